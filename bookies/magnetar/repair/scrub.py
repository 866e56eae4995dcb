"""The scrub of a bookie: reads all entries that it should have, slowly, and has repaired what is missing or damaged.

1. The index names the ledgers in which this bookie has a role; of those that are CLOSED every entry is read, at a rate
   that nobody notices. The bookie verifies what it reads; headers alone are looked at here.
2. What is not there becomes a task: complete this range, from the other members. The replicator does the rest.
3. A bookie that was reborn with an empty directory lacks everything: its first pass begins at once, at the rate of
   repair. That is how it gets its part back.

Nothing is concluded from what is found: a task that is made for nothing finds every entry right, and ends.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import structlog

from magnetar.ledger.bookie_rpc import BookieRpc, ReadGroup
from magnetar.metadata import copy_txns, listing
from magnetar.metadata.codec import DamagedRecord, decode_ledger
from magnetar.metadata.copy_txns import Stored
from magnetar.metadata.keyspace import Keyspace, UnknownKey
from magnetar.metadata.records import CopyReason, CopyTask, LedgerRecord
from magnetar.metadata.store import MetadataStore, MetadataUnavailable
from magnetar.repair.copying import Held, first_group, runs_of
from magnetar.repair.metrics import RepairMetrics
from magnetar.repair.replicator import Replicator
from magnetar.repair.throttle import Throttle

BYTES_PER_S = 4 << 20
READ_BYTES = 1 << 20
FIRST_PASS_AFTER_S = 600.0
PASS_EVERY_S = 24 * 3600.0
RETRY_S = 30.0
TASKS_MAX = 64
"""Of this bookie, while it looks for more to do."""
LOOK_AGAIN_S = 1.0

log = structlog.get_logger("magnetar.repair")


class Scrubber:
    """`start` it beside the bookie's replicator, whose settings hold here too.

    reborn   whether the bookie's directory was lost, and is to be filled again at once
    """

    def __init__(
        self,
        bookie_id: str,
        local: BookieRpc,
        replicator: Replicator,
        store: MetadataStore,
        keyspace: Keyspace,
        metrics: RepairMetrics,
        *,
        reborn: bool,
        now_us: Callable[[], int],
    ) -> None:
        self._bookie_id = bookie_id
        self._local = local
        self._replicator = replicator
        self._store = store
        self._keyspace = keyspace
        self._metrics = metrics
        self._reborn = reborn
        self._now_us = now_us
        self._throttle = Throttle(BYTES_PER_S, 0.0)
        self._root: asyncio.Task[None] | None = None

    def start(self) -> None:
        self._root = asyncio.create_task(self._run(), name=f"scrub {self._bookie_id}")

    async def stop(self) -> None:
        if self._root is not None:
            self._root.cancel()
            await asyncio.gather(self._root, return_exceptions=True)

    async def _run(self) -> None:
        await asyncio.sleep(0 if self._reborn else FIRST_PASS_AFTER_S)
        while True:
            try:
                await self.scrub()
                self._reborn = False
                self._metrics.last_scrub.labels(self._bookie_id).set(self._now_us() / 1e6)
                await asyncio.sleep(PASS_EVERY_S)
            except (MetadataUnavailable, DamagedRecord, UnknownKey) as reason:
                log.warning("scrub is begun again", bookie=self._bookie_id, reason=str(reason))
                await asyncio.sleep(RETRY_S)
            except Exception:
                log.exception("scrub failed", bookie=self._bookie_id)
                await asyncio.sleep(RETRY_S)

    async def scrub(self) -> int:
        """One pass; returns how many ledgers are to be completed. Raises MetadataUnavailable, DamagedRecord."""
        findings = 0
        prefix = self._keyspace.index_prefix(self._bookie_id)
        async for item in listing.items(self._store, prefix):
            findings += await self._scrub_ledger(self._keyspace.parse_index(item.key)[1])
        return findings

    async def _scrub_ledger(self, ledger_id: int) -> bool:
        ledger = await self._ledger(ledger_id)
        if ledger is None or self._bookie_id not in ledger.record.bookies():
            return False
        task = CopyTask(ledger_id, self._bookie_id, self._bookie_id, CopyReason.SCRUB, created_us=self._now_us())
        missing = await self._missing(ledger.record, task)
        if missing is None:
            return False
        await self._wait_for_room()
        task = CopyTask(
            ledger_id, self._bookie_id, self._bookie_id, CopyReason.SCRUB, "", *missing, created_us=self._now_us()
        )
        txn = copy_txns.create_task(self._keyspace, ledger, task)
        # Whoever has changed the ledger, or has a task for it, sees to it; the next pass looks again.
        if (await self._store.txn(txn.compares, txn.operations)).succeeded:
            self._metrics.scrub_findings.labels(self._bookie_id).inc()
            log.warning("entries are missing or damaged", bookie=self._bookie_id, ledger=ledger_id, entries=missing)
        return True

    async def _ledger(self, ledger_id: int) -> Stored | None:
        found = await self._store.get(self._keyspace.ledger(ledger_id))
        return None if found is None else Stored(decode_ledger(found.value), found.mod_revision)

    async def _missing(self, record: LedgerRecord, task: CopyTask) -> tuple[int, int] | None:
        """From the first to the last entry that this bookie does not have as it should; None = it has all."""
        span: tuple[int, int] | None = None
        for run in runs_of(record, task):
            following = run.first
            while following <= run.last:
                await self._keep_to_the_rate()
                group = ReadGroup(
                    record.ledger_id,
                    record.epoch,
                    record.token,
                    following,
                    run.last,
                    max_bytes=READ_BYTES,
                    headers_only=True,
                )
                found = first_group(record.ledger_id, following, (await self._local.read(group)).answers)
                entries = len(found.headers) if isinstance(found, Held) else found.entries
                if isinstance(found, Held):
                    self._count(record, entries)
                else:
                    span = (following if span is None else span[0], following + entries - 1)
                following += entries
        return span

    def _count(self, record: LedgerRecord, entries: int) -> None:
        size_bytes = record.length * entries // (record.last_entry + 1)
        self._throttle.spend(size_bytes, self._now())
        self._metrics.scrubbed_bytes.labels(self._bookie_id).inc(size_bytes)

    async def _keep_to_the_rate(self) -> None:
        while True:
            settings = self._replicator.settings
            self._throttle.set_rate(settings.bytes_per_s if self._reborn else BYTES_PER_S, self._now())
            pause_s = self._throttle.wait_s(self._now()) if settings.enabled else LOOK_AGAIN_S
            if pause_s <= 0:
                return
            await asyncio.sleep(min(pause_s, LOOK_AGAIN_S))

    async def _wait_for_room(self) -> None:
        while True:
            if len(self._replicator.tasks()) < TASKS_MAX:
                return
            await asyncio.sleep(LOOK_AGAIN_S)

    @staticmethod
    def _now() -> float:
        return asyncio.get_running_loop().time()
