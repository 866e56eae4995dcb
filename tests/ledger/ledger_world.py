"""A cluster in which nothing happens by itself: every call is handled, answered or lost when the test says so.

The cores are the real ones, and so is the judgement of the bookies (`magnetar.bookie.judge`); what is modelled is the
network, the clock, and one ledger's record with its compare-and-set. A bookie handles each call as a group of its own.
After every event each core checks its invariants.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from math import inf

from magnetar.bookie.entry_store import Damaged, LedgerMark
from magnetar.bookie.entry_store import LedgerState as StoredState
from magnetar.bookie.handlers import check_add
from magnetar.bookie.judge import (
    Conditions,
    Fence,
    Item,
    Judgement,
    ReadConditions,
    Remove,
    judge,
    judge_lac,
    judge_read,
    needed_lookups,
    unknown_lac,
    unknown_read,
    verified,
)
from magnetar.ledger.bookie_rpc import (
    AddGroup,
    AddResult,
    AddStatus,
    EntryAnswer,
    EntryOutcome,
    LacQuery,
    LacResult,
    ReadGroup,
    ReadResult,
)
from magnetar.ledger.effects import (
    AskEntries,
    AskLac,
    Commit,
    Confirmed,
    Found,
    Lost,
    NotFound,
    ReadEffect,
    Recovered,
    RecoveryEffect,
    Report,
    Send,
    Undecided,
    Wake,
    WantsRoll,
    WriterEffect,
)
from magnetar.ledger.fragments import fragment_of
from magnetar.ledger.quorum import Quorum
from magnetar.ledger.reads import OutrunBookies, ReadCore, ReadLimits, ReplicaOrder
from magnetar.ledger.recovery import RecoveryCore, RecoveryLimits
from magnetar.ledger.writer import CommitOutcome, WriterCore, WriterLimits
from magnetar.metadata.records import (
    NO_ENTRY,
    VACANT,
    BookieRegistration,
    BookieState,
    Fragment,
    LedgerPurpose,
    LedgerRecord,
    LedgerState,
)
from magnetar.wire import envelope
from magnetar.wire.envelope import DamagedEnvelope

LEDGER = 7
TOKEN = b"token-of-ledger7"

# What histories are made of: small limits, so that they are reached.
BOOKIES = ("b1", "b2", "b3", "b4", "b5", "b6")
SHAPES = (
    ("3/3/2", ("b1", "b2", "b3")),
    ("3/3/2", ("b1", "b2", VACANT)),
    ("3/2/2", ("b1", "b2", "b3")),
    ("2/2/1", ("b1", "b2")),
    ("1/1/1", ("b1",)),
    ("4/3/2", ("b1", "b2", "b3", "b4")),
    ("5/3/2", ("b1", "b2", "b3", "b4", "b5")),
    ("3/3/3", ("b1", "b2", "b3")),
)
RECOVERERS_MAX = 4
SMALL = replace(
    WriterLimits(), group_bytes_max=100, lag_entries_max=6, retained_bytes_max=150, fragments_max=2, avoid_s=8.0
)
SMALL_RECOVERY = replace(RecoveryLimits(), read_entries_max=3, write_back_bytes_max=120)

Request = AddGroup | ReadGroup | LacQuery
Result = AddResult | ReadResult | LacResult
Effect = WriterEffect | RecoveryEffect | ReadEffect


def ledger_record(
    ensemble: Sequence[str], quorums: str = "3/3/2", *, ledger_id: int = LEDGER, epoch: int = 1
) -> LedgerRecord:
    size, write_quorum, ack_quorum = map(int, quorums.split("/"))
    assert size == len(ensemble)
    fragments = (Fragment(0, tuple(ensemble)),)
    return LedgerRecord(
        ledger_id, 1, LedgerPurpose.DATA, LedgerState.OPEN, epoch, TOKEN, write_quorum, ack_quorum, fragments
    )


def registration(bookie_id: str, **facts: object) -> BookieRegistration:
    return replace(BookieRegistration(bookie_id, f"{bookie_id}:7660"), **facts)  # type: ignore[arg-type]


@dataclass
class SimBookie:
    """A bookie whose every call is one group, durable when it is answered."""

    bookie_id: str
    entries: dict[tuple[int, int], bytes | Damaged] = field(default_factory=dict)
    marks: dict[int, LedgerMark] = field(default_factory=dict)
    limbo: bool = False
    floor: int = 0
    read_only: bool = False
    collecting: set[int] = field(default_factory=set)

    def handle(self, request: Request) -> Result:
        match request:
            case AddGroup():
                try:
                    return self._judge(check_add(request)).verdicts[0]  # type: ignore[return-value]
                except DamagedEnvelope as damage:
                    return AddResult(AddStatus.MALFORMED, str(damage))
            case ReadGroup():
                refusal = self._fence(request) if request.fence else ""
                return unknown_read(refusal) if refusal else self._read(request)
            case LacQuery():
                refusal = self._fence(request) if request.fence else ""
                state = self._state(request.ledger_id)
                return unknown_lac(refusal) if refusal else judge_lac(request.token, state, self._doubts())

    def delete(self, ledger_id: int) -> None:
        """What the collector does to a ledger that no record gives this bookie."""
        self._judge(Remove(ledger_id, now_us=1))

    def wipe(self) -> None:
        """Its disk was replaced by an empty one."""
        self.entries.clear()
        self.marks.clear()

    def _fence(self, request: ReadGroup | LacQuery) -> str:
        verdict = self._judge(Fence(request.ledger_id, request.epoch, request.token)).verdicts[0]
        return verdict.refusal  # type: ignore[union-attr]

    def _judge(self, item: Item) -> Judgement:
        ledger_id = item.ledger_id  # type: ignore[union-attr]
        states = {ledger_id: self._state(ledger_id)}
        stored = {key: self.entries.get(key) for key in needed_lookups([item], states)}
        conditions = Conditions(self.floor, self.read_only, False, self.collecting)
        judgement = judge([item], states, stored, conditions)
        writes = judgement.writes
        for deleted in writes.deleted:
            self.entries = {key: data for key, data in self.entries.items() if key[0] != deleted}
        self.entries.update({(ledger, entry): data for ledger, entry, data in writes.entries})
        self.marks.update(writes.marks)
        return judgement

    def _read(self, group: ReadGroup) -> ReadResult:
        ids = range(group.first_entry, group.last_entry + 1)
        values = [verified(self.entries.get((group.ledger_id, i)), group.ledger_id, i) for i in ids]
        return judge_read(group.token, values, self.marks.get(group.ledger_id), self._doubts())

    def damage(self, entry_id: int) -> None:
        data = self.entries[LEDGER, entry_id]
        assert isinstance(data, bytes)
        self.entries[LEDGER, entry_id] = data[:-1] + bytes([data[-1] ^ 1])

    def _doubts(self) -> ReadConditions:
        return ReadConditions(self.limbo, bool(self.collecting))

    def _state(self, ledger_id: int) -> StoredState:
        last = max((entry for ledger, entry in self.entries if ledger == ledger_id), default=NO_ENTRY)
        if last == NO_ENTRY:
            return StoredState(self.marks.get(ledger_id))
        value = self.entries[ledger_id, last]
        if isinstance(value, Damaged):
            return StoredState(self.marks.get(ledger_id), tail_damage="the last entry is damaged")
        return StoredState(self.marks.get(ledger_id), last, envelope.peek(value).lac)


@dataclass(eq=False)
class Call:
    """A call under way: not handled while `result` is None, then not answered."""

    actor: Actor
    bookie: str
    sequence: int
    request: Request
    result: Result | None = None

    def unanswered(self) -> Result:
        match self.request:
            case AddGroup():
                return AddResult(AddStatus.NO_ANSWER, "connection lost")
            case ReadGroup():
                return ReadResult((EntryAnswer(EntryOutcome.UNKNOWN),), "connection lost")
            case LacQuery():
                return LacResult(EntryOutcome.UNKNOWN, message="connection lost")


class Actor:
    """Who drives a core: performs its effects in the world and tells of them."""

    def __init__(self, world: World, name: str) -> None:
        self.world = world
        self.name = name
        self.wake_at = inf
        self.over = False

    def answer(self, call: Call, result: Result) -> None:
        raise NotImplementedError

    def tick(self) -> None:
        raise NotImplementedError

    def bookies_changed(self) -> None:
        """Most do not care."""

    def describe(self) -> str:
        raise NotImplementedError

    def perform(self, effects: Sequence[Effect]) -> None:
        for effect in effects:
            self.say(effect)
            match effect:
                case Send(sequence, bookie, request) | AskEntries(sequence, bookie, request):
                    self.world.calls.append(Call(self, bookie, sequence, request))
                case AskLac(sequence, bookie, query):
                    self.world.calls.append(Call(self, bookie, sequence, query))
                case Wake(at):
                    self.wake_at = min(self.wake_at, at)
                case _:
                    self.perform_own(effect)

    def perform_own(self, effect: Effect) -> None:
        raise NotImplementedError

    def say(self, effect: Effect) -> None:
        text = _said(effect)
        if text:
            self.world.say(f"{self.name} {text}")


def _ids(group: AddGroup) -> str:
    ids = [envelope.peek(data).entry_id for data in group.entries]
    return ",".join(map(str, ids))


def _said(effect: Effect) -> str:
    match effect:
        case Send(_, bookie, group):
            return f"sends {_ids(group)} to {bookie}" + (" as recovery" if group.recovery else "")
        case AskLac(_, bookie, query):
            return f"asks {bookie} for its lac" + (", fencing" if query.fence else "")
        case AskEntries(_, bookie, group):
            return f"asks {bookie} for {group.first_entry}-{group.last_entry}" + (", fencing" if group.fence else "")
        case Confirmed(last):
            return f"has confirmed up to {last}"
        case Commit(_, new):
            fragment = new.fragments[-1]
            return f"wants the ensemble {' '.join(b or '-' for b in fragment.bookies)} from {fragment.first_entry}"
        case Lost(reason, _):
            return f"has lost the ledger: {reason.value}"
        case WantsRoll(reason):
            return f"wants a roll: {reason}"
        case Report(kind, bookie, _):
            return f"reports: {kind.value} {bookie}".rstrip()
        case Recovered(record, _):
            fragments = "; ".join(f"{f.first_entry}: {' '.join(b or '-' for b in f.bookies)}" for f in record.fragments)
            return f"found the end {record.last_entry} length {record.length} ({fragments})"
        case Undecided(reason, _, superseded):
            return f"is undecided: {reason}" + (" (superseded)" if superseded else "")
        case Found(bookie, entries):
            payloads = b" ".join(bytes(envelope.payload(data)) for data in entries).decode()
            return f"got {len(entries)} from {bookie}: {payloads}"
        case NotFound(proven, _):
            return "found that it is missing" if proven else "found it unavailable"
        case Wake():
            return ""


class WriterActor(Actor):
    def __init__(self, world: World, name: str, limits: WriterLimits | None) -> None:
        super().__init__(world, name)
        self.core = WriterCore(world.record, world.registered(), world.rng, limits)
        self.added: list[bytes] = []
        self.commits: list[tuple[Commit, bool | None]] = []
        self.tick()

    def add(self, *payloads: bytes) -> None:
        for payload in payloads:
            self.added.append(payload)
            self.core.add(payload)
        self._did(self.core.flush(self.world.now))

    def answer(self, call: Call, result: Result) -> None:
        assert isinstance(result, AddResult)
        self._did(self.core.answered(call.sequence, result, self.world.now))

    def tick(self) -> None:
        self.wake_at = inf
        self._did(self.core.tick(self.world.now))

    def bookies_changed(self) -> None:
        self._did(self.core.bookies_changed(self.world.registered(), self.world.now))

    def describe(self) -> str:
        return self.core.describe()

    def apply_commit(self) -> None:
        """The store applies the change, or refuses it; the writer does not hear of it yet."""
        commit, applied = self.commits[0]
        assert applied is None
        self.commits[0] = (commit, self.world.compare_and_set(commit.old, commit.new))

    def answer_commit(self) -> None:
        _, applied = self.commits.pop(0)
        assert applied is not None
        self._did(self.core.committed(CommitOutcome.COMMITTED if applied else CommitOutcome.LOST, self.world.now))

    def perform_own(self, effect: Effect) -> None:
        match effect:
            case Confirmed(last):
                self.world.confirm(last, self.added)
            case Commit():
                self.commits.append((effect, None))
            case Lost():
                self.over = True

    def _did(self, effects: Sequence[WriterEffect]) -> None:
        self.core.check()
        self.perform(effects)


class RecovererActor(Actor):
    def __init__(self, world: World, name: str, limits: RecoveryLimits | None) -> None:
        super().__init__(world, name)
        self.core = RecoveryCore(world.record, world.registered(), world.rng, limits)
        self.base = world.record
        self.found: LedgerRecord | None = None
        self.last_envelope: bytes | None = None
        self.undecided: Undecided | None = None
        self._did(self.core.begin(world.now))

    def answer(self, call: Call, result: Result) -> None:
        match result:
            case AddResult():
                self._did(self.core.add_answered(call.sequence, result, self.world.now))
            case ReadResult():
                self._did(self.core.read_answered(call.sequence, result, self.world.now))
            case LacResult():
                self._did(self.core.lac_answered(call.sequence, result, self.world.now))

    def tick(self) -> None:
        self.wake_at = inf
        self._did(self.core.tick(self.world.now))

    def bookies_changed(self) -> None:
        self._did(self.core.bookies_changed(self.world.registered(), self.world.now))

    def describe(self) -> str:
        return self.core.describe()

    def close(self) -> None:
        assert self.found is not None
        self.world.close(self.name, self.base, self.found)

    def perform_own(self, effect: Effect) -> None:
        match effect:
            case Recovered(record, data):
                self.found, self.last_envelope, self.over = record, data, True
            case Undecided():
                self.undecided, self.over = effect, True

    def _did(self, effects: Sequence[RecoveryEffect]) -> None:
        self.core.check()
        self.perform(effects)


class ReaderActor(Actor):
    def __init__(self, world: World, name: str, first: int, last: int, order: ReplicaOrder) -> None:
        super().__init__(world, name)
        self.core = ReadCore(world.record, first, last, 1 << 20, order, ReadLimits())
        self.outcome: Found | NotFound | None = None
        self._did(self.core.begin(world.now))

    def answer(self, call: Call, result: Result) -> None:
        assert isinstance(result, ReadResult)
        self._did(self.core.answered(call.sequence, result.answers, result.message, self.world.now))

    def tick(self) -> None:
        self.wake_at = inf
        self._did(self.core.tick(self.world.now))

    def describe(self) -> str:
        return self.core.describe()

    def perform_own(self, effect: Effect) -> None:
        assert isinstance(effect, Found | NotFound)
        self.outcome, self.over = effect, True

    def _did(self, effects: Sequence[ReadEffect]) -> None:
        self.core.check()
        self.perform(effects)


class World:
    """One ledger on its bookies, and everybody who works on it.

    confirmed   payloads the writer reported as confirmed, by entry: what must never be lost
    closed      the record once it is CLOSED: it never changes
    disks_are_whole   nothing that a bookie acknowledged was taken from it
    """

    def __init__(self, record: LedgerRecord, bookies: Sequence[str], seed: int = 1) -> None:
        self.rng = random.Random(seed)
        self.now = 0.0
        self.record = record
        self.bookies = {name: SimBookie(name) for name in bookies}
        self.states = {name: registration(name) for name in bookies}
        self.actors: dict[str, Actor] = {}
        self.calls: list[Call] = []
        self.confirmed: dict[int, bytes] = {}
        self.closed: LedgerRecord | None = None
        self.heard: list[str] = []
        self.disks_are_whole = True

    def say(self, line: str) -> None:
        self.heard.append(line)

    # Actors.

    def writer(self, name: str = "w", limits: WriterLimits | None = None) -> WriterActor:
        actor = WriterActor(self, name, limits)
        self.actors[name] = actor
        return actor

    def claim(self, *, raise_epoch: bool = True) -> None:
        epoch = self.record.epoch + raise_epoch
        self.compare_and_set(self.record, self.record.with_state(LedgerState.IN_RECOVERY, epoch))

    def recoverer(self, name: str = "r", limits: RecoveryLimits | None = None) -> RecovererActor:
        actor = RecovererActor(self, name, limits)
        self.actors[name] = actor
        return actor

    def reader(self, name: str, first: int, last: int, order: ReplicaOrder | None = None) -> ReaderActor:
        actor = ReaderActor(self, name, first, last, order or ReplicaOrder(0, OutrunBookies()))
        self.actors[name] = actor
        return actor

    # The metadata store.

    def registered(self) -> list[BookieRegistration]:
        return list(self.states.values())

    def register(self, name: str, state: BookieState = BookieState.WRITABLE) -> None:
        self.bookies.setdefault(name, SimBookie(name))
        self.states[name] = registration(name, state=state)
        self._bookies_changed()

    def unregister(self, name: str) -> None:
        self.states.pop(name, None)
        self._bookies_changed()

    def _bookies_changed(self) -> None:
        for actor in list(self.actors.values()):
            actor.bookies_changed()

    def compare_and_set(self, old: LedgerRecord, new: LedgerRecord) -> bool:
        if self.record != old:
            return False
        assert self.record.state is not LedgerState.CLOSED, "a closed ledger was changed"
        self.record = new
        return True

    def close(self, who: str, old: LedgerRecord, new: LedgerRecord) -> None:
        if self.compare_and_set(old, new):
            self.closed = new
            self.say(f"{who} closed the ledger at {new.last_entry}")
            self.check()
        else:
            self.say(f"{who} takes the record as it is: {self.record.state.name} at {self.record.last_entry}")

    # The network.

    def waiting(self, actor: str = "", bookie: str = "", *, handled: bool | None = None) -> list[Call]:
        return [
            call
            for call in self.calls
            if (not actor or call.actor.name == actor)
            and (not bookie or call.bookie == bookie)
            and (handled is None or (call.result is not None) == handled)
        ]

    def handle(self, call: Call) -> None:
        assert call.result is None
        call.result = self.bookies[call.bookie].handle(call.request)

    def answer(self, call: Call) -> None:
        assert call.result is not None
        self.calls.remove(call)
        self.say(f"  {call.bookie} answers {call.actor.name}: {_answer_text(call)}")
        call.actor.answer(call, call.result)
        self.check()

    def lose(self, call: Call) -> None:
        """No answer, whether it was handled or not."""
        self.calls.remove(call)
        call.actor.answer(call, call.unanswered())
        self.check()

    def deliver(self, actor: str = "", bookie: str = "", count: int | None = None) -> None:
        """Handles and answers what is under way now; what that leads to is left."""
        for call in self.waiting(actor, bookie)[:count]:
            if call in self.calls:
                if call.result is None:
                    self.handle(call)
                self.answer(call)

    def run(self, actor: str = "", without: Sequence[str] = ()) -> None:
        """Delivers until nothing is under way but what the bookies `without` keep."""
        for _ in range(10_000):
            calls = [call for call in self.waiting(actor) if call.bookie not in without]
            if not calls:
                return
            if calls[0].result is None:
                self.handle(calls[0])
            self.answer(calls[0])
        raise AssertionError("it never ends")

    def pass_time(self, seconds: float) -> None:
        """Wakes everybody who asked for it, at the times they asked for."""
        until = self.now + seconds
        while True:
            due = [actor for actor in self.actors.values() if actor.wake_at <= until]
            if not due:
                break
            actor = min(due, key=lambda actor: actor.wake_at)
            self.now = max(self.now, actor.wake_at)
            actor.tick()
        self.now = until

    # What must hold.

    def confirm(self, last: int, added: Sequence[bytes]) -> None:
        for entry_id in range(len(self.confirmed), last + 1):
            assert self.closed is None or entry_id <= self.closed.last_entry, (
                f"entry {entry_id} was confirmed after the ledger was closed at {self.closed.last_entry}"
            )
            self.confirmed[entry_id] = added[entry_id]
            copies = len(self.copies(self.record, entry_id))
            assert copies >= self.record.ack_quorum or not self.disks_are_whole, (
                f"entry {entry_id} was confirmed with {copies} copies in the ensemble that the store knows"
            )

    def check(self) -> None:
        """What was confirmed is in the closed ledger; every entry of it stands, once, on an ack quorum."""
        if self.closed is None:
            return
        closed = self.closed
        assert closed.last_entry >= len(self.confirmed) - 1, (
            f"lost: {len(self.confirmed)} entries were confirmed and the ledger is closed at {closed.last_entry}"
        )
        length = 0
        for entry_id in range(closed.last_entry + 1):
            copies = self.copies(closed, entry_id)
            assert len(set(copies)) == 1, f"entry {entry_id} has {len(set(copies))} contents"
            if self.disks_are_whole:
                assert len(copies) >= closed.ack_quorum, f"entry {entry_id} has {len(copies)} copies"
            payload = bytes(envelope.payload(copies[0]))
            assert self.confirmed.get(entry_id, payload) == payload, f"entry {entry_id} is not what was confirmed"
            length += len(payload)
            envelope.verify(copies[0], closed.ledger_id, entry_id)
        assert closed.length == length

    def copies(self, record: LedgerRecord, entry_id: int) -> list[bytes]:
        """The copies on the entry's write set."""
        quorum = Quorum.of(record)
        fragment, _ = fragment_of(record, entry_id)
        names = [fragment.bookies[place] for place in quorum.write_set(entry_id)]
        values = [self.bookies[n].entries.get((record.ledger_id, entry_id)) for n in names if n != VACANT]
        return [value for value in values if isinstance(value, bytes)]


def _answer_text(call: Call) -> str:
    match call.result:
        case AddResult(status, _):
            return status.name
        case LacResult(EntryOutcome.HAVE, lac, last):
            return f"lac {lac}, last entry {last}"
        case LacResult(outcome):
            return outcome.name
        case ReadResult(answers):
            assert isinstance(call.request, ReadGroup)
            return _runs([answer.outcome for answer in answers], call.request.first_entry)
        case _:
            raise AssertionError("not handled")


def _runs(outcomes: Sequence[EntryOutcome], first: int) -> str:
    """HAVE 0-1, PROVABLY_NOT 2"""
    parts = []
    start = 0
    for index in range(1, len(outcomes) + 1):
        if index == len(outcomes) or outcomes[index] is not outcomes[start]:
            ids = str(first + start) if index - start == 1 else f"{first + start}-{first + index - 1}"
            parts.append(f"{outcomes[start].name} {ids}")
            start = index
    return ", ".join(parts)
