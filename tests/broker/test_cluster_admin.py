"""Administration of a cluster: any broker answers, whoever serves the shards."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest
from broker_world import KEYSPACE, TOPIC, Calls, Cluster, ProduceClient, batch, eventually, refusal
from consume_world import ConsumeClient

from magnetar.broker.broker import Broker
from magnetar.broker.layout import preferred_broker
from magnetar.node.rpc import Refused
from magnetar.v1 import admin_pb2 as pb
from magnetar.v1 import common_pb2

Connect = Callable[[Broker], Calls]
MESSAGES = 5


class Topic:
    """A topic with a shard at each of three brokers, and some messages in each."""

    def __init__(self, brokers: dict[str, Broker], shards: dict[str, int], calls: dict[str, Calls]) -> None:
        self.brokers = brokers
        self.shards = shards
        self.calls = calls


@pytest.fixture
async def topic(cluster: Cluster, connect: Connect) -> Topic:
    names = ["a", "b", "c"]
    brokers = {name: await cluster.start_broker(name) for name in names}
    await eventually(lambda: all(len(broker.view.brokers()) == 3 for broker in brokers.values()))
    calls = {name: connect(brokers[name]) for name in names}
    layout = await calls["a"].create_topic(shards=12)
    shards = {str(preferred_broker(shard.shard_id, names)): shard for shard in layout.shards}
    request = pb.CreateSubscriptionRequest(topic=TOPIC, subscription="audit")
    request.start.earliest = True
    await calls["b"].admin("CreateSubscription", request, pb.CreateSubscriptionResponse)
    for name, shard in shards.items():
        async with ProduceClient(calls[name]) as client:
            await client.open(shard.shard_id)
            await client.publish(*(batch(i, i - 1, slot=shard.first_slot) for i in range(MESSAGES)))
            await client.answers(MESSAGES)
    return Topic(brokers, {name: shard.shard_id for name, shard in shards.items()}, calls)


async def describe(calls: Calls, name: str = "audit") -> pb.SubscriptionDescription:
    request = pb.DescribeSubscriptionRequest(topic=TOPIC, subscription=name)
    return (await calls.admin("DescribeSubscription", request, pb.DescribeSubscriptionResponse)).subscription


async def test_every_broker_describes_the_whole_topic_and_its_subscriptions(topic: Topic) -> None:
    async with ConsumeClient(topic.calls["c"]) as consumer:
        await consumer.open(topic.shards["c"], name="audit", messages=2)
        await consumer.offsets(2, batch_size=1)
        for calls in topic.calls.values():
            described = await calls.describe_topic()
            ends = {shard.owner: shard.end_offset for shard in described.shards if shard.end_offset}
            assert ends == dict.fromkeys(topic.brokers, MESSAGES)
            assert all(shard.owner == preferred_broker(shard.shard_id, ["a", "b", "c"]) for shard in described.shards)
            found = await describe(calls)
            assert found.backlog_messages == MESSAGES * 3
            assert [consumer.shard_id for consumer in found.consumers] == [topic.shards["c"]]
            assert found.oldest_age_s > 0
            assert {cursor.shard_id for cursor in found.shards} == {shard.shard_id for shard in described.shards}
            listed = await calls.admin(
                "ListSubscriptions", pb.ListSubscriptionsRequest(topic=TOPIC), pb.ListSubscriptionsResponse
            )
            [summary] = listed.subscriptions
            assert (summary.backlog_messages, summary.consumers) == (MESSAGES * 3, 1)


async def test_a_seek_at_any_broker_moves_the_subscription_in_all_shards_or_in_the_one_asked_for(topic: Topic) -> None:
    request = pb.SeekSubscriptionRequest(topic=TOPIC, subscription="audit")
    request.position.offset = 3
    for calls in topic.calls.values():
        answer = await calls.admin("SeekSubscription", request, pb.SeekSubscriptionResponse)
        floors = {place.shard_id: place.floor for place in answer.shards}
        assert {floors[shard] for shard in topic.shards.values()} == {3}
        assert len(floors) == 12
        assert (await describe(calls)).backlog_messages == 6
        one = pb.SeekSubscriptionRequest(topic=TOPIC, subscription="audit", shard_id=topic.shards["b"])
        one.position.earliest = True
        answer = await calls.admin("SeekSubscription", one, pb.SeekSubscriptionResponse)
        assert [(place.shard_id, place.floor) for place in answer.shards] == [(topic.shards["b"], 0)]
        assert (await describe(calls)).backlog_messages == 9
        one.dry_run = True
        one.position.offset = 5
        answer = await calls.admin("SeekSubscription", one, pb.SeekSubscriptionResponse)
        assert answer.shards[0].floor == 5
        assert (await describe(calls)).backlog_messages == 9


async def test_a_subscription_created_at_any_broker_misses_nothing_that_is_published_afterwards_anywhere(
    topic: Topic, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The owner's watch is slow: what counts is that it was asked before the answer.
    for broker in topic.brokers.values():
        monkeypatch.setattr(broker.topics, "on_subscription", [])
    for number, calls in enumerate(topic.calls.values()):
        name = f"new-{number}"
        request = pb.CreateSubscriptionRequest(topic=TOPIC, subscription=name)
        await calls.admin("CreateSubscription", request, pb.CreateSubscriptionResponse)
        for owner, shard in topic.shards.items():
            served = topic.brokers[owner].served.get(shard)
            assert served is not None
            assert served.log.cursors[name].floor == MESSAGES
        delete = pb.DeleteSubscriptionRequest(topic=TOPIC, subscription=name)
        await calls.admin("DeleteSubscription", delete, pb.DeleteSubscriptionResponse)
        for owner, shard in topic.shards.items():
            served = topic.brokers[owner].served.get(shard)
            assert served is not None
            assert name not in served.log.cursors


async def test_a_topic_is_deleted_by_any_broker_though_others_serve_its_shards(cluster: Cluster, topic: Topic) -> None:
    request = pb.DeleteTopicRequest(topic=TOPIC)
    answer = await topic.calls["a"].admin("DeleteTopic", request, pb.DeleteTopicResponse)
    assert (answer.shards, answer.messages) == (12, MESSAGES * 3)
    left = await cluster.store.range(KEYSPACE.root)
    kinds = {item.key.removeprefix(KEYSPACE.root).split("/")[0] for item in left.items}
    assert kinds <= {"ids", "brokers", "bookies", "cookies", "elections", "instance"}
    assert [len(broker.served) for broker in topic.brokers.values()] == [0, 0, 0]


async def test_a_topic_is_deleted_although_an_owner_of_it_has_just_crashed(cluster: Cluster, topic: Topic) -> None:
    crashed = topic.brokers["c"]
    await cluster.kill(crashed)
    request = pb.DeleteTopicRequest(topic=TOPIC)
    deleting = asyncio.create_task(topic.calls["a"].admin("DeleteTopic", request, pb.DeleteTopicResponse))

    await eventually(lambda: TOPIC in topic.brokers["b"]._going)
    await cluster.end_session(crashed)
    await deleting
    assert await cluster.store.get(KEYSPACE.topic(TOPIC)) is None
    assert not (await cluster.store.range(KEYSPACE.shards_prefix())).items


async def test_of_a_shard_whose_owner_does_not_answer_a_description_says_so_and_a_seek_is_refused(
    cluster: Cluster, topic: Topic
) -> None:
    await cluster.kill(topic.brokers["c"])
    calls = topic.calls["a"]
    described = await calls.describe_topic()
    assert next(shard.owner for shard in described.shards if shard.shard_id == topic.shards["c"]) == "c"
    found = await describe(calls)
    assert found.backlog_messages == MESSAGES * 2
    assert any(f"shard {topic.shards['c']}: nobody answers" in why for why in found.waiting_for)
    seek = pb.SeekSubscriptionRequest(topic=TOPIC, subscription="audit", shard_id=topic.shards["c"])
    seek.position.earliest = True
    error = await refusal(calls.admin("SeekSubscription", seek, pb.SeekSubscriptionResponse))
    assert error.reason == common_pb2.ERROR_REASON_UNAVAILABLE


async def test_who_is_asked_by_another_broker_passes_nothing_on(topic: Topic, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two brokers with opposite views would ask each other for ever."""
    calls, shard = topic.calls["a"], topic.shards["b"]

    async def nobody(*_: object) -> None:
        raise AssertionError("it asked another broker")

    monkeypatch.setattr(topic.brokers["a"].peers, "call", nobody)
    seek = pb.SeekSubscriptionRequest(topic=TOPIC, subscription="audit", shard_id=shard, passed_on=True)
    seek.position.earliest = True
    requests = {
        "DescribeShard": (pb.DescribeShardRequest(topic=TOPIC, shard_id=shard), pb.DescribeShardResponse),
        "SettleSubscription": (
            pb.SettleSubscriptionRequest(topic=TOPIC, shard_id=shard, subscription="audit"),
            pb.SettleSubscriptionResponse,
        ),
        "SeekSubscription": (seek, pb.SeekSubscriptionResponse),
    }
    for method, (request, answer) in requests.items():
        error = await refusal(calls.admin(method, request, answer))
        assert (error.reason, error.owner) == (common_pb2.ERROR_REASON_NOT_OWNER, topic.brokers["b"].address)


async def test_brokers_that_send_each_other_on_are_asked_a_bounded_number_of_times(
    topic: Topic, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def sent_to(broker: Broker, other: Broker) -> None:
        async def shard(_topic: str, shard_id: int) -> None:
            asked.append(broker.settings.id)
            raise Refused(common_pb2.ERROR_REASON_NOT_OWNER, "not here", owner=other.address)

        monkeypatch.setattr(broker, "shard", shard)

    a, b = topic.brokers["a"], topic.brokers["b"]
    sent_to(a, b)
    sent_to(b, a)
    found = await describe(topic.calls["a"])
    assert len(asked) <= 12 * 2 * 3
    assert len([why for why in found.waiting_for if "nobody answers" in why]) == 12


async def test_a_broker_without_a_session_says_at_once_that_the_metadata_store_is_away(
    cluster: Cluster, connect: Connect
) -> None:
    broker = await cluster.start_broker()
    calls = connect(broker)
    await calls.create_topic()
    cluster.store.refused_keys.add(KEYSPACE.broker("broker0"))
    await cluster.end_session(broker)
    await eventually(lambda: broker.ownership.session is None)
    error = await refusal(calls.describe_topic())
    assert error.reason == common_pb2.ERROR_REASON_UNAVAILABLE
    assert error.message.startswith("the metadata store does not answer: ")
    cluster.store.refused_keys.clear()
    await eventually(lambda: broker.ownership.session is not None)
    assert (await calls.describe_topic()).topic == TOPIC
