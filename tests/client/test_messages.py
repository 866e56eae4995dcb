"""Ids, times, keys and positions as users meet them."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime, timedelta, timezone

import pytest
from hypothesis import given
from hypothesis import strategies as st

from magnetar.client import EARLIEST, LATEST, InvalidArgument, MessageId
from magnetar.client.backoff import Delays
from magnetar.client.message import from_microseconds, readable_key, to_microseconds
from magnetar.client.positions import check_start, start_position


@given(st.integers(0, (1 << 64) - 1), st.none() | st.integers(0, (1 << 64) - 1))
def test_a_message_id_and_its_text_are_inverse(shard: int, offset: int | None) -> None:
    message_id = MessageId(shard, offset)
    assert MessageId.parse(str(message_id)) == message_id


@pytest.mark.parametrize("text", ["", "1", "1:", ":1", "a:1", "1:2:3", " 1:2", "-1:2", "1:٣"])
def test_what_is_not_a_message_id_is_refused(text: str) -> None:
    with pytest.raises(InvalidArgument):
        MessageId.parse(text)


def test_message_ids_are_ordered_within_a_shard_only() -> None:
    assert MessageId(1, 5) < MessageId(1, 6)
    assert MessageId(1, 6) >= MessageId(1, 6)
    assert max(MessageId(1, 3), MessageId(1, 9)) == MessageId(1, 9)
    with pytest.raises(TypeError):
        assert MessageId(1, 5) < MessageId(2, 6)
    assert len({MessageId(1, 5), MessageId(1, 5)}) == 1


def test_times_are_exact_to_the_microsecond_and_in_utc() -> None:
    time = datetime(2013, 1, 31, 23, 59, 59, 999_999, tzinfo=timezone(timedelta(hours=-5)))
    assert from_microseconds(to_microseconds(time)) == time
    assert from_microseconds(to_microseconds(time)).tzinfo is UTC
    assert to_microseconds(datetime(1969, 12, 31, 23, 59, 59, tzinfo=UTC)) == -1_000_000


def test_a_naive_time_is_refused_with_the_remedy() -> None:
    with pytest.raises(InvalidArgument, match=r"timezone.utc"):
        to_microseconds(datetime(2013, 1, 1))


def test_keys_are_text_if_they_can_be() -> None:
    assert readable_key("Ünï".encode()) == "Ünï"
    assert readable_key(b"") == ""
    assert readable_key(b"\xff") == b"\xff"
    assert readable_key(None) is None


def test_positions_say_what_they_are() -> None:
    assert start_position(EARLIEST).earliest is True
    assert start_position(LATEST).WhichOneof("position") == "earliest"
    assert start_position(MessageId(3, 7)).offset == 7
    assert start_position(datetime(1970, 1, 1, tzinfo=UTC)).time_us == 0


@pytest.mark.parametrize(
    "attempt",
    [
        lambda: start_position(MessageId(1, None)),
        lambda: start_position("earliest"),  # type: ignore[arg-type]
        lambda: start_position(datetime(2020, 1, 1)),
        lambda: check_start(MessageId(1, 2)),
    ],
)
def test_positions_that_are_none_are_refused(attempt: Callable[[], object]) -> None:
    with pytest.raises(InvalidArgument):
        attempt()


def test_waits_double_up_to_a_bound_and_begin_anew_after_success() -> None:
    delays = Delays(lambda: 1.0, first_s=0.02, max_s=2.0)
    assert [round(delays.next_s(), 3) for _ in range(9)] == [0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28, 2.0, 2.0]
    delays.reset()
    assert delays.next_s() == 0.02


def test_a_broker_that_names_the_owner_is_followed_at_once_but_not_in_a_circle() -> None:
    delays = Delays(lambda: 0.0, first_s=0.02, max_s=2.0)
    assert delays.next_s(at_once=True) == 0.0
    assert delays.next_s(at_once=True) > 0.0


def test_a_broker_may_ask_for_more_time_but_not_for_ever() -> None:
    delays = Delays(lambda: 0.0)
    assert delays.next_s(at_least_s=0.5) == 0.5
    assert delays.next_s(at_least_s=3600.0) == 2.0
