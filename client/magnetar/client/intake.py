"""All that a consumer or reader has open: a feed for each shard of the topic, one inbox, and what went wrong.

Feeds keep themselves open. What goes wrong with one of them is either final, then the consumer cannot go on, or it is
trouble that the user's next call tells: an acknowledgement that failed and that nobody awaits, a shard that did not
answer for the whole timeout (forgotten if it has answered by then).
"""

from __future__ import annotations

import asyncio
import os
import secrets
import socket
from collections.abc import Callable, Coroutine
from typing import Any, Protocol

from magnetar.client.connection import ConsumeStream
from magnetar.client.errors import MagnetarError
from magnetar.client.feed import Feed, FeedOwner, ReaderFeed
from magnetar.client.inbox import Inbox
from magnetar.client.layouts import Layout, ShardPlace
from magnetar.client.lifetime import Lifetime
from magnetar.client.links import Cluster
from magnetar.client.message import MessageBatch
from magnetar.client.positions import EARLIEST, start_position
from magnetar.client.refusal import Refused
from magnetar.client.subscription_feed import SubscriptionFeed
from magnetar.v1 import metadata_pb2

BUFFER_BYTES = 32 << 20
"""That a consumer may have delivered and not taken, over all shards."""

FEED_BYTES_MIN = 2 << 20
FEED_MESSAGES = 1_000_000
"""Messages that a stream or reader may have delivered and not taken, in each shard; bytes count first."""

HOST_CHARACTERS_MAX = 64


class FeedKind(Protocol):
    """Makes the feed for a shard."""

    def __call__(
        self,
        cluster: Cluster[ConsumeStream],
        topic: str,
        place: ShardPlace,
        owner: FeedOwner,
        *,
        messages: int,
        bytes_: int,
    ) -> Feed: ...


class Intake:
    """See the module's docstring. Is the owner of its feeds.

    prefetch   messages to have here, of a queue; None: as many as the bytes allow
    changed    something arrived, opened, ended or went wrong
    trouble    what the next call raises
    """

    def __init__(
        self,
        cluster: Cluster[ConsumeStream],
        lifetime: Lifetime,
        topic: str,
        kind: FeedKind,
        *,
        start: metadata_pb2.StartPosition,
        inbox: Inbox,
        subscription: str = "",
        key_ordered: bool = False,
        prefetch: int | None = None,
        stop_at_end: bool = False,
    ) -> None:
        self.topic = topic
        self.subscription = subscription
        self.key_ordered = key_ordered
        self.stop_at_end = stop_at_end
        self.consumer_name = ""
        self.hand_over: Callable[[Callable[[], object]], None] | None = None
        self.inbox = inbox
        self.changed = asyncio.Event()
        self.trouble: MagnetarError | None = None
        self.feeds: dict[int, Feed] = {}
        self._cluster = cluster
        self._lifetime = lifetime
        self._kind = kind
        self._start = start
        self._prefetch = prefetch
        self._layout = Layout(topic, 0, ())
        self._unreachable: Feed | None = None
        self._unlisten: Callable[[], None] | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    # --- life ---

    async def open(self, check: Callable[[Layout], None]) -> None:
        """Open at every shard on return. Raises MagnetarError, or what `check` raises for the layout."""
        layout = await self._cluster.layouts.get(self.topic, create=True)
        check(layout)
        host = socket.gethostname()[:HOST_CHARACTERS_MAX]
        self.consumer_name = f"{host}-{os.getpid()}-{secrets.token_hex(6)}"
        self._adopt(layout)
        while not all(feed.opened_once for feed in self.feeds.values()):
            self.raise_trouble()
            await self.change()
        self._unlisten = self._cluster.layouts.listen(self.topic, self._adopt)

    async def stop(self) -> None:
        if self._unlisten is not None:
            self._unlisten()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*(feed.stop() for feed in self.feeds.values()))

    @property
    def subscription_feeds(self) -> list[SubscriptionFeed]:
        return [feed for feed in self.feeds.values() if isinstance(feed, SubscriptionFeed)]

    @property
    def at_end(self) -> bool:
        """Everything up to the stop was given."""
        return self.stop_at_end and all(isinstance(f, ReaderFeed) and f.finished for f in self.feeds.values())

    async def change(self) -> None:
        """Until something arrives or goes wrong."""
        self.changed.clear()
        await self.changed.wait()

    def raise_trouble(self) -> None:
        """What went wrong and nobody waits for, once."""
        trouble, self.trouble, self._unreachable = self.trouble, None, None
        if trouble is not None:
            raise trouble.again()

    # --- shards ---

    def _adopt(self, layout: Layout) -> None:
        if layout.epoch < self._layout.epoch:
            return
        self._layout = layout
        for place in layout.shards:
            if place.shard_id not in self.feeds:
                feed = self.feeds[place.shard_id] = self._feed(place, len(layout.shards))
                feed.start()
        for shard_id in [shard_id for shard_id in self.feeds if layout.shard(shard_id) is None]:
            self.feeds.pop(shard_id).abandon()

    def _feed(self, place: ShardPlace, shards: int) -> Feed:
        messages = FEED_MESSAGES if self._prefetch is None else max(1, self._prefetch // shards)
        bytes_ = max(FEED_BYTES_MIN, BUFFER_BYTES // shards)
        return self._kind(self._cluster, self.topic, place, self, messages=messages, bytes_=bytes_)

    def start_of(self, shard_id: int) -> metadata_pb2.StartPosition:
        # A shard that appears while this is in use continues those that were read: all of it is new. For a subscription
        # the broker knows better.
        return self._start if self._lifetime.over is not None else start_position(EARLIEST)

    def shard_ended(self) -> None:
        self._in_background(self._look_for_shards())

    async def _look_for_shards(self) -> None:
        try:
            await self._cluster.layouts.refresh(self.topic)
        except Refused:
            return  # The children's deliveries are not lost by this: the next refresh finds them.

    def _in_background(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    # --- told by feeds ---

    def arrived(self, batch: MessageBatch) -> None:
        self.inbox.put(batch)
        self.changed.set()

    def drop_buffered(self, feed: Feed) -> None:
        self.inbox.drop_from(feed)

    def drop_overtaken(self) -> None:
        self.inbox.drop_overtaken()

    def feed_opened(self, feed: Feed) -> None:
        if self._unreachable is feed:
            self._unreachable, self.trouble = None, None
        self.changed.set()

    def feed_finished(self, feed: Feed) -> None:
        feed.abandon()
        self.changed.set()

    def feed_failed(self, error: MagnetarError) -> None:
        self._lifetime.fail(error)
        self.trouble, self._unreachable = error, None
        self.changed.set()

    def feed_troubled(self, error: MagnetarError) -> None:
        if self.trouble is None or self._unreachable is not None:
            self.trouble, self._unreachable = error, None
        self.changed.set()

    def feed_unreachable(self, feed: Feed, error: MagnetarError) -> None:
        if self.trouble is None:
            self.trouble, self._unreachable = error, feed
        self.changed.set()
