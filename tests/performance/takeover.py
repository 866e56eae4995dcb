"""How long brokers that live take to serve what a crashed one had: a busy topic, and all its topics at once.

    python tests/performance/takeover.py [--topics 1000] [--in-process]

The cluster is real processes: `magnetar metadata`, three bookies, two brokers. One broker is killed with SIGKILL. Times
count from then; the lease of its session, which has to end first, is 5 s. The topics are divided between both brokers,
so twice as many are made, and each has a message. With --in-process everything runs in this process, stores are in
memory, and times count from the end of the session: what brokers themselves cost.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import os
import re
import signal
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable
from contextlib import AsyncExitStack
from pathlib import Path

import structlog

sys.path.insert(0, str(Path(__file__).parents[1] / "broker"))

from broker_world import Cluster

from magnetar.cli.local_cluster import LocalCluster, Size, local_cluster
from magnetar.client import Client, Producer, connect

PUBLISHERS = 20
TIMEOUT_S = 120.0
LOOK_S = 0.05

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


def served_shards(http: str) -> int:
    with urllib.request.urlopen(f"http://{http}/metrics", timeout=20) as answer:
        found = re.search(r"^magnetar_broker_served_shards (\S+)", answer.read().decode(), re.MULTILINE)
    assert found is not None
    return int(float(found[1]))


def cpu_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


async def with_processes(cluster: LocalCluster, topics: int) -> Figures:
    async with connect(cluster.servers, timeout=TIMEOUT_S) as client, client.producer("busy") as producer:
        await producer.send(b"first")
        [shard] = (await client.admin.topics.describe("busy")).shards
        began = time.monotonic()
        await fill(client, 2 * topics)
        print(f"{2 * topics} topics were filled in {time.monotonic() - began:.1f} s", file=sys.stderr)
        http = {broker.id: broker.http_address for broker in await client.admin.brokers.list()}
        [survivor] = [name for name in http if name != shard.owner]
        victim = next(member for member in cluster.members if member.name == shard.owner)
        before, crashed = served_shards(http[survivor]), served_shards(http[str(shard.owner)])
        busy = Busy()
        publishing = asyncio.create_task(busy.publish(producer))
        await asyncio.sleep(1.0)
        others = [member for member in cluster.members if member is not victim]
        spent = {member.name: -cpu_s(member.process.pid) for member in others}
        killed = time.monotonic()
        victim.process.send_signal(signal.SIGKILL)
        while await asyncio.to_thread(served_shards, http[survivor]) < before + crashed:  # noqa: ASYNC110
            await asyncio.sleep(LOOK_S)
        all_served_s = time.monotonic() - killed
        for member in others:
            spent[member.name] += cpu_s(member.process.pid)
        print("CPU seconds:", {name: round(seconds, 2) for name, seconds in spent.items()}, file=sys.stderr)
        await asyncio.sleep(0.5)
        publishing.cancel()
        await asyncio.gather(publishing, return_exceptions=True)
    return {"shards": crashed, "busy_topic_s": busy.pause_s(killed), "all_served_s": all_served_s}


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
        shards = len(first.served)
        await cluster.kill(first)
        await asyncio.sleep(1.0)
        cpu_s, ended = time.process_time(), time.monotonic()
        await cluster.end_session(first)
        await until(lambda: len(second.served) >= shards)
        all_served_s, cpu_s = time.monotonic() - ended, time.process_time() - cpu_s
        await until(lambda: busy.confirmed[-1] >= ended)
        publishing.cancel()
        await asyncio.gather(publishing, return_exceptions=True)
    return {"shards": shards, "busy_topic_s": busy.pause_s(ended), "all_served_s": all_served_s, "cpu_s": cpu_s}


async def main(topics: int, in_this_process: bool) -> None:
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
            with local_cluster(Path(folder), Size(bookies=3, brokers=2)) as processes:
                figures = await with_processes(processes, topics)
    print(json.dumps({name: round(figure, 3) for name, figure in figures.items()}))


if __name__ == "__main__":
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.ERROR))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--topics", type=int, default=1000)
    parser.add_argument("--in-process", action="store_true")
    arguments = parser.parse_args()
    asyncio.run(main(arguments.topics, arguments.in_process))
