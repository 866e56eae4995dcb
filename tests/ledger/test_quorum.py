from __future__ import annotations

from itertools import combinations

import pytest

from magnetar.ledger.quorum import Quorum, filled_mask, mask_of, places_of
from magnetar.metadata.records import VACANT

SHAPES = [(1, 1, 1), (3, 3, 2), (3, 2, 2), (5, 3, 2), (4, 4, 3), (5, 5, 3), (3, 3, 1)]


@pytest.mark.parametrize("shape", SHAPES)
def test_any_coverage_meets_any_ack_quorum(shape: tuple[int, int, int]) -> None:
    quorum = Quorum(*shape)
    for entry_id in range(quorum.ensemble_size):
        write_set = quorum.write_set(entry_id)
        for acknowledged in combinations(write_set, quorum.ack_quorum):
            for denied in combinations(write_set, quorum.coverage):
                assert mask_of(acknowledged) & mask_of(denied)


def test_a_write_set_wraps_around_the_ensemble() -> None:
    quorum = Quorum(5, 3, 2)
    assert quorum.write_set(3) == (3, 4, 0)
    assert list(places_of(quorum.write_mask(13))) == [0, 3, 4]
    assert quorum.striped


@pytest.mark.parametrize("shape", SHAPES)
def test_covered_means_that_too_few_are_silent_to_hide_an_acknowledged_entry(shape: tuple[int, int, int]) -> None:
    quorum = Quorum(*shape)
    for known in range(1 << quorum.ensemble_size):
        silent = ~known
        hidden = any((quorum.write_mask(e) & silent).bit_count() >= quorum.ack_quorum for e in range(shape[0]))
        assert quorum.is_covered(known) == (not hidden)


def test_a_vacant_place_neither_acknowledges_nor_covers() -> None:
    quorum = Quorum(3, 3, 2)
    assert filled_mask(("a", VACANT, "c")) == 0b101
    assert quorum.can_acknowledge(0b101)
    assert quorum.is_covered(0b101)
    assert not quorum.can_acknowledge(0b001)
    assert not quorum.is_covered(0b001)


@pytest.mark.parametrize("shape", [(2, 3, 2), (3, 2, 3), (3, 3, 0), (33, 3, 2)])
def test_quorums_that_cannot_be_are_refused(shape: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError, match="E >= Qw >= Qa >= 1"):
        Quorum(*shape)
