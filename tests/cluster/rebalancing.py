"""What tests of rebalancing do with a cluster: fill it, let a bookie join, look at disks, follow operations."""

from __future__ import annotations

import random
import subprocess
from collections.abc import Mapping

from cluster.harness import Cluster, Process, until

from magnetar.client import EARLIEST, RebalanceOperation
from magnetar.client.sync import Client

PAYLOAD_BYTES = 16 << 10
PAYLOADS_AT_ONCE = 128
SHARDS = 2
END_S = 240.0


def fill(client: Client, topic: str, size_bytes: int) -> None:
    """So many bytes of random messages, that nobody acknowledges."""
    client.admin.topics.create(topic, shards=SHARDS)
    client.admin.subscriptions.create(topic, "keep", start=EARLIEST)
    rng = random.Random(topic)
    with client.producer(topic) as producer:
        for _ in range(0, size_bytes, PAYLOAD_BYTES * PAYLOADS_AT_ONCE):
            producer.send_many([rng.randbytes(PAYLOAD_BYTES) for _ in range(PAYLOADS_AT_ONCE)])


def join(cluster: Cluster, name: str) -> None:
    """One more bookie, with an empty directory."""
    cluster.bookies.append(name)
    cluster.processes[name] = Process(name, cluster.folder / "logs")
    cluster.restart(name)


def disk_bytes(cluster: Cluster) -> dict[str, int]:
    """What the bookies' directories take on their disk, as du says."""
    folders = {name: str(cluster.data_dir(name)) for name in cluster.bookies}
    said = subprocess.run(
        ["du", "--summarize", "--block-size=1", *folders.values()], capture_output=True, text=True, check=False
    ).stdout
    sizes = {path: int(size) for size, path in (line.split("\t") for line in said.splitlines())}
    return {name: sizes[folder] for name, folder in folders.items()}


def skew(used: Mapping[str, int]) -> float:
    """The largest distance from the even share, as a part of it."""
    even = sum(used.values()) / len(used)
    return max(abs(size - even) for size in used.values()) / even


def runner(cluster: Cluster) -> str:
    """The bookie whose process carries rebalancing out: the one that audited last."""
    audited = {
        name: cluster.metric(name, "magnetar_repair_last_audit_timestamp_seconds")
        for name in cluster.bookies
        if cluster.processes[name].alive
    }
    return max(audited, key=lambda name: audited[name])


def until_ended(client: Client, operation: str, timeout_s: float = END_S) -> RebalanceOperation:
    def ended() -> RebalanceOperation | None:
        found = client.admin.rebalance.status(operation)
        return found if found.ended is not None else None

    return until(f"{operation} ends", ended, timeout_s)


def until_moved(client: Client, operation: str, moves: int) -> None:
    until(
        f"{operation} has moved {moves} ledgers",
        lambda: client.admin.rebalance.status(operation).moves_done >= moves,
        END_S,
    )


def copied_bytes(cluster: Cluster) -> float:
    """What was copied to all bookies, by their own count. Less than what was moved where a target had some already."""
    return sum(cluster.metric(name, "magnetar_repair_copied_bytes_total") for name in cluster.bookies)


def average_rate(operation: RebalanceOperation, size_bytes: float) -> float:
    """Bytes per second, from its begin to its end."""
    assert operation.ended is not None
    return size_bytes / (operation.ended - operation.created).total_seconds()
