"""What the tests of a bookie share: a writer of one ledger, bookies over stores in memory, a disk that can be held."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry

from magnetar.bookie.bookie import Bookie
from magnetar.bookie.disk import DiskUsage
from magnetar.bookie.entry_store import EntryStore
from magnetar.bookie.memory import MemoryEntryStore
from magnetar.bookie.rocksdb import RocksEntryStore
from magnetar.ledger.bookie_rpc import AddGroup, LacQuery, ReadGroup
from magnetar.metadata.keyspace import Keyspace
from magnetar.metadata.memory import MemoryStore
from magnetar.metadata.store import MetadataStore
from magnetar.node.settings import BookieSettings
from magnetar.wire.envelope import encode

MIB = 1 << 20


class LedgerWriter:
    """Makes the entries and calls of one ledger; `lac` is always the entry before."""

    def __init__(self, ledger_id: int = 7, epoch: int = 1) -> None:
        self.ledger_id = ledger_id
        self.epoch = epoch
        self.token = b"token-%010d" % ledger_id

    def entry(self, entry_id: int, payload: bytes = b"payload") -> bytes:
        return encode(self.ledger_id, entry_id, entry_id - 1, (entry_id + 1) * len(payload), payload)

    def add(
        self, *entry_ids: int, payload: bytes = b"payload", recovery: bool = False, epoch: int | None = None
    ) -> AddGroup:
        entries = tuple(self.entry(entry_id, payload) for entry_id in entry_ids)
        return AddGroup(self.ledger_id, self.epoch if epoch is None else epoch, self.token, entries, recovery)

    def read(self, first: int, last: int, *, fence: bool = False, epoch: int | None = None) -> ReadGroup:
        return ReadGroup(self.ledger_id, self.epoch if epoch is None else epoch, self.token, first, last, fence)

    def lac(self, *, fence: bool = False, epoch: int | None = None) -> LacQuery:
        return LacQuery(self.ledger_id, self.epoch if epoch is None else epoch, self.token, fence)


@pytest.fixture
def writer() -> Callable[..., LedgerWriter]:
    return LedgerWriter


class HeldDisk:
    """A sync that waits while the disk is held; `syncing` tells that one does."""

    def __init__(self) -> None:
        self._free = asyncio.Event()
        self._free.set()
        self.syncing = asyncio.Event()
        self.error: OSError | None = None

    async def sync(self) -> None:
        self.syncing.set()
        await self._free.wait()
        self.syncing.clear()
        if self.error is not None:
            raise self.error

    def hold(self) -> None:
        self._free.clear()

    def release(self) -> None:
        self._free.set()


@pytest.fixture
def held_disk() -> HeldDisk:
    return HeldDisk()


class Deaths:
    """Takes the place of what ends the process."""

    def __init__(self) -> None:
        self.messages: list[str] = []
        self.died = asyncio.Event()

    def __call__(self, message: str) -> None:
        self.messages.append(message)
        self.died.set()


@pytest.fixture
def deaths() -> Deaths:
    return Deaths()


class InjectedDisk:
    def __init__(self) -> None:
        self.used_share = 0.5

    def __call__(self) -> DiskUsage:
        return DiskUsage(round((1 - self.used_share) * 1000) * MIB, 1000 * MIB)


@pytest.fixture
def disk() -> InjectedDisk:
    return InjectedDisk()


@pytest.fixture
def keyspace() -> Keyspace:
    return Keyspace("test")


@pytest.fixture
async def metadata() -> AsyncIterator[MetadataStore]:
    async with MemoryStore() as store:
        yield store


class BookieMaker:
    """Starts bookies, in memory unless told otherwise, and stops them at the end of the test."""

    def __init__(self, metadata: MetadataStore, keyspace: Keyspace, directory: Path) -> None:
        self.metadata = metadata
        self.keyspace = keyspace
        self.directory = directory
        self.deaths = Deaths()
        self.now_us = 1_000_000_000_000_000
        self.store = MemoryEntryStore()
        self._bookies: list[Bookie] = []

    async def start(
        self,
        bookie_id: str = "bookie0",
        *,
        store: EntryStore | None = None,
        rocksdb: bool = False,
        serve: bool = False,
        listen: str = "127.0.0.1:0",
        gauge: Callable[[], DiskUsage] | None = None,
        memory_bytes: int = 32 * MIB,
        data_dir: Path | None = None,
    ) -> Bookie:
        opened = store or self.store

        async def open_memory(directory: Path, memory_bytes: int) -> EntryStore:
            return opened

        settings = BookieSettings(
            id=bookie_id,
            data_dir=data_dir or self.directory / bookie_id,
            listen=listen,
            memory_bytes=memory_bytes,
            gc_interval_s=3600,
            lease_s=1.0,
        )
        bookie = await Bookie.start(
            settings,
            self.metadata,
            self.keyspace,
            registry=CollectorRegistry(),
            serve=serve,
            gauge=gauge or InjectedDisk(),
            now_us=lambda: self.now_us,
            die=self.deaths,
            open_store=RocksEntryStore.open if rocksdb else open_memory,
        )
        self._bookies.append(bookie)
        return bookie

    async def stop_all(self) -> None:
        for bookie in self._bookies:
            await bookie.stop()


@pytest.fixture
async def bookies(metadata: MetadataStore, keyspace: Keyspace, tmp_path: Path) -> AsyncIterator[BookieMaker]:
    maker = BookieMaker(metadata, keyspace, tmp_path)
    yield maker
    await maker.stop_all()
    assert not maker.deaths.messages
