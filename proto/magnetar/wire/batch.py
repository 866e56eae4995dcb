"""A batch: what a producer packed together. The header is for everyone on its way, the body for the consumer.

Header, big-endian, 72 bytes:

     0 magic u16 = 0x4D42   2 version u8 = 1   3 reserved u8   4 length u32, of the whole batch
     8 crc32c u32, of all bytes from 12 on
    12 flags u16: 1 = keyed, a slot for each message   14 codec u8   15 reserved u8   16 count u32
    20 min_slot u16   22 max_slot u16   24 producer_id 16 bytes   40 epoch u64
    48 previous i64, last sequence of the producer's batch before, -1 = none   56 last i64
    64 body size u32, uncompressed   68 body_offset u32

then, if keyed, count slots u16; then extensions up to body_offset: type u16 (0x8000 = refuse the batch unless you know
this type), length u32, bytes. Sequences are consecutive: the first is last - count + 1. A batch that is not keyed has
one slot, min_slot = max_slot.

The body begins with its directory, big-endian: block count u16, reserved u16, then for each block first message u32,
count u32, min_slot u16, max_slot u16, uncompressed size u32, compressed size u32. The blocks follow, each compressed by
itself; `columns.py` has their form. The body size of the header is the sum of the blocks' uncompressed sizes.

A decoder believes no number before it compared it with the bytes that are there, and never allocates more than the
header's body size, which is limited.
"""

from __future__ import annotations

import struct
import sys
from array import array
from collections.abc import Mapping, Sequence
from functools import cached_property
from io import BytesIO
from itertools import accumulate
from typing import TYPE_CHECKING, NamedTuple

from fastcrc import crc32

from magnetar.wire import columns as columnar
from magnetar.wire import compression, selection
from magnetar.wire.columns import Block, Columns, MalformedBatch
from magnetar.wire.compression import Codec, DecompressionFailed
from magnetar.wire.slots import SLOTS

if TYPE_CHECKING:
    import pyarrow

__all__ = [
    "BODY_BYTES_MAX",
    "CHUNK",
    "COUNT_MAX",
    "DELIVER_AT",
    "ENCRYPTION_KEY",
    "HEADER_SIZE",
    "KEYED",
    "KEY_TYPE",
    "MUST_UNDERSTAND",
    "NO_SEQUENCE",
    "ORIGIN",
    "PRODUCER_ID_SIZE",
    "SCHEMA_ID",
    "SEQUENCES",
    "TRANSACTION",
    "BatchBody",
    "BatchHeader",
    "Codec",
    "Columns",
    "MalformedBatch",
    "UnknownExtension",
    "count_of",
    "decode_batch",
    "encode_batch",
    "extensions",
    "parse_header",
    "restamp",
    "slots",
    "to_arrow",
]

HEADER_SIZE = 72
MAGIC = 0x4D42
VERSION = 1
PRODUCER_ID_SIZE = 16
NO_SEQUENCE = -1

KEYED = 1

DELIVER_AT = 1
SEQUENCES = 2
CHUNK = 3
SCHEMA_ID = 4
TRANSACTION = 5
ENCRYPTION_KEY = 6
ORIGIN = 7
KEY_TYPE = 8
MUST_UNDERSTAND = 0x8000

COUNT_MAX = 1_000_000
"""Messages of a batch."""

BODY_BYTES_MAX = 64 << 20
"""Uncompressed bytes of a body. What brokers accept, every consumer can read."""

_START = struct.Struct(">HBxII")
_FIELDS = struct.Struct(">HBxIHH16sQqqII")
_HEADER = struct.Struct(">HBxIIHBxIHH16sQqqII")
_CHECKED_FROM = _START.size
_COUNT = struct.Struct(">I")
_COUNT_AT = 16
_EXTENSION = struct.Struct(">HI")
_DIRECTORY = struct.Struct(">HH")
_DIRECTORY_BLOCK = struct.Struct(">IIHHII")
_LENGTH_MAX = 0xFFFF_FFFF
_SLOT_SIZE = 2
_SEQUENCE_MAX = (1 << 63) - 1
_EPOCH_MAX = (1 << 64) - 1

_CODECS = tuple(Codec)
_UNDERSTOOD: frozenset[int] = frozenset()

assert _HEADER.size == HEADER_SIZE == _START.size + _FIELDS.size


class UnknownExtension(MalformedBatch):
    """The batch has an extension that must be understood, and is not."""


class BatchHeader(NamedTuple):
    """The header of a batch, checked. Fields as in the module's docstring; `length` and `body_offset` in bytes."""

    length: int
    crc: int
    flags: int
    codec: Codec
    count: int  # type: ignore[assignment]  # of messages; nobody counts the values of a header
    min_slot: int
    max_slot: int
    producer_id: bytes
    epoch: int
    previous: int
    last: int
    body_size: int
    body_offset: int

    @property
    def first_sequence(self) -> int:
        return self.last - self.count + 1

    @property
    def keyed(self) -> bool:
        return bool(self.flags & KEYED)


def encode_batch(
    columns: Columns,
    *,
    producer_id: bytes,
    epoch: int,
    previous: int,
    last: int,
    slots: array[int] | None = None,
    slot: int = 0,
    codec: int = Codec.NONE,
    extensions: Sequence[tuple[int, bytes]] = (),
) -> bytes:
    """The bytes of a batch: keyed if there are slots, one a message, else of the one slot.

    Raises ValueError if it is empty, too large, or if a value does not fit the format.
    """
    count = len(columns.payloads)
    if not 1 <= count <= COUNT_MAX:
        raise ValueError(f"batch has no messages or too many: count=`{count}` max=`{COUNT_MAX}`")
    if slots is not None and len(slots) != count:
        raise ValueError(f"batch does not have a slot for each message: slots=`{len(slots)}` count=`{count}`")
    if len(producer_id) != PRODUCER_ID_SIZE:
        raise ValueError(f"producer id is not {PRODUCER_ID_SIZE} bytes long: bytes=`{len(producer_id)}`")
    if not (NO_SEQUENCE <= previous <= _SEQUENCE_MAX and count - 1 <= last <= _SEQUENCE_MAX):
        raise ValueError(f"sequence is out of range: previous=`{previous}` last=`{last}` count=`{count}`")
    if not (0 <= slot < SLOTS and 0 <= epoch <= _EPOCH_MAX):
        raise ValueError(f"slot or epoch is out of range: slot=`{slot}` epoch=`{epoch}`")
    block = columnar.encode_block(columns)
    body_size = sum(map(len, block))
    if body_size > BODY_BYTES_MAX:
        raise ValueError(f"batch is too large: bytes=`{body_size}` max=`{BODY_BYTES_MAX}`")
    codec, stored_size = Codec(codec), body_size
    if codec is not Codec.NONE:
        block = [compression.compress(codec, b"".join(block))]
        stored_size = len(block[0])
    low, high = (slot, slot) if slots is None else (min(slots), max(slots))
    column = b"" if slots is None else _slots_to_bytes(slots)
    extra = b"".join([_EXTENSION.pack(kind, len(data)) + data for kind, data in extensions])
    body_offset = HEADER_SIZE + len(column) + len(extra)
    fields = _FIELDS.pack(
        0 if slots is None else KEYED,
        codec,
        count,
        low,
        high,
        producer_id,
        epoch,
        previous,
        last,
        body_size,
        body_offset,
    )
    directory = _DIRECTORY.pack(1, 0) + _DIRECTORY_BLOCK.pack(0, count, low, high, body_size, stored_size)
    return _seal([fields, column, extra, directory, *block])


def parse_header(data: bytes | memoryview, *, check: bool = True) -> BatchHeader:
    """The header of the batch that is exactly these bytes; raises MalformedBatch.

    On return the header agrees with itself and every extent it names lies inside the data. With check, the checksum is
    right, each slot lies in min_slot..max_slot, and no extension is there that must be understood and is not
    (UnknownExtension). Without, the caller knows the bytes as what was checked before.
    """
    if len(data) < HEADER_SIZE:
        raise MalformedBatch(f"batch is short: bytes=`{len(data)}`")
    magic, version, length, crc, flags, codec, count, *rest = _HEADER.unpack_from(data)
    if magic != MAGIC or version != VERSION:
        raise MalformedBatch(f"batch is of another format: magic=`{magic:04x}` version=`{version}`")
    if length != len(data):
        raise MalformedBatch(f"batch is not of its length: length=`{length}` bytes=`{len(data)}`")
    if check:
        computed = crc32.iscsi(memoryview(data)[_CHECKED_FROM:])
        if computed != crc:
            raise MalformedBatch(f"batch has a wrong checksum: stored=`{crc:08x}` computed=`{computed:08x}`")
    if flags & ~KEYED or codec > Codec.ZSTD:
        raise MalformedBatch(f"batch has unknown flags or an unknown codec: flags=`{flags}` codec=`{codec}`")
    header = BatchHeader(length, crc, flags, _CODECS[codec], count, *rest)
    _check_header(header)
    if check:
        _check_slots(data, header)
        _check_extensions(data, header)
    return header


def count_of(data: bytes | memoryview) -> int:
    """The messages of a batch, by a look at two fields of its header; raises MalformedBatch."""
    if len(data) < HEADER_SIZE:
        raise MalformedBatch(f"batch is short: bytes=`{len(data)}`")
    magic, version, length, _ = _START.unpack_from(data)
    (count,) = _COUNT.unpack_from(data, _COUNT_AT)
    if magic != MAGIC or version != VERSION or length != len(data) or not 1 <= count <= COUNT_MAX:
        raise MalformedBatch(f"batch has a damaged header: length=`{length}` bytes=`{len(data)}` count=`{count}`")
    return int(count)


def slots(data: bytes | memoryview, header: BatchHeader) -> array[int]:
    """The slot of each message, an array of typecode "H"; raises MalformedBatch if the data is too short for it."""
    if not header.keyed:
        return array("H", [header.min_slot]) * header.count
    column = bytes(data[HEADER_SIZE : _slots_end(header)])
    if len(column) != header.count * _SLOT_SIZE:
        raise MalformedBatch(f"slots are cut off: bytes=`{len(data)}` count=`{header.count}`")
    found = array("H", column)
    if sys.byteorder == "little":
        found.byteswap()
    return found


def extensions(data: bytes | memoryview, header: BatchHeader) -> list[tuple[int, bytes]]:
    """Type, with its must-understand bit, and bytes of each extension; raises MalformedBatch."""
    found: list[tuple[int, bytes]] = []
    position, end = _slots_end(header), min(header.body_offset, len(data))
    while position < end:
        if end - position < _EXTENSION.size:
            raise MalformedBatch(f"extension is cut off: left=`{end - position}`")
        kind, size = _EXTENSION.unpack_from(data, position)
        position += _EXTENSION.size
        if size > end - position:
            raise MalformedBatch(f"extension does not fit: type=`{kind}` bytes=`{size}` left=`{end - position}`")
        found.append((kind, bytes(data[position : position + size])))
        position += size
    return found


def restamp(data: bytes, *, previous: int, epoch: int | None = None, last: int | None = None) -> bytes:
    """The same batch behind another one in the producer's chain, under another epoch or last sequence if given.

    Raises MalformedBatch if the data is damaged: a new checksum must never cover that up.
    """
    header = parse_header(data)
    last = header.last if last is None else last
    sequences = NO_SEQUENCE <= previous <= _SEQUENCE_MAX and 0 <= last <= _SEQUENCE_MAX
    if not (sequences and (epoch is None or 0 <= epoch <= _EPOCH_MAX)):
        raise ValueError(f"sequence or epoch is out of range: previous=`{previous}` last=`{last}` epoch=`{epoch}`")
    fields = _FIELDS.pack(
        header.flags,
        header.codec,
        header.count,
        header.min_slot,
        header.max_slot,
        header.producer_id,
        header.epoch if epoch is None else epoch,
        previous,
        last,
        header.body_size,
        header.body_offset,
    )
    return _seal([fields, memoryview(data)[HEADER_SIZE:]])


class BatchBody:
    """The messages of a batch, each column decoded when it is asked for, in bulk, and then kept.

    With a selection, its lists hold the selected messages only. A list column is None if no message of the batch has
    such a value. Made from checked bytes or bytes to check; raises MalformedBatch, as does `properties`.
    """

    def __init__(
        self,
        data: bytes | memoryview,
        header: BatchHeader | None = None,
        *,
        selection: bytes = selection.ALL,
        max_body_bytes: int = BODY_BYTES_MAX,
    ) -> None:
        """Check and find the columns, decompressing if need be.

        header   what `parse_header` made of these bytes, None = check them here
        """
        self.header = parse_header(data) if header is None else header
        self._block = _parse_body(bytes(data), self.header, max_body_bytes)
        self._narrow(selection)

    def select(self, chosen: bytes) -> BatchBody:
        """The same messages as far as they stand in this selection of the batch too; nothing is parsed again."""
        body = object.__new__(BatchBody)
        body.header, body._block = self.header, self._block
        _check_selection(chosen, self.header.count)
        body._narrow(selection.intersect(self.selection, chosen, self.header.count))
        return body

    def _narrow(self, chosen: bytes) -> None:
        _check_selection(chosen, self.header.count)
        self.selection = selection.normalise(chosen, self.header.count)
        self._mask = selection.to_mask(self.selection, self.header.count) if self.selection else None

    def __len__(self) -> int:
        return selection.count_of(self.selection, self.header.count)

    @cached_property
    def indices(self) -> list[int]:
        """The place in the batch of each message here, ascending."""
        return selection.indices(self.selection, self.header.count)

    @cached_property
    def payloads(self) -> list[bytes]:
        return columnar.payloads_of(self._block, self._mask)

    @cached_property
    def keys(self) -> list[bytes | None] | None:
        return columnar.keys_of(self._block, self._mask)

    @cached_property
    def properties(self) -> list[Mapping[str, str] | None] | None:
        return columnar.properties_of(self._block, self._mask)

    @cached_property
    def event_times(self) -> list[int | None] | None:
        """Microseconds UTC."""
        return columnar.event_times_of(self._block, self._mask)

    @property
    def payload_column(self) -> memoryview:
        """The payloads of all messages of the batch, whatever the selection, in one piece and not copied."""
        start = self._block.payload_start
        return memoryview(self._block.source)[start : start + sum(self._block.payload_lengths)]

    @cached_property
    def payload_offsets(self) -> array[int]:
        """Where in the payload column each message of the batch begins, and at last the column's end."""
        return array("i", accumulate(self._block.payload_lengths, initial=0))

    def columns(self) -> Columns:
        """All columns."""
        return Columns(self.payloads, self.keys, self.properties, self.event_times)

    def to_arrow(self) -> pyarrow.RecordBatch:
        """Columns payload, key, properties and event_time (null where there is none); raises MalformedBatch.

        The payloads stay where the batch has them, or where it was decompressed to, unless the selection is not one
        contiguous range: then the selected ones are copied once.
        """
        from magnetar.wire import arrow

        return arrow.record_batch(self._block, self.payload_offsets, self.selection)


def decode_batch(
    data: bytes | memoryview, header: BatchHeader | None = None, *, max_body_bytes: int = BODY_BYTES_MAX
) -> Columns:
    """All messages of a batch; raises MalformedBatch, also if its body is larger than the limit."""
    return BatchBody(data, header, max_body_bytes=max_body_bytes).columns()


def to_arrow(
    data: bytes | memoryview, selection: bytes | None = None, *, max_body_bytes: int = BODY_BYTES_MAX
) -> pyarrow.RecordBatch:
    """The messages of a batch, or the selected ones, as `BatchBody.to_arrow` gives them; raises MalformedBatch."""
    return BatchBody(data, selection=selection or b"", max_body_bytes=max_body_bytes).to_arrow()


def _seal(parts: Sequence[bytes | memoryview]) -> bytes:
    """The batch made of everything from byte 12 on.

    The checksum is put into the joined bytes in place, which a BytesIO allows as long as it alone holds them: a large
    batch is allocated and copied once.
    """
    sealed = BytesIO(b"".join((bytes(_CHECKED_FROM), *parts)))
    with sealed.getbuffer() as view:
        if len(view) > _LENGTH_MAX:
            raise ValueError(f"batch is too large: bytes=`{len(view)}` max=`{_LENGTH_MAX}`")
        with view[_CHECKED_FROM:] as checked:
            crc = crc32.iscsi(checked)
        _START.pack_into(view, 0, MAGIC, VERSION, len(view), crc)
    return sealed.getvalue()


def _slots_end(header: BatchHeader) -> int:
    return HEADER_SIZE + (header.count * _SLOT_SIZE if header.keyed else 0)


def _slots_to_bytes(slots: array[int]) -> bytes:
    column = array("H", slots)
    if sys.byteorder == "little":
        column.byteswap()
    return column.tobytes()


def _check_header(header: BatchHeader) -> None:
    if not 1 <= header.count <= COUNT_MAX:
        raise MalformedBatch(f"batch has no messages or too many: count=`{header.count}` max=`{COUNT_MAX}`")
    if header.min_slot > header.max_slot or (header.min_slot != header.max_slot and not header.keyed):
        raise MalformedBatch(f"batch has impossible slots: min=`{header.min_slot}` max=`{header.max_slot}`")
    if header.previous < NO_SEQUENCE or header.first_sequence < 0:
        raise MalformedBatch(f"batch has negative sequences: previous=`{header.previous}` last=`{header.last}`")
    if header.body_size > BODY_BYTES_MAX:
        raise MalformedBatch(f"batch is too large: bytes=`{header.body_size}` max=`{BODY_BYTES_MAX}`")
    if not _slots_end(header) <= header.body_offset <= header.length:
        raise MalformedBatch(
            f"body does not begin inside the batch: body_offset=`{header.body_offset}` length=`{header.length}`"
        )


def _check_slots(data: bytes | memoryview, header: BatchHeader) -> None:
    if not header.keyed:
        return
    column = slots(data, header)
    if min(column) < header.min_slot or max(column) > header.max_slot:
        raise MalformedBatch(f"slot is out of range: min=`{header.min_slot}` max=`{header.max_slot}`")


def _check_extensions(data: bytes | memoryview, header: BatchHeader) -> None:
    for kind, _ in extensions(data, header):
        if kind & MUST_UNDERSTAND and kind not in _UNDERSTOOD:
            raise UnknownExtension(f"batch needs an extension unknown here: type=`{kind & ~MUST_UNDERSTAND}`")


def _check_selection(chosen: bytes, count: int) -> None:
    try:
        selection.check(chosen, count)
    except selection.InvalidSelection as error:
        raise MalformedBatch(str(error)) from error


def _parse_body(data: bytes, header: BatchHeader, max_body_bytes: int) -> Block:
    """The columns of all messages; decompresses what is compressed, after all sizes were found right."""
    if header.body_size > max_body_bytes:
        raise MalformedBatch(f"body is too large: bytes=`{header.body_size}` max=`{max_body_bytes}`")
    position, sizes = _parse_directory(data, header)
    blocks: list[Block] = []
    for count, uncompressed, compressed in sizes:
        end = position + compressed
        if header.codec is Codec.NONE:
            blocks.append(columnar.parse_block(data, position, end, count))
        else:
            try:
                source = compression.decompress(header.codec, memoryview(data)[position:end], uncompressed)
            except DecompressionFailed as error:
                raise MalformedBatch(str(error)) from error
            blocks.append(columnar.parse_block(source, 0, len(source), count))
        position = end
    return columnar.join_blocks(blocks)


def _parse_directory(data: bytes, header: BatchHeader) -> tuple[int, list[tuple[int, int, int]]]:
    """Where the first block stands, and count, uncompressed and compressed size of each; they fill the data."""
    start = header.body_offset + _DIRECTORY.size
    if start > len(data):
        raise MalformedBatch(f"directory is cut off: body_offset=`{header.body_offset}` bytes=`{len(data)}`")
    block_count, _ = _DIRECTORY.unpack_from(data, header.body_offset)
    end = start + block_count * _DIRECTORY_BLOCK.size
    if end > len(data) or block_count == 0:
        raise MalformedBatch(f"directory does not fit: blocks=`{block_count}` bytes=`{len(data)}`")
    sizes: list[tuple[int, int, int]] = []
    messages = uncompressed_sum = compressed_sum = 0
    for first, count, low, high, uncompressed, compressed in _DIRECTORY_BLOCK.iter_unpack(data[start:end]):
        if first != messages or count == 0 or not header.min_slot <= low <= high <= header.max_slot:
            raise MalformedBatch(
                f"block is not one of its batch: first=`{first}` count=`{count}` min=`{low}` max=`{high}`"
            )
        if header.codec is Codec.NONE and uncompressed != compressed:
            raise MalformedBatch(f"block has two sizes: uncompressed=`{uncompressed}` stored=`{compressed}`")
        sizes.append((count, uncompressed, compressed))
        messages, uncompressed_sum = messages + count, uncompressed_sum + uncompressed
        compressed_sum += compressed
    if messages != header.count or uncompressed_sum != header.body_size or end + compressed_sum != len(data):
        raise MalformedBatch(
            f"blocks are not the batch: messages=`{messages}` "
            f"uncompressed=`{uncompressed_sum}` stored=`{compressed_sum}`"
        )
    return end, sizes
