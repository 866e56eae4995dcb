"""What is deleted, and when."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest
from log_world import Cluster, OpenLog, until

from magnetar.managed_log import chain as chains
from magnetar.managed_log.log import LogReleased, LogSettings, OffsetTrimmed
from magnetar.metadata.records import LedgerRecord, Owner, Segment, SubscriptionType
from magnetar.metadata.shards import ShardMetadata, ShardNotFound
from magnetar.metadata.store import OPERATIONS_MAX, Compare, Operation, TxnResult

QUEUE = SubscriptionType.QUEUE
SMALL = LogSettings(segment_bytes=1_000, trim_open_bytes=500, retry_first_s=0.001, retry_last_s=0.01)
WEEK_US = 7 * 24 * 3600 * 1_000_000


async def filled(cluster: Cluster, segments: int, settings: LogSettings = SMALL) -> OpenLog:
    owner = await cluster.open(settings=settings)
    while len(owner.log.record.segments) + owner.log.record.pages * chains.SEGMENTS_PER_PAGE < segments:
        await owner.append(b"%040d" % owner.sent)
    await idle(owner)
    return owner


async def idle(owner: OpenLog) -> None:
    await until(lambda: owner.log._shard._tasks == set())


async def test_what_all_subscriptions_acknowledged_is_deleted_and_no_more(cluster: Cluster) -> None:
    owner = await filled(cluster, 8)
    segments = owner.log.record.segments
    await owner.log.create_cursor("fast", 1, QUEUE, 0)
    await owner.log.create_cursor("slow", 2, QUEUE, 0)
    await owner.log.ack("fast", floor=owner.log.end_offset)
    await owner.log.trim()
    assert owner.log.start_offset == 0
    await owner.log.ack("slow", floor=segments[3].first_offset + 1)
    await idle(owner)
    assert owner.log.start_offset == segments[3].first_offset
    assert owner.log.record.segments == segments[3:]
    await cluster.check()
    with pytest.raises(OffsetTrimmed) as trimmed:
        await owner.log.read(0)
    assert trimmed.value.start_offset == segments[3].first_offset
    successor = await cluster.take_over(owner)
    assert successor.log.start_offset == segments[3].first_offset
    assert await successor.read_all() == [b"%040d" % n for n in range(segments[3].first_offset, owner.log.end_offset)]


async def test_without_subscriptions_messages_stay_for_the_retention_time(cluster: Cluster) -> None:
    owner = await filled(cluster, 4)
    assert await owner.log.trim() == 0
    cluster.clock.now += WEEK_US + 60_000_000
    await owner.append(b"new")
    assert await owner.log.trim() == 3
    await idle(owner)
    await owner.log.trim()
    await cluster.check()
    assert (await owner.read_all())[-1] == b"new"


async def test_everything_can_go_and_the_log_goes_on_where_it_was(cluster: Cluster) -> None:
    owner = await filled(cluster, 4)
    await owner.log.create_cursor("s", 1, QUEUE, 0)
    while owner.log._appender.open_bytes < 500:
        await owner.append(b"x" * 40)
    end, newest = owner.log.end_offset, owner.log.last_publish_time_us
    await owner.log.ack("s", floor=end)
    await idle(owner)
    await owner.log.trim()
    await idle(owner)
    await owner.log.trim()
    assert (owner.log.start_offset, owner.log.end_offset) == (end, end)
    assert owner.log.record.segments == ()
    assert set(await cluster.ledgers()) == {owner.log.record.cursor_ledger}
    cluster.clock.now -= 3_600_000_000
    successor = await cluster.take_over(owner, settings=SMALL)
    assert await successor.append(b"next") == end
    assert await successor.log.publish_time_of(end) >= newest
    await cluster.check()


async def test_an_open_segment_stays_while_it_is_small_or_not_acknowledged(cluster: Cluster) -> None:
    owner = await cluster.open(settings=SMALL)
    await owner.append(b"a")
    await owner.log.create_cursor("s", 1, QUEUE, 1)
    await owner.log.trim()
    await idle(owner)
    assert owner.log.start_offset == 0
    await owner.append(b"b" * 600)
    await owner.log.trim()
    await idle(owner)
    assert owner.log.start_offset == 0
    assert (await cluster.shard_record()).segments[0].messages == 0


async def test_trimming_never_passes_what_the_producers_table_covers(cluster: Cluster) -> None:
    owner = await filled(cluster, 6)
    segments = owner.log.record.segments
    owner.log.producer_snapshot = lambda: ([b"old"], segments[2].first_offset)
    owner.log._cursors.covered_offset = 0
    await owner.log.create_cursor("s", 1, QUEUE, 0)
    await owner.log.ack("s", floor=segments[5].first_offset)
    await owner.log.trim()
    assert owner.log.start_offset == segments[2].first_offset
    await cluster.check()


async def test_a_takeover_after_trimming_still_has_what_the_producers_table_lacks(cluster: Cluster) -> None:
    owner = await filled(cluster, 6)
    await owner.log.create_cursor("s", 1, QUEUE, owner.log.end_offset)
    await owner.log.trim()
    successor = await cluster.take_over(owner)
    assert successor.log.start_offset <= successor.log.producers_covered_offset


async def test_long_histories_are_trimmed_in_bounded_transactions_through_their_pages(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chains, "SEGMENTS_PER_PAGE", 20)
    owner = await filled(cluster, 70)
    assert owner.log.record.pages >= 2
    before = len(cluster.store.transactions)
    await owner.log.create_cursor("s", 1, QUEUE, owner.log.end_offset)
    await owner.log.trim()
    await idle(owner)
    assert owner.log.record.pages == 0
    assert len(owner.log.record.segments) == 1
    assert max(map(len, cluster.store.transactions[before:])) <= OPERATIONS_MAX
    await cluster.check()


async def test_a_segment_being_trimmed_while_it_is_read_is_said_to_be_trimmed(cluster: Cluster) -> None:
    owner = await filled(cluster, 4)
    owner.log._cache.forget(1)
    await owner.log.create_cursor("s", 1, QUEUE, owner.log.end_offset)
    successor = await cluster.take_over(owner, settings=SMALL)
    reads = successor.log._reads
    source = await reads._source_at(0)
    await successor.log.trim()
    with pytest.raises(OffsetTrimmed):
        await reads._entries(source, 0, 0, 1)


async def test_a_lost_reply_while_trimming_costs_nothing(cluster: Cluster) -> None:
    owner = await filled(cluster, 6)
    answered = iter([True])
    cluster.store.fault = lambda operations: "reply" if len(operations) > 8 and next(answered, False) else ""
    await owner.log.create_cursor("s", 1, QUEUE, owner.log.end_offset)
    await idle(owner)
    assert len(owner.log.record.segments) == 1
    assert not next(answered, False)
    await cluster.check()


async def test_a_deleted_shard_leaves_nothing(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chains, "SEGMENTS_PER_PAGE", 5)
    owner = await filled(cluster, 22)
    await owner.log.create_cursor("s", 1, QUEUE, 0)
    owner.send(b"dropped")
    await owner.log.delete()
    with pytest.raises(ShardNotFound):
        await ShardMetadata.load(cluster.store, cluster.keyspace, 1)
    space = cluster.keyspace
    for prefix in (space.shards_prefix(), space.pages_prefix(1), space.ledgers_prefix(), space.index_prefix()):
        assert (await cluster.store.inner.range(prefix)).items == ()
    assert (await cluster.store.inner.range(space.owned_prefix())).items == ()


async def test_a_deletion_that_was_cut_off_is_finished_by_the_next_owner(cluster: Cluster) -> None:
    owner = await filled(cluster, 40)
    seen = iter(range(100))
    cluster.store.fault = lambda _: "crash after" if next(seen) >= 2 else ""
    deleting = asyncio.create_task(owner.log.delete())
    await cluster.store.crashed.wait()
    deleting.cancel()
    cluster.store.fault = lambda _: ""
    successor = await cluster.take_over(owner)
    await successor.log.delete()
    with pytest.raises(ShardNotFound):
        await ShardMetadata.load(cluster.store, cluster.keyspace, 1)


async def test_a_change_that_waits_when_the_shard_is_lost_says_so(cluster: Cluster) -> None:
    """Not as a cancellation: that would end the task that trims all shards of a broker."""
    owner = await filled(cluster, 4)
    await idle(owner)
    cluster.store.silent = True
    changes = [asyncio.create_task(owner.log.renew_session(Owner("broker0", n))) for n in (1, 2)]
    for _ in range(5):
        await asyncio.sleep(0)
    owner.log.abandon()
    for change in changes:
        with pytest.raises(LogReleased):
            await change


async def test_a_trim_that_wants_a_snapshot_when_the_shard_is_lost_does_not_wait_for_ever(cluster: Cluster) -> None:
    owner = await filled(cluster, 4)
    await owner.log.create_cursor("s", 1, QUEUE, 0)
    await idle(owner)
    owner.log.abandon()
    with pytest.raises(LogReleased):
        async with asyncio.timeout(1):
            await owner.log._cursors.store_snapshot()


async def test_a_cursor_that_moves_back_before_a_trim_is_sent_keeps_its_messages(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    owner = await filled(cluster, 8)
    trimmer, gate = owner.log._trimmer, asyncio.Event()
    reached, ledgers_of = asyncio.Event(), trimmer._ledgers

    async def slow(segments: tuple[Segment, ...]) -> list[LedgerRecord]:
        reached.set()
        await gate.wait()
        return await ledgers_of(segments)

    monkeypatch.setattr(trimmer, "_ledgers", slow)
    await owner.log.create_cursor("s", 1, QUEUE, owner.log.end_offset)
    await reached.wait()
    await owner.log.seek("s", 0)
    gate.set()
    await idle(owner)
    assert (owner.log.start_offset, owner.log.cursors["s"].floor) == (0, 0)


async def test_a_cursor_that_moves_back_while_a_trim_is_stored_begins_above_what_goes(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A floor below the log's start could never be acknowledged, and nothing would ever be trimmed again."""
    owner = await filled(cluster, 8)
    await owner.log.create_cursor("s", 1, QUEUE, 0)
    await idle(owner)
    reached, gate, deliver = asyncio.Event(), asyncio.Event(), cluster.store.txn

    async def slow(compares: Sequence[Compare], operations: Sequence[Operation]) -> TxnResult:
        reached.set()
        await gate.wait()
        return await deliver(compares, operations)

    monkeypatch.setattr(cluster.store, "txn", slow)
    await owner.log.ack("s", floor=owner.log.end_offset)
    await reached.wait()
    await owner.log.seek("s", 0)
    gate.set()
    await idle(owner)
    assert owner.log.start_offset > 0
    assert owner.log.cursors["s"].floor == owner.log.start_offset
