"""Compares the copies of a closed ledger: every entry on every bookie that must have it, by its checksum.

Bookies read and verify what they store, and answer headers alone. For one (ledger, entry) only one byte string exists:
equal headers, with the checksum of all else in them, are equal entries.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from magnetar.ledger.bookie_rpc import Bookies, EntryOutcome, ReadGroup
from magnetar.metadata.records import VACANT, CopyReason, CopyTask, LedgerRecord
from magnetar.repair.copying import Run, runs_of
from magnetar.wire.envelope import HEADER_SIZE, DamagedEnvelope, peek

CHUNK_ENTRIES = 2_000
READ_BYTES = 1 << 20
"""Of entries, not of headers: what a bookie reads at once."""
PROBLEMS_MAX = 20
"""Named one by one; the rest is counted."""


@dataclass(slots=True)
class Verification:
    """What was compared. `copies`: entries that a bookie has, verified, and that equal all other copies.

    next_entry   where to go on; 0 = everything was compared
    problems     what is missing, damaged or different, in words
    """

    next_entry: int = 0
    entries: int = 0
    copies: int = 0
    size_bytes: int = 0
    bookies: set[str] = field(default_factory=set)
    problems: list[str] = field(default_factory=list)
    more_problems: int = 0

    def blame(self, problem: str) -> None:
        if len(self.problems) < PROBLEMS_MAX:
            self.problems.append(problem)
        else:
            self.more_problems += 1

    def said(self) -> list[str]:
        if not self.more_problems:
            return self.problems
        return [*self.problems, f"and {self.more_problems} more like these"]


async def verify(record: LedgerRecord, bookies: Bookies, first_entry: int, enough: Callable[[], bool]) -> Verification:
    """From this entry to the end of the ledger, or until `enough` says so after a chunk."""
    found = Verification()
    following = first_entry
    while following <= record.last_entry:
        last = min(record.last_entry, following + CHUNK_ENTRIES - 1)
        await _verify_chunk(record, bookies, following, last, found)
        following = last + 1
        if following <= record.last_entry and enough():
            found.next_entry = following
            break
    return found


async def _verify_chunk(record: LedgerRecord, bookies: Bookies, first: int, last: int, found: Verification) -> None:
    members = sorted(record.bookies())
    held = dict(
        zip(members, await asyncio.gather(*(_headers(record, bookies, m, first, last) for m in members)), strict=True)
    )
    found.bookies.update(members)
    vacant = any(VACANT in fragment.bookies for fragment in record.fragments)
    for entry_id in range(first, last + 1):
        copies = {member: headers[entry_id] for member, headers in held.items() if entry_id in headers}
        _compare(record, entry_id, copies, found)
    if vacant:
        found.blame(f"ledger {record.ledger_id} has a vacant place: it misses a copy")


def _compare(record: LedgerRecord, entry_id: int, copies: dict[str, bytes | str], found: Verification) -> None:
    found.entries += 1
    right = [header for header in copies.values() if isinstance(header, bytes)]
    for member, header in copies.items():
        if isinstance(header, str):
            found.blame(f"ledger {record.ledger_id} entry {entry_id}: {member} {header}")
    if len(set(right)) > 1:
        sums = ", ".join(f"{m} {h[-4:].hex()}" for m, h in copies.items() if isinstance(h, bytes))
        found.blame(f"ledger {record.ledger_id} entry {entry_id}: copies differ, by their checksums {sums}")
        return
    found.copies += len(right)
    if right:
        found.size_bytes += len(right) * _payload_bytes(record)


def _payload_bytes(record: LedgerRecord) -> int:
    return record.length // (record.last_entry + 1)


async def _headers(
    record: LedgerRecord, bookies: Bookies, member: str, first: int, last: int
) -> dict[int, bytes | str]:
    """Of each entry that the member must have: its header, or what is wrong with it."""
    held: dict[int, bytes | str] = {}
    for run in _runs(record, member, first, last):
        following = run.first
        while following <= run.last:
            read = ReadGroup(
                record.ledger_id,
                record.epoch,
                record.token,
                following,
                run.last,
                max_bytes=READ_BYTES,
                headers_only=True,
            )
            result = await bookies.rpc(member).read(read)
            for answer in result.answers:
                held[following] = _judge(record.ledger_id, following, answer.outcome, answer.entry, result.message)
                following += 1
    return held


def _runs(record: LedgerRecord, member: str, first: int, last: int) -> Iterator[Run]:
    whole = CopyTask(record.ledger_id, member, member, CopyReason.SCRUB, first_entry=first, last_entry=last)
    yield from runs_of(record, whole)


def _judge(ledger_id: int, entry_id: int, outcome: EntryOutcome, header: bytes | None, message: str) -> bytes | str:
    if outcome is EntryOutcome.PROVABLY_NOT:
        return "does not have it"
    if outcome is not EntryOutcome.HAVE or header is None:
        return f"gives no copy of it: {message or 'it is damaged or unknown there'}"
    try:
        envelope = peek(header)
    except DamagedEnvelope as damage:
        return f"has a damaged copy: {damage}"
    if (envelope.ledger_id, envelope.entry_id) != (ledger_id, entry_id):
        return "has another entry in its place"
    return header[:HEADER_SIZE]
