"""How a role process reaches the bookies of its cluster."""

from __future__ import annotations

import asyncio

from magnetar.ledger.bookie_directory import BookieDirectory
from magnetar.ledger.bookie_rpc import BookieRpc
from magnetar.ledger.grpc_bookie import GrpcBookie
from magnetar.metadata.keyspace import Keyspace
from magnetar.metadata.records import BookieRegistration
from magnetar.metadata.store import MetadataStore
from magnetar.node.lifecycle import Stack


async def bookie_directory(cluster: str, store: MetadataStore, keyspace: Keyspace, parts: Stack) -> BookieDirectory:
    """The bookies of the cluster and connections to them, until `parts` are closed."""
    connections = Connections(cluster)
    parts.push("connections", connections.close)
    directory = BookieDirectory(store, keyspace, connections.connect, disconnect=connections.disconnect)
    parts.push("bookie directory", directory.stop)
    await directory.start()
    return directory


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
