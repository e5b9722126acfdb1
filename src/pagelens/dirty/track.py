"""`track`: dirty pages of this process, or of another, epoch by epoch. The library's way in.

    with pagelens.track(weights=array) as t:
        work()
        for offset, length in t.epoch().of("weights"):
            save(offset, length)

A tracker owns one backend. It numbers and times the looks, serialises them over threads, notices exec (the
backend is made anew: everything in the new image is NEW) and refuses to be used in a forked child, whose
descriptors would still speak about the parent.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from pagelens.dirty import spans
from pagelens.dirty.choose import make_backend
from pagelens.dirty.epoch import Backend, Builder, Epoch, Look, Semantics, Why
from pagelens.dirty.spans import Spans
from pagelens.linux.procfs import Process
from pagelens.vm.closing import Closing
from pagelens.vm.errors import TargetGoneError, UsageError
from pagelens.vm.units import AddrRange, page_down, page_up
from pagelens.vm.vma import VmaList


def buffer_span(buffer: Any) -> tuple[int, int]:
    """(address, bytes) of an array, bytearray, mmap or anything else with one contiguous buffer."""
    if hasattr(buffer, "__array_interface__"):
        array = buffer
        if not array.flags.c_contiguous and not array.flags.f_contiguous:
            raise UsageError("cannot track an array that is not contiguous; track its base")
        return int(array.__array_interface__["data"][0]), int(array.nbytes)
    view = np.frombuffer(buffer, dtype=np.uint8)
    return int(view.__array_interface__["data"][0]), int(view.nbytes)


class Tracker(Closing):
    """Made by `track`. Use as a context manager; `close` leaves nothing behind."""

    def __init__(
        self,
        proc: Process,
        make: Callable[[Process], Backend],
        *,
        named: dict[str, tuple[int, int]] | None = None,
        keep: tuple[object, ...] = (),
    ) -> None:
        self._proc = proc
        self._make = make
        self._named = named or {}
        self._keep = keep  # the buffers: their memory must not be freed and reused while it is named
        self._lock = threading.Lock()
        self._owner = os.getpid()
        self._closed = False
        self._first_seen = False
        self._number = 0
        self._fresh_image = False
        self._watching = True
        self._backend = make(proc)
        try:
            self._backend.arm()
        except TargetGoneError:
            self._reattach()  # exec meanwhile
        except BaseException:
            self._backend.close()
            raise
        self._last_ns = time.monotonic_ns()

    @property
    def semantics(self) -> Semantics:
        """What the backend promises."""
        return self._backend.semantics

    @property
    def backend(self) -> str:
        """The backend's name."""
        return self._backend.semantics.name

    @property
    def pid(self) -> int:
        """The process that is watched."""
        return self._proc.pid

    def epoch(self) -> Epoch:
        """The pages written since the last call (or since the start), and a new epoch begins. Thread-safe.

        Raises TargetGoneError when the process has ended."""
        with self._lock:
            self._check()
            begin = time.monotonic_ns()
            look = self._look()
            if self._first_seen:  # there was no look before, since when a page could have been written
                look.builder, self._first_seen = _as_new(look.builder), False
            done = time.monotonic_ns()
            start, count, why = look.builder.columns()
            epoch = Epoch(
                epoch=self._number,
                time_ns=done,
                span_ns=done - self._last_ns,
                cost_ns=done - begin,
                backend=self._backend.semantics.name,
                start=start,
                count=count,
                why=why,
                vmas=look.vmas,
                pid=self._proc.pid,
                complete=look.complete,
                notes=tuple(look.notes),
                unmapped_pages=look.unmapped_pages,
                zero_reads=look.zero_reads,
                named=self._named,
                details=look.details,
            )
            self._number += 1
            self._last_ns = done
            return epoch

    def lost(self, why: str) -> Epoch:
        """An epoch of which nothing is known but that it was (the process ended before it could be looked at)."""
        with self._lock:
            now = time.monotonic_ns()
            none = np.empty(0, np.uint64)
            epoch = Epoch(
                epoch=self._number,
                time_ns=now,
                span_ns=now - self._last_ns,
                cost_ns=0,
                backend=self._backend.semantics.name,
                start=none,
                count=none,
                why=np.empty(0, np.uint8),
                vmas=VmaList(),
                pid=self._proc.pid,
                complete=False,
                notes=(why,),
            )
            self._number += 1
            self._last_ns = now
            return epoch

    def list_everything(self) -> None:
        """Make the next epoch list all contents, as NEW (a child that was found between looks)."""
        with self._lock:
            self._arm_from_nothing()
            self._first_seen = True

    def contents(self) -> Spans:
        """The pages that hold private contents as of the last look, or of the start; empty where the backend
        does not know."""
        with self._lock:
            held = getattr(self._backend, "contents", None)
            return held() if held is not None else spans.EMPTY

    def epochs(self, interval: float, count: int | None = None) -> Iterator[Epoch]:
        """An epoch every `interval` seconds, `count` of them or until the process ends."""
        due = time.monotonic()
        while count is None or count > 0:
            due += interval
            time.sleep(max(0.0, due - time.monotonic()))
            try:
                yield self.epoch()
            except TargetGoneError:
                if count is not None:
                    raise
                return
            if count is not None:
                count -= 1

    def _look(self) -> Look:
        renewed = False
        for _ in range(5):
            if not self._watching:
                self._reattach()
                renewed = True
                if not self._watching:
                    break
            try:
                look = self._backend.look()
            except TargetGoneError:
                self._watching = False
                continue
            if renewed:
                look.builder = _as_new(look.builder)
                look.notes.append("the process called exec: everything that the new image holds is listed")
            return look
        look = Look(Builder(), VmaList(), complete=False)
        look.notes.append("the process calls exec faster than it can be watched: what it wrote is not known")
        return look

    def _reattach(self) -> None:
        # The address space is gone: by exec (then the process lives) or by exit. Where exec follows exec, it is
        # given up until the next look.
        self._backend.close()
        self._watching = False
        for _ in range(10):
            if not self._proc.alive:
                break
            try:
                self._backend = self._make(self._proc)
                self._backend.arm()
            except TargetGoneError:
                self._backend.close()
                time.sleep(0.002)  # exec again, or exiting
                continue
            self._watching = True
            self._arm_from_nothing()
            return
        if not self._proc.alive:
            raise TargetGoneError(f"process {self._proc.pid} has ended") from None

    def _arm_from_nothing(self) -> None:
        # What the new image wrote before it was armed belongs to this epoch too.
        forget = getattr(self._backend, "forget", None)
        if forget is not None:
            forget()

    def _check(self) -> None:
        if self._closed:
            raise UsageError("this tracker is closed")
        if os.getpid() != self._owner:
            raise UsageError("this tracker belongs to the parent process; call pagelens.track() in the child")

    def close(self) -> None:
        """Stop. In a forked child only its own descriptors close; the parent's tracking goes on."""
        with self._lock:
            if not self._closed:
                self._closed = True
                self._backend.close()
                self._proc.close()


def _as_new(builder: Builder) -> Builder:
    out = Builder()
    out.add(builder.seen, Why.NEW)
    return out


def track(
    *buffers: Any,
    pid: int | None = None,
    backend: str = "auto",
    ranges: list[AddrRange] | None = None,
    keep_huge: bool = False,
    **named: Any,
) -> Tracker:
    """Watch written pages.

    Positional and named `buffers` (arrays, bytearrays, mmaps): only their pages, in this process; a named one
    is asked for with `Epoch.of(name)` (positional ones are named "0", "1", …). `ranges`: address ranges.
    Neither: everything that the process can write. `pid`: another process. `backend`: auto, pagescan,
    soft-dirty, mprotect, uffd-sync (`pagelens.dirty.choose.BACKENDS`).

    Raises CapabilityMissingError (with the fix) where the backend cannot work here, UsageError for arguments
    that make no sense, TargetGoneError for a process that is not there.
    """
    everything = {str(i): b for i, b in enumerate(buffers)} | named
    if everything and pid not in (None, os.getpid()):
        raise UsageError("buffers are of this process; for another one give ranges")
    spots = {}
    pairs = [(r.start, r.end) for r in ranges or ()]
    for name, buffer in everything.items():
        at, size = buffer_span(buffer)
        if not size:
            raise UsageError(f"buffer {name} is empty")
        spots[name] = (at, at + size)
        pairs.append((page_down(at), page_up(at + size)))
    where: Spans | None = spans.of(pairs) if pairs else None
    proc = Process.open(os.getpid() if pid is None else pid)
    try:
        return Tracker(
            proc,
            lambda p: make_backend(backend, p, ranges=where, keep_huge=keep_huge),
            named=spots,
            keep=tuple(everything.values()),
        )
    except BaseException:
        proc.close()
        raise
