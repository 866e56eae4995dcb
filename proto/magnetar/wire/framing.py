"""Protobuf messages that carry payload, joined from pieces. Pure.

protobuf copies bytes when a message takes them and several times more when it is serialized: 1 MiB costs 1.3 to 2.8 ms,
joined from pieces 0.03 ms. Fields of a message may stand in any order, so what protobuf serialized without the payload,
and the payload with its tag and length, are the message when they stand side by side.
"""

from __future__ import annotations

Pieces = list[bytes]
"""Of one message, in order."""

_LENGTH_DELIMITED = 2


def bytes_field(number: int, value: bytes) -> Pieces:
    """A field of type bytes."""
    return [_start(number, len(value)), value]


def message_field(number: int, message: Pieces) -> Pieces:
    """A field that is a message itself."""
    return [_start(number, sum(map(len, message))), *message]


def _start(number: int, size: int) -> bytes:
    return _varint(number << 3 | _LENGTH_DELIMITED) + _varint(size)


def _varint(value: int) -> bytes:
    if value < 1 << 7:
        return bytes((value,))
    if value < 1 << 14:
        return bytes((value & 0x7F | 0x80, value >> 7))
    encoded = bytearray()
    while value > 0x7F:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    encoded.append(value)
    return bytes(encoded)
