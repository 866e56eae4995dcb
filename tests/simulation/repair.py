"""Moves copies of closed ledgers between bookies while everything fails: the real replicators and auditor.

Each bookie has a replicator in a process of its own, and one process audits; any of them is killed and started again,
or stands still, at any await. A driver gives orders as a rebalancing does: tasks that move a part from one bookie to
another, often back to one that has just been left, where a collector may be about to delete the old copy; and it takes
some of them back. Tasks that owners write when they close ledgers are carried out beside them.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable

from prometheus_client import CollectorRegistry
from simulation.bookies import SimulatedBookie
from simulation.loop import Process
from simulation.metadata import SimulatedMetadata
from simulation.world import World

from magnetar.ledger.bookie_directory import BookieDirectory
from magnetar.ledger.placement import loses_rack
from magnetar.metadata import copy_txns
from magnetar.metadata.codec import decode_copy, decode_ledger, encode_repair
from magnetar.metadata.copy_txns import CopyTxn, Stored, StoredTask
from magnetar.metadata.records import CopyReason, CopyTask, RepairSettings
from magnetar.metadata.store import MetadataUnavailable, Put
from magnetar.repair.auditor import Auditor
from magnetar.repair.copying import runs_of
from magnetar.repair.metrics import RepairMetrics
from magnetar.repair.replicator import Replicator

PAUSE_S = 0.1
TASKS_MAX = 6
MOVED_BACK = 0.7
"""Share of the moves to a bookie that has just been left."""
ORDERED_AGAIN = 0.3
"""Share of the moves of a ledger that has a task already."""
TAKEN_BACK = 0.15
KILLED = 0.1
STOOD_STILL = 0.1
STILL_S_MAX = 8.0
AUDITOR = "auditor"


class Repair:
    """Works until it is stopped, and leaves no task and no claim behind."""

    def __init__(self, world: World, shards: set[int], seed: int) -> None:
        self._world = world
        self._shards = shards
        """Those whose ledgers are never deleted: of others a move may end by a trim."""
        self._rng = random.Random(f"repair {seed}")
        self._stopping = False
        self._metadata = SimulatedMetadata(world.metadata, Process("repair"))
        self._workers: dict[str, Process] = {}
        self._made: dict[tuple[int, str], CopyTask] = {}
        self._left: dict[int, str] = {}
        """Ledger -> the bookie that its last move left."""
        self._taken: dict[int, str] = {}
        """Ledger -> the bookie that took it over last."""
        self.moved = 0
        for name in (*world.bookies(), AUDITOR):
            self._start(name)
        self.task = world.spawn(self._metadata._process, self._run(), "repair")

    async def stop(self) -> None:
        """The orders end; what they have begun is given up."""
        self._stopping = True
        await self.task
        for name in list(self._workers):
            self._kill(name)
        for work in (self._give_all_up, self._check_moved):
            left: object = True
            while left:
                await asyncio.sleep(PAUSE_S)
                left = await self._unanswered(work)

    # --- workers ---

    def _start(self, name: str) -> None:
        process = self._workers[name] = Process(f"repair {name}")
        self._world.spawn(process, self._work(name, process), f"repair {name}")

    async def _work(self, name: str, process: Process) -> None:
        world = self._world
        metadata = SimulatedMetadata(world.metadata, process)
        rng = random.Random(f"worker {name} {world.seed} {world.loop.time()}")
        metrics = RepairMetrics.of(CollectorRegistry())
        if name == AUDITOR:
            Auditor(name, metadata, world.keyspace, metrics, now_us=self._now_us, rng=rng).start()
            return
        directory = BookieDirectory(
            metadata,
            world.keyspace,
            lambda registration: SimulatedBookie(world.network, process, registration.bookie_id, world.reachable),
            disconnect=lambda bookie: bookie.close(),  # type: ignore[attr-defined]
            rng=rng,
        )
        await directory.start()
        target = SimulatedBookie(world.network, process, name, world.reachable)
        Replicator(name, target, directory, metadata, world.keyspace, metrics, now_us=self._now_us, rng=rng).start()

    def _now_us(self) -> int:
        return 1_000_000_000_000_000 + int(self._world.loop.time() * 1_000_000)

    def _kill(self, name: str) -> None:
        process = self._workers.pop(name)
        self._world._dead.append((process, None, self._world.loop.kill(process)))
        self._world.network.died(process)

    def _fail_some(self) -> None:
        name = self._rng.choice(sorted(self._workers))
        if self._rng.random() < KILLED:
            self._kill(name)
            self._start(name)
        elif self._rng.random() < STOOD_STILL:
            process = self._workers[name]
            if not process.paused:
                self._world.loop.pause(process)
                self._world.loop.call_later(self._rng.random() * STILL_S_MAX, self._go_on, process)

    def _go_on(self, process: Process) -> None:
        if process.alive and process.paused:
            self._world.loop.resume(process)

    # --- orders ---

    async def _set_rate(self) -> None:
        """Mostly so low that a collector comes by while a ledger is copied."""
        settings = RepairSettings(bytes_per_s=self._rng.choice([10_000, 30_000, 10_000_000]))
        await self._metadata.txn([], [Put(self._world.keyspace.repair(), encode_repair(settings))])

    async def _run(self) -> None:
        await self._unanswered(self._set_rate)
        while not self._stopping:
            await asyncio.sleep(self._rng.expovariate(1 / PAUSE_S))
            self._fail_some()
            await self._unanswered(self._order)

    async def _unanswered(self, work: Callable[[], object]) -> object:
        """What the work returns; True while the store does not answer."""
        try:
            return await work()  # type: ignore[misc]
        except MetadataUnavailable:
            return True

    async def _order(self) -> None:
        tasks = await self._tasks()
        await self._count(tasks)
        mine = [stored for stored in tasks if stored.task.reason is CopyReason.REBALANCE]
        if mine and self._rng.random() < TAKEN_BACK:
            await self._give_up(self._rng.choice(mine))
        elif len(mine) < TASKS_MAX:
            await self._move_one({(stored.task.ledger_id, stored.task.place) for stored in tasks})

    async def _move_one(self, busy: set[tuple[int, str]]) -> None:
        """Of a ledger with a task, too, for another place: each is allowed as long as the other one is not done."""
        keyspace = self._world.keyspace
        found = (await self._metadata.range(keyspace.ledgers_prefix())).items
        ledgers = [Stored(decode_ledger(item.value), item.mod_revision) for item in found]
        if not ledgers:
            return
        ordered = {ledger_id for ledger_id, _ in self._made}
        again = [ledger for ledger in ledgers if ledger.record.ledger_id in ordered]
        ledger = self._rng.choice(again if again and self._rng.random() < ORDERED_AGAIN else ledgers)
        record = ledger.record
        targets = [name for name in self._world.bookies() if name not in record.bookies()]
        if not targets:
            return
        place, target = self._rng.choice(sorted(record.bookies())), self._rng.choice(targets)
        if (record.ledger_id, place) in busy:
            return
        if self._left.get(record.ledger_id) in targets and self._rng.random() < MOVED_BACK:
            target = self._left[record.ledger_id]
        if self._world.racks and loses_rack(record, place, target, self._world.racks):
            return  # As a plan: whether it holds when it is carried out is another question.
        task = CopyTask(record.ledger_id, place, target, CopyReason.REBALANCE, operation="simulated")
        if await self._send(copy_txns.create_task(keyspace, ledger, task)):
            self._made[record.ledger_id, place] = task

    async def _count(self, tasks: list[StoredTask]) -> None:
        """Of the orders that are gone, those that were carried out."""
        left = {(stored.task.ledger_id, stored.task.place) for stored in tasks}
        for ledger_id, place in [key for key in self._made if key not in left]:
            ledger = await self._ledger(ledger_id)
            task = self._made.pop((ledger_id, place))
            if ledger is not None and task.target in ledger.record.bookies():
                self.moved += 1
                self._left[ledger_id] = task.place
                self._taken[ledger_id] = task.target

    async def _give_up(self, stored: StoredTask) -> None:
        ledger = await self._ledger(stored.task.ledger_id)
        if ledger is None:
            await self._send(copy_txns.drop_orphan(self._world.keyspace, stored))
        else:
            await self._send(copy_txns.give_up(self._world.keyspace, ledger, stored, None))

    async def _give_all_up(self) -> bool:
        """True while there are tasks."""
        tasks = await self._tasks()
        for stored in tasks:
            await self._give_up(stored)
        return bool(tasks)

    async def _check_moved(self) -> None:
        """Who took a part over has all of it, however often it was moved before: nothing else would find that out."""
        for ledger_id, target in self._taken.items():
            ledger = await self._ledger(ledger_id)
            if ledger is None or target not in ledger.record.bookies() or target in self._world.lost_disks:
                continue
            whole = CopyTask(ledger_id, target, target, CopyReason.SCRUB)
            stored = self._world.disks[target].store.durable_entries(ledger_id)
            for run in runs_of(ledger.record, whole):
                missing = [entry_id for entry_id in range(run.first, run.last + 1) if entry_id not in stored]
                if missing:
                    self._world.boundaries._fail(
                        f"copy: {target} took over a part and lacks entries: ledger={ledger_id} entries={missing[:5]}"
                    )

    # --- the store ---

    async def _tasks(self) -> list[StoredTask]:
        found = (await self._metadata.range(self._world.keyspace.copies_prefix())).items
        return [StoredTask(decode_copy(item.value), item.mod_revision) for item in found]

    async def _ledger(self, ledger_id: int) -> Stored | None:
        found = await self._metadata.get(self._world.keyspace.ledger(ledger_id))
        return None if found is None else Stored(decode_ledger(found.value), found.mod_revision)

    async def _send(self, txn: CopyTxn) -> bool:
        return (await self._metadata.txn(txn.compares, txn.operations)).succeeded
