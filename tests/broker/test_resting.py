"""Shards that nobody uses: put to rest, kept, opened again, and taken over without being opened."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from broker_world import KEYSPACE, PATIENCE_S, TOPIC, Calls, Cluster, ProduceClient, batch, eventually
from consume_world import EARLIEST, ConsumeClient

from magnetar.broker.broker import Broker
from magnetar.broker.layout import preferred_broker
from magnetar.broker.served import Rest
from magnetar.broker.shard import ServedShard
from magnetar.metadata.records import Owner, ShardRecord
from magnetar.metadata.shards import ShardMetadata
from magnetar.metadata.store import Put
from magnetar.v1 import admin_pb2, metadata_pb2

Connect = Callable[[Broker], Calls]
QUEUE = metadata_pb2.SUBSCRIPTION_TYPE_QUEUE


class Gate:
    """A call that waits before it is made until it is let through."""

    def __init__(self, call: Callable[..., Awaitable[Any]]) -> None:
        self.reached, self.let_through = asyncio.Event(), asyncio.Event()
        self._call = call

    async def __call__(self, *arguments: Any, **named: Any) -> Any:
        self.reached.set()
        await self.let_through.wait()
        return await self._call(*arguments, **named)


class World:
    """Brokers that put nothing to rest by themselves for the time of a test, and a topic with shards."""

    def __init__(self, cluster: Cluster, brokers: list[Broker], shards: list[int]) -> None:
        self.cluster = cluster
        self.brokers = brokers
        self.shards = shards

    @property
    def broker(self) -> Broker:
        return self.brokers[0]

    @property
    def shard_id(self) -> int:
        return self.shards[0]

    async def record(self, shard_id: int | None = None) -> ShardRecord:
        found = await ShardMetadata.load(self.cluster.store, KEYSPACE, shard_id or self.shard_id)
        return found.record

    def preferred_by(self, broker: Broker) -> list[int]:
        names = [one.settings.id for one in self.brokers]
        return [shard for shard in self.shards if preferred_broker(shard, names) == broker.settings.id]


async def rest(broker: Broker) -> None:
    await broker.served.rest_unused(0.0, broker._mover.gives)


async def start(cluster: Cluster, connect: Connect, brokers: int, shards: int) -> World:
    started = [await cluster.start_broker(f"broker{number}") for number in range(brokers)]
    await eventually(lambda: all(len(broker.view.brokers()) == brokers for broker in started))
    topic = await connect(started[0]).create_topic(shards=shards)
    return World(cluster, started, [shard.shard_id for shard in topic.shards])


@pytest.fixture
async def world(cluster: Cluster, connect: Connect) -> World:
    return await start(cluster, connect, brokers=1, shards=1)


@pytest.fixture
async def pair(cluster: Cluster, connect: Connect) -> World:
    return await start(cluster, connect, brokers=2, shards=16)


async def publish(calls: Calls, shard: int, first: int, count: int) -> None:
    async with ProduceClient(calls) as producer:
        assert (await producer.open(shard)).last_sequence == first - 1
        slot = await slot_of(calls, shard)
        await producer.publish(*(batch(first + i, first + i - 1, slot=slot) for i in range(count)))
        assert [offset for _, _, _, offset in await producer.answers(count)] == list(range(first, first + count))


async def slot_of(calls: Calls, shard: int) -> int:
    return next(one.first_slot for one in (await calls.resolve()).shards if one.shard_id == shard)


# --- one broker ---


async def test_a_shard_that_nobody_uses_is_closed_and_kept_and_whoever_comes_goes_on_where_others_stopped(
    world: World, connect: Connect
) -> None:
    broker, shard, calls = world.broker, world.shard_id, connect(world.broker)
    await publish(calls, shard, 0, 5)
    async with ConsumeClient(calls) as consumer:
        await consumer.open(shard, name="jobs", kind=QUEUE)
        await consumer.offsets(5, batch_size=1)
        await consumer.ack((0, 2), request_id=7)
    served = broker.served.get(shard)
    assert served is not None
    await eventually(lambda: not served.in_use)
    await rest(broker)
    assert list(broker.served.at_rest) == [shard]
    assert len(broker.served) == 0
    assert (await world.record()).owner == broker.ownership.session
    assert not (await ShardMetadata.load(world.cluster.store, KEYSPACE, shard)).ledgers
    # It is nobody's to be taken over, and not opened by the sweep.
    await broker.sweep()
    assert len(broker.served) == 0
    assert [one.owner for one in (await calls.resolve()).shards] == [broker.address]
    await publish(calls, shard, 5, 2)
    assert not broker.served.at_rest
    async with ConsumeClient(calls) as consumer:
        await consumer.open(shard, name="jobs", kind=QUEUE)
        # Nobody was attached when it came to rest: the queue waits for nobody.
        subscription = broker.served.get(shard).subscriptions["jobs"]  # type: ignore[union-attr]
        assert subscription._reunion is None
        assert await consumer.offsets(5, batch_size=1) == [2, 3, 4, 5, 6]


async def test_what_somebody_is_attached_to_does_not_come_to_rest(world: World, connect: Connect) -> None:
    broker, shard, calls = world.broker, world.shard_id, connect(world.broker)
    served = await broker.shard(TOPIC, shard)

    async def stays() -> None:
        await rest(broker)
        assert broker.served.get(shard) is served

    async with ProduceClient(calls) as producer:
        await producer.open(shard)
        await stays()
    await eventually(lambda: not served.in_use)
    async with ConsumeClient(calls) as consumer:
        await consumer.open(shard, name="s")
        await stays()
    await eventually(lambda: not served.in_use)
    async with ConsumeClient(calls) as reader:
        await reader.open_reader(shard, start=EARLIEST)
        await stays()
    await eventually(lambda: not served.in_use)
    # Who asked for it a moment ago may still want it.
    await broker.shard(TOPIC, shard)
    await broker.served.rest_unused(60.0, broker._mover.gives)
    assert broker.served.get(shard) is served
    await broker.served.rest_unused(0.0, lambda shard_id: shard_id == shard)
    assert broker.served.get(shard) is served
    await rest(broker)
    assert broker.served.get(shard) is None


async def resting(world: World, monkeypatch: pytest.MonkeyPatch) -> tuple[Gate, asyncio.Task[None]]:
    """The shard is being closed, and waits."""
    served = await world.broker.shard(TOPIC, world.shard_id)
    gate = Gate(served.log.rest)
    monkeypatch.setattr(served.log, "rest", gate)
    closing = asyncio.create_task(rest(world.broker))
    await gate.reached.wait()
    return gate, closing


async def test_who_comes_while_a_shard_is_being_closed_waits_and_is_served(
    world: World, connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate, closing = await resting(world, monkeypatch)
    publishing = asyncio.create_task(publish(connect(world.broker), world.shard_id, 0, 3))
    await eventually(lambda: world.shard_id in world.broker.served._loads)
    gate.let_through.set()
    async with asyncio.timeout(PATIENCE_S):
        await publishing
    await closing
    assert (await world.record()).epoch == 2


async def test_a_shard_that_cannot_be_closed_is_recovered_for_whoever_comes(
    world: World, connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    broker, shard = world.broker, world.shard_id
    await publish(connect(broker), shard, 0, 3)
    served = broker.served.get(shard)
    assert served is not None
    await eventually(lambda: not served.in_use)
    monkeypatch.setattr("magnetar.broker.served.CLOSE_S", 0.05)
    gate = Gate(served.log.rest)
    monkeypatch.setattr(served.log, "rest", gate)
    await rest(broker)
    assert (broker.served.get(shard), list(broker.served.at_rest)) == (None, [])
    await publish(connect(broker), shard, 3, 2)


async def test_a_topic_is_deleted_while_its_shard_is_being_closed(
    world: World, connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate, closing = await resting(world, monkeypatch)
    deleting = asyncio.create_task(world.broker.delete_topic(TOPIC))
    await eventually(lambda: world.shard_id in world.broker.served._deletions)
    gate.let_through.set()
    await asyncio.gather(deleting, closing)
    assert not (await world.cluster.store.range(KEYSPACE.shards_prefix())).items


async def test_a_session_that_is_lost_takes_the_shards_at_rest_with_it(world: World, connect: Connect) -> None:
    broker, shard = world.broker, world.shard_id
    await publish(connect(broker), shard, 0, 3)
    await eventually(lambda: not broker.served.get(shard).in_use)  # type: ignore[union-attr]
    await rest(broker)
    first = broker.ownership.session
    await world.cluster.end_session(broker)
    await eventually(lambda: broker.ownership.session not in (None, first))
    # The record names the old session: the new one claims it as any broker's that is gone.
    await eventually(lambda: shard in broker.served.at_rest)
    assert (await world.record()).owner == broker.ownership.session
    await publish(connect(broker), shard, 3, 1)


async def test_messages_of_a_deleted_subscription_go_although_the_shard_is_at_rest(
    world: World, connect: Connect
) -> None:
    broker, shard, calls = world.broker, world.shard_id, connect(world.broker)
    for name in ("kept", "dropped"):
        request = admin_pb2.CreateSubscriptionRequest(topic=TOPIC, subscription=name, type=QUEUE)
        request.start.earliest = True
        await calls.admin("CreateSubscription", request, admin_pb2.CreateSubscriptionResponse)
    await publish(calls, shard, 0, 3)
    async with ConsumeClient(calls) as consumer:
        await consumer.open(shard, name="kept", kind=QUEUE)
        await consumer.offsets(3, batch_size=1)
        await consumer.ack((0, 3), request_id=7)
    served = broker.served.get(shard)
    assert served is not None
    await eventually(lambda: not served.in_use)
    await rest(broker)
    assert len((await world.record()).segments) == 1
    await broker.topics.delete_subscription(TOPIC, "dropped")
    async with asyncio.timeout(PATIENCE_S):
        while (await world.record()).segments:
            await broker.served.trim()  # Another trim may be under way: then this one does nothing.
            await asyncio.sleep(0.001)


async def test_a_shard_at_rest_is_opened_when_its_messages_were_kept_long_enough(
    cluster: Cluster, connect: Connect
) -> None:
    broker = await cluster.start_broker("broker0", retention_unsubscribed_s=0.0)
    [shard] = [one.shard_id for one in (await connect(broker).create_topic()).shards]
    await publish(connect(broker), shard, 0, 3)
    await eventually(lambda: not broker.served.get(shard).in_use)  # type: ignore[union-attr]
    await rest(broker)
    await broker.served.revisit()
    assert broker.served.get(shard) is not None
    await broker.served.trim()
    await rest(broker)
    # Nothing is left that could be too old.
    await broker.served.revisit()
    assert list(broker.served.at_rest) == [shard]


# --- two brokers ---


async def test_shards_of_a_dead_broker_are_claimed_together_and_not_opened_those_in_use_first(
    pair: World, connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    a, b = pair.brokers
    mine = pair.preferred_by(a)
    for shard in mine:
        await publish(connect(a), shard, 0, 2)
    await eventually(lambda: not any(shard.in_use for shard in a.served))
    await rest(a)
    busy = mine[-1]
    await publish(connect(a), busy, 2, 1)
    await pair.cluster.kill(a)
    claims: list[list[int]] = []
    claim = b.ownership.claim_together

    async def claim_and_tell(shards: Any) -> list[ShardMetadata]:
        claims.append([snapshot.record.shard_id for snapshot in shards])
        return await claim(shards)

    monkeypatch.setattr(b.ownership, "claim_together", claim_and_tell)
    before = pair.cluster.store.requests
    await pair.cluster.end_session(a)
    await eventually(lambda: set(mine) <= set(b.served.at_rest))
    assert pair.cluster.store.requests - before <= 3 * len(mine)
    assert [sorted(shards) for shards in claims] == [sorted(mine)]
    assert claims[0][0] == busy
    assert len(b.served) == 0
    for shard in mine:
        assert (await pair.record(shard)).owner == b.ownership.session
        await publish(connect(b), shard, 3 if shard == busy else 2, 1)


async def test_a_damaged_record_keeps_no_other_shard_from_being_claimed(pair: World) -> None:
    a, b = pair.brokers
    mine = pair.preferred_by(a)
    for shard in mine:
        await a.shard(TOPIC, shard)
    await pair.cluster.kill(a)
    await pair.cluster.store.txn([], [Put(KEYSPACE.shard(mine[0]), b"junk")])
    await pair.cluster.end_session(a)
    await eventually(lambda: set(mine[1:]) <= set(b.served.at_rest))


async def test_what_a_client_asks_for_while_many_are_claimed_is_its_own_and_the_others_are_claimed_all_the_same(
    pair: World, connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    a, b = pair.brokers
    mine = pair.preferred_by(a)
    for shard in mine:
        await a.shard(TOPIC, shard)
    await pair.cluster.kill(a)
    gate = Gate(b.ownership.claim_together)
    monkeypatch.setattr(b.ownership, "claim_together", gate)
    await pair.cluster.end_session(a)
    await gate.reached.wait()
    wanted: ServedShard = await b.shard(TOPIC, mine[0])
    gate.let_through.set()
    await eventually(lambda: set(mine[1:]) <= set(b.served.at_rest))
    assert b.served.get(mine[0]) is wanted
    assert (await pair.record(mine[0])).epoch == wanted.log.epoch
    await publish(connect(b), mine[0], 0, 1)


async def test_a_shard_at_rest_is_handed_over_and_deleted_wherever_it_is(pair: World, connect: Connect) -> None:
    a, b = pair.brokers
    shard = pair.preferred_by(a)[0]
    await publish(connect(a), shard, 0, 2)
    await eventually(lambda: not a.served.get(shard).in_use)  # type: ignore[union-attr]
    await rest(a)
    move = admin_pb2.MoveShardRequest(shard_id=shard, to_broker_id=b.settings.id)
    await connect(b).admin("MoveShard", move, admin_pb2.MoveShardResponse)
    assert shard not in a.served.at_rest
    await publish(connect(b), shard, 2, 1)
    await eventually(lambda: not b.served.get(shard).in_use)  # type: ignore[union-attr]
    await rest(b)
    assert shard in b.served.at_rest
    request = admin_pb2.DeleteTopicRequest(topic=TOPIC)
    await connect(a).admin("DeleteTopic", request, admin_pb2.DeleteTopicResponse)
    assert not (await pair.cluster.store.range(KEYSPACE.shards_prefix())).items


async def test_a_shard_that_is_wrongly_taken_for_one_at_rest_is_taken_over_all_the_same(pair: World) -> None:
    a, b = pair.brokers
    shard = pair.preferred_by(a)[0]
    await a.shard(TOPIC, shard)
    b.served._at_rest[shard] = Rest(0, 1)
    await pair.cluster.kill(a)
    await pair.cluster.end_session(a)
    await eventually(lambda: b.view.recorded_owner(shard) == b.ownership.session)
    await eventually(lambda: shard in b.served.at_rest)
    assert b.served._at_rest[shard].epoch == 0


async def test_another_brokers_claim_of_a_shard_at_rest_is_noticed(pair: World) -> None:
    a, b = pair.brokers
    shard = pair.preferred_by(a)[0]
    await a.shard(TOPIC, shard)
    await rest(a)
    session = a.ownership.session
    assert isinstance(session, Owner)
    # As a target does that finds the owner silent.
    await b.ownership.claim_from(shard, session)
    await eventually(lambda: shard not in a.served.at_rest)
    record = await pair.record(shard)
    assert (record.owner, record.epoch) == (b.ownership.session, 2)
