"""Fixtures of the client's tests: a scripted cluster of real gRPC servers, and a client of it."""

from __future__ import annotations

import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from scripted_broker import ScriptedBroker, ScriptedCluster

from magnetar.client import Client, connect

TIMEOUT_S = 20.0
"""Longer than any test: what is to time out says so itself."""


@pytest.fixture
async def cluster() -> AsyncIterator[ScriptedCluster]:
    cluster = ScriptedCluster()
    await cluster.broker()
    yield cluster
    await cluster.stop()


@pytest.fixture
def broker(cluster: ScriptedCluster) -> ScriptedBroker:
    return cluster.brokers[0]


@pytest.fixture
async def client(broker: ScriptedBroker) -> AsyncIterator[Client]:
    async with connect(broker.address, timeout=TIMEOUT_S) as client:
        yield client


@pytest.fixture
def connecting(broker: ScriptedBroker) -> Callable[[float], Client]:
    """A client with another patience."""
    return lambda timeout: connect(broker.address, timeout=timeout)
