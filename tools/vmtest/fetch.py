"""Debian's kernels: which package, fetched once, checked by hash on each use.

The index (index.json in the cache) remembers what was fetched, so that a run with a warm cache needs no
network and does not move to a newer kernel by itself: `./dev test-kernels --update` does.
"""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vmtest.apt import Apt, natural, unpack
from vmtest.cache import kernels_dir, locked, sha256
from vmtest.errors import VmtestError

DEFAULT = ("6.1", "6.12", "7.2")
# The first package is the kernel itself; {r} is its release. Debian split the package up in 7.x, where
# linux-image is an empty package: so the split layout is tried first.
_LAYOUTS = (
    (r"linux-binary-(?P<r>{v}\.\d+\S*-cloud-amd64)", ("linux-modules-{r}", "linux-base-{r}")),
    (r"linux-image-(?P<r>{v}\.\d+\S*-cloud-amd64)", ()),
)


@dataclass(frozen=True)
class Kernel:
    """A kernel ready to boot. `modules` is the directory with kernel/ in it, or None (all built in)."""

    name: str
    release: str
    image: Path
    modules: Path | None
    config: Path | None


def kernel(name: str, *, update: bool = False) -> Kernel:
    """The kernel called `name`: a version such as 6.12, or the path of a bzImage.

    Raises VmtestError with one sentence where there is none.
    """
    if "/" in name or Path(name).is_file():
        return _from_path(Path(name))
    if not re.fullmatch(r"\d+\.\d+", name):
        raise VmtestError(f"'{name}' is neither a version such as 6.12 nor the path of a bzImage")
    with locked("kernels"):
        index = _load()
        entry = index.get(name)
        if entry is None or update or not _whole(entry):
            entry = _download(name)
            index[name] = entry
            (kernels_dir() / "index.json").write_text(json.dumps(index, indent=1, sort_keys=True) + "\n")
        return _unpacked(name, entry)


def _from_path(path: Path) -> Kernel:
    if not path.is_file():
        raise VmtestError(f"no kernel image at {path}")
    # A kernel of one's own: its modules, if any, are looked for where `make modules_install` beside it puts
    # them; its configuration beside it, or in the tree that it was built in (arch/x86/boot/bzImage).
    path = path.resolve()
    release = _release(path)
    modules = path.parent / "lib/modules" / release
    places = (path.parent / f"config-{release}", path.parent / "config", path.parent / ".config")
    config = next((c for c in (*places, *(p / ".config" for p in path.parents[3:4])) if c.is_file()), None)
    return Kernel(path.name, release, path, modules if (modules / "kernel").is_dir() else None, config)


def _release(image: Path) -> str:
    # Documentation/arch/x86/boot.rst: "HdrS" at 0x202; the word at 0x20e, plus 0x200, is where the version string
    # is, which begins with the release.
    with image.open("rb") as file:
        head = file.read(1 << 16)
    if head[0x202:0x206] != b"HdrS":
        raise VmtestError(f"{image} is no bzImage")
    at = int.from_bytes(head[0x20E:0x210], "little") + 0x200
    return head[at : at + 100].split(b"\0")[0].decode(errors="replace").split(" ")[0]


def _load() -> dict[str, Any]:
    try:
        index: dict[str, Any] = json.loads((kernels_dir() / "index.json").read_text())
    except FileNotFoundError:
        return {}
    return index


def _whole(entry: dict[str, Any]) -> bool:
    files = [(kernels_dir() / p["file"], p["sha256"]) for p in entry["packages"]]
    return all(f.exists() and sha256(f) == digest for f, digest in files)


def _download(name: str) -> dict[str, Any]:
    apt = Apt()
    apt.update()
    for layout, more in _LAYOUTS:
        pattern = layout.format(v=re.escape(name))
        found = [re.fullmatch(pattern, n) for n in apt.names(pattern)]
        # A backport of this kernel for an older release is not the kernel that this release ships.
        ours = [m for m in found if m and not (name == "6.12" and "deb12" in m["r"])]
        if not ours:
            continue
        best = max(ours, key=lambda m: natural(m["r"]))
        names = [best[0], *(n.format(r=best["r"]) for n in more)]
        into = kernels_dir() / "packages"
        packages = apt.download(names, into)
        return {
            "release": best["r"],
            "packages": [
                {
                    "name": p.name,
                    "version": p.version,
                    "sha256": p.sha256,
                    "file": str(p.file.relative_to(kernels_dir())),
                }
                for p in packages
            ],
        }
    raise VmtestError(f"Debian has no cloud kernel {name} now")


def _unpacked(name: str, entry: dict[str, Any]) -> Kernel:
    release = entry["release"]
    tree = kernels_dir() / "trees" / release
    stamp = tree / ".unpacked"
    hashes = "\n".join(p["sha256"] for p in entry["packages"])
    if not stamp.exists() or stamp.read_text() != hashes:
        shutil.rmtree(tree, ignore_errors=True)
        for package in entry["packages"]:
            unpack(kernels_dir() / package["file"], tree)
        stamp.write_text(hashes)
    modules = next(
        d for d in (tree / "usr/lib/modules" / release, tree / "lib/modules" / release) if d.is_dir()
    )
    image = next(f for f in (modules / "vmlinuz", tree / "boot" / f"vmlinuz-{release}") if f.exists())
    config = next(f for f in (modules / "config", tree / "boot" / f"config-{release}") if f.exists())
    return Kernel(name, release, image, modules, config)
