"""Every verb of `magnetar bench` against one real standalone, and what they are made of."""

from __future__ import annotations

import asyncio
import gzip
import json
import signal
import subprocess
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from magnetar.cli import machine
from magnetar.cli.bench.failover import Failover, Fault
from magnetar.cli.bench.latencies import Latencies
from magnetar.cli.bench.measuring import measured
from magnetar.cli.bench.payloads import generated, rows_of
from magnetar.cli.bench.schedule import Schedule
from magnetar.cli.bench.target import Target, file_system
from magnetar.cli.local_cluster import Member

SHAPE = {
    "test", "settings", "messages", "msgs_per_s", "mb_per_s", "latency_ms", "disk_mb_per_s", "disk_ratio",
    "bytes_written_per_byte", "frames_per_message", "grpc_mb_per_s", "grpc_frames_per_s", "cpu_busy", "processes",
    "runs",
}  # fmt: skip
SHORT = ("--seconds", 0.1, "--warm-up", 0)


@pytest.fixture(scope="module")
def cluster(magnetar: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """The command with MAGNETAR_SERVER set to a standalone."""
    folder = tmp_path_factory.mktemp("standalone")
    server = magnetar.start("standalone", "--data-dir", folder, "--port", 0, "--http-port", 0, "--output", "json")
    try:
        line = server.process.stdout.readline()
        assert line, server.end(None).err
        yield type(magnetar)(json.loads(line)["server"])
    finally:
        ended = server.end()
    assert (ended.code, ended.err) == (0, "")


@pytest.fixture(autouse=True)
def short_probes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "DISK_PROBE_S", 0.01)
    monkeypatch.setattr(machine, "GRPC_PROBE_FRAMES", 20)
    monkeypatch.setattr(machine, "GRPC_PROBE_BLOCKS", 2)


def benched(cluster: Any, folder: Path, *arguments: object) -> dict[str, Any]:
    ran = cluster.call("bench", *arguments, *SHORT, "--data-dir", folder, "--output", "json")
    assert ran.code == 0, ran.err
    result: dict[str, Any] = json.loads(ran.out)
    return result


# --- verbs ---


@pytest.mark.parametrize(
    "arguments",
    [
        ["publish", "--batch", 100, "--keys", 10, "--topics", 2],
        ["publish", "--mode", "nowait", "--size", 100],
        ["publish", "--mode", "single", "--batch", 1, "--in-flight", 16, "--rate", 500],
        ["latency"],
        ["consume", "--bytes", 10_000, "--subscriptions", 2],
        ["consume", "--bytes", 10_000, "--form", "messages"],
        ["catch-up", "--bytes", 100_000],
        ["end-to-end", "--rate", 200],
        ["queue", "--bytes", 10_000, "--consumers", 2],
        ["queue", "--bytes", 10_000, "--form", "batches"],
    ],
    ids=lambda arguments: " ".join(map(str, arguments)),
)
def test_a_verb_measures_and_leaves_nothing(cluster: Any, tmp_path: Path, arguments: list[object]) -> None:
    result = benched(cluster, tmp_path, *arguments)
    assert set(result) == SHAPE
    assert result["test"] == arguments[0]
    assert result["messages"] > 0
    assert result["msgs_per_s"] > 0
    reads = arguments[0] in ("consume", "catch-up", "queue")
    assert set(result["latency_ms"]) == (set() if reads else {"p50", "p95", "p99", "p999", "max"})
    assert (result["disk_ratio"] is None) == reads
    assert [process["role"] for process in result["processes"]] == ["client"]
    assert [run["messages"] for run in result["runs"]] == [result["messages"]]
    assert json.loads(cluster.call("topics", "list", "--output", "json").out) == []
    assert list(tmp_path.iterdir()) == []


def test_the_median_of_several_runs_is_shown(cluster: Any, tmp_path: Path) -> None:
    result = benched(cluster, tmp_path, "publish", "--batch", 10, "--runs", 3)
    rates = sorted(run["msgs_per_s"] for run in result["runs"])
    assert len(rates) == 3
    assert result["msgs_per_s"] == rates[1]


def test_a_tail_beside_a_catch_up_is_compared_with_itself_in_quiet(cluster: Any, tmp_path: Path) -> None:
    result = benched(cluster, tmp_path, "catch-up", "--bytes", 100_000, "--tail-rate", 0.5)
    assert set(result) == SHAPE | {"tail_quiet_ms", "tail_beside_ms", "tail_p99_ratio"}
    assert result["tail_p99_ratio"] > 0


def test_a_table_has_what_the_json_has(cluster: Any, tmp_path: Path) -> None:
    ran = cluster.call("bench", "latency", *SHORT, "--runs", 2, "--data-dir", tmp_path)
    assert ran.code == 0
    for words in ("messages/s of each run", "latency p50 / p99", "share of the disk", "client: CPU, peak memory"):
        assert words in ran.out
    assert "median" in ran.err


def test_rows_of_a_file_are_published_with_their_keys(cluster: Any, tmp_path: Path) -> None:
    file = tmp_path / "rows.csv"
    file.write_text("id,name\n1,one\n2,two\n")
    result = benched(cluster, tmp_path, "publish", "--file", file, "--key-column", "name", "--compression", "lz4")
    assert result["settings"]["key_column"] == "name"
    assert result["mb_per_s"] == pytest.approx(result["msgs_per_s"] * 5 / 1e6, rel=0.01, abs=0.001)
    assert result["disk_ratio"] is None


@pytest.mark.parametrize("fault", list(Fault))
def test_failover_sends_the_fault_to_who_serves_or_stores_the_topic(cluster: Any, tmp_path: Path, fault: Fault) -> None:
    """The signal goes to a process of the victim's name that only waits: the cluster is another one, and goes on."""
    with subprocess.Popen(["sleep", "600"]) as victim:
        try:
            target = Target(cluster.environment["MAGNETAR_SERVER"], tmp_path, [Member(f"{fault}0", victim)])
            settings = {"seconds": 0.1, "warm_up": 0.0, "runs": 1}
            result = asyncio.run(measured(Failover(100, 200.0, fault), target, settings, 30.0))
            if fault is Fault.broker:
                assert victim.wait() == -signal.SIGKILL
            else:
                assert victim.poll() is None
        finally:
            victim.kill()
    assert set(result) == SHAPE | {"quiet_ms", "pause_s", "p999_ratio"}
    assert 0 < result["pause_s"] < 30
    assert result["quiet_ms"]["p50"] > 0


# --- refusals ---


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["publish", "--local", "1,1", "--data-dir", "/dev/shm"], 1, "/dev/shm is in memory"),
        (["publish", "--server", "localhost:1", "--local", "1,1"], 2, "exclude each other"),
        (["publish", "--key-column", "id"], 2, "--key-column needs --file"),
        (["failover", "--server", "localhost:1"], 2, "give it --local"),
        (["failover", "--local", "3,2", "--runs", "2"], 2, "--local 3,3"),
        (["failover", "--fault", "bookie", "--local", "2,1"], 2, "--local 3,1"),
        (["end-to-end", "--size", "7"], 2, "'--size'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_cannot_be_measured_is_refused(magnetar: Any, arguments: list[str], code: int, words: str) -> None:
    assert magnetar.call("bench", *arguments).is_refused(code, words)


def test_a_file_system_in_memory_is_known_as_one() -> None:
    assert file_system(Path("/dev/shm")) == "tmpfs"
    assert file_system(Path("/proc")) == "proc"


# --- parts ---


async def test_calls_are_due_at_a_fixed_rate_however_late_they_are_made() -> None:
    schedule = Schedule(60.0, per_s=1000.0)
    dues = [await schedule.next()]
    time.sleep(0.02)  # noqa: ASYNC251  # nobody asks meanwhile
    asked = time.perf_counter()
    dues += [await schedule.next() for _ in range(5)]
    steps = [later - earlier for earlier, later in pairwise(dues)]  # type: ignore[operator]
    assert steps == pytest.approx([0.001] * 5)
    assert asked - dues[-1] > 0.01  # type: ignore[operator]


async def test_a_schedule_without_a_rate_ends_when_its_time_is_over() -> None:
    assert await Schedule(60.0).next() is not None
    assert await Schedule(0.0).next() is None
    assert await Schedule(0.0, per_s=10.0).next() is None


def test_percentiles_are_exact_to_three_digits() -> None:
    latencies = Latencies()
    assert latencies.figures_ms() == {}
    for milliseconds in range(1, 1001):
        latencies.record(milliseconds / 1e3)
    assert latencies.figures_ms() == pytest.approx({"p50": 500, "p95": 950, "p99": 990, "p999": 999, "max": 1000}, 1e-3)
    latencies.record(1e9)
    assert latencies.figures_ms()["max"] == pytest.approx(3.6e6, 1e-3)


def test_payloads_come_in_groups_with_keys_in_turn() -> None:
    payloads = generated(10, 3, 5000)
    group = payloads.next()
    assert len(group.payloads) == 5000
    assert group.payload_bytes == 50_000
    assert group.keys is not None
    assert group.keys[:4] == [b"key-0", b"key-1", b"key-2", b"key-0"]
    assert generated(0, 0, 1).next().keys is None
    every = generated(1, 10_000, 10_000).next().keys
    assert every is not None
    assert len(set(every)) == 10_000


def test_rows_are_read_from_gzip_too(tmp_path: Path) -> None:
    file = tmp_path / "rows.csv.gz"
    file.write_bytes(gzip.compress(b"id,name\n1,\n2,two\n"))
    group = rows_of(file, "name", 3).next()
    assert group.payloads == [b"1,", b"2,two", b"1,"]
    assert group.keys == [None, b"two", None]
