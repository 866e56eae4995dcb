"""Clients of several brokers, through crashes and hand-offs: each message once, each key in order, no error."""

from __future__ import annotations

import asyncio
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import AsyncExitStack
from typing import Any

import pytest
from broker_world import PATIENCE_S, TOPIC, Cluster, eventually

from magnetar.broker.broker import Broker
from magnetar.client import EARLIEST, LATEST, Client, Message, Producer, QueueConsumer, StreamConsumer, connect
from magnetar.v1 import common_pb2

KEYS = 16
EACH = 300
"""Messages of a producer."""
PRODUCERS = {"unnamed": None, "named": "orders-1"}


@pytest.fixture
async def brokers(cluster: Cluster) -> list[Broker]:
    brokers = [await cluster.start_broker(f"broker{number}") for number in range(3)]
    await eventually(lambda: all(len(broker.view.brokers()) == 3 for broker in brokers))
    return brokers


@pytest.fixture
async def client(brokers: list[Broker]) -> AsyncIterator[Client]:
    async with connect(",".join(broker.address for broker in brokers), timeout=PATIENCE_S) as client:
        yield client


async def crash(cluster: Cluster, broker: Broker) -> None:
    await cluster.kill(broker)
    await cluster.end_session(broker)


async def stop(cluster: Cluster, broker: Broker) -> None:
    cluster.brokers.remove(broker)
    await broker.stop()


def busiest(cluster: Cluster) -> Broker:
    return max(cluster.brokers, key=lambda broker: len(broker.served))


class Story:
    """What was sent, and what came to each subscription."""

    def __init__(self) -> None:
        self.confirmed = 0
        self.came: dict[str, defaultdict[tuple[str, object], int]] = {
            name: defaultdict(int) for name in ("stream", "queue")
        }
        self.done: dict[str, set[bytes]] = {"stream": set(), "queue": set()}
        self._moved = asyncio.Event()

    async def until(self, confirmed: int) -> None:
        async with asyncio.timeout(PATIENCE_S):
            while self.confirmed < confirmed:
                self._moved.clear()
                await self._moved.wait()

    async def publish(self, producer: Producer, name: str) -> None:
        for number in range(EACH):
            await producer.send(f"{name} {number}".encode(), key=f"k{number % KEYS}")
            self.confirmed += 1
            self._moved.set()

    def take(self, subscription: str, message: Message) -> None:
        """A key's messages of one producer come in order: none goes ahead of one that never came."""
        name, _, number = message.payload.decode().partition(" ")
        place = int(number) // KEYS
        came = self.came[subscription]
        assert place <= came[name, message.key], f"a key went ahead: {subscription} {message.payload!r}"
        came[name, message.key] = max(came[name, message.key], place + 1)

    async def consume(self, consumer: StreamConsumer | QueueConsumer, subscription: str) -> None:
        while len(self.done[subscription]) < EACH * len(PRODUCERS):
            messages = await consumer.receive_batch(20, timeout=0.1)
            for message in messages:
                self.take(subscription, message)
            for message in messages:
                await consumer.ack(message)
                self.done[subscription].add(message.payload)


async def tell(client: Client, story: Story, happens: Coroutine[Any, Any, None]) -> None:
    """Producers, a stream consumer and two queue consumers with order by key, while something happens."""
    async with AsyncExitStack() as stack, asyncio.timeout(PATIENCE_S * 2):
        work = []
        stream = await stack.enter_async_context(client.stream_consumer(TOPIC, subscription="stream", start=EARLIEST))
        work.append(story.consume(stream, "stream"))
        for _ in range(2):
            queue = client.queue_consumer(TOPIC, subscription="queue", key_ordered=True, start=EARLIEST, prefetch=50)
            work.append(story.consume(await stack.enter_async_context(queue), "queue"))
        for label, name in PRODUCERS.items():
            producer = await stack.enter_async_context(client.producer(TOPIC, name=name))
            work.append(story.publish(producer, label))
        await asyncio.gather(*work, happens)


async def check_stored(client: Client) -> None:
    """Every message is stored once, each producer's in order by key."""
    stored: defaultdict[tuple[str, object], list[int]] = defaultdict(list)
    async with client.reader(TOPIC, start=EARLIEST, stop=LATEST) as reader:
        async for message in reader:
            name, _, number = message.payload.decode().partition(" ")
            stored[name, message.key].append(int(number))
    assert len(stored) == KEYS * len(PRODUCERS)
    for (_, key), numbers in stored.items():
        assert isinstance(key, str)
        assert numbers == list(range(int(key[1:]), EACH, KEYS))


@pytest.mark.parametrize("how", [crash, stop])
async def test_brokers_go_while_producers_and_consumer_groups_are_at_work(
    cluster: Cluster, client: Client, how: Callable[[Cluster, Broker], Coroutine[Any, Any, None]]
) -> None:
    await client.admin.topics.create(TOPIC, shards=4)
    # So that nothing is trimmed, and all can be read in the end.
    await client.admin.subscriptions.create(TOPIC, "keeper", start=EARLIEST)
    story = Story()

    async def two_brokers_go() -> None:
        for point in (EACH // 2, EACH):
            await story.until(point)
            await how(cluster, busiest(cluster))

    await tell(client, story, two_brokers_go())
    assert len(cluster.brokers) == 1
    await check_stored(client)
    for subscription in story.done:
        assert len(story.done[subscription]) == EACH * len(PRODUCERS)


async def test_a_planned_stop_costs_clients_no_lease_and_no_timeout(cluster: Cluster, client: Client) -> None:
    async with client.producer(TOPIC) as producer:
        await producer.send(b"0")
        owner = next(broker for broker in cluster.brokers if len(broker.served))
        stopping = asyncio.create_task(stop(cluster, owner))
        longest_s, number = 0.0, 0
        while not stopping.done() or len(owner.served):
            number += 1
            began = time.monotonic()
            await producer.send(b"%d" % number)
            longest_s = max(longest_s, time.monotonic() - began)
        await stopping
        # No lease ends by itself here: who waited for one would wait for ever. On a quiet machine it is some 100 ms.
        assert longest_s < PATIENCE_S / 2
    async with client.reader(TOPIC, stop=LATEST) as reader:
        assert [message.payload async for message in reader] == [b"%d" % n for n in range(number + 1)]


async def test_a_client_that_was_told_of_one_broker_only_finds_the_others_when_it_dies(
    cluster: Cluster, brokers: list[Broker]
) -> None:
    async with connect(brokers[0].address, timeout=PATIENCE_S) as client:
        async with client.producer(TOPIC) as producer:
            await producer.send(b"0")
            while busiest(cluster) is not brokers[0]:
                # Whoever serves it goes, until that is the only broker that the client was told of.
                await stop(cluster, busiest(cluster))
                await producer.send(b"0")
            spare = await cluster.start_broker("spare")
            await eventually(lambda: spare.address in client._parts.brokers.known())  # type: ignore[union-attr]
            await crash(cluster, brokers[0])
            await producer.send(b"last")
        assert len(busiest(cluster).served) == 1


async def test_a_client_leaves_an_owner_that_fell_silent_as_soon_as_another_one_took_over(
    cluster: Cluster, brokers: list[Broker], client: Client
) -> None:
    """Its connection stands: the process was stopped, or a cable pulled. gRPC would notice after many seconds."""
    async with (
        client.producer(TOPIC) as producer,
        client.stream_consumer(TOPIC, subscription="s", start=EARLIEST) as consumer,
    ):
        await producer.send(b"0")
        assert (await consumer.receive()).payload == b"0"
        owner = busiest(cluster)
        (shard,) = owner.served
        # From now on it answers nothing, and tells nobody that it does not serve the shard any more.
        shard.log.abandon()
        receipt = producer.send_nowait(b"1")
        await asyncio.sleep(0)
        await owner.ownership.close()
        async with asyncio.timeout(5):
            await receipt
            assert (await consumer.receive()).payload == b"1"
        assert busiest(cluster) is owner or owner.served.get(shard.shard_id) is shard


async def test_administration_through_any_server_survives_the_death_of_the_owner(
    cluster: Cluster, client: Client
) -> None:
    async with client.producer(TOPIC) as producer:
        await producer.send(b"0")
    await client.admin.subscriptions.create(TOPIC, "audit", start=EARLIEST)
    await crash(cluster, busiest(cluster))
    assert (await client.admin.subscriptions.describe(TOPIC, "audit")).backlog_messages == 1
    [cursor] = await client.admin.subscriptions.seek(TOPIC, "audit", LATEST)
    assert cursor.floor == 1
    assert [s.backlog_messages for s in await client.admin.subscriptions.list(TOPIC)] == [0]
    [shard] = (await client.admin.topics.describe(TOPIC)).shards
    assert (shard.owner, shard.end_offset) == (busiest(cluster).settings.id, 1)
    await client.admin.topics.delete(TOPIC)
    assert await client.admin.topics.list() == []


async def test_brokers_of_opposite_opinions_do_not_wear_out_a_client(
    cluster: Cluster, brokers: list[Broker], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each names the other as the owner; once one of them gives way the client goes on."""
    a, b = brokers[:2]
    asked: list[str] = []
    real = {broker: broker.shard for broker in (a, b)}

    def disagree(broker: Broker, other: Broker) -> None:
        from magnetar.broker.refusals import not_owner

        async def shard(topic: str, shard_id: int) -> Any:
            asked.append(broker.settings.id)
            if len(asked) < 8:
                raise not_owner(shard_id, other.address)
            return await real[broker](topic, shard_id)

        monkeypatch.setattr(broker, "shard", shard)

    await stop(cluster, brokers[2])
    disagree(a, b)
    disagree(b, a)
    began = time.monotonic()
    async with connect(a.address, timeout=PATIENCE_S) as client, client.producer(TOPIC) as producer:
        await producer.send(b"0")
    # It waited longer and longer between the attempts: at least half of 20 + 40 + 80 ms and so on.
    assert time.monotonic() - began > 0.5 * sum(0.02 * 2**n for n in range(5))
    assert set(asked) == {"broker0", "broker1"}


async def test_a_greeting_of_another_age_is_refused_with_both_ranges(cluster: Cluster, brokers: list[Broker]) -> None:
    import grpc.aio

    from magnetar.v1 import broker_pb2

    hello = common_pb2.Hello(protocol_min=7, protocol_max=9, name="from the future")
    async with grpc.aio.insecure_channel(brokers[0].address) as channel:
        for method, request, answer in (
            ("Produce", broker_pb2.ProduceRequest(hello=hello), broker_pb2.ProduceResponse),
            ("Consume", broker_pb2.ConsumeRequest(hello=hello), broker_pb2.ConsumeResponse),
        ):
            call = channel.stream_stream(f"/magnetar.v1.BrokerService/{method}")()
            await call.write(request.SerializeToString())
            error = answer.FromString(await call.read()).error
            assert error.reason == common_pb2.ERROR_REASON_UNSUPPORTED_VERSION
            assert "client=`7-9`" in error.message
            assert "server=`1-1`" in error.message
