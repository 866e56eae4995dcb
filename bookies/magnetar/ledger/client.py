"""The ledgers of a cluster, for those who write and read them.

Nothing here writes metadata: records come in, new records go out, and whoever owns the shard commits them.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from random import Random

from prometheus_client import CollectorRegistry

from magnetar.ledger.bookie_rpc import Bookies
from magnetar.ledger.errors import (
    EntryMissing,
    EntryUnavailable,
    LedgerBusy,
    LedgerError,
    LedgerLost,
    LostReason,
    NotEnoughBookies,
    ReadError,
    RecoverySuperseded,
    RecoveryUndecided,
    WriterClosed,
)
from magnetar.ledger.fragments import Unreplicated
from magnetar.ledger.metrics import LedgerMetrics
from magnetar.ledger.placement import choose_ensemble, is_eligible
from magnetar.ledger.quorum import Quorum
from magnetar.ledger.read_handle import Entry, ReadHandle
from magnetar.ledger.reads import OutrunBookies, ReadLimits
from magnetar.ledger.recoverer import RecoveredLedger, Recoverer
from magnetar.ledger.recovery import RecoveryLimits
from magnetar.ledger.write_handle import CommitChange, Standing, WriteHandle
from magnetar.ledger.writer import CommitOutcome, WriterLimits
from magnetar.metadata.records import Fragment, LedgerPurpose, LedgerRecord, LedgerState

__all__ = [
    "CommitChange",
    "CommitOutcome",
    "Entry",
    "EntryMissing",
    "EntryUnavailable",
    "LedgerBusy",
    "LedgerClient",
    "LedgerError",
    "LedgerLost",
    "LedgerSettings",
    "LostReason",
    "NotEnoughBookies",
    "ReadError",
    "ReadHandle",
    "RecoveredLedger",
    "RecoverySuperseded",
    "RecoveryUndecided",
    "Standing",
    "Unreplicated",
    "WriteHandle",
    "WriterClosed",
]

TOKEN_BYTES = 16


@dataclass(frozen=True, slots=True)
class LedgerSettings:
    """How new ledgers are replicated, and how long bookies are waited for."""

    ensemble_size: int = 3
    write_quorum: int = 3
    ack_quorum: int = 2
    add_timeout_s: float = 5.0
    hedge_s: float = 0.5
    recovery_give_up_s: float = 10.0


class LedgerClient:
    """Plans, writes, recovers and reads ledgers. Used on one event loop."""

    def __init__(
        self,
        bookies: Bookies,
        *,
        now_us: Callable[[], int],
        rng: Random,
        settings: LedgerSettings | None = None,
        registry: CollectorRegistry | None = None,
    ) -> None:
        self.settings = settings or LedgerSettings()
        self._bookies = bookies
        self._now_us = now_us
        self._rng = rng
        self._metrics = LedgerMetrics.of(registry or CollectorRegistry())
        self._quorum = Quorum(self.settings.ensemble_size, self.settings.write_quorum, self.settings.ack_quorum)
        self._writer_limits = WriterLimits(add_timeout_s=self.settings.add_timeout_s)
        self._recovery_limits = RecoveryLimits(give_up_s=self.settings.recovery_give_up_s)
        self._read_limits = ReadLimits(hedge_s=self.settings.hedge_s)
        self._outrun = OutrunBookies()

    def lowest_id(self) -> int:
        """Of a new ledger that every bookie here may store: one that came back empty takes no lower ids."""
        return max((bookie.ledger_floor for bookie in self._bookies.registered()), default=0)

    def fills_all_places(self) -> bool:
        """A new ledger would have no vacant place."""
        lowest = self.lowest_id()
        eligible = sum(is_eligible(bookie, lowest) for bookie in self._bookies.registered())
        return eligible >= self.settings.ensemble_size

    def plan(
        self, ledger_id: int, shard_id: int, purpose: LedgerPurpose, epoch: int, rack: str | None = None
    ) -> LedgerRecord:
        """The record of a new, OPEN ledger; places that no bookie can fill now are vacant. Commits nothing.

        Raises NotEnoughBookies if fewer could store its entries than an acknowledgement needs.
        """
        ensemble = choose_ensemble(self._quorum, self._bookies.registered(), ledger_id, self._rng, rack=rack)
        return LedgerRecord(
            ledger_id=ledger_id,
            shard_id=shard_id,
            purpose=purpose,
            state=LedgerState.OPEN,
            epoch=epoch,
            token=self._rng.randbytes(TOKEN_BYTES),
            write_quorum=self._quorum.write_quorum,
            ack_quorum=self._quorum.ack_quorum,
            fragments=(Fragment(0, ensemble),),
            created_us=self._now_us(),
        )

    def writer(
        self,
        record: LedgerRecord,
        *,
        commit: CommitChange,
        on_confirmed: Callable[[int], None],
        on_lost: Callable[[LedgerLost], None],
        on_wants_roll: Callable[[str], None] | None = None,
    ) -> WriteHandle:
        """The writer of a new ledger whose OPEN record stands in metadata. A ledger has one writer in its life.

        commit          compare-and-sets an ensemble change; returns when the outcome is known, however long that takes
        on_confirmed    gets the last confirmed entry, once per advance, in order
        on_lost         is called at most once: fenced, or closed elsewhere
        on_wants_roll   is called at most once: the ledger should be closed for another
        Raises ValueError unless the record is OPEN and empty.
        """
        return WriteHandle(
            record,
            self._bookies,
            commit=commit,
            on_confirmed=on_confirmed,
            on_lost=on_lost,
            on_wants_roll=on_wants_roll,
            rng=self._rng,
            limits=self._writer_limits,
            metrics=self._metrics,
        )

    async def recover(self, record: LedgerRecord) -> RecoveredLedger:
        """Finds the end of a ledger whose record is IN_RECOVERY, its epoch raised; fences its writer.

        Returns the record to commit as CLOSED. Raises RecoveryUndecided: try again later; ValueError in another state.
        """
        recoverer = Recoverer(
            record,
            self._bookies,
            rng=self._rng,
            limits=self._recovery_limits,
            writer_limits=self._writer_limits,
            metrics=self._metrics,
        )
        return await recoverer.run()

    async def recover_all(self, records: list[LedgerRecord]) -> list[RecoveredLedger]:
        """`recover` of several ledgers side by side; the results in their order. Raises what the first failure raises,
        after all have ended."""
        results = await asyncio.gather(*map(self.recover, records), return_exceptions=True)
        for result in results:
            if isinstance(result, BaseException):
                raise result
        return [result for result in results if not isinstance(result, BaseException)]

    def reader(self, record: LedgerRecord, *, lac: Callable[[], int] | None = None) -> ReadHandle:
        """Reads the ledger up to its end if it is CLOSED, else up to what `lac` says."""
        return ReadHandle(
            record, self._bookies, lac=lac, limits=self._read_limits, metrics=self._metrics, outrun=self._outrun
        )
