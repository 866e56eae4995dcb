"""Consumers and readers: receiving, in the three ways there are, from all shards of a topic.

Messages of one shard come in order; between shards there is none.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine, Generator
from types import TracebackType
from typing import Any, Self

from magnetar.client.completion import Completion
from magnetar.client.connection import ConsumeStream
from magnetar.client.errors import ClusterUnavailable, EndOfTopic, InvalidArgument, MagnetarError
from magnetar.client.feed import ReaderFeed
from magnetar.client.inbox import CHUNK_MESSAGES, Inbox
from magnetar.client.intake import Intake
from magnetar.client.layouts import Layout, checked_name, full_topic
from magnetar.client.lifetime import Lifetime
from magnetar.client.links import Cluster
from magnetar.client.message import Message, MessageBatch, MessageId
from magnetar.client.positions import LATEST, Edge, Position, check_start, start_position
from magnetar.client.receipts import Acknowledgement, wait_for_end
from magnetar.client.subscription_feed import QueueFeed, StreamFeed, SubscriptionFeed

PREFETCH_MAX = 1_000_000
RECEIVE_MESSAGES_MAX = 1_000_000


class Receiver:
    """What consumers and readers share: receiving, one message after the other, some, or as columns."""

    def __init__(self, lifetime: Lifetime, intake: Intake, timeout_s: float) -> None:
        self.topic = intake.topic
        self._lifetime = lifetime
        self._intake = intake
        self._inbox = intake.inbox
        self._timeout_s = timeout_s

    # --- life ---

    async def __aenter__(self) -> Self:
        """Open at every shard on return: what is published from now on is seen. Raises MagnetarError."""
        self._lifetime.begin()
        try:
            await self._intake.open(self._check_layout)
        except BaseException:
            self._lifetime.end()
            await self._intake.stop()
            raise
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
        self._intake.changed.set()
        try:
            async with asyncio.timeout(self._timeout_s):
                for finish in [feed.finish() for feed in self._intake.subscription_feeds]:
                    await _Ended(finish)
                    if finish.error is not None:
                        self._intake.feed_troubled(finish.error)
        except TimeoutError:
            self._intake.feed_troubled(
                ClusterUnavailable(
                    f"the consumer was closed before all acknowledgements were confirmed, they may or may not be "
                    f"durable: topic=`{self.topic}` subscription=`{self._intake.subscription}`"
                )
            )
        finally:
            self._lifetime.end()
            await self._intake.stop()
        self._intake.raise_trouble()

    def _check_layout(self, layout: Layout) -> None:
        """Raises InvalidArgument if the start does not fit the topic's shards."""

    # --- receiving ---

    async def receive(self, timeout: float | None = None) -> Message:
        """The next message, waiting for it at most `timeout` seconds, None = for ever.

        Raises TimeoutError, ClusterUnavailable when a shard could not be reached for the client's timeout (calling
        again goes on), or what happened to an acknowledgement that nobody awaited.
        """
        if self._intake.trouble is None and self._lifetime.over is None:
            for message in self._inbox.messages:
                return message
        following = await _within(timeout, self._next_message())
        if following is None:
            raise EndOfTopic(f"the reader has given everything up to its stop: topic=`{self.topic}`")
        return following

    async def receive_batch(self, max_messages: int = 1000, timeout: float | None = None) -> list[Message]:
        """The messages that are here, at most `max_messages`, waiting until there is one, at most `timeout` seconds.

        Returns an empty list after the timeout. Raises as `receive`, but never TimeoutError.
        """
        if not 1 <= max_messages <= RECEIVE_MESSAGES_MAX:
            raise InvalidArgument(f"max_messages is 1 to {RECEIVE_MESSAGES_MAX}: max_messages=`{max_messages}`")
        self._raise_trouble()
        taken = self._inbox.take(max_messages)
        if taken:
            return taken
        try:
            first = await _within(timeout, self._next_message())
        except TimeoutError:
            return []
        return [] if first is None else [first, *(self._inbox.take(max_messages - 1) if max_messages > 1 else ())]

    def __aiter__(self) -> AsyncIterator[Message]:
        return self

    async def __anext__(self) -> Message:
        if self._intake.trouble is None and self._lifetime.over is None:
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
            self._raise_trouble()
            for message in self._inbox.messages:
                return message
            if not self._inbox.load():
                if self._intake.at_end:
                    return None
                await self._intake.change()

    async def _next_batch(self) -> MessageBatch | None:
        while True:
            self._raise_trouble()
            batch = self._inbox.take_batch()
            if batch is not None:
                return batch
            if self._intake.at_end:
                return None
            await self._intake.change()

    def _raise_trouble(self) -> None:
        """What went wrong and nobody waits for, once; and whether this may be used at all."""
        self._intake.raise_trouble()
        self._lifetime.check()


class Consumer(Receiver):
    """What stream and queue consumers share: a subscription."""

    def __init__(self, lifetime: Lifetime, intake: Intake, timeout_s: float) -> None:
        super().__init__(lifetime, intake, timeout_s)
        self.subscription = intake.subscription

    def ack(self, messages: Message | MessageBatch) -> Acknowledgement:
        """Acknowledge; queued at once, sent in groups. Await the result, which its group shares, for durability.

        A stream acknowledges everything up to here in the message's shard, a queue the message, or each of the batch.
        What happens to an acknowledgement that nobody awaits is raised by the next call.
        """
        if self._intake.trouble is not None or self._lifetime.over is not None:
            self._raise_trouble()
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
        self._raise_trouble()
        where = start_position(position)
        feeds = self._intake.subscription_feeds
        if isinstance(position, MessageId):
            feeds = [feed for feed in feeds if feed.shard_id == position.shard]
            if not feeds:
                raise InvalidArgument(f"the topic has no such shard: topic=`{self.topic}` shard=`{position.shard}`")
        failure: MagnetarError | None = None
        for seek in [feed.seek(where) for feed in feeds]:
            await _Ended(seek)
            failure = failure or seek.error
        if failure is not None:
            raise failure.again()

    def _source(self, batch: MessageBatch) -> SubscriptionFeed:
        source = batch.source
        if isinstance(source, SubscriptionFeed) and self._intake.feeds.get(source.shard_id) is source:
            return source
        raise InvalidArgument("this message came from another consumer: acknowledge it there")


class StreamConsumer(Consumer):
    """A stream subscription: ordered, acknowledged cumulatively, each shard active at one consumer. Made by
    `Client.stream_consumer`, used with `async with`."""


class QueueConsumer(Consumer):
    """A queue subscription: each message goes to one consumer and is acknowledged by itself. Made by
    `Client.queue_consumer`, used with `async with`.

        async for message in queue:
            async with message:      # ack when the block succeeds, nack when it raises
                ...
    """

    def nack(self, messages: Message | MessageBatch) -> Acknowledgement:
        """Give back: the broker delivers it again at once, perhaps to another consumer. Queued like `ack`.

        Awaiting the result waits until it is on its way; nothing needs to be durable.
        """
        if self._intake.trouble is not None or self._lifetime.over is not None:
            self._raise_trouble()
        if not isinstance(messages, Message | MessageBatch):
            raise InvalidArgument(f"give back a Message or a MessageBatch: type=`{type(messages).__name__}`")
        if isinstance(messages, Message):
            return Acknowledgement(self._source(messages.batch).nack(messages.batch, messages.index))
        return Acknowledgement(self._source(messages).nack_batch(messages))


class Reader(Receiver):
    """Reads a topic without a subscription: the broker keeps nothing about it. Made by `Client.reader`, used with
    `async with`."""

    def __init__(self, lifetime: Lifetime, intake: Intake, timeout_s: float, start: Position) -> None:
        super().__init__(lifetime, intake, timeout_s)
        self._from = start

    def _check_layout(self, layout: Layout) -> None:
        if not isinstance(self._from, MessageId):
            return
        if layout.shard(self._from.shard) is None:
            raise InvalidArgument(f"the topic has no such shard: topic=`{self.topic}` shard=`{self._from.shard}`")
        if len(layout.shards) > 1:
            raise InvalidArgument(
                f"a message is a start only in a topic of one shard: start at EARLIEST, LATEST or a time: "
                f"topic=`{self.topic}` shards=`{len(layout.shards)}`"
            )


def stream_consumer(
    cluster: Cluster[ConsumeStream], lifetime: Lifetime, topic: str, *, subscription: str, start: Position
) -> StreamConsumer:
    """Raises InvalidArgument."""
    intake = Intake(
        cluster,
        lifetime,
        full_topic(topic),
        StreamFeed,
        start=check_start(start),
        inbox=Inbox(),
        subscription=checked_name("subscription", subscription),
    )
    return StreamConsumer(lifetime, intake, cluster.timeout_s)


def queue_consumer(
    cluster: Cluster[ConsumeStream],
    lifetime: Lifetime,
    topic: str,
    *,
    subscription: str,
    key_ordered: bool,
    prefetch: int,
    start: Position,
) -> QueueConsumer:
    """Raises InvalidArgument."""
    if not 1 <= prefetch <= PREFETCH_MAX:
        raise InvalidArgument(f"prefetch is 1 to {PREFETCH_MAX}: prefetch=`{prefetch}`")
    intake = Intake(
        cluster,
        lifetime,
        full_topic(topic),
        QueueFeed,
        start=check_start(start),
        # A chunk counts as taken when it is made: a small part of what is wanted here, so that not much more is.
        inbox=Inbox(max(1, min(CHUNK_MESSAGES, prefetch // 4))),
        subscription=checked_name("subscription", subscription),
        key_ordered=bool(key_ordered),
        prefetch=prefetch,
    )
    return QueueConsumer(lifetime, intake, cluster.timeout_s)


def reader(
    cluster: Cluster[ConsumeStream], lifetime: Lifetime, topic: str, *, start: Position, stop: Edge | None
) -> Reader:
    """Raises InvalidArgument."""
    if stop is not None and stop is not LATEST:
        raise InvalidArgument(f"stop is None or LATEST: stop=`{stop}`")
    intake = Intake(
        cluster,
        lifetime,
        full_topic(topic),
        ReaderFeed,
        start=start_position(start),
        inbox=Inbox(),
        stop_at_end=stop is LATEST,
    )
    return Reader(lifetime, intake, cluster.timeout_s, start)


async def _within(timeout: float | None, work: Coroutine[Any, Any, Message | None]) -> Message | None:
    if timeout is None:
        return await work
    async with asyncio.timeout(max(0.0, timeout)):
        return await work


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


class _Ended:
    """Await until a completion has ended, well or badly."""

    __slots__ = ("_completion",)

    def __init__(self, completion: Completion) -> None:
        self._completion = completion

    def __await__(self) -> Generator[object, None, None]:
        yield from wait_for_end(self._completion)
