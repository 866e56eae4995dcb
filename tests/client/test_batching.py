"""Messages into batches: limits, numbering, dividing."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from magnetar.client.batching import BATCH_BYTES_MAX, MESSAGE_OVERHEAD, Batch, Batching, Outbox, cost_of
from magnetar.client.errors import InvalidArgument
from magnetar.wire.batch import decode_batch, parse_header, slots

PRODUCER = bytes(range(16))


def outbox(**limits: float) -> tuple[Outbox, list[Batch]]:
    begun: list[Batch] = []
    return Outbox(7, Batching(**limits), begun.append), begun  # type: ignore[arg-type]


def put(box: Outbox, payload: bytes, key: bytes | None = None, slot: int = 0) -> tuple[Batch, int]:
    cost = cost_of(len(payload), key, 0, None)
    batch = box.batch_for(cost, slot)
    return batch, batch.append(cost, payload, key, slot, None, None)


def encoded(batch: Batch, first: int = 0, previous: int = -1) -> Batch:
    if not batch.numbered:
        batch.first = first
    batch.encode(producer_id=PRODUCER, epoch=0, previous=previous, codec=0)
    return batch


def test_messages_join_the_open_batch_until_it_has_enough() -> None:
    box, begun = outbox(max_messages=3)
    places = [put(box, b"x") for _ in range(7)]
    assert [index for _, index in places] == [0, 1, 2, 0, 1, 2, 0]
    assert len(begun) == 3
    assert [box.take().count for _ in range(3)] == [3, 3, 1]
    assert box.next_size() == 0
    assert not box


def test_a_batch_stays_within_its_bytes_and_a_larger_message_gets_its_own() -> None:
    box, _ = outbox(max_bytes=1000)
    for size in (300, 300, 300, 5000, 10):
        put(box, bytes(size))
    taken = [box.take() for _ in range(4)]
    assert [[len(payload) for payload in batch.payloads] for batch in taken] == [[300, 300], [300], [5000], [10]]


def test_a_full_batch_of_small_messages_is_smaller_than_a_frame_when_encoded() -> None:
    box, _ = outbox(max_messages=100_000)
    box.put_many([b""] * 100_000, [b"k"] * 100_000, [1] * 100_000, 1)
    while box:
        assert len(encoded(box.take()).data) <= BATCH_BYTES_MAX


def test_an_open_batch_lingers_until_it_is_ripe_or_full() -> None:
    box, begun = outbox(linger=1.0, max_messages=2)
    put(box, b"a")
    assert box.next_size() == 0
    begun[0].ripe = True
    assert box.next_size() > 0
    box.take()
    put(box, b"b")
    put(box, b"c")
    put(box, b"d")
    assert box.take().payloads == [b"b", b"c"]
    assert box.next_size() == 0


def test_a_ripe_batch_can_be_left_to_fill() -> None:
    box, _ = outbox(max_messages=2)
    put(box, b"a")
    assert box.next_size() > 0
    assert box.next_size(full=True) == 0
    put(box, b"b")
    assert box.next_size(full=True) > 0


def test_a_message_as_large_as_a_batch_has_nothing_to_wait_for() -> None:
    box, _ = outbox(max_bytes=1000)
    put(box, bytes(5000))
    assert box.next_size(full=True) > 0


def test_numbered_messages_share_a_batch_only_while_their_sequences_are_consecutive() -> None:
    box, _ = outbox()
    for sequence in (5, 6, 9, 10, 11, 3):
        batch = box.numbered_batch_for(20, sequence, 0)
        batch.append(20, b"%d" % sequence, None, 0, None, None)
    taken = [box.take() for _ in range(3)]
    assert [(batch.first, batch.last, batch.payloads) for batch in taken] == [
        (5, 6, [b"5", b"6"]),
        (9, 11, [b"9", b"10", b"11"]),
        (3, 3, [b"3"]),
    ]


def test_keyless_messages_in_a_keyed_batch_have_the_batch_slot() -> None:
    box, _ = outbox()
    batch, _ = put(box, b"a", slot=500)
    put(box, b"b", key=b"k", slot=77)
    put(box, b"c", slot=500)
    box.seal()
    data = encoded(batch).data
    header = parse_header(data)
    assert list(slots(data, header)) == [500, 77, 500]
    assert decode_batch(data).keys == [None, b"k", None]


def test_a_keyless_batch_has_one_slot() -> None:
    box, _ = outbox()
    batch, _ = put(box, b"a", slot=500)
    box.seal()
    header = parse_header(encoded(batch).data)
    assert not header.keyed
    assert header.min_slot == header.max_slot == 500


messages = st.lists(
    st.tuples(st.binary(max_size=60), st.none() | st.binary(max_size=6), st.integers(0, 65535)), min_size=1, max_size=40
)


@given(messages, st.booleans())
def test_dividing_keeps_every_message_its_slot_and_its_cost(
    given_messages: list[tuple[bytes, bytes | None, int]], encode_first: bool
) -> None:
    box, _ = outbox()
    batch = box.begin(321)
    costs = 0
    for payload, key, slot in given_messages:
        cost = cost_of(len(payload), key, 0, None)
        costs += cost
        batch.append(cost, payload, key, slot, None, None)
    box.seal()
    if encode_first:
        encoded(batch)
    slots_before = list(batch.message_slots())
    groups = [(1, [i for i, slot in enumerate(slots_before) if slot < 30_000])]
    groups.append((2, [i for i in range(batch.count) if i not in groups[0][1]]))
    parts = batch.divide([group for group in groups if group[1]])
    assert sum(part.size for part in parts) == costs
    assert batch.moved is not None
    for index, (payload, key, _) in enumerate(given_messages):
        part, place = batch.moved[index]
        assert part.payloads[place] == payload
        part.pad_keys(part.count)
        assert part.keys[place] == key
        assert part.slots[place] == slots_before[index]
        assert part.shard == (1 if slots_before[index] < 30_000 else 2)


@given(st.lists(st.binary(max_size=200), min_size=1, max_size=60), st.integers(1, 10), st.integers(1, 600))
def test_putting_many_is_the_same_as_putting_one_by_one(payloads: list[bytes], most: int, size: int) -> None:
    one, _ = outbox(max_messages=most, max_bytes=256 + size)
    many, _ = outbox(max_messages=most, max_bytes=256 + size)
    for payload in payloads:
        put(one, payload)
    places = many.put_many(payloads, None, (), 0)
    assert [batch.payloads for batch in one.pending()] == [batch.payloads for batch in many.pending()]
    assert [batch.size for batch in one.pending()] == [batch.size for batch in many.pending()]
    found = [batch.payloads[index + i] for batch, index, count in places for i in range(count)]
    assert found == payloads
    assert sum(batch.size for batch in many.pending()) == sum(len(p) + MESSAGE_OVERHEAD for p in payloads)


@pytest.mark.parametrize("limits", [{"linger": -1.0}, {"max_messages": 0}, {"max_bytes": (1 << 20) + 1}])
def test_batching_that_cannot_be_is_refused(limits: dict[str, float]) -> None:
    with pytest.raises(InvalidArgument, match=next(iter(limits))):
        Batching(**limits)  # type: ignore[arg-type]
