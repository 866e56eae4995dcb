"""Acknowledgements, holds and credits of a consumer in a shard."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from magnetar.client import acks
from magnetar.client.acks import Credits, Hold, Holds, ShardAcks, merged, ranges_of
from magnetar.client.errors import RetriableError


def test_what_is_queued_together_is_one_group_with_one_answer() -> None:
    shard = ShardAcks()
    group = shard.open
    group.offsets += [5, 3, 4, 9]
    assert shard.take(1) is group
    assert group.ranges == [(3, 6), (9, 10)]
    assert shard.open is not group
    assert shard.answered(1) is group
    assert not shard


def test_groups_without_an_answer_are_sent_again_first_and_in_order() -> None:
    shard = ShardAcks()
    groups = []
    for number in range(3):
        shard.open.floor = 10 + number
        groups.append(shard.take(number))
    shard.open.floor = 50
    shard.answered(0)
    shard.lost()
    assert [shard.take(100 + n) for n in range(2)] == groups[1:]
    assert shard.take(200).floor == 50
    assert shard.answered(1) is None
    assert shard.answered(101) is groups[2]


def test_too_many_unanswered_groups_make_the_next_one_wait_and_grow() -> None:
    shard = ShardAcks()
    for number in range(acks.GROUPS_IN_FLIGHT_MAX):
        shard.open.offsets.append(number)
        shard.take(number)
    shard.open.offsets += [100, 101]
    assert not shard.queued
    shard.answered(0)
    assert shard.queued
    assert shard.take(99).ranges == [(100, 102)]


def test_a_group_too_large_for_a_frame_is_answered_when_its_rest_is() -> None:
    shard = ShardAcks()
    group = shard.open
    group.offsets += range(0, 2 * (acks.RANGES_PER_GROUP_MAX + 5), 2)
    first = shard.take(1)
    rest = shard.take(2)
    assert rest is group
    assert len(first.ranges) == acks.RANGES_PER_GROUP_MAX
    assert len(rest.ranges) == 5
    first.end(RetriableError("no"))
    rest.end()
    assert isinstance(group.error, RetriableError)


def test_what_is_acknowledged_and_unanswered_is_known_wherever_it_stands() -> None:
    shard = ShardAcks()
    shard.open.offsets.append(1)
    shard.take(1)
    shard.lost()
    shard.open.offsets.append(2)
    shard.take(2)
    shard.open.ranges.append((5, 7))
    assert shard.unanswered() == [(1, 3), (5, 7)]


@given(st.sets(st.integers(0, 60)))
def test_ranges_are_the_same_offsets(offsets: set[int]) -> None:
    ranges = ranges_of(list(offsets))
    assert [offset for start, end in ranges for offset in range(start, end)] == sorted(offsets)
    assert all(a[1] < b[0] for a, b in pairwise(ranges))
    assert merged(ranges_of([offset])[0] for offset in offsets) == ranges


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 19), st.integers(0, 20)), max_size=30))
def test_a_hold_knows_what_is_held(steps: list[tuple[bool, int, int]]) -> None:
    hold, held = Hold(100, 20), set[int]()
    for deliver, start, size in steps:
        if deliver:
            wanted = set(range(start, min(20, start + size)))
            added = hold.add(bytes(i in wanted for i in range(20)))
            assert {i for i, bit in enumerate(added) if bit} == wanted - held
            held |= wanted
        else:
            assert hold.drop(start) == (start in held)
            held.discard(start)
        assert hold.left == len(held)
        assert list(hold.ranges()) == [(a + 100, b + 100) for a, b in ranges_of(list(held))]


def test_holds_of_several_batches_are_named_together_with_what_is_not_answered_yet() -> None:
    holds = Holds()
    holds.of(0, 4).add(b"\x01\x01\x00\x01")
    second = holds.of(4, 2)
    second.add(b"\x01\x01")
    assert holds.ranges([(2, 3)]) == [(0, 6)]
    second.drop(0)
    second.drop(1)
    holds.forget(second)
    assert holds.ranges() == [(0, 2), (3, 4)]
    assert len(holds) == 3


@given(st.integers(1, 50), st.lists(st.tuples(st.booleans(), st.integers(1, 10)), max_size=60))
def test_credit_never_exceeds_the_budget_and_never_runs_dry(budget: int, steps: list[tuple[bool, int]]) -> None:
    """The broker's view: what it was granted and has not used, plus what is here, is at most the budget."""
    credits = Credits(budget, budget * 100)
    at_broker, at_broker_bytes = credits.opened()
    buffered = 0
    for deliver, count in steps:
        if deliver:
            count = min(count, at_broker)
            at_broker -= count
            at_broker_bytes -= count * 100
            buffered += count
            credits.delivered(count, count * 100)
        else:
            count = min(count, buffered)
            buffered -= count
            credits.taken(count, count * 100)
        if (grant := credits.grant()) is not None:
            at_broker += grant[0]
            at_broker_bytes += grant[1]
        assert at_broker + buffered <= budget
        assert buffered > 0 or (at_broker > 0 and at_broker_bytes > 0)


def test_a_new_opening_is_granted_what_does_not_wait_here() -> None:
    credits = Credits(10, 1000)
    assert credits.opened() == (10, 1000)
    credits.delivered(4, 900)
    assert credits.opened() == (6, 100)
