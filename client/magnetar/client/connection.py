"""The two streams that a client keeps to a broker, and handles: what is multiplexed on them.

One `Produce` and one `Consume` stream a broker. Each has one task that writes and one that reads. The writer asks for
everything that is queued now, in one frame of at most 1 MiB or exactly one batch, and asks again when that frame is
taken: many small frames when little is going on, few full ones under load.

A handle is one producer or consumer at one shard. It keeps its state itself; a stream that ends tells its handles why.
"""

from __future__ import annotations

import asyncio
import logging
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable
from typing import Generic, Protocol, TypeVar

from google.protobuf.message import DecodeError

from magnetar.client.refusal import PROTOCOL_VIOLATION, Refused, unavailable
from magnetar.client.rpc import BROKER_SERVICE, BrokerRpc, RpcStream
from magnetar.v1 import broker_pb2, common_pb2
from magnetar.wire.framing import Pieces, bytes_field, message_field

FRAME_BYTES_MAX = 1 << 20
"""A frame is at most this, or one batch."""

HANDLES_PER_FRAME_MAX = 128
"""So that the broker works for some shards while batches for others are encoded; what is for one goes together."""

RANGES_PER_FRAME = 40_000
"""Ranges of acknowledgements at which a frame is full enough, about 800 KiB; brokers refuse 100 000."""

GREETING_S_MAX = 5.0
"""For a broker to answer the greeting; later, gRPC's keepalive finds one that is silent."""

PROTOCOL_VERSION = 1
CLIENT_NAME = "magnetar-python"

_REQUEST_BATCHES_FIELD = 3
_BATCHES_FIELD = 1
_BATCH_FIELD = 2
"""Of ProduceRequest, ProduceBatches and ProduceBatch."""

log = logging.getLogger("magnetar.client")


class ProducerHandle(Protocol):
    """A producer at a shard, as its stream sees it."""

    def next_size(self) -> int:
        """About how many bytes the next batch has; 0: nothing can go now."""

    def next_batch(self) -> bytes | None:
        """The next batch; None if there is none after all. Counts as sent."""

    def opened(self, opened: broker_pb2.ProducerOpened) -> None: ...
    def stored(self, stored: broker_pb2.BatchStored) -> None: ...
    def windowed(self, window_bytes: int) -> None: ...
    def ended(self, refused: Refused, sequence: int) -> None:
        """The handle is closed, at both sides. sequence: first of the batch that was refused, or -1."""


class ConsumerHandle(Protocol):
    """A consumer at a shard, as its stream sees it."""

    def fill(self, request: broker_pb2.ConsumeRequest) -> int:
        """Put in what is queued. Returns how many ranges of offsets that was, at most 50 000."""

    def opened(self, opened: broker_pb2.SubscriptionOpened) -> None: ...
    def delivered(self, delivery: broker_pb2.Delivery) -> None: ...
    def noticed(self, notice: broker_pb2.ConsumerNotice) -> None: ...
    def ended(self, refused: Refused, sequence: int = -1) -> None:
        """The handle is closed, at both sides."""


HandleT = TypeVar("HandleT", ProducerHandle, ConsumerHandle)


class Stream(ABC, Generic[HandleT]):
    """What both kinds of stream are: a greeting, a writer, a reader, and handles that hear of the end."""

    method: str

    def __init__(self, rpc: BrokerRpc, address: str, ended: Callable[[], None]) -> None:
        self.address = address
        self.registered = address
        """The address that layouts give for this broker, once it answered."""
        self._rpc = rpc
        self._ended = ended
        self._handles: dict[int, HandleT] = {}
        self._next_handle = 1
        self._over: Refused | None = None
        self._work = asyncio.Event()
        self._ready: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._task = asyncio.create_task(self._run(), name=f"{self.method} {address}")

    async def ready(self) -> None:
        """The broker answered the greeting. Raises Refused."""
        await asyncio.shield(self._ready)

    def add(self, handle: HandleT) -> int:
        """A number for the handle; it hears what the broker says about it from now on. Raises Refused at the end."""
        if self._over is not None:
            raise self._over
        number = self._next_handle
        self._next_handle += 1
        self._handles[number] = handle
        return number

    def remove(self, number: int) -> None:
        """The handle hears no more."""
        self._handles.pop(number, None)

    async def stop(self) -> None:
        self._task.cancel()
        await asyncio.wait({self._task})

    @abstractmethod
    def _greeting(self) -> bytes: ...

    @abstractmethod
    def _answer(self, frame: bytes) -> tuple[common_pb2.HelloReply, common_pb2.Error | None]:
        """The broker's answer to the greeting, and the error in its place if there is one."""

    @abstractmethod
    def _next_frame(self) -> bytes | None:
        """Everything that is queued now, as far as a frame holds it; None if there is nothing."""

    @abstractmethod
    def _receive(self, frame: bytes) -> None:
        """Raises Refused if the frame ends the stream."""

    async def _run(self) -> None:
        refused = unavailable(f"the connection was closed: broker=`{self.address}`")
        stream = self._rpc.stream(self.address, self.method)
        try:
            await self._greet(stream)
            self._ready.set_result(None)
            await self._talk(stream)
        except Refused as error:
            refused = error
        except DecodeError:
            refused = Refused(PROTOCOL_VIOLATION, f"the broker sent what does not parse: broker=`{self.address}`")
        except Exception as error:
            log.exception("stream failed: broker=`%s`", self.address)
            refused = unavailable(f"the client failed: {error!r} broker=`{self.address}`")
        finally:
            self._end(refused)
            await stream.close()

    async def _greet(self, stream: RpcStream) -> None:
        try:
            async with asyncio.timeout(GREETING_S_MAX):
                await stream.write(self._greeting())
                frame = await stream.read()
        except TimeoutError:
            raise unavailable(f"the broker does not answer: broker=`{self.address}`") from None
        if frame is None:
            raise unavailable(f"the broker ended the stream: broker=`{self.address}`")
        hello, error = self._answer(frame)
        if error is not None:
            raise Refused.of(error)
        self.registered = hello.address or self.address

    async def _talk(self, stream: RpcStream) -> None:
        """Until one direction ends; then the other ends too."""
        tasks = {
            asyncio.create_task(self._write(stream), name=f"{self.method} {self.address} writer"),
            asyncio.create_task(self._read(stream), name=f"{self.method} {self.address} reader"),
        }
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        # Of two failures the broker's own reason, which the reader has, says more.
        failures = [error for task in done if not task.cancelled() and (error := task.exception()) is not None]
        raise max(failures, key=lambda error: isinstance(error, Refused) and error.final)

    async def _write(self, stream: RpcStream) -> None:
        while True:
            frame = self._next_frame()
            if frame is None:
                self._work.clear()
                await self._work.wait()
            else:
                await stream.write(frame)

    async def _read(self, stream: RpcStream) -> None:
        while True:
            frame = await stream.read()
            if frame is None:
                raise unavailable(f"the broker ended the stream: broker=`{self.address}`")
            self._receive(frame)

    def _end(self, refused: Refused) -> None:
        self._over = refused
        self._ended()
        if not self._ready.done():
            self._ready.set_exception(refused)
            # Marks the error as seen: nobody may be waiting.
            self._ready.exception()
        handles, self._handles = self._handles, {}
        for handle in handles.values():
            handle.ended(refused, -1)

    def _hello(self) -> common_pb2.Hello:
        return common_pb2.Hello(protocol_min=PROTOCOL_VERSION, protocol_max=PROTOCOL_VERSION, name=CLIENT_NAME)


class ProduceStream(Stream[ProducerHandle]):
    """Producers at one broker."""

    method = BROKER_SERVICE + "Produce"

    def __init__(self, rpc: BrokerRpc, address: str, ended: Callable[[], None]) -> None:
        self._control: deque[broker_pb2.ProduceRequest] = deque()
        self._waiting: deque[int] = deque()
        self._queued: set[int] = set()
        super().__init__(rpc, address, ended)

    def open(self, request: broker_pb2.OpenProducer) -> None:
        self._control.append(broker_pb2.ProduceRequest(open=request))
        self._work.set()

    def close(self, number: int) -> None:
        if number in self._handles:
            self.remove(number)
            self._control.append(broker_pb2.ProduceRequest(close=broker_pb2.CloseProducer(handle=number)))
            self._work.set()

    def wake(self, number: int) -> None:
        """The handle may have a batch to send."""
        if number not in self._queued:
            self._queued.add(number)
            self._waiting.append(number)
            self._work.set()

    def _greeting(self) -> bytes:
        return broker_pb2.ProduceRequest(hello=self._hello()).SerializeToString()

    def _answer(self, frame: bytes) -> tuple[common_pb2.HelloReply, common_pb2.Error | None]:
        response = broker_pb2.ProduceResponse.FromString(frame)
        return response.hello, response.error if response.HasField("error") else None

    def _next_frame(self) -> bytes | None:
        if self._control:
            return self._control.popleft().SerializeToString()
        batches: Pieces = []
        handles: set[int] = set()
        size = 0
        while self._waiting and len(handles) < HANDLES_PER_FRAME_MAX:
            number = self._waiting[0]
            handle = self._handles.get(number)
            wanted = handle.next_size() if handle is not None else 0
            if size and wanted and size + wanted > FRAME_BYTES_MAX:
                break
            # Each handle in turn gives one batch, so that none waits behind a busy one.
            self._waiting.popleft()
            data = handle.next_batch() if handle is not None and wanted else None
            if data is None:
                self._queued.discard(number)
                continue
            self._waiting.append(number)
            batches += _batch_field(number, data)
            size += len(data)
            handles.add(number)
        if not batches:
            return None
        return b"".join(message_field(_REQUEST_BATCHES_FIELD, batches))

    def _receive(self, frame: bytes) -> None:
        response = broker_pb2.ProduceResponse.FromString(frame)
        handles = self._handles
        for opened in response.opened:
            if (handle := handles.get(opened.handle)) is not None:
                handle.opened(opened)
        for stored in response.stored:
            if (handle := handles.get(stored.handle)) is not None:
                handle.stored(stored)
        for error in response.errors:
            if (handle := handles.pop(error.handle, None)) is not None:
                handle.ended(Refused.of(error.error), error.sequence)
        for window in response.windows:
            if (handle := handles.get(window.handle)) is not None:
                handle.windowed(window.window_bytes)
        if response.HasField("error"):
            raise Refused.of(response.error)


def _batch_field(number: int, data: bytes) -> Pieces:
    """Of ProduceBatches."""
    handle = broker_pb2.ProduceBatch(handle=number).SerializeToString()
    return message_field(_BATCHES_FIELD, [handle, *bytes_field(_BATCH_FIELD, data)])


class ConsumeStream(Stream[ConsumerHandle]):
    """Consumers and readers at one broker."""

    method = BROKER_SERVICE + "Consume"

    def __init__(self, rpc: BrokerRpc, address: str, ended: Callable[[], None]) -> None:
        self._waiting: dict[int, None] = {}
        self._closing: list[int] = []
        self._requests: dict[int, tuple[int, Callable[[broker_pb2.AckResult], None]]] = {}
        self._next_request = 1
        super().__init__(rpc, address, ended)

    def wake(self, number: int) -> None:
        """The handle has something to say."""
        if number not in self._waiting:
            self._waiting[number] = None
            self._work.set()

    def request(self, number: int, answered: Callable[[broker_pb2.AckResult], None]) -> int:
        """The id of a request about the handle; the function is called with the result.

        Never if the handle or the stream ends first: its owner may have asked at another broker by then, whose ids are
        the same numbers.
        """
        request_id = self._next_request
        self._next_request += 1
        self._requests[request_id] = number, answered
        return request_id

    def close(self, number: int) -> None:
        """The handle is closed, without waiting for the broker's answer."""
        if number in self._handles:
            self.remove(number)
            self._closing.append(number)
            self._work.set()

    def _greeting(self) -> bytes:
        return broker_pb2.ConsumeRequest(hello=self._hello()).SerializeToString()

    def _answer(self, frame: bytes) -> tuple[common_pb2.HelloReply, common_pb2.Error | None]:
        response = broker_pb2.ConsumeResponse.FromString(frame)
        return response.hello, response.error if response.HasField("error") else None

    def _next_frame(self) -> bytes | None:
        request = broker_pb2.ConsumeRequest()
        for number in self._closing:
            request.close.add(handle=number, request_id=self.request(number, lambda result: None))
        self._closing.clear()
        ranges = 0
        while self._waiting and ranges < RANGES_PER_FRAME:
            number = next(iter(self._waiting))
            # Before it is asked: while it fills the frame it may find that it has more for the next one.
            del self._waiting[number]
            handle = self._handles.get(number)
            if handle is not None:
                ranges += handle.fill(request)
        return request.SerializeToString() or (self._next_frame() if self._waiting else None)

    def _receive(self, frame: bytes) -> None:
        response = broker_pb2.ConsumeResponse.FromString(frame)
        handles = self._handles
        for opened in response.opened:
            if (handle := handles.get(opened.handle)) is not None:
                handle.opened(opened)
        for delivery in response.deliveries:
            if (handle := handles.get(delivery.handle)) is not None:
                handle.delivered(delivery)
        for result in response.acks:
            number, answered = self._requests.pop(result.request_id, (0, None))
            if answered is not None and number in handles:
                answered(result)
        for error in response.errors:
            if (handle := handles.pop(error.handle, None)) is not None:
                handle.ended(Refused.of(error.error))
        for notice in response.notices:
            if (handle := handles.get(notice.handle)) is not None:
                handle.noticed(notice)
        if response.HasField("error"):
            raise Refused.of(response.error)


StreamT = TypeVar("StreamT", ProduceStream, ConsumeStream)


class Streams(Generic[StreamT]):
    """The streams of one kind, one a broker, made when they are needed."""

    def __init__(self, kind: Callable[[BrokerRpc, str, Callable[[], None]], StreamT], rpc: BrokerRpc) -> None:
        self._kind: Callable[[BrokerRpc, str, Callable[[], None]], StreamT] = kind
        self._rpc = rpc
        self._streams: dict[str, StreamT] = {}

    async def at(self, address: str) -> StreamT:
        """The stream to this broker, greeted. Raises Refused."""
        stream = self._streams.get(address)
        if stream is None:
            stream = self._streams[address] = self._kind(self._rpc, address, lambda: self._forget(address))
        await stream.ready()
        return stream

    async def stop(self) -> None:
        for stream in tuple(self._streams.values()):
            await stream.stop()

    def _forget(self, address: str) -> None:
        self._streams.pop(address, None)
