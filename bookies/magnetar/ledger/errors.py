"""What the ledger layer raises; each kind says what to do. Pure.

LedgerError
├── NotEnoughBookies      nothing was created: add bookies, or try later
├── LedgerLost            read the shard's record: it is another's, or the ledger is to be recovered
├── WriterClosed          add to another ledger
├── LedgerBusy            close it when what is in flight has settled
├── RecoveryUndecided     recover again later
│   └── RecoverySuperseded   read the ledger's record first: somebody raised its epoch
└── ReadError
    ├── EntryUnavailable  read again later
    └── EntryMissing      all its bookies proved that they do not have it: nothing brings it back
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum


class LostReason(Enum):
    FENCED = "fenced"
    """A recoverer has begun: another owner, or one who thinks so."""
    STALE_EPOCH = "stale epoch"
    """A bookie has seen a higher epoch of this ledger."""
    CLOSED_ELSEWHERE = "closed elsewhere"
    """The ledger's record was changed by another."""
    FAILED = "failed"
    """The owner of this writer failed while committing a change."""


class LedgerError(Exception):
    """Something a ledger cannot do."""


class NotEnoughBookies(LedgerError):
    """Fewer bookies accept new entries than an acknowledgement needs. Nothing was created: add some, or try later."""

    def __init__(self, needed: int, available: int) -> None:
        super().__init__(f"not enough writable bookies: needed=`{needed}` available=`{available}`")
        self.needed = needed
        self.available = available


class LedgerLost(LedgerError):
    """The ledger is no longer this writer's. What was confirmed stays; of the rest the outcome is unknown."""

    def __init__(self, ledger_id: int, reason: LostReason, last_confirmed: int, detail: str) -> None:
        super().__init__(
            f"ledger is lost to its writer: ledger=`{ledger_id}` reason=`{reason.value}` "
            f"last_confirmed=`{last_confirmed}` detail=`{detail}`"
        )
        self.ledger_id = ledger_id
        self.reason = reason
        self.last_confirmed = last_confirmed


class WriterClosed(LedgerError):
    """Nothing can be added any more: the writer was sealed, closed or abandoned."""


class LedgerBusy(LedgerError):
    """The ledger cannot be closed yet: entries or an ensemble change are in flight."""


class RecoveryUndecided(LedgerError):
    """Too few bookies said enough to know where the ledger ends. It stays IN_RECOVERY; nothing is lost by trying again.

    said   what each bookie that was asked said last
    """

    def __init__(self, ledger_id: int, reason: str, said: Mapping[str, str]) -> None:
        statements = " ".join(f"{bookie}=`{statement}`" for bookie, statement in said.items())
        super().__init__(f"recovery is undecided: ledger=`{ledger_id}` reason=`{reason}` {statements}".rstrip())
        self.ledger_id = ledger_id
        self.reason = reason
        self.said = dict(said)


class RecoverySuperseded(RecoveryUndecided):
    """A bookie has seen a higher epoch: somebody else recovers this ledger, or has."""


class ReadError(LedgerError):
    """An entry could not be read."""

    WHAT = "entry cannot be read"

    def __init__(self, ledger_id: int, entry_id: int, said: Mapping[str, str]) -> None:
        statements = " ".join(f"{bookie}=`{statement}`" for bookie, statement in said.items())
        super().__init__(f"{self.WHAT}: ledger=`{ledger_id}` entry=`{entry_id}` {statements}".rstrip())
        self.ledger_id = ledger_id
        self.entry_id = entry_id
        self.said = dict(said)


class EntryUnavailable(ReadError):
    """No bookie could give the entry now; at least one of them does not know whether it has it."""

    WHAT = "entry is unavailable"


class EntryMissing(ReadError):
    """Every bookie of the entry's write set proved that it does not have it."""

    WHAT = "entry is on none of its bookies"
