"""Appending over real bookies: order, grouping, rolling, and what a silent store or lost bookies do to it."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace

import pytest
from log_world import SHARD_ID, Cluster, OpenLog, until

from magnetar.managed_log import chain as chains
from magnetar.managed_log.log import LogReleased, LogSettings
from magnetar.metadata.codec import decode_bookie, encode_bookie
from magnetar.metadata.ids import BLOCK_SIZE
from magnetar.metadata.records import VACANT, LedgerState, SubscriptionType
from magnetar.metadata.store import Operation, Put, exists

SMALL = LogSettings(segment_bytes=2_000, retry_first_s=0.001, retry_last_s=0.01)


def numbered(first: int, count: int, size: int = 20) -> list[bytes]:
    return [b"%0*d" % (size, number) for number in range(first, first + count)]


async def fill(owner: OpenLog, first: int, count: int, size: int = 20) -> None:
    """So many messages, one a batch, one an entry."""
    for payload in numbered(first, count, size):
        await owner.append(payload)


async def test_what_was_appended_is_read_back(cluster: Cluster) -> None:
    owner = await cluster.open()
    assert await owner.append(b"a", b"b") == 0
    assert await owner.append(b"c") == 2
    assert await owner.read_all() == [b"a", b"b", b"c"]
    await cluster.check()


async def test_nothing_is_created_before_the_first_append(cluster: Cluster) -> None:
    owner = await cluster.open()
    assert (owner.log.start_offset, owner.log.end_offset) == (0, 0)
    assert await owner.log.read(0) == []
    assert await cluster.ledgers() == {}


async def test_batches_queued_together_become_one_entry_and_one_group(cluster: Cluster) -> None:
    owner = await cluster.open()
    await owner.append(b"first")
    batches = [owner.send(payload) for payload in numbered(0, 50)]
    await owner.stored(batches[-1])
    assert [len(group) for group in owner.groups] == [1, 50]
    assert [batch.first_offset for batch in owner.appended] == list(range(51))
    assert len(await owner.log.read(1)) == 1


async def test_under_load_entries_grow_and_in_flight_bytes_stay_bounded(cluster: Cluster) -> None:
    settings = LogSettings(entry_bytes=10_000, max_in_flight_bytes=20_000)
    owner = await cluster.open(settings=settings)
    most = 0
    batches = []
    for payload in numbered(0, 300, size=1_000):
        batches.append(owner.send(payload))
        if len(batches) % 10 == 0:
            await asyncio.sleep(0)
        handle = owner.log._appender.handle
        most = max(most, handle.in_flight_bytes if handle is not None else 0)
    await owner.stored(batches[-1])
    assert most <= 20_000 + 11_000
    assert await owner.read_all() == numbered(0, 300, size=1_000)
    sizes = [entry.size for entry in await owner.log.read(0, max_bytes=1 << 30)]
    assert max(sizes) <= 10_000
    assert sum(size > 5_000 for size in sizes) > len(sizes) // 2


async def test_a_batch_larger_than_an_entry_is_an_entry_of_its_own(cluster: Cluster) -> None:
    owner = await cluster.open()
    batches = [owner.send(payload) for payload in (b"a", bytes(3 << 20), b"b")]
    await owner.stored(batches[-1])
    assert [len(entry.batches) for entry in await owner.log.read(0, max_bytes=1 << 30)] == [1, 1, 1]


async def test_publish_times_never_go_back_also_not_with_the_next_owner(cluster: Cluster) -> None:
    owner = await cluster.open()
    await owner.append(b"a")
    newest = owner.log.last_publish_time_us
    cluster.clock.now -= 3_600_000_000
    await owner.append(b"b")
    successor = await cluster.take_over(owner)
    await successor.append(b"c")
    assert await successor.read_all() == [b"a", b"b", b"c"]
    assert await successor.log.publish_time_of(2) == newest


async def test_an_idle_log_has_no_task(cluster: Cluster) -> None:
    before = asyncio.all_tasks()
    owner = await cluster.open()
    await owner.append(b"a")
    await owner.log.create_cursor("s", 1, SubscriptionType.QUEUE, 0)
    await owner.log.ack("s", floor=1)
    await until(lambda: asyncio.all_tasks() == before)


async def test_appends_wait_for_bookies_and_go_on(cluster: Cluster) -> None:
    owner = await cluster.open(settings=SMALL)
    for bookie in ("bookie0", "bookie1"):
        await cluster.bookies[bookie].stop()
    await until(lambda: len(cluster.directory.registered()) == 1)
    batch = owner.send(b"a")
    for _ in range(200):
        await asyncio.sleep(0)
    assert batch.first_offset == -1
    await cluster.start_bookie("bookie0")
    await owner.stored(batch)
    assert await owner.read_all() == [b"a"]


async def test_appends_go_on_when_bookies_come_back_that_take_no_older_ledgers(cluster: Cluster) -> None:
    owner = await cluster.open(settings=SMALL)
    await owner.stored(owner.send(b"a"))
    key = cluster.keyspace.bookie("bookie0")
    found = await cluster.store.inner.get(key)
    assert found is not None
    reborn = replace(decode_bookie(found.value), ledger_floor=BLOCK_SIZE + 1)
    await cluster.store.inner.txn([exists(key)], [Put(key, encode_bookie(reborn), found.lease_id)])
    await until(lambda: any(bookie.ledger_floor for bookie in cluster.directory.registered()))
    before = owner.log.record.segments[-1].ledger_id
    await fill(owner, 0, 20)
    segments = owner.log.record.segments
    following = next(segment.ledger_id for segment in segments if segment.ledger_id > before)
    assert following > BLOCK_SIZE
    assert VACANT not in (await cluster.ledgers())[following].fragments[0].bookies


async def test_a_bookie_that_stops_in_the_middle_is_replaced_and_nothing_is_lost(cluster: Cluster) -> None:
    await cluster.start_bookie("bookie3")
    await until(lambda: len(cluster.directory.registered()) == 4)
    owner = await cluster.open()
    await fill(owner, 0, 20)
    record = await cluster.shard_record()
    ensemble = (await cluster.ledgers())[record.segments[-1].ledger_id].fragments[-1].bookies
    await cluster.bookies[ensemble[0]].stop()
    await fill(owner, 20, 20)
    ledger = owner.log.record.segments[-1].ledger_id
    await until(lambda: len(owner.log._shard.ledgers[ledger].fragments) == 2)
    assert await owner.read_all() == numbered(0, 40)
    owner.log._cache.forget(SHARD_ID)
    assert await owner.read_all() == numbered(0, 40)
    await cluster.check()


async def test_segments_roll_by_size_with_the_next_ledger_linked_ahead(cluster: Cluster) -> None:
    owner = await cluster.open(settings=SMALL)
    await fill(owner, 0, 200)
    assert await owner.read_all() == numbered(0, 200)
    await until(lambda: owner.log._shard._tasks == set())
    await cluster.check()
    record = await cluster.shard_record()
    assert len(record.segments) > 10
    ledgers = await cluster.ledgers()
    for segment in record.segments[:-1]:
        assert ledgers[segment.ledger_id].state is LedgerState.CLOSED
        assert 2_000 <= segment.bytes == ledgers[segment.ledger_id].length < 3_000
        assert segment.first_time_us == await owner.log.publish_time_of(segment.first_offset)
    owner.log._cache.forget(SHARD_ID)
    assert await owner.read_all() == numbered(0, 200)


async def test_while_the_store_is_silent_the_open_ledger_grows(cluster: Cluster) -> None:
    owner = await cluster.open(settings=SMALL)
    await owner.append(b"first")
    cluster.store.silent = True
    await fill(owner, 0, 100)
    assert owner.log._appender.open_bytes > 2 * SMALL.segment_bytes
    cluster.store.silent = False
    await until(lambda: len(owner.log.record.segments) > 1)
    await owner.append(b"last")
    assert await owner.read_all() == [b"first", *numbered(0, 100), b"last"]
    await until(lambda: owner.log._shard._tasks == set())
    await cluster.check()


async def test_beyond_the_hard_limit_appends_wait_for_the_store(cluster: Cluster) -> None:
    settings = LogSettings(segment_bytes=2_000, segment_bytes_hard=4_000, entry_bytes=1_000)
    owner = await cluster.open(settings=settings)
    await owner.append(b"first")
    cluster.store.silent = True
    batches = [owner.send(bytes(1_000)) for _ in range(10)]
    for _ in range(500):
        await asyncio.sleep(0)
    assert 2 < owner.log.end_offset < 6
    assert owner.log.queued_bytes > 5_000
    cluster.store.silent = False
    await owner.stored(batches[-1])


@pytest.mark.parametrize("fault", ["request", "reply"])
@pytest.mark.parametrize("every", [1, 2, 3])
async def test_lost_metadata_messages_at_rolls_cost_nothing(cluster: Cluster, fault: str, every: int) -> None:
    owner = await cluster.open(settings=SMALL)
    sent = 0

    def lose(operations: Sequence[Operation]) -> str:
        nonlocal sent
        sent += 1
        return fault if sent % (every + 1) == 0 else ""

    cluster.store.fault = lose
    count = 0
    while len(owner.log.record.segments) <= 3:
        await fill(owner, count, 1)
        count += 1
    cluster.store.fault = lambda _: ""
    assert await owner.read_all() == numbered(0, count)
    assert owner.released == []
    await until(lambda: owner.log._shard._tasks == set())
    await cluster.check()


async def test_a_segment_ends_by_age_without_a_successor_and_only_if_not_empty(cluster: Cluster) -> None:
    owner = await cluster.open(settings=LogSettings(segment_s=60))
    await owner.append(b"a")
    cluster.clock.now += 61_000_000
    await owner.log.trim()
    await until(lambda: owner.log._appender.state.value == "closed")
    (segment,) = (await cluster.shard_record()).segments
    assert segment.messages == 1
    cluster.clock.now += 61_000_000
    await owner.log.trim()
    assert len((await cluster.shard_record()).segments) == 1
    await owner.append(b"b")
    assert await owner.read_all() == [b"a", b"b"]
    await cluster.check()


async def test_a_segment_that_ends_by_age_while_its_successor_is_being_linked_moves_on_to_it(cluster: Cluster) -> None:
    owner = await cluster.open(settings=LogSettings(segment_bytes=2_000, segment_s=60, retry_first_s=0.001))
    await fill(owner, 0, 1)
    cluster.store.silent = True
    count = 1
    while owner.log._appender.open_bytes < 1_500:
        await fill(owner, count, 1)
        count += 1
    cluster.clock.now += 61_000_000
    owner.log._appender.tick()
    await until(lambda: owner.log._appender.state.value == "leaving")
    cluster.store.silent = False
    await until(lambda: owner.log._shard._tasks == set())
    await fill(owner, count, 1)
    await until(lambda: owner.log._shard._tasks == set())
    await cluster.check()
    assert await owner.read_all() == numbered(0, count + 1)
    successor = await cluster.take_over(owner)
    assert await successor.read_all() == numbered(0, count + 1)
    await cluster.check()


async def test_old_segments_move_to_pages_and_are_read_from_there(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chains, "SEGMENTS_PER_PAGE", 4)
    monkeypatch.setattr(chains, "PAGES_CACHED_MAX", 1)
    owner = await cluster.open(settings=SMALL)
    await fill(owner, 0, 250)
    await until(lambda: owner.log._shard._tasks == set())
    record = await cluster.shard_record()
    assert record.pages >= 2
    assert len(record.segments) <= 5
    await cluster.check()
    successor = await cluster.take_over(owner, settings=SMALL)
    assert await successor.read_all() == numbered(0, 250)
    for offset in (0, 77, 150, 249):
        time_us = await successor.log.publish_time_of(offset)
        assert await successor.log.offset_at(time_us) == offset


async def test_a_released_log_refuses_everything_and_tells_once(cluster: Cluster) -> None:
    owner = await cluster.open()
    await owner.append(b"a")
    waiter = asyncio.create_task(owner.log.wait_beyond(1))
    await asyncio.sleep(0)
    await cluster.take_over(owner)
    owner.send(b"b")
    await until(lambda: owner.released != [])
    assert [released.owner.broker_id for released in owner.released if released.owner] == ["broker1"]
    with pytest.raises(LogReleased, match="another broker claimed the shard"):
        await waiter
    with pytest.raises(LogReleased):
        owner.send(b"c")
    with pytest.raises(LogReleased):
        await owner.log.read(0)
    with pytest.raises(LogReleased):
        owner.log.ack("s", floor=1)
    with pytest.raises(LogReleased):
        await owner.log.trim()
    with pytest.raises(LogReleased):
        await owner.log.close()
    assert len(owner.released) == 1


async def test_no_add_is_sent_before_its_ledger_stands_in_the_records(cluster: Cluster) -> None:
    owner = await cluster.open()
    cluster.store.silent = True
    owner.send(b"a")
    for _ in range(300):
        await asyncio.sleep(0)
    assert all(not store._written.entries for store in cluster.stores.values())
    cluster.store.silent = False
    await until(lambda: owner.log.end_offset == 1)
    puts = [o.key for t in cluster.store.transactions for o in t if isinstance(o, Put) and "/ledgers/" in o.key]
    assert len(puts) == 1
