"""The payload of an entry in a shard's data ledger: batches of any producers, with offsets and a publish time.

Big-endian: kind u8 (1 messages, 2 control) | version u8 = 1 | batch count u16 | message count u32 | first offset u64 |
publish time i64, microseconds UTC; then for each batch: batch length u32, selection length u32; then for each batch its
selection and its bytes. Only selected messages count; they take the offsets from the first one on, densely. A control
entry has no batch and takes no offset; its first offset is the next one to be given.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import NamedTuple

from magnetar.wire import batch, selection

VERSION = 1
BATCH_COUNT_MAX = 0xFFFF
OFFSET_MAX = (1 << 63) - 1

_HEADER = struct.Struct(">BBHIQq")
_LENGTHS = struct.Struct(">II")

HEADER_SIZE = _HEADER.size
BATCH_OVERHEAD = _LENGTHS.size
"""Bytes that each batch adds to an entry besides its own and its selection's."""


class MalformedEntry(ValueError):
    """These bytes are not the payload of a data ledger's entry; the message says what is wrong."""


class EntryKind(IntEnum):
    MESSAGES = 1
    CONTROL = 2


class EntryInfo(NamedTuple):
    """The header of an entry."""

    kind: EntryKind
    first_offset: int
    message_count: int
    publish_time_us: int
    batch_count: int

    @property
    def end_offset(self) -> int:
        """One past the offset of its last message."""
        return self.first_offset + self.message_count


@dataclass(frozen=True, slots=True)
class EntryBatch:
    """A batch as it stands in an entry: `count` messages, those of the selection, from `first_offset` on."""

    first_offset: int
    count: int
    batch: bytes
    selection: bytes = selection.ALL

    @property
    def end_offset(self) -> int:
        """One past the offset of its last message."""
        return self.first_offset + self.count


def encode_entry(first_offset: int, publish_time_us: int, batches: Sequence[tuple[bytes, bytes, int]]) -> bytes:
    """The payload for these (batch, selection, count of selected messages); raises ValueError if there are too many."""
    if not 1 <= len(batches) <= BATCH_COUNT_MAX:
        raise ValueError(f"entry has no batch or too many: batches=`{len(batches)}` max=`{BATCH_COUNT_MAX}`")
    message_count = sum(count for _, _, count in batches)
    if first_offset + message_count > OFFSET_MAX:
        raise ValueError(f"offsets are used up: first_offset=`{first_offset}` messages=`{message_count}`")
    header = _HEADER.pack(EntryKind.MESSAGES, VERSION, len(batches), message_count, first_offset, publish_time_us)
    parts = [header]
    parts += [_LENGTHS.pack(len(data), len(chosen)) for data, chosen, _ in batches]
    for data, chosen, _ in batches:
        parts += chosen, data
    return b"".join(parts)


def encode_control(first_offset: int, publish_time_us: int) -> bytes:
    """The payload of an entry without messages."""
    return _HEADER.pack(EntryKind.CONTROL, VERSION, 0, 0, first_offset, publish_time_us)


def peek_entry(payload: bytes | memoryview) -> EntryInfo:
    """The header alone; raises MalformedEntry."""
    if len(payload) < HEADER_SIZE:
        raise MalformedEntry(f"entry is short: bytes=`{len(payload)}`")
    kind, version, batch_count, message_count, first_offset, publish_time_us = _HEADER.unpack_from(payload)
    if version != VERSION or kind not in (EntryKind.MESSAGES, EntryKind.CONTROL):
        raise MalformedEntry(f"entry is of another format: kind=`{kind}` version=`{version}`")
    if (kind == EntryKind.MESSAGES) != (batch_count > 0) or message_count < batch_count:
        raise MalformedEntry(f"entry counts wrong: kind=`{kind}` batches=`{batch_count}` messages=`{message_count}`")
    if kind == EntryKind.CONTROL and (message_count or len(payload) != HEADER_SIZE):
        raise MalformedEntry(f"control entry is not empty: messages=`{message_count}` bytes=`{len(payload)}`")
    if first_offset + message_count > OFFSET_MAX:
        raise MalformedEntry(f"offsets are impossible: first_offset=`{first_offset}` messages=`{message_count}`")
    return EntryInfo(EntryKind(kind), first_offset, message_count, publish_time_us, batch_count)


def split_entry(payload: bytes | memoryview) -> tuple[EntryInfo, list[EntryBatch]]:
    """The header and the batches with the offsets they take; raises MalformedEntry.

    Of a batch only the length and the count in its header are looked at: the envelope's checksum covers the rest.
    """
    info = peek_entry(payload)
    view = memoryview(payload)
    position = HEADER_SIZE + info.batch_count * BATCH_OVERHEAD
    if position > len(view):
        raise MalformedEntry(f"lengths are cut off: batches=`{info.batch_count}` bytes=`{len(view)}`")
    batches: list[EntryBatch] = []
    offset = info.first_offset
    for batch_size, selection_size in _LENGTHS.iter_unpack(view[HEADER_SIZE:position]):
        batch_at = position + selection_size
        end = batch_at + batch_size
        if end > len(view):
            raise MalformedEntry(f"batch is cut off: end=`{end}` bytes=`{len(view)}`")
        data, chosen = bytes(view[batch_at:end]), bytes(view[position:batch_at])
        count = _count(data, chosen)
        batches.append(EntryBatch(offset, count, data, chosen))
        offset += count
        position = end
    if position != len(view) or offset != info.end_offset:
        raise MalformedEntry(
            f"batches are not the entry: end=`{position}` bytes=`{len(view)}` "
            f"messages=`{offset - info.first_offset}` counted=`{info.message_count}`"
        )
    return info, batches


def _count(data: bytes, chosen: bytes) -> int:
    try:
        count = selection.count_of(chosen, batch.count_of(data))
    except (batch.MalformedBatch, selection.InvalidSelection) as error:
        raise MalformedEntry(f"entry holds a damaged batch: {error}") from error
    if count == 0:
        raise MalformedEntry(f"entry holds a batch of which nothing is selected: bytes=`{len(data)}`")
    return count
