"""The newest changes of an engine in this process, and the watches that read them.

A watch holds no changes of its own, only the revision it has come to: whatever is slow, the history bounds the memory.
A watch that falls behind the oldest revision kept receives a Reset and ends. The position of a watch that is up to date
moves along with changes it does not watch, so that a quiet prefix never sees a Reset.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator
from itertools import islice

from magnetar.metadata.store import Change, Changes, Reset, WatchEvent

HISTORY_CHANGES_MAX = 10_000
HISTORY_BYTES_MAX = 32 << 20
REVISIONS_PER_EVENT_MAX = 256


class History:
    """Changes of the revisions `oldest` to `revision`, in order, at most one entry for each revision."""

    def __init__(self, revision: int, *, oldest: int = 0, changes_max: int = HISTORY_CHANGES_MAX) -> None:
        self.revision = revision
        self.oldest = oldest
        self._changes_max = changes_max
        self._kept: deque[Changes] = deque()
        self._kept_changes = 0
        self._kept_bytes = 0
        self._watches: dict[HistoryWatch, None] = {}
        self._closed = False

    def append(self, changes: Changes) -> None:
        """Takes the changes of the next revision, and wakes who watches them."""
        assert changes.revision == self.revision + 1 or not self._kept, "revisions have no gaps"
        self.revision = changes.revision
        self._kept.append(changes)
        self._kept_changes += len(changes.changes)
        self._kept_bytes += _size_bytes(changes)
        while self._kept_changes > self._changes_max or self._kept_bytes > HISTORY_BYTES_MAX:
            dropped = self._kept.popleft()
            self._kept_changes -= len(dropped.changes)
            self._kept_bytes -= _size_bytes(dropped)
            self.oldest = dropped.revision + 1
        for watch in self._watches:
            watch.on_append(changes)

    def since(self, revision: int) -> list[Changes]:
        """The changes at `revision` and later, REVISIONS_PER_EVENT_MAX revisions at most."""
        start = max(0, revision - self._kept[0].revision) if self._kept else 0
        return list(islice(self._kept, start, start + REVISIONS_PER_EVENT_MAX))

    def watch(self, prefix: str, from_revision: int) -> HistoryWatch:
        watch = HistoryWatch(self, prefix, from_revision)
        if self._closed:
            watch.end()
        else:
            self._watches[watch] = None
        return watch

    def forget(self, watch: HistoryWatch) -> None:
        self._watches.pop(watch, None)

    def close(self) -> None:
        """Ends all watches."""
        self._closed = True
        for watch in list(self._watches):
            watch.end()


class HistoryWatch:
    """See `store.Watch`. One task at a time may iterate it."""

    def __init__(self, history: History, prefix: str, from_revision: int) -> None:
        self._history = history
        self._prefix = prefix
        self._next_revision = from_revision
        self._ended = False
        self._wake: asyncio.Future[None] | None = None

    def __aiter__(self) -> AsyncIterator[WatchEvent]:
        return self

    async def __anext__(self) -> WatchEvent:
        while not self._ended:
            event = self._take()
            if event is not None:
                return event
            assert self._wake is None, "one task at a time may iterate a watch"
            self._wake = asyncio.get_running_loop().create_future()
            try:
                await self._wake
            finally:
                self._wake = None
        raise StopAsyncIteration

    async def close(self) -> None:
        self.end()

    def end(self) -> None:
        self._ended = True
        self._history.forget(self)
        self._notify()

    def on_append(self, changes: Changes) -> None:
        if self._next_revision == changes.revision and not self._matching([changes]):
            self._next_revision += 1
        else:
            self._notify()

    def _notify(self) -> None:
        if self._wake is not None and not self._wake.done():
            self._wake.set_result(None)

    def _matching(self, revisions: list[Changes]) -> tuple[Change, ...]:
        return tuple(c for revision in revisions for c in revision.changes if c.key.startswith(self._prefix))

    def _take(self) -> WatchEvent | None:
        """The next event, or None if there is nothing new."""
        if self._next_revision < self._history.oldest:
            self.end()
            return Reset()
        while self._next_revision <= self._history.revision:
            revisions = self._history.since(self._next_revision)
            if not revisions:
                self._next_revision = self._history.revision + 1
                break
            changes = self._matching(revisions)
            self._next_revision = revisions[-1].revision + 1
            if changes:
                return Changes(changes, revisions[-1].revision)
        return None


def _size_bytes(changes: Changes) -> int:
    return sum(len(c.key) + (len(c.current.value) if c.current is not None else 0) for c in changes.changes)
