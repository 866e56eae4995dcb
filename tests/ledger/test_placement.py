from __future__ import annotations

import random
from collections import Counter

import pytest
from ledger_world import registration

from magnetar.ledger.errors import NotEnoughBookies
from magnetar.ledger.placement import choose_ensemble, choose_replacements
from magnetar.ledger.quorum import Quorum
from magnetar.metadata.records import VACANT, BookieRegistration, BookieState

QUORUM = Quorum(3, 3, 2)


def bookies(count: int, **facts: object) -> list[BookieRegistration]:
    return [registration(f"b{n}", **facts) for n in range(count)]


def test_members_stand_in_distinct_racks_when_there_are_enough() -> None:
    registered = [registration(f"b{n}", rack=f"r{n % 3}") for n in range(9)]
    for seed in range(50):
        ensemble = choose_ensemble(QUORUM, registered, 1, random.Random(seed))
        assert len({int(name[1:]) % 3 for name in ensemble}) == 3


def test_a_missing_rack_does_not_cost_a_member() -> None:
    registered = [registration("b0", rack="x"), registration("b1", rack="x"), registration("b2", rack="y")]
    assert set(choose_ensemble(QUORUM, registered, 1, random.Random(1))) == {"b0", "b1", "b2"}


def test_the_first_member_stands_in_the_wanted_rack_if_it_can() -> None:
    registered = [registration(f"b{n}", rack=f"r{n}") for n in range(6)]
    for seed in range(20):
        assert choose_ensemble(QUORUM, registered, 1, random.Random(seed), rack="r4")[0] == "b4"
    assert len(set(choose_ensemble(QUORUM, registered, 1, random.Random(1), rack="nowhere"))) == 3


def test_only_bookies_that_take_new_entries_of_the_ledger_are_chosen() -> None:
    registered = [
        *bookies(3),
        registration("full", state=BookieState.READ_ONLY),
        registration("leaving", state=BookieState.DRAINING),
        registration("reborn", ledger_floor=8),
    ]
    for seed in range(20):
        assert set(choose_ensemble(QUORUM, registered, 7, random.Random(seed))) == {"b0", "b1", "b2"}
    assert any("reborn" in choose_ensemble(QUORUM, registered, 8, random.Random(seed)) for seed in range(20))


def test_places_stay_vacant_while_an_ack_quorum_is_filled() -> None:
    assert sorted(choose_ensemble(QUORUM, bookies(2), 1, random.Random(1))) == [VACANT, "b0", "b1"]
    with pytest.raises(NotEnoughBookies) as refused:
        choose_ensemble(QUORUM, bookies(1), 1, random.Random(1))
    assert (refused.value.needed, refused.value.available) == (2, 1)


def test_a_striped_ensemble_needs_an_ack_quorum_in_every_write_set() -> None:
    striped = Quorum(5, 3, 2)
    assert VACANT in choose_ensemble(striped, bookies(4), 1, random.Random(1))
    with pytest.raises(NotEnoughBookies) as refused:
        choose_ensemble(striped, bookies(3), 1, random.Random(1))
    assert refused.value.needed == 4


def test_bookies_with_more_room_are_chosen_more_often_but_not_always() -> None:
    registered = [registration(f"b{n}", disk_free_bytes=1000) for n in range(4)]
    registered.append(registration("empty", disk_free_bytes=1_000_000))
    one = Quorum(1, 1, 1)
    chosen = Counter(choose_ensemble(one, registered, 1, random.Random(seed))[0] for seed in range(2000))
    assert 0.35 < chosen["empty"] / 2000 < 0.5, "three times the median's share: 3 of 7"


def test_replacements_are_never_members_nor_avoided_and_prefer_unused_racks() -> None:
    registered = [registration(f"b{n}", rack=f"r{n % 3}") for n in range(7)]
    for seed in range(30):
        spares = choose_replacements(("b0", "b1", "b2"), [1], registered, 1, random.Random(seed), avoid={"b4"})
        assert spares in ({1: "b3"}, {1: "b5"}, {1: "b6"}), "all racks but r1 are used, and b4 is to be avoided"
    assert choose_replacements(("b0", "b1", "b2"), [1], registered, 1, random.Random(1), avoid=set()) == {1: "b4"}


def test_as_many_places_are_filled_as_there_are_spares_the_first_places_first() -> None:
    assert choose_replacements(("b0", "gone", "lost"), [2, 1], bookies(2), 1, random.Random(1)) == {2: "b1"}
    assert choose_replacements(("b0", "b1", "lost"), [2], bookies(2), 1, random.Random(1)) == {}
