"""Cursors: what each subscription has acknowledged in one shard. Pure.

Rules:

1. A cursor is an ack floor, below which everything is acknowledged, and a bitmap of acknowledged offsets above it. The
   floor itself is never in the bitmap: it moves over what touches it. There is no limit on holes.
2. Every change takes effect in memory at once and waits to be stored. `take` hands out all that waits as one group;
   `stored` says that it is durable. Trimming looks at what is durable.
3. Applying the stored changes in order gives the table back. A snapshot is the whole table in numbered parts that
   follow each other directly; it counts from its last part, an unfinished one is ignored.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from pyroaring import BitMap64

from magnetar.metadata.records import SubscriptionType
from magnetar.wire.selection import ALL, pack

PART_BYTES_MAX = 512 * 1024
PIECE_BYTES_OVERHEAD = 128
COUNT_BYTES = 12
COUNTS_PER_PIECE = 16_384
RANGES_PER_CHANGE = 16_384
RANGE_MESSAGES_MAX = 1 << 32
"""Messages acknowledged by one range: bounds what a few bytes can make the bitmap grow to."""

Range = tuple[int, int]
"""Offsets start <= offset < end."""


class CursorNotFound(KeyError):
    """The shard has no such cursor."""

    def __init__(self, subscription: str) -> None:
        super().__init__(subscription)
        self.subscription = subscription

    def __str__(self) -> str:
        return f"no such cursor subscription=`{self.subscription}`"


class InvalidAck(ValueError):
    """Offsets that are not in the log."""


class AckBeyondEnd(InvalidAck):
    """Offsets that are not in the log yet. Who got such messages got them elsewhere: the log is another owner's."""


# --- changes, as they are stored ---


@dataclass(frozen=True, slots=True)
class CursorCreated:
    """Replaces a cursor of another subscription id; of the same id, only its type."""

    subscription: str
    subscription_id: int
    type: SubscriptionType
    floor: int


@dataclass(frozen=True, slots=True)
class CursorDeleted:
    subscription: str


@dataclass(frozen=True, slots=True)
class CursorAcked:
    """Ranges ascend and do not touch. A floor of 0 says nothing."""

    subscription: str
    floor: int = 0
    ranges: tuple[Range, ...] = ()
    delivery_counts: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True, slots=True)
class CursorSeeked:
    subscription: str
    floor: int


CursorChange = CursorCreated | CursorDeleted | CursorAcked | CursorSeeked


@dataclass(frozen=True, slots=True)
class CursorPiece:
    """A cursor, or a part of one: pieces of one cursor are united. `acked` is a serialized bitmap, empty = nothing."""

    subscription: str
    subscription_id: int
    type: SubscriptionType
    floor: int
    acked: bytes = b""
    delivery_counts: tuple[tuple[int, int], ...] = ()

    @property
    def size_bytes(self) -> int:
        counts = len(self.delivery_counts) * COUNT_BYTES
        return PIECE_BYTES_OVERHEAD + 4 * len(self.subscription) + len(self.acked) + counts


@dataclass(frozen=True, slots=True)
class SnapshotPart:
    """Part `part` of 0..parts-1. `producers` are opaque chunks that count up to `covered_offset`."""

    snapshot_id: int
    part: int
    parts: int
    cursors: tuple[CursorPiece, ...] = ()
    producers: tuple[bytes, ...] = ()
    covered_offset: int = 0


class Cursor:
    """One subscription's position. Others may look; only its table changes it."""

    __slots__ = ("_acked", "_counts", "floor", "name", "subscription_id", "type")

    def __init__(self, name: str, subscription_id: int, type: SubscriptionType, floor: int) -> None:
        self.name = name
        self.subscription_id = subscription_id
        self.type = type
        self.floor = floor
        self._acked = BitMap64()
        self._counts: dict[int, int] = {}

    def __repr__(self) -> str:
        return f"Cursor({self.name!r}, floor={self.floor}, acked_above={len(self._acked)})"

    @property
    def acked(self) -> BitMap64:
        """Acknowledged offsets above the floor. Not to be changed."""
        return self._acked

    @property
    def acked_above(self) -> int:
        """How many offsets above the floor are acknowledged."""
        return len(self._acked)

    @property
    def delivery_counts(self) -> Mapping[int, int]:
        """Of unacknowledged messages that were delivered more than once."""
        return self._counts

    def is_acked(self, offset: int) -> bool:
        return offset < self.floor or offset in self._acked

    def backlog(self, end: int) -> int:
        """How many messages below `end` are not acknowledged."""
        if end <= self.floor:
            return 0
        return end - self.floor - self._acked.range_cardinality(self.floor, end)

    def next_unacked(self, offset: int) -> int:
        """The first offset at or above this one that is not acknowledged."""
        if offset < self.floor:
            return self.floor
        return self._end_of_run(offset) if offset in self._acked else offset

    def unacked_selection(self, first_offset: int, count: int, selection: bytes = ALL) -> bytes | None:
        """Which messages of a stored batch are not acknowledged; None if there is no such message.

        `count` messages stand at `first_offset` and up: all of the batch, or those of the stored `selection`.
        """
        end = first_offset + count
        acked = self._acked.range_cardinality(max(first_offset, self.floor), end) if end > self.floor else 0
        unacked = end - max(first_offset, self.floor) - acked
        if unacked <= 0:
            return None
        if unacked == count:
            return selection
        mask = bytearray(b"\x01" * count)
        if first_offset < self.floor:
            mask[: self.floor - first_offset] = bytes(self.floor - first_offset)
        if acked:
            for offset in self._acked.iter_equal_or_larger(first_offset):
                if offset >= end:
                    break
                mask[offset - first_offset] = 0
        return pack(mask) if not selection else _narrow(selection, mask)

    def _end_of_run(self, offset: int) -> int:
        """The first offset above that is not in the bitmap, in a logarithmic number of looks."""
        acked = self._acked
        step = 1
        while acked.contains_range(offset, offset + step):
            step *= 2
        low, high = step // 2, step  # the run is at least `low` and less than `high` long
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if acked.contains_range(offset, offset + middle) else (low, middle)
        return offset + low

    def _ack(self, floor: int, ranges: Iterable[Range]) -> bool:
        """Returns whether anything became acknowledged."""
        before = (self.floor, len(self._acked))
        for start, end in ranges:
            if end > self.floor:
                self._acked.add_range(max(start, self.floor), end)
        self._raise_floor(max(floor, self.floor))
        if self._counts:
            self._counts = {offset: count for offset, count in self._counts.items() if not self.is_acked(offset)}
        return before != (self.floor, len(self._acked))

    def _raise_floor(self, floor: int) -> None:
        if floor in self._acked:
            floor = self._end_of_run(floor)
        if floor == self.floor:
            return
        self.floor = floor
        self._acked.remove_range(0, floor)

    def _count(self, counts: Iterable[tuple[int, int]]) -> None:
        self._counts.update((offset, count) for offset, count in counts if not self.is_acked(offset))

    def _seek(self, floor: int) -> None:
        self.floor = floor
        self._acked = BitMap64()
        self._counts = {}

    def pieces(self) -> Iterator[CursorPiece]:
        """The cursor as pieces, each of which fits into a part."""
        counts = sorted(self._counts.items())
        bitmaps = list(_serialized(self._acked)) or [b""]
        for position in range(max(len(bitmaps), -(-len(counts) // COUNTS_PER_PIECE))):
            acked = bitmaps[position] if position < len(bitmaps) else b""
            own = tuple(counts[position * COUNTS_PER_PIECE : (position + 1) * COUNTS_PER_PIECE])
            yield CursorPiece(self.name, self.subscription_id, self.type, self.floor, acked, own)

    def check(self) -> None:
        """Asserts the invariants; for tests."""
        assert not self._acked or self._acked.min() > self.floor
        assert all(not self.is_acked(offset) for offset in self._counts)


def _serialized(bitmap: BitMap64) -> Iterator[bytes]:
    """The bitmap in pieces of at most half a part."""
    if not bitmap:
        return
    data = bitmap.serialize()
    if len(data) <= PART_BYTES_MAX // 2:
        yield data
        return
    middle = bitmap[len(bitmap) // 2]
    low, high = bitmap.copy(), bitmap.copy()
    low.remove_range(middle, bitmap.max() + 1)
    high.remove_range(0, middle)
    yield from _serialized(low)
    yield from _serialized(high)


def _narrow(selection: bytes, mask: bytearray) -> bytes:
    """The selected messages whose byte in the mask is 1; the mask has one byte for each selected message."""
    kept = bytearray(len(selection))
    position = 0
    for at, byte in enumerate(selection):
        for bit in range(8):
            if byte >> bit & 1:
                kept[at] |= mask[position] << bit
                position += 1
    return bytes(kept)


class _WaitingAck:
    __slots__ = ("counts", "floor", "ranges")

    def __init__(self) -> None:
        self.floor = 0
        self.ranges: list[Range] = []
        self.counts: dict[int, int] = {}

    def changes(self, subscription: str) -> Iterator[CursorAcked]:
        """In bounded pieces: the parts of an acknowledgement can be stored one after the other."""
        ranges = joined(r for r in self.ranges if r[1] > self.floor)
        counts = sorted(self.counts.items())
        for position in range(max(1, -(-len(ranges) // RANGES_PER_CHANGE), -(-len(counts) // COUNTS_PER_PIECE))):
            own = ranges[position * RANGES_PER_CHANGE : (position + 1) * RANGES_PER_CHANGE]
            counted = counts[position * COUNTS_PER_PIECE : (position + 1) * COUNTS_PER_PIECE]
            yield CursorAcked(subscription, self.floor if position == 0 else 0, tuple(own), tuple(counted))


def joined(ranges: Iterable[Range]) -> list[Range]:
    """The same offsets as ascending ranges that do not touch."""
    result: list[Range] = []
    for start, end in sorted(ranges):
        if result and start <= result[-1][1]:
            result[-1] = (result[-1][0], max(end, result[-1][1]))
        else:
            result.append((start, end))
    return result


@dataclass(frozen=True, slots=True)
class ChangeGroup:
    """Everything that waited: what to store, and each touched cursor's floor then (None = the cursor is gone)."""

    changes: tuple[CursorChange, ...]
    floors: Mapping[str, int | None]


class CursorTable:
    """All cursors of a shard. See the module's rules."""

    def __init__(self) -> None:
        self.cursors: dict[str, Cursor] = {}
        self._waiting: list[CursorChange | tuple[str, _WaitingAck]] = []
        self._waiting_acks: dict[str, _WaitingAck] = {}
        self._touched: set[str] = set()
        self._stored_floors: dict[str, int] = {}

    @property
    def waiting(self) -> bool:
        return bool(self._waiting)

    def cursor(self, subscription: str) -> Cursor:
        """Raises CursorNotFound."""
        found = self.cursors.get(subscription)
        if found is None:
            raise CursorNotFound(subscription)
        return found

    # --- changes that wait to be stored ---

    def create(self, subscription: str, subscription_id: int, type: SubscriptionType, floor: int) -> bool:
        """Returns whether there is something to store: not if this very cursor is there."""
        found = self.cursors.get(subscription)
        if found is not None and (found.subscription_id, found.type) == (subscription_id, type):
            return False
        self._queue(CursorCreated(subscription, subscription_id, type, floor))
        return True

    def delete(self, subscription: str) -> None:
        self.cursor(subscription)
        self._queue(CursorDeleted(subscription))

    def seek(self, subscription: str, floor: int) -> None:
        self.cursor(subscription)
        self._queue(CursorSeeked(subscription, floor))

    def ack(self, subscription: str, floor: int, ranges: Sequence[Range]) -> bool:
        """Returns whether anything became acknowledged by it."""
        cursor = self.cursor(subscription)
        if not cursor._ack(floor, ranges):
            return False
        waiting = self._waiting_ack(subscription)
        waiting.floor = max(waiting.floor, floor)
        waiting.ranges.extend(ranges)
        return True

    def count_deliveries(self, subscription: str, counts: Mapping[int, int]) -> None:
        """These messages were delivered so many times; acknowledged ones are ignored."""
        cursor = self.cursor(subscription)
        cursor._count(counts.items())
        self._waiting_ack(subscription).counts.update(counts)

    def take(self) -> ChangeGroup:
        """All that waits, as one group, which waits no more."""
        changes: list[CursorChange] = []
        for change in self._waiting:
            if isinstance(change, tuple):
                changes.extend(change[1].changes(change[0]))
            else:
                changes.append(change)
        floors = {name: self.cursors[name].floor if name in self.cursors else None for name in self._touched}
        self._waiting, self._waiting_acks, self._touched = [], {}, set()
        return ChangeGroup(tuple(changes), floors)

    def stored(self, group: ChangeGroup) -> None:
        """The group is durable. Groups become durable in the order in which they were taken."""
        for name, floor in group.floors.items():
            if floor is None:
                self._stored_floors.pop(name, None)
            else:
                self._stored_floors[name] = floor

    def safe_floor(self) -> int | None:
        """Below it nothing is needed by any cursor, also if the changes not yet stored are lost. None = no cursors."""
        floors = [*self._stored_floors.values(), *(cursor.floor for cursor in self.cursors.values())]
        return min(floors) if floors else None

    def _queue(self, change: CursorChange) -> None:
        self.apply(change)
        self._waiting.append(change)
        self._waiting_acks.pop(change.subscription, None)
        self._touched.add(change.subscription)

    def _waiting_ack(self, subscription: str) -> _WaitingAck:
        waiting = self._waiting_acks.get(subscription)
        if waiting is None:
            waiting = self._waiting_acks[subscription] = _WaitingAck()
            self._waiting.append((subscription, waiting))
            self._touched.add(subscription)
        return waiting

    # --- rebuilding ---

    def apply(self, change: CursorChange) -> None:
        """Takes over a stored change; one about a cursor that is not there says nothing."""
        match change:
            case CursorCreated():
                self._apply_created(change)
            case CursorDeleted():
                self.cursors.pop(change.subscription, None)
            case CursorAcked():
                if (cursor := self.cursors.get(change.subscription)) is not None:
                    cursor._ack(change.floor, change.ranges)
                    cursor._count(change.delivery_counts)
            case CursorSeeked():
                if (cursor := self.cursors.get(change.subscription)) is not None:
                    cursor._seek(change.floor)

    def _apply_created(self, change: CursorCreated) -> None:
        found = self.cursors.get(change.subscription)
        if found is not None and found.subscription_id == change.subscription_id:
            found.type = change.type
        else:
            created = Cursor(change.subscription, change.subscription_id, change.type, change.floor)
            self.cursors[change.subscription] = created

    def unite(self, piece: CursorPiece) -> None:
        """Adds a piece of a snapshot; raises ValueError if its bitmap does not parse."""
        cursor = self.cursors.get(piece.subscription)
        if cursor is None:
            cursor = Cursor(piece.subscription, piece.subscription_id, piece.type, piece.floor)
            self.cursors[piece.subscription] = cursor
        if piece.acked:
            cursor._acked |= BitMap64.deserialize(piece.acked)
        cursor._count(piece.delivery_counts)

    def floors(self) -> dict[str, int]:
        return {name: cursor.floor for name, cursor in self.cursors.items()}

    def stored_are(self, floors: dict[str, int]) -> None:
        """A snapshot is durable; when it was taken these were the floors of all cursors."""
        self._stored_floors = floors

    def snapshot(self, snapshot_id: int, producers: Sequence[bytes], covered_offset: int) -> list[SnapshotPart]:
        """The whole table and the producers' chunks, in parts of at most PART_BYTES_MAX (or one larger chunk)."""
        contents: list[tuple[list[CursorPiece], list[bytes]]] = [([], [])]
        room = PART_BYTES_MAX
        items: list[CursorPiece | bytes] = [piece for cursor in self.cursors.values() for piece in cursor.pieces()]
        for item in [*items, *producers]:
            size = len(item) + 8 if isinstance(item, bytes) else item.size_bytes
            if size > room and contents[-1] != ([], []):
                contents.append(([], []))
                room = PART_BYTES_MAX
            room -= size
            if isinstance(item, bytes):
                contents[-1][1].append(item)
            else:
                contents[-1][0].append(item)
        return [
            SnapshotPart(snapshot_id, part, len(contents), tuple(pieces), tuple(chunks), covered_offset)
            for part, (pieces, chunks) in enumerate(contents)
        ]


class CursorReplay:
    """Rebuilds the table from the entries of a cursor ledger, or from an inline snapshot.

    producers, covered_offset, snapshot_id   of the last complete snapshot
    """

    def __init__(self) -> None:
        self.table = CursorTable()
        self.producers: list[bytes] = []
        self.covered_offset = 0
        self.snapshot_id = 0
        self._parts: list[SnapshotPart] = []

    def changed(self, changes: Iterable[CursorChange]) -> None:
        self._parts = []
        for change in changes:
            self.table.apply(change)

    def snapshot_part(self, part: SnapshotPart) -> None:
        """Raises ValueError if a complete snapshot does not parse."""
        if part.part == 0:
            self._parts = [part]
        elif self._parts and (self._parts[0].snapshot_id, len(self._parts)) == (part.snapshot_id, part.part):
            self._parts.append(part)
        else:
            self._parts = []
        if self._parts and len(self._parts) == part.parts:
            self._restore(self._parts)
            self._parts = []

    def _restore(self, parts: list[SnapshotPart]) -> None:
        table = CursorTable()
        for piece in (piece for part in parts for piece in part.cursors):
            table.unite(piece)
        self.table = table
        self.producers = [chunk for part in parts for chunk in part.producers]
        self.covered_offset = parts[-1].covered_offset
        self.snapshot_id = parts[-1].snapshot_id

    def finish(self) -> CursorTable:
        self.table.stored_are(self.table.floors())
        return self.table
