import pytest

from magnetar.broker.flow import (
    CREDIT_BYTES_MAX,
    CREDIT_MESSAGES_MAX,
    TURN_MESSAGES_MAX,
    CreditRefused,
    Credits,
    Watermarks,
    share,
)


def test_a_delivery_needs_credit_for_messages_and_for_bytes() -> None:
    credits = Credits()
    assert not credits.open
    credits.grant(10, 0)
    assert not credits.open
    credits.grant(0, 5)
    assert credits.open
    credits.spend(1, 500)
    assert not credits.open
    credits.grant(0, 495)
    assert not credits.open
    credits.grant(0, 1)
    assert credits.open


@pytest.mark.parametrize("grant", [(0, 0), (-1, 5), (5, -1), (CREDIT_MESSAGES_MAX, 0), (0, CREDIT_BYTES_MAX)])
def test_a_grant_of_nothing_or_too_much_is_refused_and_changes_nothing(grant: tuple[int, int]) -> None:
    credits = Credits(1, 1)
    with pytest.raises(CreditRefused):
        credits.grant(*grant)
    assert (credits.messages, credits.size_bytes) == (1, 1)


def test_a_long_backlog_goes_in_large_turns_and_a_short_one_is_spread() -> None:
    assert share(100, 4) == 25
    assert share(3, 4) == 1
    assert share(5, 2) == 3
    assert share(10_000_000, 2) == TURN_MESSAGES_MAX


def test_a_full_buffer_stays_full_until_it_is_well_drained() -> None:
    marks = Watermarks(high_bytes=100, low_bytes=40)
    assert not marks.add(99)
    assert marks.add(1)
    assert not marks.add(50)
    assert not marks.remove(109)
    assert marks.full
    assert marks.remove(1)
    assert not marks.full
    assert not marks.remove(10)
