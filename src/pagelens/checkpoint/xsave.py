"""The XSAVE area in the one layout that every gdb reads.

The CPU says where each component of the area lies (CPUID leaf 0xD), and makers differ: AMD has no MPX state and puts
AVX-512 and PKRU lower than Intel. A core file does not say which it is. gdb 13 and older take Intel's offsets and a
size that follows from xcr0 alone (gdbsupport/x86-xstate.h), warn of any other ("Unexpected size of section
.reg-xstate") and show no upper halves then; gdb 14 and later guess the layout from the size (i387-tdep.c,
i387_guess_xsave_layout), and know this one. Rejected: the area as it is with NT_X86_XSAVE_LAYOUT beside it (Linux 6.12
writes it into its cores; no released gdb reads it).
"""

from __future__ import annotations

SSE, AVX, MPX, AVX512, PKRU = 0x2, 0x4, 0x18, 0xE0, 0x200
_KNOWN = 0x3 | AVX | MPX | AVX512 | PKRU
_XCR0_AT, _IN_USE_AT = 464, 512  # sw_reserved.xfeatures, header.xfeatures (asm/fpu/types.h)
_HEADER_END = 576
# Component bit -> (bytes, Intel's offset).
_COMPONENTS = {2: (256, 576), 3: (64, 960), 4: (64, 1024), 5: (64, 1088), 6: (512, 1152), 7: (1024, 1664)}
_COMPONENTS[9] = (8, 2688)


def for_gdb(area: bytes) -> bytes:
    """`area` (uncompacted, as PTRACE_GETREGSET gives it) with Intel's offsets and of the size that its xcr0 tells.

    Components that gdb does not know (AMX tiles, APX) are left out where they are in their initial state; where
    one is in use, the area comes back as it is: nothing is lost, and gdb 13 warns.
    """
    if len(area) < _HEADER_END:
        return area
    xcr0, in_use = (int.from_bytes(area[at : at + 8], "little") for at in (_XCR0_AT, _IN_USE_AT))
    if in_use & ~_KNOWN or not xcr0 & SSE:
        return area
    xcr0 &= _KNOWN
    out = bytearray(_size(xcr0))
    out[:_HEADER_END] = area[:_HEADER_END]
    out[_XCR0_AT : _XCR0_AT + 8] = xcr0.to_bytes(8, "little")
    packed = len(area) < _size(xcr0)  # AMD's: each component follows the one before, 64-byte aligned
    at = _HEADER_END
    for bit, (size, place) in _COMPONENTS.items():
        if not xcr0 >> bit & 1:
            continue
        source = at if packed else place
        at = -(-(source + size) // 64) * 64
        if source + size > len(area):
            return area  # neither layout: better as it is than wrong
        out[place : place + size] = area[source : source + size]
    return bytes(out)


def _size(xcr0: int) -> int:
    for mask, size in ((PKRU, 2696), (AVX512, 2688), (MPX, 1088), (AVX, 832)):
        if xcr0 & mask:
            return size
    return _HEADER_END
