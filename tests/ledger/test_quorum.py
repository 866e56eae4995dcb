from __future__ import annotations

from itertools import combinations

import pytest

from magnetar.ledger.quorum import Quorum, filled_mask, mask_of, places_of
from magnetar.metadata.records import VACANT

SHAPES = [(1, 1, 1), (3, 3, 2), (3, 2, 2), (5, 3, 2), (4, 4, 3), (5, 5, 3), (3, 3, 1)]


@pytest.mark.parametrize("shape", SHAPES)
def test_what_denies_an_entry_meets_any_ack_quorum_of_the_places_that_are_filled(shape: tuple[int, int, int]) -> None:
    quorum = Quorum(*shape)
    for entry_id in range(quorum.ensemble_size):
        write_set = quorum.write_set(entry_id)
        for vacant in range(quorum.write_quorum - quorum.ack_quorum + 1):
            filled = write_set[vacant:]
            denials = len(filled) - quorum.ack_quorum + 1
            for denied in combinations(filled, denials):
                assert quorum.is_denied(entry_id, mask_of(denied), mask_of(filled))
                assert not quorum.is_denied(entry_id, mask_of(denied[1:]), mask_of(filled))
                for acknowledged in combinations(filled, quorum.ack_quorum):
                    assert mask_of(acknowledged) & mask_of(denied)


def test_a_write_set_wraps_around_the_ensemble() -> None:
    quorum = Quorum(5, 3, 2)
    assert quorum.write_set(3) == (3, 4, 0)
    assert list(places_of(quorum.write_mask(13))) == [0, 3, 4]
    assert quorum.striped


@pytest.mark.parametrize("shape", SHAPES)
def test_covered_means_that_too_few_are_silent_to_hide_an_acknowledged_entry(shape: tuple[int, int, int]) -> None:
    quorum = Quorum(*shape)
    for filled in range(1 << quorum.ensemble_size):
        if not quorum.can_acknowledge(filled):
            continue
        for known in range(1 << quorum.ensemble_size):
            silent = filled & ~known
            hidden = any((quorum.write_mask(e) & silent).bit_count() >= quorum.ack_quorum for e in range(shape[0]))
            assert quorum.is_covered(known, filled) == (not hidden)


def test_a_vacant_place_neither_acknowledges_nor_speaks() -> None:
    quorum, filled = Quorum(3, 3, 2), filled_mask(("a", VACANT, "c"))
    assert filled == 0b101
    assert quorum.can_acknowledge(filled)
    assert not quorum.can_acknowledge(0b001)
    assert quorum.is_covered(0b001, filled)
    assert not quorum.is_covered(0b010, filled)
    assert not quorum.is_denied(0, 0b010, filled)


def test_nothing_is_proved_where_nobody_said_anything() -> None:
    """Not even of an ensemble in which nothing can be acknowledged."""
    quorum = Quorum(3, 3, 2)
    for filled in (0b000, 0b001):
        assert not quorum.is_covered(0, filled)
        assert not quorum.is_denied(0, 0, filled)


@pytest.mark.parametrize("shape", [(2, 3, 2), (3, 2, 3), (3, 3, 0), (33, 3, 2)])
def test_quorums_that_cannot_be_are_refused(shape: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError, match="E >= Qw >= Qa >= 1"):
        Quorum(*shape)
