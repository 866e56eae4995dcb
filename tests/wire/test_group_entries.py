"""Entries of a shard's data ledger: batches with offsets."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from magnetar.wire import selection
from magnetar.wire.batch import Columns, encode_batch
from magnetar.wire.entry import (
    BATCH_COUNT_MAX,
    BATCH_OVERHEAD,
    HEADER_SIZE,
    OFFSET_MAX,
    EntryBatch,
    EntryInfo,
    EntryKind,
    MalformedEntry,
    encode_control,
    encode_entry,
    peek_entry,
    split_entry,
)

PROPERTY = settings(derandomize=True, deadline=None, max_examples=200)


def batch_of(count: int) -> bytes:
    return encode_batch(Columns([b"m"] * count), producer_id=bytes(16), epoch=0, previous=-1, last=count - 1, slot=5)


@st.composite
def stored(draw: st.DrawFn) -> tuple[bytes, bytes, int]:
    count = draw(st.integers(1, 20))
    wanted = draw(st.sets(st.integers(0, count - 1), min_size=1))
    return batch_of(count), selection.from_indices(count, wanted), len(wanted)


def test_the_bytes_of_an_entry_never_change() -> None:
    data = encode_entry(1000, 1_700_000_000_000_001, [(batch_of(3), b"\x05", 2), (batch_of(1), b"", 1)])
    first, second = batch_of(3).hex(), batch_of(1).hex()
    assert data.hex() == (
        "01 01 0002 00000003 00000000000003e8 00060a24181e4001 0000006e 00000001 0000006a 00000000".replace(" ", "")
        + "05"
        + first
        + second
    )
    assert encode_control(9, 7).hex() == "02 01 0000 00000000 0000000000000009 0000000000000007".replace(" ", "")


@PROPERTY
@given(st.integers(0, 1 << 62), st.integers(-(1 << 63), (1 << 63) - 1), st.lists(stored(), min_size=1, max_size=6))
def test_batches_come_back_with_dense_offsets(
    first_offset: int, time_us: int, batches: list[tuple[bytes, bytes, int]]
) -> None:
    data = encode_entry(first_offset, time_us, batches)
    info, found = split_entry(memoryview(data))
    assert info == peek_entry(data)
    messages = sum(count for _, _, count in batches)
    assert info == EntryInfo(EntryKind.MESSAGES, first_offset, messages, time_us, len(batches))
    assert [(each.batch, each.selection, each.count) for each in found] == batches
    assert [each.first_offset for each in found] == [first_offset, *(each.end_offset for each in found[:-1])]
    assert found[-1].end_offset == info.end_offset == first_offset + messages
    assert len(data) == HEADER_SIZE + sum(len(each) + len(chosen) + BATCH_OVERHEAD for each, chosen, _ in batches)


def test_a_control_entry_takes_no_offset() -> None:
    info, batches = split_entry(encode_control(77, 5))
    assert (info.kind, info.first_offset, info.end_offset, batches) == (EntryKind.CONTROL, 77, 77, [])


def test_an_entry_is_not_empty_not_too_long_and_does_not_pass_the_last_offset() -> None:
    one = (batch_of(1), b"", 1)
    for first_offset, batches in ((0, []), (0, [one] * (BATCH_COUNT_MAX + 1)), (OFFSET_MAX, [one])):
        with pytest.raises(ValueError, match=r"first_offset|batches"):
            encode_entry(first_offset, 0, batches)


@pytest.mark.parametrize(
    "batches",
    [
        [(batch_of(3), b"\x03", 3)],
        [(batch_of(3), b"", 4)],
        [(batch_of(3), b"\x08", 1)],
        [(batch_of(3), b"\x01\x00", 1)],
        [(batch_of(3), b"\x00", 1)],
        [(batch_of(3), b"\x00", 1), (batch_of(3), b"", 2)],
        [(b"", b"", 1)],
        [(batch_of(3)[:-1], b"", 3)],
        [(batch_of(3) + b"\0", b"", 3)],
    ],
)
def test_counts_and_selections_that_do_not_fit_the_batches_are_refused(batches: list[tuple[bytes, bytes, int]]) -> None:
    with pytest.raises(MalformedEntry):
        split_entry(encode_entry(0, 0, batches))


VALID = encode_entry(1000, 5, [(batch_of(3), b"\x05", 2), (batch_of(9), b"", 9), (batch_of(1), b"", 1)])


@pytest.mark.parametrize("size", range(len(VALID)))
def test_each_truncation_is_refused(size: int) -> None:
    with pytest.raises(MalformedEntry):
        split_entry(VALID[:size])


def test_trailing_bytes_are_refused() -> None:
    for data in (VALID, encode_control(1, 1)):
        with pytest.raises(MalformedEntry):
            split_entry(data + b"\0")


@pytest.mark.parametrize("control", [False, True])
def test_flipped_bits_give_a_consistent_entry_or_are_refused(control: bool) -> None:
    valid = encode_control(3, 4) if control else VALID
    for bit in range(len(valid) * 8):
        damaged = bytearray(valid)
        damaged[bit >> 3] ^= 1 << (bit & 7)
        try:
            info, batches = split_entry(bytes(damaged))
        except MalformedEntry:
            continue
        check_consistent(info, batches)


@PROPERTY
@given(st.binary(max_size=300) | st.binary(max_size=300).map(lambda tail: b"\x01\x01\x00\x01\x00\x00\x00\x01" + tail))
def test_random_bytes_are_refused(data: bytes) -> None:
    with pytest.raises(MalformedEntry):
        split_entry(data)


def check_consistent(info: EntryInfo, batches: list[EntryBatch]) -> None:
    offset = info.first_offset
    for each in batches:
        assert each.first_offset == offset
        assert each.count >= 1
        offset = each.end_offset
    assert offset == info.end_offset
