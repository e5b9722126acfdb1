"""The oracle: a real process that does exactly the operations of a program, and can be looked at after each.

The child is native/oracle/oracle.c. Its world is fenced, so that the kernel does nothing of its own accord to
its pages, and the fence is verified, never assumed. Every fence is of the process alone; nothing on the
system is changed, so there is nothing to put back if we are killed (and PR_SET_PDEATHSIG ends the child
then).

Rejected: switching THP, KSM and NUMA balancing off for the whole machine (a proof must not disturb the
programs beside it, and a killed proof would leave it so).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from pagelens.linux import maps, smaps
from pagelens.linux.frames import DIRTY
from pagelens.model import op as ops
from pagelens.model.op import Op, Outcome
from pagelens.model.world import Descriptors, Key, Names, Setting, Span, undefined, unmaps_harness
from pagelens.proof.calls import SPECIAL
from pagelens.proof.checkpoint import FRAME
from pagelens.proof.children import (
    CLONE,
    EXEC,
    FORK,
    READ,
    SETTLE,
    SLOT_SIZE,
    SLOTS,
    SYSCALL,
    THREAD,
    U64_MAX,
    UNMAP_REST,
    WRITE,
    ZEROS,
    Channel,
    Children,
    OracleError,
)  # fmt: skip
from pagelens.proof.fences import Fence
from pagelens.proof.machine import Machine
from pagelens.vm.accounting import Accounting
from pagelens.vm.units import PAGE_SIZE
from pagelens.vm.vma import Vma, VmaList

U64 = npt.NDArray[np.uint64]

_AHEAD = 1 << 16  # pages that are read before they are asked for
# Of smaps_rollup, what a page of text that others map as well changes.
_OF_TEXT = frozenset(
    {
        "Pss",
        "Pss_Dirty",
        "Pss_File",
        "Shared_Clean",
        "Shared_Dirty",
        "Private_Clean",
        "Private_Dirty",
        "Locked",
    }
)
# Of the machine's facts, what a program's outcome depends on.
_MEASURED = (
    "memlock", "stack", "data", "address_space", "max_map_count", "memory_pages", "dac_min_addr", "overcommit",
    "levels",
)  # fmt: skip
_TOUCH = {"read": READ, "write": WRITE, "exec": EXEC}
# arch/x86/entry/syscalls/syscall_64.tbl
_NR = {
    "mmap": 9, "mprotect": 10, "munmap": 11, "brk": 12, "pwrite": 18, "mremap": 25, "msync": 26,
    "madvise": 28, "ftruncate": 77, "mlock": 149, "munlock": 150, "mlockall": 151, "munlockall": 152,
    "set_mempolicy": 238, "fallocate": 285, "memfd": 319, "mlock2": 325,
}  # fmt: skip


class Oracle(Children):
    """The processes of one program, on the kernel of `machine` (None: this one). Same interface as
    `model.runner.ModelWorld`."""

    def __init__(self, machine: Machine | None = None) -> None:
        super().__init__(machine)
        self.names = Names()
        self.files: dict[str, int] = {}
        self.disks: dict[str, str] = {}  # files on disk: the name that maps has for them, ours
        self.open = Descriptors()
        self._lines: dict[bytes, tuple[Key, Vma] | None] = {}
        self._affinity = self.machine.pin()
        try:
            self._start()
        except BaseException:
            self.close()
            raise

    def _start(self) -> None:
        pid = self._spawn()
        self._open("main", 0, pid, "main")
        if self.send("main", UNMAP_REST).result < 0:
            raise OracleError("the oracle child cannot unmap its stack and vdso (sealed mappings?)")
        # It has executed itself anew meanwhile: what we opened is of the old address space.
        self._channels["main"].files.shut()
        self._open("main", 0, pid, "main")
        self.send("main", SYSCALL, _NR["set_mempolicy"], 4)  # MPOL_LOCAL: no NUMA hint faults
        self.setting = self._measure()
        self.settle("main")
        self.fences = self._verify(pid)

    def _measure(self) -> Setting:
        probe = self.send("main", SYSCALL, _NR["mmap"], 0, PAGE_SIZE, 0, 0x22, U64_MAX, 0).result
        self.send("main", SYSCALL, _NR["munmap"], probe, PAGE_SIZE)
        brk = self.send("main", SYSCALL, _NR["brk"], 0).result
        vmas = maps.parse(self.machine.maps(self._channels["main"].files.maps))
        default = Setting()
        inside = [v for v in vmas if v.start in (default.text, default.region)]
        if len(inside) != 2 or len(vmas) != 2:
            raise OracleError(f"the oracle child has unexpected mappings: {', '.join(map(str, vmas))}")
        if inside[1].pages * PAGE_SIZE != SLOTS * SLOT_SIZE:
            raise OracleError("the oracle child is of another version than this code; fix: ./dev build")
        files = self._channels["main"].files
        status = files.read("status").decode()
        stat = files.stat()
        facts = self.machine.facts()
        caps = next(
            (int(line.split()[1], 16) for line in status.splitlines() if line.startswith("CapEff")), 0
        )
        return Setting(
            peak=smaps.status(files)["VmPeak"],
            text_pages=inside[0].pages,
            region_pages=inside[1].pages,
            brk=brk,
            mmap_base=probe + PAGE_SIZE,
            data_bytes=stat.end_data - stat.start_data,
            start_stack=stat.start_stack,
            **{name: int(facts[name]) for name in _MEASURED},
            disk_aligns=bool(facts["disk_aligns"]),
            ipc_lock=bool(caps >> 14 & 1),
            # The child has populated its region and runs its text; a kernel that sums exactly shows both. (Where a task
            # keeps up to 64 counts back, the region, a multiple of it, may be right, but the page of text is not.)
            rss_exact=f"RssShmem:\t{inside[1].pages * 4:8d} kB" in status
            and f"RssFile:\t{inside[0].pages * 4:8d} kB" in status,
        )

    def _verify(self, pid: int) -> tuple[Fence, ...]:
        self.names.regions.update(arena=ops.ARENA_BASE, heap=self.setting.brk)
        policy = self.send("main", SYSCALL, _NR["set_mempolicy"], 4).result
        pinned, cpu = self.machine.pinned(pid)
        handle = self._channels["main"].files.handle
        again = self.send("main", SETTLE, 0, self.setting.text, self.setting.text_pages)
        return (
            *(Fence(*found) for found in self.machine.fences(handle, policy == 0)),
            Fence("cpu", pinned, f"pinned to {cpu}"),
            Fence("harness", again.faults == 0, f"{again.faults} faults when nothing happens"),
        )

    def slot_address(self, proc: str) -> int:
        """Where the slot of a process or thread lies in the child; its command's six words start at 16."""
        return self.setting.region + self._channels[proc].slot * SLOT_SIZE

    @property
    def zeros(self) -> tuple[int, int]:
        """(address, bytes) of memory that nobody uses."""
        return self.setting.region + ZEROS * SLOT_SIZE, SLOT_SIZE

    def settle(self, proc: str) -> None:
        """Touch the whole harness, so that nothing of it faults later."""
        self.send(proc, SETTLE, 0, self.setting.text, self.setting.text_pages)

    def apply(self, op: Op) -> Outcome | None:
        """Do one operation. None where it was left out (an undefined region, a process that is gone)."""
        if op.proc not in self._channels or undefined(op, self.names) or not self.open.has(op):
            return None
        if self.open.leaves_hole(op):
            return None
        if unmaps_harness(op, self.names, self.setting):
            return None
        if op.proc in self._waiting or (op.name == "execve" and not self.is_leader(op.proc)):
            return None
        self._moment += 1
        outcome = self._apply(op)
        if outcome.result >= 0:
            self.open.done(op)
        return outcome

    def _apply(self, op: Op) -> Outcome:
        if op.name in _TOUCH:
            assert op.place is not None
            addr = self.names.resolve(op.place)
            pages = op.length // PAGE_SIZE
            return self.send(op.proc, _TOUCH[op.name], 0, addr, pages, look=self._looked_at(op))
        if op.name in ("fork", "vfork", "thread", "execve", "exit"):
            return self._special(op)
        if op.name in SPECIAL:
            outcome = SPECIAL[op.name](self, op)
            self.names.learn(op, outcome.result)
            return outcome
        addr = self.names.resolve(op.place) if op.place is not None else 0
        args: tuple[int, ...] = (addr, op.length)
        match op.name:
            case "mmap":
                fd = self.files[op.file] if op.file else U64_MAX
                args = (addr, op.length, op.prot, op.flags, fd, op.offset)
            case "mprotect":
                args = (addr, op.length, op.prot)
            case "mremap":
                new = self.names.resolve(op.new_place) if op.new_place is not None else 0
                args = (addr, op.length, op.new_length, op.flags, new)
            case "madvise" | "mlock2" | "msync":
                args = (addr, op.length, op.flags)
            case "mlockall":
                args = (op.flags,)
            case "ftruncate":
                args = (self.files[op.file], op.length)
            case "fallocate":
                args = (self.files[op.file], op.flags, op.offset, op.length)
        outcome = self.send(op.proc, SYSCALL, _NR[op.name], *args, look=self._looked_at(op))
        self.names.learn(op, outcome.result)
        return outcome

    def _special(self, op: Op) -> Outcome:
        channel = self._channels[op.proc]
        if op.name == "execve":
            outcome = self._execve(op.proc, channel)
            self.settle(op.proc)
            return Outcome(outcome.result)
        if op.name != "exit":
            if not self._free:
                raise OracleError(f"more than {ZEROS} processes and threads at once")
            slot = self._free.pop()
            if op.name == "vfork":
                return self._vfork(op, channel, slot)
            flags = FORK if op.name == "fork" else THREAD
            made = self.send(op.proc, CLONE, 0, flags, slot)
            if made.result < 0:
                self._free.append(slot)
                return made
            if op.name == "fork":
                self._pids.add(made.result)
            self._open(op.result, slot, made.result, op.result if op.name == "fork" else channel.leader)
            self.settle(op.result)
            return Outcome(0, made.faults)
        self._exit(op.proc, channel)
        return Outcome(0)

    def _look(self, proc: str) -> Channel:
        # The channel of the process, with maps as they are. Nobody but us makes the child do anything, so one
        # look holds until the next command.
        channel = self._channels[self._channels[proc].leader]
        if channel.looked != self._moment:
            self._seen(channel, self.machine.look([self._want(channel)])[0])
        return channel

    def _changed(self, channel: Channel, text: bytes) -> None:
        cache = self._lines
        if len(cache) > 20_000:
            cache.clear()
        found = [cache[line] if line in cache else self._line(line) for line in text.splitlines()]
        pairs = [pair for pair in found if pair is not None]
        channel.vmas = None
        channel.keys, channel.shown = [pair[0] for pair in pairs], [pair[1] for pair in pairs]

    def _looked_at(self, op: Op) -> list[str]:
        # Whom a comparison looks at after `op` (proof.compare): all, unless it stays within its own vmas.
        if op.name in ops.LOCAL and self.is_leader(op.proc):
            return [op.proc]
        return [name for name, channel in self._channels.items() if channel.leader == name]

    def _line(self, line: bytes) -> tuple[Key, Vma] | None:
        # None: of the harness, or the gate area.
        vma = maps.parse_line(line)
        if vma.name in self.disks:
            vma = replace(vma, name=self.disks[vma.name])
        pair = None
        if vma.start >> 63 == 0 and vma.start not in (self.setting.text, self.setting.region):
            pair = (vma.start, vma.end, int(vma.prot), vma.shared, vma.offset, vma.name), vma
        self._lines[line] = pair
        return pair

    def vmas(self, proc: str) -> VmaList:
        """The vmas of the program: without the harness."""
        channel = self._look(proc)
        if channel.vmas is None:
            channel.vmas = VmaList(channel.shown)
        return channel.vmas

    def keys(self, proc: str) -> list[Key]:
        """What maps says of the vmas of the program; the same list while nothing of it changes."""
        return self._look(proc).keys

    def pagemap(self, proc: str, start: int, npages: int) -> U64:
        """uint64[npages] of /proc/PID/pagemap."""
        return np.frombuffer(self._entries(self._channels[proc], [(start, npages)]), np.uint64)

    def pages(self, proc: str, spans: Sequence[Span]) -> U64:
        """The pagemap of several spans, one after the other."""
        channel = self._channels[self._channels[proc].leader]
        if channel.read != self._moment or channel.spans != spans:
            channel.spans = spans if sum(pages for _, pages in spans) <= _AHEAD else ()
            channel.entries, channel.read = self._entries(channel, spans), self._moment
        return np.frombuffer(channel.entries, np.uint64)

    def _entries(self, channel: Channel, spans: Sequence[Span]) -> bytes:
        data = self.machine.pagemap(channel.files.pagemap, spans)
        if len(data) != 8 * sum(pages for _, pages in spans):
            raise OracleError(f"pagemap of pid {channel.tid} is cut off in {spans}")
        return data

    def kpage(self, frames: U64) -> tuple[U64, U64]:
        """(kpagecount, kpageflags) of frames; CapabilityMissingError without privilege."""
        count, flags = self.machine.frames(frames.tobytes())
        return np.frombuffer(count, np.uint64), np.frombuffer(flags, np.uint64)

    def statm(self, proc: str) -> tuple[int, ...]:
        """statm, in pages."""
        return tuple(map(int, self._channels[proc].files.read("statm").split()))

    def rollup(self, proc: str) -> dict[str, int]:
        """smaps_rollup, in bytes, harness included. What depends on who else maps the child's text, another oracle,
        and on whether it is written back, is there only where nobody does and it is, before and afterwards."""
        before = self._text_mappings(proc)
        figures = smaps.rollup(self._channels[proc].files)
        # Who was made by vfork has no mapping of its own.
        ours = len({channel.leader for channel in self._channels.values()}) - len(self._waiting)
        if before == self._text_mappings(proc) == ours:
            return figures
        return {name: value for name, value in figures.items() if name not in _OF_TEXT}

    def _text_mappings(self, proc: str) -> int:
        # kpagecount of the child's text; 0 where frames are hidden, or the program is not written back yet.
        frame = self.pagemap(proc, self.setting.text, 1) & FRAME
        if not frame[0]:
            return 0
        count, flags = self.kpage(frame)
        return 0 if int(flags[0]) & DIRTY else int(count[0])

    def accounting(self, proc: str) -> tuple[VmaList, Accounting]:
        """smaps with VmFlags, and status; harness included."""
        return smaps.read(self._channels[proc].files)

    def status(self, proc: str) -> dict[str, int]:
        """Memory fields of status, in bytes."""
        return smaps.status(self._channels[proc].files)

    def close(self) -> None:
        """End the child and all its processes. Twice is harmless."""
        if self._affinity:
            self.machine.unpin(self._affinity)
            self._affinity = []
        super().close()
