"""The fragments of a ledger: which ensemble holds an entry, and how a record changes when an ensemble does. Pure.

Fragments are ordered by their first entries, the first of them 0. Each but the last ends where the next begins; the
last ends at the ledger's last entry, or is open.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from magnetar.metadata.records import VACANT, CopyReason, CopyTask, Fragment, LedgerRecord, LedgerState

FRAGMENTS_MAX = 16
"""A ledger with so many rolls instead of beginning another: a txn that moves its record stays small."""


@dataclass(frozen=True, slots=True)
class Unreplicated:
    """Entries first_entry..last_entry, those this place holds, that its bookie (VACANT: nobody) did not acknowledge."""

    place: int
    bookie: str
    first_entry: int
    last_entry: int


def fragment_of(record: LedgerRecord, entry_id: int) -> tuple[Fragment, int | None]:
    """The fragment that holds the entry, and the id of the fragment's last entry; None = it is the open last one."""
    end: int | None = record.last_entry if record.state is LedgerState.CLOSED else None
    for fragment in reversed(record.fragments):
        if fragment.first_entry <= entry_id:
            return fragment, end
        end = fragment.first_entry - 1
    raise ValueError(f"no fragment holds the entry: ledger=`{record.ledger_id}` entry=`{entry_id}`")


def appends_fragment(record: LedgerRecord, first_entry: int) -> bool:
    """True if a new ensemble from `first_entry` on adds a fragment; False if it replaces the last one."""
    return record.fragments[-1].first_entry != first_entry


def with_ensemble(record: LedgerRecord, first_entry: int, bookies: Sequence[str]) -> LedgerRecord:
    """The record with this ensemble from `first_entry` on. An empty last fragment is replaced, so keys only grow."""
    last = record.fragments[-1]
    assert first_entry >= last.first_entry, "a fragment begins below the last one"
    assert len(bookies) == len(last.bookies), "an ensemble changed its size"
    kept = record.fragments if appends_fragment(record, first_entry) else record.fragments[:-1]
    return replace(record, fragments=(*kept, Fragment(first_entry, tuple(bookies))))


def closed(record: LedgerRecord, last_entry: int, length: int) -> LedgerRecord:
    """The record CLOSED at `last_entry`; fragments that begin beyond it hold nothing and are dropped."""
    kept = tuple(f for f in record.fragments if f.first_entry <= max(last_entry, 0))
    return replace(record, state=LedgerState.CLOSED, fragments=kept, last_entry=last_entry, length=length)


def copies_to_make(record: LedgerRecord, missed: Iterable[Unreplicated], now_us: int) -> tuple[CopyTask, ...]:
    """The tasks to be written with the close of this ledger: one for each member that may miss entries, over all that
    it may miss, and one if a place is vacant."""
    spans: dict[str, tuple[int, int]] = {}
    for gap in missed:
        first, last = spans.get(gap.bookie, (gap.first_entry, gap.last_entry))
        spans[gap.bookie] = min(first, gap.first_entry), min(record.last_entry, max(last, gap.last_entry))
    tasks = [
        CopyTask(record.ledger_id, bookie, bookie, CopyReason.UNREPLICATED, "", first, last, now_us)
        for bookie, (first, last) in sorted(spans.items())
        if bookie in record.bookies() and first <= last
    ]
    if any(VACANT in fragment.bookies for fragment in record.fragments):
        tasks.append(CopyTask(record.ledger_id, VACANT, "", CopyReason.UNREPLICATED, created_us=now_us))
    return tuple(tasks)
