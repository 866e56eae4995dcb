"""Trimming a shard's log: segments that nobody needs any more are unlinked and deleted, oldest first.

1. With subscriptions, what all of them have acknowledged durably can go; without one, what is older than
   `retention_unsubscribed_s`.
2. Nothing goes that the last durable snapshot of the producers' table does not cover: the next owner rebuilds the table
   from it and the messages after it. If that stands in the way, a snapshot is written first.
3. Ledgers are deleted in the transaction that unlinks them; bookies collect what no record names.
4. Cursors move while a trim reads: what goes is looked at once more when its transaction is made, and from then on no
   cursor may begin below `start_offset`. A floor below the log could never be acknowledged.
5. The open segment goes too once everything in it is acknowledged: it is ended if its size is worth it.
"""

from __future__ import annotations

from dataclasses import replace

from magnetar.managed_log.appender import Appender
from magnetar.managed_log.chain import Chain, PageNeeded, Trimmed, boundary_before, drop_oldest, trimmable_below
from magnetar.managed_log.cursor_ledger import CursorLedger
from magnetar.managed_log.deletion import fitting
from magnetar.managed_log.errors import ReadFailed
from magnetar.managed_log.owned_shard import OwnedShard
from magnetar.managed_log.segment_reads import SegmentReads
from magnetar.metadata.records import LedgerRecord, Segment, ShardRecord
from magnetar.metadata.shards import ShardChange
from magnetar.metadata.store import MetadataUnavailable


class Trimmer:
    """See the module. One trim at a time; a call meanwhile does nothing.

    start_offset   where the log begins, or will when the transaction under way is applied
    """

    def __init__(
        self, shard: OwnedShard, chain: Chain, appender: Appender, cursors: CursorLedger, reads: SegmentReads
    ) -> None:
        self._shard = shard
        self._chain = chain
        self._appender = appender
        self._cursors = cursors
        self._reads = reads
        self._busy = False
        self.start_offset = shard.record.start_offset

    def due(self) -> bool:
        """A cheap look at whether cursors have moved so far that `trim` would find something."""
        floor = self._cursors.table.safe_floor()
        oldest = self._chain.oldest()
        if self._busy or floor is None:
            return False
        return isinstance(oldest, PageNeeded) or trimmable_below(oldest, floor) > 0

    async def trim(self) -> int:
        """Returns how many segments went. Raises ReadFailed while the store is silent, LogReleased."""
        if self._busy:
            return 0
        self._busy = True
        try:
            self._end_open_segment()
            trimmed = 0
            while count := await self._trim_some():
                trimmed += count
            return trimmed
        finally:
            self._busy = False

    def _end_open_segment(self) -> None:
        if self._appender.open_bytes >= self._shard.settings.trim_open_bytes:
            self.end_acknowledged()

    def end_acknowledged(self) -> bool:
        """Has the open segment ended if everything in it is acknowledged: a trim then finds it. False if it is not."""
        appender = self._appender
        floor = self._cursors.table.safe_floor()
        acknowledged = floor is not None and floor >= appender.end_offset and appender.idle
        if acknowledged and appender.open_bytes:
            appender.end_segment()
        return acknowledged and appender.open_bytes > 0

    async def _trim_some(self) -> int:
        oldest = await self._oldest()
        boundary = await self._boundary(oldest)
        if trimmable_below(oldest, boundary) > trimmable_below(oldest, self._cursors.covered_offset):
            await self._cursors.store_snapshot()
        count = trimmable_below(oldest, min(boundary, self._cursors.covered_offset))
        if count == 0:
            return 0
        ledgers = await self._ledgers(oldest[:count])
        count = min(count, fitting(ledgers))
        floor_time_us = 0
        if self._is_all(oldest, count):
            floor_time_us = await self._appender.learn_last_time()
        return await self._drop(oldest, count, ledgers[:count], floor_time_us)

    async def _oldest(self) -> tuple[Segment, ...]:
        while isinstance(found := self._chain.oldest(), PageNeeded):
            await self._reads.load_page(found.page)
        return found

    async def _boundary(self, oldest: tuple[Segment, ...]) -> int:
        floor = self._cursors.table.safe_floor()
        if floor is not None:
            return floor
        if not oldest or oldest[-1].messages == 0:
            next_time_us = 0
        elif (following := await self._reads.segment_at(oldest[-1].end_offset)) is not None and following is not oldest[
            -1
        ]:
            next_time_us = self._chain.first_time_us(following) or self._appender.last_time_us
        else:
            next_time_us = await self._appender.learn_last_time()
        keep_from_us = self._shard.now_us() - int(self._shard.settings.retention_unsubscribed_s * 1_000_000)
        return boundary_before(oldest, keep_from_us, next_time_us)

    async def _ledgers(self, segments: tuple[Segment, ...]) -> list[LedgerRecord]:
        ids = [segment.ledger_id for segment in segments]
        try:
            found = await self._shard.metadata.closed_ledgers(ids)
        except MetadataUnavailable as error:
            raise ReadFailed(f"records of old ledgers are not known: {error}") from error
        missing = [ledger_id for ledger_id in ids if ledger_id not in found]
        if missing:
            raise ReadFailed(f"records of old ledgers are missing: ledgers=`{missing}`")
        return [found[ledger_id] for ledger_id in ids]

    def _is_all(self, oldest: tuple[Segment, ...], count: int) -> bool:
        return self._shard.record.pages == 0 and count == len(oldest)

    async def _drop(
        self, oldest: tuple[Segment, ...], count: int, ledgers: list[LedgerRecord], floor_time_us: int
    ) -> int:
        """One transaction. Returns 0 if chain or cursors have changed meanwhile: there is nothing to hurry."""
        dropped: Trimmed | None = None

        def build(record: ShardRecord) -> ShardChange | None:
            nonlocal dropped
            current = record.segments if record.pages == 0 else self._chain.oldest()
            if isinstance(current, PageNeeded) or current[:count] != oldest[:count]:
                return None
            floor = self._cursors.table.safe_floor()
            if floor is not None and floor < oldest[count - 1].end_offset:
                return None
            dropped = drop_oldest(record, current, count)
            after = dropped.record
            self.start_offset = after.start_offset
            if not after.segments and not after.pages:
                # Nothing is left to tell when the last message was published, and no later one may be older.
                last_us = max(after.floor_time_us, floor_time_us, self._appender.last_time_us)
                after = replace(after, floor_time_us=last_us)
            return ShardChange(
                after, delete_ledgers=tuple(ledgers), put_pages=dropped.put_pages, delete_pages=dropped.delete_pages
            )

        page = self._shard.record.first_page if self._shard.record.pages else None
        if not await self._shard.change(build) or dropped is None:
            return 0
        if page is not None:
            self._chain.drop_page(page)
        self._reads.trimmed(dropped.segments)
        return count
