"""A cluster in one process, and clients that speak the raw protocol."""

from __future__ import annotations

import asyncio
from array import array
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AsyncExitStack
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, TypeVar

import grpc
import grpc.aio
import pytest
from google.protobuf.message import Message

from magnetar.bookie.bookie import Bookie
from magnetar.bookie.entry_store import EntryStore
from magnetar.bookie.memory import MemoryEntryStore
from magnetar.ledger.bookie_directory import BookieDirectory
from magnetar.metadata.keyspace import Keyspace
from magnetar.metadata.memory import MemoryStore
from magnetar.metadata.store import Compare, KeyValue, MetadataUnavailable, Operation, Put, RangeResult, TxnResult
from magnetar.node.rpc import ERROR_METADATA_KEY
from magnetar.node.settings import BookieSettings, BrokerSettings
from magnetar.v1 import admin_pb2, broker_pb2, common_pb2
from magnetar.wire.batch import Columns, encode_batch
from magnetar.wire.slots import slots_of

if TYPE_CHECKING:
    from magnetar.broker.broker import Broker

KEYSPACE = Keyspace("test")
TOPIC = "public/default/orders"
PATIENCE_S = 20.0

AnswerT = TypeVar("AnswerT", bound=Message)


class StubbornStore(MemoryStore):
    """A store that refuses to answer for some keys.

    silent_reads   so many reads under a prefix, or of a key, get no answer
    requests       reads and transactions asked for
    """

    def __init__(self) -> None:
        super().__init__()
        self.refused_keys: set[str] = set()
        self.silent_reads: Counter[str] = Counter()
        self.requests = 0

    async def range(self, prefix: str, *, after: str = "", limit: int = 0) -> RangeResult:
        self._read(prefix)
        return await super().range(prefix, after=after, limit=limit)

    async def get(self, key: str) -> KeyValue | None:
        self._read(key)
        return await super().get(key)

    def _read(self, key: str) -> None:
        self.requests += 1
        if self.silent_reads[key] > 0:
            self.silent_reads[key] -= 1
            raise MetadataUnavailable("no answer")

    async def txn(self, compares: Sequence[Compare], operations: Sequence[Operation]) -> TxnResult:
        self.requests += 1
        if any(isinstance(operation, Put) and operation.key in self.refused_keys for operation in operations):
            raise MetadataUnavailable("no answer")
        return await super().txn(compares, operations)


class Cluster:
    """A metadata store and bookies in memory, and the brokers a test starts."""

    def __init__(self, directory: Path, stack: AsyncExitStack) -> None:
        self.store = StubbornStore()
        self.bookies: dict[str, Bookie] = {}
        self.entries: dict[str, MemoryEntryStore] = {}
        self.brokers: list[Broker] = []
        self.disk = asyncio.Event()
        """Cleared: no bookie's fsync returns."""
        self.disk.set()
        self._directory = directory
        self._stack = stack

    async def start_bookie(self, name: str) -> Bookie:
        async def sync() -> None:
            await self.disk.wait()

        entries = self.entries.setdefault(name, MemoryEntryStore(sync))

        async def open_store(directory: Path, memory_bytes: int) -> EntryStore:
            return entries

        settings = BookieSettings(id=name, data_dir=self._directory / name, cluster="test")
        bookie = await Bookie.start(settings, self.store, KEYSPACE, serve=False, open_store=open_store)
        self._stack.push_async_callback(bookie.stop)
        self.bookies[name] = bookie
        return bookie

    async def start_broker(self, name: str = "broker0", **settings: Any) -> Broker:
        from magnetar.broker.broker import Broker

        directory = BookieDirectory(self.store, KEYSPACE, lambda bookie: self.bookies[bookie.bookie_id].local())
        await directory.start()
        self._stack.push_async_callback(directory.stop)
        merged = {"id": name, "cluster": "test", "listen": "127.0.0.1:0", "pending_bytes": 64 << 20, **settings}
        broker = await Broker.start(BrokerSettings(**merged), self.store, KEYSPACE, directory)
        self.brokers.append(broker)
        return broker

    async def stop_brokers(self) -> None:
        self.disk.set()
        for broker in self.brokers:
            await broker.stop()

    async def kill(self, broker: Broker) -> None:
        """As SIGKILL does: connections break, nothing is written or released, and its session stands until it ends."""
        self.brokers.remove(broker)
        assert broker._server is not None
        registration = broker.ownership._registration
        assert registration is not None
        assert registration._keeper is not None
        given = {task for _, task in broker._mover._given.values()}
        opened = {*broker.served._loads.values(), *broker.served._settling.values()}
        tasks = {registration._keeper, *broker._tasks, *opened, *given}
        for task in tasks:
            task.cancel()
        await broker._takeovers.stop()
        for shard in broker.served:
            shard.log.abandon("killed")
            for subscription in shard.subscriptions.values():
                subscription._pump.stop()
        await broker._server.server.stop(None)
        await broker.view.close()
        await broker.topics.close()
        await broker.peers.close()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def end_session(self, broker: Broker) -> None:
        """What the store does when it has not heard of a broker for a lease's time."""
        key = await self.store.get(KEYSPACE.broker(broker.settings.id))
        assert key is not None
        await self.store.revoke_lease(key.lease_id)


class Calls:
    """Calls of one broker with one answer."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self.channel = channel

    async def raw(self, service: str, method: str, data: bytes) -> bytes:
        answer: bytes = await self.channel.unary_unary(f"/magnetar.v1.{service}/{method}")(data)
        return answer

    async def resolve(self, topic: str = TOPIC, create: bool = True) -> broker_pb2.Layout:
        request = broker_pb2.ResolveRequest(topic=topic, create=create)
        return broker_pb2.ResolveResponse.FromString(
            await self.raw("BrokerService", "Resolve", request.SerializeToString())
        ).layout

    async def register(self, name: str, topic: str = TOPIC) -> broker_pb2.RegisterProducerResponse:
        request = broker_pb2.RegisterProducerRequest(topic=topic, name=name)
        return broker_pb2.RegisterProducerResponse.FromString(
            await self.raw("BrokerService", "RegisterProducer", request.SerializeToString())
        )

    async def admin(self, method: str, request: Message, answer: type[AnswerT]) -> AnswerT:
        return answer.FromString(await self.raw("AdminService", method, request.SerializeToString()))

    async def create_topic(self, topic: str = TOPIC, shards: int = 1) -> admin_pb2.TopicDescription:
        request = admin_pb2.CreateTopicRequest(topic=topic, shards=shards)
        return (await self.admin("CreateTopic", request, admin_pb2.CreateTopicResponse)).topic

    async def describe_topic(self, topic: str = TOPIC) -> admin_pb2.TopicDescription:
        request = admin_pb2.DescribeTopicRequest(topic=topic)
        return (await self.admin("DescribeTopic", request, admin_pb2.DescribeTopicResponse)).topic


class Stream:
    """A Produce or Consume stream, greeted when entered."""

    def __init__(self, calls: Calls, method: str, request: type[Message], response: type[Any]) -> None:
        self._call = calls.channel.stream_stream(f"/magnetar.v1.BrokerService/{method}")()
        self._request = request
        self._response = response

    async def __aenter__(self) -> Self:
        await self.send(hello=common_pb2.Hello(protocol_min=1, protocol_max=1, name="test"))
        self.hello: common_pb2.HelloReply = (await self.receive()).hello
        assert self.hello.protocol == 1
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._call.cancel()

    async def send(self, **frame: Any) -> None:
        await self._call.write(self._request(**frame).SerializeToString())

    async def send_raw(self, data: bytes) -> None:
        await self._call.write(data)

    async def done(self) -> None:
        await self._call.done_writing()

    async def receive(self) -> Any:
        """The next frame; None at the end."""
        async with asyncio.timeout(PATIENCE_S):
            data = await self._call.read()
        return None if data is grpc.aio.EOF else self._response.FromString(data)


class ProduceClient(Stream):
    """A Produce stream. Answers are kept by kind until they are asked for."""

    def __init__(self, calls: Calls) -> None:
        super().__init__(calls, "Produce", broker_pb2.ProduceRequest, broker_pb2.ProduceResponse)
        self.stored: list[tuple[int, int, int, int]] = []
        self.errors: list[broker_pb2.ProducerError] = []
        self.opened: list[broker_pb2.ProducerOpened] = []

    async def open(
        self, shard_id: int, handle: int = 1, producer_id: bytes = b"p" * 16, epoch: int = 0, name: str = ""
    ) -> broker_pb2.ProducerOpened:
        await self.send_open(shard_id, handle, producer_id, epoch, name)
        await self.until(lambda: bool(self.opened or self.errors))
        assert self.opened, self.errors
        return self.opened.pop(0)

    async def send_open(
        self,
        shard_id: int,
        handle: int = 1,
        producer_id: bytes = b"p" * 16,
        epoch: int = 0,
        name: str = "",
        topic: str = TOPIC,
    ) -> None:
        await self.send(
            open=broker_pb2.OpenProducer(
                handle=handle, topic=topic, shard_id=shard_id, producer_id=producer_id, epoch=epoch, name=name
            )
        )

    async def publish(self, *batches: bytes, handle: int = 1) -> None:
        items = [broker_pb2.ProduceBatch(handle=handle, batch=batch) for batch in batches]
        await self.send(batches=broker_pb2.ProduceBatches(batches=items))

    async def answers(self, count: int) -> list[tuple[int, int, int, int]]:
        """The next BatchStored: handle, first and last sequence, first offset."""
        await self.until(lambda: len(self.stored) >= count or bool(self.errors))
        assert len(self.stored) >= count, self.errors
        taken, self.stored = self.stored[:count], self.stored[count:]
        return taken

    async def error(self) -> broker_pb2.ProducerError:
        await self.until(lambda: bool(self.errors))
        return self.errors.pop(0)

    async def until(self, holds: Callable[[], bool]) -> None:
        while not holds():
            frame = await self.receive()
            assert frame is not None, "the stream ended"
            assert not frame.HasField("error"), frame.error
            self.opened.extend(frame.opened)
            self.stored.extend((s.handle, s.first_sequence, s.last_sequence, s.first_offset) for s in frame.stored)
            self.errors.extend(frame.errors)


def batch(
    last: int,
    previous: int = -1,
    count: int = 1,
    *,
    producer_id: bytes = b"p" * 16,
    epoch: int = 0,
    keys: list[bytes] | None = None,
    size: int = 10,
    slot: int = 0,
) -> bytes:
    """A batch of messages that say their sequence."""
    payloads = [str(last - count + 1 + i).encode().ljust(size, b".") for i in range(count)]
    slots: array[int] | None = None if keys is None else slots_of(keys)
    columns = Columns(payloads, None if keys is None else list(keys))
    return encode_batch(
        columns, producer_id=producer_id, epoch=epoch, previous=previous, last=last, slots=slots, slot=slot
    )


async def refusal(call: Awaitable[Any]) -> common_pb2.Error:
    """The error that a call with one answer ends with."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    metadata = dict(caught.value.trailing_metadata() or ())
    return common_pb2.Error.FromString(metadata[ERROR_METADATA_KEY])


async def eventually(holds: Callable[[], bool]) -> None:
    """Lets the loop turn until it holds."""
    async with asyncio.timeout(PATIENCE_S):
        while not holds():  # noqa: ASYNC110  # what is waited for happens in tasks of the cluster
            await asyncio.sleep(0.001)
