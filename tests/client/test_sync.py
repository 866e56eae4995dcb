"""The blocking client: the same things, from ordinary threads."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Iterator
from concurrent.futures import Future

import pytest
from scripted_broker import Fate, ScriptedCluster, error

from magnetar.client import ClientClosed, InvalidArgument, MessageTooLarge, QueueFull
from magnetar.client.sync import EARLIEST, LATEST, Batching, Client, MessageId, connect


@pytest.fixture
def cluster() -> Iterator[ScriptedCluster]:
    """Served by a loop in another thread."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()

    async def start() -> ScriptedCluster:
        cluster = ScriptedCluster()
        await cluster.broker()
        return cluster

    cluster = asyncio.run_coroutine_threadsafe(start(), loop).result()
    yield cluster
    asyncio.run_coroutine_threadsafe(cluster.stop(), loop).result()
    loop.call_soon_threadsafe(loop.stop)
    thread.join()
    loop.close()


@pytest.fixture
def client(cluster: ScriptedCluster) -> Iterator[Client]:
    with connect(cluster.brokers[0].address, timeout=20) as client:
        yield client


def test_everything_that_is_sent_is_received(client: Client) -> None:
    with client.producer("clicks") as producer:
        assert producer.topic == "public/default/clicks"
        first = producer.send(b"0", key="k", properties={"a": "b"})
        futures = [producer.send_nowait(b"%d" % number) for number in range(1, 50)]
        ids = producer.send_many([b"%d" % number for number in range(50, 100)])
        producer.flush()
        assert [first, *(future.result(5) for future in futures), *ids] == [MessageId(1, n) for n in range(100)]
    with client.stream_consumer("clicks", subscription="s", start=EARLIEST) as consumer:
        message = consumer.receive(timeout=5)
        assert (message.payload, message.key, dict(message.properties)) == (b"0", "k", {"a": "b"})
        rest = consumer.receive_batch(max_messages=9, timeout=5)
        for message in consumer:
            rest.append(message)
            if len(rest) == 99:
                break
        assert [int(message.payload) for message in rest] == list(range(1, 100))
        consumer.ack(rest[-1]).result(5)
        with pytest.raises(TimeoutError):
            consumer.receive(timeout=0.01)
        assert consumer.receive_batch(timeout=0.01) == []


def test_columns_go_on_where_messages_stopped(client: Client) -> None:
    with client.producer("clicks", batching=Batching(max_messages=40)) as producer:
        producer.send_many([b"%d" % number for number in range(100)])
    with client.reader("clicks", stop=LATEST) as reader:
        seen = [next(reader).payload for _ in range(5)]
        for columns in reader.batches():
            seen += columns.payloads
    assert [int(payload) for payload in seen] == list(range(100))


def test_a_reader_with_a_stop_ends(client: Client) -> None:
    with client.producer("clicks") as producer:
        producer.send_many([b"x"] * 1000)
    with client.reader("clicks", start=EARLIEST, stop=LATEST) as reader:
        assert sum(1 for _ in reader) == 1000


def test_a_block_acknowledges_or_gives_back(cluster: ScriptedCluster, client: Client) -> None:
    with client.producer("clicks") as producer:
        producer.send_many([b"0", b"1"])
    with client.queue_consumer("clicks", subscription="q", start=EARLIEST) as queue:
        with queue.receive(timeout=5):
            pass
        message = queue.receive(timeout=5)
        with pytest.raises(ZeroDivisionError), message:
            raise ZeroDivisionError
        again = queue.receive(timeout=5)
        assert (again.id, again.redelivery_count) == (message.id, 1)
        queue.nack(again).result(5)
        queue.ack(queue.receive(timeout=5)).result(5)
    assert cluster.topics["public/default/clicks"].shards[1].subscriptions["q"].acked == {0, 1}


def test_a_seek_voids_what_was_fetched(client: Client) -> None:
    with client.producer("clicks") as producer:
        producer.send_many([b"%d" % number for number in range(100)])
    with client.stream_consumer("clicks", subscription="s", start=EARLIEST) as consumer:
        for message in consumer:
            if message.payload == b"20":
                break
        consumer.seek(MessageId(1, 5))
        assert next(consumer).payload == b"5"


def test_what_cannot_be_sent_raises_at_the_call(cluster: ScriptedCluster, client: Client) -> None:
    with client.producer("clicks", max_pending_bytes=1000) as producer:
        with pytest.raises(InvalidArgument, match="encode"):
            producer.send_nowait("text")  # type: ignore[arg-type]
        with pytest.raises(MessageTooLarge):
            producer.send_nowait(bytes((5 << 20) + 1))
        cluster.on_batch = lambda shard, header: Fate.DROP
        future: Future[MessageId] = producer.send_nowait(bytes(900))
        with pytest.raises(QueueFull):
            producer.send_nowait(bytes(900))
        cluster.on_batch = lambda shard, header: Fate.STORE
        cluster.cut_from_another_thread()
        assert future.result(10) == MessageId(1, 0)
        assert producer.pending_bytes == 0


def test_a_failure_that_nobody_looked_at_is_raised_by_the_next_call(cluster: ScriptedCluster, client: Client) -> None:
    with client.producer("clicks") as producer:
        cluster.on_batch = lambda shard, header: error("MALFORMED", "unseen")
        future = producer.send_nowait(b"x")
        while not future.done():
            pass
        cluster.on_batch = lambda shard, header: Fate.STORE
        with pytest.raises(InvalidArgument, match="unseen"):
            producer.send_nowait(b"y")
        producer.send(b"z")
        cluster.on_batch = lambda shard, header: error("MALFORMED", "seen")
        with pytest.raises(InvalidArgument, match="seen"):
            producer.send_nowait(b"x").result(5)
        cluster.on_batch = lambda shard, header: Fate.STORE
        producer.send(b"z")


def test_several_threads_share_a_producer(cluster: ScriptedCluster, client: Client) -> None:
    with client.producer("clicks") as producer:
        threads = [threading.Thread(target=lambda: [producer.send_nowait(b"x") for _ in range(500)]) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        producer.flush()
    assert cluster.topics["public/default/clicks"].shards[1].end == 2000


def test_ctrl_c_interrupts_a_wait_and_the_client_stays_usable(client: Client) -> None:
    with client.stream_consumer("clicks", subscription="s") as consumer:
        timer = threading.Timer(0.2, lambda: os.kill(os.getpid(), 2))
        timer.start()
        with pytest.raises(KeyboardInterrupt):
            consumer.receive()
        with client.producer("clicks") as producer:
            producer.send(b"x")
        assert consumer.receive(timeout=5).payload == b"x"


def test_what_is_closed_or_was_never_entered_says_so(cluster: ScriptedCluster) -> None:
    client = connect(cluster.brokers[0].address)
    with pytest.raises(ClientClosed, match="with connect"):
        client.admin.topics.list()
    with client:
        assert client.admin.topics.list() == []
    with pytest.raises(ClientClosed):
        client.admin.topics.list()
    client.close()


def test_the_thread_ends_with_the_client(cluster: ScriptedCluster) -> None:
    with connect(cluster.brokers[0].address) as client, client.producer("clicks") as producer:
        producer.send(b"x")
    assert "magnetar-client" not in {thread.name for thread in threading.enumerate()}
