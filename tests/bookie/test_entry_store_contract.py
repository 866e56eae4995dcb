"""One contract for every entry store: what was committed stays, after a crash too; what is not there is not made up."""

from __future__ import annotations

import shutil
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import pytest

from magnetar.bookie.entry_store import (
    ENTRIES_PER_READ_MAX,
    EntryQuery,
    EntryStore,
    GroupWrites,
    LedgerMark,
    LedgerState,
    decode_mark,
    encode_mark,
)
from magnetar.bookie.memory import MemoryEntryStore
from magnetar.bookie.rocksdb import RocksEntryStore

MARK = LedgerMark(b"t" * 16, 3, stored=True)


class Disk(Protocol):
    """A place that stores can be opened on, one after the other."""

    async def open(self) -> EntryStore: ...

    async def crash(self) -> None: ...

    async def close(self) -> None: ...


class MemoryDisk:
    def __init__(self) -> None:
        self._store = MemoryEntryStore()

    async def open(self) -> EntryStore:
        return self._store

    async def crash(self) -> None:
        self._store = self._store.crash()

    async def close(self) -> None:
        pass


class RocksDisk:
    """A crash leaves the files as they are and opens a copy of them: nothing is flushed or closed."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._copies = 0
        self._opened: list[RocksEntryStore] = []

    async def open(self) -> EntryStore:
        store = await RocksEntryStore.open(self._directory, 32 << 20)
        self._opened.append(store)
        return store

    async def crash(self) -> None:
        self._copies += 1
        copy = self._directory.with_name(f"copy{self._copies}")
        shutil.copytree(self._directory, copy)
        self._directory = copy

    async def close(self) -> None:
        for store in self._opened:
            await store.close()


@pytest.fixture(params=["memory", "rocksdb"])
async def disk(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Disk]:
    disk: Disk = MemoryDisk() if request.param == "memory" else RocksDisk(tmp_path / "store")
    yield disk
    await disk.close()


def group(*entries: tuple[int, int, bytes], mark: LedgerMark = MARK) -> GroupWrites:
    return GroupWrites(entries=list(entries), marks={ledger_id: mark for ledger_id, _, _ in entries})


async def test_a_new_store_is_empty_and_without_doubt(disk: Disk) -> None:
    store = await disk.open()
    assert store.empty
    assert store.doubt == ""
    assert dict(store.meta) == {}
    assert await store.marks() == []


async def test_committed_entries_marks_and_meta_survive_a_crash(disk: Disk, writer: Any) -> None:
    ledger = writer(7)
    big = ledger.entry(1, b"x" * 100_000)
    store = await disk.open()
    await store.commit(group((7, 0, ledger.entry(0)), (7, 1, big)))
    await store.commit(GroupWrites(marks={9: LedgerMark(b"other", 5, fenced=True)}, meta={"cookie": b"me"}))
    await disk.crash()
    store = await disk.open()
    assert store.doubt == ""
    assert not store.empty
    assert dict(store.meta) == {"cookie": b"me"}
    assert await store.marks() == [(7, MARK), (9, LedgerMark(b"other", 5, fenced=True))]
    [read] = await store.read([EntryQuery(7, 0, 5, 1 << 20)])
    assert read.values == [ledger.entry(0), big, None, None, None, None]
    assert read.mark == MARK


async def test_the_state_of_a_ledger_is_its_mark_and_its_last_entry(disk: Disk, writer: Any) -> None:
    store = await disk.open()
    await store.commit(group(*((i, e, writer(i).entry(e)) for i in (6, 7, 8) for e in (0, 1, 5))))
    await store.commit(GroupWrites(marks={10: LedgerMark(b"t", 1, fenced=True)}))
    assert await store.load([7, 9, 10]) == {
        7: LedgerState(MARK, 5, 4),
        9: LedgerState(None),
        10: LedgerState(LedgerMark(b"t", 1, fenced=True)),
    }


async def test_a_stored_ledger_without_entries_has_no_last_entry(disk: Disk, writer: Any) -> None:
    store = await disk.open()
    await store.commit(group((6, 0, writer(6).entry(0)), (8, 0, writer(8).entry(0))))
    await store.commit(GroupWrites(marks={7: MARK}))
    assert (await store.load([7]))[7] == LedgerState(MARK)


async def test_lookup_tells_stored_from_absent(disk: Disk, writer: Any) -> None:
    store = await disk.open()
    await store.commit(group((7, 3, writer(7).entry(3))))
    keys = [(7, entry_id) for entry_id in range(600)]
    found = await store.lookup(keys)
    assert found == {key: writer(7).entry(3) if key == (7, 3) else None for key in keys}


async def test_a_deleted_ledger_is_gone_and_its_neighbours_are_not(disk: Disk, writer: Any) -> None:
    store = await disk.open()
    await store.commit(group(*((i, e, writer(i).entry(e)) for i in (6, 7, 8) for e in range(3))))
    tombstone = replace(MARK, stored=False, deleted_us=17)
    await store.commit(GroupWrites(deleted=[7], marks={7: tombstone}))
    await store.reclaim([7])
    await disk.crash()
    store = await disk.open()
    reads = await store.read([EntryQuery(i, 0, 2, 1 << 20) for i in (6, 7, 8)])
    assert [read.values.count(None) for read in reads] == [0, 3, 0]
    assert (await store.load([7]))[7] == LedgerState(tombstone)
    await store.commit(GroupWrites(forgotten=[7]))
    assert [ledger_id for ledger_id, _ in await store.marks()] == [6, 8]


async def test_a_read_stops_before_its_byte_limit_but_has_one_entry(disk: Disk, writer: Any) -> None:
    ledger = writer(7)
    store = await disk.open()
    await store.commit(group(*((7, e, ledger.entry(e, b"x" * 960)) for e in range(40))))
    for max_bytes, expected in ((1, 1), (1000, 1), (2999, 2), (3000, 3), (30_500, 30)):
        [read] = await store.read([EntryQuery(7, 0, 39, max_bytes)])
        assert len(read.values) == expected, max_bytes


async def test_a_read_of_a_vast_range_has_a_bounded_answer(disk: Disk) -> None:
    store = await disk.open()
    [read] = await store.read([EntryQuery(7, 5, (1 << 63) - 1, 1 << 20)])
    assert read.values == [None] * ENTRIES_PER_READ_MAX


async def test_entries_of_a_later_commit_replace_earlier_ones(disk: Disk, writer: Any) -> None:
    store = await disk.open()
    await store.commit(group((7, 0, writer(7).entry(0, b"damaged"))))
    await store.commit(group((7, 0, writer(7).entry(0, b"healed"))))
    assert await store.lookup([(7, 0)]) == {(7, 0): writer(7).entry(0, b"healed")}


@pytest.mark.parametrize(
    "mark",
    [
        LedgerMark(b"", 0),
        LedgerMark(b"t" * 16, 2**63, fenced=True),
        LedgerMark(b"t", 1, stored=True, deleted_us=2**62),
        LedgerMark(b"t", 1, fenced=True, stored=True),
    ],
)
def test_marks_survive_their_stored_form(mark: LedgerMark) -> None:
    assert decode_mark(encode_mark(mark)) == mark


def test_the_stored_form_of_a_mark_is_fixed() -> None:
    mark = LedgerMark(b"tk", 0x0102, fenced=True, stored=True, deleted_us=5)
    assert encode_mark(mark).hex() == "0103" + "0000000000000102" + "0000000000000005" + "746b"
