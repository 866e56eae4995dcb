"""A log that nobody uses is closed by its owner, who keeps the shard; a claimed one is closed without being opened."""

from __future__ import annotations

import asyncio

import pytest
from log_world import Cluster, OpenLog, at_once, until

from magnetar.managed_log.log import LogReleased, LogSettings, LogUndecided, ManagedLog
from magnetar.metadata.ids import IdBlocks
from magnetar.metadata.records import LedgerState, SubscriptionType
from magnetar.metadata.shards import ShardMetadata

QUEUE = SubscriptionType.QUEUE
SMALL = LogSettings(
    segment_bytes=1_500, cursor_ledger_bytes=600, retry_first_s=0.001, retry_last_s=0.01, recovery_attempts=2
)


async def settle(cluster: Cluster, metadata: ShardMetadata) -> None:
    ids = IdBlocks(cluster.store, cluster.keyspace, sleep=at_once)
    await ManagedLog.settle(metadata, cluster.client(), ids, SMALL, cluster.clock)


async def test_a_log_at_rest_is_its_owners_and_has_nothing_to_recover(cluster: Cluster) -> None:
    owner = await cluster.open(settings=SMALL)
    for number in range(40):
        await owner.append(b"%050d" % number)
    await owner.log.create_cursor("s", 1, QUEUE, 0)
    await owner.log.ack("s", floor=2, ranges=[(5, 7)])
    before = owner.log.record
    await owner.log.rest()
    record = await cluster.shard_record()
    assert (record.owner, record.epoch) == (before.owner, before.epoch)
    assert (record.next_ledger, record.cursor_ledger, record.next_cursor) == (0, 0, 0)
    assert {ledger.state for ledger in (await cluster.ledgers()).values()} == {LedgerState.CLOSED}
    assert owner.released == []
    with pytest.raises(LogReleased):
        owner.send(b"x")
    again = await cluster.open(settings=SMALL)
    assert len(await again.read_all()) == 40
    assert (again.log.cursors["s"].floor, again.log.cursors["s"].backlog(40)) == (2, 36)
    assert again.producer_chunks == [b"table"]
    assert await again.append(b"next") == 40
    await cluster.check()


async def test_what_is_under_way_when_a_log_comes_to_rest_is_stored_first(cluster: Cluster) -> None:
    owner = await cluster.open(settings=SMALL)
    batches = [owner.send(b"%050d" % number) for number in range(60)]
    await owner.log.rest()
    assert [batch.first_offset for batch in batches] == list(range(60))
    assert len(await (await cluster.open(settings=SMALL)).read_all()) == 60


async def test_a_log_that_another_broker_claims_while_it_comes_to_rest_is_the_other_ones(cluster: Cluster) -> None:
    owner = await cluster.open(settings=SMALL)
    await owner.append(b"a")
    successor = await cluster.take_over(owner, settings=SMALL)
    with pytest.raises(LogReleased):
        await owner.log.rest()
    assert (await cluster.shard_record()).epoch == successor.log.epoch
    assert await successor.append(b"b") == 1


async def test_an_acknowledged_segment_is_ended_before_its_log_comes_to_rest(cluster: Cluster) -> None:
    owner = await cluster.open()
    await owner.append(b"a")
    assert not owner.log.end_acknowledged()  # Nobody has acknowledged anything.
    await owner.log.create_cursor("s", 1, QUEUE, 0)
    assert not owner.log.end_acknowledged()
    await owner.log.ack("s", floor=1)
    assert owner.log.end_acknowledged()
    await until(lambda: not owner.log.end_acknowledged())
    assert await owner.log.trim() == 1
    await owner.log.rest()
    assert await cluster.ledgers() == {}


async def used_and_left(cluster: Cluster) -> OpenLog:
    """A log with an open ledger, one linked ahead, and a cursor ledger, whose owner is gone."""
    owner = await cluster.open(settings=SMALL)
    while not owner.log.record.next_ledger:
        await owner.append(b"%050d" % owner.sent)
    await owner.log.create_cursor("s", 1, QUEUE, 0)
    await owner.log.ack("s", floor=2)
    owner.log.abandon()
    await cluster.vanish("broker0")
    return owner


async def test_a_claimed_shard_is_settled_without_opening_its_log(cluster: Cluster) -> None:
    owner = await used_and_left(cluster)
    metadata = await cluster.claim("broker1")
    cluster.store.transactions.clear()
    await settle(cluster, metadata)
    assert len(cluster.store.transactions) == 1
    record = await cluster.shard_record()
    assert (record.owner, record.epoch) == (metadata.session, metadata.epoch)
    assert {ledger.state for ledger in (await cluster.ledgers()).values()} == {LedgerState.CLOSED}
    await cluster.check()
    opened = await cluster.open("broker1", SMALL)
    assert await opened.read_all() == [b"%050d" % number for number in range(owner.sent)]
    assert opened.log.cursors["s"].floor == 2


async def test_a_settling_that_fails_or_crashes_leaves_what_the_next_one_needs(cluster: Cluster) -> None:
    owner = await used_and_left(cluster)
    metadata = await cluster.claim("broker1")
    cluster.cut |= set(cluster.bookies)
    with pytest.raises(LogUndecided):
        await settle(cluster, metadata)
    cluster.cut.clear()
    cluster.store.fault = lambda _: "crash after"
    settling = asyncio.create_task(settle(cluster, metadata))
    await cluster.store.crashed.wait()
    settling.cancel()
    cluster.store.fault = lambda _: ""
    await settle(cluster, await cluster.claim("broker1"))
    opened = await cluster.open("broker1", SMALL)
    assert len(await opened.read_all()) == owner.sent
    assert opened.log.cursors["s"].floor == 2
    await cluster.check()
