"""Call stacks out of recorded registers and the top of the stack (.eh_frame, by libdw in the C core).

Frame pointers are missing from most distribution binaries; a copy of 1 KiB of stack beside the registers holds
the return addresses of the innermost calls at the price of one frame-pointer walk. What lies beyond the copy is
cut off, and is counted as such.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pagelens.linux.native import library
from pagelens.vm.closing import Closing
from pagelens.vm.errors import CapabilityMissingError
from pagelens.vm.vma import Vma

REGISTERS = (
    *("rax", "rdx", "rcx", "rbx", "rsi", "rdi", "rbp", "rsp"),
    *("r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15", "rip"),
)
MAX_FRAMES = 64


@dataclass(frozen=True, slots=True)
class Stacks:
    """frames: uint64[n, MAX_FRAMES], the instruction first, then return addresses; count: uint8[n];
    complete: bool[n], whether the outermost frame was reached."""

    frames: npt.NDArray[np.uint64]
    count: npt.NDArray[np.uint8]
    complete: npt.NDArray[np.bool_]


def maps_text(vmas: Iterable[Vma]) -> str:
    """The file mappings in the form of /proc/PID/maps, which libdw reads."""
    return "".join(
        f"{v.start:x}-{v.end:x} {v.perms} {v.offset:08x} {v.dev} {v.inode} {v.name}\n"
        for v in vmas
        if v.name.startswith("/")
    )


class Unwinder(Closing):
    """Unwinds samples of one address space.

    Raises CapabilityMissingError where libdw is not installed.
    """

    def __init__(self, vmas: Iterable[Vma]) -> None:
        lib = library()
        if not lib.pl_unwind_available():
            raise CapabilityMissingError(
                "stacks by .eh_frame need libdw", capability="libdw", fix="apt-get install -y elfutils"
            )
        handle = ctypes.c_void_p
        size, byte = ctypes.c_size_t, ctypes.c_ubyte
        lib.pl_unwind_open.restype = handle
        lib.pl_unwind_open.argtypes = [ctypes.c_char_p]
        lib.pl_unwind_close.argtypes = [handle]
        lib.pl_unwind.argtypes = [handle, handle, handle, handle, size, size, handle, byte, handle, handle]
        lib.pl_unwind.restype = None
        self._lib = lib
        text = maps_text(vmas)
        self._handle: int | None = lib.pl_unwind_open(text.encode()) if text else None

    def unwind(
        self,
        regs: npt.NDArray[np.uint64],
        stacks: npt.NDArray[np.uint8],
        lengths: npt.NDArray[np.uint32] | None = None,
    ) -> Stacks:
        """regs: uint64[n, 17] in the order of REGISTERS. stacks: uint8[n, bytes] from the stack pointer up, of
        which lengths[i] (all, by default) are good."""
        n = len(regs)
        if regs.shape != (n, len(REGISTERS)) or stacks.ndim != 2 or len(stacks) != n:
            raise ValueError(f"shapes {regs.shape}, {stacks.shape} are not [n, 17], [n, bytes]")
        regs = np.ascontiguousarray(regs, dtype=np.uint64)
        stacks = np.ascontiguousarray(stacks, dtype=np.uint8)
        if lengths is None:
            lengths = np.full(n, stacks.shape[1], dtype=np.uint32)
        lengths = np.ascontiguousarray(np.minimum(lengths, stacks.shape[1]), dtype=np.uint32)
        frames = np.zeros((n, MAX_FRAMES), dtype=np.uint64)
        count = np.zeros(n, dtype=np.uint8)
        complete = np.zeros(n, dtype=np.uint8)
        if self._handle is None:
            frames[:, 0] = regs[:, 16]
            count[:] = 1
        else:
            pointers = [a.ctypes.data for a in (regs, stacks, lengths)]
            out = [a.ctypes.data for a in (count, complete)]
            self._lib.pl_unwind(
                self._handle, *pointers, stacks.shape[1], n, frames.ctypes.data, MAX_FRAMES, *out
            )
        return Stacks(frames, count, complete.astype(np.bool_))

    def close(self) -> None:
        """Free what libdw holds."""
        if self._handle:
            self._lib.pl_unwind_close(self._handle)
            self._handle = None
