"""What waits for the user: chunks, columns, and what a seek overtakes."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from magnetar.client.completion import Completion
from magnetar.client.errors import MagnetarError
from magnetar.client.inbox import Inbox
from magnetar.client.message import MessageBatch
from magnetar.wire.batch import Columns, encode_batch, parse_header
from magnetar.wire.selection import from_indices


class Shard:
    """A source that counts what it hears."""

    individual = False
    hand_over: Callable[[Callable[[], object]], None] | None = None

    def __init__(self) -> None:
        self.topic, self.shard_id, self.generation = "a/b/c", 3, 0
        self.taken: list[tuple[int, int]] = []
        self.lost = 0

    def took(self, batch: MessageBatch, start: int, stop: int) -> None:
        self.taken.append((batch.offsets[start], batch.offsets[stop - 1]))

    def dropped(self, batch: MessageBatch, start: int) -> None:
        self.lost += len(batch) - start

    def ack(self, batch: MessageBatch, index: int) -> Completion:
        return Completion()

    def ack_batch(self, batch: MessageBatch) -> Completion:
        return Completion()

    nack = ack


def delivery(shard: Shard, first: int, count: int, chosen: list[int] | None = None) -> MessageBatch:
    columns = Columns([b"%d" % (first + i) for i in range(count)])
    data = encode_batch(columns, producer_id=bytes(16), epoch=0, previous=-1, last=count - 1)
    return MessageBatch(
        shard, data, parse_header(data), first_offset=first, publish_time_us=0,
        chosen=b"" if chosen is None else from_indices(count, chosen), generation=shard.generation,
    )  # fmt: skip


def offsets(messages: object) -> list[int | None]:
    return [message.id.offset for message in messages]  # type: ignore[attr-defined]


@pytest.fixture
def shard() -> Shard:
    return Shard()


@pytest.fixture
def inbox(shard: Shard) -> Inbox:
    inbox = Inbox(chunk_messages=4)
    inbox.put(delivery(shard, 0, 10))
    inbox.put(delivery(shard, 10, 3, [0, 2]))
    return inbox


def test_messages_come_in_order_and_each_chunk_counts_as_taken_when_it_is_made(inbox: Inbox, shard: Shard) -> None:
    assert inbox.load()
    assert shard.taken == [(0, 3)]
    assert offsets(inbox.messages) == [0, 1, 2, 3]
    assert offsets(inbox.take(100)) == [4, 5, 6, 7, 8, 9, 10, 12]
    assert not inbox.load()
    assert not inbox


def test_columns_hold_what_was_not_given_out_as_messages(inbox: Inbox, shard: Shard) -> None:
    inbox.load()
    next(inbox.messages)
    rest = inbox.take_batch()
    assert rest is not None
    assert list(rest.offsets) == list(range(1, 10))
    assert rest.payloads == [b"%d" % n for n in range(1, 10)]
    following = inbox.take_batch()
    assert following is not None
    assert list(following.offsets) == [10, 12]
    assert inbox.take_batch() is None
    assert shard.taken == [(0, 3), (4, 9), (10, 12)]


def test_a_seek_takes_back_also_messages_that_are_made(inbox: Inbox, shard: Shard) -> None:
    inbox.load()
    next(inbox.messages)
    shard.generation += 1
    inbox.drop_overtaken()
    assert inbox.take(100) == []
    assert shard.lost == 8
    inbox.put(delivery(shard, 50, 1))
    assert offsets(inbox.take(100)) == [50]


def test_what_was_delivered_before_a_seek_and_arrives_after_it_is_not_given_out(inbox: Inbox, shard: Shard) -> None:
    inbox.take(100)
    late = delivery(shard, 20, 2)
    shard.generation += 1
    inbox.put(late)
    assert inbox.take(10) == []
    assert shard.lost == 2


def test_dropping_a_source_leaves_the_others_and_the_messages_that_are_made(inbox: Inbox, shard: Shard) -> None:
    other = Shard()
    inbox.put(delivery(other, 100, 2))
    inbox.load()
    inbox.drop_from(shard)
    assert offsets(inbox.take(100)) == [0, 1, 2, 3, 100, 101]
    assert shard.lost == 8


def test_a_batch_that_cannot_be_decoded_is_skipped_after_what_came_before_it(shard: Shard) -> None:
    inbox = Inbox()
    inbox.put(delivery(shard, 0, 2))
    broken = delivery(shard, 2, 2)
    broken._data = broken._data[:-1]
    inbox.put(broken)
    inbox.put(delivery(shard, 4, 1))
    assert offsets(inbox.take(100)) == [0, 1]
    with pytest.raises(MagnetarError, match="first_offset=`2`"):
        inbox.take(100)
    assert offsets(inbox.take(100)) == [4]
