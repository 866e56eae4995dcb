"""The client library against a real `magnetar standalone` in a process of its own, which is also killed."""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest

from magnetar.client import (
    EARLIEST,
    LATEST,
    AlreadyExists,
    Batching,
    Client,
    ConsumerBusy,
    InvalidArgument,
    LedgerNotFound,
    Message,
    MessageId,
    ProducerFenced,
    SubscriptionNotFound,
    TopicNotFound,
    connect,
)
from magnetar.client import sync as blocking

START_TIMEOUT_S = 30.0
STOP_TIMEOUT_S = 15.0


class Standalone:
    """A server process on one data directory and, after the first start, one port."""

    def __init__(self, data_dir: Path) -> None:
        self.data_dir = data_dir
        self.port = 0
        self._process: subprocess.Popen[str] | None = None

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    def start(self) -> None:
        command = [
            str(Path(sys.executable).with_name("magnetar")), "standalone", "--data-dir", str(self.data_dir),
            "--port", str(self.port), "--http-port", "0", "--bookies", "3", "--output", "json",
        ]  # fmt: skip
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        assert self._process.stdout is not None
        self.port = int(json.loads(self._process.stdout.readline())["server"].rpartition(":")[2])

    def end(self, how: signal.Signals) -> None:
        if self._process is not None:
            self._process.send_signal(how)
            self._process.wait(STOP_TIMEOUT_S)
            assert self._process.stdout is not None
            self._process.stdout.close()
            self._process = None


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Standalone]:
    server = Standalone(tmp_path_factory.mktemp("standalone"))
    server.start()
    yield server
    server.end(signal.SIGTERM)


@pytest.fixture
async def client(server: Standalone) -> AsyncIterator[Client]:
    async with connect(server.address, timeout=30.0) as client:
        yield client


async def take(consumer: object, count: int) -> list[Message]:
    return [await consumer.receive(timeout=20) for _ in range(count)]  # type: ignore[attr-defined]


def numbers(messages: list[Message]) -> list[int]:
    return [int(message.payload) for message in messages]


async def test_everything_of_a_message_comes_back_under_the_id_it_was_given(client: Client) -> None:
    time = datetime(2013, 1, 31, 12, 0, 0, 123_456, tzinfo=UTC)
    async with client.producer("all", compression="zstd") as producer:
        ids = [
            await producer.send(b"", key="Ünï", properties={"page": "/cart"}, event_time=time),
            await producer.send(b"\xff" * (5 << 20)),
            await producer.send(b"plain", key=b"\xff"),
        ]
    async with client.reader("all", stop=LATEST) as reader:
        messages = [message async for message in reader]
    assert [message.id for message in messages] == ids
    assert (messages[0].payload, messages[0].key, messages[0].event_time) == (b"", "Ünï", time)
    assert dict(messages[0].properties) == {"page": "/cart"}
    assert (len(messages[1].payload), messages[1].key, messages[2].key) == (5 << 20, None, b"\xff")
    assert messages[0].publish_time <= messages[2].publish_time <= datetime.now(UTC)


async def test_a_crash_of_the_server_loses_repeats_and_reorders_nothing(client: Client, server: Standalone) -> None:
    await client.admin.topics.create("crash", shards=4)
    # Nothing is deleted while a subscription needs it.
    await client.admin.subscriptions.create("crash", "keeper", start=EARLIEST)
    seen: Counter[int] = Counter()
    order: dict[object, list[int]] = {}
    half = asyncio.Event()

    async def consume() -> None:
        async with client.stream_consumer("crash", subscription="s", start=EARLIEST) as consumer:
            while seen.total() < 4000:
                for message in await consumer.receive_batch(timeout=25.0):
                    seen[int(message.payload)] += 1
                    order.setdefault(message.key, []).append(int(message.payload))
                    consumer.ack(message)
                if seen.total() > 1500:
                    half.set()

    async def publish() -> list[MessageId]:
        async with client.producer("crash", batching=Batching(max_messages=20)) as producer:
            receipts = []
            for number in range(4000):
                receipts.append(producer.send_nowait(b"%d" % number, key=f"k{number % 97}"))
                if number == 2500:
                    await half.wait()
                elif number % 50 == 0:
                    await asyncio.sleep(0)
            return [await receipt for receipt in receipts]

    async def crash() -> None:
        await half.wait()
        server.end(signal.SIGKILL)
        await asyncio.to_thread(server.start)

    ids, _, _ = await asyncio.gather(publish(), consume(), crash())
    assert seen == Counter(range(4000))
    assert all(found == sorted(found) for found in order.values())
    stored: dict[MessageId, int] = {}
    async with client.reader("crash", stop=LATEST) as reader:
        async for message in reader:
            stored[message.id] = int(message.payload)
    assert sorted(stored.values()) == list(range(4000))
    assert all(stored[id] == number for number, id in enumerate(ids) if id.offset is not None)
    assert (await client.admin.subscriptions.describe("crash", "s")).backlog_messages == 0


async def test_a_queue_shares_gives_back_and_keeps_what_was_acknowledged(client: Client) -> None:
    async with client.producer("work") as producer:
        await producer.send_many([b"%d" % number for number in range(200)], keys=[f"k{n % 9}" for n in range(200)])
    done: Counter[int] = Counter()
    failed: set[int] = set()

    async def worker() -> None:
        async with client.queue_consumer("work", subscription="q", start=EARLIEST, prefetch=10) as queue:
            for message in await queue.receive_batch(max_messages=20, timeout=5):
                queue.nack(message)
            while done.total() < 200:
                for message in await queue.receive_batch(max_messages=5, timeout=0.5):
                    number = int(message.payload)
                    if number % 10 == 0 and number not in failed:
                        failed.add(number)
                        with pytest.raises(ZeroDivisionError):
                            async with message:
                                raise ZeroDivisionError
                    else:
                        async with message:
                            done[number] += 1

    await asyncio.gather(worker(), worker(), worker())
    assert done == Counter(range(200))
    description = await client.admin.subscriptions.describe("work", "q")
    assert (description.type, description.backlog_messages, description.consumers) == ("queue", 0, ())


async def test_keys_of_a_queue_stay_in_order_at_one_consumer_at_a_time(client: Client) -> None:
    async with client.producer("orders") as producer:
        await producer.send_many([b"%d" % n for n in range(600)], keys=[f"k{n % 13}" for n in range(600)])
    order: dict[object, list[int]] = {}
    count = 0

    async def worker() -> None:
        nonlocal count
        async with client.queue_consumer("orders", subscription="q", key_ordered=True, start=EARLIEST) as queue:
            while count < 600:
                for message in await queue.receive_batch(max_messages=10, timeout=0.5):
                    order.setdefault(message.key, []).append(int(message.payload))
                    count += 1
                    queue.ack(message)

    await asyncio.gather(worker(), worker())
    assert order == {f"k{k}": list(range(k, 600, 13)) for k in range(13)}


async def test_a_seek_goes_to_a_message_a_time_and_the_ends(client: Client) -> None:
    async with client.producer("tape") as producer:
        ids = await producer.send_many([b"%d" % number for number in range(50)])
        await producer.send_many([b"%d" % number for number in range(50, 100)])
    async with client.stream_consumer("tape", subscription="s", start=EARLIEST) as consumer:
        messages = await take(consumer, 100)
        await consumer.ack(messages[-1])
        await consumer.seek(ids[20])
        assert numbers(await take(consumer, 80)) == list(range(20, 100))
        await consumer.seek(messages[50].publish_time)
        assert numbers(await take(consumer, 50)) == list(range(50, 100))
        await consumer.seek(EARLIEST)
        assert numbers(await take(consumer, 3)) == [0, 1, 2]
        await consumer.seek(LATEST)
        assert await consumer.receive_batch(timeout=0.05) == []
        (cursor,) = await client.admin.subscriptions.seek("tape", "s", MessageId(ids[0].shard, 90))
        assert cursor.floor == 90
        assert numbers(await take(consumer, 10)) == list(range(90, 100))


async def test_a_consumer_that_stands_by_goes_on_where_the_acknowledged_ends(client: Client) -> None:
    async with client.producer("duty") as producer:
        await producer.send_many([b"%d" % number for number in range(30)])
    async with (
        client.stream_consumer("duty", subscription="s", start=EARLIEST) as first,
        client.stream_consumer("duty", subscription="s") as second,
    ):
        messages = await take(first, 30)
        first.ack(messages[11])
        assert await second.receive_batch(timeout=0.05) == []
        await first.close()
        assert numbers(await take(second, 18)) == list(range(12, 30))


async def test_a_named_producer_stores_each_sequence_once_and_fences_its_older_connection(client: Client) -> None:
    async with client.producer("named", name="importer") as older:
        first = [await older.send(b"%d" % n, sequence=n) for n in range(5)]
        async with client.producer("named", name="importer") as newer:
            again = [await newer.send(b"%d" % n, sequence=n) for n in range(3, 8)]
            assert again[:2] == first[3:]
            with pytest.raises(ProducerFenced):
                await older.send(b"x", sequence=100)
    async with client.reader("named", stop=LATEST) as reader:
        assert [message.payload async for message in reader] == [b"%d" % n for n in range(8)]


async def test_a_name_belongs_to_its_newest_connection_from_the_moment_it_is_open(client: Client) -> None:
    async with client.producer("renamed", name="importer") as older:
        await older.send(b"before")
        async with client.producer("renamed", name="importer"):
            with pytest.raises(ProducerFenced):
                await older.send(b"after")
    async with client.reader("renamed", stop=LATEST) as reader:
        assert [message.payload async for message in reader] == [b"before"]


async def test_what_does_not_exist_or_exists_already_has_an_error_of_its_own(client: Client) -> None:
    topics, subscriptions = client.admin.topics, client.admin.subscriptions
    created = await topics.create("present", shards=3)
    assert [shard.slots for shard in created.shards] == [(0, 21845), (21846, 43690), (43691, 65535)] or len(
        created.shards
    ) == 3
    with pytest.raises(AlreadyExists):
        await topics.create("present")
    await subscriptions.create("present", "s", type="queue", start=EARLIEST)
    with pytest.raises(AlreadyExists):
        await subscriptions.create("present", "s")
    with pytest.raises(ConsumerBusy):
        async with client.stream_consumer("present", subscription="s"):
            raise AssertionError
    for missing in (topics.describe("absent"), topics.delete("absent"), subscriptions.list("absent")):
        with pytest.raises(TopicNotFound):
            await missing
    for missing in (subscriptions.describe("present", "x"), subscriptions.delete("present", "x")):
        with pytest.raises(SubscriptionNotFound):
            await missing
    with pytest.raises(LedgerNotFound):
        await client.admin.ledgers.describe(10**15)
    with pytest.raises(InvalidArgument):
        await topics.create("a/b")
    assert [summary.subscription for summary in await subscriptions.list("present")] == ["s"]
    assert "public/default/present" in await topics.list("public")
    health = await client.admin.cluster.health()
    assert (health.brokers, health.bookies, health.under_replicated_ledgers) == (1, 3, 0)


async def test_deleting_a_topic_ends_who_uses_it(client: Client) -> None:
    async with client.producer("doomed") as producer:
        await producer.send(b"x")
        async with client.stream_consumer("doomed", subscription="s", start=EARLIEST) as consumer:
            consumer.ack(await consumer.receive(timeout=20))
            foreseen = await client.admin.topics.delete("doomed", dry_run=True)
            deleted = await client.admin.topics.delete("doomed")
            assert foreseen.shards == deleted.shards == 1
            with pytest.raises(TopicNotFound):
                await consumer.receive(timeout=20)
        with pytest.raises(TopicNotFound):
            await producer.send(b"y")
    assert "public/default/doomed" not in await client.admin.topics.list()


def test_the_blocking_client_does_the_same(server: Standalone) -> None:
    with blocking.connect(server.address) as client:
        with client.producer("blocking") as producer:
            futures = [producer.send_nowait(b"%d" % number) for number in range(100)]
            assert [future.result(20).offset for future in futures] == list(range(100))
        with client.queue_consumer("blocking", subscription="q", start=EARLIEST) as queue:
            for message in queue:
                with message:
                    pass
                if message.payload == b"99":
                    break
        with client.reader("blocking", stop=LATEST) as reader:
            assert [int(payload) for columns in reader.batches() for payload in columns.payloads] == list(range(100))
        assert client.admin.subscriptions.describe("blocking", "q").backlog_messages == 0
