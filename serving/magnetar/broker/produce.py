"""The Produce stream: one a client and broker, many producers in it.

One task reads: it checks each batch and gives it to the log of its shard. One task writes: it sends everything there is
to say in one frame, so that an idle client hears at once and a busy one in large frames. Opening a producer may take
long (the shard may have to be taken over), so each opening is a task of its own.

Rules:

1. A handle's answers come in the order of its batches. A batch that is refused closes its handle; the error is sent
   after the answers to all batches pushed before it. Batches that were under way to a closed handle are dropped.
2. A client keeps at most the window's bytes of a handle unanswered. Twice that is a violation, and ends the stream.
3. Reading stops while the broker, or a shard that this stream writes to, holds its limit of bytes not yet stored.
"""

from __future__ import annotations

import asyncio
from contextlib import suppress
from enum import Enum
from typing import Protocol

import structlog

from magnetar.broker.budget import ByteBudget
from magnetar.broker.dedup import NO_SEQUENCE, PRODUCER_ID_BYTES, StoredBatch, Verdict, named_producer_id
from magnetar.broker.metrics import BrokerMetrics
from magnetar.broker.refusals import checked_name, refusal_of, topic_name
from magnetar.broker.shard import ServedShard, fenced, superseded
from magnetar.node.rpc import GONE, Refused, ServerStream, invalid_argument, malformed, parse
from magnetar.v1 import broker_pb2, common_pb2
from magnetar.wire.batch import BODY_BYTES_MAX, BatchHeader, MalformedBatch, parse_header

HANDLES_MAX = 10_000
"""Of one stream, those closed by an error included until the client lets go of them."""

WINDOW_BYTES_MAX = 4 << 20
WINDOW_BYTES_MIN = 64 << 10
WINDOW_EXCESS = 2
"""How many windows a handle may have unanswered before that is a violation."""

BATCH_BYTES_MAX = (8 << 20) - (64 << 10)
"""Of one batch: with its envelope it must fit into a frame to a bookie."""

COLUMN_BYTES_MAX = 64 << 10
"""What the columns of a message may take beside its payload, key and properties."""

ANSWERS_PER_FRAME_MAX = 10_000
OPENED_PER_FRAME_MAX = 4_000
UNSENT_ANSWERS_MAX = 50_000
"""What may wait to be said to a client that does not listen; then nothing more is read from it."""

DRAIN_S = 10.0
"""How long a client that sends no more is waited for while its batches are being stored."""

log = structlog.get_logger("magnetar.produce")


class ProduceBroker(Protocol):
    """What a stream needs of its broker."""

    metrics: BrokerMetrics
    budget: ByteBudget
    max_message_bytes: int

    def greet(self, hello: common_pb2.Hello) -> common_pb2.HelloReply: ...
    def next_opening(self) -> int: ...
    async def shard(self, topic: str, shard_id: int) -> ServedShard: ...
    async def producer_epoch(self, topic: str, name: str) -> int: ...


class HandleState(Enum):
    OPENING = 1
    OPEN = 2
    FAILING = 3
    """A batch was refused; the error waits for the answers to what was pushed before."""
    CLOSED = 4


class ProducerHandle:
    """A producer opened at a shard through this stream.

    in_flight         batches pushed and unanswered
    unanswered_bytes  of batches sent and not answered
    echoes            first and last sequence, size of batches that came again while in flight, in order
    """

    __slots__ = (
        "echoes",
        "epoch",
        "failure",
        "failure_sequence",
        "in_flight",
        "number",
        "opening",
        "producer_id",
        "shard",
        "state",
        "stream",
        "unanswered_bytes",
        "window_bytes",
    )

    def __init__(self, stream: ProduceStream, number: int, producer_id: bytes, epoch: int, opening: int) -> None:
        self.stream = stream
        self.number = number
        self.producer_id = producer_id
        self.epoch = epoch
        self.opening = opening
        self.state = HandleState.OPENING
        self.shard: ServedShard | None = None
        self.window_bytes = 0
        self.unanswered_bytes = 0
        self.in_flight = 0
        self.echoes: list[tuple[int, int, int]] = []
        self.failure: Refused | None = None
        self.failure_sequence = NO_SEQUENCE

    # --- told by the shard ---

    def opened(self, last_sequence: int, recent: list[StoredBatch], stored_epoch: int) -> None:
        if self.state is HandleState.OPENING:
            self.state = HandleState.OPEN
            self.stream.say_opened(self, last_sequence, recent, stored_epoch)

    def stored(self, first_sequence: int, last_sequence: int, first_offset: int, size_bytes: int) -> None:
        if self.state is HandleState.CLOSED:
            return
        self.in_flight -= 1
        self.unanswered_bytes -= size_bytes
        self.stream.say_stored(self.number, first_sequence, last_sequence, first_offset)
        if self.echoes:
            self._answer_echoes(last_sequence)
        if self.failure is not None and self.in_flight == 0:
            self.end(self.failure)

    def end(self, refused: Refused) -> None:
        if self.state is not HandleState.CLOSED:
            self.close()
            self.stream.say_failed(self, refused)

    # --- told by the stream ---

    def fail(self, refused: Refused, sequence: int = NO_SEQUENCE) -> None:
        """Nothing more is taken from this handle; the client is told after the answers it still waits for."""
        self.failure = refused
        self.failure_sequence = sequence
        self.state = HandleState.FAILING
        if self.in_flight == 0:
            self.end(refused)

    def close(self) -> None:
        self.state = HandleState.CLOSED
        if self.shard is not None:
            self.shard.close_producer(self)

    def _answer_echoes(self, persisted: int) -> None:
        assert self.shard is not None
        while self.echoes and self.echoes[0][1] <= persisted:
            first, last, size_bytes = self.echoes.pop(0)
            self.unanswered_bytes -= size_bytes
            self.stream.say_stored(
                self.number, first, last, self.shard.producers.first_offset(self.producer_id, first, last)
            )


class ProduceStream:
    """See the module's rules. `run` returns when the client is done, or raises Refused to end the stream."""

    def __init__(self, stream: ServerStream, broker: ProduceBroker) -> None:
        self._stream = stream
        self._broker = broker
        # None: closed by an error, and the client has not said yet that it knows.
        self._handles: dict[int, ProducerHandle | None] = {}
        self._opening: set[asyncio.Task[None]] = set()
        self._wake = asyncio.Event()
        self._idle = asyncio.Event()
        self._written = asyncio.Event()
        self._ending = False
        self._opened: list[broker_pb2.ProducerOpened] = []
        self._stored: list[tuple[int, int, int, int]] = []
        self._errors: list[broker_pb2.ProducerError] = []
        self._crowded: dict[ServedShard, None] = {}

    async def run(self) -> None:
        hello = await self._read_frame()
        if hello is None:
            return
        if hello.WhichOneof("frame") != "hello":
            raise violation("the first frame of a stream is hello and nothing else")
        reply = broker_pb2.ProduceResponse(hello=self._broker.greet(hello.hello))
        await self._stream.write(reply.SerializeToString())
        reader = asyncio.current_task()
        assert reader is not None
        writer = asyncio.create_task(self._write(reader), name=f"produce writer {self._stream.peer}")
        try:
            await self._read_all()
            await self._drain()
        finally:
            self._close_handles()
            await self._end_writer(writer)

    # --- reading ---

    async def _read_all(self) -> None:
        room = self._broker.budget.room
        while True:
            await room()
            await self._wait_for_crowded_shards()
            await self._wait_for_the_writer()
            frame = await self._read_frame()
            if frame is None:
                return
            kind = frame.WhichOneof("frame")
            if kind == "batches":
                for item in frame.batches.batches:
                    self._batch(item.handle, item.batch)
            elif kind == "open":
                self._open(frame.open)
            elif kind == "close":
                self._close(frame.close.handle)
            else:
                raise violation("a frame is one of open, batches and close, and hello comes once")

    async def _read_frame(self) -> broker_pb2.ProduceRequest | None:
        data = await self._stream.read()
        return None if data is None else parse(broker_pb2.ProduceRequest, data)

    async def _wait_for_crowded_shards(self) -> None:
        """A shard that cannot write must not fill the whole broker's budget: its streams wait for it alone."""
        for shard in [shard for shard in self._crowded if shard.pending.exhausted]:
            await shard.pending.room()
        self._crowded.clear()

    async def _wait_for_the_writer(self) -> None:
        while len(self._stored) + len(self._opened) + len(self._errors) > UNSENT_ANSWERS_MAX:
            self._written.clear()
            await self._written.wait()

    async def _drain(self) -> None:
        """The client sends no more: what it sent is answered before the stream ends."""
        with suppress(TimeoutError):
            async with asyncio.timeout(DRAIN_S):
                while any(
                    handle is not None and (handle.in_flight or handle.echoes) for handle in self._handles.values()
                ):
                    self._idle.clear()
                    await self._idle.wait()

    def _batch(self, number: int, data: bytes) -> None:
        handle = self._handles.get(number)
        if handle is None:
            if number in self._handles:
                return
            raise violation(f"a batch for a handle that is not open handle=`{number}`")
        if handle.state is not HandleState.OPEN:
            if handle.state is HandleState.OPENING:
                raise violation(f"a batch before its producer was opened handle=`{number}`")
            return
        size_bytes = len(data)
        unanswered = handle.unanswered_bytes
        if unanswered and unanswered + size_bytes > handle.window_bytes * WINDOW_EXCESS:
            raise violation(
                f"more bytes than granted handle=`{number}` bytes=`{unanswered + size_bytes}` "
                f"window=`{handle.window_bytes}`"
            )
        try:
            header = parse_header(data)
        except MalformedBatch as error:
            self._refuse(handle, malformed(str(error)))
            return
        self._judge(handle, header, data)

    def _judge(self, handle: ProducerHandle, header: BatchHeader, data: bytes) -> None:
        shard = handle.shard
        assert shard is not None
        if header.producer_id != handle.producer_id or header.epoch != handle.epoch:
            self._refuse(handle, malformed("the batch is of another producer or epoch than its handle"), header)
            return
        verdict = shard.producers.decide(header, handle.epoch, handle.opening)
        if verdict is Verdict.APPEND:
            refused = self._unfit(shard, header)
            if refused is not None:
                self._refuse(handle, refused, header)
                return
            handle.in_flight += 1
            handle.unanswered_bytes += len(data)
            shard.push(handle, header, data)
            if shard.pending.exhausted:
                self._crowded[shard] = None
        elif verdict is Verdict.DUPLICATE:
            first, last = header.first_sequence, header.last
            self._broker.metrics.duplicate_batches.inc()
            self.say_stored(handle.number, first, last, shard.producers.first_offset(header.producer_id, first, last))
        elif verdict is Verdict.PENDING:
            self._broker.metrics.duplicate_batches.inc()
            handle.unanswered_bytes += len(data)
            handle.echoes.append((header.first_sequence, header.last, len(data)))
        else:
            self._refuse(handle, _refusal(verdict, header), header)

    def _unfit(self, shard: ServedShard, header: BatchHeader) -> Refused | None:
        """Why a batch that continues its chain cannot be stored in this shard."""
        if header.first_sequence <= header.previous:
            return malformed(
                f"the batch overlaps the one before it previous=`{header.previous}` first=`{header.first_sequence}`"
            )
        if header.min_slot < shard.first_slot or header.max_slot > shard.last_slot:
            return Refused(
                common_pb2.ERROR_REASON_WRONG_SHARD,
                f"the batch has slots outside its shard: take the topic's layout and form it again "
                f"shard=`{shard.shard_id}` slots=`{header.min_slot}-{header.max_slot}`",
            )
        limit = self._broker.max_message_bytes
        too_large = (
            header.length > limit and header.count > 1
            if header.count > 1
            else header.body_size > limit + COLUMN_BYTES_MAX
        )
        if too_large or header.length > BATCH_BYTES_MAX or header.body_size > BODY_BYTES_MAX:
            return Refused(
                common_pb2.ERROR_REASON_MESSAGE_TOO_LARGE,
                f"the batch is too large: send smaller messages bytes=`{header.length}` "
                f"uncompressed=`{header.body_size}` messages=`{header.count}` max=`{limit}`",
            )
        return None

    def _refuse(self, handle: ProducerHandle, refused: Refused, header: BatchHeader | None = None) -> None:
        handle.fail(refused, NO_SEQUENCE if header is None else header.first_sequence)

    # --- opening and closing ---

    def _open(self, request: broker_pb2.OpenProducer) -> None:
        number = request.handle
        if self._handles.get(number) is not None:
            raise violation(f"the handle is open already handle=`{number}`")
        if len(self._opening) >= HANDLES_MAX:
            raise violation(f"a stream opens at most {HANDLES_MAX} producers at a time")
        self._handles.pop(number, None)
        self._errors = [error for error in self._errors if error.handle != number]
        if len(self._handles) >= HANDLES_MAX and not self._drop_closed_handle():
            raise violation(f"a stream has at most {HANDLES_MAX} open handles handle=`{number}`")
        opening = self._broker.next_opening()
        handle = ProducerHandle(self, number, request.producer_id, request.epoch, opening)
        self._handles[number] = handle
        task = asyncio.create_task(self._open_at_shard(handle, request), name=f"open producer {number}")
        self._opening.add(task)
        task.add_done_callback(self._opening.discard)

    def _drop_closed_handle(self) -> bool:
        closed = next((number for number, handle in self._handles.items() if handle is None), None)
        if closed is None:
            return False
        del self._handles[closed]
        return True

    async def _open_at_shard(self, handle: ProducerHandle, request: broker_pb2.OpenProducer) -> None:
        try:
            topic = topic_name(request.topic)
            _check_producer(topic, request)
            shard = await self._broker.shard(topic, request.shard_id)
            if request.name and not shard.producers.knows(handle.producer_id, handle.epoch):
                await self._check_epoch(topic, request, shard)
            if handle.state is not HandleState.OPENING:
                return
            handle.shard = shard
            handle.window_bytes = self._broker.budget.share(WINDOW_BYTES_MIN, WINDOW_BYTES_MAX)
            shard.open_producer(handle)
        except Exception as error:
            refused = refusal_of(error)
            if refused is None:
                log.exception("opening a producer failed", topic=request.topic, shard=request.shard_id)
                refused = Refused(common_pb2.ERROR_REASON_INTERNAL, "internal error: the broker's log has the details")
            handle.end(refused)

    async def _check_epoch(self, topic: str, request: broker_pb2.OpenProducer, shard: ServedShard) -> None:
        """The epoch is the newest of its name, and lower ones are refused by this owner or any later one from here on.

        The table of a shard taken over knows the epochs of what was stored, not those that were only opened. So:

        1. The shard was taken over, which made its table. 2. The name's record is read: a connection that was replaced
        before this is refused. 3. It is read whose the shard is: a broker that was replaced without knowing it would
        open the new connection, while the old one goes on at the next owner.

        In this order, since the record shows that the epoch was registered, and only then the shard was still ours.
        Whoever claims it later begins with an empty table, so it opens an older connection in step 2 or not at all.
        An epoch that this table knows has been through this: no need to ask again. A silent store: try again.
        """
        newest = await self._broker.producer_epoch(topic, request.name)
        if newest < request.epoch:
            raise invalid_argument(f"the producer is not registered: register its name producer=`{request.name}`")
        if newest > request.epoch:
            raise fenced(f"a newer connection holds this producer producer=`{request.name}` epoch=`{newest}`")
        await shard.check_owned()

    def _close(self, number: int) -> None:
        if number not in self._handles:
            raise violation(f"closing a handle that is not open handle=`{number}`")
        handle = self._handles.pop(number)
        if handle is not None:
            handle.close()

    def _close_handles(self) -> None:
        for task in self._opening:
            task.cancel()
        for handle in self._handles.values():
            if handle is not None:
                handle.close()
        self._handles.clear()

    # --- what is to be said ---

    def say_opened(
        self, handle: ProducerHandle, last_sequence: int, recent: list[StoredBatch], stored_epoch: int
    ) -> None:
        self._opened.append(
            broker_pb2.ProducerOpened(
                handle=handle.number,
                last_sequence=last_sequence,
                recent=[
                    broker_pb2.BatchStored(
                        handle=handle.number,
                        first_sequence=batch.first_sequence,
                        last_sequence=batch.last_sequence,
                        first_offset=batch.first_offset,
                    )
                    for batch in recent
                ],
                window_bytes=handle.window_bytes,
                stored_epoch=stored_epoch,
            )
        )
        self._wake.set()

    def say_stored(self, number: int, first_sequence: int, last_sequence: int, first_offset: int) -> None:
        self._stored.append((number, first_sequence, last_sequence, first_offset))
        self._wake.set()
        self._idle.set()

    def say_failed(self, handle: ProducerHandle, refused: Refused) -> None:
        self._broker.metrics.refused(refused.reason)
        if handle.number in self._handles:
            self._handles[handle.number] = None
        self._errors.append(
            broker_pb2.ProducerError(handle=handle.number, error=refused.to_error(), sequence=handle.failure_sequence)
        )
        self._wake.set()
        self._idle.set()

    # --- writing ---

    async def _write(self, reader: asyncio.Task[None]) -> None:
        try:
            while not self._ending or self._wake.is_set():
                await self._wake.wait()
                self._wake.clear()
                while (frame := self._next_frame()) is not None:
                    await self._stream.write(frame)
                    self._written.set()
        except GONE:
            return  # The client is gone; reading ends too.
        except Exception:
            log.exception("writing to a client failed", peer=self._stream.peer)
            reader.cancel()

    def _next_frame(self) -> bytes | None:
        """Everything that is to be said, up to the limit; None if that is nothing."""
        if not (self._opened or self._stored or self._errors):
            return None
        opened, self._opened = self._opened[:OPENED_PER_FRAME_MAX], self._opened[OPENED_PER_FRAME_MAX:]
        stored, self._stored = self._stored[:ANSWERS_PER_FRAME_MAX], self._stored[ANSWERS_PER_FRAME_MAX:]
        response = broker_pb2.ProduceResponse(opened=opened)
        add = response.stored.add
        for handle, first, last, offset in stored:
            add(handle=handle, first_sequence=first, last_sequence=last, first_offset=offset)
        if not (self._opened or self._stored):
            # An error closes its handle, so it never goes ahead of an answer.
            errors, self._errors = self._errors[:OPENED_PER_FRAME_MAX], self._errors[OPENED_PER_FRAME_MAX:]
            response.errors.extend(errors)
        return response.SerializeToString()

    async def _end_writer(self, writer: asyncio.Task[None]) -> None:
        self._ending = True
        self._wake.set()
        try:
            async with asyncio.timeout(DRAIN_S):
                await writer
        except TimeoutError:
            log.warning("a client does not take its answers", peer=self._stream.peer)


def violation(message: str) -> Refused:
    return Refused(common_pb2.ERROR_REASON_PROTOCOL_VIOLATION, message)


def _check_producer(topic: str, request: broker_pb2.OpenProducer) -> None:
    if len(request.producer_id) != PRODUCER_ID_BYTES:
        raise invalid_argument(f"a producer id has {PRODUCER_ID_BYTES} bytes bytes=`{len(request.producer_id)}`")
    if not request.name:
        if request.epoch != 0:
            raise invalid_argument(f"a producer without a name has epoch 0 epoch=`{request.epoch}`")
        return
    checked_name("producer", request.name)
    if request.epoch == 0 or request.producer_id != named_producer_id(topic, request.name):
        raise invalid_argument(
            f"the id and epoch of a named producer come from its registration producer=`{request.name}`"
        )


def _refusal(verdict: Verdict, header: BatchHeader) -> Refused:
    if verdict is Verdict.FENCED:
        return fenced()
    if verdict is Verdict.SUPERSEDED:
        return superseded()
    why = "the producer is not known here" if verdict is Verdict.MUST_OPEN else "the batch does not follow the last one"
    return Refused(
        common_pb2.ERROR_REASON_OUT_OF_ORDER,
        f"{why}: open the producer again previous=`{header.previous}` last=`{header.last}`",
    )
