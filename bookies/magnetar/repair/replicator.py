"""The replicator of a bookie: makes the copies whose target this bookie is, a few at a time, at a bounded rate.

For each task (`copy_txns.py` has the rules):

1. Read the task and the ledger's record. What is not there is not needed any more.
2. Claim the copy, unless the place only completes what it has. The claim compares the record in which the racks were
   judged, and nothing moves beside a claim: what a rebalancing moves keeps its racks, whatever was repaired since the
   move was planned. A move that would lose one is given back; one whose members are not all there waits for them.
3. Copy (`copying.py`).
4. Finish: one transaction changes the fragments, ends the claim and deletes the task.

What goes wrong leaves the claim where it is: the copy is tried again after a pause that grows, and goes on where it
was. Why it does not go on stands in the task. To take it away from this bookie is up to the auditor.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import structlog

from magnetar.ledger import placement
from magnetar.ledger.bookie_rpc import BookieRpc, Bookies
from magnetar.metadata import copy_txns
from magnetar.metadata.codec import DamagedRecord, decode_copy, decode_ledger, decode_operation, decode_repair
from magnetar.metadata.copy_txns import CopyTxn, Stored, StoredTask
from magnetar.metadata.follow import Follower
from magnetar.metadata.keyspace import Keyspace
from magnetar.metadata.records import CopyReason, CopyTask, LedgerRecord, RepairSettings
from magnetar.metadata.store import Change, KeyValue, MetadataStore, MetadataUnavailable
from magnetar.repair.copier import Copier
from magnetar.repair.copying import CopyStalled
from magnetar.repair.metrics import RepairMetrics
from magnetar.repair.operation_rates import OperationRates
from magnetar.repair.throttle import Throttle

COPIES_AT_ONCE = 2
UNREPLICATED_REST_US = 10_000_000
RETRY_FIRST_S = 0.5
RETRY_MAX_S = 30.0
LOOK_AGAIN_S = 0.25
"""At the rate, while a copy waits for it: it may have been changed."""
MARK_BYTES = 16

URGENCY = (
    CopyReason.LOST,
    CopyReason.UNREPLICATED,
    CopyReason.SCRUB,
    CopyReason.DRAINING,
    CopyReason.REBALANCE,
)
"""Which of the waiting tasks is begun first."""

Key = tuple[int, str]
"""(ledger, place)"""

log = structlog.get_logger("magnetar.repair")


class TaskChanged(Exception):
    """Task or ledger are not as they were read: look again."""


@dataclass(slots=True)
class _Pause:
    until: float
    next_s: float


class Replicator:
    """See the module. `start` it once the bookie is registered, `stop` it before the bookie stops."""

    def __init__(
        self,
        bookie_id: str,
        target: BookieRpc,
        bookies: Bookies,
        store: MetadataStore,
        keyspace: Keyspace,
        metrics: RepairMetrics,
        *,
        now_us: Callable[[], int],
        rng: random.Random | None = None,
    ) -> None:
        self._bookie_id = bookie_id
        self._target = target
        self._bookies = bookies
        self._store = store
        self._keyspace = keyspace
        self._metrics = metrics
        self._now_us = now_us
        self._rng = rng or random.Random()
        self.settings = RepairSettings()
        self._tasks: dict[Key, CopyTask] = {}
        self._pauses: dict[Key, _Pause] = {}
        self._running: dict[Key, asyncio.Task[None]] = {}
        self._changed = asyncio.Event()
        self._turn = asyncio.Lock()
        self._throttle = Throttle(self.settings.bytes_per_s, 0.0)
        self._operation_rates = OperationRates()
        self._root: asyncio.Task[None] | None = None
        self._followers = (
            Follower(store, keyspace.copies_prefix(), self._tasks_listed, self._tasks_changed),
            Follower(store, keyspace.repair(), self._settings_listed, self._settings_changed),
            Follower(store, keyspace.operations_prefix(), self._operations_listed, self._operations_changed),
        )

    def start(self) -> None:
        self._root = asyncio.create_task(self._run(), name=f"replicator {self._bookie_id}")

    async def stop(self) -> None:
        """Copies under way are left where they are: they go on when this bookie is back."""
        tasks = [task for task in (self._root, *self._running.values()) if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for follower in self._followers:
            await follower.close()

    def tasks(self) -> Sequence[CopyTask]:
        """Those of this bookie, begun or not."""
        return [task for task in self._tasks.values() if task.target == self._bookie_id]

    # --- what the watches say ---

    def _tasks_listed(self, items: Sequence[KeyValue]) -> None:
        self._tasks.clear()
        self._pauses.clear()
        for item in items:
            self._remember(item.key, item)
        self._changed.set()

    def _tasks_changed(self, changes: Sequence[Change]) -> None:
        for change in changes:
            self._remember(change.key, change.current)
        self._changed.set()

    def _remember(self, key: str, item: KeyValue | None) -> None:
        parsed = self._keyspace.parse_copy(key)
        before = self._tasks.pop(parsed, None)
        if item is not None:
            self._tasks[parsed] = decode_copy(item.value)
        if (
            before is not None
            and item is not None
            and replace(before, problem="") == replace(self._tasks[parsed], problem="")
        ):
            return  # only its problem changed
        # The end of one copy of a ledger is what the next one waits for.
        for waiting in [key for key in self._pauses if key[0] == parsed[0]]:
            del self._pauses[waiting]
        if item is not None and self._tasks[parsed].target == self._bookie_id:
            self._let_rest(parsed, self._tasks[parsed])

    def _settings_listed(self, items: Sequence[KeyValue]) -> None:
        self._set(decode_repair(items[0].value) if items else RepairSettings())

    def _settings_changed(self, changes: Sequence[Change]) -> None:
        current = changes[-1].current
        self._set(RepairSettings() if current is None else decode_repair(current.value))

    def _operations_listed(self, items: Sequence[KeyValue]) -> None:
        self._operation_rates.forget_all()
        for item in items:
            self._operation_rates.keep(decode_operation(item.value))

    def _operations_changed(self, changes: Sequence[Change]) -> None:
        for change in changes:
            if change.current is None:
                self._operation_rates.forget(self._keyspace.parse_operation(change.key))
            else:
                self._operation_rates.keep(decode_operation(change.current.value))

    def _set(self, settings: RepairSettings) -> None:
        self.settings = settings
        self._throttle.set_rate(settings.bytes_per_s, self._now())
        self._changed.set()

    # --- which task is next ---

    async def _run(self) -> None:
        await self._follow()
        while True:
            self._changed.clear()
            while len(self._running) < COPIES_AT_ONCE and (key := self._next()) is not None:
                work = asyncio.create_task(self._work(key, self._tasks[key]), name=f"copy of ledger {key[0]}")
                self._running[key] = work
                work.add_done_callback(lambda _, key=key: self._ended(key))  # type: ignore[misc]
            try:
                async with asyncio.timeout(self._until_next_pause_ends()):
                    await self._changed.wait()
            except TimeoutError:
                continue

    async def _follow(self) -> None:
        for follower in self._followers:
            while True:
                try:
                    await follower.start()
                    break
                except (MetadataUnavailable, DamagedRecord) as reason:
                    log.warning("replicator waits for metadata", bookie=self._bookie_id, reason=str(reason))
                    await asyncio.sleep(RETRY_FIRST_S)

    def _ended(self, key: Key) -> None:
        self._running.pop(key, None)
        self._changed.set()

    def _next(self) -> Key | None:
        """The most urgent task that can be begun; never two of one ledger, for the second could claim nothing."""
        if not self.settings.enabled:
            return None
        now = self._now()
        busy = {ledger_id for ledger_id, _ in self._running}
        ready = [
            (URGENCY.index(task.reason), key)
            for key, task in self._tasks.items()
            if task.target == self._bookie_id and key[0] not in busy and self._may_begin(key, now)
        ]
        return min(ready)[1] if ready else None

    def _may_begin(self, key: Key, now: float) -> bool:
        pause = self._pauses.get(key)
        return pause is None or pause.until <= now

    def _let_rest(self, key: Key, task: CopyTask) -> None:
        """A takeover closes many ledgers at once, and slow members often catch up: neither is the time for copies."""
        rest_us = task.created_us + UNREPLICATED_REST_US - self._now_us()
        if task.reason is CopyReason.UNREPLICATED and rest_us > 0:
            until = self._now() + min(rest_us, UNREPLICATED_REST_US) / 1e6
            self._pauses[key] = _Pause(until, RETRY_FIRST_S)

    def _until_next_pause_ends(self) -> float | None:
        times = [pause.until for key, pause in self._pauses.items() if key not in self._running]
        return max(0.01, min(times) - self._now()) if times else None

    # --- one task ---

    async def _work(self, key: Key, task: CopyTask) -> None:
        """A task's root. By now it may be gone, or another one."""
        try:
            await self._do(key)
        except CopyStalled as stalled:
            self._retry_later(key)
            self._count(task, "stalled")
            await self._tell(key, str(stalled))
        except (MetadataUnavailable, TaskChanged, DamagedRecord) as reason:
            log.info("copy is tried again", bookie=self._bookie_id, ledger=key[0], reason=str(reason))
            self._retry_later(key)
        except Exception:
            log.exception("copy failed", bookie=self._bookie_id, ledger=key[0], place=key[1])
            self._retry_later(key)
            self._count(task, "failed")

    def _retry_later(self, key: Key) -> None:
        pause = self._pauses.setdefault(key, _Pause(0.0, RETRY_FIRST_S))
        pause.until = self._now() + pause.next_s * (0.5 + self._rng.random() / 2)
        pause.next_s = min(RETRY_MAX_S, pause.next_s * 2)

    async def _do(self, key: Key) -> None:
        task = await self._read_task(key)
        if task is None or task.task.target != self._bookie_id:
            return
        ledger = await self._read_ledger(key[0])
        if ledger is None:
            await self._send(copy_txns.drop_orphan(self._keyspace, task))
            self._count(task.task, "trimmed")
            return
        if not copy_txns.names(ledger.record, task.task.place):
            await self._send(copy_txns.give_up(self._keyspace, ledger, task, None))
            return
        if not task.task.completes:
            if not copy_txns.takes(ledger.record, task.task.place, self._bookie_id):
                await self._send(copy_txns.give_up(self._keyspace, ledger, task, replace(task.task, target="")))
                return
            if task.task.reason is CopyReason.REBALANCE and self._loses_rack(ledger.record, task.task):
                await self._send(copy_txns.give_up(self._keyspace, ledger, task, None))
                self._count(task.task, "would lose a rack")
                return
            ledger = await self._claim(ledger, task)
        await self._copier(ledger, task.task).run()
        await self._finish(key, ledger, task)

    def _loses_rack(self, record: LedgerRecord, task: CopyTask) -> bool:
        """Raises CopyStalled while that cannot be told: who has no session tells of no rack."""
        racks = {bookie.bookie_id: bookie.rack for bookie in self._bookies.registered()}
        if task.target not in racks or (away := placement.unknown_racks(record, task.place, task.target, racks)):
            names = ", ".join(sorted(away)) if task.target in racks else task.target
            raise CopyStalled(f"it waits for {names} to be back or repaired: racks could be lost meanwhile")
        return placement.loses_rack(record, task.place, task.target, racks)

    def _copier(self, ledger: Stored, task: CopyTask) -> Copier:
        key = (task.ledger_id, task.place)

        async def pace(entries: int, size_bytes: int) -> None:
            self._throttle_of(task).spend(size_bytes, self._now())
            self._metrics.copied_entries.labels(self._bookie_id, task.reason.name.lower()).inc(entries)
            self._metrics.copied_bytes.labels(self._bookie_id, task.reason.name.lower()).inc(size_bytes)
            await self._keep_to_the_rate(task)

        def rate() -> float:
            return self._throttle_of(task).bytes_per_s

        def wanted() -> bool:
            current = self._tasks.get(key)
            return current is not None and current.target == self._bookie_id

        return Copier(ledger.record, task, self._target, self._bookies, self._turn, rate, pace, wanted)

    async def _keep_to_the_rate(self, task: CopyTask) -> None:
        pause_s = self._throttle_of(task).wait_s(self._now())
        while pause_s > 0:
            await asyncio.sleep(min(pause_s, LOOK_AGAIN_S))
            pause_s = self._throttle_of(task).wait_s(self._now())

    def _throttle_of(self, task: CopyTask) -> Throttle:
        """That of its operation, as long as it belongs to one."""
        current = self._tasks.get((task.ledger_id, task.place), task)
        own = self._operation_rates.throttle(current.operation, self._tasks.values(), self._now())
        return self._throttle if own is None else own

    async def _claim(self, ledger: Stored, task: StoredTask) -> Stored:
        """The ledger under the claim. Raises CopyStalled while another copy of it is under way, TaskChanged."""
        if not copy_txns.can_claim(ledger.record, task.task):
            assert ledger.record.copy is not None
            raise CopyStalled(f"another copy of this ledger is under way target=`{ledger.record.copy.target}`")
        mark = self._rng.randbytes(MARK_BYTES)
        txn = copy_txns.claim(self._keyspace, ledger, task, mark, self._now_us())
        try:
            result = await self._store.txn(txn.compares, txn.operations)
            if not result.succeeded:
                raise TaskChanged("task or ledger changed before the claim")
        except MetadataUnavailable:
            log.info("outcome of a claim is unknown", bookie=self._bookie_id, ledger=ledger.record.ledger_id)
        found = await self._read_ledger(ledger.record.ledger_id)
        if found is None or found.record.copy is None or found.record.copy.mark != mark:
            raise TaskChanged("the claim is not there")
        return found

    async def _finish(self, key: Key, ledger: Stored, task: StoredTask) -> None:
        """Raises TaskChanged if ledger or task were changed meanwhile; nothing is changed then."""
        try:
            await self._send(copy_txns.finish(self._keyspace, ledger, task))
        except TaskChanged:
            current = await self._read_task(key)
            if current is None or replace(current.task, problem="") != replace(task.task, problem=""):
                raise
            # Its problem was written meanwhile, by this bookie.
            await self._send(copy_txns.finish(self._keyspace, ledger, current))
        self._count(task.task, "done")
        log.info(
            "ledger copied",
            bookie=self._bookie_id,
            ledger=task.task.ledger_id,
            place=task.task.place or "vacant",
            reason=task.task.reason.name,
        )

    async def _tell(self, key: Key, problem: str) -> None:
        """Writes why the task does not go on, once."""
        try:
            task = await self._read_task(key)
            if task is not None and task.task.target == self._bookie_id and task.task.problem != problem:
                changed = replace(task.task, problem=problem)
                await self._send(copy_txns.change_task(self._keyspace, task, changed))
                log.warning("copy stalled", bookie=self._bookie_id, ledger=key[0], place=key[1], problem=problem)
        except (MetadataUnavailable, TaskChanged, DamagedRecord):
            return

    # --- the store ---

    async def _send(self, txn: CopyTxn) -> None:
        """Raises TaskChanged if a comparison failed, MetadataUnavailable if the outcome is unknown: both read again."""
        if not (await self._store.txn(txn.compares, txn.operations)).succeeded:
            raise TaskChanged("task or ledger changed meanwhile")

    async def _read_task(self, key: Key) -> StoredTask | None:
        found = await self._store.get(self._keyspace.copy(*key))
        return None if found is None else StoredTask(decode_copy(found.value), found.mod_revision)

    async def _read_ledger(self, ledger_id: int) -> Stored | None:
        found = await self._store.get(self._keyspace.ledger(ledger_id))
        return None if found is None else Stored(decode_ledger(found.value), found.mod_revision)

    def _count(self, task: CopyTask, outcome: str) -> None:
        self._metrics.copies.labels(self._bookie_id, task.reason.name.lower(), outcome).inc()

    @staticmethod
    def _now() -> float:
        return asyncio.get_running_loop().time()
