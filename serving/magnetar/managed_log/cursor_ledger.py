"""The cursor ledger of a shard: makes the changes of its cursors durable, with the producers' table beside them.

Rules:

1. One group of changes is being stored at a time; what is queued meanwhile is the next group and shares one future.
2. The state is what the record names: `inline_cursors`, or the entries of `cursor_ledger` from its last complete
   snapshot on, or nothing. The first ledger of a shard without any state is linked as `cursor_ledger` at once.
3. A roll: (1) a new ledger is linked as `next_cursor`; changes go on to the old one. (2) When nothing is in flight, a
   snapshot is taken; from now on nothing goes to the old one. (3) Its parts are stored in the new one. (4) One
   transaction makes it `cursor_ledger`, deletes the old one and clears the inline state. What the snapshot holds is
   answered then. A crash before (4) leaves the old state whole; after it, the new one.
4. Whatever happens to a ledger, the state in memory is at least what is stored while the shard is ours. So a lost
   ledger is answered by a roll, whose transactions fail if the shard is another's.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from magnetar.ledger.errors import LedgerLost, WriterClosed
from magnetar.ledger.write_handle import WriteHandle
from magnetar.managed_log.cursor import ChangeGroup, CursorReplay, CursorTable
from magnetar.managed_log.cursor_codec import encode_changes, encode_part
from magnetar.managed_log.errors import LogReleased, Released
from magnetar.managed_log.owned_shard import OwnedShard, Retry
from magnetar.metadata.records import LedgerPurpose, LedgerRecord, ShardRecord
from magnetar.metadata.shards import ShardChange

ProducerSnapshot = Callable[[], tuple[list[bytes], int]]


@dataclass(frozen=True, slots=True)
class FinishedCursors:
    """The cursors and producers of a log that is being closed, made durable.

    state    entries that hold all of it
    inline   the same, small enough to be put into the shard record: then the ledger is to be dropped
    closed   else the CLOSED record to be committed, if a ledger was open
    """

    state: tuple[bytes, ...]
    inline: bytes = b""
    closed: LedgerRecord | None = None


class CursorLedger:
    """See the module.

    table             all cursors; change it through here only
    covered_offset    the producers' table of the last durable snapshot counts up to here
    producer_snapshot gives the chunks of the producers' table and the offset up to which they count
    _storing          futures of groups taken and not answered: more than one only after a ledger was lost
    _broken           the ledger was lost: what was given to it is answered by a roll
    """

    def __init__(
        self,
        shard: OwnedShard,
        replay: CursorReplay,
        producer_snapshot: ProducerSnapshot,
        on_stored: Callable[[], None],
    ) -> None:
        self._shard = shard
        self.table: CursorTable = replay.finish()
        self.covered_offset = replay.covered_offset
        self.producer_snapshot = producer_snapshot
        self._on_stored = on_stored
        self._snapshot_id = replay.snapshot_id
        self._snapshot_bytes = 0
        self._snapshot_wanted = False
        self._roll_wanted = False
        self._handle: WriteHandle | None = None
        self._broken = False
        self._queued: asyncio.Future[None] | None = None
        self._storing: list[asyncio.Future[None]] = []
        self._running: asyncio.Task[None] | None = None
        self._linking: asyncio.Task[None] | None = None
        shard.on_lost.append(self._stop)

    # --- what others ask ---

    @property
    def handle(self) -> WriteHandle | None:
        """The writer of the open ledger; None once it was lost, until the next one stands in its place."""
        return None if self._broken else self._handle

    def changed(self) -> asyncio.Future[None]:
        """Something was queued in the table: completes when it is durable. Shared by the group; need not be awaited.

        Raises LogReleased: nobody would complete it any more.
        """
        self._shard.check_served()
        if self._queued is None:
            self._queued = _quiet_future()
            self._wake()
        return self._queued

    def latest(self) -> asyncio.Future[None]:
        """Completes when everything that was queued so far is durable."""
        if self._queued is not None:
            return self._queued
        if self._storing:
            return self._storing[-1]
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        done.set_result(None)
        return done

    def store_snapshot(self) -> asyncio.Future[None]:
        """Writes a snapshot of cursors and producers with the next group; completes when it is durable."""
        self._snapshot_wanted = True
        return self.changed()

    def roll(self) -> None:
        """The open ledger is to be replaced soon: it stands on bookies that are given up. Call it until it is."""
        if self._handle is not None:
            self._roll_wanted = True
            self.store_snapshot()

    # --- storing ---

    def _wake(self) -> None:
        if self._running is None and self._shard.released is None:
            self._running = self._shard.spawn(self._run)

    async def _run(self) -> None:
        try:
            while self._queued is not None or self._storing:
                await self._store_next()
        finally:
            self._running = None

    async def _store_next(self) -> None:
        if self._handle is None and self._has_no_state():
            await self._begin_first()
        handle = self._handle
        if handle is None or self._broken or self._must_roll(handle):
            await self._roll()
            return
        await self._store_group(handle)
        if self._is_full(handle) and self._linking is None and not self._shard.record.next_cursor:
            self._linking = self._shard.spawn(self._link_ahead)

    async def _store_group(self, handle: WriteHandle) -> None:
        group = self._take()
        covered_offset = self.covered_offset
        if self._snapshot_wanted:
            payloads, covered_offset = self._encode_snapshot()
        else:
            payloads = encode_changes(group.changes)
        if not await self._add_all(handle, payloads):
            self._broken = True
            return
        self.covered_offset = covered_offset
        self.table.stored(group)
        self._answer()

    def _take(self) -> ChangeGroup:
        """What is queued becomes what is being stored. A group whose ledger was lost stays there until a roll."""
        if self._queued is not None:
            self._storing.append(self._queued)
            self._queued = None
        return self.table.take()

    def _answer(self) -> None:
        answered, self._storing = self._storing, []
        for future in answered:
            if not future.done():
                future.set_result(None)
        self._on_stored()

    def _encode_snapshot(self) -> tuple[list[bytes], int]:
        self._snapshot_wanted = False
        self._snapshot_id += 1
        chunks, covered_offset = self.producer_snapshot()
        payloads = [encode_part(part) for part in self.table.snapshot(self._snapshot_id, chunks, covered_offset)]
        self._snapshot_bytes = sum(map(len, payloads))
        return payloads, covered_offset

    async def _add_all(self, handle: WriteHandle, payloads: Sequence[bytes]) -> bool:
        """Stores the payloads, one directly after the other; False when the ledger was lost."""
        try:
            for payload in payloads:
                if handle.in_flight_bytes >= self._shard.settings.max_in_flight_bytes:
                    await handle.confirmed()
                handle.add(payload)
            await handle.confirmed()
        except (LedgerLost, WriterClosed):
            return False
        return True

    # --- ledgers ---

    def _has_no_state(self) -> bool:
        record = self._shard.record
        return record.cursor_ledger == 0 and not record.inline_cursors

    def _is_full(self, handle: WriteHandle) -> bool:
        settings = self._shard.settings
        limit = max(settings.cursor_ledger_bytes, settings.cursor_ledger_snapshots * self._snapshot_bytes)
        return handle.length >= limit or bool(handle.wants_roll) or self._roll_wanted

    def _must_roll(self, handle: WriteHandle) -> bool:
        """Only with the next ledger linked: while the store is silent, changes go on to this one."""
        too_long = handle.length >= self._shard.settings.segment_bytes_hard
        return too_long or (self._is_full(handle) and self._shard.record.next_cursor != 0)

    def _writer(self, ledger_id: int) -> WriteHandle:
        """A lost ledger is noticed by the next group that goes to it."""
        return self._shard.writer(self._shard.ledgers[ledger_id], lambda _: None, lambda _: None)

    async def _begin_first(self) -> None:
        def link(ledger: LedgerRecord, record: ShardRecord) -> ShardChange:
            return ShardChange(replace(record, cursor_ledger=ledger.ledger_id), put_ledgers=(ledger,))

        await self._shard.create_ledger(LedgerPurpose.CURSOR, link)
        self._handle = self._writer(self._shard.record.cursor_ledger)

    async def _link_next(self) -> None:
        """Step 1 of a roll; nothing if it is done."""

        def link(ledger: LedgerRecord, record: ShardRecord) -> ShardChange | None:
            if record.next_cursor:
                return None
            return ShardChange(replace(record, next_cursor=ledger.ledger_id), put_ledgers=(ledger,))

        if not self._shard.record.next_cursor:
            await self._shard.create_ledger(LedgerPurpose.CURSOR, link)

    async def _link_ahead(self) -> None:
        try:
            await self._link_next()
        finally:
            self._linking = None

    async def _roll(self) -> None:
        """See rule 3."""
        retry = Retry(self._shard.settings)
        while True:
            await self._link_next()
            new = self._writer(self._shard.record.next_cursor)
            self._take()
            floors = self.table.floors()
            payloads, covered_offset = self._encode_snapshot()
            if await self._add_all(new, payloads):
                break
            new.abandon()
            await self._shard.change(self._drop_next)
            await retry.wait()
        await self._shard.change(self._make_current)
        if self._handle is not None:
            self._handle.abandon()
        self._handle, self._broken, self._roll_wanted = new, False, False
        self.covered_offset = covered_offset
        self.table.stored_are(floors)
        self._answer()

    def _drop_next(self, record: ShardRecord) -> ShardChange:
        gone = self._shard.ledgers[record.next_cursor]
        return ShardChange(replace(record, next_cursor=0), delete_ledgers=(gone,))

    def _make_current(self, record: ShardRecord) -> ShardChange:
        """Step 4 of a roll."""
        current = replace(record, cursor_ledger=record.next_cursor, next_cursor=0, inline_cursors=b"")
        return ShardChange(current, delete_ledgers=self._shard.linked(record.cursor_ledger))

    # --- the end ---

    async def finish(self, settle_s: float) -> FinishedCursors:
        """Makes all state durable for a clean close; nothing may be changed any more.

        `settle_s`: how long it waits for bookies beyond the ack quorum.
        """
        await self._settle()
        chunks, covered_offset = self.producer_snapshot()
        snapshot = self.table.snapshot(self._snapshot_id + 1, chunks, covered_offset)
        state = tuple(encode_part(part) for part in snapshot)
        if len(state) == 1 and len(state[0]) <= self._shard.settings.inline_bytes:
            return FinishedCursors(state, inline=state[0])
        while True:
            if self._has_no_state() or covered_offset != self.covered_offset or self._broken:
                await self.store_snapshot()
                await self._settle()
            if self._handle is None:
                return FinishedCursors(state)
            try:
                return FinishedCursors(state, closed=await self._handle.close(settle_s))
            except LedgerLost:
                self._broken = True

    async def _settle(self) -> None:
        """Waits until nothing is being stored or linked."""
        while busy := [task for task in (self._running, self._linking) if task is not None]:
            await asyncio.wait(busy)
        self._shard.check_served()

    def _stop(self, released: Released) -> None:
        waiting = [*self._storing, *([self._queued] if self._queued is not None else [])]
        self._storing, self._queued = [], None
        for future in waiting:
            if not future.done():
                future.set_exception(LogReleased(self._shard.shard_id, released))


def _quiet_future() -> asyncio.Future[None]:
    """A future whose exception may go unnoticed: acknowledgements need not be awaited."""
    future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    future.add_done_callback(lambda done: None if done.cancelled() else done.exception() and None)
    return future
