"""Who gets which message of one shard for one subscription: the decisions, without reading or sending anything. Pure.

A dispatcher takes events (a consumer came or went, credit, acknowledgements, batches that were read, a seek) and
`dispatch()` returns effects: Deliver, Read, CaughtUp, Activated. No effect means: idle until the next event, and
`explain()` says why. The shell carries effects out in order; it changes the cursor before it reports `acked`.

Every offset stands in exactly one place:

    acknowledged        the cursor says so
    >= position         not looked at yet. Some may be pending at a consumer that says it holds them from before
    pending             delivered to exactly one consumer
    waiting             below position and to be delivered (again), lowest first

Batches travel whole with a selection; what was read and is still needed is kept in `LoadedBatches`, bounded in bytes.
"""

from __future__ import annotations

from array import array
from bisect import bisect_right, insort
from collections import deque
from collections.abc import Iterable, Sequence
from enum import Enum
from typing import NamedTuple, Protocol

from magnetar.broker.flow import CONSUMER_UNACKED_MAX, SUBSCRIPTION_UNACKED_MAX, Credits, share
from magnetar.broker.offset_set import CHUNK, OffsetSet, first_bit, lowest, ones, pieces_of
from magnetar.broker.redelivery import Returned

LOADED_BYTES_MAX = 4 << 20
"""Batches that a dispatcher keeps between passes; what the last read brought is kept in any case."""

DISPATCH_BYTES_MAX = 1 << 20
"""Bytes of batches that one pass hands out; the last batch may exceed it."""


RANGE_IN_BITS_MAX = 16 * CHUNK
"""Acknowledged ranges up to this length are joined and taken as bitmaps; longer ones, each by itself, as ranges."""


class CursorView(Protocol):
    """What a dispatcher sees of a cursor."""

    @property
    def floor(self) -> int: ...
    def next_unacked(self, offset: int, /) -> int:
        """The first offset at or above this one that is not acknowledged."""

    def unacked_selection(self, first_offset: int, count: int, /) -> bytes | None:
        """Selection of what is not acknowledged among these; None if all of it is."""


class LoadedBatch:
    """A batch that was read: messages first_offset .. end_offset - 1. `slots` is filled where keys matter."""

    __slots__ = ("count", "data", "end_offset", "first_offset", "owners", "owners_of", "publish_time_us", "slots")

    def __init__(self, first_offset: int, count: int, data: bytes, publish_time_us: int = 0) -> None:
        self.first_offset = first_offset
        self.count = count
        self.end_offset = first_offset + count
        self.data = data
        self.publish_time_us = publish_time_us
        self.slots: array[int] | None = None
        self.owners = b""
        self.owners_of = -1

    def __repr__(self) -> str:
        return f"LoadedBatch({self.first_offset}..{self.end_offset})"


class Deliver(NamedTuple):
    """Send these messages of the batch to the consumer. `redeliveries`: index and earlier deliveries, in pairs."""

    consumer: int
    cursor_epoch: int
    batch: LoadedBatch
    selection: bytes
    messages: int
    redeliveries: tuple[int, ...] = ()


class Read(NamedTuple):
    """Read entries from this offset on and report them by `loaded`, or `read_failed`. One at a time."""

    offset: int
    cursor_epoch: int
    tail: bool
    """It will not be followed by reads of what comes next: it is at the end of the log, or for a redelivery."""


class CaughtUp(NamedTuple):
    """Everything below `offset` was delivered, and nothing more is stored."""

    consumer: int
    offset: int


class Activated(NamedTuple):
    """A consumer that stood by is now the active one."""

    consumer: int
    next_offset: int


Effect = Deliver | Read | CaughtUp | Activated


class Reason(Enum):
    """Why nothing is delivered."""

    NO_CONSUMER = "no consumer"
    NO_CREDIT = "no credit"
    BUFFER_FULL = "outgoing buffer full"
    CONSUMER_UNACKED = "consumer holds too many unacknowledged messages"
    SUBSCRIPTION_UNACKED = "subscription has too many unacknowledged messages"
    DRAINING = "slots wait for their former consumer"
    LOOK_AHEAD = "look-ahead limit reached"
    STANDBY = "stands by"
    READING = "reading"
    NOTHING_TO_READ = "nothing to read"


class Waiting(NamedTuple):
    """One cause: whom it concerns (None = all), and how many slots or messages, where that can be counted."""

    reason: Reason
    consumer: int | None = None
    number: int = 0


class LoadedBatches:
    """Batches by offset. Beyond LOADED_BYTES_MAX those loaded first go, never those of the last load."""

    __slots__ = ("_batches", "_firsts", "size_bytes")

    def __init__(self) -> None:
        self._batches: dict[int, LoadedBatch] = {}
        self._firsts: list[int] = []
        self.size_bytes = 0

    def __len__(self) -> int:
        return len(self._batches)

    def find(self, offset: int) -> LoadedBatch | None:
        """The batch that holds this offset, if it is here."""
        at = bisect_right(self._firsts, offset) - 1
        if at < 0:
            return None
        batch = self._batches[self._firsts[at]]
        return batch if offset < batch.end_offset else None

    def load(self, batches: Iterable[LoadedBatch]) -> None:
        kept = []
        for batch in batches:
            if batch.first_offset not in self._batches:
                insort(self._firsts, batch.first_offset)
                self.size_bytes += len(batch.data)
            kept.append(self._batches.pop(batch.first_offset, batch))
        room = LOADED_BYTES_MAX - sum(len(batch.data) for batch in kept)
        old_bytes = self.size_bytes - (LOADED_BYTES_MAX - room)
        while self._batches and old_bytes > max(0, room):
            oldest = next(iter(self._batches.values()))
            old_bytes -= len(oldest.data)
            self.discard(oldest)
        for batch in kept:
            self._batches[batch.first_offset] = batch

    def discard(self, batch: LoadedBatch) -> None:
        if self._batches.pop(batch.first_offset, None) is not None:
            del self._firsts[bisect_right(self._firsts, batch.first_offset) - 1]
            self.size_bytes -= len(batch.data)

    def clear(self) -> None:
        self._batches.clear()
        self._firsts.clear()
        self.size_bytes = 0

    def check(self) -> None:
        assert self._firsts == sorted(self._batches)
        assert self.size_bytes == sum(len(batch.data) for batch in self._batches.values())


class Consumer:
    """What a dispatcher knows of one attached consumer.

    pending     delivered to it and neither acknowledged nor returned
    paused      its outgoing buffer is full
    told        it was told that it caught up, and got nothing since
    """

    __slots__ = ("credits", "id", "paused", "pending", "told")

    def __init__(self, consumer: int) -> None:
        self.id = consumer
        self.credits = Credits()
        self.paused = False
        self.pending = OffsetSet()
        self.told = False


class Dispatch:
    """What all dispatchers have in common.

    position        lowest offset not looked at
    cursor_epoch    grows with each seek, and with each activation of a stream's consumer
    reading         the read under way; its result is dropped if the epoch is another one by then
    """

    def __init__(self, cursor: CursorView) -> None:
        self.cursor = cursor
        self.cursor_epoch = 1
        self.position = cursor.floor
        self.consumers: dict[int, Consumer] = {}
        self.batches = LoadedBatches()
        self.reading: Read | None = None
        self._wanted: Read | None = None
        self._tail_at = -1

    # Events

    def credit(self, consumer: int, messages: int, size_bytes: int) -> None:
        """The consumer granted this much more; raises CreditRefused."""
        self.consumers[consumer].credits.grant(messages, size_bytes)

    def refund(self, consumer: int, messages: int, size_bytes: int) -> None:
        """A delivery to it was dropped before it was sent."""
        if consumer in self.consumers:
            self.consumers[consumer].credits.refund(messages, size_bytes)

    def pause(self, consumer: int, paused: bool) -> None:
        """Its outgoing buffer is full, or has room again."""
        self.consumers[consumer].paused = paused

    @property
    def takers(self) -> bool:
        """Whether there is a consumer whose outgoing buffer has room."""
        return any(not consumer.paused for consumer in self.consumers.values())

    def loaded(self, read: Read, batches: Sequence[LoadedBatch]) -> None:
        """A read brought these batches, ascending; those of an older cursor epoch are dropped."""
        if read == self.reading:
            self.reading = None
        if read.cursor_epoch == self.cursor_epoch:
            self.batches.load([batch for batch in batches if self._needed(batch)])

    def read_failed(self, read: Read) -> None:
        """The read brought nothing. The next pass asks again."""
        if read == self.reading:
            self.reading = None

    def seek(self, offset: int) -> None:
        """The cursor was moved there: everything from there on is delivered anew."""
        self.cursor_epoch += 1
        self._restart(offset)
        for consumer in self.consumers.values():
            consumer.told = False

    def trimmed(self, start_offset: int) -> None:
        """Nothing below is stored any more."""
        self.position = max(self.position, start_offset)

    # Decisions

    def dispatch(self, end_offset: int, bytes_max: int = DISPATCH_BYTES_MAX) -> list[Effect]:
        """What is to be done now, in this order. `end_offset`: one past the last confirmed message."""
        effects: list[Effect] = []
        self._wanted = None
        self._hand_out(end_offset, bytes_max, effects)
        if self._wanted is not None and self.reading is None:
            self.reading = self._wanted
            effects.append(self._wanted)
        if self._at_end(end_offset):
            self._tail_at = self.position
            self._tell_caught_up(end_offset, effects)
        return effects

    def explain(self, end_offset: int) -> list[Waiting]:
        """Why nothing more is delivered right now; empty if the next pass delivers."""
        raise NotImplementedError

    def check(self, end_offset: int) -> None:
        """Assert what must hold."""
        self.batches.check()
        assert self.position <= max(end_offset, self.cursor.floor)
        for consumer in self.consumers.values():
            consumer.pending.check()

    # Parts

    def _hand_out(self, end_offset: int, bytes_max: int, effects: list[Effect]) -> None:
        raise NotImplementedError

    def _restart(self, offset: int) -> None:
        """Forget what was read and delivered; go on at this offset."""
        self.position = offset
        self.batches.clear()
        self._tail_at = -1

    def _needed(self, batch: LoadedBatch) -> bool:
        return batch.end_offset > self.position

    def _at_end(self, end_offset: int) -> bool:
        return self.position >= end_offset

    def _told_by(self) -> Iterable[Consumer]:
        """Whom it concerns that the end is reached."""
        return self.consumers.values()

    def _tell_caught_up(self, end_offset: int, effects: list[Effect]) -> None:
        for consumer in self._told_by():
            if not consumer.told:
                consumer.told = True
                effects.append(CaughtUp(consumer.id, end_offset))

    def _frontier(self, end_offset: int) -> LoadedBatch | None:
        """The batch at the position; None at the end, or if it has to be read first."""
        batch = self.batches.find(self.position)
        if batch is None:
            self._skip_acked(end_offset)
            if self.position >= end_offset:
                return None
            batch = self.batches.find(self.position)
            if batch is None:
                self._wanted = self._wanted or Read(self.position, self.cursor_epoch, self.position == self._tail_at)
                return None
        return batch if batch.end_offset <= end_offset else None

    def _skip_acked(self, end_offset: int) -> None:
        """Move the position to the first offset that is not acknowledged."""
        self.position = max(self.position, min(self.cursor.next_unacked(self.position), end_offset))

    def _unacked(self, batch: LoadedBatch) -> int:
        """Bits of the batch's messages that are not acknowledged."""
        selection = self.cursor.unacked_selection(batch.first_offset, batch.count)
        if selection is None:
            return 0
        return int.from_bytes(selection, "little") if selection else ones(batch.count)

    def _unseen(self, batch: LoadedBatch) -> int:
        """Bits of its messages that are neither acknowledged nor below the position."""
        seen = max(0, self.position - batch.first_offset)
        return self._unacked(batch) >> seen << seen

    def _deliver(self, consumer: Consumer, batch: LoadedBatch, bits: int, redeliveries: tuple[int, ...]) -> Deliver:
        messages = bits.bit_count()
        consumer.credits.spend(messages, len(batch.data))
        consumer.told = False
        selection = b"" if messages == batch.count else bits.to_bytes((batch.count + 7) >> 3, "little")
        return Deliver(consumer.id, self.cursor_epoch, batch, selection, messages, redeliveries)


class StreamDispatch(Dispatch):
    """One active consumer, the first that was attached; the others stand by. Whole batches, in order.

    When another one becomes active it begins at the cursor's floor, with a new cursor epoch.
    """

    def __init__(self, cursor: CursorView) -> None:
        super().__init__(cursor)
        self._activated: int | None = None

    @property
    def active(self) -> int | None:
        return next(iter(self.consumers), None)

    def attach(self, consumer: int, held: Iterable[tuple[int, int]] = ()) -> None:
        """`held`: offsets that it says were delivered to it before; it does not get them again."""
        assert consumer not in self.consumers
        first = not self.consumers
        state = Consumer(consumer)
        state.pending = OffsetSet(held)
        self.consumers[consumer] = state
        if first:
            self._activate()

    def detach(self, consumer: int) -> None:
        was_active = consumer == self.active
        del self.consumers[consumer]
        if was_active:
            self._activated = self.active
            self._activate()

    def acked(self, consumer: int | None, ranges: Sequence[tuple[int, int]]) -> None:
        """The cursor acknowledges these now."""
        for state in self.consumers.values():
            if state.pending:
                for start, end in ranges:
                    state.pending.remove_range(start, end)

    def next_offset(self) -> int:
        return max(self.position, self.cursor.floor)

    def seek(self, offset: int) -> None:
        super().seek(offset)
        for consumer in self.consumers.values():
            consumer.pending.clear()

    def explain(self, end_offset: int) -> list[Waiting]:
        causes = [Waiting(Reason.STANDBY, consumer) for consumer in list(self.consumers)[1:]]
        active = self.consumers.get(self.active) if self.active is not None else None
        if active is None:
            return [Waiting(Reason.NO_CONSUMER)]
        if self._at_end(end_offset):
            causes.append(Waiting(Reason.NOTHING_TO_READ))
        elif active.paused:
            causes.append(Waiting(Reason.BUFFER_FULL, active.id))
        elif not active.credits.open:
            causes.append(Waiting(Reason.NO_CREDIT, active.id))
        elif self.reading is not None:
            causes.append(Waiting(Reason.READING))
        return causes

    def _activate(self) -> None:
        self.cursor_epoch += 1
        self._restart(self.cursor.floor)
        for consumer in self.consumers.values():
            consumer.told = False

    def _told_by(self) -> Iterable[Consumer]:
        return [] if self.active is None else [self.consumers[self.active]]

    def _hand_out(self, end_offset: int, bytes_max: int, effects: list[Effect]) -> None:
        if self.active is None:
            return
        active = self.consumers[self.active]
        if self._activated is not None:
            self._activated = None
            effects.append(Activated(active.id, self.next_offset()))
        while bytes_max > 0 and active.credits.open and not active.paused:
            batch = self._frontier(end_offset)
            if batch is None:
                return
            bits = self._unseen(batch)
            if active.pending:
                bits &= ~active.pending.window(batch.first_offset, batch.count)
            self.position = batch.end_offset
            self.batches.discard(batch)
            if bits:
                effects.append(self._deliver(active, batch, bits, ()))
                bytes_max -= len(batch.data)


class QueueDispatch(Dispatch):
    """Each message to one consumer: an equal share of what waits to each that has credit, in turns.

    What was returned goes first, lowest offset first. Who has least pending comes first, then whose last turn is the
    longest ago: consumers stand in the order of their last turns.

    held_ahead      pending offsets at or above the position: of consumers that held them when they were attached
    """

    def __init__(self, cursor: CursorView) -> None:
        super().__init__(cursor)
        self.returned = Returned()
        self.unacked = 0
        self.held_ahead = OffsetSet()

    # Events

    def attach(self, consumer: int, held: Iterable[tuple[int, int]] = ()) -> None:
        """`held`: offsets that it says were delivered to it before; they are, unless somebody else has them."""
        assert consumer not in self.consumers
        state = self.consumers[consumer] = Consumer(consumer)
        for start, end in held:
            self._hold(state, start, end)

    def detach(self, consumer: int) -> None:
        """What is pending there is delivered again, and counts as delivered once more."""
        state = self.consumers[consumer]
        self._give_back(state.pending.pieces())
        del self.consumers[consumer]

    def acked(self, consumer: int | None, ranges: Sequence[tuple[int, int]]) -> None:
        """The cursor acknowledges these now, whoever had them; `consumer` is who said so."""
        state = self.consumers.get(consumer) if consumer is not None else None
        for start, end in ranges:
            if end - start > RANGE_IN_BITS_MAX:
                self._acked_range(start, end)
        for start, bits in pieces_of(item for item in ranges if item[1] - item[0] <= RANGE_IN_BITS_MAX):
            settled = self._settle(state, [(start, state.pending.remove(start, bits))]) if state is not None else 0
            if settled != bits.bit_count():
                self._acked_elsewhere(start, bits)
            if self.returned.counts:
                self.returned.counts.forget_bits(start, bits)

    def _acked_range(self, start: int, end: int) -> None:
        self._drop_waiting(start, end)
        for state in self.consumers.values():
            self._settle(state, state.pending.take_range(start, end))
        self.returned.counts.forget(start, end)

    def _acked_elsewhere(self, start: int, bits: int) -> None:
        self._taken_up(start, self.returned.waiting.remove(start, bits))
        for other in self.consumers.values():
            if other.pending:
                self._settle(other, [(start, other.pending.remove(start, bits))])

    def nack(self, consumer: int, start: int, end: int) -> int:
        """Of start <= offset < end, what is pending at this consumer is delivered again; returns how many that is."""
        state = self.consumers[consumer]
        before = self.unacked
        taken = state.pending.take_range(start, end)
        self._unstick(state, taken)
        self._give_back(taken)
        return before - self.unacked

    def trimmed(self, start_offset: int) -> None:
        self.acked(None, [(0, start_offset)])
        self.held_ahead.remove_range(0, max(self.position, start_offset))
        super().trimmed(start_offset)

    def next_offset(self) -> int:
        first = self.returned.waiting.first()
        return self.position if first < 0 else min(first, self.position)

    # Decisions

    def explain(self, end_offset: int) -> list[Waiting]:
        if not self.consumers:
            return [Waiting(Reason.NO_CONSUMER)]
        if self._at_end(end_offset):
            return [Waiting(Reason.NOTHING_TO_READ)]
        causes = []
        if self.unacked >= SUBSCRIPTION_UNACKED_MAX:
            causes.append(Waiting(Reason.SUBSCRIPTION_UNACKED, None, self.unacked))
        for consumer in self.consumers.values():
            if consumer.paused:
                causes.append(Waiting(Reason.BUFFER_FULL, consumer.id))
            elif not consumer.credits.open:
                causes.append(Waiting(Reason.NO_CREDIT, consumer.id))
            elif len(consumer.pending) >= CONSUMER_UNACKED_MAX:
                causes.append(Waiting(Reason.CONSUMER_UNACKED, consumer.id, len(consumer.pending)))
        if not causes and self.reading is not None:
            causes.append(Waiting(Reason.READING))
        return causes

    def check(self, end_offset: int) -> None:
        super().check(end_offset)
        self.returned.waiting.check()
        assert self.unacked == sum(len(consumer.pending) for consumer in self.consumers.values())
        held = set(self.returned.waiting)
        assert all(offset < self.position for offset in held)
        for consumer in self.consumers.values():
            pending = set(consumer.pending)
            assert not held & pending, "an offset stands in two places"
            assert {offset for offset in pending if offset >= self.position} <= set(self.held_ahead)
            held |= pending
        assert all(self.cursor.unacked_selection(offset, 1) is not None for offset in held), "acknowledged but here"
        for offset in range(self.cursor.floor, self.position):
            assert offset in held or self.cursor.unacked_selection(offset, 1) is None, f"lost: offset=`{offset}`"

    # Parts

    def _restart(self, offset: int) -> None:
        super()._restart(offset)
        self.returned.clear()
        self.held_ahead.clear()
        self.unacked = 0
        for consumer in self.consumers.values():
            consumer.pending.clear()

    def _needed(self, batch: LoadedBatch) -> bool:
        return super()._needed(batch) or bool(self.returned.waiting.window(batch.first_offset, batch.count))

    def _at_end(self, end_offset: int) -> bool:
        return self.position >= end_offset and not self.returned.waiting

    def _hold(self, state: Consumer, start: int, end: int) -> None:
        selection = self.cursor.unacked_selection(start, end - start)
        if selection is None:
            return
        bits = int.from_bytes(selection, "little") if selection else ones(end - start)
        for other in self.consumers.values():
            bits &= ~other.pending.window(start, end - start)
        seen = lowest_below(bits, self.position - start)
        self._taken_up(start, self.returned.waiting.remove(start, seen))
        self.held_ahead.add(start, bits ^ seen)
        self._held(start, bits ^ seen)
        state.pending.add(start, bits)
        self.unacked += bits.bit_count()

    def _allowance(self, consumer: Consumer) -> int:
        """Messages that it may get now."""
        if consumer.paused or not consumer.credits.open:
            return 0
        return min(
            consumer.credits.messages,
            CONSUMER_UNACKED_MAX - len(consumer.pending),
            SUBSCRIPTION_UNACKED_MAX - self.unacked,
        )

    def _hand_out(self, end_offset: int, bytes_max: int, effects: list[Effect]) -> None:
        able = [consumer for consumer in self.consumers.values() if self._allowance(consumer) > 0]
        ready = deque(sorted(able, key=lambda consumer: len(consumer.pending)))
        undelivered = len(self.returned.waiting) + end_offset - self.position
        if not ready or undelivered <= 0:
            return
        turn = share(undelivered, len(ready))
        while ready and bytes_max > 0:
            consumer = ready.popleft()
            left = turn
            while left > 0 and bytes_max > 0 and (allowed := self._allowance(consumer)) > 0:
                given = self._give(consumer, left, turn, allowed, end_offset)
                if given is None:
                    return
                effects.append(given)
                left -= given.messages
                bytes_max -= len(given.batch.data) + len(given.selection)
                self.consumers[consumer.id] = self.consumers.pop(consumer.id)
            if left <= 0:
                ready.append(consumer)

    def _give(self, consumer: Consumer, left: int, turn: int, allowed: int, end_offset: int) -> Deliver | None:
        """Deliver the next messages of one batch: those left of its turn, or all if the whole turn has room for them.

        At most as many as allowed. None if there is nothing, or it has to be read first.
        """
        while (offset := self.returned.waiting.first()) >= 0:
            batch = self.batches.find(offset)
            if batch is None:
                self._wanted = Read(offset, self.cursor_epoch, True)
                return None
            bits = self.returned.waiting.window(batch.first_offset, batch.count) & self._unacked(batch)
            bits = lowest(bits, min(allowed, left if bits.bit_count() > turn else turn))
            if bits:
                self.returned.waiting.remove(batch.first_offset, bits)
                self._forget_loaded(batch)
                return self._deliver_pending(consumer, batch, bits)
            self.returned.waiting.remove_range(batch.first_offset, batch.end_offset)
        while (batch := self._frontier(end_offset)) is not None:
            bits = self._unseen(batch) & ~self.held_ahead.window(batch.first_offset, batch.count)
            chosen = lowest(bits, min(allowed, left if bits.bit_count() > turn else turn))
            rest = bits ^ chosen
            self._advance(batch.first_offset + first_bit(rest) if rest else batch.end_offset)
            self._forget_loaded(batch)
            if chosen:
                return self._deliver_pending(consumer, batch, chosen)
        return None

    def _deliver_pending(self, consumer: Consumer, batch: LoadedBatch, bits: int) -> Deliver:
        consumer.pending.add(batch.first_offset, bits)
        self.unacked += bits.bit_count()
        counts = self.returned.counts
        return self._deliver(consumer, batch, bits, counts.pairs(batch.first_offset, bits) if counts else ())

    def _advance(self, position: int) -> None:
        self.position = position
        if self.held_ahead:
            self.held_ahead.remove_range(0, position)

    def _skip_acked(self, end_offset: int) -> None:
        super()._skip_acked(end_offset)
        self._advance(self.position)

    def _forget_loaded(self, batch: LoadedBatch) -> None:
        """Let it go if nothing in it is waiting or not looked at."""
        if batch.end_offset <= self.position and not self.returned.waiting.window(batch.first_offset, batch.count):
            self.batches.discard(batch)

    def _settle(self, state: Consumer, pieces: Sequence[tuple[int, int]]) -> int:
        """These are acknowledged, and were taken out of what is pending there; returns how many they are."""
        settled = 0
        for start, bits in pieces:
            settled += bits.bit_count()
            if self.held_ahead:
                self.held_ahead.remove(start, bits)
        if settled:
            self.unacked -= settled
            self._unstick(state, pieces)
        return settled

    def _give_back(self, pieces: Sequence[tuple[int, int]]) -> None:
        """These were pending at a consumer, and are to be delivered again."""
        for start, bits in pieces:
            self.unacked -= bits.bit_count()
            ahead = self.held_ahead.remove(start, bits) if self.held_ahead else 0
            self.returned.counts.increment(start, bits)
            self.returned.waiting.add(start, bits ^ ahead)
            self._came_back(start, bits ^ ahead)

    # What only the order of keys needs

    def _drop_waiting(self, start: int, end: int) -> None:
        """start <= offset < end need no delivery any more."""
        self.returned.waiting.remove_range(start, end)

    def _held(self, start: int, bits: int) -> None:
        """These are pending, and were not looked at."""

    def _taken_up(self, start: int, bits: int) -> None:
        """These are no longer waiting."""

    def _came_back(self, start: int, bits: int) -> None:
        """These are waiting now."""

    def _unstick(self, state: Consumer, pieces: Sequence[tuple[int, int]]) -> None:
        """These are no longer pending there."""


def lowest_below(bits: int, count: int) -> int:
    """The bits with an index below count."""
    return bits & ones(count) if count > 0 else 0
