"""How long brokers that live take to have what a crashed one had: a busy topic, and all its topics at once.

    python tests/performance/takeover.py [--topics 2000] [--used] [--in-process]

The cluster is real processes: `magnetar metadata`, three bookies, two brokers. So many topics get a message each and
are left alone; the brokers put them to rest. Then the broker is killed with SIGKILL that has a busy topic beside its
half of the others. Times count from then; the lease of its session, which has to end first, is 5 s. Requests are those
that the metadata server answered until all was claimed: everybody's. With --used nothing comes to rest before: all of
the topics are to be recovered. With --in-process everything runs in this process, stores are in memory, and times count
from the end of the session: what brokers themselves cost.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import os
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import AsyncExitStack
from pathlib import Path

import structlog

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[1] / "broker"))


from broker_world import Cluster
from cluster import harness as processes

from magnetar.client import Client, Producer, connect

PUBLISHERS = 20
TIMEOUT_S = 120.0
LOOK_S = 0.05
LEASE_S = 5.0
REST_AFTER_S = 5.0
TOPICS_USED = 50

Figures = dict[str, float]


async def fill(client: Client, topics: int) -> None:
    slots = asyncio.Semaphore(PUBLISHERS)

    async def one(number: int) -> None:
        async with slots, client.producer(f"topic-{number}") as producer:
            await producer.send(b"x" * 100)

    await asyncio.gather(*(one(number) for number in range(topics)))


async def until(holds: Callable[[], bool]) -> None:
    while not holds():  # noqa: ASYNC110  # what is waited for happens elsewhere
        await asyncio.sleep(LOOK_S)


class Busy:
    """A producer that never pauses by itself, and when its messages were confirmed."""

    def __init__(self) -> None:
        self.confirmed: list[float] = []

    async def publish(self, producer: Producer) -> None:
        while True:
            await producer.send(b"x" * 100)
            self.confirmed.append(time.monotonic())

    def pause_s(self, since: float) -> float:
        """The longest time without a confirmation since then."""
        times = [moment for moment in self.confirmed if moment >= since]
        return max(after - before for before, after in zip([since, *times], times, strict=False))


# --- real processes ---


def rss_bytes(pid: int | None) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def cpu_s(pid: int | None) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


class Processes:
    """A cluster of processes, asked from a thread: nothing here waits for an answer of it."""

    def __init__(self, cluster: processes.Cluster) -> None:
        self.cluster = cluster

    async def metric(self, name: str, metric: str) -> float:
        return await asyncio.to_thread(self.cluster.metric, name, metric)

    async def broker_metric(self, broker: str, metric: str) -> int:
        return int(await self.metric(broker, f"magnetar_broker_{metric}"))

    async def requests(self) -> int:
        return int(await self.metric(processes.METADATA, "magnetar_metadata_requests_total"))

    async def until(self, broker: str, metric: str, holds: Callable[[int], bool]) -> float:
        """The time since when it holds, about."""
        while not holds(await self.broker_metric(broker, metric)):  # noqa: ASYNC110
            await asyncio.sleep(LOOK_S)
        return time.monotonic()


async def memory_at_rest(cluster: Processes, before: dict[str, int]) -> Figures:
    """Of a broker for each of its topics, once none but the busy one is open. It knows those of others, too."""
    began = time.monotonic()
    for broker in before:
        await cluster.until(broker, "served_shards", lambda served: served <= 1)
    print(f"all were at rest after another {time.monotonic() - began:.1f} s", file=sys.stderr)
    kib = []
    for broker, rss in before.items():
        owned = await cluster.broker_metric(broker, "owned_shards")
        kib.append((rss_bytes(cluster.cluster.pid(broker)) - rss) / 1024 / owned)
    return {"kib_per_topic_at_rest": max(kib)}


async def crash(cluster: Processes, victim: str, survivor: str) -> Figures:
    own, lost = [await cluster.broker_metric(broker, "owned_shards") for broker in (survivor, victim)]
    rested = await cluster.broker_metric(survivor, "shards_at_rest")
    requests, spent_s = await cluster.requests(), cpu_s(cluster.cluster.pid(survivor))
    killed = time.monotonic()
    await asyncio.to_thread(cluster.cluster.kill, victim)
    claimed = await cluster.until(survivor, "owned_shards", lambda owned: owned >= own + lost)
    claiming = await cluster.requests() - requests
    settled = await cluster.until(survivor, "shards_at_rest", lambda at_rest: at_rest >= rested + lost - 1)
    settling = await cluster.requests() - requests
    print(f"the survivor took {cpu_s(cluster.cluster.pid(survivor)) - spent_s:.1f} s of CPU", file=sys.stderr)
    return {
        "topics_lost": lost,
        "all_claimed_s": claimed - killed,
        "requests_per_topic_claimed": claiming / lost,
        "all_recovered_s": settled - killed,
        "requests_per_topic_recovered": settling / lost,
    }


async def first_use_s(client: Client, topics: int) -> float:
    """The longest time that one of some topics took to take a message."""
    longest_s = 0.0
    for number in range(0, topics, max(1, topics // TOPICS_USED)):
        began = time.monotonic()
        async with client.producer(f"topic-{number}") as producer:
            await producer.send(b"x" * 100)
        longest_s = max(longest_s, time.monotonic() - began)
    return longest_s


async def with_processes(cluster: Processes, topics: int, used: bool) -> Figures:
    brokers = cluster.cluster.brokers
    rss = {broker: rss_bytes(cluster.cluster.pid(broker)) for broker in brokers}
    async with connect(cluster.cluster.servers, timeout=TIMEOUT_S) as client, client.producer("busy") as producer:
        await producer.send(b"first")
        began = time.monotonic()
        await fill(client, topics)
        print(f"{topics} topics were filled in {time.monotonic() - began:.1f} s", file=sys.stderr)
        figures = {} if used else await memory_at_rest(cluster, rss)
        [shard] = (await client.admin.topics.describe("busy")).shards
        victim = str(shard.owner)
        [survivor] = [broker for broker in brokers if broker != victim]
        busy = Busy()
        publishing = asyncio.create_task(busy.publish(producer))
        await asyncio.sleep(1.0)
        killed = time.monotonic()
        figures |= await crash(cluster, victim, survivor)
        await until(lambda: busy.confirmed[-1] > killed + LEASE_S)
        publishing.cancel()
        await asyncio.gather(publishing, return_exceptions=True)
        return figures | {"busy_topic_s": busy.pause_s(killed), "first_use_s": await first_use_s(client, topics)}


# --- in this process ---


async def in_process(cluster: Cluster, topics: int) -> Figures:
    first = await cluster.start_broker("first")
    async with AsyncExitStack() as stack:
        client = await stack.enter_async_context(connect(first.address, timeout=TIMEOUT_S))
        await fill(client, topics)
        second = await cluster.start_broker("second")
        producer = await stack.enter_async_context(client.producer("topic-0"))
        busy = Busy()
        publishing = asyncio.create_task(busy.publish(producer))
        await until(lambda: len(busy.confirmed) >= 100)
        shards = len(first.ownership.mine())
        await cluster.kill(first)
        await asyncio.sleep(1.0)
        spent_s, ended = time.process_time(), time.monotonic()
        await cluster.end_session(first)
        await until(lambda: len(second.ownership.mine()) >= shards)
        claimed_s = time.monotonic() - ended
        await until(lambda: len(second.served) + len(second.served.at_rest) >= shards)
        recovered_s, spent_s = time.monotonic() - ended, time.process_time() - spent_s
        await until(lambda: busy.confirmed[-1] >= ended)
        publishing.cancel()
        await asyncio.gather(publishing, return_exceptions=True)
    return {
        "topics_lost": shards,
        "busy_topic_s": busy.pause_s(ended),
        "all_claimed_s": claimed_s,
        "all_recovered_s": recovered_s,
        "cpu_s": spent_s,
    }


async def main(topics: int, used: bool, in_this_process: bool) -> None:
    with tempfile.TemporaryDirectory() as folder:
        if in_this_process:
            async with AsyncExitStack() as stack:
                cluster = Cluster(Path(folder), stack)
                await stack.enter_async_context(cluster.store)
                for bookie in range(3):
                    await cluster.start_bookie(f"bookie{bookie}")
                stack.push_async_callback(cluster.stop_brokers)
                figures = await in_process(cluster, topics)
        else:
            settings = {"broker": {"lease_s": LEASE_S, "rest_after_s": 3600.0 if used else REST_AFTER_S}}
            real = processes.Cluster(Path(folder), settings=settings)
            try:
                real.start()
                figures = await with_processes(Processes(real), topics, used)
            finally:
                real.close()
    print(json.dumps({name: round(figure, 3) for name, figure in figures.items()}))


if __name__ == "__main__":
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.ERROR))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--topics", type=int, default=2000)
    parser.add_argument("--used", action="store_true")
    parser.add_argument("--in-process", action="store_true")
    arguments = parser.parse_args()
    asyncio.run(main(arguments.topics, arguments.used, arguments.in_process))
