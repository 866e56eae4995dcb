"""The cluster that is measured: one that serves already, or one of processes that are started for it."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from magnetar.cli.command import CommandFailed
from magnetar.cli.local_cluster import Member, Size, local_cluster

FOLDER_PREFIX = "magnetar-bench-"
MEMORY_FILE_SYSTEMS = ("tmpfs", "ramfs")
MOUNTS = Path("/proc/self/mountinfo")


@dataclass(frozen=True, slots=True)
class Target:
    """`servers`: its brokers. `members`: its processes, if this command started them. `folder`: whose disk to probe."""

    servers: str
    folder: Path
    members: Sequence[Member] = ()

    def member(self, name: str) -> Member:
        return next(member for member in self.members if member.name == name)


@contextmanager
def target(server: str | None, size: Size, data_dir: Path) -> Iterator[Target]:
    """The cluster at `server`, or one of its own that ends, with its data, when this does. Raises CommandFailed."""
    if server is not None:
        check_disk(data_dir)
        yield Target(server, data_dir)
        return
    with _folder(data_dir) as folder, local_cluster(folder, size) as cluster:
        yield Target(cluster.servers, folder, cluster.members)


@contextmanager
def _folder(data_dir: Path) -> Iterator[Path]:
    """On a disk, for the time of this run. It is locked meanwhile: those of killed runs are not, and are removed."""
    try:
        data_dir.mkdir(parents=True, exist_ok=True)
        check_disk(data_dir)
        for left in data_dir.glob(FOLDER_PREFIX + "*"):
            with suppress(OSError):  # locked, or somebody else's
                _remove_unless_used(left)
        folder = Path(tempfile.mkdtemp(prefix=FOLDER_PREFIX, dir=data_dir))
        lock = os.open(folder, os.O_RDONLY)
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise CommandFailed(f"cannot use {data_dir}: {reason}; choose another --data-dir") from None
    fcntl.flock(lock, fcntl.LOCK_EX)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(lock)


def _remove_unless_used(folder: Path) -> None:
    lock = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if any(folder.iterdir()):  # an empty one may be another run's, which is about to lock it
            shutil.rmtree(folder, ignore_errors=True)
    finally:
        os.close(lock)


def check_disk(folder: Path) -> None:
    """Raises CommandFailed if the folder is in memory, where an fsync costs nothing."""
    kind = file_system(folder)
    if kind in MEMORY_FILE_SYSTEMS:
        raise CommandFailed(
            f"{folder} is in memory, and an fsync there costs nothing: give a --data-dir on a disk file_system=`{kind}`"
        )


def file_system(folder: Path) -> str:
    """The type of the file system that the folder is on; empty if it is not among this process's mounts."""
    device = os.stat(folder).st_dev
    number = f"{os.major(device)}:{os.minor(device)}"
    for line in MOUNTS.read_text().splitlines():
        place, _, rest = line.partition(" - ")
        if place.split()[2] == number:
            return rest.split()[0]
    return ""
