"""The stored form of cursors: entries of a cursor ledger, and the inline state of a cleanly closed shard."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import chain

from google.protobuf.message import DecodeError

from magnetar.managed_log.cursor import (
    PART_BYTES_MAX,
    RANGE_MESSAGES_MAX,
    CursorAcked,
    CursorChange,
    CursorCreated,
    CursorDeleted,
    CursorPiece,
    CursorReplay,
    CursorSeeked,
    Range,
    SnapshotPart,
)
from magnetar.metadata.records import SubscriptionType
from magnetar.v1 import cursor_pb2, metadata_pb2

_TYPE_TO_STORED = {
    SubscriptionType.UNDECIDED: metadata_pb2.SUBSCRIPTION_TYPE_UNSPECIFIED,
    SubscriptionType.STREAM: metadata_pb2.SUBSCRIPTION_TYPE_STREAM,
    SubscriptionType.QUEUE: metadata_pb2.SUBSCRIPTION_TYPE_QUEUE,
}
_TYPE_FROM_STORED: dict[int, SubscriptionType] = {int(stored): kind for kind, stored in _TYPE_TO_STORED.items()}


class DamagedCursorEntry(ValueError):
    """These bytes are not an entry of a cursor ledger; the message says what is wrong."""


def encode_changes(changes: Iterable[CursorChange]) -> list[bytes]:
    """Deltas of at most PART_BYTES_MAX each, to be stored in this order. No changes, no deltas."""
    payloads: list[bytes] = []
    delta = cursor_pb2.CursorDelta()
    size = 0
    for change in changes:
        stored = _store_change(change)
        change_size = stored.ByteSize() + 8  # its tag and its length
        if size and size + change_size > PART_BYTES_MAX:
            payloads.append(cursor_pb2.CursorEntry(delta=delta).SerializeToString())
            delta, size = cursor_pb2.CursorDelta(), 0
        delta.changes.append(stored)
        size += change_size
    if size:
        payloads.append(cursor_pb2.CursorEntry(delta=delta).SerializeToString())
    return payloads


def encode_part(part: SnapshotPart) -> bytes:
    stored = cursor_pb2.CursorSnapshotPart(
        snapshot_id=part.snapshot_id,
        part=part.part,
        parts=part.parts,
        cursors=[_store_piece(piece) for piece in part.cursors],
        producers=part.producers,
        producers_covered_offset=part.covered_offset,
    )
    return cursor_pb2.CursorEntry(snapshot=stored).SerializeToString()


def replay_entry(payload: bytes | memoryview, replay: CursorReplay) -> None:
    """Feeds one entry of a cursor ledger to the replay, in the order of the ledger; raises DamagedCursorEntry."""
    try:
        entry = cursor_pb2.CursorEntry.FromString(bytes(payload))
        match entry.WhichOneof("kind"):
            case "delta":
                replay.changed([_load_change(change) for change in entry.delta.changes])
            case "snapshot":
                replay.snapshot_part(_load_part(entry.snapshot))
            case kind:
                raise DamagedCursorEntry(f"cursor entry is of another kind: kind=`{kind}` bytes=`{len(payload)}`")
    except DecodeError as error:
        raise DamagedCursorEntry(f"cursor entry does not parse: bytes=`{len(payload)}`") from error
    except DamagedCursorEntry:
        raise
    except ValueError as error:
        raise DamagedCursorEntry(f"cursor entry is impossible: {error}") from error


# --- changes ---


def _store_change(change: CursorChange) -> cursor_pb2.CursorChange:
    stored = cursor_pb2.CursorChange(subscription=change.subscription)
    match change:
        case CursorCreated():
            stored.created.subscription_id = change.subscription_id
            stored.created.type = _TYPE_TO_STORED[change.type]
            stored.created.floor = change.floor
        case CursorDeleted():
            stored.deleted = True
        case CursorAcked():
            stored.acked.floor = change.floor
            stored.acked.ranges.extend(_delta_coded(change.ranges))
            stored.acked.delivery_counts.extend(chain.from_iterable(change.delivery_counts))
        case CursorSeeked():
            stored.seeked_to = change.floor
    return stored


def _load_change(stored: cursor_pb2.CursorChange) -> CursorChange:
    name = _name(stored.subscription)
    match stored.WhichOneof("change"):
        case "created":
            created = stored.created
            return CursorCreated(name, created.subscription_id, _load_type(created.type), created.floor)
        case "deleted":
            return CursorDeleted(name)
        case "acked":
            acked = stored.acked
            return CursorAcked(name, acked.floor, tuple(_ranges(acked.ranges)), tuple(_pairs(acked.delivery_counts)))
        case "seeked_to":
            return CursorSeeked(name, stored.seeked_to)
        case kind:
            raise DamagedCursorEntry(f"cursor change is of another kind: kind=`{kind}` subscription=`{name}`")


def _delta_coded(ranges: Sequence[Range]) -> Iterator[int]:
    before = 0
    for start, end in ranges:
        yield start - before
        yield end - start
        before = end


def _ranges(deltas: Sequence[int]) -> Iterator[Range]:
    before = 0
    for gap, length in _pairs(deltas):
        start = before + gap
        before = start + length
        if not 0 < length <= RANGE_MESSAGES_MAX or before >> 63:
            raise DamagedCursorEntry(f"acknowledged range is impossible: start=`{start}` messages=`{length}`")
        yield start, before


# --- snapshots ---


def _store_piece(piece: CursorPiece) -> cursor_pb2.CursorState:
    return cursor_pb2.CursorState(
        subscription=piece.subscription,
        subscription_id=piece.subscription_id,
        type=_TYPE_TO_STORED[piece.type],
        floor=piece.floor,
        acked=piece.acked,
        delivery_counts=chain.from_iterable(piece.delivery_counts),
    )


def _load_part(stored: cursor_pb2.CursorSnapshotPart) -> SnapshotPart:
    if stored.part >= stored.parts:
        raise DamagedCursorEntry(f"snapshot part is beyond its parts: part=`{stored.part}` parts=`{stored.parts}`")
    pieces = tuple(_load_piece(piece) for piece in stored.cursors)
    covered = stored.producers_covered_offset
    return SnapshotPart(stored.snapshot_id, stored.part, stored.parts, pieces, tuple(stored.producers), covered)


def _load_piece(stored: cursor_pb2.CursorState) -> CursorPiece:
    counts = tuple(_pairs(stored.delivery_counts))
    name, kind = _name(stored.subscription), _load_type(stored.type)
    return CursorPiece(name, stored.subscription_id, kind, stored.floor, stored.acked, counts)


def _pairs(numbers: Sequence[int]) -> Iterator[tuple[int, int]]:
    if len(numbers) % 2:
        raise DamagedCursorEntry(f"a list of pairs has an odd length: numbers=`{len(numbers)}`")
    return zip(numbers[::2], numbers[1::2], strict=True)


def _load_type(stored: int) -> SubscriptionType:
    try:
        return _TYPE_FROM_STORED[stored]
    except KeyError:
        raise DamagedCursorEntry(f"subscription is of another type: type=`{stored}`") from None


def _name(stored: str) -> str:
    if not stored:
        raise DamagedCursorEntry("cursor has no subscription name")
    return stored
