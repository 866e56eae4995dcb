"""Receiving and acknowledging while nothing breaks."""

from __future__ import annotations

import asyncio

import pytest
from scripted_broker import ScriptedBroker, ScriptedCluster, Shard, error

from magnetar.client import (
    EARLIEST,
    LATEST,
    Batching,
    Client,
    ConsumerBusy,
    EndOfTopic,
    InvalidArgument,
    Message,
    MessageId,
    TopicNotFound,
)

TOPIC = "public/default/clicks"


@pytest.fixture
def shard(cluster: ScriptedCluster) -> Shard:
    (shard,) = cluster.create("clicks").shards.values()
    return shard


@pytest.fixture
async def hundred(shard: Shard, client: Client) -> Shard:
    """A hundred messages in ten batches."""
    async with client.producer("clicks", batching=Batching(max_messages=10)) as producer:
        await producer.send_many([b"%d" % number for number in range(100)])
    return shard


def numbers(messages: list[Message]) -> list[int]:
    return [int(message.payload) for message in messages]


async def take(consumer: object, count: int) -> list[Message]:
    return [await consumer.receive(timeout=5) for _ in range(count)]  # type: ignore[attr-defined]


async def test_a_stream_delivers_in_order_and_acknowledges_cumulatively(client: Client, hundred: Shard) -> None:
    async with client.stream_consumer("clicks", subscription="s", start=EARLIEST) as consumer:
        messages = await take(consumer, 50)
        assert numbers(messages) == list(range(50))
        await consumer.ack(messages[29])
        assert hundred.subscriptions["s"].floor == 30
    async with client.stream_consumer("clicks", subscription="s") as consumer:
        assert numbers(await take(consumer, 3)) == [30, 31, 32]


async def test_latest_is_where_the_subscription_was_when_the_block_was_entered(client: Client, hundred: Shard) -> None:
    async with client.stream_consumer("clicks", subscription="s") as consumer, client.producer("clicks") as producer:
        await producer.send(b"100")
        assert numbers([await consumer.receive(timeout=5)]) == [100]


async def test_closing_makes_durable_what_was_acknowledged(client: Client, hundred: Shard) -> None:
    async with client.stream_consumer("clicks", subscription="s", start=EARLIEST) as consumer:
        for message in await take(consumer, 100):
            consumer.ack(message)
    assert hundred.subscriptions["s"].floor == 100
    assert hundred.subscriptions["s"].sessions == []


async def test_acknowledgements_of_one_moment_share_an_answer(client: Client, hundred: Shard) -> None:
    async with client.queue_consumer("clicks", subscription="q", start=EARLIEST) as consumer:
        acks = [consumer.ack(message) for message in await take(consumer, 40)]
        await acks[-1]
        assert all(ack.done() for ack in acks)
        assert hundred.subscriptions["q"].acked == set(range(40))


async def test_receive_waits_no_longer_than_asked(client: Client, shard: Shard) -> None:
    async with client.stream_consumer("clicks", subscription="s") as consumer:
        with pytest.raises(TimeoutError):
            await consumer.receive(timeout=0.01)
        assert await consumer.receive_batch(timeout=0.01) == []
        assert await consumer.receive_batch(timeout=0) == []


async def test_receive_batch_gives_what_is_here_up_to_a_limit(client: Client, hundred: Shard) -> None:
    async with client.stream_consumer("clicks", subscription="s", start=EARLIEST) as consumer:
        first = await consumer.receive(timeout=5)
        rest: list[Message] = []
        while len(rest) < 99:
            batch = await consumer.receive_batch(max_messages=7, timeout=5)
            assert 1 <= len(batch) <= 7
            rest += batch
        assert numbers([first, *rest]) == list(range(100))
        with pytest.raises(InvalidArgument):
            await consumer.receive_batch(max_messages=0)


async def test_several_tasks_may_receive_from_one_consumer(client: Client, hundred: Shard) -> None:
    async with client.queue_consumer("clicks", subscription="q", start=EARLIEST) as consumer:
        groups = await asyncio.gather(*(take(consumer, 20) for _ in range(5)))
        assert sorted(number for group in groups for number in numbers(group)) == list(range(100))


async def test_columns_are_the_same_messages(client: Client, cluster: ScriptedCluster) -> None:
    cluster.create("clicks")
    async with client.producer("clicks") as producer:
        for number in range(5):
            key = None if number == 2 else f"k{number}"
            producer.send_nowait(b"%d" % number, key=key, properties={"n": str(number)} if number else None)
    async with client.stream_consumer("clicks", subscription="s", start=EARLIEST) as consumer:
        first = await consumer.receive(timeout=5)
        assert first.payload == b"0"
        columns = await anext(consumer.batches())
        assert columns.payloads == [b"1", b"2", b"3", b"4"]
        assert columns.keys == ["k1", None, "k3", "k4"]
        assert list(columns.offsets) == [1, 2, 3, 4]
        assert [dict(pairs) for pairs in columns.properties] == [{"n": str(n)} for n in range(1, 5)]
        assert (columns.topic, columns.shard, len(columns)) == (TOPIC, 1, 4)
        assert [message.id for message in columns] == [MessageId(1, n) for n in range(1, 5)]
        table = columns.to_arrow()
        assert table.column("payload").to_pylist() == columns.payloads
        await consumer.ack(columns)
        assert cluster.topics[TOPIC].shards[1].subscriptions["s"].floor == 5


async def test_a_queue_acknowledges_one_by_one_and_whole_batches(client: Client, hundred: Shard) -> None:
    async with client.queue_consumer("clicks", subscription="q", start=EARLIEST) as consumer:
        messages = await take(consumer, 3)
        await consumer.ack(messages[1])
        assert hundred.subscriptions["q"].acked == {1}
        async for columns in consumer.batches():
            await consumer.ack(columns)
            if 9 in columns.offsets:
                break
        assert hundred.subscriptions["q"].acked == {1, *range(3, 10)}
        # Acknowledging what is not held any more does nothing.
        await consumer.ack(messages[1])


async def test_what_is_given_back_comes_again_at_once_and_counts(client: Client, hundred: Shard) -> None:
    async with client.queue_consumer("clicks", subscription="q", start=EARLIEST) as consumer:
        messages = await take(consumer, 100)
        await consumer.nack(messages[7])
        again = await consumer.receive(timeout=5)
        assert (again.id, again.redelivery_count) == (messages[7].id, 1)
        await consumer.ack(again)
        assert hundred.subscriptions["q"].acked == {7}


async def test_a_block_acknowledges_or_gives_back(client: Client, hundred: Shard) -> None:
    async with client.queue_consumer("clicks", subscription="q", start=EARLIEST) as consumer:
        async with await consumer.receive(timeout=5):
            pass
        message = await consumer.receive(timeout=5)
        with pytest.raises(ZeroDivisionError):
            async with message:
                raise ZeroDivisionError
        with pytest.raises(InvalidArgument, match="async with"), message:
            pass
        seen = await take(consumer, 99)
        assert [m.redelivery_count for m in seen if m.id.offset == 1] == [1]
    assert hundred.subscriptions["q"].acked == {0}


async def test_only_a_queue_has_blocks_and_each_consumer_its_own_messages(client: Client, hundred: Shard) -> None:
    async with (
        client.stream_consumer("clicks", subscription="a", start=EARLIEST) as one,
        client.stream_consumer("clicks", subscription="b", start=EARLIEST) as other,
        client.reader("clicks") as reader,
    ):
        message = await one.receive(timeout=5)
        with pytest.raises(InvalidArgument, match="queue"):
            async with message:
                pass
        with pytest.raises(InvalidArgument, match="another consumer"):
            other.ack(message)
        with pytest.raises(InvalidArgument):
            one.ack(await reader.receive(timeout=5))
        with pytest.raises(InvalidArgument, match="bytes"):
            one.ack(b"x")  # type: ignore[arg-type]


@pytest.mark.parametrize("prefetch", [1, 3, 8])
async def test_a_queue_has_no_more_here_than_it_asked_for(client: Client, hundred: Shard, prefetch: int) -> None:
    async with client.queue_consumer("clicks", subscription="q", start=EARLIEST, prefetch=prefetch) as consumer:
        (session,) = hundred.subscriptions["q"].sessions
        seen: list[int] = []
        for _ in range(100):
            message = await consumer.receive(timeout=5)
            seen.append(int(message.payload))
            consumer.ack(message)
            delivered = max(session.pending, default=0) + 1
            assert delivered - len(seen) <= prefetch + prefetch // 4
    assert seen == list(range(100))


async def test_a_stream_reads_on_however_much_there_is(client: Client, shard: Shard) -> None:
    async with client.producer("clicks", batching=Batching(max_messages=100)) as producer:
        await producer.send_many([bytes(20_000)] * 5000)
    async with client.stream_consumer("clicks", subscription="s", start=EARLIEST) as consumer:
        count = 0
        async for columns in consumer.batches():
            count += len(columns)
            if count == 5000:
                break


async def test_a_seek_moves_the_subscription_and_voids_what_was_delivered(client: Client, hundred: Shard) -> None:
    async with client.stream_consumer("clicks", subscription="s", start=EARLIEST) as consumer:
        messages = await take(consumer, 20)
        await consumer.seek(MessageId(1, 5))
        assert numbers(await take(consumer, 3)) == [5, 6, 7]
        await consumer.ack(messages[19])
        assert hundred.subscriptions["s"].floor == 5
        await consumer.seek(LATEST)
        assert await consumer.receive_batch(timeout=0.01) == []
        await consumer.seek(EARLIEST)
        messages = await take(consumer, 100)
        assert numbers(messages) == list(range(100))
        await consumer.ack(messages[-1])
        assert hundred.subscriptions["s"].floor == 100
        with pytest.raises(InvalidArgument, match="no such shard"):
            await consumer.seek(MessageId(99, 0))


async def test_a_seek_of_a_queue_delivers_again_what_was_acknowledged(client: Client, hundred: Shard) -> None:
    async with client.queue_consumer("clicks", subscription="q", start=EARLIEST) as consumer:
        for message in await take(consumer, 60):
            consumer.ack(message)
        await consumer.seek(MessageId(1, 50))
        assert numbers(await take(consumer, 50)) == list(range(50, 100))


async def test_a_seek_by_somebody_else_voids_what_was_delivered(
    client: Client, hundred: Shard, broker: ScriptedBroker
) -> None:
    async with client.stream_consumer("clicks", subscription="s", start=EARLIEST) as consumer:
        messages = await take(consumer, 60)
        broker.seek(hundred, hundred.subscriptions["s"], 10)
        broker._dispatch(hundred)
        received = [await consumer.receive(timeout=5)]
        while received[-1].payload != b"10":
            received.append(await consumer.receive(timeout=5))
        assert numbers(await take(consumer, 2)) == [11, 12]
        await consumer.ack(messages[-1])
        assert hundred.subscriptions["s"].floor == 10


async def test_another_type_of_consumer_is_refused_at_the_door(client: Client, hundred: Shard) -> None:
    async with client.queue_consumer("clicks", subscription="s", start=EARLIEST):
        with pytest.raises(ConsumerBusy):
            async with client.stream_consumer("clicks", subscription="s"):
                raise AssertionError


async def test_all_shards_are_read(cluster: ScriptedCluster, client: Client) -> None:
    cluster.create("wide", shards=5)
    async with client.producer("wide") as producer:
        await producer.send_many([b"%d" % n for n in range(200)], keys=[f"k{n}" for n in range(200)])
    async with client.stream_consumer("wide", subscription="s", start=EARLIEST) as consumer:
        assert sorted(numbers(await take(consumer, 200))) == list(range(200))


async def test_a_topic_that_is_deleted_ends_its_consumers(
    client: Client, cluster: ScriptedCluster, shard: Shard
) -> None:
    async with client.stream_consumer("clicks", subscription="s") as consumer:
        cluster.on_open = lambda shard: error("TOPIC_NOT_FOUND", "the topic was deleted")
        cluster.brokers[0].cut()
        with pytest.raises(TopicNotFound, match="was deleted"):
            await consumer.receive(timeout=5)
        with pytest.raises(TopicNotFound):
            await consumer.receive_batch(timeout=0)


class TestReader:
    """Reading without a subscription."""

    async def test_with_a_stop_it_ends_where_the_end_was(self, client: Client, hundred: Shard) -> None:
        async with client.reader("clicks", stop=LATEST) as reader, client.producer("clicks") as producer:
            await producer.send(b"too late")
            assert numbers([message async for message in reader]) == list(range(100))
            assert await reader.receive_batch(timeout=5) == []
            with pytest.raises(EndOfTopic):
                await reader.receive(timeout=5)
        async with client.reader("clicks", start=LATEST, stop=LATEST) as reader:
            assert [columns async for columns in reader.batches()] == []

    async def test_without_a_stop_it_follows(self, client: Client, hundred: Shard) -> None:
        async with client.reader("clicks", start=LATEST) as reader, client.producer("clicks") as producer:
            await producer.send(b"100")
            assert numbers([await reader.receive(timeout=5)]) == [100]

    async def test_it_begins_at_a_message_inside_a_batch(self, client: Client, hundred: Shard) -> None:
        async with client.reader("clicks", start=MessageId(1, 37), stop=LATEST) as reader:
            assert numbers([message async for message in reader]) == list(range(37, 100))

    async def test_a_message_is_a_start_in_a_topic_of_one_shard(self, cluster: ScriptedCluster, client: Client) -> None:
        cluster.create("wide", shards=2)
        for start in (MessageId(1, 0), MessageId(9, 0)):
            with pytest.raises(InvalidArgument, match="shard"):
                async with client.reader("wide", start=start):
                    raise AssertionError

    async def test_after_a_broken_connection_it_goes_on_where_it_was(
        self, client: Client, hundred: Shard, broker: ScriptedBroker
    ) -> None:
        async with client.reader("clicks", stop=LATEST) as reader:
            seen = numbers(await take(reader, 25))
            broker.cut()
            seen += numbers([message async for message in reader])
        assert seen == list(range(100))
