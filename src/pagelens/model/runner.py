"""Runs operations (`model.op`) in the model. `proof.oracle` does the same on a real process.

The world that the model starts in is that of the oracle child: an address space that holds nothing but two
mappings of the harness, far from where programs work. They are there because mlockall, fork and the vma limit
see them; `HARNESS` is what views leave out.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from pagelens.model import export
from pagelens.model import op as ops
from pagelens.model.files import File
from pagelens.model.machine import Machine
from pagelens.model.op import Op, Outcome, disk_name
from pagelens.model.process import Process
from pagelens.model.profile import Profile
from pagelens.model.space import Layout, Limits, Mm
from pagelens.model.world import Descriptors, Key, Names, Setting, Span, undefined, unmaps_harness
from pagelens.vm.accounting import Accounting
from pagelens.vm.errors import UsageError
from pagelens.vm.snapshot import Snapshot
from pagelens.vm.units import PAGE_SIZE
from pagelens.vm.vma import VmaList

U64 = npt.NDArray[np.uint64]

# setup_arg_pages: a page of arguments and 128 KiB, as far as RLIMIT_STACK allows.
EXEC_STACK = 33 * PAGE_SIZE


class ModelWorld:
    """The processes of one program, in the model. setting: that of the oracle child, to be compared with it;
    without one there is no harness in the address space."""

    def __init__(self, profile: str | Profile, setting: Setting | None = None) -> None:
        self.setting = setting or Setting(text_pages=0, region_pages=0)
        self.machine = Machine(
            profile,
            max_map_count=self.setting.max_map_count,
            memory_pages=self.setting.memory_pages,
            overcommit=self.setting.overcommit,
        )
        if self.machine.profile.status_rss_lags:
            self.setting = replace(self.setting, rss_exact=False)
        self.machine.dac_min_addr = self.setting.dac_min_addr
        self.names = Names({"arena": ops.ARENA_BASE, "heap": self.setting.brk})
        self.files: dict[str, File] = {}
        self.open = Descriptors()
        layout = Layout(
            mmap_base=self.setting.mmap_base,
            levels=self.setting.levels,
            start_brk=self.setting.brk,
            end_data=self.setting.data_bytes,
            start_stack=self.setting.start_stack,
            start_code=self.setting.text,
            end_code=self.setting.text + self.setting.text_pages * PAGE_SIZE,
        )
        limits = Limits(
            self.setting.address_space,
            self.setting.data,
            self.setting.stack,
            self.setting.memlock,
            cap_ipc_lock=self.setting.ipc_lock,
        )
        self._layout, self._limits = layout, limits
        main = self.machine.spawn(layout=layout, limits=limits)
        self.processes: dict[str, Process] = {"main": main}
        self._threads: set[str] = set()
        self._waiting: dict[str, str] = {}  # who stands still, and for which child of vfork
        self._hidden = frozenset(start for start, _ in self.setting.harness)
        self._shown: dict[int, export.Shown] = {}  # by mm number
        self._harness("main")

    def _harness(self, proc: str) -> None:
        # What the oracle's child maps for itself.
        if not self.setting.region_pages:
            return
        main = self.processes[proc]
        text = self.machine.file("pl-oracle", self.setting.text_pages * PAGE_SIZE, cached=True)
        _must(main.mmap(self.setting.text, text.size, 5, ops.PRIVATE | ops.FIXED, text, 0))
        length = self.setting.region_pages * PAGE_SIZE
        flags = ops.SHARED | ops.ANONYMOUS | ops.FIXED
        _must(main.mmap(self.setting.region, length, 3, flags))
        self.settle(proc)
        mm = main.mm  # exec itself needed more: a stack, the vdso
        stack, first = (min(limit, EXEC_STACK) for limit in (mm.limits.stack, self.setting.stack))
        mm.hiwater_vm = max(mm.hiwater_vm, (self.setting.peak - first + stack) // PAGE_SIZE)

    def settle(self, proc: str) -> None:
        """Touch the whole harness, so that nothing of it faults later (as the child does)."""
        if not self.setting.region_pages:
            return
        process = self.processes[proc]
        counted = process.min_flt, process.maj_flt
        process.access(self.setting.region, self.setting.region_pages * PAGE_SIZE, "w")
        process.access(self.setting.text, self.setting.text_pages * PAGE_SIZE, "r")
        process.min_flt, process.maj_flt = counted  # the harness's own, not the operation's

    def obstacle(self, op: Op) -> str:
        """Why `op` would be left out; empty where it would not."""
        if op.proc not in self.processes:
            return f"no process {op.proc!r}; there are: {' '.join(self.alive())}"
        if undefined(op, self.names) or (op.file and op.file not in self.files):
            names = " ".join([*self.names.regions, *self.files])
            return f"it names something that does not exist; there are: {names}"
        if unmaps_harness(op, self.names, self.setting):
            return "its lengths wrap onto the text or the region that every process here has"
        if not self.open.has(op):
            return f"{op.proc!r} has no file {op.file!r}: execve gave it a table of descriptors of its own"
        if self.open.leaves_hole(op):
            return f"it would leave pages of {op.file!r}, which lies on disk, out of the page cache"
        if op.proc in self._waiting:
            return f"{op.proc!r} stands still until {self._waiting[op.proc]!r} exits or does execve (vfork)"
        if op.name == "execve" and op.proc in self._threads:
            return "execve by a thread that is not the first one is not modelled"
        return ""

    def apply(self, op: Op) -> Outcome | None:
        """Do one operation. None where it was left out (an undefined region, a process that is gone)."""
        if self.obstacle(op):
            return None
        process = self.processes[op.proc]
        if op.name in ops.ACCESSES:
            assert op.place is not None
            addr = self.names.resolve(op.place)
            got = process.access(addr, op.length, ops.ACCESSES[op.name])
            faults = got.minor + got.major
            if got.signal is None:
                return Outcome(op.length // PAGE_SIZE, faults)
            pages = (got.addr - addr) // PAGE_SIZE
            return Outcome(pages, faults, ops.SIGNALS[got.signal], got.si_code, got.addr)
        before = process.min_flt + process.maj_flt
        result = self._call(process, op)
        self.names.learn(op, result)
        if result >= 0:
            self.open.done(op)
        if op.name in ("exit", "execve", "clear_refs"):
            return Outcome(result)
        return Outcome(result, process.min_flt + process.maj_flt - before)

    def _call(self, process: Process, op: Op) -> int:
        addr = self.names.resolve(op.place) if op.place is not None else 0
        match op.name:
            case "mmap":
                file = self.files[op.file] if op.file else None
                return process.mmap(addr, op.length, op.prot, op.flags, file, op.offset)
            case "munmap":
                return process.munmap(addr, op.length)
            case "mprotect":
                return process.mprotect(addr, op.length, op.prot)
            case "mremap":
                new = self.names.resolve(op.new_place) if op.new_place is not None else 0
                return process.mremap(addr, op.length, op.new_length, op.flags, new)
            case "madvise":
                return process.madvise(addr, op.length, op.flags)
            case "brk":
                return process.brk(addr)
            case "mlock":
                return process.mlock(addr, op.length)
            case "mlock2":
                return process.mlock2(addr, op.length, op.flags)
            case "munlock":
                return process.munlock(addr, op.length)
            case "mlockall":
                return process.mlockall(op.flags)
            case "munlockall":
                return process.munlockall()
            case "msync":
                return process.msync(addr, op.length, op.flags)
            case "memfd":
                self.files[op.result] = file = process.memfd_create(op.result)
                return file.ftruncate(op.length)
            case "disk":
                self.files[op.result] = file = File(
                    self.machine, disk_name(op.result), op.length, cached=True
                )
                file.thp_align = self.setting.disk_aligns
                return 0
            case "ftruncate":
                return self.files[op.file].ftruncate(op.length)
            case "pwrite":
                return self.files[op.file].pwrite(op.length, op.offset)
            case "fallocate":
                return self.files[op.file].fallocate(op.flags, op.offset, op.length)
            case "shmat":
                return process.shmat(addr, op.length, op.prot, op.flags)
            case "rlimit":
                return process.setrlimit(op.flags, op.length)
            case "uncap":
                return process.drop_capabilities()
            case "peek" | "poke":
                return process.remote(addr, op.length, write=op.name == "poke")
            case _:
                return self._process_call(process, op)

    def _process_call(self, process: Process, op: Op) -> int:
        match op.name:
            case "fork":
                try:
                    self.processes[op.result] = process.fork()
                except MemoryError:
                    return -errno.ENOMEM
                self.settle(op.result)
                return 0
            case "vfork":
                self.processes[op.result] = process.vfork()
                self._waiting[op.proc] = op.result
                return 0
            case "thread":
                self.processes[op.result] = process
                self._threads.add(op.result)
                return 0
            case "execve":
                self._end_threads(op.proc, process)
                process.exec(self._layout)
                old, first = process.mm.limits, self._limits
                old.cap_ipc_lock, old.cap_sys_admin = first.cap_ipc_lock, first.cap_sys_admin
                old.cap_sys_rawio = first.cap_sys_rawio  # as it was started
                self._harness(op.proc)
                return 0
            case "exit":
                if op.proc in self._threads:
                    del self.processes[op.proc]
                    self._threads.discard(op.proc)
                    return 0
                # exit_group: its threads go with it.
                self._end_threads(op.proc, process)
                del self.processes[op.proc]
                process.exit()
                return 0
            case "clear_refs":
                result = process.clear_refs(op.flags)
                self.settle(op.proc)
                return result
        raise UsageError(f"the model has no operation {op.name!r}")

    def _end_threads(self, proc: str, process: Process) -> None:
        # Of a process that ends or begins anew; who waits for it as its vfork's child goes on.
        self._waiting = {who: child for who, child in self._waiting.items() if child != proc}
        for name in [n for n, p in self.processes.items() if p is process and n != proc]:
            del self.processes[name]
            self._threads.discard(name)
            self._waiting.pop(name, None)

    def alive(self) -> Iterator[str]:
        """Names of the processes (and threads) that exist."""
        return iter(self.processes)

    def is_leader(self, proc: str) -> bool:
        """Whether `proc` is a process, not a second thread of one."""
        return proc not in self._threads

    def vmas(self, proc: str) -> VmaList:
        """The vmas of the program: without the harness."""
        return VmaList(v for v in export.vma_list(self.processes[proc].mm) if v.start not in self._hidden)

    def keys(self, proc: str) -> list[Key]:
        """What maps says of the vmas of the program; the same list while nothing of it changes."""
        mm = self.processes[proc].mm
        return self._look(mm).keys(mm)

    def pages(self, proc: str, spans: Sequence[Span]) -> U64:
        """The pagemap of several spans, one after the other, frame numbers left out."""
        mm = self.processes[proc].mm
        return self._look(mm).pages(mm, spans)

    def kpage(self, frames: U64) -> tuple[U64, U64]:
        """(kpagecount, kpageflags) of frames."""
        return self.machine.kpage(frames)

    def _look(self, mm: Mm) -> export.Shown:
        shown = self._shown.get(mm.number)
        if shown is None:
            shown = self._shown[mm.number] = export.Shown(self._hidden)
        return shown

    def snapshot(self, proc: str) -> Snapshot:
        """Everything, harness included."""
        return self.processes[proc].snapshot()

    def statm(self, proc: str) -> tuple[int, ...]:
        """statm, in pages."""
        return self.processes[proc].statm()

    def rollup(self, proc: str) -> dict[str, int]:
        """smaps_rollup, in bytes, harness included."""
        return export.rollup(self.processes[proc].mm)

    def accounting(self, proc: str) -> tuple[VmaList, Accounting]:
        """The vmas with VmFlags, harness included; smaps fields of each, and status."""
        snapshot = self.processes[proc].snapshot(pages=False)
        accounting = snapshot.accounting
        assert accounting is not None
        return snapshot.vmas, replace(accounting, status=self.status(proc))

    def status(self, proc: str) -> dict[str, int]:
        """Memory fields of status, in bytes."""
        return export.status_fields(self.processes[proc].mm)

    def pagemap(self, proc: str, start: int, npages: int) -> U64:
        """uint64[npages] as /proc/PID/pagemap, frame numbers left out."""
        return self.processes[proc].pagemap(start, npages)


def _must(result: int) -> None:
    if result < 0:
        raise AssertionError(f"the model cannot set up the harness: {ops.errno_name(result)}")
