"""A cluster as it is meant to run, each role a process: it serves, and each role stops in order under load."""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import pytest

from magnetar.client import EARLIEST, LATEST, Client, MessageId, connect

pytestmark = pytest.mark.timeout(180)
COMMAND = [sys.executable, "-m", "magnetar.cli.main"]
START_S = 40.0
STOP_S = 40.0
PATIENCE_S = 50.0
BROKERS = ("broker0", "broker1")
BOOKIES = ("bookie0", "bookie1", "bookie2")


@dataclass
class Role:
    """One role, in one process after another; `line` is what the newest printed when it served."""

    name: str
    arguments: list[str]
    errors: Path
    process: subprocess.Popen[bytes] | None = None
    line: dict[str, str] = field(default_factory=dict)

    def start(self) -> None:
        """On the address it had before, if it ran before."""
        addresses = [f"listen={self.line['address']}", f"http_listen={self.line['http']}"] if self.line else []
        with self.errors.open("ab") as errors:
            self.process = subprocess.Popen(
                [*COMMAND, *self.arguments, *(f"--set={one}" for one in addresses)],
                stdout=subprocess.PIPE,
                stderr=errors,
            )

    def wait_served(self) -> dict[str, str]:
        assert self.process is not None
        line = read_line(self.process.stdout)
        assert line, f"{self.name} did not start: {self.errors.read_text()}"
        self.line = json.loads(line)
        return self.line

    def stop(self) -> int:
        """Asks it to stop and returns its exit code."""
        assert self.process is not None
        self.process.terminate()
        try:
            return self.process.wait(STOP_S)
        finally:
            self.kill()

    def kill(self) -> None:
        if self.process is not None:
            if self.process.poll() is None:
                self.process.send_signal(signal.SIGKILL)
                self.process.wait()
            assert self.process.stdout is not None
            self.process.stdout.close()
            self.process = None


def read_line(pipe: IO[bytes] | None) -> bytes:
    assert pipe is not None
    return pipe.readline()


class Cluster:
    """A metadata server, three bookies and two brokers on free ports."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.roles: dict[str, Role] = {}

    def start(self) -> None:
        metadata = self._start("metadata", "metadata", f"data_dir={self._folder / 'metadata'}")
        url = f"metadata=etcd://{metadata.wait_served()['address']}"
        for name in BOOKIES:
            self._start(name, "bookie", url, f"id={name}", f"data_dir={self._folder / name}")
        for name in BROKERS:
            self._start(name, "broker", url, f"id={name}")
        for name in (*BOOKIES, *BROKERS):
            self.roles[name].wait_served()

    def _start(self, name: str, role: str, *settings: str) -> Role:
        arguments = [role, "--output", "json", "--set=listen=127.0.0.1:0", *(f"--set={one}" for one in settings)]
        started = self.roles[name] = Role(name, arguments, self._folder / f"{name}.errors")
        started.start()
        return started

    @property
    def servers(self) -> str:
        return ",".join(self.roles[name].line["address"] for name in BROKERS)

    def kill(self) -> None:
        for role in self.roles.values():
            role.kill()

    def run(self, *arguments: str, input: bytes = b"") -> str:
        """A command against this cluster, which must succeed; returns what it printed."""
        ran = subprocess.run(
            [*COMMAND, *arguments, "--server", self.servers], input=input, capture_output=True, timeout=60
        )
        assert ran.returncode == 0, ran.stderr.decode()
        return ran.stdout.decode()

    def errors(self) -> dict[str, str]:
        """What the processes logged."""
        return {name: text for name, role in self.roles.items() if (text := role.errors.read_text())}


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    cluster = Cluster(tmp_path)
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.kill()


def fetched(address: str, path: str) -> bytes:
    with urllib.request.urlopen(f"http://{address}/{path}", timeout=20) as answer:
        return bytes(answer.read())


def test_a_cluster_of_processes_is_used_like_a_standalone(cluster: Cluster) -> None:
    rows = "".join(f"row {number}\n" for number in range(500))
    cluster.run("topics", "create", "t", "--shards", "4")
    cluster.run("produce", "t", input=rows.encode())
    read = cluster.run("consume", "t", "--subscription", "s", "--from", "earliest", "--no-wait")
    assert sorted(read.splitlines()) == sorted(rows.splitlines())

    brokers = json.loads(cluster.run("brokers", "list", "--output", "json"))
    assert [one["id"] for one in brokers] == list(BROKERS)
    assert sum(one["shards"] for one in brokers) == 4
    assert {one["state"] for one in brokers} == {"SERVING"}
    bookies = json.loads(cluster.run("bookies", "list", "--output", "json"))
    assert [(one["id"], one["state"]) for one in bookies] == [(name, "WRITABLE") for name in BOOKIES]
    assert all(one["ledgers"] > 0 and one["disk_free_bytes"] > 0 for one in bookies)
    for one in (*brokers, *bookies):
        line = cluster.roles[one["id"]].line
        assert (one["address"], one["http_address"]) == (line["address"], line["http"])
    health = json.loads(cluster.run("cluster", "health", "--output", "json"))
    assert (health["healthy"], health["brokers"], health["bookies"], health["problems"]) == (True, 2, 3, [])

    for name, role in cluster.roles.items():
        assert set(role.line) == {"role", "id", "address", "http", "cluster"}
        assert json.loads(fetched(role.line["http"], "livez")) == {"ok": True, "problems": []}, name
        assert json.loads(fetched(role.line["http"], "readyz")) == {"ok": True, "problems": []}, name
        assert b"process_cpu_seconds_total" in fetched(role.line["http"], "metrics"), name

    for name in reversed(cluster.roles):
        assert cluster.roles[name].stop() == 0, cluster.errors()
    assert "not replicated" in cluster.roles["metadata"].errors.read_text()
    assert '"level": "error"' not in "".join(cluster.errors().values())


class Publishing:
    """Sends numbered messages, a key each in turn, until it is told to stop; remembers which are stored."""

    def __init__(self) -> None:
        self.stored: dict[int, MessageId] = {}
        self.sent = 0
        self._stop = False
        self._moved = asyncio.Event()

    async def run(self, client: Client) -> None:
        async with client.producer("t") as producer, asyncio.TaskGroup() as waiting:
            while not self._stop:
                receipts = [producer.send_nowait(b"%d" % n, key=f"k{n % 7}") for n in range(self.sent, self.sent + 20)]
                first, self.sent = self.sent, self.sent + 20
                waiting.create_task(self._remember(first, receipts))
                await receipts[0]

    async def _remember(self, first: int, receipts: list[Any]) -> None:
        for number, receipt in enumerate(receipts, first):
            self.stored[number] = await receipt
        self._moved.set()

    async def go_on(self) -> None:
        """Returns when one more group was stored."""
        before = len(self.stored)
        async with asyncio.timeout(PATIENCE_S):
            while len(self.stored) == before:
                self._moved.clear()
                await self._moved.wait()

    def stop(self) -> None:
        self._stop = True


async def restart(role: Role, publishing: Publishing) -> None:
    """While messages are published; they are, too, once it is back."""
    await publishing.go_on()
    assert await asyncio.to_thread(role.stop) == 0, role.errors.read_text()
    role.start()
    await asyncio.to_thread(role.wait_served)
    await publishing.go_on()


async def test_each_role_is_restarted_in_turn_and_nothing_is_lost(cluster: Cluster) -> None:
    publishing = Publishing()
    async with connect(cluster.servers, timeout=PATIENCE_S) as client:
        await client.admin.topics.create("t", shards=4)
        async with asyncio.TaskGroup() as group:
            group.create_task(publishing.run(client))
            for name in (*BOOKIES, *BROKERS, "metadata"):
                await restart(cluster.roles[name], publishing)
            publishing.stop()
        async with client.reader("t", start=EARLIEST, stop=LATEST) as reader:
            messages = [message async for message in reader]
    found = [int(message.payload) for message in messages]
    assert sorted(found) == list(range(publishing.sent)), "lost or stored twice"
    keys: dict[object, list[int]] = {}
    for message in messages:
        keys.setdefault(message.key, []).append(int(message.payload))
    assert all(numbers == sorted(numbers) for numbers in keys.values()), "out of order"
    for message in messages:
        told = publishing.stored[int(message.payload)]
        # Of what was stored long before its producer came back, only the shard is known to the producer.
        assert message.id == told if told.offset is not None else message.id.shard == told.shard
