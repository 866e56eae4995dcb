"""Watches of a server elsewhere: what its answers mean, and the stream that is opened again after every break."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable

import structlog

from magnetar.etcd import etcd_pb2 as pb
from magnetar.metadata.backoff import Backoff
from magnetar.metadata.etcd_channel import WATCH, Connection, EtcdChannel, Stream, Unanswered
from magnetar.metadata.etcd_codec import BadAnswer, change, prefix_range
from magnetar.metadata.store import Change, Changes, MetadataError, Reset, WatchEvent

EVENTS_WAITING_MAX = 16
"""Events that are held for a slow consumer; then the stream is not read, and the server has to hold the rest."""
FRAGMENTS_BYTES_MAX = 64 << 20
"""A group of fragments beyond it is given up: the watch is reset."""
CHANGE_BYTES = 64
"""Counted for a change beside its key and value."""

log = structlog.get_logger(__name__)


class WatchCanceled(Exception):
    """The server ended the watch for a reason of its own."""


class WatchPosition:
    """How far a watch has come, and what the next answer of its stream means. Pure.

    1. A stream begins at the revision after the last whole one that was delivered.
    2. Fragments are held until the last one is there, and dropped when the stream breaks in between.
    3. Only what the server says about this watch moves the position. A progress answer for all watches of a stream does
       not: etcd before 3.5.8 sends it ahead of events that are still to come.
    """

    def __init__(self, prefix: str, from_revision: int) -> None:
        self.next_revision = max(1, from_revision)
        self._prefix = prefix
        self._watch_id: int | None = None
        self._held: list[Change] = []
        self._held_bytes = 0

    def begin(self) -> pb.WatchRequest:
        """The first request of a new stream."""
        self._watch_id = None
        self._drop_held()
        key, range_end = prefix_range(self._prefix)
        return pb.WatchRequest(
            create=pb.WatchCreateRequest(
                key=key,
                range_end=range_end,
                start_revision=self.next_revision,
                progress_notify=True,
                fragment=True,
            )
        )

    @property
    def created(self) -> bool:
        return self._watch_id is not None

    def on_answer(self, answer: pb.WatchResponse) -> WatchEvent | None:
        """What to deliver, if anything. After a Reset the watch is over. Raises WatchCanceled, BadAnswer."""
        if answer.compact_revision:
            return Reset()
        if answer.canceled:
            raise WatchCanceled(answer.cancel_reason or "no reason given")
        if answer.created:
            self._watch_id = answer.watch_id
        if answer.watch_id != self._watch_id:
            if answer.events:
                raise BadAnswer(f"it sent events of another watch: watch=`{answer.watch_id}`")
            return None
        if answer.events or answer.fragment:
            return self._on_events(answer)
        if not answer.created and not self._held:
            self.next_revision = max(self.next_revision, answer.header.revision + 1)
        return None

    def _on_events(self, answer: pb.WatchResponse) -> WatchEvent | None:
        self._hold(answer)
        if self._held_bytes > FRAGMENTS_BYTES_MAX:
            self._drop_held()
            return Reset()
        if answer.fragment or not self._held:
            return None
        changes = tuple(self._held)
        self._drop_held()
        self.next_revision = changes[-1].revision + 1
        return Changes(changes, changes[-1].revision)

    def _hold(self, answer: pb.WatchResponse) -> None:
        for event in answer.events:
            found = change(event)
            if not found.key.startswith(self._prefix):
                raise BadAnswer(f"it sent a change that is not watched: key=`{found.key}` prefix=`{self._prefix}`")
            if self._held and found.revision < self._held[-1].revision:
                raise BadAnswer(f"it sent changes out of order: revision=`{found.revision}`")
            if found.revision >= self.next_revision:  # else it was delivered before
                self._held.append(found)
                self._held_bytes += CHANGE_BYTES + len(event.kv.key) + len(event.kv.value)

    def _drop_held(self) -> None:
        self._held = []
        self._held_bytes = 0


class EtcdWatch:
    """See `store.Watch`. One task at a time may iterate it."""

    def __init__(
        self, channel: EtcdChannel, prefix: str, from_revision: int, on_close: Callable[[EtcdWatch], None]
    ) -> None:
        self._channel = channel
        self._prefix = prefix
        self._position = WatchPosition(prefix, from_revision)
        self._on_close = on_close
        self._backoff = Backoff(channel.rng)
        # None is the end.
        self._events: asyncio.Queue[WatchEvent | Exception | None] = asyncio.Queue(EVENTS_WAITING_MAX)
        self._ended = channel.closed
        self._pump = asyncio.create_task(self._run(), name=f"metadata-watch {prefix}")

    @property
    def waiting(self) -> int:
        """Events that have come and were not taken."""
        return self._events.qsize()

    def __aiter__(self) -> AsyncIterator[WatchEvent]:
        return self

    async def __anext__(self) -> WatchEvent:
        event = None if self._ended else await self._events.get()
        if event is None:
            self._ended = True
            raise StopAsyncIteration
        if isinstance(event, Exception):
            self._ended = True
            raise event
        if isinstance(event, Reset):
            self._ended = True
        return event

    async def close(self) -> None:
        self._ended = True
        self._on_close(self)
        self._pump.cancel()
        await asyncio.gather(self._pump, return_exceptions=True)
        while not self._events.empty():
            self._events.get_nowait()
        self._events.put_nowait(None)

    async def _run(self) -> None:
        try:
            over = False
            while not over:
                over = await self._follow()
                if not over:
                    await asyncio.sleep(self._backoff.next_s())
        except MetadataError as error:
            await self._events.put(None if self._channel.closed else error)
        except Exception as error:
            log.exception("a watch failed", prefix=self._prefix)
            await self._events.put(MetadataError(f"a watch failed: prefix=`{self._prefix}` error=`{error!r}`"))

    async def _follow(self) -> bool:
        """Delivers what one stream brings. True if the watch is over, False if the stream is to be opened again."""
        connection = await self._channel.connected(None)
        stream: Stream[pb.WatchResponse] | None = None
        try:
            stream = connection.stream(WATCH)
            return await self._read(connection, stream)
        except WatchCanceled as error:
            log.warning("a watch was canceled", prefix=self._prefix, reason=str(error))
        except TimeoutError:
            self._channel.leave(connection, "a watch was not begun in time")
        except (Unanswered, BadAnswer) as error:
            self._channel.leave(connection, str(error))
        finally:
            if stream is not None:
                stream.close()
        return False

    async def _read(self, connection: Connection, stream: Stream[pb.WatchResponse]) -> bool:
        async with asyncio.timeout(self._channel.times.attempt_s):
            await stream.send(self._position.begin())
            event = self._position.on_answer(await stream.receive())
        while not isinstance(event, Reset):
            if event is not None:
                await self._events.put(event)
            if self._position.created:
                self._backoff = Backoff(self._channel.rng)
            event = self._position.on_answer(await stream.receive())
        await self._events.put(event)
        return True
