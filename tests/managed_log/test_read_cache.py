"""The read cache against a dictionary; its two budgets."""

from __future__ import annotations

import sys

from hypothesis import given
from hypothesis import strategies as st

from magnetar.managed_log.cache import ENTRY_BYTES_OVERHEAD, ReadCache, StoredEntry
from magnetar.managed_log.entry_index import POINTS_MAX, EntryIndex
from magnetar.wire.entry import EntryBatch


def entry(first: int, count: int = 1, size: int = 100) -> StoredEntry:
    return StoredEntry(first, first + count, 0, [EntryBatch(first, count, bytes(size))])


def cost(entries: int, size: int = 100) -> int:
    return entries * (size + ENTRY_BYTES_OVERHEAD)


def offsets(entries: list[StoredEntry]) -> list[int]:
    return [e.first_offset for e in entries]


def test_reading_history_does_not_evict_the_tail() -> None:
    cache = ReadCache(cost(8), catch_up_part=0.5)
    for offset in range(100, 104):
        cache.put_appended(1, entry(offset))
    for offset in range(50):
        cache.put_read(1, entry(offset))
    assert offsets(cache.get(1, 100, 1 << 20)) == [100, 101, 102, 103]
    assert offsets(cache.get(1, 46, 1 << 20)) == [46, 47, 48, 49]
    assert cache.size_bytes <= cost(8)


def test_a_read_runs_on_from_history_into_the_tail() -> None:
    cache = ReadCache(1 << 20)
    for offset in (3, 1, 2):
        cache.put_read(1, entry(offset))
    for offset in (4, 5):
        cache.put_appended(1, entry(offset))
    assert offsets(cache.get(1, 1, 1 << 20)) == [1, 2, 3, 4, 5]
    assert offsets(cache.get(1, 1, 150)) == [1, 2]
    assert cache.get(1, 0, 1 << 20) == cache.get(2, 1, 1 << 20) == []


def test_an_entry_is_found_by_any_of_its_offsets() -> None:
    cache = ReadCache(1 << 20)
    cache.put_appended(1, entry(10, count=5))
    assert [offsets(cache.get(1, offset, 1)) for offset in (9, 10, 14, 15)] == [[], [10], [10], []]
    assert cache.has(1, 14)
    assert not cache.has(1, 15)


def test_an_entry_larger_than_the_budget_is_not_kept() -> None:
    cache = ReadCache(cost(4))
    cache.put_appended(1, entry(0))
    cache.put_appended(1, entry(1, size=1 << 20))
    assert offsets(cache.get(1, 0, 1 << 30)) == [0]


def test_what_was_evicted_is_let_go_at_once() -> None:
    cache = ReadCache(cost(8), catch_up_part=0.5)
    payload = bytes(100)
    before = sys.getrefcount(payload)
    cache.put_read(1, StoredEntry(0, 1, 0, [EntryBatch(0, 1, payload)]))
    assert sys.getrefcount(payload) == before + 1
    for offset in range(1, 6):
        cache.put_read(1, entry(offset))
    assert not cache.has(1, 0)
    assert sys.getrefcount(payload) == before


@given(
    steps=st.lists(st.tuples(st.booleans(), st.integers(1, 3), st.integers(0, 40), st.integers(1, 200)), max_size=120),
    forgotten=st.integers(1, 3),
)
def test_what_is_cached_is_what_was_put_and_stays_within_bounds(
    steps: list[tuple[bool, int, int, int]], forgotten: int
) -> None:
    cache = ReadCache(6_000, catch_up_part=0.5)
    for appended, shard_id, offset, size in steps:
        if appended:
            cache.put_appended(shard_id, entry(offset, size=size))
        else:
            cache.put_read(shard_id, entry(offset, size=size))
        assert cache.size_bytes <= 6_000
        assert offsets(cache.get(shard_id, offset, 1)) == [offset]
    for shard_id in (1, 2, 3):
        for offset in range(42):
            found = offsets(cache.get(shard_id, offset, 1 << 20))
            assert found == list(range(offset, offset + len(found)))
            assert cache.has(shard_id, offset) == bool(found)
    cache.forget(forgotten)
    assert not any(cache.has(forgotten, offset) for offset in range(42))
    for shard_id in {1, 2, 3} - {forgotten}:
        cache.forget(shard_id)
    assert cache.size_bytes == 0


@given(
    counts=st.lists(st.integers(0, 5), min_size=1, max_size=60),
    seen=st.lists(st.integers(0, 59)),
    look=st.integers(0, 300),
)
def test_the_index_brackets_every_offset_and_time(counts: list[int], seen: list[int], look: int) -> None:
    firsts = [sum(counts[:i]) for i in range(len(counts))]
    times = [100 + 3 * i for i in range(len(counts))]
    index = EntryIndex(0)
    for entry_id in seen:
        if entry_id < len(counts):
            index.add(entry_id, firsts[entry_id], times[entry_id])
    end = len(counts)
    offset = look % (firsts[-1] + 1)
    bracket = index.with_offset(offset, end)
    holding = [i for i in range(end) if firsts[i] <= offset]
    assert bracket.low <= holding[-1]
    assert bracket.high > holding[-1] or firsts[bracket.low] == offset
    time_us = 90 + look
    since = index.since(time_us, end)
    answer = next((i for i in range(end) if times[i] >= time_us), end)
    assert since.low <= answer < since.high


def test_the_index_stays_bounded_and_still_narrows() -> None:
    index = EntryIndex(0)
    for entry_id in range(50_000):
        index.add(entry_id, entry_id * 10, entry_id)
    bracket = index.with_offset(123_456, 50_000)
    assert bracket.low <= 12_345 < bracket.high
    assert bracket.high - bracket.low <= 2 * 50_000 // (POINTS_MAX // 2)
    index.will_go_on(12_346, 123_460)
    assert index.with_offset(123_460, 50_000).found
