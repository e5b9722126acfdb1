"""Numbers of the x86-64 Linux interface that the model speaks: flags, advice, error numbers, PTE bits.

They are the kernel's own values (include/uapi/asm-generic/mman*.h, include/linux/mm.h), so that a recorded
system call can be handed to the model as it is. The PTE layout is the model's own: a page's whole state in
one uint64, so that a million pages change state in one numpy expression. Rejected: an object a page; one
boolean array a bit (eight times the memory traffic).
"""

from __future__ import annotations

import errno
import functools
from typing import Final

PAGE: Final = 4096
SHIFT: Final = 12
PMD_SIZE: Final = 2 << 20
MASK: Final = ~(PAGE - 1)
U64_MAX: Final = (1 << 64) - 1

PROT_READ, PROT_WRITE, PROT_EXEC = 1, 2, 4
PROT_SEM, PROT_GROWSDOWN, PROT_GROWSUP = 8, 0x0100_0000, 0x0200_0000

MAP_SHARED, MAP_PRIVATE, MAP_SHARED_VALIDATE, MAP_DROPPABLE = 1, 2, 3, 8
MAP_TYPE: Final = 0x0F
MAP_FIXED, MAP_ANONYMOUS, MAP_32BIT, MAP_ABOVE4G = 0x10, 0x20, 0x40, 0x80
MAP_GROWSDOWN, MAP_DENYWRITE, MAP_LOCKED, MAP_NORESERVE = 0x100, 0x800, 0x2000, 0x4000
MAP_POPULATE, MAP_NONBLOCK, MAP_STACK, MAP_HUGETLB = 0x8000, 0x1_0000, 0x2_0000, 0x4_0000
MAP_SYNC, MAP_FIXED_NOREPLACE = 0x8_0000, 0x10_0000

CLONE_VM, CLONE_VFORK, CLONE_THREAD = 0x100, 0x4000, 0x1_0000

MREMAP_MAYMOVE, MREMAP_FIXED, MREMAP_DONTUNMAP = 1, 2, 4
MS_ASYNC, MS_INVALIDATE, MS_SYNC = 1, 2, 4
MCL_CURRENT, MCL_FUTURE, MCL_ONFAULT = 1, 2, 4
MLOCK_ONFAULT: Final = 1

MADV_NORMAL, MADV_RANDOM, MADV_SEQUENTIAL, MADV_WILLNEED, MADV_DONTNEED = 0, 1, 2, 3, 4
MADV_FREE, MADV_REMOVE, MADV_DONTFORK, MADV_DOFORK = 8, 9, 10, 11
MADV_MERGEABLE, MADV_UNMERGEABLE, MADV_HUGEPAGE, MADV_NOHUGEPAGE = 12, 13, 14, 15
MADV_DONTDUMP, MADV_DODUMP, MADV_WIPEONFORK, MADV_KEEPONFORK = 16, 17, 18, 19
MADV_COLD, MADV_PAGEOUT, MADV_POPULATE_READ, MADV_POPULATE_WRITE = 20, 21, 22, 23
MADV_DONTNEED_LOCKED, MADV_COLLAPSE = 24, 25
MADV_GUARD_INSTALL, MADV_GUARD_REMOVE = 102, 103

# vm_flags, include/linux/mm.h.
VM_READ, VM_WRITE, VM_EXEC, VM_SHARED = 0x1, 0x2, 0x4, 0x8
VM_MAYREAD, VM_MAYWRITE, VM_MAYEXEC, VM_MAYSHARE = 0x10, 0x20, 0x40, 0x80
VM_GROWSDOWN, VM_UFFD_MISSING, VM_PFNMAP, VM_MAYBE_GUARD = 0x100, 0x200, 0x400, 0x800
VM_UFFD_WP, VM_LOCKED, VM_IO = 0x1000, 0x2000, 0x4000
VM_SEQ_READ, VM_RAND_READ, VM_DONTCOPY, VM_DONTEXPAND = 0x8000, 0x1_0000, 0x2_0000, 0x4_0000
VM_LOCKONFAULT, VM_ACCOUNT, VM_NORESERVE, VM_HUGETLB = 0x8_0000, 0x10_0000, 0x20_0000, 0x40_0000
VM_SYNC, VM_WIPEONFORK, VM_DONTDUMP, VM_SOFTDIRTY = 0x80_0000, 0x200_0000, 0x400_0000, 0x800_0000
VM_MIXEDMAP, VM_HUGEPAGE, VM_NOHUGEPAGE, VM_MERGEABLE = 0x1000_0000, 0x2000_0000, 0x4000_0000, 0x8000_0000
VM_DROPPABLE: Final = 1 << 38
VM_SEALED: Final = 1 << 42

VM_ACCESS: Final = VM_READ | VM_WRITE | VM_EXEC
VM_SPECIAL: Final = VM_IO | VM_DONTEXPAND | VM_PFNMAP | VM_MIXEDMAP
VM_LOCKED_MASK: Final = VM_LOCKED | VM_LOCKONFAULT
VM_MAY: Final = VM_MAYREAD | VM_MAYWRITE | VM_MAYEXEC
VM_STACK: Final = VM_GROWSDOWN  # x86: VM_STACK_FLAGS without those that all data mappings have
VM_DATA_DEFAULT: Final = VM_READ | VM_WRITE | VM_MAY  # VM_DATA_FLAGS_TSK_EXEC without READ_IMPLIES_EXEC

# fs/proc/task_mmu.c, show_smap_vma_flags: the order is that of the bit numbers.
VMFLAG_CODES: Final[tuple[tuple[int, str], ...]] = (
    (VM_READ, "rd"), (VM_WRITE, "wr"), (VM_EXEC, "ex"), (VM_SHARED, "sh"),
    (VM_MAYREAD, "mr"), (VM_MAYWRITE, "mw"), (VM_MAYEXEC, "me"), (VM_MAYSHARE, "ms"),
    (VM_GROWSDOWN, "gd"), (VM_UFFD_MISSING, "um"), (VM_PFNMAP, "pf"), (VM_MAYBE_GUARD, "gu"),
    (VM_UFFD_WP, "uw"), (VM_LOCKED, "lo"), (VM_IO, "io"), (VM_SEQ_READ, "sr"), (VM_RAND_READ, "rr"),
    (VM_DONTCOPY, "dc"), (VM_DONTEXPAND, "de"), (VM_LOCKONFAULT, "lf"), (VM_ACCOUNT, "ac"),
    (VM_NORESERVE, "nr"), (VM_HUGETLB, "ht"), (VM_SYNC, "sf"), (VM_WIPEONFORK, "wf"),
    (VM_DONTDUMP, "dd"), (VM_SOFTDIRTY, "sd"), (VM_MIXEDMAP, "mm"), (VM_HUGEPAGE, "hg"),
    (VM_NOHUGEPAGE, "nh"), (VM_MERGEABLE, "mg"), (VM_DROPPABLE, "dp"), (VM_SEALED, "sl"),
)  # fmt: skip

# x86 page-fault error code, arch/x86/include/asm/trap_pf.h.
PF_PROT, PF_WRITE, PF_USER, PF_INSTR, PF_PK = 1, 2, 4, 16, 32
SEGV_MAPERR, SEGV_ACCERR, SEGV_PKUERR, BUS_ADRERR = 1, 2, 4, 2

# PTE bits of the model; the frame number stands above FRAME_SHIFT.
P, W, A, D, SD = 1, 2, 4, 8, 16  # present, writable, accessed, dirty, soft-dirty
AE: Final = 32  # PageAnonExclusive of the mapped page
ANON: Final = 64  # the mapped frame is anonymous memory
ZERO: Final = 128  # the zero page: pte_special, neither counted nor in the reverse map
GUARD: Final = 256  # PTE_MARKER_GUARD; not present
SHMEM: Final = 512  # the mapped frame belongs to shmem (MM_SHMEMPAGES)
SPECIAL: Final = 1024  # PFN mapping (vvar): present, no struct page behind it
FRAME_SHIFT: Final = 16

EPERM, EAGAIN, ENOMEM, EACCES, EFAULT = (
    -errno.EPERM,
    -errno.EAGAIN,
    -errno.ENOMEM,
    -errno.EACCES,
    -errno.EFAULT,
)
EEXIST, EINVAL, EBADF, ENODEV, EBUSY = -errno.EEXIST, -errno.EINVAL, -errno.EBADF, -errno.ENODEV, -errno.EBUSY
EOVERFLOW, EOPNOTSUPP, EINTR = -errno.EOVERFLOW, -errno.EOPNOTSUPP, -errno.EINTR


def page_align(length: int) -> int:
    """PAGE_ALIGN on 64 bits: overflows to 0 as the kernel's does."""
    return (length + PAGE - 1) & MASK & U64_MAX


@functools.lru_cache(4096)
def flag_codes(vm_flags: int) -> frozenset[str]:
    """The two-letter codes of smaps' VmFlags line."""
    return frozenset(code for bit, code in VMFLAG_CODES if vm_flags & bit)
