"""The guests' root: one ext4 image, made once, shared by all kernels and all guests.

Each guest writes to a throw-away overlay of it (qemu's snapshot=on), so it has a real ext4 for swap files and
file mappings and leaves nothing behind. What changes with every commit (pagelens, its tests) is not in it:
see image.py.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

from vmtest import newer, packages
from vmtest.cache import cache_dir, locked
from vmtest.errors import VmtestError

VERSION = "5"  # change it when this file makes something else of the same packages
VENV = Path("/opt/venv")
CRIU = Path("/opt/criu")
SIZE_MB = 6144  # sparse: what is not written takes no space
_KEEP = 2  # images kept for work trees that differ in their packages

_CRIU_WRAPPER = """#!/bin/sh
# CRIU of a newer Debian, with the C library that it was built for.
exec /opt/criu/usr/lib64/ld-linux-x86-64.so.2 \\
    --library-path /opt/criu/usr/lib/x86_64-linux-gnu  /opt/criu/usr/sbin/criu "$@"
"""


def root_image() -> Path:
    """The image for this machine's packages and virtual environment; built when there is none yet."""
    installed = packages.installed_closure()
    criu_version, criu = newer.tree("criu")
    key = hashlib.sha256(
        repr((VERSION, sorted(installed.items()), packages.environment_stamp(), criu_version)).encode()
    ).hexdigest()[:16]
    directory = cache_dir() / "images"
    directory.mkdir(exist_ok=True)
    image = directory / f"root-{key}.ext4"
    with locked("images"):
        if not image.exists():
            print("vmtest: making the guests' root image (once)", file=sys.stderr, flush=True)
            with tempfile.TemporaryDirectory(dir=directory, prefix="stage-") as stage:
                _fill(Path(stage), installed, criu)
                _make(Path(stage), image)
            for old in sorted(directory.glob("root-*.ext4"), key=lambda p: p.stat().st_mtime)[:-_KEEP]:
                old.unlink()
        os.utime(image)
    return image


def _place(source: Path, target: Path) -> None:
    # A hard link where the file system allows it: nothing is copied twice.
    target.parent.mkdir(parents=True, exist_ok=True)
    if target.is_symlink() or target.exists():
        return
    if source.is_symlink():
        target.symlink_to(source.readlink())
        return
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def _tree(source: Path, target: Path, skip: set[str]) -> None:
    for directory, names, files in os.walk(source):
        here = target / Path(directory).relative_to(source)
        here.mkdir(parents=True, exist_ok=True)
        links = [n for n in names if Path(directory, n).is_symlink()]
        names[:] = [n for n in names if n not in skip and n not in links]
        for name in [*files, *links]:
            _place(Path(directory, name), here / name)


def _fill(stage: Path, installed: dict[str, str], criu: Path) -> None:
    for merged in ("bin", "sbin", "lib", "lib64"):
        (stage / "usr" / merged).mkdir(parents=True)
        (stage / merged).symlink_to(f"usr/{merged}")
    for path in packages.files_of(installed):
        if path.is_dir() and not path.is_symlink():
            (stage / path.relative_to("/")).mkdir(parents=True, exist_ok=True)
        elif path.is_symlink() or path.is_file():
            _place(path, stage / path.relative_to("/"))
    _alternatives(stage)
    prefix = packages.python_prefix()
    if str(prefix) == "/usr":
        _tree(
            Path(sysconfig.get_path("stdlib")),
            stage / sysconfig.get_path("stdlib")[1:],
            {"test", "__pycache__"},
        )
    else:
        _tree(
            prefix,
            stage / prefix.relative_to("/"),
            {"test", "site-packages", "idlelib", "share", "include"}
            | {p.name for p in (prefix / "lib").glob("python*/config-*")},
        )
    _place(Path(os.path.realpath(sys.executable)), stage / os.path.realpath(sys.executable)[1:])
    # Compilers of Python code and the like are not run in a guest.
    skip = {"mypy", "mypyc", "ruff", "pip", "mesonbuild", "ninja", "pandas-stubs", "debugpy"}
    _tree(Path(sys.prefix), stage / VENV.relative_to("/"), skip)
    for script in (stage / VENV.relative_to("/") / "bin").iterdir():
        if not script.is_symlink() and script.stat().st_size < 4096:
            # A console script names the interpreter by its path here; ours is another.
            text = script.read_text(errors="replace")
            script.unlink()
            script.write_text(text.replace(str(sys.prefix), str(VENV)))
            script.chmod(0o755)
    site = next((stage / VENV.relative_to("/") / "lib").glob("python*/site-packages"))
    for editable in site.glob("pagelens*"):
        shutil.rmtree(editable) if editable.is_dir() else editable.unlink()
    (site / "pagelens").mkdir()  # image.py's disk is bound here
    command = stage / VENV.relative_to("/") / "bin" / "pagelens"
    command.unlink(missing_ok=True)
    command.write_text(
        f"#!{VENV}/bin/python\nimport sys\nfrom pagelens.cli.main import entry\nsys.exit(entry())\n"
    )
    command.chmod(0o755)
    # All byte code is made here: under emulation, compiling what a command imports takes minutes.
    subprocess.run(
        [
            *(
                sys.executable,
                "-W",
                "ignore",
                "-m",
                "compileall",
                "-qq",
                "-j",
                "0",
                "-s",
                str(stage),
                "-p",
                "/",
            ),
            *(str(site), str(stage / sysconfig.get_path("stdlib")[1:])),
        ],
        check=False,  # some files of test suites are no Python, on purpose
    )
    _tree(criu, stage / CRIU.relative_to("/"), {"doc", "man", "locale"})
    wrapper = stage / "usr/sbin/criu"
    wrapper.unlink(missing_ok=True)
    wrapper.write_text(_CRIU_WRAPPER)
    wrapper.chmod(0o755)
    _etc(stage)


def _alternatives(stage: Path) -> None:
    # awk, c99 and their like point through /etc/alternatives, which belongs to no package.
    source = Path("/etc/alternatives")
    if source.is_dir():
        for link in source.iterdir():
            if link.is_symlink() and (stage / str(link.readlink()).lstrip("/")).exists():
                _place(link, stage / "etc/alternatives" / link.name)
    awk = stage / "usr/bin/awk"
    if not awk.exists() and (stage / "usr/bin/mawk").exists():
        awk.unlink(missing_ok=True)
        awk.symlink_to("mawk")


def _etc(stage: Path) -> None:
    etc = stage / "etc"
    etc.mkdir(exist_ok=True)
    for name, text in {
        "passwd": "root:x:0:0:root:/root:/bin/bash\nnobody:x:65534:65534:nobody:/:/usr/sbin/nologin\n",
        "group": "root:x:0:\nnogroup:x:65534:\n",
        "hosts": "127.0.0.1 localhost\n",
        "hostname": "guest\n",
        "fstab": "",
        "mtab": "",
    }.items():
        (etc / name).unlink(missing_ok=True)
        (etc / name).write_text(text)
    shutil.copy2("/etc/ld.so.cache", etc / "ld.so.cache")
    for name in ("proc", "sys", "dev", "run", "tmp", "root", "var/tmp", "mnt", "repo"):
        (stage / name).mkdir(parents=True, exist_ok=True)
    (stage / "tmp").chmod(0o1777)
    (stage / "var/tmp").chmod(0o1777)


def _make(stage: Path, image: Path) -> None:
    new = image.with_suffix(".new")
    new.unlink(missing_ok=True)
    command = ["mke2fs", "-q", "-t", "ext4", "-m", "0", "-E", "root_owner=0:0"]
    environment = os.environ | {"PATH": os.environ.get("PATH", "") + ":/usr/sbin:/sbin"}
    done = subprocess.run(
        [*command, "-d", str(stage), str(new), f"{SIZE_MB}M"],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
    )
    if done.returncode:
        raise VmtestError(f"mke2fs could not make the guests' root: {done.stderr.strip()}")
    new.rename(image)
