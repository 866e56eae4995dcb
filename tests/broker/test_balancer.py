"""Which shards the balancer moves, and that it comes to an end; what loads are."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from magnetar.broker.balancer import MOVES_PER_ROUND, REST_S, TARGET, TRIGGER, Balancer, BrokerLoad
from magnetar.broker.loads import HALF_LIFE_S, Loads, ShardLoad

MB = 1_000_000.0


def broker(name: str, *loads: float, first: int = 0) -> BrokerLoad:
    return BrokerLoad(name, tuple(ShardLoad(first + i, load * MB, load * 1000) for i, load in enumerate(loads, 1)))


def test_a_shard_moves_from_the_busiest_broker_to_the_idlest_with_the_reason() -> None:
    brokers = [broker("a", 4, 2, 2), broker("b", 3, first=10), broker("c", 1, first=20)]
    [move] = Balancer().plan(brokers, 0.0)
    assert (move.shard_id, move.source, move.target) == (2, "a", "c")
    assert move.reason == "a has 2.00 times the average load, c 0.25; the shard has 0.50"


def test_loads_that_are_near_to_each_other_move_nothing() -> None:
    assert Balancer().plan([broker("a", 2, 2, 2), broker("b", 2, 1, 1, first=10)], 0.0) == []


def test_what_has_begun_goes_on_until_it_is_nearer_than_what_begins_it() -> None:
    between = [broker("a", *[0.1] * 62), broker("b", *[0.1] * 38, first=100)]
    assert TARGET < 0.24 < TRIGGER
    assert Balancer().plan(between, 0.0) == []
    assert len(Balancer(balancing=True).plan(between, 0.0)) == MOVES_PER_ROUND


def test_one_busy_shard_is_not_sent_to_and_fro() -> None:
    assert Balancer().plan([broker("a", 8), broker("b", 0.1, first=10)], 0.0) == []


def test_a_shard_that_moved_rests() -> None:
    brokers = [broker("a", 1, 1, 1, 1), broker("b", first=10)]
    balancer = Balancer()
    first = {move.shard_id for move in balancer.plan(brokers, 0.0)}
    for shard in first:
        balancer.moved(shard, 0.0)
    assert first.isdisjoint(move.shard_id for move in balancer.plan(brokers, REST_S - 1))
    assert {move.shard_id for move in balancer.plan(brokers, REST_S)} == first


def test_a_quiet_cluster_and_a_single_broker_move_nothing() -> None:
    assert Balancer().plan([broker("a", 0.01, 0.01), broker("b", first=10)], 0.0) == []
    assert Balancer().plan([broker("a", 9, 9)], 0.0) == []
    assert Balancer().plan([], 0.0) == []


@given(st.lists(st.lists(st.floats(0.01, 100.0, allow_nan=False), max_size=8), min_size=2, max_size=5))
def test_every_move_brings_two_brokers_nearer_and_rounds_come_to_an_end(loads: list[list[float]]) -> None:
    placed = {f"b{i}": {i * 100 + n: load for n, load in enumerate(one)} for i, one in enumerate(loads)}
    balancer, rounds = Balancer(), 0
    while True:
        brokers = [
            BrokerLoad(name, tuple(ShardLoad(shard, load * MB, load) for shard, load in shards.items()))
            for name, shards in placed.items()
        ]
        moves = balancer.plan(brokers, rounds * 60.0)
        assert len(moves) <= MOVES_PER_ROUND
        if not moves:
            return
        rounds += 1
        assert rounds < 50
        for move in moves:
            source, target = placed[move.source], placed[move.target]
            before = sum(source.values()) - sum(target.values())
            target[move.shard_id] = source.pop(move.shard_id)
            assert abs(sum(source.values()) - sum(target.values())) <= before * (1 + 1e-9)
            balancer.moved(move.shard_id, rounds * 60.0)


def test_a_load_is_an_average_of_the_time_for_which_it_was_seen_and_what_is_old_weighs_half() -> None:
    loads = Loads()
    loads.sample(0.0, [(1, 0, 0), (2, 0, 0)])
    loads.sample(HALF_LIFE_S, [(1, 600_000, 6_000), (2, 0, 0)])
    [load] = loads.report()
    assert load == ShardLoad(1, pytest.approx(10_000.0), pytest.approx(100.0))
    loads.sample(2 * HALF_LIFE_S, [(1, 600_000, 6_000)])
    # 10,000 with half the weight of the nothing that followed.
    assert loads.report()[0].bytes_per_s == pytest.approx(10_000.0 / 3)
    # Given away, and back again: its totals begin anew, and so does it.
    loads.sample(2 * HALF_LIFE_S + 5, [])
    assert loads.report() == []
    loads.sample(2 * HALF_LIFE_S + 10, [(1, 10, 1)])
    assert loads.report() == [ShardLoad(1, pytest.approx(2.0), pytest.approx(0.2))]


def test_a_shard_that_has_just_come_counts_as_much_as_one_with_the_same_load_that_was_always_there() -> None:
    loads = Loads()
    for second in range(0, 600, 5):
        loads.sample(float(second), [(1, 1000 * second, 10 * second)])
    for age in (5, 10, 60):
        loads.sample(595.0 + age, [(1, 1000 * (595 + age), 10 * (595 + age)), (2, 1000 * age, 10 * age)])
        old, new = loads.report()
        assert (new.bytes_per_s, new.messages_per_s) == pytest.approx((old.bytes_per_s, old.messages_per_s))


def test_loads_that_are_asked_for_again_at_once_do_not_change() -> None:
    loads = Loads()
    loads.sample(0.0, [(1, 0, 0)])
    loads.sample(10.0, [(1, 1000, 10)])
    before = loads.report()
    loads.sample(10.1, [(1, 9000, 90)])
    assert loads.report() == before
