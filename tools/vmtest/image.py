"""What a boot adds to the root image: the initramfs with the kernel's modules, and a small disk with the work
tree.

The disk is made anew for each run (a few MB, well under a second). It is mounted where the work tree lies on
the host, so that paths in debug information hold; src/pagelens on it is bound over the virtual environment's
site-packages, so tests in a guest use an installed package.
"""

from __future__ import annotations

import compileall
import lzma
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from vmtest.errors import VmtestError
from vmtest.fetch import Kernel

GUEST = Path(__file__).parent / "guest"
BUSYBOX = Path("/bin/busybox")
# (module, options): the way to the disks and ports, then what tests ask for. What is built in is simply not
# found.
MODULES = (
    ("virtio_pci", ""),
    ("virtio_blk", ""),
    ("virtio_console", ""),
    ("zram", "num_devices=1"),
    ("brd", "rd_nr=1 rd_size=65536"),
    ("loop", ""),
    ("overlay", ""),
    # CRIU asks for these.
    ("unix_diag", ""),
    ("tcp_diag", ""),
    ("udp_diag", ""),
    ("raw_diag", ""),
    ("packet_diag", ""),
    ("netlink_diag", ""),
    ("nf_tables", ""),
    ("tun", ""),
    ("veth", ""),
)


def _module_files(modules: Path) -> dict[str, Path]:
    found: dict[str, Path] = {}
    for path in (modules / "kernel").rglob("*.ko*"):
        name = path.name.split(".ko")[0].replace("-", "_")
        found[name] = path
    return found


def _content(path: Path) -> bytes:
    data = path.read_bytes()
    if path.suffix == ".xz":
        return lzma.decompress(data)
    if path.suffix == ".ko":
        return data
    raise VmtestError(f"cannot unpack the module {path.name}")


def _load_order(modules: Path | None) -> dict[str, tuple[bytes, str]]:
    # name -> (content, options) in an order in which each finds what it depends on.
    files = _module_files(modules) if modules else {}
    order: dict[str, tuple[bytes, str]] = {}

    def add(name: str, options: str) -> None:
        if name in order or name not in files:
            return
        data = _content(files[name])
        match = re.search(rb"\0depends=([^\0]*)\0", data)
        for needed in match[1].decode().split(",") if match and match[1] else []:
            add(needed.replace("-", "_"), "")
        order[name] = (data, options)

    for name, options in MODULES:
        add(name, options)
    return order


class _Cpio:
    # A newc archive (Documentation/driver-api/early-userspace/buffer-format.rst): written here, so no cpio is
    # run and no device node needs privilege.
    def __init__(self) -> None:
        self._parts: list[bytes] = []
        self._inode = 0

    def add(self, name: str, mode: int, data: bytes = b"", device: tuple[int, int] = (0, 0)) -> None:
        self._inode += 1
        encoded = name.encode() + b"\0"
        fields = (self._inode, mode, 0, 0, 1, 0, len(data), 0, 0, *device, len(encoded), 0)
        head = b"070701" + b"".join(b"%08X" % f for f in fields) + encoded
        self._parts.append(head + b"\0" * (-len(head) % 4) + data + b"\0" * (-len(data) % 4))

    def bytes(self) -> bytes:
        self.add("TRAILER!!!", 0)
        return b"".join(self._parts)


def initramfs(kernel: Kernel, target: Path) -> None:
    """Writes the initramfs: busybox, the modules in load order, guest/init. Not compressed: unpacking costs
    more."""
    if not BUSYBOX.exists():
        raise VmtestError("busybox is missing: apt-get install busybox-static")
    archive = _Cpio()
    for directory in ("bin", "dev", "proc", "sys", "modules", "root", "config"):
        archive.add(directory, 0o040755)
    archive.add("dev/console", 0o020600, device=(5, 1))
    archive.add("bin/busybox", 0o100755, BUSYBOX.read_bytes())
    archive.add("bin/sh", 0o120777, b"busybox")
    order = _load_order(kernel.modules)
    for name, (data, _) in order.items():
        archive.add(f"modules/{name}.ko", 0o100644, data)
    lines = "".join(f"{name}.ko {options}\n" for name, (_, options) in order.items())
    archive.add("modules/order", 0o100644, lines.encode())
    archive.add("init", 0o100755, (GUEST / "init").read_bytes())
    archive.add("stage2", 0o100755, (GUEST / "stage2").read_bytes())
    target.write_bytes(archive.bytes())


def _work_tree(root: Path) -> list[Path]:
    done = subprocess.run(
        ["git", "-C", str(root), "ls-files", "-co", "--exclude-standard", "-z"],
        capture_output=True,
        check=False,
    )
    if done.returncode == 0:
        return [Path(os.fsdecode(p)) for p in done.stdout.split(b"\0") if p]
    # An unpacked archive instead of a clone.
    skip = {".venv", "build", "build-asan", "dist", ".git", "__pycache__"}
    found = []
    for directory, names, files in os.walk(root):
        names[:] = [n for n in names if n not in skip]
        found += [Path(directory, f).relative_to(root) for f in files]
    return found


def _subjects(root: Path, target: Path) -> None:
    # Compiled here: gcc under emulation takes seconds for each.
    target.mkdir(parents=True)
    done = subprocess.run(
        [sys.executable, "-m", "support.subjects", str(target)],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"PYTHONPATH": str(root / "tests")},
    )
    if done.returncode:
        raise VmtestError(f"a subject program does not compile: {done.stderr.strip()[-400:]}")


def work_disk(
    root: Path, kernel: Kernel, command: list[str], environment: dict[str, str], stage: Path, target: Path
) -> None:
    """Writes the disk with the work tree, the package, the command and its environment."""
    for compiled_here in ("src/pagelens", "tools", "tests/support"):
        compileall.compile_dir(root / compiled_here, quiet=2)
    for path in _work_tree(root):
        source = root / path
        if path.parts[0] in {"src", ".git"} or not source.is_file():
            continue
        (stage / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(source, stage / path)
        # Byte code that was made here: compiling Python under emulation takes seconds.
        for compiled in source.parent.glob(f"__pycache__/{source.stem}.*.pyc"):
            (stage / path).parent.joinpath("__pycache__").mkdir(exist_ok=True)
            shutil.copy2(compiled, (stage / path).parent / "__pycache__" / compiled.name)
    own = stage / ".vmtest"
    shutil.copytree(root / "src/pagelens", own / "site/pagelens")
    _subjects(root, own / "subjects")
    if kernel.config:
        shutil.copy2(kernel.config, own / "config")
    (own / "command").write_text("exec " + shlex.join(command) + "\n")
    lines = [f"export {name}={shlex.quote(value)}\n" for name, value in environment.items()]
    (own / "environment").write_text("".join(lines))
    (own / "root").write_text(str(root) + "\n")
    size = sum(f.stat().st_size + 4096 for f in stage.rglob("*") if f.is_file())
    done = subprocess.run(
        [
            "mke2fs",
            "-q",
            "-t",
            "ext4",
            "-O",
            "^has_journal",
            "-E",
            "root_owner=0:0",
            "-d",
            str(stage),
            str(target),
            f"{size * 3 // 2 // 2**20 + 16}M",
        ],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"PATH": os.environ.get("PATH", "") + ":/usr/sbin:/sbin"},
    )
    if done.returncode:
        raise VmtestError(f"mke2fs could not make the work disk: {done.stderr.strip()}")
