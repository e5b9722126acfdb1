"""/proc/PID/maps: the vma list (fs/proc/task_mmu.c, show_map_vma; proc_pid_maps(5)).

The gate area [vsyscall] is left out: it is no vma of the address space, it lies in kernel addresses, and no
call can act on it.
Reading is not atomic: seq_file hands out about a page of text per call and the list may change in between.
The kernel resumes behind the last address that it printed, so the list never overlaps, but its parts may be
of different times; `snapshot.take` says whether the target ran meanwhile.
"""

from __future__ import annotations

from pagelens.linux.procfs import Process
from pagelens.vm.errors import DamagedInputError
from pagelens.vm.vma import Prot, Vma, VmaList

GATE = 1 << 63  # [vsyscall] lies above
_PERMS: dict[bytes, tuple[Prot, bool]] = {}


def read(proc: Process) -> VmaList:
    """The vmas of a process, from its maps."""
    return parse(proc.read("maps"))


def parse(data: bytes) -> VmaList:
    """The vmas of a maps text. Raises DamagedInputError for a line that is none."""
    out = []
    for line in data.splitlines():
        vma = parse_line(line)
        if vma.start < GATE:
            out.append(vma)
    return VmaList(out)


def parse_line(line: bytes, vm_flags: frozenset[str] | None = None) -> Vma:
    """One line of maps, or the first line of a block of smaps."""
    fields = line.split(None, 5)
    try:
        first, _, last = fields[0].partition(b"-")
        prot = _PERMS.get(fields[1]) or _perms(fields[1])
        vma = Vma(
            int(first, 16),
            int(last, 16),
            prot[0],
            prot[1],
            int(fields[2], 16),
            fields[3].decode(),
            int(fields[4]),
            _name(fields[5]) if len(fields) > 5 else "",
            vm_flags,
        )
    except (ValueError, IndexError) as exc:
        raise DamagedInputError(f"not a line of maps: {line[:120]!r}") from exc
    if vma.end <= vma.start:
        raise DamagedInputError(f"not a line of maps: {line[:120]!r}")
    return vma


def _perms(text: bytes) -> tuple[Prot, bool]:
    if len(text) != 4 or any(c not in allowed for c, allowed in zip(text, _LETTERS, strict=True)):
        raise ValueError(text)
    _PERMS[text] = Vma.parse_perms(text.decode())
    return _PERMS[text]


_LETTERS = (b"r-", b"w-", b"x-", b"sp")


def _name(text: bytes) -> str:
    # show_map_vma escapes a newline in a path as \012 (seq_file_path); nothing else is escaped.
    name = text.decode(errors="surrogateescape")
    return name.replace("\\012", "\n") if "\\012" in name else name
