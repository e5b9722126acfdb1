"""Who lives where in a live process: evidence for `vm.regions`.

Nothing is stopped or traced, and no page is faulted in (`peek`). Each name rests on something that was read:

thread stacks  get_robust_list(2) gives the address of each thread's list head, which glibc keeps inside its
               struct pthread; there the descriptor's self pointer, the tid and (stackblock, size, guardsize)
               are found by value, not by offset, so glibc versions do not matter. Where that fails (another
               libc), the stack pointer of /proc/PID/task/TID/syscall names the vma that holds it.
malloc arenas  heap_info at 64 MiB boundaries: its arena pointer, size and mprotect_size must agree with the
map. big chunks     a chunk header with IS_MMAPPED whose size fits, at the start of a vma or right behind a
tenant. bss, relro     the program headers of the mapped file.

Rejected: offsets into struct pthread by glibc version (tables age), ptrace for fs_base (stops the target).
"""

from __future__ import annotations

import ctypes
import os
import struct
from collections.abc import Callable, Iterator

from pagelens.linux import elf
from pagelens.linux.peek import Peek
from pagelens.linux.procfs import Process
from pagelens.vm.errors import PagelensError
from pagelens.vm.regions import Evidence, Kind, Region, Tenant, name_regions
from pagelens.vm.units import PAGE_SIZE, format_size, page_down, page_up
from pagelens.vm.vma import Prot, Vma, VmaList

_SYS_GET_ROBUST_LIST = 274
_HEAP_MAX = 64 << 20  # HEAP_MAX_SIZE of glibc on 64 bits
_RW = Prot.READ | Prot.WRITE
_IS_MMAPPED = 2
_ARENAS_PER_VMA = 256
_LIBC = ctypes.CDLL(None, use_errno=True)


def regions(proc: Process, vmas: VmaList) -> tuple[list[Region], tuple[str, ...]]:
    """The regions of a live process, and notes on evidence that could not be had."""
    evidence = collect(proc, vmas)
    return name_regions(vmas, evidence), evidence.notes


def collect(proc: Process, vmas: VmaList) -> Evidence:
    """Evidence for `name_regions`. What needs privilege that we lack is left out, with a note."""
    tenants = list(image_tenants(vmas, lambda vma: open_image(proc, vma)))
    pointers: dict[int, tuple[str, int]] = {}
    notes: list[str] = []
    try:
        with Peek(proc) as peek:
            stacks = _threads(proc, peek, vmas, pointers)
            tenants += stacks
            tenants += _arenas(peek, vmas)
            tenants += _chunks(peek, vmas, tenants)
            tenants += _main_tls(vmas, tenants, proc.pid)
    except PagelensError as exc:
        notes.append(f"names of stacks, arenas and chunks are missing ({exc})")
    return Evidence(tuple(_disjoint(tenants)), pointers, tuple(notes))


def _disjoint(tenants: list[Tenant]) -> list[Tenant]:
    out: list[Tenant] = []
    for tenant in sorted(tenants, key=lambda t: (t.start, -t.end)):
        if not out or tenant.start >= out[-1].end:
            out.append(tenant)
    return out


def _threads(proc: Process, peek: Peek, vmas: VmaList, pointers: dict[int, tuple[str, int]]) -> list[Tenant]:
    out: list[Tenant] = []
    for tid in proc.tasks():
        if tid == proc.pid:
            continue
        try:
            comm = proc.read_task(tid, "comm").decode(errors="replace").strip()
        except PagelensError:
            continue  # gone
        found = _glibc_stack(peek, vmas, tid)
        if found is None:
            sp = stack_pointer(proc, tid)
            if sp:
                pointers[tid] = (comm, sp)
            continue
        block, size, guard, where = found
        if guard:
            why = f"guardsize {guard} in the descriptor at {where:#x}"
            out.append(
                Tenant(block, block + guard, Kind.GUARD, f"guard of thread {tid}'s stack ({comm})", why)
            )
        why = f"descriptor at {where:#x}: tid {tid}, stackblock {block:#x}, size {size}"
        label = f"stack of thread {tid} ({comm})"
        out.append(Tenant(block + guard, block + size, Kind.THREAD_STACK, label, why))
    return out


def _main_tls(vmas: VmaList, tenants: list[Tenant], tid: int) -> list[Tenant]:
    # The loader allocates the main thread's descriptor and TLS with its own memory.
    head = _robust_list(tid)
    vma = vmas.find(head) if head else None
    if vma is None or not _malloc_like(vma):
        return []
    start = max([vma.start, *(t.end for t in tenants if vma.start < t.end <= head)])
    end = min([vma.end, *(t.start for t in tenants if head < t.start < vma.end)])
    if end - start > 1 << 20:
        return []
    why = f"robust list of thread {tid} at {head:#x}"
    return [Tenant(start, end, Kind.TLS, "loader's memory, TLS of the main thread", why)]


def _robust_list(tid: int) -> int:
    head, length = ctypes.c_ulong(), ctypes.c_ulong()
    long = ctypes.c_long
    if _LIBC.syscall(long(_SYS_GET_ROBUST_LIST), long(tid), ctypes.byref(head), ctypes.byref(length)) < 0:
        return 0
    return head.value


def stack_pointer(proc: Process, tid: int) -> int:
    """Stack pointer of a thread that sleeps (/proc/PID/task/TID/syscall), 0 where it runs or it is
    refused."""
    for _ in range(3):
        try:
            fields = proc.read_task(tid, "syscall").split()
        except PagelensError:
            return 0
        if len(fields) >= 3:
            return int(fields[-2], 16)
    return 0


def _glibc_stack(peek: Peek, vmas: VmaList, tid: int) -> tuple[int, int, int, int] | None:
    # (stackblock, size, guardsize, address of the descriptor) from struct pthread, or None.
    head = _robust_list(tid)
    if not head:
        return None
    low = head - 0x400
    words = peek.words(low, 0x1000 // 8)
    for i, word in enumerate(words[: 0x400 // 8]):
        # tcbhead_t: first word its own address, third word the descriptor's (the same).
        if word == low + 8 * i and len(words) > i + 2 and words[i + 2] == word:
            ids = struct.pack(f"{0x400 // 8 - i + 1}Q", *words[i : 0x400 // 8 + 1])
            if struct.pack("i", tid) not in (ids[k : k + 4] for k in range(0, len(ids), 4)):
                continue
            for block, size, guard in zip(words[i:], words[i + 1 :], words[i + 2 :], strict=False):
                if _is_stack(vmas, block, size, guard, word):
                    return block, size, guard, word
    return None


def _is_stack(vmas: VmaList, block: int, size: int, guard: int, descriptor: int) -> bool:
    if (block | size | guard) & (PAGE_SIZE - 1) or size < 4 * PAGE_SIZE or guard >= size:
        return False
    return block < descriptor < block + size and vmas.find(block) is not None


def _arenas(peek: Peek, vmas: VmaList) -> list[Tenant]:
    out: list[Tenant] = []
    arenas: dict[int, int] = {}  # mstate -> number
    for vma in vmas:
        if not _malloc_like(vma):
            continue
        first = (vma.start + _HEAP_MAX - 1) & -_HEAP_MAX
        for base in range(first, min(vma.end, first + _ARENAS_PER_VMA * _HEAP_MAX), _HEAP_MAX):
            words = peek.words(base, 4)
            if len(words) < 4:
                continue
            arena, previous, size, reach = words
            own = previous == 0 and base < arena <= base + 64
            more = previous != 0 and previous % _HEAP_MAX == 0 and arena % 16 == 0 and arena > PAGE_SIZE
            if not (own or more) or (size | reach) & (PAGE_SIZE - 1):
                continue
            if not 0 < size <= reach <= _HEAP_MAX or base + reach > vma.end:
                continue
            number = arenas.setdefault(arena, len(arenas) + 1)
            label = f"malloc arena {number}" + ("" if own else " (further heap)")
            why = f"heap_info at {base:#x}: arena {arena:#x}, size {size}"
            out.append(Tenant(base, base + reach, Kind.ARENA, label, why))
            rest = vmas.find(base + reach)
            if rest is not None and rest.prot == Prot.NONE and reach < _HEAP_MAX:
                end = min(rest.end, base + _HEAP_MAX)
                out.append(Tenant(base + reach, end, Kind.RESERVED, f"{label}: room to grow", why))
    return out


def _chunks(peek: Peek, vmas: VmaList, tenants: list[Tenant]) -> list[Tenant]:
    ends = sorted(t.end for t in tenants)
    starts = {t.start for t in tenants}
    out = []
    for vma in vmas:
        if not _malloc_like(vma):
            continue
        # A chunk starts where the vma does, or where another tenant of it ends.
        for candidate in [vma.start, *(e for e in ends if vma.start < e < vma.end)]:
            at = candidate
            while at < vma.end and at not in starts:
                words = peek.words(at, 2)
                if len(words) < 2 or words[0] or words[1] & 7 != _IS_MMAPPED:
                    break
                size = words[1] & ~7
                if size & (PAGE_SIZE - 1) or not size or at + size > vma.end:
                    break
                why = f"chunk header at {at:#x}: size {size}, IS_MMAPPED"
                out.append(Tenant(at, at + size, Kind.CHUNK, f"malloc of {format_size(size - 16)}", why))
                at += size
    return out


def _malloc_like(vma: Vma) -> bool:
    return vma.prot == _RW and not vma.shared and not vma.inode and (not vma.name or vma.name[:5] == "[anon")


def image_tenants(vmas: VmaList, opener: Callable[[Vma], elf.ElfFile | None]) -> Iterator[Tenant]:
    """bss and relro of each loaded program or library, by the program headers that `opener` finds."""
    for vma in vmas:
        if not vma.inode or vma.offset or vma.shared or not vma.name.startswith("/"):
            continue
        image = opener(vma)
        if image is None or not image.loads():
            continue
        bias = vma.start - page_down(image.loads()[0].vaddr) if image.dynamic else 0
        base = vma.name.removesuffix(" (deleted)").rpartition("/")[2]
        for s in image.segments:
            if s.type == elf.PT_LOAD and s.flags & 2 and s.memsz > s.filesz:
                start, end = page_up(bias + s.vaddr + s.filesz), page_up(bias + s.vaddr + s.memsz)
                found = vmas.find(start)
                if start < end and found is not None and not found.inode and found.prot == _RW:
                    why = f"program header: {s.memsz - s.filesz} bytes beyond the file's part"
                    yield Tenant(start, min(end, found.end), Kind.BSS, f"{base} bss", why)
            elif s.type == elf.PT_GNU_RELRO:
                start, end = page_down(bias + s.vaddr), page_down(bias + s.vaddr + s.memsz)
                found = vmas.find(start)
                if start < end and found is not None and found.inode == vma.inode:
                    why = "program header PT_GNU_RELRO"
                    yield Tenant(start, min(end, found.end), Kind.RELRO, f"{base} relro", why)


def open_image(proc: Process, vma: Vma) -> elf.ElfFile | None:
    """Headers of the file that `vma` maps, wherever it can be reached: by name, in the target's root, by
    map."""
    path = vma.name.removesuffix(" (deleted)")
    for candidate in (
        path,
        f"/proc/{proc.pid}/root{path}",
        f"/proc/{proc.pid}/map_files/{vma.start:x}-{vma.end:x}",
    ):
        if os.path.exists(candidate):  # noqa: PTH110 (once per library; no path object needed)
            found = elf.read(candidate, vma.inode)
            if found is not None:
                return found
    return None
