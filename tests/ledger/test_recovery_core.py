"""Recovery, event by event: what it asks, what it takes for an answer, and when it gives up."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
from ledger_world import TOKEN, ledger_record, registration

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
    Recovered,
    RecoveryEffect,
    Report,
    ReportKind,
    Send,
    Undecided,
    Wake,
)
from magnetar.ledger.fragments import closed, with_ensemble
from magnetar.ledger.recovery import RecoveryCore, RecoveryLimits
from magnetar.metadata.records import VACANT, Fragment, LedgerRecord, LedgerState
from magnetar.wire import envelope

RECORD = ledger_record(("a", "b", "c")).with_state(LedgerState.IN_RECOVERY, epoch=5)
LEDGER = RECORD.ledger_id
BESIDE_VACANT = replace(RECORD, fragments=(Fragment(0, ("a", "b", VACANT)),))
NOTHING = LacResult(EntryOutcome.PROVABLY_NOT)
UNKNOWN_LAC = LacResult(EntryOutcome.UNKNOWN, message="limbo")
DENIED = EntryAnswer(EntryOutcome.PROVABLY_NOT)
UNKNOWN = EntryAnswer(EntryOutcome.UNKNOWN)
OK = AddResult(AddStatus.OK)
LIMITS = RecoveryLimits(attempts_max=2, retry_first_s=0.1, give_up_s=10.0, read_entries_max=4)


def entry(entry_id: int, lac: int = -1) -> bytes:
    return envelope.encode(LEDGER, entry_id, lac, 10 * (entry_id + 1), b"0123456789")


def have(entry_id: int) -> EntryAnswer:
    return EntryAnswer(EntryOutcome.HAVE, entry(entry_id))


def lac(value: int, last: int) -> LacResult:
    return LacResult(EntryOutcome.HAVE, value, last, fenced=True, epoch=5)


class Recovery:
    """A core under test; questions are answered by naming the bookie that was asked last."""

    def __init__(self, record: LedgerRecord, names: str, limits: RecoveryLimits) -> None:
        registered = [registration(name) for name in names.split()]
        self.core = RecoveryCore(record, registered, random.Random(1), limits)
        self.now = 0.0
        self.asked: dict[tuple[type, str], int] = {}

    def event(self, effects: list[RecoveryEffect]) -> list[RecoveryEffect]:
        self.core.check()
        for effect in effects:
            if isinstance(effect, AskLac | AskEntries | Send):
                self.asked[type(effect), effect.bookie] = effect.sequence
        return [effect for effect in effects if not isinstance(effect, Wake)]

    def begin(self) -> list[RecoveryEffect]:
        return self.event(self.core.begin(self.now))

    def lac(self, bookie: str, result: LacResult) -> list[RecoveryEffect]:
        return self.event(self.core.lac_answered(self.asked.pop((AskLac, bookie)), result, self.now))

    def read(self, bookie: str, *answers: EntryAnswer, message: str = "") -> list[RecoveryEffect]:
        sequence = self.asked.pop((AskEntries, bookie))
        return self.event(self.core.read_answered(sequence, ReadResult(answers, message), self.now))

    def stored(self, bookie: str, result: AddResult = OK) -> list[RecoveryEffect]:
        return self.event(self.core.add_answered(self.asked.pop((Send, bookie)), result, self.now))

    def tick(self, at: float) -> list[RecoveryEffect]:
        self.now = at
        return self.event(self.core.tick(at))


MakeRecovery = Callable[..., Recovery]


@pytest.fixture
def make() -> Iterator[MakeRecovery]:
    made: list[Recovery] = []

    def make(record: LedgerRecord = RECORD, names: str = "a b c", **limits: object) -> Recovery:
        made.append(Recovery(record, names, replace(LIMITS, **limits)))  # type: ignore[arg-type]
        return made[-1]

    yield make
    for recovery in made:
        recovery.core.check()
        assert recovery.core.describe()


def ask_lac(sequence: int, bookie: str) -> AskLac:
    return AskLac(sequence, bookie, LacQuery(LEDGER, 5, TOKEN, fence=True))


def ask(sequence: int, bookie: str, first: int, last: int, *, fence: bool = True) -> AskEntries:
    return AskEntries(sequence, bookie, ReadGroup(LEDGER, 5, TOKEN, first, last, fence=fence))


def send(sequence: int, bookie: str, *ids: int) -> Send:
    return Send(sequence, bookie, AddGroup(LEDGER, 5, TOKEN, tuple(map(entry, ids)), recovery=True))


def test_all_are_asked_and_fenced_and_the_first_coverage_is_enough(make: MakeRecovery) -> None:
    recovery = make()
    assert recovery.begin() == [ask_lac(1, "a"), ask_lac(2, "b"), ask_lac(3, "c")]
    assert recovery.lac("a", lac(2, 4)) == []
    # From after the highest LAC up to one beyond the last entry that anybody has.
    assert recovery.lac("b", lac(1, 3)) == [ask(4, "a", 3, 5), ask(5, "b", 3, 5), ask(6, "c", 3, 5)]
    assert recovery.lac("c", lac(9, 9)) == [], "too late to matter"


def test_what_one_has_is_written_back_to_all_and_what_two_deny_is_the_end(make: MakeRecovery) -> None:
    recovery = make()
    recovery.begin()
    recovery.lac("a", lac(0, 2))
    recovery.lac("b", lac(0, 2))
    assert recovery.read("a", have(1), have(2), DENIED) == [send(1, "a", 1, 2), send(2, "b", 1, 2), send(3, "c", 1, 2)]
    assert recovery.read("c", DENIED, DENIED, DENIED) == []
    assert recovery.stored("a") == []
    assert recovery.stored("c") == [Recovered(closed(RECORD, 2, 30), entry(2))]


def test_an_empty_ledger_ends_before_its_first_entry(make: MakeRecovery) -> None:
    recovery = make()
    recovery.begin()
    recovery.lac("b", NOTHING)
    assert recovery.lac("c", NOTHING) == [ask(4, "a", 0, 0), ask(5, "b", 0, 0), ask(6, "c", 0, 0)]
    recovery.read("b", DENIED)
    assert recovery.read("c", DENIED) == [Recovered(closed(RECORD, -1, 0), None)]


def test_the_length_of_a_ledger_that_ends_at_its_lac_is_read_from_its_last_entry(make: MakeRecovery) -> None:
    record = with_ensemble(RECORD, 3, ("a", "d", "e"))
    recovery = make(record, "a b c d e")
    recovery.begin()
    recovery.lac("d", NOTHING)
    recovery.lac("e", NOTHING)
    recovery.read("d", DENIED)
    # Entry 2 stands on the fragment before; nothing is fenced for it.
    assert recovery.read("e", DENIED) == [
        ask(7, "c", 2, 2, fence=False), ask(8, "a", 2, 2, fence=False), ask(9, "b", 2, 2, fence=False),
    ]  # fmt: skip
    assert recovery.read("c", UNKNOWN) == []
    assert recovery.read("b", have(2)) == [Recovered(closed(record, 2, 30), entry(2))]


def test_a_confirmed_last_entry_that_nobody_gives_is_undecided_not_missing(make: MakeRecovery) -> None:
    record = with_ensemble(RECORD, 3, ("a", "d", "e"))
    recovery = make(record, "a b c d e")
    recovery.begin()
    recovery.lac("d", NOTHING)
    recovery.lac("e", NOTHING)
    recovery.read("d", DENIED)
    recovery.read("e", DENIED)
    recovery.read("a", DENIED)
    recovery.read("b", DENIED)
    (undecided,) = recovery.read("c", DENIED)
    assert isinstance(undecided, Undecided)
    assert undecided.reason == "entry 2 was confirmed and no bookie gives it"


def test_unknown_is_asked_again_and_never_counts(make: MakeRecovery) -> None:
    recovery = make()
    recovery.begin()
    recovery.lac("a", lac(0, 0))
    assert recovery.lac("b", UNKNOWN_LAC) == []
    recovery.lac("c", lac(0, 0))
    assert recovery.read("a", DENIED) == []
    assert recovery.read("b", UNKNOWN, message="limbo") == []
    assert recovery.tick(0.05) == []
    assert recovery.tick(0.1) == [ask(7, "b", 1, 1)]
    assert recovery.read("c", UNKNOWN) == []
    assert recovery.tick(0.3) == [ask(8, "c", 1, 1)]
    assert recovery.read("b", UNKNOWN, message="limbo") == []
    said = {"a": "entry 1: PROVABLY_NOT", "b": "entry 1: UNKNOWN limbo", "c": "entry 1: UNKNOWN disk"}
    assert recovery.read("c", UNKNOWN, message="disk") == [Undecided("too few bookies know entry 1", said)]


def test_too_few_lacs_are_undecided(make: MakeRecovery) -> None:
    recovery = make()
    recovery.begin()
    recovery.lac("a", UNKNOWN_LAC)
    recovery.lac("b", UNKNOWN_LAC)
    recovery.lac("c", lac(0, 0))
    assert recovery.tick(0.1) == [ask_lac(4, "a"), ask_lac(5, "b")]
    assert recovery.lac("a", UNKNOWN_LAC) == []
    said = {"a": "lac: UNKNOWN limbo", "b": "lac: UNKNOWN limbo", "c": "lac: HAVE"}
    assert recovery.lac("b", UNKNOWN_LAC) == [Undecided("too few bookies told their lac", said)]


def test_a_hung_majority_is_not_waited_for_for_ever(make: MakeRecovery) -> None:
    recovery = make()
    recovery.begin()
    recovery.lac("a", lac(0, 0))
    assert recovery.tick(9.9) == []
    (undecided,) = recovery.tick(10.0)
    assert isinstance(undecided, Undecided)
    assert undecided.reason == "no progress in 10 s while asking for lacs"
    assert undecided.said["b"] == "no answer yet"


def test_beside_a_vacant_place_one_denial_is_enough_for_nothing_is_acknowledged_without_both(
    make: MakeRecovery,
) -> None:
    recovery = make(BESIDE_VACANT, "a b")
    assert recovery.begin() == [ask_lac(1, "a"), ask_lac(2, "b")]
    assert recovery.lac("b", UNKNOWN_LAC) == []
    assert recovery.lac("a", lac(0, 1)) == [ask(3, "a", 1, 2), ask(4, "b", 1, 2)]
    assert recovery.read("b", UNKNOWN) == []
    assert recovery.read("a", have(1), DENIED) == [send(1, "a", 1), send(2, "b", 1)]
    assert recovery.stored("b") == []
    assert recovery.stored("a") == [Recovered(closed(BESIDE_VACANT, 1, 20), entry(1))]


def test_what_the_other_one_has_beside_a_vacant_place_and_a_bookie_that_does_not_know_is_recovered(
    make: MakeRecovery,
) -> None:
    recovery = make(BESIDE_VACANT, "a b")
    recovery.begin()
    recovery.lac("a", lac(-1, 0))
    recovery.read("b", UNKNOWN)
    assert recovery.read("a", have(0), DENIED) == [send(1, "a", 0), send(2, "b", 0)]
    recovery.stored("a")
    assert recovery.stored("b") == [Recovered(closed(BESIDE_VACANT, 0, 10), entry(0))]


def test_a_vacant_place_itself_says_nothing(make: MakeRecovery) -> None:
    recovery = make(BESIDE_VACANT, "a b")
    recovery.begin()
    recovery.lac("a", NOTHING)
    recovery.read("a", UNKNOWN)
    recovery.read("b", UNKNOWN)
    recovery.tick(0.1)
    recovery.read("a", UNKNOWN)
    (undecided,) = recovery.read("b", UNKNOWN)
    assert isinstance(undecided, Undecided)
    assert undecided.said["place 2"] == "no bookie fills this place"


def test_a_damaged_copy_is_told_and_counts_as_unknown(make: MakeRecovery) -> None:
    recovery = make()
    recovery.begin()
    recovery.lac("a", lac(0, 1))
    recovery.lac("b", lac(0, 1))
    broken = EntryAnswer(EntryOutcome.HAVE, entry(1)[:-1] + b"x")
    (report,) = recovery.read("a", broken, DENIED)
    assert isinstance(report, Report)
    assert report.kind is ReportKind.DAMAGED_ENTRY
    misdirected = recovery.read("b", have(3), DENIED)
    assert [type(effect) for effect in misdirected] == [Report]
    assert recovery.read("c", DENIED, DENIED) == [], "one denial and two that do not know"


def test_a_higher_epoch_ends_it(make: MakeRecovery) -> None:
    recovery = make()
    recovery.begin()
    (undecided,) = recovery.lac("a", LacResult(EntryOutcome.UNKNOWN, epoch=6))
    assert isinstance(undecided, Undecided)
    assert undecided.superseded
    recovery = make()
    recovery.begin()
    recovery.lac("a", lac(0, 1))
    recovery.lac("b", lac(0, 1))
    recovery.read("a", have(1), DENIED)
    (undecided,) = recovery.stored("b", AddResult(AddStatus.STALE_EPOCH, "seen=`6`"))
    assert isinstance(undecided, Undecided)
    assert undecided.superseded


def test_a_member_that_fails_the_write_back_is_replaced_in_the_closing_record_only(make: MakeRecovery) -> None:
    recovery = make(names="a b c d")
    recovery.begin()
    recovery.lac("a", lac(0, 2))
    recovery.lac("b", lac(0, 2))
    recovery.read("a", have(1), have(2), DENIED)
    effects = recovery.stored("b", AddResult(AddStatus.IO_ERROR))
    assert send(4, "d", 1, 2) in effects
    assert recovery.stored("a") == []
    # The end is asked of the ensemble that the record names: d, which has nothing, is not asked.
    assert (AskEntries, "d") not in recovery.asked
    recovery.read("c", DENIED, DENIED, DENIED)
    (recovered,) = recovery.stored("d")
    assert isinstance(recovered, Recovered)
    assert recovered.record.fragments == (Fragment(0, ("a", "b", "c")), Fragment(1, ("a", "d", "c")))


def test_a_write_back_that_stalls_is_undecided_and_says_why(make: MakeRecovery) -> None:
    recovery = make()
    recovery.begin()
    recovery.lac("a", lac(0, 1))
    recovery.lac("b", lac(0, 1))
    recovery.read("a", have(1), DENIED)
    recovery.read("b", DENIED, DENIED)
    recovery.stored("b", AddResult(AddStatus.READ_ONLY, "the disk is full"))
    recovery.stored("c", AddResult(AddStatus.READ_ONLY, "the disk is full"))
    undecided = next(effect for effect in recovery.tick(20.0) if isinstance(effect, Undecided))
    assert "READ_ONLY the disk is full" in undecided.reason


def test_what_lies_beyond_the_end_is_not_recovered(make: MakeRecovery) -> None:
    recovery = make()
    recovery.begin()
    recovery.lac("a", lac(0, 3))
    recovery.lac("b", lac(0, 0))
    recovery.read("a", DENIED, have(2), have(3), DENIED)
    effects = recovery.read("b", DENIED, DENIED, DENIED, DENIED)
    assert effects == [ask(7, "a", 0, 0, fence=False), ask(8, "b", 0, 0, fence=False), ask(9, "c", 0, 0, fence=False)]
    assert recovery.read("a", have(0)) == [Recovered(closed(RECORD, 0, 10), entry(0))]


def test_striped_members_have_no_say_in_entries_that_are_not_theirs(make: MakeRecovery) -> None:
    record = ledger_record(("a", "b", "c"), "3/2/2").with_state(LedgerState.IN_RECOVERY, epoch=5)
    recovery = make(record)
    recovery.begin()
    recovery.lac("a", NOTHING)
    assert recovery.lac("b", NOTHING) != [], "each write set has one of them, and one is enough with 3/2/2"
    # Entry 0 stands on a and b. c denies it, which means nothing.
    assert recovery.read("c", DENIED) == []
    assert recovery.read("b", DENIED) == [Recovered(closed(record, -1, 0), None)]


def test_long_tails_are_read_and_written_back_in_windows(make: MakeRecovery) -> None:
    record = replace(ledger_record(("a",), "1/1/1"), state=LedgerState.IN_RECOVERY, epoch=5)
    recovery = make(record, "a", write_back_bytes_max=200)
    recovery.begin()
    assert recovery.lac("a", lac(-1, 9)) == [ask(2, "a", 0, 3)]
    assert recovery.read("a", *map(have, range(4))) == [send(1, "a", 0, 1, 2, 3)], "200 bytes are under way"
    assert recovery.stored("a") == [ask(3, "a", 4, 7)]
    recovery.read("a", *map(have, range(4, 8)))
    assert recovery.stored("a") == [ask(4, "a", 8, 11)]
    recovery.read("a", have(8), have(9), DENIED, DENIED)
    assert recovery.stored("a") == [Recovered(closed(record, 9, 100), entry(9))]
