"""Writes src/pagelens/vm/_tables.py from an unpacked kernel source tree.

    tools/gen_tables.py /path/to/linux-7.2 [-o FILE]

Facts only (names and numbers of the user-space interface): system calls from syscall_64.tbl, argument names
from SYSCALL_DEFINE, PROT/MAP/MADV/… from the uapi headers, VmFlags from show_smap_vma_flags, page flags
from kernel-page-flags.h. The newest kernel at hand is the right source: numbers are only ever added.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
HEADERS = (
    "include/uapi/asm-generic/mman-common.h",
    "include/uapi/asm-generic/mman.h",
    "include/uapi/linux/mman.h",
    "arch/x86/include/uapi/asm/mman.h",
)
# Where the same name is defined more than once, x86-64's file wins.
SOURCE_DIRS = ("mm", "kernel", "fs", "ipc", "net", "io_uring", "security", "block", "arch/x86")
# Memory-related calls whose source (io_uring/) Debian's partial trees lack.
EXTRA = {"io_uring_setup": ("entries", "p"), "io_uring_register": ("fd", "opcode", "arg", "nr_args")}
NUMBER = re.compile(r"^#define\s+([A-Z][A-Z0-9_]*)\s+(0x[0-9a-fA-F]+|\d+)(?=\s|$)", re.MULTILINE)


def defines(tree: Path, files: tuple[str, ...]) -> dict[str, int]:
    """NAME -> value of all plain numeric #defines."""
    out: dict[str, int] = {}
    for name in files:
        for key, value in NUMBER.findall((tree / name).read_text()):
            out[key] = int(value, 0)
    return out


def prefixed(names: dict[str, int], prefix: str, without: tuple[str, ...] = ()) -> dict[int, str]:
    """value -> name of the names that start with `prefix`."""
    found = {v: k for k, v in names.items() if k.startswith(prefix) and k not in without}
    return dict(sorted(found.items()))


def syscalls(tree: Path) -> dict[int, tuple[str, str]]:
    """number -> (name, entry point)."""
    out = {}
    for line in (tree / "arch/x86/entry/syscalls/syscall_64.tbl").read_text().splitlines():
        fields = line.split()
        if len(fields) >= 3 and fields[0].isdigit() and fields[1] in ("common", "64"):
            out[int(fields[0])] = (fields[2], fields[3] if len(fields) > 3 else "")
    return out


def arguments(tree: Path) -> dict[str, tuple[str, ...]]:
    """entry point without sys_ -> argument names, from SYSCALL_DEFINEn(name, type, arg, …)."""
    found: dict[str, tuple[str, ...]] = {}
    pattern = re.compile(r"^SYSCALL_DEFINE(\d)\(([^{]*?)\)\s*\{?$", re.MULTILINE | re.DOTALL)
    files = [p for d in SOURCE_DIRS for p in sorted((tree / d).rglob("*.c"))]
    for path in files:
        if "/um/" in str(path) or path.name == "nommu.c":
            continue
        text = path.read_text(errors="replace")
        if "SYSCALL_DEFINE" not in text:
            continue
        for count, body in pattern.findall(text):
            parts = [re.sub(r"/\*.*?\*/", "", p, flags=re.DOTALL).strip() for p in body.split(",")]
            names = tuple(parts[2::2])
            if len(names) == int(count) and (parts[0] not in found or "arch/x86" in str(path)):
                found[parts[0]] = names
    return found


# Meanings are ours (kernel source packages may lack Documentation/); codes without one get their VM_ name.
MEANING = {
    "rd": "readable", "wr": "writable", "ex": "executable", "sh": "shared", "mr": "may be made readable",
    "mw": "may be made writable", "me": "may be made executable", "ms": "may be shared",
    "gd": "stack: grows down", "pf": "pure frame-number range", "lo": "locked in memory",
    "io": "device memory", "sr": "sequential-read advice", "rr": "random-read advice",
    "dc": "not copied on fork",
    "de": "not expanded by mremap", "ac": "counted in the commit limit", "nr": "no swap space reserved",
    "ht": "hugetlb pages", "sf": "synchronous faults (DAX)", "ar": "architecture's own flag",
    "wf": "wiped on fork", "dd": "not in core dumps", "sd": "soft-dirty as a whole",
    "mm": "may hold pages and bare frames", "hg": "huge-page advice", "nh": "no huge pages",
    "mg": "KSM may merge", "um": "userfaultfd: missing pages", "uw": "userfaultfd: write protection",
    "ui": "userfaultfd: minor faults", "ss": "shadow stack", "sl": "sealed", "lf": "locked when faulted in",
    "dp": "dropped under memory pressure", "gu": "may hold guard pages",
}  # fmt: skip


def vm_flags(tree: Path) -> dict[str, str]:
    """Two-letter code of smaps -> meaning."""
    source = (tree / "fs/proc/task_mmu.c").read_text()
    codes = re.findall(r"\[ilog2\((VM_\w+)\)\]\s*=\s*\"(\w\w)\"", source)
    return {code: MEANING.get(code, name) for name, code in codes}


def page_flags(tree: Path) -> dict[int, str]:
    """Bit -> KPF_ name without the prefix."""
    files = ("include/uapi/linux/kernel-page-flags.h", "include/linux/kernel-page-flags.h")
    names = defines(tree, files)
    return {v: k[4:] for k, v in sorted(names.items(), key=lambda item: item[1]) if k.startswith("KPF_")}


def literal(name: str, kind: str, value: dict[object, object]) -> str:
    """A dict as Python source, one entry a line."""
    rows = "\n".join(f"    {k!r}: {v!r}," for k, v in value.items())
    return f"{name}: {kind} = {{\n{rows}\n}}\n"


def render(tree: Path) -> str:
    """The module's text."""
    makefile = (tree / "Makefile").read_text()
    version = ".".join(re.findall(r"^(?:VERSION|PATCHLEVEL) = (\d+)$", makefile, re.MULTILINE))
    names = defines(tree, HEADERS)
    calls = syscalls(tree)
    args = arguments(tree)
    args.update(EXTRA)
    by_call = {
        name: args[entry.removeprefix("sys_")]
        for name, entry in calls.values()
        if entry.removeprefix("sys_") in args
    }
    d: list[str] = [
        f'"""Generated by tools/gen_tables.py from Linux {version}; do not edit."""\n',
        "from __future__ import annotations\n",
        literal("SYSCALLS", "dict[int, str]", {n: name for n, (name, _) in calls.items()}),
        literal("SYSCALL_ARGS", "dict[str, tuple[str, ...]]", by_call),
        literal("PROT", "dict[int, str]", prefixed(names, "PROT_", ("PROT_NONE",))),
        literal(
            "MAP", "dict[int, str]", prefixed(names, "MAP_", ("MAP_FILE", "MAP_TYPE", "MAP_SHARED_VALIDATE"))
        ),
        literal("MADV", "dict[int, str]", prefixed(names, "MADV_")),
        literal("MREMAP", "dict[int, str]", prefixed(names, "MREMAP_")),
        literal("MCL", "dict[int, str]", prefixed(names, "MCL_")),
        literal("MS", "dict[int, str]", prefixed(names, "MS_")),
        literal("VM_FLAGS", "dict[str, str]", vm_flags(tree)),
        literal("PAGE_FLAGS", "dict[int, str]", page_flags(tree)),
    ]
    return "\n".join(d)


def main() -> int:
    """Generate, format, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("tree", type=Path, help="unpacked kernel source")
    parser.add_argument("-o", "--output", type=Path, default=ROOT / "src/pagelens/vm/_tables.py")
    args = parser.parse_args()
    if not (args.tree / "arch/x86/entry/syscalls/syscall_64.tbl").exists():
        sys.stderr.write(f"{args.tree} is no kernel source tree\n")
        return 2
    args.output.write_text(render(args.tree))
    subprocess.run(["ruff", "format", "-q", str(args.output)], check=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
