"""Dispatchers against a naive model of what each message's fate is."""

from __future__ import annotations

from array import array

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    initialize,
    invariant,
    precondition,
    rule,
)

from magnetar.broker.dispatch import (
    RANGE_IN_BITS_MAX,
    CaughtUp,
    Deliver,
    LoadedBatch,
    QueueDispatch,
    Read,
    StreamDispatch,
)
from magnetar.broker.key_order import KeyOrderedDispatch
from magnetar.broker.offset_set import CHUNK
from magnetar.managed_log.cursor import CursorTable
from magnetar.metadata.records import SubscriptionType
from magnetar.wire.batch import Columns, encode_batch
from magnetar.wire.selection import indices

BEGIN = 40 * CHUNK - 7
SLOTS = st.sampled_from([0, 1, 63, 20_000, 40_000, 65_535])
LOOK_AHEAD = 12


def a_batch(first_offset: int, slots: list[int]) -> LoadedBatch:
    columns = Columns([b"x" * 10] * len(slots))
    data = encode_batch(
        columns, producer_id=bytes(16), epoch=0, previous=-1, last=len(slots) - 1, slots=array("H", slots)
    )
    return LoadedBatch(first_offset, len(slots), data)


class ShortSighted(KeyOrderedDispatch):
    look_ahead_step = 3

    def look_ahead(self) -> int:
        return LOOK_AHEAD


class QueueMachine(RuleBasedStateMachine):
    """Fates: acked, held by one consumer, or neither. Everything a dispatcher does is judged by them."""

    consumers = Bundle("consumers")
    dispatcher: type[QueueDispatch] = QueueDispatch
    keyed = False

    @initialize()
    def begin(self) -> None:
        self.table = CursorTable()
        self.table.create("s", 1, SubscriptionType.QUEUE, BEGIN)
        self.cursor = self.table.cursor("s")
        self.core = self.dispatcher(self.cursor)
        self.batches: list[LoadedBatch] = []
        self.slots: dict[int, int] = {}
        self.end = BEGIN
        self.holder: dict[int, int] = {}
        self.counts: dict[int, int] = {}
        self.credits: dict[int, list[int]] = {}
        self.paused: set[int] = set()
        self.next_consumer = 0
        self.read: Read | None = None
        self.store([0, 1, 63, 20_000, 0, 65_535])
        self.store([1, 1, 0, 40_000])

    # Events

    @rule(slots=st.lists(SLOTS, min_size=1, max_size=9))
    def store(self, slots: list[int]) -> None:
        batch = a_batch(self.end, slots)
        self.batches.append(batch)
        self.slots.update(zip(range(self.end, batch.end_offset), slots, strict=True))
        self.end = batch.end_offset

    @precondition(lambda self: len(self.credits) < 4)
    @rule(
        target=consumers,
        held=st.lists(st.tuples(st.integers(0, 40), st.integers(1, 10)), max_size=2),
        credit=st.integers(1, 8),
    )
    def attach(self, held: list[tuple[int, int]], credit: int) -> int:
        consumer = self.next_consumer
        self.next_consumer += 1
        ranges = [(BEGIN + start, min(BEGIN + start + count, self.end)) for start, count in held]
        ranges = [(start, end) for start, end in ranges if start < end]
        self.core.attach(consumer, ranges)
        for start, end in ranges:
            for offset in range(start, end):
                if not self.cursor.is_acked(offset):
                    self.holder.setdefault(offset, consumer)
        self.credits[consumer] = [0, 0]
        self.credit(consumer, credit, 10_000)
        self.settle()
        return consumer

    @rule(consumer=consumes(consumers))
    def detach(self, consumer: int) -> None:
        self.core.detach(consumer)
        self.give_back({offset for offset, holder in self.holder.items() if holder == consumer})
        del self.credits[consumer]
        self.paused.discard(consumer)

    @rule(consumer=consumers, messages=st.integers(0, 20), size=st.sampled_from([10_000, 100, 0]))
    def credit(self, consumer: int, messages: int, size: int) -> None:
        if messages or size:
            self.core.credit(consumer, messages, size)
            self.credits[consumer][0] += messages
            self.credits[consumer][1] += size

    @rule(consumer=consumers, paused=st.booleans())
    def pause(self, consumer: int, paused: bool) -> None:
        self.core.pause(consumer, paused)
        (self.paused.add if paused else self.paused.discard)(consumer)

    @rule(consumer=consumers, start=st.integers(0, 60), count=st.integers(1, 4))
    def ack(self, consumer: int, start: int, count: int) -> None:
        start, end = BEGIN + start, min(BEGIN + start + count, self.end)
        if start < end:
            self.table.ack("s", 0, [(start, end)])
            self.core.acked(consumer, [(start, end)])
            for offset in range(start, end):
                self.holder.pop(offset, None)
                self.counts.pop(offset, None)

    @precondition(lambda self: self.end > BEGIN + 40)
    @rule(consumer=consumers, back=st.integers(1, 20))
    def ack_nearly_everything(self, consumer: int, back: int) -> None:
        """A range so long that it is not taken as a bitmap: everything below the end but a few."""
        end = self.end - back
        self.table.ack("s", end, [])
        self.core.acked(consumer, [(end - 2 * RANGE_IN_BITS_MAX, end)])
        for offset in range(BEGIN, end):
            self.holder.pop(offset, None)
            self.counts.pop(offset, None)

    @rule(consumer=consumers, take=st.integers(1, 10))
    def ack_what_it_holds(self, consumer: int, take: int) -> None:
        held = sorted(offset for offset, holder in self.holder.items() if holder == consumer)
        for offset in held[-take:] if take % 2 else held[:take]:
            self.ack(consumer, offset - BEGIN, 1)

    @rule(consumer=consumers, data=st.data(), count=st.integers(1, 5))
    def nack_some(self, consumer: int, data: st.DataObject, count: int) -> None:
        held = sorted(offset for offset, holder in self.holder.items() if holder == consumer)
        if held:
            self.nack(consumer, data.draw(st.sampled_from(held)), count)

    @rule(consumer=consumers)
    def nack_all(self, consumer: int) -> None:
        self.nack(consumer, BEGIN, self.end - BEGIN)

    def nack(self, consumer: int, start: int, count: int) -> None:
        end = start + count
        returned = {o for o, holder in self.holder.items() if holder == consumer and start <= o < end}
        assert self.core.nack(consumer, start, end) == len(returned)
        self.give_back(returned)

    @precondition(lambda self: self.end > BEGIN + 30)
    @rule(to=st.integers(0, 40))
    def seek(self, to: int) -> None:
        offset = min(BEGIN + to, self.end)
        self.table.seek("s", offset)
        self.core.seek(offset)
        self.holder.clear()
        self.counts.clear()

    @rule(steps=st.integers(1, 3), size=st.sampled_from([1, 300, 100_000]))
    def run(self, steps: int, size: int) -> None:
        for _ in range(steps):
            self.step(size)

    @rule()
    def read_in_vain(self) -> None:
        if self.read is not None:
            self.core.read_failed(self.read)
            self.read = None

    @rule()
    def settle(self) -> None:
        """Without further events everything that may be delivered is."""
        for _ in range(500):
            if not self.step(100_000):
                break
        else:
            raise AssertionError("never idle")
        self.judge_idleness()

    # Judgement

    def give_back(self, offsets: set[int]) -> None:
        for offset in offsets:
            del self.holder[offset]
            self.counts[offset] = self.counts.get(offset, 0) + 1

    def step(self, size: int) -> bool:
        if self.read is not None:
            read, self.read = self.read, None
            found = [
                a_batch(b.first_offset, [self.slots[o] for o in range(b.first_offset, b.end_offset)])
                for b in self.batches
                if b.end_offset > read.offset
            ][:2]
            assert found, "asked to read what is not stored"
            self.core.loaded(read, found)
            self.core.check(self.end)
        effects = self.core.dispatch(self.end, size)
        for effect in effects:
            if isinstance(effect, Deliver):
                self.judge(effect)
            elif isinstance(effect, Read):
                self.read = effect
            elif isinstance(effect, CaughtUp):
                assert effect.offset == self.end
                assert all(self.cursor.is_acked(o) or o in self.holder for o in range(BEGIN, self.end))
        return any(isinstance(effect, Deliver | Read) for effect in effects)

    def judge(self, given: Deliver) -> None:
        credit = self.credits[given.consumer]
        assert credit[0] > 0
        assert credit[1] > 0
        assert given.consumer not in self.paused
        assert given.cursor_epoch == self.core.cursor_epoch
        first = given.batch.first_offset
        offsets = [first + index for index in indices(given.selection, given.batch.count)]
        assert given.messages == len(offsets) <= credit[0]
        credit[0] -= given.messages
        credit[1] -= len(given.batch.data)
        counts = dict(zip(given.redeliveries[::2], given.redeliveries[1::2], strict=True))
        assert counts == {o - first: self.counts[o] for o in offsets if o in self.counts}
        for offset in offsets:
            assert BEGIN <= offset < self.end
            assert not self.cursor.is_acked(offset)
            assert offset not in self.holder, "two consumers have it"
            if self.keyed:
                self.judge_order(offset, given.consumer)
            self.holder[offset] = given.consumer

    def judge_order(self, offset: int, consumer: int) -> None:
        """Of its slot, everything earlier is acknowledged or at this consumer, and nobody else has anything."""
        for other, slot in self.slots.items():
            if slot == self.slots[offset] and other != offset:
                assert self.holder.get(other, consumer) == consumer, "a slot at two consumers"
                if other < offset:
                    assert self.cursor.is_acked(other) or other in self.holder, "overtaken"

    def can_take(self, consumer: int) -> bool:
        return min(self.credits[consumer]) > 0 and consumer not in self.paused

    def judge_idleness(self) -> None:
        undelivered = [o for o in range(BEGIN, self.end) if not self.cursor.is_acked(o) and o not in self.holder]
        able = [consumer for consumer in self.credits if self.can_take(consumer)]
        if not self.keyed:
            assert not (undelivered and able), "something could be delivered"
        elif len(self.core.returned.waiting) < self.core.look_ahead():  # type: ignore[attr-defined]
            for offset in undelivered:
                owner = self.core.assignment.owner(self.slots[offset])  # type: ignore[attr-defined]
                elsewhere = {self.holder[o] for o in self.holder if self.slots[o] == self.slots[offset]} - {owner}
                assert elsewhere or owner not in able, "something could be delivered"
        if undelivered:
            assert self.core.explain(self.end), "idle for no reason"

    @invariant()
    def holds_what_must_hold(self) -> None:
        self.core.check(self.end)
        assert {o for c in self.core.consumers.values() for o in c.pending} == set(self.holder)
        for consumer in self.core.consumers.values():
            assert all(self.holder[offset] == consumer.id for offset in consumer.pending)


class KeyOrderedMachine(QueueMachine):
    dispatcher = ShortSighted
    keyed = True


class StreamMachine(RuleBasedStateMachine):
    """One consumer gets everything in order, from the floor on when it becomes the active one."""

    consumers = Bundle("consumers")

    @initialize()
    def begin(self) -> None:
        self.table = CursorTable()
        self.table.create("s", 1, SubscriptionType.STREAM, BEGIN)
        self.cursor = self.table.cursor("s")
        self.core = StreamDispatch(self.cursor)
        self.batches: list[LoadedBatch] = []
        self.end = BEGIN
        self.order: list[int] = []
        self.credits: dict[int, list[int]] = {}
        self.got: list[int] = []
        self.epoch = self.core.cursor_epoch
        self.next_consumer = 0
        self.read: Read | None = None

    @rule(count=st.integers(1, 9))
    def store(self, count: int) -> None:
        self.batches.append(a_batch(self.end, [5] * count))
        self.end += count

    @precondition(lambda self: len(self.order) < 4)
    @rule(target=consumers)
    def attach(self) -> int:
        consumer = self.next_consumer
        self.next_consumer += 1
        self.core.attach(consumer)
        self.order.append(consumer)
        self.credits[consumer] = [0, 0]
        if len(self.order) == 1:
            self.restarted()
        return consumer

    @rule(consumer=consumes(consumers))
    def detach(self, consumer: int) -> None:
        self.core.detach(consumer)
        was_active = self.order[0] == consumer
        self.order.remove(consumer)
        if was_active:
            self.restarted()

    @rule(consumer=consumers, messages=st.integers(1, 20))
    def credit(self, consumer: int, messages: int) -> None:
        self.core.credit(consumer, messages, 10_000)
        self.credits[consumer][0] += messages
        self.credits[consumer][1] += 10_000

    @rule(back=st.integers(0, 10))
    def ack(self, back: int) -> None:
        floor = max(self.cursor.floor, (self.got[-1] + 1 if self.got else 0) - back)
        self.table.ack("s", floor, [])
        self.core.acked(None, [(0, floor)])

    @rule(start=st.integers(0, 30))
    def ack_one(self, start: int) -> None:
        if BEGIN + start < self.end:
            self.table.ack("s", 0, [(BEGIN + start, BEGIN + start + 1)])
            self.core.acked(None, [(BEGIN + start, BEGIN + start + 1)])

    @rule(to=st.integers(0, 40))
    def seek(self, to: int) -> None:
        offset = min(BEGIN + to, self.end)
        self.table.seek("s", offset)
        self.core.seek(offset)
        self.restarted()

    @rule(size=st.sampled_from([1, 300, 100_000]))
    def run(self, size: int) -> None:
        self.step(size)

    @rule()
    def settle(self) -> None:
        for _ in range(500):
            if not self.step(100_000):
                break
        else:
            raise AssertionError("never idle")
        if self.order and min(self.credits[self.order[0]]) > 0:
            rest = range(self.got[-1] + 1 if self.got else self.cursor.floor, self.end)
            assert all(self.cursor.is_acked(offset) for offset in rest), "something could be delivered"

    def restarted(self) -> None:
        self.got = []
        assert self.core.cursor_epoch > self.epoch
        self.epoch = self.core.cursor_epoch

    def step(self, size: int) -> bool:
        if self.read is not None:
            read, self.read = self.read, None
            self.core.loaded(read, [batch for batch in self.batches if batch.end_offset > read.offset][:2])
        effects = self.core.dispatch(self.end, size)
        for effect in effects:
            if isinstance(effect, Deliver):
                self.judge(effect)
            elif isinstance(effect, Read):
                self.read = effect
        self.core.check(self.end)
        return any(isinstance(effect, Deliver | Read) for effect in effects)

    def judge(self, given: Deliver) -> None:
        assert given.consumer == self.order[0]
        assert given.cursor_epoch == self.epoch
        assert min(self.credits[given.consumer]) > 0
        self.credits[given.consumer][0] -= given.messages
        self.credits[given.consumer][1] -= len(given.batch.data)
        offsets = [given.batch.first_offset + index for index in indices(given.selection, given.batch.count)]
        assert not any(self.cursor.is_acked(offset) for offset in offsets)
        after = self.got[-1] + 1 if self.got else self.cursor.floor
        assert all(self.cursor.is_acked(offset) for offset in range(after, offsets[0]))
        missing = set(range(offsets[0], offsets[-1])) - set(offsets)
        assert all(self.cursor.is_acked(offset) for offset in missing)
        self.got += offsets


SETTINGS = settings(max_examples=60, stateful_step_count=60, deadline=None)

TestQueue = QueueMachine.TestCase
TestQueue.settings = SETTINGS
TestKeyOrdered = KeyOrderedMachine.TestCase
TestKeyOrdered.settings = SETTINGS
TestStream = StreamMachine.TestCase
TestStream.settings = SETTINGS
