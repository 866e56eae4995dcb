"""A bookie on a small disk of its own that fills up: read-only, and back by itself when there is room. Needs root."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from cluster.harness import Cluster, on_its_own, until
from cluster.load import Judge, Load, Window

MIB = 1 << 20
DISK_BYTES = 512 * MIB
STEP_BYTES = 16 * MIB
LEFT_BYTES = 2 * MIB
"""Less than what is written until the bookie looks at its disk again."""

SETTINGS = {"bookie": {"memory_bytes": 32 * MIB}, "broker": {"segment_bytes": 4 * MIB}}
SMALL = "bookie0"
GOES_ON_S = 2.0


@contextmanager
def mounted(disk: Path) -> Iterator[Path]:
    """A disk that is memory."""
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "tmpfs", str(disk)], check=True)
    try:
        yield disk
    finally:
        subprocess.run(["umount", str(disk)], check=True)


@pytest.fixture(scope="module")
def cluster(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    metadata, bookies = request.param
    folder = tmp_path_factory.mktemp("cluster")
    with mounted(tmp_path_factory.mktemp("disk")) as disk:
        small = {SMALL: disk / SMALL}
        with Cluster(folder, metadata=metadata, bookies=bookies, settings=SETTINGS, folders=small) as cluster:
            yield cluster


@pytest.fixture
def disk(cluster: Cluster) -> Path:
    return cluster.data_dir(SMALL).parent


def free_bytes(disk: Path) -> int:
    status = os.statvfs(disk)
    return status.f_bavail * status.f_frsize


@contextmanager
def filled(disk: Path, left_bytes: int) -> Iterator[None]:
    """Something else takes the room, but for so many bytes."""
    ballast = disk / "ballast"
    with ballast.open("wb") as file:
        taken = 0
        # In steps: the load takes room, too, while a large one is being made.
        while (step := min(STEP_BYTES, free_bytes(disk) - left_bytes)) > 0:
            with suppress(OSError):
                os.posix_fallocate(file.fileno(), taken, step)
                taken += step
    try:
        yield
    finally:
        ballast.unlink()


@on_its_own(("server", 3), long=[("etcd", 4)])
def test_a_bookie_whose_disk_is_filled_is_read_only_and_comes_back_by_itself(
    cluster: Cluster, disk: Path, load: Load, judge: Judge
) -> None:
    load.run(2.0)
    # Where there is a spare the load leaves a bookie alone that has so little room, and does not fill it up.
    by_load = [DISK_BYTES // 12] if len(cluster.bookies) == 3 else []
    full = [fill(cluster, disk, load, left_bytes) for left_bytes in (*by_load, LEFT_BYTES)]
    assert cluster.processes[SMALL].starts == 1
    judge(load)
    for window in full:
        assert load.history.longest_pause(*window) < GOES_ON_S


def fill(cluster: Cluster, disk: Path, load: Load, left_bytes: int) -> Window:
    """By the load, where something is left, or at once."""
    with load.fault(f"full disk, {left_bytes >> 20} MiB left to the load", redelivers=False):
        with filled(disk, left_bytes):
            begin, _ = load.run(0.0)
            until("it is read-only", lambda: cluster.metric(SMALL, "magnetar_bookie_read_only") == 1.0)
            _, end = load.run(4.0)
        until("it is writable again", lambda: cluster.metric(SMALL, "magnetar_bookie_read_only") == 0.0)
        is_written_to(cluster)
    return begin, end


def is_written_to(cluster: Cluster) -> None:
    """When it is needed: so small a disk is the last that is chosen."""
    spare = cluster.bookies[3:]
    cluster.kill(*spare)
    added = cluster.metric(SMALL, "magnetar_bookie_added_entries_total")
    until("it is written to", lambda: cluster.metric(SMALL, "magnetar_bookie_added_entries_total") > added)
    cluster.restart(*spare)
