"""A standalone that is killed again and again while producers and consumers live on: what was answered is true."""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from random import Random

import pytest

from magnetar.client import (
    EARLIEST,
    LATEST,
    Acknowledgement,
    Batching,
    Client,
    Message,
    MessageId,
    QueueConsumer,
    StreamConsumer,
    connect,
)

PRODUCERS = 4
MESSAGES_EACH = 500
KEYS_EACH = 7
TOTAL = PRODUCERS * MESSAGES_EACH
IN_FLIGHT_MAX = 100
PATIENCE_S = 30.0

Sent = tuple[int, int]
"""Producer and number of a message."""


class Server:
    """A standalone in a process of its own: on one data directory and, after the first start, one port."""

    def __init__(self, data_dir: Path) -> None:
        self._data_dir = data_dir
        self._process: subprocess.Popen[str] | None = None
        self.port = 0

    def start(self) -> None:
        command = [
            str(Path(sys.executable).with_name("magnetar")), "standalone", "--data-dir", str(self._data_dir),
            "--port", str(self.port), "--http-port", "0", "--bookies", "3", "--output", "json",
        ]  # fmt: skip
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        assert self._process.stdout is not None
        self.port = int(json.loads(self._process.stdout.readline())["server"].rpartition(":")[2])

    def kill(self) -> None:
        if self._process is not None:
            assert self._process.stdout is not None
            self._process.send_signal(signal.SIGKILL)
            self._process.wait(10)
            self._process.stdout.close()
            self._process = None

    async def crash(self) -> None:
        await asyncio.to_thread(self.kill)
        await asyncio.to_thread(self.start)


class World:
    """What the test was told: ids of stored messages, and acknowledgements that are durable."""

    def __init__(self, seed: int) -> None:
        self.rng = Random(seed)
        self.stored: dict[Sent, MessageId] = {}
        self.done: dict[str, set[Sent]] = defaultdict(set)
        """Of each subscription, what was acknowledged durably."""
        self.came: dict[str, defaultdict[object, int]] = defaultdict(lambda: defaultdict(int))
        """Of each subscription and key, how many of its messages have come: the first so many."""
        self.given: dict[tuple[str, Sent], tuple[object, int]] = {}
        """Of each subscription and message, the consumer that it came to first, and how many crashes were before."""
        self.crashes = 0
        self._moved = asyncio.Event()

    @property
    def progress(self) -> int:
        return len(self.stored) + sum(map(len, self.done.values()))

    def moved(self) -> None:
        self._moved.set()

    async def until(self, progress: int) -> None:
        async with asyncio.timeout(PATIENCE_S):
            while self.progress < progress:
                self._moved.clear()
                await self._moved.wait()


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    server = Server(tmp_path)
    server.start()
    yield server
    server.kill()


def sent_of(message: Message) -> Sent:
    producer, number = message.payload.split(b":")[:2]
    return int(producer), int(number)


async def publish(client: Client, world: World, number: int) -> None:
    name = f"named{number}" if number % 2 else None
    room = asyncio.Semaphore(IN_FLIGHT_MAX)
    async with client.producer("t", name=name, batching=Batching(max_messages=(1, 5, 30)[number % 3])) as producer:

        async def send(n: int, payload: bytes) -> None:
            receipt = producer.send_nowait(payload, key=f"{number}/{n % KEYS_EACH}")
            await asyncio.sleep(0)
            world.stored[number, n] = await receipt
            world.moved()
            room.release()

        async with asyncio.TaskGroup() as sending:
            for n in range(MESSAGES_EACH):
                await room.acquire()
                sending.create_task(send(n, b"%d:%d:" % (number, n) + bytes(world.rng.choice((0, 10, 300)))))


async def consume(consumer: StreamConsumer | QueueConsumer, world: World, subscription: str) -> None:
    """Until everything is acknowledged. What is acknowledged durably does not come again, and no key goes ahead."""
    done, came = world.done[subscription], world.came[subscription]

    async def settle(acknowledgement: Acknowledgement, messages: list[Message]) -> None:
        await acknowledgement
        done.update(map(sent_of, messages))
        world.moved()

    async with consumer, asyncio.TaskGroup() as settling:
        while len(done) < TOTAL:
            messages = await consumer.receive_batch(50, timeout=0.5)
            for message in messages:
                sent = sent_of(message)
                to, crashes = world.given.setdefault((subscription, sent), (consumer, world.crashes))
                # A crash may give a message to a second consumer before the first, which holds it, comes back: its
                # acknowledgement is answered while the second has the message in its buffer.
                twice = sent in done and (to is consumer or crashes == world.crashes)
                assert not twice, f"an acknowledgement was undone: {subscription} {message.id}"
                place = sent[1] // KEYS_EACH
                assert place <= came[message.key], f"a key went ahead: {subscription} {message.id}"
                came[message.key] = max(came[message.key], place + 1)
                settling.create_task(settle(consumer.ack(message), [message]))
            await asyncio.sleep(0)


async def crash_now_and_then(server: Server, world: World) -> None:
    for point in sorted(world.rng.sample(range(20, TOTAL * 2), 4)):
        await world.until(point)
        world.crashes += 1
        await server.crash()
    # While shards are being taken over.
    world.crashes += 1
    await server.crash()


async def check_what_is_stored(client: Client, world: World) -> None:
    async with client.reader("t", start=EARLIEST, stop=LATEST) as reader:
        messages = [message async for message in reader]
    found = {sent_of(message): message.id for message in messages}
    # Of what was stored long before its producer came back, only the shard is known to the producer.
    for sent, id in world.stored.items():
        assert found[sent] == id if id.offset is not None else found[sent].shard == id.shard
    assert len(messages) == len(found) == len(world.stored) == TOTAL
    offsets: defaultdict[int | None, list[int | None]] = defaultdict(list)
    keys: defaultdict[object, list[int]] = defaultdict(list)
    for message in messages:
        offsets[message.id.shard].append(message.id.offset)
        keys[message.key].append(sent_of(message)[1])
    assert all(of_shard == list(range(len(of_shard))) for of_shard in offsets.values())
    assert all(a < b for numbers in keys.values() for a, b in pairwise(numbers))
    for summary in await client.admin.subscriptions.list("t"):
        assert summary.backlog_messages == (TOTAL if summary.subscription == "keep" else 0)


@pytest.mark.parametrize("seed", [1])
async def test_what_was_answered_before_a_sigkill_is_true_after_it(server: Server, seed: int) -> None:
    world = World(seed)
    async with connect(f"127.0.0.1:{server.port}", timeout=PATIENCE_S) as client:
        await client.admin.topics.create("t", shards=2)
        await client.admin.subscriptions.create("t", "keep", start=EARLIEST)
        async with asyncio.timeout(55), asyncio.TaskGroup() as group:
            stream = client.stream_consumer("t", subscription="stream", start=EARLIEST)
            group.create_task(consume(stream, world, "stream"))
            for _ in range(2):
                queue = client.queue_consumer("t", subscription="q", key_ordered=True, start=EARLIEST, prefetch=100)
                group.create_task(consume(queue, world, "q"))
            for number in range(PRODUCERS):
                group.create_task(publish(client, world, number))
            group.create_task(crash_now_and_then(server, world))
        await server.crash()
        await check_what_is_stored(client, world)
