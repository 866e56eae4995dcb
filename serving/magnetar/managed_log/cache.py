"""The read cache of a broker: entries of all its shards' logs, bounded by bytes. Pure.

What was just appended (the tail) and what was read from bookies (catch-up) have budgets of their own, so that reading
history does not evict what all tailing subscriptions are about to ask for. Each evicts what came first.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Sequence

from magnetar.wire.entry import EntryBatch

CATCH_UP_PART = 0.25
ENTRY_BYTES_OVERHEAD = 512
"""What an entry costs beyond its batches, about."""

_TRIM_HEAD_AT = 256


class StoredEntry:
    """A durable entry of a log, as readers get it. `size` counts bytes of batches and selections."""

    __slots__ = ("batches", "end_offset", "first_offset", "publish_time_us", "size")

    def __init__(self, first_offset: int, end_offset: int, publish_time_us: int, batches: Sequence[EntryBatch]) -> None:
        self.first_offset = first_offset
        self.end_offset = end_offset
        self.publish_time_us = publish_time_us
        self.batches = batches
        self.size = sum(len(batch.batch) + len(batch.selection) for batch in batches)

    def __repr__(self) -> str:
        return f"StoredEntry({self.first_offset}..{self.end_offset}, {len(self.batches)} batches)"


_GONE = StoredEntry(0, 0, 0, ())


class _Run:
    """Some entries of one shard in the order of their offsets. Its first ones go most often: they are cut lazily."""

    __slots__ = ("entries", "first_offsets", "head")

    def __init__(self) -> None:
        self.first_offsets: list[int] = []
        self.entries: list[StoredEntry] = []
        self.head = 0

    def insert(self, entry: StoredEntry) -> bool:
        """Returns False if it is there."""
        if len(self.first_offsets) == self.head or entry.first_offset > self.first_offsets[-1]:
            self.first_offsets.append(entry.first_offset)
            self.entries.append(entry)
            return True
        at = bisect_right(self.first_offsets, entry.first_offset, lo=self.head)
        if at > self.head and self.first_offsets[at - 1] == entry.first_offset:
            return False
        self.first_offsets.insert(at, entry.first_offset)
        self.entries.insert(at, entry)
        return True

    def covering(self, offset: int) -> int:
        """The position of the entry that holds the offset, -1 = none."""
        at = bisect_right(self.first_offsets, offset, lo=self.head) - 1
        return at if at >= self.head and self.entries[at].end_offset > offset else -1

    def remove(self, first_offset: int) -> None:
        at = bisect_right(self.first_offsets, first_offset, lo=self.head) - 1
        assert at >= self.head
        assert self.first_offsets[at] == first_offset
        if at > self.head:
            del self.first_offsets[at], self.entries[at]
            return
        self.entries[at] = _GONE  # what was cut must not hold its bytes until the head is
        self.head += 1
        if self.head >= _TRIM_HEAD_AT or self.head == len(self.entries):
            del self.first_offsets[: self.head], self.entries[: self.head]
            self.head = 0


class _Region:
    """Entries with one budget. The oldest go first; `_order` also says which shard's run holds them."""

    def __init__(self, capacity_bytes: int) -> None:
        self.capacity_bytes = capacity_bytes
        self.size_bytes = 0
        self.runs: dict[int, _Run] = {}
        self._order: OrderedDict[tuple[int, int], int] = OrderedDict()

    def put(self, shard_id: int, entry: StoredEntry) -> None:
        cost = entry.size + ENTRY_BYTES_OVERHEAD
        if cost > self.capacity_bytes:
            return
        run = self.runs.get(shard_id)
        if run is None:
            run = self.runs[shard_id] = _Run()
        if not run.insert(entry):
            return
        self._order[shard_id, entry.first_offset] = cost
        self.size_bytes += cost
        while self.size_bytes > self.capacity_bytes:
            oldest, _ = next(iter(self._order.items()))
            self._remove(*oldest)

    def _remove(self, shard_id: int, first_offset: int) -> None:
        self.size_bytes -= self._order.pop((shard_id, first_offset))
        run = self.runs[shard_id]
        run.remove(first_offset)
        if len(run.entries) == run.head:
            del self.runs[shard_id]

    def forget(self, shard_id: int) -> None:
        run = self.runs.get(shard_id)
        if run is not None:
            for entry in run.entries[run.head :]:
                self.size_bytes -= self._order.pop((shard_id, entry.first_offset))
            del self.runs[shard_id]


class ReadCache:
    """See the module's rules. Shared by the logs of a broker."""

    def __init__(self, capacity_bytes: int, catch_up_part: float = CATCH_UP_PART) -> None:
        catch_up_bytes = int(capacity_bytes * catch_up_part)
        self._tail = _Region(capacity_bytes - catch_up_bytes)
        self._catch_up = _Region(catch_up_bytes)
        self.hits = 0
        self.misses = 0

    @property
    def size_bytes(self) -> int:
        return self._tail.size_bytes + self._catch_up.size_bytes

    @property
    def ahead_bytes(self) -> int:
        """What may be read ahead for each shard whose history is read, so that nothing goes before it was asked for."""
        return self._catch_up.capacity_bytes // 2 // max(1, len(self._catch_up.runs))

    def put_appended(self, shard_id: int, entry: StoredEntry) -> None:
        self._tail.put(shard_id, entry)

    def put_read(self, shard_id: int, entry: StoredEntry) -> None:
        self._catch_up.put(shard_id, entry)

    def get(self, shard_id: int, offset: int, max_bytes: int) -> list[StoredEntry]:
        """Entries from the one that holds the offset on, without gap, until `max_bytes` are exceeded; [] = not here."""
        found: list[StoredEntry] = []
        while max_bytes > 0:
            more = self._following(self._tail, shard_id, offset, max_bytes)
            if not more:
                more = self._following(self._catch_up, shard_id, offset, max_bytes)
            if not more:
                break
            found += more
            offset = more[-1].end_offset
            max_bytes -= sum(entry.size for entry in more)
        if found:
            self.hits += 1
        else:
            self.misses += 1
        return found

    def has(self, shard_id: int, offset: int) -> bool:
        runs = (self._tail.runs.get(shard_id), self._catch_up.runs.get(shard_id))
        return any(run is not None and run.covering(offset) >= 0 for run in runs)

    def forget(self, shard_id: int) -> None:
        self._tail.forget(shard_id)
        self._catch_up.forget(shard_id)

    @staticmethod
    def _following(region: _Region, shard_id: int, offset: int, max_bytes: int) -> list[StoredEntry]:
        run = region.runs.get(shard_id)
        at = -1 if run is None else run.covering(offset)
        found: list[StoredEntry] = []
        if run is None or at < 0:
            return found
        while at < len(run.entries) and max_bytes > 0:
            entry = run.entries[at]
            if found and entry.first_offset != found[-1].end_offset:
                break
            found.append(entry)
            max_bytes -= entry.size
            at += 1
        return found
