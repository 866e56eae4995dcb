"""The shell around reads: asks bookies, verifies what they send, tells what is damaged."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from math import inf

from magnetar.ledger.bookie_rpc import Bookies, EntryAnswer, EntryOutcome, ReadResult
from magnetar.ledger.driving import NO_READ_ANSWER, answer_of, tell
from magnetar.ledger.effects import AskEntries, Found, NotFound, ReadEffect, Report, ReportKind, Wake
from magnetar.ledger.errors import EntryMissing, EntryUnavailable
from magnetar.ledger.metrics import LedgerMetrics
from magnetar.ledger.reads import OutrunBookies, ReadCore, ReadLimits, ReplicaOrder
from magnetar.metadata.records import LedgerRecord, LedgerState
from magnetar.wire import envelope

READ_BYTES_MAX = 1 << 20


@dataclass(frozen=True, slots=True)
class Entry:
    """A verified entry. `lac` is what its writer had confirmed when it added it."""

    entry_id: int
    payload: memoryview
    lac: int


class ReadHandle:
    """A ledger, for reading. Made by `LedgerClient.reader`. Reads of one handle prefer the same bookie."""

    def __init__(
        self,
        record: LedgerRecord,
        bookies: Bookies,
        *,
        lac: Callable[[], int] | None,
        limits: ReadLimits,
        metrics: LedgerMetrics,
        outrun: OutrunBookies,
    ) -> None:
        if record.state is not LedgerState.CLOSED and lac is None:
            raise ValueError(f"what may be read of an open ledger is up to its writer: ledger=`{record.ledger_id}`")
        self._record = record
        self._bookies = bookies
        self._lac = lac
        self._limits = limits
        self._metrics = metrics
        self._order = ReplicaOrder(record.ledger_id, outrun)

    @property
    def record(self) -> LedgerRecord:
        return self._record

    @property
    def last_entry(self) -> int:
        """The last entry that may be read: what lies beyond was never confirmed, whatever bookies hold."""
        if self._record.state is LedgerState.CLOSED or self._lac is None:
            return self._record.last_entry
        return self._lac()

    def update(self, record: LedgerRecord) -> None:
        """The ledger's record changed: it was closed, or its fragments moved."""
        assert record.ledger_id == self._record.ledger_id
        self._record = record

    async def read(self, first: int, last: int, max_bytes: int = READ_BYTES_MAX) -> list[Entry]:
        """A prefix of the entries first..last (inclusive), at least one.

        Raises ValueError if `first` was not confirmed, EntryUnavailable (try again), EntryMissing (it is lost).
        """
        last = min(last, self.last_entry)
        if not 0 <= first <= last:
            raise ValueError(
                f"no such confirmed entries: ledger=`{self._record.ledger_id}` first=`{first}` last=`{last}`"
            )
        core = ReadCore(self._record, first, last, max_bytes, self._order, self._limits)
        outcome = await self._run(core)
        if isinstance(outcome, Found):
            return [_entry(entry_id, data) for entry_id, data in enumerate(outcome.entries, first)]
        self._metrics.failed_reads.inc()
        kind = EntryMissing if outcome.proven else EntryUnavailable
        raise kind(self._record.ledger_id, first, outcome.said)

    async def _run(self, core: ReadCore) -> Found | NotFound:
        """Every call completes within its connection's timeout, so this ends."""
        loop = asyncio.get_running_loop()
        asked: dict[asyncio.Future[ReadResult], AskEntries] = {}
        wake_at = inf
        effects: list[ReadEffect] = core.begin(loop.time())
        while True:
            for effect in effects:
                match effect:
                    case AskEntries(_, bookie, group):
                        asked[self._bookies.rpc(bookie).read(group)] = effect
                    case Wake(at):
                        wake_at = at
                    case Found() | NotFound():
                        return effect
            timeout = None if wake_at == inf else max(0.0, wake_at - loop.time())
            done, _ = await asyncio.wait(asked, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
            if done:
                effects = self._answered(core, {asked.pop(future): future for future in done}, loop.time())
            else:
                wake_at = inf
                effects = core.tick(loop.time())
                self._metrics.hedges.inc(sum(isinstance(effect, AskEntries) for effect in effects))

    def _answered(
        self, core: ReadCore, done: dict[AskEntries, asyncio.Future[ReadResult]], now: float
    ) -> list[ReadEffect]:
        effects: list[ReadEffect] = []
        for ask, future in sorted(done.items(), key=lambda item: item[0].sequence):
            answers, message = self._verified(ask, answer_of(future, NO_READ_ANSWER))
            effects += core.answered(ask.sequence, answers, message, now)
        return effects

    def _verified(self, ask: AskEntries, result: ReadResult) -> tuple[list[EntryAnswer], str]:
        """The answers up to the first that is no verified copy, and that one."""
        answers: list[EntryAnswer] = []
        for entry_id, answer in enumerate(result.answers, ask.group.first_entry):
            if answer.outcome is EntryOutcome.HAVE:
                try:
                    envelope.verify(answer.entry or b"", ask.group.ledger_id, entry_id)
                except envelope.DamagedEnvelope as damage:
                    detail = f"ledger=`{ask.group.ledger_id}` entry=`{entry_id}` damage=`{damage}`"
                    tell(Report(ReportKind.DAMAGED_ENTRY, ask.bookie, detail), self._metrics)
                    answers.append(EntryAnswer(EntryOutcome.UNKNOWN))
                    return answers, f"damaged: {damage}"
            answers.append(answer)
            if answer.outcome is not EntryOutcome.HAVE:
                break
        return answers, result.message


def _entry(entry_id: int, data: bytes) -> Entry:
    return Entry(entry_id, envelope.payload(data), envelope.peek(data).lac)
