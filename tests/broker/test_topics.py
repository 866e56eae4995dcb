"""Topics, subscriptions and producers in the metadata store."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence

import pytest

from magnetar.broker.topics import Topics
from magnetar.metadata.ids import IdBlocks
from magnetar.metadata.keyspace import Keyspace
from magnetar.metadata.memory import MemoryStore
from magnetar.metadata.records import Anchor, AtOffset, SubscriptionType, TopicRecord
from magnetar.metadata.store import Compare, Delete, MetadataUnavailable, Operation, TxnResult
from magnetar.node.rpc import Refused
from magnetar.v1 import common_pb2

KEYSPACE = Keyspace("test")
TOPIC = "public/default/orders"


class DoubtfulStore(MemoryStore):
    """Loses replies of transactions: of the next one, after or before it is applied."""

    lose: str = ""

    async def txn(self, compares: Sequence[Compare], operations: Sequence[Operation]) -> TxnResult:
        lose, self.lose = self.lose, ""
        if lose == "request":
            raise MetadataUnavailable("no answer")
        result = await super().txn(compares, operations)
        if lose == "reply":
            raise MetadataUnavailable("no answer")
        return result


@pytest.fixture
async def store() -> AsyncIterator[DoubtfulStore]:
    async with DoubtfulStore() as store:
        yield store


@pytest.fixture
async def topics(store: DoubtfulStore) -> AsyncIterator[Topics]:
    topics = make(store)
    await topics.start()
    yield topics
    await topics.close()


def make(store: MemoryStore) -> Topics:
    return Topics(store, KEYSPACE, IdBlocks(store, KEYSPACE), lambda: 1_000)


def refused(reason: int) -> Callable[[Refused], bool]:
    return lambda error: error.reason == reason


async def settle() -> None:
    """Lets watches run: the store delivers without waiting for anything but turns of the loop."""
    for _ in range(20):
        await asyncio.sleep(0)


async def test_a_topic_and_its_shards_appear_together(store: DoubtfulStore, topics: Topics) -> None:
    record = await topics.create(TOPIC, 4)
    assert [shard.first_slot for shard in record.shards] == [0, 16384, 32768, 49152]
    stored = {(await store.get(KEYSPACE.topic(TOPIC))).mod_revision}  # type: ignore[union-attr]
    for shard in record.shards:
        stored.add((await store.get(KEYSPACE.shard(shard.shard_id))).create_revision)  # type: ignore[union-attr]
    assert len(stored) == 1
    assert await topics.get(TOPIC) == record


@pytest.mark.parametrize("shards", [0, 65])
async def test_a_topic_has_at_least_one_shard_and_not_too_many(topics: Topics, shards: int) -> None:
    with pytest.raises(Refused, match="1 to 64 shards"):
        await topics.create(TOPIC, shards)


async def test_whoever_comes_second_finds_the_topic_of_the_first(store: DoubtfulStore, topics: Topics) -> None:
    others = [make(store) for _ in range(5)]
    records = await asyncio.gather(*(t.get_or_create(TOPIC) for t in [topics, *others]))
    assert len(set(records)) == 1
    with pytest.raises(Refused, match="exists already"):
        await topics.create(TOPIC, 1)


async def test_that_a_topic_is_missing_is_never_remembered(store: DoubtfulStore, topics: Topics) -> None:
    with pytest.raises(Refused, match="does not exist"):
        await topics.get(TOPIC)
    await make(store).create(TOPIC, 1)
    assert (await topics.get(TOPIC)).topic == TOPIC


async def test_a_creation_whose_reply_was_lost_is_recognised(store: DoubtfulStore, topics: Topics) -> None:
    await topics.create("public/default/other", 1)  # takes a block of ids
    store.lose = "reply"
    assert (await topics.create(TOPIC, 2)).topic == TOPIC
    store.lose = "request"
    with pytest.raises(MetadataUnavailable):
        await topics.create("public/default/third", 2)


async def test_a_remembered_record_follows_the_watch(store: DoubtfulStore, topics: Topics) -> None:
    other = make(store)
    await other.create(TOPIC, 1)
    await settle()
    assert not (await topics.get(TOPIC)).deleting
    seen: list[tuple[str, TopicRecord | None]] = []
    topics.on_topic.append(lambda topic, record: seen.append((topic, record)))
    marked = await other.mark_deleting(TOPIC)
    await settle()
    assert [(topic, record and record.deleting) for topic, record in seen] == [(TOPIC, True)]
    with pytest.raises(Refused, match="being deleted"):
        await topics.get(TOPIC)
    for shard in marked.shards:
        await store.txn([], [Delete(KEYSPACE.shard(shard.shard_id))])
    await other.finish_deleting(TOPIC)
    await settle()
    assert seen[-1] == (TOPIC, None)
    with pytest.raises(Refused, match="does not exist"):
        await topics.get(TOPIC)


async def test_deleting_ends_only_when_the_shards_are_gone_and_takes_everything(
    store: DoubtfulStore, topics: Topics
) -> None:
    record = await topics.create(TOPIC, 1)
    await topics.create_subscription(TOPIC, "audit", SubscriptionType.STREAM, Anchor.LATEST)
    await topics.register_producer(TOPIC, "p")
    assert await topics.mark_deleting(TOPIC) == await topics.mark_deleting(TOPIC)
    with pytest.raises(Refused, match="still being deleted"):
        await topics.finish_deleting(TOPIC)
    for attempt in (
        topics.create_subscription(TOPIC, "late", SubscriptionType.STREAM, Anchor.LATEST),
        topics.register_producer(TOPIC, "late"),
    ):
        with pytest.raises(Refused, match="being deleted"):
            await attempt
    with pytest.raises(Refused, match="being deleted"):
        await topics.get_or_create(TOPIC)
    await store.txn([], [Delete(KEYSPACE.shard(record.shards[0].shard_id))])
    await topics.finish_deleting(TOPIC)
    await topics.finish_deleting(TOPIC)
    left = await store.range(KEYSPACE.root)
    assert {item.key.removeprefix(KEYSPACE.root).split("/")[0] for item in left.items} == {"ids"}


async def test_finishing_a_deletion_never_touches_a_new_topic_of_that_name(topics: Topics) -> None:
    record = await topics.create(TOPIC, 1)
    await topics.finish_deleting(TOPIC)
    assert await topics.marked(TOPIC) is None
    assert await topics.get(TOPIC) == record


async def test_names_are_listed_in_pages(topics: Topics) -> None:
    for name in ("public/default/a", "public/default/b", "public/other/c", "x/y/d"):
        await topics.create(name, 1)
    await topics.mark_deleting("public/default/b")
    assert await topics.page("", "", 10) == (["public/default/a", "public/other/c", "x/y/d"], False)
    assert await topics.page("", "", 2) == (["public/default/a", "public/other/c"], True)
    assert await topics.page("", "public/other/c", 2) == (["x/y/d"], False)
    assert await topics.page("public", "", 10) == (["public/default/a", "public/other/c"], False)
    assert await topics.page("public/other", "", 10) == (["public/other/c"], False)
    for prefix in ("a/b/c", "/", "..", "a/ b"):
        with pytest.raises(Refused):
            await topics.page(prefix, "", 10)


async def test_a_subscription_takes_the_type_of_its_first_consumer(topics: Topics) -> None:
    await topics.create(TOPIC, 1)
    created = await topics.create_subscription(TOPIC, "s", SubscriptionType.UNDECIDED, AtOffset(5))
    opened = await topics.open_subscription(TOPIC, "s", SubscriptionType.QUEUE, None)
    assert (opened.type, opened.start, opened.subscription_id) == (
        SubscriptionType.QUEUE,
        AtOffset(5),
        created.subscription_id,
    )
    with pytest.raises(Refused) as busy:
        await topics.open_subscription(TOPIC, "s", SubscriptionType.STREAM, Anchor.LATEST)
    assert busy.value.reason == common_pb2.ERROR_REASON_CONSUMER_BUSY
    assert await topics.open_subscription(TOPIC, "s", SubscriptionType.UNDECIDED, None) == opened


async def test_a_subscription_that_is_missing_is_created_only_if_a_start_is_given(topics: Topics) -> None:
    await topics.create(TOPIC, 1)
    with pytest.raises(Refused) as missing:
        await topics.open_subscription(TOPIC, "s", SubscriptionType.QUEUE, None)
    assert missing.value.reason == common_pb2.ERROR_REASON_SUBSCRIPTION_NOT_FOUND
    first = await topics.open_subscription(TOPIC, "s", SubscriptionType.QUEUE, Anchor.EARLIEST)
    assert await topics.delete_subscription(TOPIC, "s") == first
    second = await topics.open_subscription(TOPIC, "s", SubscriptionType.QUEUE, Anchor.EARLIEST)
    assert second.subscription_id != first.subscription_id
    assert [record.name for record in await topics.subscriptions(TOPIC)] == ["s"]


async def test_a_registration_that_comes_late_or_once_more_takes_nothing(store: DoubtfulStore, topics: Topics) -> None:
    await topics.create(TOPIC, 1)
    older = await topics.register_producer(TOPIC, "p", 0)
    assert (older.epoch, older.taken) == (1, True)
    assert await topics.register_producer(TOPIC, "p", 0) == older._replace(taken=False)
    newer = await topics.register_producer(TOPIC, "p", 1)
    assert (newer.epoch, newer.taken) == (2, True)
    for of_the_older in (0, 1):
        assert await topics.register_producer(TOPIC, "p", of_the_older) == newer._replace(taken=False)
    copies = await asyncio.gather(*(topics.register_producer(TOPIC, "p", 2) for _ in range(3)))
    assert sorted((copy.epoch, copy.taken) for copy in copies) == [(3, False), (3, False), (3, True)]
    # Applied without an answer: its epoch is nobody's, and the next request takes the one after it.
    store.lose = "reply"
    with pytest.raises(MetadataUnavailable):
        await topics.register_producer(TOPIC, "p", 3)
    assert not (await topics.register_producer(TOPIC, "p", 3)).taken
    assert (await topics.register_producer(TOPIC, "p", 4))[1:] == (5, True)


async def test_registering_a_producer_takes_the_next_epoch_each_time(store: DoubtfulStore, topics: Topics) -> None:
    await topics.create(TOPIC, 1)
    records = await asyncio.gather(*(topics.register_producer(TOPIC, "p") for _ in range(5)))
    assert sorted(record.epoch for record in records) == [1, 2, 3, 4, 5]
    assert len({record.producer_id for record in records}) == 1
    store.lose = "reply"
    with pytest.raises(MetadataUnavailable):
        await topics.register_producer(TOPIC, "p")
    assert (await topics.register_producer(TOPIC, "p")).epoch == 7
    with pytest.raises(Refused, match="does not exist"):
        await topics.register_producer("public/default/none", "p")
