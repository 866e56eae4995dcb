"""What whoever carries operations out does again and again: the shell that copies and hand-offs share.

One process of the cluster runs each kind of them, for as long as it is elected. It keeps nothing that does not stand in
the metadata store, but for what it read last: whoever is elected next goes on. An operation is read anew when it is not
as this process left it: an operator paused, cancelled or throttled it. Whose comparison fails forgets what it knows of
the operation, and reads it again.
"""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

import structlog

from magnetar.metadata.codec import DamagedRecord
from magnetar.metadata.follow import Follower
from magnetar.metadata.keyspace import Keyspace
from magnetar.metadata.records import Move, Operation
from magnetar.metadata.store import Change, Compare, KeyValue, MetadataStore, MetadataUnavailable
from magnetar.repair.listings import Listings
from magnetar.repair.operation_txns import StoredOperation, store_progress
from magnetar.repair.progress import OperationProgress

RETRY_S = 1.0

log = structlog.get_logger("magnetar.repair")

CoreT = TypeVar("CoreT", bound=OperationProgress)


class Held(Generic[CoreT]):
    """An operation and what was read of it last."""

    def __init__(self, core: CoreT, revision: int, page_revisions: dict[int, int]) -> None:
        self.core = core
        self.revision = revision
        self.page_revisions = page_revisions


class OperationLoop(ABC, Generic[CoreT]):
    """See the module. `run` it while this process is elected."""

    def __init__(self, store: MetadataStore, keyspace: Keyspace, now_us: Callable[[], int]) -> None:
        self._store = store
        self._keyspace = keyspace
        self._listings = Listings(store, keyspace)
        self._now_us = now_us
        self._running: dict[str, Held[CoreT]] = {}
        self._changed = asyncio.Event()

    @abstractmethod
    def _is_mine(self, operation: Operation) -> bool:
        """Whether operations of this kind are carried out here."""

    @abstractmethod
    def _core(self, operation: Operation, pages: Sequence[Sequence[Move]]) -> CoreT: ...

    @abstractmethod
    async def _carry_on(self, live: Sequence[StoredOperation], leader: Compare) -> float | None:
        """Goes on with all that have not ended; returns after how long again, None: when something is ordered."""

    @abstractmethod
    def _report(self, live: Sequence[StoredOperation]) -> None:
        """Sets the gauges for these."""

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
            self._running.clear()
            self._report(())
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
        try:
            found = [one for one in await self._listings.operations() if not one.operation.ended_us]
            live = [one for one in found if self._is_mine(one.operation)]
            self._running = {name: held for name, held in self._running.items() if name in map(_name, live)}
            return await self._carry_on(live, leader)
        except (MetadataUnavailable, DamagedRecord) as reason:
            log.warning("rebalancing waits", reason=str(reason))
        except Exception:
            log.exception("rebalancing failed")
        self._running.clear()
        return RETRY_S

    async def _held(self, stored: StoredOperation) -> Held[CoreT]:
        name = _name(stored)
        held = self._running.get(name)
        if held is None or held.revision != stored.revision:
            pages = await self._listings.pages(name)
            core = self._core(stored.operation, [moves for moves, _ in pages])
            revisions = {number: revision for number, (_, revision) in enumerate(pages)}
            held = self._running[name] = Held(core, stored.revision, revisions)
        return held

    async def _store_progress(self, held: Held[CoreT], leader: Compare) -> bool:
        """False: somebody changed the operation, and what was known of it is forgotten."""
        core = held.core
        pages = {number: core.pages[number] for number in sorted(core.changed)}
        txn = store_progress(self._keyspace, core.operation, held.revision, pages, held.page_revisions, leader)
        result = await self._store.txn(txn.compares, txn.operations)
        if not result.succeeded:
            self._running.pop(core.operation.operation_id, None)
            return False
        held.revision = result.revision
        held.page_revisions.update(dict.fromkeys(pages, result.revision))
        core.changed.clear()
        if core.operation.ended_us:
            _log_end(core.operation)
        return True


def _name(stored: StoredOperation) -> str:
    return stored.operation.operation_id


def _log_end(operation: Operation) -> None:
    log.info(
        "rebalancing ended",
        operation=operation.operation_id,
        state=operation.state.name,
        moves_done=operation.moves_done,
        moves_skipped=operation.moves_skipped,
        bytes_done=operation.bytes_done,
    )
