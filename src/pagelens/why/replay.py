"""Replay: rebuilds every address space over time, and finds for each fault the interval that held it.

Events are walked in order of effect; the faults between two changes of an address space are looked up at once
(numpy), or one by one where there are few. What comes out are columns beside the faults: state and key (see
`space`). Rejected: walking faults one by one (seconds for a million), and one big interval index over time
and address (more code than the walk, and no faster: the walk has as many steps as there are calls).
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from pagelens.vm.snapshot import Snapshot
from pagelens.vm.units import HPAGE_SIZE, PAGE_SHIFT
from pagelens.vm.vma import Vma
from pagelens.why.calls import Effects, clear_refs, effect_time, state_of
from pagelens.why.cuts import FileCut, cut, file_cut, removed
from pagelens.why.evidence import Area, Origin
from pagelens.why.facts import Call, Facts, Faults, FrameShot, Task
from pagelens.why.lives import UNSEEN_KEY, Lives, Seg, State
from pagelens.why.reach import REACHING, reach
from pagelens.why.renumber import in_order, with_new_mm
from pagelens.why.space import Space
from pagelens.why.windows import AROUND, WINDOW

I64 = npt.NDArray[np.signedinteger[Any]]  # as many bits as needed
Bool = npt.NDArray[np.bool_]
CLONE_VM = 0x100
_NO_MM = 0xFFFFFFFF  # of a call of somebody else: nobody knows whose memory
_FEW = 24  # below this many faults, bisect beats building arrays

# What happened to a fault's lookup, as bits.
# EDGE: a read whose window of fault-around does not lie within its interval; its neighbours are in Space.around.
GREW, WAS_MAPPED, IN_FLIGHT, BLOCK, EDGE = 1, 2, 4, 8, 16
_BEYOND = WINDOW << PAGE_SHIFT


@dataclass(slots=True)
class Family:
    """Life times and descent of address spaces. end: mm -> ns of its last task's exit or exec.
    parent: child mm -> (parent mm, ns of the fork). tasks: mm -> most tasks at one time."""

    end: dict[int, int] = field(default_factory=dict)
    parent: dict[int, tuple[int, int]] = field(default_factory=dict)
    forks: dict[int, list[int]] = field(default_factory=lambda: defaultdict(list))
    tasks: dict[int, int] = field(default_factory=lambda: defaultdict(int))


@dataclass(slots=True)
class Replayed:
    """faults: sorted by (mm, time). key, state: int[n] (state -1: nothing mapped). flags: int[n].
    removed: row of a fault -> seq of the call that had unmapped the address."""

    faults: Faults
    key: I64
    state: I64
    flags: I64
    removed: dict[int, int]
    lives: Lives
    spaces: dict[int, Space]
    family: Family
    first_keys: dict[int, tuple[list[int], list[Seg]]]
    frame_segs: list[list[Seg]]  # beside Facts.frames: what was mapped then
    removed_parts: list[tuple[FileCut, int, bool]]  # what left files, ns, and whether by MADV_REMOVE


class Replay:
    """One run over the facts."""

    def __init__(self, facts: Facts) -> None:
        self.facts = facts
        thp = str(facts.settings.get("thp", "madvise"))
        self.thp = thp
        settings = facts.settings
        self.effects = Effects(
            thp,
            facts.last,
            settings.get("filesystems"),
            bool(settings.get("unmaps_first")),
            bool(settings.get("unlocks_all", True)),
        )
        self._mm_of: dict[int, int] = {}  # by pid and tid, now
        self.lives = Lives()
        self.spaces: dict[int, Space] = {}
        self.family = Family()
        self.first_keys: dict[int, tuple[list[int], list[Seg]]] = {}
        self.frame_segs: list[list[Seg]] = []
        self.removed_parts: list[tuple[FileCut, int, bool]] = []
        self._users: dict[int, int] = defaultdict(int)
        self._started: dict[int, int] = defaultdict(int)
        faults = with_new_mm(facts)
        if not in_order(faults):  # `load` has sorted them, at no cost of a second copy
            faults = faults.take(np.lexsort((faults.seq, faults.time, faults.mm)))
        self.faults = faults
        n = len(self.faults)
        self.key = np.full(n, -1, np.int64)
        self.state = np.full(n, -1, np.int32)
        self.flags = np.zeros(n, np.int8)
        self._around: list[bool] = []  # by state: a read maps its neighbours
        self.removed: dict[int, int] = {}
        self._unseen = self.lives.intern(State(Area.UNSEEN, 7))
        mm = self.faults.mm
        bounds = [0, *(np.flatnonzero(mm[1:] != mm[:-1]) + 1).tolist(), n] if n else [0]
        mms = mm[bounds[:-1]].tolist()
        self._next = dict(zip(mms, bounds[:-1], strict=True))
        self._end = dict(zip(mms, bounds[1:], strict=True))

    def run(self) -> Replayed:
        """Walk all events."""
        born = {int(t.args[3]) for t in self.facts.tasks if t.name == "fork"}
        born |= {int(t.args[1]) for t in self.facts.tasks if t.name == "exec"}
        for mm in {*self._next, *self.facts.first} - born:
            self._begin(mm)
            self._users[mm] = 1
        steps: list[tuple[int, int, Call | Task | FrameShot]] = [
            (effect_time(c), c.seq, c)
            for c in self.facts.calls
            if self.effects.handles(c.name)
            or _clears(c)
            or file_cut(c)
            or (c.name in REACHING and c.result > 0)
        ]
        steps += [(t.time, t.seq, t) for t in self.facts.tasks]
        steps += [(s.start, 1 << 62, s) for s in self.facts.frames]
        steps.sort(key=lambda s: s[:2])
        for time, _, event in steps:
            if isinstance(event, FrameShot):
                mapped = self.spaces[event.mm].segs if event.mm in self.spaces else ()
                self.frame_segs.append([Seg(s.start, s.end, s.key, s.state) for s in mapped])
                continue
            if isinstance(event, Call) and _clears(event):
                self._clear(int(event.detail), time)
                continue
            if isinstance(event, Call) and event.name in REACHING:
                self._reach(event, time)
                continue
            if isinstance(event, Call) and not self.effects.handles(event.name):
                self._cut(event, time)
                continue
            space = self.spaces.get(event.mm)
            if space is not None:
                self._flush(space, time)
            if isinstance(event, Task):
                self._task(event)
            else:
                space = space or self._begin(event.mm)
                holes = removed(space, event)
                self.effects.apply(space, event, time)
                for hole in holes:
                    self._cut_out(hole, event, time)
        for mm in list(self._next):
            self._flush(self.spaces.get(mm) or self._begin(mm), 1 << 62)
        return Replayed(
            self.faults,
            self.key,
            self.state,
            self.flags,
            self.removed,
            self.lives,
            self.spaces,
            self.family,
            self.first_keys,
            self.frame_segs,
            self.removed_parts,
        )

    def _begin(self, mm: int) -> Space:
        snapshot = self.facts.first.get(mm)
        # What is not in the first snapshot may have been mapped by a call that --max-size dropped.
        space = Space(mm, self.lives, snapshot is not None and self.facts.dropped_before < 0)
        self.spaces[mm] = space
        if snapshot is not None and not self.facts.settings.get("calls", True):
            self._begin_without_calls(space, snapshot)
        elif snapshot is not None:
            for vma in snapshot.vmas:
                key = self.lives.begin(vma.pages, mm, Origin.SNAPSHOT, -1, -1)
                space.insert(Seg(vma.start, vma.end, key, self.lives.intern(self._state(vma))))
            self.first_keys[mm] = (
                list(space.starts),
                [Seg(s.start, s.end, s.key, s.state) for s in space.segs],
            )
        return space

    def _begin_without_calls(self, space: Space, first: Snapshot) -> None:
        # No call was recorded: what the last snapshot has and the first has not was mapped at some time
        # between.
        last = self.facts.last.get(space.mm)
        for vma, origin in [
            *((v, Origin.UNSEEN) for v in (last.vmas if last else ())),
            *((v, Origin.SNAPSHOT) for v in first.vmas),
        ]:
            later = last.vmas.find(vma.start) if last and origin is Origin.SNAPSHOT else None
            if later is not None and later.start == vma.start and later.end >= vma.end:
                continue  # the same, or grown: as it was at the end
            space.map(vma.start, vma.end, self._state(vma), origin, -1, -1)
        self.first_keys[space.mm] = (
            list(space.starts),
            [Seg(s.start, s.end, s.key, s.state) for s in space.segs],
        )

    def _state(self, vma: Vma) -> State:
        return state_of(vma, self.thp, self.effects.files)

    def _clear(self, pid: int, time: int) -> None:
        # Whoever wrote it: the file's directory says whose pages are meant.
        space = self.spaces.get(self._mm_of.get(pid, -1))
        if space is not None:
            self._flush(space, time)
            clear_refs(space, time)

    def _reach(self, call: Call, time: int) -> None:
        # Whoever called: the first argument says whose memory is meant (in the recorder's pid namespace).
        space = self.spaces.get(self._mm_of.get(call.args[0], -1))
        if space is not None and 0 <= call.mm < _NO_MM:
            self._flush(space, time)
            reach(space, call, time)

    def _cut(self, call: Call, time: int) -> None:
        what = file_cut(call)
        if what is not None:
            self._cut_out(what, call, time)

    def _cut_out(self, what: FileCut, call: Call, time: int) -> None:
        # Every mapping of the file, whoever cut it.
        self.removed_parts.append((what, time, call.name == "madvise"))
        for mm, space in self.spaces.items():
            if mm not in self.family.end and space.maps(what.file):
                self._flush(space, time)
                cut(space, what, call)

    def _task(self, task: Task) -> None:
        users = self._users
        if task.name in ("fork", "start"):
            self._mm_of[int(task.args[1])] = self._mm_of[int(task.args[0])] = int(task.args[3])
        elif task.name == "exec":
            self._mm_of[task.pid] = int(task.args[1])
        if task.name == "fork":
            flags, child = int(task.args[2]), int(task.args[3])
            users[child] += 1
            self.family.tasks[child] = max(self.family.tasks[child], users[child])
            if not flags & CLONE_VM and child != task.mm:
                parent = self.spaces.get(task.mm) or self._begin(task.mm)
                self.spaces[child] = parent.fork(child, task.time, task.seq)
                if task.mm in self.effects.brk:
                    self.effects.brk[child] = self.effects.brk[task.mm]
                self.family.parent[child] = (task.mm, task.time)
                self.family.forks[task.mm].append(task.time)
        elif task.name == "start":
            mm = int(task.args[3])
            self._started[mm] += 1
            users[mm] = self._started[mm]
            self.family.tasks[mm] = max(self.family.tasks[mm], users[mm])
        elif task.name == "exec":
            old, new = int(task.args[0]), int(task.args[1])
            self._leave(old, task.time)
            users[new] += 1
            self._begin(new)
            # Faults of execve itself were given the new number, and came before this event.
        elif task.name == "exit":
            self._leave(task.mm, task.time)

    def _leave(self, mm: int, time: int) -> None:
        self._users[mm] -= 1
        if self._users[mm] <= 0:
            self.family.end[mm] = time

    def _flush(self, space: Space, time: int) -> None:
        lo = self._next.get(space.mm)
        if lo is None:
            return
        hi = lo + int(np.searchsorted(self.faults.time[lo : self._end[space.mm]], time))
        if hi == lo:
            return
        self._next[space.mm] = hi
        if hi - lo < _FEW:
            for i in range(lo, hi):
                self._one(space, i)
            return
        addr = self.faults.addr[lo:hi].astype(np.int64)
        start, end, key, state = space.columns()
        inside = np.zeros(hi - lo, bool)
        # Most faults of a span of time go to one or two intervals; those of three that are drawn are put there at once.
        for sample in (hi - lo) * np.array((1, 3, 5)) // 6:
            at = int(np.searchsorted(start, addr[sample], side="right")) - 1
            if at < 0 or inside[sample] or addr[sample] >= end[at]:
                continue
            here = (addr >= start[at]) & (addr < end[at])
            np.copyto(
                self.key[lo:hi], (addr >> PAGE_SHIFT) + (key[at] - (start[at] >> PAGE_SHIFT)), where=here
            )
            self.state[lo:hi][here] = state[at]
            inside |= here
        left = np.flatnonzero(~inside)
        if len(start) and len(left):
            found = np.searchsorted(start, addr[left], side="right") - 1
            held = (found >= 0) & (addr[left] < end[np.maximum(found, 0)])
            left, found = left[held], found[held]
            self.key[lo + left] = key[found] + ((addr[left] - start[found]) >> PAGE_SHIFT)
            self.state[lo + left] = state[found]
            inside[left] = True
        self._blocks(space, lo, inside, addr)
        self._edges(space, lo, inside, addr)
        for i in np.flatnonzero(~inside).tolist():
            self._one(space, lo + i)

    def _blocks(self, space: Space, lo: int, inside: Bool, addr: I64) -> None:
        huge = np.array([s.huge for s in self.lives.states], bool)
        if not huge.any():
            return
        rows = np.flatnonzero(inside)
        rows = rows[huge[self.state[lo + rows]]]
        if not len(rows):
            return
        blocks, back = np.unique(addr[rows] & -HPAGE_SIZE, return_inverse=True)
        fits = np.array([space.block_fits(b) for b in blocks.tolist()], bool)
        self.flags[lo + rows[fits[back]]] |= BLOCK

    def _edges(self, space: Space, lo: int, inside: Bool, addr: I64) -> None:
        self._around += [s.area in AROUND for s in self.lives.states[len(self._around) :]]
        if not any(self._around):
            return
        rows = np.flatnonzero(inside)
        rows = rows[np.array(self._around, bool)[self.state[lo + rows]]]
        if not len(rows):
            return
        start, end, _, _ = space.columns()
        at = np.searchsorted(start, addr[rows], side="right") - 1
        low = addr[rows] & -_BEYOND
        edge = (low < start[at]) | (low + _BEYOND > end[at])
        for row, i in zip(rows[edge].tolist(), at[edge].tolist(), strict=True):
            self._edge(space, lo + row, i)

    def _edge(self, space: Space, row: int, i: int) -> None:
        # Only a completed read maps what is around it.
        error = int(self.faults.error[row])
        if self.faults.failed[row] or error < 0 or error & 3:
            return
        self.flags[row] |= EDGE
        space.read(i, int(self.faults.addr[row]) >> PAGE_SHIFT, int(self.faults.time[row]))

    def _one(self, space: Space, i: int) -> None:
        addr = int(self.faults.addr[i])
        at = space.index(addr)
        if at >= 0:
            held = space.segs[at]
            self._put(i, held, addr)
            state, low = self.lives.states[held.state], addr & -_BEYOND
            if state.area in AROUND and (low < held.start or low + _BEYOND > held.end):
                self._edge(space, i, at)
            if state.huge and space.block_fits(addr):
                self.flags[i] |= BLOCK
            return
        time, failed = int(self.faults.time[i]), bool(self.faults.failed[i])
        if not failed:
            seg = space.grow(addr, time, int(self.faults.seq[i]))
            if seg is not None:
                self._put(i, seg, addr)
                self.flags[i] |= GREW
                return
        begun = time - max(int(self.faults.latency[i]), 0)
        for since, until, seq, seg in reversed(space.past):
            if seg.start <= addr < seg.end:
                if not failed and begun <= until and time >= since:
                    self._put(i, seg, addr)
                    self.flags[i] |= IN_FLIGHT
                else:
                    self.flags[i] |= WAS_MAPPED
                    self.removed[i] = seq
                return
        # Completed, so something was mapped; where calls were not recorded (perf shows no mremap), nobody says what.
        if not space.seen or (not failed and not self.facts.settings.get("calls", True)):
            self.state[i] = self._unseen
        self.key[i] = UNSEEN_KEY + (space.mm << 36) + (addr >> PAGE_SHIFT)

    def _put(self, i: int, seg: Seg, addr: int) -> None:
        self.key[i] = seg.key + ((addr - seg.start) >> PAGE_SHIFT)
        self.state[i] = seg.state


def _clears(call: Call) -> bool:
    return call.name == "write" and call.detail.isdigit() and call.args[1] == ord("4")


def state_column(lives: Lives, state: I64, name: str, missing: int) -> I64:
    """int[n]: one field of each fault's state, `missing` where nothing is mapped. Read only: where all states have the
    same (nobody gave any advice, say), it is one number seen n times. As narrow as its values are."""
    table = np.array([int(getattr(s, name)) for s in lives.states] + [missing], np.int64)
    low, high = int(table.min()), int(table.max())
    if low == high:
        return np.broadcast_to(np.int64(low), len(state))
    if low >= -128 and high < 128:
        table = table.astype(np.int8)
    return np.take(table, state)
