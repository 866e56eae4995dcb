"""How long publishing pauses when a busy shard is handed from one living broker to the other, again and again.

    python tests/performance/hand_off.py [--hand-offs 500] [--rate 5000] [--in-process]

The cluster is real processes: `magnetar metadata`, three bookies, two brokers; with --in-process all of them are in
this one and stores are in memory. A producer sends messages of 100 bytes at the rate to a topic of one shard; a stream
and two queue consumers with order by key take them. The pause of a hand-off is the longest time between two
confirmations from just before it until the next one begins. In the end everything was confirmed, is stored once and in
order, and came to each subscription once.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import sys
import tempfile
import time
from bisect import bisect_left
from collections import Counter
from contextlib import AsyncExitStack
from itertools import pairwise
from pathlib import Path

import grpc.aio
import structlog

sys.path.insert(0, str(Path(__file__).parents[1] / "broker"))

from broker_world import Calls, Cluster

from magnetar.cli.local_cluster import Size, local_cluster
from magnetar.client import EARLIEST, LATEST, Client, Producer, QueueConsumer, StreamConsumer, connect
from magnetar.v1 import admin_pb2

TOPIC = "busy"
KEYS = 16
TIMEOUT_S = 60.0
TICK_S = 0.002
WARM_UP_S = 2.0
BETWEEN_S = 0.15
"""From one hand-off to the next."""

QUIET_MAX = 100
"""Equally long times without a hand-off, for comparison: what the machine does to publishing by itself."""

Figures = dict[str, float]


class Load:
    """Messages at a rate, when each was confirmed, and what came of them."""

    def __init__(self, rate: float) -> None:
        self.rate = rate
        self.sent = 0
        self.confirmed: list[float] = []
        self.received: dict[str, list[int]] = {"stream": [], "queue": []}
        self.distinct: dict[str, set[int]] = {"stream": set(), "queue": set()}
        self._stop = asyncio.Event()

    async def publish(self, producer: Producer) -> None:
        loop = asyncio.get_running_loop()
        began = loop.time()
        while not self._stop.is_set():
            while self.sent < (loop.time() - began) * self.rate:
                receipt = producer.send_nowait(b"%100d" % self.sent, key=f"k{self.sent % KEYS}")
                receipt.add_done_callback(lambda done: self.confirmed.append(time.monotonic()))
                self.sent += 1
            await asyncio.sleep(TICK_S)
        await producer.flush()

    async def consume(self, consumer: StreamConsumer | QueueConsumer, subscription: str) -> None:
        taken, distinct = self.received[subscription], self.distinct[subscription]
        async with consumer:
            while not (self._stop.is_set() and len(self.confirmed) == self.sent == len(distinct)):
                messages = await consumer.receive_batch(1000, timeout=0.2)
                numbers = [int(message.payload) for message in messages]
                taken += numbers
                distinct.update(numbers)
                if messages:
                    # Acknowledgements of a moment share their outcome; a stream needs the last one only.
                    asked = messages[-1:] if isinstance(consumer, StreamConsumer) else messages
                    await [consumer.ack(message) for message in asked][-1]

    def end(self) -> None:
        self._stop.set()

    def pauses_s(self, moments: list[float]) -> list[float]:
        """The longest pause after each moment, until the next one."""
        found = []
        for begin, end in pairwise([*moments, self.confirmed[-1] + 1.0]):
            first, last = bisect_left(self.confirmed, begin), bisect_left(self.confirmed, end)
            times = self.confirmed[max(0, first - 1) : last + 1]
            found.append(max((after - before for before, after in pairwise(times)), default=0.0))
        return found


async def measure(
    client: Client,
    calls: Calls,
    hand_offs: int,
    rate: float,
    between_s: float = BETWEEN_S,
    warm_up_s: float = WARM_UP_S,
) -> Figures:
    """Raises AssertionError if anything was lost, duplicated or reordered, MagnetarError if anybody saw an error."""
    await client.admin.topics.create(TOPIC)
    await client.admin.subscriptions.create(TOPIC, "keeper", start=EARLIEST)
    load = Load(rate)
    stream = client.stream_consumer(TOPIC, subscription="stream", start=EARLIEST)
    queues = [client.queue_consumer(TOPIC, subscription="queue", key_ordered=True, start=EARLIEST) for _ in range(2)]
    work = [asyncio.create_task(load.consume(stream, "stream"))]
    work += [asyncio.create_task(load.consume(queue, "queue")) for queue in queues]
    moments, paused = [], []
    async with client.producer(TOPIC, name="steady") as producer:
        publishing = asyncio.create_task(load.publish(producer))
        await asyncio.sleep(warm_up_s)
        quiet = []
        for _ in range(min(hand_offs, QUIET_MAX)):
            quiet.append(time.monotonic())
            await asyncio.sleep(between_s)
        [shard] = (await client.admin.topics.describe(TOPIC)).shards
        brokers = [broker.id for broker in await client.admin.brokers.list()]
        owner = shard.owner
        for _ in range(hand_offs):
            [owner] = [broker for broker in brokers if broker != owner]
            moments.append(time.monotonic())
            request = admin_pb2.MoveShardRequest(shard_id=shard.shard, to_broker_id=owner, reason="measured")
            paused.append((await calls.admin("MoveShard", request, admin_pb2.MoveShardResponse)).paused_s)
            await asyncio.sleep(between_s)
        load.end()
        await asyncio.gather(publishing, *work)
    await check(client, load)
    return {
        "hand_offs": hand_offs,
        "messages": load.sent,
        **percentiles_ms("pause", load.pauses_s(moments)),
        **percentiles_ms("owners_pause", paused),
        **percentiles_ms("quiet_pause", load.pauses_s([*quiet, moments[0]])[:-1]),
    }


def percentiles_ms(name: str, seconds: list[float]) -> Figures:
    ordered = sorted(seconds)
    chosen = {"p50": ordered[len(ordered) // 2], "p99": ordered[len(ordered) * 99 // 100], "worst": ordered[-1]}
    return {f"{name}_{which}_ms": 1000 * value for which, value in chosen.items()}


async def check(client: Client, load: Load) -> None:
    async with client.reader(TOPIC, start=EARLIEST, stop=LATEST) as reader:
        stored = [int(message.payload) async for message in reader]
    assert stored == list(range(load.sent)), "lost, duplicated or reordered in the log"
    for subscription, taken in load.received.items():
        twice = [number for number, count in Counter(taken).items() if count > 1]
        assert not twice, f"{len(twice)} messages came twice to {subscription}, such as {twice[:5]}"
        for key in range(KEYS):
            assert [n for n in taken if n % KEYS == key] == list(range(key, load.sent, KEYS)), subscription


async def main(hand_offs: int, rate: float, in_this_process: bool) -> None:
    async with AsyncExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        if in_this_process:
            cluster = Cluster(folder, stack)
            await stack.enter_async_context(cluster.store)
            for bookie in range(3):
                await cluster.start_bookie(f"bookie{bookie}")
            stack.push_async_callback(cluster.stop_brokers)
            servers = ",".join([(await cluster.start_broker(f"broker{number}")).address for number in range(2)])
        else:
            servers = stack.enter_context(local_cluster(folder, Size(bookies=3, brokers=2))).servers
        client = await stack.enter_async_context(connect(servers, timeout=TIMEOUT_S))
        channel = await stack.enter_async_context(grpc.aio.insecure_channel(servers.split(",")[0]))
        figures = await measure(client, Calls(channel), hand_offs, rate)
    print(json.dumps({name: round(figure, 1) for name, figure in figures.items()}))


if __name__ == "__main__":
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.ERROR))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hand-offs", type=int, default=500)
    parser.add_argument("--rate", type=float, default=5000.0)
    parser.add_argument("--in-process", action="store_true")
    arguments = parser.parse_args()
    asyncio.run(main(arguments.hand_offs, arguments.rate, arguments.in_process))
