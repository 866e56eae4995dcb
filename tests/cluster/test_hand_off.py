"""Brokers are restarted one after the other, drained and moved from under full load: nobody sees an error."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import grpc.aio
import pytest
from cluster.harness import Cluster, until
from cluster.load import Judge, Load

from magnetar.client.sync import Client
from magnetar.v1 import admin_pb2

QUIET_S = 2.0
MOVES = 20


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    cluster = Cluster(tmp_path_factory.mktemp("cluster"), brokers=3)
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.close()


@pytest.fixture
def client(cluster: Cluster) -> Iterator[Client]:
    with cluster.connect() as client:
        yield client


def shards_of(client: Client, broker: str) -> int:
    return sum(one.shards for one in client.admin.brokers.list() if one.id == broker)


def owners(client: Client, topic: str) -> dict[int, str | None]:
    return {shard.shard: shard.owner for shard in client.admin.topics.describe(topic).shards}


async def move(address: str, shard: int, broker: str) -> None:
    request = admin_pb2.MoveShardRequest(shard_id=shard, to_broker_id=broker, reason="a test").SerializeToString()
    async with grpc.aio.insecure_channel(address) as channel:
        await channel.unary_unary("/magnetar.v1.AdminService/MoveShard")(request)


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
        asyncio.run(move(cluster.servers.split(",")[0], shard, others[number % len(others)]))
        assert owners(client, load.topic)[shard] == others[number % len(others)]
    load.run_until_answered(1000)
    judge(load)
