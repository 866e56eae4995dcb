"""The writer, event by event: each test compares all effects; the fixture checks the invariants after each event."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
from ledger_world import TOKEN, ledger_record, registration

from magnetar.ledger.bookie_rpc import AddGroup, AddResult, AddStatus
from magnetar.ledger.effects import (
    Commit,
    Confirmed,
    Lost,
    Report,
    ReportKind,
    Send,
    Wake,
    WantsRoll,
    WriterEffect,
)
from magnetar.ledger.errors import LedgerBusy, LostReason, WriterClosed
from magnetar.ledger.fragments import Unreplicated, with_ensemble
from magnetar.ledger.writer import CommitOutcome, WriterCore, WriterLimits
from magnetar.metadata.records import VACANT, BookieRegistration, BookieState, Fragment, LedgerRecord, LedgerState
from magnetar.wire import envelope

OK = AddResult(AddStatus.OK)
RECORD = ledger_record(("a", "b", "c"))


class Writer:
    """A core under test. Each event returns its effects without Wake, which `wakes` collects."""

    def __init__(self, record: LedgerRecord, names: str, limits: WriterLimits) -> None:
        self.registered = {name: registration(name) for name in names.split()}
        self.core = WriterCore(record, list(self.registered.values()), random.Random(1), limits)
        self.now = 0.0
        self.wakes: list[float] = []
        self.last: dict[str, list[int]] = {}

    def event(self, effects: list[WriterEffect]) -> list[WriterEffect]:
        self.core.check()
        for effect in effects:
            if isinstance(effect, Wake):
                self.wakes.append(effect.at)
            elif isinstance(effect, Send):
                self.last.setdefault(effect.bookie, []).append(effect.sequence)
        return [effect for effect in effects if not isinstance(effect, Wake)]

    def add(self, *payloads: bytes) -> list[WriterEffect]:
        for payload in payloads:
            self.core.add(payload)
        return self.event(self.core.flush(self.now))

    def answer(self, bookie: str, status: AddStatus = AddStatus.OK, message: str = "") -> list[WriterEffect]:
        """Answers the oldest group that the bookie was sent and has not answered."""
        sequence = self.last[bookie].pop(0)
        return self.event(self.core.answered(sequence, AddResult(status, message), self.now))

    def committed(self, outcome: CommitOutcome = CommitOutcome.COMMITTED) -> list[WriterEffect]:
        return self.event(self.core.committed(outcome, self.now))

    def register(self, *changes: BookieRegistration, gone: str = "") -> list[WriterEffect]:
        self.registered.update({change.bookie_id: change for change in changes})
        for name in gone.split():
            del self.registered[name]
        return self.event(self.core.bookies_changed(list(self.registered.values()), self.now))

    def tick(self, at: float) -> list[WriterEffect]:
        self.now = at
        return self.event(self.core.tick(at))

    def start(self) -> list[WriterEffect]:
        return self.tick(self.now)


MakeWriter = Callable[..., Writer]


@pytest.fixture
def make() -> Iterator[MakeWriter]:
    made: list[Writer] = []

    def make(record: LedgerRecord = RECORD, names: str = "a b c", **limits: object) -> Writer:
        made.append(Writer(record, names, replace(WriterLimits(), **limits)))  # type: ignore[arg-type]
        return made[-1]

    yield make
    for writer in made:
        writer.core.check()
        assert writer.core.describe()


def group(*entries: tuple[int, int, int, bytes], epoch: int = 1) -> AddGroup:
    """Of (entry id, lac, length, payload)."""
    data = tuple(envelope.encode(RECORD.ledger_id, i, lac, length, payload) for i, lac, length, payload in entries)
    return AddGroup(RECORD.ledger_id, epoch, TOKEN, data)


def failed(bookie: str, place: int, said: str) -> Report:
    return Report(ReportKind.MEMBER_FAILED, bookie, f"ledger=`7` place=`{place}` said=`{said}`")


def changed(first_entry: int, new: str) -> Report:
    return Report(ReportKind.ENSEMBLE_CHANGED, "", f"ledger=`7` first_entry=`{first_entry}` new=`{new}`")


def test_what_was_added_since_the_last_flush_is_sent_together_to_all_members(make: MakeWriter) -> None:
    writer = make()
    sent = group((0, -1, 2, b"xx"), (1, -1, 5, b"yyy"))
    assert writer.add(b"xx", b"yyy") == [Send(1, "a", sent), Send(2, "b", sent), Send(3, "c", sent)]
    assert (writer.core.length, writer.core.next_entry, writer.core.in_flight_entries) == (5, 2, 2)
    assert writer.event(writer.core.flush(0.0)) == []


def test_the_members_share_one_group(make: MakeWriter) -> None:
    effects = make().add(b"x")
    assert len({id(effect.group) for effect in effects if isinstance(effect, Send)}) == 1


def test_groups_are_cut_at_their_limit_and_hold_at_least_one_entry(make: MakeWriter) -> None:
    writer = make(ledger_record(("a",), "1/1/1"), "a", group_bytes_max=100)
    effects = writer.add(b"x" * 30, b"x" * 30, b"x" * 10, b"x" * 200, b"x")
    sizes = [len(effect.group.entries) for effect in effects if isinstance(effect, Send)]
    assert sizes == [1, 1, 1, 1, 1]
    effects = writer.add(b"x", b"x", b"x")
    assert [len(effect.group.entries) for effect in effects if isinstance(effect, Send)] == [2, 1]


def test_entries_are_confirmed_in_order_at_the_ack_quorum_once_per_advance(make: MakeWriter) -> None:
    writer = make()
    writer.add(b"0")
    writer.add(b"1")
    writer.add(b"2")
    assert writer.answer("a") == []
    assert writer.answer("a") == []
    assert writer.answer("a") == []
    assert writer.answer("b") == [Confirmed(0)]
    writer.last["b"].reverse()
    assert writer.answer("b") == [], "2 has its quorum, 1 has not"
    assert writer.answer("b") == [Confirmed(2)]
    assert writer.core.in_flight_bytes == 0


def test_an_envelope_carries_the_lac_and_the_length_of_the_moment_it_was_built(make: MakeWriter) -> None:
    writer = make()
    writer.add(b"first")
    writer.answer("a")
    writer.answer("b")
    assert writer.add(b"xy")[0] == Send(4, "a", group((1, 0, 7, b"xy")))


@pytest.mark.parametrize(
    ("status", "reason"),
    [(AddStatus.FENCED, LostReason.FENCED), (AddStatus.STALE_EPOCH, LostReason.STALE_EPOCH)],
)
def test_a_fence_ends_it_at_once(make: MakeWriter, status: AddStatus, reason: LostReason) -> None:
    writer = make()
    writer.add(b"x")
    assert writer.answer("b", status, "because") == [Lost(reason, "b: because")]
    assert writer.answer("a") == []
    assert writer.answer("c") == []
    assert writer.core.lac == -1
    with pytest.raises(WriterClosed):
        writer.core.add(b"y")


@pytest.mark.parametrize("status", [AddStatus.READ_ONLY, AddStatus.IO_ERROR, AddStatus.MALFORMED, AddStatus.REFUSED])
def test_a_refusal_fails_the_member_and_a_spare_takes_its_place(make: MakeWriter, status: AddStatus) -> None:
    writer = make(names="a b c d")
    writer.add(b"x")
    old, new = RECORD, with_ensemble(RECORD, 0, ("a", "d", "c"))
    assert writer.answer("b", status, "no") == [failed("b", 1, f"{status.name} no"), Commit(old, new)]
    # The first entry of the fragment is not confirmed: the fragment is replaced, not followed by another.
    assert new.fragments == (Fragment(0, ("a", "d", "c")),)
    assert writer.committed() == [Send(4, "d", group((0, -1, 1, b"x"))), changed(0, "1:d")]
    assert writer.core.record == new


@pytest.mark.parametrize(
    ("status", "kind"),
    [(AddStatus.CONFLICT, ReportKind.CONFLICT), (AddStatus.WRONG_TOKEN, ReportKind.WRONG_TOKEN)],
)
def test_what_must_never_happen_is_told_with_what_the_bookie_said(
    make: MakeWriter, status: AddStatus, kind: ReportKind
) -> None:
    writer = make()
    writer.add(b"x")
    said = "stored_crc32c=`1` sent_crc32c=`2`"
    assert writer.answer("b", status, said) == [
        Report(kind, "b", f"ledger=`7` said=`{said}`"),
        failed("b", 1, f"{status.name} {said}"),
    ]
    assert writer.tick(100.0) == [failed("a", 0, "no answer in 5 s"), failed("c", 2, "no answer in 5 s")]
    assert "b REJECTED" in (writer.core.stalled or ""), "it is not asked again"


def test_a_silent_member_gets_the_same_bytes_again_and_what_came_meanwhile(make: MakeWriter) -> None:
    writer = make()
    writer.add(b"0")
    assert writer.answer("c", AddStatus.NO_ANSWER) == []
    assert [effect.bookie for effect in writer.add(b"1") if isinstance(effect, Send)] == ["a", "b"]
    assert writer.tick(0.02) == [Send(3, "c", group((0, -1, 1, b"0"))), Send(6, "c", group((1, -1, 2, b"1")))]
    assert writer.answer("c", AddStatus.BUSY, "full") == []
    assert writer.tick(0.03) == []
    assert writer.tick(0.06) == [Send(3, "c", group((0, -1, 1, b"0")))]


def test_a_member_that_stays_silent_has_failed_after_the_add_timeout(make: MakeWriter) -> None:
    writer = make(names="a b c d")
    writer.add(b"0")
    writer.answer("a")
    writer.answer("b")
    assert writer.wakes == [5.0]
    assert writer.tick(4.9) == []
    assert writer.tick(5.0) == [failed("c", 2, "no answer in 5 s"), Commit(RECORD, writer_change(1, "a", "b", "d"))]


def writer_change(first_entry: int, *ensemble: str) -> LedgerRecord:
    return with_ensemble(RECORD, first_entry, ensemble)


def test_no_answer_from_a_bookie_without_a_session_is_not_waited_for(make: MakeWriter) -> None:
    writer = make()
    writer.add(b"0")
    writer.register(gone="c")
    said = "NO_ANSWER gone, and its session is gone"
    assert writer.answer("c", AddStatus.NO_ANSWER, "gone") == [failed("c", 2, said)]


def test_a_member_that_lags_too_far_behind_the_others_has_failed(make: MakeWriter) -> None:
    writer = make(lag_entries_max=2)
    for n in range(3):
        writer.add(b"x")
        writer.answer("a")
        assert writer.answer("b")[:1] == [Confirmed(n)]
    assert writer.core.describe().count("FAILED") == 1
    assert writer.core.unreplicated() == [Unreplicated(2, "c", 0, 2)]


def test_entries_under_way_to_all_do_not_make_a_laggard(make: MakeWriter) -> None:
    writer = make(lag_entries_max=2)
    for _ in range(6):
        writer.add(b"x")
    assert writer.answer("a") == []
    assert writer.answer("b") == [Confirmed(0)]
    assert "FAILED" not in writer.core.describe()


def test_no_spare_is_not_a_failure(make: MakeWriter) -> None:
    writer = make()
    writer.add(b"0")
    writer.answer("a")
    assert writer.answer("c", AddStatus.IO_ERROR) == [failed("c", 2, "IO_ERROR")]
    assert writer.core.stalled is None
    assert writer.answer("b") == [Confirmed(0)]
    assert [effect.bookie for effect in writer.add(b"1") if isinstance(effect, Send)] == ["a", "b"]
    writer.answer("a")
    writer.answer("b")
    assert writer.register(registration("d")) == [Commit(RECORD, writer_change(2, "a", "b", "d"))]
    assert writer.committed() == [changed(2, "2:d")]
    assert writer.core.unreplicated() == [Unreplicated(2, "c", 0, 1)]


def test_a_failed_member_is_probed_with_one_group_and_gets_the_rest_when_it_stores_that(make: MakeWriter) -> None:
    writer = make(ledger_record(("a", "b", "c"), "3/3/3"), group_bytes_max=100)
    writer.add(b"0" * 50)
    writer.answer("c", AddStatus.IO_ERROR)
    writer.add(b"1" * 50, b"2" * 50)
    writer.last["c"] = []
    probe = writer.tick(0.1)
    assert [(type(effect), len(writer.last["c"])) for effect in probe] == [(Send, 1)]
    assert writer.answer("c", AddStatus.IO_ERROR) == [], "told once"
    assert writer.tick(0.2) == [], "the pause grows"
    assert len(writer.tick(0.31)) == 1
    sent = writer.answer("c")
    assert sent[0] == Report(ReportKind.MEMBER_BACK, "c", "IO_ERROR")
    assert [effect.bookie for effect in sent[1:] if isinstance(effect, Send)] == ["c", "c"]


def test_a_failed_member_is_tried_at_once_when_it_registers_again(make: MakeWriter) -> None:
    writer = make()
    writer.add(b"0")
    writer.register(gone="b c")
    writer.answer("b", AddStatus.NO_ANSWER)
    writer.answer("c", AddStatus.NO_ANSWER)
    stalled = writer.core.stalled or ""
    assert "b FAILED" in stalled
    assert "c FAILED" in stalled
    assert writer.register(registration("b")) == [Send(4, "b", group((0, -1, 1, b"0")))]
    writer.answer("a")
    assert writer.answer("b") == [
        Report(ReportKind.MEMBER_BACK, "b", "NO_ANSWER, and its session is gone"),
        Confirmed(0),
    ]


def test_while_a_change_is_of_unknown_outcome_only_members_of_both_ensembles_count(make: MakeWriter) -> None:
    writer = make(names="a b c d")
    writer.add(b"0")
    writer.answer("c")
    assert writer.register(gone="c") == [Commit(RECORD, writer_change(0, "a", "b", "d"))]
    assert writer.answer("a") == [], "the acknowledgement of c does not count any more"
    assert writer.answer("b") == [Confirmed(0)], "completions go on"
    # What was confirmed meanwhile is kept for the new member, and sent when it is one.
    assert writer.committed() == [Send(4, "d", group((0, -1, 1, b"0"))), changed(0, "2:d")]


def test_further_failures_wait_for_the_outcome_of_the_change_under_way(make: MakeWriter) -> None:
    writer = make(names="a b c d e")
    writer.add(b"0")
    first = writer.answer("c", AddStatus.IO_ERROR)
    assert isinstance(first[1], Commit)
    assert writer.answer("b", AddStatus.IO_ERROR) == [failed("b", 1, "IO_ERROR")]
    after = writer.committed()
    assert isinstance(after[-1], Commit)
    assert after[-1].old == first[1].new
    assert len(after[-1].new.fragments) == 1


def test_a_lost_change_is_a_lost_ledger(make: MakeWriter) -> None:
    writer = make(names="a b c d")
    writer.add(b"0")
    writer.answer("c", AddStatus.IO_ERROR)
    assert writer.committed(CommitOutcome.LOST) == [
        Lost(LostReason.CLOSED_ELSEWHERE, "an ensemble change found the record changed")
    ]


def test_what_is_kept_for_a_change_is_bounded_and_the_rest_is_to_be_repaired(make: MakeWriter) -> None:
    writer = make(names="a b c d", retained_bytes_max=100)
    writer.register(gone="c")
    for _ in range(4):
        writer.add(b"x" * 8)
        writer.answer("a")
        writer.answer("b")
    assert [effect.group for effect in writer.committed() if isinstance(effect, Send)] == [
        group((2, 1, 24, b"x" * 8), (3, 2, 32, b"x" * 8))
    ]
    writer.answer("d")
    assert writer.core.unreplicated() == [Unreplicated(2, "d", 0, 1)]


def test_an_answer_of_a_replaced_member_changes_nothing_for_its_successor(make: MakeWriter) -> None:
    writer = make(names="a b c d")
    writer.add(b"0")
    writer.register(gone="c")
    writer.committed()
    assert writer.answer("c") == []
    assert writer.answer("a") == []
    assert writer.answer("d") == [Confirmed(0)]


def test_no_change_is_begun_while_changes_are_held(make: MakeWriter) -> None:
    writer = make(names="a b c d")
    assert writer.event(writer.core.hold_changes(True, 0.0)) == []
    assert writer.register(gone="c") == []
    assert writer.event(writer.core.hold_changes(False, 1.0)) == [Commit(RECORD, writer_change(0, "a", "b", "d"))]


def test_draining_members_leave_one_by_one_so_that_the_others_can_acknowledge(make: MakeWriter) -> None:
    writer = make(names="a b c d e")
    writer.register(registration("a", state=BookieState.DRAINING), registration("b", state=BookieState.DRAINING))
    assert writer.core.record.fragments[-1].bookies == ("a", "b", "c")
    assert writer.core.change_in_flight
    assert writer.core.describe().count("LEAVING") == 1
    assert isinstance(writer.committed()[-1], Commit)


def test_a_vacant_place_is_filled_when_a_bookie_appears(make: MakeWriter) -> None:
    record = ledger_record(("a", "b", VACANT))
    writer = make(record, "a b")
    assert writer.start() == []
    writer.add(b"0")
    writer.answer("a")
    assert writer.answer("b") == [Confirmed(0)]
    change = Commit(record, with_ensemble(record, 1, ("a", "b", "c")))
    assert writer.register(registration("c")) == [change]
    writer.committed()
    assert writer.core.unreplicated() == [Unreplicated(2, VACANT, 0, 0)]


def test_a_ledger_with_too_many_fragments_wants_to_be_rolled_once(make: MakeWriter) -> None:
    writer = make(names="a b c d e", fragments_max=2)
    writer.add(b"0")
    writer.answer("a")
    writer.answer("b")
    writer.register(gone="c")
    writer.committed()
    writer.add(b"1")
    for bookie in ("a", "b"):
        writer.answer(bookie)
    reason = "the ensemble should change and the ledger has 2 fragments"
    assert writer.register(gone="b") == [WantsRoll(reason)]
    assert writer.tick(1.0) == []
    assert writer.core.wants_roll == reason


def test_a_bookie_that_failed_is_no_spare_until_it_registers_again_or_time_has_passed(make: MakeWriter) -> None:
    writer = make(names="a b c d", avoid_s=30.0)
    writer.add(b"0")
    writer.answer("c", AddStatus.IO_ERROR)
    writer.committed()
    assert writer.answer("b", AddStatus.IO_ERROR) == [failed("b", 1, "IO_ERROR")], "c is not taken"
    assert writer.core.record.fragments[-1].bookies == ("a", "b", "d")
    writer.register(gone="c")
    back = writer.register(registration("c"))
    assert [type(effect) for effect in back] == [Commit]


def test_a_striped_ledger_sends_each_member_what_its_place_holds(make: MakeWriter) -> None:
    writer = make(ledger_record(("a", "b", "c"), "3/2/2"))
    effects = writer.add(b"0", b"1", b"2", b"3")
    ids = {
        effect.bookie: [envelope.peek(data).entry_id for data in effect.group.entries]
        for effect in effects
        if isinstance(effect, Send)
    }
    assert ids == {"a": [0, 2, 3], "b": [0, 1, 3], "c": [1, 2]}
    assert writer.answer("a") == []
    assert writer.answer("b") == [Confirmed(0)]
    assert writer.answer("c") == [Confirmed(3)]
    assert writer.core.unreplicated() == []


def test_a_sealed_writer_completes_what_it_has_with_new_members_if_need_be(make: MakeWriter) -> None:
    writer = make(names="a b c d")
    writer.add(b"0")
    writer.core.seal()
    with pytest.raises(WriterClosed):
        writer.core.add(b"1")
    assert isinstance(writer.answer("c", AddStatus.IO_ERROR)[1], Commit)
    with pytest.raises(LedgerBusy):
        writer.core.closed_record()
    writer.committed()
    writer.answer("a")
    assert writer.answer("b") == [Confirmed(0)]
    assert writer.register(gone="b") == [], "nothing is left to be written"
    record = writer.core.closed_record()
    assert (record.state, record.last_entry, record.length) == (LedgerState.CLOSED, 0, 1)
    assert record.fragments == (Fragment(0, ("a", "b", "d")),)


def test_a_closed_record_has_no_fragments_beyond_its_end(make: MakeWriter) -> None:
    writer = make(names="a b c d")
    writer.add(b"0")
    writer.answer("a")
    writer.answer("b")
    writer.register(gone="c")
    writer.committed()
    assert writer.core.closed_record().fragments == (Fragment(0, ("a", "b", "c")),)


def test_an_empty_ledger_can_be_closed(make: MakeWriter) -> None:
    record = make().core.closed_record()
    assert (record.last_entry, record.length) == (-1, 0)


def test_an_abandoned_writer_does_nothing_any_more(make: MakeWriter) -> None:
    writer = make(names="a b c d")
    writer.add(b"0")
    writer.answer("c", AddStatus.IO_ERROR)
    writer.core.abandon()
    assert writer.answer("a") == []
    assert writer.committed() == []
    assert writer.tick(10.0) == []
    assert writer.register(gone="a") == []


def test_only_open_ledgers_are_written(make: MakeWriter) -> None:
    with pytest.raises(ValueError, match="not writable"):
        make(RECORD.with_state(LedgerState.IN_RECOVERY))


def test_an_entry_that_no_frame_could_carry_is_refused(make: MakeWriter) -> None:
    writer = make()
    with pytest.raises(ValueError, match="too large"):
        writer.core.add(b"x" * (8 << 20))
    assert writer.core.next_entry == 0
