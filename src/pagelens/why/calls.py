"""What each memory system call does to an address space, and when it takes effect.

A call's effect lies somewhere between its entry and its return. What shrinks is applied at entry and what
maps at return: an address is free before anybody can be given it again, so this order holds between threads
too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from pagelens.vm.snapshot import Snapshot
from pagelens.vm.units import PAGE_SIZE, page_down, page_up
from pagelens.vm.vma import Vma
from pagelens.why import partial
from pagelens.why.cuts import CUTTING
from pagelens.why.evidence import Area, Mark, Origin
from pagelens.why.facts import Call
from pagelens.why.files import NAMELESS, Files, device
from pagelens.why.lives import (
    LOCKED,
    ONFAULT,
    UFFD_ASYNC,
    UFFD_BEFORE,
    UFFD_MINOR,
    UFFD_MISSING,
    UFFD_WP,
    Seg,
    State,
)
from pagelens.why.locking import lock, populate, unlock_vma
from pagelens.why.space import Space

MAP_SHARED, MAP_TYPE, MAP_ANONYMOUS, MAP_GROWSDOWN = 1, 0xF, 0x20, 0x100
MAP_LOCKED, MAP_POPULATE, MAP_STACK, MAP_HUGETLB = 0x2000, 0x8000, 0x20000, 0x40000
SHRINKING = frozenset({"munmap", "shmdt", "madvise", "process_madvise"}) | CUTTING
# Effective at entry: they take pages or mappings away.


_NO_FILES = Files()
# Low 16 bits of ioctl commands: type and number.
_UFFD_API, _UFFD_REGISTER, _UFFD_UNREGISTER, _UFFD_PROTECT, _PAGEMAP_SCAN = (
    0xAA3F,
    0xAA00,
    0xAA01,
    0xAA06,
    0x6610,
)
_UFFD_COPY, _UFFD_MOVE = 0xAA03, 0xAA05
_WP_ASYNC = 1 << 15  # a feature in UFFDIO_API
_MERGE = 67  # PR_SET_MEMORY_MERGE


def effect_time(call: Call) -> int:
    """ns at which the effect of a call is applied."""
    return call.start if call.name in SHRINKING else call.end


def area_of(vma: Vma, files: Files = _NO_FILES) -> Area:
    """The kind of a vma of a snapshot. files: of the capture."""
    flags = vma.vm_flags or frozenset()
    if "ht" in flags:
        return Area.HUGETLB
    if vma.name in ("[vdso]", "[vvar]", "[vsyscall]", "[vvar_vclock]", "[uprobes]") or "pf" in flags:
        return Area.SPECIAL
    if not vma.inode:
        return Area.SHMEM if vma.shared else Area.ANON
    if files.huge(vma.dev, vma.name):
        return Area.HUGETLB
    if vma.shared:
        return Area.SHMEM if files.in_memory(vma.dev, vma.name) else Area.SHARED_FILE
    return Area.ANON if vma.name == "/dev/zero" else Area.FILE


def state_of(vma: Vma, thp: str, files: Files = _NO_FILES) -> State:
    """The state of a vma of a snapshot. thp: the setting "always", "madvise" or "never"."""
    flags = vma.vm_flags or frozenset()
    huge = ("hg" in flags or thp == "always") and "nh" not in flags and thp != "never"
    return State(
        area_of(vma, files),
        int(vma.prot),
        grows=vma.name == "[stack]" or "gd" in flags,
        huge=huge,
        uffd=_registered(flags),
        mergeable="mg" in flags,
        dontfork="dc" in flags,
        wipeonfork="wf" in flags,
        locked=0 if "lo" not in flags else ONFAULT if "lf" in flags else LOCKED,
        name=vma.name,
        file=(vma.dev, vma.inode) if vma.inode else None,
        shift=vma.offset - vma.start if vma.inode else 0,
    )


class Effects:
    """Applies calls. last: final snapshots, asked only for what arguments do not tell (shmat's length).
    filesystems: those in memory, see `Files`. unmaps_first, unlocks_all: see `capture.merging.Rules`."""

    def __init__(
        self,
        thp: str,
        last: Mapping[int, Snapshot],
        filesystems: object = None,
        unmaps_first: bool = False,
        unlocks_all: bool = True,
    ) -> None:
        self.thp = thp
        self.last = last
        self.files = Files(filesystems)
        self.unmaps_first, self.unlocks_all = unmaps_first, unlocks_all
        self._huge_fds: set[tuple[int, int]] = set()  # (mm, fd) of memfd_create(MFD_HUGETLB)
        self._async_fds: set[tuple[int, int]] = set()  # (mm, fd) of userfaultfds with WP_ASYNC
        self.brk: dict[int, int] = {}
        self._do: dict[str, Callable[[Space, Call, int], None]] = {
            "mmap": self._mmap,
            "munmap": self._munmap,
            "brk": self._brk,
            "mprotect": self._mprotect,
            "pkey_mprotect": self._mprotect,
            "mremap": self._mremap,
            "madvise": self._madvise,
            "mlock": self._mlock,
            "mlock2": self._mlock,
            "munlock": self._munlock,
            "mlockall": self._mlockall,
            "munlockall": self._munlockall,
            "msync": self._msync,
            "shmat": self._shmat,
            "shmdt": self._shmdt,
            "ioctl": self._ioctl,
            "memfd_create": self._memfd_create,
            "prctl": self._prctl,
        }

    def handles(self, name: str) -> bool:
        """Whether a call of that name changes anything here."""
        return name in self._do

    def apply(self, space: Space, call: Call, time: int) -> None:
        """Apply one call, a failed one as far as it went."""
        if call.result < 0 and call.name != "brk":
            done = partial.effect(space, call)
            if done is None:
                return
            call = done
        space.faulted = call.gup
        self._do[call.name](space, call, time)

    def _mmap(self, space: Space, call: Call, time: int) -> None:
        _, length, prot, flags, fd, offset = (*call.args, 0, 0, 0, 0, 0, 0)[:6]
        start, end = call.result, call.result + page_up(length)
        shared = (flags & MAP_TYPE) != 2
        anon = bool(flags & MAP_ANONYMOUS) or (fd & 0xFFFFFFFF) == 0xFFFFFFFF
        dev = device(call.dev)
        if not anon and (space.mm, fd) in self._huge_fds and call.detail.startswith("memfd:"):
            self.files.learn_huge(dev)
        memory = anon or self.files.in_memory(dev, call.detail)
        if flags & MAP_HUGETLB or (not anon and self.files.huge(dev, call.detail)):
            area = Area.HUGETLB
        elif shared:
            area = Area.SHMEM if memory or call.detail == "zero" else Area.SHARED_FILE
        else:
            area = Area.ANON if anon or call.detail in ("zero", "/dev/zero") else Area.FILE
        nohuge = bool(flags & MAP_STACK)
        # Shared memory without a name is a file as well, of which nobody else knows.
        file = (
            (NAMELESS, call.seq) if anon and shared else None if anon or not call.inode else (dev, call.inode)
        )
        state = State(
            area,
            prot & 7,
            grows=bool(flags & MAP_GROWSDOWN),
            huge=self.thp == "always" and not nohuge and area is Area.ANON,
            populated=time if flags & (MAP_POPULATE | MAP_LOCKED) and prot & 7 else -1,
            populated_read=time
            if flags & (MAP_POPULATE | MAP_LOCKED) and prot & 7 and (shared or not prot & 2)
            else -1,
            populated_own=time if flags & (MAP_POPULATE | MAP_LOCKED) and prot & 2 and not shared else -1,
            locked=LOCKED if flags & MAP_LOCKED else 0,
            made=call.seq,
            name=call.detail,
            file=file,
            shift=0 if not file else -start if anon else offset - start,
        )
        space.remove(start, end, call.seq, call.start, call.end)
        space.map(start, end, state, Origin.MMAP, time, call.seq)

    @staticmethod
    def _munmap(space: Space, call: Call, _time: int) -> None:
        start = call.args[0]
        space.remove(start, start + page_up(call.args[1]), call.seq, call.start, call.end)

    def _brk(self, space: Space, call: Call, time: int) -> None:
        end = page_up(call.result)
        old = self.brk.get(space.mm)
        self.brk[space.mm] = end
        if old is None:
            old = self._heap_end(space, end)
        if end < old:
            space.remove(end, old, call.seq, call.start, call.end)
        elif end > old:
            state = State(Area.ANON, 3, huge=self.thp == "always", made=-2, name="[heap]")
            space.map(old, end, state, Origin.BRK, time, call.seq)

    @staticmethod
    def _heap_end(space: Space, end: int) -> int:
        for seg in reversed(space.segs):
            if seg.start <= end and space.lives.states[seg.state].name == "[heap]":
                return seg.end
        return end  # the first brk of a program only asks where the break is

    @staticmethod
    def _mprotect(space: Space, call: Call, time: int) -> None:
        start, length, prot = call.args[:3]

        def protect(state: State) -> State:
            new = state._replace(prot=prot & 7, prot_time=time, guard=False)
            # mprotect_fixup: what is locked and private is populated when it becomes writable, with write faults.
            gains = prot & 2 and not state.prot & 2 and state.area in (Area.ANON, Area.FILE)
            return populate(new, time, True) if gains and state.locked == LOCKED else new

        space.change(start, start + page_up(length), protect)

    def _mremap(self, space: Space, call: Call, time: int) -> None:
        old, old_len, new_len, flags = call.args[:4]
        old_len, new_len, new = page_up(old_len), page_up(new_len), call.result
        if new < 0:
            if self.unmaps_first:
                space.remove(call.args[4], call.args[4] + new_len, call.seq, call.start, call.end)
            return
        if new == old and new_len <= old_len:
            space.remove(old + new_len, old + old_len, call.seq, call.start, call.end)
            return
        i = space.index(old + max(old_len, 1) - 1)
        model = _empty(space.lives.states[space.segs[i].state]) if i >= 0 else State(Area.ANON, 3)
        if new != old:
            model = model._replace(shift=model.shift + old - new) if model.file else model
            keep = min(old_len, new_len)
            space.remove(old + keep, old + old_len, call.seq, call.start, call.end)
            for seg in space.remove(old, old + keep, call.seq, call.start, call.end, moved=True):
                # Each area by itself (remap_move): what lies at gaps of the target stays.
                at, end = seg.start - old + new, seg.end - old + new
                space.remove(at, end, call.seq, call.start, call.end)
                # mremap_userfaultfd_prep: without EVENT_REMAP the range leaves the userfaultfd.
                state = space.lives.states[seg.state]._replace(uffd=0, wp_time=-1)
                if state.file:
                    state = state._replace(shift=state.shift + old - new)
                space.insert(Seg(at, end, seg.key, space.lives.intern(state)))
                if flags & 4:  # MREMAP_DONTUNMAP: the old range stays, empty and not locked
                    state = _empty(space.lives.states[seg.state])._replace(locked=0)
                    space.map(seg.start, seg.end, state, Origin.MREMAP, time, call.seq, fresh=False)
                    if self.unlocks_all:
                        unlock_vma(space, seg, state)
        tail = min(old_len, new_len)  # 0: a second mapping of what is shared
        if new_len > tail:
            if model.locked == LOCKED:  # vrm_will_map_new: what a locked mapping grows by is populated
                model = lock(model, time)
            space.map(new + tail, new + new_len, model, Origin.MREMAP, time, call.seq, fresh=False)

    def _madvise(self, space: Space, call: Call, time: int) -> None:
        start, length, advice = call.args[:3]
        end = start + page_up(length)
        marks = {8: Mark.FREE, 20: Mark.COLD, 21: Mark.PAGEOUT}
        if advice in (4, 9, 24):  # DONTNEED, REMOVE, DONTNEED_LOCKED
            space.drop(start, end, time, call.seq)
        elif advice in marks:
            space.advise(start, end, marks[advice], time)
        elif advice == 14:
            space.change(start, end, lambda s: s._replace(huge=self.thp != "never"))
        elif advice in (12, 13):  # MERGEABLE, UNMERGEABLE
            space.change(start, end, lambda s: s._replace(mergeable=advice == 12))
        elif advice == 25:  # COLLAPSE: whole huge pages, present from now on
            space.change(start, end, lambda s: populate(s, time, True) if s.area is Area.ANON else s)
        elif advice == 15:
            space.change(start, end, lambda s: s._replace(huge=False))
        elif advice in (10, 11):
            space.change(start, end, lambda s: s._replace(dontfork=advice == 10))
        elif advice in (18, 19):
            space.change(start, end, lambda s: s._replace(wipeonfork=advice == 18))
        elif advice in (22, 23):  # POPULATE_READ, POPULATE_WRITE
            space.change(start, end, lambda s: populate(s, time, advice == 23))
        elif advice == 102:  # GUARD_INSTALL
            space.drop(start, end, time, call.seq)
            space.change(start, end, lambda s: s._replace(guard=True))
        elif advice == 103:
            space.change(start, end, lambda s: s._replace(guard=False))

    @staticmethod
    def _mlock(space: Space, call: Call, time: int) -> None:
        on_fault = call.name == "mlock2" and bool(call.args[2] & 1)  # MLOCK_ONFAULT
        start, end = page_down(call.args[0]), page_up(call.args[0] + call.args[1])
        full = end if call.result == 0 else start
        if call.result == -14:
            full = partial.populated_until(space, start, end)
        space.change(start, full, lambda s: lock(s, time, on_fault))
        space.change(full, end, lambda s: lock(s, time, on_fault, fill=False))

    @staticmethod
    def _munlock(space: Space, call: Call, _time: int) -> None:
        start = page_down(call.args[0])
        space.change(start, page_up(call.args[0] + call.args[1]), lambda s: s._replace(locked=0))

    @staticmethod
    def _mlockall(space: Space, call: Call, time: int) -> None:
        # apply_mlockall_flags: a call without MCL_FUTURE ends an earlier one's.
        flags = call.args[0]
        on_fault = bool(flags & 4)
        space.future = 0 if not flags & 2 else ONFAULT if on_fault else LOCKED
        if flags & 1:
            space.change(0, 1 << 62, lambda s: lock(s, time, on_fault))

    @staticmethod
    def _munlockall(space: Space, _call: Call, _time: int) -> None:
        space.future = 0
        space.change(0, 1 << 62, lambda s: s._replace(locked=0))

    @staticmethod
    def _msync(space: Space, call: Call, time: int) -> None:
        space.change(call.args[0], call.args[0] + page_up(call.args[1]), lambda s: s._replace(sync_time=time))

    def _shmat(self, space: Space, call: Call, time: int) -> None:
        # The length is the segment's and no argument tells it: the last snapshot does, if it is still
        # attached.
        snapshot = self.last.get(space.mm)
        vma = snapshot.vmas.find(call.result) if snapshot else None
        end = vma.end if vma and vma.start == call.result else call.result + (64 << 20)
        i = space.index(end - 1)
        nearest = [s.start for s in space.segs if call.result < s.start < end]
        if nearest and (vma is None or i >= 0):
            end = min(nearest)
        prot = 1 if call.args[2] & 0o10000 else 3
        space.map(
            call.result, end, State(Area.SHMEM, prot, made=call.seq, name="SYSV"), Origin.MMAP, time, call.seq
        )

    @staticmethod
    def _shmdt(space: Space, call: Call, _time: int) -> None:
        i = space.index(call.args[0])
        if i >= 0:
            space.remove(space.segs[i].start, space.segs[i].end, call.seq, call.start, call.end)

    def _memfd_create(self, space: Space, call: Call, _time: int) -> None:
        (self._huge_fds.add if call.args[1] & 4 else self._huge_fds.discard)((space.mm, call.result))

    @staticmethod
    def _prctl(space: Space, call: Call, _time: int) -> None:
        if call.args[0] == _MERGE:
            space.mergeable = bool(call.args[1])
            space.change(0, 1 << 62, lambda s: s._replace(mergeable=space.mergeable))

    def _ioctl(self, space: Space, call: Call, time: int) -> None:
        if len(call.args) < 6:
            return
        fd, command, _, first, second, third = call.args[:6]
        command &= 0xFFFF
        if command == _UFFD_API:
            (self._async_fds.add if second & _WP_ASYNC else self._async_fds.discard)((space.mm, fd))
        elif command == _UFFD_REGISTER:
            mode = third & (UFFD_MISSING | UFFD_WP | UFFD_MINOR)
            mode |= UFFD_ASYNC if (space.mm, fd) in self._async_fds else 0
            space.change(first, first + page_up(second), lambda s: s._replace(uffd=mode))
        elif command == _UFFD_UNREGISTER:
            space.change(first, first + page_up(second), lambda s: s._replace(uffd=0, wp_time=-1))
        elif command == _UFFD_PROTECT and third & 1:
            space.change(first, first + page_up(second), lambda s: s._replace(wp_time=time))
        elif command == _UFFD_PROTECT and second > PAGE_SIZE:
            # Of one page it is a handler's answer: the fault that it answers ends the protection as well, and
            # thousands of pages need no interval of their own.
            space.change(first, first + page_up(second), lambda s: s._replace(wp_time=-1))
        elif command in (_UFFD_COPY, _UFFD_MOVE) and call.result == 0:
            space.own(first, first + page_up(third), time)
        elif command == _PAGEMAP_SCAN and first & 1:  # PM_SCAN_WP_MATCHING
            space.change(second, third, lambda s: s._replace(wp_time=time) if s.uffd & UFFD_WP else s)


def clear_refs(space: Space, time: int) -> None:
    """A 4 written to clear_refs: all that is mapped is write-protected (clear_soft_dirty, fs/proc/task_mmu.c)."""
    space.change(0, 1 << 62, lambda s: s._replace(clear_time=time))


def _registered(flags: frozenset[str]) -> int:
    mode = UFFD_MISSING * ("um" in flags) | UFFD_WP * ("uw" in flags) | UFFD_MINOR * ("ui" in flags)
    return mode | UFFD_BEFORE if mode else 0


def _empty(state: State) -> State:
    # The same mapping without what was in it.
    state = state._replace(populated=-1, populated_read=-1, populated_own=-1, mark=Mark.NONE, mark_time=-1)
    return state._replace(free_time=-1, freed_out=-1, wp_time=-1)
