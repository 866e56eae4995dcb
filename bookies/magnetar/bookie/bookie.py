"""A bookie: the store, the queue before it, and the tasks around them.

Start, in this order: the directory is locked, the store opened, the identity established (limbo included), the queue
and the service started, and at last the bookie registers: from then on it is used. Stopping goes the other way.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Protocol

import structlog
from prometheus_client import CollectorRegistry

from magnetar.bookie.collector import Collector
from magnetar.bookie.cookies import BookieRefusal, Identity, establish_identity
from magnetar.bookie.directory import DirectoryInUse, DirectoryLock
from magnetar.bookie.disk import DiskGauge, DiskState, gauge_of
from magnetar.bookie.entry_store import EntryStore, StoreDamaged, StoreFailed, StoreUnopenable
from magnetar.bookie.group_commit import GROUP_BYTES_MAX, GroupCommit, die
from magnetar.bookie.handlers import BookieHandlers
from magnetar.bookie.judge import Conditions, ReadConditions
from magnetar.bookie.local import LocalBookie
from magnetar.bookie.metrics import BookieMetrics
from magnetar.bookie.reads import Reads
from magnetar.bookie.rocksdb import MEMTABLE_SHARE, RocksEntryStore
from magnetar.bookie.service import BookieService
from magnetar.metadata.codec import encode_bookie
from magnetar.metadata.follow import Follower
from magnetar.metadata.keyspace import Keyspace
from magnetar.metadata.records import BookieRegistration, BookieState
from magnetar.metadata.store import Change, KeyValue, MetadataStore, MetadataUnavailable
from magnetar.node.lifecycle import Stack, software_version
from magnetar.node.registration import IdInUse, Registration
from magnetar.node.rpc import serve
from magnetar.node.settings import BookieSettings
from magnetar.v1 import bookie_pb2 as pb

DISK_CHECK_S = 2.0
DISK_REPORT_S = 60.0
"""How often the free space in the registration is brought up to date when nothing else changes it."""
QUEUE_SHARE = 4
"""The queue of adds gets one part in so many of the bookie's memory; the store leaves that to it."""
STOP_GRACE_S = 2.0

log = structlog.get_logger("magnetar.bookie")


class OpenStore(Protocol):
    def __call__(self, directory: Path, memory_bytes: int) -> Awaitable[EntryStore]: ...


class Lock(Protocol):
    def close(self) -> None: ...


class Bookie:
    """A running bookie. Made by `start`."""

    def __init__(
        self,
        settings: BookieSettings,
        store: EntryStore,
        identity: Identity,
        metadata: MetadataStore,
        keyspace: Keyspace,
        registry: CollectorRegistry,
        gauge: DiskGauge,
        now_us: Callable[[], int],
        die: Callable[[str], object],
        http_address: str,
    ) -> None:
        self.settings = settings
        self.identity = identity
        self._store = store
        self._metadata = metadata
        self._keyspace = keyspace
        self._gauge = gauge
        self._die = die
        # What one group and the flush of one memtable may write, between two looks at the disk.
        reserve_bytes = settings.memory_bytes // MEMTABLE_SHARE + GROUP_BYTES_MAX
        self._disk = DiskState(settings.read_only_at, settings.writable_at, reserve_bytes)
        self._state_changed = asyncio.Event()
        self._draining = False
        self._drain = Follower(metadata, keyspace.bookie_drain(settings.id), self._drain_listed, self._drain_changed)
        self._registered_state: BookieState | None = None
        self._metrics = BookieMetrics(registry, settings.id)
        self._commits = GroupCommit(
            store, self._conditions, self._metrics, queue_bytes=settings.memory_bytes // QUEUE_SHARE, die=die
        )
        reads = Reads(store, self._commits, self._read_conditions, self._metrics)
        self.handlers = BookieHandlers(store, self._commits, reads, self._is_limbo)
        self.collector = Collector(settings.id, store, self._commits, metadata, keyspace, self._metrics, now_us)
        self._registration: Registration | None = None
        self._address = ""
        self._http_address = http_address
        self._locals: list[LocalBookie] = []
        self._stack = Stack()

    @classmethod
    async def start(
        cls,
        settings: BookieSettings,
        metadata: MetadataStore,
        keyspace: Keyspace,
        *,
        registry: CollectorRegistry | None = None,
        serve: bool = True,
        http_address: str = "",
        gauge: DiskGauge | None = None,
        now_us: Callable[[], int] = lambda: time.time_ns() // 1000,
        die: Callable[[str], object] = die,
        open_store: OpenStore = RocksEntryStore.open,
        lock: Callable[[Path], Lock] = DirectoryLock,
    ) -> Bookie:
        """Returns when the bookie is registered. Without `serve` it is reached through `local()` only.

        Raises BookieRefusal with cause and remedy, ListenError, MetadataUnavailable. A failed fsync ends the process.
        """
        stack = Stack()
        try:
            store = await _open(settings, stack, open_store, lock)
            identity = await establish_identity(store, metadata, keyspace, settings.id)
            bookie = cls(
                settings,
                store,
                identity,
                metadata,
                keyspace,
                registry or CollectorRegistry(),
                gauge or gauge_of(settings.data_dir),
                now_us,
                die,
                http_address,
            )
            bookie._stack = stack
            await bookie._start(serve)
        except BaseException as error:
            if isinstance(error, StoreFailed):
                die(str(error))
            await stack.close()
            raise
        return bookie

    async def stop(self) -> None:
        """Takes no more calls, answers what is queued, closes the store, ends the session."""
        await self._stack.close()

    def local(self) -> LocalBookie:
        """The bookie as the ledger layer of this process calls it."""
        bookie = LocalBookie(self.settings.id, self.handlers)
        self._locals.append(bookie)
        return bookie

    @property
    def id(self) -> str:
        return self.settings.id

    @property
    def address(self) -> str:
        """Where the service is reached; empty without one."""
        return self._address

    @property
    def state(self) -> BookieState:
        """A full disk says more than a drain: both keep new ledgers away."""
        if self._disk.state is BookieState.WRITABLE and self._draining:
            return BookieState.DRAINING
        return self._disk.state

    @property
    def session(self) -> int | None:
        return self._registration.session if self._registration is not None else None

    def problems(self) -> list[str]:
        """What keeps the bookie from being of full use, for /readyz."""
        problems: list[str] = []
        if self.session is None:
            problems.append("bookie has no session in the metadata store")
        if self._disk.state is BookieState.READ_ONLY:
            problems.append("bookie is read-only: the disk is nearly full")
        return problems

    def registration_record(self) -> BookieRegistration:
        return BookieRegistration(
            bookie_id=self.settings.id,
            address=self._address,
            rack=self.settings.rack,
            state=self.state,
            disk_free_bytes=self._disk.usage.free_bytes,
            disk_total_bytes=self._disk.usage.total_bytes,
            ledger_floor=self.identity.limbo_floor,
            version=software_version(),
            http_address=self._http_address,
        )

    async def check_disk(self) -> None:
        """Measures the disk; a change of state, also by a drain, goes into the registration at once."""
        self._disk.update(self._gauge())
        self._state_changed.clear()
        usage = self._store.usage()
        metrics = self._metrics
        metrics.disk_free_bytes.set(self._disk.usage.free_bytes)
        metrics.stored_bytes.set(usage.stored_bytes)
        metrics.garbage_bytes.set(usage.garbage_bytes)
        metrics.read_only.set(self._disk.state is BookieState.READ_ONLY)
        metrics.limbo.set(self.identity.limbo_floor > 0)
        if self._registered_state not in (None, self.state):
            log.warning("bookie's state changed", bookie=self.id, state=self.state.name)
            await self._report()

    async def collect(self) -> None:
        """One round of the collector: ledgers first, then space."""
        await self.collector.collect()
        await self.collector.recover_space(self._disk.usage)

    async def _start(self, serve_grpc: bool) -> None:
        self._disk.update(self._gauge())
        self._commits.start()
        self._stack.push("local callers", self._close_locals)
        self._stack.push("queue", self._commits.close)
        self._stack.push("handlers", self.handlers.close)
        if serve_grpc:
            await self._serve()
        await self.check_disk()
        await self._drain.start()
        self._stack.push("drain", self._drain.close)
        await self._register()
        for name, work in (("disk", self._watch_disk), ("collector", self._collect_for_ever)):
            task = asyncio.create_task(self._own(name, work), name=f"bookie {self.id} {name}")
            self._stack.push(name, partial(_cancel, task))
        log.info("bookie started", bookie=self.id, address=self._address, limbo_floor=self.identity.limbo_floor)

    async def _serve(self) -> None:
        service = BookieService(self.id, self.settings.cluster, self.handlers, self._status)
        server = await serve([service.service()], self.settings.listen)
        self._stack.push("service", lambda: server.stop(STOP_GRACE_S))
        host = self.settings.listen.rpartition(":")[0]
        self._address = self.settings.advertised_address or f"{host}:{server.port}"

    async def _register(self) -> None:
        key = self._keyspace.bookie(self.id)
        record = self.registration_record()
        self._registration = Registration(self._metadata, key, encode_bookie(record), self.settings.lease_s)
        self._registered_state = record.state
        self._stack.push("registration", self._registration.close)
        try:
            await self._registration.register()
        except IdInUse as error:
            raise BookieRefusal(str(error)) from None

    def _drain_listed(self, items: Sequence[KeyValue]) -> None:
        # The prefix holds the keys of bookies whose names begin like this one's, too.
        self._set_draining(any(item.key == self._keyspace.bookie_drain(self.id) for item in items))

    def _drain_changed(self, changes: Sequence[Change]) -> None:
        for change in changes:
            if change.key == self._keyspace.bookie_drain(self.id):
                self._set_draining(change.current is not None)

    def _set_draining(self, draining: bool) -> None:
        self._draining = draining
        self._state_changed.set()

    async def _close_locals(self) -> None:
        for bookie in self._locals:
            bookie.close()

    async def _report(self) -> None:
        if self._registration is None:
            return
        record = self.registration_record()
        try:
            await self._registration.update(encode_bookie(record))
        except MetadataUnavailable as error:
            log.warning("registration not updated", bookie=self.id, reason=str(error))
        else:
            self._registered_state = record.state

    async def _watch_disk(self) -> None:
        loop = asyncio.get_running_loop()
        report_at = loop.time() + DISK_REPORT_S
        while True:
            with suppress(TimeoutError):
                async with asyncio.timeout(DISK_CHECK_S):
                    await self._state_changed.wait()
            await self.check_disk()
            if loop.time() >= report_at:
                report_at = loop.time() + DISK_REPORT_S
                await self._report()

    async def _collect_for_ever(self) -> None:
        while True:
            await asyncio.sleep(self.settings.gc_interval_s)
            await self.collect()

    async def _own(self, name: str, work: Callable[[], Awaitable[None]]) -> None:
        """A task's root: what it does not expect ends the bookie."""
        try:
            await work()
        except Exception as error:
            log.exception("task failed", bookie=self.id, task=name)
            self._die(f"{name} failed error=`{error}`")

    def _conditions(self) -> Conditions:
        # A disk can fill up between two looks of the watcher, and a write that finds no space ends the process.
        before = self._disk.state
        self._disk.update(self._gauge())
        if self._disk.state is not before:
            self._state_changed.set()
        return Conditions(
            floor=self.identity.limbo_floor,
            read_only=self._disk.state is BookieState.READ_ONLY,
            full=self._disk.full,
            collecting=self.collector.collecting,
        )

    def _is_limbo(self, ledger_id: int) -> bool:
        return ledger_id < self.identity.limbo_floor

    def _read_conditions(self, ledger_id: int) -> ReadConditions:
        return ReadConditions(self._is_limbo(ledger_id), ledger_id in self.collector.collecting)

    def _status(self, ledgers: int) -> pb.StatusResponse:
        usage = self._store.usage()
        return pb.StatusResponse(
            bookie_id=self.id,
            state=self.state.value,  # type: ignore[arg-type]
            disk_free_bytes=self._disk.usage.free_bytes,
            disk_total_bytes=self._disk.usage.total_bytes,
            stored_bytes=usage.stored_bytes,
            garbage_bytes=usage.garbage_bytes,
            ledgers=ledgers,
            limbo=self.identity.limbo_floor > 0,
        )


async def _open(
    settings: BookieSettings, stack: Stack, open_store: OpenStore, lock: Callable[[Path], Lock]
) -> EntryStore:
    """The store of a directory that this process alone holds. Raises BookieRefusal."""
    directory = settings.data_dir
    try:
        held = lock(directory)
    except DirectoryInUse as error:
        raise BookieRefusal(
            f"another process uses the data directory: {error}; stop it or choose another directory"
        ) from None
    except OSError as error:
        raise BookieRefusal(
            f"the data directory cannot be used: {error.strerror} directory=`{directory}`; choose another one"
        ) from None

    async def unlock() -> None:
        held.close()

    stack.push("lock", unlock)
    try:
        store = await open_store(directory / "store", settings.memory_bytes)
    except StoreDamaged as damage:
        raise BookieRefusal(
            f"the store is damaged: {damage}; move {directory} away and start with --repair-bookie {settings.id} "
            "if other bookies hold the data, or restore it from a backup"
        ) from None
    except StoreUnopenable as error:
        raise BookieRefusal(f"the store cannot be opened: {error}; remove the cause and start again") from None
    stack.push("store", store.close)
    return store


async def _cancel(task: asyncio.Task[None]) -> None:
    task.cancel()
    await asyncio.wait([task])
