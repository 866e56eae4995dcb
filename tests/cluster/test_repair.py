"""Storage that heals and moves under load: lost bookies, drained ones, and faults in the middle of either."""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Iterator

import pytest
from cluster.copies import compare_copies
from cluster.harness import LEASE_S, METADATA, Cluster, until
from cluster.load import Judge, Load

DELAY_S = 1.0
SLOW, FAST = 2_000_000, 200_000_000
"""Rates of repair, in bytes a second: a fault in the middle of it needs time."""
REPAIRED_S = 120.0
PROBE_PAUSE_S = 0.02
FILL_MESSAGES = 150_000
SETTINGS = {"broker": {"segment_bytes": 4 << 20, "trim_interval_s": 1.0}, "bookie": {"gc_interval_s": 5.0}}


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with Cluster(tmp_path_factory.mktemp("cluster"), bookies=4, settings=SETTINGS) as cluster:
        yield cluster


class Probe:
    """A producer of single messages, and how long each took to be answered."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self._stopping = threading.Event()
        self.latencies: list[tuple[float, float]] = []
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        with self._cluster.connect() as client, client.producer("probe") as producer:
            while not self._stopping.wait(PROBE_PAUSE_S):
                begin = time.monotonic()
                producer.send(b"x" * 100)
                self.latencies.append((begin, time.monotonic() - begin))

    def stop(self) -> None:
        self._stopping.set()
        self._thread.join()

    def p99_ms(self, begin: float, end: float) -> float:
        found = sorted(latency for at, latency in self.latencies if begin <= at < end)
        return 1000 * found[int(len(found) * 0.99)] if found else float("nan")


def repair(cluster: Cluster, *, throttle: int = FAST) -> None:
    with cluster.connect() as client:
        client.admin.cluster.repair(enabled=True, delay=DELAY_S, throttle=throttle)


def ledgers_of(cluster: Cluster, bookie: str) -> int:
    with cluster.connect() as client:
        return next((one.ledgers for one in client.admin.bookies.list() if one.id == bookie), 0)


def until_empty(cluster: Cluster, bookie: str) -> None:
    until(f"no ledger names {bookie}", lambda: ledgers_of(cluster, bookie) == 0, REPAIRED_S)


def until_whole(cluster: Cluster) -> None:
    """Nothing is left to copy."""

    def done() -> bool:
        with cluster.connect() as client:
            return not client.admin.cluster.repair().copies

    until("all copies are made", done, REPAIRED_S)


def check_copies(cluster: Cluster, what: str) -> None:
    found = compare_copies(cluster._addresses[METADATA])
    print(f"\n{what}: {found.ledgers} ledgers, {found.entries:,} entries, {found.copies:,} copies compared")
    assert not found.problems, found.problems[:10]
    assert found.copies >= 3 * found.entries > 0


def remove(cluster: Cluster, bookie: str) -> None:
    """What is left of a bookie that has stopped; started again it is a new one."""
    with cluster.connect() as client:
        until(f"{bookie} has no session", lambda: _state(client, bookie) == "LOST", LEASE_S + 30)
        client.admin.bookies.decommission(bookie)
    shutil.rmtree(cluster.data_dir(bookie), ignore_errors=True)


def _state(client: object, bookie: str) -> str:
    return next(one.state for one in client.admin.bookies.list() if one.id == bookie)  # type: ignore[attr-defined]


def refuses_with_the_remedy(cluster: Cluster, bookie: str) -> None:
    process = cluster.processes[bookie]
    before = len(process.log.read_text()) if process.log.exists() else 0
    cluster.launch(bookie)
    assert process.wait() == 1
    (line,) = process.log.read_text()[before:].splitlines()
    assert "its disk was lost or swapped" in line
    assert f"--repair-bookie {bookie}" in line


def test_what_a_killed_bookie_held_is_made_anew_under_load(cluster: Cluster, load: Load, judge: Judge) -> None:
    repair(cluster)
    load.run_until_answered(FILL_MESSAGES)
    probe = Probe(cluster)
    quiet = load.run(5.0)
    begin = time.monotonic()
    with load.fault("SIGKILL of bookie0 and rm -rf of its disk", redelivers=False):
        cluster.kill("bookie0")
        shutil.rmtree(cluster.data_dir("bookie0"))
        until_empty(cluster, "bookie0")
    repaired = time.monotonic()
    load.run(1.0)
    probe.stop()
    print(
        f"\nrepaired in {repaired - begin:.1f} s; p99 of single messages: quiet {probe.p99_ms(*quiet):.1f} ms, "
        f"repair {probe.p99_ms(begin, repaired):.1f} ms"
    )
    refuses_with_the_remedy(cluster, "bookie0")
    judge(load)
    until_whole(cluster)
    check_copies(cluster, "after the loss of a bookie")
    remove(cluster, "bookie0")
    cluster.restart("bookie0")


def test_a_bookie_is_drained_while_it_serves_and_then_removed(cluster: Cluster, load: Load, judge: Judge) -> None:
    repair(cluster)
    load.run_until_answered(FILL_MESSAGES // 3)
    with load.fault("drain of bookie1", redelivers=False):
        with cluster.connect() as client:
            assert client.admin.bookies.drain("bookie1").ledgers > 0
        until_empty(cluster, "bookie1")
        assert cluster.processes["bookie1"].alive
        load.run(1.0)
        assert ledgers_of(cluster, "bookie1") == 0, "it takes no new ledgers"
        assert cluster.processes["bookie1"].terminate() == 0
        remove(cluster, "bookie1")
    load.run(1.0)
    judge(load)
    until_whole(cluster)
    check_copies(cluster, "after a drain")
    cluster.restart("bookie1")


@pytest.mark.long
def test_bookies_that_die_as_source_and_as_target_in_the_middle_only_delay_it(
    cluster: Cluster, load: Load, judge: Judge
) -> None:
    repair(cluster, throttle=SLOW)
    load.run_until_answered(FILL_MESSAGES // 3)
    with load.fault("SIGKILL of bookies in the middle of a repair", redelivers=False):
        cluster.kill("bookie2")
        until("copies are being made", lambda: _copied(cluster, "bookie1") + _copied(cluster, "bookie3") > 0)
        for victim in ("bookie3", "bookie1"):
            # Each is source of some copies and target of others.
            cluster.kill(victim)
            load.run(LEASE_S + 2.0)
            cluster.restart(victim)
        repair(cluster)
        until_empty(cluster, "bookie2")
    judge(load)
    until_whole(cluster)
    check_copies(cluster, "after faults in the middle")
    shutil.rmtree(cluster.data_dir("bookie2"))
    remove(cluster, "bookie2")
    cluster.restart("bookie2")


def _copied(cluster: Cluster, bookie: str) -> float:
    return cluster.metric(bookie, "magnetar_repair_copied_bytes_total")


@pytest.mark.long
def test_a_metadata_store_that_dies_in_the_middle_only_delays_it(cluster: Cluster, load: Load, judge: Judge) -> None:
    repair(cluster, throttle=SLOW)
    load.run_until_answered(FILL_MESSAGES // 3)
    with load.fault("SIGKILL of the metadata store in the middle of a repair", redelivers=True):
        cluster.kill("bookie0")
        until("copies are being made", lambda: sum(_copied(cluster, f"bookie{i}") for i in (1, 2, 3)) > 0)
        cluster.kill(METADATA)
        load.run(3.0)
        cluster.restart(METADATA)
        repair(cluster)
        until_empty(cluster, "bookie0")
    judge(load)
    until_whole(cluster)
    check_copies(cluster, "after the death of the metadata store")
