"""The envelope of a ledger's entry: one byte string an entry, and damage is seen."""

from __future__ import annotations

import pytest
from fastcrc import crc32
from hypothesis import given, settings
from hypothesis import strategies as st

from magnetar.wire import envelope
from magnetar.wire.envelope import HEADER_SIZE, DamagedEnvelope, Envelope

u64 = st.integers(0, (1 << 64) - 1)
headers = st.builds(Envelope, u64, u64, st.integers(-(1 << 63), (1 << 63) - 1), u64)

GOLDEN = bytes.fromhex(
    "01 00 0000 0000000000000007 0000000000000003 0000000000000002 0000000000000405 604c9db0 7061796c6f6164"
)


def test_the_bytes_of_an_envelope_never_change() -> None:
    assert envelope.encode(7, 3, 2, 1029, b"payload").hex() == GOLDEN.hex()
    assert envelope.verify(GOLDEN, 7, 3) == Envelope(ledger_id=7, entry_id=3, lac=2, length=1029)


@settings(derandomize=True, deadline=None)
@given(headers, st.binary(max_size=200))
def test_what_was_encoded_verifies_and_gives_its_parts_back(header: Envelope, payload: bytes) -> None:
    data = envelope.encode(*header, payload)
    assert envelope.peek(data) == header
    assert envelope.verify(memoryview(data), header.ledger_id, header.entry_id) == header
    assert envelope.payload(data) == payload


def test_a_payload_is_a_view_of_the_envelope() -> None:
    data = envelope.encode(1, 2, 1, 3, memoryview(b"abc"))
    assert envelope.payload(data).obj is data


def test_an_entry_of_another_place_is_named() -> None:
    with pytest.raises(DamagedEnvelope, match="another ledger: wanted=`8` found=`7`"):
        envelope.verify(GOLDEN, 8, 3)
    with pytest.raises(DamagedEnvelope, match="another entry: wanted=`4` found=`3`"):
        envelope.verify(GOLDEN, 7, 4)


@pytest.mark.parametrize("at", [1, 2, 3])
def test_flags_that_nobody_knows_are_refused_under_a_right_checksum(at: int) -> None:
    altered = bytearray(GOLDEN)
    altered[at] = 1
    checksum = crc32.iscsi(bytes(altered[HEADER_SIZE:]), crc32.iscsi(bytes(altered[:36])))
    altered[36:40] = checksum.to_bytes(4, "big")
    with pytest.raises(DamagedEnvelope, match="unknown flags"):
        envelope.verify(bytes(altered))


@pytest.mark.parametrize("bit", range(len(GOLDEN) * 8))
def test_each_flipped_bit_is_damage(bit: int) -> None:
    damaged = bytearray(GOLDEN)
    damaged[bit >> 3] ^= 1 << (bit & 7)
    with pytest.raises(DamagedEnvelope):
        envelope.verify(bytes(damaged))


@pytest.mark.parametrize("size", range(len(GOLDEN)))
def test_each_truncation_is_damage(size: int) -> None:
    with pytest.raises(DamagedEnvelope):
        envelope.verify(GOLDEN[:size])
    if size < HEADER_SIZE:
        with pytest.raises(DamagedEnvelope, match="short"):
            envelope.peek(GOLDEN[:size])
        with pytest.raises(DamagedEnvelope, match="short"):
            envelope.payload(GOLDEN[:size])


@settings(derandomize=True, deadline=None, max_examples=300)
@given(st.binary(max_size=100) | st.binary(max_size=100).map(lambda tail: b"\x01\x00\x00\x00" + tail))
def test_random_bytes_are_damage(data: bytes) -> None:
    with pytest.raises(DamagedEnvelope):
        envelope.verify(data)
