"""Rebalancing with real bookies in this process: ordered, carried out, interrupted, taken back."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from repair_world import MIB, RepairWorld, closed_ledger

from magnetar.metadata.keyspace import Keyspace
from magnetar.metadata.records import Goal, Move, MoveState, Operation, OperationState
from magnetar.metadata.store import Compare, Delete, exists
from magnetar.repair.metrics import RepairMetrics
from magnetar.repair.orders import OrderRefused, Orders
from magnetar.repair.replicator import COPIES_AT_ONCE
from magnetar.repair.runner import Runner

LEDGERS = 8


class Rebalanced:
    """Three filled bookies and an empty one, an operator, and a runner that can be stopped and started."""

    def __init__(self, world: RepairWorld) -> None:
        self.world = world
        self.orders = Orders(world.store, world.keyspace, now_us=self.now_us, rng=random.Random(7))
        self._runner: asyncio.Task[None] | None = None

    def now_us(self) -> int:
        return self.world.now_us + int(asyncio.get_running_loop().time() * 1e6)

    async def start(self) -> None:
        await self.world.start("abcd")
        for number in range(1, LEDGERS + 1):
            await self.world.put_ledger(closed_ledger(number, 60, (0, tuple("abc"))))
        await self.start_runner()

    async def start_runner(self) -> None:
        metrics = RepairMetrics.of(self.world.registry)
        runner = Runner(self.world.store, self.world.keyspace, metrics, now_us=self.now_us, pass_s=0.02)
        self._runner = asyncio.create_task(runner.run(self.still_leader()))

    def still_leader(self) -> Compare:
        return exists(self.world.keyspace.ledgers_prefix() + "0" * 15 + "8")

    async def kill_runner(self) -> None:
        if self._runner is not None:
            self._runner.cancel()
            await asyncio.gather(self._runner, return_exceptions=True)

    async def begin(self, bytes_per_s: int = 100 * MIB, mark: bytes = b"1") -> Operation:
        plan = await self.orders.plan(Goal.BYTES)
        return (await self.orders.apply(plan.goal, plan.revision, plan.moves, bytes_per_s, mark)).operation

    async def operation(self, name: str = "rebalance-1") -> Operation:
        return (await self.orders.operation(name)).operation

    async def moves(self, name: str = "rebalance-1") -> tuple[Move, ...]:
        return (await self.orders.operation(name)).moves

    async def until_ended(self, name: str = "rebalance-1") -> Operation:
        async def ended() -> bool:
            return bool((await self.operation(name)).ended_us)

        await self.world.until(ended, f"{name} ends")
        return await self.operation(name)

    async def until_done(self, count: int) -> None:
        async def done() -> bool:
            return (await self.operation()).moves_done >= count

        await self.world.until(done, f"{count} moves are done")

    async def until_tasks_at_most(self, count: int) -> None:
        async def few() -> bool:
            return len(await self.world.tasks()) <= count

        await self.world.until(few, f"at most {count} tasks are left")

    async def check_all_complete(self) -> dict[str, int]:
        """Every copy is where its record says, byte for byte. Returns how many each bookie has."""
        held: dict[str, int] = dict.fromkeys("abcd", 0)
        for number in range(1, LEDGERS + 1):
            record = await self.world.check_complete(number)
            assert record.copy is None
            for name in record.bookies():
                held[name] += 1
        assert not await self.world.tasks()
        return held


@pytest.fixture
async def cluster(world: RepairWorld) -> AsyncIterator[Rebalanced]:
    made = Rebalanced(world)
    await made.start()
    yield made
    await made.kill_runner()


@asynccontextmanager
async def throttled(cluster: Rebalanced) -> AsyncIterator[Operation]:
    """An operation that is in the middle of it for as long as the test wants."""
    yield await cluster.begin(bytes_per_s=10_000)
    await cluster.kill_runner()


async def test_an_empty_bookie_is_filled_and_nothing_is_left_to_plan(cluster: Rebalanced) -> None:
    begun = await cluster.begin()
    assert (begun.operation_id, begun.state, begun.moves) == ("rebalance-1", OperationState.RUNNING, 6)
    ended = await cluster.until_ended()
    assert (ended.state, ended.moves_done, ended.bytes_done) == (OperationState.DONE, 6, begun.size_bytes)
    assert await cluster.check_all_complete() == {"a": 6, "b": 6, "c": 6, "d": 6}
    assert (await cluster.orders.plan(Goal.BYTES)).moves == ()
    remaining = "magnetar_repair_rebalance_remaining_bytes"
    await cluster.world.until(lambda: cluster.world.registry.get_sample_value(remaining) == 0, "nothing remains")


async def test_another_runner_goes_on_where_a_killed_one_stood(cluster: Rebalanced) -> None:
    async with throttled(cluster):
        await cluster.until_done(1)
        remaining = "magnetar_repair_rebalance_remaining_bytes"
        assert cluster.world.registry.get_sample_value(remaining) > 0
        await cluster.kill_runner()
        assert cluster.world.registry.get_sample_value(remaining) == 0, "it is run elsewhere now"
        await cluster.orders.change("rebalance-1", bytes_per_s=100 * MIB)
        await cluster.world.until_no_tasks()
        await cluster.start_runner()
        assert (await cluster.until_ended()).moves_done == 6
        assert (await cluster.check_all_complete())["d"] == 6


async def test_a_runner_that_was_replaced_changes_nothing(cluster: Rebalanced) -> None:
    cluster.still_leader = lambda: exists(Keyspace("elsewhere").instance())  # type: ignore[method-assign]
    await cluster.kill_runner()
    await cluster.start_runner()
    await cluster.begin()
    await asyncio.sleep(0.1)
    assert not await cluster.world.tasks()


async def test_a_pause_lets_claimed_copies_end_and_a_resume_goes_on(cluster: Rebalanced) -> None:
    async with throttled(cluster):
        await cluster.until_done(1)
        await cluster.orders.change("rebalance-1", state=OperationState.PAUSED)
        await cluster.until_tasks_at_most(COPIES_AT_ONCE)
        await cluster.orders.change("rebalance-1", bytes_per_s=100 * MIB)
        await cluster.world.until_no_tasks()
        paused = await cluster.operation()
        assert paused.state is OperationState.PAUSED
        assert paused.moves_done < 6
        await cluster.orders.change("rebalance-1", state=OperationState.RUNNING)
        assert (await cluster.until_ended()).moves_done == 6
        await cluster.check_all_complete()


async def test_what_was_done_before_a_cancellation_can_be_rolled_back(cluster: Rebalanced) -> None:
    async with throttled(cluster):
        await cluster.until_done(1)
        with pytest.raises(OrderRefused, match="has not ended: cancel it first"):
            await cluster.orders.roll_back("rebalance-1", 0, b"2")
        await cluster.orders.change("rebalance-1", state=OperationState.CANCELLED)
        cancelled = await cluster.until_ended()
        assert cancelled.state is OperationState.CANCELLED
        assert 0 < cancelled.moves_done < 6
        await cluster.check_all_complete()
        rolled = await cluster.orders.roll_back("rebalance-1", 100 * MIB, b"2")
        assert rolled.operation.rollback_of == "rebalance-1"
        assert rolled.operation.moves == cancelled.moves_done
        await cluster.until_ended("rebalance-2")
        assert await cluster.check_all_complete() == {"a": 8, "b": 8, "c": 8, "d": 0}
        with pytest.raises(OrderRefused, match="nothing to take back"):
            await cluster.orders.roll_back("rebalance-1", 0, b"3")


async def test_a_trimmed_ledger_is_skipped_and_the_rest_goes_on(cluster: Rebalanced) -> None:
    await cluster.kill_runner()
    begun = await cluster.begin()
    trimmed = (await cluster.moves())[0].ledger_id
    keys = cluster.world.keyspace
    await cluster.world.store.txn(
        [], [Delete(keys.ledger(trimmed)), *(Delete(keys.index(name, trimmed)) for name in "abc")]
    )
    cluster.still_leader = lambda: exists(keys.bookie("a"))  # type: ignore[method-assign]
    await cluster.start_runner()
    ended = await cluster.until_ended()
    assert (ended.moves_done, ended.moves_skipped) == (begun.moves - 1, 1)
    skipped = next(move for move in await cluster.moves() if move.state is MoveState.SKIPPED)
    assert (skipped.ledger_id, skipped.reason) == (trimmed, "the ledger was trimmed or deleted")


async def test_a_source_that_dies_is_survived_by_the_other_copies(cluster: Rebalanced) -> None:
    async with throttled(cluster):
        await cluster.until_done(1)
        await cluster.world.stop_bookie("a")
        await cluster.orders.change("rebalance-1", bytes_per_s=100 * MIB)
        assert (await cluster.until_ended()).moves_done == 6


async def test_a_target_that_is_away_makes_it_wait_and_say_so(cluster: Rebalanced) -> None:
    async with throttled(cluster):
        await cluster.until_done(1)
        await cluster.world.stop_bookie("d")

        async def says_so() -> bool:
            return "d has no session: its moves wait for it" in (await cluster.operation()).problems

        await cluster.world.until(says_so, "the operation says why it waits")
        await cluster.world.start_bookie("d")
        await cluster.orders.change("rebalance-1", bytes_per_s=100 * MIB)
        assert (await cluster.until_ended()).moves_done == 6
        await cluster.check_all_complete()


# Orders.


async def test_two_operations_never_move_one_ledger(cluster: Rebalanced) -> None:
    plan = await cluster.orders.plan(Goal.BYTES)
    async with throttled(cluster):
        with pytest.raises(OrderRefused, match=r"the plan holds no more, plan again: .*rebalance-1 moves it"):
            await cluster.orders.apply(plan.goal, plan.revision, plan.moves, MIB, b"2")
        assert (await cluster.orders.plan(Goal.BYTES)).moves == ()


async def test_of_two_orders_at_once_one_is_refused(cluster: Rebalanced) -> None:
    await cluster.kill_runner()
    plan = await cluster.orders.plan(Goal.BYTES)
    orders = [cluster.orders.apply(plan.goal, plan.revision, plan.moves, MIB, mark) for mark in (b"1", b"2")]
    answers = await asyncio.gather(*orders, return_exceptions=True)
    assert [isinstance(answer, OrderRefused) for answer in answers].count(True) == 1
    assert len(await cluster.orders.operations()) == 1


async def test_an_order_that_is_given_again_is_the_same_order(cluster: Rebalanced) -> None:
    plan = await cluster.orders.plan(Goal.BYTES)
    again = [
        (await cluster.orders.apply(plan.goal, plan.revision, plan.moves, MIB, b"1")).operation.operation_id
        for _ in range(2)
    ]
    assert again == ["rebalance-1", "rebalance-1"]


async def test_bad_orders_are_refused_with_the_reason_and_change_nothing(cluster: Rebalanced) -> None:
    plan = await cluster.orders.plan(Goal.BYTES)
    with pytest.raises(OrderRefused, match="a throttle is above zero"):
        await cluster.orders.apply(plan.goal, plan.revision, plan.moves, 0, b"1")
    with pytest.raises(OrderRefused, match="the plan is empty"):
        await cluster.orders.apply(plan.goal, plan.revision, (), MIB, b"1")
    with pytest.raises(OrderRefused, match="there is no such operation"):
        await cluster.orders.change("rebalance-9", state=OperationState.PAUSED)
    with pytest.raises(OrderRefused, match="there is no such operation"):
        await cluster.orders.roll_back("a/b", 0, b"1")
    await cluster.world.put_record(closed_ledger(plan.moves[0].ledger_id, 60, (0, tuple("abc"))))
    with pytest.raises(OrderRefused, match=f"ledger {plan.moves[0].ledger_id}: it was changed"):
        await cluster.orders.apply(plan.goal, plan.revision, plan.moves, MIB, b"1")
    assert await cluster.orders.operations() == []


async def test_a_dry_run_changes_nothing(cluster: Rebalanced) -> None:
    plan = await cluster.orders.plan(Goal.BYTES)
    said = await cluster.orders.apply(plan.goal, plan.revision, plan.moves, MIB, b"1", dry_run=True)
    assert (said.operation.moves, await cluster.orders.operations()) == (6, [])
    await cluster.begin()
    await cluster.until_ended()
    await cluster.orders.roll_back("rebalance-1", 0, b"2", dry_run=True)
    assert len(await cluster.orders.operations()) == 1
    with pytest.raises(OrderRefused, match="the operation is done"):
        await cluster.orders.change("rebalance-1", bytes_per_s=MIB)


async def test_operations_that_ended_long_ago_are_forgotten(
    cluster: Rebalanced, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("magnetar.repair.operation_txns.KEPT_MAX", 1)
    await cluster.begin()
    await cluster.until_ended()
    for number, mark in ((2, b"2"), (3, b"3"), (4, b"4")):
        await cluster.orders.roll_back(f"rebalance-{number - 1}", 0, mark)
        await cluster.until_ended(f"rebalance-{number}")
    names = [operation.operation_id for operation in await cluster.orders.operations()]
    assert names == ["rebalance-3", "rebalance-4"]
    assert not (await cluster.world.store.range(cluster.world.keyspace.moves_prefix("rebalance-1"))).items


async def test_the_newest_operation_is_the_one_that_was_begun_last_whatever_clocks_say(cluster: Rebalanced) -> None:
    await cluster.begin()
    await cluster.until_ended()
    store, keyspace = cluster.world.store, cluster.world.keyspace
    slow = Orders(store, keyspace, now_us=lambda: cluster.now_us() - 3_600_000_000, rng=random.Random(8))
    await slow.roll_back("rebalance-1", 0, b"2")
    assert (await cluster.orders.current()).operation.operation_id == "rebalance-2"


async def test_who_asks_without_an_id_hears_of_the_operation_that_goes_on(cluster: Rebalanced) -> None:
    orders = cluster.orders
    plan = await orders.plan(Goal.BYTES)
    await orders.apply(plan.goal, plan.revision, plan.moves[:1], 1, b"1")
    await orders.change("rebalance-1", state=OperationState.PAUSED)
    await orders.apply(plan.goal, plan.revision, plan.moves[1:], 100 * MIB, b"2")
    assert (await orders.current()).operation.operation_id == "rebalance-2"
    await cluster.until_ended("rebalance-2")
    assert (await orders.current()).operation.operation_id == "rebalance-1"


async def test_a_copy_whose_source_is_drained_goes_on_at_the_rate_of_repair(cluster: Rebalanced) -> None:
    world = cluster.world
    await cluster.begin(bytes_per_s=1)

    async def sources() -> set[str]:
        records = [await world.record(number) for number in range(1, LEDGERS + 1)]
        return {record.copy.replaces for record in records if record is not None and record.copy is not None}

    await world.until(sources, "a copy is claimed")
    (source,) = await sources()
    await world.drain(source)
    world.start_auditor()

    async def is_empty() -> bool:
        records = [await world.record(number) for number in range(1, LEDGERS + 1)]
        return not any(record is not None and source in record.bookies() for record in records)

    await world.until(is_empty, f"{source} is empty")
