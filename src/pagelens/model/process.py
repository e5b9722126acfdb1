"""Process: system calls and accesses, named and numbered as the kernel's; results are >= 0 or -errno."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pagelens.model import (
    advice,
    export,
    forking,
    lock,
    mapping,
    populate,
    protect,
    provenance,
    refs,
    remap,
    sysv,
)
from pagelens.model.abi import CLONE_THREAD, CLONE_VFORK, CLONE_VM, EFAULT, ENOMEM, PAGE
from pagelens.model.area import Area
from pagelens.model.batch import access_range
from pagelens.model.events import Entry
from pagelens.model.fault import AccessResult
from pagelens.model.files import File
from pagelens.model.space import Layout, Mm
from pagelens.vm import Snapshot
from pagelens.vm.pages import U64

if TYPE_CHECKING:
    from pagelens.model.machine import Machine


class Process:
    """One process of a machine. Several may share an mm (vfork, threads)."""

    def __init__(self, machine: Machine, mm: Mm, pid: int, tid: int | None = None) -> None:
        self.machine = machine
        self.mm = mm
        self.pid = pid
        self.tid = tid if tid is not None else pid
        mm.pid = mm.pid or pid
        self.min_flt = 0
        self.maj_flt = 0
        self.alive = True
        machine.processes.append(self)

    def start(self) -> None:
        """Give a fresh mm the areas of its layout (what exec leaves behind)."""
        event = self.machine.events.next_id()
        for given in self.mm.layout.areas:
            area = Area(given.start, given.end, given.vm_flags, given.pgoff, given.file, given.name, event)
            self.mm.areas.insert(area)
            self.mm.stat_account(area.flags, area.pages)

    # -- bookkeeping of calls

    def _enter(self) -> int:
        self.machine.running = self
        self.machine.gup = 0
        return self.machine.events.next_id()

    def _done(
        self,
        event: int,
        name: str,
        args: tuple[int, ...],
        result: int,
        *ranges: tuple[int, int],
        kind: str = "syscall",
    ) -> int:
        mm = self.mm
        mm.hiwater_rss = max(mm.hiwater_rss, mm.rss)
        self.machine.events.add(
            Entry(
                event,
                mm.number,
                self.pid,
                self.tid,
                kind,
                name,
                args,
                result,
                gup=self.machine.gup,
                ranges=ranges,
            )
        )
        return result

    # -- system calls

    def mmap(
        self, addr: int, length: int, prot: int, flags: int, file: File | None = None, offset: int = 0
    ) -> int:
        """mmap(2). MAP_ANONYMOUS with file None; populates where asked."""
        event = self._enter()
        result, fill = mapping.do_mmap(self.mm, addr, length, prot, flags, file, offset, event)
        if fill:
            populate.populate_range(self.mm, result, result + fill, ignore_errors=True)
        span = (result, result + length) if result >= 0 else (0, 0)
        return self._done(event, "mmap", (addr, length, prot, flags, 0, offset), result, span)

    def munmap(self, addr: int, length: int) -> int:
        """munmap(2)."""
        event = self._enter()
        result = mapping.do_munmap(self.mm, addr, length, event)
        return self._done(event, "munmap", (addr, length), result, (addr, addr + length))

    def mprotect(self, addr: int, length: int, prot: int) -> int:
        """mprotect(2)."""
        event = self._enter()
        result = protect.do_mprotect(self.mm, addr, length, prot, event)
        return self._done(event, "mprotect", (addr, length, prot), result, (addr, addr + length))

    def brk(self, addr: int) -> int:
        """The raw system call: the new break, or the old one on failure. brk(0) asks."""
        event = self._enter()
        result, fill = mapping.do_brk(self.mm, addr, event)
        if fill:
            populate.populate_range(self.mm, *fill, ignore_errors=True)
        return self._done(event, "brk", (addr,), result, fill or (0, 0))

    def mremap(self, old: int, old_size: int, new_size: int, flags: int, new_addr: int = 0) -> int:
        """mremap(2): the address or -errno."""
        event = self._enter()
        result = remap.do_mremap(self.mm, old, old_size, new_size, flags, new_addr, event)
        spans = [(old, old + old_size)]
        if result >= 0:
            spans.append((result, result + new_size))
        return self._done(event, "mremap", (old, old_size, new_size, flags, new_addr), result, *spans)

    def madvise(self, addr: int, length: int, advice_: int) -> int:
        """madvise(2)."""
        event = self._enter()
        result = advice.do_madvise(self.mm, addr, length, advice_, event)
        return self._done(event, "madvise", (addr, length, advice_), result, (addr, addr + length))

    def mlock(self, addr: int, length: int) -> int:
        """mlock(2)."""
        event = self._enter()
        result = lock.do_mlock(self.mm, addr, length, 0, event)
        return self._done(event, "mlock", (addr, length), result, (addr, addr + length))

    def mlock2(self, addr: int, length: int, flags: int) -> int:
        """mlock2(2)."""
        event = self._enter()
        result = lock.do_mlock(self.mm, addr, length, flags, event)
        return self._done(event, "mlock2", (addr, length, flags), result, (addr, addr + length))

    def munlock(self, addr: int, length: int) -> int:
        """munlock(2)."""
        event = self._enter()
        result = lock.do_munlock(self.mm, addr, length, event)
        return self._done(event, "munlock", (addr, length), result, (addr, addr + length))

    @property
    def _everything(self) -> tuple[int, int]:
        return 0, self.mm.layout.task_size + PAGE

    def mlockall(self, flags: int) -> int:
        """mlockall(2)."""
        event = self._enter()
        return self._done(
            event, "mlockall", (flags,), lock.do_mlockall(self.mm, flags, event), self._everything
        )

    def munlockall(self) -> int:
        """munlockall(2)."""
        event = self._enter()
        return self._done(event, "munlockall", (), lock.do_munlockall(self.mm, event), self._everything)

    def msync(self, addr: int, length: int, flags: int) -> int:
        """msync(2); MS_SYNC writes back."""
        event = self._enter()
        result = lock.do_msync(self.mm, addr, length, flags)
        return self._done(event, "msync", (addr, length, flags), result, (addr, addr + length))

    def shmat(self, addr: int, length: int, prot: int, flags: int = 0) -> int:
        """shmget(2) of a private segment, shmat(2), shmctl(2) IPC_RMID: the address or -errno."""
        event = self._enter()
        result, fill = sysv.do_shmat(self.mm, addr, length, prot, flags, event)
        if fill:
            populate.populate_range(self.mm, result, result + fill, ignore_errors=True)
        span = (result, result + length) if result >= 0 else (0, 0)
        return self._done(event, "shmat", (addr, length, prot, flags), result, span)

    def setrlimit(self, resource: int, limit: int) -> int:
        """setrlimit(2) of the soft limit, in bytes: RLIMIT_DATA, STACK, MEMLOCK, AS. 0 or -EINVAL."""
        event = self._enter()
        result = self.mm.limits.set(resource, limit)
        return self._done(event, "setrlimit", (resource, limit), result)

    def drop_capabilities(self) -> int:
        """capset(2) to nothing: RLIMIT_MEMLOCK holds from now on."""
        event = self._enter()
        limits = self.mm.limits
        limits.cap_ipc_lock = limits.cap_sys_admin = limits.cap_sys_rawio = False
        return self._done(event, "capset", (), 0)

    def remote(self, addr: int, length: int, *, write: bool) -> int:
        """process_vm_writev(2) or process_vm_readv(2) by a process that is not modelled: its faults are not
        counted here. Bytes, or -EFAULT where nothing could be reached."""
        event = self._enter()
        self.machine.running = None
        done = populate.remote_access(self.mm, addr, length, write=write)
        name = "process_vm_writev" if write else "process_vm_readv"
        result = done if done or not length else EFAULT
        return self._done(event, name, (self.pid, addr, length), result, (addr, addr + done))

    def clear_refs(self, kind: int) -> int:
        """A write of 1 to 5 into /proc/PID/clear_refs."""
        event = self._enter()
        return self._done(
            event, "clear_refs", (kind,), refs.clear_refs(self.mm, kind, event), self._everything
        )

    def fork(self, pid: int | None = None) -> Process:
        """fork(2). MemoryError where the kernel says ENOMEM (commit limit)."""
        event = self._enter()
        child_mm = forking.dup_mm(self.mm, event)
        if child_mm is None:
            self._done(event, "fork", (), ENOMEM, kind="task")
            raise MemoryError("fork: ENOMEM")
        child = Process(self.machine, child_mm, pid if pid is not None else self.machine.next_pid())
        self._done(event, "fork", (child.pid, child.tid, 0, child_mm.number), child.pid, kind="task")
        return child

    def vfork(self, pid: int | None = None) -> Process:
        """vfork(2): a process that shares this address space until it execs or exits."""
        return self._sharing(
            pid if pid is not None else self.machine.next_pid(), None, CLONE_VM | CLONE_VFORK
        )

    def thread(self, tid: int | None = None) -> Process:
        """A second thread: same pid and address space, counters of its own."""
        tid = tid if tid is not None else self.machine.next_pid()
        return self._sharing(self.pid, tid, CLONE_VM | CLONE_THREAD)

    def _sharing(self, pid: int, tid: int | None, flags: int) -> Process:
        event = self._enter()
        other = Process(self.machine, self.mm, pid, tid)
        self.mm.users += 1
        self._done(event, "fork", (pid, other.tid, flags, self.mm.number), other.tid, kind="task")
        return other

    def exec(self, layout: Layout) -> None:
        """execve(2): a new address space; the old one goes with its last user. Other threads end."""
        event = self._enter()
        old = self.mm
        for thread in self._threads():
            thread._leave()
        self.mm = Mm(self.machine, layout, old.limits)
        self.mm.pid = self.pid
        self.tid = self.pid
        old.users -= 1
        if old.users == 0:
            forking.exit_mm(old, event)
        self._done(event, "exec", (old.number, self.mm.number), 0, kind="task")
        self.start()

    def _threads(self) -> list[Process]:
        return [p for p in self.machine.processes if p is not self and p.pid == self.pid and p.mm is self.mm]

    def _leave(self) -> None:
        self.alive = False
        self.mm.users -= 1
        self.machine.processes.remove(self)

    def process_vm_writev(self, target: Process, addr: int, length: int) -> int:
        """process_vm_writev(2) of one range: bytes written, or -EFAULT where nothing could be."""
        return self._remote(target, addr, length, "process_vm_writev", write=True)

    def process_vm_readv(self, target: Process, addr: int, length: int) -> int:
        """process_vm_readv(2) of one range: bytes read, or -EFAULT where nothing could be."""
        return self._remote(target, addr, length, "process_vm_readv", write=False)

    def _remote(self, target: Process, addr: int, length: int, name: str, *, write: bool) -> int:
        event = self._enter()
        done = populate.remote_access(target.mm, addr, length, write=write)
        result = done if done or not length else EFAULT
        args = (target.pid, addr, length)
        log = self.machine.events
        entry = Entry(event, target.mm.number, self.pid, self.tid, "syscall", name, args, result)
        entry.gup, entry.ranges = self.machine.gup, ((addr, addr + done),)
        log.add(entry)
        return result

    def exit(self, code: int = 0) -> None:
        """exit_group(2), exit(2) for a thread: the address space goes with its last user."""
        if not self.alive:
            return
        event = self._enter()
        if self.tid == self.pid:
            for thread in self._threads():
                thread._leave()
        self._leave()
        self._done(event, "exit", (self.min_flt, self.maj_flt, 0, 0), code, kind="task")
        if self.mm.users == 0:
            forking.exit_mm(self.mm, event)

    def memfd_create(self, name: str) -> File:
        """memfd_create(2): an empty shmem file with ftruncate, pwrite and fallocate."""
        return File(self.machine, f"/memfd:{name} (deleted)", 0, shmem=True)

    # -- accesses

    def access(self, addr: int, length: int, kind: str) -> AccessResult:
        """Touch every page of [addr, addr+length) in order; kind 'r', 'w' or 'x'. Stops at a signal."""
        self.machine.running = self
        result = AccessResult()
        access_range(self.mm, addr, length, kind, result)
        mm = self.mm
        mm.hiwater_rss = max(mm.hiwater_rss, mm.rss)
        log = self.machine.events
        for f in result.faults:
            start = f.addr & ~(PAGE - 1)
            entry = Entry(f.seq, mm.number, self.pid, self.tid, "fault", None, (), addr=f.addr)
            entry.error_code, entry.major, entry.failed = f.error_code, f.major, f.failed
            entry.count, entry.stride = f.count, f.stride
            entry.ranges = ((start, start + f.stride * (f.count - 1) + PAGE),)
            log.add(entry)
        return result

    # -- state

    def pagemap(self, start: int, npages: int) -> U64:
        """uint64[npages] as /proc/PID/pagemap encodes it; frame numbers are the model's own."""
        return export.pagemap(self.mm, start, npages)

    def walk(self, addr: int) -> list[tuple[str, int, bool]]:
        """The page-table walk of an address: (level, index, present), top first, to the first absent."""
        return self.mm.tables.walk(addr)

    def statm(self) -> tuple[int, int, int, int, int, int, int]:
        """/proc/PID/statm, in pages."""
        return export.statm(self.mm)

    def provenance(self, addr: int) -> list[Entry]:
        """The events that put the page at addr into its state, newest first, through mremap and fork."""
        return provenance.chain(self.machine, self.mm, addr)

    def snapshot(self, *, pages: bool = True, accounting: bool = True) -> Snapshot:
        """The address space as vm.Snapshot."""
        mm = self.mm
        status = {**export.status_fields(mm), "min_flt": self.min_flt, "maj_flt": self.maj_flt}
        return Snapshot(
            self.pid,
            self.machine.events.seq,
            export.vma_list(mm),
            export.page_runs(mm) if pages else None,
            export.accounting(mm, status) if accounting else None,
            method=f"model {self.machine.profile.name}",
        )
