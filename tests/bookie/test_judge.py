"""What a bookie answers, as tables: the state of the ledger, the conditions, the item, the verdict."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from magnetar.bookie.entry_store import Damaged, LedgerMark, LedgerState
from magnetar.bookie.handlers import check_add
from magnetar.bookie.judge import (
    Add,
    Conditions,
    Done,
    Fence,
    Forget,
    Item,
    Judgement,
    ReadConditions,
    Remove,
    SetMeta,
    judge,
    judge_lac,
    judge_read,
    needed_lookups,
    verified,
)
from magnetar.ledger.bookie_rpc import AddResult, AddStatus, EntryOutcome
from magnetar.metadata.records import NO_ENTRY
from magnetar.wire.envelope import DamagedEnvelope, encode

TOKEN = b"token-0000000007"
OPEN = LedgerMark(TOKEN, 3, stored=True)
FENCED = replace(OPEN, fenced=True)
DELETED = replace(OPEN, stored=False, deleted_us=5)
UNTOUCHED = LedgerState(None)

READ_ONLY = Conditions(read_only=True)
FULL = Conditions(read_only=True, full=True)
BELOW_FLOOR = Conditions(floor=8)
AT_FLOOR = Conditions(floor=7)
COLLECTING = Conditions(collecting={7})


def verdict_of(item: Item, state: LedgerState, conditions: Conditions, **stored: Any) -> tuple[Any, Judgement]:
    judgement = judge([item], {7: state}, stored.get("stored", {}), conditions)
    return judgement.verdicts[0], judgement


@pytest.mark.parametrize(
    ("mark", "conditions", "epoch", "ordinary", "recovery"),
    [
        (None, Conditions(), 3, "OK", "OK"),
        (OPEN, Conditions(), 3, "OK", "OK"),
        (OPEN, Conditions(), 4, "OK", "OK"),
        (OPEN, Conditions(), 2, "STALE_EPOCH", "STALE_EPOCH"),
        (FENCED, Conditions(), 3, "FENCED", "OK"),
        (FENCED, Conditions(), 2, "FENCED", "STALE_EPOCH"),
        (replace(OPEN, token=b"x"), Conditions(), 3, "WRONG_TOKEN", "WRONG_TOKEN"),
        (replace(FENCED, token=b"x"), Conditions(), 3, "WRONG_TOKEN", "WRONG_TOKEN"),
        (DELETED, Conditions(), 3, "REFUSED", "OK"),
        (replace(DELETED, fenced=True), Conditions(), 3, "FENCED", "OK"),
        (None, BELOW_FLOOR, 3, "REFUSED", "OK"),
        (OPEN, BELOW_FLOOR, 3, "REFUSED", "OK"),
        (None, AT_FLOOR, 3, "OK", "OK"),
        (OPEN, READ_ONLY, 3, "READ_ONLY", "OK"),
        (FENCED, READ_ONLY, 3, "FENCED", "OK"),
        (OPEN, FULL, 3, "READ_ONLY", "READ_ONLY"),
        (OPEN, COLLECTING, 3, "BUSY", "BUSY"),
        (FENCED, COLLECTING, 3, "BUSY", "BUSY"),
        (Damaged("torn"), Conditions(), 3, "IO_ERROR", "IO_ERROR"),
    ],
)
def test_an_add_is_judged_by_the_ledgers_mark_and_the_bookies_conditions(
    mark: Any, conditions: Conditions, epoch: int, ordinary: str, recovery: str, writer: Any
) -> None:
    for is_recovery, expected in ((False, ordinary), (True, recovery)):
        item = check_add(writer(7).add(0, epoch=epoch, recovery=is_recovery))
        verdict, judgement = verdict_of(item, LedgerState(mark), conditions)
        assert verdict.status is AddStatus[expected], (is_recovery, verdict)
        assert bool(judgement.writes.entries) == (expected == "OK")
        assert judgement.needs_sync == (expected == "OK")


def test_the_first_add_writes_the_mark_with_token_and_epoch(writer: Any) -> None:
    verdict, judgement = verdict_of(check_add(writer(7, 4).add(0, 1)), UNTOUCHED, Conditions())
    mark = LedgerMark(TOKEN, 4, stored=True)
    assert verdict == AddResult(AddStatus.OK)
    assert judgement.writes.marks == {7: mark}
    assert judgement.writes.entries == [(7, 0, writer(7).entry(0)), (7, 1, writer(7).entry(1))]
    assert judgement.states == {7: LedgerState(mark, 1, 0)}


def test_an_append_to_a_known_ledger_writes_no_mark_and_looks_nothing_up(writer: Any) -> None:
    item = check_add(writer(7, 3).add(5, 6))
    state = LedgerState(OPEN, 4, 3)
    assert needed_lookups([item], {7: state}) == []
    _, judgement = verdict_of(item, state, Conditions())
    assert judgement.writes.marks == {}
    assert judgement.states[7].last_entry == 6


def test_only_ids_that_are_not_new_are_looked_up(writer: Any) -> None:
    item = check_add(writer(7, 3).add(2, 4, 5))
    assert needed_lookups([item], {7: LedgerState(OPEN, 4, 3)}) == [(7, 2), (7, 4)]
    assert needed_lookups([item], {7: LedgerState(OPEN, tail_damage="torn")}) == [(7, 2), (7, 4), (7, 5)]


def test_the_same_bytes_again_are_ok_with_this_groups_fsync_and_not_written_twice(writer: Any) -> None:
    item = check_add(writer(7, 3).add(4))
    verdict, judgement = verdict_of(item, LedgerState(OPEN, 4, 3), Conditions(), stored={(7, 4): writer(7).entry(4)})
    assert verdict.status is AddStatus.OK
    assert judgement.needs_sync
    assert judgement.writes.entries == []


def test_other_bytes_under_a_stored_id_are_a_conflict_that_names_both_checksums(writer: Any) -> None:
    sent, known = writer(7).entry(4, b"sent"), writer(7).entry(4, b"known")
    item = check_add(writer(7, 3).add(4, 5, payload=b"sent", recovery=True))
    verdict, judgement = verdict_of(item, LedgerState(OPEN, 4, 3), Conditions(), stored={(7, 4): known})
    assert verdict.status is AddStatus.CONFLICT
    assert f"stored_crc32c=`{known[36:40].hex()}` sent_crc32c=`{sent[36:40].hex()}`" in verdict.message
    assert judgement.writes.entries == []
    assert not judgement.needs_sync


def test_a_conflict_within_one_group_is_seen_without_the_store(writer: Any) -> None:
    items = [check_add(writer(7, 3).add(0, payload=payload)) for payload in (b"first", b"other", b"first")]
    judgement = judge(items, {7: UNTOUCHED}, {}, Conditions())
    assert [verdict.status.name for verdict in judgement.verdicts if isinstance(verdict, AddResult)] == [
        "OK",
        "CONFLICT",
        "OK",
    ]
    assert judgement.writes.entries == [(7, 0, writer(7).entry(0, b"first"))]


def test_a_hole_below_the_last_entry_is_filled(writer: Any) -> None:
    item = check_add(writer(7, 3).add(2))
    verdict, judgement = verdict_of(item, LedgerState(OPEN, 4, 3), Conditions(), stored={(7, 2): None})
    assert verdict.status is AddStatus.OK
    assert judgement.states[7] == LedgerState(OPEN, 4, 3)


@pytest.mark.parametrize("damage", [Damaged("torn"), b"not an envelope", encode(8, 4, 3, 1, b"x")])
def test_a_damaged_entry_is_healed_by_recovery_and_stops_an_ordinary_add(damage: Any, writer: Any) -> None:
    for recovery, expected in ((True, AddStatus.OK), (False, AddStatus.IO_ERROR)):
        item = check_add(writer(7, 3).add(4, recovery=recovery))
        verdict, judgement = verdict_of(item, LedgerState(OPEN, 4, 3), Conditions(), stored={(7, 4): damage})
        assert verdict.status is expected
        assert len(judgement.writes.entries) == int(recovery)


def test_an_add_behind_a_fence_in_its_group_is_fenced_and_one_before_it_is_not(writer: Any) -> None:
    items: list[Item] = [
        check_add(writer(7, 3).add(0)),
        Fence(7, 4, TOKEN),
        check_add(writer(7, 3).add(1)),
        check_add(writer(7, 4).add(1, recovery=True)),
    ]
    judgement = judge(items, {7: UNTOUCHED}, {}, Conditions())
    assert [getattr(verdict, "status", verdict) for verdict in judgement.verdicts] == [
        AddStatus.OK,
        Done(),
        AddStatus.FENCED,
        AddStatus.OK,
    ]
    assert judgement.writes.marks[7] == LedgerMark(TOKEN, 4, fenced=True, stored=True)


@pytest.mark.parametrize(
    ("mark", "epoch", "token", "refused", "after"),
    [
        (None, 4, TOKEN, False, LedgerMark(TOKEN, 4, fenced=True)),
        (OPEN, 3, TOKEN, False, replace(OPEN, fenced=True)),
        (OPEN, 9, TOKEN, False, replace(OPEN, fenced=True, epoch=9)),
        (OPEN, 2, TOKEN, True, OPEN),
        (OPEN, 3, b"x", True, OPEN),
        (DELETED, 3, TOKEN, False, replace(DELETED, fenced=True)),
        (Damaged("torn"), 3, TOKEN, True, Damaged("torn")),
    ],
)
def test_a_fence_is_judged_by_token_and_epoch(mark: Any, epoch: int, token: bytes, refused: bool, after: Any) -> None:
    verdict, judgement = verdict_of(Fence(7, epoch, token), LedgerState(mark), Conditions())
    assert bool(verdict.refusal) == refused
    assert judgement.states[7].mark == after
    assert judgement.needs_sync == (not refused)


def test_a_fence_that_is_there_already_needs_no_fsync() -> None:
    verdict, judgement = verdict_of(Fence(7, 3, TOKEN), LedgerState(FENCED), Conditions())
    assert verdict == Done()
    assert not judgement.needs_sync


def test_removing_leaves_a_tombstone_that_remembers_fence_epoch_and_token() -> None:
    verdict, judgement = verdict_of(Remove(7, 99), LedgerState(FENCED, 4, 3), COLLECTING)
    tombstone = LedgerMark(TOKEN, 3, fenced=True, deleted_us=99)
    assert verdict == Done()
    assert judgement.writes.deleted == [7]
    assert judgement.states == {7: LedgerState(tombstone, NO_ENTRY, NO_ENTRY)}


def test_only_a_tombstone_is_forgotten() -> None:
    for mark, forgotten in ((DELETED, True), (OPEN, False), (replace(DELETED, stored=True), False), (None, False)):
        verdict, judgement = verdict_of(Forget(7), LedgerState(mark), Conditions())
        assert (judgement.writes.forgotten == [7]) == forgotten
        assert bool(verdict.refusal) != forgotten


def test_meta_is_written_with_its_group() -> None:
    judgement = judge([SetMeta({"a": b"1"})], {}, {}, Conditions())
    assert judgement.writes.meta == {"a": b"1"}
    assert judgement.needs_sync


HAVE, NOT, UNKNOWN = EntryOutcome.HAVE, EntryOutcome.PROVABLY_NOT, EntryOutcome.UNKNOWN


@pytest.mark.parametrize(
    ("mark", "conditions", "token", "present", "absent"),
    [
        (OPEN, ReadConditions(), TOKEN, HAVE, NOT),
        (FENCED, ReadConditions(), TOKEN, HAVE, NOT),
        (OPEN, ReadConditions(limbo=True), TOKEN, HAVE, UNKNOWN),
        (OPEN, ReadConditions(collecting=True), TOKEN, UNKNOWN, UNKNOWN),
        (replace(DELETED, stored=True), ReadConditions(), TOKEN, HAVE, UNKNOWN),
        (None, ReadConditions(), TOKEN, HAVE, NOT),
        (None, ReadConditions(limbo=True), TOKEN, HAVE, UNKNOWN),
        (OPEN, ReadConditions(), b"x", UNKNOWN, UNKNOWN),
        (Damaged("torn"), ReadConditions(), TOKEN, UNKNOWN, UNKNOWN),
    ],
)
def test_a_negative_is_given_only_where_nothing_can_be_missing(
    mark: Any, conditions: ReadConditions, token: bytes, present: EntryOutcome, absent: EntryOutcome, writer: Any
) -> None:
    assert judge_read(token, [writer(7).entry(0)], mark, conditions).answers[0].outcome is present
    assert judge_read(token, [None], mark, conditions).answers[0].outcome is absent
    assert judge_read(token, [Damaged("torn")], mark, conditions).answers[0].outcome is UNKNOWN


@pytest.mark.parametrize("flip", range(0, 47, 3))
def test_an_entry_with_any_byte_changed_is_damaged(flip: int, writer: Any) -> None:
    data = bytearray(writer(7).entry(4))
    data[flip] ^= 0x10
    assert isinstance(verified(bytes(data), 7, 4), Damaged)
    assert isinstance(verified(writer(7).entry(5), 7, 4), Damaged)


@pytest.mark.parametrize(
    ("state", "conditions", "outcome", "lac", "last"),
    [
        (LedgerState(OPEN, 4, 3), ReadConditions(), HAVE, 3, 4),
        (LedgerState(FENCED), ReadConditions(), NOT, -1, -1),
        (UNTOUCHED, ReadConditions(), NOT, -1, -1),
        (LedgerState(OPEN, 4, 3), ReadConditions(limbo=True), UNKNOWN, -1, -1),
        (UNTOUCHED, ReadConditions(limbo=True), UNKNOWN, -1, -1),
        (LedgerState(DELETED), ReadConditions(), UNKNOWN, -1, -1),
        (LedgerState(OPEN, 4, 3, "torn"), ReadConditions(), UNKNOWN, -1, -1),
        (LedgerState(Damaged("torn")), ReadConditions(), UNKNOWN, -1, -1),
    ],
)
def test_a_lac_is_stated_only_where_nothing_can_be_missing(
    state: LedgerState, conditions: ReadConditions, outcome: EntryOutcome, lac: int, last: int
) -> None:
    result = judge_lac(TOKEN, state, conditions)
    assert (result.outcome, result.lac, result.last_entry) == (outcome, lac, last)
    assert result.fenced == (isinstance(state.mark, LedgerMark) and state.mark.fenced)


def test_what_could_never_be_read_again_is_refused_before_it_is_queued(writer: Any) -> None:
    good = writer(7).add(0, 1)
    broken = bytearray(writer(7).entry(0))
    broken[-1] ^= 1
    for bad in (
        good._replace(entries=()),
        good._replace(ledger_id=0),
        good._replace(ledger_id=8),
        good._replace(token=b""),
        good._replace(entries=good.entries[::-1]),
        good._replace(entries=(good.entries[0], good.entries[0])),
        good._replace(entries=(bytes(broken),)),
        good._replace(entries=(b"",)),
        good._replace(entries=(encode(7, 3, 3, 1, b"lac is not below"),)),
        good._replace(entries=(encode(7, 1 << 63, 0, 1, b"id is too high"),)),
    ):
        with pytest.raises(DamagedEnvelope):
            check_add(bad)
    assert isinstance(check_add(good), Add)
