"""What the cores ask of the shells that drive them: frozen values, performed in order. Pure.

Writer:     Send, Confirmed, Commit, Lost, WantsRoll, Wake, Report
Recovery:   AskLac, AskEntries, Send, Recovered, Undecided, Wake, Report
Reads:      AskEntries, Found, NotFound, Wake
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple

from magnetar.ledger.bookie_rpc import AddGroup, LacQuery, ReadGroup
from magnetar.ledger.errors import LostReason
from magnetar.metadata.records import LedgerRecord


class ReportKind(Enum):
    CONFLICT = "a bookie holds other bytes under the same ids"
    WRONG_TOKEN = "a bookie knows the ledger by another token"
    DAMAGED_ENTRY = "a bookie sent a damaged entry"
    MEMBER_FAILED = "a member of the ensemble failed"
    MEMBER_BACK = "a failed member answers again"
    ENSEMBLE_CHANGED = "the ensemble was changed"


class Send(NamedTuple):
    """Hand the group to the bookie; its answer comes back under this sequence."""

    sequence: int
    bookie: str
    group: AddGroup


@dataclass(frozen=True, slots=True)
class AskLac:
    sequence: int
    bookie: str
    query: LacQuery


@dataclass(frozen=True, slots=True)
class AskEntries:
    sequence: int
    bookie: str
    group: ReadGroup


class Confirmed(NamedTuple):
    """All entries up to and with this one are confirmed."""

    last_entry: int


@dataclass(frozen=True, slots=True)
class Commit:
    """Compare-and-set the record; its outcome is an event, however long it takes."""

    old: LedgerRecord
    new: LedgerRecord


@dataclass(frozen=True, slots=True)
class Lost:
    """The ledger is lost to its writer. Nothing follows."""

    reason: LostReason
    detail: str


@dataclass(frozen=True, slots=True)
class WantsRoll:
    """The ensemble should change and may not any more: continue in another ledger."""

    reason: str


@dataclass(frozen=True, slots=True)
class Recovered:
    """The record to commit as CLOSED, and the envelope of its last entry (None: it is empty). Nothing follows."""

    record: LedgerRecord
    last_envelope: bytes | None


@dataclass(frozen=True, slots=True)
class Undecided:
    """Recovery cannot go on now. Nothing follows. `superseded`: a higher epoch was seen."""

    reason: str
    said: Mapping[str, str]
    superseded: bool = False


@dataclass(frozen=True, slots=True)
class Found:
    """A prefix of the entries asked for, at least one; from this bookie. Nothing follows."""

    bookie: str
    entries: tuple[bytes, ...]


@dataclass(frozen=True, slots=True)
class NotFound:
    """No bookie gave the first entry. `proven`: every member of its write set denied it. Nothing follows."""

    proven: bool
    said: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Wake:
    """Call tick() at this time, or before."""

    at: float


@dataclass(frozen=True, slots=True)
class Report:
    """Something an operator wants to know. CONFLICT, WRONG_TOKEN and DAMAGED_ENTRY must never happen."""

    kind: ReportKind
    bookie: str
    detail: str


WriterEffect = Send | Confirmed | Commit | Lost | WantsRoll | Wake | Report
RecoveryEffect = AskLac | AskEntries | Send | Recovered | Undecided | Wake | Report
ReadEffect = AskEntries | Found | NotFound | Wake
