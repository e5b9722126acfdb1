"""The kernel of another machine: its end serves a `proof.machine.Local` on a port, and `connected` drives it from here.

Meant for virtual machines: the port there is a virtio-serial port, and what the hypervisor makes of it here is a Unix
socket. One request, one reply: each a length and a value in the form of `marshal`, which holds plain values only.
"""

from __future__ import annotations

import contextlib
import errno
import marshal
import os
import socket
import stat
import struct
import time
from collections.abc import Iterator
from functools import partial
from typing import Any, cast

from pagelens.proof.machine import PATIENCE, Local, Machine
from pagelens.vm.errors import (
    CapabilityMissingError,
    DamagedInputError,
    PagelensError,
    TargetGoneError,
    UsageError,
)

_LENGTH = struct.Struct("<I")
_MOST = 1 << 28  # bytes of an answer: pagemap of 128 GiB
_FORM = 2  # of marshal: older than any Python that we run on, so both ends may differ
_SERVED = frozenset(name for name in vars(Machine) if not name.startswith("_"))


class _Distant:
    # Each method of Machine is a request.
    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._number = 0
        self._buffer = b""

    def __getattr__(self, name: str) -> Any:
        if name not in _SERVED:
            raise AttributeError(name)
        method = partial(self._request, name)
        setattr(self, name, method)
        return method

    def _request(self, name: str, *args: Any) -> Any:
        self._number += 1
        data = marshal.dumps((self._number, name, args), _FORM)
        try:
            self._connection.sendall(_LENGTH.pack(len(data)) + data)
            number = 0
            while number < self._number:  # a Ctrl-C may have come before the last answer
                number, error, value = self._answer()
        except OSError as exc:
            raise TargetGoneError(f"the machine of the proof is gone: {exc}") from None
        except (ValueError, TypeError, EOFError):
            raise DamagedInputError("what answers there is not `pagelens model serve`") from None
        if error:
            raise _error(*error)
        return value

    def _answer(self) -> tuple[int, tuple[str, str, str] | None, Any]:
        have = _LENGTH.size
        self._receive(have)
        size = _LENGTH.unpack_from(self._buffer)[0]
        if size > _MOST:
            raise ValueError("too long")
        self._receive(have + size)
        body, self._buffer = self._buffer[have : have + size], self._buffer[have + size :]
        number, error, value = marshal.loads(body)
        return number, error, value

    def _receive(self, size: int) -> None:
        while len(self._buffer) < size:
            more = self._connection.recv(max(size - len(self._buffer), 65536))
            if not more:
                raise OSError("it has closed the connection")
            self._buffer += more


@contextlib.contextmanager
def connected(path: str) -> Iterator[Machine]:
    """The machine that serves at the Unix socket `path`. TargetGoneError where nobody does, or no longer."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(2 * PATIENCE / 1000)
        try:
            connection.connect(path)
        except OSError as exc:
            raise TargetGoneError(f"nobody serves at {path}: {exc.strerror or exc}") from None
        machine = cast("Machine", _Distant(connection))
        machine.facts()
        yield machine


def serve(port: str) -> None:
    """Do what comes through `port` until its other end closes.

    A child that is left then ends by itself: its pipes are ours. UsageError where the port cannot be opened."""
    machine = Local(min(os.sched_getaffinity(0)))  # where the interrupts of a small guest arrive
    try:
        fd = os.open(port, os.O_RDWR | os.O_NOCTTY | os.O_CLOEXEC)
    except OSError as exc:
        raise UsageError(f"cannot open the port {port}: {exc.strerror}") from None
    try:
        if not stat.S_ISCHR(os.fstat(fd).st_mode):
            raise UsageError(f"{port} is no port: not a character device")
        head = _read(fd, _LENGTH.size, wait=True)
        while head is not None:
            body = _read(fd, _LENGTH.unpack(head)[0])
            if body is None:
                break
            number, name, args = marshal.loads(body)
            reply = marshal.dumps((number, *_done(machine, name, args)), _FORM)
            out = memoryview(_LENGTH.pack(len(reply)) + reply)
            while out:
                out = out[os.write(fd, out) :]
            head = _read(fd, _LENGTH.size)
    finally:
        os.close(fd)


def _read(fd: int, size: int, *, wait: bool = False) -> bytes | None:
    # None: the other end has closed. wait: for it to come at all (a virtio port reads as ended until then).
    data = b""
    while len(data) < size:
        try:
            more = os.read(fd, size - len(data))
        except OSError as exc:
            if exc.errno != errno.EIO:  # of a terminal whose other end has closed
                raise
            more = b""
        if not more:
            if not wait:
                return None
            time.sleep(0.05)
        data += more
    return data


def _done(machine: Machine, name: str, args: tuple[Any, ...]) -> tuple[Any, Any]:
    # (None, value), or (what to raise at the other end, None).
    try:
        if name not in _SERVED:
            raise PagelensError(f"no such request: {name}")
        return None, getattr(machine, name)(*args)
    except CapabilityMissingError as exc:
        return ("CapabilityMissingError", str(exc), exc.capability), None
    except (PagelensError, OSError) as exc:
        return (type(exc).__name__, str(exc), ""), None


def _error(kind: str, text: str, capability: str) -> PagelensError:
    if kind == "CapabilityMissingError":
        return CapabilityMissingError(text, capability=capability)
    return TargetGoneError(text) if kind == "TargetGoneError" else PagelensError(f"{kind} there: {text}")
