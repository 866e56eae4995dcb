"""One copy of a closed ledger, decided: which entries the target must hold, who can give them, what is right. Pure.

Steps of a copy, for each run of entries that stand together:

1. Ask the target for the headers of what it holds already (it verifies each stored envelope): a copy that was cut off
   goes on where it was.
2. What it holds is compared with the header of any other member that has it: for one (ledger, entry) only one byte
   string exists, so that equal headers, with the checksum of all else in them, are equal entries.
3. What it lacks, or does not know of, or holds damaged, is read from a member that has it, the next one if that fails,
   verified, and added as recovery adds entries: the very bytes.
4. What was added is asked for again, as in step 1, and compared with what was sent.

What a bookie says it holds is synced: its reads wait for the group that is being committed (`bookie/reads.py`).

A target that is being collected says UNKNOWN to reads and BUSY to adds: the copy stalls and is tried again. It cannot
miss a deletion: step 1 comes after the claim, so that a collector that re-reads the record after it began to refuse
adds finds the claim, or had deleted before step 1 was answered.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from magnetar.ledger.bookie_rpc import EntryAnswer, EntryOutcome
from magnetar.ledger.quorum import Quorum
from magnetar.metadata.copy_txns import takes
from magnetar.metadata.records import NO_ENTRY, VACANT, CopyTask, LedgerRecord
from magnetar.wire.envelope import HEADER_SIZE, DamagedEnvelope, peek, verify


class CopyStalled(Exception):
    """The copy cannot go on now; the message is what an operator is told."""


@dataclass(frozen=True, slots=True)
class Run:
    """Entries first..last that the target must hold, and the bookies that may have them."""

    first: int
    last: int
    sources: tuple[str, ...]


def runs_of(record: LedgerRecord, task: CopyTask) -> Iterator[Run]:
    """What the task's target must hold when the copy is done, in the order of the entries."""
    quorum = Quorum.of(record)
    low, high = 0, record.last_entry
    if task.completes and task.last_entry != NO_ENTRY:
        low, high = task.first_entry, min(high, task.last_entry)
    for position in _fragments(record, task):
        fragment = record.fragments[position]
        first = max(low, fragment.first_entry)
        last = min(high, _last_of(record, position))
        sources = tuple(bookie for bookie in fragment.bookies if bookie not in (VACANT, task.target))
        for run_first, run_last in _held(quorum, fragment.bookies.index(task.place), first, last):
            yield Run(run_first, run_last, sources)


def _fragments(record: LedgerRecord, task: CopyTask) -> Sequence[int]:
    if not task.completes:
        return takes(record, task.place, task.target)
    return [position for position, fragment in enumerate(record.fragments) if task.place in fragment.bookies]


def _last_of(record: LedgerRecord, position: int) -> int:
    following = record.fragments[position + 1 : position + 2]
    return following[0].first_entry - 1 if following else record.last_entry


def _held(quorum: Quorum, place: int, first: int, last: int) -> Iterator[tuple[int, int]]:
    """The runs of first..last that the place holds: one, unless entries are striped."""
    if not quorum.striped:
        if first <= last:
            yield first, last
        return
    begin: int | None = None
    for entry_id in range(first, last + 1):
        holds = bool(quorum.write_mask(entry_id) >> place & 1)
        if holds and begin is None:
            begin = entry_id
        elif not holds and begin is not None:
            yield begin, entry_id - 1
            begin = None
    if begin is not None:
        yield begin, last


def size_of(record: LedgerRecord, task: CopyTask) -> int:
    """About how many bytes the target must hold: its share of the entries, as large as the average."""
    entries = sum(run.last - run.first + 1 for run in runs_of(record, task))
    return record.length * entries // (record.last_entry + 1) if entries else 0


@dataclass(frozen=True, slots=True)
class Held:
    """The next entries, as their headers, that a bookie holds."""

    headers: tuple[bytes, ...]


@dataclass(frozen=True, slots=True)
class Lacking:
    """So many of the next entries a bookie does not hold, or does not know of."""

    entries: int


def first_group(ledger_id: int, first: int, answers: Sequence[EntryAnswer]) -> Held | Lacking:
    """The leading answers of one kind; a header that is not the one asked for counts as lacking."""
    headers: list[bytes] = []
    for entry_id, answer in enumerate(answers, first):
        header = _header(ledger_id, entry_id, answer)
        if header is None:
            break
        headers.append(header)
    if headers:
        return Held(tuple(headers))
    lacking = 0
    for entry_id, answer in enumerate(answers, first):
        if _header(ledger_id, entry_id, answer) is not None:
            break
        lacking += 1
    return Lacking(max(1, lacking))


def _header(ledger_id: int, entry_id: int, answer: EntryAnswer) -> bytes | None:
    if answer.outcome is not EntryOutcome.HAVE or answer.entry is None:
        return None
    try:
        envelope = peek(answer.entry)
    except DamagedEnvelope:
        return None
    matches = (envelope.ledger_id, envelope.entry_id) == (ledger_id, entry_id)
    return answer.entry[:HEADER_SIZE] if matches else None


def verified_prefix(ledger_id: int, first: int, answers: Sequence[EntryAnswer]) -> tuple[bytes, ...]:
    """The leading whole entries that verify."""
    entries: list[bytes] = []
    for entry_id, answer in enumerate(answers, first):
        if answer.outcome is not EntryOutcome.HAVE or answer.entry is None:
            break
        try:
            verify(answer.entry, ledger_id, entry_id)
        except DamagedEnvelope:
            break
        entries.append(answer.entry)
    return tuple(entries)


def first_difference(expected: Sequence[bytes], found: Sequence[bytes]) -> int | None:
    """The position of the first header that differs, as far as both go."""
    for position, (one, other) in enumerate(zip(expected, found, strict=False)):
        if one[:HEADER_SIZE] != other[:HEADER_SIZE]:
            return position
    return None
