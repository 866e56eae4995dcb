"""Recovery: finds where a ledger ends, and closes it there, whatever its writer is doing. Pure.

The record is IN_RECOVERY already, its epoch raised. Events come in as method calls, each returns the effects it caused.

1. FENCING: ask all bookies of the last fragment for their LAC, fencing the ledger there. Wait until Qw - Qa + 1 of
   every write set said something: then some of them have each acknowledged entry, and step 3 will find it. Never wait
   for more: a hung bookie must not hold up recovery.
2. Start after the highest LAC, but not below the last fragment: what is below it was confirmed before it began.
3. READING: ask those bookies for the entries that follow. These reads fence too: a bookie that missed step 1 is fenced
   before it denies, so what it denied stays denied. Members that change during write-back are never read: they do not
   have what the old writer's acknowledgements speak of.
4. One verified copy makes an entry recoverable; it is written back, the same bytes, to the whole write set and needs
   Qa acknowledgements. Qw - Qa + 1 denials make it the end. UNKNOWN is neither; if nothing else can come, recovery is
   undecided, and the ledger stays as it is.
5. TAIL: if no entry was found beyond the start, the last one is read for the ledger's length.
6. All written back: the record, CLOSED, with the fragments that changed during write-back. Committing it is the
   caller's; whoever finds it CLOSED already takes what is there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import Enum
from math import inf

from magnetar.ledger.bookie_rpc import AddResult, EntryOutcome, LacQuery, LacResult, ReadGroup, ReadResult
from magnetar.ledger.effects import (
    AskEntries,
    AskLac,
    Commit,
    Confirmed,
    Lost,
    Recovered,
    RecoveryEffect,
    Report,
    ReportKind,
    Send,
    Undecided,
    Wake,
    WriterEffect,
)
from magnetar.ledger.errors import LostReason
from magnetar.ledger.fragments import FRAGMENTS_MAX, Unreplicated, closed, fragment_of
from magnetar.ledger.placement import Randomness
from magnetar.ledger.quorum import Quorum, places_of
from magnetar.ledger.writer import CommitOutcome, WriterCore, WriterLimits
from magnetar.metadata.records import NO_ENTRY, VACANT, BookieRegistration, LedgerRecord
from magnetar.wire import envelope


@dataclass(frozen=True, slots=True)
class RecoveryLimits:
    """What bounds a recovery.

    attempts_max          a bookie that answers UNKNOWN is asked again so often, per entry
    retry_first_s         delay before the first of these; doubles
    give_up_s             without any progress for so long it is undecided
    read_entries_max      entries asked of one bookie at once, and how far one may run ahead of the decisions
    read_bytes_max        likewise, in bytes
    write_back_bytes_max  nothing more is read while so much is being written back
    fragments_added_max   ensemble changes during write-back, beyond the fragments a writer may use up
    """

    attempts_max: int = 3
    retry_first_s: float = 0.1
    give_up_s: float = 10.0
    read_entries_max: int = 64
    read_bytes_max: int = 1 << 20
    write_back_bytes_max: int = 16 << 20
    fragments_added_max: int = 4


class RecoveryPhase(Enum):
    FENCING = 1
    READING = 2
    """Reading and writing back, until the end is known and all below it is confirmed."""
    TAIL = 3
    DONE = 4


class _Witness:
    """A bookie that is asked what it has.

    asked       the sequence of the question it has not answered, 0 = none
    next_entry  it has answered for all below that it was asked for
    held_at     its last answer was no copy but this entry's denial, or UNKNOWN: it is not asked for later ones
                until that entry is decided
    attempts    UNKNOWN answers to what is being decided
    """

    __slots__ = ("asked", "attempts", "bit", "bookie", "held_at", "next_entry", "place", "retry_at", "said")

    def __init__(self, place: int, bookie: str, next_entry: int) -> None:
        self.place = place
        self.bit = 1 << place
        self.bookie = bookie
        self.next_entry = next_entry
        self.asked = 0
        self.attempts = 0
        self.held_at = NO_ENTRY
        self.retry_at = 0.0
        self.said = "no answer yet" if bookie != VACANT else "no bookie fills this place"


class _Tally:
    """What was said about one entry: a verified copy, and masks of who denied it and who does not know."""

    __slots__ = ("data", "denied", "length", "unknown")

    def __init__(self) -> None:
        self.data: bytes | None = None
        self.length = 0
        self.denied = 0
        self.unknown = 0


class RecoveryCore:
    """The recovery of one ledger.

    lac        highest LAC seen; meaningful from READING on
    frontier   the lowest entry that is not decided; all below, from the start on, are recoverable
    end        the ledger's last entry, once known
    _held      the last entry that each member told; late answers count, too
    _horizon   nobody is known to have this entry or any beyond: a guess of how far it is worth asking
    """

    def __init__(
        self,
        record: LedgerRecord,
        registered: Sequence[BookieRegistration],
        rng: Randomness,
        limits: RecoveryLimits | None = None,
        writer_limits: WriterLimits | None = None,
    ) -> None:
        self.record = record
        self.limits = limits or RecoveryLimits()
        self.quorum = Quorum.of(record)
        self.phase = RecoveryPhase.FENCING
        self.lac = NO_ENTRY
        self.start = NO_ENTRY
        self.frontier = 0
        self.end: int | None = None
        self._known = 0
        self._held: dict[str, int] = {}
        self._horizon = 0
        fragments_max = max(FRAGMENTS_MAX, len(record.fragments)) + self.limits.fragments_added_max
        self._writer_limits = replace(writer_limits or WriterLimits(), fragments_max=fragments_max)
        self._registered = registered
        self._rng = rng
        self._writer = self._write_back_after(NO_ENTRY)
        self._witnesses = [_Witness(place, bookie, 0) for place, bookie in enumerate(record.fragments[-1].bookies)]
        self._tallies: dict[int, _Tally] = {}
        self._last_envelope: bytes | None = None
        self._asked: dict[int, tuple[_Witness, int]] = {}
        self._sequence = 0
        self._progress_at = 0.0
        self._wake_at = inf
        self._out: list[RecoveryEffect] = []

    # Events.

    def begin(self, now: float) -> list[RecoveryEffect]:
        self._progress_at = now
        return self._end_event(now)

    def lac_answered(self, sequence: int, result: LacResult, now: float) -> list[RecoveryEffect]:
        asked = self._asked.pop(sequence, None)
        if asked is not None and result.outcome is EntryOutcome.HAVE:
            self._held[asked[0].bookie] = result.last_entry
        if asked is None or self.phase is not RecoveryPhase.FENCING:
            return []
        witness = asked[0]
        witness.asked = 0
        witness.said = f"lac: {result.outcome.name} {result.message}".rstrip()
        if result.epoch > self.record.epoch:
            self._give_up(
                f"{witness.bookie} has seen epoch {result.epoch}, this recovery has {self.record.epoch}", True
            )
        elif result.outcome is EntryOutcome.UNKNOWN:
            self._note_unknown(witness, now)
        else:
            self._known |= witness.bit
            self._progress_at = now
            if result.outcome is EntryOutcome.HAVE:
                self.lac = max(self.lac, result.lac)
                self._horizon = max(self._horizon, result.last_entry + 1)
        return self._end_event(now)

    def read_answered(self, sequence: int, result: ReadResult, now: float) -> list[RecoveryEffect]:
        asked = self._asked.pop(sequence, None)
        if asked is None or self.phase is RecoveryPhase.DONE:
            return []
        witness, first = asked
        if witness.asked != sequence:
            return []
        witness.asked = 0
        for entry_id, answer in enumerate(result.answers, first):
            if entry_id >= self.frontier or self.phase is RecoveryPhase.TAIL:
                self._count(witness, entry_id, answer.outcome, answer.entry, result.message)
        witness.next_entry = max(witness.next_entry, first + len(result.answers))
        last = first + max(len(result.answers), 1) - 1
        if result.answers and result.answers[-1].outcome is EntryOutcome.HAVE:
            self._horizon = max(self._horizon, last + self.limits.read_entries_max)
        else:
            witness.held_at = last
        if self._tally(self._deciding).unknown & witness.bit:
            self._note_unknown(witness, now)
        else:
            self._progress_at = now
        return self._end_event(now)

    def add_answered(self, sequence: int, result: AddResult, now: float) -> list[RecoveryEffect]:
        if self.phase is not RecoveryPhase.DONE:
            self._perform(self._writer.answered(sequence, result, now), now)
        return self._end_event(now)

    def bookies_changed(self, registered: Sequence[BookieRegistration], now: float) -> list[RecoveryEffect]:
        self._registered = registered
        if self.phase is not RecoveryPhase.DONE:
            self._perform(self._writer.bookies_changed(registered, now), now)
        return self._end_event(now)

    def tick(self, now: float) -> list[RecoveryEffect]:
        """Time has come for what Wake asked."""
        self._wake_at = inf
        if self.phase is not RecoveryPhase.DONE:
            self._perform(self._writer.tick(now), now)
        if self.phase is not RecoveryPhase.DONE and now >= self._progress_at + self.limits.give_up_s:
            stalled = self._writer.stalled
            self._give_up(stalled or f"no progress in {self.limits.give_up_s:g} s while {self._doing()}")
        return self._end_event(now)

    # Step 1 and 2.

    def _ask_lacs(self, now: float) -> None:
        if self.quorum.is_covered(self._known):
            self._start_reading()
            return
        for witness in self._witnesses:
            if not self._known & witness.bit and self._may_ask(witness, now):
                query = LacQuery(self.record.ledger_id, self.record.epoch, self.record.token, fence=True)
                self._out.append(AskLac(self._ask(witness, 0), witness.bookie, query))
        hopeful = sum(witness.bit for witness in self._witnesses if self._has_hope(witness))
        if not self.quorum.is_covered(self._known | hopeful):
            self._give_up("too few bookies told their lac")

    def _start_reading(self) -> None:
        self.phase = RecoveryPhase.READING
        self.start = max(self.lac, self.record.fragments[-1].first_entry - 1)
        self.frontier = self.start + 1
        self._writer = self._write_back_after(self.start)
        for witness in self._witnesses:
            witness.asked = witness.attempts = 0
            witness.next_entry = self.frontier
            witness.held_at = NO_ENTRY
            witness.retry_at = 0.0

    def _write_back_after(self, last_confirmed: int) -> WriterCore:
        return WriterCore(
            self.record, self._registered, self._rng, self._writer_limits, recovery=True, last_confirmed=last_confirmed
        )

    # Steps 3 and 4.

    def _count(self, witness: _Witness, entry_id: int, outcome: EntryOutcome, data: bytes | None, message: str) -> None:
        """Notes what a member of the entry's write set says about it; others have no say."""
        if not self._write_mask(entry_id) & witness.bit:
            return
        tally = self._tally(entry_id)
        witness.said = f"entry {entry_id}: {outcome.name} {message}".rstrip()
        tally.unknown &= ~witness.bit
        if outcome is EntryOutcome.PROVABLY_NOT:
            tally.denied |= witness.bit
            return
        if outcome is EntryOutcome.HAVE and data is not None:
            try:
                length = envelope.verify(data, self.record.ledger_id, entry_id).length
            except envelope.DamagedEnvelope as damage:
                witness.said = f"entry {entry_id}: damaged, {damage}"
                self._out.append(Report(ReportKind.DAMAGED_ENTRY, witness.bookie, witness.said))
            else:
                if tally.data is None:
                    tally.data, tally.length = data, length
                return
        tally.unknown |= witness.bit

    def _decide(self, now: float) -> None:
        """Moves the frontier over what is recoverable, up to the end or to what nobody decided yet."""
        before = self.frontier
        while self.end is None:
            tally = self._tallies.get(self.frontier)
            if tally is None:
                break
            if tally.data is not None:
                self._writer.add_built(tally.data, tally.length)
                self._last_envelope = tally.data
                del self._tallies[self.frontier]
                self.frontier += 1
            elif (tally.denied & self._write_mask(self.frontier)).bit_count() >= self.quorum.coverage:
                self.end = self.frontier - 1
            else:
                break
        if self.frontier != before:
            self._progress_at = now
            for witness in self._witnesses:
                witness.attempts = 0
            self._perform(self._writer.flush(now), now)

    def _read_on(self, now: float) -> None:
        self._decide(now)
        if self.phase is not RecoveryPhase.READING:
            return
        if self.end is None:
            self._ask_entries(now)
        elif self._writer.is_settled:
            self._finish(now)

    def _ask_entries(self, now: float) -> None:
        if self._writer.in_flight_bytes < self.limits.write_back_bytes_max:
            for witness in self._witnesses:
                self._ask_witness(witness, now)
        self._check_hope(f"too few bookies know entry {self.frontier}")

    def _ask_witness(self, witness: _Witness, now: float) -> None:
        unknown = self._tally(self.frontier).unknown & witness.bit
        if not self._may_ask(witness, now) or (witness.held_at >= self.frontier and not unknown):
            return
        first = self.frontier if unknown else max(witness.next_entry, self.frontier)
        last = min(max(first, self._horizon), self.frontier + self.limits.read_entries_max - 1)
        if first <= last:
            self._ask_range(witness, first, last, fence=True)

    def _ask_range(self, witness: _Witness, first: int, last: int, *, fence: bool) -> None:
        record = self.record
        group = ReadGroup(
            record.ledger_id, record.epoch, record.token, first, last, fence=fence, max_bytes=self.limits.read_bytes_max
        )
        self._out.append(AskEntries(self._ask(witness, first), witness.bookie, group))

    # Steps 5 and 6.

    def _finish(self, now: float) -> None:
        assert self.end is not None
        if self.end == NO_ENTRY:
            self._recovered(0)
        elif self.end > self.start:
            self._recovered(self._writer.length)
        else:
            self._start_tail(now)

    def _start_tail(self, now: float) -> None:
        """The fragment before the last may hold the last entry; its own bookies are asked then."""
        self.phase = RecoveryPhase.TAIL
        fragment, _ = fragment_of(self.record, self.start)
        self._tallies.clear()
        self._asked.clear()
        self._witnesses = [
            _Witness(place, fragment.bookies[place], self.start) for place in self.quorum.write_set(self.start)
        ]
        self._read_tail(now)

    def _read_tail(self, now: float) -> None:
        tally = self._tally(self.start)
        if tally.data is not None:
            self._last_envelope = tally.data
            self._recovered(tally.length)
            return
        for witness in self._witnesses:
            if not tally.denied & witness.bit and self._may_ask(witness, now):
                self._ask_range(witness, self.start, self.start, fence=False)
        self._check_hope(f"entry {self.start} was confirmed and no bookie gives it")

    def _recovered(self, length: int) -> None:
        assert self.end is not None
        self.phase = RecoveryPhase.DONE
        self._out.append(Recovered(closed(self._writer.record, self.end, length), self._last_envelope))

    def unreplicated(self) -> list[Unreplicated]:
        """Once recovered: what members of the last fragments may lack.

        What was written back and not acknowledged; and of a member that did not tell an entry at or beyond the start,
        all that was there before. Holes in what the others had before are the scrub's to find.
        """
        assert self.end is not None
        found = []
        for gap in self._writer.unreplicated():
            proven = self._held.get(gap.bookie, NO_ENTRY) >= self.start
            first = max(gap.first_entry, self.start + 1) if proven else gap.first_entry
            last = min(gap.last_entry, self.end)
            if first <= last:
                found.append(replace(gap, first_entry=first, last_entry=last))
        return found

    # Asking.

    @property
    def _deciding(self) -> int:
        return self.start if self.phase is RecoveryPhase.TAIL else self.frontier

    def _tally(self, entry_id: int) -> _Tally:
        tally = self._tallies.get(entry_id)
        if tally is None:
            tally = self._tallies[entry_id] = _Tally()
        return tally

    def _write_mask(self, entry_id: int) -> int:
        return self.quorum.write_mask(entry_id)

    def _ask(self, witness: _Witness, first: int) -> int:
        self._sequence += 1
        self._asked[self._sequence] = (witness, first)
        witness.asked = self._sequence
        return self._sequence

    def _note_unknown(self, witness: _Witness, now: float) -> None:
        witness.retry_at = now + self.limits.retry_first_s * 2**witness.attempts
        witness.attempts += 1

    def _may_ask(self, witness: _Witness, now: float) -> bool:
        """True if it can be asked now; asks to be woken if it can be later."""
        if witness.asked or not self._has_hope(witness):
            return False
        if witness.attempts and witness.retry_at > now:
            self._wake(witness.retry_at)
            return False
        return True

    def _has_hope(self, witness: _Witness) -> bool:
        """True unless it has said UNKNOWN too often: it is asked, or can be asked again."""
        return witness.bookie != VACANT and (witness.asked != 0 or witness.attempts < self.limits.attempts_max)

    def _check_hope(self, reason: str) -> None:
        """Gives up if no answer that may still come can decide the entry: one copy, or enough denials."""
        tally = self._tally(self._deciding)
        mask = self._write_mask(self._deciding) & ~tally.denied
        if not any(witness.bit & mask and self._has_hope(witness) for witness in self._witnesses):
            self._give_up(reason)

    def _perform(self, effects: Sequence[WriterEffect], now: float) -> None:
        """Passes on what the write-back asks; its ensemble changes are taken at once, they are local."""
        for effect in effects:
            match effect:
                case Send() | Report():
                    self._out.append(effect)
                case Wake(at):
                    self._wake(at)
                case Confirmed():
                    self._progress_at = now
                case Commit():
                    self._perform(self._writer.committed(CommitOutcome.COMMITTED, now), now)
                case Lost(reason, detail):
                    self._give_up(detail, reason is LostReason.STALE_EPOCH)

    def _give_up(self, reason: str, superseded: bool = False) -> None:
        if self.phase is not RecoveryPhase.DONE:
            self.phase = RecoveryPhase.DONE
            said = {w.bookie or f"place {w.place}": w.said for w in self._witnesses}
            self._out.append(Undecided(reason, said, superseded))

    def _wake(self, at: float) -> None:
        if at < self._wake_at:
            self._wake_at = at
            self._out.append(Wake(at))

    def _end_event(self, now: float) -> list[RecoveryEffect]:
        """What every event ends with: go on as far as what is known allows."""
        if self.phase is RecoveryPhase.FENCING:
            self._ask_lacs(now)
        if self.phase is RecoveryPhase.READING:
            self._read_on(now)
        elif self.phase is RecoveryPhase.TAIL:
            self._read_tail(now)
        if self.phase is RecoveryPhase.DONE:
            self._asked.clear()
        else:
            self._wake(self._progress_at + self.limits.give_up_s)
        out, self._out = self._out, []
        return out

    # Looking inside.

    def _doing(self) -> str:
        match self.phase:
            case RecoveryPhase.FENCING:
                return "asking for lacs"
            case RecoveryPhase.TAIL:
                return f"reading the last entry {self.start}"
            case _ if self.end is not None:
                return f"writing back up to entry {self.end}"
        return f"deciding entry {self.frontier}"

    def describe(self) -> str:
        end = "unknown" if self.end is None else self.end
        lines = [
            f"recovery of ledger {self.record.ledger_id} {self.phase.name} epoch={self.record.epoch} lac={self.lac} "
            f"start={self.start} frontier={self.frontier} end={end}"
        ]
        for entry_id, tally in sorted(self._tallies.items()):
            denied = ",".join(map(str, places_of(tally.denied)))
            unknown = ",".join(map(str, places_of(tally.unknown)))
            lines.append(f"  entry {entry_id}: copy={tally.data is not None} denied=[{denied}] unknown=[{unknown}]")
        lines += [f"  {w.place} {w.bookie or '(vacant)'} asked={w.asked != 0} said=`{w.said}`" for w in self._witnesses]
        if self.phase is not RecoveryPhase.FENCING:
            lines.append(self._writer.describe())
        return "\n".join(lines)

    def check(self) -> None:
        """Asserts every invariant."""
        self._writer.check()
        original = self.record.fragments[-1]
        assert all(self._asked[w.asked][0] is w for w in self._witnesses if w.asked and w.asked in self._asked)
        if self.phase is RecoveryPhase.DONE:
            return
        if self.phase is RecoveryPhase.FENCING:
            assert not self._writer.in_flight_entries
            return
        assert self.start >= original.first_entry - 1, "recovery rewrites an earlier fragment"
        assert self.frontier == self._writer.next_entry, "a decided entry was not written back"
        assert self.end is None or self.end == self.frontier - 1
        if self.phase is RecoveryPhase.READING:
            assert tuple(w.bookie for w in self._witnesses) == original.bookies, "reads left the original ensemble"
        for fragment in self._writer.record.fragments[len(self.record.fragments) :]:
            assert fragment.first_entry > original.first_entry
        for tally in self._tallies.values():
            assert not tally.denied & tally.unknown
