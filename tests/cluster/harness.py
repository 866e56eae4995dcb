"""A cluster of real processes under test: each role by the command that users type, killed and stopped by process id.

Every process is started through `setpriv --pdeathsig KILL`, so that none outlives the tests however they end, and keeps
its address when it is started again. What it writes goes into files, which the report of a failed test quotes.
"""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self, TypeVar

import pytest
from cluster.network import Network

from magnetar.client.sync import Client, connect

MAGNETAR = str(Path(sys.executable).with_name("magnetar"))
ETCD = "/usr/bin/etcd"
"""Debian's: the one of the test extra is too old for tests that kill it."""

LEASE_S = 5.0
START_S = 60.0
STOP_S = 60.0
POLL_S = 0.05
LOG_LINES_SHOWN = 60
METADATA = "metadata"

MetadataKind = Literal["server", "etcd"]
T = TypeVar("T")


def until(what: str, found: Callable[[], T | None], timeout_s: float = START_S) -> T:
    """Waits for something that is true; returns it."""
    deadline = time.monotonic() + timeout_s
    while not (value := found()):
        assert time.monotonic() < deadline, f"waited {timeout_s:.0f} s in vain: {what}"
        time.sleep(POLL_S)
    return value


def pass_time(seconds: float) -> None:
    """A fault or a load lasts: nothing else is waited for here."""
    time.sleep(seconds)


def on(*clusters: tuple[MetadataKind, int], long: Sequence[tuple[MetadataKind, int]] = ()) -> pytest.MarkDecorator:
    """Marks a test that runs on these shared clusters: a metadata store, and so many bookies. `long`: not in CI."""
    return pytest.mark.parametrize("shared_cluster", _cases(clusters, long), indirect=True, scope="session")


def on_its_own(
    *clusters: tuple[MetadataKind, int], long: Sequence[tuple[MetadataKind, int]] = ()
) -> pytest.MarkDecorator:
    """The same for tests whose file makes a cluster of its own kind, `cluster`."""
    return pytest.mark.parametrize("cluster", _cases(clusters, long), indirect=True, scope="module")


def _cases(clusters: Sequence[tuple[MetadataKind, int]], long: Sequence[tuple[MetadataKind, int]]) -> list[Any]:
    cases = [pytest.param(one, id=f"{one[0]}-{one[1]}") for one in clusters]
    return cases + [pytest.param(one, id=f"{one[0]}-{one[1]}", marks=pytest.mark.long) for one in long]


# --- processes ---


class ProcessEnded(AssertionError):
    """A process is not there, or ended, when it should live."""


@dataclass
class Process:
    """One process, which may be started again and again. `inside`: what its command is to be run by."""

    name: str
    folder: Path
    inside: Sequence[str] = ()
    starts: int = 0
    _process: subprocess.Popen[bytes] | None = None

    @property
    def alive(self) -> bool:
        return self._process is not None and self._process.poll() is None

    @property
    def exit_code(self) -> int | None:
        return None if self._process is None else self._process.poll()

    @property
    def out(self) -> Path:
        """What the last start wrote to stdout."""
        return self.folder / f"{self.name}.{self.starts}.out"

    @property
    def log(self) -> Path:
        """What all starts wrote to stderr."""
        return self.folder / f"{self.name}.log"

    def start(self, command: Sequence[str]) -> None:
        assert not self.alive, f"{self.name} lives already"
        self.starts += 1
        self.folder.mkdir(parents=True, exist_ok=True)
        with self.out.open("wb") as out, self.log.open("ab") as log:
            self._process = subprocess.Popen(
                ["setpriv", "--pdeathsig", "KILL", *self.inside, *command],
                stdin=subprocess.DEVNULL, stdout=out, stderr=log,
            )  # fmt: skip

    def signal(self, number: signal.Signals) -> None:
        if self._process is None or not self.alive:
            raise ProcessEnded(f"{self.name} is not alive: exit_code=`{self.exit_code}`")
        self._process.send_signal(number)

    def kill(self) -> None:
        """SIGKILL; it is gone on return. Fine if it is gone already."""
        if self._process is not None:
            self._process.kill()
            self._process.wait(STOP_S)

    def terminate(self) -> int:
        """SIGTERM; returns the exit code."""
        self.signal(signal.SIGTERM)
        return self.wait()

    def wait(self, timeout_s: float = STOP_S) -> int:
        assert self._process is not None
        return self._process.wait(timeout_s)

    def lines(self) -> list[str]:
        """Whole lines of stdout since the last start."""
        text = self.out.read_text() if self.starts else ""
        return text[: text.rfind("\n") + 1].splitlines()

    def first_line(self) -> str | None:
        lines = self.lines()
        if not lines and not self.alive:
            raise ProcessEnded(f"{self.name} ended: exit_code=`{self.exit_code}`\n{self.tail()}")
        return lines[0] if lines else None

    def tail(self) -> str:
        if not self.log.exists():
            return ""
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-LOG_LINES_SHOWN:])


# --- a cluster ---


class Cluster:
    """A metadata store (`metadata`), bookies (`bookie0`...) and brokers (`broker0`...), all known by these names.

    settings   of a role, for all of its processes
    network    each process becomes a host of its own there; None: all on loopback
    folders    where a bookie keeps its data, if not in its place in `folder`
    """

    def __init__(
        self,
        folder: Path,
        *,
        metadata: MetadataKind = "server",
        bookies: int = 3,
        brokers: int = 2,
        settings: Mapping[str, Mapping[str, object]] | None = None,
        network: Network | None = None,
        folders: Mapping[str, Path] | None = None,
    ) -> None:
        self.folder = folder
        self.metadata_kind = metadata
        self.bookies = [f"bookie{number}" for number in range(bookies)]
        self.brokers = [f"broker{number}" for number in range(brokers)]
        self.network = network
        self._settings = settings or {}
        self._folders = dict(folders or {})
        self._addresses: dict[str, str] = {}
        self._http: dict[str, str] = {}
        self.processes: dict[str, Process] = {}
        for name in (METADATA, *self.bookies, *self.brokers):
            if network is not None:
                network.add(name)
            inside = () if network is None else network.inside(name)
            self.processes[name] = Process(name, folder / "logs", inside)

    def __str__(self) -> str:
        return f"{self.metadata_kind}, {len(self.bookies)} bookies, {len(self.brokers)} brokers"

    # --- life ---

    def __enter__(self) -> Self:
        """Runs on return, until the block is left."""
        try:
            self.start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def start(self) -> None:
        self.restart(METADATA)
        for names in (self.bookies, self.brokers):
            self.restart(*names)

    def close(self) -> None:
        """Kills everything, in whatever state it is."""
        for process in self.processes.values():
            process.kill()
        assert not any(process.alive for process in self.processes.values())

    def restart(self, *names: str) -> None:
        """Starts processes that are not alive; all of them serve on return."""
        for name in names:
            self.launch(name)
        for name in names:
            self.wait_ready(name)

    def restart_all(self) -> None:
        """Starts everything at once, as after a power cut: each finds what it needs when it comes."""
        self.restart(METADATA, *self.bookies, *self.brokers)

    def mend(self) -> None:
        """Lets everything run that is stopped, and starts what is not alive: what a test before may have left."""
        for process in self.processes.values():
            if process.alive:
                process.signal(signal.SIGCONT)
        self.restart(*(name for name, process in self.processes.items() if not process.alive))

    def launch(self, name: str, *arguments: str) -> None:
        """Starts a process and waits for nothing."""
        self.processes[name].start([*self._command(name), *arguments])

    def wait_ready(self, name: str) -> None:
        """Raises ProcessEnded when it refused to start."""
        process = self.processes[name]
        if name == METADATA and self.metadata_kind == "etcd":
            until("etcd is healthy", lambda: self._etcd_is_healthy(process))
            return
        line = until(f"{name} says that it is ready", process.first_line)
        ready = json.loads(line)
        self._addresses[name], self._http[name] = ready["address"], ready["http"]

    def kill(self, *names: str) -> None:
        """SIGKILL to all of them, then waits until they are gone."""
        for name in names:
            self.processes[name].signal(signal.SIGKILL)
        for name in names:
            self.processes[name].kill()

    def kill_all(self) -> None:
        self.kill(*(name for name, process in self.processes.items() if process.alive))

    def pause(self, name: str) -> None:
        self.processes[name].signal(signal.SIGSTOP)

    def resume(self, name: str) -> None:
        self.processes[name].signal(signal.SIGCONT)

    def pid(self, name: str) -> int | None:
        process = self.processes[name]._process
        return None if process is None else process.pid

    # --- facts ---

    @property
    def servers(self) -> str:
        return ",".join(self._addresses[broker] for broker in self.brokers)

    def connect(self, timeout_s: float = 60.0) -> Client:
        return connect(self.servers, timeout=timeout_s)

    def data_dir(self, name: str) -> Path:
        return self._folders.get(name, self.folder / name)

    def metric(self, name: str, metric: str) -> float:
        """The sum of a metric's samples, as the process tells them."""
        with urllib.request.urlopen(f"http://{self._http[name]}/metrics", timeout=START_S) as answer:
            samples = [line.rpartition(" ") for line in answer.read().decode().splitlines()]
        return sum(float(value) for sample, _, value in samples if sample.partition("{")[0] == metric)

    def owner(self, client: Client, topic: str, shard: int = 0) -> str | None:
        """The broker that owns one of the topic's shards, by its place in the layout."""
        return client.admin.topics.describe(topic).shards[shard].owner

    def tails(self) -> list[tuple[str, str]]:
        return [(name, process.tail()) for name, process in self.processes.items()]

    # --- commands ---

    def _command(self, name: str) -> list[str]:
        role = name.rstrip("0123456789")
        if role == METADATA and self.metadata_kind == "etcd":
            return self._etcd_command()
        settings: dict[str, object] = {"listen": self._address(name, role)}
        if self.network is None:
            settings["http_listen"] = "127.0.0.1:0"
        if role != METADATA:
            settings |= {"id": name, "metadata": f"etcd://{self._addresses[METADATA]}", "lease_s": LEASE_S}
        if role != "broker":
            settings["data_dir"] = self.data_dir(name)
        settings |= self._settings.get(role, {})
        assignments = [part for key, value in settings.items() for part in ("--set", f"{key}={value}")]
        return [MAGNETAR, role, *assignments, "--output", "json"]

    def _address(self, name: str, role: str) -> str:
        if name not in self._addresses:
            if self.network is None:
                return "127.0.0.1:0"
            port = {METADATA: 2379, "bookie": 7660, "broker": 7650}[role]
            self._addresses[name] = f"{self.network.address(name)}:{port}"
        return self._addresses[name]

    def _etcd_command(self) -> list[str]:
        if METADATA not in self._addresses:
            host = "127.0.0.1" if self.network is None else self.network.address(METADATA)
            self._addresses[METADATA] = f"{host}:{free_port() if self.network is None else 2379}"
            self._peer = f"http://{host}:{free_port() if self.network is None else 2380}"
        clients = f"http://{self._addresses[METADATA]}"
        return [
            ETCD, "--name", METADATA, "--data-dir", str(self.data_dir(METADATA)),
            "--listen-client-urls", clients, "--advertise-client-urls", clients,
            "--listen-peer-urls", self._peer, "--initial-advertise-peer-urls", self._peer,
            "--initial-cluster", f"{METADATA}={self._peer}",
        ]  # fmt: skip

    def _etcd_is_healthy(self, process: Process) -> bool:
        if not process.alive:
            raise ProcessEnded(f"etcd ended: exit_code=`{process.exit_code}`\n{process.tail()}")
        try:
            with urllib.request.urlopen(f"http://{self._addresses[METADATA]}/health", timeout=1.0) as answer:
                return bool(json.load(answer)["health"] == "true")
        except (OSError, urllib.error.URLError):
            return False


def free_port() -> int:
    """For programs that cannot take port 0."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return int(listening.getsockname()[1])
