"""The messages of a block as columns, little-endian. This is what a batch compresses.

    flags u8 (1 keys, 2 properties, 4 event times) | 3 bytes reserved
    payload lengths
    [key lengths, key bytes]                a length is stored + 1: 0 = no key
    [property lengths, property bytes]      0 = none
    [event times: i64 a message, microseconds UTC, INT64_MIN = none]
    payload bytes

A column of lengths is: width u8 (1, 2 or 4) | 3 bytes reserved | count * width bytes. The properties of a message are:
count u16, then for each key length u16, key, value length u32, value, both UTF-8.

Nothing here makes an object for each message but the values that are asked for: lengths are arrays, and values are cut
from one buffer by a reader that C drives.
"""

from __future__ import annotations

import struct
import sys
from array import array
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from io import BytesIO
from itertools import accumulate, chain, compress

NO_EVENT_TIME = -(1 << 63)

_KEYS = 1
_PROPERTIES = 2
_EVENT_TIMES = 4

_PREFIX_SIZE = 4
_TYPECODES = {1: "B", 2: "H", 4: "I"}
_EVENT_TIME_SIZE = 8

_U16 = struct.Struct("<H")
_U32 = struct.Struct("<I")

assert all(array(code).itemsize == width for width, code in _TYPECODES.items())


class MalformedBatch(ValueError):
    """These bytes are not a batch, or not the batch that its header describes; the message says what is wrong."""


@dataclass(slots=True)
class Columns:
    """The messages of a batch, each column as long as `payloads` or None if no message has such a value.

    event_times   microseconds UTC
    """

    payloads: list[bytes]
    keys: list[bytes | None] | None = None
    properties: list[Mapping[str, str] | None] | None = None
    event_times: list[int | None] | None = None


@dataclass(slots=True)
class Block:
    """The columns of a block, found and bounded in `source`, their values not yet made.

    *_lengths    one number a message; keys + 1, None where the block has no such column
    *_start      where the values of the column begin in `source`
    """

    source: bytes
    payload_lengths: array[int]
    payload_start: int
    key_lengths: array[int] | None = None
    key_start: int = 0
    property_lengths: array[int] | None = None
    property_start: int = 0
    event_times: array[int] | None = None


def encode_block(columns: Columns) -> list[bytes]:
    """The parts whose concatenation is the block; the last ones are the payloads.

    Raises ValueError if a column is not as long as the payloads, or a value does not fit its field.
    """
    count = len(columns.payloads)
    for column in (columns.keys, columns.properties, columns.event_times):
        if column is not None and len(column) != count:
            raise ValueError(f"columns differ in length: payloads=`{count}` other=`{len(column)}`")
    flags = 0
    parts = [b"", _encode_lengths(list(map(len, columns.payloads)))]
    if columns.keys is not None:
        lengths = [0 if key is None else len(key) + 1 for key in columns.keys]
        if any(lengths):
            flags |= _KEYS
            parts += _encode_lengths(lengths), b"".join([key for key in columns.keys if key])
    if columns.properties is not None:
        encoded = [encode_properties(pairs) if pairs else b"" for pairs in columns.properties]
        if any(encoded):
            flags |= _PROPERTIES
            parts += _encode_lengths(list(map(len, encoded))), b"".join(encoded)
    if columns.event_times is not None:
        times = [NO_EVENT_TIME if time is None else time for time in columns.event_times]
        if times.count(NO_EVENT_TIME) != count:
            flags |= _EVENT_TIMES
            parts.append(_encode_event_times(times))
    parts[0] = bytes((flags, 0, 0, 0))
    parts += columns.payloads
    return parts


def parse_block(source: bytes, start: int, end: int, count: int) -> Block:
    """Find the columns of the block that stands at start..end of the source; raises MalformedBatch.

    On return every column lies inside the block and the payloads end where it ends.
    """
    if end - start < _PREFIX_SIZE:
        raise MalformedBatch(f"block is short: bytes=`{end - start}`")
    flags = source[start]
    if flags & ~(_KEYS | _PROPERTIES | _EVENT_TIMES):
        raise MalformedBatch(f"block has unknown columns: flags=`{flags}`")
    payload_lengths, position = _parse_lengths(source, start + _PREFIX_SIZE, end, count)
    block = Block(source, payload_lengths, 0)
    if flags & _KEYS:
        block.key_lengths, block.key_start = _parse_lengths(source, position, end, count)
        key_bytes = sum(block.key_lengths) - count + block.key_lengths.count(0)
        position = _advance(block.key_start, key_bytes, end)
    if flags & _PROPERTIES:
        block.property_lengths, block.property_start = _parse_lengths(source, position, end, count)
        position = _advance(block.property_start, sum(block.property_lengths), end)
    if flags & _EVENT_TIMES:
        after = _advance(position, count * _EVENT_TIME_SIZE, end)
        block.event_times = _from_little_endian("q", source[position:after])
        position = after
    block.payload_start = position
    if position + sum(payload_lengths) != end:
        raise MalformedBatch(
            f"payloads do not fill the block: lengths=`{sum(payload_lengths)}` bytes=`{end - position}`"
        )
    return block


def join_blocks(blocks: Sequence[Block]) -> Block:
    """One block with the messages of all, in order. Copies, if there are several."""
    if len(blocks) == 1:
        return blocks[0]
    columns = [
        [(block.source, block.payload_start, block.payload_lengths) for block in blocks],
        [(block.source, block.key_start, _key_sizes(block.key_lengths)) for block in blocks],
        [(block.source, block.property_start, block.property_lengths or array("I")) for block in blocks],
    ]
    values = [b"".join([source[at : at + sum(lengths)] for source, at, lengths in column]) for column in columns]
    counts = [len(block.payload_lengths) for block in blocks]
    return Block(
        b"".join(values),
        array("I", chain.from_iterable(block.payload_lengths for block in blocks)),
        0,
        _joined("I", [block.key_lengths for block in blocks], counts, 0),
        len(values[0]),
        _joined("I", [block.property_lengths for block in blocks], counts, 0),
        len(values[0]) + len(values[1]),
        _joined("q", [block.event_times for block in blocks], counts, NO_EVENT_TIME),
    )


def payloads_of(block: Block, mask: bytes | None = None) -> list[bytes]:
    """The payloads, of the messages whose byte in the mask is 1 if there is a mask."""
    return _cut(block.source, block.payload_start, block.payload_lengths, mask)


def keys_of(block: Block, mask: bytes | None = None) -> list[bytes | None] | None:
    """The keys, masked like the payloads; None without such a column."""
    stored = block.key_lengths
    if stored is None:
        return None
    keys: list[bytes | None] = list(_cut(block.source, block.key_start, _key_sizes(stored), mask))
    if 0 not in stored:
        return keys
    present = stored if mask is None else compress(stored, mask)
    return [key if length else None for key, length in zip(keys, present, strict=True)]


def properties_of(block: Block, mask: bytes | None = None) -> list[Mapping[str, str] | None] | None:
    """The properties, masked like the payloads; None without such a column. Raises MalformedBatch."""
    if block.property_lengths is None:
        return None
    encoded = _cut(block.source, block.property_start, block.property_lengths, mask)
    return [decode_properties(data) if data else None for data in encoded]


def event_times_of(block: Block, mask: bytes | None = None) -> list[int | None] | None:
    """The event times, masked like the payloads; None without such a column."""
    if block.event_times is None:
        return None
    times: Iterable[int] = block.event_times if mask is None else compress(block.event_times, mask)
    return [None if time == NO_EVENT_TIME else time for time in times]


def encode_properties(pairs: Mapping[str, str]) -> bytes:
    """The properties of one message; raises ValueError if they do not fit the format."""
    try:
        parts = [_U16.pack(len(pairs))]
        for key, value in pairs.items():
            key_bytes, value_bytes = key.encode(), value.encode()
            parts += _U16.pack(len(key_bytes)), key_bytes, _U32.pack(len(value_bytes)), value_bytes
    except struct.error:
        raise ValueError(f"properties are too many or a name is too long: count=`{len(pairs)}`") from None
    return b"".join(parts)


def decode_properties(data: bytes) -> dict[str, str]:
    """What `encode_properties` made of at least one pair; raises MalformedBatch."""
    try:
        (count,) = _U16.unpack_from(data)
        position = _U16.size
        pairs: dict[str, str] = {}
        for _ in range(count):
            (key_size,) = _U16.unpack_from(data, position)
            value_at = position + _U16.size + key_size
            (value_size,) = _U32.unpack_from(data, value_at)
            end = value_at + _U32.size + value_size
            if end > len(data):
                raise MalformedBatch(f"property is cut off: bytes=`{len(data)}` end=`{end}`")
            pairs[data[position + _U16.size : value_at].decode()] = data[value_at + _U32.size : end].decode()
            position = end
    except (struct.error, UnicodeDecodeError) as error:
        raise MalformedBatch(f"properties are damaged: bytes=`{len(data)}`") from error
    if not pairs or len(pairs) != count or position != len(data):
        raise MalformedBatch(f"properties are not what they count: count=`{count}` bytes=`{len(data)}`")
    return pairs


def key_sizes(block: Block) -> array[int] | None:
    """The bytes of each key, 0 for no key; None without such a column."""
    return None if block.key_lengths is None else _key_sizes(block.key_lengths)


def _key_sizes(stored: array[int] | None) -> array[int]:
    if stored is None:
        return array("I")
    if 0 in stored:
        return array("I", [length - 1 if length else 0 for length in stored])
    return array("I", map((-1).__add__, stored))


def _cut(source: bytes, start: int, lengths: array[int], mask: bytes | None) -> list[bytes]:
    """The values that stand one behind the other from start on."""
    if mask is None:
        # A BytesIO shares the buffer, and its read() makes each value with no slice object and no offset in between.
        reader = BytesIO(source)
        reader.seek(start)
        return list(map(reader.read, lengths))
    starts = list(accumulate(lengths, initial=start))
    chosen = map(slice, compress(starts, mask), compress(starts[1:], mask))
    return list(map(source.__getitem__, chosen))


def _encode_event_times(times: list[int]) -> bytes:
    try:
        return _little_endian("q", times)
    except OverflowError:
        raise ValueError("event time is not a 64-bit number of microseconds") from None


def _encode_lengths(lengths: list[int]) -> bytes:
    """The column of lengths, in the smallest width that holds them all."""
    for width, typecode in _TYPECODES.items():
        # A width that does not do fails at the first number too large for it: cheaper than to look for the largest.
        with suppress(OverflowError):
            return bytes((width, 0, 0, 0)) + _little_endian(typecode, lengths)
    raise ValueError(f"value is too long: bytes=`{max(lengths)}`")


def _parse_lengths(source: bytes, position: int, end: int, count: int) -> tuple[array[int], int]:
    """The column of lengths at the position, and where it ends, which is inside the block."""
    start = _advance(position, _PREFIX_SIZE, end)
    typecode = _TYPECODES.get(source[position])
    if typecode is None:
        raise MalformedBatch(f"lengths are of an unknown width: width=`{source[position]}`")
    after = _advance(start, count * source[position], end)
    return _from_little_endian(typecode, source[start:after]), after


def _advance(position: int, size: int, end: int) -> int:
    if size > end - position:
        raise MalformedBatch(f"column does not fit the block: bytes=`{size}` left=`{end - position}`")
    return position + size


def _little_endian(typecode: str, numbers: list[int]) -> bytes:
    """Raises OverflowError if a number does not fit."""
    column = array(typecode, numbers)
    if sys.byteorder == "big":
        column.byteswap()
    return column.tobytes()


def _from_little_endian(typecode: str, data: bytes) -> array[int]:
    column = array(typecode, data)
    if sys.byteorder == "big":
        column.byteswap()
    return column


def _joined(
    typecode: str, columns: Sequence[array[int] | None], counts: Sequence[int], absent: int
) -> array[int] | None:
    """The columns one behind the other, with the value for "absent" where a block has none; None if no block has it."""
    if all(column is None for column in columns):
        return None
    joined = array(typecode)
    for column, count in zip(columns, counts, strict=True):
        joined.extend([absent] * count if column is None else column.tolist())
    return joined
