"""Reading a log from its bookies: which segment, which entry, and reading ahead.

A read in progress is shared by all who ask for its offset. What was read goes to the cache's catch-up part. Nothing
beyond the end of the log, that is beyond what is confirmed, is ever returned.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Callable

from magnetar.ledger.errors import ReadError
from magnetar.ledger.read_handle import Entry, ReadHandle
from magnetar.managed_log.cache import ReadCache, StoredEntry
from magnetar.managed_log.chain import Chain, PageNeeded
from magnetar.managed_log.entry_index import EntryIndex
from magnetar.managed_log.errors import OffsetTrimmed, ReadFailed, Released
from magnetar.managed_log.owned_shard import OwnedShard
from magnetar.metadata.records import LedgerRecord, Segment
from magnetar.metadata.shards import PageNotFound
from magnetar.metadata.store import MetadataUnavailable
from magnetar.wire.entry import EntryInfo, MalformedEntry, peek_entry, split_entry

SOURCES_MAX = 32
"""Segments of one log that are kept ready for reading."""

PAGES_PER_SEARCH_MAX = 64

READS_AHEAD_MAX = 4
"""Of `read_bytes` each, under way at once for whoever reads on: the bookie reads one while the broker takes another."""
FILLED = 0.9
"""The part of `read_bytes` that entries should fill when it is guessed how many fit."""


class _Source:
    """A segment's ledger, ready for reading.

    entries_per_read   how many fit into one, by what was read last; 0 = nothing was
    """

    __slots__ = ("entries_per_read", "handle", "index", "last_entry", "segment")

    def __init__(self, segment: Segment, handle: ReadHandle, last_entry: Callable[[], int]) -> None:
        self.segment = segment
        self.handle = handle
        self.last_entry = last_entry
        self.index = EntryIndex(segment.first_offset)
        self.entries_per_read = 0

    @property
    def end_entry(self) -> int:
        return self.last_entry() + 1

    def was_read(self, entries: list[Entry], read_bytes: int) -> None:
        size_bytes = sum(len(entry.payload) for entry in entries)
        self.entries_per_read = max(1, int(FILLED * read_bytes * len(entries) / max(1, size_bytes)))


class SegmentReads:
    """See the module. `end_offset` tells how far the log is confirmed."""

    def __init__(self, shard: OwnedShard, chain: Chain, cache: ReadCache, end_offset: Callable[[], int]) -> None:
        self._shard = shard
        self._chain = chain
        self._cache = cache
        self._end_offset = end_offset
        self._sources: OrderedDict[int, _Source] = OrderedDict()
        self._reading: dict[int, asyncio.Future[list[StoredEntry]]] = {}
        shard.on_lost.append(self._stop)

    # --- what the log tells ---

    def opened(self, segment: Segment, ledger: LedgerRecord, last_entry: Callable[[], int]) -> None:
        """Entries go to this ledger; those up to `last_entry()` are confirmed."""
        handle = self._shard.client.reader(ledger, lac=last_entry)
        self._sources[segment.ledger_id] = _Source(segment, handle, last_entry)

    def appended(self, ledger_id: int, entry_id: int, entry: StoredEntry) -> None:
        source = self._sources.get(ledger_id)
        if source is not None:
            source.index.add(entry_id, entry.first_offset, entry.publish_time_us)

    def changed(self, ledger: LedgerRecord) -> None:
        """The ensemble of a ledger that is not closed has changed."""
        source = self._sources.get(ledger.ledger_id)
        if source is not None:
            source.handle.update(ledger)

    def closed(self, ledger: LedgerRecord) -> None:
        source = self._sources.get(ledger.ledger_id)
        if source is not None:
            source.handle = self._shard.client.reader(ledger, lac=None)
            source.last_entry = lambda: ledger.last_entry

    def trimmed(self, segments: tuple[Segment, ...]) -> None:
        for segment in segments:
            self._sources.pop(segment.ledger_id, None)

    def _stop(self, _: Released) -> None:
        for reading in self._reading.values():
            reading.cancel()

    # --- reading ---

    async def read(self, offset: int) -> list[StoredEntry]:
        """The entries from the one that holds the offset on, about `read_bytes` of them; at least one.

        The offset stands in the log. Raises OffsetTrimmed, ReadFailed.
        """
        reading = self._reading.get(offset)
        if reading is None:
            reading = self._begin(offset)
        try:
            return await asyncio.shield(reading)
        except asyncio.CancelledError:
            if reading.cancelled():
                self._shard.check_served()
            raise

    def read_ahead(self, offset: int) -> None:
        """Somebody will ask for this offset soon; reads it into the cache unless enough is being read."""
        busy = len(self._reading) >= self._shard.settings.read_ahead_max
        if (
            busy
            or offset in self._reading
            or offset >= self._end_offset()
            or self._cache.has(self._shard.shard_id, offset)
        ):
            return
        room = self._cache.ahead_bytes // self._shard.settings.read_bytes
        self._begin(offset, max(1, min(room, READS_AHEAD_MAX)))

    def _begin(self, offset: int, reads: int = 1) -> asyncio.Future[list[StoredEntry]]:
        reading = asyncio.ensure_future(self._read(offset, reads))
        self._reading[offset] = reading

        def done(_: asyncio.Future[list[StoredEntry]]) -> None:
            del self._reading[offset]
            if not reading.cancelled():
                reading.exception()  # a failed read ahead is nobody's problem: who wants the offset reads it again

        reading.add_done_callback(done)
        return reading

    async def _read(self, offset: int, reads: int) -> list[StoredEntry]:
        source = await self._source_at(offset)
        entry_id = await self._find_offset(source, offset)
        entries: list[StoredEntry] = []
        following = entry_id
        while not entries and entry_id < source.end_entry:
            for entry in await self._side_by_side(source, entry_id, reads):
                stored = self._store(entry)
                entry_id = entry.entry_id + 1
                if offset < stored.end_offset <= self._end_offset():
                    entries.append(stored)
                    following = entry_id
        if not entries or entries[0].first_offset > offset:
            raise ReadFailed(f"segment does not hold the offset: ledger=`{source.segment.ledger_id}` offset=`{offset}`")
        source.index.will_go_on(following, entries[-1].end_offset)
        for stored in entries:
            self._cache.put_read(self._shard.shard_id, stored)
        return entries

    async def _side_by_side(self, source: _Source, first: int, reads: int) -> list[Entry]:
        """A prefix of the entries from `first` on, by so many reads at once. What does not fit is left to the next."""
        read_bytes = self._shard.settings.read_bytes
        last, step = source.end_entry - 1, source.entries_per_read
        if reads == 1 or not step:
            found = await self._entries(source, first, last, read_bytes)
        else:
            starts = range(first, min(first + reads * step, last + 1), step)
            asked = (self._entries(source, start, min(start + step - 1, last), read_bytes) for start in starts)
            found = []
            for start, part in zip(starts, await asyncio.gather(*asked), strict=True):
                if start == first + len(found):
                    found += part
        source.was_read(found, read_bytes)
        return found

    def _store(self, entry: Entry) -> StoredEntry:
        try:
            info, batches = split_entry(entry.payload)
        except MalformedEntry as error:
            raise ReadFailed(f"entry does not parse: entry=`{entry.entry_id}` {error}") from error
        return StoredEntry(info.first_offset, info.end_offset, info.publish_time_us, batches)

    async def _entries(self, source: _Source, first: int, last: int, max_bytes: int) -> list[Entry]:
        """Reads once more after a failure if repair has moved the ledger since."""
        self._check_not_trimmed(source)
        try:
            return await source.handle.read(first, last, max_bytes)
        except ReadError as error:
            if not await self._refresh(source):
                raise self._failed(source, error) from error
        try:
            return await source.handle.read(first, last, max_bytes)
        except ReadError as error:
            raise self._failed(source, error) from error

    async def _refresh(self, source: _Source) -> bool:
        ledger_id = source.segment.ledger_id
        if ledger_id in self._shard.ledgers:
            return False
        record = await self._closed_ledger(ledger_id)
        if record is None:
            return False
        source.handle = self._shard.client.reader(record, lac=None)
        return True

    def _failed(self, source: _Source, error: ReadError) -> ReadFailed | OffsetTrimmed:
        try:
            self._check_not_trimmed(source)
        except OffsetTrimmed as trimmed:
            return trimmed
        return ReadFailed(str(error))

    def _check_not_trimmed(self, source: _Source) -> None:
        start = self._chain.start_offset
        first = source.segment.first_offset
        if first < start:
            raise OffsetTrimmed(first, start)

    # --- finding ---

    async def segment_at(self, offset: int) -> Segment | None:
        return await self._search(lambda: self._chain.segment_at(offset))

    async def _search(self, look: Callable[[], Segment | PageNeeded | None]) -> Segment | None:
        for _ in range(PAGES_PER_SEARCH_MAX):
            found = look()
            if not isinstance(found, PageNeeded):
                return found
            await self.load_page(found.page)
        raise ReadFailed(f"segments are trimmed faster than they are searched: shard=`{self._shard.shard_id}`")

    async def load_page(self, page: int) -> None:
        """Raises ReadFailed while the store is silent."""
        try:
            self._chain.add_page(page, await self._shard.metadata.page(page))
        except MetadataUnavailable as error:
            raise ReadFailed(f"older segments are not known: {error}") from error
        except PageNotFound:
            record = self._shard.record
            if record.first_page <= page < record.first_page + record.pages:
                raise ReadFailed(f"page of segments is missing: page=`{page}`") from None

    async def _source_at(self, offset: int) -> _Source:
        segment = await self.segment_at(offset)
        if segment is None:
            raise OffsetTrimmed(offset, self._chain.start_offset)
        return await self._source(segment)

    async def _source(self, segment: Segment) -> _Source:
        source = self._sources.get(segment.ledger_id)
        if source is None:
            record = await self._closed_ledger(segment.ledger_id)
            if record is None:
                if segment.first_offset < self._chain.start_offset:
                    raise OffsetTrimmed(segment.first_offset, self._chain.start_offset)
                raise ReadFailed(f"the record of a closed ledger is missing: ledger=`{segment.ledger_id}`")
            last_entry = record.last_entry
            source = _Source(segment, self._shard.client.reader(record, lac=None), lambda: last_entry)
            self._sources[segment.ledger_id] = source
        self._sources.move_to_end(segment.ledger_id)
        self._forget_oldest()
        return source

    def _forget_oldest(self) -> None:
        for ledger_id in list(self._sources):
            if len(self._sources) <= SOURCES_MAX:
                break
            if ledger_id not in self._shard.ledgers:
                del self._sources[ledger_id]

    async def _closed_ledger(self, ledger_id: int) -> LedgerRecord | None:
        try:
            return await self._shard.metadata.closed_ledger(ledger_id)
        except MetadataUnavailable as error:
            raise ReadFailed(f"the record of a closed ledger is not known: ledger=`{ledger_id}` {error}") from error

    async def _find_offset(self, source: _Source, offset: int) -> int:
        """The last entry that begins at or before the offset."""
        bracket = source.index.with_offset(offset, source.end_entry)
        if bracket.found:
            return bracket.low
        return (
            await self._first_entry(source, bracket.low + 1, bracket.high, lambda info: info.first_offset > offset) - 1
        )

    async def _first_entry(self, source: _Source, low: int, high: int, holds: Callable[[EntryInfo], bool]) -> int:
        """The first entry of low..high-1 for which the condition holds, as it does for all after it; `high` = none."""
        while low < high:
            middle = (low + high) // 2
            info = await self._info(source, middle)
            low, high = (low, middle) if holds(info) else (middle + 1, high)
        return low

    async def _info(self, source: _Source, entry_id: int) -> EntryInfo:
        entries = await self._entries(source, entry_id, entry_id, 1)
        try:
            info = peek_entry(entries[0].payload)
        except MalformedEntry as error:
            raise ReadFailed(f"entry does not parse: entry=`{entry_id}` {error}") from error
        source.index.add(entry_id, info.first_offset, info.publish_time_us)
        return info

    async def offset_at(self, time_us: int) -> int:
        """The first offset whose message was published at or after the time; the end if there is none yet."""
        segment = await self._search(lambda: self._chain.segment_before(time_us))
        if segment is None:
            return self._chain.start_offset
        source = await self._source(segment)
        end_entry = source.end_entry
        bracket = source.index.since(time_us, end_entry)
        entry_id = await self._first_entry(
            source, bracket.low, bracket.high - 1, lambda i: i.publish_time_us >= time_us
        )
        if entry_id < end_entry:
            return (await self._info(source, entry_id)).first_offset
        return self._end_offset() if segment.messages == 0 else min(segment.end_offset, self._end_offset())

    async def last_time_us(self) -> int:
        """The publish time of the newest confirmed message; 0 if the log holds none."""
        end = self._end_offset()
        if end <= self._chain.start_offset:
            return 0
        source = await self._source_at(end - 1)
        return (await self._info(source, source.end_entry - 1)).publish_time_us
