"""A rate is held over any while, changes at once, and what was not used is kept for a moment only."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from magnetar.repair.throttle import BURST_S, Throttle


@given(sizes=st.lists(st.integers(1, 2_000_000), min_size=1, max_size=50), rate=st.integers(1_000, 100_000_000))
@settings(max_examples=60, derandomize=True, database=None, deadline=None)
def test_no_more_is_moved_than_the_rate_allows(sizes: list[int], rate: int) -> None:
    throttle = Throttle(rate, 0.0)
    now = 0.0
    for size in sizes:
        now += throttle.wait_s(now)
        throttle.spend(size, now)
    now += throttle.wait_s(now)
    assert sum(sizes) <= rate * (now + BURST_S) * 1.001
    assert now <= sum(sizes) / rate * 1.001, "nor less"


def test_a_new_rate_holds_for_what_is_owed() -> None:
    throttle = Throttle(1_000, 0.0)
    throttle.spend(10_000, 0.0)
    assert throttle.wait_s(0.0) == 10.0
    throttle.set_rate(10_000, 1.0)
    assert throttle.wait_s(1.0) == 0.9


def test_a_long_rest_gives_no_more_than_the_burst() -> None:
    throttle = Throttle(1_000, 0.0)
    throttle.spend(int(1_000 * BURST_S), 1_000.0)
    assert throttle.wait_s(1_000.0) == 0.0
    throttle.spend(100, 1_000.0)
    assert throttle.wait_s(1_000.0) == 0.1
