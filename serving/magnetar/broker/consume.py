"""The Consume stream: one a client and broker, many subscriptions and readers in it.

One task reads frames and acts on them; one writes everything there is to say. Opening may take long (the shard may have
to be taken over), so each opening is a task of its own; what the client says about the handle meanwhile waits for it.

Rules:

1. A client that does not read blocks itself only: its deliveries stop at the outbox's limit, and nothing more is read
   from it while more than ANSWERS_MAX answers wait, or STREAM_WAITING_MAX requests for their handles to be open.
2. An error of one handle ends that handle. What arrives for it afterwards is dropped, until the handle is opened again;
   acknowledgements of it are answered with an error. What does not parse, or breaks the rules, ends the stream.
3. The end of a stream detaches its consumers; what they held goes to others.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from contextlib import suppress
from enum import Enum
from typing import Any, Protocol

import structlog

from magnetar.broker.dispatch import Deliver
from magnetar.broker.metrics import BrokerMetrics
from magnetar.broker.outbox import Outbox
from magnetar.broker.reader import Reader
from magnetar.broker.refusals import checked_name, not_owner, refusal_of, topic_name
from magnetar.broker.shard import ServedShard
from magnetar.broker.subscription import Attached, Subscription
from magnetar.managed_log.errors import LogReleased
from magnetar.metadata.codec import start_position_from_message
from magnetar.metadata.records import SubscriptionType
from magnetar.node.rpc import GONE, Refused, ServerStream, invalid_argument, parse, unavailable
from magnetar.v1 import broker_pb2, common_pb2

HANDLES_MAX = 10_000
"""Of one stream, those that were closed and are remembered included."""

WAITING_MAX = 1_000
"""What a client may say about a handle before it was answered that it is open."""

STREAM_WAITING_MAX = 10_000
"""The same of all handles of a stream: at this number nothing more is read from the client."""

ITEMS_MAX = 50_000
"""Of one frame: they are acted on in one go, and everybody else waits meanwhile."""

ANSWERS_MAX = 10_000
"""Answers not yet sent, and acknowledgements not yet durable, at which nothing more is read from the client."""

RANGES_MAX = 100_000
"""Ranges of one frame."""

NAME_CHARACTERS_MAX = 250
DRAIN_S = 10.0
"""How long a client that sends no more is waited for while its acknowledgements are being stored."""

log = structlog.get_logger("magnetar.consume")

Range = tuple[int, int]


class ConsumeBroker(Protocol):
    """What a stream needs of its broker."""

    metrics: BrokerMetrics

    def greet(self, hello: common_pb2.Hello) -> common_pb2.HelloReply: ...
    async def shard(self, topic: str, shard_id: int) -> ServedShard: ...


async def consume(stream: ServerStream, broker: ConsumeBroker) -> None:
    """Serves the stream until the client is done. Raises Refused to end it with an error."""
    await ConsumeStream(stream, broker).run()


class HandleState(Enum):
    OPENING = 1
    OPEN = 2
    CLOSED = 3


class ConsumerHandle:
    """A consumer or reader opened on a stream: the session that a Subscription or Reader delivers to.

    waiting     what the client said while it was being opened
    """

    __slots__ = ("_stream", "client", "consumer", "number", "reader", "state", "subscription", "waiting")

    def __init__(self, stream: ConsumeStream, number: int, consumer: str, client: str) -> None:
        self._stream = stream
        self.number = number
        self.consumer = consumer
        self.client = client
        self.state = HandleState.OPENING
        self.subscription: Subscription | None = None
        self.reader: Reader | None = None
        self.waiting: list[Callable[[], None]] = []

    # --- told by the subscription or reader ---

    @property
    def full(self) -> bool:
        return self._stream.outbox.full

    def deliver(self, given: Deliver) -> None:
        metrics = self._stream.metrics
        metrics.delivered_messages.inc(given.messages)
        metrics.delivered_bytes.inc(len(given.batch.data))
        self._stream.outbox.deliver(self.number, given)

    def caught_up(self, offset: int) -> None:
        self._stream.outbox.caught_up(self.number, offset)

    def activated(self, next_offset: int) -> None:
        self._stream.outbox.activated(self.number)

    def drop_deliveries(self) -> tuple[int, int]:
        return self._stream.outbox.drop_deliveries(self.number)

    def end(self, refused: Refused) -> None:
        if self.state is not HandleState.CLOSED:
            self.close()
            self._stream.say_failed(self, refused)

    # --- told by the stream ---

    def opened(self, attached: Attached) -> None:
        self.state = HandleState.OPEN
        self._stream.outbox.opened(
            broker_pb2.SubscriptionOpened(
                handle=self.number,
                next_offset=attached.next_offset,
                end_offset=attached.end_offset,
                active=attached.active,
                cursor_epoch=attached.cursor_epoch,
            )
        )
        for said in self._take_waiting():
            said()

    def _take_waiting(self) -> list[Callable[[], None]]:
        waiting, self.waiting = self.waiting, []
        self._stream.waiting_ended(len(waiting))
        return waiting

    def credit(self, messages: int, size_bytes: int) -> None:
        if self.subscription is not None:
            self.subscription.credit(self, messages, size_bytes)
        elif self.reader is not None:
            self.reader.credit(messages, size_bytes)

    def has_room(self, room: bool) -> None:
        if self.subscription is not None:
            self.subscription.has_room(self, room)
        elif self.reader is not None:
            self.reader.has_room(room)

    def close(self) -> None:
        """Undelivered messages are taken back, and those it holds go to others."""
        self.state = HandleState.CLOSED
        self._take_waiting()
        if self.subscription is not None:
            self.subscription.detach(self)
        if self.reader is not None:
            self.reader.close()
        self.drop_deliveries()

    def of_subscription(self) -> Subscription:
        """Raises Refused(INVALID_ARGUMENT) for a reader."""
        if self.subscription is None:
            raise invalid_argument(f"a reader has no acknowledgements and no position to move: handle=`{self.number}`")
        return self.subscription


class ConsumeStream:
    """See the module's rules."""

    def __init__(self, stream: ServerStream, broker: ConsumeBroker) -> None:
        self.outbox = Outbox(self._said, self._room)
        self.metrics = broker.metrics
        self._stream = stream
        self._broker = broker
        self._client = ""
        # None: closed; what is still under way to it is dropped.
        self._handles: dict[int, ConsumerHandle | None] = {}
        # In the order of their starts: cancelled in another one, each would be searched among all that wait for a lock.
        self._tasks: dict[asyncio.Task[None], None] = {}
        self._unanswered = 0
        self._waiting = 0
        self._wake = asyncio.Event()
        self._progress = asyncio.Event()
        self._ending = False

    async def run(self) -> None:
        frame = await self._read_frame()
        if frame is None:
            return
        if not frame.HasField("hello") or len(frame.ListFields()) != 1:
            raise _violation("the first frame of a stream is hello and nothing else")
        self._client = f"{frame.hello.name[:NAME_CHARACTERS_MAX]} {self._stream.peer}".strip()
        reply = broker_pb2.ConsumeResponse(hello=self._broker.greet(frame.hello))
        await self._stream.write(reply.SerializeToString())
        writer = asyncio.create_task(self._write(), name=f"consume writer {self._stream.peer}")
        try:
            await self._read_all()
            self._close_handles()
            await self._drain()
        finally:
            self._close_handles()
            await self._end_writer(writer)

    # --- reading ---

    async def _read_all(self) -> None:
        while True:
            await self._wait_for_answers()
            frame = await self._read_frame()
            if frame is None:
                return
            if frame.HasField("hello"):
                raise _violation("hello comes once")
            self._act(frame)

    async def _read_frame(self) -> broker_pb2.ConsumeRequest | None:
        data = await self._stream.read()
        return None if data is None else parse(broker_pb2.ConsumeRequest, data)

    async def _wait_for_answers(self) -> None:
        while self._unanswered + self.outbox.answers > ANSWERS_MAX or self._waiting > STREAM_WAITING_MAX:
            self._progress.clear()
            await self._progress.wait()

    def waiting_ended(self, count: int) -> None:
        """So much of what was said about a handle that was being opened waits no more."""
        self._waiting -= count
        self._progress.set()

    def _act(self, frame: broker_pb2.ConsumeRequest) -> None:
        items = len(frame.credits) + len(frame.acks) + len(frame.nacks) + len(frame.seeks) + len(frame.close)
        if items > ITEMS_MAX:
            raise _violation(f"a frame has at most {ITEMS_MAX} items: send several items=`{items}`")
        ranges = sum(len(ack.ranges) for ack in frame.acks) + sum(len(nack.ranges) for nack in frame.nacks)
        ranges += sum(len(subscription.held) for subscription in frame.open)
        if ranges > RANGES_MAX:
            raise _violation(f"a frame has at most {RANGES_MAX} ranges ranges=`{ranges}`")
        for subscription in frame.open:
            self._open(subscription.handle, subscription.consumer, self._open_subscription, subscription)
        for reader in frame.open_readers:
            self._open(reader.handle, "", self._open_reader, reader)
        for credit in frame.credits:
            self._to_handle(credit.handle, self._credit, credit)
        for ack in frame.acks:
            self._to_handle(ack.handle, self._ack, ack, ack.request_id)
        for nack in frame.nacks:
            self._to_handle(nack.handle, self._nack, nack)
        for seek in frame.seeks:
            self._to_handle(seek.handle, self._seek, seek, seek.request_id)
        for close in frame.close:
            self._close(close)

    def _to_handle(
        self, number: int, act: Callable[[ConsumerHandle, Any], None], said: Any, request_id: int = 0
    ) -> None:
        """Acts now, or when the handle is open. What is refused is the answer to the request, or ends the handle."""
        handle = self._handles.get(number)
        if handle is None:
            if number not in self._handles:
                raise _violation(f"the handle is not open handle=`{number}`")
            if request_id:
                self._answer(request_id, unavailable(f"the consumer is closed: open it again handle=`{number}`"))
        elif handle.state is HandleState.OPENING:
            if len(handle.waiting) >= WAITING_MAX:
                raise _violation(f"too much is said about a handle that is being opened handle=`{number}`")
            handle.waiting.append(lambda: self._to_handle(number, act, said, request_id))
            self._waiting += 1
        else:
            try:
                act(handle, said)
            except Refused as refused:
                if request_id:
                    self._answer(request_id, refused)
                else:
                    handle.end(refused)

    def _credit(self, handle: ConsumerHandle, credit: broker_pb2.Credit) -> None:
        handle.credit(credit.messages, credit.bytes)

    def _nack(self, handle: ConsumerHandle, nack: broker_pb2.Nack) -> None:
        handle.of_subscription().nack(handle, _ranges(nack.ranges))

    def _ack(self, handle: ConsumerHandle, ack: broker_pb2.Ack) -> None:
        durable = handle.of_subscription().ack(handle, ack.floor, _ranges(ack.ranges))
        if ack.request_id:
            self._answer_when(durable, ack.request_id)

    # --- opening ---

    def _open(
        self,
        number: int,
        consumer: str,
        open_it: Callable[[ConsumerHandle, Any], Coroutine[Any, Any, None]],
        request: Any,
    ) -> None:
        if self._handles.get(number) is not None:
            raise _violation(f"the handle is open already handle=`{number}`")
        if len(self._tasks) >= HANDLES_MAX:
            raise _violation(f"a stream opens at most {HANDLES_MAX} consumers at a time")
        self._handles.pop(number, None)
        if len(self._handles) >= HANDLES_MAX and not self._forget_closed_handle():
            raise _violation(f"a stream has at most {HANDLES_MAX} open handles handle=`{number}`")
        handle = ConsumerHandle(self, number, consumer, self._client)
        self._handles[number] = handle
        self._spawn(self._opening(handle, open_it, request), f"open consumer {number}")

    async def _opening(
        self,
        handle: ConsumerHandle,
        open_it: Callable[[ConsumerHandle, Any], Coroutine[Any, Any, None]],
        request: Any,
    ) -> None:
        try:
            await open_it(handle, request)
        except Exception as error:
            handle.end(_refusal(error, "opening a consumer failed"))

    async def _open_subscription(self, handle: ConsumerHandle, request: broker_pb2.OpenSubscription) -> None:
        topic, name = topic_name(request.topic), checked_name("subscription", request.subscription)
        if len(request.consumer) > NAME_CHARACTERS_MAX:
            raise invalid_argument(f"the consumer's name has more than {NAME_CHARACTERS_MAX} characters")
        kind = _subscription_type(request.type)
        if request.key_ordered and kind is not SubscriptionType.QUEUE:
            raise invalid_argument(f"only queue subscriptions are ordered by key: subscription=`{name}`")
        shard = await self._broker.shard(topic, request.shard_id)
        start = start_position_from_message(request.start)
        subscription = await shard.subscription(name, kind, start, create=True)
        await subscription.turn_of(request.consumer)
        if handle.state is HandleState.OPENING:
            attached = subscription.attach(handle, key_ordered=request.key_ordered, held=_ranges(request.held))
            handle.subscription = subscription
            handle.opened(attached)

    async def _open_reader(self, handle: ConsumerHandle, request: broker_pb2.OpenReader) -> None:
        shard = await self._broker.shard(topic_name(request.topic), request.shard_id)
        reader = await Reader.open(shard, handle, start_position_from_message(request.start))
        if handle.state is HandleState.OPENING:
            handle.reader = reader
            handle.opened(reader.start())

    def _forget_closed_handle(self) -> bool:
        closed = next((number for number, handle in self._handles.items() if handle is None), None)
        if closed is None:
            return False
        del self._handles[closed]
        return True

    # --- seeking ---

    def _seek(self, handle: ConsumerHandle, seek: broker_pb2.Seek) -> None:
        if len(self._tasks) >= HANDLES_MAX:
            raise unavailable("too many seeks are under way on this stream")
        self._spawn(self._seeking(handle, handle.of_subscription(), seek), f"seek {handle.number}")

    async def _seeking(self, handle: ConsumerHandle, subscription: Subscription, seek: broker_pb2.Seek) -> None:
        try:
            attached = await subscription.seek(start_position_from_message(seek.position))
        except Exception as error:
            refused = _refusal(error, "a seek failed")
            self.outbox.answer_in_order(
                handle.number, broker_pb2.AckResult(request_id=seek.request_id, error=refused.to_error())
            )
            return
        self.outbox.answer_in_order(
            handle.number,
            broker_pb2.AckResult(
                request_id=seek.request_id, next_offset=attached.next_offset, cursor_epoch=attached.cursor_epoch
            ),
        )

    # --- closing ---

    def _close(self, close: broker_pb2.CloseConsumer) -> None:
        """Answered when what was acknowledged before is durable; what is not acknowledged is given back at once."""
        number = close.handle
        if number not in self._handles:
            raise _violation(f"the handle is not open handle=`{number}`")
        handle, self._handles[number] = self._handles[number], None
        if handle is not None:
            handle.close()
        if not close.request_id:
            return
        if handle is None or handle.subscription is None:
            self.outbox.answer(broker_pb2.AckResult(request_id=close.request_id))
            return
        try:
            self._answer_when(handle.subscription.flushed(), close.request_id)
        except Refused as refused:
            self._answer(close.request_id, refused)

    def _close_handles(self) -> None:
        for task in self._tasks:
            task.cancel()
        handles, self._handles = self._handles, {}
        for handle in handles.values():
            if handle is not None:
                handle.close()

    async def _drain(self) -> None:
        """The client sends no more: what it acknowledged is answered before the stream ends."""
        with suppress(TimeoutError):
            async with asyncio.timeout(DRAIN_S):
                while self._unanswered:
                    self._progress.clear()
                    await self._progress.wait()

    # --- what is to be said ---

    def say_failed(self, handle: ConsumerHandle, refused: Refused) -> None:
        self.metrics.refused(refused.reason)
        if self._handles.get(handle.number) is handle:
            self._handles[handle.number] = None
        self.outbox.failed(handle.number, refused)

    def _answer(self, request_id: int, refused: Refused) -> None:
        self.metrics.refused(refused.reason)
        self.outbox.answer(broker_pb2.AckResult(request_id=request_id, error=refused.to_error()))

    def _answer_when(self, durable: asyncio.Future[None], request_id: int) -> None:
        self._unanswered += 1

        def done(future: asyncio.Future[None]) -> None:
            self._unanswered -= 1
            self._progress.set()
            error = asyncio.CancelledError() if future.cancelled() else future.exception()
            if error is None:
                self.outbox.answer(broker_pb2.AckResult(request_id=request_id))
            else:
                self._answer(request_id, _refusal(error, "storing an acknowledgement failed"))

        durable.add_done_callback(done)

    def _said(self) -> None:
        self._wake.set()

    def _room(self, room: bool) -> None:
        for handle in self._handles.values():
            if handle is not None:
                handle.has_room(room)

    # --- writing ---

    async def _write(self) -> None:
        while True:
            await self._wake.wait()
            self._wake.clear()
            while (frame := self.outbox.next_frame()) is not None:
                data, delivered = frame
                try:
                    await self._stream.write(data)
                except GONE:
                    return  # The client is gone; reading ends too.
                self.outbox.written(delivered)
                self._progress.set()
            if self._ending:
                return

    async def _end_writer(self, writer: asyncio.Task[None]) -> None:
        self._ending = True
        self._wake.set()
        try:
            async with asyncio.timeout(DRAIN_S):
                await writer
        except TimeoutError:
            log.warning("a client does not take its answers", peer=self._stream.peer)

    def _spawn(self, work: Coroutine[Any, Any, None], name: str) -> None:
        task = asyncio.create_task(work, name=name)
        self._tasks[task] = None
        task.add_done_callback(self._tasks.pop)


def _violation(message: str) -> Refused:
    return Refused(common_pb2.ERROR_REASON_PROTOCOL_VIOLATION, message)


def _refusal(error: BaseException, what: str) -> Refused:
    if isinstance(error, LogReleased):
        return not_owner(0, why=str(error))
    refused = refusal_of(error) if isinstance(error, Exception) else None
    if refused is None:
        log.error(what, exc_info=error)
        refused = Refused(common_pb2.ERROR_REASON_INTERNAL, "internal error: the broker's log has the details")
    return refused


def _ranges(ranges: Sequence[common_pb2.Range]) -> list[Range]:
    return [(item.start, item.end) for item in ranges]


def _subscription_type(value: int) -> SubscriptionType:
    """Raises Refused(INVALID_ARGUMENT)."""
    if value not in (SubscriptionType.STREAM.value, SubscriptionType.QUEUE.value):
        raise invalid_argument(f"a subscription is a stream or a queue: type=`{value}`")
    return SubscriptionType(value)
