"""Consumers and readers: receiving, in the three ways there are, from all shards of a topic.

A consumer has one feed a shard, which keeps itself open, and one inbox. Messages of one shard come in order; between
shards there is none.
"""

from __future__ import annotations

import asyncio
import os
import secrets
import socket
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Callable, Coroutine, Generator
from types import TracebackType
from typing import Any, Self

from magnetar.client.completion import Completion
from magnetar.client.connection import ConsumeStream
from magnetar.client.errors import ClusterUnavailable, EndOfTopic, InvalidArgument, MagnetarError
from magnetar.client.feed import Feed, ReaderFeed
from magnetar.client.inbox import CHUNK_MESSAGES, Inbox
from magnetar.client.layouts import Layout, ShardPlace, checked_name, full_topic
from magnetar.client.lifetime import Lifetime
from magnetar.client.links import Cluster
from magnetar.client.message import Message, MessageBatch, MessageId
from magnetar.client.positions import EARLIEST, LATEST, Edge, Position, check_start, start_position
from magnetar.client.receipts import Acknowledgement, wait_for_end
from magnetar.client.refusal import Refused
from magnetar.client.subscription_feed import QueueFeed, StreamFeed, SubscriptionFeed
from magnetar.v1 import metadata_pb2

BUFFER_BYTES = 32 << 20
"""That a consumer may have delivered and not taken, over all shards."""
FEED_BYTES_MIN = 2 << 20
FEED_MESSAGES = 1_000_000
PREFETCH_MAX = 1_000_000
RECEIVE_MESSAGES_MAX = 1_000_000


class Receiver(ABC):
    """What consumers and readers share. Used with `async with`."""

    kind: str
    subscription = ""
    key_ordered = False
    stop_at_end = False

    def __init__(
        self,
        cluster: Cluster[ConsumeStream],
        lifetime: Lifetime,
        topic: str,
        *,
        start: metadata_pb2.StartPosition,
        chunk_messages: int = CHUNK_MESSAGES,
    ) -> None:
        self.topic = full_topic(topic)
        self.consumer_name = ""
        self.hand_over: Callable[[Callable[[], object]], None] | None = None
        self._cluster = cluster
        self._lifetime = lifetime
        self._start = start
        self._layout = Layout(self.topic, 0, ())
        self._feeds: dict[int, Feed] = {}
        self.chunk_messages = chunk_messages
        self._inbox = Inbox(chunk_messages)
        self._changed = asyncio.Event()
        self._trouble: MagnetarError | None = None
        self._unreachable: Feed | None = None
        self._unlisten: Callable[[], None] | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    # --- life ---

    async def __aenter__(self) -> Self:
        """Open at every shard on return: what is published from now on is seen. Raises MagnetarError."""
        self._lifetime.begin()
        try:
            layout = self._checked(await self._cluster.layouts.get(self.topic, create=True))
            self.consumer_name = f"{socket.gethostname()[:64]}-{os.getpid()}-{secrets.token_hex(6)}"
            self._adopt(layout)
            while not all(feed.opened_once for feed in self._feeds.values()):
                self._raise_trouble()
                await self._change()
        except BaseException:
            await self._stop()
            raise
        self._unlisten = self._cluster.layouts.listen(self.topic, self._adopt)
        self._lifetime.opened()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if kind is None:
            await self.close()
        else:
            # What went wrong in the block is the news.
            try:
                await self.close()
            except MagnetarError:
                return

    async def close(self) -> None:
        """Wait until what was acknowledged is durable, at most the client's timeout, and stop. Twice is fine.

        Raises what happened to an acknowledgement that nobody awaited.
        """
        if not self._lifetime.close():
            return
        self._changed.set()
        try:
            async with asyncio.timeout(self._cluster.timeout_s):
                for completion in self._finishing():
                    await _Ended(completion)
                    self._trouble = self._trouble or completion.error
        except TimeoutError:
            self._trouble = self._trouble or ClusterUnavailable(
                f"the consumer was closed before all acknowledgements were confirmed: they may or may not be durable: "
                f"topic=`{self.topic}` subscription=`{self.subscription}`"
            )
        finally:
            await self._stop()
        trouble, self._trouble = self._trouble, None
        if trouble is not None:
            raise trouble.again()

    def _finishing(self) -> list[Completion]:
        """What has to be confirmed before the end."""
        return []

    async def _stop(self) -> None:
        if self._unlisten is not None:
            self._unlisten()
        self._lifetime.end()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*(feed.stop() for feed in self._feeds.values()))

    # --- shards ---

    @abstractmethod
    def _feed(self, place: ShardPlace, shards: int) -> Feed:
        """The feed for a shard of so many."""

    def _checked(self, layout: Layout) -> Layout:
        """Raises InvalidArgument if the start does not fit it."""
        return layout

    def _adopt(self, layout: Layout) -> None:
        if layout.epoch < self._layout.epoch:
            return
        self._layout = layout
        for place in layout.shards:
            if place.shard_id not in self._feeds:
                feed = self._feeds[place.shard_id] = self._feed(place, len(layout.shards))
                feed.start()
        for shard_id in [shard_id for shard_id in self._feeds if layout.shard(shard_id) is None]:
            self._feeds.pop(shard_id).abandon()

    def start_of(self, shard_id: int) -> metadata_pb2.StartPosition:
        return self._start

    def shard_ended(self) -> None:
        self._in_background(self._look_for_shards())

    async def _look_for_shards(self) -> None:
        try:
            await self._cluster.layouts.refresh(self.topic)
        except Refused:
            return

    def _in_background(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    # --- told by feeds ---

    def arrived(self, batch: MessageBatch) -> None:
        self._inbox.put(batch)
        self._changed.set()

    def feed_opened(self, feed: Feed) -> None:
        if self._unreachable is feed:
            self._unreachable, self._trouble = None, None
        self.feed_changed()

    def feed_changed(self) -> None:
        self._changed.set()

    def drop_buffered(self, feed: Feed) -> None:
        self._inbox.drop_from(feed)

    def drop_overtaken(self) -> None:
        self._inbox.drop_overtaken()

    def feed_failed(self, error: MagnetarError) -> None:
        self._lifetime.fail(error)
        self._trouble, self._unreachable = error, None
        self._changed.set()

    def feed_troubled(self, error: MagnetarError) -> None:
        if self._trouble is None or self._unreachable is not None:
            self._trouble, self._unreachable = error, None
        self._changed.set()

    def feed_unreachable(self, feed: Feed, error: MagnetarError) -> None:
        if self._trouble is None:
            self._trouble, self._unreachable = error, feed
        self._changed.set()

    # --- receiving ---

    async def receive(self, timeout: float | None = None) -> Message:
        """The next message, waiting for it at most `timeout` seconds, None = for ever.

        Raises TimeoutError, ClusterUnavailable when a shard could not be reached for the client's timeout (calling
        again goes on), or what happened to an acknowledgement that nobody awaited.
        """
        if self._trouble is None and self._lifetime.over is None:
            for message in self._inbox.messages:
                return message
        following = await self._within(timeout, self._next_message())
        if following is None:
            raise EndOfTopic(f"the reader has given everything up to its stop: topic=`{self.topic}`")
        return following

    async def receive_batch(self, max_messages: int = 1000, timeout: float | None = None) -> list[Message]:
        """The messages that are here, at most `max_messages`, waiting until there is one, at most `timeout` seconds.

        Returns an empty list after the timeout. Raises as `receive`, but never TimeoutError.
        """
        if not 1 <= max_messages <= RECEIVE_MESSAGES_MAX:
            raise InvalidArgument(f"max_messages is 1 to {RECEIVE_MESSAGES_MAX}: max_messages=`{max_messages}`")
        self._raise_trouble(unless_open=True)
        taken = self._inbox.take(max_messages)
        if taken:
            return taken
        try:
            first = await self._within(timeout, self._next_message())
        except TimeoutError:
            return []
        return [] if first is None else [first, *(self._inbox.take(max_messages - 1) if max_messages > 1 else ())]

    def __aiter__(self) -> AsyncIterator[Message]:
        return self

    async def __anext__(self) -> Message:
        if self._trouble is None and self._lifetime.over is None:
            for message in self._inbox.messages:
                return message
        following = await self._next_message()
        if following is None:
            raise StopAsyncIteration
        return following

    def batches(self) -> AsyncIterator[MessageBatch]:
        """Deliveries as columns, one shard a batch, waiting for each: the fast way."""
        return _Batches(self._next_batch)

    async def _next_message(self) -> Message | None:
        """None: everything up to the stop was given."""
        while True:
            self._raise_trouble(unless_open=True)
            for message in self._inbox.messages:
                return message
            if not self._inbox.load():
                if self._at_end():
                    return None
                await self._change()

    async def _next_batch(self) -> MessageBatch | None:
        while True:
            self._raise_trouble(unless_open=True)
            batch = self._inbox.take_batch()
            if batch is not None:
                return batch
            if self._at_end():
                return None
            await self._change()

    async def _within(self, timeout: float | None, work: Coroutine[Any, Any, Message | None]) -> Message | None:
        if timeout is None:
            return await work
        async with asyncio.timeout(max(0.0, timeout)):
            return await work

    async def _change(self) -> None:
        """Until something arrives or goes wrong."""
        self._changed.clear()
        await self._changed.wait()

    def _at_end(self) -> bool:
        return False

    def _raise_trouble(self, *, unless_open: bool = False) -> None:
        """What went wrong and nobody waits for, once; and whether this may be used at all."""
        trouble, self._trouble, self._unreachable = self._trouble, None, None
        if trouble is not None:
            raise trouble.again()
        if unless_open:
            self._lifetime.check()


class _Batches:
    """Iterates over deliveries."""

    __slots__ = ("_next",)

    def __init__(self, following: Callable[[], Coroutine[Any, Any, MessageBatch | None]]) -> None:
        self._next = following

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> MessageBatch:
        batch = await self._next()
        if batch is None:
            raise StopAsyncIteration
        return batch


class Consumer(Receiver):
    """What stream and queue consumers share."""

    _feeds: dict[int, Feed]

    def __init__(
        self,
        cluster: Cluster[ConsumeStream],
        lifetime: Lifetime,
        topic: str,
        *,
        subscription: str,
        start: Position,
        chunk_messages: int = CHUNK_MESSAGES,
    ) -> None:
        super().__init__(cluster, lifetime, topic, start=check_start(start), chunk_messages=chunk_messages)
        self.subscription = checked_name("subscription", subscription)

    def ack(self, messages: Message | MessageBatch) -> Acknowledgement:
        """Acknowledge; queued at once, sent in groups. Await the result, which its group shares, for durability.

        A stream acknowledges everything up to here in the message's shard, a queue the message, or each of the batch.
        What happens to an acknowledgement that nobody awaits is raised by the next call.
        """
        if self._trouble is not None or self._lifetime.over is not None:
            self._raise_trouble(unless_open=True)
        if isinstance(messages, Message):
            batch = messages.batch
            return Acknowledgement(self._source(batch).ack(batch, messages.index))
        if isinstance(messages, MessageBatch):
            return Acknowledgement(self._source(messages).ack_batch(messages))
        raise InvalidArgument(f"acknowledge a Message or a MessageBatch: type=`{type(messages).__name__}`")

    async def seek(self, position: Position) -> None:
        """Move the subscription: EARLIEST, LATEST, a time, or a message, which comes again and moves its shard only.

        Durable on return. What was delivered before is not given out any more, and acknowledging it does nothing.
        Raises InvalidArgument, RetriableError.
        """
        self._raise_trouble(unless_open=True)
        where = start_position(position)
        if isinstance(position, MessageId):
            feed = self._feeds.get(position.shard)
            if feed is None:
                raise InvalidArgument(f"the topic has no such shard: topic=`{self.topic}` shard=`{position.shard}`")
            feeds = [feed]
        else:
            feeds = list(self._feeds.values())
        seeks = [feed.seek(where) for feed in feeds if isinstance(feed, SubscriptionFeed)]
        failure: MagnetarError | None = None
        for seek in seeks:
            await _Ended(seek)
            failure = failure or seek.error
        if failure is not None:
            raise failure.again()

    def _source(self, batch: MessageBatch) -> SubscriptionFeed:
        source = batch.source
        if isinstance(source, SubscriptionFeed) and self._feeds.get(source.shard_id) is source:
            return source
        raise InvalidArgument("this message came from another consumer: acknowledge it there")

    def _finishing(self) -> list[Completion]:
        return [feed.finish() for feed in self._feeds.values() if isinstance(feed, SubscriptionFeed)]


class StreamConsumer(Consumer):
    """A stream subscription: ordered, acknowledged cumulatively, each shard active at one consumer. Made by
    `Client.stream_consumer`, used with `async with`."""

    kind = "stream consumer"

    def _feed(self, place: ShardPlace, shards: int) -> Feed:
        bytes_ = max(FEED_BYTES_MIN, BUFFER_BYTES // shards)
        return StreamFeed(self._cluster, self.topic, place, self, messages=FEED_MESSAGES, bytes_=bytes_)


class QueueConsumer(Consumer):
    """A queue subscription: each message goes to one consumer and is acknowledged by itself. Made by
    `Client.queue_consumer`, used with `async with`.

        async for message in queue:
            async with message:      # ack when the block succeeds, nack when it raises
                ...
    """

    kind = "queue consumer"

    def __init__(
        self,
        cluster: Cluster[ConsumeStream],
        lifetime: Lifetime,
        topic: str,
        *,
        subscription: str,
        key_ordered: bool,
        prefetch: int,
        start: Position,
    ) -> None:
        if not 1 <= prefetch <= PREFETCH_MAX:
            raise InvalidArgument(f"prefetch is 1 to {PREFETCH_MAX}: prefetch=`{prefetch}`")
        chunk_messages = max(1, min(CHUNK_MESSAGES, prefetch // 4))
        super().__init__(
            cluster, lifetime, topic, subscription=subscription, start=start, chunk_messages=chunk_messages
        )
        self.key_ordered = key_ordered
        self._prefetch = prefetch

    def nack(self, messages: Message | MessageBatch) -> Acknowledgement:
        """Give back: the broker delivers it again at once, perhaps to another consumer. Queued like `ack`.

        Awaiting the result waits until it is on its way; nothing needs to be durable.
        """
        if self._trouble is not None or self._lifetime.over is not None:
            self._raise_trouble(unless_open=True)
        if not isinstance(messages, Message | MessageBatch):
            raise InvalidArgument(f"give back a Message or a MessageBatch: type=`{type(messages).__name__}`")
        batch = messages.batch if isinstance(messages, Message) else messages
        source = self._source(batch)
        if isinstance(messages, Message) or not isinstance(source, QueueFeed):
            return Acknowledgement(source.nack(batch, messages.index if isinstance(messages, Message) else 0))
        return Acknowledgement(source.nack_batch(batch))

    def _feed(self, place: ShardPlace, shards: int) -> Feed:
        return QueueFeed(
            self._cluster,
            self.topic,
            place,
            self,
            messages=max(1, self._prefetch // shards),
            bytes_=max(FEED_BYTES_MIN, BUFFER_BYTES // shards),
        )


class Reader(Receiver):
    """Reads a topic without a subscription: the broker keeps nothing about it. Made by `Client.reader`, used with
    `async with`."""

    kind = "reader"

    def __init__(
        self,
        cluster: Cluster[ConsumeStream],
        lifetime: Lifetime,
        topic: str,
        *,
        start: Position,
        stop: Edge | None,
    ) -> None:
        super().__init__(cluster, lifetime, topic, start=start_position(start))
        if stop is not None and stop is not LATEST:
            raise InvalidArgument(f"stop is None or LATEST: stop=`{stop}`")
        self.stop_at_end = stop is LATEST
        self._from = start

    def _checked(self, layout: Layout) -> Layout:
        if not isinstance(self._from, MessageId):
            return layout
        if layout.shard(self._from.shard) is None:
            raise InvalidArgument(f"the topic has no such shard: topic=`{self.topic}` shard=`{self._from.shard}`")
        if len(layout.shards) > 1:
            raise InvalidArgument(
                f"a message is a start only in a topic of one shard: start at EARLIEST, LATEST or a time: "
                f"topic=`{self.topic}` shards=`{len(layout.shards)}`"
            )
        return layout

    def start_of(self, shard_id: int) -> metadata_pb2.StartPosition:
        # A shard that appears later continues those that were read: all of it is new.
        if self._lifetime.over is None:
            return start_position(EARLIEST)
        return self._start

    def _feed(self, place: ShardPlace, shards: int) -> Feed:
        bytes_ = max(FEED_BYTES_MIN, BUFFER_BYTES // shards)
        return ReaderFeed(self._cluster, self.topic, place, self, messages=FEED_MESSAGES, bytes_=bytes_)

    def feed_changed(self) -> None:
        super().feed_changed()
        for feed in self._feeds.values():
            if isinstance(feed, ReaderFeed) and feed.finished:
                feed.abandon()

    def _at_end(self) -> bool:
        return self.stop_at_end and all(isinstance(feed, ReaderFeed) and feed.finished for feed in self._feeds.values())


class _Ended:
    """Await until a completion has ended, well or badly."""

    __slots__ = ("_completion",)

    def __init__(self, completion: Completion) -> None:
        self._completion = completion

    def __await__(self) -> Generator[object, None, None]:
        yield from wait_for_end(self._completion)
