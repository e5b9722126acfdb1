"""System V shared memory (ipc/shm.c): the one kind of mapping here whose vm_ops have `close`.

That decides merges (`merge_close_forbids_any`), and it is why this is modelled at all; segments are private to
the call that makes them. Rejected: keys and ids (no rule of paging looks at them).
"""

from __future__ import annotations

from pagelens.model.abi import EINVAL, ENOMEM, MAP_FIXED, MAP_SHARED, PAGE, SHIFT, U64_MAX, page_align
from pagelens.model.files import File
from pagelens.model.mapping import do_mmap
from pagelens.model.space import Mm

SHM_RND, SHM_REMAP = 0x2000, 0x4000
_MOST = U64_MAX - (1 << 24)  # SHMMAX


def do_shmat(mm: Mm, addr: int, length: int, prot: int, flags: int, event: int) -> tuple[int, int]:
    """(address or -errno, bytes to populate): newseg, then do_shmat. Always readable; prot adds w and x."""
    if not 1 <= length <= _MOST:
        return EINVAL, 0
    pages = page_align(length) >> SHIFT
    if mm.charge(pages):  # shmem_acct_size: once, for the segment
        return ENOMEM, 0
    segment = File(mm.machine, "/SYSV00000000 (deleted)", length, shmem=True, writable=bool(prot & 2))
    segment.opens, segment.charged = 0, pages
    segment.close_hook, segment.map_pages = True, False  # shm_vm_ops
    result, fill = _attach(mm, segment, addr, 1 | prot & 6, flags, event)
    if result < 0:
        segment.unused()
    return result, fill


def _attach(mm: Mm, segment: File, addr: int, prot: int, flags: int, event: int) -> tuple[int, int]:
    if addr and addr & (PAGE - 1):
        if not flags & SHM_RND:
            return EINVAL, 0
        addr &= ~(PAGE - 1)
    if not addr and flags & SHM_REMAP:
        return EINVAL, 0
    if addr and not flags & SHM_REMAP:
        end = addr + segment.size
        if end > U64_MAX or mm.areas.overlapping(addr, end):
            return EINVAL, 0
    kind = MAP_SHARED | (MAP_FIXED if addr else 0)
    return do_mmap(mm, addr, segment.size, prot, kind, segment, 0, event)
