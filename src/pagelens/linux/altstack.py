"""Alternate signal stacks (sigaltstack(2)) of another process's threads, read by a BPF iterator over tasks.

ptrace and /proc show all of a thread's state but this. Without BPF (no privilege, no BTF, an object that was
not built) it is not known, and the answer says so. Source: native/bpf/altstack.bpf.c; task_struct.sas_ss_*.
"""

from __future__ import annotations

import ctypes
import functools
import struct

from pagelens.linux.bpf import BpfObject, map_update
from pagelens.linux.native import lib_dir
from pagelens.vm.errors import CapabilityMissingError

SS_DISABLE = 2
_RECORD = struct.Struct("<QQII")
Altstack = tuple[int, int, int]  # sp, flags, size, as in stack_t; size 0: none


class AltStacks:
    """The loaded iterator. Raises CapabilityMissingError."""

    def __init__(self) -> None:
        self._object = BpfObject(lib_dir() / "altstack.bpf.o")
        try:
            self._object.load()
            self._wanted = self._object.map_fd(".bss")
            self._link = self._object.prepare_iterator("altstacks")
        except BaseException:
            self._object.close()
            raise

    def read(self, pid: int) -> dict[int, Altstack]:
        """tid -> its alternate stack, of each thread of the process (pid and tids in our namespace)."""
        map_update(self._wanted, ctypes.c_uint32(0), ctypes.c_uint32(pid))
        found = self._object.run_iterator(self._link)
        return {
            tid: (sp, flags | (0 if size else SS_DISABLE), size)
            for sp, size, tid, flags in _RECORD.iter_unpack(found)
        }


@functools.cache
def prepare() -> AltStacks | str:
    """Load it, once in this process: that takes milliseconds, so do it before a target is held. The reason
    where it cannot be."""
    try:
        return AltStacks()
    except CapabilityMissingError as error:
        return str(error)


def read(pid: int) -> tuple[dict[int, Altstack], str]:
    """(tid -> alternate stack, why they are not known or "")."""
    reader = prepare()
    if isinstance(reader, str):
        return {}, reader
    try:
        return reader.read(pid), ""
    except (CapabilityMissingError, OSError) as error:
        return {}, str(error)
