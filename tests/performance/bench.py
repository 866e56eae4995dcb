"""What has a target, measured: `make bench`, or a few seconds for each with `make bench QUICK=1`.

    python tests/performance/bench.py [--quick] [--check] [--only WORDS] [--data-dir DIR] [--json FILE]

Each row starts clusters of its own by `magnetar bench --local`: 3 bookies, 3 copies of which 2 must be synced, one
broker process and one client process if it says nothing else. The table is Markdown. With --check only ratios of one
run are judged, against limits that no noise of a machine explains, and the exit code is 1 if one is not kept.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from churn import churn

Result = dict[str, Any]
Judged = tuple[str, bool | None]
"""What was measured in words, and whether the target is met; None: there is none."""

FLIGHTS = Path(__file__).parents[1] / "data" / "flights-2013-01.csv.gz"
LEASE_S = 5.0
MIB = 1.048576
COMMAND_S_MAX = 3600.0


@dataclass(frozen=True, slots=True)
class Length:
    """How long everything takes. `full` or `quick`, by the argument."""

    quick: bool

    def of(self, full: float, quick: float = 3.0) -> float:
        return quick if self.quick else full

    @property
    def runs(self) -> int:
        return 1 if self.quick else 3


class Bench:
    """Runs `magnetar bench`, and remembers the results by their command line: rows share what is the same."""

    def __init__(self, data_dir: Path, length: Length) -> None:
        self.data_dir = data_dir
        self.length = length
        self.results: dict[str, Result] = {}

    def __call__(self, verb: str, **options: object) -> Result:
        options = {"seconds": self.length.of(10.0), "warm_up": self.length.of(3.0, 1.0), **options}
        words = [word for name, value in options.items() for word in (f"--{name.replace('_', '-')}", str(value))]
        line = " ".join([verb, *words])
        if line not in self.results:
            print(f"magnetar bench {line}", file=sys.stderr, flush=True)
            self.results[line] = self._run([verb, *words])
        return self.results[line]

    def _run(self, arguments: list[str]) -> Result:
        command = [sys.executable, "-m", "magnetar.cli.main", "bench", *arguments]
        if "--local" not in arguments:
            command += ["--local", "3,1"]
        command += ["--data-dir", str(self.data_dir), "--timeout", "60", "--output", "json"]
        ran = subprocess.run(command, capture_output=True, text=True, timeout=COMMAND_S_MAX)
        if ran.returncode:
            return {"failed": ran.stderr.strip()}
        result: Result = json.loads(ran.stdout)
        return result


@dataclass(frozen=True, slots=True)
class Row:
    """Something with a target: how it is measured, and when it is met."""

    what: str
    target: str
    measure: Callable[[Bench], Judged]


class Failed(Exception):
    """A measurement that did not end."""


def good(result: Result) -> Result:
    if "failed" in result:
        raise Failed(result["failed"])
    return result


def broker_figure(result: Result, name: str) -> float:
    return float(sum(one[name] for one in result["processes"] if one["role"].startswith("broker")))


# --- publishing ---


def full_disk(bench: Bench) -> Judged:
    result = good(bench("publish", size=1024, seconds=bench.length.of(60.0), runs=bench.length.runs))
    ratio, busy = result["disk_ratio"], result["cpu_busy"]
    return f"{ratio:.2f}: {result['mb_per_s']:.0f} of {result['disk_mb_per_s']:.0f} MB/s, cores {busy:.0%} busy", (
        ratio >= 0.65 or (ratio >= 0.55 and busy > 0.95)
    )


def small_messages(bench: Bench) -> Result:
    return good(bench("publish", size=100, in_flight=32, runs=bench.length.runs))


def rate_of(target: float, per: int = 1, **options: object) -> Callable[[Bench], Judged]:
    """Messages a second of a publishing load, or calls of `per` messages."""

    def measure(bench: Bench) -> Judged:
        rate = good(bench("publish", runs=bench.length.runs, **options))["msgs_per_s"] / per
        return f"{rate:,.0f} /s", rate >= target

    return measure


def small_messages_rate(bench: Bench) -> Judged:
    rate = small_messages(bench)["msgs_per_s"]
    return f"{rate:,.0f} /s", rate >= 400_000


def frames(bench: Bench) -> Judged:
    found = small_messages(bench)["frames_per_message"]
    return f"{found:.4f}", found <= 0.01


def percentiles(result: Result, **limits_ms: float) -> Judged:
    latencies = result["latency_ms"]
    text = ", ".join(f"{name.replace('p999', 'p99.9')} {latencies[name]:.1f} ms" for name in limits_ms)
    return text, all(latencies[name] <= limit for name, limit in limits_ms.items())


def one_at_a_time(bench: Bench) -> Judged:
    return percentiles(good(bench("latency", size=1024, runs=bench.length.runs)), p50=2.5, p99=8.0)


def half_load(bench: Bench) -> Judged:
    most = good(bench("publish", size=1024, seconds=bench.length.of(60.0), runs=bench.length.runs))["msgs_per_s"]
    rate = round(most / 2, -2)
    result = good(bench("publish", size=1024, rate=rate, batch=100, seconds=bench.length.of(600.0, 5.0)))
    text, met = percentiles(result, p99=50.0, p999=150.0)
    return f"{text} at {result['msgs_per_s']:,.0f} of {rate:,.0f} /s", met and result["msgs_per_s"] > 0.99 * rate


def thousand_producers(bench: Bench) -> Judged:
    result = good(
        bench("publish", size=100, mode="single", topics=1000, rate=10_000, warm_up=bench.length.of(10.0, 3.0))
    )
    text, met = percentiles(result, p99=60.0)
    memory_mib = broker_figure(result, "peak_rss_mb") / MIB
    return f"{text}, {memory_mib:.0f} MiB, {result['msgs_per_s']:,.0f} /s", met and memory_mib < 512


def two_workers(bench: Bench) -> Judged:
    one, two = (
        good(bench("publish", size=1024, topics=16, batch=100, in_flight=256, local=local)) for local in ("3,1", "3,2")
    )
    per_message = [broker_figure(result, "cpu_s") / result["messages"] for result in (one, two)]
    shares = [process["cpu_s"] for process in two["processes"] if process["role"].startswith("broker")]
    text = f"{per_message[1] / per_message[0]:.2f}x, CPU seconds of each {' and '.join(f'{s:.1f}' for s in shares)}"
    return text, per_message[1] <= 1.15 * per_message[0]


def long_backlog(bench: Bench) -> Judged:
    """Messages without a subscription are kept: what is published is the backlog."""
    result = good(bench("publish", size=1024, warm_up=bench.length.of(30.0), seconds=bench.length.of(180.0, 5.0)))
    growth = broker_figure(result, "rss_growth_mb")
    stored = result["messages"] * result["settings"]["size"] / 1e9
    return f"{growth:+.0f} MB with {stored:.1f} GB", growth <= 150


def churned(bench: Bench) -> Judged:
    gigabytes = bench.length.of(10.0, 0.5)
    print(f"churn: 200 topics, {gigabytes:g} GB, half of them deleted meanwhile", file=sys.stderr, flush=True)
    found = asyncio.run(churn(bench.data_dir, int(gigabytes * 1e9), bench.length.of(600.0, 90.0)))
    bench.results["churn"] = found
    text = f"{found['written_per_byte']:.2f}, disk {found['disk_by_live']:.2f}x after {found['collected_s']:.0f} s"
    return text, found["written_per_byte"] <= 2.3 and found["disk_by_live"] <= 1.6


# --- consuming ---


def cached(bench: Bench) -> Judged:
    rates = [good(bench("consume", size=100, form=form, runs=bench.length.runs))["msgs_per_s"] for form in FORMS]
    return f"{rates[0]:,.0f} / {rates[1]:,.0f} /s", rates[0] >= 1_500_000 and rates[1] >= 350_000


FORMS = ("batches", "messages")


def catching_up(bench: Bench) -> Judged:
    size = int(bench.length.of(4e9, 4e8))
    alone = good(bench("catch-up", bytes=size, seconds=bench.length.of(30.0, 5.0)))
    beside = good(bench("catch-up", bytes=size, tail_rate=10, seconds=bench.length.of(60.0, 5.0)))
    ratio = beside["tail_p99_ratio"]
    text = f"{alone['mb_per_s']:.0f} / {beside['mb_per_s']:.0f} MB/s, tail p99 {ratio:.1f}x"
    return text, alone["mb_per_s"] >= 250 and beside["mb_per_s"] >= 100 and ratio <= 2.0


def fan_out(bench: Bench) -> Judged:
    rate = good(bench("consume", size=1024, subscriptions=10, runs=bench.length.runs))["mb_per_s"]
    return f"{rate:.0f} MB/s", rate >= 250


def queues(bench: Bench) -> Judged:
    rates = [good(bench("queue", size=100, consumers=count, runs=bench.length.runs))["msgs_per_s"] for count in (1, 8)]
    return f"{rates[0]:,.0f} / {rates[1]:,.0f} /s", min(rates) >= 200_000


# --- faults ---


def killed_broker(bench: Bench) -> Judged:
    pause = good(bench("failover", local="3,2", seconds=bench.length.of(20.0, 8.0)))["pause_s"]
    return f"{pause:.1f} s", pause <= LEASE_S + 1


def stopped_bookie(bench: Bench) -> Judged:
    ratio = good(bench("failover", fault="bookie", local="3,1", seconds=bench.length.of(30.0, 8.0)))["p999_ratio"]
    return f"{ratio:.1f}x", ratio <= 2.0


ROWS = (
    Row("publish 1 KiB: disk_ratio", "0.65, or 0.55 with both cores above 95 %", full_disk),
    Row("publish 100 B, send_many", "400,000 /s", small_messages_rate),
    Row(
        "publish flights, lz4, keyed, send_many",
        "700,000 /s",
        rate_of(700_000, file=FLIGHTS, key_column="tailnum", compression="lz4", in_flight=32),
    ),
    Row("send_nowait, 100 B, one producer", "250,000 /s", rate_of(250_000, mode="nowait", size=100)),
    Row("one batch per publish, 1 KiB, 512 in flight", "12,000 /s",
        rate_of(12_000, mode="single", batch=1, in_flight=512)),
    Row("1,000 shards, a batch of ten 100 B each in turn", "6,000 /s",
        rate_of(6_000, per=10, size=100, batch=10, topics=1000, in_flight=512)),
    Row("one at a time, 1 KiB", "p50 2.5 ms, p99 8 ms", one_at_a_time),
    Row("half the maximum throughput", "p99 50 ms, p99.9 150 ms", half_load),
    Row("consume 100 B from cache: batches() / messages", "1,500,000 / 350,000 /s", cached),
    Row("catch-up, alone / beside a tail of 10 MB/s", "250 / 100 MB/s, tail p99 2x", catching_up),
    Row("fan-out, 10 subscriptions, 1 KiB", "250 MB/s", fan_out),
    Row("queue, 100 B, individual acks, 1 / 8 consumers", "200,000 / 200,000 /s", queues),
    Row("1,000 topics, 10 messages/s each", "p99 60 ms, 512 MiB", thousand_producers),
    Row("two brokers against one: CPU per message", "1.15x", two_workers),
    Row("broker with a backlog: growth of memory", "150 MB", long_backlog),
    Row("200 topics, half deleted: bytes written per byte and copy", "2.3, disk 1.6x", churned),
    Row("broker killed: pause", "lease + 1 s = 6 s", killed_broker),
    Row("bookie stopped: p99.9 by the quiet one", "2x", stopped_bookie),
    Row("frames per message, 100 B send_many", "0.01", frames),
)  # fmt: skip


# --- growth: no targets, but it must be straight ---


def growth(bench: Bench) -> Iterator[tuple[str, str]]:
    quick = bench.length.quick
    for topics in (1, 10, 100, 1000) if quick else (1, 10, 100, 1000, 10_000):
        result = bench("publish", size=1024, topics=topics, batch=10, in_flight=256)
        yield f"publish 1 KiB to {topics:,} topics", _growth(result)
    for size in (10**6, 10**7, 10**8) if quick else (10**6, 10**7, 10**8, 10**9, 10**10):
        yield f"catch up with {size / 1e6:,.0f} MB", _growth(bench("catch-up", bytes=size, seconds=60))


def _growth(result: Result) -> str:
    if "failed" in result:
        return f"failed: {result['failed']}"
    return f"{result['mb_per_s']:.1f} MB/s, broker at most {broker_figure(result, 'peak_rss_mb'):.0f} MB"


# --- what continuous integration runs ---

CHECKS: tuple[tuple[str, str, Callable[[float], bool], str], ...] = (
    ("publish 1 KiB: disk_ratio", "disk_ratio", lambda ratio: ratio >= 0.65 / 2, "0.33 at least"),
    ("publish 1 KiB: bytes written per byte", "bytes_written_per_byte", lambda written: written <= 2.6, "2.6 at most"),
    ("publish 100 B: frames per message", "frames_per_message", lambda found: found <= 0.02, "0.02 at most"),
)


def check(bench: Bench) -> bool:
    by_size = {"1 KiB": 1024, "100 B": 100}
    kept = True
    for what, name, holds, limit in CHECKS:
        figure = good(bench("publish", size=by_size[what.partition(":")[0].removeprefix("publish ")], seconds=5))[name]
        kept &= holds(figure)
        print(f"{'ok  ' if holds(figure) else 'FAIL'}  {what} is {figure:.3f}, {limit}")
    return kept


def machine() -> str:
    cpu = next((line.partition(":")[2].strip() for line in Path("/proc/cpuinfo").read_text().splitlines()
                if line.startswith("model name")), platform.machine())  # fmt: skip
    memory_gb = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    return f"{os.cpu_count()} cores of {cpu}, {memory_gb:.0f} GB, Python {platform.python_version()}"


def table(bench: Bench, rows: list[Row]) -> None:
    print(f"\n{machine()}\n\n| what | target | measured | met |\n|---|---|---|---|", flush=True)
    for row in rows:
        try:
            text, met = row.measure(bench)
        except Failed as failed:
            text, met = f"failed: {failed}", False
        print(f"| {row.what} | {row.target} | {text} | {'yes' if met else 'no'} |", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a few seconds for each row")
    parser.add_argument("--check", action="store_true", help="only the ratios that must hold everywhere")
    parser.add_argument("--only", default="", help="rows whose name has these words")
    parser.add_argument("--no-growth", action="store_true", help="without the tables of growth")
    parser.add_argument("--data-dir", type=Path, default=Path(), help="on the disk to measure")
    parser.add_argument("--json", type=Path, help="write every result to this file")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="magnetar-targets-", dir=asked.data_dir) as folder:
        bench = Bench(Path(folder), Length(asked.quick or asked.check))
        if asked.check:
            return 0 if check(bench) else 1
        table(bench, [row for row in ROWS if asked.only in row.what])
        if not asked.only and not asked.no_growth:
            print("\n| growth | measured |\n|---|---|", flush=True)
            for what, text in growth(bench):
                print(f"| {what} | {text} |", flush=True)
    if asked.json:
        asked.json.write_text(json.dumps(bench.results, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
