"""A small broker in memory that speaks the protocol over real gRPC and can be told to misbehave.

`ScriptedCluster` holds what is stored; any number of `ScriptedBroker`s serve it. A test sets `on_batch` to decide what
happens to each batch, cuts streams, moves shards, loses acknowledgements.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from enum import Enum
from hashlib import blake2b
from typing import Any

import grpc
import grpc.aio

from magnetar.v1 import admin_pb2, broker_pb2, common_pb2, metadata_pb2
from magnetar.wire.batch import BatchHeader, decode_batch, parse_header
from magnetar.wire.selection import from_indices, indices

OPEN = metadata_pb2.SHARD_STATE_OPEN
SEALED = metadata_pb2.SHARD_STATE_SEALED


class Fate(Enum):
    """What happens to a batch, beside being refused with an error."""

    STORE = "stored and answered"
    STORE_SILENTLY = "stored, the answer is lost"
    STORE_AND_CUT = "stored, then the stream breaks"
    CUT = "the stream breaks before it is stored"
    DROP = "neither stored nor answered"


def error(reason: str, message: str = "because", **fields: Any) -> common_pb2.Error:
    return common_pb2.Error(reason=common_pb2.ErrorReason.Value(f"ERROR_REASON_{reason}"), message=message, **fields)


@dataclass
class ProducerRecord:
    epoch: int = 0
    last: int = -1
    recent: list[tuple[int, int, int]] = field(default_factory=list)
    stream: object = None


@dataclass
class SubscriptionState:
    """A subscription in one shard."""

    type: int
    floor: int
    acked: set[int] = field(default_factory=set)
    cursor_epoch: int = 1
    sessions: list[Session] = field(default_factory=list)
    counts: dict[int, int] = field(default_factory=dict)
    key_ordered: bool = False

    def is_acked(self, offset: int) -> bool:
        return offset < self.floor or offset in self.acked


@dataclass
class Shard:
    shard_id: int
    first_slot: int
    last_slot: int
    owner: ScriptedBroker
    state: int = OPEN
    parents: tuple[int, ...] = ()
    start: int = 0
    log: list[tuple[int, bytes, BatchHeader]] = field(default_factory=list)
    producers: dict[bytes, ProducerRecord] = field(default_factory=dict)
    parent_lasts: dict[bytes, list[tuple[int, int, int]]] = field(default_factory=dict)
    subscriptions: dict[str, SubscriptionState] = field(default_factory=dict)
    readers: list[Session] = field(default_factory=list)

    @property
    def end(self) -> int:
        return self.log[-1][0] + self.log[-1][2].count if self.log else self.start

    def append(self, data: bytes, header: BatchHeader) -> int:
        first = self.end
        self.log.append((first, data, header))
        record = self.producers[header.producer_id]
        record.last = header.last
        record.recent = [*record.recent, (header.first_sequence, header.last, first)][-16:]
        return first

    def payloads(self) -> list[bytes]:
        return [payload for _, data, _ in self.log for payload in decode_batch(data).payloads]

    def keys(self) -> list[bytes | None]:
        found: list[bytes | None] = []
        for _, data, header in self.log:
            found += decode_batch(data).keys or [None] * header.count
        return found


@dataclass
class Topic:
    name: str
    epoch: int
    shards: dict[int, Shard]

    def layout(self) -> broker_pb2.Layout:
        layout = broker_pb2.Layout(topic=self.name, epoch=self.epoch)
        for shard in self.shards.values():
            layout.shards.add(
                shard_id=shard.shard_id, first_slot=shard.first_slot, last_slot=shard.last_slot, state=shard.state,
                parents=shard.parents, owner=shard.owner.address if shard.owner else "",
            )  # fmt: skip
        return layout


class ScriptedCluster:
    """What is stored, and the script. `on_batch` decides the fate of each batch: a Fate, or an error."""

    def __init__(self) -> None:
        self.topics: dict[str, Topic] = {}
        self.epochs: dict[tuple[str, str], int] = {}
        self.brokers: list[ScriptedBroker] = []
        self.next_shard = 1
        self.window_bytes = 4 << 20
        self.on_batch: Callable[[Shard, BatchHeader], Fate | common_pb2.Error] = lambda shard, header: Fate.STORE
        self.on_open: Callable[[Shard], common_pb2.Error | None] = lambda shard: None
        self.on_resolve: Callable[[str], common_pb2.Error | None] = lambda topic: None
        self.on_ack: Callable[[], Fate] = lambda: Fate.STORE
        self.on_reader: Callable[[], common_pb2.Error | None] = lambda: None
        """Why a reader is not opened."""
        self.on_close: Callable[[], common_pb2.Error | None] = lambda: None
        """What closing a consumer ends with."""
        self.on_admin: Callable[[ScriptedBroker], common_pb2.Error | None] = lambda broker: None
        self.rivals = False
        """Others register every name first."""
        self.pushes = False
        """Brokers push layouts: at `push`, and to whoever begins to watch."""
        self.opens = 0
        self.resolves = 0
        self.consumer_opens: list[broker_pb2.OpenSubscription] = []
        self.headers: list[BatchHeader] = []
        self.frames: list[int] = []
        self.changed = asyncio.Event()
        self._loop = asyncio.get_running_loop()

    def cut_from_another_thread(self) -> None:
        for broker in self.brokers:
            self._loop.call_soon_threadsafe(broker.cut)

    async def broker(self) -> ScriptedBroker:
        broker = ScriptedBroker(self)
        await broker.start()
        self.brokers.append(broker)
        return broker

    async def stop(self) -> None:
        for broker in self.brokers:
            await broker.stop()

    def create(self, name: str, shards: int = 1) -> Topic:
        full = name if "/" in name else f"public/default/{name}"
        topic = self.topics[full] = Topic(full, 1, {})
        for number in range(shards):
            self.add_shard(topic, 65536 * number // shards, 65536 * (number + 1) // shards - 1)
        return topic

    def add_shard(self, topic: Topic, first_slot: int, last_slot: int, parents: tuple[Shard, ...] = ()) -> Shard:
        shard = Shard(
            self.next_shard, first_slot, last_slot, self.brokers[0], parents=tuple(p.shard_id for p in parents)
        )
        shard.start = max((parent.end for parent in parents), default=0)
        for parent in parents:
            for producer_id, record in parent.producers.items():
                shard.parent_lasts.setdefault(producer_id, []).append(
                    (parent.first_slot, parent.last_slot, record.last)
                )
        topic.shards[shard.shard_id] = shard
        self.next_shard += 1
        return shard

    def split(self, topic: Topic, shard: Shard) -> tuple[Shard, Shard]:
        middle = (shard.first_slot + shard.last_slot) // 2
        shard.state = SEALED
        children = (
            self.add_shard(topic, shard.first_slot, middle, (shard,)),
            self.add_shard(topic, middle + 1, shard.last_slot, (shard,)),
        )
        topic.epoch += 1
        return children

    def move(self, shard: Shard, owner: ScriptedBroker) -> None:
        shard.owner = owner

    def push(self, topic: Topic) -> None:
        """Whoever watches is told of the layout as it is now."""
        layout = topic.layout()
        for broker in self.brokers:
            for watch in broker.watches:
                watch.put_nowait(layout)

    async def until(self, condition: Callable[[], bool]) -> None:
        """Wait for something that the brokers will see."""
        async with asyncio.timeout(10):
            while not condition():
                self.changed.clear()
                await self.changed.wait()


class Session:
    """A consumer's or reader's handle at a broker."""

    def __init__(self, stream: Stream, handle: int, shard: Shard, subscription: SubscriptionState | None) -> None:
        self.stream = stream
        self.handle = handle
        self.shard = shard
        self.subscription = subscription
        self.next = 0
        self.messages = 0
        self.bytes = 0
        self.pending: set[int] = set()
        self.selects = False

    @property
    def active(self) -> bool:
        return self.subscription is None or self.selects or self.subscription.sessions[0] is self


class Stream:
    """One stream of a client."""

    def __init__(self, broker: ScriptedBroker, context: grpc.aio.ServicerContext) -> None:
        self.broker = broker
        self.context = context
        self.out: asyncio.Queue[Any] = asyncio.Queue()
        self.broken = asyncio.Event()
        self.sessions: dict[int, Session] = {}
        self.handles: dict[int, tuple[Shard, bytes, int]] = {}

    def say(self, response: Any) -> None:
        self.out.put_nowait(response)

    def cut(self) -> None:
        self.broken.set()


class ScriptedBroker:
    """Serves a cluster's shards that it owns."""

    def __init__(self, cluster: ScriptedCluster) -> None:
        self.cluster = cluster
        self.address = ""
        self.streams: set[Stream] = set()
        self._server: grpc.aio.Server | None = None
        self.consumers_seen = 0
        self.watches: list[asyncio.Queue[broker_pb2.Layout]] = []
        self.answering = asyncio.Event()
        """Cleared: it answers no call any more; streams of producers and consumers go on."""
        self.answering.set()

    async def start(self, port: int = 0) -> None:
        self._server = grpc.aio.server(options=[("grpc.so_reuseport", 0), ("grpc.max_receive_message_length", 8 << 20)])
        unary: dict[str, Callable[[bytes, Any], Awaitable[bytes]]] = {
            "Resolve": self._resolve,
            "RegisterProducer": self._register,
        }
        handlers = {name: grpc.unary_unary_rpc_method_handler(method) for name, method in unary.items()}
        handlers["Produce"] = grpc.stream_stream_rpc_method_handler(self._produce)
        handlers["Consume"] = grpc.stream_stream_rpc_method_handler(self._consume)
        if self.cluster.pushes:
            handlers["WatchLayout"] = grpc.unary_stream_rpc_method_handler(self._watch_layout)
        calls = {"ListTopics": self._list_topics, "CreateTopic": self._create_topic}
        admin = {name: grpc.unary_unary_rpc_method_handler(method) for name, method in calls.items()}
        self._server.add_generic_rpc_handlers(
            (
                grpc.method_handlers_generic_handler("magnetar.v1.BrokerService", handlers),
                grpc.method_handlers_generic_handler("magnetar.v1.AdminService", admin),
            )
        )
        bound = self._server.add_insecure_port(f"127.0.0.1:{port}")
        self.address = f"127.0.0.1:{bound}"
        await self._server.start()

    async def stop(self) -> None:
        if self._server is not None:
            self.cut()
            await self._server.stop(0)
            self._server = None

    async def restart(self) -> None:
        port = int(self.address.rpartition(":")[2])
        await self.stop()
        await self.start(port)

    def cut(self) -> None:
        """Break every stream."""
        for stream in tuple(self.streams):
            stream.cut()

    # --- calls ---

    async def _refuse(self, context: Any, refused: common_pb2.Error) -> None:
        await context.abort(
            grpc.StatusCode.UNAVAILABLE, refused.message,
            trailing_metadata=(("magnetar-error-bin", refused.SerializeToString()),),
        )  # fmt: skip

    async def _resolve(self, data: bytes, context: Any) -> bytes:
        request = broker_pb2.ResolveRequest.FromString(data)
        await self.answering.wait()
        self.cluster.resolves += 1
        refused = self.cluster.on_resolve(request.topic)
        if refused is None and request.topic not in self.cluster.topics:
            if request.create:
                self.cluster.create(request.topic)
            else:
                refused = error("TOPIC_NOT_FOUND")
        if refused is not None:
            await self._refuse(context, refused)
        layout = self.cluster.topics[request.topic].layout()
        brokers = [broker.address for broker in self.cluster.brokers]
        return broker_pb2.ResolveResponse(layout=layout, brokers=brokers).SerializeToString()

    async def _watch_layout(self, data: bytes, context: Any) -> None:
        request = broker_pb2.WatchLayoutRequest.FromString(data)
        await self.answering.wait()
        watch: asyncio.Queue[broker_pb2.Layout] = asyncio.Queue()
        watch.put_nowait(self.cluster.topics[request.topic].layout())
        self.watches.append(watch)
        self.cluster.changed.set()
        try:
            while True:
                layout = await watch.get()
                await context.write(broker_pb2.WatchLayoutResponse(layout=layout).SerializeToString())
        finally:
            self.watches.remove(watch)
            self.cluster.changed.set()

    async def _register(self, data: bytes, context: Any) -> bytes:
        request = broker_pb2.RegisterProducerRequest.FromString(data)
        name = (request.topic, request.name)
        newest = self.cluster.epochs.get(name, 0)
        outdated = self.cluster.rivals or request.newest_known != newest
        self.cluster.epochs[name] = newest + (not outdated)
        producer_id = blake2b(f"{request.topic}\0{request.name}".encode(), digest_size=16).digest()
        return broker_pb2.RegisterProducerResponse(
            producer_id=producer_id, epoch=self.cluster.epochs[name], outdated=outdated
        ).SerializeToString()

    async def _create_topic(self, data: bytes, context: Any) -> bytes:
        await self._administer(context)
        topic = self.cluster.create(admin_pb2.CreateTopicRequest.FromString(data).topic)
        return admin_pb2.CreateTopicResponse(topic=admin_pb2.TopicDescription(topic=topic.name)).SerializeToString()

    async def _administer(self, context: Any) -> None:
        await self.answering.wait()
        refused = self.cluster.on_admin(self)
        if refused is not None:
            await self._refuse(context, refused)

    async def _list_topics(self, data: bytes, context: Any) -> bytes:
        await self._administer(context)
        return admin_pb2.ListTopicsResponse(topics=sorted(self.cluster.topics)).SerializeToString()

    # --- streams ---

    async def _run(self, context: Any, kind: Any, response: Any, handle: Callable[[Stream, Any], None]) -> None:
        stream = Stream(self, context)
        self.streams.add(stream)
        writer = asyncio.create_task(self._write(stream))
        broken = asyncio.create_task(stream.broken.wait())
        try:
            while not stream.broken.is_set():
                read = asyncio.ensure_future(context.read())
                await asyncio.wait({read, broken}, return_when=asyncio.FIRST_COMPLETED)
                if not read.done():
                    read.cancel()
                    break
                data = read.result()
                if data is grpc.aio.EOF:
                    break
                self.cluster.frames.append(len(data))
                request = kind.FromString(data)
                if request.HasField("hello"):
                    assert request.hello.protocol_min == request.hello.protocol_max == 1
                    stream.say(response(hello=common_pb2.HelloReply(protocol=1, node_id="scripted")))
                else:
                    handle(stream, request)
                self.cluster.changed.set()
        finally:
            broken.cancel()
            self.streams.discard(stream)
            for session in tuple(stream.sessions.values()):
                self._detach(session)
            self.cluster.changed.set()
            # gRPC never sends the status of a call whose first write was cut off: the one under way ends.
            stream.out.put_nowait(None)
            await asyncio.gather(writer, return_exceptions=True)
        if stream.broken.is_set():
            await context.abort(grpc.StatusCode.UNAVAILABLE, "cut by the script")

    async def _write(self, stream: Stream) -> None:
        while (response := await stream.out.get()) is not None and not stream.broken.is_set():
            await stream.context.write(response.SerializeToString())

    # --- producing ---

    async def _produce(self, _: Any, context: Any) -> None:
        await self._run(context, broker_pb2.ProduceRequest, broker_pb2.ProduceResponse, self._produce_frame)

    def _produce_frame(self, stream: Stream, request: broker_pb2.ProduceRequest) -> None:
        match request.WhichOneof("frame"):
            case "open":
                self._open_producer(stream, request.open)
            case "batches":
                for item in request.batches.batches:
                    if not stream.broken.is_set():
                        self._batch(stream, item.handle, item.batch)
            case "close":
                stream.handles.pop(request.close.handle, None)

    def _open_producer(self, stream: Stream, request: broker_pb2.OpenProducer) -> None:
        self.cluster.opens += 1
        shard = self._shard(request.topic, request.shard_id)
        refused = self._not_mine(shard) or self.cluster.on_open(shard)
        record = shard.producers.setdefault(request.producer_id, ProducerRecord())
        if refused is None and request.epoch < record.epoch:
            refused = error("PRODUCER_FENCED")
        if refused is not None:
            self._producer_error(stream, request.handle, refused, -1)
            return
        record.epoch, record.stream = request.epoch, (stream, request.handle)
        stream.handles[request.handle] = (shard, request.producer_id, request.epoch)
        opened = broker_pb2.ProducerOpened(
            handle=request.handle, last_sequence=record.last, window_bytes=self.cluster.window_bytes
        )
        for first, last, offset in record.recent:
            opened.recent.add(handle=request.handle, first_sequence=first, last_sequence=last, first_offset=offset)
        for first_slot, last_slot, last in shard.parent_lasts.get(request.producer_id, ()):
            opened.parents.add(first_slot=first_slot, last_slot=last_slot, last_sequence=last)
        stream.say(broker_pb2.ProduceResponse(opened=[opened]))

    def _batch(self, stream: Stream, handle: int, data: bytes) -> None:
        if handle not in stream.handles:
            return
        shard, producer_id, epoch = stream.handles[handle]
        header = parse_header(data)
        self.cluster.headers.append(header)
        record = shard.producers[producer_id]
        assert header.producer_id == producer_id
        assert header.epoch == epoch
        refused = self._not_mine(shard)
        if refused is None and record.stream != (stream, handle):
            refused = error("PRODUCER_FENCED" if epoch < record.epoch else "OUT_OF_ORDER")
        if refused is None and header.last <= record.last:
            self._stored(stream, handle, header, -1)
            return
        if refused is None and header.previous != record.last:
            refused = error("OUT_OF_ORDER", f"previous {header.previous} last {record.last}")
        if refused is None and not shard.first_slot <= header.min_slot <= header.max_slot <= shard.last_slot:
            refused = error("WRONG_SHARD")
        if refused is None and shard.state != OPEN:
            refused = error("WRONG_SHARD")
        fate = refused or self.cluster.on_batch(shard, header)
        if isinstance(fate, common_pb2.Error):
            self._producer_error(stream, handle, fate, header.first_sequence)
            return
        if fate in (Fate.STORE, Fate.STORE_SILENTLY, Fate.STORE_AND_CUT):
            offset = shard.append(data, header)
            if fate is Fate.STORE:
                self._stored(stream, handle, header, offset)
            self._dispatch(shard)
        if fate in (Fate.CUT, Fate.STORE_AND_CUT):
            stream.cut()

    def _stored(self, stream: Stream, handle: int, header: BatchHeader, offset: int) -> None:
        stored = broker_pb2.BatchStored(
            handle=handle, first_sequence=header.first_sequence, last_sequence=header.last, first_offset=offset
        )
        stream.say(broker_pb2.ProduceResponse(stored=[stored]))

    def _producer_error(self, stream: Stream, handle: int, refused: common_pb2.Error, sequence: int) -> None:
        stream.handles.pop(handle, None)
        stream.say(
            broker_pb2.ProduceResponse(
                errors=[broker_pb2.ProducerError(handle=handle, error=refused, sequence=sequence)]
            )
        )

    def _shard(self, topic: str, shard_id: int) -> Shard:
        return self.cluster.topics[topic].shards[shard_id]

    def _not_mine(self, shard: Shard) -> common_pb2.Error | None:
        return None if shard.owner is self else error("NOT_OWNER", owner=shard.owner.address)

    # --- consuming ---

    async def _consume(self, _: Any, context: Any) -> None:
        await self._run(context, broker_pb2.ConsumeRequest, broker_pb2.ConsumeResponse, self._consume_frame)

    def _consume_frame(self, stream: Stream, request: broker_pb2.ConsumeRequest) -> None:
        for opening in request.open:
            self._open_subscription(stream, opening)
        for opening in request.open_readers:
            shard = self._shard(opening.topic, opening.shard_id)
            if (refused := self.cluster.on_reader()) is not None:
                refusal = broker_pb2.ConsumerError(handle=opening.handle, error=refused)
                stream.say(broker_pb2.ConsumeResponse(errors=[refusal]))
                continue
            session = stream.sessions[opening.handle] = Session(stream, opening.handle, shard, None)
            session.next = self._position(shard, opening.start)
            shard.readers.append(session)
            self._say_opened(session, session.next, 1)
        for credit in request.credits:
            if (session := stream.sessions.get(credit.handle)) is not None:
                session.messages += credit.messages
                session.bytes += credit.bytes
        for ack in request.acks:
            self._ack(stream, ack)
        for nack in request.nacks:
            self._nack(stream, nack)
        for seek in request.seeks:
            self._seek(stream, seek)
        for close in request.close:
            session = stream.sessions.get(close.handle)
            if session is not None:
                self._detach(session)
            answer = broker_pb2.AckResult(request_id=close.request_id, error=self.cluster.on_close())
            stream.say(broker_pb2.ConsumeResponse(acks=[answer]))
        for session in tuple(stream.sessions.values()):
            self._dispatch(session.shard)

    def _open_subscription(self, stream: Stream, opening: broker_pb2.OpenSubscription) -> None:
        self.cluster.consumer_opens.append(opening)
        shard = self._shard(opening.topic, opening.shard_id)
        refused = self._not_mine(shard) or self.cluster.on_open(shard)
        state = shard.subscriptions.get(opening.subscription)
        if refused is None and state is not None and state.type != opening.type:
            refused = error("CONSUMER_BUSY")
        if refused is not None:
            failure = broker_pb2.ConsumerError(handle=opening.handle, error=refused)
            stream.say(broker_pb2.ConsumeResponse(errors=[failure]))
            return
        if state is None:
            floor = self._position(shard, opening.start)
            state = shard.subscriptions[opening.subscription] = SubscriptionState(opening.type, floor)
        session = stream.sessions[opening.handle] = Session(stream, opening.handle, shard, state)
        session.selects = opening.type == metadata_pb2.SUBSCRIPTION_TYPE_QUEUE
        state.sessions.append(session)
        if session.selects:
            session.pending = {offset for r in opening.held for offset in range(r.start, r.end)}
        elif session.active:
            state.cursor_epoch += 1
        session.next = state.floor
        self._say_opened(session, state.floor, state.cursor_epoch)

    def _say_opened(self, session: Session, next_offset: int, cursor_epoch: int) -> None:
        opened = broker_pb2.SubscriptionOpened(
            handle=session.handle, next_offset=next_offset, end_offset=session.shard.end,
            active=session.active, cursor_epoch=cursor_epoch,
        )  # fmt: skip
        session.stream.say(broker_pb2.ConsumeResponse(opened=[opened]))

    def _position(self, shard: Shard, position: metadata_pb2.StartPosition) -> int:
        match position.WhichOneof("position"):
            case "earliest":
                return shard.start if position.earliest else shard.end
            case "offset":
                return position.offset
        return shard.start

    def _detach(self, session: Session) -> None:
        session.stream.sessions.pop(session.handle, None)
        if session.subscription is None:
            session.shard.readers.remove(session)
            return
        state = session.subscription
        was_active = not session.selects and state.sessions[0] is session
        state.sessions.remove(session)
        for offset in session.pending:
            state.counts[offset] = state.counts.get(offset, 0) + 1
        if was_active and state.sessions:
            state.cursor_epoch += 1
            state.sessions[0].next = state.floor
            notice = broker_pb2.ConsumerNotice(handle=state.sessions[0].handle, active=True)
            state.sessions[0].stream.say(broker_pb2.ConsumeResponse(notices=[notice]))
        self._dispatch(session.shard)

    def _ack(self, stream: Stream, ack: broker_pb2.Ack) -> None:
        session = stream.sessions[ack.handle]
        state = session.subscription
        assert state is not None
        fate = self.cluster.on_ack()
        if fate in (Fate.STORE, Fate.STORE_SILENTLY, Fate.STORE_AND_CUT):
            state.floor = max(state.floor, ack.floor)
            for r in ack.ranges:
                assert r.end <= session.shard.end
                state.acked.update(range(r.start, r.end))
                session.pending.difference_update(range(r.start, r.end))
        if fate is Fate.STORE:
            stream.say(broker_pb2.ConsumeResponse(acks=[broker_pb2.AckResult(request_id=ack.request_id)]))
        if fate in (Fate.CUT, Fate.STORE_AND_CUT):
            stream.cut()

    def _nack(self, stream: Stream, nack: broker_pb2.Nack) -> None:
        session = stream.sessions[nack.handle]
        state = session.subscription
        assert state is not None
        for r in nack.ranges:
            for offset in range(r.start, r.end):
                assert offset in session.pending
                session.pending.discard(offset)
                state.counts[offset] = state.counts.get(offset, 0) + 1

    def _seek(self, stream: Stream, seek: broker_pb2.Seek) -> None:
        session = stream.sessions[seek.handle]
        floor = self.seek(session.shard, session.subscription, self._position(session.shard, seek.position))
        assert session.subscription is not None
        result = broker_pb2.AckResult(
            request_id=seek.request_id, next_offset=floor, cursor_epoch=session.subscription.cursor_epoch
        )
        stream.say(broker_pb2.ConsumeResponse(acks=[result]))

    def seek(self, shard: Shard, state: SubscriptionState | None, floor: int) -> int:
        assert state is not None
        state.floor = floor
        state.acked.clear()
        state.counts.clear()
        state.cursor_epoch += 1
        for session in state.sessions:
            session.next = floor
            session.pending.clear()
        return floor

    def _dispatch(self, shard: Shard) -> None:
        for session in (*shard.readers, *(s for state in shard.subscriptions.values() for s in state.sessions)):
            if session.active:
                self._deliver(session)

    def _deliver(self, session: Session) -> None:
        state = session.subscription
        for first, data, header in session.shard.log:
            if session.messages <= 0 or session.bytes <= 0:
                return
            wanted = self._wanted(session, first, header.count)
            if not wanted:
                continue
            if session.selects:
                wanted = wanted[: session.messages]
                session.pending.update(first + index for index in wanted)
            else:
                session.next = first + header.count
            session.messages -= len(wanted)
            session.bytes -= len(data)
            delivery = broker_pb2.Delivery(
                handle=session.handle, cursor_epoch=state.cursor_epoch if state else 1, first_offset=first,
                publish_time_us=1_700_000_000_000_000 + first, batch=data,
                selection=from_indices(header.count, wanted),
            )  # fmt: skip
            if state is not None and state.counts:
                for index in wanted:
                    if count := state.counts.get(first + index):
                        delivery.redeliveries.extend((index, count))
            session.stream.say(broker_pb2.ConsumeResponse(deliveries=[delivery]))

    def _wanted(self, session: Session, first: int, count: int) -> list[int]:
        state = session.subscription
        if not session.selects:
            if first + count <= session.next:
                return []
            floor = 0 if state is None else state.floor
            return [index for index in range(count) if first + index >= max(floor, session.next)]
        assert state is not None
        taken: set[int] = set().union(*(other.pending for other in state.sessions))
        return [i for i in range(count) if first + i not in taken and not state.is_acked(first + i)]


def selected(delivery: broker_pb2.Delivery, count: int) -> list[int]:
    return indices(delivery.selection, count)
