"""An operator who rebalances bookies and brokers, drains bookies and removes one, at random and whatever happens.

Each bookie's process makes copies, scrubs, and may be elected, as a real one does (`repair/workers.py`): who carries an
operation out dies, stands still and is cut off with its bookie. Orders go through the admin service of any broker.

`stop` begins when all faults are over. What it waits for is bounded:

1. Every operation ends, but for those that the operator has paused; resumed, these end, too.
2. An operation that is rolled back as a whole leaves the fragment lists as they were, though whoever runs it is killed.
3. The same of one that moves shards: they are where they were to go, and back.
4. A bookie that is drained is empty, and can be removed and started anew; nothing is lost.
5. No task and no claim is left; every copy that a closed ledger's record names is there, the same bytes, and the admin
   service's comparison says so.

Every single change is judged by `copies.py`.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from typing import Any, TypeVar

from google.protobuf.message import Message
from grpc import StatusCode
from grpc.aio import AioRpcError
from prometheus_client import CollectorRegistry
from simulation.bookies import SimulatedBookie
from simulation.loop import Process
from simulation.metadata import SimulatedMetadata
from simulation.rpc import SimulatedChannel
from simulation.world import World

from magnetar.bookie.bookie import Bookie
from magnetar.broker.peers import ADMIN_SERVICE
from magnetar.ledger.bookie_directory import BookieDirectory
from magnetar.metadata.records import CopyReason, CopyTask, Fragment, Goal, LedgerRecord, OperationState
from magnetar.repair.copying import runs_of
from magnetar.repair.workers import RepairWorkers
from magnetar.v1 import metadata_pb2, rebalance_pb2, repair_pb2

PAUSE_S = 0.3
CHANGES, OTHER_ORDERS = 0.5, 0.25
"""Share of the orders about an operation that has not ended, if there is one; and of others that begin none."""
CALL_S = 5.0
ENDED_S = 90.0
"""After which what was ordered must have happened, faults being over."""
LOOK_S = 0.5
RATES = (10_000, 50_000, 10_000_000)
"""At the lowest one a copy takes seconds: much can happen meanwhile."""
FAST = 50_000_000
RUNNING, PAUSED, CANCELLED = (
    metadata_pb2.OPERATION_STATE_RUNNING,
    metadata_pb2.OPERATION_STATE_PAUSED,
    metadata_pb2.OPERATION_STATE_CANCELLED,
)
GOALS = (metadata_pb2.GOAL_BYTES, metadata_pb2.GOAL_SEGMENTS)
KILLED_RUNNER = 0.5
REMOVED = 0.3
"""Share of the runs in which a bookie is removed at the end."""
NO_BOOKIE = "bookie99"

Answer = TypeVar("Answer", bound=Message)


class Workers:
    """A bookie with what its process does beside storing."""

    def __init__(self, bookie: Bookie, workers: RepairWorkers) -> None:
        self._bookie = bookie
        self._workers = workers

    @property
    def elected(self) -> bool:
        return self._workers.auditor.elected

    async def scrub(self) -> None:
        """Reads all that this bookie should have, once."""
        await self._workers.scrubber.scrub()

    async def stop(self) -> None:
        await self._workers.stop()
        await self._bookie.stop()

    @classmethod
    async def start(cls, world: World, name: str, process: Process, bookie: Bookie) -> Workers:
        metadata = SimulatedMetadata(world.metadata, process)
        directory = BookieDirectory(
            metadata,
            world.keyspace,
            lambda registration: SimulatedBookie(world.network, process, registration.bookie_id, world.reachable),
            disconnect=lambda bookie: bookie.close(),  # type: ignore[attr-defined]
        )
        await directory.start()
        reborn = bookie.identity.limbo_floor > 0
        registry, now_us = CollectorRegistry(), world.clock(name)
        workers = RepairWorkers(
            name, bookie.local(), directory, metadata, world.keyspace, registry, reborn=reborn, now_us=now_us
        )
        workers.start()
        return cls(bookie, workers)


class Rebalancing:
    """See the module. Made before the world starts: its bookies repair."""

    def __init__(self, world: World, topics: list[str], seed: int) -> None:
        self._world = world
        self._topics = topics
        self._rng = random.Random(f"rebalancing {seed}")
        self._copies = world.boundaries.copies
        self._copies.on_removed = self._removed
        self._process = Process("rebalancer")
        self._stopping = False
        self._saved: rebalance_pb2.PlanRebalanceResponse | None = None
        self._task: asyncio.Task[None] | None = None
        self.orders = 0
        self._emptied = ""
        """The bookie that is to be removed."""
        world.with_workers = lambda name, process, bookie: Workers.start(world, name, process, bookie)

    def start(self) -> None:
        self._task = self._world.spawn(self._process, self._run(), "rebalancing")

    # --- orders while everything strikes ---

    async def _run(self) -> None:
        begin = (
            (6, self._plan_and_apply),
            (4, self._move_shards),
            (2, self._apply_saved),
            (4, self._roll_back),
            (1, self._apply_without_a_rate),
        )
        change = (
            (3, self._throttle),
            (3, lambda: self._change(PAUSED)),
            (4, lambda: self._change(RUNNING)),
            (2, lambda: self._change(CANCELLED)),
        )
        others = ((1, self._look), (2, self._drain), (3, self._undrain), (1, self._remove), (1, self._configure))
        while not self._stopping:
            await asyncio.sleep(self._rng.expovariate(1 / PAUSE_S))
            live = any(not one.ended_us for one in self._copies.operations.values())
            orders = others if self._rng.random() < OTHER_ORDERS else begin
            if live and self._rng.random() < CHANGES:
                orders = change
            (order,) = self._rng.choices([work for _, work in orders], [weight for weight, _ in orders])
            await order()

    async def _plan(self) -> rebalance_pb2.PlanRebalanceResponse | None:
        rng = self._rng
        request = rebalance_pb2.PlanRebalanceRequest(goal=rng.choice(GOALS))
        if rng.random() < 0.3:
            request.max_bytes = rng.randrange(1, 200_000)
        if rng.random() < 0.2:
            request.topic = rng.choice(self._topics)
        plan = await self._ask("PlanRebalance", request, rebalance_pb2.PlanRebalanceResponse)
        if plan is not None and rng.random() < 0.3:
            self._saved = plan
        return plan

    async def _plan_and_apply(self) -> None:
        plan = await self._plan()
        if plan is not None and plan.moves:
            await self._apply(plan, self._rng.choice(RATES))

    async def _move_shards(self) -> str:
        """To other brokers, of which no plan would have any need: so little is published here."""
        request = rebalance_pb2.PlanRebalanceRequest(goal=metadata_pb2.GOAL_BROKERS)
        plan = await self._ask("PlanRebalance", request, rebalance_pb2.PlanRebalanceResponse)
        if plan is None:
            return ""
        owners = self._copies.owners
        shards = self._rng.sample(sorted(owners), self._rng.randint(1, len(owners))) if owners else []
        del plan.moves[:]
        for shard in shards:
            target = self._rng.choice([broker for broker in self._world.brokers() if broker != owners[shard]])
            plan.moves.add(shard_id=shard, source=owners[shard], target=target)
        return await self._apply(plan, 0) if plan.moves else ""

    async def _apply_saved(self) -> None:
        """It may hold yet, or be refused: what it does is judged by what it changes."""
        if self._saved is not None and self._saved.moves:
            await self._apply(self._saved, self._rng.choice(RATES))

    async def _apply_without_a_rate(self) -> None:
        plan = await self._plan()
        if plan is not None and plan.moves:
            await self._must_be_refused("ApplyRebalance", self._request(plan, 0))

    async def _apply(self, plan: rebalance_pb2.PlanRebalanceResponse, rate: int) -> str:
        """The operation's id; empty if it was refused, or nothing is known. Asked twice, it is one."""
        request = self._request(plan, rate)
        answer = await self._ask("ApplyRebalance", request, rebalance_pb2.ApplyRebalanceResponse)
        if answer is None or self._rng.random() < 0.2:
            again = await self._ask("ApplyRebalance", request, rebalance_pb2.ApplyRebalanceResponse)
            if answer and again and answer.operation.operation.operation_id != again.operation.operation.operation_id:
                self._fail(f"operation: one order was carried out twice: {answer} {again}")
            answer = again or answer
        return answer.operation.operation.operation_id if answer else ""

    def _request(self, plan: rebalance_pb2.PlanRebalanceResponse, rate: int) -> rebalance_pb2.ApplyRebalanceRequest:
        return rebalance_pb2.ApplyRebalanceRequest(
            revision=plan.revision,
            goal=plan.goal,
            moves=plan.moves,
            bytes_per_s=rate,
            mark=self._rng.randbytes(16),
        )

    async def _throttle(self) -> None:
        await self._change(metadata_pb2.OPERATION_STATE_UNSPECIFIED, self._rng.choice(RATES))

    async def _change(self, state: int, rate: int = 0) -> None:
        name = self._some_operation()
        if name and rate and self._moves_shards(name):
            await self._must_be_refused("ChangeRebalance", self._order_request(name, state, rate))
        elif name:
            await self._order(name, state, rate)

    def _moves_shards(self, name: str) -> bool:
        return self._copies.operations[name].goal is Goal.BROKERS

    async def _order(self, name: str, state: int, rate: int = 0) -> bool:
        request = self._order_request(name, state, rate)
        return await self._ask("ChangeRebalance", request, rebalance_pb2.ChangeRebalanceResponse) is not None

    def _order_request(self, name: str, state: int, rate: int) -> rebalance_pb2.ChangeRebalanceRequest:
        return rebalance_pb2.ChangeRebalanceRequest(operation_id=name, state=state, bytes_per_s=rate)  # type: ignore[arg-type]

    async def _roll_back(self) -> None:
        name = self._some_operation(ended=self._rng.random() < 0.8)
        if name:
            answer = await self._take_back(name, self._rng.choice(RATES))
            if answer is not None and not self._copies.operations[name].ended_us:
                self._fail(f"operation: one that had not ended is rolled back: {self._copies.operations[name]}")

    async def _take_back(self, name: str, rate: int) -> rebalance_pb2.RollBackRebalanceResponse | None:
        request = rebalance_pb2.RollBackRebalanceRequest(
            operation_id=name,
            bytes_per_s=0 if self._moves_shards(name) else rate,
            mark=self._rng.randbytes(16),
        )
        return await self._ask("RollBackRebalance", request, rebalance_pb2.RollBackRebalanceResponse)

    def _some_operation(self, ended: bool = False) -> str:
        """Mostly one about which something can be said."""
        wanted = ended if self._rng.random() < 0.9 else not ended
        names = [name for name, one in self._copies.operations.items() if bool(one.ended_us) == wanted]
        return self._rng.choice(names) if names else ""

    async def _look(self) -> None:
        await self._ask("ListRebalances", rebalance_pb2.ListRebalancesRequest(), rebalance_pb2.ListRebalancesResponse)
        await self._ask(
            "DescribeRebalance", rebalance_pb2.DescribeRebalanceRequest(), rebalance_pb2.DescribeRebalanceResponse
        )
        if self._copies.ledgers:
            request = rebalance_pb2.VerifyLedgerRequest(ledger_id=self._rng.choice(list(self._copies.ledgers)))
            await self._ask("VerifyLedger", request, rebalance_pb2.VerifyLedgerResponse)

    async def _drain(self) -> None:
        await self._must_be_refused("DrainBookie", repair_pb2.DrainBookieRequest(bookie_id=NO_BOOKIE))
        request = repair_pb2.DrainBookieRequest(bookie_id=self._rng.choice(self._world.bookies()))
        await self._ask("DrainBookie", request, repair_pb2.DrainBookieResponse)

    async def _undrain(self) -> None:
        for bookie in self._world.bookies():
            request = repair_pb2.UndrainBookieRequest(bookie_id=bookie)
            await self._ask("UndrainBookie", request, repair_pb2.UndrainBookieResponse)

    async def _remove(self) -> None:
        """Refused as long as anything stands on it, or it runs: `copies.py` looks at those that are not."""
        await self._must_be_refused("DecommissionBookie", repair_pb2.DecommissionBookieRequest(bookie_id=NO_BOOKIE))
        bookie = self._rng.choice(self._world.bookies())
        request = repair_pb2.DecommissionBookieRequest(bookie_id=bookie)
        await self._ask("DecommissionBookie", request, repair_pb2.DecommissionBookieResponse)

    def _removed(self, bookie: str) -> None:
        """Its disk is emptied, too, and it is started again as a new one."""
        self._world.loop.call_soon(self._world.replace_disk, bookie, context=self._world.loop.outside.context)

    async def _configure(self) -> None:
        rng = self._rng
        request = repair_pb2.ConfigureRepairRequest(
            enabled=rng.random() < 0.7, delay_s=rng.choice([1.0, 5.0, 60.0]), bytes_per_s=rng.choice(RATES)
        )
        await self._ask("ConfigureRepair", request, repair_pb2.ConfigureRepairResponse)

    # --- when all faults are over ---

    async def stop(self) -> None:
        """See the module."""
        assert self._task is not None
        self._stopping = True
        await self._task
        await self._world.spawn(self._process, self._come_to_an_end(), "end of rebalancing")

    async def _come_to_an_end(self) -> None:
        await self._until("a bookie does not run", self._all_run)
        await self._until("repair is not switched on", self._repair_again)
        await self._until("a bookie stays drained", self._undrained)
        await self._all_end()
        await self._until("copies are not made", self._no_tasks)
        await self._move_and_roll_back()
        await self._move_shards_and_roll_back()
        # A bookie that lost its disk is no spare for an open ledger that is older: empty, such a ledger cannot end.
        if not self._world.lost_disks and self._rng.random() < REMOVED:
            await self._replace_a_bookie()
        await self._until("a bookie does not run", self._all_run)
        await self._until("copies are not made", self._no_tasks)
        await self._compare_copies()
        operations = self._copies.operations
        handed_over = sum(one.moves_done for one in operations.values() if one.goal is Goal.BROKERS)
        facts = len(operations), "operations", self.orders, "orders", handed_over, "shards handed over"
        self._world.transcript.note("rebalanced", *facts)

    async def _until(self, words: str, done: Callable[[], Any]) -> None:
        """Asks `done` until it says so; it fails if that takes too long."""
        deadline = self._world.loop.time() + ENDED_S
        while not await done():
            if self._world.loop.time() > deadline:
                live = [one for one in self._copies.operations.values() if not one.ended_us]
                tasks = list(self._copies.tasks.values())
                left = (await self._world.metadata.store.range(self._world.keyspace.index_prefix(self._emptied))).items
                index = [item.key for item in left][:5] if self._emptied else []
                self._fail(
                    f"rebalancing: {words} within {ENDED_S} s: operations={live[:3]} tasks={tasks[:5]} index={index}"
                )
            await asyncio.sleep(LOOK_S)

    async def _all_run(self) -> bool:
        return all(self._world.hosts[bookie].running is not None for bookie in self._world.bookies())

    async def _repair_again(self) -> bool:
        request = repair_pb2.ConfigureRepairRequest(enabled=True, delay_s=60.0, bytes_per_s=FAST)
        return await self._ask("ConfigureRepair", request, repair_pb2.ConfigureRepairResponse) is not None

    async def _undrained(self) -> bool:
        answers = [
            await self._ask(
                "UndrainBookie", repair_pb2.UndrainBookieRequest(bookie_id=bookie), repair_pb2.UndrainBookieResponse
            )
            for bookie in self._world.bookies()
        ]
        return None not in answers

    async def _all_end(self) -> None:
        """Those that are paused end when they are resumed, or cancelled."""
        for state in (OperationState.RUNNING, OperationState.PAUSED):
            names = [name for name, one in self._copies.operations.items() if one.state is state and not one.ended_us]
            for name in names:
                order = CANCELLED if state is OperationState.PAUSED and self._rng.random() < 0.3 else RUNNING
                await self._until("an order is not taken", lambda n=name, o=order: self._hurried(n, o))  # type: ignore[misc]
            waits = "an operation does not end though nobody has paused it"
            await self._until(waits, lambda: self._ended(but_paused=True))
        await self._until("an operation does not end", self._ended)

    async def _hurried(self, name: str, order: int) -> bool:
        rate = 0 if self._moves_shards(name) else FAST
        return bool(self._copies.operations[name].ended_us) or await self._order(name, order, rate)

    async def _ended(self, but_paused: bool = False) -> bool:
        return all(
            one.ended_us or (but_paused and one.state is OperationState.PAUSED)
            for one in self._copies.operations.values()
        )

    async def _no_tasks(self) -> bool:
        return not self._copies.tasks and not any(record.copy for record in self._copies.ledgers.values())

    async def _move_and_roll_back(self) -> None:
        plan = await self._plan()
        if plan is None or not plan.moves:
            return
        before = self._fragments()
        lengths = {ledger_id: len(lists) for ledger_id, lists in self._copies.history.items()}
        moved = await self._apply(plan, FAST)
        if not moved:
            return
        await self._ended_though_killed()
        answer = await self._take_back(moved, FAST)
        if answer is None:
            return
        await self._ended_though_killed()
        taken_back = {move.ledger_id for move in self._copies.moves_of(answer.operation.operation.operation_id)}
        for ledger_id in taken_back - {move.ledger_id for move in answer.operation.skipped}:
            # Twice, and by nobody else.
            changes = len(self._copies.history[ledger_id]) - lengths[ledger_id]
            unmoved = ledger_id not in self._copies.ledgers or self._fragments()[ledger_id] == before[ledger_id]
            if not unmoved and 0 < changes <= 2:
                self._fail(
                    f"rollback: a ledger is not where it was: ledger={ledger_id} before={before[ledger_id]} "
                    f"{self._copies.history[ledger_id]}"
                )

    async def _move_shards_and_roll_back(self) -> None:
        moved = await self._move_shards()
        if not moved:
            return
        await self._until("shards are not moved", self._ended)
        self._check_arrived(moved)
        answer = await self._take_back(moved, 0)
        if answer is not None:
            await self._until("shards are not moved back", self._ended)
            self._check_arrived(answer.operation.operation.operation_id)

    def _check_arrived(self, name: str) -> None:
        """Those that rest meanwhile, and so have no owner, are left out."""
        owners = self._copies.owners
        for move in self._copies.moves_of(name):
            if owners.get(move.shard_id, move.target) != move.target:
                self._fail(f"operation: a shard is not where it was to go: {name} {move} {owners}")

    def _fragments(self) -> dict[int, tuple[Fragment, ...]]:
        return {ledger_id: record.fragments for ledger_id, record in self._copies.ledgers.items()}

    async def _ended_though_killed(self) -> None:
        """Who carries operations out may be killed meanwhile."""
        if self._rng.random() < KILLED_RUNNER:
            await asyncio.sleep(self._rng.random())
            elected = [name for name in self._world.bookies() if self._is_elected(name)]
            for name in elected:
                self._world.kill(name)
                self._world.start_host(name)
        await self._until("an operation does not end", self._ended)

    def _is_elected(self, name: str) -> bool:
        running = self._world.hosts[name].running
        return running is not None and running.elected

    async def _replace_a_bookie(self) -> None:
        """Drained, stopped, removed, and started with an empty disk."""
        bookie = self._rng.choice(self._world.bookies())
        self._world.transcript.note(bookie, "is to be removed")
        self._emptied = bookie
        await self._until("a bookie is not drained", lambda: self._empty(bookie))
        await self._world.stop(bookie)
        await self._until("a bookie is not removed", lambda: self._is_removed(bookie))
        await self._until("a new bookie does not start", lambda: self._runs(bookie))

    async def _empty(self, bookie: str) -> bool:
        request = repair_pb2.DrainBookieRequest(bookie_id=bookie)
        answer = await self._ask("DrainBookie", request, repair_pb2.DrainBookieResponse)
        return answer is not None and not answer.ledgers

    async def _is_removed(self, bookie: str) -> bool:
        if await self._world.metadata.store.get(self._world.keyspace.cookie(bookie)) is None:
            return True
        request = repair_pb2.DecommissionBookieRequest(bookie_id=bookie)
        return await self._ask("DecommissionBookie", request, repair_pb2.DecommissionBookieResponse) is not None

    async def _runs(self, bookie: str) -> bool:
        return self._world.hosts[bookie].running is not None

    async def _compare_copies(self) -> None:
        """When every bookie has read all it should have: what an owner that died knew of missing entries is not known
        otherwise."""
        for bookie in self._world.bookies():
            await self._until("a bookie cannot read all it has", lambda b=bookie: self._scrubbed(b))  # type: ignore[misc]
        await self._until("copies are not made", self._no_tasks)
        for record in list(self._copies.ledgers.values()):
            self._check_complete(record)
        for ledger_id in sorted(self._copies.ledgers):
            await self._until("copies differ", lambda i=ledger_id: self._compared(i))  # type: ignore[misc]

    async def _scrubbed(self, bookie: str) -> bool:
        running, process = self._world.hosts[bookie].running, self._world.hosts[bookie].process
        if running is None or process is None:
            return False
        await self._world.spawn(process, running.scrub(), f"scrub {bookie}")
        return True

    def _check_complete(self, record: LedgerRecord) -> None:
        for bookie in sorted(record.bookies()):
            store = self._world.disks[bookie].store
            stored = store.durable_entries(record.ledger_id) if store is not None else {}
            runs = runs_of(record, CopyTask(record.ledger_id, bookie, bookie, CopyReason.SCRUB))
            missing = [entry for run in runs for entry in range(run.first, run.last + 1) if entry not in stored]
            if missing:
                self._fail(f"copies: {bookie} lacks entries, and nobody knows: {record} entries={missing[:5]}")

    async def _compared(self, ledger_id: int) -> bool:
        """What cannot be read now is asked for again."""
        request = rebalance_pb2.VerifyLedgerRequest(ledger_id=ledger_id)
        answer = await self._ask("VerifyLedger", request, rebalance_pb2.VerifyLedgerResponse)
        if ledger_id not in self._copies.ledgers:
            return True
        if answer is None or any("gives no copy" in problem for problem in answer.problems):
            return False
        if answer.problems:
            self._fail(f"verify: copies differ: ledger={ledger_id} {list(answer.problems)}")
        return True

    # --- asking ---

    async def _must_be_refused(self, method: str, request: Message) -> None:
        if await self._call(method, request) is not None:
            self._fail(f"operator: {method} should have been refused: {request}")

    async def _ask(self, method: str, request: Message, kind: type[Answer]) -> Answer | None:
        """None: it was refused, or nothing is known."""
        data = await self._call(method, request)
        return None if data is None else kind.FromString(data)

    async def _call(self, method: str, request: Message) -> bytes | None:
        self.orders += 1
        address = self._world.address(self._rng.choice(self._world.brokers()))
        channel = SimulatedChannel(self._world.network, self._process, self._world.listeners, address)
        try:
            return await channel.unary_unary(ADMIN_SERVICE + method)(request.SerializeToString(), timeout=CALL_S)
        except AioRpcError as error:
            self._world.transcript.note("operator", method, "failed:", error.details())
            if error.code() is StatusCode.UNKNOWN:
                self._fail(f"operator: {method} failed: {error.details()}")
            return None

    def _fail(self, words: str) -> None:
        self._world.boundaries._fail(words)
