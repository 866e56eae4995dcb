"""Layouts that brokers push: a client follows a shard to its next owner, and does not run after every rumour."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest
from scripted_broker import Fate, ScriptedBroker, ScriptedCluster, Shard, Topic, error

from magnetar.client import EARLIEST, Client, connect
from magnetar.client import layouts as client_layouts
from magnetar.client import links as client_links
from magnetar.client.backoff import Delays
from magnetar.client.layouts import Brokers
from magnetar.client.rpc import RpcStream
from magnetar.v1 import broker_pb2

TIMEOUT_S = 20.0
FOR_EVER_S = 1000.0


class World:
    """Two brokers that push, a topic whose shard the first one owns, and a client that was told of the second one."""

    def __init__(self, cluster: ScriptedCluster, topic: Topic) -> None:
        self.cluster = cluster
        self.topic = topic
        self.a, self.b = cluster.brokers

    @property
    def shard(self) -> Shard:
        (shard,) = self.topic.shards.values()
        return shard

    async def watched(self, at: ScriptedBroker) -> None:
        await self.cluster.until(lambda: len(at.watches) == 1)


@pytest.fixture
async def world() -> AsyncIterator[World]:
    cluster = ScriptedCluster()
    cluster.pushes = True
    await cluster.broker()
    topic = cluster.create("clicks")
    await cluster.broker()
    yield World(cluster, topic)
    await cluster.stop()


@pytest.fixture
async def client(world: World) -> AsyncIterator[Client]:
    async with connect(f"{world.b.address},{world.a.address}", timeout=TIMEOUT_S) as client:
        yield client


@pytest.fixture
def no_retries(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who waits before the next attempt waits for ever, unless something wakes it."""
    monkeypatch.setattr(Delays, "next_s", lambda *_: FOR_EVER_S)
    original = Delays.next_s
    monkeypatch.setattr(
        Delays, "next_s", lambda self, *, at_least_s=0.0, at_once=False: 0.0 if at_once else original(self)
    )


async def test_a_producer_goes_to_the_next_owner_as_soon_as_that_is_pushed(
    world: World, client: Client, no_retries: None
) -> None:
    async with client.producer("clicks") as producer:
        await producer.send(b"0")
        await world.watched(world.b)
        await world.a.stop()
        receipt = producer.send_nowait(b"1")
        # It finds nobody at the owner's address, and the layout still names that one.
        opens = world.cluster.opens
        world.cluster.move(world.shard, world.b)
        world.cluster.push(world.topic)
        await receipt
        assert world.cluster.opens == opens + 1
    assert world.shard.payloads() == [b"0", b"1"]


async def test_a_broker_that_serves_nothing_of_the_topic_is_the_one_that_is_watched(
    world: World, client: Client
) -> None:
    async with client.producer("clicks") as producer:
        await producer.send(b"0")
        await world.watched(world.b)
        assert not world.a.watches
        # The shard moves there: now the other one is the bystander.
        world.cluster.move(world.shard, world.b)
        world.cluster.push(world.topic)
        await world.watched(world.a)
        await world.cluster.until(lambda: not world.b.watches)
    await world.cluster.until(lambda: not world.a.watches)


async def test_two_brokers_that_disagree_about_the_owner_do_not_keep_a_client_busy(
    world: World, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each takes the other for the bystander: one of them is the owner that was replaced and does not know it."""
    watched: list[str] = []
    watch = Brokers.watch

    def counted(self: Brokers, address: str, method: str, request: bytes) -> RpcStream:
        watched.append(address)
        # Whoever is asked says that it is the owner itself.
        world.cluster.move(world.shard, world.a if address == world.a.address else world.b)
        return watch(self, address, method, request)

    monkeypatch.setattr(Brokers, "watch", counted)
    async with client.producer("clicks"):
        await world.cluster.until(lambda: len(watched) >= 4)
        loop = asyncio.get_running_loop()
        began, so_far = loop.time(), len(watched)
        await world.cluster.until(lambda: loop.time() - began >= 0.5)
        assert len(watched) - so_far <= 8


async def test_a_silent_broker_is_not_watched_though_it_serves_nothing_of_the_topic(
    world: World, client: Client
) -> None:
    """It may be the owner that was lost, and the others tell step by step who takes over."""
    topic = world.cluster.create("views", shards=2)
    for shard in topic.shards.values():
        world.cluster.move(shard, world.a)
    fates = {world.a: Fate.DROP, world.b: Fate.STORE}
    keys = [str(number) for number in range(20)]
    async with client.producer("views") as producer:
        await producer.send_many([b"0"] * 20, keys)
        await world.watched(world.b)
        world.cluster.on_batch = lambda shard, header: fates[shard.owner]
        world.a.answering.clear()
        sending = asyncio.create_task(producer.send_many([b"1"] * 20, keys))
        for number, shard in enumerate(topic.shards.values()):
            world.cluster.move(shard, world.b)
            world.cluster.push(topic)
            await world.cluster.until(lambda shard=shard: b"1" in shard.payloads())  # type: ignore[misc]
            assert number or not sending.done()
        await sending
        assert len(world.b.watches) == 1
        world.a.answering.set()


async def test_an_open_producer_leaves_an_owner_that_is_silent_for_the_one_that_is_pushed(
    world: World, client: Client
) -> None:
    fates = {world.a: Fate.DROP, world.b: Fate.STORE}
    async with client.producer("clicks") as producer:
        await producer.send(b"0")
        await world.watched(world.b)
        world.cluster.on_batch = lambda shard, header: fates[shard.owner]
        receipt = producer.send_nowait(b"1")
        await world.cluster.until(lambda: len(world.cluster.headers) == 2)
        world.cluster.move(world.shard, world.b)
        world.cluster.push(world.topic)
        await receipt
    assert world.shard.payloads() == [b"0", b"1"]


async def test_who_waits_for_an_owner_that_is_silent_asks_others_though_nothing_is_pushed(
    world: World, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where the broker that stands still is also the one that is watched."""
    monkeypatch.setattr(client_links, "SILENCE_S", 0.05)
    fates = {world.a: Fate.DROP, world.b: Fate.STORE}
    async with client.producer("clicks") as producer:
        await producer.send(b"0")
        world.cluster.on_batch = lambda shard, header: fates[shard.owner]
        receipt = producer.send_nowait(b"1")
        await world.cluster.until(lambda: len(world.cluster.headers) == 2)
        world.cluster.move(world.shard, world.b)
        await receipt
    assert world.shard.payloads() == [b"0", b"1"]


async def test_a_watched_broker_that_stands_still_is_left_while_something_is_waited_for(
    world: World, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is pushed comes from one that lives by the time that there is news."""
    monkeypatch.setattr(client_links, "SILENCE_S", 0.05)
    monkeypatch.setattr(client_layouts, "SILENCE_S_MAX", 0.05)
    async with client.producer("clicks") as producer:
        await producer.send(b"0")
        await world.watched(world.b)
        world.b.answering.clear()
        world.cluster.on_batch = lambda shard, header: Fate.DROP
        receipt = producer.send_nowait(b"1")
        await world.cluster.until(lambda: len(world.a.watches) == 1)
        assert not receipt.done()
        world.b.answering.set()
        world.cluster.on_batch = lambda shard, header: Fate.STORE
        world.cluster.move(world.shard, world.b)
        world.cluster.push(world.topic)
        await receipt


async def test_news_that_are_withdrawn_at_once_move_nobody(
    world: World, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The broker that pushes may be behind: the producer came where it is by a newer redirect."""
    async with (
        client.producer("clicks") as producer,
        client.stream_consumer("clicks", subscription="s", start=EARLIEST) as consumer,
    ):
        await producer.send(b"0")
        assert (await consumer.receive()).payload == b"0"
        await world.watched(world.b)
        opens = world.cluster.opens, len(world.cluster.consumer_opens)
        for owner in (world.b, world.a):
            world.cluster.move(world.shard, owner)
            world.cluster.push(world.topic)
        await asyncio.sleep(2 * _grace_s())
        await producer.send(b"1")
        assert (await consumer.receive()).payload == b"1"
        assert (world.cluster.opens, len(world.cluster.consumer_opens)) == opens


async def test_who_was_redirected_since_the_news_does_not_follow_them_any_more(
    world: World, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A queue that left its owner for old news would leave what it holds to others, and has it in its hands."""
    monkeypatch.setattr(client_links, "HINT_GRACE_S", 0.5)
    told = asyncio.Event()
    async with client.queue_consumer("clicks", subscription="q", start=EARLIEST):
        await world.watched(world.b)
        await world.cluster.until(lambda: len(world.cluster.consumer_opens) == 1)
        parts: Any = client._parts
        parts.consuming.layouts.listen(world.topic.name, lambda layout: told.set())
        world.cluster.move(world.shard, world.b)
        world.cluster.push(world.topic)
        await asyncio.wait_for(told.wait(), TIMEOUT_S)
        for opens, owner in ((2, world.b), (3, world.a)):
            world.cluster.move(world.shard, owner)
            (session,) = world.shard.subscriptions["q"].sessions
            session.stream.broker._detach(session)
            moved = broker_pb2.ConsumerError(handle=session.handle, error=error("NOT_OWNER", owner=owner.address))
            session.stream.say(broker_pb2.ConsumeResponse(errors=[moved]))
            await world.cluster.until(lambda opens=opens: len(world.cluster.consumer_opens) == opens)  # type: ignore[misc]
        await asyncio.sleep(1.5 * _grace_s())
        assert len(world.cluster.consumer_opens) == 3


async def test_a_broker_that_is_silent_does_not_keep_the_others_from_being_asked(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client_layouts, "SILENCE_S_MAX", 0.01)
    world.b.answering.clear()
    async with connect(f"{world.b.address},{world.a.address}", timeout=TIMEOUT_S) as client:
        async with asyncio.timeout(client_layouts.ATTEMPT_S_MAX / 2), client.producer("clicks") as producer:
            await producer.send(b"0")
        # The one that answered is asked first from now on.
        parts: Any = client._parts
        assert parts.brokers.preferred == world.a.address
    world.b.answering.set()


async def test_a_silent_broker_does_not_keep_others_from_being_asked_what_there_is(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client_layouts, "SILENCE_S_MAX", 0.01)
    world.b.answering.clear()
    async with connect(f"{world.b.address},{world.a.address}", timeout=TIMEOUT_S) as client:
        async with asyncio.timeout(TIMEOUT_S / 2):
            assert await client.admin.topics.list() == ["public/default/clicks"]
    world.b.answering.set()


async def test_more_topics_than_can_be_watched_work_all_the_same(
    world: World, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client_layouts, "WATCHES_MAX", 1)
    world.cluster.create("views")
    async with client.producer("clicks") as clicks, client.producer("views") as views:
        await clicks.send(b"0")
        await world.watched(world.b)
        await views.send(b"0")
        (shard,) = world.cluster.topics["public/default/views"].shards.values()
        world.cluster.move(shard, world.b)
        world.a.cut()
        await views.send(b"1")
    assert shard.payloads() == [b"0", b"1"]


def _grace_s() -> float:
    from magnetar.client.links import HINT_GRACE_S

    return HINT_GRACE_S
