"""Dispatchers in single situations: events in, effects compared."""

from __future__ import annotations

from array import array
from collections.abc import Iterable
from typing import TypeVar

import pytest

from magnetar.broker import flow
from magnetar.broker.dispatch import (
    LOADED_BYTES_MAX,
    Activated,
    CaughtUp,
    Deliver,
    Dispatch,
    Effect,
    LoadedBatch,
    LoadedBatches,
    QueueDispatch,
    Read,
    Reason,
    StreamDispatch,
    Waiting,
)
from magnetar.broker.key_order import (
    CONSUMERS_MAX,
    GROUPS,
    LOOK_AHEAD_PER_CONSUMER,
    Assignment,
    KeyOrderedDispatch,
    SlotIndex,
)
from magnetar.broker.offset_set import CHUNK
from magnetar.managed_log.cursor import CursorTable
from magnetar.metadata.records import SubscriptionType
from magnetar.wire.batch import Columns, encode_batch
from magnetar.wire.selection import indices
from magnetar.wire.slots import SLOTS

DispatchT = TypeVar("DispatchT", bound=Dispatch)


class Log:
    """Batches of one size; answers a dispatcher's reads at once."""

    def __init__(self, batches: Iterable[list[int]], batch_bytes: int = 0) -> None:
        self.table = CursorTable()
        self.table.create("s", 1, SubscriptionType.QUEUE, 0)
        self.cursor = self.table.cursor("s")
        self.batches: list[LoadedBatch] = []
        self.end = 0
        self.reads: list[Read] = []
        for slots in batches:
            self.store(slots, batch_bytes)

    def store(self, slots: list[int], batch_bytes: int = 0) -> None:
        data = encode_batch(
            Columns([b""] * len(slots)),
            producer_id=bytes(16),
            epoch=0,
            previous=-1,
            last=len(slots) - 1,
            slots=array("H", slots),
        )
        self.batches.append(LoadedBatch(self.end, len(slots), data.ljust(batch_bytes)))
        self.end += len(slots)

    def run(self, core: Dispatch, *, check: bool = True) -> list[Effect]:
        """All effects until nothing more happens, without the reads."""
        effects: list[Effect] = []
        for _ in range(10_000):
            more = core.dispatch(self.end)
            if check:
                core.check(self.end)
            effects += [effect for effect in more if not isinstance(effect, Read)]
            reads = [effect for effect in more if isinstance(effect, Read)]
            for read in reads:
                self.reads.append(read)
                core.loaded(read, [batch for batch in self.batches if batch.end_offset > read.offset][:4])
            if not any(isinstance(effect, Deliver | Read) for effect in more):
                return effects
        raise AssertionError("never idle")

    def ack(self, core: StreamDispatch | QueueDispatch, consumer: int, *ranges: tuple[int, int]) -> None:
        self.table.ack("s", 0, list(ranges))
        core.acked(consumer, ranges)


def offsets(effects: list[Effect], consumer: int | None = None) -> list[int]:
    return [
        effect.batch.first_offset + index
        for effect in effects
        if isinstance(effect, Deliver) and consumer in (None, effect.consumer)
        for index in indices(effect.selection, effect.batch.count)
    ]


def attached(core: DispatchT, *consumers: int, credit: int = 1_000_000) -> DispatchT:
    for consumer in consumers:
        core.attach(consumer)  # type: ignore[attr-defined]
        if credit:
            core.credit(consumer, credit, 1 << 40)
    return core


# --- streams ---


def test_a_stream_reads_delivers_and_says_that_the_end_is_reached() -> None:
    log = Log([[0] * 3, [0] * 2])
    core = attached(StreamDispatch(log.cursor), 7)
    epoch = core.cursor_epoch
    [read] = core.dispatch(log.end)
    assert read == Read(0, epoch, False)
    assert core.dispatch(log.end) == [], "one read at a time"
    assert core.explain(log.end) == [Waiting(Reason.READING)]
    core.loaded(Read(0, epoch, False), log.batches)
    one, two = log.batches
    assert core.dispatch(log.end) == [Deliver(7, epoch, one, b"", 3), Deliver(7, epoch, two, b"", 2), CaughtUp(7, 5)]
    assert core.dispatch(log.end) == []
    log.store([0])
    assert core.dispatch(log.end) == [Read(5, epoch, True)], "a read at the tail is not followed by others"


def test_a_read_that_was_asked_for_before_a_seek_brings_nothing() -> None:
    log = Log([[0] * 3, [0] * 2])
    core = attached(StreamDispatch(log.cursor), 7)
    [stale] = core.dispatch(log.end)
    assert isinstance(stale, Read)
    log.table.seek("s", 3)
    core.seek(3)
    assert core.dispatch(log.end) == []
    core.loaded(stale, log.batches)
    [read] = core.dispatch(log.end)
    assert read == Read(3, stale.cursor_epoch + 1, False)


def test_the_next_in_line_becomes_active_at_the_floor_with_a_new_epoch() -> None:
    log = Log([[0] * 3, [0] * 2])
    core = attached(StreamDispatch(log.cursor), 1, 2, 3)
    assert offsets(log.run(core), 1) == [0, 1, 2, 3, 4]
    assert core.explain(log.end) == [
        Waiting(Reason.STANDBY, 2), Waiting(Reason.STANDBY, 3), Waiting(Reason.NOTHING_TO_READ)
    ]  # fmt: skip
    log.ack(core, 1, (0, 2), (3, 4))
    epoch = core.cursor_epoch
    core.detach(1)
    effects = log.run(core)
    assert effects[0] == Activated(2, 2)
    assert offsets(effects, 2) == [2, 4]
    assert all(effect.cursor_epoch > epoch for effect in effects if isinstance(effect, Deliver))
    core.detach(3)
    assert log.run(core) == []


def test_acknowledged_offsets_are_skipped_without_reading_them() -> None:
    log = Log([[0] * 10 for _ in range(50)])
    log.table.ack("s", 0, [(1, 480)])
    core = attached(StreamDispatch(log.cursor), 1)
    assert offsets(log.run(core)) == [0, *range(480, 500)]
    assert [read.offset for read in log.reads] == [0, 480]


def test_a_trimmed_stream_goes_on_where_the_log_begins() -> None:
    log = Log([[0] * 3, [0] * 2])
    core = attached(StreamDispatch(log.cursor), 1)
    [read] = core.dispatch(log.end)
    assert isinstance(read, Read)
    core.read_failed(read)
    core.trimmed(3)
    assert offsets(log.run(core)) == [3, 4]


# --- queues ---


def test_one_batch_is_spread_over_the_consumers_that_wait() -> None:
    log = Log([[0] * 12])
    core = attached(QueueDispatch(log.cursor), 1, 2, 3)
    effects = log.run(core)
    assert [offsets(effects, consumer) for consumer in (1, 2, 3)] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]


def test_with_many_batches_each_goes_whole_to_one_consumer() -> None:
    log = Log([[0] * 10 for _ in range(12)])
    core = attached(QueueDispatch(log.cursor), 1, 2, 3)
    effects = log.run(core)
    assert all(effect.selection == b"" for effect in effects if isinstance(effect, Deliver))
    assert min(len(offsets(effects, consumer)) for consumer in (1, 2, 3)) >= 30


def test_who_has_least_unacknowledged_comes_first() -> None:
    log = Log([[0] * 10])
    core = attached(QueueDispatch(log.cursor), 1, 2)
    log.run(core)
    log.ack(core, 2, *[(offset, offset + 1) for offset in core.consumers[2].pending])
    log.store([0])
    assert offsets(log.run(core), 2) == [10]


def test_single_messages_go_round() -> None:
    log = Log([])
    core = attached(QueueDispatch(log.cursor), 1, 2, 3)
    got = []
    for _ in range(6):
        log.store([0])
        got += [effect.consumer for effect in log.run(core) if isinstance(effect, Deliver)]
    assert got == [1, 2, 3, 1, 2, 3]


def test_what_came_back_goes_first_lowest_first() -> None:
    log = Log([[0] * 4, [0] * 4, [0] * 4])
    core = attached(QueueDispatch(log.cursor), 1, credit=6)
    assert offsets(log.run(core)) == [0, 1, 2, 3, 4, 5]
    core.nack(1, 1, 3)
    core.nack(1, 5, 6)
    core.credit(1, 5, 100)
    effects = log.run(core)
    assert offsets(effects) == [1, 2, 5, 6, 7]
    assert [effect.redeliveries for effect in effects if isinstance(effect, Deliver)] == [(1, 1, 2, 1), (1, 1), ()]


def test_a_consumer_gets_no_more_than_it_may_have_unacknowledged() -> None:
    log = Log([[0] * 1000 for _ in range(60)])
    core = attached(QueueDispatch(log.cursor), 1)
    assert len(offsets(log.run(core, check=False))) == flow.CONSUMER_UNACKED_MAX
    assert core.explain(log.end) == [Waiting(Reason.CONSUMER_UNACKED, 1, flow.CONSUMER_UNACKED_MAX)]
    log.ack(core, 1, (10, 110))
    assert offsets(log.run(core)) == list(range(50_000, 50_100))


def test_a_subscription_has_no_more_unacknowledged_than_it_may() -> None:
    log = Log([[0] * 1000 for _ in range(230)])
    core = attached(QueueDispatch(log.cursor), 1, 2, 3, 4, 5)
    assert len(offsets(log.run(core, check=False))) == flow.SUBSCRIPTION_UNACKED_MAX
    assert Waiting(Reason.SUBSCRIPTION_UNACKED, None, flow.SUBSCRIPTION_UNACKED_MAX) in core.explain(log.end)
    lost = len(core.consumers[5].pending)
    core.detach(5)
    again = log.run(core, check=False)
    assert (len(offsets(again)), core.unacked) == (lost, flow.SUBSCRIPTION_UNACKED_MAX)
    assert all(effect.redeliveries for effect in again if isinstance(effect, Deliver))


def test_a_full_buffer_and_missing_credit_are_told_apart() -> None:
    log = Log([[0]])
    core = attached(QueueDispatch(log.cursor), 1, 2, credit=0)
    core.credit(2, 5, 5)
    core.pause(2, True)
    assert log.run(core) == []
    assert core.explain(log.end) == [Waiting(Reason.NO_CREDIT, 1), Waiting(Reason.BUFFER_FULL, 2)]
    core.pause(2, False)
    assert offsets(log.run(core), 2) == [0]
    core.detach(1)
    core.detach(2)
    assert core.explain(log.end) == [Waiting(Reason.NO_CONSUMER)]


def test_one_pass_hands_out_a_bounded_number_of_bytes() -> None:
    log = Log([[0] for _ in range(10)], batch_bytes=1000)
    core = attached(QueueDispatch(log.cursor), 1)
    [read] = core.dispatch(log.end)
    assert isinstance(read, Read)
    core.loaded(read, log.batches)
    assert [len(offsets(core.dispatch(log.end, 2500))) for _ in range(4)] == [3, 3, 3, 1]


def test_loaded_batches_are_bounded_but_keep_what_was_loaded_last() -> None:
    batches = LoadedBatches()
    size = LOADED_BYTES_MAX // 4
    one = [LoadedBatch(i, 1, bytes(size)) for i in range(3)]
    batches.load(one)
    more = [LoadedBatch(i, 1, bytes(size)) for i in range(3, 6)]
    batches.load(more)
    batches.check()
    assert [batches.find(i) for i in range(6)] == [None, None, one[2], *more]
    large = [LoadedBatch(10, 1, bytes(9 * size)), LoadedBatch(11, 1, bytes(size))]
    batches.load(large)
    assert [batches.find(10), batches.find(11), len(batches)] == [*large, 2]


def test_everybody_who_got_something_is_told_when_the_end_is_reached_and_once() -> None:
    log = Log([])
    core = attached(QueueDispatch(log.cursor), 1, 2)
    assert log.run(core) == [CaughtUp(1, 0), CaughtUp(2, 0)]
    log.store([0])
    assert log.run(core)[1:] == [CaughtUp(1, 1)]
    assert log.run(core) == []
    core.nack(1, 0, 1)
    assert log.run(core)[1:] == [CaughtUp(2, 1)]


# --- order of keys ---


def test_groups_are_shared_evenly_and_few_move() -> None:
    assignment = Assignment()
    before: list[int | None] = []
    for consumer in range(10):
        before = list(assignment.groups)
        assignment.join(consumer)
        moved = [group for group in range(GROUPS) if assignment.groups[group] != before[group]]
        assert all(assignment.groups[group] == consumer for group in moved), "groups move to the new one only"
        counts = [assignment.groups.count(other) for other in range(consumer + 1)]
        assert max(counts) - min(counts) <= 1
    before = list(assignment.groups)
    assignment.leave(4)
    moved = [group for group in range(GROUPS) if assignment.groups[group] != before[group]]
    assert all(before[group] == 4 for group in moved)
    counts = [assignment.groups.count(other) for other in assignment.index]
    assert max(counts) - min(counts) <= 1


@pytest.mark.parametrize(("first", "last"), [(0, SLOTS - 1), (100, 163), (5, 5), (30_000, 31_023), (7, 2000)])
def test_every_slot_of_a_shard_has_an_owner_however_narrow_it_is(first: int, last: int) -> None:
    assignment = Assignment(first, last)
    for consumer in range(CONSUMERS_MAX):
        assignment.join(consumer)
    owners = [assignment.owner(slot) for slot in range(first, last + 1)]
    assert None not in owners
    assert len(set(owners)) == min(CONSUMERS_MAX, last - first + 1)
    assert len(assignment.table) == SLOTS
    assert None not in (assignment.owner(0), assignment.owner(SLOTS - 1))


def test_a_slot_that_moves_waits_for_its_former_consumer() -> None:
    slots = [0, 60_000]
    log = Log([slots])
    core = attached(KeyOrderedDispatch(log.cursor), 1)
    assert offsets(log.run(core), 1) == [0, 1]
    attached(core, 2)
    moved = next(i for i, slot in enumerate(slots) if core.assignment.owner(slot) == 2)
    log.store(slots)
    assert offsets(log.run(core)) == [2 + 1 - moved], "the slot that did not move goes on"
    assert core.explain(log.end) == [Waiting(Reason.DRAINING, 1, 1)]
    log.ack(core, 1, (moved, moved + 1))
    assert offsets(log.run(core), 2) == [2 + moved]


def test_what_a_lost_consumer_had_goes_before_what_came_later() -> None:
    log = Log([[0, 60_000] * 3])
    core = attached(KeyOrderedDispatch(log.cursor), 1, 2)
    assert sorted(offsets(log.run(core))) == list(range(6))
    core.pause(2, True)
    log.store([0, 60_000])
    log.run(core)
    core.detach(1)
    log.store([0, 60_000])
    effects = log.run(core)
    assert effects == []
    core.pause(2, False)
    effects = log.run(core)
    mine = offsets(effects, 2)
    for slot in (0, 1):
        ofslot = [offset for offset in mine if offset % 2 == slot]
        assert ofslot == sorted(ofslot)


def test_a_slow_consumer_holds_up_others_only_at_the_limit() -> None:
    log = Log([[0, 60_000] * 500 for _ in range(30)])
    core = attached(KeyOrderedDispatch(log.cursor), 1, 2)
    slow, quick = core.assignment.owner(0), core.assignment.owner(60_000)
    assert slow is not None
    assert {slow, quick} == {1, 2}
    core.pause(slow, True)
    got = offsets(log.run(core))
    limit = 2 * LOOK_AHEAD_PER_CONSUMER
    assert got == list(range(1, 2 * limit, 2))
    assert Waiting(Reason.LOOK_AHEAD, None, limit) in core.explain(log.end)
    core.pause(slow, False)
    assert len(offsets(log.run(core))) == 30_000 - limit


def test_the_slots_of_settled_messages_are_forgotten() -> None:
    log = Log([[slot % 7 for slot in range(CHUNK)] for _ in range(200)])
    core = attached(KeyOrderedDispatch(log.cursor), 1, credit=0)
    for batch in log.batches:
        core.credit(1, batch.count, 1 << 30)
        log.run(core, check=False)
        log.ack(core, 1, (batch.first_offset, batch.end_offset))
    assert log.cursor.floor == log.end
    assert len(core.slots) < 100


def test_slots_are_kept_for_what_is_pending_and_for_what_comes() -> None:
    slots = SlotIndex()
    for number in range(10):
        slots.record(number * CHUNK, array("H", [number]) * CHUNK)
    slots.keep([3 * CHUNK], 8 * CHUNK + 5)
    assert len(slots) == 3
    assert [slots[3 * CHUNK + 1], slots[8 * CHUNK], slots[9 * CHUNK + 7]] == [3, 8, 9]


def test_a_waiting_message_is_not_delivered_after_it_was_acknowledged_elsewhere() -> None:
    log = Log([[0, 0, 0]])
    core = attached(KeyOrderedDispatch(log.cursor), 1, credit=1)
    assert offsets(log.run(core)) == [0]
    log.ack(core, 1, (1, 2))
    core.credit(1, 10, 10)
    assert offsets(log.run(core)) == [2]


def test_a_slot_that_drains_again_before_its_messages_were_freed_keeps_them() -> None:
    assignment = Assignment()
    for consumer in (1, 2, 3):
        assignment.join(consumer)
    slot = next(slot for slot in reversed(range(SLOTS)) if assignment.owner(slot) == 2)
    log = Log([[slot, slot]])
    core = attached(KeyOrderedDispatch(log.cursor), 1)
    log.run(core)
    core.nack(1, 0, 1)
    core.attach(2, [(0, 1)])
    log.store([slot])
    log.store([0])
    core.attach(3, [(2, 4)])
    assert core.assignment.owner(slot) == 2
    core.credit(2, 10, 1 << 30)
    log.ack(core, 1, (1, 2))
    [read] = core.dispatch(log.end)
    assert isinstance(read, Read)
    core.loaded(read, log.batches[1:2])
    [read] = core.dispatch(log.end)
    assert isinstance(read, Read)
    core.nack(2, 0, 1)
    core.nack(3, 3, 4)
    core.read_failed(read)
    assert offsets(log.run(core), 2) == [], "consumer 3 still has a message of the slot"
    core.nack(3, 2, 3)
    assert offsets(log.run(core), 2) == [0, 2]
