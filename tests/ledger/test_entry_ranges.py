from __future__ import annotations

from itertools import pairwise

import hypothesis.strategies as st
from hypothesis import given, settings

from magnetar.ledger.entry_ranges import EntryRanges

ids = st.integers(0, 30)
ranges = st.lists(st.tuples(ids, st.integers(0, 6)).map(lambda pair: (pair[0], pair[0] + pair[1])), max_size=12)


@settings(derandomize=True, deadline=None)
@given(ranges, ids, ids)
def test_ranges_hold_what_was_added_and_know_what_is_missing(added: list[tuple[int, int]], a: int, b: int) -> None:
    held = EntryRanges()
    wanted: set[int] = set()
    for first, last in added:
        held.add(first, last)
        wanted |= set(range(first, last + 1))
    assert {i for first, last in held for i in range(first, last + 1)} == wanted
    bounds = list(held)
    assert all(left[1] + 1 < right[0] for left, right in pairwise(bounds)), "neighbours not merged"
    first, last = min(a, b), max(a, b)
    missing = [i for low, high in held.missing(first, last) for i in range(low, high + 1)]
    assert missing == [i for i in range(first, last + 1) if i not in wanted]
