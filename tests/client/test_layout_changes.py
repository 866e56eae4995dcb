"""A topic that splits under a producer: what waits for the old shard goes to the new ones, once and in order."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest
from scripted_broker import SEALED, Fate, ScriptedCluster, Shard, error

from magnetar.client import EARLIEST, Batching, Client
from magnetar.wire.batch import BatchHeader

KEYS = [f"k{number}" for number in range(16)]


def in_order(cluster: ScriptedCluster, shards: list[Shard]) -> dict[bytes, list[int]]:
    found: dict[bytes, list[int]] = {}
    for shard in shards:
        for payload, key in zip(shard.payloads(), shard.keys(), strict=True):
            assert key is not None
            found.setdefault(key, []).append(int(payload))
    return found


@pytest.mark.parametrize("at", [0, 5, 30])
@pytest.mark.parametrize("answered", [True, False])
async def test_each_message_is_stored_once_and_keys_stay_in_order_through_a_split(
    cluster: ScriptedCluster, client: Client, at: int, answered: bool
) -> None:
    topic = cluster.create("clicks")
    (parent,) = topic.shards.values()
    children: list[Shard] = []

    def split(shard: Shard, header: BatchHeader) -> Fate | object:
        if shard is parent and len(parent.log) == at:
            children.extend(cluster.split(topic, parent))
            return error("WRONG_SHARD", "split")
        return Fate.STORE if answered or shard is not parent else Fate.STORE_SILENTLY

    cluster.on_batch = split  # type: ignore[assignment]
    async with client.producer("clicks", batching=Batching(max_messages=3)) as producer:
        receipts = [producer.send_nowait(b"%d" % n, key=KEYS[n % 16]) for n in range(160)]
        ids = await asyncio.gather(*receipts)
        assert len(children) == 2
        # What is sent afterwards goes to the children, behind what waited.
        later = [await producer.send(b"%d" % n, key=KEYS[n % 16]) for n in range(160, 176)]
    stored = in_order(cluster, [parent, *children])
    assert stored == {key.encode(): list(range(number, 176, 16)) for number, key in enumerate(KEYS)}
    assert {id.shard for id in later} == {child.shard_id for child in children}
    shards = {shard.shard_id: shard for shard in [parent, *children]}
    for number, id in enumerate(ids):
        if id.offset is not None:
            shard = shards[id.shard]
            assert shard.payloads()[id.offset - shard.start] == b"%d" % number
    if answered:
        assert all(id.offset is not None for id in ids)


async def test_while_a_shard_is_sealed_and_has_no_children_messages_wait(
    cluster: ScriptedCluster, client: Client
) -> None:
    topic = cluster.create("clicks")
    (parent,) = topic.shards.values()
    async with client.producer("clicks") as producer:
        await producer.send(b"0", key="k")
        parent.state = SEALED
        topic.epoch += 1
        receipt = producer.send_nowait(b"1", key="k")
        resolves = cluster.resolves
        await cluster.until(lambda: cluster.resolves > resolves + 2)
        assert not receipt.done()
        parent.state = 1
        children = cluster.split(topic, parent)
        message_id = await receipt
        assert message_id.shard in {child.shard_id for child in children}
        assert message_id.offset == 1


async def test_a_consumer_finds_the_shards_of_a_split(cluster: ScriptedCluster, client: Client) -> None:
    topic = cluster.create("clicks")
    (parent,) = topic.shards.values()
    async with (
        client.producer("clicks") as producer,
        client.stream_consumer("clicks", subscription="s", start=EARLIEST) as consumer,
    ):
        await producer.send(b"0", key="k")
        assert (await consumer.receive(timeout=5)).payload == b"0"
        children = cluster.split(topic, parent)
        await producer.send(b"1", key="k")
        message = await consumer.receive(timeout=5)
        assert message.payload == b"1"
        assert message.id.shard in {child.shard_id for child in children}


async def test_an_older_layout_changes_nothing(cluster: ScriptedCluster, client: Client) -> None:
    topic = cluster.create("clicks", shards=2)
    topic.epoch = 5
    async with client.producer("clicks") as producer:
        lanes = list(producer._lanes._row)
        topic.epoch = 4
        cluster.add_shard(topic, 0, 65535)
        refresh: Callable[[str], object] = producer._lanes._cluster.layouts.refresh
        await refresh("public/default/clicks")  # type: ignore[misc]
        assert producer._lanes._row == lanes
