"""What it takes to even a cluster out: an empty fourth bookie joins three filled ones while clients go on.

    python tests/performance/rebalance.py [--gb 5] [--throttle 10MB/s] [--data-dir DIR]

The cluster is real processes: `magnetar metadata`, three bookies, two brokers. Printed: how long it took to fill it and
to move the new bookie's share, at which rate, how the rate kept to the throttle, how even records and disks are before
and after (`du`, with clients running), what clients saw, and whether every copy of what moved is whole. Fails if the
disks do not come within 5 % of even, or the throttle is missed by 10 %.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from cluster.harness import Cluster, until
from cluster.load import Load
from cluster.rebalancing import average_rate, disk_bytes, fill, join, skew, until_ended

from magnetar.cli.quantities import human_rate, parse_rate
from magnetar.client.sync import Client

NEW = "bookie3"
SPACE_RETURNS_S = 180.0
MOVED_S = 3600.0
EVEN = 0.05
HELD = 0.10


def tell(what: str, *facts: object) -> None:
    print(f"{what:<28}", *facts, flush=True)


def shares(cluster: Cluster) -> str:
    used = disk_bytes(cluster)
    sizes = ", ".join(f"{name} {size / 1e6:,.0f} MB" for name, size in used.items())
    return f"{sizes}; skew {skew(used):.1%}"


def move(client: Client, throttle: int) -> None:
    plan = client.admin.rebalance.plan()
    tell(
        "plan",
        f"{len(plan.moves)} segments, {plan.bytes / 1e6:,.0f} MB, skew {plan.skew_before:.1%} ->",
        f"{plan.skew_after:.1%}",
    )
    begun = client.admin.rebalance.apply(plan, throttle=throttle)
    operation = until_ended(client, begun.operation, MOVED_S)
    assert operation.ended is not None
    rate = average_rate(operation, operation.bytes_done)
    tell("time", f"{(operation.ended - operation.created).total_seconds():.1f} s")
    tell("rate", human_rate(rate), f"of {human_rate(throttle)}, {rate / throttle - 1:+.1%}")
    assert abs(rate / throttle - 1) <= HELD, "the throttle was not held"
    tell(
        "moved",
        f"{operation.moves_done} segments, {operation.bytes_done / 1e6:,.0f} MB, skipped {operation.moves_skipped}",
    )
    verified = client.admin.rebalance.verify(operation.operation)
    tell("compared", f"{verified.copies:,} copies of {verified.entries:,} entries, problems {len(verified.problems)}")
    assert not verified.problems


def space_returns(cluster: Cluster) -> None:
    """While clients go on: what has moved leaves the disks that it came from."""
    begin = time.monotonic()
    try:
        until("the disks are even", lambda: skew(disk_bytes(cluster)) <= EVEN, SPACE_RETURNS_S)
    finally:
        tell("disks after", f"{time.monotonic() - begin:.0f} s later:", shares(cluster))


def run(folder: Path, size_bytes: int, throttle: int) -> None:
    cluster = Cluster(folder)
    load = Load(cluster, folder)
    try:
        cluster.start()
        with cluster.connect() as client:
            begin = time.monotonic()
            fill(client, "filled", size_bytes)
            tell("filled", f"{size_bytes / 1e9:.2f} GB in {time.monotonic() - begin:.0f} s")
            join(cluster, NEW)
            tell("disks before", shares(cluster))
            load.start()
            move(client, throttle)
            tell("skew by records", f"{client.admin.rebalance.plan().skew_before:.1%}")
            space_returns(cluster)
            verdict = load.finish()
            tell("clients", f"{verdict.messages_per_s:,.0f} msgs/s, lost {verdict.lost}, twice {verdict.duplicated},",
                 f"p99 {verdict.latency.p99:.0f} ms, longest pause {verdict.longest_pause_s:.2f} s")  # fmt: skip
    finally:
        load.close()
        cluster.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gb", type=float, default=5.0, help="of messages, before their copies")
    parser.add_argument("--throttle", type=parse_rate, default=parse_rate("10MB/s"))
    parser.add_argument("--data-dir", type=Path, default=None)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.data_dir) as folder:
        run(Path(folder), int(arguments.gb * 1e9), arguments.throttle)


if __name__ == "__main__":
    main()
