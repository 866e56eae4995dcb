"""Selections: bitmaps of messages, against sets of indices."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from magnetar.wire import selection
from magnetar.wire.selection import InvalidSelection

PROPERTY = settings(derandomize=True, deadline=None)


@st.composite
def chosen(draw: st.DrawFn) -> tuple[int, set[int], set[int]]:
    """A count of messages and two sets of them."""
    count = draw(st.integers(1, 200))
    subset = st.sets(st.integers(0, count - 1)) | st.just(set(range(count)))
    return count, draw(subset), draw(subset)


def test_the_bits_stand_lowest_first() -> None:
    assert selection.from_indices(10, [0, 3, 9]) == bytes([0b0000_1001, 0b0000_0010])


@PROPERTY
@given(chosen())
def test_indices_come_back_ascending(case: tuple[int, set[int], set[int]]) -> None:
    count, wanted, _ = case
    encoded = selection.from_indices(count, wanted)
    assert selection.indices(encoded, count) == sorted(wanted)
    assert selection.count_of(encoded, count) == len(wanted)
    assert (encoded == b"") == (len(wanted) == count)
    assert list(selection.to_mask(encoded, count)) == [index in wanted for index in range(count)]


@PROPERTY
@given(chosen())
def test_an_intersection_is_that_of_the_sets(case: tuple[int, set[int], set[int]]) -> None:
    count, first, second = case
    both = selection.intersect(selection.from_indices(count, first), selection.from_indices(count, second), count)
    assert both == selection.from_indices(count, first & second)


@PROPERTY
@given(st.integers(1, 100), st.lists(st.tuples(st.integers(0, 100), st.integers(0, 100)), max_size=5))
def test_ranges_are_half_open_and_stay_in_the_batch(count: int, pairs: list[tuple[int, int]]) -> None:
    ranges = [(start, end) for start, end in pairs if start <= end <= count]
    wanted = {index for start, end in ranges for index in range(start, end)}
    assert selection.from_ranges(count, ranges) == selection.from_indices(count, wanted)
    if len(ranges) < len(pairs):
        with pytest.raises(InvalidSelection):
            selection.from_ranges(count, pairs)


def test_all_set_bits_are_written_as_nothing() -> None:
    assert selection.normalise(b"\xff\x07", 11) == selection.all_of(11) == b""
    assert selection.normalise(b"\xff\x03", 11) == b"\xff\x03"
    assert selection.intersect(b"\xff\x07", b"", 11) == b""


@pytest.mark.parametrize(("bitmap", "count"), [(b"\x01", 9), (b"\x01\x00", 8), (b"\xff\x08", 11), (b"\x00", 0)])
def test_a_bitmap_of_another_size_or_with_bits_beyond_is_refused(bitmap: bytes, count: int) -> None:
    for call in (selection.check, selection.indices, selection.count_of, selection.normalise, selection.to_mask):
        with pytest.raises(InvalidSelection):
            call(bitmap, count)
    with pytest.raises(InvalidSelection):
        selection.intersect(b"", bitmap, count)


@pytest.mark.parametrize("index", [-1, 8])
def test_an_index_outside_of_the_batch_is_refused(index: int) -> None:
    with pytest.raises(InvalidSelection):
        selection.from_indices(8, [index])


@PROPERTY
@given(st.binary(max_size=30), st.integers(0, 240))
def test_any_bitmap_fits_or_is_refused(bitmap: bytes, count: int) -> None:
    try:
        found = selection.indices(bitmap, count)
    except InvalidSelection:
        return
    assert selection.from_indices(count, found) == selection.normalise(bitmap, count)
