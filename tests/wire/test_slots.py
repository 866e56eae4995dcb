"""Slots: the hash is Kafka's, and its partitions are ranges."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from magnetar.wire import slots
from magnetar.wire.slots import SLOTS, murmur2, slot_of, slots_of


@pytest.mark.parametrize(
    ("key", "hashed"),
    [
        (b"21", -973932308),
        (b"foobar", -790332482),
        (b"a-little-bit-long-string", -985981536),
        (b"a-little-bit-longer-string", -1486304829),
        (b"lkjh234lh9fiuh90y23oiuhsafujhadof229phr9h19h89h8", -58897971),
        (b"abc", 479470107),
    ],
)
def test_murmur2_gives_the_published_values(key: bytes, hashed: int) -> None:
    assert murmur2(key) == hashed & 0xFFFF_FFFF


def plain_murmur2(key: bytes) -> int:
    """The algorithm as Kafka's Utils.murmur2 states it."""
    m, mask = 0x5BD1E995, 0xFFFF_FFFF
    h = 0x9747B28C ^ len(key)
    whole = len(key) & ~3
    for at in range(0, whole, 4):
        k = int.from_bytes(key[at : at + 4], "little") * m & mask
        k = (k ^ k >> 24) * m & mask
        h = h * m & mask ^ k
    if key[whole:]:
        h = (h ^ int.from_bytes(key[whole:], "little")) * m & mask
    h = (h ^ h >> 13) * m & mask
    return h ^ h >> 15


@settings(derandomize=True, deadline=None, max_examples=300)
@given(st.binary(max_size=100))
def test_a_slot_is_the_reversed_low_half_of_murmur2(key: bytes) -> None:
    assert slot_of(key) == int(f"{plain_murmur2(key) & 0xFFFF:016b}"[::-1], 2)


@pytest.mark.parametrize("k", range(9))
def test_each_partition_of_a_power_of_two_is_one_contiguous_range_of_slots(k: int) -> None:
    partitions, width = 1 << k, SLOTS >> k
    ranges: dict[int, int] = {}
    for number in range(8000):
        key = b"key-%d" % number
        partition = (murmur2(key) & 0x7FFF_FFFF) % partitions
        assert ranges.setdefault(partition, slot_of(key) // width) == slot_of(key) // width
    assert sorted(ranges) == sorted(ranges.values()) == list(range(partitions))


@settings(derandomize=True, deadline=None)
@given(st.lists(st.binary(max_size=80)))
def test_slots_in_bulk_are_the_slots_one_by_one(keys: list[bytes]) -> None:
    found = slots_of(keys)
    assert found.typecode == "H"
    assert found.tolist() == [slot_of(key) for key in keys]


def test_the_cache_of_keys_stays_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slots, "CACHED_KEYS_MAX", 100)
    monkeypatch.setattr(slots, "_recent", {})
    keys = [b"%d" % number for number in range(1000)]
    expected = slots_of(keys)
    assert slots_of(keys) == expected
    assert len(slots._recent) <= 100
    slots_of([b"long" * 1000])
    assert max(map(len, slots._recent)) <= slots.CACHED_KEY_BYTES_MAX
