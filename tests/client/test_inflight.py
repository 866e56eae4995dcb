"""The chain of a producer in a shard: what is sent again, in which order, and what is not."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from magnetar.client.batching import Batch
from magnetar.client.errors import InvalidArgument
from magnetar.client.inflight import Chain, Known, ParentRange, Stored, covered_by_parents, regroup
from magnetar.wire.batch import parse_header

PRODUCER = bytes(16)
WINDOW = 1 << 20

Send = Callable[..., Batch]


@pytest.fixture
def chain() -> Iterator[Chain]:
    chain = Chain()
    yield chain
    chain.check()


def make(first: int, count: int, *, numbered: bool = False, slot: int = 0) -> Batch:
    batch = Batch(1, 1 << 20, slot=slot)
    batch.numbered = numbered
    batch.first = first
    for number in range(count):
        batch.append(20, b"%d" % (first + number), None, slot, None, None)
    batch.seal()
    return batch


def send(chain: Chain, first: int, count: int = 1) -> Batch:
    batch = make(first, count)
    batch.encode(producer_id=PRODUCER, epoch=0, previous=chain.sent_last, codec=0)
    chain.sent(batch)
    chain.check()
    return batch


def test_each_batch_follows_the_one_sent_before(chain: Chain) -> None:
    chain.opened(-1, [], WINDOW)
    batches = [send(chain, 0, 3), send(chain, 10), send(chain, 11, 2)]
    assert [batch.previous for batch in batches] == [-1, 2, 10]


def test_an_answer_ends_everything_up_to_it(chain: Chain) -> None:
    chain.opened(-1, [], WINDOW)
    batches = [send(chain, 0, 3), send(chain, 3, 2), send(chain, 5)]
    assert chain.store(Stored(0, 4, 100)) == batches[:2]
    assert [batch.offset for batch in batches] == [100, 103, None]
    assert not batches[2].ended
    assert chain.unanswered == len(batches[2].data)


def test_the_next_opening_tells_what_is_stored_and_the_rest_is_sent_again_behind_it(chain: Chain) -> None:
    chain.opened(-1, [], WINDOW)
    batches = [send(chain, 0, 3), send(chain, 3, 2), send(chain, 5), send(chain, 6)]
    chain.lost()
    assert chain.unanswered == 0
    assert chain.opened(4, [Stored(0, 2, 50), Stored(3, 4, 60)], WINDOW) == batches[:2]
    assert [batch.offset for batch in batches[:2]] == [50, 60]
    assert chain.resend() is batches[2]
    assert chain.resend() is batches[3]
    assert chain.resend_size() == 0
    assert [parse_header(batch.data).previous for batch in batches[2:]] == [4, 5]


def test_numbers_that_the_life_before_has_taken_are_given_anew(chain: Chain) -> None:
    """The owner that was replaced knew of sequences up to 1; its successor has up to 4, and none of these batches."""
    chain.opened(1, [], WINDOW)
    batches = [send(chain, 2, 2), send(chain, 4), send(chain, 5)]
    assert chain.renumber(4, 6) == 10
    assert chain.opened(4, [Stored(2, 4, 70)], WINDOW) == []
    assert [chain.resend() for _ in batches] == batches
    assert [(parse_header(batch.data).previous, batch.first, batch.last) for batch in batches] == [
        (4, 6, 7),
        (7, 8, 8),
        (8, 9, 9),
    ]
    assert [parse_header(batch.data).last for batch in batches] == [7, 8, 9]
    assert chain.store(Stored(6, 9, 100)) == batches


def test_numbers_that_nobody_has_taken_and_those_of_the_user_are_kept(chain: Chain) -> None:
    chain.opened(1, [], WINDOW)
    free = send(chain, 9)
    assert chain.renumber(4, 10) == 10
    assert (free.first, parse_header(free.data).last) == (9, 9)
    users = Chain()
    users.opened(-1, [], WINDOW)
    batch = make(2, 1, numbered=True)
    batch.encode(producer_id=PRODUCER, epoch=2, previous=-1, codec=0)
    users.sent(batch)
    assert users.renumber(4, 5) == 5
    assert users.opened(4, [Stored(2, 2, 70)], WINDOW) == [batch]
    assert batch.offset == 70


def test_a_batch_stored_long_ago_has_no_offset(chain: Chain) -> None:
    chain.opened(-1, [], WINDOW)
    batch = send(chain, 0)
    chain.lost()
    chain.opened(7, [Stored(5, 7, 90)], WINDOW)
    assert batch.ended
    assert batch.offset_of(0) is None


def test_a_producer_that_the_broker_forgot_begins_a_new_chain(chain: Chain) -> None:
    chain.opened(-1, [], WINDOW)
    send(chain, 0)
    chain.store(Stored(0, 0, 0))
    batch = send(chain, 1)
    chain.lost()
    chain.opened(-1, [], WINDOW)
    assert chain.resend() is batch
    assert parse_header(batch.data).previous == -1


def test_a_loss_while_sending_again_keeps_the_order(chain: Chain) -> None:
    chain.opened(-1, [], WINDOW)
    batches = [send(chain, n) for n in range(4)]
    chain.lost()
    chain.opened(-1, [], WINDOW)
    chain.resend()
    chain.resend()
    chain.lost()
    chain.opened(0, [], WINDOW)
    assert [chain.resend() for _ in range(3)] == batches[1:]
    assert [batch.previous for batch in batches[1:]] == [0, 1, 2]


def test_a_refused_batch_fails_alone_and_those_behind_close_the_gap(chain: Chain) -> None:
    chain.opened(-1, [], WINDOW)
    batches = [send(chain, n) for n in range(4)]
    error = InvalidArgument("no")
    assert chain.refuse(1, error) == [batches[1]]
    assert batches[1].error is error
    chain.lost()
    chain.opened(0, [], WINDOW)
    assert [chain.resend() for _ in range(2)] == batches[2:]
    assert [batch.previous for batch in batches[2:]] == [0, 2]
    assert chain.refuse(99, error) == []


def test_the_window_lets_a_batch_larger_than_itself_go_alone(chain: Chain) -> None:
    chain.opened(-1, [], 200)
    assert chain.fits(5000)
    send(chain, 0)
    assert chain.fits(200 - chain.unanswered)
    assert not chain.fits(201 - chain.unanswered)
    chain.store(Stored(0, 0, 0))
    assert chain.fits(5000)


def test_user_sequences_that_were_sent_before_are_known(chain: Chain) -> None:
    chain.opened(4, [], WINDOW)
    assert chain.runs(make(5, 3, numbered=True)) == [(Known.NEW, [])]
    assert chain.runs(make(3, 4, numbered=True)) == [(Known.SENT, [0, 1]), (Known.NEW, [2, 3])]
    assert chain.runs(make(0, 2)) == [(Known.NEW, [])]


def test_user_sequences_stored_in_a_parent_are_known_by_slot(chain: Chain) -> None:
    chain.opened(-1, [], WINDOW, [ParentRange(0, 99, 6), ParentRange(100, 199, 2)])
    assert chain.runs(make(5, 3, numbered=True, slot=50)) == [(Known.IN_PARENT, [0, 1]), (Known.NEW, [2])]
    assert chain.runs(make(5, 3, numbered=True, slot=150)) == [(Known.NEW, [0, 1, 2])]


def test_a_duplicate_ends_with_the_offsets_of_the_original_once_that_is_stored(chain: Chain) -> None:
    chain.opened(-1, [], WINDOW)
    send(chain, 0, 4)
    again = make(2, 2, numbered=True)
    assert chain.answer_later(again) == []
    assert again in chain.store(Stored(0, 3, 10))
    assert [again.offset_of(i) for i in range(2)] == [12, 13]


def test_a_duplicate_of_something_older_than_sixteen_batches_has_no_offset(chain: Chain) -> None:
    chain.opened(-1, [], WINDOW)
    for number in range(20):
        send(chain, number)
        chain.store(Stored(number, number, 100 + number))
    old, young = make(2, 1, numbered=True), make(10, 1, numbered=True)
    assert chain.answer_later(old) == [old]
    assert chain.answer_later(young) == [young]
    assert (old.offset_of(0), young.offset_of(0)) == (None, 110)


def test_regrouping_sends_each_key_to_one_shard_in_order(chain: Chain) -> None:
    batch = Batch(1, 1 << 20)
    batch.first = 0
    for number, slot in enumerate([10, 200, 11, 201, 10]):
        batch.append(20, b"%d" % number, b"k%d" % slot, slot, None, None)
    batch.seal()
    batch.encode(producer_id=PRODUCER, epoch=0, previous=-1, codec=0)
    low, high = regroup(batch, lambda slot: 2 if slot < 100 else 3)
    assert (low.shard, low.payloads, high.shard, high.payloads) == (2, [b"0", b"2", b"4"], 3, [b"1", b"3"])
    assert low.parent_last == high.parent_last == 4
    assert covered_by_parents(low, [ParentRange(0, 99, 4), ParentRange(100, 299, -1)])
    assert not covered_by_parents(high, [ParentRange(0, 99, 4), ParentRange(100, 299, -1)])


def test_what_was_never_sent_is_not_covered_by_a_parent(chain: Chain) -> None:
    (part,) = regroup(make(0, 2), lambda slot: 5)
    assert not covered_by_parents(part, [ParentRange(0, 65535, 1000)])


def test_user_sequences_stay_with_their_messages_when_regrouped(chain: Chain) -> None:
    batch = Batch(1, 1 << 20)
    batch.numbered, batch.first = True, 7
    for slot in (1, 1, 200, 1):
        batch.append(20, b"", b"k", slot, None, None)
    batch.seal()
    parts = regroup(batch, lambda slot: 2 if slot < 100 else 3)
    assert [(part.shard, part.first, part.last) for part in parts] == [(2, 7, 8), (3, 9, 9), (2, 10, 10)]
