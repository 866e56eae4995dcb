"""The log of a shard: the endless sequence of its messages, and the cursors in it, while this broker owns the shard.

    append -> Appender -> WriteHandle -> bookies           one entry for all that is queued; confirmed in order
    read   <- ReadCache <- SegmentReads <- bookies         never beyond what is confirmed
    ack    -> CursorTable -> CursorLedger -> bookies       in memory at once, durable in groups

What it does in the metadata store goes through one OwnedShard. Without work it has no task.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType

from magnetar.ledger.client import LedgerClient, Standing
from magnetar.ledger.write_handle import SETTLE_S, WriteHandle
from magnetar.managed_log.appender import AppendedEntry, Appender, PendingBatch
from magnetar.managed_log.cache import ReadCache, StoredEntry
from magnetar.managed_log.chain import Chain, link_segment
from magnetar.managed_log.cursor import RANGE_MESSAGES_MAX, AckBeyondEnd, Cursor, CursorNotFound, InvalidAck, Range
from magnetar.managed_log.cursor_ledger import CursorLedger, FinishedCursors, ProducerSnapshot
from magnetar.managed_log.deletion import delete_shard
from magnetar.managed_log.errors import (
    LogDamaged,
    LogError,
    LogReleased,
    LogUndecided,
    OffsetTrimmed,
    ReadFailed,
    Released,
)
from magnetar.managed_log.owned_shard import OwnedShard
from magnetar.managed_log.segment_reads import SegmentReads
from magnetar.managed_log.settings import LogSettings
from magnetar.managed_log.takeover import Inheritance, TakenOver, end_ledgers, inherit, take_over
from magnetar.managed_log.trimming import Trimmer
from magnetar.metadata.ids import IdBlocks
from magnetar.metadata.records import (
    VACANT,
    LedgerPurpose,
    LedgerRecord,
    LedgerState,
    Owner,
    Segment,
    ShardRecord,
    SubscriptionType,
)
from magnetar.metadata.shards import OutcomeUnknown, OwnershipLost, SessionEnded, ShardChange, ShardMetadata
from magnetar.metadata.store import MetadataUnavailable
from magnetar.wire.entry import EntryBatch

__all__ = [
    "AckBeyondEnd",
    "Cursor",
    "CursorNotFound",
    "Inheritance",
    "InvalidAck",
    "LogDamaged",
    "LogError",
    "LogFacts",
    "LogReleased",
    "LogSettings",
    "LogUndecided",
    "ManagedLog",
    "OffsetTrimmed",
    "PendingBatch",
    "ReadCache",
    "ReadFailed",
    "Released",
    "SegmentFacts",
    "StoredEntry",
]


CLOSED = Released(None, "the log was closed")

PASS_SETTLE_S = 0.1
"""How long a log that is passed on waits for bookies beyond the ack quorum: producers wait meanwhile."""

INHERITED_BYTES_MAX = 2 << 20
"""Of cursors and producers that go with a shard that is passed on; a larger state is read from its ledger."""

STANDING_S = 2.0
"""For bookies to say whether a ledger was fenced."""


@dataclass(frozen=True, slots=True)
class SegmentFacts:
    """A segment for an operator. Of the open one the counts are of this moment."""

    ledger_id: int
    first_offset: int
    first_time_us: int
    messages: int
    bytes: int
    state: LedgerState
    ensemble: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class LogFacts:
    """A log for an operator. `segments`: those that the shard record lists; older ones stand in `pages` pages."""

    shard_id: int
    epoch: int
    start_offset: int
    end_offset: int
    segments: tuple[SegmentFacts, ...]
    pages: int
    queued_bytes: int
    write_state: str
    waiting_for: str
    """Why entries wait for bookies; empty if they do not."""
    cursor_ledger: int


class ManagedLog:
    """One shard's log. Get it from `open`.

    on_appended      called once per confirmed group, in order, after `end_offset` moved; the batches know their offsets
    on_end           called after each move of `end_offset`
    producer_chunks, producers_covered_offset   the producers' table as of the last durable snapshot at opening, until a
                     producer_snapshot is set
    """

    def __init__(self, shard: OwnedShard, cache: ReadCache, taken: TakenOver) -> None:
        self._shard = shard
        self._cache = cache
        self._chain = Chain(shard.record)
        self.on_appended: Callable[[list[PendingBatch]], None] = lambda batches: None
        self.on_end: list[Callable[[], None]] = []
        self.producer_chunks = taken.replay.producers
        self.producers_covered_offset = taken.replay.covered_offset
        self._appender = Appender(shard, self._chain, taken.end_offset, self)
        self._reads = SegmentReads(shard, self._chain, cache, lambda: self._appender.end_offset)
        self._cursors = CursorLedger(shard, taken.replay, self._unchanged_producers, self._cursors_stored)
        self._trimmer = Trimmer(shard, self._chain, self._appender, self._cursors, self._reads)
        self._end_moved: asyncio.Future[None] | None = None
        self._closing = False
        shard.on_changed.append(self._record_changed)
        shard.on_ensemble.append(self._reads.changed)
        shard.on_lost.append(self._stopped)
        cache.forget(shard.shard_id)

    @classmethod
    async def open(
        cls,
        metadata: ShardMetadata,
        ledgers: LedgerClient,
        ids: IdBlocks,
        cache: ReadCache,
        settings: LogSettings,
        now_us: Callable[[], int],
        on_released: Callable[[Released], None],
    ) -> ManagedLog:
        """Takes over the log of a shard that `metadata` has claimed; its open ledgers are recovered on return.

        `on_released` is called once when the shard is lost, also if that is found out here.
        Raises LogReleased; LogUndecided and ReadFailed (try again); LogDamaged.
        """
        shard = OwnedShard(metadata, ledgers, ids, settings, now_us, on_released)
        return cls(shard, cache, await take_over(shard))

    @staticmethod
    async def settle(
        metadata: ShardMetadata,
        ledgers: LedgerClient,
        ids: IdBlocks,
        settings: LogSettings,
        now_us: Callable[[], int],
    ) -> None:
        """Recovers and closes what the former owner of a shard that `metadata` has claimed left open, without opening
        the log: then it is as after `rest`. Raises as `open`.
        """
        shard = OwnedShard(metadata, ledgers, ids, settings, now_us, lambda released: None)
        try:
            await end_ledgers(shard)
        finally:
            shard.abandon(CLOSED)

    @classmethod
    async def open_passed_on(
        cls,
        metadata: ShardMetadata,
        inherited: Inheritance | None,
        ledgers: LedgerClient,
        ids: IdBlocks,
        cache: ReadCache,
        settings: LogSettings,
        now_us: Callable[[], int],
        on_released: Callable[[Released], None],
    ) -> ManagedLog:
        """Opens the log of a shard that `metadata` has accepted from its former owner: nothing is to be recovered.

        Raises as `open`.
        """
        shard = OwnedShard(metadata, ledgers, ids, settings, now_us, on_released)
        taken = await inherit(shard, inherited)
        opened = cls(shard, cache, taken)
        if shard.ledgers:
            opened._appender.begin_in_last(taken.last_time_us or await opened.find_last_time())
        return opened

    # --- facts ---

    @property
    def shard_id(self) -> int:
        return self._shard.shard_id

    @property
    def epoch(self) -> int:
        return self._shard.record.epoch

    @property
    def record(self) -> ShardRecord:
        return self._shard.record

    @property
    def start_offset(self) -> int:
        """The first offset that is not trimmed."""
        return self._chain.start_offset

    @property
    def end_offset(self) -> int:
        """One past the last confirmed message."""
        return self._appender.end_offset

    @property
    def last_publish_time_us(self) -> int:
        """The newest publish time given or known: no later message is older. After a takeover, a lower bound."""
        return self._appender.last_time_us

    @property
    def queued_bytes(self) -> int:
        """Of batches that wait to be sent to a ledger."""
        return self._appender.queued_bytes

    @property
    def released(self) -> Released | None:
        return self._shard.released

    async def describe(self) -> LogFacts:
        """Raises MetadataUnavailable."""
        view = self._appender.view(self._shard.record)
        open_ledgers = self._shard.ledgers
        closed = await self._shard.metadata.closed_ledgers(
            [segment.ledger_id for segment in view.segments if segment.ledger_id not in open_ledgers]
        )
        known = {**closed, **open_ledgers}
        facts = [self._segment_facts(s, known[s.ledger_id]) for s in view.segments if s.ledger_id in known]
        return LogFacts(
            shard_id=view.shard_id,
            epoch=view.epoch,
            start_offset=self.start_offset,
            end_offset=self.end_offset,
            segments=tuple(facts),
            pages=view.pages,
            queued_bytes=self.queued_bytes,
            write_state=self._appender.state.value,
            waiting_for=(self._appender.handle.stalled or "") if self._appender.handle is not None else "",
            cursor_ledger=view.cursor_ledger,
        )

    def _segment_facts(self, segment: Segment, ledger: LedgerRecord) -> SegmentFacts:
        is_open = segment.messages == 0
        return SegmentFacts(
            ledger_id=segment.ledger_id,
            first_offset=segment.first_offset,
            first_time_us=self._chain.first_time_us(segment),
            messages=self.end_offset - segment.first_offset if is_open else segment.messages,
            bytes=self._appender.open_bytes if is_open else segment.bytes,
            state=ledger.state,
            ensemble=ledger.fragments[-1].bookies,
        )

    def backlog_bytes(self, floor: int) -> int:
        """About how many bytes stand at and above the offset."""
        return self._chain.bytes_above(floor, self._appender.open_bytes, self.end_offset)

    # --- appending ---

    def append(self, batch: PendingBatch) -> None:
        """Queues the batch for the next entry; `on_appended` tells when it is durable. Raises LogReleased."""
        self._appender.append(batch)

    def segment_started(self, ledger: LedgerRecord, last_entry: Callable[[], int]) -> None:
        self._reads.opened(Segment(ledger.ledger_id, self.end_offset), ledger, last_entry)

    def entries_confirmed(self, ledger_id: int, entries: list[AppendedEntry]) -> None:
        batches: list[PendingBatch] = []
        for entry in entries:
            parts = [EntryBatch(b.first_offset, b.count, b.data, b.selection) for b in entry.batches]
            stored = StoredEntry(entry.first_offset, entry.end_offset, entry.publish_time_us, parts)
            self._cache.put_appended(self.shard_id, stored)
            self._reads.appended(ledger_id, entry.entry_id, stored)
            batches += entry.batches
        self.on_appended(batches)
        moved, self._end_moved = self._end_moved, None
        if moved is not None:
            moved.set_result(None)
        for callback in list(self.on_end):
            callback()

    def segment_ended(self, closed: LedgerRecord) -> None:
        """Each roll writes a snapshot, so that the next owner replays the headers of two segments at most."""
        self._reads.closed(closed)
        self._cursors.store_snapshot()

    async def find_last_time(self) -> int:
        return max(await self._reads.last_time_us(), self._shard.record.floor_time_us)

    # --- reading ---

    async def read(self, offset: int, *, max_bytes: int = 1 << 20, tail: bool = False) -> list[StoredEntry]:
        """Entries from the one that holds the offset on, about `max_bytes`, at least one; [] at the end of the log.

        A reader that is not at the `tail` will go on: what follows is read ahead.
        Raises OffsetTrimmed, ReadFailed (try again), LogReleased.
        """
        self._shard.check_served()
        if offset >= self.end_offset:
            return []
        if offset < self.start_offset:
            raise OffsetTrimmed(offset, self.start_offset)
        entries = self._cache.get(self.shard_id, offset, max_bytes)
        if not entries:
            entries = _first_bytes(await self._reads.read(offset), max_bytes)
        if not tail:
            self._reads.read_ahead(entries[-1].end_offset)
        return entries

    async def offset_at(self, time_us: int) -> int:
        """The first offset published at or after the time; the end if there is none yet. Raises like `read`."""
        self._shard.check_served()
        return max(self.start_offset, await self._reads.offset_at(time_us))

    async def publish_time_of(self, offset: int) -> int:
        """Raises like `read`, and IndexError at or beyond the end."""
        entries = await self.read(offset, max_bytes=1, tail=True)
        if not entries:
            raise IndexError(f"offset is beyond the end: offset=`{offset}` end_offset=`{self.end_offset}`")
        return entries[0].publish_time_us

    async def wait_beyond(self, offset: int) -> None:
        """Returns when `end_offset` is greater. Raises LogReleased."""
        while self.end_offset <= offset:
            self._shard.check_served()
            if self._end_moved is None:
                self._end_moved = asyncio.get_running_loop().create_future()
            await asyncio.shield(self._end_moved)

    # --- cursors ---

    @property
    def cursors(self) -> Mapping[str, Cursor]:
        return MappingProxyType(self._cursors.table.cursors)

    async def create_cursor(self, name: str, subscription_id: int, type: SubscriptionType, floor: int) -> Cursor:
        """Creates the cursor, or finds it; replaces one of an older subscription of this name. Durable on return.

        The floor is moved into the log. Raises LogReleased.
        """
        self._check_changeable()
        table = self._cursors.table
        if table.create(name, subscription_id, type, self._into_log(floor)):
            await self._stored(self._cursors.changed())
        else:
            await self._stored(self._cursors.latest())
        return table.cursor(name)

    async def delete_cursor(self, name: str) -> None:
        """Durable on return; a cursor that is not there is no error. Raises LogReleased."""
        self._check_changeable()
        if name in self._cursors.table.cursors:
            self._cursors.table.delete(name)
            await self._stored(self._cursors.changed())
        else:
            await self._stored(self._cursors.latest())

    def ack(self, name: str, *, floor: int = 0, ranges: Sequence[Range] = ()) -> asyncio.Future[None]:
        """Acknowledges everything below `floor` and the offsets start <= o < end of each range.

        Takes effect at once; durable when the future, shared by all that is stored together, completes.
        Raises CursorNotFound, InvalidAck (nothing is acknowledged), LogReleased; the future too raises LogReleased.
        """
        self._check_changeable()
        self._check_ack(floor, ranges)
        if self._cursors.table.ack(name, floor, ranges):
            return self._cursors.changed()
        return self._cursors.latest()

    def count_deliveries(self, name: str, counts: Mapping[int, int]) -> asyncio.Future[None]:
        """Remembers how often unacknowledged messages, by offset, were delivered. Raises like `ack`."""
        self._check_changeable()
        self._cursors.table.count_deliveries(name, counts)
        return self._cursors.changed()

    async def seek(self, name: str, floor: int) -> None:
        """Moves the cursor, back or forth; acknowledgements above it are forgotten. Durable on return.

        The floor is moved into the log. Raises CursorNotFound, LogReleased.
        """
        self._check_changeable()
        self._cursors.table.seek(name, self._into_log(floor))
        await self._stored(self._cursors.changed())

    def _check_changeable(self) -> None:
        self._shard.check_served()
        if self._closing:
            raise LogReleased(self.shard_id, CLOSED)

    def _into_log(self, offset: int) -> int:
        return max(self._trimmer.start_offset, min(offset, self.end_offset))

    def _check_ack(self, floor: int, ranges: Sequence[Range]) -> None:
        if floor < 0:
            raise InvalidAck(f"floor is not in the log: floor=`{floor}`")
        for start, stop in ranges:
            if not 0 <= start < stop or stop - start > RANGE_MESSAGES_MAX:
                raise InvalidAck(f"range is not in the log: start=`{start}` end=`{stop}`")
        acked, end = max([floor, *(stop for _, stop in ranges)]), self.end_offset
        if acked > end:
            raise AckBeyondEnd(f"acknowledged beyond the end: acked=`{acked}` end_offset=`{end}`")

    async def _stored(self, future: asyncio.Future[None]) -> None:
        """The future is shared: one waiter's cancellation is not the others'."""
        await asyncio.shield(future)

    def _cursors_stored(self) -> None:
        if self._trimmer.due():
            self._shard.spawn(self._trim_quietly)

    # --- producers ---

    @property
    def producer_snapshot(self) -> ProducerSnapshot:
        """Asked at each snapshot for the chunks of the producers' table and the offset up to which they count."""
        return self._cursors.producer_snapshot

    @producer_snapshot.setter
    def producer_snapshot(self, snapshot: ProducerSnapshot) -> None:
        self._cursors.producer_snapshot = snapshot
        self.producer_chunks = []

    def _unchanged_producers(self) -> tuple[list[bytes], int]:
        return self.producer_chunks, self.producers_covered_offset

    # --- trimming ---

    async def trim(self) -> int:
        """Deletes what nobody needs, ends an old segment, and ledgers with a vacant place that new ones would not have.

        To be called every few seconds. Returns how many segments went. Raises ReadFailed while the store is silent,
        LogReleased.
        """
        self._shard.check_served()
        self._appender.tick()
        self._end_incomplete()
        return await self._trimmer.trim()

    def end_acknowledged(self) -> bool:
        """Whether the open segment could go if it were ended; it is being ended then. A log at rest frees no space."""
        return self._trimmer.end_acknowledged()

    def leave_bookies(self, bookies: Collection[str]) -> None:
        """The log's open ledgers are to end if they name these bookies: only closed ones are copied.

        A writer replaces a member by itself, if there is a spare for this ledger, and only for what comes. Call it
        again until nothing names them.
        """
        self._end_ledgers(lambda ledger: not ledger.bookies().isdisjoint(bookies))

    def _end_incomplete(self) -> None:
        """An idle ledger that was begun while bookies were away would stand with too few copies for ever."""
        begun_before_us = self._shard.now_us() - round(self._shard.settings.vacant_s * 1e6)

        def is_due(ledger: LedgerRecord) -> bool:
            return ledger.created_us < begun_before_us and any(VACANT in part.bookies for part in ledger.fragments)

        if any(map(is_due, self._shard.ledgers.values())) and self._shard.client.fills_all_places():
            self._end_ledgers(is_due)

    def _end_ledgers(self, is_to_end: Callable[[LedgerRecord], bool]) -> None:
        record, ledgers = self._shard.record, self._shard.ledgers
        current = record.segments[-1].ledger_id if record.segments else 0

        def named(*ids: int) -> bool:
            return any(is_to_end(ledgers[ledger_id]) for ledger_id in ids if ledger_id in ledgers)

        if named(current, record.next_ledger):
            self._appender.end_segment()
        if named(record.cursor_ledger, record.next_cursor):
            self._cursors.roll()

    async def _trim_quietly(self) -> None:
        try:
            await self._trimmer.trim()
        except ReadFailed:
            return  # the next call of trim() tells

    # --- the end ---

    async def close(self) -> None:
        """Releases the shard cleanly: everything appended and acknowledged is durable, all ledgers are closed.

        The record then names nobody. Waits as long as that takes; cancelled, it abandons the log. Raises LogReleased if
        the shard is lost before.
        """
        self._shard.check_served()
        try:
            finished = await self._finish(SETTLE_S)
            await self._shard.give_up(lambda record: _nobodys(finished.change(record)), CLOSED)
        finally:
            self._shard.abandon(CLOSED)

    async def rest(self) -> None:
        """As `close`, but the shard stays this owner's, which has nothing to recover when it opens the log again."""
        self._shard.check_served()
        try:
            finished = await self._finish(SETTLE_S)
            await self._shard.give_up(finished.change, CLOSED)
        finally:
            self._shard.abandon(CLOSED)

    async def pass_on(self, heir: Owner, ledger: LedgerRecord | None) -> Inheritance:
        """As `close`, but the shard is the heir's in the next epoch, which can serve it with what is returned.

        `ledger`: a new one of the heir's, in that epoch; it becomes the last segment if this log has one open.
        Raises LogReleased; SessionEnded if the heir's session is over: then all is closed, and this broker owns it.
        """
        self._shard.check_served()
        try:
            finished = await self._finish(PASS_SETTLE_S)
            try:
                await self._shard.give_up(lambda record: _inherited_by(heir, ledger, finished.change(record)), CLOSED)
            except SessionEnded:
                await self._shard.give_up(finished.change, CLOSED)
                raise
        finally:
            self._shard.abandon(CLOSED)
        state = finished.cursors.state
        return Inheritance(
            last_time_us=self._appender.known_last_time_us,
            cursors=state if sum(map(len, state)) <= INHERITED_BYTES_MAX else (),
            cursor_ledger=self._closed_cursor_ledger(finished.cursors),
        )

    def _closed_cursor_ledger(self, cursors: FinishedCursors) -> LedgerRecord | None:
        return (cursors.closed or self._shard.closed_cursor) if self._shard.record.cursor_ledger else None

    async def _finish(self, settle_s: float) -> _Finished:
        """Takes nothing more and makes all that was taken durable."""
        closed = await self._appender.finish(settle_s)
        end = self._appender.segment_end(closed.length) if closed is not None else None
        self._closing = True
        cursors = await self._cursors.finish(settle_s)

        def change(record: ShardRecord) -> ShardChange:
            put = () if cursors.closed is None else (cursors.closed,)
            gone = self._shard.linked(record.next_ledger) + self._shard.linked(record.next_cursor)
            ended = replace(record, next_ledger=0, next_cursor=0)
            if end is not None and closed is not None:
                ended = end.close(ended)
                if end.has_messages(record):
                    put = (*put, closed)
                else:
                    gone = (*gone, closed)
            if cursors.inline:
                gone += self._shard.linked(record.cursor_ledger)
                ended = replace(ended, cursor_ledger=0, inline_cursors=cursors.inline)
            return ShardChange(ended, put_ledgers=put, delete_ledgers=gone)

        return _Finished(change, cursors)

    def abandon(self, reason: str = "abandoned") -> None:
        """Stops at once, as a crash would: nothing more is written, and `on_released` is not called."""
        self._shard.abandon(Released(None, reason))

    async def delete(self) -> None:
        """Deletes the shard with everything in it, in bounded transactions.

        Raises LogReleased, LogUndecided: claim the shard again and delete it from its records.
        """
        self._shard.check_served()
        await self._shard.quiesce(Released(None, "the shard is being deleted"))
        try:
            await delete_shard(self._shard.metadata)
        except OwnershipLost as lost:
            raise LogReleased(self.shard_id, Released(lost.owner, "another broker claimed the shard")) from lost
        except (MetadataUnavailable, OutcomeUnknown) as error:
            raise LogUndecided(f"shard was not wholly deleted: shard=`{self.shard_id}` {error}") from error

    async def renew_session(self, session: Owner) -> None:
        """The broker registered again: its new session owns the shard, in the same epoch. Raises LogReleased."""
        await self._shard.renew_session(session)

    async def check_owned(self) -> None:
        """Reads that nobody had claimed the shard before this was called. Raises LogReleased, MetadataUnavailable."""
        await self._shard.check_owned()

    async def standing(self) -> Standing:
        """What bookies say about this owner, asked for each ledger that is open: LOST if one of them was fenced.

        MINE: nobody had taken the shard over when they were asked. UNKNOWN also if nothing is open: then whoever took
        over had nothing to fence.
        """
        handles = [handle for handle in (self._appender.handle, self._cursors.handle) if handle is not None]
        found = await asyncio.gather(*map(_standing, handles))
        return next((s for s in (Standing.LOST, Standing.MINE) if s in found), Standing.UNKNOWN)

    def _stopped(self, released: Released) -> None:
        self._cache.forget(self.shard_id)
        if self._end_moved is not None:
            self._end_moved.set_exception(LogReleased(self.shard_id, released))
            self._end_moved.exception()

    def _record_changed(self, record: ShardRecord) -> None:
        self._chain.update(self._appender.view(record))


@dataclass(frozen=True, slots=True)
class _Finished:
    """A log that takes nothing more: the change that closes all of its ledgers, and what its cursors are."""

    change: Callable[[ShardRecord], ShardChange]
    cursors: FinishedCursors


def _nobodys(change: ShardChange) -> ShardChange:
    return replace(change, record=replace(change.record, owner=None))


def _inherited_by(heir: Owner, ledger: LedgerRecord | None, change: ShardChange) -> ShardChange:
    """The heir owns the shard in the next epoch, and its ledger follows the segment that is closed now, if one is.

    A shard to which nobody appends is passed on without a ledger: thousands of them cost nothing then.
    """
    record = replace(change.record, owner=heir, epoch=change.record.epoch + 1)
    closed = [put for put in change.put_ledgers if put.purpose is LedgerPurpose.DATA]
    if ledger is None or not closed or ledger.epoch != record.epoch:
        return replace(change, record=record)
    linked, pages = link_segment(record, Segment(ledger.ledger_id, record.segments[-1].end_offset))
    return replace(change, record=linked, put_ledgers=(*change.put_ledgers, ledger), put_pages=pages)


async def _standing(handle: WriteHandle) -> Standing:
    """A bookie that hangs does not hold up who asks."""
    try:
        async with asyncio.timeout(STANDING_S):
            return await handle.standing()
    except TimeoutError:
        return Standing.UNKNOWN


def _first_bytes(entries: list[StoredEntry], max_bytes: int) -> list[StoredEntry]:
    """The first entries of about so many bytes, at least one."""
    count = 0
    while count < len(entries) and max_bytes > 0:
        max_bytes -= entries[count].size
        count += 1
    return entries[: max(count, 1)]
