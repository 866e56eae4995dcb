"""Magnetar beside others from Python, in one run: `make bench-peers`.

    python tests/performance/peers/run.py [--only WORDS] [--seconds N] [--data-dir DIR]

Three copies of everything on this machine, one client process. Each peer runs twice: synced to the disk before the
answer, and with its own defaults; Magnetar always syncs. The ratios say how many times as fast as the peer Magnetar is,
for a latency how many times as long the peer takes. Messages are sent one by one at both (send_nowait here), since
that is what the peers have; beside it stands what send_many does. What a peer needs is fetched into
MAGNETAR_PEERS_CACHE, by default ~/.cache/magnetar-peers; a peer that is not to be had, or does not start, is one line.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import fetching
import servers

CLIENTS = Path(__file__).parent / "clients.py"
CLIENT_S_MAX = 180.0
COLUMNS = ("publish 100 B /s", "consume 100 B /s", "publish 1 KiB /s", "latency p50 ms", "latency p99 ms")
LATENCIES = 3
"""The first of the columns in which less is better."""

Row = list[float]


@dataclass(frozen=True, slots=True)
class Peer:
    """A client, and the cluster for it; `default` is what its defaults do about syncing."""

    client: str
    cluster: Callable[..., AbstractContextManager[str]]
    default: str
    default_syncs: bool = False


PEERS = (
    Peer("nats-py", servers.nats, "synced every 2 minutes"),
    Peer("confluent-kafka", servers.kafka, "never synced"),
    Peer("aiokafka", servers.kafka, "never synced"),
    Peer("pulsar-client", servers.pulsar, "synced", default_syncs=True),
)


class Failed(Exception):
    """A workload that did not end well; the message is one line."""


def peer_row(peer: Peer, folder: Path, fsync: bool, seconds: float) -> Row:
    with peer.cluster(folder, fsync=fsync) as addresses:

        def figures(workload: str, size: int = 0) -> dict[str, float]:
            command = [str(fetching.python()), str(CLIENTS), peer.client, workload, "--servers", addresses]
            return ran([*command, "--size", str(size), "--seconds", str(seconds)])

        figures("prepare")
        small, consumed, large = figures("publish", 100), figures("consume"), figures("publish", 1024)
        one = figures("latency", 1024)
    return [*(each["messages"] / each["elapsed_s"] for each in (small, consumed, large)), one["p50_ms"], one["p99_ms"]]


def magnetar_row(folder: Path, mode: str, seconds: float) -> Row:
    def figures(*arguments: str) -> dict[str, float]:
        command = [sys.executable, "-m", "magnetar.cli.main", "bench", *arguments, "--seconds", str(seconds)]
        result = ran([*command, "--local", "3,1", "--data-dir", str(folder), "--output", "json"])
        return {**result, **result["latency_ms"]}  # type: ignore[dict-item]

    small, large = (figures("publish", "--mode", mode, "--size", size) for size in ("100", "1024"))
    consumed = figures("consume", "--size", "100", "--form", "batches" if mode == "many" else "messages")
    one = figures("latency", "--size", "1024")
    return [*(each["msgs_per_s"] for each in (small, consumed, large)), one["p50"], one["p99"]]


def ran(command: list[str]) -> dict[str, float]:
    """The JSON that it prints. Raises Failed."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=CLIENT_S_MAX)
    except subprocess.TimeoutExpired:
        raise Failed(f"did not end within {CLIENT_S_MAX:g} s") from None
    if done.returncode:
        raise Failed(" ".join(done.stderr.strip().splitlines()[-1:]))
    found: dict[str, float] = json.loads(done.stdout or "{}")
    if found and not found["messages"]:
        raise Failed(f"{command[2]} {command[3]} moved no message")
    return found


def ratios(own: Row, theirs: Row) -> str:
    shown = [theirs[at] / own[at] if at >= LATENCIES else own[at] / theirs[at] for at in range(len(COLUMNS))]
    return " | ".join(f"{ratio:.1f}x" for ratio in shown)


def figures_of(row: Row) -> str:
    return " | ".join(f"{figure:,.0f}" if at < LATENCIES else f"{figure:.1f}" for at, figure in enumerate(row))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="peers whose name has these words")
    parser.add_argument("--seconds", type=float, default=5.0, help="of each workload")
    parser.add_argument("--data-dir", type=Path, default=Path(), help="on the disk to measure")
    asked = parser.parse_args()
    print(f"| | {' | '.join(COLUMNS)} |\n|---|{'---|' * len(COLUMNS)}", flush=True)
    with tempfile.TemporaryDirectory(prefix="magnetar-peers-", dir=asked.data_dir.resolve()) as folder:
        own = magnetar_row(Path(folder), "nowait", asked.seconds)
        print(f"| magnetar, synced, send_nowait and messages | {figures_of(own)} |", flush=True)
        many = magnetar_row(Path(folder), "many", asked.seconds)
        print(f"| magnetar, synced, send_many and batches() | {figures_of(many)} |", flush=True)
        for peer in PEERS:
            if asked.only not in peer.client:
                continue
            for fsync, name in ((True, "synced"), (peer.default_syncs, f"defaults: {peer.default}")):
                home = Path(tempfile.mkdtemp(dir=folder))
                try:
                    theirs = peer_row(peer, home, fsync, asked.seconds)
                except (Failed, fetching.NotFetched, servers.NotStarted, subprocess.SubprocessError) as failed:
                    print(f"| {peer.client}, {name}: {' '.join(str(failed).split())} |", flush=True)
                    continue
                print(f"| {peer.client}, {name} | {figures_of(theirs)} |", flush=True)
                print(f"| magnetar by that | {ratios(own, theirs)} |", flush=True)


if __name__ == "__main__":
    main()
