"""The owners of a busy topic go, in a cluster of real processes: stopped for a while, killed, asked to stop."""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import AsyncIterator, Iterator
from itertools import pairwise
from pathlib import Path

import pytest

from magnetar.cli.local_cluster import LocalCluster, Member, Size, local_cluster
from magnetar.client import EARLIEST, LATEST, Client, QueueConsumer, StreamConsumer, connect

pytestmark = pytest.mark.timeout(240)
TOPIC = "orders"
KEYS = 8
LEASE_S = 5.0
TIMEOUT_S = 60.0
MACHINE_S = 20.0
"""What a machine that does many other things may add to each pause before it counts as a failure."""


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[LocalCluster]:
    with local_cluster(tmp_path, Size(bookies=3, brokers=3)) as cluster:
        yield cluster


@pytest.fixture
async def client(cluster: LocalCluster) -> AsyncIterator[Client]:
    async with connect(cluster.servers, timeout=TIMEOUT_S) as client:
        # So that nothing is trimmed, and all can be read in the end.
        await client.admin.topics.create(TOPIC)
        await client.admin.subscriptions.create(TOPIC, "keeper", start=EARLIEST)
        yield client


async def owner_of(client: Client, cluster: LocalCluster) -> Member:
    [shard] = (await client.admin.topics.describe(TOPIC)).shards
    return next(member for member in cluster.members if member.name == shard.owner)


class Traffic:
    """A producer that never pauses by itself, a stream consumer and two queue consumers with order by key."""

    def __init__(self) -> None:
        self.sent = 0
        self.times: list[float] = []
        self.consumed: dict[str, dict[int, None]] = {"stream": {}, "queue": {}}
        self._stop = asyncio.Event()

    async def publish(self, client: Client, name: str) -> None:
        async with client.producer(TOPIC, name=name) as producer:
            while not self._stop.is_set():
                await producer.send(b"%d" % self.sent, key=f"k{self.sent % KEYS}")
                self.sent += 1
                self.times.append(time.monotonic())

    async def consume(self, consumer: StreamConsumer | QueueConsumer, subscription: str) -> None:
        """Until everything came. What came first of each key was in order."""
        taken = self.consumed[subscription]
        async with consumer:
            while not (self._stop.is_set() and len(taken) == self.sent):
                for message in await consumer.receive_batch(100, timeout=0.2):
                    taken.setdefault(int(message.payload))
                    await consumer.ack(message)

    def begin(self, client: Client) -> list[asyncio.Task[None]]:
        work = [self.publish(client, "first")]
        stream = client.stream_consumer(TOPIC, subscription="stream", start=EARLIEST)
        work.append(self.consume(stream, "stream"))
        for _ in range(2):
            queue = client.queue_consumer(TOPIC, subscription="queue", key_ordered=True, start=EARLIEST)
            work.append(self.consume(queue, "queue"))
        return [asyncio.create_task(one) for one in work]

    def end(self) -> None:
        self._stop.set()

    async def confirmed(self, more: int) -> None:
        """So many more messages were confirmed."""
        wanted = len(self.times) + more
        while len(self.times) < wanted:  # noqa: ASYNC110  # it happens in another process
            await asyncio.sleep(0.01)

    def longest_pause_s(self, since: float) -> float:
        times = [since, *(moment for moment in self.times if moment > since)]
        return max(after - before for before, after in pairwise(times))


async def check(client: Client, traffic: Traffic) -> None:
    """Everything is stored once and in order, and came to each subscription, each key in order."""
    async with client.reader(TOPIC, start=EARLIEST, stop=LATEST) as reader:
        stored = [int(message.payload) async for message in reader]
    for key in range(KEYS):
        assert [number for number in stored if number % KEYS == key] == list(range(key, traffic.sent, KEYS))
    for taken in traffic.consumed.values():
        for key in range(KEYS):
            assert [number for number in taken if number % KEYS == key] == list(range(key, traffic.sent, KEYS))


async def test_a_busy_topic_goes_on_without_an_error_whatever_happens_to_its_owners(
    cluster: LocalCluster, client: Client
) -> None:
    traffic = Traffic()
    work = traffic.begin(client)
    await traffic.confirmed(200)

    async def lose(how: str, number: int) -> tuple[Member, float]:
        """Its owner gets a signal; returns it and the longest pause until the topic goes on elsewhere."""
        owner, began = await owner_of(client, cluster), time.monotonic()
        owner.process.send_signal(number)
        await traffic.confirmed(200)
        pause_s = traffic.longest_pause_s(began)
        print(f"the owner of a busy topic was {how}: longest pause {pause_s:.2f} s")
        assert (await owner_of(client, cluster)) is not owner
        return owner, pause_s

    stopped, pause_s = await lose("stopped", signal.SIGSTOP)
    assert pause_s < LEASE_S + MACHINE_S
    # It wakes up, and finds that it was replaced.
    stopped.process.send_signal(signal.SIGCONT)
    await traffic.confirmed(200)
    _, pause_s = await lose("killed", signal.SIGKILL)
    assert pause_s < LEASE_S + MACHINE_S
    asked, pause_s = await lose("asked to stop", signal.SIGTERM)
    assert pause_s < MACHINE_S
    assert await asyncio.to_thread(asked.process.wait, TIMEOUT_S) == 0
    traffic.end()
    await asyncio.gather(*work)
    await check(client, traffic)
