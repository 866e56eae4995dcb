"""Taking over the log of a claimed shard: recovery of its open ledgers, and what its cursors were.

1. The ledgers that are not closed (the open one, the one linked ahead, the cursor ledger) are recovered side by side.
2. The end of the open one is the end of its last entry. The next one counts if its first entry begins exactly there: it
   was then written after all before it was confirmed. Otherwise nothing of it was ever confirmed to anybody.
3. One transaction closes them, counts their messages, unlinks and deletes what is empty and drops `next_cursor`, whose
   roll has not happened. It creates nothing: that waits for the first append or acknowledgement.
4. The cursors are rebuilt from the cursor ledger, which is fenced now, or from the inline state.

A shard that its former owner passed on has nothing to be recovered: its ledgers are closed but for the last one, which
is empty and the new owner's. What the former owner tells beside it (`Inheritance`) need not be read.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from magnetar.ledger.client import RecoveredLedger
from magnetar.ledger.errors import ReadError, RecoveryUndecided
from magnetar.managed_log.chain import link_segment
from magnetar.managed_log.cursor import CursorReplay
from magnetar.managed_log.cursor_codec import DamagedCursorEntry, replay_entry
from magnetar.managed_log.errors import LogDamaged, LogUndecided, ReadFailed
from magnetar.managed_log.owned_shard import OwnedShard, Retry
from magnetar.metadata.records import NO_ENTRY, LedgerRecord, Segment, ShardRecord
from magnetar.metadata.shards import ShardChange
from magnetar.metadata.store import MetadataUnavailable
from magnetar.wire.entry import EntryInfo, MalformedEntry, peek_entry

REPLAY_READ_BYTES = 1 << 20

T = TypeVar("T")
U = TypeVar("U")


@dataclass(frozen=True, slots=True)
class TakenOver:
    end_offset: int
    last_time_us: int
    """0 = not known."""
    replay: CursorReplay


@dataclass(frozen=True, slots=True)
class Ended:
    """A log whose ledgers are all closed. `cursor_ledger`: its record, if it was open."""

    end_offset: int
    last_time_us: int
    cursor_ledger: LedgerRecord | None


@dataclass(frozen=True, slots=True)
class Inheritance:
    """What the former owner of a shard tells the one to whom it passed the shard on.

    last_time_us    publish time of the last message; 0 = there is none
    cursors         entries that hold the state of all cursors and producers, as in a cursor ledger; empty = read it
    cursor_ledger   the record of the cursor ledger, CLOSED; None if the shard has none
    """

    last_time_us: int
    cursors: tuple[bytes, ...] = ()
    cursor_ledger: LedgerRecord | None = None


@dataclass(frozen=True, slots=True)
class _Data:
    """A recovered data ledger that holds messages or control entries: headers of its first and last entry."""

    record: LedgerRecord
    first: EntryInfo
    last: EntryInfo


async def take_over(shard: OwnedShard) -> TakenOver:
    """See the module. Raises LogUndecided, ReadFailed, LogDamaged, LogReleased."""
    ended = await end_ledgers(shard)
    replay = await _replay(shard, ended.cursor_ledger)
    return TakenOver(ended.end_offset, ended.last_time_us, replay)


async def end_ledgers(shard: OwnedShard) -> Ended:
    """Steps 1 to 3. Raises as `take_over`."""
    record = shard.record
    current_id = record.segments[-1].ledger_id if record.segments else 0
    current, following, cursors = await _side_by_side(
        _recover_data(shard, current_id),
        _recover_data(shard, record.next_ledger),
        _recover(shard, record.cursor_ledger),
    )
    plan = _Plan(shard)
    plan.end_current(current_id, current)
    plan.judge_next(following)
    plan.end_cursors(cursors)
    if plan.change != ShardChange(record):
        await shard.change(plan.build)
    return Ended(plan.end_offset, plan.last_time_us, cursors.record if cursors is not None else None)


async def inherit(shard: OwnedShard, inherited: Inheritance | None) -> TakenOver:
    """As `take_over`, of a shard that was passed on; None: its former owner is gone and tells nothing.

    Raises ReadFailed, LogDamaged, LogReleased.
    """
    record = shard.record
    end_offset = record.start_offset
    if record.segments:
        last = record.segments[-1]
        end_offset = last.first_offset if last.ledger_id in shard.ledgers else last.end_offset
    known = None if inherited is None or inherited.cursor_ledger is None else inherited.cursor_ledger.ledger_id
    if inherited is None or not inherited.cursors or (known or 0) != record.cursor_ledger:
        return TakenOver(end_offset, 0 if inherited is None else inherited.last_time_us, await _replay(shard, None))
    replay = CursorReplay()
    replay.covered_offset = record.start_offset
    shard.closed_cursor = inherited.cursor_ledger
    try:
        for entry in inherited.cursors:
            replay_entry(entry, replay)
    except DamagedCursorEntry as error:
        raise LogDamaged(f"cursors that were passed on do not parse: shard=`{record.shard_id}` {error}") from error
    return TakenOver(end_offset, inherited.last_time_us, replay)


class _Plan:
    """The change of step 3, and what it says about the log."""

    def __init__(self, shard: OwnedShard) -> None:
        record = shard.record
        self._shard = shard
        self.change = ShardChange(record)
        self.end_offset = record.segments[-1].end_offset if record.segments else record.start_offset
        self.last_time_us = 0

    def build(self, record: ShardRecord) -> ShardChange:
        """The broker may have renewed its session meanwhile."""
        return replace(self.change, record=replace(self.change.record, owner=record.owner))

    def end_current(self, ledger_id: int, found: _Data | None) -> None:
        if ledger_id not in self._shard.ledgers:
            return
        record = self.change.record
        open_segment = record.segments[-1]
        self.end_offset = open_segment.first_offset
        before = replace(record, segments=record.segments[:-1])
        if found is None:
            self._apply(before, delete=(self._shard.ledgers[ledger_id],))
            return
        if found.first.first_offset != open_segment.first_offset:
            raise LogDamaged(
                f"segment does not begin where its record says: ledger=`{ledger_id}` "
                f"first_offset=`{open_segment.first_offset}` found=`{found.first.first_offset}`"
            )
        self._append(before, found)

    def judge_next(self, found: _Data | None) -> None:
        record = self.change.record
        if record.next_ledger == 0:
            return
        unlinked = replace(record, next_ledger=0)
        if found is None or found.first.first_offset != self.end_offset:
            self._apply(unlinked, delete=self._shard.linked(record.next_ledger))
        else:
            self._append(unlinked, found)

    def end_cursors(self, found: RecoveredLedger | None) -> None:
        record = self.change.record
        if record.next_cursor:
            gone = self._shard.linked(record.next_cursor)
            self._apply(replace(record, next_cursor=0), delete=gone)
        if found is None:
            return
        if found.record.last_entry == NO_ENTRY:
            gone = (self._shard.ledgers[found.record.ledger_id],)
            self._apply(replace(self.change.record, cursor_ledger=0), delete=gone)
        else:
            self._apply(self.change.record, put=(found.record,))

    def _append(self, record: ShardRecord, found: _Data) -> None:
        messages = found.last.end_offset - found.first.first_offset
        if messages == 0:
            self._apply(record, delete=(self._shard.ledgers[found.record.ledger_id],))
            return
        segment = Segment(
            ledger_id=found.record.ledger_id,
            first_offset=found.first.first_offset,
            first_time_us=found.first.publish_time_us,
            messages=messages,
            bytes=found.record.length,
        )
        linked, pages = link_segment(record, segment)
        self._apply(linked, put=(found.record,))
        self.change = replace(self.change, put_pages=self.change.put_pages + pages)
        self.end_offset = segment.end_offset
        self.last_time_us = found.last.publish_time_us

    def _apply(
        self, record: ShardRecord, put: tuple[LedgerRecord, ...] = (), delete: tuple[LedgerRecord, ...] = ()
    ) -> None:
        change = self.change
        self.change = replace(
            change, record=record, put_ledgers=change.put_ledgers + put, delete_ledgers=change.delete_ledgers + delete
        )


async def _side_by_side(
    first: Coroutine[Any, Any, T], second: Coroutine[Any, Any, T], third: Coroutine[Any, Any, U]
) -> tuple[T, T, U]:
    """Lets all of them end before one's failure is raised: nothing goes on in the background."""
    tasks = asyncio.ensure_future(first), asyncio.ensure_future(second), asyncio.ensure_future(third)
    try:
        await asyncio.wait(tasks)
    finally:
        for task in tasks:
            task.cancel()
    for task in tasks:
        if error := task.exception():
            raise error
    return tasks[0].result(), tasks[1].result(), tasks[2].result()


async def _recover(shard: OwnedShard, ledger_id: int) -> RecoveredLedger | None:
    """None if there is no such ledger, or it is closed."""
    ledger = shard.ledgers.get(ledger_id)
    try:
        return None if ledger is None else await shard.recover(ledger, shard.settings.recovery_attempts)
    except RecoveryUndecided as error:
        raise LogUndecided(f"shard cannot be taken over now: shard=`{shard.shard_id}` {error}") from error


async def _recover_data(shard: OwnedShard, ledger_id: int) -> _Data | None:
    """None also if it is empty."""
    found = await _recover(shard, ledger_id)
    if found is None or found.last_payload is None:
        return None
    try:
        last = peek_entry(found.last_payload)
        first = last if found.record.last_entry == 0 else peek_entry(await _first_payload(shard, found.record))
    except MalformedEntry as error:
        raise LogDamaged(f"entry of a recovered ledger does not parse: ledger=`{ledger_id}` {error}") from error
    return _Data(found.record, first, last)


async def _first_payload(shard: OwnedShard, ledger: LedgerRecord) -> bytes | memoryview:
    try:
        return (await shard.client.reader(ledger, lac=None).read(0, 0, 1))[0].payload
    except ReadError as error:
        raise ReadFailed(f"first entry of a recovered ledger cannot be read: {error}") from error


# --- cursors ---


async def _replay(shard: OwnedShard, recovered: LedgerRecord | None) -> CursorReplay:
    record = shard.record
    replay = CursorReplay()
    replay.covered_offset = record.start_offset
    try:
        if record.cursor_ledger:
            shard.closed_cursor = recovered or await _closed_cursor_ledger(shard)
            await _replay_ledger(shard, shard.closed_cursor, replay)
        elif record.inline_cursors:
            replay_entry(record.inline_cursors, replay)
    except DamagedCursorEntry as error:
        raise LogDamaged(f"cursors cannot be rebuilt: shard=`{record.shard_id}` {error}") from error
    return replay


async def _closed_cursor_ledger(shard: OwnedShard) -> LedgerRecord:
    ledger_id = shard.record.cursor_ledger
    retry = Retry(shard.settings)
    while True:
        try:
            found = await shard.metadata.closed_ledger(ledger_id)
        except MetadataUnavailable:
            await retry.wait()
            continue
        if found is None:
            raise LogDamaged(f"the record of the cursor ledger is missing: ledger=`{ledger_id}`")
        return found


async def _replay_ledger(shard: OwnedShard, ledger: LedgerRecord, replay: CursorReplay) -> None:
    reader = shard.client.reader(ledger, lac=None)
    following = 0
    while following <= ledger.last_entry:
        try:
            entries = await reader.read(following, ledger.last_entry, REPLAY_READ_BYTES)
        except ReadError as error:
            raise ReadFailed(f"cursor ledger cannot be read: {error}") from error
        for entry in entries:
            replay_entry(entry.payload, replay)
        following = entries[-1].entry_id + 1
