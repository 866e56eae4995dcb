"""How messages become batches. Pure.

An `Outbox` holds what a producer has for one shard and has not given to the stream: sealed batches, full ones, in front
of one open batch, which still takes messages. The stream pulls when it can take more; so batches are small when idle
and big under load, without a timer. Sequences are given when a batch is pulled, so they are consecutive in each batch.

A batch may be divided as long as it is not stored: between shards when the layout changed, or where its messages were
partly stored by an earlier life of a named producer. Its receipts follow through `moved`.
"""

from __future__ import annotations

from array import array
from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from operator import add

from magnetar.client.completion import Completion
from magnetar.client.errors import InvalidArgument, MagnetarError
from magnetar.wire.batch import Columns, decode_batch, encode_batch, parse_header, restamp
from magnetar.wire.batch import slots as slots_of_batch

BATCH_MESSAGES_MAX = 100_000
BATCH_BYTES_MAX = 1 << 20
LINGER_S_MAX = 60.0

MESSAGE_OVERHEAD = 12
"""Bytes that a message counts for beside its values: their lengths and its slot."""
EVENT_TIME_SIZE = 8
PROPERTIES_OVERHEAD = 8
PROPERTY_OVERHEAD = 6
HEADER_ALLOWANCE = 256
"""Kept free in each batch for its header and directory."""

NO_SEQUENCE = -1


@dataclass(frozen=True, slots=True)
class Batching:
    """When a batch is full, and how long an open one waits for more.

    linger        seconds; 0: as soon as the stream takes it. While several batches of a shard are unanswered, one that
                  is not full takes more messages until an answer comes
    max_messages  at most 100 000
    max_bytes     of payloads, keys and properties, at most 1 MiB; a larger message travels alone
    """

    linger: float = 0.0
    max_messages: int = 10_000
    max_bytes: int = BATCH_BYTES_MAX

    def __post_init__(self) -> None:
        if not 0.0 <= self.linger <= LINGER_S_MAX:
            raise InvalidArgument(f"linger is 0 to {LINGER_S_MAX:.0f} seconds: linger=`{self.linger}`")
        if not 1 <= self.max_messages <= BATCH_MESSAGES_MAX:
            raise InvalidArgument(f"max_messages is 1 to {BATCH_MESSAGES_MAX}: max_messages=`{self.max_messages}`")
        if not 1 <= self.max_bytes <= BATCH_BYTES_MAX:
            raise InvalidArgument(f"max_bytes is 1 to {BATCH_BYTES_MAX}: max_bytes=`{self.max_bytes}`")


def properties_size(properties: Mapping[str, str]) -> int:
    """Bytes the properties count for. Raises UnicodeEncodeError for what is not text."""
    size = PROPERTIES_OVERHEAD
    for name, value in properties.items():
        size += PROPERTY_OVERHEAD + len(name.encode()) + len(value.encode())
    return size


class Batch(Completion):
    """Messages of one producer for one shard, from the first message until they are stored.

    size         bytes it counts for, in its own limit and in the producer's budget
    limit        bytes it may grow to; -1 once sealed
    slot         of its keyless messages
    ripe         an open batch that need not wait for more messages
    first, last  sequences; -1 until given
    numbered     the sequences are the user's and must be kept
    data         its encoded form; its columns are empty from then on
    previous     last sequence before it in its chain, as encoded
    parent_last  last sequence under which it may be stored in a parent shard; -1: surely not stored there
    shard        where it is stored, or was going to be
    offset       of its first message, once stored; None if not known
    offsets      of each message, where they are not consecutive
    moved        what became of each message when the batch was divided
    """

    __slots__ = (
        "count",
        "data",
        "event_times",
        "first",
        "keys",
        "last",
        "limit",
        "moved",
        "numbered",
        "offset",
        "offsets",
        "parent_last",
        "payloads",
        "previous",
        "properties",
        "ripe",
        "shard",
        "size",
        "slot",
        "slots",
    )

    def __init__(self, shard: int, limit: int, *, slot: int = 0, ripe: bool = True) -> None:
        super().__init__()
        self.payloads: list[bytes] = []
        self.keys: list[bytes | None] = []
        self.slots: array[int] = array("H")
        self.properties: list[Mapping[str, str] | None] = []
        self.event_times: list[int | None] = []
        self.count = 0
        self.size = 0
        self.limit = limit
        self.slot = slot
        self.ripe = ripe
        self.shard = shard
        self.first = self.last = self.previous = self.parent_last = NO_SEQUENCE
        self.numbered = False
        self.data = b""
        self.offset: int | None = None
        self.offsets: Sequence[int | None] | None = None
        self.moved: list[tuple[Batch, int]] | None = None

    # --- growing ---

    def append(
        self,
        cost: int,
        payload: bytes,
        key: bytes | None,
        slot: int,
        properties: Mapping[str, str] | None,
        event_time_us: int | None,
    ) -> int:
        """Take one message, and return its index. Columns that others did not need are filled up first."""
        index = len(self.payloads)
        self.payloads.append(payload)
        self.size += cost
        if key is not None:
            self.pad_keys(index)
            self.keys.append(key)
            self.slots.append(slot)
        if properties:
            self.properties.extend([None] * (index - len(self.properties)))
            self.properties.append(properties)
        if event_time_us is not None:
            self.event_times.extend([None] * (index - len(self.event_times)))
            self.event_times.append(event_time_us)
        return index

    def pad_keys(self, index: int) -> None:
        """Messages before the index that have no key get the slot of the batch."""
        missing = index - len(self.keys)
        if missing:
            self.keys.extend([None] * missing)
            self.slots.extend([self.slot] * missing)

    def seal(self) -> None:
        """It takes no more messages."""
        if self.limit >= 0:
            self.limit = -1
            self.count = len(self.payloads)
            if self.numbered:
                self.last = self.first + self.count - 1

    # --- encoding ---

    def encode(self, *, producer_id: bytes, epoch: int, previous: int, codec: int) -> None:
        """Give it its bytes; its first sequence is set. The columns are dropped: the bytes have them."""
        self.last = self.first + self.count - 1
        columns, slots = self._columns()
        self.data = encode_batch(
            columns,
            producer_id=producer_id,
            epoch=epoch,
            previous=previous,
            last=self.last,
            slots=slots,
            slot=self.slot,
            codec=codec,
        )
        self.previous = previous
        self.payloads, self.keys, self.properties, self.event_times = [], [], [], []
        self.slots = array("H")

    def put_behind(self, previous: int) -> None:
        """It now follows another batch than the one it was encoded behind."""
        if self.previous != previous:
            self.data = restamp(self.data, previous=previous)
            self.previous = previous

    def renumber(self, first: int) -> None:
        """An encoded batch gets other sequences; its place in the chain is set by `put_behind`."""
        self.first, self.last = first, first + self.count - 1
        self.previous = first - 1
        self.data = restamp(self.data, previous=self.previous, last=self.last)

    def _columns(self) -> tuple[Columns, array[int] | None]:
        """All columns, filled up to the count; slots are None for a keyless batch."""
        count = self.count
        if self.keys:
            self.pad_keys(count)
        for column in (self.properties, self.event_times):
            if column:
                column.extend([None] * (count - len(column)))
        columns = Columns(self.payloads, self.keys or None, self.properties or None, self.event_times or None)
        return columns, self.slots if self.keys else None

    # --- the end ---

    def stored(self, offset: int | None) -> None:
        """It is durable, its first message at this offset; None: nobody remembers where."""
        self.offset = offset
        self.data = b""
        self.end()

    def failed(self, error: MagnetarError) -> None:
        """It is given up. Whether it is stored may be unknown; the error says so."""
        self.seal()
        self.data = b""
        self.payloads = []
        self.end(error)

    def offset_of(self, index: int) -> int | None:
        """Where a message of a stored batch stands, if known."""
        if self.offsets is not None:
            return self.offsets[index]
        return None if self.offset is None else self.offset + index

    # --- dividing ---

    def message_slots(self) -> Sequence[int]:
        """The slot of each message of a sealed batch."""
        if self.data:
            return slots_of_batch(self.data, parse_header(self.data, check=False))
        self.pad_keys(self.count)
        return self.slots

    def divide(self, groups: Sequence[tuple[int, Sequence[int]]]) -> list[Batch]:
        """New sealed batches in place of this one: for each shard and list of indices, ascending, one.

        Every message stands in exactly one group. Where the sequences are the user's, the indices of a group are
        consecutive; else the new batches get new ones when they are encoded. Receipts follow to the new batches.
        """
        slots = self.message_slots()
        columns = decode_batch(self.data) if self.data else self._columns()[0]
        moved: list[tuple[Batch, int]] = [(self, 0)] * self.count
        parts: list[Batch] = []
        for shard, indices in groups:
            part = Batch(shard, 0, slot=self.slot)
            part.parent_last = max(self.parent_last, self.last if self.data else NO_SEQUENCE)
            part.numbered = self.numbered
            if self.numbered:
                part.first = self.first + indices[0]
            for place, index in enumerate(indices):
                part.append(*_message(columns, index, slots[index]))
                moved[index] = (part, place)
            part.seal()
            parts.append(part)
        self.data, self.payloads = b"", []
        self.moved = moved
        self._tell()
        return parts


def _message(
    columns: Columns, index: int, slot: int
) -> tuple[int, bytes, bytes | None, int, Mapping[str, str] | None, int | None]:
    """One message of the columns, as `Batch.append` takes it."""
    payload = columns.payloads[index]
    key = columns.keys[index] if columns.keys else None
    properties = columns.properties[index] if columns.properties else None
    event_time_us = columns.event_times[index] if columns.event_times else None
    cost = cost_of(len(payload), key, properties_size(properties) if properties else 0, event_time_us)
    return cost, payload, key, slot, properties, event_time_us


def cost_of(payload_size: int, key: bytes | None, properties_bytes: int, event_time_us: int | None) -> int:
    """Bytes that a message counts for."""
    cost = payload_size + MESSAGE_OVERHEAD + properties_bytes
    if key is not None:
        cost += len(key)
    return cost if event_time_us is None else cost + EVENT_TIME_SIZE


class Outbox:
    """The batches of one producer for one shard that have no place in its chain yet, oldest first.

    open    the batch that takes the next message; sealed (limit -1) if there is none
    begun   called with each new batch: there is something to send, now or when it is ripe
    """

    __slots__ = ("_batching", "_begun", "_sealed", "open", "shard")

    def __init__(self, shard: int, batching: Batching, begun: Callable[[Batch], None]) -> None:
        self.shard = shard
        self.open = sealed_batch()
        self._batching = batching
        self._begun = begun
        self._sealed: deque[Batch] = deque()

    def __bool__(self) -> bool:
        return bool(self._sealed) or self.open.limit >= 0

    def begin(self, slot: int = 0) -> Batch:
        """A new open batch, behind what is there."""
        self.seal()
        limit = max(self._batching.max_bytes - HEADER_ALLOWANCE, 1)
        self.open = Batch(self.shard, limit, slot=slot, ripe=self._batching.linger == 0.0)
        self._begun(self.open)
        return self.open

    def batch_for(self, cost: int, slot: int = 0) -> Batch:
        """The open batch, if a message of this cost fits, or a new one. A message larger than a batch gets its own."""
        batch = self.open
        if batch.size + cost > batch.limit or len(batch.payloads) >= self._batching.max_messages:
            return self.begin(slot)
        return batch

    def numbered_batch_for(self, cost: int, sequence: int, slot: int) -> Batch:
        """The batch for a message whose sequence is the user's: a batch's sequences are consecutive."""
        batch = self.open
        if batch.limit >= 0 and not (batch.numbered and batch.first + len(batch.payloads) == sequence):
            self.seal()
        batch = self.batch_for(cost, slot)
        if not batch.payloads:
            batch.numbered = True
            batch.first = sequence
        return batch

    def put_many(
        self, payloads: Sequence[bytes], keys: Sequence[bytes | None] | None, slots: Sequence[int], slot: int
    ) -> list[tuple[Batch, int, int]]:
        """Messages in bulk, with keys and the slot of each, or without.

        slot   of new batches: for keyless messages

        Returns where they went, in order: batch, first index, count.
        """
        costs: Iterable[int] = map(MESSAGE_OVERHEAD.__add__, map(len, payloads))
        if keys is not None:
            costs = map(add, costs, [0 if key is None else len(key) for key in keys])
        ends = list(accumulate(costs, initial=0))
        places: list[tuple[Batch, int, int]] = []
        at = 0
        while at < len(payloads):
            batch = self.batch_for(ends[at + 1] - ends[at], slot)
            index = len(batch.payloads)
            fitting = bisect_right(ends, ends[at] + batch.limit - batch.size) - 1
            stop = max(at + 1, min(fitting, at + self._batching.max_messages - index))
            batch.payloads.extend(payloads[at:stop])
            batch.size += ends[stop] - ends[at]
            if keys is not None:
                batch.pad_keys(index)
                batch.keys.extend(keys[at:stop])
                batch.slots.extend(slots[at:stop])
            places.append((batch, index, stop - at))
            at = stop
        return places

    def seal(self) -> None:
        """What is open takes no more messages, and need not wait."""
        if self.open.limit >= 0:
            self.open.seal()
            self._sealed.append(self.open)

    def next_size(self, *, full: bool = False) -> int:
        """About how many bytes the next batch to send has; 0: there is none that is full, or ripe if that will do."""
        if self._sealed:
            return self._sealed[0].size + HEADER_ALLOWANCE
        batch = self.open
        if full and len(batch.payloads) < self._batching.max_messages and batch.size < batch.limit:
            return 0
        return batch.size + HEADER_ALLOWANCE if batch.limit >= 0 and batch.ripe and batch.payloads else 0

    def take(self) -> Batch:
        """The next batch to send, sealed. Only if `next_size` is not 0."""
        if not self._sealed:
            self.seal()
        return self._sealed.popleft()

    def take_all(self) -> list[Batch]:
        """Every batch, sealed, oldest first; nothing remains."""
        self.seal()
        batches = [batch for batch in self._sealed if batch.count]
        self._sealed.clear()
        return batches

    def put_first(self, batches: Sequence[Batch]) -> None:
        """Sealed batches go before everything that is here, in this order."""
        self._sealed.extendleft(reversed(batches))

    def put(self, batch: Batch) -> None:
        """A sealed batch goes behind everything that is here."""
        self.seal()
        self._sealed.append(batch)

    def pending(self) -> list[Batch]:
        """Every batch, oldest first."""
        return [*self._sealed, self.open] if self.open.limit >= 0 else list(self._sealed)


def sealed_batch() -> Batch:
    """A batch that takes nothing: stands where no batch is open, so that one comparison sees it."""
    return Batch(0, -1)
