"""A rebalancing of brokers: ordered, carried out by the elected broker, interrupted, refused, taken back."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Callable

import pytest
from broker_world import PATIENCE_S, TOPIC, Cluster, eventually

from magnetar.broker import shard_runner
from magnetar.broker.broker import Broker
from magnetar.client import Client, InvalidArgument, OrderRefused, RebalanceOperation, connect

SHARDS = 12


class Rebalanced:
    """Broker a owns all shards of a topic, b and c are new."""

    def __init__(self, brokers: dict[str, Broker], client: Client) -> None:
        self.brokers = brokers
        self.client = client
        self.rebalance = client.admin.rebalance

    async def begun(self) -> RebalanceOperation:
        return await self.rebalance.apply(await self.rebalance.plan(goal="brokers"))

    async def until(self, operation: str, holds: Callable[[RebalanceOperation], bool]) -> RebalanceOperation:
        async with asyncio.timeout(PATIENCE_S):
            while True:
                found = await self.rebalance.status(operation)
                if holds(found):
                    return found
                await asyncio.sleep(0.02)

    async def until_ended(self, operation: str) -> RebalanceOperation:
        return await self.until(operation, lambda found: found.ended is not None)

    async def until_done(self, operation: str, moves: int) -> None:
        await self.until(operation, lambda found: found.moves_done >= moves)

    async def numbers(self) -> dict[str, int]:
        """Of the shards that each broker serves."""
        owners = [shard.owner for shard in (await self.client.admin.topics.describe(TOPIC)).shards]
        return {name: owners.count(name) for name in self.brokers}


@pytest.fixture
async def cluster_of_three(cluster: Cluster) -> AsyncIterator[Rebalanced]:
    a = await cluster.start_broker("a")
    async with connect(a.address) as client:
        for shard in (await client.admin.topics.create(TOPIC, shards=SHARDS)).shards:
            await a.shard(TOPIC, shard.shard)
        brokers = {"a": a, **{name: await cluster.start_broker(name) for name in "bc"}}
        await eventually(lambda: all(len(broker.view.brokers()) == 3 for broker in brokers.values()))
        yield Rebalanced(brokers, client)


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Hand-offs that a test can interrupt."""
    monkeypatch.setattr(shard_runner, "PACE_S", 0.2)
    monkeypatch.setattr(shard_runner, "STORE_S", 0.1)
    return monkeypatch


async def test_brokers_that_joined_get_their_part_and_give_it_back(cluster_of_three: Rebalanced) -> None:
    rebalance = cluster_of_three.rebalance
    plan = await rebalance.plan(goal="brokers")
    assert [(one.broker, one.shards_before, one.shards_after) for one in plan.brokers] == [
        ("a", 12, 4), ("b", 0, 4), ("c", 0, 4),
    ]  # fmt: skip
    tried = await rebalance.apply(plan, dry_run=True)
    assert (tried.moves, await rebalance.list()) == (8, [])
    begun = await rebalance.apply(plan)
    assert (begun.operation, begun.goal, begun.moves, begun.throttle) == ("rebalance-1", "brokers", 8, 0)
    ended = await cluster_of_three.until_ended("rebalance-1")
    assert (ended.state, ended.percent, ended.moves_done, ended.moves_skipped) == ("DONE", 100.0, 8, 0)
    assert [(one.broker, one.shards_in_done, one.shards_out_done) for one in ended.brokers] == [
        ("a", 0, 8), ("b", 4, 0), ("c", 4, 0),
    ]  # fmt: skip
    assert await cluster_of_three.numbers() == {"a": 4, "b": 4, "c": 4}
    assert (await rebalance.plan(goal="brokers")).moves == ()
    with pytest.raises(
        OrderRefused, match=r"holds no more, plan again: shards \d+, \d+, \d+ and 1 more: its owner is [bc], not a"
    ):
        await rebalance.apply(plan)
    back = await rebalance.rollback("rebalance-1")
    assert (back.rollback_of, back.moves) == ("rebalance-1", 8)
    assert (await cluster_of_three.until_ended(back.operation)).moves_done == 8
    assert await cluster_of_three.numbers() == {"a": 12, "b": 0, "c": 0}


async def test_what_shards_have_none_of_is_refused(cluster_of_three: Rebalanced) -> None:
    rebalance = cluster_of_three.rebalance
    with pytest.raises(OrderRefused, match="copies no bytes: leave --max-bytes out"):
        await rebalance.plan(goal="brokers", max_bytes=1)
    plan = await rebalance.plan(goal="brokers")
    with pytest.raises(OrderRefused, match="copies no bytes: leave the throttle out"):
        await rebalance.apply(plan, throttle=1)
    await rebalance.apply(plan)
    with pytest.raises(OrderRefused, match="leave the throttle out"):
        await rebalance.throttle("rebalance-1", 1)
    await cluster_of_three.until_ended("rebalance-1")
    with pytest.raises(OrderRefused, match="leave the throttle out"):
        await rebalance.rollback("rebalance-1", throttle=1)
    with pytest.raises(InvalidArgument, match="no bytes copied that could be compared"):
        await rebalance.verify("rebalance-1")


async def test_two_operations_do_not_move_one_shard(cluster_of_three: Rebalanced, slow: pytest.MonkeyPatch) -> None:
    rebalance = cluster_of_three.rebalance
    plan = await rebalance.plan(goal="brokers")
    await rebalance.apply(plan)
    with pytest.raises(OrderRefused, match=r"rebalance-1 moves it|its owner is"):
        await rebalance.apply(plan)
    assert "another rebalancing moves them" in " ".join((await rebalance.plan(goal="brokers")).notes)


async def test_a_pause_holds_a_resume_goes_on_and_a_cancellation_ends(
    cluster_of_three: Rebalanced, slow: pytest.MonkeyPatch
) -> None:
    rebalance = cluster_of_three.rebalance
    name = (await cluster_of_three.begun()).operation
    await cluster_of_three.until_done(name, 1)
    await rebalance.pause(name)
    paused = await rebalance.status(name)
    assert (paused.state, paused.ended) == ("PAUSED", None)
    await rebalance.resume(name)
    await cluster_of_three.until_done(name, paused.moves_done + 1)
    await rebalance.cancel(name)
    ended = await cluster_of_three.until_ended(name)
    assert ended.state == "CANCELLED"
    assert ended.moves_done < ended.moves
    # One may have been under way when the word came: what became of it stands in its record.
    assert ended.moves_done == SHARDS - (await cluster_of_three.numbers())["a"]
    back = await rebalance.rollback(name)
    assert (await cluster_of_three.until_ended(back.operation)).moves_done == ended.moves_done
    assert (await cluster_of_three.numbers())["a"] == SHARDS


async def test_the_next_elected_broker_goes_on_where_the_last_one_stood(
    cluster_of_three: Rebalanced, slow: pytest.MonkeyPatch
) -> None:
    a = cluster_of_three.brokers["a"]
    name = (await cluster_of_three.begun()).operation
    await cluster_of_three.until_done(name, 2)
    [leading] = [task for task in a._tasks if task.get_name() == "a balance"]
    leading.cancel()
    slow.undo()
    ended = await cluster_of_three.until_ended(name)
    assert (ended.state, ended.moves_done, ended.moves_skipped) == ("DONE", 8, 0)
    assert await cluster_of_three.numbers() == {"a": 4, "b": 4, "c": 4}
    leader = await a._balancing._election.current_leader()
    assert leader in ("b", "c")


async def test_what_cannot_be_moved_any_more_is_skipped_with_the_reason(
    cluster_of_three: Rebalanced, slow: pytest.MonkeyPatch
) -> None:
    rebalance = cluster_of_three.rebalance
    name = (await cluster_of_three.begun()).operation
    await cluster_of_three.until_done(name, 1)
    await cluster_of_three.client.admin.brokers.drain("c")
    slow.undo()
    ended = await cluster_of_three.until_ended(name)
    assert ended.state == "DONE"
    assert ended.moves_done + ended.moves_skipped == ended.moves
    assert {move.reason for move in ended.skipped} == {"c is gone, stopping or being drained: plan again"}
    back = await rebalance.rollback(name)
    # What came to c was handed over since: that stays, and is named.
    assert back.moves + len(back.notes) == ended.moves_done
    assert all(re.fullmatch(r"shard \d+: its owner is [ab], not c", note) for note in back.notes)
