"""Operations that take more than one system call of the child, or a call from outside it.

Each is a function of the oracle and the operation. What a call must read from memory travels in the words of
the command itself, which lie in the child's slot.
"""

from __future__ import annotations

import ctypes
import errno
import os
import resource
import struct
from collections.abc import Callable
from typing import TYPE_CHECKING

from pagelens.model.op import Op, Outcome

if TYPE_CHECKING:
    from pagelens.proof.oracle import Oracle

_PWRITE, _SHMGET, _SHMAT, _SHMCTL, _FTRUNCATE, _CAPSET, _MEMFD = 18, 29, 30, 31, 77, 126, 319
_WORDS = 16  # offset of the command's six argument words in a slot
_IPC_CREAT, _SHM_RDONLY, _SHM_EXEC = 0o1000, 0o10000, 0o100000


def clear_refs(oracle: Oracle, op: Op) -> Outcome:
    """A write into /proc/PID/clear_refs, from outside."""
    fd = oracle.process(op.proc).fd("clear_refs", os.O_WRONLY)
    try:
        os.write(fd, b"%d\n" % op.flags)
        result = 0
    except OSError as exc:
        result = -(exc.errno or errno.EIO)
    finally:
        os.close(fd)
    oracle.settle(op.proc)
    return Outcome(result)


def memfd(oracle: Oracle, op: Op) -> Outcome:
    """memfd_create and ftruncate."""
    low, high = struct.unpack("<2Q", op.result.encode()[:15].ljust(16, b"\0"))
    at = oracle.slot_address(op.proc) + _WORDS + 4 * 8
    made = oracle.call(op.proc, _MEMFD, at, 0, 0, 0, low, high)
    if made.result < 0:
        return made
    oracle.files[op.result] = made.result
    return oracle.call(op.proc, _FTRUNCATE, made.result, op.length)


def pwrite(oracle: Oracle, op: Op) -> Outcome:
    """pwrite of zeros."""
    address, most = oracle.zeros
    return oracle.call(op.proc, _PWRITE, oracle.files[op.file], address, min(op.length, most), op.offset)


def shmat(oracle: Oracle, op: Op) -> Outcome:
    """shmget, shmat, and IPC_RMID at once, so that the segment ends with its last mapping."""
    made = oracle.call(op.proc, _SHMGET, 0, op.length, _IPC_CREAT | 0o700)
    if made.result < 0:
        return made
    flags = op.flags | (0 if op.prot & 2 else _SHM_RDONLY) | (_SHM_EXEC if op.prot & 4 else 0)
    address = oracle.names.resolve(op.place) if op.place is not None else 0
    outcome = oracle.call(op.proc, _SHMAT, made.result, address, flags)
    oracle.call(op.proc, _SHMCTL, made.result, 0)
    return outcome


def rlimit(oracle: Oracle, op: Op) -> Outcome:
    """prlimit of the soft limit, within the hard one."""
    pid = oracle.leader_pid(op.proc)
    hard = resource.prlimit(pid, op.flags)[1]
    try:
        resource.prlimit(pid, op.flags, (-1 if op.length >> 63 else op.length, hard))
    except (OSError, ValueError):
        return Outcome(-errno.EPERM)
    return Outcome(0)


def uncap(oracle: Oracle, op: Op) -> Outcome:
    """capset to nothing; header and data lie in the words of the command."""
    words = oracle.slot_address(op.proc) + _WORDS
    return oracle.call(op.proc, _CAPSET, words + 2 * 8, words + 3 * 8, 0x2008_0522)


class _Vector(ctypes.Structure):
    _fields_ = (("base", ctypes.c_void_p), ("length", ctypes.c_size_t))


_libc = ctypes.CDLL(None, use_errno=True)


def remote(oracle: Oracle, op: Op) -> Outcome:
    """process_vm_readv or process_vm_writev by this process; faults are counted here, not in the child."""
    assert op.place is not None
    write = op.name == "poke"
    buffer = ctypes.create_string_buffer(max(op.length, 1))
    ours = _Vector(ctypes.addressof(buffer), op.length)
    theirs = _Vector(oracle.names.resolve(op.place), op.length)
    function = _libc.process_vm_writev if write else _libc.process_vm_readv
    function.restype = ctypes.c_ssize_t
    done = function(oracle.leader_pid(op.proc), ctypes.byref(ours), 1, ctypes.byref(theirs), 1, 0)
    return Outcome(done if done >= 0 else -ctypes.get_errno())


SPECIAL: dict[str, Callable[[Oracle, Op], Outcome]] = {
    "clear_refs": clear_refs,
    "memfd": memfd,
    "pwrite": pwrite,
    "shmat": shmat,
    "rlimit": rlimit,
    "uncap": uncap,
    "peek": remote,
    "poke": remote,
}
