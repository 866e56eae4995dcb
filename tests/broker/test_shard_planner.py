"""Which shards a rebalancing of brokers moves, when a saved plan is stale, and what becomes of its moves."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from magnetar.broker.loads import ShardLoad
from magnetar.broker.running_hand_offs import FAILURES_MAX, RunningHandOffs
from magnetar.broker.shard_planner import TARGET, TRIGGER, Snapshot, objections, plan
from magnetar.metadata.records import (
    Goal,
    Move,
    MoveState,
    Operation,
    OperationState,
    Owner,
    ShardRecord,
    ShardState,
)

MB = 1_000_000.0


def snapshot(
    owned: dict[str, list[float]], *, draining: tuple[str, ...] = (), leaving: tuple[str, ...] = ()
) -> Snapshot:
    """Brokers with a shard of each of these loads, in MB/s; 0.0 = it is quiet. The ids count from 1."""
    owners: dict[int, Owner] = {}
    loads: dict[int, ShardLoad] = {}
    for broker, shards in owned.items():
        for load in shards:
            shard_id = len(owners) + 1
            owners[shard_id] = Owner(broker, 1)
            if load:
                loads[shard_id] = ShardLoad(shard_id, load * MB, load * 1000)
    sessions = dict.fromkeys(owned, 1)
    return Snapshot(9, sessions, owners, dict.fromkeys(owners, 2), leaving, draining, loads)


def moved(before: Snapshot, moves: tuple[Move, ...]) -> Snapshot:
    owners = dict(before.owners)
    for move in moves:
        assert owners[move.shard_id] == Owner(move.source, 1)
        owners[move.shard_id] = Owner(move.target, 1)
    return replace(before, owners=owners)


def numbers(seen: Snapshot) -> dict[str, int]:
    return {name: sum(owner.broker_id == name for owner in seen.owners.values()) for name in seen.sessions}


def test_a_broker_that_joined_gets_its_part_of_a_quiet_cluster() -> None:
    before = snapshot({"a": [0.0] * 6, "b": [0.0] * 6, "c": []})
    found = plan(before)
    assert len(found.moves) == 4
    assert numbers(moved(before, found.moves)) == {"a": 4, "b": 4, "c": 4}
    assert (found.skew_before, found.skew_after, found.notes) == (1.0, 0.0, ())
    assert [(one.broker_id, one.shards_before, one.shards_after) for one in found.brokers] == [
        ("a", 6, 4), ("b", 6, 4), ("c", 0, 4),
    ]  # fmt: skip


def test_loads_come_first_and_quiet_shards_even_the_numbers() -> None:
    before = snapshot({"a": [4.0, 4.0, *[0.0] * 8], "b": [0.0] * 10})
    found = plan(before)
    after = moved(before, found.moves)
    assert [(move.shard_id, move.source, move.target) for move in found.moves] == [(1, "a", "b"), (11, "b", "a")]
    assert {one.broker_id: round(one.load_after, 6) for one in found.brokers} == {"a": 0.5, "b": 0.5}
    assert numbers(after) == {"a": 10, "b": 10}


def test_one_shard_that_is_busier_than_a_broker_stays_and_the_plan_says_so() -> None:
    found = plan(snapshot({"a": [9.0], "b": [0.5]}))
    assert found.moves == ()
    assert "no more can be moved" in found.notes[0]


def test_draining_and_stopping_brokers_are_left_out_with_a_note() -> None:
    found = plan(snapshot({"a": [0.0] * 4, "b": [], "c": [0.0] * 5, "d": []}, draining=("c",), leaving=("d",)))
    assert {(move.source, move.target) for move in found.moves} == {("a", "b")}
    assert [note.partition(" and ")[0] for note in found.notes] == ["broker c is being drained", "broker d is stopping"]


def test_only_shards_of_the_topic_move_and_none_that_another_operation_moves() -> None:
    before = replace(snapshot({"a": [0.0] * 8, "b": []}), busy={1: "rebalance-1 moves it"})
    found = plan(before, shards={1, 2, 3})
    assert {move.shard_id for move in found.moves} == {2, 3}


def test_shards_of_a_broker_that_is_gone_are_not_counted() -> None:
    before = snapshot({"a": [0.0] * 2, "b": [0.0] * 2, "dead": [0.0] * 9})
    found = plan(replace(before, sessions={"a": 1, "b": 1}))
    assert (found.moves, len(found.notes)) == ((), 2)
    assert "9 shards without a living owner" in found.notes[0]


def test_a_cluster_too_quiet_for_its_loads_to_be_judged_says_so() -> None:
    found = plan(snapshot({"a": [0.05], "b": [0.0]}))
    assert (found.moves, found.notes) == ((), found.notes[:1])
    assert "less than 100 kB/s is published" in found.notes[0]
    assert plan(snapshot({"a": [1.0], "b": [1.0]})).notes == ()


CLUSTERS = st.dictionaries(
    st.sampled_from("abcdef"),
    st.lists(st.just(0.0) | st.floats(0.01, 100.0), max_size=20),
    min_size=1,
)


@given(CLUSTERS)
def test_every_plan_evens_and_comes_to_an_end(owned: dict[str, list[float]]) -> None:
    before = snapshot(owned)
    for _ in range(10):
        found = plan(before)
        if not found.moves:
            break
        assert len({move.shard_id for move in found.moves}) == len(found.moves) <= len(before.owners)
        assert all(move.source != move.target for move in found.moves)
        after = moved(before, found.moves)
        assert numbers(after) == {one.broker_id: one.shards_after for one in found.brokers}
        assert objections(before, found.moves, found.revision) == []
        fullest_before = max(one.load_before for one in found.brokers)
        assert max(one.load_after for one in found.brokers) <= fullest_before + 1e-9
        before = after
    assert plan(before).moves == ()


@given(st.dictionaries(st.sampled_from("abcdef"), st.integers(0, 60), min_size=1))
def test_numbers_of_quiet_shards_end_within_one_of_the_average_once_they_move(owned: dict[str, int]) -> None:
    before = snapshot({name: [0.0] * count for name, count in owned.items()})
    after = numbers(moved(before, plan(before).moves)).values()
    average = sum(after) / len(after)
    wanted = TRIGGER if tuple(after) == tuple(owned.values()) else TARGET
    assert max(abs(number - average) for number in after) <= wanted * average + 1


def stale(change: Snapshot) -> str:
    before = snapshot({"a": [0.0] * 4, "b": []})
    found = plan(before)
    assert [move.shard_id for move in found.moves] == [1, 2]
    return "; ".join(objections(change, found.moves, found.revision))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"owners": {1: Owner("c", 1), 2: Owner("a", 1)}}, "shard 1: its owner is c, not a"),
        ({"owners": {2: Owner("a", 1)}}, "shard 1: it has no owner: its topic was deleted"),
        ({"changed": {1: 12, 2: 2}}, "shard 1: its owner changed after the plan was made"),
        ({"sessions": {"a": 1}}, "shards 1, 2: b is gone"),
        ({"draining": ("b",)}, "shards 1, 2: b is being drained"),
        ({"leaving": ("a",)}, "shards 1, 2: a is stopping"),
        ({"sessions": {"a": 1, "b": 1, "c": 12}}, "broker c registered after the plan was made"),
        ({"busy": {2: "rebalance-7 moves it"}}, "shard 2: rebalance-7 moves it"),
        ({"revision": 3}, "this store has come to 3: it is of another"),
    ],
)
def test_a_stale_plan_is_refused_with_what_has_changed(change: dict[str, object], words: str) -> None:
    later = replace(snapshot({"a": [0.0] * 4, "b": []}), revision=20)
    assert words in stale(replace(later, **change))  # type: ignore[arg-type]


def test_a_plan_that_was_tampered_with_is_refused() -> None:
    seen = snapshot({"a": [0.0] * 4, "b": []})
    moves = [Move(0, "a", "b", 0, shard_id=1), Move(0, "a", "b", 0, shard_id=1), Move(0, "a", "a", 0, shard_id=2)]
    assert objections(seen, moves, 9) == ["shard 1: the plan moves it twice", "shard 2: it is at a already"]


# Carried out.


def running(*shards: int, state: OperationState = OperationState.RUNNING) -> RunningHandOffs:
    moves = [Move(0, "a", "b", 0, shard_id=shard) for shard in shards]
    operation = Operation("rebalance-1", Goal.BROKERS, state, 0, 9, len(moves), 0, 1, b"m", created_us=1)
    return RunningHandOffs(operation, [moves])


def record(owner: str | None) -> ShardRecord:
    return ShardRecord(1, "t", ShardState.OPEN, 1, None if owner is None else Owner(owner, 1), 0, 1023)


@pytest.mark.parametrize(
    ("seen", "takers", "state", "reason"),
    [
        (record("b"), "ab", MoveState.DONE, ""),
        (record("b"), "a", MoveState.DONE, ""),
        (None, "ab", MoveState.SKIPPED, "the topic was deleted"),
        (record("c"), "abc", MoveState.SKIPPED, "its owner is c"),
        (record("a"), "a", MoveState.SKIPPED, "b is gone, stopping or being drained"),
        (record("a"), "ab", MoveState.PENDING, ""),
        (record(None), "ab", MoveState.PENDING, ""),
    ],
)
def test_what_became_of_a_move_is_read_from_the_record(
    seen: ShardRecord | None, takers: str, state: MoveState, reason: str
) -> None:
    core = running(1)
    assert core.settle(seen, set(takers)) == (state is not MoveState.PENDING)
    move = core.move((0, 0))
    assert move.state is state
    assert reason in move.reason


def test_a_move_that_fails_comes_last_and_is_skipped_in_the_end() -> None:
    core = running(1, 2)
    core.failed("busy")
    core.keep_progress(2)
    assert core.operation.problems == ("shard 1: busy",)
    assert core.next().shard_id == 2
    core.arrived()
    assert core.only_failures_left
    for _ in range(FAILURES_MAX - 1):
        assert core.next().shard_id == 1
        core.failed("busy still")
    core.keep_progress(3)
    ended = core.operation
    assert (ended.state, ended.moves_done, ended.moves_skipped, ended.problems) == (OperationState.DONE, 1, 1, ())
    assert core.move((0, 0)).reason == "busy still"


def test_a_cancelled_operation_ends_and_a_paused_one_does_not() -> None:
    cancelled = running(1, state=OperationState.CANCELLED)
    cancelled.keep_progress(5)
    assert (cancelled.operation.state, cancelled.operation.ended_us) == (OperationState.CANCELLED, 5)
    paused = running(1, state=OperationState.PAUSED)
    paused.keep_progress(5)
    assert paused.operation.ended_us == 0


def test_a_cancelled_operation_counts_what_arrived_and_leaves_the_rest() -> None:
    core = running(1, 2, 3, state=OperationState.CANCELLED)
    target = core.move((0, 0)).target
    assert core.pending_shards() == [1, 2, 3]
    core.settle_arrived({1: "elsewhere", 2: target})
    assert core.pending_shards() == [1, 3]
    core.keep_progress(1)
    assert (core.operation.moves_done, core.operation.state) == (1, OperationState.CANCELLED)
    assert core.operation.ended_us == 1
