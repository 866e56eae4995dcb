"""Keeps a producer or consumer open at whoever owns a shard, through crashes, moves and reconnects.

    resolve ──▶ connect ──▶ open ──▶ (in use) ──▶ ended: why?
       ▲                                             │
       └────────── wait, doubling, with jitter ◀─────┘

The reason decides alone: a broker that names the owner is believed at once, a final reason ends the link, everything
else is tried again, for ever. Patience is another matter: when something is waited for and nothing moves for `timeout`
seconds, `_timed_out` tells the users, and the link goes on.

A layout that names another owner than before is news. Whoever waits, or is open at an owner that is silent, goes there
at once. Who is open elsewhere goes after HINT_GRACE_S, unless other news came, or a redirect: the broker that told may
know less than the one that redirected.
"""

from __future__ import annotations

import asyncio
import logging
import random
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Generic

from magnetar.client.backoff import Delays
from magnetar.client.connection import Streams, StreamT
from magnetar.client.layouts import Brokers, Layout, Layouts
from magnetar.client.refusal import NOT_OWNER, OUT_OF_ORDER, WRONG_SHARD, Refused, unavailable

HINT_GRACE_S = 0.3
"""From news of another owner until an open handle is given up for it."""

SILENCE_S = 1.0
"""While something is waited for so long, the layout is asked for, as often, and whoever is watched has to answer."""

log = logging.getLogger("magnetar.client")


@dataclass(frozen=True, slots=True)
class Cluster(Generic[StreamT]):
    """What a link needs: who to ask, the streams to them, and how patient to be."""

    brokers: Brokers
    layouts: Layouts
    streams: Streams[StreamT]
    timeout_s: float


class ShardLink(ABC, Generic[StreamT]):
    """One handle at one shard; see the module's docstring."""

    def __init__(self, cluster: Cluster[StreamT], topic: str, shard_id: int, owner: str) -> None:
        self.topic = topic
        self.shard_id = shard_id
        self._cluster: Cluster[StreamT] = cluster
        self._loop = asyncio.get_running_loop()
        self._owner = owner
        self._delays = Delays(random.random)
        self._stream: StreamT | None = None
        self._number = 0
        self._at = ""
        self._closed: asyncio.Future[Refused] | None = None
        self._refused = unavailable("no broker said who serves the shard")
        self._task: asyncio.Task[None] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._moved_at = 0.0
        self._stopped = False
        self._unlisten: Callable[[], None] | None = None
        self._told_owner = owner
        self._news = asyncio.Event()
        self._hint: asyncio.TimerHandle | None = None

    # --- what kinds of link do ---

    @abstractmethod
    def _open(self, stream: StreamT) -> int:
        """Add this handle to the stream and send the opening. Returns its number."""

    @abstractmethod
    def _lost(self) -> None:
        """The handle is not open any more."""

    @abstractmethod
    def _failed(self, refused: Refused) -> None:
        """It ended for a final reason; the link ends too."""

    @abstractmethod
    def _waiting(self) -> bool:
        """Something is waited for."""

    @abstractmethod
    def _timed_out(self, refused: Refused) -> None:
        """Nothing moved for the whole timeout. refused: what went wrong last."""

    # --- life ---

    @property
    def started(self) -> bool:
        return self._task is not None

    def start(self) -> None:
        if self._task is None:
            self._unlisten = self._cluster.layouts.listen(self.topic, self._told)
            self._task = asyncio.create_task(self._run(), name=f"{type(self).__name__} {self.topic} {self.shard_id}")

    async def stop(self) -> None:
        """The handle is closed, in the background at the broker."""
        self.abandon()
        if self._task is not None:
            await asyncio.wait({self._task})

    def abandon(self) -> None:
        """As `stop`, without waiting for the end."""
        self._stopped = True
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._unlisten is not None:
            self._unlisten()
            self._unlisten = None
        self._forget_hint()
        if self._task is not None:
            self._task.cancel()

    async def _run(self) -> None:
        try:
            while True:
                refused = await self._attempt()
                self._refused = refused
                if refused.final and not refused.one_batch:
                    break
                wait_s = self._delays.next_s(at_least_s=refused.retry_after_s, at_once=self._knows_where(refused))
                if wait_s:
                    await self._pause(wait_s)
        except Exception as error:
            log.exception("link failed: topic=`%s` shard=`%d`", self.topic, self.shard_id)
            refused = unavailable(f"the client failed: {error!r}")
        self._failed(refused)

    async def _attempt(self) -> Refused:
        """Open at the owner and stay until it ends."""
        try:
            address = self._at = self._owner or await self._resolve()
            self._owner = ""
            self._news.clear()
            stream = await self._connect(address)
            self._number = self._open(stream)
        except Refused as error:
            return error
        finally:
            self._at = ""
        self._stream = stream
        self._closed = self._loop.create_future()
        try:
            # Whoever stops the link cancels this wait, and not what tells whether the handle is open.
            refused = await asyncio.shield(self._closed)
        finally:
            self._let_go(stream)
        if refused.reason == NOT_OWNER:
            self._owner = refused.owner
            self._forget_hint()
        elif refused.reason == OUT_OF_ORDER or refused.one_batch:
            self._owner = address
        return refused

    async def _connect(self, address: str) -> StreamT:
        """Raises Refused, NOT_OWNER also if news comes of another owner while this one does not answer."""
        connecting = asyncio.ensure_future(self._cluster.streams.at(address))
        news = asyncio.ensure_future(self._news.wait())
        try:
            await asyncio.wait({connecting, news}, return_when=asyncio.FIRST_COMPLETED)
            if connecting.done():
                return connecting.result()
        finally:
            for waiting in (connecting, news):
                waiting.cancel()
            await asyncio.gather(connecting, news, return_exceptions=True)
        self._owner = self._told_owner
        raise Refused(NOT_OWNER, f"the shard has another owner: broker=`{address}`", owner=self._told_owner)

    async def _pause(self, wait_s: float) -> None:
        """Until then, or until there is news of an owner."""
        with suppress(TimeoutError):
            async with asyncio.timeout(wait_s):
                await self._news.wait()
                self._owner = self._told_owner

    def _told(self, layout: Layout) -> None:
        """A layout came. Only an owner that is not the one of the layout before is news."""
        place = layout.shard(self.shard_id)
        if place is None or place.owner == self._told_owner:
            return
        self._told_owner = place.owner
        self._forget_hint()
        stream = self._stream
        here = (self._at,) if stream is None else (stream.address, stream.registered)
        if not place.owner or place.owner in here:
            self._news.clear()
            return
        self._news.set()
        if stream is not None:
            self._hint = self._loop.call_later(0.0 if self.silent else HINT_GRACE_S, self._follow, place.owner)

    def _forget_hint(self) -> None:
        if self._hint is not None:
            self._hint.cancel()
            self._hint = None

    def _follow(self, owner: str) -> None:
        stream = self._stream
        if stream is not None and owner not in (stream.address, stream.registered):
            self._cut(Refused(NOT_OWNER, f"the shard has another owner: broker=`{stream.address}`", owner=owner))

    async def _resolve(self) -> str:
        layout = await self._cluster.layouts.refresh(self.topic)
        shard = layout.shard(self.shard_id)
        if shard is None:
            raise unavailable(f"the topic's layout has no such shard: topic=`{self.topic}` shard=`{self.shard_id}`")
        return shard.owner or self._cluster.brokers.preferred

    def _knows_where(self, refused: Refused) -> bool:
        return bool(self._owner) or refused.reason == WRONG_SHARD

    def _let_go(self, stream: StreamT) -> None:
        """Nothing happens any more if the handle has ended; else it is closed at the broker too."""
        if self._closed is not None and not self._closed.done():
            self._close(stream)
            self._lost()
        stream.remove(self._number)
        self._stream, self._closed = None, None

    @abstractmethod
    def _close(self, stream: StreamT) -> None:
        """Close an open handle at the broker."""

    def ended(self, refused: Refused, sequence: int = -1) -> None:
        """The broker closed the handle, or the stream is gone."""
        if self._closed is not None and not self._closed.done():
            self._lost()
            self._closed.set_result(refused)

    def _cut(self, refused: Refused) -> None:
        """Close the handle from this side, and open again."""
        if self._stream is not None and self._closed is not None and not self._closed.done():
            self._close(self._stream)
            self.ended(refused)

    # --- patience ---

    @property
    def silent(self) -> bool:
        """Something is waited for, and nothing has moved for SILENCE_S."""
        return self._timer is not None and self._waiting() and self._loop.time() - self._moved_at >= SILENCE_S

    def _watch(self) -> None:
        """Something is waited for from now on, or still."""
        if self._timer is None and not self._stopped:
            self._moved_at = self._loop.time()
            self._look_in(self._cluster.timeout_s)

    def _moved(self) -> None:
        """What is waited for came nearer."""
        self._moved_at = self._loop.time()
        self._delays.reset()

    def _trouble(self) -> Refused:
        """Why nothing moves, as far as is known here."""
        if self._stream is not None:
            return unavailable(
                "the shard's broker takes what it is sent, and does not answer: `magnetar cluster health` says whether "
                f"bookies are missing broker=`{self._stream.address}`"
            )
        if self._at:
            return unavailable(f"the shard's broker cannot be reached: broker=`{self._at}`")
        return self._refused

    def _look_in(self, remaining_s: float) -> None:
        self._timer = self._loop.call_later(min(remaining_s, SILENCE_S), self._look)

    def _look(self) -> None:
        self._timer = None
        if not self._waiting():
            return
        now = self._loop.time()
        remaining_s = self._moved_at + self._cluster.timeout_s - now
        if remaining_s <= 0.0:
            self._timed_out(self._trouble())
            self._moved_at, remaining_s = now, self._cluster.timeout_s
        elif now - self._moved_at >= SILENCE_S:
            # A broker that stands still closes nothing: others know whether the shard has a new owner.
            self._cluster.layouts.doubt(self.topic)
        if self._waiting() and not self._stopped:
            self._look_in(remaining_s)
