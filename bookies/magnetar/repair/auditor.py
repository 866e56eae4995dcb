"""The elected auditor: keeps the list of copies that are to be made in step with what the cluster has lost or drains.

A pass, at each change of what it depends on and every few seconds:

1. Look: sessions, cookies, drains, losses, settings, tasks; all complete, or the pass is given up. Nothing is concluded
   from a partial listing.
2. Losses are written, so that the delay outlives this auditor, and brokers know which bookies are given up.
3. Tasks that `audit.py` wants otherwise are changed; a claim goes in the same transaction.
4. For each bookie whose parts must go, the index names its ledgers: those that are CLOSED and have no task get one, as
   long as there is room. Ledgers that are open are up to their owners, who roll them.

Now and then all records of closed ledgers are looked at, for what no index key or change told: vacant places without a
task, bookies that nobody knows, claims without a task. Those in fewer racks than they could are counted: they are moved
when somebody asks for it (`planner.py`).

Two auditors may believe to be elected. Every transaction compares that this term holds, and what it was built on; so
the election saves work, and the comparisons keep it right.
"""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import replace
from typing import Any

import structlog

from magnetar.ledger.placement import lacks_racks
from magnetar.metadata import copy_txns, listing
from magnetar.metadata.codec import (
    DamagedRecord,
    decode_bookie,
    decode_copy,
    decode_ledger,
    decode_loss,
    decode_repair,
    encode_loss,
)
from magnetar.metadata.copy_txns import CopyTxn, Stored, StoredTask
from magnetar.metadata.election import Election
from magnetar.metadata.follow import Follower
from magnetar.metadata.keyspace import Keyspace, UnknownKey
from magnetar.metadata.records import VACANT, CopyReason, CopyTask, Loss, RepairSettings
from magnetar.metadata.store import (
    Compare,
    Delete,
    KeyValue,
    MetadataStore,
    MetadataUnavailable,
    Put,
    absent,
    exists,
    unchanged,
)
from magnetar.repair import audit
from magnetar.repair.audit import Cluster
from magnetar.repair.metrics import RepairMetrics

ELECTION = "auditor"
PASS_S = 5.0
SETTLE_S = 0.5
"""Changes come in crowds: a pass begins so long after the first of them."""
SWEEP_S = 300.0
INDEX_KEYS_PER_PASS = 4_000
"""Of one bookie that are looked at for ledgers without a task; the next pass goes on behind them."""
RETRY_S = 1.0

Key = tuple[int, str]

log = structlog.get_logger("magnetar.repair")


class Auditor:
    """A candidate. `start` it in every process that may audit.

    duties   what else one process alone does, for as long as it is elected; each is given what holds while it is
    """

    def __init__(
        self,
        candidate: str,
        store: MetadataStore,
        keyspace: Keyspace,
        metrics: RepairMetrics,
        *,
        now_us: Callable[[], int],
        duties: Sequence[Callable[[Compare], Coroutine[Any, Any, None]]] = (),
        rng: random.Random | None = None,
    ) -> None:
        self._duties = duties
        self._candidate = candidate
        self._store = store
        self._keyspace = keyspace
        self._metrics = metrics
        self._now_us = now_us
        self._rng = rng or random.Random()
        self._election = Election(store, keyspace, ELECTION, candidate, rng=self._rng)
        self._term_holds = absent(keyspace.election(ELECTION))
        self._changed = asyncio.Event()
        self._root: asyncio.Task[None] | None = None
        self._swept_at = 0.0
        self._index_position: dict[str, str] = {}

    def start(self) -> None:
        self._root = asyncio.create_task(self._run(), name=f"auditor {self._candidate}")

    async def stop(self) -> None:
        if self._root is not None:
            self._root.cancel()
            await asyncio.gather(self._root, return_exceptions=True)
        try:
            await self._election.resign()
        except MetadataUnavailable as reason:
            log.info("the auditor's election ends with its lease", reason=str(reason))

    @property
    def elected(self) -> bool:
        return self._election.leader

    async def _run(self) -> None:
        while True:
            await self._election.campaign()
            log.info("auditor elected", candidate=self._candidate)
            self._swept_at = 0.0
            self._index_position.clear()
            lost = asyncio.create_task(self._election.wait_lost())
            leading = asyncio.create_task(self._lead())
            term_holds = self._election.still_leader()
            duties = [asyncio.create_task(duty(term_holds)) for duty in self._duties]
            try:
                await asyncio.wait((lost, leading), return_when=asyncio.FIRST_COMPLETED)
            finally:
                for task in (lost, leading, *duties):
                    task.cancel()
                await asyncio.gather(lost, leading, *duties, return_exceptions=True)
            log.info("auditor is not elected any more", candidate=self._candidate)

    async def _lead(self) -> None:
        """A term."""
        self._term_holds = self._election.still_leader()
        followers = self._followers()
        try:
            for follower in followers:
                await follower.start()
            while self._election.leader:
                self._changed.clear()
                await self._wait_for_a_reason(await self._pass())
        except MetadataUnavailable as reason:
            log.info("auditor waits for metadata", reason=str(reason))
            await asyncio.sleep(RETRY_S)
        except Exception:
            log.exception("audit failed", candidate=self._candidate)
            await asyncio.sleep(RETRY_S)
        finally:
            for follower in followers:
                await follower.close()

    def _followers(self) -> list[Follower]:
        keys = self._keyspace
        prefixes = (keys.bookies_prefix(), keys.cookies_prefix(), keys.bookie_drains_prefix(), keys.copies_prefix())
        return [
            Follower(self._store, prefix, lambda _: self._changed.set(), lambda _: self._changed.set(), list_keys=False)
            for prefix in (*prefixes, keys.repair())
        ]

    async def _wait_for_a_reason(self, due_us: int | None) -> None:
        pause_s = PASS_S if due_us is None else min(PASS_S, max(0.0, (due_us - self._now_us()) / 1e6))
        try:
            async with asyncio.timeout(max(SETTLE_S, pause_s)):
                await self._changed.wait()
        except TimeoutError:
            return
        await asyncio.sleep(SETTLE_S)

    async def _pass(self) -> int | None:
        """Returns when the next bookie is to be given up."""
        try:
            return await self.audit()
        except (DamagedRecord, UnknownKey, MetadataUnavailable) as reason:
            log.warning("audit given up", candidate=self._candidate, reason=str(reason) or type(reason).__name__)
            return None

    async def audit(self) -> int | None:
        """One pass; returns when the next bookie is to be given up.

        Raises DamagedRecord, UnknownKey, MetadataUnavailable: nothing more is decided then.
        """
        cluster, losses = await self._look()
        judged = audit.judge_losses(cluster)
        await self._write_losses(judged, losses)
        cluster = replace(cluster, losses=judged)
        tasks = await self._tasks()
        load = audit.load_of(stored.task for stored in tasks.values())
        for stored in list(tasks.values()):
            if audit.needs_decision(cluster, stored.task):
                await self._decide(cluster, stored, tasks, load)
        for bookie, reason in sorted(audit.emptied(cluster).items()):
            await self._empty(cluster, bookie, reason, tasks, load)
        loop_time = asyncio.get_running_loop().time()
        if not self._swept_at or loop_time - self._swept_at >= SWEEP_S:
            await self._sweep(cluster, tasks, load)
            self._swept_at = loop_time
        await self._report(cluster, tasks)
        return audit.next_due_us(cluster)

    # --- looking ---

    async def _look(self) -> tuple[Cluster, dict[str, tuple[Loss, int]]]:
        keys = self._keyspace
        bookies = {
            keys.parse_bookie(item.key): decode_bookie(item.value) for item in await self._all(keys.bookies_prefix())
        }
        known = frozenset([keys.parse_cookie(item.key) for item in await self._all(keys.cookies_prefix())])
        drains = frozenset([keys.parse_bookie_drain(item.key) for item in await self._all(keys.bookie_drains_prefix())])
        losses = {
            keys.parse_loss(item.key): (decode_loss(item.value), item.mod_revision)
            for item in await self._all(keys.losses_prefix())
        }
        found = await self._store.get(keys.repair())
        settings = RepairSettings() if found is None else decode_repair(found.value)
        holding = [bookie for bookie in sorted(known - bookies.keys()) if await self._holds(bookie)]
        cluster = Cluster(
            bookies,
            known,
            frozenset(holding),
            drains,
            {bookie: loss for bookie, (loss, _) in losses.items()},
            settings,
            self._now_us(),
        )
        return cluster, losses

    async def _holds(self, bookie: str) -> bool:
        return bool((await self._store.range(self._keyspace.index_prefix(bookie), limit=1)).items)

    async def _tasks(self) -> dict[Key, StoredTask]:
        keys = self._keyspace
        return {
            keys.parse_copy(item.key): StoredTask(decode_copy(item.value), item.mod_revision)
            for item in await self._all(keys.copies_prefix())
        }

    async def _all(self, prefix: str) -> list[KeyValue]:
        return [item async for item in listing.items(self._store, prefix)]

    async def _ledger(self, ledger_id: int) -> Stored | None:
        found = await self._store.get(self._keyspace.ledger(ledger_id))
        return None if found is None else Stored(decode_ledger(found.value), found.mod_revision)

    # --- changing ---

    async def _write_losses(self, judged: dict[str, Loss], stored: dict[str, tuple[Loss, int]]) -> None:
        keys = self._keyspace
        for bookie in sorted(judged.keys() | stored.keys()):
            loss, (before, revision) = judged.get(bookie), stored.get(bookie, (None, 0))
            if loss == before:
                continue
            key = keys.loss(bookie)
            operation = Delete(key) if loss is None else Put(key, encode_loss(loss))
            await self._send(CopyTxn([unchanged(key, revision)], [operation]))
            self._log_loss(bookie, loss)

    def _log_loss(self, bookie: str, loss: Loss | None) -> None:
        if loss is None:
            log.warning("bookie is back, or was removed", bookie=bookie)
        elif loss.given_up:
            log.warning("lost bookie is given up: its part is made anew", bookie=bookie)
        else:
            log.warning("bookie is lost, and waited for", bookie=bookie)

    async def _decide(
        self, cluster: Cluster, stored: StoredTask, tasks: dict[Key, StoredTask], load: Counter[str]
    ) -> None:
        task = stored.task
        ledger = await self._ledger(task.ledger_id)
        if ledger is None:
            await self._send(copy_txns.drop_orphan(self._keyspace, stored))
            tasks.pop((task.ledger_id, task.place), None)
            return
        wanted = audit.decide(cluster, task, ledger.record, load, self._rng, _others(tasks, task.ledger_id, task.place))
        if wanted == task:
            return
        if wanted is not None and (wanted.target, wanted.place) == (task.target, task.place):
            txn = copy_txns.change_task(self._keyspace, stored, wanted)  # its claim goes on
        else:
            txn = copy_txns.give_up(self._keyspace, ledger, stored, wanted)
        if await self._send(txn):
            tasks.pop((task.ledger_id, task.place))
            if wanted is not None:
                tasks[task.ledger_id, task.place] = StoredTask(wanted, 0)
            log.info(
                "copy decided anew", ledger=task.ledger_id, place=task.place or "vacant", before=task, after=wanted
            )

    async def _empty(
        self, cluster: Cluster, bookie: str, reason: CopyReason, tasks: dict[Key, StoredTask], load: Counter[str]
    ) -> None:
        """Tasks for the ledgers of a bookie whose parts must go, as many as there is room for."""
        if not cluster.settings.enabled:
            return
        prefix = self._keyspace.index_prefix(bookie)
        room = audit.room_for(stored.task for stored in tasks.values())
        looked_at = 0
        async for page in listing.pages(self._store, prefix, after=self._index_position.pop(bookie, "")):
            for item in page.items:
                ledger_id = self._keyspace.parse_index(item.key)[1]
                if room <= 0:
                    return
                if (ledger_id, bookie) not in tasks:
                    ledger = await self._ledger(ledger_id)
                    if ledger is not None and copy_txns.names(ledger.record, bookie):
                        room -= await self._create(cluster, ledger, bookie, reason, tasks, load)
            looked_at += len(page.items)
            if looked_at >= INDEX_KEYS_PER_PASS:
                self._index_position[bookie] = page.items[-1].key
                return

    async def _create(
        self,
        cluster: Cluster,
        ledger: Stored,
        place: str,
        reason: CopyReason,
        tasks: dict[Key, StoredTask],
        load: Counter[str],
    ) -> bool:
        others = _others(tasks, ledger.record.ledger_id, place)
        task = audit.new_task(cluster, ledger.record, place, reason, load, self._rng, others)
        txn = copy_txns.create_task(self._keyspace, ledger, task)
        txn.compares += self._because(cluster, place, reason)
        created = await self._send(txn)
        if created:
            tasks[task.ledger_id, place] = StoredTask(task, 0)
        return created

    def _because(self, cluster: Cluster, place: str, reason: CopyReason) -> list[Compare]:
        """What makes the copy necessary holds at the moment when it is decided."""
        if place == VACANT:
            return []
        keys = self._keyspace
        if reason is CopyReason.DRAINING:
            return [exists(keys.bookie_drain(place))]
        compares = [absent(keys.bookie(place))]
        return [*compares, absent(keys.cookie(place))] if audit.is_unknown(cluster, place) else compares

    async def _send(self, txn: CopyTxn) -> bool:
        """False: something is not as it was read; the next pass sees it. Raises MetadataUnavailable."""
        result = await self._store.txn([*txn.compares, self._term_holds], txn.operations)
        if not result.succeeded:
            self._changed.set()
        return result.succeeded

    # --- all records ---

    async def _sweep(self, cluster: Cluster, tasks: dict[Key, StoredTask], load: Counter[str]) -> None:
        room = audit.room_for(stored.task for stored in tasks.values())
        racks = cluster.racks
        lacking_racks = 0
        async for item in listing.items(self._store, self._keyspace.ledgers_prefix()):
            ledger = Stored(decode_ledger(item.value), item.mod_revision)
            lacking_racks += lacks_racks(ledger.record, racks)
            room -= await self._look_after(cluster, ledger, tasks, load, room)
        self._metrics.lacking_racks.set(lacking_racks)
        for stored in list(tasks.values()):
            if stored.revision and await self._ledger(stored.task.ledger_id) is None:
                await self._send(copy_txns.drop_orphan(self._keyspace, stored))

    async def _look_after(
        self, cluster: Cluster, ledger: Stored, tasks: dict[Key, StoredTask], load: Counter[str], room: int
    ) -> int:
        """How many tasks were made."""
        record = ledger.record
        if record.copy is not None and (record.ledger_id, record.copy.replaces) not in tasks:
            await self._drop_stray_claim(ledger)
            return 0
        if not cluster.settings.enabled:
            return 0
        made = 0
        for place, reason in audit.places_in_need(cluster, record).items():
            if (record.ledger_id, place) not in tasks and made < room:
                made += await self._create(cluster, ledger, place, reason, tasks, load)
        return made

    async def _drop_stray_claim(self, ledger: Stored) -> None:
        """A claim whose task is gone: every transaction ends both, so this heals what something else did."""
        assert ledger.record.copy is not None
        txn = copy_txns.drop_stray_claim(self._keyspace, ledger)
        if await self._send(txn):
            log.error("a claim without a task was dropped", ledger=ledger.record.ledger_id, claim=ledger.record.copy)

    async def _report(self, cluster: Cluster, tasks: dict[Key, StoredTask]) -> None:
        metrics = self._metrics
        counts = Counter(stored.task.reason for stored in tasks.values())
        for reason in CopyReason:
            metrics.tasks.labels(reason.name.lower()).set(counts[reason])
        metrics.unassigned.set(sum(not stored.task.target for stored in tasks.values()))
        metrics.lost_bookies.set(len(cluster.missing))
        metrics.under_replicated.set(await self._under_replicated(cluster, tasks))
        metrics.last_audit.set(self._now_us() / 1e6)

    async def _under_replicated(self, cluster: Cluster, tasks: dict[Key, StoredTask]) -> int:
        """Ledgers that name a bookie without a session, or miss entries; of each bookie so many are counted."""
        wanting = audit.WANTING
        found = {ledger_id for (ledger_id, _), stored in tasks.items() if stored.task.reason in wanting}
        for bookie in sorted(cluster.holding):
            looked_at = 0
            async for page in listing.pages(self._store, self._keyspace.index_prefix(bookie)):
                found.update(self._keyspace.parse_index(item.key)[1] for item in page.items)
                looked_at += len(page.items)
                if looked_at >= INDEX_KEYS_PER_PASS:
                    break
        return len(found)


def _others(tasks: Mapping[Key, StoredTask], ledger_id: int, place: str) -> list[CopyTask]:
    """The ledger's tasks for other places."""
    return [stored.task for key, stored in tasks.items() if key[0] == ledger_id and key[1] != place]
