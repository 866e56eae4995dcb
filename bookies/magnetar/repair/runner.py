"""Carries rebalancings of bookies out, one runner in the cluster: the elected auditor's process has it.

A pass over each operation that has not ended (`operation_loop.py`):

1. Read the bookies and all open tasks, then the records of the ledgers that are to be decided about.
2. Decide (`operations.py`).
3. Store the progress.
4. Take tasks back, make tasks. Each transaction compares what it was decided upon; what failed is decided anew.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import replace

import structlog

from magnetar.metadata.copy_txns import CopyTxn, Stored, drop_orphan, give_up
from magnetar.metadata.keyspace import Keyspace
from magnetar.metadata.records import Goal, Move, Operation, OperationState
from magnetar.metadata.store import Compare, MetadataStore
from magnetar.repair.listings import Cluster
from magnetar.repair.metrics import RepairMetrics
from magnetar.repair.operation_loop import Held, OperationLoop
from magnetar.repair.operation_txns import StoredOperation, create_tasks
from magnetar.repair.operations import Observed, RunningOperation, Step

PASS_S = 0.5
PASS_PAUSED_S = 2.0
READS_AT_ONCE = 16

log = structlog.get_logger("magnetar.repair")


class Runner(OperationLoop[RunningOperation]):
    """See the module. `run` it while this process is elected."""

    def __init__(
        self,
        store: MetadataStore,
        keyspace: Keyspace,
        metrics: RepairMetrics,
        *,
        now_us: Callable[[], int],
        pass_s: float = PASS_S,
    ) -> None:
        super().__init__(store, keyspace, now_us)
        self._metrics = metrics
        self._pass_s = pass_s

    def _is_mine(self, operation: Operation) -> bool:
        return operation.goal is not Goal.BROKERS

    def _core(self, operation: Operation, pages: Sequence[Sequence[Move]]) -> RunningOperation:
        return RunningOperation(operation, pages)

    async def _carry_on(self, live: Sequence[StoredOperation], leader: Compare) -> float | None:
        self._report(live)
        if not live:
            return None
        cluster = await self._listings.cluster()
        for stored in live:
            await self._advance(stored, cluster, leader)
        return PASS_PAUSED_S if all(one.operation.state is OperationState.PAUSED for one in live) else self._pass_s

    def _report(self, live: Sequence[StoredOperation]) -> None:
        operations = [one.operation for one in live]
        remaining = sum(one.size_bytes - one.bytes_done - one.bytes_skipped for one in operations)
        self._metrics.rebalance_remaining.set(remaining)
        self._metrics.rebalance_problems.set(sum(len(one.problems) for one in operations))

    async def _advance(self, stored: StoredOperation, cluster: Cluster, leader: Compare) -> None:
        held = await self._held(stored)
        seen = Observed(
            self._now_us(), cluster.snapshot(), cluster.given_up, cluster.settings.enabled, cluster.tasks, {}
        )
        before = held.core.operation
        wanted = held.core.to_read(seen)
        found = await self._read(wanted)
        step = held.core.step(replace(seen, ledgers=dict(zip(wanted, found, strict=True))))
        if held.core.operation == before or await self._store_progress(held, leader):
            await self._carry_out(held, step, leader)

    async def _read(self, ledger_ids: Sequence[int]) -> list[Stored | None]:
        found: list[Stored | None] = []
        for start in range(0, len(ledger_ids), READS_AT_ONCE):
            part = ledger_ids[start : start + READS_AT_ONCE]
            found += await asyncio.gather(*(self._listings.ledger(ledger_id) for ledger_id in part))
        return found

    async def _carry_out(self, held: Held[RunningOperation], step: Step, leader: Compare) -> None:
        name = held.core.operation.operation_id
        txns = [give_up(self._keyspace, ledger, task, None) for ledger, task in step.take_back]
        txns += [drop_orphan(self._keyspace, task) for task in step.orphans]
        txns += create_tasks(self._keyspace, name, held.revision, step.create, leader)
        for txn in txns:
            await self._send(txn)

    async def _send(self, txn: CopyTxn) -> None:
        """What does not succeed was decided upon records that have changed: the next pass decides anew."""
        result = await self._store.txn(txn.compares, txn.operations)
        if not result.succeeded:
            log.info("a step of a rebalancing is decided anew")
