"""A small cluster in one process: real bookies over entry stores in memory, and a metadata store that loses answers."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from random import Random
from types import TracebackType
from typing import Self, TypeVar

from magnetar.bookie.bookie import Bookie
from magnetar.bookie.disk import DiskUsage
from magnetar.bookie.memory import MemoryEntryStore
from magnetar.ledger.bookie_directory import BookieDirectory
from magnetar.ledger.bookie_rpc import (
    AddGroup,
    AddResult,
    AddStatus,
    EntryAnswer,
    EntryOutcome,
    LacQuery,
    LacResult,
    ReadGroup,
    ReadResult,
)
from magnetar.ledger.client import LedgerClient, LedgerSettings, RecoverySuperseded
from magnetar.managed_log.cache import ReadCache, StoredEntry
from magnetar.managed_log.log import LogSettings, ManagedLog, PendingBatch, Released
from magnetar.metadata.ids import IdBlocks
from magnetar.metadata.keyspace import Keyspace
from magnetar.metadata.memory import MemoryStore
from magnetar.metadata.records import LedgerRecord, LedgerState, Owner, ShardRecord, ShardState
from magnetar.metadata.shards import ShardMetadata, shard_creation_operations
from magnetar.metadata.store import (
    Compare,
    Delete,
    KeyValue,
    Lease,
    MetadataUnavailable,
    Operation,
    Put,
    RangeResult,
    TxnResult,
    Watch,
)
from magnetar.node.settings import BookieSettings
from magnetar.wire.batch import Columns, decode_batch, encode_batch

SHARD_ID = 1
T = TypeVar("T")
START_US = 1_700_000_000_000_000


class Clock:
    """Microseconds; each look is a microsecond later, so that order shows."""

    def __init__(self) -> None:
        self.now = START_US

    def __call__(self) -> int:
        self.now += 1
        return self.now


class FaultyStore:
    """A metadata store behind a network. Set `silent`, or let single transactions of the shard meet a fault.

    fault(operations) is asked about each transaction: "" = deliver, "request" = lose it, "reply" = apply it and lose
    the answer, "crash before" and "crash after" = its sender never hears anything again.
    """

    def __init__(self) -> None:
        self.inner = MemoryStore()
        self.silent = False
        self.fault: Callable[[Sequence[Operation]], str] = lambda _: ""
        self.transactions: list[tuple[Operation, ...]] = []
        self.crashed = asyncio.Event()

    async def _reach(self) -> None:
        await asyncio.sleep(0)
        if self.silent:
            raise MetadataUnavailable("silent")

    async def get(self, key: str) -> KeyValue | None:
        await self._reach()
        return await self.inner.get(key)

    async def range(self, prefix: str, *, after: str = "", limit: int = 0) -> RangeResult:
        await self._reach()
        return await self.inner.range(prefix, after=after, limit=limit)

    async def txn(self, compares: Sequence[Compare], operations: Sequence[Operation]) -> TxnResult:
        await self._reach()
        fault = self.fault(operations)
        if fault == "request":
            raise MetadataUnavailable("request lost")
        if fault == "crash before":
            await self._crash()
        self.transactions.append(tuple(operations))
        result = await self.inner.txn(compares, operations)
        if fault == "crash after":
            await self._crash()
        if fault == "reply":
            raise MetadataUnavailable("reply lost")
        return result

    async def _crash(self) -> None:
        self.crashed.set()
        await asyncio.Event().wait()

    def watch(self, prefix: str, *, from_revision: int) -> Watch:
        return self.inner.watch(prefix, from_revision=from_revision)

    async def grant_lease(self, ttl_s: float) -> Lease:
        return await self.inner.grant_lease(ttl_s)

    async def close(self) -> None:
        await self.inner.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()


class Wire:
    """The connection to a bookie; while the cluster has it `cut` nothing gets through."""

    def __init__(self, cluster: Cluster, bookie_id: str) -> None:
        self.bookie_id = bookie_id
        self._cut = cluster.cut
        self._bookie = cluster.bookies[bookie_id].local()

    def add(self, group: AddGroup) -> asyncio.Future[AddResult]:
        return self._dead(AddResult(AddStatus.NO_ANSWER, "cut")) or self._bookie.add(group)

    def read(self, group: ReadGroup) -> asyncio.Future[ReadResult]:
        return self._dead(ReadResult((EntryAnswer(EntryOutcome.UNKNOWN),), "cut")) or self._bookie.read(group)

    def read_lac(self, query: LacQuery) -> asyncio.Future[LacResult]:
        return self._dead(LacResult(EntryOutcome.UNKNOWN, message="cut")) or self._bookie.read_lac(query)

    def _dead(self, answer: T) -> asyncio.Future[T] | None:
        if self.bookie_id not in self._cut:
            return None
        future: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        future.set_result(answer)
        return future


class Cluster:
    """Bookies, a shard, and brokers that own it one after the other."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.store = FaultyStore()
        self.keyspace = Keyspace("test")
        self.clock = Clock()
        self.bookies: dict[str, Bookie] = {}
        self.stores: dict[str, MemoryEntryStore] = {}
        self.cut: set[str] = set()
        self.directory = BookieDirectory(self.store, self.keyspace, lambda found: Wire(self, found.bookie_id))
        self.logs: list[ManagedLog] = []
        self._numbers = itertools.count()

    async def start(self, bookies: int = 3) -> None:
        for number in range(bookies):
            await self.start_bookie(f"bookie{number}")
        await self.directory.start()
        record = ShardRecord(SHARD_ID, "t/n/x", ShardState.OPEN, 0, None, 0, 65535, created_us=START_US)
        await self.store.txn(*shard_creation_operations(self.keyspace, record))

    async def start_bookie(self, bookie_id: str) -> None:
        entries = self.stores.setdefault(bookie_id, MemoryEntryStore())

        async def open_store(directory: Path, memory_bytes: int) -> MemoryEntryStore:
            return entries

        settings = BookieSettings(id=bookie_id, data_dir=self.path / bookie_id, gc_interval_s=3600)
        self.bookies[bookie_id] = await Bookie.start(
            settings,
            self.store.inner,
            self.keyspace,
            serve=False,
            gauge=lambda: DiskUsage(1 << 40, 1 << 41),
            open_store=open_store,
        )

    async def stop(self) -> None:
        for opened in self.logs:
            opened.abandon()
        await self.directory.stop()
        for bookie in self.bookies.values():
            await bookie.stop()
        await self.store.close()

    # --- owners ---

    async def register(self, broker_id: str) -> Owner:
        """A new session of the broker; an older one is over."""
        key = self.keyspace.broker(broker_id)
        await self.store.inner.txn([], [Delete(key)])
        await self.store.inner.txn([], [Put(key, b"")])
        found = await self.store.inner.get(key)
        assert found is not None
        return Owner(broker_id, found.create_revision)

    async def vanish(self, broker_id: str) -> None:
        """The broker's session is over. What it has open goes on, as that of a broker cut off would."""
        await self.store.inner.txn([], [Delete(self.keyspace.broker(broker_id))])

    async def claim(self, broker_id: str) -> ShardMetadata:
        metadata = await ShardMetadata.load(self.store, self.keyspace, SHARD_ID, sleep=at_once)
        await metadata.claim(await self.register(broker_id))
        return metadata

    async def open(
        self,
        broker_id: str = "broker0",
        settings: LogSettings | None = None,
        cache_bytes: int = 64 << 20,
        *,
        with_producers: bool = True,
    ) -> OpenLog:
        metadata = await self.claim(broker_id)
        opened = OpenLog(broker_id, self)
        ledgers = self.client()
        ids = IdBlocks(self.store, self.keyspace, sleep=at_once)
        opened.log = await ManagedLog.open(
            metadata,
            ledgers,
            ids,
            ReadCache(cache_bytes),
            settings or LogSettings(),
            self.clock,
            opened.released.append,
        )
        self.logs.append(opened.log)
        opened.log.on_appended = opened.groups.append
        opened.producer_chunks = opened.log.producer_chunks
        if with_producers:
            opened.log.producer_snapshot = lambda: ([b"table"], opened.log.end_offset)
        return opened

    def client(self) -> LedgerClient:
        return LedgerClient(
            self.directory,
            now_us=self.clock,
            rng=Random(next(self._numbers)),
            settings=LedgerSettings(add_timeout_s=0.5, hedge_s=0.1, recovery_give_up_s=1.0),
        )

    async def fence(self, ledger: LedgerRecord) -> None:
        """Somebody recovers a ledger, and tells nobody."""
        with suppress(RecoverySuperseded):
            await self.client().recover(ledger.with_state(LedgerState.IN_RECOVERY))

    async def take_over(self, old: OpenLog, broker_id: str = "broker1", settings: LogSettings | None = None) -> OpenLog:
        """The old owner vanishes without closing anything; it still runs."""
        await self.vanish(old.broker_id)
        return await self.open(broker_id, settings)

    # --- what is stored ---

    async def shard_record(self) -> ShardRecord:
        return (await ShardMetadata.load(self.store.inner, self.keyspace, SHARD_ID)).record

    async def ledgers(self) -> dict[int, LedgerRecord]:
        """All ledger records, closed or not."""
        metadata = await ShardMetadata.load(self.store.inner, self.keyspace, SHARD_ID)
        found = await self.store.inner.range(self.keyspace.ledgers_prefix())
        closed = await metadata.closed_ledgers([self.keyspace.parse_ledger(item.key) for item in found.items])
        return {**closed, **metadata.ledgers}

    async def indexed(self) -> set[int]:
        found = await self.store.inner.range(self.keyspace.index_prefix())
        return {self.keyspace.parse_index(item.key)[1] for item in found.items}

    async def check(self) -> None:
        """What must hold whenever nothing is under way: every ledger record is linked, every link has its record."""
        record = await self.shard_record()
        metadata = await ShardMetadata.load(self.store.inner, self.keyspace, SHARD_ID)
        pages = [await metadata.page(n) for n in range(record.first_page, record.first_page + record.pages)]
        segments = [*itertools.chain.from_iterable(pages), *record.segments]
        linked = {segment.ledger_id for segment in segments}
        linked |= {record.next_ledger, record.cursor_ledger, record.next_cursor} - {0}
        assert set(await self.ledgers()) == linked == await self.indexed()
        offset = record.start_offset
        for position, segment in enumerate(segments):
            assert segment.first_offset == offset
            assert segment.messages > 0 or position == len(segments) - 1
            offset = segment.end_offset


class OpenLog:
    """A log, and what its broker heard of it."""

    log: ManagedLog

    def __init__(self, broker_id: str, cluster: Cluster) -> None:
        self.broker_id = broker_id
        self.released: list[Released] = []
        self.groups: list[list[PendingBatch]] = []
        self.producer_chunks: list[bytes] = []
        self.sent = 0
        self._cluster = cluster

    @property
    def appended(self) -> list[PendingBatch]:
        return [batch for group in self.groups for batch in group]

    def send(self, *payloads: bytes) -> PendingBatch:
        """Queues one batch of these messages."""
        batch = PendingBatch(make_batch(*payloads), len(payloads), payloads)
        self.log.append(batch)
        self.sent += len(payloads)
        return batch

    async def append(self, *payloads: bytes) -> int:
        """One batch, durable on return; returns its first offset."""
        batch = self.send(*payloads)
        await self.stored(batch)
        return batch.first_offset

    async def stored(self, batch: PendingBatch) -> None:
        while batch.first_offset < 0:
            await self.log.wait_beyond(self.log.end_offset)

    async def read_all(self, offset: int | None = None) -> list[bytes]:
        """Every payload from the offset on, one a message; checks that offsets are dense and times ascend."""
        offset = self.log.start_offset if offset is None else offset
        payloads: list[bytes] = []
        time_us = 0
        while entries := await self.log.read(offset):
            for entry in entries:
                assert entry.first_offset <= offset < entry.end_offset
                assert entry.publish_time_us >= time_us
                payloads += payloads_of(entry)[offset - entry.first_offset :]
                offset, time_us = entry.end_offset, entry.publish_time_us
        assert offset == self.log.end_offset
        return payloads


def make_batch(*payloads: bytes) -> bytes:
    return encode_batch(Columns(list(payloads)), producer_id=bytes(16), epoch=0, previous=-1, last=len(payloads) - 1)


def payloads_of(entry: StoredEntry) -> list[bytes]:
    return [bytes(payload) for batch in entry.batches for payload in decode_batch(batch.batch).payloads]


async def until(holds: Callable[[], bool], *, deadline_s: float = 10.0) -> None:
    """Lets the loop run until it is so."""
    async with asyncio.timeout(deadline_s):
        while True:
            if holds():
                return
            await asyncio.sleep(0)


async def at_once(delay_s: float) -> None:
    """Sleeps no longer than it takes to let others run."""
    await asyncio.sleep(0)
