"""Bookies of one process with a metadata store, closed ledgers on them, and what repairs those."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from prometheus_client import CollectorRegistry

from magnetar.bookie.bookie import Bookie
from magnetar.bookie.disk import DiskUsage
from magnetar.bookie.entry_store import EntryStore
from magnetar.bookie.memory import MemoryEntryStore
from magnetar.bookie.rocksdb import RocksEntryStore
from magnetar.ledger.bookie_directory import BookieDirectory, Unreachable
from magnetar.ledger.bookie_rpc import AddGroup, AddStatus, BookieRpc, LacQuery, ReadGroup
from magnetar.metadata.codec import (
    decode_copy,
    decode_ledger,
    decode_loss,
    encode_copy,
    encode_drain,
    encode_ledger,
    encode_repair,
)
from magnetar.metadata.keyspace import Keyspace
from magnetar.metadata.memory import MemoryStore
from magnetar.metadata.records import (
    BookieRegistration,
    CopyReason,
    CopyTask,
    Drain,
    Fragment,
    LedgerPurpose,
    LedgerRecord,
    LedgerState,
    RepairSettings,
)
from magnetar.metadata.store import Delete, Operation, Put
from magnetar.node.settings import BookieSettings
from magnetar.repair.auditor import Auditor
from magnetar.repair.metrics import RepairMetrics
from magnetar.repair.replicator import Replicator
from magnetar.wire.envelope import encode

MIB = 1 << 20
WAIT_S = 20.0


def closed_ledger(
    ledger_id: int, entries: int, *fragments: tuple[int, tuple[str, ...]], write: int = 0
) -> LedgerRecord:
    size = len(fragments[0][1])
    return LedgerRecord(
        ledger_id=ledger_id,
        shard_id=1,
        purpose=LedgerPurpose.DATA,
        state=LedgerState.CLOSED,
        epoch=3,
        token=b"token-%010d" % ledger_id,
        write_quorum=write or size,
        ack_quorum=max(1, (write or size) - 1),
        fragments=tuple(Fragment(first, bookies) for first, bookies in fragments),
        last_entry=entries - 1,
        length=sum(len(payload(ledger_id, i)) for i in range(entries)),
    )


def payload(ledger_id: int, entry_id: int) -> bytes:
    return b"%d of %d " % (entry_id, ledger_id) * (1 + entry_id % 50)


def envelopes(record: LedgerRecord) -> list[bytes]:
    made, length = [], 0
    for entry_id in range(record.last_entry + 1):
        data = payload(record.ledger_id, entry_id)
        length += len(data)
        made.append(encode(record.ledger_id, entry_id, entry_id - 1, length, data))
    return made


class RepairWorld:
    """`directory` is what repair knows of bookies; a bookie in `silenced` answers nobody."""

    def __init__(self, folder: Path) -> None:
        self.store = MemoryStore()
        self.keyspace = Keyspace("test")
        self.folder = folder
        self.bookies: dict[str, Bookie] = {}
        self.stores: dict[str, EntryStore] = {}
        self.replicators: dict[str, Replicator] = {}
        self.auditors: list[Auditor] = []
        self.silenced: set[str] = set()
        self._locals: dict[str, tuple[Bookie, BookieRpc]] = {}
        self.now_us = 1_000_000_000_000_000
        self.directory = BookieDirectory(self.store, self.keyspace, self._connect)
        self.registry = CollectorRegistry()

    def _connect(self, registration: BookieRegistration) -> BookieRpc:
        return Switched(self, registration.bookie_id)

    def local(self, name: str) -> BookieRpc:
        bookie = self.bookies[name]
        if name not in self._locals or self._locals[name][0] is not bookie:
            self._locals[name] = (bookie, bookie.local())
        return self._locals[name][1]

    async def start(self, names: Sequence[str], *, rocksdb: bool = False, replicate: bool = True) -> None:
        await self.directory.start()
        for name in names:
            await self.start_bookie(name, rocksdb=rocksdb, replicate=replicate)

    async def start_bookie(self, name: str, *, rocksdb: bool = False, replicate: bool = True, rack: str = "") -> Bookie:
        opened = self.stores.setdefault(name, MemoryEntryStore())

        async def open_memory(directory: Path, memory_bytes: int) -> EntryStore:
            return opened

        settings = BookieSettings(
            id=name, data_dir=self.folder / name, memory_bytes=32 * MIB, gc_interval_s=3600, lease_s=1.0, rack=rack
        )
        self.bookies[name] = await Bookie.start(
            settings,
            self.store,
            self.keyspace,
            registry=CollectorRegistry(),
            serve=False,
            gauge=lambda: DiskUsage(500 * MIB, 1000 * MIB),
            now_us=lambda: self.now_us,
            open_store=RocksEntryStore.open if rocksdb else open_memory,
        )
        if replicate:
            self.start_replicator(name)
        await self.until(lambda: name in {b.bookie_id for b in self.directory.registered()}, f"{name} is registered")
        return self.bookies[name]

    def start_replicator(self, name: str) -> Replicator:
        replicator = Replicator(
            name,
            self.local(name),
            self.directory,
            self.store,
            self.keyspace,
            RepairMetrics.of(self.registry),
            now_us=lambda: self.now_us,
            rng=random.Random(name),
        )
        replicator.start()
        self.replicators[name] = replicator
        return replicator

    async def stop_bookie(self, name: str) -> None:
        if name in self.replicators:
            await self.replicators.pop(name).stop()
        await self.bookies.pop(name).stop()
        await self.until(lambda: name not in {b.bookie_id for b in self.directory.registered()}, f"{name} is gone")

    def start_auditor(self, candidate: str = "auditor") -> Auditor:
        auditor = Auditor(
            candidate,
            self.store,
            self.keyspace,
            RepairMetrics.of(self.registry),
            now_us=lambda: self.now_us,
            rng=random.Random(candidate),
        )
        auditor.start()
        self.auditors.append(auditor)
        return auditor

    def pass_time(self, seconds: float) -> None:
        self.now_us += int(seconds * 1_000_000)
        for auditor in self.auditors:
            auditor._changed.set()

    async def set_repair(self, settings: RepairSettings) -> None:
        await self.store.txn([], [Put(self.keyspace.repair(), encode_repair(settings))])

    async def drain(self, name: str) -> None:
        await self.store.txn([], [Put(self.keyspace.drain(name), encode_drain(Drain(name, self.now_us)))])

    async def undrain(self, name: str) -> None:
        await self.store.txn([], [Delete(self.keyspace.drain(name))])

    async def losses(self) -> dict[str, bool]:
        """Lost bookies, and whether each was given up."""
        items = (await self.store.range(self.keyspace.losses_prefix())).items
        return {loss.bookie_id: loss.given_up for loss in (decode_loss(item.value) for item in items)}

    async def close(self) -> None:
        for auditor in self.auditors:
            await auditor.stop()
        for name in list(self.bookies):
            if name in self.replicators:
                await self.replicators.pop(name).stop()
            await self.bookies.pop(name).stop()
        await self.directory.stop()
        await self.store.close()

    # --- ledgers ---

    async def put_ledger(self, record: LedgerRecord, missing: Mapping[str, Sequence[int]] | None = None) -> None:
        """Stores the entries where the record says they stand, but for what is missing, and then the record."""
        missing = missing or {}
        made = envelopes(record)
        ends = [fragment.first_entry for fragment in record.fragments[1:]] + [len(made)]
        for fragment, end in zip(record.fragments, ends, strict=True):
            for place, name in enumerate(fragment.bookies):
                if name in self.bookies:
                    held = [i for i in range(fragment.first_entry, end) if place in _write_set(record, i)]
                    await self.add(name, record, [made[i] for i in held if i not in missing.get(name, ())])
        await self.put_record(record)

    async def add(self, name: str, record: LedgerRecord, entries: Sequence[bytes]) -> None:
        for start in range(0, len(entries), 100):
            group = AddGroup(record.ledger_id, record.epoch, record.token, tuple(entries[start : start + 100]))
            assert (await self.local(name).add(group)).status is AddStatus.OK

    async def put_record(self, record: LedgerRecord) -> None:
        keys = self.keyspace
        operations: list[Operation] = [Put(keys.ledger(record.ledger_id), encode_ledger(record))]
        operations += [Put(keys.index(name, record.ledger_id), b"") for name in record.roles()]
        await self.store.txn([], operations)

    async def record(self, ledger_id: int) -> LedgerRecord | None:
        found = await self.store.get(self.keyspace.ledger(ledger_id))
        return None if found is None else decode_ledger(found.value)

    async def index(self, ledger_id: int) -> set[str]:
        """The bookies that have a role, as the index has it."""
        items = (await self.store.range(self.keyspace.index_prefix())).items
        named = [self.keyspace.parse_index(item.key) for item in items]
        return {bookie for bookie, ledger in named if ledger == ledger_id}

    async def copies(self, record: LedgerRecord) -> dict[str, list[bytes | None]]:
        """What each bookie that runs has of the ledger."""
        found: dict[str, list[bytes | None]] = {}
        for name in self.bookies:
            entries: list[bytes | None] = []
            while len(entries) <= record.last_entry:
                read = ReadGroup(record.ledger_id, record.epoch, record.token, len(entries), record.last_entry)
                entries += [answer.entry for answer in (await self.local(name).read(read)).answers]
            found[name] = entries
        return found

    async def check_complete(self, ledger_id: int) -> LedgerRecord:
        """Every bookie that the record names has every entry that it should, byte for byte."""
        record = await self.record(ledger_id)
        assert record is not None
        made = envelopes(record)
        copies = await self.copies(record)
        ends = [fragment.first_entry for fragment in record.fragments[1:]] + [len(made)]
        for fragment, end in zip(record.fragments, ends, strict=True):
            assert len(set(fragment.bookies)) == len(fragment.bookies), "two copies on one bookie"
            for place, name in enumerate(fragment.bookies):
                for entry_id in range(fragment.first_entry, end):
                    if place in _write_set(record, entry_id):
                        assert copies[name][entry_id] == made[entry_id], (name, entry_id)
        assert await self.index(ledger_id) == record.roles()
        return record

    # --- tasks ---

    async def put_task(
        self,
        ledger_id: int,
        place: str,
        target: str,
        reason: CopyReason = CopyReason.LOST,
        *,
        first: int = 0,
        last: int = -1,
    ) -> None:
        task = CopyTask(ledger_id, place, target, reason, first_entry=first, last_entry=last)
        await self.store.txn([], [Put(self.keyspace.copy(ledger_id, place), encode_copy(task))])

    async def tasks(self) -> list[CopyTask]:
        return [decode_copy(item.value) for item in (await self.store.range(self.keyspace.copies_prefix())).items]

    async def until(self, holds: Callable[[], object], what: str) -> None:
        async def poll() -> None:
            while True:
                if await found if asyncio.iscoroutine(found := holds()) else found:
                    return
                await asyncio.sleep(0.005)

        try:
            await asyncio.wait_for(poll(), WAIT_S)
        except TimeoutError:
            raise AssertionError(f"not within {WAIT_S:g} s: {what}; tasks: {await self.tasks()}") from None

    async def until_no_tasks(self) -> None:
        async def done() -> bool:
            return not await self.tasks()

        await self.until(done, "all copies are made")


class Switched:
    """A bookie as others reach it: while it is silenced or stopped it answers nothing."""

    def __init__(self, world: RepairWorld, bookie_id: str) -> None:
        self._world = world
        self.bookie_id = bookie_id

    def _to(self) -> BookieRpc:
        if self.bookie_id not in self._world.bookies or self.bookie_id in self._world.silenced:
            return Unreachable(self.bookie_id)
        return self._world.local(self.bookie_id)

    def add(self, group: AddGroup) -> Any:
        return self._to().add(group)

    def read(self, group: ReadGroup) -> Any:
        return self._to().read(group)

    def read_lac(self, query: LacQuery) -> Any:
        return self._to().read_lac(query)


def _write_set(record: LedgerRecord, entry_id: int) -> set[int]:
    return {(entry_id + k) % record.ensemble_size for k in range(record.write_quorum)}
