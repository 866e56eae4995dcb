"""One stream of the Watch service: it reads requests, and serves its ready watches one page at a time, in turns.

Answers to requests go before events. So the answer that tells a watch's creation comes before its first event, and
nothing comes after the one that tells its end.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Iterator

from magnetar.etcd.etcd_pb2 import (
    Event,
    ResponseHeader,
    WatchCreateRequest,
    WatchRequest,
    WatchResponse,
)
from magnetar.metadata.server.refusals import Reason, Refusal
from magnetar.metadata.server.watches import WATCHES_MAX, Watch, Watches, watch_of
from magnetar.metadata.sqlite_tables import Revision
from magnetar.node.rpc import ServerStream, parse

WATCHES_PER_STREAM_MAX = 10_000
KEYS_BYTES_PER_STREAM_MAX = 8 << 20
"""Of the keys that its watches are for."""
WAITING_ANSWERS_MAX = 16
"""A client that asks faster than it reads is not read any more."""
FRAGMENT_BYTES_MAX = 2 << 20
LAST_WRITE_S = 5.0

EMPTY_RANGE = "mvcc: watcher range is empty"
DUPLICATE_ID = "mvcc: duplicate watch ID provided on the WatchStream"
TOO_MANY_WATCHES = "etcdserver: too many watches"

ReadPage = Callable[[int], Awaitable[list[Revision] | None]]


class WatchStream:
    """`read_page` reads older revisions from the tables; None = they are compacted."""

    def __init__(
        self, stream: ServerStream, watches: Watches, read_page: ReadPage, header: Callable[[int], ResponseHeader]
    ) -> None:
        self._stream = stream
        self._all = watches
        self._read_page = read_page
        self._header = header
        self._watches: dict[int, Watch] = {}
        self._ready: dict[Watch, None] = {}
        self._answers: deque[WatchResponse] = deque()
        self._answers_space = asyncio.Event()
        self._progress_of: list[Watch] = []
        self._progress_at: int | None = None
        """Tell the client once all of its watches have come to this revision."""
        self._keys_bytes = 0
        self._next_id = 0
        self._ended = False
        self._wake = asyncio.Event()

    async def run(self) -> None:
        """Until the client ends it. A client that only stops sending still receives."""
        reader = asyncio.create_task(self._read(), name="watch-read")
        writer = asyncio.create_task(self._write(), name="watch-write")
        try:
            done, _ = await asyncio.wait((reader, writer), return_when=asyncio.FIRST_EXCEPTION)
            for task in done:
                task.result()
        finally:
            watches, self._watches = self._watches, {}
            for watch in watches.values():
                self._all.leave(watch)
            reader.cancel()
            # gRPC never sends the status of a call whose write was cut off: that one is given time to end.
            self.end()
            await asyncio.wait((writer,), timeout=LAST_WRITE_S)
            writer.cancel()
            await asyncio.gather(reader, writer, return_exceptions=True)

    def tell_progress(self) -> None:
        """Has every watch that asked for it, and is quiet, told how far it has come."""
        self._progress_of = [w for w in self._watches.values() if w.progress_notify and not w.told]
        for watch in self._watches.values():
            watch.told = False
        self._wake.set()

    def end(self) -> None:
        """Ends it with an error that has the client go elsewhere."""
        self._ended = True
        self._wake.set()

    # Requests.

    async def _read(self) -> None:
        while (data := await self._stream.read()) is not None:
            request = parse(WatchRequest, data)
            match request.WhichOneof("request"):
                case "create":
                    self._create(request.create)
                case "cancel":
                    self._cancel(request.cancel.watch_id)
                case "progress":
                    self._progress_at = self._all.revision
            self._wake.set()
            while len(self._answers) >= WAITING_ANSWERS_MAX:
                self._answers_space.clear()
                await self._answers_space.wait()

    def _create(self, request: WatchCreateRequest) -> None:
        next_revision = request.start_revision or self._all.revision + 1
        watch = watch_of(request, request.watch_id or self._free_id(), next_revision, self._on_ready)
        answer = WatchResponse(header=self._header(self._all.revision), watch_id=watch.watch_id, created=True)
        refusal = self._refusal(watch)
        if refusal:
            answer.watch_id = -1
            answer.canceled = True
            answer.cancel_reason = refusal
        self._answers.append(answer)
        if not refusal:
            self._watches[watch.watch_id] = watch
            self._keys_bytes += watch.keys_bytes
            self._all.enter(watch)

    def _refusal(self, watch: Watch) -> str:
        if watch.span.high is not None and watch.span.high <= watch.span.low:
            return EMPTY_RANGE
        if watch.watch_id in self._watches:
            return DUPLICATE_ID
        many = len(self._watches) >= WATCHES_PER_STREAM_MAX or self._all.total >= WATCHES_MAX
        large = self._keys_bytes + watch.keys_bytes > KEYS_BYTES_PER_STREAM_MAX
        return TOO_MANY_WATCHES if many or large else ""

    def _free_id(self) -> int:
        while self._next_id in self._watches:
            self._next_id += 1
        self._next_id += 1
        return self._next_id - 1

    def _cancel(self, watch_id: int) -> None:
        watch = self._watches.get(watch_id)
        if watch is not None:
            self._forget(watch)
            header = self._header(self._all.revision)
            self._answers.append(WatchResponse(header=header, watch_id=watch_id, canceled=True))

    def _forget(self, watch: Watch) -> None:
        del self._watches[watch.watch_id]
        self._keys_bytes -= watch.keys_bytes
        self._ready.pop(watch, None)
        self._all.leave(watch)

    def _on_ready(self, watch: Watch) -> None:
        self._ready[watch] = None
        self._wake.set()

    # Answers and events.

    async def _write(self) -> None:
        while True:
            await self._wake.wait()
            self._wake.clear()
            while not self._ended and (self._answers or self._ready or self._progress_is_due()):
                await self._write_next()
            if self._ended:
                raise Refusal(Reason.STOPPED)
            await self._write_progress()

    async def _write_next(self) -> None:
        if self._answers:
            answer = self._answers.popleft()
            self._answers_space.set()
            await self._send(answer)
        elif self._progress_is_due():
            header = self._header(self._progress_at or 0)
            self._progress_at = None
            await self._send(WatchResponse(header=header, watch_id=-1))
        else:
            watch = next(iter(self._ready))
            del self._ready[watch]
            await self._serve(watch)

    async def _serve(self, watch: Watch) -> None:
        """Sends the next page of a ready watch; afterwards it is synced, or ready again, or gone."""
        page = None
        if watch.next_revision >= self._all.compacted:
            page = self._all.page(watch.next_revision)
            if page is None:
                page = await self._read_page(watch.next_revision)
                if self._watches.get(watch.watch_id) is not watch:
                    return
        if page is None:
            self._forget(watch)
            answer = WatchResponse(header=self._header(self._all.revision), watch_id=watch.watch_id, canceled=True)
            answer.compact_revision = self._all.compacted
            await self._send(answer)
            return
        events = [event for revision in page for event in watch.events(revision)]
        seen = page[-1].number if page else self._all.revision
        watch.next_revision = max(watch.next_revision, seen + 1)
        # Before anything is awaited: a revision that is made meanwhile finds it synced, or it is ready anyhow.
        self._all.settle(watch)
        if events:
            watch.told = True
            for answer in self._cut(watch, events, seen):
                await self._send(answer)

    async def _write_progress(self) -> None:
        watches, self._progress_of = self._progress_of, []
        for watch in watches:
            if watch.synced:
                await self._send(WatchResponse(header=self._header(self._all.revision), watch_id=watch.watch_id))

    def _progress_is_due(self) -> bool:
        wanted = self._progress_at
        return wanted is not None and all(w.next_revision > wanted or w.synced for w in self._watches.values())

    def _cut(self, watch: Watch, events: list[Event], seen: int) -> Iterator[WatchResponse]:
        """One answer, or several if the client takes fragments and it is large."""
        start = size_bytes = 0
        for i, event in enumerate(events):
            event_bytes = event.ByteSize()
            if watch.fragment and i > start and size_bytes + event_bytes > FRAGMENT_BYTES_MAX:
                yield self._events_answer(watch, events[start:i], seen, fragment=True)
                start, size_bytes = i, 0
            size_bytes += event_bytes
        yield self._events_answer(watch, events[start:], seen, fragment=False)

    def _events_answer(self, watch: Watch, events: list[Event], seen: int, *, fragment: bool) -> WatchResponse:
        return WatchResponse(header=self._header(seen), watch_id=watch.watch_id, fragment=fragment, events=events)

    async def _send(self, answer: WatchResponse) -> None:
        await self._stream.write(answer.SerializeToString())
