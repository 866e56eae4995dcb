"""Resolving topics, watching layouts, registering producers, over real gRPC."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import grpc
import grpc.aio
import pytest
from broker_world import KEYSPACE, PATIENCE_S, TOPIC, Calls, Cluster, ProduceClient, batch, eventually, refusal

from magnetar.broker.broker import Broker
from magnetar.broker.layout import preferred_broker
from magnetar.node.rpc import ERROR_METADATA_KEY
from magnetar.v1 import admin_pb2, broker_pb2, common_pb2


class LayoutWatch:
    def __init__(self, calls: Calls, topic: str = TOPIC) -> None:
        request = broker_pb2.WatchLayoutRequest(topic=topic).SerializeToString()
        self._call = calls.channel.unary_stream("/magnetar.v1.BrokerService/WatchLayout")(request)

    async def next(self) -> broker_pb2.Layout:
        async with asyncio.timeout(PATIENCE_S):
            return broker_pb2.WatchLayoutResponse.FromString(await self._call.read()).layout

    async def owners(self) -> list[str]:
        return [shard.owner for shard in (await self.next()).shards]

    async def error(self) -> common_pb2.Error:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await asyncio.wait_for(self._to_the_end(), PATIENCE_S)
        return common_pb2.Error.FromString(dict(caught.value.trailing_metadata() or ())[ERROR_METADATA_KEY])

    async def _to_the_end(self) -> None:
        while await self._call.read() is not grpc.aio.EOF:
            pass

    def cancel(self) -> None:
        self._call.cancel()


async def test_a_topic_is_created_on_first_use_only_when_asked(calls: Calls) -> None:
    assert (await refusal(calls.resolve("orders", create=False))).reason == common_pb2.ERROR_REASON_TOPIC_NOT_FOUND
    created = await calls.resolve("orders")
    assert (created.topic, created.epoch) == (TOPIC, 1)
    [shard] = created.shards
    assert (shard.first_slot, shard.last_slot, shard.owner) == (0, 65535, "")
    assert await calls.resolve(TOPIC, create=False) == created


async def test_many_first_uses_at_once_make_one_topic(calls: Calls) -> None:
    layouts = await asyncio.gather(*(calls.resolve() for _ in range(20)))
    assert len({layout.SerializeToString(deterministic=True) for layout in layouts}) == 1


@pytest.mark.parametrize("topic", ["", "a/b", "a/b/c/d", "../x", "a b", "é", "x" * 250, "public/default/"])
async def test_a_name_that_is_none_is_an_invalid_argument(calls: Calls, topic: str) -> None:
    error = await refusal(calls.resolve(topic))
    assert error.reason == common_pb2.ERROR_REASON_INVALID_ARGUMENT
    assert "topic" in error.message or "namespace" in error.message or "tenant" in error.message


async def test_a_watch_is_told_of_owners_and_of_the_end_of_the_topic(
    cluster: Cluster, broker: Broker, calls: Calls
) -> None:
    await calls.create_topic(shards=2)
    watch = LayoutWatch(calls)
    layout = await watch.next()
    assert [shard.owner for shard in layout.shards] == ["", ""]
    await broker.shard(TOPIC, layout.shards[1].shard_id)
    assert await watch.owners() == ["", broker.address]
    await calls.admin("DeleteTopic", admin_pb2.DeleteTopicRequest(topic=TOPIC), admin_pb2.DeleteTopicResponse)
    assert (await watch.error()).reason == common_pb2.ERROR_REASON_TOPIC_NOT_FOUND


async def test_a_watch_of_a_missing_topic_is_refused_and_one_that_is_left_is_forgotten(
    broker: Broker, calls: Calls
) -> None:
    assert (await LayoutWatch(calls, "none").error()).reason == common_pb2.ERROR_REASON_TOPIC_NOT_FOUND
    await calls.resolve()
    watch = LayoutWatch(calls)
    await watch.next()
    watch.cancel()
    resolver = broker._resolver
    await eventually(lambda: not resolver._by_topic and not resolver._by_shard and resolver._watches == 0)


async def test_every_broker_names_the_owner_and_sends_clients_to_the_preferred_one(
    cluster: Cluster, connect: Callable[[Broker], Calls]
) -> None:
    brokers = {name: await cluster.start_broker(name) for name in ("a", "b")}
    a, b = connect(brokers["a"]), connect(brokers["b"])
    shards = [shard.shard_id for shard in (await a.create_topic(shards=16)).shards]
    preferred = {preferred_broker(shard, ["a", "b"]): shard for shard in shards}
    await eventually(lambda: len(brokers["a"].view.brokers()) == 2)
    async with ProduceClient(a) as client:
        await client.send_open(preferred["b"])
        error = (await client.error()).error
        assert (error.reason, error.owner) == (common_pb2.ERROR_REASON_NOT_OWNER, brokers["b"].address)
    watch = LayoutWatch(a)
    layout = await watch.next()
    async with ProduceClient(b) as client:
        await client.open(preferred["b"])
    at = shards.index(preferred["b"])
    assert (await watch.owners())[at] == brokers["b"].address
    assert (await b.resolve()).shards[at].owner == brokers["b"].address
    # The owner goes: the other one takes over, and whoever watches hears of it.
    await brokers["b"].stop()
    cluster.brokers.remove(brokers["b"])
    async with ProduceClient(a) as client:
        await client.open(preferred["b"])
        await client.publish(batch(0, slot=layout.shards[at].first_slot))
        assert await client.answers(1) == [(1, 0, 0, 0)]
    while (await watch.owners())[at] != brokers["a"].address:
        pass


async def test_without_a_session_a_broker_sends_clients_elsewhere_and_serves_what_is_open(
    cluster: Cluster, broker: Broker, calls: Calls
) -> None:
    shard = (await calls.resolve()).shards[0].shard_id
    async with ProduceClient(calls) as client:
        await client.open(shard)
        watch = LayoutWatch(calls)
        await watch.next()
        # It loses its session and cannot register again.
        key = KEYSPACE.broker("broker0")
        found = await cluster.store.get(key)
        assert found is not None
        cluster.store.refused_keys.add(key)
        await cluster.store.revoke_lease(found.lease_id)
        assert (await watch.error()).reason == common_pb2.ERROR_REASON_UNAVAILABLE
        assert (await refusal(calls.resolve())).reason == common_pb2.ERROR_REASON_UNAVAILABLE
        assert broker.problems() == ["broker broker0 has no session: the metadata store does not answer"]
        await client.publish(batch(0))
        await client.answers(1)
        cluster.store.refused_keys.clear()
        await eventually(lambda: broker.ownership.session is not None)
        served = await broker.shard(TOPIC, shard)
        await eventually(lambda: served.log.record.owner == broker.ownership.session)
        await client.publish(batch(1, 0))
        await client.answers(1)
        assert served.log.epoch == 1
    assert broker.problems() == []


async def test_a_registration_is_refused_for_a_bad_name_or_a_missing_topic(calls: Calls) -> None:
    assert (await refusal(calls.register("p", "none"))).reason == common_pb2.ERROR_REASON_TOPIC_NOT_FOUND
    await calls.resolve()
    assert (await refusal(calls.register("p/q"))).reason == common_pb2.ERROR_REASON_INVALID_ARGUMENT
    assert [(await calls.register("p")).epoch for _ in range(3)] == [1, 2, 3]
