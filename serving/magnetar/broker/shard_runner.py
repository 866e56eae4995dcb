"""Carries rebalancings of brokers out, one runner in the cluster: the broker that is elected to balance has it.

A pass over each operation that has not ended (`repair/operation_loop.py`): for STORE_S shards are handed over one by
one, at most one each PACE_S, then the progress is stored. A pause or a cancellation waits for that long at most.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

from magnetar.broker.cluster_view import ClusterView
from magnetar.broker.describe import Records
from magnetar.broker.metrics import BrokerMetrics
from magnetar.broker.mover import MOVE_S
from magnetar.broker.peers import ADMIN_SERVICE, Peers
from magnetar.broker.running_hand_offs import RunningHandOffs
from magnetar.metadata.keyspace import Keyspace
from magnetar.metadata.records import Goal, Move, Operation, OperationState
from magnetar.metadata.shards import read_shards
from magnetar.metadata.store import Compare, MetadataStore
from magnetar.node.rpc import Refused
from magnetar.repair.operation_loop import Held, OperationLoop
from magnetar.repair.operation_txns import StoredOperation
from magnetar.v1 import admin_pb2 as pb

PACE_S = 0.05
"""From one hand-off to the next: at most twenty shards a second pause their producers."""
STORE_S = 0.5
PASS_PAUSED_S = 2.0
RETRY_S = 1.0
"""After hand-offs that failed."""


class ShardRunner(OperationLoop[RunningHandOffs]):
    """See the module. `run` it while this broker is elected. `address` is this broker's own, once it listens."""

    def __init__(
        self,
        store: MetadataStore,
        keyspace: Keyspace,
        view: ClusterView,
        peers: Peers,
        metrics: BrokerMetrics,
        now_us: Callable[[], int],
    ) -> None:
        super().__init__(store, keyspace, now_us)
        self.address = ""
        self._view = view
        self._peers = peers
        self._metrics = metrics
        self._records = Records(store, keyspace)

    @property
    def at_work(self) -> bool:
        """An operation goes on: nobody else should move shards meanwhile."""
        return any(held.core.is_running for held in self._running.values())

    def _is_mine(self, operation: Operation) -> bool:
        return operation.goal is Goal.BROKERS

    def _core(self, operation: Operation, pages: Sequence[Sequence[Move]]) -> RunningHandOffs:
        return RunningHandOffs(operation, pages)

    async def _carry_on(self, live: Sequence[StoredOperation], leader: Compare) -> float | None:
        pauses = [await self._advance(await self._held(stored), leader) for stored in live]
        self._report(live)
        return min(pauses, default=None)

    async def _advance(self, held: Held[RunningHandOffs], leader: Compare) -> float:
        """Returns after how long it goes on."""
        core, before = held.core, held.core.operation
        if core.is_running:
            await self._hand_over(core)
        elif core.is_cancelled:
            # Hand-offs whose progress was not stored before it was cancelled: a rollback is to take them back, too.
            core.settle_arrived(await self._owners(core.pending_shards()))
        core.keep_progress(self._now_us())
        if core.operation != before:
            await self._store_progress(held, leader)
        if core.operation.ended_us:
            self._running.pop(core.operation.operation_id, None)
        if core.operation.state is OperationState.PAUSED:
            return PASS_PAUSED_S
        return RETRY_S if core.remaining and core.only_failures_left else 0.0

    async def _hand_over(self, core: RunningHandOffs) -> None:
        loop = asyncio.get_running_loop()
        end = loop.time() + STORE_S
        # Those that fail come again at the end: not all of them within one pass.
        for _ in range(core.remaining):
            if loop.time() >= end:
                return
            began = loop.time()
            record = await self._records.shard(core.next().shard_id)
            if core.settle(None if record is None else record.record, self._takers()):
                continue
            try:
                await self._move(core.next(), core.operation.operation_id)
            except Refused as refused:
                core.failed(refused.message)
            else:
                core.arrived()
            await asyncio.sleep(max(0.0, PACE_S - (loop.time() - began)))

    async def _owners(self, shards: Sequence[int]) -> dict[int, str]:
        """Raises MetadataUnavailable."""
        found = await read_shards(self._store, self._keyspace, shards)
        records = [shard.record for shard in found]
        return {record.shard_id: record.owner.broker_id for record in records if record.owner is not None}

    def _takers(self) -> set[str]:
        brokers = {broker.owner.broker_id for broker in self._view.brokers() if not broker.leaving}
        return {broker_id for broker_id in brokers if not self._view.drained(broker_id)}

    async def _move(self, move: Move, reason: str) -> None:
        """Raises Refused."""
        request = pb.MoveShardRequest(shard_id=move.shard_id, to_broker_id=move.target, reason=reason)
        method = ADMIN_SERVICE + "MoveShard"
        await self._peers.call(self.address, method, request, pb.MoveShardResponse, timeout_s=MOVE_S)

    def _report(self, live: Sequence[StoredOperation]) -> None:
        operations = [one.operation for one in live]
        remaining = sum(one.moves - one.moves_done - one.moves_skipped for one in operations)
        self._metrics.rebalance_remaining.set(remaining)
        self._metrics.rebalance_problems.set(sum(len(one.problems) for one in operations))
