"""Consumers whose broker goes away: nothing lost, nothing seen twice, acknowledgements kept."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Callable
from contextlib import suppress

import pytest
from scripted_broker import Fate, ScriptedBroker, ScriptedCluster, Shard, Stream, error

from magnetar.client import (
    EARLIEST,
    LATEST,
    Batching,
    Client,
    ClusterUnavailable,
    InvalidArgument,
    Message,
    MessageId,
    connect,
)
from magnetar.v1 import broker_pb2


@pytest.fixture
async def shard(cluster: ScriptedCluster, client: Client) -> Shard:
    """A hundred messages in ten batches."""
    (shard,) = cluster.create("clicks").shards.values()
    async with client.producer("clicks", batching=Batching(max_messages=10)) as producer:
        await producer.send_many([b"%d" % number for number in range(100)])
    return shard


def numbers(messages: list[Message]) -> list[int]:
    return [int(message.payload) for message in messages]


async def take(consumer: object, count: int) -> list[Message]:
    return [await consumer.receive(timeout=10) for _ in range(count)]  # type: ignore[attr-defined]


async def reopened(cluster: ScriptedCluster, broker: ScriptedBroker) -> None:
    """Break all streams, and wait until a consumer is back."""
    before = len(cluster.consumer_opens)
    broker.cut()
    await cluster.until(lambda: len(cluster.consumer_opens) > before)


@pytest.mark.parametrize("acked", [None, 3, 11, 54])
@pytest.mark.parametrize("taken", [0, 1, 15, 55])
async def test_a_stream_goes_on_without_repeating_what_was_given_out(
    cluster: ScriptedCluster, broker: ScriptedBroker, client: Client, shard: Shard, taken: int, acked: int | None
) -> None:
    async with client.stream_consumer("clicks", subscription="s", start=EARLIEST) as consumer:
        messages = await take(consumer, taken)
        if acked is not None and acked < taken:
            await consumer.ack(messages[acked])
        await reopened(cluster, broker)
        messages += await take(consumer, 100 - taken)
        assert numbers(messages) == list(range(100))
        # Messages from before are still good for acknowledging.
        await consumer.ack(messages[min(taken, 99)])
        assert shard.subscriptions["s"].floor == min(taken, 99) + 1
        assert await consumer.receive_batch(timeout=0.01) == []


async def test_an_acknowledgement_whose_answer_was_lost_is_sent_again(
    cluster: ScriptedCluster, client: Client, shard: Shard
) -> None:
    for kind, fate in ((client.stream_consumer, Fate.STORE_AND_CUT), (client.queue_consumer, Fate.CUT)):
        fates = [fate]
        cluster.on_ack = lambda fates=fates: fates.pop() if fates else Fate.STORE  # type: ignore[misc]
        async with kind("clicks", subscription=fate.name, start=EARLIEST) as consumer:
            messages = await take(consumer, 10)
            await consumer.ack(messages[9])
            assert not fates
            state = shard.subscriptions[fate.name]
            assert state.is_acked(9)


async def test_a_queue_names_what_it_holds_and_does_not_get_it_again(
    cluster: ScriptedCluster, broker: ScriptedBroker, client: Client, shard: Shard
) -> None:
    async with client.queue_consumer("clicks", subscription="q", start=EARLIEST, prefetch=40) as consumer:
        messages = await take(consumer, 20)
        await consumer.ack(messages[4])
        consumer.nack(messages[6])
        await asyncio.sleep(0)
        await reopened(cluster, broker)
        seen = numbers(messages) + numbers(await take(consumer, 81))
        # Only what was given back came twice.
        assert Counter(seen) == Counter([*range(100), 6])
        held = [(r.start, r.end) for r in cluster.consumer_opens[-1].held]
        assert held[:3] == [(0, 4), (5, 6), (7, held[2][1])] or held[:2] == [(0, 4), (5, held[1][1])]
        for message in messages:
            consumer.ack(message)
    assert set(range(20)) - {6} <= shard.subscriptions["q"].acked


async def test_what_a_queue_acknowledged_without_an_answer_is_named_too(
    cluster: ScriptedCluster, broker: ScriptedBroker, client: Client, shard: Shard
) -> None:
    dropped: list[Fate] = []
    cluster.on_ack = lambda: dropped.append(Fate.DROP) or dropped[-1]  # type: ignore[func-returns-value]
    async with client.queue_consumer("clicks", subscription="q", start=EARLIEST) as consumer:
        messages = await take(consumer, 100)
        for message in messages[:50]:
            consumer.ack(message)
        await cluster.until(lambda: bool(dropped))
        cluster.on_ack = lambda: Fate.STORE
        await reopened(cluster, broker)
        assert [(r.start, r.end) for r in cluster.consumer_opens[-1].held] == [(0, 100)]
        await consumer.ack(messages[50])
        assert await consumer.receive_batch(timeout=0.01) == []
    assert shard.subscriptions["q"].acked == set(range(51))


async def test_a_shard_that_moved_is_followed(cluster: ScriptedCluster, client: Client, shard: Shard) -> None:
    other = await cluster.broker()
    async with client.stream_consumer("clicks", subscription="s", start=EARLIEST) as consumer:
        messages = await take(consumer, 10)
        cluster.move(shard, other)
        cluster.brokers[0].cut()
        messages += await take(consumer, 90)
        assert numbers(messages) == list(range(100))
        await consumer.ack(messages[-1])
    assert shard.subscriptions["s"].floor == 100


async def test_a_late_answer_of_the_former_owner_answers_nothing_that_the_new_one_was_asked(
    cluster: ScriptedCluster, broker: ScriptedBroker, client: Client, shard: Shard
) -> None:
    """Both count requests from one on: else an acknowledgement that nobody stored would pass for a durable one."""
    other = await cluster.broker()
    cluster.create("views")
    asked: list[Fate] = []
    cluster.on_ack = lambda: asked.append(Fate.DROP) or asked[-1]  # type: ignore[func-returns-value]
    async with client.queue_consumer("clicks", subscription="q", start=EARLIEST) as consumer:
        messages = await take(consumer, 10)
        acked = consumer.ack(messages[0])
        await cluster.until(lambda: len(asked) == 1)
        (session,) = shard.subscriptions["q"].sessions
        cluster.move(shard, other)
        broker._detach(session)
        moved = broker_pb2.ConsumerError(handle=session.handle, error=error("NOT_OWNER", owner=other.address))
        session.stream.say(broker_pb2.ConsumeResponse(errors=[moved]))
        await cluster.until(lambda: len(asked) == 2)
        session.stream.say(broker_pb2.ConsumeResponse(acks=[broker_pb2.AckResult(request_id=1)]))
        async with client.reader("views", start=EARLIEST, stop=LATEST) as reader:
            assert [message async for message in reader] == []  # it is answered on the same stream, behind that
        cluster.on_ack = lambda: Fate.STORE
        other.cut()
        await acked
    assert shard.subscriptions["q"].acked == {0}


async def test_a_consumer_whose_shard_moves_while_it_closes_is_closed_all_the_same(
    cluster: ScriptedCluster, client: Client, shard: Shard
) -> None:
    async with client.stream_consumer("clicks", subscription="s", start=EARLIEST) as consumer:
        messages = await take(consumer, 10)
        await consumer.ack(messages[-1])
        cluster.on_close = lambda: error("NOT_OWNER", "shard was released")
    assert shard.subscriptions["s"].floor == 10


async def test_acknowledgements_that_were_dropped_with_their_handle_are_sent_again_before_it_is_closed(
    cluster: ScriptedCluster, client: Client, shard: Shard
) -> None:
    fates = [Fate.DROP]
    async with client.stream_consumer("clicks", subscription="s", start=EARLIEST) as consumer:
        messages = await take(consumer, 10)
        cluster.on_ack = lambda: fates.pop() if fates else Fate.STORE
        consumer.ack(messages[-1])
    assert not fates
    assert shard.subscriptions["s"].floor == 10


async def test_a_reader_sent_to_an_owner_that_was_replaced_waits_for_the_right_one(
    cluster: ScriptedCluster, broker: ScriptedBroker, client: Client, shard: Shard
) -> None:
    """Its log ends where the shard was taken from it: the reader's place lies beyond."""
    refusals = [error("INVALID_ARGUMENT", "the offset is beyond the end")] * 2
    async with client.reader("clicks", start=EARLIEST) as reader:
        messages = await take(reader, 50)
        cluster.on_reader = lambda: refusals.pop() if refusals else None
        broker.cut()
        await cluster.until(lambda: not refusals)
        assert numbers(messages + await take(reader, 50)) == list(range(100))


async def test_a_consumer_that_stood_by_takes_over_at_the_floor(client: Client, shard: Shard) -> None:
    async with (
        client.stream_consumer("clicks", subscription="s", start=EARLIEST) as first,
        client.stream_consumer("clicks", subscription="s") as second,
    ):
        messages = await take(first, 30)
        await first.ack(messages[13])
        assert await second.receive_batch(timeout=0.01) == []
        await first.close()
        assert numbers(await take(second, 86)) == list(range(14, 100))


async def test_a_consumer_that_lost_its_place_and_gets_it_back_repeats_nothing(
    cluster: ScriptedCluster, broker: ScriptedBroker, client: Client, shard: Shard
) -> None:
    async with (
        connect(broker.address, timeout=20) as rival_client,
        client.stream_consumer("clicks", subscription="s", start=EARLIEST) as consumer,
    ):
        messages = await take(consumer, 5)
        async with rival_client.stream_consumer("clicks", subscription="s") as rival:
            state = shard.subscriptions["s"]
            # The first connection breaks; the rival, which stood by, is active and goes on to 20.
            before = len(cluster.consumer_opens)
            state.sessions[0].stream.cut()
            await cluster.until(lambda: len(cluster.consumer_opens) > before)
            theirs = await take(rival, 40)
            assert numbers(theirs) == list(range(40))
            await rival.ack(theirs[19])
        rest = await take(consumer, 85)
        # The rest of a batch that was begun still comes; what waited behind it was the rival's business up to 20.
        assert numbers(messages + rest) == [*range(10), *range(20, 100)]
        await consumer.ack(rest[-1])
        assert state.floor == 100


async def test_a_subscription_that_was_moved_back_meanwhile_is_read_from_there(
    cluster: ScriptedCluster, broker: ScriptedBroker, client: Client, shard: Shard
) -> None:
    async with client.stream_consumer("clicks", subscription="s", start=EARLIEST) as consumer:
        messages = await take(consumer, 60)
        await consumer.ack(messages[49])
        cluster.on_open = lambda shard: error("UNAVAILABLE")
        await reopened(cluster, broker)
        broker.seek(shard, shard.subscriptions["s"], 20)
        cluster.on_open = lambda shard: None
        received = await take(consumer, 1)
        while received[-1].payload != b"20":
            received += await take(consumer, 1)
        assert numbers(await take(consumer, 5)) == list(range(21, 26))


async def test_what_others_did_meanwhile_is_not_given_out_from_what_waits_here(
    cluster: ScriptedCluster, broker: ScriptedBroker, client: Client, shard: Shard
) -> None:
    async with client.stream_consumer("clicks", subscription="s", start=EARLIEST) as consumer:
        messages = await take(consumer, 60)
        cluster.on_open = lambda shard: error("UNAVAILABLE")
        await reopened(cluster, broker)
        broker.seek(shard, shard.subscriptions["s"], 85)
        cluster.on_open = lambda shard: None
        # Its answer comes after the opening's.
        await consumer.ack(messages[0])
        assert numbers(await take(consumer, 15)) == list(range(85, 100))


async def test_what_was_under_way_before_a_seek_is_dropped_when_it_comes_after_it(
    broker: ScriptedBroker, client: Client, shard: Shard
) -> None:
    async with client.stream_consumer("clicks", subscription="s", start=EARLIEST) as consumer:
        await take(consumer, 50)
        (session,) = shard.subscriptions["s"].sessions
        old = shard.subscriptions["s"].cursor_epoch
        original = broker._seek

        def seek(stream: Stream, seek: broker_pb2.Seek) -> None:
            original(stream, seek)
            first, data, _ = shard.log[7]
            late = broker_pb2.Delivery(handle=session.handle, cursor_epoch=old, first_offset=first, batch=data)
            stream.say(broker_pb2.ConsumeResponse(deliveries=[late]))

        broker._seek = seek  # type: ignore[method-assign]
        await consumer.seek(MessageId(shard.shard_id, 5))
        assert numbers(await take(consumer, 95)) == list(range(5, 100))


async def test_a_seek_survives_a_broken_connection(
    cluster: ScriptedCluster, broker: ScriptedBroker, client: Client, shard: Shard
) -> None:
    async with client.stream_consumer("clicks", subscription="s", start=EARLIEST) as consumer:
        await take(consumer, 50)
        original = broker._seek
        broker._seek = lambda stream, seek: stream.cut()  # type: ignore[method-assign]
        seeking = asyncio.create_task(consumer.seek(EARLIEST))
        await cluster.until(lambda: len(cluster.consumer_opens) > 1)
        broker._seek = original  # type: ignore[method-assign]
        await seeking
        assert numbers(await take(consumer, 100)) == list(range(100))


async def test_a_seek_that_is_refused_leaves_everything_to_be_delivered(
    broker: ScriptedBroker, client: Client, shard: Shard
) -> None:
    async with client.stream_consumer("clicks", subscription="s", start=EARLIEST) as consumer:
        messages = await take(consumer, 50)
        await consumer.ack(messages[29])
        broker._seek = lambda stream, seek: stream.say(  # type: ignore[method-assign]
            broker_pb2.ConsumeResponse(
                acks=[broker_pb2.AckResult(request_id=seek.request_id, error=error("INVALID_ARGUMENT", "not there"))]
            )
        )
        with pytest.raises(InvalidArgument, match="not there"):
            await consumer.seek(EARLIEST)
        rest = await take(consumer, 70)
        assert numbers(rest) == list(range(30, 100))
        await consumer.ack(rest[-1])


async def test_a_shard_out_of_reach_is_an_error_once_and_receiving_goes_on_when_it_is_back(
    cluster: ScriptedCluster, broker: ScriptedBroker, connecting: Callable[[float], Client], shard: Shard
) -> None:
    async with (
        connecting(1.0) as client,
        client.stream_consumer("clicks", subscription="s", start=EARLIEST) as consumer,
    ):
        messages = await take(consumer, 100)
        port = int(broker.address.rpartition(":")[2])
        await broker.stop()
        with pytest.raises(ClusterUnavailable, match="shard=`1`"):
            await consumer.receive(timeout=10)
        await broker.start(port)
        while shard.subscriptions["s"].floor < 100:
            # As long as it is not back, each of these fails.
            with suppress(ClusterUnavailable):
                await consumer.ack(messages[-1])
    assert shard.subscriptions["s"].floor == 100


async def test_an_acknowledgement_without_an_answer_fails_after_the_timeout_and_says_it_is_unknown(
    cluster: ScriptedCluster, connecting: Callable[[float], Client], shard: Shard
) -> None:
    cluster.on_ack = lambda: Fate.DROP
    async with (
        connecting(1.0) as client,
        client.stream_consumer("clicks", subscription="s", start=EARLIEST) as consumer,
    ):
        messages = await take(consumer, 10)
        with pytest.raises(ClusterUnavailable, match="may or may not be durable"):
            await consumer.ack(messages[3])
        consumer.ack(messages[4])
        assert len(await consumer.receive_batch(max_messages=1000)) == 90
        with pytest.raises(ClusterUnavailable):
            await consumer.receive(timeout=10)
        cluster.on_ack = lambda: Fate.STORE


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("kind", ["stream", "queue"])
async def test_under_random_failures_every_message_is_seen_once_and_ends_acknowledged(
    cluster: ScriptedCluster, broker: ScriptedBroker, kind: str, seed: int
) -> None:
    rng = random.Random(seed)
    other = await cluster.broker()
    topic = cluster.create("clicks", shards=2)
    async with connect(broker.address, timeout=30) as client:
        async with client.producer("clicks", batching=Batching(max_messages=9)) as producer:
            keys = [f"k{n % 40}" for n in range(600)]
            await producer.send_many([b"%d" % n for n in range(600)], keys=keys)

        def fate() -> Fate:
            dice = rng.random()
            if dice < 0.1:
                return rng.choice([Fate.CUT, Fate.STORE_AND_CUT])
            if dice < 0.13:
                cluster.move(rng.choice(list(topic.shards.values())), rng.choice([broker, other]))
                for one in cluster.brokers:
                    one.cut()
            return Fate.STORE

        cluster.on_ack = fate
        seen: Counter[int] = Counter()
        order: dict[object, list[int]] = {}
        if kind == "stream":
            consumer = client.stream_consumer("clicks", subscription="s", start=EARLIEST)
        else:
            consumer = client.queue_consumer("clicks", subscription="s", start=EARLIEST, prefetch=50)  # type: ignore[assignment]
        async with consumer:
            while seen.total() < 600:
                for message in await consumer.receive_batch(max_messages=rng.randint(1, 30), timeout=10):
                    seen[int(message.payload)] += 1
                    order.setdefault(message.key, []).append(int(message.payload))
                    consumer.ack(message)
                await asyncio.sleep(0)
            cluster.on_ack = lambda: Fate.STORE
        assert seen == Counter(range(600))
        if kind == "stream":
            assert all(found == sorted(found) for found in order.values())
        for shard in topic.shards.values():
            state = shard.subscriptions["s"]
            assert all(state.is_acked(offset) for offset in range(shard.end))
