"""Operations that take more than one system call of the child, or a call from outside it.

Each is a function of the oracle and the operation. What a call must read from memory travels in the words of
the command itself, which lie in the child's slot.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Callable
from typing import TYPE_CHECKING

from pagelens.model.op import Op, Outcome, disk_name
from pagelens.vm.units import PAGE_SIZE

if TYPE_CHECKING:
    from pagelens.proof.oracle import Oracle

_OPEN, _PWRITE, _SHMGET, _SHMAT, _SHMCTL, _FTRUNCATE, _CAPSET, _MEMFD = 2, 18, 29, 30, 31, 77, 126, 319
_WORDS = 16  # offset of the command's six argument words in a slot
_IPC_CREAT, _SHM_RDONLY, _SHM_EXEC = 0o1000, 0o10000, 0o100000


def clear_refs(oracle: Oracle, op: Op) -> Outcome:
    """A write into /proc/PID/clear_refs, from outside."""
    result = oracle.process(op.proc).write("clear_refs", b"%d\n" % op.flags)
    oracle.settle(op.proc)
    return Outcome(result)


def _text(text: str) -> tuple[int, int]:
    # The two last words of a command.
    low, high = struct.unpack("<2Q", text.encode()[:15].ljust(16, b"\0"))
    return low, high


def memfd(oracle: Oracle, op: Op) -> Outcome:
    """memfd_create and ftruncate."""
    at = oracle.slot_address(op.proc) + _WORDS + 4 * 8
    made = oracle.call(op.proc, _MEMFD, at, 0, 0, 0, *_text(op.result))
    if made.result < 0:
        return made
    oracle.files[op.result] = made.result
    return oracle.call(op.proc, _FTRUNCATE, made.result, op.length)


def disk(oracle: Oracle, op: Op) -> Outcome:
    """A file on disk, made outside and opened by the child, then unlinked."""
    path = oracle.machine.disk(op.length // PAGE_SIZE)
    try:
        at = oracle.slot_address(op.proc) + _WORDS + 4 * 8
        made = oracle.call(op.proc, _OPEN, at, os.O_RDWR, 0, 0, *_text(path))
    finally:
        oracle.machine.unlink(path)
    if made.result < 0:
        return made
    oracle.files[op.result] = made.result
    oracle.disks[f"{path} (deleted)"] = disk_name(op.result)
    return Outcome(0, made.faults)


def pwrite(oracle: Oracle, op: Op) -> Outcome:
    """pwrite of zeros; into a file on disk page by page, as a larger one would make larger folios."""
    address, most = oracle.zeros
    length = min(op.length, most)
    step = PAGE_SIZE if disk_name(op.file) in oracle.disks.values() else most
    done = Outcome(0)
    for at in range(0, length, step):
        size = min(step, length - at)
        one = oracle.call(op.proc, _PWRITE, oracle.files[op.file], address, size, op.offset + at)
        if one.result < 0:
            return one
        done = Outcome(done.result + one.result, done.faults + one.faults)
    return done


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
    soft = -1 if op.length >> 63 else op.length
    return Outcome(oracle.machine.limit(oracle.leader_pid(op.proc), op.flags, soft))


def uncap(oracle: Oracle, op: Op) -> Outcome:
    """capset to nothing; header and data lie in the words of the command."""
    words = oracle.slot_address(op.proc) + _WORDS
    return oracle.call(op.proc, _CAPSET, words + 2 * 8, words + 3 * 8, 0x2008_0522)


def remote(oracle: Oracle, op: Op) -> Outcome:
    """process_vm_readv or process_vm_writev by the harness; faults are counted there, not in the child."""
    assert op.place is not None
    pid, addr = oracle.leader_pid(op.proc), oracle.names.resolve(op.place)
    return Outcome(oracle.machine.remote(pid, addr, op.length, op.name == "poke"))


SPECIAL: dict[str, Callable[[Oracle, Op], Outcome]] = {
    "clear_refs": clear_refs,
    "memfd": memfd,
    "disk": disk,
    "pwrite": pwrite,
    "shmat": shmat,
    "rlimit": rlimit,
    "uncap": uncap,
    "peek": remote,
    "poke": remote,
}
