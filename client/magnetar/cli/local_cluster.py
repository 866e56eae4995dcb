"""A cluster of real processes on this host, for the time of one command: a metadata server, bookies, brokers."""

from __future__ import annotations

import json
import select
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from magnetar.cli.child import MAGNETAR, child_environment
from magnetar.cli.command import EXIT_USAGE, CommandFailed

START_S = 60.0
STOP_S = 30.0
BOOKIES_MAX = 9
BROKERS_MAX = 9
COPIES_MAX = 3
"""Of an entry, if there are so many bookies."""


@dataclass(frozen=True, slots=True)
class Size:
    """How many of each role."""

    bookies: int
    brokers: int


@dataclass(frozen=True, slots=True)
class Member:
    """One running process."""

    name: str
    process: subprocess.Popen[bytes]


@dataclass(frozen=True, slots=True)
class LocalCluster:
    """A cluster that serves. `servers` are its brokers, as a client takes them."""

    servers: str
    members: Sequence[Member]


def parse_local(local: str) -> Size:
    """What BOOKIES,BROKERS asks for. Raises CommandFailed."""
    try:
        bookies, brokers = (int(part) for part in local.split(","))
    except ValueError:
        raise CommandFailed(f"--local takes BOOKIES,BROKERS, such as 3,1; got {local!r}", EXIT_USAGE) from None
    if not (1 <= bookies <= BOOKIES_MAX and 1 <= brokers <= BROKERS_MAX):
        raise CommandFailed(
            f"--local starts 1 to {BOOKIES_MAX} bookies and 1 to {BROKERS_MAX} brokers, such as 3,1; got {local!r}",
            EXIT_USAGE,
        )
    return Size(bookies, brokers)


@contextmanager
def local_cluster(folder: Path, size: Size) -> Iterator[LocalCluster]:
    """Runs the cluster on free ports, with its data under `folder`. Raises CommandFailed when it does not start."""
    deadline = time.monotonic() + START_S
    copies = min(COPIES_MAX, size.bookies)
    quorums = [f"ensemble_size={copies}", f"write_quorum={copies}", f"ack_quorum={copies // 2 + 1}"]
    with ExitStack() as running:
        metadata = _start(running, "metadata", "metadata", [f"data_dir={folder / 'metadata'}"])
        url = f"metadata=etcd://{_ready(metadata, deadline)['address']}"
        bookies = [
            _start(running, "bookie", f"bookie{i}", [url, f"id=bookie{i}", f"data_dir={folder / f'bookie{i}'}"])
            for i in range(size.bookies)
        ]
        for bookie in bookies:
            _ready(bookie, deadline)
        brokers = [
            _start(running, "broker", f"broker{i}", [url, f"id=broker{i}", *quorums]) for i in range(size.brokers)
        ]
        addresses = [_ready(broker, deadline)["address"] for broker in brokers]
        yield LocalCluster(",".join(addresses), [metadata, *bookies, *brokers])


def _start(running: ExitStack, role: str, name: str, assignments: Sequence[str]) -> Member:
    """Starts a process on free ports; the stack ends it, last started first."""
    settings = [f"--set={one}" for one in ("listen=127.0.0.1:0", *assignments)]
    process = subprocess.Popen(
        [*MAGNETAR, role, "--output", "json", *settings],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        process_group=0,
        env=child_environment(MAGNETAR_LOG="error"),
    )
    running.callback(_stop, process)
    return Member(name, process)


def _stop(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(STOP_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    assert process.stdout is not None
    process.stdout.close()


def _ready(member: Member, deadline: float) -> Any:
    """What the process prints when it serves. Raises CommandFailed."""
    stdout = member.process.stdout
    assert stdout is not None
    readable, _, _ = select.select([stdout], [], [], max(0.0, deadline - time.monotonic()))
    if not readable:
        raise CommandFailed(f"{member.name} did not start within {START_S:g} s: is the machine overloaded?")
    line = stdout.readline()
    if not line:
        raise CommandFailed(f"{member.name} did not start, for the reason above")
    return json.loads(line)
