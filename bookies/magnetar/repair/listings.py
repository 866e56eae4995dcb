"""Reads the records that rebalancing decides upon: whole listings, or none."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass, field

from magnetar.metadata import listing
from magnetar.metadata.codec import (
    decode_bookie,
    decode_copy,
    decode_drain,
    decode_ledger,
    decode_loss,
    decode_moves,
    decode_operation,
    decode_repair,
)
from magnetar.metadata.copy_txns import Stored, StoredTask
from magnetar.metadata.keyspace import Keyspace
from magnetar.metadata.records import (
    BookieRegistration,
    CopyTask,
    Goal,
    LedgerRecord,
    Move,
    MoveState,
    OperationState,
    RepairSettings,
)
from magnetar.metadata.store import KeyValue, MetadataStore
from magnetar.repair.operation_txns import StoredOperation, number
from magnetar.repair.planner import Snapshot

MOVE_PAGES = 8
"""A page of moves takes some hundred kilobytes at most."""


@dataclass(slots=True)
class Cluster:
    """The bookies, and what is being copied. `revision`: of the first that was read, so that nothing in it is newer
    than what is read afterwards."""

    revision: int
    bookies: dict[str, BookieRegistration] = field(default_factory=dict)
    sessions: dict[str, int] = field(default_factory=dict)
    draining: set[str] = field(default_factory=set)
    given_up: set[str] = field(default_factory=set)
    settings: RepairSettings = field(default_factory=RepairSettings)
    tasks: list[StoredTask] = field(default_factory=list)

    def snapshot(self) -> Snapshot:
        """Without ledgers."""
        return Snapshot(self.revision, self.bookies, self.sessions, (), {}, self.draining)


class Listings:
    """Every call raises MetadataUnavailable rather than return a part, DamagedRecord for what cannot be read."""

    def __init__(self, store: MetadataStore, keyspace: Keyspace) -> None:
        self._store = store
        self._keyspace = keyspace

    async def cluster(self) -> Cluster:
        keys = self._keyspace
        found = [page async for page in listing.pages(self._store, keys.bookies_prefix())]
        cluster = Cluster(found[0].revision)
        for item in (item for page in found for item in page.items):
            name = keys.parse_bookie(item.key)
            cluster.bookies[name] = decode_bookie(item.value)
            cluster.sessions[name] = item.create_revision
        cluster.draining = {
            decode_drain(item.value).bookie_id async for item in self._under(keys.bookie_drains_prefix())
        }
        losses = [decode_loss(item.value) async for item in self._under(keys.losses_prefix())]
        cluster.given_up = {loss.bookie_id for loss in losses if loss.given_up}
        settings = await self._store.get(keys.repair())
        if settings is not None:
            cluster.settings = decode_repair(settings.value)
        cluster.tasks = [
            StoredTask(decode_copy(item.value), item.mod_revision) async for item in self._under(keys.copies_prefix())
        ]
        return cluster

    async def operations(self) -> list[StoredOperation]:
        """All, the oldest first."""
        prefix = self._keyspace.operations_prefix()
        found = [StoredOperation(decode_operation(i.value), i.mod_revision) async for i in self._under(prefix)]
        return sorted(found, key=number)

    async def operation(self, operation_id: str) -> StoredOperation | None:
        found = await self._store.get(self._keyspace.operation(operation_id))
        return None if found is None else StoredOperation(decode_operation(found.value), found.mod_revision)

    async def pages(self, operation_id: str) -> list[tuple[tuple[Move, ...], int]]:
        """The moves of each page, and the revision of its key."""
        prefix = self._keyspace.moves_prefix(operation_id)
        found = listing.items(self._store, prefix, page_keys=MOVE_PAGES)
        return [(decode_moves(item.value), item.mod_revision) async for item in found]

    async def moves(self, operation_id: str) -> list[Move]:
        return [move for moves, _ in await self.pages(operation_id) for move in moves]

    async def ledger(self, ledger_id: int) -> Stored | None:
        """A CLOSED one."""
        found = await self._store.get(self._keyspace.ledger(ledger_id))
        return None if found is None else Stored(decode_ledger(found.value), found.mod_revision)

    async def snapshot(self) -> Snapshot:
        """Everything that a plan is made of."""
        cluster = await self.cluster()
        busy = {one.task.ledger_id: "a copy of it is to be made" for one in cluster.tasks}
        under_way = {one.task.ledger_id: _move_of(one.task) for one in cluster.tasks if one.task.target}
        for stored in await self.operations():
            name = stored.operation.operation_id
            is_live = stored.operation.state in (OperationState.RUNNING, OperationState.PAUSED)
            if is_live and stored.operation.goal is not Goal.BROKERS:
                pending = [move for move in await self.moves(name) if move.state is MoveState.PENDING]
                busy |= {move.ledger_id: f"{name} moves it" for move in pending}
                under_way |= {move.ledger_id: move for move in pending}
        ledgers: list[LedgerRecord] = []
        changed: dict[int, int] = {}
        async for item in self._under(self._keyspace.ledgers_prefix()):
            record = decode_ledger(item.value)
            ledgers.append(record)
            changed[record.ledger_id] = item.mod_revision
            if item.mod_revision > cluster.revision:
                busy.setdefault(record.ledger_id, "it changed while the plan was made")
        return Snapshot(
            cluster.revision, cluster.bookies, cluster.sessions, ledgers, changed, cluster.draining, busy, under_way
        )

    def _under(self, prefix: str) -> AsyncIterator[KeyValue]:
        return listing.items(self._store, prefix)


def _move_of(task: CopyTask) -> Move:
    return Move(task.ledger_id, task.place, task.target, 0)
