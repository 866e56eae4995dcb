"""Carries rebalancing operations out, one runner in the cluster: the elected auditor's process has it.

It keeps nothing that does not stand in the metadata store, but for what it read last: whoever is elected next goes on.

A pass over each operation that has not ended:

1. Read it anew if it is not as this runner left it: an operator paused, cancelled or throttled it.
2. Read the bookies and all open tasks, then the records of the ledgers that are to be decided about.
3. Decide (`operations.py`).
4. Store the progress. Whose comparison fails forgets what it knows of the operation, and reads it again.
5. Take tasks back, make tasks. Each transaction compares what it was decided upon; what failed is decided anew.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import replace

import structlog

from magnetar.metadata.codec import DamagedRecord
from magnetar.metadata.copy_txns import CopyTxn, Stored, drop_orphan, give_up
from magnetar.metadata.follow import Follower
from magnetar.metadata.keyspace import Keyspace
from magnetar.metadata.records import OperationState
from magnetar.metadata.store import Change, Compare, KeyValue, MetadataStore, MetadataUnavailable
from magnetar.repair.listings import Cluster, Listings
from magnetar.repair.metrics import RepairMetrics
from magnetar.repair.operation_txns import StoredOperation, create_tasks, store_progress
from magnetar.repair.operations import Observed, RunningOperation, Step

PASS_S = 0.5
PASS_PAUSED_S = 2.0
RETRY_S = 1.0
READS_AT_ONCE = 16

log = structlog.get_logger("magnetar.repair")


class Runner:
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
        self._metrics = metrics
        self._store = store
        self._keyspace = keyspace
        self._listings = Listings(store, keyspace)
        self._now_us = now_us
        self._pass_s = pass_s
        self._running: dict[str, _Held] = {}
        self._changed = asyncio.Event()

    async def run(self, leader: Compare) -> None:
        """Until it is cancelled; `leader` holds while nobody else is elected. What goes wrong is tried again."""
        follower = Follower(self._store, self._keyspace.operations_prefix(), self._listed, self._told)
        self._running.clear()
        try:
            while True:
                try:
                    await follower.start()
                    break
                except MetadataUnavailable:
                    await asyncio.sleep(RETRY_S)
            while True:
                await self._wait(await self._pass_in_time(leader))
        finally:
            await follower.close()

    def _listed(self, _items: Sequence[KeyValue]) -> None:
        self._changed.set()

    def _told(self, _changes: Sequence[Change]) -> None:
        self._changed.set()

    async def _wait(self, pause_s: float | None) -> None:
        """So long, or until something is ordered if there is nothing to do."""
        if pause_s is not None:
            await asyncio.sleep(pause_s)
        else:
            await self._changed.wait()
        self._changed.clear()

    async def _pass_in_time(self, leader: Compare) -> float | None:
        """One pass over all; returns after how long the next one is due, None: when something is ordered."""
        try:
            return await self._pass(leader)
        except (MetadataUnavailable, DamagedRecord) as reason:
            log.warning("rebalancing waits", reason=str(reason))
        except Exception:
            log.exception("rebalancing failed")
        self._running.clear()
        return RETRY_S

    async def _pass(self, leader: Compare) -> float | None:
        live = [one for one in await self._listings.operations() if not one.operation.ended_us]
        self._running = {name: held for name, held in self._running.items() if name in {_name(one) for one in live}}
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
        held = self._running.get(_name(stored))
        if held is None or held.revision != stored.revision:
            held = self._running[_name(stored)] = await self._load(stored)
        seen = Observed(
            self._now_us(), cluster.snapshot(), cluster.given_up, cluster.settings.enabled, cluster.tasks, {}
        )
        before = held.core.operation
        wanted = held.core.to_read(seen)
        found = await self._read(wanted)
        step = held.core.step(replace(seen, ledgers=dict(zip(wanted, found, strict=True))))
        if held.core.operation != before and not await self._store_progress(held, leader):
            del self._running[_name(stored)]
            return
        if held.core.operation.ended_us:
            _log_end(held.core)
        await self._carry_out(held, step, leader)

    async def _load(self, stored: StoredOperation) -> _Held:
        pages = await self._listings.pages(_name(stored))
        core = RunningOperation(stored.operation, [moves for moves, _ in pages])
        return _Held(core, stored.revision, {number: revision for number, (_, revision) in enumerate(pages)})

    async def _read(self, ledger_ids: Sequence[int]) -> list[Stored | None]:
        found: list[Stored | None] = []
        for start in range(0, len(ledger_ids), READS_AT_ONCE):
            part = ledger_ids[start : start + READS_AT_ONCE]
            found += await asyncio.gather(*(self._listings.ledger(ledger_id) for ledger_id in part))
        return found

    async def _store_progress(self, held: _Held, leader: Compare) -> bool:
        pages = {number: held.core.pages[number] for number in sorted(held.core.changed)}
        txn = store_progress(self._keyspace, held.core.operation, held.revision, pages, held.page_revisions, leader)
        result = await self._store.txn(txn.compares, txn.operations)
        if result.succeeded:
            held.revision = result.revision
            held.page_revisions.update(dict.fromkeys(pages, result.revision))
            held.core.changed.clear()
        return result.succeeded

    async def _carry_out(self, held: _Held, step: Step, leader: Compare) -> None:
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


class _Held:
    """An operation and what was read of it last."""

    def __init__(self, core: RunningOperation, revision: int, page_revisions: dict[int, int]) -> None:
        self.core = core
        self.revision = revision
        self.page_revisions = page_revisions


def _name(stored: StoredOperation) -> str:
    return stored.operation.operation_id


def _log_end(core: RunningOperation) -> None:
    operation = core.operation
    log.info(
        "rebalancing ended",
        operation=operation.operation_id,
        state=operation.state.name,
        moves_done=operation.moves_done,
        moves_skipped=operation.moves_skipped,
        bytes_done=operation.bytes_done,
    )
