"""The writer of one open ledger: what it sends, when an entry is confirmed, when an ensemble changes. Pure.

Events come in as method calls, each returns the effects it caused, in order. The steps of an entry:

1. `add` gives it the next id and builds its envelope, with the LAC and the ledger's length of that moment. These bytes
   are the only ones that ever exist for this id: a resend carries them again.
2. `flush` sends everything added since, in chunks, to every member of the write set that answers.
3. `answered` counts acknowledgements by (entry, place). Entries are confirmed strictly in order, at Qa of them.
4. A member that fails is replaced if there is a spare: a new fragment begins at LAC + 1. No spare is not a failure:
   the ensemble stays, and the member is probed until it answers or a spare appears.
5. While the outcome of such a change is unknown, only members of both ensembles count, so that whatever a recoverer
   reads as the last ensemble holds an ack quorum of all that was confirmed. Confirmed entries of the new fragment are
   kept: after the commit, and not before, its new members get them. (Before, a new bookie's collector would find a
   ledger that no record gives it, and delete what it acknowledged.)
6. FENCED, STALE_EPOCH and a lost change end it at once. Of what is not confirmed then, nobody knows if it will survive.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from itertools import pairwise
from math import inf

from magnetar.ledger.bookie_rpc import AddGroup, AddResult, AddStatus
from magnetar.ledger.effects import Commit, Confirmed, Lost, Report, ReportKind, Send, Wake, WantsRoll, WriterEffect
from magnetar.ledger.errors import LedgerBusy, LostReason, WriterClosed
from magnetar.ledger.fragments import FRAGMENTS_MAX, Unreplicated, appends_fragment, closed, with_ensemble
from magnetar.ledger.member import SENDING, Chunk, Member, MemberState, Outstanding, PendingEntry
from magnetar.ledger.placement import Randomness, choose_replacements
from magnetar.ledger.quorum import Quorum, filled_mask
from magnetar.metadata.records import NO_ENTRY, VACANT, BookieRegistration, BookieState, LedgerRecord, LedgerState
from magnetar.wire import envelope

ENTRY_BYTES_MAX = 8 * 1024 * 1024 - 64 * 1024
"""Envelope and payload. A frame of 8 MiB is the hard limit on every channel."""


@dataclass(frozen=True, slots=True)
class WriterLimits:
    """What bounds a writer.

    add_timeout_s        a member silent for so long about something sent to it has failed
    group_bytes_max      envelopes in one AddGroup, unless it is exactly one entry
    lag_bytes_max        confirmed by others and still outstanding at one member: beyond this it has failed
    lag_entries_max      likewise, in entries
    retained_bytes_max   confirmed entries kept for the new members of a change whose outcome is unknown
    fragments_max        a ledger with so many asks to be rolled instead of changing its ensemble again
    resends_max          a busy or silent member gets the same bytes again so often before it has failed
    resend_first_s       delay of the first resend; doubles up to resend_last_s
    probe_first_s        delay of the first probe of a failed member; doubles up to probe_last_s
    avoid_s              a bookie that failed is no spare for so long, unless it registers again
    """

    add_timeout_s: float = 5.0
    group_bytes_max: int = 1 << 20
    lag_bytes_max: int = 32 << 20
    lag_entries_max: int = 100_000
    retained_bytes_max: int = 64 << 20
    fragments_max: int = FRAGMENTS_MAX
    resends_max: int = 12
    resend_first_s: float = 0.02
    resend_last_s: float = 1.0
    probe_first_s: float = 0.1
    probe_last_s: float = 2.0
    avoid_s: float = 30.0


class CommitOutcome(Enum):
    """What became of an ensemble change's compare-and-set. There is no third: while it is unknown, it is awaited."""

    COMMITTED = 1
    LOST = 2


class Phase(Enum):
    OPEN = 1
    SEALED = 2
    """Takes no more entries; ends with CLOSED."""
    CLOSED = 3
    LOST = 4
    ABANDONED = 5


_RETRIED = frozenset({AddStatus.BUSY, AddStatus.NO_ANSWER})
_LOSING = {AddStatus.FENCED: LostReason.FENCED, AddStatus.STALE_EPOCH: LostReason.STALE_EPOCH}
_LASTING = frozenset({AddStatus.REFUSED, AddStatus.CONFLICT, AddStatus.WRONG_TOKEN})
_LOUD = {AddStatus.CONFLICT: ReportKind.CONFLICT, AddStatus.WRONG_TOKEN: ReportKind.WRONG_TOKEN}


@dataclass(frozen=True, slots=True)
class _Change:
    """An ensemble change whose outcome is unknown. `first_entry`: where its fragment begins."""

    record: LedgerRecord
    spares: dict[int, str]
    first_entry: int


class WriterCore:
    """One ledger's writer. With `recovery` it is a recoverer's write-back: see `add_built`.

    lac              all entries up to this are confirmed; moved by _advance only
    next_entry       id of the next entry; lac < pending ids < next_entry
    length           payload bytes of all entries added
    record           the record as last committed: moved by committed() only
    _pending         not confirmed, in order; _queued are the newest of them, not sent yet
    _retained        confirmed since the change in flight began; its new members still need them
    _counted         places whose acknowledgements count: all, but for those a change in flight replaces
    _history         the members of each fragment, to know at the end what each of them lacks
    """

    def __init__(
        self,
        record: LedgerRecord,
        registered: Sequence[BookieRegistration],
        rng: Randomness,
        limits: WriterLimits | None = None,
        *,
        recovery: bool = False,
        last_confirmed: int = NO_ENTRY,
    ) -> None:
        expected = LedgerState.IN_RECOVERY if recovery else LedgerState.OPEN
        if record.state is not expected:
            raise ValueError(f"ledger is not writable: ledger=`{record.ledger_id}` state=`{record.state.name}`")
        self.record = record
        self.limits = limits or WriterLimits()
        self.quorum = Quorum.of(record)
        self.phase = Phase.OPEN
        self.lac = last_confirmed
        self.next_entry = last_confirmed + 1
        self.length = 0
        self.in_flight_bytes = 0
        self.wants_roll = ""
        self._recovery = recovery
        self._rng = rng
        self._registered = {bookie.bookie_id: bookie for bookie in registered}
        self._members = [Member(place, bookie) for place, bookie in enumerate(record.fragments[-1].bookies)]
        self._history = [(record.fragments[-1].first_entry, tuple(self._members))]
        self._pending: deque[PendingEntry] = deque()
        self._queued: list[PendingEntry] = []
        self._retained: deque[PendingEntry] = deque()
        self._retained_bytes = 0
        self._change: _Change | None = None
        self._changes_held = False
        self._counted = self._all = (1 << self.quorum.ensemble_size) - 1
        self._sends: dict[int, Outstanding] = {}
        self._sequence = 0
        self._avoid: dict[str, float] = {}
        self._review = True
        self._wake_at = inf
        self._out: list[WriterEffect] = []

    # What the owner sees.

    @property
    def ledger_id(self) -> int:
        return self.record.ledger_id

    @property
    def in_flight_entries(self) -> int:
        return len(self._pending)

    @property
    def change_in_flight(self) -> bool:
        return self._change is not None

    @property
    def is_settled(self) -> bool:
        """Nothing is in flight: all that was added is confirmed, and no change awaits its outcome."""
        return not self._pending and self._change is None

    @property
    def is_replicated(self) -> bool:
        """No member that answers owes an acknowledgement."""
        return not any(member.outstanding for member in self._members)

    @property
    def stalled(self) -> str | None:
        """Why entries wait although the ledger is not lost; None if they do not."""
        if not self._pending or self.quorum.can_acknowledge(self._answering() & self._counted):
            return None
        said = "; ".join(
            f"{member.bookie or f'place {member.place}'} {member.state.name}: {member.said}"
            for member in self._members
            if member.state is not MemberState.LIVE
        )
        unknown = "; the outcome of an ensemble change is unknown" if self._change else ""
        return f"fewer than {self.quorum.ack_quorum} members answer: {said}{unknown}"

    def unreplicated(self) -> list[Unreplicated]:
        """Of the confirmed entries, what each place's bookie did not acknowledge: to be checked and repaired."""
        ends = [first - 1 for first, _ in self._history[1:]]
        found = []
        for (first, members), end in zip(self._history, [*ends, self.lac], strict=True):
            for member in members:
                for low, high in member.stored.missing(first, end):
                    if self._holds_any(member.bit, low, high):
                        found.append(Unreplicated(member.place, member.bookie, low, high))
        return found

    def _holds_any(self, bit: int, first: int, last: int) -> bool:
        """True if some entry of the range stands at the place. E entries in a row reach every write set."""
        return any(
            self.quorum.write_mask(entry_id) & bit
            for entry_id in range(first, min(last + 1, first + self.quorum.ensemble_size))
        )

    # Events.

    def add(self, payload: bytes) -> int:
        """Takes the payload as the next entry and returns its id; flush() sends it.

        Raises WriterClosed, or ValueError for a payload that no frame could carry.
        """
        if self.phase is not Phase.OPEN:
            raise WriterClosed(f"nothing can be added: ledger=`{self.ledger_id}` phase=`{self.phase.name}`")
        if len(payload) > ENTRY_BYTES_MAX - envelope.HEADER_SIZE:
            raise ValueError(f"entry is too large: bytes=`{len(payload)}` max=`{ENTRY_BYTES_MAX}`")
        entry_id = self.next_entry
        self.length += len(payload)
        self._enqueue(envelope.encode(self.record.ledger_id, entry_id, self.lac, self.length, payload))
        return entry_id

    def add_built(self, data: bytes, length: int) -> None:
        """Takes an envelope that was built before, by the ledger's first writer, as the next entry."""
        assert self._recovery, "only a recoverer writes what another built"
        self.length = length
        self._enqueue(data)

    def _enqueue(self, data: bytes) -> None:
        entry = PendingEntry(self.next_entry, data)
        self.next_entry += 1
        self.in_flight_bytes += len(data)
        self._pending.append(entry)
        self._queued.append(entry)

    def flush(self, now: float) -> list[WriterEffect]:
        """Sends what was added since the last flush."""
        queued, self._queued = self._queued, []
        if self.phase in (Phase.OPEN, Phase.SEALED):
            for chunk in self._chunks(queued):
                for member in self._members:
                    self._offer(member, chunk, now)
        return self._end(now)

    def answered(self, sequence: int, result: AddResult, now: float) -> list[WriterEffect]:
        """A bookie's answer, or the lack of one. Answers to what is no longer asked change nothing."""
        sent = self._sends.get(sequence)
        if sent is None:
            return []
        status = result.status
        if status is AddStatus.OK:
            self._stored(sent, now)
        elif sent.member.state is MemberState.LEAVING:
            self._drop(sent)
        elif status in _LOSING:
            self._lose(_LOSING[status], f"{sent.member.bookie}: {result.message}")
        elif status in _RETRIED and sent.member.state is not MemberState.PROBING:
            self._resend_later(sent, result, now)
        else:
            self._report_loud(sent.member.bookie, result)
            self._fail(sent.member, f"{status.name} {result.message}".rstrip(), now, lasting=status in _LASTING)
        return self._end(now)

    def committed(self, outcome: CommitOutcome, now: float) -> list[WriterEffect]:
        """The outcome of the change in flight is known."""
        if self.phase not in (Phase.OPEN, Phase.SEALED):
            return []
        change = self._change
        assert change is not None, "no change is in flight"
        if outcome is CommitOutcome.LOST:
            self._lose(LostReason.CLOSED_ELSEWHERE, "an ensemble change found the record changed")
        else:
            self._apply(change, now)
        return self._end(now)

    def bookies_changed(self, registered: Sequence[BookieRegistration], now: float) -> list[WriterEffect]:
        """The registered bookies changed. One that came back, or takes writes again, is tried again at once."""
        before = self._registered
        self._registered = {bookie.bookie_id: bookie for bookie in registered}
        for name, bookie in self._registered.items():
            if name not in before or before[name].state is not bookie.state:
                if self._avoid.get(name, 0.0) != inf:
                    self._avoid.pop(name, None)
                for member in self._members:
                    if member.bookie == name and member.state is MemberState.FAILED:
                        member.retry_at = now
        self._review = True
        return self._end(now)

    def hold_changes(self, held: bool, now: float) -> list[WriterEffect]:
        """While held (the metadata store is silent) no ensemble change is begun."""
        self._changes_held = held
        self._review = True
        return self._end(now)

    def tick(self, now: float) -> list[WriterEffect]:
        """Time has come for what Wake asked."""
        self._wake_at = inf
        if self.phase in (Phase.OPEN, Phase.SEALED):
            for member in self._members:
                self._check_time(member, now)
            self._review = True
        return self._end(now)

    def lose(self, reason: LostReason, detail: str) -> list[WriterEffect]:
        """The owner knows from elsewhere that the ledger is lost."""
        if self.phase in (Phase.OPEN, Phase.SEALED):
            self._lose(reason, detail)
        return self._take()

    def seal(self) -> None:
        """No more entries; what was added is still completed, with new members if need be."""
        if self.phase is Phase.OPEN:
            self.phase = Phase.SEALED

    def abandon(self) -> None:
        """Stops at once; what is in flight is nobody's concern any more."""
        if self.phase in (Phase.OPEN, Phase.SEALED):
            self._stop(Phase.ABANDONED)

    def closed_record(self) -> LedgerRecord:
        """The record to commit as CLOSED. Nothing can be added from then on.

        Raises LedgerBusy while something is in flight, WriterClosed if the ledger was lost or abandoned.
        """
        if self.phase in (Phase.LOST, Phase.ABANDONED):
            raise WriterClosed(f"the ledger cannot be closed: ledger=`{self.ledger_id}` phase=`{self.phase.name}`")
        if not self.is_settled:
            raise LedgerBusy(
                f"the ledger cannot be closed yet: ledger=`{self.ledger_id}` entries=`{len(self._pending)}` "
                f"change=`{self._change is not None}`"
            )
        self._stop(Phase.CLOSED)
        return closed(self.record, self.lac, self.length)

    # Sending.

    def _chunks(self, entries: Sequence[PendingEntry]) -> Iterator[Chunk]:
        first, size = 0, 0
        for index, entry in enumerate(entries):
            if index > first and size + len(entry.data) > self.limits.group_bytes_max:
                yield self._chunk(entries[first].entry_id, entries[index - 1].entry_id, tuple(entries[first:index]))
                first, size = index, 0
            size += len(entry.data)
        if entries:
            yield self._chunk(entries[first].entry_id, entries[-1].entry_id, tuple(entries[first:]))

    def _chunk(self, first: int, last: int, entries: tuple[PendingEntry, ...]) -> Chunk:
        data = tuple(entry.data for entry in entries)
        record = self.record
        group = AddGroup(record.ledger_id, record.epoch, record.token, data, self._recovery)
        return Chunk(first, last, entries, sum(map(len, data)), group)

    def _part(self, chunk: Chunk, member: Member) -> Chunk | None:
        """What of the chunk the member's place holds; the chunk itself without striping."""
        if not self.quorum.striped:
            return chunk
        held = tuple(entry for entry in chunk.entries if self.quorum.write_mask(entry.entry_id) & member.bit)
        if len(held) == len(chunk.entries):
            return chunk
        return self._chunk(chunk.first, chunk.last, held) if held else None

    def _offer(self, member: Member, chunk: Chunk, now: float) -> None:
        """Sends the chunk if the member is in a state to get it. What it does not get, it lacks."""
        state = member.state
        if state is MemberState.PROBING:
            if member.outstanding:
                return
        elif state is not MemberState.LIVE and state is not MemberState.RESENDING:
            return
        part = self._part(chunk, member)
        if part is None:
            member.stored.add(chunk.first, chunk.last)
            return
        self._sequence += 1
        sent = Outstanding(self._sequence, member, part, now, waiting=state is MemberState.RESENDING)
        member.take(sent)
        self._sends[sent.sequence] = sent
        if not sent.waiting:
            self._out.append(Send(sent.sequence, member.bookie, part.group))
        self._wake(now + self.limits.add_timeout_s)

    def _resend_later(self, sent: Outstanding, result: AddResult, now: float) -> None:
        member = sent.member
        said = f"{result.status.name} {result.message}".rstrip()
        if result.status is AddStatus.NO_ANSWER and member.bookie not in self._registered:
            self._fail(member, f"{said}, and its session is gone", now)
            return
        sent.waiting = True
        if member.state is MemberState.LIVE:
            if member.resends >= self.limits.resends_max:
                self._fail(member, said, now)
                return
            member.become(MemberState.RESENDING)
            member.said = said
            delay = min(self.limits.resend_first_s * 2**member.resends, self.limits.resend_last_s)
            member.resends += 1
            member.retry_at = now + delay
            self._wake(member.retry_at)

    def _resend(self, member: Member) -> None:
        member.become(MemberState.LIVE)
        for sent in member.outstanding.values():
            if sent.waiting:
                sent.waiting = False
                self._out.append(Send(sent.sequence, member.bookie, sent.chunk.group))

    def _probe(self, member: Member, now: float) -> None:
        """Sends the first group that the member lacks; without one the next flush is the probe."""
        member.become(MemberState.PROBING)
        chunk = next(self._chunks(self._lacking(member)), None)
        if chunk is not None:
            self._offer(member, chunk, now)

    def _lacking(self, member: Member) -> list[PendingEntry]:
        """Sent entries that the member needs: not confirmed, or confirmed under a change that makes it a member."""
        first_queued = self._queued[0].entry_id if self._queued else self.next_entry
        lacking = [
            entry
            for entry in (*self._retained, *self._pending)
            if not entry.acks & member.bit and entry.entry_id < first_queued
        ]
        return [entry for entry in lacking if self.quorum.write_mask(entry.entry_id) & member.bit]

    # Counting.

    def _stored(self, sent: Outstanding, now: float) -> None:
        member = sent.member
        self._drop(sent)
        chunk = sent.chunk
        member.stored.add(chunk.first, chunk.last)
        if member.state is MemberState.LEAVING:
            return
        bit = member.bit
        for entry in chunk.entries:
            entry.acks |= bit
        member.resends = 0
        if member.state is MemberState.PROBING:
            self._welcome_back(member, now)
        self._advance(now)

    def _welcome_back(self, member: Member, now: float) -> None:
        member.become(MemberState.LIVE)
        member.probes = 0
        self._avoid.pop(member.bookie, None)
        self._out.append(Report(ReportKind.MEMBER_BACK, member.bookie, member.said))
        self._review = True
        for chunk in list(self._chunks(self._lacking(member))):
            self._offer(member, chunk, now)

    def _drop(self, sent: Outstanding) -> None:
        del self._sends[sent.sequence]
        sent.member.give_back(sent)

    def _advance(self, now: float) -> None:
        """Confirms from the head, in order, what Qa counted members have."""
        pending, counted, needed = self._pending, self._counted, self.quorum.ack_quorum
        lac = self.lac
        while pending and (pending[0].acks & counted).bit_count() >= needed:
            entry = pending.popleft()
            lac = entry.entry_id
            self.in_flight_bytes -= len(entry.data)
            if self._change is not None:
                self._retain(entry)
        if lac != self.lac:
            self.lac = lac
            self._out.append(Confirmed(lac))
            self._check_lag(now)

    def _retain(self, entry: PendingEntry) -> None:
        self._retained.append(entry)
        self._retained_bytes += len(entry.data)
        while self._retained_bytes > self.limits.retained_bytes_max:
            self._retained_bytes -= len(self._retained.popleft().data)

    def _check_lag(self, now: float) -> None:
        bytes_max = self.limits.lag_bytes_max + self.in_flight_bytes
        entries_max = self.limits.lag_entries_max + len(self._pending)
        for member in self._members:
            if member.outstanding_bytes > bytes_max or member.outstanding_entries > entries_max:
                lag = f"lags behind: bytes=`{member.outstanding_bytes}` entries=`{member.outstanding_entries}`"
                if member.state in SENDING:
                    self._fail(member, lag, now)

    # Failing, replacing.

    def _check_time(self, member: Member, now: float) -> None:
        if member.state in SENDING:
            oldest = member.oldest()
            if oldest is not None and oldest.since + self.limits.add_timeout_s <= now:
                self._fail(member, f"no answer in {self.limits.add_timeout_s:g} s", now)
        if member.state is MemberState.RESENDING and member.retry_at <= now:
            self._resend(member)

    def _fail(self, member: Member, said: str, now: float, *, lasting: bool = False) -> None:
        """What it has not acknowledged, it lacks from now on; a late acknowledgement is not looked for."""
        for sent in list(member.outstanding.values()):
            self._drop(sent)
        if not member.probes:
            detail = f"ledger=`{self.ledger_id}` place=`{member.place}` said=`{said}`"
            self._out.append(Report(ReportKind.MEMBER_FAILED, member.bookie, detail))
        member.become(MemberState.REJECTED if lasting else MemberState.FAILED)
        member.said = said
        member.retry_at = now + min(self.limits.probe_first_s * 2**member.probes, self.limits.probe_last_s)
        member.probes = min(member.probes + 1, 30)
        member.resends = 0
        self._avoid[member.bookie] = inf if lasting else now + self.limits.avoid_s
        self._review = True

    def _report_loud(self, bookie: str, result: AddResult) -> None:
        kind = _LOUD.get(result.status)
        if kind is not None:
            self._out.append(Report(kind, bookie, f"ledger=`{self.ledger_id}` said=`{result.message}`"))

    def _answering(self) -> int:
        return sum(member.bit for member in self._members if member.state is MemberState.LIVE)

    def _is_unwanted(self, member: Member) -> bool:
        if member.state in (MemberState.FAILED, MemberState.REJECTED):
            return True
        if self._recovery:
            return False
        bookie = self._registered.get(member.bookie)
        return bookie is None or bookie.state is not BookieState.WRITABLE

    def _to_replace(self) -> list[int]:
        """Places to give to spares: first all that do not answer, then of those that still do only so many at once that
        the others can acknowledge while the outcome of the change is unknown (at least one)."""
        unwanted = [member for member in self._members if self._is_unwanted(member)]
        places = [member.place for member in unwanted if member.state is not MemberState.LIVE]
        remaining = self._answering()
        for member in unwanted:
            if member.state is MemberState.LIVE:
                remaining &= ~member.bit
                if places and not self.quorum.can_acknowledge(remaining):
                    break
                places.append(member.place)
        return places

    def _change_if_needed(self, now: float) -> None:
        if self._change is not None or self._changes_held:
            return
        if (self._recovery or self.phase is Phase.SEALED) and not self._pending:
            return
        places = self._to_replace()
        if not places:
            return
        spares = self._choose_spares(places, now)
        if not spares:
            return
        first_entry = self.lac + 1
        if appends_fragment(self.record, first_entry) and len(self.record.fragments) >= self.limits.fragments_max:
            self._want_roll(f"the ensemble should change and the ledger has {len(self.record.fragments)} fragments")
            return
        self._begin(spares, first_entry)

    def _choose_spares(self, places: Sequence[int], now: float) -> dict[int, str]:
        for name in [name for name, until in self._avoid.items() if until <= now]:
            del self._avoid[name]
        if self._avoid:
            self._wake(min(self._avoid.values()))
        return choose_replacements(
            [member.bookie for member in self._members],
            places, list(self._registered.values()), self.ledger_id, self._rng, avoid=self._avoid,
        )  # fmt: skip

    def _want_roll(self, reason: str) -> None:
        if not self.wants_roll:
            self.wants_roll = reason
            self._out.append(WantsRoll(reason))

    def _begin(self, spares: dict[int, str], first_entry: int) -> None:
        replaced = 0
        ensemble = [member.bookie for member in self._members]
        for place, bookie in spares.items():
            self._members[place].become(MemberState.LEAVING)
            replaced |= 1 << place
            ensemble[place] = bookie
        self._counted = self._all & ~replaced
        for entry in self._pending:
            entry.acks &= self._counted
        new = with_ensemble(self.record, first_entry, ensemble)
        self._change = _Change(new, spares, first_entry)
        self._out.append(Commit(self.record, new))

    def _apply(self, change: _Change, now: float) -> None:
        for place, bookie in change.spares.items():
            self._members[place] = Member(place, bookie)
        self.record, self._change, self._counted = change.record, None, self._all
        if self._history[-1][0] == change.first_entry:
            self._history.pop()
        self._history.append((change.first_entry, tuple(self._members)))
        for place in change.spares:
            member = self._members[place]
            for chunk in list(self._chunks(self._lacking(member))):
                self._offer(member, chunk, now)
        self._retained.clear()
        self._retained_bytes = 0
        names = " ".join(f"{place}:{bookie}" for place, bookie in change.spares.items())
        detail = f"ledger=`{self.ledger_id}` first_entry=`{change.first_entry}` new=`{names}`"
        self._out.append(Report(ReportKind.ENSEMBLE_CHANGED, "", detail))
        self._review = True

    # Ending.

    def _lose(self, reason: LostReason, detail: str) -> None:
        self._stop(Phase.LOST)
        self._out.append(Lost(reason, detail))

    def _stop(self, phase: Phase) -> None:
        self.phase = phase
        self._pending.clear()
        self._queued.clear()
        self._retained.clear()
        self._sends.clear()
        for member in self._members:
            member.outstanding.clear()
            member.outstanding_bytes = member.outstanding_entries = 0
        self._change = None
        self.in_flight_bytes = self._retained_bytes = 0

    def _wake(self, at: float) -> None:
        if at < self._wake_at:
            self._wake_at = at
            self._out.append(Wake(at))

    def _end(self, now: float) -> list[WriterEffect]:
        """What every event ends with: replace, probe, and ask to be woken, if anything gave a reason to."""
        if self._review and self.phase in (Phase.OPEN, Phase.SEALED):
            self._review = False
            self._change_if_needed(now)
            for member in self._members:
                if member.state is MemberState.FAILED:
                    if member.retry_at <= now:
                        self._probe(member, now)
                    else:
                        self._wake(member.retry_at)
                self._wake_for(member)
        return self._take()

    def _wake_for(self, member: Member) -> None:
        if member.state is MemberState.RESENDING:
            self._wake(member.retry_at)
        oldest = member.oldest()
        if member.state in SENDING and oldest is not None:
            self._wake(oldest.since + self.limits.add_timeout_s)

    def _take(self) -> list[WriterEffect]:
        out, self._out = self._out, []
        return out

    # Looking inside.

    def describe(self) -> str:
        lines = [
            f"writer of ledger {self.ledger_id} {self.phase.name} epoch={self.record.epoch} lac={self.lac} "
            f"next={self.next_entry} pending={len(self._pending)} queued={len(self._queued)}"
        ]
        lines += [f"  from {f.first_entry}: {' '.join(b or '-' for b in f.bookies)}" for f in self.record.fragments]
        lines += [f"  member {member.describe()}" for member in self._members]
        if self._change is not None:
            change = " ".join(f"{place}->{bookie}" for place, bookie in self._change.spares.items())
            lines.append(f"  change in flight from {self._change.first_entry}: {change} retained={len(self._retained)}")
        if self.stalled:
            lines.append(f"  stalled: {self.stalled}")
        return "\n".join(lines)

    def check(self) -> None:
        """Asserts every invariant."""
        if self.phase not in (Phase.OPEN, Phase.SEALED):
            assert not self._pending
            assert not self._sends
            assert self._change is None
            return
        assert [entry.entry_id for entry in self._pending] == list(range(self.lac + 1, self.next_entry))
        assert self._queued == list(self._pending)[len(self._pending) - len(self._queued) :]
        assert self.in_flight_bytes == sum(len(entry.data) for entry in self._pending)
        assert self._retained_bytes == sum(len(entry.data) for entry in self._retained)
        for entry in self._pending:
            assert not entry.acks & ~self.quorum.write_mask(entry.entry_id), "acknowledged outside the write set"
            assert not entry.acks & ~self._counted, "acknowledged by a member that is being replaced"
        if self._pending:
            assert self._pending[0].acks.bit_count() < self.quorum.ack_quorum, "the head is confirmed and stays"
        self._check_members()
        self._check_change()

    def _check_members(self) -> None:
        names = [member.bookie for member in self._members if member.bookie != VACANT]
        assert len(names) == len(set(names)), "a bookie fills two places"
        assert tuple(member.bookie for member in self._members) == self.record.fragments[-1].bookies
        for place, member in enumerate(self._members):
            assert member.place == place
            assert (member.bookie == VACANT) <= (member.state in (MemberState.VACANT, MemberState.LEAVING))
            assert not member.outstanding or member.state in SENDING or member.state is MemberState.LEAVING
            assert member.state is not MemberState.PROBING or len(member.outstanding) <= 1
            assert all(self._sends[sequence] is sent for sequence, sent in member.outstanding.items())
            assert member.outstanding_bytes == sum(sent.chunk.size for sent in member.outstanding.values())

    def _check_change(self) -> None:
        firsts = [fragment.first_entry for fragment in self.record.fragments]
        assert all(a < b for a, b in pairwise(firsts)), "fragments are not in order"
        assert len(firsts) <= max(self.limits.fragments_max, 1)
        leaving = sum(member.bit for member in self._members if member.state is MemberState.LEAVING)
        assert self._counted == self._all & ~leaving
        assert (self._change is None) == (leaving == 0)
        assert self._change is not None or not self._retained
        if self._change is not None:
            assert firsts[-1] <= self._change.first_entry <= self.lac + 1
            new, old = self._change.record.fragments[-1].bookies, self.record.fragments[-1].bookies
            assert not filled_mask(old) & ~filled_mask(new), "a change empties a place"
