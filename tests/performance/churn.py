"""Topics that are written beside each other while half of them are deleted: what reaches the disk, and what stays."""

from __future__ import annotations

import asyncio
import os
import time
from pathlib import Path

from magnetar.cli.bench.payloads import generated
from magnetar.cli.bench.target import Target, target
from magnetar.cli.bench.topics import in_groups, new_producers
from magnetar.cli.local_cluster import Size
from magnetar.cli.machine import ProcessFigures
from magnetar.client import Client, connect

TOPICS = 200
GROUP = 16
SIZE = 1024
WRITERS = 16
COPIES = 3
WANTED = 1.6


async def churn(data_dir: Path, total_bytes: int, collect_s_max: float) -> dict[str, float]:
    """Publishes so many bytes in small batches; the first half of the topics goes, one after the other, on the way.

    Then the bookies have so many seconds to give the bytes of deleted topics back.
    """
    with target(None, Size(COPIES, 1), data_dir) as cluster:
        async with connect(cluster.servers, timeout=60.0) as client:
            topics = [f"churn-{number}" for number in range(TOPICS)]
            await in_groups(topics, client.admin.topics.create)
            before = _written(cluster)
            published = await _publish(client, topics, total_bytes)
            begin = time.monotonic()
            live = sum(published.values()) * COPIES
            while _stored(cluster.folder) > WANTED * live and time.monotonic() - begin < collect_s_max:  # noqa: ASYNC110
                await asyncio.sleep(1.0)
            collected_s = time.monotonic() - begin
        return {
            "written_per_byte": (_written(cluster) - before) / (total_bytes * COPIES),
            "disk_by_live": _stored(cluster.folder) / live,
            "collected_s": collected_s,
        }


async def _publish(client: Client, topics: list[str], total_bytes: int) -> dict[str, int]:
    """Bytes in the topics that live on."""
    payloads = generated(SIZE, 0, GROUP)
    groups = total_bytes // (GROUP * SIZE)
    doomed = topics[: TOPICS // 2]
    published = dict.fromkeys(topics, 0)
    async with new_producers(client, topics) as producers:
        by_topic = dict(zip(topics, producers, strict=True))
        numbers = iter(range(groups))

        async def write() -> None:
            for number in numbers:
                if doomed and number > groups * (1 - len(doomed) / (TOPICS // 2)):
                    topic = doomed.pop(0)
                    await by_topic.pop(topic).close()
                    await client.admin.topics.delete(topic)
                    del published[topic]
                topic = list(by_topic)[number % len(by_topic)]
                await by_topic[topic].send_many(payloads.next().payloads)
                if topic in published:
                    published[topic] += GROUP * SIZE

        async with asyncio.TaskGroup() as writers:
            for _ in range(WRITERS):
                writers.create_task(write())
    return published


def _written(cluster: Target) -> int:
    return sum(ProcessFigures.read(member.process.pid).written for member in cluster.members)


def _stored(folder: Path) -> int:
    """Bytes that the bookies' files take on the disk."""
    total = 0
    for place, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.lstat(os.path.join(place, name)).st_blocks * 512
            except FileNotFoundError:
                continue  # Files come and go.
    return total
