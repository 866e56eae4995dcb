"""The admin service over real gRPC."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any

import pytest
from broker_world import KEYSPACE, TOPIC, Calls, Cluster, ProduceClient, batch, eventually, refusal

from magnetar.broker.broker import Broker
from magnetar.metadata.codec import decode_bookie, encode_bookie, encode_copy, encode_repair
from magnetar.metadata.records import Anchor, CopyReason, CopyTask, RepairSettings, SubscriptionType
from magnetar.metadata.store import Delete, Put
from magnetar.node.rpc import Refused
from magnetar.v1 import admin_pb2 as pb
from magnetar.v1 import common_pb2, metadata_pb2

Produce = Callable[[], ProduceClient]

SEGMENT_BYTES = 64 << 10


async def publish(
    client: ProduceClient, shard: int, batches: int, *, size: int = 10, slot: int = 0, handle: int = 1
) -> None:
    opened = await client.open(shard, handle)
    start = opened.last_sequence + 1
    await client.publish(*(batch(i, i - 1, size=size, slot=slot) for i in range(start, start + batches)), handle=handle)
    await client.answers(batches)


async def subscribe(calls: Calls, name: str, position: metadata_pb2.StartPosition | None = None, kind: int = 0) -> None:
    request = pb.CreateSubscriptionRequest(topic=TOPIC, subscription=name, type=kind, start=position)  # type: ignore[arg-type]
    await calls.admin("CreateSubscription", request, pb.CreateSubscriptionResponse)


async def describe(calls: Calls, name: str) -> pb.SubscriptionDescription:
    request = pb.DescribeSubscriptionRequest(topic=TOPIC, subscription=name)
    return (await calls.admin("DescribeSubscription", request, pb.DescribeSubscriptionResponse)).subscription


async def health(calls: Calls) -> pb.ClusterHealthResponse:
    return await calls.admin("ClusterHealth", pb.ClusterHealthRequest(), pb.ClusterHealthResponse)


async def test_a_topic_is_created_with_even_shards_described_and_listed(calls: Calls) -> None:
    dry = pb.CreateTopicRequest(topic="orders", shards=2, dry_run=True)
    planned = (await calls.admin("CreateTopic", dry, pb.CreateTopicResponse)).topic
    assert [(s.shard_id, s.first_slot, s.last_slot) for s in planned.shards] == [(0, 0, 32767), (0, 32768, 65535)]
    assert (await refusal(calls.describe_topic())).reason == common_pb2.ERROR_REASON_TOPIC_NOT_FOUND
    created = await calls.create_topic("orders", 2)
    assert [(s.first_slot, s.last_slot, s.owner, s.state) for s in created.shards] == [
        (0, 32767, "", metadata_pb2.SHARD_STATE_OPEN),
        (32768, 65535, "", metadata_pb2.SHARD_STATE_OPEN),
    ]
    assert await calls.describe_topic() == created
    assert (await refusal(calls.create_topic())).reason == common_pb2.ERROR_REASON_ALREADY_EXISTS
    await calls.create_topic("a/b/c")
    listed = await calls.admin("ListTopics", pb.ListTopicsRequest(limit=1), pb.ListTopicsResponse)
    assert (list(listed.topics), listed.more) == (["a/b/c"], True)
    listed = await calls.admin("ListTopics", pb.ListTopicsRequest(after="a/b/c"), pb.ListTopicsResponse)
    assert (list(listed.topics), listed.more) == ([TOPIC], False)


async def test_a_description_shows_owner_offsets_and_segments(
    cluster: Cluster, connect: Callable[[Broker], Calls]
) -> None:
    calls = connect(await cluster.start_broker("broker0", segment_bytes=SEGMENT_BYTES))
    shard = (await calls.create_topic()).shards[0].shard_id
    async with ProduceClient(calls) as client:
        await publish(client, shard, 20, size=8 << 10)
    [described] = (await calls.describe_topic()).shards
    assert (described.owner, described.start_offset, described.end_offset) == ("broker0", 0, 20)
    assert len(described.segments) >= 2
    assert sum(segment.messages for segment in described.segments) == 20
    assert all(segment.bytes >= segment.messages * 8 << 10 for segment in described.segments)
    assert all(len(set(segment.ensemble)) == 3 for segment in described.segments)
    assert {segment.state for segment in described.segments[:-1]} == {metadata_pb2.LEDGER_STATE_CLOSED}
    assert described.segments[-1].state == metadata_pb2.LEDGER_STATE_OPEN


async def test_a_shard_that_nobody_serves_is_described_from_its_records(
    cluster: Cluster, broker: Broker, calls: Calls, produce: Produce, connect: Callable[[Broker], Calls]
) -> None:
    shard = (await calls.create_topic()).shards[0].shard_id
    async with produce() as client:
        await publish(client, shard, 7)
    await broker.stop()
    cluster.brokers.remove(broker)
    other = await cluster.start_broker("broker1")
    [described] = (await connect(other).describe_topic()).shards
    assert (described.owner, described.end_offset, len(other.served)) == ("", 7, 0)


async def test_a_deleted_topic_leaves_nothing_and_its_name_is_free(
    cluster: Cluster, connect: Callable[[Broker], Calls]
) -> None:
    broker = await cluster.start_broker("broker0", segment_bytes=SEGMENT_BYTES)
    calls = connect(broker)
    topic = await calls.create_topic(shards=2)
    await subscribe(calls, "audit")
    await calls.register("p")
    shard = topic.shards[0].shard_id
    async with ProduceClient(calls) as client:
        await publish(client, shard, 40, size=8 << 10)
        request = pb.DeleteTopicRequest(topic=TOPIC, dry_run=True)
        counted = await calls.admin("DeleteTopic", request, pb.DeleteTopicResponse)
        assert counted.shards == 2
        assert (counted.messages, counted.bytes > 40 * 8 << 10) == (40, True)
        assert (await calls.describe_topic()).shards[0].end_offset == 40
        await calls.admin("DeleteTopic", pb.DeleteTopicRequest(topic=TOPIC), pb.DeleteTopicResponse)
        assert (await client.error()).error.reason == common_pb2.ERROR_REASON_NOT_OWNER
    left = await cluster.store.range(KEYSPACE.root)
    kinds = {item.key.removeprefix(KEYSPACE.root).split("/")[0] for item in left.items}
    assert kinds <= {"ids", "brokers", "bookies", "cookies", "elections", "instance"}
    again = await calls.create_topic()
    assert again.shards[0].shard_id not in {shard.shard_id for shard in topic.shards}
    assert (await calls.register("p")).epoch == 1
    assert len(broker.served) == 0


async def test_a_deletion_that_was_cut_short_is_finished_by_the_next_broker(
    cluster: Cluster, broker: Broker, calls: Calls, produce: Produce
) -> None:
    shard = (await calls.create_topic()).shards[0].shard_id
    async with produce() as client:
        await publish(client, shard, 5)
    # The broker dies after it marked the topic. Its ledger is still open, and no bookie is needed to delete it.
    await broker.ownership.close()
    await broker.topics.close()
    await broker.topics.mark_deleting(TOPIC)
    other = await cluster.start_broker("broker1")
    await other.sweep()
    assert await cluster.store.get(KEYSPACE.topic(TOPIC)) is None
    assert await cluster.store.get(KEYSPACE.shard(shard)) is None
    assert not (await cluster.store.range(KEYSPACE.index_prefix())).items


async def test_a_broker_that_cannot_list_topics_at_its_start_finishes_deletions_later(cluster: Cluster) -> None:
    broker = await cluster.start_broker()
    await broker.topics.create(TOPIC, 1)
    await broker.topics.close()
    await broker.topics.mark_deleting(TOPIC)
    await broker.ownership.close()
    other = await cluster.start_broker("broker1")
    deleted: list[str] = []
    other.topics.on_topic.append(lambda topic, record: deleted.append(topic) if record is None else None)
    # Its first listing is only tried when this test waits.
    cluster.store.silent_reads[KEYSPACE.topics_prefix()] = 2
    await eventually(lambda: deleted == [TOPIC])
    assert not cluster.store.silent_reads[KEYSPACE.topics_prefix()]
    assert len(other.served) == 0


async def test_a_new_subscription_reaches_its_shards_also_if_the_store_is_silent_when_they_hear_of_it(
    cluster: Cluster, broker: Broker, calls: Calls, produce: Produce
) -> None:
    (shard,) = (await calls.create_topic()).shards
    async with produce() as client:
        await publish(client, shard.shard_id, 1)
    served = broker.served.get(shard.shard_id)
    assert served is not None
    cluster.store.silent_reads[KEYSPACE.subscription(TOPIC, "s")] = 2
    await broker.topics.create_subscription(TOPIC, "s", SubscriptionType.QUEUE, Anchor.LATEST)
    await eventually(lambda: "s" in served.log.cursors)
    assert not cluster.store.silent_reads[KEYSPACE.subscription(TOPIC, "s")]


class Gate:
    """A call that waits, with its answer, until it is let through."""

    def __init__(self, call: Callable[..., Awaitable[Any]]) -> None:
        self.reached, self.let_through = asyncio.Event(), asyncio.Event()
        self._call = call

    async def __call__(self, *arguments: Any) -> Any:
        answer = await self._call(*arguments)
        self.reached.set()
        await self.let_through.wait()
        return answer


async def test_a_subscription_that_is_deleted_while_a_consumer_opens_it_leaves_no_cursor(
    broker: Broker, calls: Calls, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would hold back trimming, and nobody could see or delete it."""
    shard = await broker.shard(TOPIC, (await calls.create_topic()).shards[0].shard_id)
    await broker.topics.create_subscription(TOPIC, "s", SubscriptionType.QUEUE, Anchor.LATEST)
    await eventually(lambda: "s" in shard.log.cursors)
    gate = Gate(broker.topics.open_subscription)
    monkeypatch.setattr(broker.topics, "open_subscription", gate)
    opening = asyncio.create_task(shard.subscription("s", SubscriptionType.QUEUE, Anchor.LATEST, True))
    await gate.reached.wait()
    await broker.topics.delete_subscription(TOPIC, "s")
    deletion = asyncio.create_task(shard.subscription_changed("s"))
    for _ in range(100):
        await asyncio.sleep(0)
    gate.let_through.set()
    await asyncio.gather(opening, deletion, return_exceptions=True)
    assert "s" not in shard.log.cursors


async def test_a_subscription_that_is_deleted_while_it_is_moved_leaves_no_cursor(broker: Broker, calls: Calls) -> None:
    shard = await broker.shard(TOPIC, (await calls.create_topic()).shards[0].shard_id)
    record = await broker.topics.create_subscription(TOPIC, "s", SubscriptionType.QUEUE, Anchor.LATEST)
    await broker.topics.delete_subscription(TOPIC, "s")
    await eventually(lambda: "s" not in shard.log.cursors)
    with pytest.raises(Refused, match="does not exist"):
        await shard.seek(record.name, 0)
    assert "s" not in shard.log.cursors


async def test_a_subscription_that_is_created_while_changes_are_caught_up_keeps_its_cursor(
    broker: Broker, calls: Calls, monkeypatch: pytest.MonkeyPatch
) -> None:
    shard = await broker.shard(TOPIC, (await calls.create_topic()).shards[0].shard_id)
    gate = Gate(broker.topics.subscriptions)
    monkeypatch.setattr(broker.topics, "subscriptions", gate)
    catching_up = asyncio.create_task(broker._catch_up())
    await gate.reached.wait()
    opening = asyncio.create_task(shard.subscription("s", SubscriptionType.QUEUE, Anchor.LATEST, True))
    for _ in range(100):
        await asyncio.sleep(0)
    gate.let_through.set()
    await asyncio.gather(catching_up, opening)
    assert "s" in shard.log.cursors


async def test_a_topic_served_by_another_broker_is_deleted_by_that_one(
    cluster: Cluster, broker: Broker, calls: Calls, connect: Callable[[Broker], Calls], produce: Produce
) -> None:
    shard = (await calls.create_topic()).shards[0].shard_id
    async with produce() as client:
        await publish(client, shard, 5)
    other = connect(await cluster.start_broker("broker1"))
    request = pb.DeleteTopicRequest(topic=TOPIC)
    try:
        await other.admin("DeleteTopic", request, pb.DeleteTopicResponse)
    except Exception:
        # It was told to try again while the owner is still deleting.
        await eventually(lambda: len(broker.served) == 0)
        await other.admin("DeleteTopic", request, pb.DeleteTopicResponse)
    assert await cluster.store.get(KEYSPACE.shard(shard)) is None


async def test_a_subscription_starts_where_it_was_asked_to_in_every_shard(
    broker: Broker, calls: Calls, produce: Produce
) -> None:
    low, high = (await calls.create_topic(shards=2)).shards
    async with produce() as client:
        await publish(client, low.shard_id, 10)
    await subscribe(calls, "latest", kind=metadata_pb2.SUBSCRIPTION_TYPE_STREAM)
    await subscribe(calls, "earliest", metadata_pb2.StartPosition(earliest=True), metadata_pb2.SUBSCRIPTION_TYPE_QUEUE)
    await subscribe(calls, "fourth", metadata_pb2.StartPosition(offset=4))
    now_us = metadata_pb2.StartPosition(time_us=1)
    await subscribe(calls, "timed", now_us)
    listed = await calls.admin(
        "ListSubscriptions", pb.ListSubscriptionsRequest(topic=TOPIC), pb.ListSubscriptionsResponse
    )
    assert [(s.subscription, s.type, s.backlog_messages, s.consumers) for s in listed.subscriptions] == [
        ("earliest", metadata_pb2.SUBSCRIPTION_TYPE_QUEUE, 10, 0),
        ("fourth", metadata_pb2.SUBSCRIPTION_TYPE_UNSPECIFIED, 6, 0),
        ("latest", metadata_pb2.SUBSCRIPTION_TYPE_STREAM, 0, 0),
        ("timed", metadata_pb2.SUBSCRIPTION_TYPE_UNSPECIFIED, 10, 0),
    ]
    described = await describe(calls, "earliest")
    assert [(c.shard_id, c.floor, c.end_offset) for c in described.shards] == [
        (low.shard_id, 0, 10),
        (high.shard_id, 0, 0),
    ]
    assert described.backlog_bytes > 0
    assert described.oldest_age_s >= 0
    assert described.waiting_for
    assert (await calls.describe_topic()).subscriptions == ["earliest", "fourth", "latest", "timed"]
    again = subscribe(calls, "latest")
    assert (await refusal(again)).reason == common_pb2.ERROR_REASON_ALREADY_EXISTS


async def test_a_seek_moves_all_shards_or_one_and_a_dry_run_none(
    broker: Broker, calls: Calls, produce: Produce
) -> None:
    low, high = (await calls.create_topic(shards=2)).shards
    async with produce() as client:
        await publish(client, low.shard_id, 10)
        await publish(client, high.shard_id, 4, slot=high.first_slot, handle=2)
    await subscribe(calls, "s")

    async def seek(shard: int = 0, dry_run: bool = False) -> list[tuple[int, int, int]]:
        request = pb.SeekSubscriptionRequest(topic=TOPIC, subscription="s", shard_id=shard, dry_run=dry_run)
        request.position.offset = 2
        answer = await calls.admin("SeekSubscription", request, pb.SeekSubscriptionResponse)
        return [(cursor.shard_id, cursor.floor, cursor.backlog_messages) for cursor in answer.shards]

    assert await seek(dry_run=True) == [(low.shard_id, 2, 8), (high.shard_id, 2, 2)]
    assert (await describe(calls, "s")).backlog_messages == 0
    assert await seek(shard=high.shard_id) == [(high.shard_id, 2, 2)]
    assert (await describe(calls, "s")).backlog_messages == 2
    await seek()
    assert (await describe(calls, "s")).backlog_messages == 10
    error = await refusal(seek(shard=999))
    assert error.reason == common_pb2.ERROR_REASON_INVALID_ARGUMENT


async def test_a_deleted_subscription_holds_nothing_back_any_more(broker: Broker, calls: Calls) -> None:
    shard = (await calls.create_topic()).shards[0].shard_id
    await subscribe(calls, "s")
    log = (await broker.shard(TOPIC, shard)).log
    assert list(log.cursors) == ["s"]
    request = pb.DeleteSubscriptionRequest(topic=TOPIC, subscription="s", dry_run=True)
    await calls.admin("DeleteSubscription", request, pb.DeleteSubscriptionResponse)
    assert list(log.cursors) == ["s"]
    request.dry_run = False
    await calls.admin("DeleteSubscription", request, pb.DeleteSubscriptionResponse)
    assert list(log.cursors) == []
    for method in ("DeleteSubscription", "DescribeSubscription", "SeekSubscription"):
        missing = pb.SeekSubscriptionRequest(topic=TOPIC, subscription="s")
        if method == "SeekSubscription":
            missing.position.earliest = True
        data = missing.SerializeToString()
        error = await refusal(calls.raw("AdminService", method, data))
        assert error.reason == common_pb2.ERROR_REASON_SUBSCRIPTION_NOT_FOUND


async def test_a_shard_that_is_opened_later_takes_over_the_topics_subscriptions(
    cluster: Cluster, broker: Broker, calls: Calls
) -> None:
    shard = (await calls.create_topic()).shards[0].shard_id
    await subscribe(calls, "old")
    await broker.stop()
    cluster.brokers.remove(broker)
    other = await cluster.start_broker("broker1")
    await other.topics.delete_subscription(TOPIC, "old")
    await other.topics.create_subscription(TOPIC, "new", SubscriptionType.QUEUE, Anchor.LATEST)
    served = await other.shard(TOPIC, shard)
    assert list(served.log.cursors) == ["new"]


async def test_ledgers_are_listed_in_pages_with_their_topic_and_found(
    cluster: Cluster, connect: Callable[[Broker], Calls]
) -> None:
    calls = connect(await cluster.start_broker("broker0", segment_bytes=SEGMENT_BYTES))
    shard = (await calls.create_topic()).shards[0].shard_id
    other_topic = "public/default/other"
    other = (await calls.create_topic(other_topic)).shards[0].shard_id
    async with ProduceClient(calls) as client:
        await publish(client, shard, 40, size=8 << 10)
        await client.send_open(other, 2, topic=other_topic)
        await client.until(lambda: bool(client.opened))
        await client.publish(batch(0), handle=2)
        await client.answers(1)

    async def page(topic: str = "", after: int = 0, limit: int = 0) -> pb.AdminServiceListLedgersResponse:
        request = pb.AdminServiceListLedgersRequest(topic=topic, after=after, limit=limit)
        return await calls.admin("ListLedgers", request, pb.AdminServiceListLedgersResponse)

    everything = (await page()).ledgers
    ids = [ledger.record.ledger_id for ledger in everything]
    assert ids == sorted(set(ids))
    assert {ledger.topic for ledger in everything} == {TOPIC, other_topic}
    assert {ledger.record.state for ledger in everything} >= {
        metadata_pb2.LEDGER_STATE_OPEN,
        metadata_pb2.LEDGER_STATE_CLOSED,
    }
    paged: list[int] = []
    more = True
    while more:
        answer = await page(after=paged[-1] if paged else 0, limit=2)
        paged.extend(ledger.record.ledger_id for ledger in answer.ledgers)
        more = answer.more
    assert paged == ids
    assert [ledger.record.ledger_id for ledger in (await page(TOPIC)).ledgers] == [
        ledger.record.ledger_id for ledger in everything if ledger.topic == TOPIC
    ]
    for ledger in everything:
        request = pb.DescribeLedgerRequest(ledger_id=ledger.record.ledger_id)
        assert (await calls.admin("DescribeLedger", request, pb.DescribeLedgerResponse)).ledger == ledger
    missing = calls.admin("DescribeLedger", pb.DescribeLedgerRequest(ledger_id=10_000), pb.DescribeLedgerResponse)
    assert (await refusal(missing)).reason == common_pb2.ERROR_REASON_LEDGER_NOT_FOUND


async def test_health_names_a_lost_bookie_and_what_to_do(
    cluster: Cluster, broker: Broker, calls: Calls, produce: Produce
) -> None:
    shard = (await calls.create_topic()).shards[0].shard_id
    async with produce() as client:
        await publish(client, shard, 5)
    found = await health(calls)
    assert (found.healthy, found.brokers, found.bookies, found.under_replicated_ledgers) == (True, 1, 3, 0)
    await cluster.bookies["bookie2"].stop()
    directory = broker._admin._bookies
    await eventually(lambda: len(directory.registered()) == 2)
    found = await health(calls)
    assert (found.healthy, found.bookies, found.under_replicated_ledgers) == (False, 2, 1)
    assert any("bookie2" in problem and "start it again" in problem for problem in found.problems)
    assert any("new ledgers want 3" in problem for problem in found.problems)
    assert not any("switched off" in problem for problem in found.problems)
    await cluster.store.txn([], [Put(KEYSPACE.repair(), encode_repair(RepairSettings(enabled=False)))])
    assert any("repair is switched off" in problem for problem in (await health(calls)).problems)
    assert found.unavailable_shards == 0
    await cluster.bookies["bookie1"].stop()
    await eventually(lambda: len(directory.registered()) == 1)
    found = await health(calls)
    assert found.unavailable_shards == 1
    stands = f"shard {shard}: publishing stands still"
    assert any(stands in problem and "start bookie1, bookie2 again" in problem for problem in found.problems)


async def test_health_counts_shards_whose_owner_is_gone(
    cluster: Cluster, broker: Broker, calls: Calls, connect: Callable[[Broker], Calls], monkeypatch: pytest.MonkeyPatch
) -> None:
    shard = (await calls.create_topic()).shards[0].shard_id
    await broker.shard(TOPIC, shard)
    observer = await cluster.start_broker("observer")
    monkeypatch.setattr(observer._takeovers, "want", lambda shards: None)
    await broker.ownership.close()
    found = await health(connect(observer))
    assert (found.healthy, found.brokers, found.unavailable_shards) == (False, 1, 1)
    assert any("broker broker0 has no session and owns 1 shard:" in problem for problem in found.problems)


@pytest.mark.parametrize("method", ["DescribeTopic", "DeleteTopic", "ListSubscriptions"])
async def test_a_topic_that_does_not_exist_is_not_found(calls: Calls, method: str) -> None:
    data = pb.DescribeTopicRequest(topic="none").SerializeToString()
    assert (await refusal(calls.raw("AdminService", method, data))).reason == common_pb2.ERROR_REASON_TOPIC_NOT_FOUND


async def test_health_waits_until_a_bookie_that_started_empty_has_its_part_again(
    cluster: Cluster, broker: Broker, calls: Calls
) -> None:
    await calls.create_topic()
    found = await cluster.store.get(KEYSPACE.bookie("bookie2"))
    assert found is not None
    reborn = encode_bookie(replace(decode_bookie(found.value), ledger_floor=1000))
    task = CopyTask(999, "bookie2", "bookie2", CopyReason.UNREPLICATED, last_entry=5)
    later = CopyTask(1000, "bookie2", "bookie2", CopyReason.UNREPLICATED, last_entry=5)
    tasks = [Put(KEYSPACE.copy(one.ledger_id, one.place), encode_copy(one)) for one in (task, later)]
    await cluster.store.txn([], [Put(KEYSPACE.bookie("bookie2"), reborn, found.lease_id), *tasks])
    directory = broker._admin._bookies
    await eventually(lambda: any(bookie.ledger_floor for bookie in directory.registered()))
    answer = await health(calls)
    assert (answer.healthy, answer.under_replicated_ledgers) == (False, 1)
    assert any("bookie2 started with an empty directory" in problem for problem in answer.problems)
    await cluster.store.txn([], [Delete(KEYSPACE.copy(999, "bookie2"))])
    assert (await health(calls)).healthy
