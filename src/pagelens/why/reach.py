"""process_vm_readv and process_vm_writev reach pages of another address space, without a fault event there.

get_user_pages brings absent pages in (the zero page for a read of anonymous memory, a copy for a write), and pins what
it reads: a page that a fork had shared gets a copy of its own for that (gup_must_unshare, mm/gup.c), which stays
read-only. Known are the first ranges of a call (PL_MAX_VECTORS in native/bpf/record.h); what lies behind them is not.
"""

from __future__ import annotations

from pagelens.vm.units import page_down, page_up, ranges_of
from pagelens.why.facts import Call
from pagelens.why.locking import populate
from pagelens.why.space import Space

REACHING = frozenset({"process_vm_readv", "process_vm_writev"})


def reach(space: Space, call: Call, time: int) -> None:
    """What a call by whomever has done to the address space that it names."""
    left, write = call.result, call.name == "process_vm_writev"
    space.faulted = call.gup
    for address, length in ranges_of(call.detail):
        done = min(length, left)
        if done <= 0:
            return
        left -= done
        start, end = page_down(address), page_up(address + done)
        space.change(start, end, lambda state: populate(state, time, write))
        if not write:
            space.unshare(start, end, time)
