"""When `consume --no-wait` has printed everything that it can get."""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass
from typing import Any

import pytest

from magnetar.cli.command import CommandFailed
from magnetar.cli.consume import Rest, Shape, Type, Wanted
from magnetar.client import EARLIEST, ConsumerDescription, CursorDescription, MessageId, SubscriptionDescription

ME = f"{socket.gethostname()[:64]}-{os.getpid()}-a1b2"
OTHER = f"{socket.gethostname()}-{os.getpid() + 1}-a1b2"


@dataclass(frozen=True)
class Printed:
    id: MessageId


def cursor(shard: int, floor: int, end: int, backlog: int | None = None) -> CursorDescription:
    return CursorDescription(shard, floor, 0, end, end - floor if backlog is None else backlog, 0, 0)


def consumer(name: str, shard: int, *, active: bool = True, unacked: int = 0) -> ConsumerDescription:
    return ConsumerDescription(name, shard, active, unacked, 1000, 1 << 20, "")


def described(*cursors: CursorDescription, consumers: tuple[ConsumerDescription, ...] = ()) -> SubscriptionDescription:
    backlog = sum(one.backlog_messages for one in cursors)
    return SubscriptionDescription("s", None, backlog, 0, 0.0, cursors, consumers, ("shard 1: a reason",))


def rest(description: SubscriptionDescription, type: Type = Type.stream, timeout_s: float = 30.0) -> Rest:
    return Rest(Wanted("t", "s", type, EARLIEST, None, True, Shape.raw, timeout_s), description)


def came(rest: Rest, *ids: tuple[int, int]) -> bool:
    messages: Any = [Printed(MessageId(shard, offset)) for shard, offset in ids]
    rest.came(messages, {})
    return rest.is_empty


def test_without_a_backlog_there_is_nothing_to_wait_for() -> None:
    assert rest(described()).is_empty
    assert rest(described(cursor(1, 5, 5), cursor(2, 0, 0))).is_empty


def test_each_shard_ends_with_the_last_message_of_the_beginning() -> None:
    waiting = rest(described(cursor(1, 0, 3), cursor(2, 4, 6)))
    assert not came(waiting, (1, 0), (1, 1))
    assert not came(waiting, (1, 2))
    assert not came(waiting, (2, 4))
    assert came(waiting, (2, 5))


def test_a_message_stored_later_ends_its_shard_too_so_that_a_steady_producer_does_not_prevent_the_end() -> None:
    assert came(rest(described(cursor(1, 0, 3)), Type.queue), (1, 7), (1, 8))


def test_silence_ends_what_was_acknowledged_meanwhile_by_others() -> None:
    waiting = rest(described(cursor(1, 0, 3), cursor(2, 0, 3)))
    waiting.silence(described(cursor(1, 3, 9), cursor(2, 2, 3)))
    assert not waiting.is_empty
    waiting.silence(described(cursor(1, 3, 9), cursor(2, 3, 3)))
    assert waiting.is_empty


def test_a_shard_that_another_stream_consumer_reads_is_not_waited_for(capsys: pytest.CaptureFixture[str]) -> None:
    waiting = rest(described(cursor(1, 0, 3)))
    waiting.silence(described(cursor(1, 0, 3), consumers=(consumer(OTHER, 1), consumer(ME, 1, active=False))))
    assert waiting.is_empty
    assert "other consumers have them: 3 messages" in capsys.readouterr().err


def test_a_queue_is_waited_for_while_messages_are_left_or_on_their_way_here() -> None:
    waiting = rest(described(cursor(1, 0, 10)), Type.queue)
    mine, others = consumer(ME, 1, unacked=4), consumer(OTHER, 1, unacked=6)
    waiting.silence(described(cursor(1, 0, 10), consumers=(mine, others)))
    assert not waiting.is_empty
    waiting.silence(described(cursor(1, 0, 10, backlog=7), consumers=(consumer(ME, 1), others)))
    assert not waiting.is_empty
    waiting.silence(described(cursor(1, 0, 10, backlog=6), consumers=(consumer(ME, 1), others)))
    assert waiting.is_empty


def test_a_consumer_that_is_about_to_be_attached_again_waits() -> None:
    waiting = rest(described(cursor(1, 0, 3)))
    waiting.silence(described(cursor(1, 0, 3), consumers=(consumer(OTHER, 1),)))
    assert not waiting.is_empty


def test_messages_that_do_not_come_are_an_error_with_the_reason_and_never_a_quiet_end() -> None:
    waiting = rest(described(cursor(1, 0, 3)), timeout_s=0.0)
    with pytest.raises(CommandFailed, match="3 messages did not come within 0 s: shard 1: a reason") as failed:
        waiting.silence(described(cursor(1, 0, 3), consumers=(consumer(ME, 1),)))
    assert failed.value.exit_code == 124
