"""The bookie's gRPC service: frames of many calls in, frames of many answers out.

A stream begins with Hello. Then every item of a frame is a call of its own; answers come in the order they are ready,
all that are ready in one frame. A stream that has too much unanswered, or a bookie whose queue is full, is simply not
read from. A frame that does not parse ends its stream with an error frame, and no other.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

from google.protobuf.message import Message

from magnetar.bookie.entry_store import ENTRIES_PER_READ_MAX, StoreDamaged
from magnetar.bookie.handlers import BookieHandlers, LedgerFacts
from magnetar.bookie.reads import READ_BYTES_MAX
from magnetar.ledger.bookie_rpc import ReadResult
from magnetar.ledger.bookie_wire import (
    FRAME_BYTES_MAX,
    ITEM_OVERHEAD_BYTES,
    PROTOCOL_MAX,
    PROTOCOL_MIN,
    add_from_message,
    encode_lac_result,
    encode_read_result,
    frame_of_add_results,
    frame_of_items,
    lac_from_message,
    read_from_message,
)
from magnetar.node.rpc import MESSAGE_BYTES_MAX, Refused, ServerStream, Service, malformed, parse, unavailable
from magnetar.v1 import bookie_pb2 as pb
from magnetar.v1 import common_pb2
from magnetar.wire.envelope import HEADER_SIZE

UNANSWERED_BYTES_MAX = 4 << 20
"""Of a stream: what the answers to its unanswered calls may hold, and those not yet taken by the client."""
ANSWER_BYTES = 256
"""Counted for an answer without entries."""
TOKENS_PER_STREAM_MAX = 4096
LEDGERS_PER_FRAME = 10_000
LAST_ANSWERS_S = 5.0
"""For a client to take what is ready before its stream is ended with an error."""


class Tokens:
    """The tokens a stream has named: of its first TOKENS_PER_STREAM_MAX ledgers; others are named each time."""

    def __init__(self) -> None:
        self._named: dict[int, bytes] = {}

    def of(self, ledger_id: int, token: bytes) -> bytes:
        """The token that is meant; empty if none was ever named."""
        if not token:
            return self._named.get(ledger_id, b"")
        if ledger_id in self._named or len(self._named) < TOKENS_PER_STREAM_MAX:
            self._named[ledger_id] = token
        return token


@dataclass(frozen=True, slots=True)
class Exchange:
    """What differs between the three kinds of streams."""

    request_class: type[Message]
    items: Callable[[Any], Sequence[Any]]
    call: Callable[[Any, Tokens], asyncio.Future[Any]]
    cost: Callable[[Any], int]
    size: Callable[[Any], int]
    """What a result takes in a frame."""
    frame: Callable[[Sequence[tuple[int, Any]]], bytes]
    """Of results by request id."""
    response: Callable[..., Any]


class BookieService:
    """Serves one bookie's handlers."""

    def __init__(
        self,
        bookie_id: str,
        cluster: str,
        handlers: BookieHandlers,
        status: Callable[[int], pb.StatusResponse],
    ) -> None:
        self._bookie_id = bookie_id
        self._cluster = cluster
        self._handlers = handlers
        self._status = status
        self._adds = Exchange(
            pb.AddEntriesRequest,
            lambda frame: frame.groups,
            lambda item, tokens: handlers.add(add_from_message(item, tokens.of(item.ledger_id, item.token))),
            lambda item: ANSWER_BYTES,
            lambda result: ITEM_OVERHEAD_BYTES + len(result.message),
            frame_of_add_results,
            pb.AddEntriesResponse,
        )
        self._reads = Exchange(
            pb.ReadEntriesRequest,
            lambda frame: frame.groups,
            lambda item, tokens: handlers.read(read_from_message(item, tokens.of(item.ledger_id, item.token))),
            _read_cost,
            _read_size,
            lambda answers: frame_of_items([encode_read_result(*answer) for answer in answers]),
            pb.ReadEntriesResponse,
        )
        self._lacs = Exchange(
            pb.ReadLacRequest,
            lambda frame: frame.queries,
            lambda item, tokens: handlers.read_lac(lac_from_message(item, tokens.of(item.ledger_id, item.token))),
            lambda item: ANSWER_BYTES,
            lambda result: ITEM_OVERHEAD_BYTES + len(result.message),
            lambda answers: frame_of_items([encode_lac_result(*answer) for answer in answers]),
            pb.ReadLacResponse,
        )

    def service(self) -> Service:
        return Service(
            pb.DESCRIPTOR.services_by_name["BookieService"],
            {
                "AddEntries": lambda stream: self._serve(stream, self._adds),
                "ReadEntries": lambda stream: self._serve(stream, self._reads),
                "ReadLac": lambda stream: self._serve(stream, self._lacs),
                "ListLedgers": self._list_ledgers,
                "Status": self._status_call,
            },
        )

    async def _serve(self, stream: ServerStream, exchange: Exchange) -> None:
        data = await stream.read()
        if data is None:
            return
        check_hello(parse(exchange.request_class, data), exchange)
        reply = common_pb2.HelloReply(
            protocol=PROTOCOL_MAX,
            node_id=self._bookie_id,
            cluster=self._cluster,
            max_message_bytes=MESSAGE_BYTES_MAX,
            max_frame_bytes=FRAME_BYTES_MAX,
        )
        await stream.write(exchange.response(hello=reply).SerializeToString())
        await _Conversation(stream, exchange, self._handlers.room).run()

    async def _list_ledgers(self, request: bytes, stream: ServerStream) -> None:
        parse(pb.ListLedgersRequest, request)
        try:
            ledgers = await self._handlers.ledgers()
        except StoreDamaged as damage:
            raise unavailable(str(damage)) from None
        for start in range(0, len(ledgers), LEDGERS_PER_FRAME):
            frame = _ledgers_frame(ledgers[start : start + LEDGERS_PER_FRAME])
            await stream.write(frame.SerializeToString())

    async def _status_call(self, request: bytes, _context: Any) -> bytes:
        parse(pb.StatusRequest, request)
        try:
            ledgers = len(await self._handlers.ledgers())
        except StoreDamaged as damage:
            raise unavailable(str(damage)) from None
        return self._status(ledgers).SerializeToString()


def check_hello(frame: Any, exchange: Exchange) -> None:
    """Raises Refused unless the frame is a Hello, alone, of a protocol that is spoken here."""
    if not frame.HasField("hello") or exchange.items(frame):
        raise Refused(common_pb2.ERROR_REASON_PROTOCOL_VIOLATION, "the first frame of a stream is a hello, alone")
    hello = frame.hello
    if not hello.protocol_min <= PROTOCOL_MAX or not hello.protocol_max >= PROTOCOL_MIN:
        raise Refused(
            common_pb2.ERROR_REASON_UNSUPPORTED_VERSION,
            f"no common protocol offered=`{hello.protocol_min}-{hello.protocol_max}` "
            f"spoken=`{PROTOCOL_MIN}-{PROTOCOL_MAX}`",
        )


def _read_cost(item: pb.ReadGroup) -> int:
    whole = min(item.max_bytes, READ_BYTES_MAX)
    return ANSWER_BYTES + (min(whole, HEADER_SIZE * ENTRIES_PER_READ_MAX) if item.headers_only else whole)


def _read_size(result: ReadResult) -> int:
    return sum(ITEM_OVERHEAD_BYTES + len(answer.entry or b"") for answer in result.answers)


def _ledgers_frame(ledgers: Iterable[LedgerFacts]) -> pb.ListLedgersResponse:
    return pb.ListLedgersResponse(
        ledgers=[
            pb.StoredLedger(ledger_id=facts.ledger_id, fenced=facts.fenced, limbo=facts.limbo, epoch=facts.epoch)
            for facts in ledgers
        ]
    )


class _Conversation:
    """One stream after its Hello. This task reads, another one writes."""

    def __init__(
        self,
        stream: ServerStream,
        exchange: Exchange,
        room: Callable[[], Any],
        unanswered_max: int = UNANSWERED_BYTES_MAX,
    ) -> None:
        self._stream = stream
        self._exchange = exchange
        self._room = room
        self._unanswered_max = unanswered_max
        self._tokens = Tokens()
        self._ready: deque[tuple[int, Any, int]] = deque()
        """Request id, result, cost."""
        self._unanswered = 0
        self._writing = False
        self._something_ready = asyncio.Event()
        self._progress = asyncio.Event()

    async def run(self) -> None:
        """Ends when the client has sent all and got all answers. Raises Refused for a frame it does not take."""
        writer = asyncio.create_task(self._write(), name="bookie answers")
        writer.add_done_callback(lambda _: self._progress.set())
        try:
            while (data := await self._stream.read()) is not None:
                await self._take(self._parse(data), writer)
            await self._wait_below(0, writer)
        except Refused:
            with suppress(TimeoutError):
                async with asyncio.timeout(LAST_ANSWERS_S):
                    await self._wait_written(writer)
            raise
        finally:
            writer.cancel()
            await asyncio.gather(writer, return_exceptions=True)

    def _parse(self, data: bytes) -> Sequence[Any]:
        frame: Any = parse(self._exchange.request_class, data)
        if frame.HasField("hello"):
            raise Refused(common_pb2.ERROR_REASON_PROTOCOL_VIOLATION, "hello comes once")
        items = self._exchange.items(frame)
        if not items:
            raise malformed("frame holds nothing")
        return items

    async def _take(self, items: Sequence[Any], writer: asyncio.Task[None]) -> None:
        exchange = self._exchange
        for item in items:
            cost = exchange.cost(item)
            if self._unanswered + cost > self._unanswered_max:
                await self._wait_below(max(0, self._unanswered_max - cost), writer)
            self._unanswered += cost
            self._call(item, cost)
        await self._room()

    def _call(self, item: Any, cost: int) -> None:
        self._exchange.call(item, self._tokens).add_done_callback(partial(self._answered, item.request_id, cost))

    def _answered(self, request_id: int, cost: int, done: asyncio.Future[Any]) -> None:
        self._ready.append((request_id, done.result(), cost))
        self._something_ready.set()

    async def _wait_below(self, limit: int, writer: asyncio.Task[None]) -> None:
        """Returns when at most `limit` is unanswered; raises what ended the writer."""
        while self._unanswered > limit:
            self._progress.clear()
            await self._progress.wait()
            if writer.done():
                writer.result()

    async def _wait_written(self, writer: asyncio.Task[None]) -> None:
        """Returns when all answers are written; a frame that is cut off would leave no way to send the refusal."""
        while (self._ready or self._writing) and not writer.done():
            self._progress.clear()
            await self._progress.wait()

    async def _write(self) -> None:
        while True:
            if not self._ready:
                self._something_ready.clear()
                await self._something_ready.wait()
            frame, cost = self._next_frame()
            self._writing = True
            await self._stream.write(frame)
            self._writing = False
            self._unanswered -= cost
            self._progress.set()

    def _next_frame(self) -> tuple[bytes, int]:
        """Of all that is ready and fits, and what that cost."""
        ready, size_of = self._ready, self._exchange.size
        answers: list[tuple[int, Any]] = []
        size_bytes = cost = 0
        while ready:
            request_id, result, result_cost = ready[0]
            size_bytes += size_of(result)
            if answers and size_bytes > FRAME_BYTES_MAX:
                break
            ready.popleft()
            answers.append((request_id, result))
            cost += result_cost
        return self._exchange.frame(answers), cost
