"""Brokers are restarted one after the other, drained and moved from under full load: nobody sees an error."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import grpc.aio
import pytest
from cluster.hand_offs import move, owners
from cluster.harness import Cluster, until
from cluster.load import Judge, Load
from cluster.rebalancing import until_ended

from magnetar.client.sync import Client

QUIET_S = 2.0
MOVES = 20


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with Cluster(tmp_path_factory.mktemp("cluster"), brokers=3) as cluster:
        yield cluster


def shards_of(client: Client, broker: str) -> int:
    return sum(one.shards for one in client.admin.brokers.list() if one.id == broker)


async def move_one(address: str, shard: int, broker: str) -> None:
    async with grpc.aio.insecure_channel(address) as channel:
        await move(channel, shard, broker)


def test_a_rolling_restart_of_all_brokers(cluster: Cluster, load: Load, judge: Judge) -> None:
    load.run(QUIET_S)
    for broker in cluster.brokers:
        assert cluster.processes[broker].terminate() == 0
        load.run_until_answered(1000)
        cluster.restart(broker)
        load.run_until_answered(1000)
    judge(load)


def test_brokers_are_drained_before_they_stop(cluster: Cluster, load: Load, client: Client, judge: Judge) -> None:
    load.run(QUIET_S)
    for broker in cluster.brokers[:2]:
        planned = client.admin.brokers.drain(broker, dry_run=True)
        assert planned.shards == sum(planned.targets.values()) == shards_of(client, broker)
        client.admin.brokers.drain(broker)
        until(f"{broker} has no shards", lambda broker=broker: shards_of(client, broker) == 0)
        load.run_until_answered(1000)
        assert broker not in owners(client, load.topic).values()
        assert cluster.processes[broker].terminate() == 0
        cluster.restart(broker)
        # The wish outlives the process.
        assert {one.id: one.state for one in client.admin.brokers.list()}[broker] == "DRAINING"
        load.run_until_answered(1000)
        assert client.admin.brokers.undrain(broker)
    judge(load)


def test_shards_are_moved_one_by_one(cluster: Cluster, load: Load, client: Client, judge: Judge) -> None:
    load.run(QUIET_S)
    for number in range(MOVES):
        shard, owner = sorted(owners(client, load.topic).items())[number % load.shards]
        others = [broker for broker in cluster.brokers if broker != owner]
        asyncio.run(move_one(cluster.servers.split(",")[0], shard, others[number % len(others)]))
        assert owners(client, load.topic)[shard] == others[number % len(others)]
    load.run_until_answered(1000)
    judge(load)


def test_a_broker_that_was_restarted_gets_its_part_back(
    cluster: Cluster, load: Load, client: Client, judge: Judge
) -> None:
    restarted = cluster.brokers[0]
    assert cluster.processes[restarted].terminate() == 0
    cluster.restart(restarted)
    load.run(QUIET_S)
    assert restarted not in owners(client, load.topic).values()
    plan = client.admin.rebalance.plan(goal="brokers", topic=load.topic)
    # One of the others may have less than its part, too.
    assert restarted in {move.target for move in plan.moves}
    assert restarted not in {move.source for move in plan.moves}
    assert plan.skew_after < plan.skew_before
    ended = until_ended(client, client.admin.rebalance.apply(plan).operation)
    assert (ended.state, ended.moves_done) == ("DONE", len(plan.moves))
    assert set(owners(client, load.topic).values()) == set(cluster.brokers)
    back = until_ended(client, client.admin.rebalance.rollback(ended.operation).operation)
    assert back.moves_done == ended.moves_done
    assert restarted not in owners(client, load.topic).values()
    load.run_until_answered(1000)
    judge(load)
