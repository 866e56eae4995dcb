"""The shell around a writer's core: hands groups to bookies, answers to the core, and confirmations to the owner."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from enum import Enum
from functools import partial

from magnetar.ledger.bookie_rpc import AddResult, Bookies, EntryOutcome, LacQuery, LacResult
from magnetar.ledger.driving import NO_ADD_ANSWER, NO_LAC_ANSWER, Alarm, answer_of, log, tell
from magnetar.ledger.effects import Commit, Confirmed, Lost, Report, Send, Wake, WantsRoll, WriterEffect
from magnetar.ledger.errors import LedgerLost, LostReason, WriterClosed
from magnetar.ledger.fragments import Unreplicated
from magnetar.ledger.metrics import LedgerMetrics
from magnetar.ledger.placement import Randomness
from magnetar.ledger.writer import CommitOutcome, Phase, WriterCore, WriterLimits
from magnetar.metadata.records import VACANT, LedgerRecord

SETTLE_S = 1.0
"""close() waits so long for members beyond the ack quorum, so that the segment needs no repair."""

CommitChange = Callable[[LedgerRecord, LedgerRecord], Awaitable[CommitOutcome]]


class Standing(Enum):
    """What bookies say about a writer's claim to its ledger."""

    MINE = 1
    """When they were asked, no recoverer had fenced enough of them to decide anything."""
    LOST = 2
    UNKNOWN = 3


class WriteHandle:
    """An open ledger, for its one writer. Made by `LedgerClient.writer`; used on one event loop.

    Callbacks are called from the loop, not from within add(): on_confirmed once per advance, in order; on_lost at most
    once, and nothing after it.
    """

    def __init__(
        self,
        record: LedgerRecord,
        bookies: Bookies,
        *,
        commit: CommitChange,
        on_confirmed: Callable[[int], None],
        on_lost: Callable[[LedgerLost], None],
        on_wants_roll: Callable[[str], None] | None,
        rng: Randomness,
        limits: WriterLimits,
        metrics: LedgerMetrics,
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._core = WriterCore(record, bookies.registered(), rng, limits)
        self._bookies = bookies
        self._commit_change = commit
        self._on_confirmed = on_confirmed
        self._on_lost = on_lost
        self._on_wants_roll = on_wants_roll
        self._metrics = metrics
        self._confirmed = self._core.lac
        self._flush_due = False
        self._change: asyncio.Task[None] | None = None
        self._lost: LedgerLost | None = None
        self._waiters: list[tuple[Callable[[], bool], asyncio.Future[None]]] = []
        self._alarm = Alarm(self._loop, self._tick)
        self._forget_bookies = bookies.on_change(self._bookies_changed)
        # A vacant place may be filled, and a member that is gone replaced, before the first add.
        self._loop.call_soon(self._tick)

    # What the owner sees.

    @property
    def record(self) -> LedgerRecord:
        """As last committed."""
        return self._core.record

    @property
    def ledger_id(self) -> int:
        return self._core.ledger_id

    @property
    def lac(self) -> int:
        return self._core.lac

    @property
    def length(self) -> int:
        """Payload bytes of all entries added."""
        return self._core.length

    @property
    def next_entry(self) -> int:
        return self._core.next_entry

    @property
    def in_flight_entries(self) -> int:
        return self._core.in_flight_entries

    @property
    def in_flight_bytes(self) -> int:
        return self._core.in_flight_bytes

    @property
    def wants_roll(self) -> bool:
        """The ensemble should change and may not any more."""
        return bool(self._core.wants_roll)

    @property
    def stalled(self) -> str | None:
        """Why entries wait for bookies, None if they do not."""
        return self._core.stalled

    @property
    def lost(self) -> LedgerLost | None:
        return self._lost

    @property
    def unreplicated(self) -> list[Unreplicated]:
        """Of the confirmed entries, what each place's bookie has not acknowledged."""
        return self._core.unreplicated()

    def describe(self) -> str:
        return self._core.describe()

    # What the owner does.

    def add(self, payload: bytes) -> int:
        """Takes the next entry and returns its id. It is sent before the loop waits again, with what else was added.

        Raises LedgerLost, WriterClosed, or ValueError for an entry that is too large.
        """
        try:
            entry_id = self._core.add(payload)
        except WriterClosed:
            if self._lost is not None:
                raise self._lost from None
            raise
        if not self._flush_due:
            self._flush_due = True
            self._loop.call_soon(self._flush)
        return entry_id

    async def confirmed(self) -> None:
        """Returns when all that was added is confirmed; the outcome of an ensemble change may still be unknown.

        Raises LedgerLost, WriterClosed (abandoned).
        """
        await self._until(lambda: self._core.in_flight_entries == 0)

    async def drain(self) -> None:
        """Returns when all that was added is confirmed and no ensemble change is under way. Raises LedgerLost,
        WriterClosed (abandoned)."""
        await self._until(lambda: self._core.is_settled)

    async def close(self, settle_s: float = SETTLE_S) -> LedgerRecord:
        """Takes no more entries, completes those that it has, waits a moment for slow members; then `closed_record`.

        Raises LedgerLost, WriterClosed (abandoned).
        """
        self._core.seal()
        await self.drain()
        try:
            async with asyncio.timeout(settle_s):
                await self._until(lambda: self._core.is_settled and self._core.is_replicated)
        except TimeoutError:
            await self.drain()
        return self.closed_record()

    def closed_record(self) -> LedgerRecord:
        """The record to commit as CLOSED; nothing can be added any more. Once committed, nothing changes it but repair.

        Raises LedgerBusy while something is in flight, LedgerLost, WriterClosed (abandoned).
        """
        if self._lost is not None:
            raise self._lost
        first = self._core.phase is not Phase.CLOSED
        record = self._core.closed_record()
        if first:
            self._metrics.unreplicated.inc(len(self._core.unreplicated()))
            self._end(WriterClosed(f"the ledger is closed: ledger=`{self.ledger_id}`"))
        return record

    def abandon(self) -> None:
        """Stops at once, calls nothing back any more. A change whose outcome is awaited goes on being awaited."""
        self._core.abandon()
        self._end(WriterClosed(f"the writer was abandoned: ledger=`{self.ledger_id}`"))

    def hold_changes(self, held: bool) -> None:
        """While held no ensemble change is begun: for the time that the metadata store is silent."""
        self._drive(self._core.hold_changes(held, self._loop.time()))

    async def standing(self) -> Standing:
        """Asks the members whether the ledger was fenced, without fencing it; if so, it is lost.

        MINE: Qa members of every write set were not fenced when they answered: whoever recovers fences one of any Qa.
        """
        record = self.record
        query = LacQuery(record.ledger_id, record.epoch, record.token)
        members = [(place, bookie) for place, bookie in enumerate(record.fragments[-1].bookies) if bookie != VACANT]
        asked = {self._bookies.rpc(bookie).read_lac(query): (place, bookie) for place, bookie in members}
        known, pending = 0, set(asked)
        can_acknowledge = self._core.quorum.can_acknowledge
        while pending and not can_acknowledge(known):
            done, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
            for future in done:
                place, bookie = asked[future]
                if self._lost_by(bookie, answer_of(future, NO_LAC_ANSWER)):
                    return Standing.LOST
                if answer_of(future, NO_LAC_ANSWER).outcome is not EntryOutcome.UNKNOWN:
                    known |= 1 << place
        if self._lost is not None:
            return Standing.LOST
        return Standing.MINE if can_acknowledge(known) else Standing.UNKNOWN

    def _lost_by(self, bookie: str, result: LacResult) -> bool:
        if result.epoch > self.record.epoch:
            self._drive(self._core.lose(LostReason.STALE_EPOCH, f"{bookie} has seen epoch {result.epoch}"))
        elif result.fenced:
            self._drive(self._core.lose(LostReason.FENCED, f"{bookie} says so"))
        else:
            return False
        return True

    # Events.

    def _flush(self) -> None:
        self._flush_due = False
        self._drive(self._core.flush(self._loop.time()))

    def _tick(self) -> None:
        self._drive(self._core.tick(self._loop.time()))

    def _bookies_changed(self) -> None:
        self._drive(self._core.bookies_changed(self._bookies.registered(), self._loop.time()))

    def _answered(self, sequence: int, future: asyncio.Future[AddResult]) -> None:
        self._drive(self._core.answered(sequence, answer_of(future, NO_ADD_ANSWER), self._loop.time()))

    async def _commit(self, change: Commit) -> None:
        try:
            outcome = await self._commit_change(change.old, change.new)
        except Exception as error:
            log.exception("an ensemble change could not be committed", ledger=self.ledger_id)
            self._drive(self._core.lose(LostReason.FAILED, f"committing an ensemble change: {error!r}"))
        else:
            self._drive(self._core.committed(outcome, self._loop.time()))

    # Effects.

    def _drive(self, effects: Sequence[WriterEffect]) -> None:
        for effect in effects:
            if type(effect) is Send:
                future = self._bookies.rpc(effect.bookie).add(effect.group)
                future.add_done_callback(partial(self._answered, effect.sequence))
            elif type(effect) is Confirmed:
                self._confirm(effect.last_entry)
            else:
                self._drive_rarely(effect)
        if self._waiters:
            self._wake_waiters()

    def _drive_rarely(self, effect: WriterEffect) -> None:
        match effect:
            case Wake(at):
                self._alarm.set(at)
            case Commit():
                self._change = self._loop.create_task(self._commit(effect), name=f"ensemble of ledger {self.ledger_id}")
            case WantsRoll(reason):
                log.info("ledger wants to be rolled", ledger=self.ledger_id, reason=reason)
                if self._on_wants_roll is not None:
                    self._on_wants_roll(reason)
            case Report():
                tell(effect, self._metrics)
            case Lost(reason, detail):
                self._lose(LedgerLost(self.ledger_id, reason, self._core.lac, detail))

    def _confirm(self, last_entry: int) -> None:
        self._metrics.confirmed_entries.inc(last_entry - self._confirmed)
        self._confirmed = last_entry
        self._on_confirmed(last_entry)

    def _lose(self, lost: LedgerLost) -> None:
        self._lost = lost
        self._metrics.lost.labels(lost.reason.name.lower()).inc()
        log.warning("ledger is lost", ledger=self.ledger_id, reason=lost.reason.value, detail=str(lost))
        self._end(lost)
        self._on_lost(lost)

    def _end(self, error: LedgerLost | WriterClosed) -> None:
        self._alarm.cancel()
        self._forget_bookies()
        waiters, self._waiters = self._waiters, []
        for _, future in waiters:
            if not future.done():
                future.set_exception(error)

    # Waiting.

    async def _until(self, holds: Callable[[], bool]) -> None:
        if self._lost is not None:
            raise self._lost
        if self._core.phase is Phase.ABANDONED:
            raise WriterClosed(f"the writer was abandoned: ledger=`{self.ledger_id}`")
        if not holds():
            future = self._loop.create_future()
            self._waiters.append((holds, future))
            await future

    def _wake_waiters(self) -> None:
        waiting = []
        for holds, future in self._waiters:
            if future.done():
                continue
            if holds():
                future.set_result(None)
            else:
                waiting.append((holds, future))
        self._waiters = waiting
