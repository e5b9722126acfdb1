"""The wire format of Protocol Buffers, as much as CRIU's images need: varints and length-delimited fields.

Rejected: the protobuf package with CRIU's .proto files (a dependency and copied definitions, for three
messages).
"""

from __future__ import annotations

from collections.abc import Iterator

from pagelens.vm.errors import DamagedInputError


def varint(value: int) -> bytes:
    """An unsigned (or 64-bit two's complement) integer."""
    value &= 2**64 - 1
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def field(number: int, value: int | bytes) -> bytes:
    """One field: an int as varint, bytes as length-delimited."""
    if isinstance(value, bytes):
        return varint(number << 3 | 2) + varint(len(value)) + value
    return varint(number << 3) + varint(value)


def fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """(number, value) of each field; fixed32 and fixed64 as int. DamagedInputError."""
    at = 0
    while at < len(data):
        key, at = _read(data, at)
        match key & 7:
            case 0:
                value, at = _read(data, at)
                yield key >> 3, value
            case 2:
                size, at = _read(data, at)
                if at + size > len(data):
                    raise DamagedInputError("a field of an image is cut off")
                yield key >> 3, data[at : at + size]
                at += size
            case 1 | 5:
                size = 8 if key & 7 == 1 else 4
                yield key >> 3, int.from_bytes(data[at : at + size], "little")
                at += size
            case kind:
                raise DamagedInputError(f"not a protobuf field (wire type {kind})")


def _read(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        if at >= len(data) or shift > 63:
            raise DamagedInputError("a number in an image is cut off")
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        shift += 7
        if byte < 0x80:
            return value, at
