"""What is decided about losses, drains and tasks, for any look at a cluster."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from repair_world import closed_ledger

from magnetar.metadata.copy_txns import moved, names, takes
from magnetar.metadata.records import (
    VACANT,
    BookieRegistration,
    BookieState,
    CopyReason,
    CopyTask,
    LedgerRecord,
    Loss,
    RepairSettings,
)
from magnetar.repair import audit
from magnetar.repair.audit import Cluster, decide, emptied, judge_losses, needs_decision, new_task

S = 1_000_000
NOW = 1_000 * S
LEDGER = closed_ledger(5, 40, (0, ("a", "b", "c")))


def cluster(
    living: str = "abcd",
    *,
    lost: str = "",
    racks: str = "",
    given_up: str = "",
    drains: str = "",
    holding: str | None = None,
    now_us: int = NOW,
    **repair: Any,
) -> Cluster:
    bookies = {
        name: BookieRegistration(name, name, rack=racks[i] if racks else "", disk_free_bytes=100)
        for i, name in enumerate(living)
    }
    losses = {name: Loss(name, NOW - 30 * S, given_up=name in given_up) for name in lost}
    known = frozenset(living) | frozenset(lost)
    holds = frozenset(lost if holding is None else holding)
    return Cluster(bookies, known, holds, frozenset(drains), losses, RepairSettings(**repair), now_us)


def decided(look: Cluster, task: CopyTask, record: LedgerRecord = LEDGER) -> CopyTask | None:
    return decide(look, task, record, Counter(), random.Random(1))


def lost_task(target: str = "d", **fields: Any) -> CopyTask:
    return CopyTask(5, "a", target, CopyReason.LOST, **fields)


# Bookies.


def test_a_bookie_lost_alone_is_waited_for_and_then_given_up() -> None:
    look = cluster("bcd", lost="a")
    assert judge_losses(look) == {"a": Loss("a", NOW - 30 * S)}
    assert audit.next_due_us(look) == NOW + 30 * S
    later = replace(look, now_us=NOW + 30 * S)
    assert judge_losses(later) == {"a": Loss("a", NOW - 30 * S, given_up=True)}
    assert audit.next_due_us(later) is None


def test_a_second_loss_ends_the_waiting_at_once() -> None:
    assert all(loss.given_up for loss in judge_losses(cluster("cd", lost="ab")).values())


def test_a_bookie_that_holds_nothing_any_more_is_no_second_loss() -> None:
    judged = judge_losses(cluster("cd", lost="ab", given_up="a", holding="b"))
    assert judged["a"].given_up
    assert not judged["b"].given_up


def test_a_bookie_that_is_back_or_unknown_is_not_lost() -> None:
    look = cluster("abcd")
    assert judge_losses(replace(look, losses={"a": Loss("a", 1, True), "x": Loss("x", 1, True)})) == {}


def test_nobody_is_given_up_while_repair_is_off() -> None:
    look = cluster("cd", lost="ab", enabled=False, now_us=NOW + 1_000 * S)
    assert not any(loss.given_up for loss in judge_losses(look).values())
    assert audit.next_due_us(look) is None


def test_a_clock_that_was_set_back_does_not_prolong_the_delay() -> None:
    look = cluster("bcd", lost="a", now_us=NOW - 500 * S)
    assert judge_losses(look)["a"].since_us == NOW - 500 * S


def test_what_must_go_is_on_drained_and_given_up_bookies() -> None:
    look = cluster("bcd", lost="ae", given_up="a", drains="b")
    assert emptied(look) == {"a": CopyReason.LOST, "b": CopyReason.DRAINING}


# Tasks.


def test_the_part_of_a_lost_bookie_goes_to_one_that_has_none() -> None:
    look = cluster("bcd", lost="a", given_up="a")
    task = new_task(look, LEDGER, "a", CopyReason.LOST, Counter(), random.Random(1))
    assert (task.place, task.target, task.problem) == ("a", "d", "")
    assert not needs_decision(look, task)


def test_without_a_spare_bookie_the_task_waits_and_says_so() -> None:
    look = cluster("bc", lost="a", given_up="a")
    task = new_task(look, LEDGER, "a", CopyReason.LOST, Counter(), random.Random(1))
    assert task.target == ""
    assert "start another one" in task.problem
    spare = cluster("bcd", lost="a", given_up="a")
    assert needs_decision(spare, task)
    assert decided(spare, task) == replace(task, target="d", problem="")


@pytest.mark.parametrize("state", [BookieState.READ_ONLY, BookieState.DRAINING])
def test_a_bookie_that_takes_no_ledgers_takes_no_copies(state: BookieState) -> None:
    look = cluster("bcd", lost="a", given_up="a")
    bookies = {**look.bookies, "d": replace(look.bookies["d"], state=state)}
    task = new_task(replace(look, bookies=bookies), LEDGER, "a", CopyReason.LOST, Counter(), random.Random(1))
    assert task.target == ""


def test_a_bookie_reborn_after_the_ledger_takes_copies_of_it() -> None:
    look = cluster("bcd", lost="a", given_up="a")
    bookies = {**look.bookies, "d": replace(look.bookies["d"], ledger_floor=100)}
    task = new_task(replace(look, bookies=bookies), LEDGER, "a", CopyReason.LOST, Counter(), random.Random(1))
    assert task.target == "d"


def test_a_bookie_that_is_back_keeps_its_part() -> None:
    look = cluster("abcd")
    assert needs_decision(look, lost_task())
    assert decided(look, lost_task()) is None


def test_a_bookie_that_is_back_completes_what_it_missed() -> None:
    task = decided(cluster("abcd"), lost_task(first_entry=3, last_entry=9))
    assert task == CopyTask(5, "a", "a", CopyReason.UNREPLICATED, first_entry=3, last_entry=9)
    assert not needs_decision(cluster("abcd"), task)


def test_a_bookie_that_is_back_with_an_empty_disk_completes_all() -> None:
    look = cluster("abcd")
    reborn = replace(look, bookies={**look.bookies, "a": replace(look.bookies["a"], ledger_floor=6)})
    task = decided(reborn, lost_task())
    assert task == CopyTask(5, "a", "a", CopyReason.UNREPLICATED, first_entry=0, last_entry=39)


def test_an_undrained_bookie_keeps_its_part() -> None:
    task = replace(lost_task(), reason=CopyReason.DRAINING)
    assert not needs_decision(cluster("abcd", drains="a"), task)
    assert decided(cluster("abcd"), task) is None


def test_a_drained_bookie_that_is_lost_is_still_emptied() -> None:
    task = replace(lost_task(), reason=CopyReason.DRAINING)
    look = cluster("bcd", lost="a", given_up="a", drains="a")
    assert decided(look, task) == replace(task, reason=CopyReason.LOST)


def test_a_member_that_misses_entries_and_is_given_up_is_replaced_and_its_gap_is_not_forgotten() -> None:
    task = CopyTask(5, "a", "a", CopyReason.UNREPLICATED, first_entry=3, last_entry=9)
    look = cluster("bcd", lost="a", given_up="a")
    assert needs_decision(look, task)
    moved_away = decided(look, task)
    assert moved_away == replace(task, target="d", reason=CopyReason.LOST)
    assert decided(cluster("abcd"), moved_away) == task


def test_a_lost_target_is_waited_for_a_moment_and_then_replaced() -> None:
    look = cluster("bce", lost="ad", given_up="a")
    just_lost = replace(look, losses={**look.losses, "d": Loss("d", NOW - S)})
    assert not needs_decision(just_lost, lost_task())
    assert needs_decision(look, lost_task())
    assert decided(look, lost_task()) == lost_task("e")


def test_a_drained_target_is_replaced() -> None:
    assert decided(cluster("bcde", lost="a", given_up="a", drains="d"), lost_task()) == lost_task("e")


def test_a_full_target_is_replaced_once_it_refused() -> None:
    look = cluster("bcde", lost="a", given_up="a")
    full = replace(look, bookies={**look.bookies, "d": replace(look.bookies["d"], state=BookieState.READ_ONLY)})
    assert not needs_decision(full, lost_task())
    assert decided(full, lost_task(problem="the target refuses")) == lost_task("e")


def test_a_move_of_a_rebalancing_whose_target_is_lost_is_given_up() -> None:
    task = CopyTask(5, "a", "d", CopyReason.REBALANCE, operation="op")
    assert not needs_decision(cluster("abcd"), task)
    assert decided(cluster("abc", lost="d"), task) is None


def test_a_move_of_a_rebalancing_goes_on_as_repair_when_its_place_is_lost() -> None:
    task = CopyTask(5, "a", "d", CopyReason.REBALANCE, operation="op")
    assert decided(cluster("bcd", lost="a", given_up="a"), task) == replace(task, reason=CopyReason.LOST, operation="")


def test_a_task_of_a_place_that_no_fragment_names_ends() -> None:
    record = replace(LEDGER, fragments=moved(LEDGER, "a", "d").fragments)
    assert decided(cluster("bcd", lost="a", given_up="a"), lost_task(""), record) is None


def test_a_bookie_that_nobody_knows_is_lost() -> None:
    look = cluster("bcd")
    assert audit.places_in_need(look, LEDGER) == {"a": CopyReason.LOST}
    assert not needs_decision(look, lost_task())


def test_one_target_does_not_get_more_than_its_share_and_the_rest_waits_in_silence() -> None:
    look = cluster("bcd", lost="a", given_up="a")
    load = Counter({"d": audit.TARGET_TASKS_MAX})
    task = new_task(look, LEDGER, "a", CopyReason.LOST, load, random.Random(1))
    assert (task.target, task.problem) == ("", "")


def test_tasks_of_others_do_not_keep_a_lost_bookie_from_being_replaced() -> None:
    others = [CopyTask(i, "a", "a", CopyReason.UNREPLICATED) for i in range(1, 2 * audit.TASKS_MAX)]
    assert audit.room_for(others) == audit.TASKS_MAX
    assert audit.room_for([replace(task, reason=CopyReason.LOST) for task in others]) == 0
    assert audit.load_of(others) == Counter()


def test_a_copy_goes_to_another_rack_than_the_other_members() -> None:
    look = cluster("bcdef", racks="12213", lost="a", given_up="a")
    chosen = {new_task(look, LEDGER, "a", CopyReason.LOST, Counter(), random.Random(seed)).target for seed in range(20)}
    assert chosen == {"f"}


def test_a_copy_waits_for_the_rack_that_it_needs_rather_than_go_to_one_it_has() -> None:
    look = cluster("bcdef", racks="12213", lost="a", given_up="a")
    load = Counter({"f": audit.TARGET_TASKS_MAX})
    task = new_task(look, LEDGER, "a", CopyReason.LOST, load, random.Random(1))
    assert (task.target, task.problem) == ("", "")


def test_a_copy_does_not_wait_for_the_moves_of_a_rebalancing_that_may_wait_for_it() -> None:
    moves = [CopyTask(i, "c", "d", CopyReason.REBALANCE, "op") for i in range(10, 10 + audit.TARGET_TASKS_MAX)]
    assert audit.load_of(moves) == Counter()
    assert audit.load_of([*moves, lost_task()]) == Counter("d")


def test_a_rack_counts_before_the_number_of_fragments_and_nothing_counts_where_there_are_none() -> None:
    record = closed_ledger(5, 40, (0, ("a", "b", "c")), (20, ("a", "b", "e")))
    targets = {}
    for racks in ("1223", ""):
        look = cluster("bcde", racks=racks, lost="a", given_up="a")
        targets[racks] = new_task(look, record, "a", CopyReason.LOST, Counter(), random.Random(1)).target
    assert targets["1223"] in ("c", "e"), "d would stand beside one of its own rack"
    assert targets[""] == "d", "it takes both"


def test_two_copies_of_a_ledger_that_are_made_at_once_go_to_different_racks() -> None:
    look = cluster("cdefg", racks="12234", lost="ab", given_up="ab")
    for seed in range(20):
        first = new_task(look, LEDGER, "a", CopyReason.LOST, Counter(), random.Random(seed))
        second = new_task(look, LEDGER, "b", CopyReason.LOST, Counter(), random.Random(seed), [first])
        assert len({look.racks[name] for name in (first.target, second.target, "c")}) == 3


def test_a_copy_goes_to_another_rack_than_the_copy_that_a_rebalancing_is_making() -> None:
    look = cluster("bcdef", racks="12334", lost="a", given_up="a")
    moving = CopyTask(5, "b", "d", CopyReason.REBALANCE, operation="op")
    task = new_task(look, LEDGER, "a", CopyReason.LOST, Counter(), random.Random(1), [moving])
    assert task.target == "f"
    free = {new_task(look, LEDGER, "a", CopyReason.LOST, Counter(), random.Random(s)).target for s in range(20)}
    assert free == {"d", "e", "f"}, "without it they are equal"


# For all ledgers and clusters.

NAMES = "abcdefg"


@st.composite
def ledgers(draw: st.DrawFn) -> LedgerRecord:
    size = draw(st.integers(1, 4))
    starts = [0, *sorted(draw(st.sets(st.integers(1, 39), max_size=3)))]
    fragments = []
    for start in starts:
        filled = draw(st.permutations(NAMES))[:size]
        vacant = draw(st.sets(st.integers(0, size - 1), max_size=size - 1))
        fragments.append((start, tuple(VACANT if i in vacant else name for i, name in enumerate(filled))))
    return closed_ledger(5, 40, *fragments)


@given(record=ledgers(), living=st.sets(st.sampled_from(NAMES)), data=st.data())
@settings(max_examples=150, derandomize=True, database=None, deadline=None)
def test_copies_end_with_no_copy_lost_none_doubled_and_nothing_left_that_could_be_moved(
    record: LedgerRecord, living: set[str], data: st.DataObject
) -> None:
    """All tasks of a ledger carried out, one after the other, by the rules of the transactions."""
    lost = "".join(sorted(set(NAMES) - living))
    look = cluster("".join(sorted(living)), lost=lost, given_up=lost)
    rng = random.Random(data.draw(st.integers(0, 1_000)))
    steps = 0
    for place, reason in audit.places_in_need(look, record).items():
        while names(record, place):
            task = new_task(look, record, place, reason, Counter(), rng)
            if not task.target:
                assert not any(takes(record, place, name) for name in living), "somebody could have taken it"
                break
            before = record
            record = moved(record, place, task.target)
            steps += 1
            assert record != before, "each copy moves something"
            for old, new in zip(before.fragments, record.fragments, strict=True):
                filled = [name for name in new.bookies if name != VACANT]
                assert len(set(filled)) == len(filled), "two copies on one bookie"
                kept = {name for name in old.bookies if name in living}
                assert kept <= set(new.bookies), "a copy that lives was dropped"
    assert steps <= sum(len(fragment.bookies) for fragment in record.fragments)
