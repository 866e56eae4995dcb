"""What a bookie does for the cluster, beside storing: it makes copies, reads its entries again and again, and may be
elected. Who is elected audits, and carries rebalancing operations out.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from prometheus_client import CollectorRegistry

from magnetar.ledger.bookie_rpc import BookieRpc, Bookies
from magnetar.metadata.keyspace import Keyspace
from magnetar.metadata.store import MetadataStore
from magnetar.repair.auditor import Auditor
from magnetar.repair.metrics import RepairMetrics
from magnetar.repair.replicator import Replicator
from magnetar.repair.runner import Runner
from magnetar.repair.scrub import Scrubber


class RepairWorkers:
    """Of one bookie. `start` them once it is registered; `stop` them before it stops."""

    def __init__(
        self,
        bookie_id: str,
        local: BookieRpc,
        bookies: Bookies,
        store: MetadataStore,
        keyspace: Keyspace,
        registry: CollectorRegistry,
        *,
        reborn: bool = False,
        now_us: Callable[[], int] = lambda: time.time_ns() // 1000,
    ) -> None:
        metrics = RepairMetrics.of(registry)
        self.replicator = Replicator(bookie_id, local, bookies, store, keyspace, metrics, now_us=now_us)
        self.scrubber = Scrubber(
            bookie_id, local, self.replicator, store, keyspace, metrics, reborn=reborn, now_us=now_us
        )
        runner = Runner(store, keyspace, metrics, now_us=now_us)
        self.auditor = Auditor(bookie_id, store, keyspace, metrics, now_us=now_us, duties=[runner.run])

    def start(self) -> None:
        self.replicator.start()
        self.scrubber.start()
        self.auditor.start()

    async def stop(self) -> None:
        await self.auditor.stop()
        await self.scrubber.stop()
        await self.replicator.stop()
