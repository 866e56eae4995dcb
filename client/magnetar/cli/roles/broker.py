"""The broker role: a server of topics in a process of its own, with its bookies in others."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from magnetar.broker.broker import Broker
from magnetar.cli.roles.process import Ready, join, run_role, start_http
from magnetar.ledger.bookie_directory import BookieDirectory
from magnetar.ledger.bookie_rpc import BookieRpc
from magnetar.ledger.grpc_bookie import GrpcBookie
from magnetar.metadata.records import BookieRegistration
from magnetar.node.lifecycle import Stack
from magnetar.node.settings import BrokerSettings
from magnetar.node.telemetry import new_registry


def run_broker(settings: BrokerSettings, on_ready: Callable[[Ready], None]) -> None:
    """Runs until SIGINT or SIGTERM. Raises RoleRefused, with everything stopped, when it cannot start."""

    async def start(parts: Stack) -> Ready:
        return await _start(settings, parts)

    run_role(settings, start, on_ready)


async def _start(settings: BrokerSettings, parts: Stack) -> Ready:
    registry = new_registry()
    started: list[Broker] = []

    def problems() -> list[str]:
        return started[0].problems() if started else [f"broker {settings.id} is starting"]

    http = start_http(settings, registry, problems, parts)
    store, keyspace = await join(settings, parts)
    connections = Connections(settings.cluster)
    parts.push("connections", connections.close)
    directory = BookieDirectory(store, keyspace, connections.connect, disconnect=connections.disconnect)
    parts.push("bookie directory", directory.stop)
    await directory.start()
    broker = await Broker.start(settings, store, keyspace, directory, registry=registry, http_address=http)
    parts.push("broker", broker.stop)
    started.append(broker)
    return Ready("broker", settings.id, broker.address, http, settings.cluster)


class Connections:
    """Connections to the bookies of a cluster, ended in the background."""

    def __init__(self, cluster: str) -> None:
        self._cluster = cluster
        self._endings: set[asyncio.Task[None]] = set()

    def connect(self, registration: BookieRegistration) -> BookieRpc:
        return GrpcBookie(registration.bookie_id, registration.address, cluster=self._cluster)

    def disconnect(self, connection: BookieRpc) -> None:
        assert isinstance(connection, GrpcBookie)
        ending = asyncio.create_task(connection.close(), name=f"end connection to {connection.bookie_id}")
        self._endings.add(ending)
        ending.add_done_callback(self._endings.discard)

    async def close(self) -> None:
        """Returns when all that were disconnected have ended."""
        await asyncio.gather(*self._endings)
