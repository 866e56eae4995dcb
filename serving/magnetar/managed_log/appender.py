"""Appending to a shard's log: batches become entries, entries go to the open ledger, ledgers follow each other.

States of the write side, and what moves it:

    CLOSED    no ledger is open                    -> OPEN      a batch waits: a ledger is linked
    OPEN      entries go to the ledger             -> LEAVING   it is full, old, or to be ended: it gets no more entries
                                                   -> LOST      its writer says so
    LEAVING   its last entries are being confirmed -> OPEN      in the next ledger, which was linked before
                                                   -> CLOSED    its end is in the records
                                                   -> LOST
    LOST      it is recovered by this very owner   -> OPEN, CLOSED, or the shard is released
    FINISHED  the log is being closed

Rules:

1. No entry goes to a ledger before the transaction that links it returned, nor before the last entry of the ledger
   before is confirmed (or settled by recovery, and that in the records).
2. A close is sent only for a ledger that was left for good.
3. Self-clocking: with little in flight what is queued goes at once; else it waits until it fills an entry.
4. One task at most, and only while a step above is under way: an idle log has none.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import replace
from enum import Enum
from typing import Any, Protocol

import structlog

from magnetar.ledger.errors import LedgerLost
from magnetar.ledger.write_handle import SETTLE_S, WriteHandle
from magnetar.managed_log.chain import (
    Chain,
    OpenSegment,
    RollRules,
    RollStep,
    SegmentEnd,
    link_segment,
    roll_step,
    segment_bytes_for,
)
from magnetar.managed_log.errors import LogDamaged, LogReleased, ReadFailed, Released
from magnetar.managed_log.owned_shard import OwnedShard, Retry
from magnetar.metadata.records import LedgerPurpose, LedgerRecord, Segment, ShardRecord
from magnetar.metadata.shards import ShardChange
from magnetar.wire.entry import BATCH_OVERHEAD, encode_entry

log = structlog.get_logger(__name__)

BATCHES_PER_ENTRY_MAX = 10_000
LAST_TIME_ATTEMPTS = 5


class PendingBatch:
    """A batch to append: `count` messages, those of the selection (empty = all). `context` belongs to the caller."""

    __slots__ = ("context", "count", "data", "first_offset", "selection", "size")

    def __init__(self, data: bytes, count: int, context: Any = None, selection: bytes = b"") -> None:
        self.data = data
        self.count = count
        self.context = context
        self.selection = selection
        self.size = len(data) + len(selection) + BATCH_OVERHEAD
        self.first_offset = -1


class AppendedEntry:
    """An entry as it was handed to the ledger. Its batches get their offsets when it is confirmed."""

    __slots__ = ("batches", "end_offset", "entry_id", "first_offset", "publish_time_us")

    def __init__(self, entry_id: int, first_offset: int, publish_time_us: int, batches: list[PendingBatch]) -> None:
        self.entry_id = entry_id
        self.first_offset = first_offset
        self.end_offset = first_offset + sum(batch.count for batch in batches)
        self.publish_time_us = publish_time_us
        self.batches = batches


class AppendEvents(Protocol):
    """What the log does about what the appender did."""

    def segment_started(self, ledger: LedgerRecord, last_entry: Callable[[], int]) -> None:
        """Entries go to this ledger; `last_entry()` says how far it is confirmed."""
        ...

    def entries_confirmed(self, ledger_id: int, entries: list[AppendedEntry]) -> None:
        """In order; `end_offset` has moved."""
        ...

    def segment_ended(self, closed: LedgerRecord) -> None:
        """The ledger was left for good; its CLOSED record is about to be committed."""
        ...

    async def find_last_time(self) -> int:
        """The publish time of the last message in the log, 0 = there is none. Raises ReadFailed."""
        ...


class WriteState(Enum):
    CLOSED = "closed"
    OPEN = "open"
    LEAVING = "leaving"
    LOST = "lost"
    FINISHED = "finished"


class Appender:
    """The write side of one log. See the module.

    end_offset       one past the last confirmed message
    _next_offset     one past the last message handed to a ledger
    _last_time_us    publish time of the last entry handed to a ledger; no later one is older
    _first_time_us   publish time of the open ledger's first entry, 0 = it has none
    _ending          while the change that moves on to the next ledger is not committed: the end of the one before
    """

    def __init__(self, shard: OwnedShard, chain: Chain, end_offset: int, events: AppendEvents) -> None:
        self._shard = shard
        self._chain = chain
        self._settings = shard.settings
        self.end_offset = end_offset
        self.queued_bytes = 0
        self.state = WriteState.CLOSED
        self._events = events
        self._next_offset = end_offset
        last = shard.record.segments[-1] if shard.record.segments else None
        self._last_time_us = max(shard.record.floor_time_us, last.first_time_us if last else 0)
        self._last_time_known = last is None and shard.record.pages == 0
        self._queue: deque[PendingBatch] = deque()
        self._in_flight: deque[AppendedEntry] = deque()
        self._handle: WriteHandle | None = None
        self._first_time_us = 0
        self._opened_us = 0
        self._roll_rules = self._rules_for(0)
        self._end_asked = False
        self._ending: SegmentEnd | None = None
        self._stopping = False
        self._pump_due = False
        self._stepping: asyncio.Task[None] | None = None
        self._linking: asyncio.Task[None] | None = None
        self._settled: asyncio.Event = asyncio.Event()
        shard.on_lost.append(self._stop)

    # --- what others ask ---

    def view(self, record: ShardRecord) -> ShardRecord:
        """The shard record as readers must see it: with the ledger to which entries already go."""
        return record if self._ending is None else self._ending.move_on(record)[0]

    @property
    def handle(self) -> WriteHandle | None:
        return self._handle

    @property
    def open_bytes(self) -> int:
        return self._handle.length if self._handle is not None else 0

    @property
    def idle(self) -> bool:
        """Nothing is queued and nothing is in flight."""
        return not self._queue and not self._in_flight

    def append(self, batch: PendingBatch) -> None:
        """Queues the batch. Raises LogReleased."""
        self._shard.check_served()
        if self._stopping:
            raise LogReleased(self._shard.shard_id, Released(None, "the log is being closed"))
        assert batch.count > 0, "a batch without messages"
        self._queue.append(batch)
        self.queued_bytes += batch.size
        self._schedule_pump()

    def tick(self) -> None:
        """Time has passed: the open segment may be too old."""
        self._wake_if_due()

    def end_segment(self) -> None:
        """The open segment is to be ended soon: to free its space, or to leave its bookies. An empty one goes."""
        self._end_asked = True
        self._wake_if_due()

    def begin_in_last(self, last_time_us: int) -> None:
        """The shard was passed on with an empty ledger as its last segment: entries go there at once.

        `last_time_us`: the publish time of the last message.
        """
        self._last_time_us = max(self._last_time_us, last_time_us)
        self._last_time_known = True
        self._go_on()

    async def finish(self, settle_s: float) -> LedgerRecord | None:
        """Takes no more batches, waits until all that was appended is confirmed, and leaves the ledger for good.

        `settle_s`: how long it waits for bookies beyond the ack quorum.
        Returns its CLOSED record, for the caller to commit with `segment_end`; None if no ledger is open.
        """
        self._stopping = True
        while self._shard.released is None and not self._settled_down():
            self._settled.clear()
            self._wake_if_due()
            await self._settled.wait()
        self._shard.check_served()
        self.state = WriteState.FINISHED
        return await self._closed(self._handle, settle_s) if self._handle is not None else None

    def _settled_down(self) -> bool:
        at_rest = self._stepping is None and self._linking is None and self._next_step(self._roll_step()) is None
        return at_rest and self.idle

    async def learn_last_time(self) -> int:
        """The publish time of the last message, 0 if there is none. Raises ReadFailed."""
        if not self._last_time_known:
            found = await self._events.find_last_time()
            self._last_time_us = max(self._last_time_us, found)
            self._last_time_known = True
        return self._last_time_us

    @property
    def last_time_us(self) -> int:
        """The newest publish time that is known."""
        return self._last_time_us

    @property
    def known_last_time_us(self) -> int:
        """The publish time of the last message; 0 if there is none, or it is not known."""
        return self._last_time_us if self._last_time_known else 0

    def _stop(self, _: Released) -> None:
        self._queue.clear()
        self._in_flight.clear()
        self.queued_bytes = 0
        self._settled.set()

    # --- entries ---

    def _schedule_pump(self) -> None:
        if not self._pump_due:
            self._pump_due = True
            asyncio.get_running_loop().call_soon(self._pump)

    def _pump(self) -> None:
        self._pump_due = False
        if self._shard.released is not None:
            return
        while self.state is WriteState.OPEN and self._queue and self._has_room():
            self._add_entry()
        if not self._plainly_stays():
            self._wake_if_due()

    def _has_room(self) -> bool:
        handle, settings = self._handle, self._settings
        assert handle is not None
        if handle.in_flight_bytes >= settings.max_in_flight_bytes or handle.length >= settings.segment_bytes_hard:
            return False
        return len(self._in_flight) < settings.entries_before_grouping or self.queued_bytes >= settings.entry_bytes

    def _add_entry(self) -> None:
        assert self._handle is not None
        batches = self._take_group()
        first_offset = self._next_offset
        publish_time_us = self._last_time_us = max(self._shard.now_us(), self._last_time_us)
        self._first_time_us = self._first_time_us or publish_time_us
        payload = encode_entry(first_offset, publish_time_us, [(b.data, b.selection, b.count) for b in batches])
        entry = AppendedEntry(self._handle.next_entry, first_offset, publish_time_us, batches)
        self._in_flight.append(entry)
        self._next_offset = entry.end_offset
        self._handle.add(payload)

    def _take_group(self) -> list[PendingBatch]:
        queue, limit = self._queue, self._settings.entry_bytes
        group = [queue.popleft()]
        size = group[0].size
        while queue and size + queue[0].size <= limit and len(group) < BATCHES_PER_ENTRY_MAX:
            size += queue[0].size
            group.append(queue.popleft())
        self.queued_bytes -= size
        return group

    def _confirmed(self, handle: WriteHandle, last_entry: int) -> None:
        if handle is not self._handle or self._shard.released is not None:
            return
        in_flight, entries = self._in_flight, []
        while in_flight and in_flight[0].entry_id <= last_entry:
            entries.append(in_flight.popleft())
        try:
            self._complete(handle.ledger_id, entries)
        except Exception as error:
            self._shard.fail(error)
        if self._queue:
            self._schedule_pump()
        elif not self._plainly_stays():
            self._wake_if_due()

    def _complete(self, ledger_id: int, entries: list[AppendedEntry]) -> None:
        if not entries:
            return
        self._chain.open_first_time_us = self._first_time_us
        for entry in entries:
            offset = entry.first_offset
            for batch in entry.batches:
                batch.first_offset = offset
                offset += batch.count
        self.end_offset = entries[-1].end_offset
        self._events.entries_confirmed(ledger_id, entries)

    def _lost(self, handle: WriteHandle) -> None:
        if handle is self._handle and self.state in (WriteState.OPEN, WriteState.LEAVING):
            self.state = WriteState.LOST
            self._wake_if_due()

    # --- steps ---

    def _next_step(self, roll: RollStep) -> Callable[[], Awaitable[None]] | None:
        match self.state:
            case WriteState.LOST:
                return self._recover
            case WriteState.CLOSED:
                return self._open if self._queue else None
            case WriteState.OPEN:
                if roll is RollStep.SWITCH:
                    return self._switch
                return self._close if roll is RollStep.CLOSE else None
            case WriteState.LEAVING | WriteState.FINISHED:
                return None

    def _roll_step(self) -> RollStep:
        """What to do about the open ledger, if there is one."""
        handle = self._handle
        if self.state is not WriteState.OPEN or handle is None:
            return RollStep.STAY
        segment = OpenSegment(
            size_bytes=handle.length,
            opened_us=self._opened_us,
            next_linked=self._shard.record.next_ledger != 0,
            exhausted=bool(handle.wants_roll),
            asked=self._end_asked,
            waiting=not self.idle,
        )
        return roll_step(self._roll_rules, segment, self._shard.now_us())

    def _plainly_stays(self) -> bool:
        """Whether `roll_step` can only say STAY, and nobody waits for it: so it is after nearly every append."""
        handle, rules = self._handle, self._roll_rules
        return (
            self.state is WriteState.OPEN
            and handle is not None
            and handle.length < rules.segment_bytes * rules.link_ahead
            and self._last_time_us - self._opened_us < rules.segment_us
            and not self._shard.record.next_ledger
            and not (self._end_asked or self._stopping or handle.wants_roll)
        )

    def _wake_if_due(self) -> None:
        if self._shard.released is not None or self._stepping is not None:
            return
        roll = self._roll_step()
        if self._next_step(roll) is not None:
            self._stepping = self._shard.spawn(self._steps)
        elif self._linking is not None:
            return
        elif roll is RollStep.LINK_AHEAD and not self._stopping:
            self._linking = self._shard.spawn(self._link_ahead)
        elif self.idle:
            self._settled.set()

    async def _steps(self) -> None:
        try:
            while (step := self._next_step(self._roll_step())) is not None:
                await step()
        finally:
            self._stepping = None
        self._schedule_pump()

    def _start(self, ledger: LedgerRecord) -> None:
        """Entries go to this ledger from now on: it is linked, and the one before is settled."""
        assert not self._in_flight
        handle: WriteHandle | None = None

        def on_confirmed(last_entry: int) -> None:
            assert handle is not None
            self._confirmed(handle, last_entry)

        def on_lost(_: LedgerLost) -> None:
            assert handle is not None
            self._lost(handle)

        handle = self._handle = self._shard.writer(ledger, on_confirmed, on_lost, lambda _: self._schedule_pump())
        self._chain.open_first_time_us = self._first_time_us = 0
        self._opened_us = self._shard.now_us()
        retained = self._chain.bytes_above(self._chain.start_offset, 0, self.end_offset)
        self._roll_rules = self._rules_for(retained)
        self._end_asked = False
        self.state = WriteState.OPEN
        self._events.segment_started(ledger, lambda: handle.lac)
        self._schedule_pump()

    def _rules_for(self, retained_bytes: int) -> RollRules:
        settings = self._settings
        segment_bytes = segment_bytes_for(retained_bytes, settings.segment_bytes)
        return RollRules(segment_bytes, int(settings.segment_s * 1_000_000), settings.link_ahead)

    async def _open(self) -> None:
        """CLOSED -> OPEN."""
        await self._take_last_time()
        if self._shard.record.next_ledger:
            await self._shard.change(self._link_next)
        else:
            await self._shard.create_ledger(LedgerPurpose.DATA, self._link_first)
        self._start(self._shard.ledgers[self._shard.record.segments[-1].ledger_id])

    def _link_first(self, ledger: LedgerRecord, record: ShardRecord) -> ShardChange:
        linked, pages = link_segment(record, Segment(ledger.ledger_id, self.end_offset))
        return ShardChange(linked, put_ledgers=(ledger,), put_pages=pages)

    def _link_next(self, record: ShardRecord) -> ShardChange:
        segment = Segment(record.next_ledger, self.end_offset)
        linked, pages = link_segment(replace(record, next_ledger=0), segment)
        return ShardChange(linked, put_pages=pages)

    async def _take_last_time(self) -> None:
        """So that publish times never go back. Gives up after a while: old data that cannot be read stops no append."""
        retry = Retry(self._settings)
        for _ in range(LAST_TIME_ATTEMPTS):
            try:
                await self.learn_last_time()
                return
            except ReadFailed as error:
                problem = str(error)
            await retry.wait()
        log.warning("last publish time is not known", shard=self._shard.shard_id, problem=problem)

    async def _link_ahead(self) -> None:
        def link(ledger: LedgerRecord, record: ShardRecord) -> ShardChange | None:
            if record.next_ledger or self.state is not WriteState.OPEN:
                return None
            return ShardChange(replace(record, next_ledger=ledger.ledger_id), put_ledgers=(ledger,))

        try:
            await self._shard.create_ledger(
                LedgerPurpose.DATA, link, lambda: self.state is WriteState.OPEN and not self._stopping
            )
        finally:
            self._linking = None
        self._schedule_pump()

    async def _drain(self, handle: WriteHandle) -> bool:
        """Waits until all of the ledger that was left is confirmed; False if it was lost instead."""
        try:
            await handle.confirmed()
        except LedgerLost:
            self.state = WriteState.LOST
        return self.state is WriteState.LEAVING

    async def _switch(self) -> None:
        """OPEN -> LEAVING -> OPEN, in the next ledger; only then the old one is closed."""
        left = self._leave()
        if not await self._drain(left):
            return
        end = self.segment_end(left.length)
        self._ending = end
        self._chain.update(self.view(self._shard.record))
        self._start(self._shard.ledgers[self._shard.record.next_ledger])
        await self._commit_end(end, await self._closed(left))

    async def _close(self) -> None:
        """OPEN -> LEAVING -> CLOSED, or OPEN if the next ledger was linked meanwhile."""
        left = self._leave()
        if not await self._drain(left):
            return
        await self._commit_end(self.segment_end(left.length), await self._closed(left))
        self._go_on()

    def _go_on(self) -> None:
        """The end is in the records: CLOSED, or OPEN in the next ledger if one was linked in the meantime."""
        self.state, self._handle = WriteState.CLOSED, None
        segments = self._shard.record.segments
        if segments and segments[-1].ledger_id in self._shard.ledgers:
            self._start(self._shard.ledgers[segments[-1].ledger_id])

    def _leave(self) -> WriteHandle:
        assert self._handle is not None
        self.state = WriteState.LEAVING
        return self._handle

    def segment_end(self, size_bytes: int) -> SegmentEnd:
        """The end of the ledger that was left: as far as is confirmed now."""
        assert self._handle is not None
        return SegmentEnd(self._handle.ledger_id, self.end_offset, size_bytes, self._first_time_us)

    async def _closed(self, left: WriteHandle, settle_s: float = SETTLE_S) -> LedgerRecord:
        """The CLOSED record of a ledger that was left with everything confirmed; waits a moment for slow members."""
        try:
            return await left.close(settle_s)
        except LedgerLost:
            return await self._recovered(left)

    async def _commit_end(self, end: SegmentEnd, closed: LedgerRecord) -> None:
        def build(record: ShardRecord) -> ShardChange:
            self._ending = None
            linked, pages = end.move_on(record)
            if end.has_messages(record):
                return ShardChange(linked, put_ledgers=(closed,), put_pages=pages)
            return ShardChange(linked, delete_ledgers=(closed,), put_pages=pages)

        await self._shard.change(build)
        self._events.segment_ended(closed)

    async def _recover(self) -> None:
        """LOST -> OPEN or CLOSED: the ledger is recovered, what it holds is done, the rest goes to the next one."""
        lost = self._handle
        assert lost is not None
        closed = await self._recovered(lost)
        done = [entry for entry in self._in_flight if entry.entry_id <= closed.last_entry]
        end_offset = done[-1].end_offset if done else self.end_offset
        end = replace(self.segment_end(closed.length), end_offset=end_offset)
        await self._commit_end(end, closed)
        self._resume(closed.ledger_id, done, end_offset)

    async def _recovered(self, lost: WriteHandle) -> LedgerRecord:
        """The CLOSED record, to be committed, of this shard's own lost ledger. Raises LogDamaged, LogReleased."""
        lost.abandon()
        ledger = await self._shard.begin_recovery(lost.ledger_id, self._release_in_silence)
        if ledger is None:
            raise LogDamaged(f"the record of the ledger that was appended to is gone: ledger=`{lost.ledger_id}`")
        closed = (await self._shard.recover(ledger)).record
        if closed.last_entry < lost.lac:
            raise LogDamaged(
                f"recovery ended a ledger below what was confirmed: ledger=`{closed.ledger_id}` "
                f"last_entry=`{closed.last_entry}` confirmed=`{lost.lac}`"
            )
        return closed

    def _release_in_silence(self) -> None:
        self._shard.release(Released(None, "the ledger was fenced and the metadata store is silent"))

    def _resume(self, ledger_id: int, done: list[AppendedEntry], end_offset: int) -> None:
        """After recovery is in the records: completes what is stored, queues the rest again, in order."""
        rest = [batch for entry in self._in_flight if entry.first_offset >= end_offset for batch in entry.batches]
        self._in_flight.clear()
        self._queue.extendleft(reversed(rest))
        self.queued_bytes += sum(batch.size for batch in rest)
        self._complete(ledger_id, done)
        self._next_offset = self.end_offset = end_offset
        self._go_on()
