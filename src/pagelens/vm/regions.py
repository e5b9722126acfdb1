"""Regions: the address space as a person would name it.

A vma is what the kernel keeps; a region is what somebody put there. Most often they coincide, but the kernel
merges neighbours of equal flags, so that one vma may hold a thread's stack and a malloc chunk (Linux 6.1
does this to the first stack below a big chunk): such a vma becomes one row for each tenant.

This module is pure: it takes a vma list and evidence, from a live process (`linux.regions`), a capture or the
model, and says for each name what it rests on. Without evidence it names what maps alone shows.
Rejected: guessing allocators from sizes. What nothing points to is called anonymous memory.
"""

from __future__ import annotations

import enum
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import PurePosixPath

from pagelens.vm.vma import Prot, Vma, VmaList


class Kind(enum.StrEnum):
    """What a region is."""

    HEAP = "heap"
    STACK = "stack"
    THREAD_STACK = "thread-stack"
    GUARD = "guard"
    ARENA = "arena"
    CHUNK = "chunk"
    TLS = "tls"
    TEXT = "text"
    RODATA = "rodata"
    RELRO = "relro"
    DATA = "data"
    BSS = "bss"
    FILE = "file"
    SHARED_FILE = "shared-file"
    VDSO = "vdso"
    VVAR = "vvar"
    MEMFD = "memfd"
    SHM = "shm"
    SYSV = "sysv-shm"
    SHARED_ANON = "shared-anon"
    HUGETLB = "hugetlb"
    JIT = "jit"
    RESERVED = "reserved"
    DEVICE = "device"
    SPECIAL = "special"
    ANON = "anon"


@dataclass(frozen=True, slots=True)
class Region:
    """[start, end) in bytes within vma number `vma` of the list. evidence: what the name rests on."""

    start: int
    end: int
    vma: int
    kind: Kind
    label: str
    evidence: str

    @property
    def pages(self) -> int:
        """Length in 4 KiB pages."""
        return (self.end - self.start) >> 12


@dataclass(frozen=True, slots=True)
class Tenant:
    """A range whose holder is known from outside of the vma list: a thread's stack, an arena, a chunk, a
    bss."""

    start: int
    end: int
    kind: Kind
    label: str
    evidence: str


@dataclass(frozen=True, slots=True)
class Evidence:
    """What is known beyond the vma list.

    tenants: ranges, by address, without overlap. stack_pointers: tid -> (name, sp) of threads whose stack's
    bounds are not known. notes: what could not be read.
    """

    tenants: tuple[Tenant, ...] = ()
    stack_pointers: dict[int, tuple[str, int]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


_SYSV = re.compile(r"^/SYSV([0-9a-f]{8})")
_ANON_NAME = re.compile(r"^\[anon(?:_shmem)?:(.*)\]$")


def name_regions(vmas: VmaList, evidence: Evidence | None = None) -> list[Region]:
    """All regions, by address; together they cover each vma exactly."""
    evidence = evidence or Evidence()
    tenants = sorted(evidence.tenants, key=lambda t: t.start)
    out: list[Region] = []
    next_tenant = 0
    for index, vma in enumerate(vmas):
        while next_tenant < len(tenants) and tenants[next_tenant].end <= vma.start:
            next_tenant += 1
        at = vma.start
        i = next_tenant
        while i < len(tenants) and tenants[i].start < vma.end:
            tenant = tenants[i]
            start, end = max(tenant.start, at), min(tenant.end, vma.end)
            if start < end:
                if at < start:
                    out.append(_plain(vmas, index, vma, at, start, evidence))
                out.append(Region(start, end, index, tenant.kind, tenant.label, tenant.evidence))
                at = end
            i += 1
        if at < vma.end:
            out.append(_plain(vmas, index, vma, at, vma.end, evidence))
    return out


def tenants_of(regions: Sequence[Region]) -> dict[int, list[Region]]:
    """vma number -> its regions, only for vmas with two or more."""
    by_vma: dict[int, list[Region]] = {}
    for region in regions:
        by_vma.setdefault(region.vma, []).append(region)
    return {index: found for index, found in by_vma.items() if len(found) > 1}


def _plain(vmas: VmaList, index: int, vma: Vma, start: int, end: int, evidence: Evidence) -> Region:
    kind, label, why = _classify(vmas, index, vma, start, end, evidence)
    return Region(start, end, index, kind, label, why)


def _classify(
    vmas: VmaList, index: int, vma: Vma, start: int, end: int, evidence: Evidence
) -> tuple[Kind, str, str]:
    name = vma.name
    if name.startswith("[") and not name.startswith("[anon"):
        return _special(name)
    if match := _ANON_NAME.match(name):
        return Kind.ANON, match.group(1).strip(), "name given by prctl(PR_SET_VMA)"
    if vma.vm_flags is not None and "ht" in vma.vm_flags:
        return Kind.HUGETLB, f"hugetlb {name}".strip(), "VmFlags ht"
    if name:
        return _file(vmas, index, vma)
    for tid, (comm, sp) in evidence.stack_pointers.items():
        if start <= sp < end:
            return Kind.THREAD_STACK, f"stack of thread {tid} ({comm})", f"its stack pointer is {sp:#x}"
    if vma.prot & Prot.EXEC:
        return Kind.JIT, "generated code", "anonymous and executable"
    if vma.prot == Prot.NONE:
        return _inaccessible(vmas, index, vma)
    return Kind.ANON, "anonymous memory", "no name, and nothing in it or beside it tells"


def _special(name: str) -> tuple[Kind, str, str]:
    match name:
        case "[heap]":
            return Kind.HEAP, "heap", "brk area"
        case "[stack]":
            return Kind.STACK, "main stack", "named by the kernel"
        case "[vdso]":
            return Kind.VDSO, "vdso", "named by the kernel"
    if name.startswith("[vvar"):
        return Kind.VVAR, name.strip("[]"), "named by the kernel"
    return Kind.SPECIAL, name.strip("[]"), "named by the kernel"


def _inaccessible(vmas: VmaList, index: int, vma: Vma) -> tuple[Kind, str, str]:
    above = vmas[index + 1] if index + 1 < len(vmas) else None
    if vma.size <= 1 << 20 and above is not None and above.start == vma.end and above.prot & Prot.WRITE:
        return Kind.GUARD, "guard", "no access, at most 1 MiB, right below writable memory"
    return Kind.RESERVED, "reserved addresses", "anonymous, no access"


def _file(vmas: VmaList, index: int, vma: Vma) -> tuple[Kind, str, str]:
    name = vma.name
    gone = name.removesuffix(" (deleted)")
    if gone.startswith("/memfd:"):
        label = f"memfd {gone[7:]}"
        if vma.prot & Prot.EXEC:
            return Kind.JIT, f"generated code in {label}", "executable memfd"
        return Kind.MEMFD, label, "memfd_create"
    if match := _SYSV.match(name):
        return Kind.SYSV, f"SysV segment {vma.inode} (key 0x{match.group(1)})", "shmat"
    if gone == "/dev/zero" and vma.shared:
        return Kind.SHARED_ANON, "shared anonymous memory", "MAP_SHARED|MAP_ANONYMOUS"
    if gone.startswith("/dev/shm/"):
        return Kind.SHM, f"shared memory {gone[9:]}", "file in /dev/shm"
    if gone.startswith("/anon_hugepage"):
        return Kind.HUGETLB, "hugetlb", "MAP_HUGETLB"
    if gone.startswith("/dev/"):
        return Kind.DEVICE, gone, "device file"
    if not gone.startswith("/") or gone.startswith("/[aio]"):
        return Kind.SPECIAL, gone.strip("/"), "named by the kernel"
    base = PurePosixPath(gone).name
    if vma.shared:
        return Kind.SHARED_FILE, base, "shared file mapping"
    if not _is_image(vmas, index, vma):
        return Kind.FILE, base, "private file mapping"
    if vma.prot & Prot.EXEC:
        return Kind.TEXT, f"{base} text", "executable file mapping"
    if vma.prot & Prot.WRITE:
        return Kind.DATA, f"{base} data", "writable private file mapping"
    if _is_relro(vmas, index, vma):
        return Kind.RELRO, f"{base} relro", "read-only part of the writable segment"
    return Kind.RODATA, f"{base} rodata", "read-only file mapping"


def _is_image(vmas: VmaList, index: int, vma: Vma) -> bool:
    # A program or library has an executable mapping of the same file nearby.
    low, high = max(0, index - 8), min(len(vmas), index + 9)
    return any(v.inode == vma.inode and v.dev == vma.dev and v.prot & Prot.EXEC for v in vmas[low:high])


def _is_relro(vmas: VmaList, index: int, vma: Vma) -> bool:
    # Without the file's headers: right below the writable segment of the same file, and not its first page.
    above = vmas[index + 1] if index + 1 < len(vmas) else None
    same = above is not None and above.start == vma.end and (above.dev, above.inode) == (vma.dev, vma.inode)
    return bool(same and above and above.prot & Prot.WRITE and vma.offset)
