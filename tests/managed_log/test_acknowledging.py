"""Cursors of a log: grouped, durable, rolled, moved, and cleanly closed."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest
from log_world import Cluster, OpenLog, until

from magnetar.managed_log.log import AckBeyondEnd, CursorNotFound, InvalidAck, LogReleased, LogSettings
from magnetar.metadata.records import Owner, SubscriptionType
from magnetar.metadata.store import Compare, Operation, Put, TxnResult

QUEUE, STREAM = SubscriptionType.QUEUE, SubscriptionType.STREAM
SMALL = LogSettings(cursor_ledger_bytes=400, retry_first_s=0.001, retry_last_s=0.01)


async def with_messages(cluster: Cluster, count: int, settings: LogSettings | None = None) -> OpenLog:
    owner = await cluster.open(settings=settings)
    await owner.append(*(b"%d" % number for number in range(count)))
    return owner


def position(owner: OpenLog, name: str = "s") -> tuple[int, list[int]]:
    cursor = owner.log.cursors[name]
    return cursor.floor, list(cursor.acked)


async def test_what_was_answered_survives_the_owner(cluster: Cluster) -> None:
    owner = await with_messages(cluster, 100)
    await owner.log.create_cursor("s", 7, QUEUE, 10)
    await owner.log.create_cursor("t", 8, STREAM, 0)
    await owner.log.ack("s", floor=20, ranges=[(25, 30), (50, 51)])
    await owner.log.ack("t", floor=40)
    await owner.log.count_deliveries("s", {60: 3, 27: 2})
    owner.log.abandon()
    successor = await cluster.take_over(owner)
    assert position(successor) == (20, [25, 26, 27, 28, 29, 50])
    assert position(successor, "t") == (40, [])
    cursor = successor.log.cursors["s"]
    assert (cursor.subscription_id, cursor.type, dict(cursor.delivery_counts)) == (7, QUEUE, {60: 3})


async def test_an_acknowledgement_takes_effect_at_once_and_is_answered_when_durable(cluster: Cluster) -> None:
    owner = await with_messages(cluster, 10)
    await owner.log.create_cursor("s", 1, QUEUE, 0)
    future = owner.log.ack("s", floor=4)
    assert position(owner) == (4, [])
    assert not future.done()
    again = owner.log.ack("s", floor=4)
    assert not again.done()
    await again
    assert future.done()
    assert owner.log.ack("s", floor=3).done()


async def test_what_is_queued_while_a_group_is_stored_shares_one_future_and_one_entry(cluster: Cluster) -> None:
    owner = await with_messages(cluster, 1_000)
    await owner.log.create_cursor("s", 1, QUEUE, 0)
    handle = owner.log._cursors._handle
    assert handle is not None
    before = handle.next_entry
    first = owner.log.ack("s", ranges=[(1, 2)])
    await asyncio.sleep(0)
    later = [owner.log.ack("s", ranges=[(offset, offset + 1)]) for offset in range(3, 999, 2)]
    await asyncio.gather(first, *later)
    assert len(set(later)) <= 2
    assert handle.next_entry - before <= 3


async def test_acknowledgements_beyond_the_end_are_refused_and_change_nothing(cluster: Cluster) -> None:
    owner = await with_messages(cluster, 10)
    await owner.log.create_cursor("s", 1, QUEUE, 0)
    for floor, ranges in ((-1, []), (5, [(3, 3)]), (0, [(-1, 2)])):
        with pytest.raises(InvalidAck):
            owner.log.ack("s", floor=floor, ranges=ranges)
    for floor, ranges in ((11, []), (0, [(9, 11)]), (0, [(1, 2), (9, 11)])):
        with pytest.raises(AckBeyondEnd):
            owner.log.ack("s", floor=floor, ranges=ranges)
    with pytest.raises(CursorNotFound):
        owner.log.ack("ghost", floor=1)
    assert position(owner) == (0, [])


async def test_a_subscription_is_created_once_replaced_by_a_newer_id_and_deleted(cluster: Cluster) -> None:
    owner = await with_messages(cluster, 10)
    first = await owner.log.create_cursor("s", 1, QUEUE, 3)
    assert await owner.log.create_cursor("s", 1, QUEUE, 0) is first
    assert first.floor == 3
    newer = await owner.log.create_cursor("s", 2, STREAM, 99)
    assert (newer.floor, newer.subscription_id) == (10, 2)
    successor = await cluster.take_over(owner)
    assert successor.log.cursors["s"].subscription_id == 2
    await successor.log.delete_cursor("s")
    await successor.log.delete_cursor("s")
    third = await cluster.take_over(successor, "broker2")
    assert dict(third.log.cursors) == {}


async def test_the_type_of_an_undecided_subscription_is_decided_without_moving_it(cluster: Cluster) -> None:
    owner = await with_messages(cluster, 10)
    await owner.log.create_cursor("s", 1, SubscriptionType.UNDECIDED, 2)
    await owner.log.ack("s", ranges=[(5, 6)])
    await owner.log.create_cursor("s", 1, QUEUE, 0)
    successor = await cluster.take_over(owner)
    assert successor.log.cursors["s"].type is QUEUE
    assert position(successor) == (2, [5])


async def test_a_seek_forgets_what_was_acknowledged_above(cluster: Cluster) -> None:
    owner = await with_messages(cluster, 50)
    await owner.log.create_cursor("s", 1, QUEUE, 0)
    await owner.log.ack("s", floor=30, ranges=[(35, 40)])
    await owner.log.seek("s", 5)
    assert position(owner) == (5, [])
    await owner.log.ack("s", ranges=[(6, 7)])
    successor = await cluster.take_over(owner)
    assert position(successor) == (5, [6])
    await successor.log.seek("s", 1_000)
    assert position(successor) == (50, [])


async def test_a_cursor_ledger_is_created_with_the_first_subscription_by_one_transaction(cluster: Cluster) -> None:
    owner = await with_messages(cluster, 10)
    assert owner.log.record.cursor_ledger == 0
    before = len(cluster.store.transactions)
    await owner.log.create_cursor("s", 1, QUEUE, 0)
    assert len(cluster.store.transactions) == before + 1
    assert owner.log.record.cursor_ledger


async def test_a_cursor_ledger_rolls_and_the_old_one_is_deleted(cluster: Cluster) -> None:
    owner = await with_messages(cluster, 1_000, SMALL)
    await owner.log.create_cursor("s", 1, QUEUE, 0)
    seen = {owner.log.record.cursor_ledger}
    for offset in range(1, 400, 2):
        await owner.log.ack("s", ranges=[(offset, offset + 1)])
        seen.add(owner.log.record.cursor_ledger)
    assert len(seen) > 3
    await until(lambda: owner.log._shard._tasks == set())
    await cluster.check()
    successor = await cluster.take_over(owner, settings=SMALL)
    assert position(successor) == position(owner) == (0, list(range(1, 400, 2)))
    await successor.log.ack("s", floor=100)
    await cluster.check()
    assert position(await cluster.take_over(successor, "broker2"))[0] == 100


async def test_while_the_store_is_silent_acknowledgements_are_answered_in_the_old_ledger(cluster: Cluster) -> None:
    owner = await with_messages(cluster, 1_000, SMALL)
    await owner.log.create_cursor("s", 1, QUEUE, 0)
    cluster.store.silent = True
    ledger = owner.log.record.cursor_ledger
    for offset in range(1, 400, 2):
        await owner.log.ack("s", ranges=[(offset, offset + 1)])
    assert owner.log.record.cursor_ledger == ledger
    cluster.store.silent = False
    await until(lambda: owner.log.record.next_cursor != 0)
    await owner.log.ack("s", floor=1)
    assert owner.log.record.cursor_ledger != ledger
    await cluster.check()


async def test_what_was_acknowledged_during_a_roll_may_not_be_trimmed_when_the_roll_is_done(cluster: Cluster) -> None:
    owner = await with_messages(cluster, 100)
    await owner.log.create_cursor("s", 1, QUEUE, 0)
    await owner.log.close()
    successor = await cluster.open("broker1")
    floors = []
    ledger = successor.log._cursors
    ledger._on_stored = lambda: floors.append(ledger.table.safe_floor())

    def fault(operations: Sequence[Operation]) -> str:
        if successor.log.record.next_cursor:  # the snapshot is stored, and about to count
            successor.log.ack("s", floor=90)
        return ""

    cluster.store.fault = fault
    await successor.log.ack("s", floor=50)
    cluster.store.fault = lambda _: ""
    await ledger.latest()
    assert floors == [50, 90]


@pytest.mark.parametrize("lost", ["request", "reply"])
async def test_lost_metadata_messages_at_a_cursor_roll_cost_nothing(cluster: Cluster, lost: str) -> None:
    owner = await with_messages(cluster, 1_000, SMALL)
    await owner.log.create_cursor("s", 1, QUEUE, 0)
    sent = 0

    def fault(operations: Sequence[Operation]) -> str:
        nonlocal sent
        sent += 1
        return lost if sent % 2 else ""

    cluster.store.fault = fault
    for offset in range(1, 400, 2):
        await owner.log.ack("s", ranges=[(offset, offset + 1)])
    cluster.store.fault = lambda _: ""
    await until(lambda: owner.log._shard._tasks == set())
    await cluster.check()
    assert position(await cluster.take_over(owner)) == (0, list(range(1, 400, 2)))


async def test_a_bookie_that_stops_does_not_stop_acknowledgements(cluster: Cluster) -> None:
    owner = await with_messages(cluster, 1_000)
    await owner.log.create_cursor("s", 1, QUEUE, 0)
    await cluster.bookies["bookie2"].stop()
    for offset in range(1, 50, 2):
        await owner.log.ack("s", ranges=[(offset, offset + 1)])
    assert position(await cluster.take_over(owner)) == (0, list(range(1, 50, 2)))


async def test_an_ensemble_change_of_unknown_outcome_holds_up_neither_acknowledgements_nor_a_roll(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    await cluster.start_bookie("bookie3")
    owner = await cluster.open(settings=LogSettings(segment_bytes=2_000))
    await owner.log.create_cursor("s", 1, QUEUE, 0)
    while not owner.log.record.next_ledger:
        await owner.append(b"0" * 50)
    answering, deliver = asyncio.Event(), cluster.store.txn

    async def slow(compares: Sequence[Compare], operations: Sequence[Operation]) -> TxnResult:
        await answering.wait()
        return await deliver(compares, operations)

    monkeypatch.setattr(cluster.store, "txn", slow)
    left, cursors = owner.log._appender.handle, owner.log._cursors._handle
    assert left is not None
    assert cursors is not None
    cluster.cut.add(min(set(left.record.fragments[0].bookies) & set(cursors.record.fragments[0].bookies)))
    async with asyncio.timeout(20):
        await owner.append(b"seen by two")
        await owner.log.ack("s", floor=1)
        await until(lambda: left._core.change_in_flight and cursors._core.change_in_flight)
        while owner.log._appender.handle is left:
            await owner.append(b"0" * 50)
        await owner.append(b"in the next ledger")
        await owner.log.ack("s", floor=owner.log.end_offset)
    answering.set()
    await until(lambda: owner.log._shard._tasks == set())
    await cluster.check()
    end_offset = owner.log.end_offset
    successor = await cluster.take_over(owner)
    assert position(successor) == (end_offset, [])
    await cluster.check()


async def test_the_state_of_a_million_holes_survives(cluster: Cluster) -> None:
    owner = await with_messages(cluster, 2)
    batch = owner.send(*([b""] * 200_000))
    await owner.stored(batch)
    await owner.log.create_cursor("s", 1, QUEUE, 0)
    await owner.log.ack("s", ranges=[(offset, offset + 1) for offset in range(1, 200_000, 2)])
    successor = await cluster.take_over(owner)
    cursor = successor.log.cursors["s"]
    assert (cursor.floor, cursor.acked_above) == (0, 100_000)
    await successor.log.ack("s", floor=1)
    third = await cluster.take_over(successor, "broker2")
    assert (third.log.cursors["s"].floor, third.log.cursors["s"].acked_above) == (2, 99_999)


# --- clean close ---


async def test_a_clean_close_leaves_small_cursors_in_the_record_and_no_open_ledger(cluster: Cluster) -> None:
    owner = await with_messages(cluster, 10)
    await owner.log.create_cursor("s", 1, QUEUE, 2)
    await owner.log.ack("s", ranges=[(5, 6)])
    await owner.log.close()
    record = await cluster.shard_record()
    assert (record.owner, record.cursor_ledger, record.next_ledger) == (None, 0, 0)
    assert 0 < len(record.inline_cursors) < 200
    assert owner.released == []
    await cluster.check()
    successor = await cluster.open("broker1")
    assert position(successor) == (2, [5])
    assert successor.producer_chunks == [b"table"]
    assert successor.log.producers_covered_offset == 10
    assert successor.log.record.inline_cursors
    await successor.log.ack("s", floor=3)
    assert not successor.log.record.inline_cursors
    await cluster.check()
    assert position(await cluster.take_over(successor, "broker2")) == (3, [5])


async def test_a_crash_before_the_first_change_keeps_the_inline_state(cluster: Cluster) -> None:
    owner = await with_messages(cluster, 10)
    await owner.log.create_cursor("s", 1, QUEUE, 2)
    await owner.log.close()
    successor = await cluster.open("broker1")
    cluster.store.fault = lambda _: "crash before"
    successor.log.ack("s", floor=9)
    await cluster.store.crashed.wait()
    cluster.store.fault = lambda _: ""
    successor.log.abandon()
    assert position(await cluster.take_over(successor, "broker2")) == (2, [])


async def test_a_clean_close_keeps_large_cursors_in_their_closed_ledger(cluster: Cluster) -> None:
    owner = await with_messages(cluster, 10_000)
    await owner.log.create_cursor("s", 1, QUEUE, 0)
    await owner.log.ack("s", ranges=[(offset, offset + 1) for offset in range(1, 10_000, 3)])
    await owner.log.close()
    record = await cluster.shard_record()
    assert record.cursor_ledger
    assert not record.inline_cursors
    await cluster.check()
    successor = await cluster.open("broker1")
    assert position(successor) == (0, list(range(1, 10_000, 3)))
    assert successor.log.producers_covered_offset == 10_000
    await successor.log.close()
    third = await cluster.open("broker2")
    assert position(third) == (0, list(range(1, 10_000, 3)))


async def test_a_large_producers_table_makes_a_clean_close_create_a_cursor_ledger(cluster: Cluster) -> None:
    owner = await with_messages(cluster, 10)
    owner.log.producer_snapshot = lambda: ([bytes(200_000)] * 5, owner.log.end_offset)
    await owner.log.close()
    assert (await cluster.shard_record()).cursor_ledger
    successor = await cluster.open("broker1")
    assert successor.producer_chunks == [bytes(200_000)] * 5
    assert successor.log.producers_covered_offset == 10


async def test_a_close_waits_for_what_was_appended_and_acknowledged(cluster: Cluster) -> None:
    owner = await with_messages(cluster, 10)
    await owner.log.create_cursor("s", 1, QUEUE, 0)
    batch = owner.send(b"late")
    acked = owner.log.ack("s", floor=5)
    await owner.log.close()
    assert batch.first_offset == 10
    assert acked.done()
    with pytest.raises(LogReleased):
        owner.send(b"later")
    successor = await cluster.open("broker1")
    assert position(successor) == (5, [])
    assert len(await successor.read_all(0)) == 11


async def test_a_close_of_an_untouched_shard_only_gives_it_up(cluster: Cluster) -> None:
    owner = await cluster.open()
    await owner.log.close()
    record = await cluster.shard_record()
    assert record.owner is None
    assert await cluster.ledgers() == {}


async def test_a_close_that_is_cut_off_abandons_the_log(cluster: Cluster) -> None:
    owner = await with_messages(cluster, 10)
    cluster.store.silent = True
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.01):
            await owner.log.close()
    cluster.store.silent = False
    with pytest.raises(LogReleased):
        owner.send(b"x")
    successor = await cluster.take_over(owner)
    assert len(await successor.read_all()) == 10


# --- producers ---


async def test_each_roll_of_the_log_stores_the_producers_table(cluster: Cluster) -> None:
    settings = LogSettings(segment_bytes=1_000, retry_first_s=0.001)
    owner = await cluster.open(settings=settings)
    while len(owner.log.record.segments) < 3:
        await owner.append(b"0" * 50)
    await until(lambda: owner.log._shard._tasks == set())
    second = owner.log.record.segments[-1].first_offset
    assert owner.log.record.cursor_ledger
    owner.log.abandon()
    successor = await cluster.take_over(owner)
    assert successor.producer_chunks == [b"table"]
    assert second <= successor.log.producers_covered_offset <= successor.log.end_offset
    await cluster.check()


async def test_until_a_broker_gives_a_table_the_old_one_is_kept(cluster: Cluster) -> None:
    owner = await with_messages(cluster, 10)
    await owner.log.close()
    successor = await cluster.open("broker1", with_producers=False)
    await successor.log.create_cursor("s", 1, QUEUE, 0)
    third = await cluster.take_over(successor, "broker2")
    assert third.producer_chunks == [b"table"]
    assert third.log.producers_covered_offset == 10


async def test_creating_a_cursor_is_written_before_its_first_acknowledgement(cluster: Cluster) -> None:
    owner = await with_messages(cluster, 10)
    creating = asyncio.create_task(owner.log.create_cursor("s", 1, QUEUE, 0))
    await asyncio.sleep(0)
    await owner.log.ack("s", floor=2)
    await creating
    assert position(await cluster.take_over(owner)) == (2, [])
    puts = [o for t in cluster.store.transactions for o in t if isinstance(o, Put)]
    assert puts


async def test_a_change_that_waits_behind_a_close_does_not_look_like_another_owner(cluster: Cluster) -> None:
    owner = await with_messages(cluster, 10)
    await owner.log.create_cursor("s", 1, QUEUE, 0)
    late: list[asyncio.Task[None]] = []
    session = Owner("broker0", 1)
    closing = asyncio.create_task(owner.log.close())

    def fault(operations: Sequence[Operation]) -> str:
        late.append(asyncio.create_task(owner.log.renew_session(session)))
        return ""

    cluster.store.fault = fault
    await closing
    cluster.store.fault = lambda _: ""
    (task,) = late
    with pytest.raises(LogReleased):
        await task
    assert owner.released == []
    with pytest.raises(LogReleased):
        owner.log.ack("s", floor=1)
