"""How long a cluster takes to make a lost bookie's part anew, and what publishers notice of it.

    python tests/performance/repair.py [--size 5GB] [--throttle 10MB/s] [--data-dir DIR]

Real processes: a metadata server, four bookies, a broker. The size is published (three copies of it are stored), then a
publisher of single messages at a fixed pace is measured: first for a quiet window, as long as the repair should take at
the throttle, then while one bookie is killed with SIGKILL, its disk deleted, and its part made anew on the others. At
the end every copy of every entry is compared.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import shutil
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from cluster.copies import compare_copies
from cluster.harness import METADATA, Cluster

from magnetar.cli.quantities import parse_rate, parse_size
from magnetar.client import EARLIEST, Client, connect

PAYLOAD_BYTES = 50_000
GROUP_MESSAGES = 20
FILLERS = 4
PROBE_BYTES = 1_000
PROBES_PER_S = 100
QUIET_S_MIN = 20.0
DELAY_S = 1.0
LOOK_S = 0.5
REPAIRED_S = 3600.0
LOST = "bookie0"


@dataclass(frozen=True, slots=True)
class Window:
    begin: float
    end: float

    @property
    def seconds(self) -> float:
        return self.end - self.begin


class Publisher:
    """Single messages at a fixed pace; a late answer delays none of those that follow."""

    def __init__(self) -> None:
        self.latencies: list[tuple[float, float]] = []
        self._pending: set[asyncio.Task[None]] = set()

    async def run(self, client: Client) -> None:
        async with client.producer("probe") as producer:
            due = time.monotonic()
            while True:
                due += 1 / PROBES_PER_S
                await asyncio.sleep(max(0.0, due - time.monotonic()))
                task = asyncio.create_task(self._send(producer, due))
                self._pending.add(task)
                task.add_done_callback(self._pending.discard)

    async def _send(self, producer: object, due: float) -> None:
        await producer.send(os.urandom(PROBE_BYTES))  # type: ignore[attr-defined]
        self.latencies.append((due, time.monotonic() - due))

    def percentile_ms(self, window: Window, share: float) -> float:
        found = sorted(latency for at, latency in self.latencies if window.begin <= at < window.end)
        return 1000 * found[int(len(found) * share)] if found else float("nan")


async def fill(client: Client, size_bytes: int) -> float:
    """Publishes so much; returns bytes a second."""
    begin = time.monotonic()
    await client.admin.topics.create("data", shards=FILLERS)
    await client.admin.subscriptions.create("data", "keep", start=EARLIEST)
    groups = size_bytes // FILLERS // (PAYLOAD_BYTES * GROUP_MESSAGES)

    async def one() -> None:
        async with client.producer("data") as producer:
            for _ in range(max(1, groups)):
                await producer.send_many([os.urandom(PAYLOAD_BYTES) for _ in range(GROUP_MESSAGES)])

    await asyncio.gather(*(one() for _ in range(FILLERS)))
    return size_bytes / (time.monotonic() - begin)


async def ledgers_left(client: Client) -> int:
    return next((bookie.ledgers for bookie in await client.admin.bookies.list() if bookie.id == LOST), 0)


async def until_repaired(client: Client) -> None:
    async with asyncio.timeout(REPAIRED_S):
        while await ledgers_left(client) or (await client.admin.cluster.repair()).copies:  # noqa: ASYNC110  # elsewhere
            await asyncio.sleep(LOOK_S)


async def measure(cluster: Cluster, size_bytes: int, bytes_per_s: int) -> dict[str, float]:
    async with connect(cluster.servers, timeout=120.0) as client:
        await client.admin.cluster.repair(delay=DELAY_S, throttle=bytes_per_s)
        filled = await fill(client, size_bytes)
        held = next(one.bytes for one in await client.admin.bookies.list() if one.id == LOST)
        publisher = Publisher()
        publishing = asyncio.create_task(publisher.run(client))
        await asyncio.sleep(2.0)
        quiet_s = max(QUIET_S_MIN, held / (3 * bytes_per_s))
        begin = time.monotonic()
        await asyncio.sleep(quiet_s)
        quiet = Window(begin, time.monotonic())
        cluster.kill(LOST)
        # A disk that is gone. To delete its files now would keep the disk busy that the others share with it here.
        gone = cluster.data_dir(LOST)
        gone.rename(gone.with_name("gone"))
        await until_repaired(client)
        repair = Window(quiet.end, time.monotonic())
        publishing.cancel()
        shutil.rmtree(gone.with_name("gone"))
        await asyncio.gather(publishing, return_exceptions=True)
    copied = sum(cluster.metric(name, "magnetar_repair_copied_bytes_total") for name in cluster.bookies if name != LOST)
    p99_quiet, p99_repair = (publisher.percentile_ms(window, 0.99) for window in (quiet, repair))
    return {
        "published_mb": size_bytes / 1e6,
        "published_mb_per_s": filled / 1e6,
        "lost_mb": held / 1e6,
        "copied_mb": copied / 1e6,
        "repair_s": repair.seconds,
        "copied_mb_per_s": copied / 1e6 / repair.seconds,
        "quiet_s": quiet.seconds,
        "quiet_p50_ms": publisher.percentile_ms(quiet, 0.5),
        "repair_p50_ms": publisher.percentile_ms(repair, 0.5),
        "quiet_p99_ms": p99_quiet,
        "repair_p99_ms": p99_repair,
        "p99_ratio": p99_repair / p99_quiet,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=parse_size, default=5_000_000_000, help="what is published, such as 5GB")
    parser.add_argument("--throttle", type=parse_rate, default=10_000_000, help="rate of each bookie, such as 10MB/s")
    parser.add_argument("--data-dir", type=Path, default=None, help="where the bookies keep their data meanwhile")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.data_dir) as folder:
        cluster = Cluster(Path(folder), bookies=4, brokers=1)
        try:
            cluster.start()
            figures = asyncio.run(measure(cluster, options.size, options.throttle))
            compared = compare_copies(cluster._addresses[METADATA])
        finally:
            cluster.close()
    assert not compared.problems, compared.problems[:10]
    figures |= {"entries_compared": compared.entries, "copies_compared": compared.copies}
    print(json.dumps({name: round(value, 2) for name, value in figures.items()}, indent=2))


if __name__ == "__main__":
    main()
