"""The client library, blocking: the same names and arguments as `magnetar.client`, with `with` and `for`.

    with connect("localhost:7650") as client:
        with client.producer("clicks") as producer:
            message_id = producer.send(b"payload", key="user-1")

        with client.stream_consumer("clicks", subscription="audit", start=EARLIEST) as consumer:
            for message in consumer:
                consumer.ack(message)

What is awaited there blocks here; what gives a receipt or an acknowledgement there gives a `concurrent.futures.Future`
here. Each client has one background thread. Objects may be used from several threads.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Mapping
from concurrent.futures import Future
from datetime import datetime
from functools import wraps
from types import TracebackType
from typing import Any, Concatenate, Generic, ParamSpec, Self, TypeVar

from magnetar.client import admin as aio_admin
from magnetar.client import client as aio
from magnetar.client import consumer as aio_consumer
from magnetar.client import producer as aio_producer
from magnetar.client import rebalancing
from magnetar.client.batching import MESSAGE_OVERHEAD, Batching
from magnetar.client.errors import ClientClosed, MagnetarError, QueueFull
from magnetar.client.message import Message, MessageBatch, MessageId, to_microseconds
from magnetar.client.outgoing import check_sizes, checked_properties, key_to_bytes, payload_bytes
from magnetar.client.portal import Portal, Watched
from magnetar.client.positions import EARLIEST, LATEST, Edge, Position
from magnetar.client.producer import PENDING_BYTES_DEFAULT, Access, Compression
from magnetar.client.receipts import Acknowledgement, Receipt

__all__ = [
    "EARLIEST",
    "LATEST",
    "Admin",
    "Batching",
    "BookieServers",
    "BrokerServers",
    "Client",
    "Cluster",
    "Ledgers",
    "Message",
    "MessageBatch",
    "MessageId",
    "Producer",
    "QueueConsumer",
    "Reader",
    "Rebalance",
    "StreamConsumer",
    "Subscriptions",
    "Topics",
    "connect",
]

InnerT = TypeVar("InnerT")
P = ParamSpec("P")
R = TypeVar("R")


class _Facade(Generic[InnerT]):
    """A blocking face of an object that lives in the portal's loop."""

    def __init__(self, portal: Callable[[], Portal], inner: InnerT) -> None:
        self._portal = portal
        self._inner = inner


def _blocking(
    method: Callable[Concatenate[InnerT, P], Coroutine[Any, Any, R]],
) -> Callable[Concatenate[_Facade[InnerT], P], R]:
    """The method of the same name and arguments that waits for the result."""

    @wraps(method)
    def call(self: _Facade[InnerT], /, *args: P.args, **kwargs: P.kwargs) -> R:
        return self._portal().run(method(self._inner, *args, **kwargs))

    return call


class Topics(_Facade[aio_admin.Topics]):
    __doc__ = aio_admin.Topics.__doc__

    create = _blocking(aio_admin.Topics.create)
    list = _blocking(aio_admin.Topics.list)
    describe = _blocking(aio_admin.Topics.describe)
    delete = _blocking(aio_admin.Topics.delete)


class Subscriptions(_Facade[aio_admin.Subscriptions]):
    __doc__ = aio_admin.Subscriptions.__doc__

    create = _blocking(aio_admin.Subscriptions.create)
    list = _blocking(aio_admin.Subscriptions.list)
    describe = _blocking(aio_admin.Subscriptions.describe)
    seek = _blocking(aio_admin.Subscriptions.seek)
    delete = _blocking(aio_admin.Subscriptions.delete)


class Ledgers(_Facade[aio_admin.Ledgers]):
    __doc__ = aio_admin.Ledgers.__doc__

    list = _blocking(aio_admin.Ledgers.list)
    describe = _blocking(aio_admin.Ledgers.describe)
    verify = _blocking(aio_admin.Ledgers.verify)


class BrokerServers(_Facade[aio_admin.BrokerServers]):
    __doc__ = aio_admin.BrokerServers.__doc__

    list = _blocking(aio_admin.BrokerServers.list)


class BookieServers(_Facade[aio_admin.BookieServers]):
    __doc__ = aio_admin.BookieServers.__doc__

    list = _blocking(aio_admin.BookieServers.list)
    drain = _blocking(aio_admin.BookieServers.drain)
    undrain = _blocking(aio_admin.BookieServers.undrain)
    decommission = _blocking(aio_admin.BookieServers.decommission)


class Cluster(_Facade[aio_admin.Cluster]):
    __doc__ = aio_admin.Cluster.__doc__

    health = _blocking(aio_admin.Cluster.health)
    repair = _blocking(aio_admin.Cluster.repair)


class Rebalance(_Facade[rebalancing.Rebalance]):
    __doc__ = rebalancing.Rebalance.__doc__

    plan = _blocking(rebalancing.Rebalance.plan)
    apply = _blocking(rebalancing.Rebalance.apply)
    list = _blocking(rebalancing.Rebalance.list)
    status = _blocking(rebalancing.Rebalance.status)
    throttle = _blocking(rebalancing.Rebalance.throttle)
    pause = _blocking(rebalancing.Rebalance.pause)
    resume = _blocking(rebalancing.Rebalance.resume)
    cancel = _blocking(rebalancing.Rebalance.cancel)
    rollback = _blocking(rebalancing.Rebalance.rollback)
    verify = _blocking(rebalancing.Rebalance.verify)


class Admin:
    __doc__ = aio_admin.Admin.__doc__

    def __init__(self, portal: Callable[[], Portal], inner: aio_admin.Admin) -> None:
        self.topics = Topics(portal, inner.topics)
        self.subscriptions = Subscriptions(portal, inner.subscriptions)
        self.ledgers = Ledgers(portal, inner.ledgers)
        self.brokers = BrokerServers(portal, inner.brokers)
        self.bookies = BookieServers(portal, inner.bookies)
        self.cluster = Cluster(portal, inner.cluster)
        self.rebalance = Rebalance(portal, inner.rebalance)


ScopedT = TypeVar("ScopedT", bound=aio_producer.Producer | aio_consumer.Receiver)


class _Scoped(_Facade[ScopedT]):
    """A facade that is used with `with`, and whose futures nobody may have looked at."""

    def __init__(self, portal: Callable[[], Portal], inner: ScopedT) -> None:
        super().__init__(portal, inner)
        self._unseen: Watched[Any] | None = None

    def __enter__(self) -> Self:
        self._portal().run(self._inner.__aenter__())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        portal = self._portal()
        if not portal.inherited:
            portal.run(self._inner.__aexit__(kind, error, traceback))
            if kind is None:
                self._raise_unseen()

    def close(self) -> None:
        """As leaving the block."""
        self._portal().run(self._inner.close())
        self._raise_unseen()

    @property
    def topic(self) -> str:
        """`tenant/namespace/topic`."""
        return self._inner.topic

    def _raise_unseen(self) -> None:
        """What a future failed with that nobody looked at, once."""
        future, self._unseen = self._unseen, None
        if future is not None and not future.seen:
            future.result()

    def _post(self, start: Callable[[], Receipt | Acknowledgement]) -> Watched[Any]:
        """Start something in the loop; the future ends as it does."""
        future: Watched[Any] = Watched()

        def settle(done: Receipt | Acknowledgement) -> None:
            try:
                result = done.result()
            except MagnetarError as error:
                self._fail(future, error)
            else:
                if future.set_running_or_notify_cancel():
                    future.set_result(result)

        def begin() -> None:
            try:
                started = start()
            except MagnetarError as error:
                self._fail(future, error)
            else:
                started.add_done_callback(settle)

        self._raise_unseen()
        portal = self._portal()
        portal.check()
        portal.post(begin)
        return future

    def _fail(self, future: Watched[Any], error: MagnetarError) -> None:
        if future.set_running_or_notify_cancel():
            future.set_exception(error)
        if not future.seen and self._unseen is None:
            self._unseen = future


class Producer(_Scoped[aio_producer.Producer]):
    """Sends messages to one topic. Made by `Client.producer`, used with `with`; leaving the block waits until
    everything is confirmed, at most the client's timeout. See `magnetar.client.Producer`.
    """

    send = _blocking(aio_producer.Producer.send)
    send_many = _blocking(aio_producer.Producer.send_many)
    flush = _blocking(aio_producer.Producer.flush)

    def __init__(self, portal: Callable[[], Portal], inner: aio_producer.Producer) -> None:
        super().__init__(portal, inner)
        self._posted_bytes = 0
        self._posting = threading.Lock()

    @property
    def name(self) -> str:
        """Empty for a producer without a name."""
        return self._inner.name

    @property
    def pending_bytes(self) -> int:
        """Bytes that are not confirmed yet, as they count against `max_pending_bytes`."""
        return self._inner.pending_bytes + self._posted_bytes

    @property
    def max_pending_bytes(self) -> int:
        """The budget that the producer was made with."""
        return self._inner.max_pending_bytes

    def send_nowait(
        self,
        payload: bytes,
        *,
        key: str | bytes | None = None,
        properties: Mapping[str, str] | None = None,
        event_time: datetime | None = None,
        sequence: int | None = None,
    ) -> Future[MessageId]:
        """Hand over one message; the future ends when it is durable, with its id. Raises as the asyncio one."""
        data = payload_bytes(payload)
        key_bytes = None if key is None else key_to_bytes(key)
        check_sizes([data], [key_bytes])
        pairs = None if properties is None else checked_properties(properties)
        if event_time is not None:
            to_microseconds(event_time)
        cost = len(data) + len(key_bytes or b"") + MESSAGE_OVERHEAD
        pending = self.pending_bytes
        if pending and pending + cost > self.max_pending_bytes:
            raise QueueFull(
                f"too much is unconfirmed, wait for futures or use send(): "
                f"pending_bytes=`{pending}` max_pending_bytes=`{self.max_pending_bytes}`"
            )

        def start() -> Receipt:
            with self._posting:
                self._posted_bytes -= cost
            return self._inner.send_nowait(data, key=key, properties=pairs, event_time=event_time, sequence=sequence)

        future = self._post(start)
        with self._posting:
            self._posted_bytes += cost
        return future


ReceiverT = TypeVar("ReceiverT", bound=aio_consumer.Receiver)
ConsumerT = TypeVar("ConsumerT", bound=aio_consumer.Consumer)


class _Receiver(_Scoped[ReceiverT]):
    """What consumers and readers share. Messages are fetched some at a time: to cross threads costs more than they."""

    def __init__(self, portal: Callable[[], Portal], inner: ReceiverT) -> None:
        super().__init__(portal, inner)
        inner._intake.hand_over = portal().post
        self._fetched: deque[Message] = deque()

    def receive(self, timeout: float | None = None) -> Message:
        """The next message, waiting for it at most `timeout` seconds, None = for ever. Raises TimeoutError."""
        self._raise_unseen()
        message = self._next_fetched()
        return self._portal().run(self._inner.receive(timeout)) if message is None else message

    def receive_batch(self, max_messages: int = 1000, timeout: float | None = None) -> list[Message]:
        """The messages that are here, waiting until there is one, at most `timeout` seconds: then an empty list."""
        self._raise_unseen()
        if self._fetched and max_messages >= 1:
            return [message for _ in range(max_messages) if (message := self._next_fetched()) is not None]
        return self._portal().run(self._inner.receive_batch(max_messages, timeout))

    def __iter__(self) -> Iterator[Message]:
        return self

    def __next__(self) -> Message:
        self._raise_unseen()
        message = self._next_fetched()
        while message is None:
            fetched = self._portal().run(self._inner.receive_batch(self._inner._inbox.chunk_messages))
            if not fetched:
                raise StopIteration
            self._fetched.extend(fetched)
            message = self._next_fetched()
        return message

    def batches(self) -> Iterator[MessageBatch]:
        """Deliveries as columns, one shard a batch, waiting for each: the fast way."""
        batches = self._inner.batches()
        while True:
            self._raise_unseen()
            batch = self._fetched_batch()
            if batch is None:
                batch = self._portal().run(_next(batches))
            if batch is None:
                return
            yield batch

    def _next_fetched(self) -> Message | None:
        try:
            return self._fetched.popleft()
        except IndexError:
            return None

    def _fetched_batch(self) -> MessageBatch | None:
        """Fetched messages of one delivery, as columns."""
        first = last = self._next_fetched()
        while first is not None and last is not None and self._fetched and self._fetched[0].batch is first.batch:
            last = self._fetched.popleft()
        return None if first is None or last is None else first.batch.part(first.index, last.index + 1)


class _Consumer(_Receiver[ConsumerT]):
    """What stream and queue consumers share."""

    @property
    def subscription(self) -> str:
        """The name of the subscription."""
        return self._inner.subscription

    def ack(self, messages: Message | MessageBatch) -> Future[None]:
        """Acknowledge; queued at once, sent in groups. The future ends when it is durable."""
        return self._post(lambda: self._inner.ack(messages))

    def seek(self, position: Position) -> None:
        """Move the subscription; see `magnetar.client.StreamConsumer.seek`."""
        self._raise_unseen()
        self._portal().run(self._inner.seek(position))
        self._fetched.clear()


class StreamConsumer(_Consumer[aio_consumer.StreamConsumer]):
    """A stream subscription: ordered, acknowledged cumulatively. See `magnetar.client.StreamConsumer`."""


class QueueConsumer(_Consumer[aio_consumer.QueueConsumer]):
    """A queue subscription: each message to one consumer, acknowledged by itself. See `magnetar.client.QueueConsumer`.

    for message in queue:
        with message:      # ack when the block succeeds, nack when it raises
            ...
    """

    def nack(self, messages: Message | MessageBatch) -> Future[None]:
        """Give back: the broker delivers it again at once. The future ends when that is on its way."""
        return self._post(lambda: self._inner.nack(messages))


class Reader(_Receiver[aio_consumer.Reader]):
    """Reads a topic without a subscription. See `magnetar.client.Reader`."""


class Client:
    """A connection to a cluster: made by `connect`, used with `with`. See `magnetar.client.Client`."""

    def __init__(self, inner: aio.Client) -> None:
        self._inner = inner
        self._open_portal: Portal | None = None
        self.admin = Admin(self._portal, inner.admin)

    def __enter__(self) -> Self:
        """Reaches no broker yet: the first call does."""
        if self._open_portal is not None:
            raise ClientClosed("a client is entered only once: make another one")
        self._open_portal = Portal()
        self._open_portal.run(self._inner.__aenter__())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        portal = self._open_portal
        if portal is not None and not portal.inherited:
            self.close()

    def close(self) -> None:
        """Close what is still open, waiting at most `timeout` for what was sent, and all connections. Twice is fine."""
        portal = self._portal()
        if portal.stopped:
            return
        try:
            portal.run(self._inner.close())
        finally:
            portal.stop()

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
        """As `magnetar.client.Client.producer`; use it with `with`."""
        inner = self._inner.producer(
            topic,
            name=name,
            batching=batching,
            compression=compression,
            max_pending_bytes=max_pending_bytes,
            access=access,
        )
        return Producer(self._portal, inner)

    def stream_consumer(self, topic: str, *, subscription: str, start: Position = LATEST) -> StreamConsumer:
        """As `magnetar.client.Client.stream_consumer`; use it with `with`."""
        return StreamConsumer(self._portal, self._inner.stream_consumer(topic, subscription=subscription, start=start))

    def queue_consumer(
        self,
        topic: str,
        *,
        subscription: str,
        key_ordered: bool = False,
        prefetch: int = 1000,
        start: Position = LATEST,
    ) -> QueueConsumer:
        """As `magnetar.client.Client.queue_consumer`; use it with `with`."""
        inner = self._inner.queue_consumer(
            topic, subscription=subscription, key_ordered=key_ordered, prefetch=prefetch, start=start
        )
        return QueueConsumer(self._portal, inner)

    def reader(self, topic: str, *, start: Position = EARLIEST, stop: Edge | None = None) -> Reader:
        """As `magnetar.client.Client.reader`; use it with `with`."""
        return Reader(self._portal, self._inner.reader(topic, start=start, stop=stop))

    def _portal(self) -> Portal:
        if self._open_portal is None:
            raise ClientClosed("this client is not open: use `with connect(...) as client`")
        return self._open_portal


def connect(servers: str, *, timeout: float = 30.0) -> Client:
    """A client for the cluster that these brokers belong to; use it with `with`. As `magnetar.client.connect`."""
    return Client(aio.connect(servers, timeout=timeout))


async def _next(batches: AsyncIterator[MessageBatch]) -> MessageBatch | None:
    return await anext(batches, None)
