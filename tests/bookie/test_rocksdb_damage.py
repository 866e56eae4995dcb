"""A damaged disk is seen: the store refuses to open, opens in doubt, or answers "unknown", and never "not there"."""

from __future__ import annotations

import asyncio
import os
import shutil
import struct
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from fastcrc import crc32

from magnetar.bookie.entry_store import (
    Damaged,
    EntryQuery,
    GroupWrites,
    LedgerMark,
    StoreDamaged,
    StoreFailed,
    StoreStalled,
    StoreUnopenable,
)
from magnetar.bookie.judge import verified
from magnetar.bookie.rocksdb import RocksEntryStore

MEMORY_BYTES = 32 << 20
GROUPS = 60
INODES = 100
PAYLOAD = b"x" * 5000
"""Large enough to stand in a blob file."""
MARK = LedgerMark(b"t" * 16, 1, stored=True)


async def open_store(directory: Path) -> RocksEntryStore:
    return await RocksEntryStore.open(directory, MEMORY_BYTES)


def flip(path: Path, position: int) -> None:
    with path.open("r+b") as file:
        file.seek(position)
        byte = file.read(1)[0]
        file.seek(position)
        file.write(bytes([byte ^ 0x04]))


def only(directory: Path, pattern: str) -> Path:
    """The largest file of the kind."""
    return max((directory / "rocksdb").glob(pattern), key=lambda path: path.stat().st_size)


@pytest.fixture
async def crashed(tmp_path: Path, writer: Any) -> Path:
    """The directory of a store that died with GROUPS groups synced and all of them in the log only."""
    directory = tmp_path / "store"
    store = await open_store(directory)
    for entry_id in range(GROUPS):
        entries = [(7, entry_id, writer(7).entry(entry_id, PAYLOAD))]
        await store.commit(GroupWrites(entries=entries, marks={7: MARK}))
    copy = tmp_path / "crashed"
    shutil.copytree(directory, copy)
    await store.close()
    return copy


async def entries_found(store: RocksEntryStore) -> int:
    [read] = await store.read([EntryQuery(7, 0, GROUPS - 1, 1 << 20)])
    return sum(value is not None for value in read.values)


async def opens_as(directory: Path) -> str:
    """How the store takes what was done to it. Fails if it opens and misses something without saying so."""
    try:
        store = await open_store(directory)
    except StoreDamaged:
        return "refused"
    try:
        if store.doubt:
            return "doubt"
        assert await entries_found(store) == GROUPS
        return "whole"
    finally:
        await store.close()


async def test_an_unclean_stop_alone_is_no_doubt(crashed: Path) -> None:
    assert await opens_as(crashed) == "whole"
    assert await opens_as(crashed) == "whole"


@pytest.mark.parametrize("percent", range(3, 100, 8))
async def test_a_flipped_bit_of_the_log_is_seen(crashed: Path, percent: int) -> None:
    log = only(crashed, "*.log")
    flip(log, log.stat().st_size * percent // 100)
    assert await opens_as(crashed) in ("refused", "doubt")


@pytest.mark.parametrize("percent", [0, 5, 35, 70, 99])
async def test_a_truncated_log_is_seen(crashed: Path, percent: int) -> None:
    log = only(crashed, "*.log")
    with log.open("r+b") as file:
        file.truncate(log.stat().st_size * percent // 100)
    assert await opens_as(crashed) in ("refused", "doubt")


@pytest.fixture
async def recycled(tmp_path: Path, writer: Any) -> Path:
    """As `crashed`, but its log stands where an older one stood, and ends in the middle of that one."""
    directory = tmp_path / "store"
    store = await open_store(directory)
    inodes: dict[Path, int] = {}
    while not (inodes and is_recycled(max(inodes), inodes)):
        await committed(store, [(8, len(inodes), writer(8).entry(0, bytes(500_000)))])
        inodes |= {log: log.stat().st_ino for log in (directory / "rocksdb").glob("*.log")}
    for entry_id in range(GROUPS):
        await committed(store, [(7, entry_id, writer(7).entry(entry_id, PAYLOAD))])
    copy = tmp_path / "crashed"
    shutil.copytree(directory, copy)
    await store.close()
    return copy


def is_recycled(log: Path, inodes: Mapping[Path, int]) -> bool:
    return list(inodes.values()).count(inodes[log]) > 1


async def committed(store: RocksEntryStore, entries: list[tuple[int, int, bytes]]) -> None:
    while True:
        try:
            return await store.commit(GroupWrites(entries=entries, marks={entries[0][0]: MARK}))
        except StoreStalled:
            await asyncio.sleep(0.01)


def place_of(directory: Path, entry: bytes) -> tuple[Path, int]:
    """The log that an entry stands in, and where."""
    for log in (directory / "rocksdb").glob("*.log"):
        position = log.read_bytes().find(entry[:200])
        if position >= 0:
            return log, position
    raise AssertionError("no log has it")


async def test_what_stood_in_a_recycled_log_before_does_not_come_back(recycled: Path, writer: Any) -> None:
    log, position = place_of(recycled, writer(7).entry(GROUPS - 1, PAYLOAD))
    assert log.stat().st_size > position + 500_000, "older records follow"
    assert await opens_as(recycled) == "whole"
    assert await opens_as(recycled) == "whole"


@pytest.mark.parametrize("harm", ["flipped", "zeroed", "truncated"])
@pytest.mark.parametrize("entry_id", [0, 1, 17, GROUPS // 2, GROUPS - 1])
async def test_damage_of_a_recycled_log_is_seen(recycled: Path, writer: Any, entry_id: int, harm: str) -> None:
    log, position = place_of(recycled, writer(7).entry(entry_id, PAYLOAD))
    if harm == "flipped":
        flip(log, position + 1000)
    elif harm == "zeroed":
        with log.open("r+b") as file:
            file.seek(position + 1000)
            file.write(bytes(100_000))
    else:
        with log.open("r+b") as file:
            file.truncate(position + 1000)
    assert await opens_as(recycled) in ("refused", "doubt")


async def test_a_group_that_was_cut_off_in_a_recycled_log_is_not_there_and_no_doubt(
    recycled: Path, writer: Any
) -> None:
    """The power fails while a group is written that was never synced: the side file does not know it yet."""
    log, position = place_of(recycled, writer(7).entry(GROUPS - 1, PAYLOAD))
    side_file = recycled / "last-group"
    number = int.from_bytes(side_file.read_bytes()[:8], "big") - 1
    data = struct.pack(">QI", number, 0x4D474E31)
    side_file.write_bytes(data + struct.pack(">I", crc32.iscsi(data)))
    flip(log, position + 1000)
    store = await open_store(recycled)
    assert store.doubt == ""
    assert await entries_found(store) == GROUPS - 1
    await store.close()


async def test_the_side_file_is_synced_once_a_second(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[int] = []
    monkeypatch.setattr("magnetar.bookie.rocksdb.os.fdatasync", synced.append)
    store = await open_store(tmp_path)
    for _ in range(20):
        await store.commit(GroupWrites())
    assert len(synced) == 1
    monkeypatch.setattr("magnetar.bookie.rocksdb.SIDE_SYNC_S", 0.0)
    await store.commit(GroupWrites())
    assert len(synced) == 2
    await store.close()


async def test_a_zeroed_tail_of_the_log_is_seen(crashed: Path) -> None:
    log = only(crashed, "*.log")
    size = log.stat().st_size
    with log.open("r+b") as file:
        file.seek(size * 3 // 4)
        file.write(bytes(size - size * 3 // 4))
    assert await opens_as(crashed) in ("refused", "doubt")


async def test_a_lost_log_is_seen(crashed: Path) -> None:
    for log in (crashed / "rocksdb").glob("*.log"):
        log.unlink()
    assert await opens_as(crashed) in ("refused", "doubt")


@pytest.mark.parametrize("ahead", ["_entries", "_ledgers"])
async def test_a_lost_log_is_seen_when_one_family_reached_the_disk_ahead_of_the_other(
    tmp_path: Path, writer: Any, ahead: str
) -> None:
    directory = tmp_path / "store"
    store = await open_store(directory)
    for entry_id in range(GROUPS):
        await store.commit(GroupWrites(entries=[(7, entry_id, writer(7).entry(entry_id))], marks={7: MARK}))
    getattr(store, ahead).flush(True)
    shutil.copytree(directory, tmp_path / "crashed")
    await store.close()
    for log in (tmp_path / "crashed" / "rocksdb").glob("*.log"):
        with log.open("r+b") as file:
            file.truncate(0)
    assert await opens_as(tmp_path / "crashed") in ("refused", "doubt")


@pytest.mark.parametrize("harm", ["gone", "short", "garbage"])
async def test_a_lost_or_damaged_side_file_is_doubt(crashed: Path, harm: str) -> None:
    side_file = crashed / "last-group"
    if harm == "gone":
        side_file.unlink()
    elif harm == "short":
        side_file.write_bytes(side_file.read_bytes()[:15])
    else:
        flip(side_file, 7)
    assert await opens_as(crashed) == "doubt"


async def test_a_side_file_that_is_behind_is_no_doubt(crashed: Path, tmp_path: Path) -> None:
    """It is not synced: after a power failure an older one may come back."""
    store = await open_store(tmp_path / "other")
    await store.commit(GroupWrites())
    shutil.copy(tmp_path / "other" / "last-group", crashed / "last-group")
    await store.close()
    assert await opens_as(crashed) == "whole"


async def test_doubt_stays_until_a_group_writes_down_what_follows_from_it(crashed: Path) -> None:
    only(crashed, "*.log").unlink()
    for _ in range(2):
        store = await open_store(crashed)
        assert store.doubt
        await store.close()
    store = await open_store(crashed)
    await store.commit(GroupWrites(meta={"limbo_floor": b"100"}))
    assert store.doubt == ""
    await store.close()
    store = await open_store(crashed)
    assert store.doubt == ""
    assert store.meta["limbo_floor"] == b"100"
    await store.close()


async def test_a_lost_table_is_seen(crashed: Path) -> None:
    assert await opens_as(crashed) == "whole"
    only(crashed, "*.sst").unlink()
    assert await opens_as(crashed) in ("refused", "doubt")


async def test_a_store_without_its_manifest_pointer_is_not_taken_for_a_new_one(crashed: Path) -> None:
    (crashed / "rocksdb" / "CURRENT").unlink()
    assert await opens_as(crashed) in ("refused", "doubt")


async def flushed(directory: Path) -> None:
    """Everything goes from the log to tables and blob files."""
    store = await open_store(directory)
    await store.close()


async def damaged_answers(directory: Path, writer: Any) -> tuple[int, list[bytes | Damaged | None]]:
    """How many entries read as damaged; fails if one is missing or has other bytes."""
    store = await open_store(directory)
    try:
        [read] = await store.read([EntryQuery(7, 0, GROUPS - 1, 1 << 20)])
        state = (await store.load([7]))[7]
        found = await store.lookup([(7, entry_id) for entry_id in range(GROUPS)])
    finally:
        await store.close()
    values = [verified(value, 7, entry_id) for entry_id, value in enumerate(read.values)]
    assert len(values) == GROUPS
    for entry_id, value in enumerate(values):
        assert isinstance(value, Damaged) or value == writer(7).entry(entry_id, PAYLOAD), entry_id
        assert isinstance(value, Damaged) == isinstance(verified(found[7, entry_id], 7, entry_id), Damaged)
    assert state.tail_damage or state.last_entry == GROUPS - 1
    return sum(isinstance(value, Damaged) for value in values), values


@pytest.mark.parametrize("percent", range(1, 100, 9))
async def test_a_flipped_bit_of_a_blob_file_reads_as_damaged_never_as_absent(
    crashed: Path, writer: Any, percent: int
) -> None:
    await flushed(crashed)
    blobs = only(crashed, "*.blob")
    flip(blobs, blobs.stat().st_size * percent // 100)
    count, _ = await damaged_answers(crashed, writer)
    assert count <= 1


async def test_a_truncated_blob_file_reads_as_damaged_never_as_absent(crashed: Path, writer: Any) -> None:
    await flushed(crashed)
    blobs = only(crashed, "*.blob")
    with blobs.open("r+b") as file:
        file.truncate(blobs.stat().st_size // 2)
    try:
        count, _ = await damaged_answers(crashed, writer)
    except StoreDamaged:
        return
    assert count >= GROUPS // 2 - 1


async def test_a_damaged_table_reads_as_damaged_or_is_refused(crashed: Path, writer: Any) -> None:
    await flushed(crashed)
    for table in (crashed / "rocksdb").glob("*.sst"):
        flip(table, 20)
    try:
        store = await open_store(crashed)
    except StoreDamaged:
        return
    try:
        [read] = await store.read([EntryQuery(7, 0, GROUPS - 1, 1 << 20)])
        assert None not in read.values
        with pytest.raises(StoreDamaged):
            await store.marks()
    finally:
        await store.close()


async def test_a_list_of_ledgers_with_a_damaged_block_is_refused_not_cut(tmp_path: Path) -> None:
    """An iterator over a damaged table ends early and says nothing unless it is asked."""
    marks = {ledger_id: LedgerMark(b"token-%010d" % ledger_id, 1, stored=True) for ledger_id in range(1, 2001)}
    store = await open_store(tmp_path)
    await store.commit(GroupWrites(marks=marks))
    await store.close()
    [table] = [path for path in (tmp_path / "rocksdb").glob("*.sst") if marks[1500].token in path.read_bytes()]
    flip(table, table.read_bytes().index(marks[1500].token))
    store = await open_store(tmp_path)
    with pytest.raises(StoreDamaged):
        await store.marks()
    states = await store.load([5, 1500])
    assert states[5].mark == marks[5]
    assert isinstance(states[1500].mark, Damaged)
    await store.close()


async def test_the_last_entry_being_damaged_leaves_its_ledger_without_a_known_end(crashed: Path, writer: Any) -> None:
    await flushed(crashed)
    blobs = only(crashed, "*.blob")
    data = blobs.read_bytes()
    position = data.rindex(writer(7).entry(GROUPS - 1, PAYLOAD))
    flip(blobs, position + 50)
    store = await open_store(crashed)
    state = (await store.load([7]))[7]
    await store.close()
    assert state.tail_damage


async def test_a_directory_without_permission_is_not_called_damaged(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(StoreUnopenable):
        await open_store(tmp_path / "file")


async def test_a_store_that_cannot_write_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = await open_store(tmp_path / "store")

    class Broken:
        def write(self, *_: object) -> None:
            raise Exception("IO error: No space left on device")

    sound = store._db
    monkeypatch.setattr(store, "_db", Broken())
    with pytest.raises(StoreFailed):
        await store.commit(GroupWrites())
    monkeypatch.setattr(store, "_db", sound)
    await store.close()


@pytest.fixture
def few_inodes(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own that has room for few files."""
    if os.geteuid():
        pytest.skip("mounting needs root")
    mounted = tmp_path / "few"
    mounted.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size=256m,nr_inodes={INODES}", "tmpfs", str(mounted)], check=True)
    try:
        yield mounted
    finally:
        subprocess.run(["umount", "--lazy", str(mounted)], check=True)


async def test_a_file_system_without_inodes_fails_the_store_and_what_was_stored_is_there_when_it_has_some(
    few_inodes: Path, tmp_path: Path, writer: Any
) -> None:
    store = await open_store(few_inodes / "store")
    fillers = few_inodes / "fillers"
    fillers.mkdir()
    with suppress(OSError):
        for number in range(INODES):
            (fillers / str(number)).touch()
    payload = b"x" * (1 << 20)
    stored = await committed_until_it_fails(store, [writer(7).entry(number, payload) for number in range(200)])
    crashed = shutil.copytree(few_inodes / "store", tmp_path / "crashed")
    with pytest.raises(Exception, match="No space left"):
        await store.close()

    store = await open_store(crashed)
    assert not store.doubt
    for entry_id in range(stored):
        [read] = await store.read([EntryQuery(7, entry_id, entry_id, 2 << 20)])
        assert read.values[0] == writer(7).entry(entry_id, payload)
    await store.close()


async def committed_until_it_fails(store: RocksEntryStore, entries: Sequence[bytes]) -> int:
    for entry_id, entry in enumerate(entries):
        try:
            await store.commit(GroupWrites(entries=[(7, entry_id, entry)], marks={7: MARK}))
        except StoreFailed:
            return entry_id
    raise AssertionError("it never failed")


async def test_deleted_ledgers_give_their_space_back_and_the_living_lose_nothing(tmp_path: Path, writer: Any) -> None:
    directory = tmp_path / "store"
    store = await open_store(directory)
    ledgers = range(1, 21)
    payload = b"x" * 8192
    for entry_id in range(60):
        entries = [(i, entry_id, writer(i).entry(entry_id, payload)) for i in ledgers]
        await store.commit(GroupWrites(entries=entries, marks=dict.fromkeys(ledgers, MARK)))
    deleted = [i for i in ledgers if i != 10]
    await store.commit(GroupWrites(deleted=deleted))
    await store.reclaim(deleted)
    assert store.usage().garbage_bytes > store.usage().stored_bytes // 2
    for _ in range(8):
        await store.rewrite_oldest(1 << 40)
    assert store.usage().stored_bytes < 2 * 60 * 8192
    [read] = await store.read([EntryQuery(10, 0, 59, 1 << 20)])
    assert read.values == [writer(10).entry(e, payload) for e in range(60)]
    await store.close()
    assert sum(path.stat().st_size for path in (directory / "rocksdb").glob("*.blob")) < 2 * 60 * 8192


async def test_small_entries_that_live_on_keep_no_file_of_deleted_ledgers(tmp_path: Path, writer: Any) -> None:
    """A cursor's ledger has a small entry now and then, between the large ones of a log."""
    directory = tmp_path / "store"
    store = await open_store(directory)
    for entry_id in range(60):
        large = [(i, entry_id, writer(i).entry(entry_id, b"x" * 8192)) for i in range(1, 20)]
        small = [(20, entry_id, writer(20).entry(entry_id, b"x" * 600))]
        await store.commit(GroupWrites(entries=large + small, marks=dict.fromkeys(range(1, 21), MARK)))
    deleted = list(range(1, 20))
    await store.commit(GroupWrites(deleted=deleted))
    await store.reclaim(deleted)
    [read] = await store.read([EntryQuery(20, 0, 59, 1 << 20)])
    assert len(read.values) == 60
    await store.close()
    assert sum(path.stat().st_size for path in (directory / "rocksdb").glob("*.blob")) == 0
