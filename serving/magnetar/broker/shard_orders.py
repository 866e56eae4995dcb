"""What an operator orders of rebalancing brokers: a plan, an operation made of it, and one that takes another back.

Everything else about an operation is the same for all goals: `repair/orders.py`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Mapping, Sequence

from magnetar.broker.balancing import measured_loads
from magnetar.broker.cluster_view import ClusterView
from magnetar.broker.describe import Records
from magnetar.broker.loads import ShardLoad
from magnetar.broker.peers import Peers
from magnetar.broker.shard_planner import ShardPlan, Snapshot, objection, objections, plan
from magnetar.metadata.codec import decode_broker
from magnetar.metadata.keyspace import Keyspace
from magnetar.metadata.records import Goal, Move, MoveState, OperationState, Owner
from magnetar.metadata.store import MetadataStore
from magnetar.repair.listings import Listings
from magnetar.repair.orders import Checked, Ordered, Orders, Wanted, check_fresh, check_size, possible


class ShardOrders:
    """Every call raises OrderRefused for what cannot be, MetadataUnavailable when its outcome is unknown."""

    def __init__(
        self, store: MetadataStore, keyspace: Keyspace, orders: Orders, view: ClusterView, peers: Peers
    ) -> None:
        self._store = store
        self._keyspace = keyspace
        self._orders = orders
        self._view = view
        self._peers = peers
        self._records = Records(store, keyspace)
        self._listings = Listings(store, keyspace)

    async def plan(self, shards: Collection[int] | None = None) -> ShardPlan:
        """The moves that are due now. Raises Refused if a broker does not tell its loads."""
        reported = await measured_loads(self._view, self._peers)
        snapshot = await self._snapshot({load.shard_id: load for broker in reported for load in broker.shards})
        return await asyncio.to_thread(plan, snapshot, shards)

    async def apply(self, revision: int, moves: Sequence[Move], mark: bytes, *, dry_run: bool = False) -> Ordered:
        """Begins a plan. The same order again (by its `mark`) is answered as before."""
        check_size(moves)

        async def check() -> Checked:
            check_fresh(objections(await self._snapshot(), moves, revision))
            return moves, ()

        return await self._orders.begin(Wanted(Goal.BROKERS, revision, 0, mark), check, dry_run=dry_run)

    async def roll_back(self, operation_id: str, mark: bytes, *, dry_run: bool = False) -> Ordered:
        """Begins an operation that takes back what another one moved; what cannot be taken back is left out."""
        operation, moves = await self._orders.to_take_back(operation_id)

        async def check() -> Checked:
            snapshot = await self._snapshot()
            return possible(moves, lambda move: objection(snapshot, move))

        wanted = Wanted(Goal.BROKERS, operation.revision, 0, mark, operation_id)
        return await self._orders.begin(wanted, check, dry_run=dry_run)

    async def _snapshot(self, loads: Mapping[int, ShardLoad] | None = None) -> Snapshot:
        """What the store says. Nothing in it is older than its revision; what is newer is busy."""
        keys = self._keyspace
        revision = (await self._store.range(keys.brokers_prefix(), limit=1)).revision
        sessions: dict[str, int] = {}
        leaving: set[str] = set()
        async for item in self._records.under(keys.brokers_prefix()):
            name = keys.parse_broker(item.key)
            sessions[name] = item.create_revision
            if decode_broker(item.value).leaving:
                leaving.add(name)
        draining = {keys.parse_broker_drain(i.key) async for i in self._records.under(keys.broker_drains_prefix())}
        busy = await self._busy()
        owners: dict[int, Owner] = {}
        changed: dict[int, int] = {}
        async for item in self._records.under(keys.owned_prefix()):
            owner, shard_id = keys.parse_owned(item.key)
            # A shard that changes hands between two pages stands in both.
            if item.create_revision > changed.get(shard_id, 0):
                owners[shard_id], changed[shard_id] = owner, item.create_revision
            if item.create_revision > revision:
                busy.setdefault(shard_id, "its owner changed just now")
        return Snapshot(revision, sessions, owners, changed, leaving, draining, loads or {}, busy)

    async def _busy(self) -> dict[int, str]:
        busy: dict[int, str] = {}
        for stored in await self._listings.operations():
            operation = stored.operation
            is_live = operation.state in (OperationState.RUNNING, OperationState.PAUSED)
            if operation.goal is Goal.BROKERS and is_live:
                moves = await self._listings.moves(operation.operation_id)
                pending = [move for move in moves if move.state is MoveState.PENDING]
                busy |= {move.shard_id: f"{operation.operation_id} moves it" for move in pending}
        return busy
