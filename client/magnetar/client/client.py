"""The client: what `connect` gives, and where producers, consumers and readers come from."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from types import TracebackType
from typing import Self

from magnetar.client import consumer as consumers
from magnetar.client.admin import Admin
from magnetar.client.batching import Batching
from magnetar.client.connection import ConsumeStream, ProduceStream, Streams
from magnetar.client.consumer import QueueConsumer, Reader, StreamConsumer
from magnetar.client.errors import ClientClosed, InvalidArgument
from magnetar.client.layouts import Brokers, Layouts
from magnetar.client.lifetime import Lifetime
from magnetar.client.links import Cluster
from magnetar.client.positions import EARLIEST, LATEST, Edge, Position
from magnetar.client.producer import PENDING_BYTES_DEFAULT, Access, Compression, Producer
from magnetar.client.rpc import BrokerRpc, GrpcRpc

TIMEOUT_S_MAX = 86_400.0
PORT_MAX = 65_535
SERVERS_MAX = 64


class Client:
    """A connection to a cluster: made by `connect`, used with `async with`.

    Leaving the block closes producers and consumers that are still open. A client belongs to the event loop it was
    entered in, and to its process: after a fork, connect again.
    """

    def __init__(self, servers: str, *, timeout: float, rpc: Callable[[], BrokerRpc] = GrpcRpc) -> None:
        if not 0.0 < timeout <= TIMEOUT_S_MAX:
            raise InvalidArgument(
                f"timeout is more than 0 and at most {TIMEOUT_S_MAX:.0f} seconds: timeout=`{timeout}`"
            )
        self._servers = parse_servers(servers)
        self._timeout_s = timeout
        self._rpc = rpc
        self._lifetime = Lifetime("client")
        self._parts: _Parts | None = None
        self.admin = Admin(lambda: self._entered().brokers, self._lifetime)

    async def __aenter__(self) -> Self:
        """Reaches no broker yet: the first call does."""
        self._lifetime.begin()
        self._parts = _Parts(self._rpc(), self._servers, self._timeout_s)
        self._lifetime.opened()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Close what is still open, waiting at most `timeout` for what was sent, and all connections. Twice is fine."""
        if not self._lifetime.close():
            return
        closers = [child.closer() for child in tuple(self._lifetime.children) if child.closer is not None]
        results = await asyncio.gather(*closers, return_exceptions=True)
        self._lifetime.end()
        if self._parts is not None:
            await self._parts.close()
        for result in results:
            if isinstance(result, BaseException):
                raise result

    def producer(
        self,
        topic: str,
        *,
        name: str | None = None,
        batching: Batching = Batching(),
        compression: Compression = "none",
        max_pending_bytes: int = PENDING_BYTES_DEFAULT,
        access: Access = "shared",
    ) -> Producer:
        """A producer for a topic, which is created with one shard if it is not there; use it with `async with`.

        name               keeps "stored once, in order" across restarts; belongs to its newest connection
        batching           when a batch is full
        compression        none, lz4 or zstd, of whole batches
        max_pending_bytes  that may be unconfirmed; beyond it `send` waits and `send_nowait` raises QueueFull

        Raises InvalidArgument.
        """
        parts = self._entered()
        lifetime = Lifetime("producer", parent=self._lifetime)
        producer = Producer(
            parts.producing,
            lifetime,
            topic,
            name=name,
            batching=batching,
            compression=compression,
            max_pending_bytes=max_pending_bytes,
            access=access,
        )
        lifetime.closer = producer.close
        return producer

    def stream_consumer(self, topic: str, *, subscription: str, start: Position = LATEST) -> StreamConsumer:
        """A consumer of a stream subscription: in order, acknowledged cumulatively; use it with `async with`.

        start   where the subscription begins if this creates it: EARLIEST, LATEST, or a time with a timezone

        Of several consumers one is active in each shard, others stand by. Raises InvalidArgument.
        """
        parts = self._entered()
        lifetime = Lifetime("stream consumer", parent=self._lifetime)
        consumer = consumers.stream_consumer(parts.consuming, lifetime, topic, subscription=subscription, start=start)
        lifetime.closer = consumer.close
        return consumer

    def queue_consumer(
        self,
        topic: str,
        *,
        subscription: str,
        key_ordered: bool = False,
        prefetch: int = 1000,
        start: Position = LATEST,
    ) -> QueueConsumer:
        """A consumer of a queue subscription: each message to one consumer, acknowledged by itself; use `async with`.

        key_ordered  messages with one key are delivered in order, to one consumer at a time
        prefetch     messages that wait here for the user, about; at least one a shard
        start        as of `stream_consumer`

        Raises InvalidArgument.
        """
        parts = self._entered()
        lifetime = Lifetime("queue consumer", parent=self._lifetime)
        consumer = consumers.queue_consumer(
            parts.consuming,
            lifetime,
            topic,
            subscription=subscription,
            key_ordered=key_ordered,
            prefetch=prefetch,
            start=start,
        )
        lifetime.closer = consumer.close
        return consumer

    def reader(self, topic: str, *, start: Position = EARLIEST, stop: Edge | None = None) -> Reader:
        """A reader: no subscription, nothing kept at the broker; use it with `async with`.

        start   EARLIEST, LATEST, a time, or, in a topic of one shard, a message, which is the first to come
        stop    LATEST: iteration ends at what is the end when the reader is opened

        Raises InvalidArgument.
        """
        parts = self._entered()
        lifetime = Lifetime("reader", parent=self._lifetime)
        reader = consumers.reader(parts.consuming, lifetime, topic, start=start, stop=stop)
        lifetime.closer = reader.close
        return reader

    def _entered(self) -> _Parts:
        self._lifetime.check()
        if self._parts is None:
            raise ClientClosed("this client is not open: use `async with connect(...) as client`")
        return self._parts


class _Parts:
    """What a client has while it is open."""

    def __init__(self, rpc: BrokerRpc, servers: tuple[str, ...], timeout_s: float) -> None:
        self.rpc = rpc
        self.brokers = Brokers(self.rpc, servers, timeout_s)
        self._layouts = layouts = Layouts(self.brokers)
        self._produce_streams = Streams(ProduceStream, self.rpc)
        self._consume_streams = Streams(ConsumeStream, self.rpc)
        self.producing = Cluster(self.brokers, layouts, self._produce_streams, timeout_s)
        self.consuming = Cluster(self.brokers, layouts, self._consume_streams, timeout_s)

    async def close(self) -> None:
        await self._layouts.stop()
        await self._produce_streams.stop()
        await self._consume_streams.stop()
        await self.rpc.close()


def connect(servers: str, *, timeout: float = 30.0) -> Client:
    """A client for the cluster that these brokers belong to; use it with `async with`.

    servers   "host:port", several separated by commas: any of them will do, the others are found
    timeout   seconds without progress after which what is retried fails with ClusterUnavailable or RetriableError

    Nothing happens before the block is entered. Raises InvalidArgument.
    """
    return Client(servers, timeout=timeout)


def parse_servers(servers: str) -> tuple[str, ...]:
    """The addresses in "host:port[,host:port]". Raises InvalidArgument."""
    if not isinstance(servers, str):
        raise InvalidArgument(f"servers is a str like 'localhost:7650': type=`{type(servers).__name__}`")
    addresses = tuple(dict.fromkeys(part.strip() for part in servers.split(",")))
    for address in addresses:
        host, separator, port = address.rpartition(":")
        if not separator or not host or not port.isascii() or not port.isdigit() or not 0 < int(port) <= PORT_MAX:
            raise InvalidArgument(f"a server is host:port, for example localhost:7650: server=`{address}`")
    if len(addresses) > SERVERS_MAX:
        raise InvalidArgument(f"at most {SERVERS_MAX} servers: servers=`{len(addresses)}`")
    return addresses
