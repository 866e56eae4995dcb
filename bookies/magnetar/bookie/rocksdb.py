"""The entry store on RocksDB.

Column families:

| family | key (big-endian) | value |
|---|---|---|
| `entries` | ledger_id u64, entry_id u64 | the envelope, kept as a blob: compaction never rewrites it |
| `ledgers` | ledger_id u64 | the ledger's mark |
| `meta` | text | identity and limbo of the bookie |

Ledger 0 does not exist: in `entries` and in `ledgers` its key holds the number of the last group. Each group is one
write batch (not synced, never waiting: a stall raises), then one fsync of the write-ahead log. After that its number
goes to a 16-byte side file, which is synced once a second. Both families count, since one can reach the disk ahead of
the other: if the smaller number is below the side file's, groups are missing that were durable once, and the store
opens in `doubt`. Only a disk that loses what it had synced in the last second before a power failure is not seen.

Which call holds the GIL decides where it runs: writes and fsyncs in one thread, reads in two, compactions in a fourth.
"""

from __future__ import annotations

import asyncio
import os
import struct
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import rocksdict
from fastcrc import crc32

from magnetar.bookie.entry_store import (
    ENTRIES_PER_READ_MAX,
    Damaged,
    EntryQuery,
    EntryRead,
    GroupWrites,
    LedgerMark,
    LedgerState,
    StoreDamaged,
    StoreFailed,
    StoreStalled,
    StoreUnopenable,
    StoreUsage,
    decode_mark,
    encode_mark,
)
from magnetar.wire.envelope import verify

WAL_BYTES_MAX = 256 << 20
"""And not more than four memtables: what small families keep alive of it is deleted at one blow, while adds wait."""
LOGS_RECYCLED_MAX = 4
"""Each as large as a memtable. What is written over an old log's blocks is synced without the file system's journal."""
SIDE_SYNC_S = 1.0
FLUSH_BYTES_PER_S = 512 << 20
"""More than a bookie ever flushes and compacts: the limit is there for its steps."""
FLUSH_STEP_US = 250
"""A flush writes what the limit allows in this time, 128 KiB: the log's next fsync waits behind that, not behind 1 MiB.
"""
FLUSH_FAIRNESS = 10
"""RocksDB's own default."""
BLOB_BYTES_MIN = 4096
"""Smaller envelopes stand in the tables themselves: one of them in a blob file (a cursor's, that lives long) would keep
all that stood around it from vanishing with its ledgers.
"""
TABLE_BYTES = 1 << 20
"""Of keys and blob references: a small table makes a small step of `rewrite_oldest`."""
SMALL_FAMILY_BYTES = 1 << 20
OPEN_FILES_MAX = 128
MEMTABLES_MAX = 4
MEMTABLE_SHARE = 8
"""A memtable of entries gets one part in so many of the store's memory."""
READ_THREADS = 2
CHUNK_ENTRIES_MAX = 256
CHUNK_GROWTH = 4
REWRITE_SHARE = 0.25

_KEY = struct.Struct(">QQ")
_LEDGER_KEY = struct.Struct(">Q")
_NUMBER = struct.Struct(">Q")
_SIDE = struct.Struct(">QII")
_SIDE_MAGIC = 0x4D474E31
_ENTRIES_NUMBER_KEY = _KEY.pack(0, 0)
_LEDGERS_NUMBER_KEY = _LEDGER_KEY.pack(0)
_ENTRY_ID_MAX = (1 << 64) - 1
_INCOMPLETE = "Result incomplete"

T = TypeVar("T")


def entry_key(ledger_id: int, entry_id: int) -> bytes:
    return _KEY.pack(ledger_id, entry_id)


@dataclass(frozen=True, slots=True)
class _Opened:
    """The database with its families, and what was found in it."""

    db: Any
    entries: Any
    ledgers: Any
    meta: Any
    group: int
    """The highest number seen anywhere: the next group takes the one after it."""
    doubt: str
    records: dict[str, bytes]


class RocksEntryStore:
    """See the module. Made by `open`."""

    def __init__(self, opened: _Opened, side_file: _SideFile) -> None:
        self.doubt = opened.doubt
        self._path = Path(opened.db.path())
        self._db = opened.db
        self._entries = opened.entries
        self._ledgers = opened.ledgers
        self._entries_handle = opened.db.get_column_family_handle("entries")
        self._ledgers_handle = opened.db.get_column_family_handle("ledgers")
        self._meta_handle = opened.db.get_column_family_handle("meta")
        self._meta = opened.records
        self._group = opened.group
        self._side_file = side_file
        self._write_options = rocksdict.WriteOptions()
        self._write_options.sync = False
        self._write_options.no_slowdown = True
        self._committer = ThreadPoolExecutor(1, thread_name_prefix="bookie-commit")
        self._readers = ThreadPoolExecutor(READ_THREADS, thread_name_prefix="bookie-read")
        self._compactor = ThreadPoolExecutor(1, thread_name_prefix="bookie-compact")

    @classmethod
    async def open(cls, directory: Path, memory_bytes: int) -> RocksEntryStore:
        """Opens or creates the store in `directory`; the memory it holds stays below three quarters of `memory_bytes`.

        Raises StoreDamaged when it is there and cannot be trusted to be whole, StoreUnopenable for other reasons.
        """
        return await asyncio.to_thread(cls._open, directory, memory_bytes)

    @classmethod
    def _open(cls, directory: Path, memory_bytes: int) -> RocksEntryStore:
        try:
            directory.mkdir(parents=True, exist_ok=True)
            side_file = _SideFile.open(directory / "last-group")
        except OSError as error:
            raise StoreUnopenable(f"{error.strerror} path=`{error.filename}`") from error
        try:
            store = cls(_open_database(directory / "rocksdb", memory_bytes, side_file.number), side_file)
            for changed in (directory, directory.parent):
                _sync_directory(changed)
            return store
        except BaseException:
            side_file.close()
            raise

    @property
    def empty(self) -> bool:
        return self._group == 0

    @property
    def meta(self) -> Mapping[str, bytes]:
        return self._meta

    async def commit(self, writes: GroupWrites) -> None:
        number = self._group + 1
        await self._run(self._committer, self._commit, writes, number)
        self._group = number
        self._meta.update(writes.meta)
        self.doubt = ""

    def _commit(self, writes: GroupWrites, number: int) -> None:
        """Batch, fsync, side file, in this order: the side file never names a group that is not durable."""
        try:
            self._db.write(self._batch(writes, number), self._write_options)
        except Exception as error:
            if _INCOMPLETE in str(error):
                raise StoreStalled(str(error)) from error
            raise StoreFailed(f"write failed error=`{error}`") from error
        try:
            self._db.flush_wal(True)
            self._side_file.write(number)
        except Exception as error:
            raise StoreFailed(f"fsync failed error=`{error}`") from error

    def _batch(self, writes: GroupWrites, number: int) -> Any:
        batch = rocksdict.WriteBatch(raw_mode=True)
        entries, ledgers = self._entries_handle, self._ledgers_handle
        for ledger_id in writes.deleted:
            batch.delete_range(entry_key(ledger_id, 0), entry_key(ledger_id + 1, 0), entries)
        for ledger_id in writes.forgotten:
            batch.delete(_LEDGER_KEY.pack(ledger_id), ledgers)
        for ledger_id, entry_id, data in writes.entries:
            batch.put(_KEY.pack(ledger_id, entry_id), data, entries)
        for ledger_id, mark in writes.marks.items():
            batch.put(_LEDGER_KEY.pack(ledger_id), encode_mark(mark), ledgers)
        for name, value in writes.meta.items():
            batch.put(name.encode(), value, self._meta_handle)
        batch.put(_ENTRIES_NUMBER_KEY, _NUMBER.pack(number), entries)
        batch.put(_LEDGERS_NUMBER_KEY, _NUMBER.pack(number), ledgers)
        return batch

    async def load(self, ledger_ids: Sequence[int]) -> dict[int, LedgerState]:
        return await self._run(self._readers, self._load, ledger_ids)

    def _load(self, ledger_ids: Sequence[int]) -> dict[int, LedgerState]:
        return {ledger_id: self._load_one(ledger_id) for ledger_id in ledger_ids}

    def _load_one(self, ledger_id: int) -> LedgerState:
        mark = self._mark(ledger_id)
        if mark is None or (isinstance(mark, LedgerMark) and not mark.stored):
            return LedgerState(mark)
        try:
            iterator = self._entries.iter()
            iterator.seek_for_prev(entry_key(ledger_id, _ENTRY_ID_MAX))
            found = (iterator.key(), iterator.value()) if iterator.valid() else None
            iterator.status()
            if found is None or found[0][:8] != _LEDGER_KEY.pack(ledger_id):
                return LedgerState(mark)
            entry_id = _KEY.unpack(found[0])[1]
            return LedgerState(mark, entry_id, verify(found[1], ledger_id, entry_id).lac)
        except Exception as error:  # What rocksdict raises for damage is a bare Exception.
            return LedgerState(mark, tail_damage=f"last entry cannot be read error=`{error}`")

    def _mark(self, ledger_id: int) -> LedgerMark | Damaged | None:
        value = _get(self._ledgers, [_LEDGER_KEY.pack(ledger_id)])[0]
        return decode_mark(value) if isinstance(value, bytes) else value

    async def lookup(self, keys: Sequence[tuple[int, int]]) -> dict[tuple[int, int], bytes | Damaged | None]:
        return await self._run(self._readers, self._lookup, keys)

    def _lookup(self, keys: Sequence[tuple[int, int]]) -> dict[tuple[int, int], bytes | Damaged | None]:
        found: dict[tuple[int, int], bytes | Damaged | None] = {}
        for start in range(0, len(keys), CHUNK_ENTRIES_MAX):
            chunk = keys[start : start + CHUNK_ENTRIES_MAX]
            found.update(zip(chunk, _get(self._entries, [_KEY.pack(*key) for key in chunk]), strict=True))
        return found

    async def read(self, queries: Sequence[EntryQuery]) -> list[EntryRead]:
        return await self._run(self._readers, self._read, queries)

    def _read(self, queries: Sequence[EntryQuery]) -> list[EntryRead]:
        return [EntryRead(self._read_values(query), self._mark(query.ledger_id)) for query in queries]

    def _read_values(self, query: EntryQuery) -> list[bytes | Damaged | None]:
        """Reads in growing chunks: how many entries fit is known only from those that came.

        One entry may be as large as all that is asked for. A first chunk of 16 would read 16 MiB to answer 1.
        """
        values: list[bytes | Damaged | None] = []
        size_bytes = 0
        end = min(query.last, query.first + ENTRIES_PER_READ_MAX - 1) + 1
        chunk = 1
        while (start := query.first + len(values)) < end:
            keys = [_KEY.pack(query.ledger_id, entry_id) for entry_id in range(start, min(end, start + chunk))]
            for value in _get(self._entries, keys):
                size_bytes += len(value) if isinstance(value, bytes) else 0
                if values and size_bytes > query.max_bytes:
                    return values
                values.append(value)
            fitting = (query.max_bytes - size_bytes) * len(values) // size_bytes if size_bytes else CHUNK_ENTRIES_MAX
            chunk = max(1, min(fitting, chunk * CHUNK_GROWTH, CHUNK_ENTRIES_MAX))
        return values

    async def marks(self) -> list[tuple[int, LedgerMark]]:
        return await self._run(self._readers, self._marks)

    def _marks(self) -> list[tuple[int, LedgerMark]]:
        marks: list[tuple[int, LedgerMark]] = []
        try:
            iterator = self._ledgers.iter()
            iterator.seek(_LEDGER_KEY.pack(1))
            while iterator.valid():
                mark = decode_mark(iterator.value())
                if isinstance(mark, Damaged):
                    raise StoreDamaged(mark.message)
                marks.append((_LEDGER_KEY.unpack(iterator.key())[0], mark))
                iterator.next()
            iterator.status()
        except StoreDamaged:
            raise
        except Exception as error:
            raise StoreDamaged(f"the list of ledgers cannot be read error=`{error}`") from error
        return marks

    async def reclaim(self, ledger_ids: Sequence[int]) -> None:
        for first, last in _runs(sorted(ledger_ids)):
            await self._run(self._compactor, self._compact, entry_key(first, 0), entry_key(last + 1, 0))

    async def rewrite_oldest(self, bytes_per_s: int) -> None:
        """One step a table, each followed by a pause, so that the average stays below `bytes_per_s`."""
        files = self._entries.property_int_value("rocksdb.num-blob-files") or 1
        # The share is rounded down to whole files: it is never less than one of them.
        await self._run(self._compactor, self._set_age_cutoff, min(1.0, max(REWRITE_SHARE, 1.01 / files)))
        try:
            for first, last in await self._run(self._compactor, self._table_ranges):
                started = time.monotonic()
                before = _blob_sizes(self._path)
                await self._run(self._compactor, self._compact, first, last)
                rewritten_bytes = sum(size for name, size in _blob_sizes(self._path).items() if name not in before)
                await asyncio.sleep(max(0.0, rewritten_bytes / bytes_per_s - (time.monotonic() - started)))
        finally:
            await self._run(self._compactor, self._set_age_cutoff, 0.0)

    def _set_age_cutoff(self, cutoff: float) -> None:
        self._entries.set_options({"blob_garbage_collection_age_cutoff": f"{cutoff:.6f}"})

    def _table_ranges(self) -> list[tuple[bytes, bytes]]:
        """First and last key of each table of entries, lowest keys first."""
        tables = [table for table in self._entries.live_files() if len(table["start_key"]) == _KEY.size]
        return sorted((bytes(table["start_key"]), bytes(table["end_key"])) for table in tables)

    def _compact(self, first: bytes, last: bytes) -> None:
        options = rocksdict.CompactOptions()
        options.set_bottommost_level_compaction(rocksdict.BottommostLevelCompaction.force())
        options.set_exclusive_manual_compaction(False)
        self._entries.compact_range(first, last, options)

    def usage(self) -> StoreUsage:
        blobs = self._entries.property_int_value("rocksdb.live-blob-file-size") or 0
        tables = self._entries.property_int_value("rocksdb.total-sst-files-size") or 0
        garbage = self._entries.property_int_value("rocksdb.live-blob-file-garbage-size") or 0
        return StoreUsage(blobs + tables, garbage)

    async def close(self) -> None:
        """Waits for what runs, then closes. Everything committed is durable already."""
        await asyncio.to_thread(self._close)

    def _close(self) -> None:
        for executor in (self._committer, self._readers, self._compactor):
            executor.shutdown(wait=True, cancel_futures=True)
        # The lock goes with the last reference to a family, not with close().
        del self._entries, self._ledgers, self._entries_handle, self._ledgers_handle, self._meta_handle
        self._db.close()
        del self._db
        self._side_file.close()

    async def _run(self, executor: ThreadPoolExecutor, function: Callable[..., T], *arguments: object) -> T:
        return await asyncio.get_running_loop().run_in_executor(executor, function, *arguments)


class _SideFile:
    """`group u64 | magic u32 | crc32c u32`, big-endian: the last group that was durable, told by another file."""

    def __init__(self, descriptor: int, number: int | None) -> None:
        self.number = number
        """What it said when it was opened; None = nothing that can be trusted."""
        self._descriptor = descriptor
        self._synced_at = 0.0

    @classmethod
    def open(cls, path: Path) -> _SideFile:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        data = os.pread(descriptor, _SIDE.size, 0)
        if not data:
            _sync_directory(path.parent)
        return cls(descriptor, cls._parse(data))

    @staticmethod
    def _parse(data: bytes) -> int | None:
        if len(data) != _SIDE.size:
            return None
        number, magic, checksum = _SIDE.unpack(data)
        sound = magic == _SIDE_MAGIC and checksum == crc32.iscsi(data[:12])
        return number if sound else None

    def write(self, number: int) -> None:
        data = struct.pack(">QI", number, _SIDE_MAGIC)
        os.pwrite(self._descriptor, data + struct.pack(">I", crc32.iscsi(data)), 0)
        if time.monotonic() - self._synced_at >= SIDE_SYNC_S:
            os.fdatasync(self._descriptor)
            self._synced_at = time.monotonic()

    def close(self) -> None:
        os.close(self._descriptor)


def _sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _open_database(path: Path, memory_bytes: int, side_number: int | None) -> _Opened:
    try:
        cache = rocksdict.Cache(memory_bytes // 8)
        families = {
            "entries": _entries_options(memory_bytes, cache),
            "ledgers": _family_options(SMALL_FAMILY_BYTES, cache),
            "meta": _family_options(SMALL_FAMILY_BYTES, cache),
        }
        db = rocksdict.Rdict(str(path), _database_options(path.parent, memory_bytes), column_families=families)
        opened = {name: db.get_column_family(name) for name in families}
        # What the log gave back becomes durable now: a killed process may have written and never synced it.
        for family in opened.values():
            family.flush(True)
        entries_number = _stored_number(opened["entries"], _ENTRIES_NUMBER_KEY)
        ledgers_number = _stored_number(opened["ledgers"], _LEDGERS_NUMBER_KEY)
        records = _records(opened["meta"])
    except Exception as error:
        raise _opening_error(path, error) from error
    known = (entries_number, ledgers_number, side_number or 0)
    doubt = _doubt(entries_number, ledgers_number, side_number)
    return _Opened(db, opened["entries"], opened["ledgers"], opened["meta"], max(known), doubt, records)


def _doubt(entries_number: int, ledgers_number: int, side_number: int | None) -> str:
    found = min(entries_number, ledgers_number)
    facts = f"entries=`{entries_number}` ledgers=`{ledgers_number}` side_file=`{side_number}`"
    if side_number is None:
        return f"the side file is not there or damaged {facts}" if max(entries_number, ledgers_number) else ""
    return f"groups are missing that were durable {facts}" if found < side_number else ""


def _stored_number(family: Any, key: bytes) -> int:
    value = family.get([key])[0]
    return 0 if value is None else int(_NUMBER.unpack(value)[0])


def _records(meta: Any) -> dict[str, bytes]:
    iterator = meta.iter()
    iterator.seek_to_first()
    records: dict[str, bytes] = {}
    while iterator.valid():
        records[iterator.key().decode()] = iterator.value()
        iterator.next()
    iterator.status()
    return records


def _opening_error(path: Path, error: Exception) -> StoreDamaged | StoreUnopenable:
    """Damage is what no other cause explains away: a full disk or a missing permission must not cost anyone data."""
    text = str(error)
    if "Corruption" in text or "No such file or directory" in text:
        return StoreDamaged(f"{text} path=`{path}`")
    return StoreUnopenable(f"{text} path=`{path}`")


def _has_direct_io(directory: Path) -> bool:
    """The file system of the directory writes around the page cache."""
    direct = getattr(os, "O_DIRECT", 0)
    probe = directory / "direct-io"
    try:
        os.close(os.open(probe, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | direct, 0o644))
    except OSError:
        return False
    finally:
        probe.unlink(missing_ok=True)
    return direct != 0


def _database_options(path: Path, memory_bytes: int) -> Any:
    options = rocksdict.Options(raw_mode=True)
    options.create_if_missing(True)
    options.create_missing_column_families(True)
    # Where a recycled log ends an older one goes on: RocksDB cannot tell a torn tail from a damaged middle. This mode
    # drops everything from there on and says nothing; the group numbers tell what was durable and is gone.
    options.set_wal_recovery_mode(rocksdict.DBRecoveryMode.point_in_time())
    options.set_recycle_log_file_num(LOGS_RECYCLED_MAX)
    options.set_paranoid_checks(True)
    options.set_max_total_wal_size(min(WAL_BYTES_MAX, memory_bytes // MEMTABLE_SHARE * MEMTABLES_MAX))
    options.set_db_write_buffer_size(memory_bytes // 2)
    options.set_max_background_jobs(2)
    options.set_max_open_files(OPEN_FILES_MAX)
    # What is flushed is read late or never: through the page cache it costs a copy, and pages that others could use.
    options.set_use_direct_io_for_flush_and_compaction(_has_direct_io(path))
    # Ledgers are read from their first entry on: the kernel may read ahead.
    options.set_advise_random_on_open(False)
    options.set_ratelimiter(FLUSH_BYTES_PER_S, FLUSH_STEP_US, FLUSH_FAIRNESS)
    # Both smooth flushes that go through the page cache: without them a memtable's worth of dirty pages stands before
    # the log's next fsync.
    options.set_bytes_per_sync(1 << 20)
    options.set_wal_bytes_per_sync(512 << 10)
    options.set_skip_stats_update_on_db_open(True)
    options.set_stats_dump_period_sec(0)
    options.set_keep_log_file_num(3)
    options.set_max_log_file_size(4 << 20)
    return options


def _family_options(memtable_bytes: int, cache: Any) -> Any:
    options = rocksdict.Options(raw_mode=True)
    options.set_compression_type(rocksdict.DBCompressionType.none())
    options.set_write_buffer_size(memtable_bytes)
    options.set_max_write_buffer_number(MEMTABLES_MAX)
    tables = rocksdict.BlockBasedOptions()
    tables.set_block_cache(cache)
    tables.set_cache_index_and_filter_blocks(True)
    tables.set_bloom_filter(10, False)
    options.set_block_based_table_factory(tables)
    return options


def _entries_options(memory_bytes: int, cache: Any) -> Any:
    options = _family_options(memory_bytes // MEMTABLE_SHARE, cache)
    options.set_target_file_size_base(TABLE_BYTES)
    options.set_enable_blob_files(True)
    options.set_min_blob_size(BLOB_BYTES_MIN)
    options.set_blob_file_size(256 << 20)
    options.set_blob_compression_type(rocksdict.DBCompressionType.none())
    options.set_enable_blob_gc(True)
    options.set_blob_gc_age_cutoff(0.0)
    return options


def _get(family: Any, keys: list[bytes]) -> list[bytes | Damaged | None]:
    """A list get releases the GIL, and fails as a whole for one damaged value: then each is asked for by itself."""
    try:
        values: list[bytes | Damaged | None] = family.get(keys)
        return values
    except Exception as error:
        if len(keys) == 1:
            return [Damaged(f"value cannot be read error=`{error}`")]
    return [_get(family, [key])[0] for key in keys]


def _blob_sizes(path: Path) -> dict[str, int]:
    """Those of new flushes are in it too, which makes the rewriting slower, never faster."""
    sizes: dict[str, int] = {}
    for file in path.glob("*.blob"):
        with suppress(FileNotFoundError):
            sizes[file.name] = file.stat().st_size
    return sizes


def _runs(numbers: Sequence[int]) -> list[tuple[int, int]]:
    """Maximal runs of consecutive numbers, as (first, last)."""
    runs: list[tuple[int, int]] = []
    for value in numbers:
        if runs and runs[-1][1] + 1 == value:
            runs[-1] = (runs[-1][0], value)
        else:
            runs.append((value, value))
    return runs
