"""The shell around a recovery's core: asks bookies, feeds the core, returns what it found."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from magnetar.ledger.bookie_rpc import AddResult, Bookies, LacResult, ReadResult
from magnetar.ledger.driving import NO_ADD_ANSWER, NO_LAC_ANSWER, NO_READ_ANSWER, Alarm, answer_of, log, tell
from magnetar.ledger.effects import AskEntries, AskLac, Recovered, RecoveryEffect, Report, Send, Undecided, Wake
from magnetar.ledger.errors import RecoverySuperseded, RecoveryUndecided
from magnetar.ledger.fragments import Unreplicated
from magnetar.ledger.metrics import LedgerMetrics
from magnetar.ledger.placement import Randomness
from magnetar.ledger.recovery import RecoveryCore, RecoveryLimits
from magnetar.ledger.writer import WriterLimits
from magnetar.metadata.records import LedgerRecord
from magnetar.wire import envelope


@dataclass(frozen=True, slots=True)
class RecoveredLedger:
    """What a recovery found.

    record         to commit as CLOSED; if somebody else did, take theirs
    last_payload   of the last entry, None if the ledger is empty
    unreplicated   what members may lack
    """

    record: LedgerRecord
    last_payload: bytes | None
    unreplicated: tuple[Unreplicated, ...] = ()


class Recoverer:
    """One recovery: `run` it once."""

    def __init__(
        self,
        record: LedgerRecord,
        bookies: Bookies,
        *,
        rng: Randomness,
        limits: RecoveryLimits,
        writer_limits: WriterLimits,
        metrics: LedgerMetrics,
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._core = RecoveryCore(record, bookies.registered(), rng, limits, writer_limits)
        self._bookies = bookies
        self._metrics = metrics
        self._outcome: asyncio.Future[RecoveredLedger] = self._loop.create_future()
        self._alarm = Alarm(self._loop, self._tick)

    async def run(self) -> RecoveredLedger:
        """All entries of the result have an ack quorum on return. Raises RecoveryUndecided."""
        forget_bookies = self._bookies.on_change(self._bookies_changed)
        try:
            self._drive(self._core.begin(self._loop.time()))
            recovered = await self._outcome
        except RecoveryUndecided as undecided:
            self._metrics.recoveries.labels("undecided").inc()
            log.warning(
                "recovery is undecided", ledger=undecided.ledger_id, reason=undecided.reason, said=undecided.said
            )
            raise
        finally:
            forget_bookies()
            self._alarm.cancel()
        self._metrics.recoveries.labels("recovered").inc()
        return recovered

    def describe(self) -> str:
        return self._core.describe()

    def _tick(self) -> None:
        self._drive(self._core.tick(self._loop.time()))

    def _bookies_changed(self) -> None:
        self._drive(self._core.bookies_changed(self._bookies.registered(), self._loop.time()))

    def _lac_answered(self, sequence: int, future: asyncio.Future[LacResult]) -> None:
        self._drive(self._core.lac_answered(sequence, answer_of(future, NO_LAC_ANSWER), self._loop.time()))

    def _read_answered(self, sequence: int, future: asyncio.Future[ReadResult]) -> None:
        self._drive(self._core.read_answered(sequence, answer_of(future, NO_READ_ANSWER), self._loop.time()))

    def _add_answered(self, sequence: int, future: asyncio.Future[AddResult]) -> None:
        self._drive(self._core.add_answered(sequence, answer_of(future, NO_ADD_ANSWER), self._loop.time()))

    def _drive(self, effects: Sequence[RecoveryEffect]) -> None:
        if self._outcome.done():
            return
        for effect in effects:
            match effect:
                case AskLac(sequence, bookie, query):
                    lac = self._bookies.rpc(bookie).read_lac(query)
                    lac.add_done_callback(partial(self._lac_answered, sequence))
                case AskEntries(sequence, bookie, group):
                    read = self._bookies.rpc(bookie).read(group)
                    read.add_done_callback(partial(self._read_answered, sequence))
                case Send(sequence, bookie, added):
                    add = self._bookies.rpc(bookie).add(added)
                    add.add_done_callback(partial(self._add_answered, sequence))
                case Wake(at):
                    self._alarm.set(at)
                case Report():
                    tell(effect, self._metrics)
                case Recovered(record, data):
                    payload = None if data is None else bytes(envelope.payload(data))
                    missed = tuple(self._core.unreplicated())
                    self._outcome.set_result(RecoveredLedger(record, payload, missed))
                case Undecided(reason, said, superseded):
                    kind = RecoverySuperseded if superseded else RecoveryUndecided
                    self._outcome.set_exception(kind(self._core.record.ledger_id, reason, said))
