"""Operations as data: what a program does to its address space, one value an operation.

The same value drives the model (`model.runner`), the oracle child (`proof.oracle`) and the scenario text
(`model.scenario`), so that nobody can do something slightly different on one side. Addresses are names with
an offset (`Place`), because mmap may answer differently on two kernels and the rest must still mean the same.

Rejected: one class for each system call (thirty classes, each with its own parser, printer and generator).
"""

from __future__ import annotations

import errno
from dataclasses import dataclass

from pagelens.vm.units import PAGE_SIZE

PROTS = {"r": 1, "w": 2, "x": 4}
SHARED, PRIVATE, FIXED, ANONYMOUS = 0x01, 0x02, 0x10, 0x20
# include/uapi/asm-generic/mman-common.h and mman.h
MAP_WORDS = {
    "shared": 0x01,
    "private": 0x02,
    "shared_validate": 0x03,
    "droppable": 0x08,
    "fixed": 0x10,
    "anon": 0x20,
    "32bit": 0x40,
    "growsdown": 0x100,
    "locked": 0x2000,
    "noreserve": 0x4000,
    "populate": 0x8000,
    "nonblock": 0x10000,
    "stack": 0x20000,
    "fixed_noreplace": 0x100000,
}
MREMAP_WORDS = {"maymove": 1, "fixed": 2, "dontunmap": 4}
MSYNC_WORDS = {"async": 1, "invalidate": 2, "sync": 4}
MLOCKALL_WORDS = {"current": 1, "future": 2, "onfault": 4}
MLOCK2_WORDS = {"onfault": 1}
FALLOCATE_WORDS = {"keep": 1, "punch": 2}
SHMAT_WORDS = {"rnd": 0x2000, "remap": 0x4000}
RLIMIT_WORDS = {"data": 2, "stack": 3, "memlock": 8, "as": 9}
UNLIMITED = (1 << 64) - 1
# Bits that mprotect takes beside rights: `rw+growsdown`.
PROT_WORDS = {"sem": 8, "bad": 0x10, "growsdown": 0x0100_0000, "growsup": 0x0200_0000}
ADVICE_WORDS = {
    "normal": 0,
    "random": 1,
    "sequential": 2,
    "willneed": 3,
    "dontneed": 4,
    "free": 8,
    "remove": 9,
    "dontfork": 10,
    "dofork": 11,
    "mergeable": 12,
    "unmergeable": 13,
    "hugepage": 14,
    "nohugepage": 15,
    "dontdump": 16,
    "dodump": 17,
    "wipeonfork": 18,
    "keeponfork": 19,
    "cold": 20,
    "pageout": 21,
    "populate_read": 22,
    "populate_write": 23,
    "dontneed_locked": 24,
    "collapse": 25,
    "guard_install": 102,
    "guard_remove": 103,
}
SIGNALS = {"SEGV": 11, "BUS": 7, "ILL": 4, "TRAP": 5, "FPE": 8}
SIGNAL_NAMES = {number: name for name, number in SIGNALS.items()}
# si_code of each, without the signal's name before it (sigaction(2)).
SI_CODES = {"SEGV": {"MAPERR": 1, "ACCERR": 2, "PKUERR": 4}, "BUS": {"ADRALN": 1, "ADRERR": 2}}


def disk_name(result: str) -> str:
    """What maps calls a file on disk of a program (the oracle's has another path)."""
    return f"/disk:{result} (deleted)"


ACCESSES = {"read": "r", "write": "w", "exec": "x"}
# Operations that take a range of pages first.
RANGED = frozenset(
    {
        "munmap",
        "mprotect",
        "mremap",
        "madvise",
        "mlock",
        "mlock2",
        "munlock",
        "msync",
        "read",
        "write",
        "exec",
        "peek",
        "poke",
    }
)
NAMES = RANGED | {
    "mmap",
    "brk",
    "mlockall",
    "munlockall",
    "fork",
    "vfork",
    "thread",
    "execve",
    "exit",
    "memfd",
    "disk",
    "ftruncate",
    "pwrite",
    "fallocate",
    "clear_refs",
    "shmat",
    "rlimit",
    "uncap",
}
# Those that only one process sees: after them no other process can differ.
LOCAL = frozenset(
    {"brk", "mlock", "mlock2", "munlock", "mprotect", "mlockall", "munlockall", "rlimit", "uncap"}
)

# Two regions that every scenario has. The arena's middle is a multiple of 512 GiB, so that its two halves
# lie in different page tables on every level; `heap` is where brk starts.
ARENA_PAGES = 1024
ARENA_MIDDLE = 0x1000_0000_0000
ARENA_BASE = ARENA_MIDDLE - ARENA_PAGES // 2 * PAGE_SIZE


@dataclass(frozen=True, slots=True)
class Place:
    """An address: `offset` bytes from the start of a named region; region "" is absolute."""

    region: str
    offset: int = 0

    def moved(self, offset: int) -> Place:
        """The place `offset` bytes further on."""
        return Place(self.region, self.offset + offset)

    def __str__(self) -> str:
        base = self.region or f"{self.offset & ~(PAGE_SIZE - 1):#x}"
        page, rest = divmod(self.offset, PAGE_SIZE) if self.region else (0, self.offset % PAGE_SIZE)
        return f"{base}[{page}]" + (f"+{rest}" if rest else "")


@dataclass(frozen=True, slots=True)
class Op:
    """One operation of process (or thread) `proc`.

    name: one of NAMES. `peek` and `poke` are process_vm_readv and process_vm_writev by another process;
    `shmat` makes a System V segment, attaches it and marks it for removal; `uncap` gives up all capabilities;
    after `vfork` its caller stands still until the child is gone or has done `execve` (of the oracle itself).
    result: the name that its result gets (a region, file, process or thread). place,
    length: bytes. flags: the system call's own flags, advice or level of clear_refs. new_place, new_length:
    mremap's target. file, offset: file name and byte offset.
    """

    name: str
    proc: str = "main"
    result: str = ""
    place: Place | None = None
    length: int = 0
    prot: int = 0
    flags: int = 0
    new_place: Place | None = None
    new_length: int = 0
    file: str = ""
    offset: int = 0

    def __str__(self) -> str:
        return format_op(self)


@dataclass(frozen=True, slots=True)
class Outcome:
    """What an operation did, as its caller sees it.

    result: return value or -errno (an access: pages reached). faults: minor and major together, of the
    calling thread. signal, code, addr: of the access that ended in a signal, else 0.
    """

    result: int
    faults: int = 0
    signal: int = 0
    code: int = 0
    addr: int = 0

    def text(self, op: Op | None = None) -> str:
        """For people; an access counts pages, a call has its return value."""
        if op is not None and op.name in ACCESSES:
            text = f"{self.result} page{'' if self.result == 1 else 's'}"
        elif -4096 < self.result < 0:
            text = errno_name(self.result)
        else:
            text = f"{self.result:#x}" if self.result > 9 else str(self.result)
        text += f", {self.faults} fault{'' if self.faults == 1 else 's'}"
        if self.signal:
            text += f", {self.signal_text()} at {self.addr:#x}"
        return text

    def signal_text(self) -> str:
        """The signal with its si_code, such as SIGSEGV (SEGV_MAPERR)."""
        name = SIGNAL_NAMES.get(self.signal, str(self.signal))
        codes = {value: f"{name}_{code}" for code, value in SI_CODES.get(name, {}).items()}
        return f"SIG{name} ({codes.get(self.code, f'si_code {self.code}')})"

    def __str__(self) -> str:
        return self.text()


def errno_name(result: int) -> str:
    """ "ENOMEM" of -12; the number where it has no name."""
    if -result == errno.EOPNOTSUPP:  # Python knows the other name of the number
        return "EOPNOTSUPP"
    return errno.errorcode.get(-result, str(result))


def prot_text(prot: int) -> str:
    """ "rw" of 3, "none" of 0; what is no right follows: "rw+growsdown"."""
    rights = "".join(letter for letter, bit in PROTS.items() if prot & bit) or "none"
    return "+".join([rights, *(word for word, bit in PROT_WORDS.items() if prot & bit)])


def flag_words(flags: int, words: dict[str, int]) -> list[str]:
    """The words of `flags`; bits that have none come as "flags=0x…"."""
    out = []
    for word, bit in words.items():
        if (
            word == "shared_validate"
            or not flags & bit
            or (word in ("shared", "private") and flags & 3 != bit)
        ):
            continue
        out.append(word)
        flags &= ~bit
    if flags:
        out.append(f"flags={flags:#x}")
    return out


def range_text(place: Place, length: int) -> str:
    """`a[3]` (one page), `a[3:5]`; a byte offset and a length in bytes where they are not whole pages."""
    text = str(place)
    if length == PAGE_SIZE and text.endswith("]"):
        return text
    if length % PAGE_SIZE or not text.endswith("]"):
        return f"{text}~{length}"
    head, _, first = text[:-1].rpartition("[")
    return f"{head}[{first}:{int(first) + length // PAGE_SIZE}]"


def size_text(length: int) -> str:
    """Pages; `N~` bytes where they are not whole pages."""
    return str(length // PAGE_SIZE) if length % PAGE_SIZE == 0 else f"~{length}"


def format_op(op: Op) -> str:
    """One line of scenario text; `scenario.parse_op` reads it back to an equal Op."""
    words: list[str] = []
    match op.name:
        case "mmap":
            words = [size_text(op.length)]
            if op.place is not None:
                words += ["at", str(op.place)]
            words += [prot_text(op.prot), *flag_words(op.flags, MAP_WORDS)]
            if op.file:
                words += ["file", str(Place(op.file, op.offset))]
        case "mprotect":
            words = [prot_text(op.prot)]
        case "mremap":
            words = [size_text(op.new_length), *flag_words(op.flags, MREMAP_WORDS)]
            if op.new_place is not None:
                words += ["to", str(op.new_place)]
        case "madvise":
            names = {number: word for word, number in ADVICE_WORDS.items()}
            words = [names.get(op.flags, f"flags={op.flags:#x}")]
        case "brk":
            words = [str(op.place)]
        case "mlock2":
            words = flag_words(op.flags, MLOCK2_WORDS)
        case "mlockall":
            words = flag_words(op.flags, MLOCKALL_WORDS)
        case "msync":
            words = flag_words(op.flags, MSYNC_WORDS)
        case "memfd" | "disk":
            words = [size_text(op.length)]
        case "ftruncate":
            words = [op.file, size_text(op.length)]
        case "pwrite":
            words = [range_text(Place(op.file, op.offset), op.length)]
        case "fallocate":
            words = [range_text(Place(op.file, op.offset), op.length), *flag_words(op.flags, FALLOCATE_WORDS)]
        case "clear_refs":
            words = [str(op.flags)]
        case "shmat":
            words = [size_text(op.length)]
            if op.place is not None:
                words += ["at", str(op.place)]
            words += [prot_text(op.prot), *flag_words(op.flags, SHMAT_WORDS)]
        case "rlimit":
            what = {number: word for word, number in RLIMIT_WORDS.items()}[op.flags]
            words = [what, "unlimited" if op.length == UNLIMITED else size_text(op.length)]
    if op.name in RANGED and op.place is not None:
        words.insert(0, range_text(op.place, op.length))
    head = f"{op.proc}: " if op.proc != "main" else ""
    if op.result:
        head += f"{op.result} = "
    return head + " ".join([op.name, *words])
