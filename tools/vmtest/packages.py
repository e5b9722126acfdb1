"""What a guest's root is made of: this machine's own Debian packages, Python, and CRIU.

The files of installed packages are taken as they lie here, so a guest's C library and tools are the ones that
the subject programs and the virtual environment were made with. CRIU comes from a newer Debian (newer.py).
"""

from __future__ import annotations

import hashlib
import re
import subprocess
import sys
from pathlib import Path

from vmtest.errors import VmtestError

# With what they depend on. gcc: a test that compiles something odd still works in a guest.
SEEDS = (
    "bash",
    "coreutils",
    "dash",
    "util-linux",
    "mount",
    "procps",
    "findutils",
    "grep",
    "sed",
    "gawk",
    "mawk",
    "tar",
    "gzip",
    "diffutils",
    "iproute2",
    "gcc",
    "libc6-dev",
    "gdb",
    "strace",
    "busybox-static",
    "e2fsprogs",
    "kmod",
    "numactl",
    "libbpf1",
    "libdw1",
    "elfutils",
    "redis-server",
)
# Of a package's files, what no program needs.
_NOT = re.compile(
    r"/usr/share/(doc|man|info|locale|lintian|bug|gtk-doc)/|/usr/lib/python3/dist-packages/.*/tests/"
)


def _dpkg(*args: str) -> str:
    try:
        return subprocess.run(["dpkg-query", *args], capture_output=True, text=True, check=False).stdout
    except FileNotFoundError:
        raise VmtestError("dpkg-query is not here: guests are made of Debian packages") from None


def installed_closure(seeds: tuple[str, ...] = SEEDS) -> dict[str, str]:
    """name:arch -> version of the installed packages among `seeds`, and all that they depend on."""
    depends: dict[str, str] = {}
    versions: dict[str, str] = {}
    names: dict[str, str] = {}
    table = _dpkg("-W", "-f", "${binary:Package}\t${Version}\t${Pre-Depends}, ${Depends}\t${Provides}\n")
    for line in table.splitlines():
        package, version, needs, provides = line.split("\t")
        versions[package], depends[package] = version, needs
        names.setdefault(package.partition(":")[0], package)
        for virtual in provides.split(","):
            names.setdefault(virtual.split("(")[0].strip(), package)
    todo, done = [s for s in seeds if s in names], {}
    while todo:
        package = names[todo.pop()]
        if package in done:
            continue
        done[package] = versions[package]
        for group in depends[package].split(","):
            options = (re.split(r"[ (:]", o.strip(), maxsplit=1)[0] for o in group.split("|"))
            todo += [o for o in options if o in names][:1]
    return done


def files_of(packages: dict[str, str]) -> list[Path]:
    """Every file, link and directory of installed packages."""
    listed = _dpkg("-L", *packages).splitlines()
    return sorted({Path(p) for p in listed if p.startswith("/") and p != "/." and not _NOT.search(p)})


def python_prefix() -> Path:
    """Where the interpreter under the virtual environment lives."""
    return Path(sys.base_prefix)


def environment_stamp() -> str:
    """Changes when the virtual environment's packages change."""
    site = Path(next(p for p in sys.path if p.endswith("site-packages")))
    names = sorted(p.name for p in site.glob("*.dist-info"))
    return hashlib.sha256("\n".join([sys.version, *names]).encode()).hexdigest()
