"""SIGKILL to the source or the target in the middle of hand-offs under full load: nothing lost or twice, all in order.

The moment is drawn anew in each round, while all shards of the topic go from one broker to another at once. What is
printed tells how many had arrived by then: the others were in every phase of it.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterator, Sequence
from contextlib import suppress

import grpc.aio
import pytest
from cluster.hand_offs import move, owners
from cluster.harness import POLL_S, START_S, Cluster, until
from cluster.load import Judge, Load
from cluster.rebalancing import until_ended, until_moved

from magnetar.client.sync import Client

ROUNDS = 4
KILLED_WITHIN_S = 0.4
QUIET_S = 1.0
IDLE_TOPICS = 6
SOURCE, TARGET, BYSTANDER = "broker0", "broker1", "broker2"


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with Cluster(tmp_path_factory.mktemp("cluster"), brokers=3) as cluster:
        yield cluster


async def moved(address: str, shards: Sequence[int], target: str) -> None:
    """All of them, each again until it is there: connections to a broker that has just come back are made anew."""
    async with grpc.aio.insecure_channel(address) as channel, asyncio.timeout(START_S):
        for shard in shards:
            while True:
                with suppress(grpc.aio.AioRpcError):
                    await move(channel, shard, target)
                    break
                await asyncio.sleep(POLL_S)


async def killed_while_moving(
    cluster: Cluster, address: str, shards: Sequence[int], victim: str, after_s: float
) -> str:
    """Moves all shards at once to TARGET and kills in between; returns how many had arrived, in words."""
    async with grpc.aio.insecure_channel(address) as channel:
        moves = [asyncio.create_task(move(channel, shard, TARGET)) for shard in shards]
        await asyncio.sleep(after_s)
        before = sum(one.done() for one in moves)
        cluster.kill(victim)
        ended = await asyncio.gather(*moves, return_exceptions=True)
    for end in ended:
        assert end is None or isinstance(end, grpc.aio.AioRpcError), end
    failed = sum(end is not None for end in ended)
    return f"SIGKILL {victim} after {after_s * 1000:.0f} ms: {before} of {len(moves)} had arrived, {failed} failed"


def check_one_owner_each(cluster: Cluster, client: Client) -> None:
    brokers = {one.id: one.shards for one in client.admin.brokers.list()}
    owned = {shard: owner for topic in client.admin.topics.list() for shard, owner in owners(client, topic).items()}
    assert set(owned.values()) <= brokers.keys()
    served = sum(cluster.metric(broker, "magnetar_broker_served_shards") for broker in brokers)
    assert served == sum(brokers.values()) == len(owned)


@pytest.mark.parametrize("victim", [SOURCE, TARGET])
def test_a_kill_in_the_middle_of_hand_offs(
    cluster: Cluster, load: Load, client: Client, judge: Judge, victim: str
) -> None:
    seed = random.randrange(1 << 32)
    rng = random.Random(seed)
    print(f"\nseed {seed}")
    shards = sorted(owners(client, load.topic))
    bystander = cluster.servers.split(",")[cluster.brokers.index(BYSTANDER)]
    for _ in range(ROUNDS):
        asyncio.run(moved(bystander, shards, SOURCE))
        load.run(QUIET_S)
        with load.fault(f"SIGKILL {victim}", redelivers=True):
            after_s = rng.uniform(0.0, KILLED_WITHIN_S)
            print(asyncio.run(killed_while_moving(cluster, bystander, shards, victim, after_s)))
            until("every shard has a living owner", lambda: victim not in owners(client, load.topic).values())
            load.run_until_answered(5_000)
            cluster.restart(victim)
    check_one_owner_each(cluster, client)
    judge(load)


def test_a_kill_of_the_broker_that_carries_a_rebalancing_out(
    cluster: Cluster, load: Load, client: Client, judge: Judge
) -> None:
    for number in range(IDLE_TOPICS):
        client.admin.topics.create(f"idle-{number}", shards=8)
        for shard in owners(client, f"idle-{number}"):
            asyncio.run(moved(cluster.servers.split(",")[0], [shard], SOURCE))
    shards = sorted(owners(client, load.topic))
    asyncio.run(moved(cluster.servers.split(",")[0], shards, SOURCE))
    operation = client.admin.rebalance.apply(client.admin.rebalance.plan(goal="brokers"))
    until_moved(client, operation.operation, 3)
    running = [
        broker for broker in cluster.brokers if cluster.metric(broker, "magnetar_broker_rebalance_remaining_shards")
    ]
    assert len(running) == 1
    with load.fault(f"SIGKILL {running[0]}", redelivers=True):
        cluster.kill(*running)
        ended = until_ended(client, operation.operation)
        load.run_until_answered(5_000)
        cluster.restart(*running)
    print(f"\n{running[0]} killed: {ended.moves_done} moved, {ended.moves_skipped} skipped: {ended.skipped[:3]}")
    assert ended.state == "DONE"
    assert 3 < ended.moves_done <= ended.moves == ended.moves_done + ended.moves_skipped
    check_one_owner_each(cluster, client)
    judge(load)
