"""Who watches what, and how far each watch has come. Synchronous, and acts on nothing.

A watch holds no events, only the next revision that it has not seen. It is *synced* when it has seen everything; then
it stands in an index by key, and the next revision that concerns it makes it ready. A ready watch is served by its
stream, at the stream's pace: from the newest revisions, which are in memory, or from the tables when it is behind them.
So a slow reader costs no memory, holds up nobody, and misses nothing until the revisions it needs are compacted.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice

from magnetar.etcd.etcd_pb2 import Event, KeyValue, WatchCreateRequest
from magnetar.metadata.server.checks import span_of
from magnetar.metadata.server.evaluation import to_key_value
from magnetar.metadata.sqlite_tables import KeyChange, Revision, Span, span_of_key

WATCHES_MAX = 100_000
WINDOW_CHANGES_MAX = 10_000
WINDOW_BYTES_MAX = 32 << 20
PAGE_CHANGES_MAX = 1000
"""Changes that a watch that is behind looks at in one step."""
PAGE_BYTES_MAX = 256 << 10


@dataclass(eq=False, slots=True)
class Watch:
    """`next_revision` is the first that it may still tell. `on_ready` is called when it stops being synced."""

    watch_id: int
    span: Span
    next_revision: int
    on_ready: Callable[[Watch], None]
    puts: bool = True
    deletes: bool = True
    want_previous: bool = False
    fragment: bool = False
    progress_notify: bool = False
    synced: bool = False
    told: bool = False
    """Events were sent since the last tick of progress."""

    @property
    def keys_bytes(self) -> int:
        return len(self.span.low) + len(self.span.high or b"")

    def events(self, revision: Revision) -> Iterator[Event]:
        for change in revision.changes:
            if change.key in self.span and (self.puts if change.current else self.deletes):
                yield _to_event(change, revision.number, self.want_previous)


def watch_of(
    request: WatchCreateRequest, watch_id: int, next_revision: int, on_ready: Callable[[Watch], None]
) -> Watch:
    return Watch(
        watch_id,
        span_of(request.key or b"\0", request.range_end),
        next_revision,
        on_ready,
        puts=WatchCreateRequest.FILTER_TYPE_NO_PUT not in request.filters,
        deletes=WatchCreateRequest.FILTER_TYPE_NO_DELETE not in request.filters,
        want_previous=request.want_previous,
        fragment=request.fragment,
        progress_notify=request.progress_notify,
    )


class Watches:
    """All watches of a server, and the newest revisions. A `Feed` of the engine."""

    def __init__(self) -> None:
        self.revision = 0
        self.compacted = -1
        self.total = 0
        """Watches there are."""
        self.written_bytes = 0
        """Of all revisions it was told."""
        self._oldest = 0
        self._window: deque[Revision] = deque()
        self._window_changes = 0
        self._window_bytes = 0
        self._of_key: dict[bytes, dict[Watch, None]] = {}
        self._of_ranges: dict[Watch, None] = {}

    def start(self, oldest: int, revision: int) -> None:
        self._oldest = oldest
        self.revision = revision

    def append(self, revision: Revision) -> None:
        self.revision = revision.number
        self.written_bytes += revision.size_bytes
        self._window.append(revision)
        self._window_changes += len(revision.changes)
        self._window_bytes += revision.size_bytes
        while self._window_changes > WINDOW_CHANGES_MAX or self._window_bytes > WINDOW_BYTES_MAX:
            self._drop_oldest()
        for watch in self._concerned(revision):
            self._become_ready(watch, revision.number)

    def enter(self, watch: Watch) -> None:
        self.total += 1
        self.settle(watch)

    def leave(self, watch: Watch) -> None:
        self.total -= 1
        if watch.synced:
            watch.synced = False
            self._unindex(watch)

    def settle(self, watch: Watch) -> None:
        """The watch is synced or ready from now on."""
        if watch.next_revision > self.revision:
            watch.synced = True
            self._index(watch)[watch] = None
        else:
            watch.on_ready(watch)

    def page(self, first: int) -> list[Revision] | None:
        """Some revisions from `first` on; None if the first of them are not in memory any more."""
        if first < self._oldest:
            return None
        start = max(0, first - self._window[0].number) if self._window else 0
        return cut_page(islice(self._window, start, None))

    def _drop_oldest(self) -> None:
        dropped = self._window.popleft()
        self._window_changes -= len(dropped.changes)
        self._window_bytes -= dropped.size_bytes
        self._oldest = dropped.number + 1

    def _concerned(self, revision: Revision) -> list[Watch]:
        """The synced watches that a change of this revision is for."""
        found: dict[Watch, None] = {}
        for change in revision.changes:
            found.update(self._of_key.get(change.key, {}))
        keys = [change.key for change in revision.changes]
        for watch in self._of_ranges:
            if any(key in watch.span for key in keys):
                found[watch] = None
        return [watch for watch in found if watch.next_revision <= revision.number]

    def _become_ready(self, watch: Watch, revision: int) -> None:
        watch.synced = False
        watch.next_revision = revision
        self._unindex(watch)
        watch.on_ready(watch)

    def _index(self, watch: Watch) -> dict[Watch, None]:
        if watch.span == span_of_key(watch.span.low):
            return self._of_key.setdefault(watch.span.low, {})
        return self._of_ranges

    def _unindex(self, watch: Watch) -> None:
        index = self._index(watch)
        del index[watch]
        if not index and index is not self._of_ranges:
            del self._of_key[watch.span.low]


def cut_page(revisions: Iterator[Revision]) -> list[Revision]:
    """The first of these, as many as one step takes."""
    page: list[Revision] = []
    changes = size_bytes = 0
    for revision in revisions:
        page.append(revision)
        changes += len(revision.changes)
        size_bytes += revision.size_bytes
        if changes >= PAGE_CHANGES_MAX or size_bytes >= PAGE_BYTES_MAX:
            break
    return page


def _to_event(change: KeyChange, revision: int, want_previous: bool) -> Event:
    event = Event()
    if change.current is not None:
        event.kv.CopyFrom(to_key_value(change.current))
    else:
        event.type = Event.EVENT_TYPE_DELETE
        event.kv.CopyFrom(KeyValue(key=change.key, mod_revision=revision))
    previous = change.previous
    # What a transaction itself had put before is not what was there.
    if want_previous and previous is not None and previous.mod_revision < revision:
        event.previous.CopyFrom(to_key_value(previous))
    return event
