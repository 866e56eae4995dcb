"""A bookie of another process: three streams, each carrying everything that is queued for it in as few frames as fit.

A stream is opened when there is something to send, and opened again after it broke. What was sent and not answered has
no answer then; what was not sent goes with the next stream, unless that cannot be opened. Pauses between attempts grow.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, Generic, TypeVar

import grpc
import grpc.aio
from google.protobuf.message import DecodeError

from magnetar.ledger.bookie_rpc import (
    AddGroup,
    AddResult,
    AddStatus,
    EntryAnswer,
    EntryOutcome,
    LacQuery,
    LacResult,
    ReadGroup,
    ReadResult,
)
from magnetar.ledger.bookie_wire import (
    FRAME_BYTES_MAX,
    ITEM_OVERHEAD_BYTES,
    PROTOCOL_MAX,
    PROTOCOL_MIN,
    add_results_from_frame,
    encode_add,
    encode_lac,
    encode_read,
    frame_of_items,
    lac_results_from_frame,
    read_results_from_frame,
)
from magnetar.ledger.deadlines import Deadlines
from magnetar.v1 import bookie_pb2 as pb
from magnetar.v1 import common_pb2
from magnetar.wire.framing import Pieces

CALL_TIMEOUT_S = 5.0
PAUSE_FIRST_S = 0.05
PAUSE_MAX_S = 2.0
ITEMS_PER_FRAME_MAX = 128
"""So that the bookie works on some of many small groups while others are encoded."""
HELD_BYTES_MAX = 64 << 20
"""Queued and unanswered, a stream: beyond it calls are refused at once."""
FRAME_HARD_BYTES_MAX = 8 << 20
ANSWER_BYTES = 1024
"""Counted for an answer beside its envelopes."""
PROGRAM = "magnetar-ledger"

CHANNEL_OPTIONS: tuple[tuple[str, int], ...] = (
    ("grpc.max_receive_message_length", FRAME_HARD_BYTES_MAX),
    ("grpc.max_send_message_length", FRAME_HARD_BYTES_MAX),
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.initial_reconnect_backoff_ms", 50),
    ("grpc.min_reconnect_backoff_ms", 50),
    ("grpc.max_reconnect_backoff_ms", 2_000),
    # A channel of its own for each bookie object: a broken connection is not shared with one that was closed.
    ("grpc.use_local_subchannel_pool", 1),
)

ItemT = TypeVar("ItemT")
ResultT = TypeVar("ResultT")


class StreamLost(Exception):
    """The stream ended, or cannot be opened; the message says how."""


@dataclass(frozen=True, slots=True)
class _Kind(Generic[ItemT, ResultT]):
    """What differs between the three streams."""

    method: str
    request: Callable[..., Any]
    response: Callable[[], Any]
    encode: Callable[[int, ItemT], Pieces]
    results: Callable[[Any], Iterable[tuple[int, ResultT]]]
    lost: Callable[[str], ResultT]
    refused: Callable[[str], ResultT]


def _no_add(message: str) -> AddResult:
    return AddResult(AddStatus.NO_ANSWER, message)


def _busy(message: str) -> AddResult:
    return AddResult(AddStatus.BUSY, message)


def _no_read(message: str) -> ReadResult:
    return ReadResult((EntryAnswer(EntryOutcome.UNKNOWN),), message)


def _no_lac(message: str) -> LacResult:
    return LacResult(EntryOutcome.UNKNOWN, message=message)


_ADDS: _Kind[AddGroup, AddResult] = _Kind(
    "AddEntries",
    pb.AddEntriesRequest,
    pb.AddEntriesResponse,
    encode_add,
    add_results_from_frame,
    _no_add,
    _busy,
)
_READS: _Kind[ReadGroup, ReadResult] = _Kind(
    "ReadEntries",
    pb.ReadEntriesRequest,
    pb.ReadEntriesResponse,
    encode_read,
    read_results_from_frame,
    _no_read,
    _no_read,
)
_LACS: _Kind[LacQuery, LacResult] = _Kind(
    "ReadLac",
    pb.ReadLacRequest,
    pb.ReadLacResponse,
    encode_lac,
    lac_results_from_frame,
    _no_lac,
    _no_lac,
)


class GrpcBookie:
    """See `bookie_rpc.BookieRpc`. Made and closed on a running event loop; nothing connects before the first call."""

    def __init__(
        self,
        bookie_id: str,
        address: str,
        *,
        cluster: str = "",
        timeout_s: float = CALL_TIMEOUT_S,
        held_bytes_max: int = HELD_BYTES_MAX,
    ) -> None:
        """`cluster`: that the bookie must say it is of; empty = any."""
        self._bookie_id = bookie_id
        self._channel = grpc.aio.insecure_channel(address, options=CHANNEL_OPTIONS)
        check = partial(_check_greeting, bookie_id, cluster)
        self._adds = _Pipe(_ADDS, self._channel, check, timeout_s, held_bytes_max)
        self._reads = _Pipe(_READS, self._channel, check, timeout_s, held_bytes_max)
        self._lacs = _Pipe(_LACS, self._channel, check, timeout_s, held_bytes_max)

    @property
    def bookie_id(self) -> str:
        return self._bookie_id

    def add(self, group: AddGroup) -> asyncio.Future[AddResult]:
        size_bytes = sum(map(len, group.entries)) + ITEM_OVERHEAD_BYTES * (1 + len(group.entries))
        return self._adds.submit(group, size_bytes, size_bytes)

    def read(self, group: ReadGroup) -> asyncio.Future[ReadResult]:
        return self._reads.submit(group, ITEM_OVERHEAD_BYTES, ANSWER_BYTES + group.max_bytes)

    def read_lac(self, query: LacQuery) -> asyncio.Future[LacResult]:
        return self._lacs.submit(query, ITEM_OVERHEAD_BYTES, ANSWER_BYTES)

    async def close(self) -> None:
        """Ends the streams; what waits completes without an answer."""
        for pipe in (self._adds, self._reads, self._lacs):
            await pipe.close()
        await self._channel.close()


class _Waiting(Generic[ItemT, ResultT]):
    __slots__ = ("frame_bytes", "future", "held_bytes", "item")

    def __init__(self, item: ItemT, frame_bytes: int, held_bytes: int, future: asyncio.Future[ResultT]) -> None:
        self.item = item
        self.frame_bytes = frame_bytes
        self.held_bytes = held_bytes
        self.future = future


class _Pipe(Generic[ItemT, ResultT]):
    """One kind of calls to one bookie. A task runs from the first call on; it holds one stream at a time."""

    def __init__(
        self,
        kind: _Kind[ItemT, ResultT],
        channel: grpc.aio.Channel,
        check_greeting: Callable[[common_pb2.HelloReply], None],
        timeout_s: float,
        held_bytes_max: int,
    ) -> None:
        self._kind = kind
        self._check_greeting = check_greeting
        self._open_stream = channel.stream_stream(f"/magnetar.v1.BookieService/{kind.method}")
        self._timeout_s = timeout_s
        self._held_bytes_max = held_bytes_max
        self._deadlines = Deadlines(timeout_s)
        self._late = partial(kind.lost, "bookie did not answer in time")
        self._queue: deque[_Waiting[ItemT, ResultT]] = deque()
        self._sent: dict[int, _Waiting[ItemT, ResultT]] = {}
        self._held_bytes = 0
        self._next_request = 1
        self._pause_s = PAUSE_FIRST_S
        self._work = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._closed = False

    def submit(self, item: ItemT, frame_bytes: int, held_bytes: int) -> asyncio.Future[ResultT]:
        """Completes with the bookie's answer, or without one after the timeout or when the stream is lost.

        `frame_bytes` is what the item takes in a frame, `held_bytes` what it and its answer take in memory.
        """
        future: asyncio.Future[ResultT] = asyncio.get_running_loop().create_future()
        if self._closed:
            future.set_result(self._kind.lost("connection is closed"))
            return future
        if self._is_over(held_bytes):
            self._let_go_of_completed()
            if self._is_over(held_bytes):
                future.set_result(self._kind.refused("too much waits for this bookie"))
                return future
        self._queue.append(_Waiting(item, frame_bytes, held_bytes, future))
        self._held_bytes += held_bytes
        self._work.set()
        if self._task is None:
            self._task = asyncio.create_task(self._run(), name=f"bookie {self._kind.method}")
        return self._deadlines.watch(future, self._late)

    def _is_over(self, more_bytes: int) -> bool:
        return self._held_bytes > 0 and self._held_bytes + more_bytes > self._held_bytes_max

    async def close(self) -> None:
        self._closed = True
        if self._task is not None:
            self._task.cancel()
            with suppress(asyncio.CancelledError):
                await self._task
        self._lose([*self._sent.values(), *self._queue], "connection is closed")
        self._sent.clear()
        self._queue.clear()
        self._deadlines.close()

    def _lose(self, waiting: list[_Waiting[ItemT, ResultT]], reason: str) -> None:
        for one in waiting:
            self._held_bytes -= one.held_bytes
            if not one.future.done():
                one.future.set_result(self._kind.lost(reason))

    def _let_go_of_completed(self) -> None:
        """Drops what timed out: nobody waits for it any more."""
        for request_id in [request_id for request_id, one in self._sent.items() if one.future.done()]:
            self._held_bytes -= self._sent.pop(request_id).held_bytes
        done = [one for one in self._queue if one.future.done()]
        if done:
            self._queue = deque(one for one in self._queue if not one.future.done())
            self._held_bytes -= sum(one.held_bytes for one in done)

    async def _run(self) -> None:
        while True:
            await self._wait_for_work()
            try:
                stream = await self._open()
            except StreamLost as lost:
                self._lose(list(self._queue), str(lost))
                self._queue.clear()
            else:
                self._pause_s = PAUSE_FIRST_S
                await self._converse(stream)
            await asyncio.sleep(self._pause_s)
            self._pause_s = min(self._pause_s * 2, PAUSE_MAX_S)

    async def _wait_for_work(self) -> None:
        while not self._queue:
            self._work.clear()
            await self._work.wait()

    async def _open(self) -> Any:
        """A stream that greeted. Raises StreamLost."""
        stream = self._open_stream()
        hello = common_pb2.Hello(protocol_min=PROTOCOL_MIN, protocol_max=PROTOCOL_MAX, name=PROGRAM)
        try:
            async with asyncio.timeout(self._timeout_s):
                await stream.write(self._kind.request(hello=hello).SerializeToString())
                frame = self._parse(await stream.read())
                if not frame.HasField("hello"):
                    raise StreamLost("bookie did not greet")
                self._check_greeting(frame.hello)
                return stream
        except TimeoutError:
            stream.cancel()
            raise StreamLost("bookie did not answer in time") from None
        except (grpc.aio.AioRpcError, grpc.aio.UsageError, asyncio.InvalidStateError) as error:
            raise StreamLost(_reason(error)) from None
        except BaseException:
            stream.cancel()
            raise

    async def _converse(self, stream: Any) -> None:
        """Sends and receives until the stream is lost; then what was sent has no answer."""
        reason = "connection lost"
        tasks = [asyncio.create_task(self._send(stream)), asyncio.create_task(self._receive(stream))]
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            reason = _reason(next(iter(done)).exception())
        finally:
            for task in tasks:
                task.cancel()
            stream.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            self._lose(list(self._sent.values()), reason)
            self._sent.clear()

    async def _send(self, stream: Any) -> None:
        while True:
            await self._wait_for_work()
            frame = self._next_frame()
            if frame is not None:
                await stream.write(frame)

    def _next_frame(self) -> bytes | None:
        """Everything that is queued and fits; what timed out in the queue is not sent."""
        items: list[Pieces] = []
        size_bytes = 0
        while self._queue and len(items) < ITEMS_PER_FRAME_MAX:
            one = self._queue[0]
            if items and size_bytes + one.frame_bytes > FRAME_BYTES_MAX:
                break
            self._queue.popleft()
            if one.future.done():
                self._held_bytes -= one.held_bytes
                continue
            size_bytes += one.frame_bytes
            items.append(self._kind.encode(self._next_request, one.item))
            self._sent[self._next_request] = one
            self._next_request += 1
        return frame_of_items(items) if items else None

    async def _receive(self, stream: Any) -> None:
        while True:
            frame = self._parse(await stream.read())
            for request_id, result in self._kind.results(frame):
                one = self._sent.pop(request_id, None)
                if one is None:
                    continue
                self._held_bytes -= one.held_bytes
                if not one.future.done():
                    one.future.set_result(result)

    def _parse(self, data: Any) -> Any:
        """Raises StreamLost for the end, an error frame, and bytes that are no frame."""
        if data is grpc.aio.EOF:
            raise StreamLost("bookie ended the stream")
        frame = self._kind.response()
        try:
            frame.ParseFromString(data)
        except DecodeError:
            raise StreamLost("bookie sent a malformed frame") from None
        if frame.HasField("error"):
            reason = common_pb2.ErrorReason.Name(frame.error.reason)
            raise StreamLost(f"bookie ended the stream reason=`{reason}` message=`{frame.error.message}`")
        return frame


def _check_greeting(bookie_id: str, cluster: str, hello: common_pb2.HelloReply) -> None:
    """An address may be another bookie's by now, even one of another cluster: it would store what is not its own."""
    if hello.node_id != bookie_id or (cluster and hello.cluster != cluster):
        raise StreamLost(
            f"another bookie answers at this address id=`{hello.node_id}` cluster=`{hello.cluster}` "
            f"expected_id=`{bookie_id}` expected_cluster=`{cluster}`"
        )


def _reason(error: BaseException | None) -> str:
    if isinstance(error, grpc.aio.AioRpcError):
        return f"connection lost status=`{error.code().name}` details=`{error.details()}`"
    return str(error) or type(error).__name__
