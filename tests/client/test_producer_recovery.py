"""Stored once, in order: whatever breaks between a producer and its broker."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import count

import pytest
from scripted_broker import Fate, ScriptedBroker, ScriptedCluster, Shard, error

from magnetar.client import (
    Batching,
    Client,
    ClusterUnavailable,
    InvalidArgument,
    MessageId,
    Producer,
    ProducerFenced,
    RetriableError,
    TopicNotFound,
)
from magnetar.client.links import SILENCE_S
from magnetar.wire.batch import BatchHeader
from magnetar.wire.slots import slot_of

TOPIC = "public/default/clicks"
SINGLE = Batching(max_messages=1)
PROMPT_S = 10.0
"""Half of the client's patience."""


def script(cluster: ScriptedCluster, *fates: Fate | object) -> None:
    """These fates for the first batches, and storing for all others."""
    left: Iterator[object] = iter(fates)
    cluster.on_batch = lambda shard, header: next(left, Fate.STORE)  # type: ignore[assignment,return-value]


def key_in(shard: Shard) -> str:
    """A key whose messages go to this shard."""
    return next(key for n in count() if shard.first_slot <= slot_of((key := f"k{n}").encode()) <= shard.last_slot)


def only_shard(cluster: ScriptedCluster) -> Shard:
    (shard,) = cluster.topics[TOPIC].shards.values()
    return shard


@pytest.fixture
def numbers() -> list[bytes]:
    return [b"%d" % number for number in range(20)]


@pytest.mark.parametrize("fate", [Fate.CUT, Fate.STORE_AND_CUT])
@pytest.mark.parametrize("at", [0, 3, 19])
async def test_a_broken_connection_neither_loses_nor_repeats_nor_reorders(
    cluster: ScriptedCluster, client: Client, numbers: list[bytes], fate: Fate, at: int
) -> None:
    async with client.producer("clicks", batching=SINGLE) as producer:
        script(cluster, *[Fate.STORE] * at, fate)
        receipts = [producer.send_nowait(payload) for payload in numbers]
        ids = [await receipt for receipt in receipts]
    shard = only_shard(cluster)
    assert shard.payloads() == numbers
    # Answers may be lost with the connection, and the broker can place the last 16 batches again.
    forgotten = max(0, at - 15)
    assert [id.offset for id in ids][forgotten:] == list(range(forgotten, 20))
    assert all(id.offset in (None, offset) for offset, id in enumerate(ids))


async def test_batches_whose_answers_were_lost_are_not_sent_again(
    cluster: ScriptedCluster, broker: ScriptedBroker, client: Client, numbers: list[bytes]
) -> None:
    async with client.producer("clicks", batching=SINGLE) as producer:
        script(cluster, Fate.STORE, *[Fate.STORE_SILENTLY] * 19)
        receipts = [producer.send_nowait(payload) for payload in numbers]
        await cluster.until(lambda: len(cluster.headers) == 20)
        broker.cut()
        ids = [await receipt for receipt in receipts]
    assert len(cluster.headers) == 20
    # The broker remembers where the last 16 batches are.
    assert [id.offset for id in ids] == [0, None, None, None, *range(4, 20)]


async def test_a_batch_out_of_order_opens_the_producer_again(
    cluster: ScriptedCluster, client: Client, numbers: list[bytes]
) -> None:
    async with client.producer("clicks", batching=SINGLE) as producer:
        script(cluster, Fate.STORE, Fate.STORE, Fate.DROP)
        receipts = [producer.send_nowait(payload) for payload in numbers]
        await asyncio.gather(*receipts)
    assert only_shard(cluster).payloads() == numbers
    assert cluster.opens == 2


@pytest.mark.parametrize("reason", ["UNAVAILABLE", "INTERNAL", "NOT_OWNER", "OUT_OF_ORDER"])
async def test_a_passing_refusal_is_tried_again(
    cluster: ScriptedCluster, client: Client, numbers: list[bytes], reason: str
) -> None:
    async with client.producer("clicks", batching=SINGLE) as producer:
        script(cluster, Fate.STORE, error(reason))
        assert len(await producer.send_many(numbers)) == 20
    assert only_shard(cluster).payloads() == numbers


async def test_a_shard_that_moved_is_followed_and_what_was_under_way_is_stored_once(
    cluster: ScriptedCluster, client: Client, numbers: list[bytes]
) -> None:
    other = await cluster.broker()
    async with client.producer("clicks", batching=SINGLE) as producer:
        await producer.send(b"first")
        shard = only_shard(cluster)
        script(cluster, *[Fate.STORE] * 5)

        def move(shard: Shard, header: BatchHeader) -> Fate:
            if len(shard.log) == 6 and shard.owner is not other:
                cluster.move(shard, other)
                return Fate.CUT
            return Fate.STORE

        cluster.on_batch = move
        await producer.send_many(numbers)
    assert shard.payloads() == [b"first", *numbers]
    assert other.streams == set() or shard.owner is other


async def test_a_broker_that_names_the_owner_is_believed_without_asking_again(
    cluster: ScriptedCluster, client: Client
) -> None:
    other = await cluster.broker()
    async with client.producer("clicks") as producer:
        await producer.send(b"0")
        resolves = cluster.resolves
        cluster.move(only_shard(cluster), other)
        await producer.send(b"1")
        assert cluster.resolves == resolves


async def test_a_broker_that_comes_back_on_its_address_is_found(
    cluster: ScriptedCluster, broker: ScriptedBroker, client: Client
) -> None:
    async with client.producer("clicks") as producer:
        await producer.send(b"before")
        await broker.stop()
        receipt = producer.send_nowait(b"meanwhile")
        await broker.start(int(broker.address.rpartition(":")[2]))
        assert (await receipt).offset == 1
    assert only_shard(cluster).payloads() == [b"before", b"meanwhile"]


@pytest.mark.parametrize("reason", ["MALFORMED", "MESSAGE_TOO_LARGE", "INVALID_ARGUMENT"])
async def test_a_condemned_batch_fails_alone_and_the_order_of_the_others_is_kept(
    cluster: ScriptedCluster, client: Client, numbers: list[bytes], reason: str
) -> None:
    async with client.producer("clicks", batching=SINGLE) as producer:
        script(cluster, Fate.STORE, Fate.STORE, error(reason, "this one is bad"))
        receipts = [producer.send_nowait(payload) for payload in numbers]
        results = await asyncio.gather(*receipts, return_exceptions=True)
        assert "this one is bad" in str(results[2])
        assert [result for result in results if isinstance(result, Exception)] == [results[2]]
    assert only_shard(cluster).payloads() == numbers[:2] + numbers[3:]


async def test_a_batch_that_cannot_be_read_ends_the_producer(cluster: ScriptedCluster, client: Client) -> None:
    async with client.producer("clicks") as producer:
        cluster.on_open = lambda shard: error("INVALID_ARGUMENT", "not like this")
        with pytest.raises(InvalidArgument, match="not like this"):
            await producer.send(b"x")
        with pytest.raises(InvalidArgument, match="not like this"):
            producer.send_nowait(b"x")


async def test_a_newer_connection_of_the_name_fences_the_older_for_good(
    cluster: ScriptedCluster, client: Client
) -> None:
    async with client.producer("clicks", name="importer") as older:
        await older.send(b"1")
        async with client.producer("clicks", name="importer") as newer:
            await newer.send(b"2")
            with pytest.raises(ProducerFenced):
                await older.send(b"3")
            with pytest.raises(ProducerFenced):
                older.send_nowait(b"4")
            await newer.send(b"5")
    assert only_shard(cluster).payloads() == [b"1", b"2", b"5"]


async def test_a_name_that_others_keep_taking_is_given_up_after_the_timeout(
    cluster: ScriptedCluster, client: Client, connecting: Callable[[float], Client]
) -> None:
    cluster.create("clicks")
    cluster.epochs[TOPIC, "importer"] = 7
    async with client.producer("clicks", name="importer"):
        assert cluster.epochs[TOPIC, "importer"] == 8
    cluster.rivals = True
    async with connecting(0.2) as impatient:
        with pytest.raises(RetriableError):
            async with impatient.producer("clicks", name="importer"):
                raise AssertionError


async def test_a_topic_that_is_deleted_ends_the_producer(cluster: ScriptedCluster, client: Client) -> None:
    async with client.producer("clicks") as producer:
        await producer.send(b"1")
        cluster.on_batch = lambda shard, header: error("TOPIC_NOT_FOUND", "the topic was deleted")
        with pytest.raises(TopicNotFound, match="was deleted"):
            await producer.send(b"2")


async def test_keyless_messages_go_where_shards_serve_and_everywhere_again_when_all_do(
    cluster: ScriptedCluster, client: Client
) -> None:
    """As while the metadata store is away: what is open goes on, what is not is not opened."""
    topic = cluster.create("clicks", shards=4)
    serving, *others = topic.shards.values()
    cluster.on_open = lambda shard: None if shard is serving else error("UNAVAILABLE")
    async with client.producer("clicks", batching=SINGLE) as producer:
        await producer.send(b"first", key=key_in(serving))
        async with asyncio.timeout(PROMPT_S):
            ids = [await producer.send(b"x") for _ in range(20)]
        assert {id.shard for id in ids} == {serving.shard_id}

        cluster.on_open = lambda shard: None
        async with asyncio.timeout(PROMPT_S):
            while not all(shard.log for shard in others):
                await producer.send(b"y")


async def test_keyless_messages_leave_a_shard_that_is_silent(cluster: ScriptedCluster, client: Client) -> None:
    topic = cluster.create("clicks", shards=2)
    silent, other = topic.shards.values()
    async with client.producer("clicks", batching=SINGLE) as producer:
        for shard in (silent, other):
            await producer.send(b"first", key=key_in(shard))
        cluster.on_batch = lambda shard, header: Fate.DROP if shard is silent else Fate.STORE
        waiting = producer.send_nowait(b"waits", key=key_in(silent))
        producer._lanes._lanes[silent.shard_id]._moved_at -= SILENCE_S
        async with asyncio.timeout(PROMPT_S):
            ids = [await producer.send(b"x") for _ in range(20)]
        assert {id.shard for id in ids} == {other.shard_id}
        cluster.on_batch = lambda shard, header: Fate.STORE
        cluster.brokers[0].cut()
        assert (await waiting).shard == silent.shard_id


async def test_without_progress_everything_of_the_shard_fails_together_and_says_that_it_is_unknown(
    cluster: ScriptedCluster, connecting: Callable[[float], Client]
) -> None:
    async with connecting(1.0) as client, client.producer("clicks", batching=SINGLE) as producer:
        await producer.send(b"stored")
        cluster.on_batch = lambda shard, header: Fate.STORE_SILENTLY
        receipts = [producer.send_nowait(b"%d" % number) for number in range(3)]
        results = await asyncio.gather(*receipts, return_exceptions=True)
        assert all(isinstance(result, ClusterUnavailable) for result in results)
        assert "may or may not be stored" in str(results[0])
        assert "takes what it is sent, and does not answer: `magnetar cluster health` says whether" in str(results[0])
        cluster.on_batch = lambda shard, header: Fate.STORE
        # They were stored after all; the producer goes on behind them.
        assert (await producer.send(b"next")).offset == 4


async def test_a_shard_that_answers_slowly_but_steadily_is_waited_for(
    cluster: ScriptedCluster, connecting: Callable[[float], Client]
) -> None:
    async with connecting(0.8) as client, client.producer("clicks", batching=SINGLE) as producer:
        cluster.window_bytes = 1
        loop = asyncio.get_running_loop()
        answers: list[object] = []
        for broker in cluster.brokers:
            original = broker._stored
            broker._stored = lambda *args, original=original: answers.append(  # type: ignore[method-assign]
                loop.call_later(0.15, original, *args)
            )
        begin = loop.time()
        await producer.send_many([b"%d" % number for number in range(8)])
        assert loop.time() - begin > 1.0
    assert len(answers) == 8


async def test_no_broker_at_all_is_a_clear_error(connecting: Callable[[float], Client], broker: ScriptedBroker) -> None:
    await broker.stop()
    async with connecting(1.0) as client:
        with pytest.raises(ClusterUnavailable, match=broker.address):
            async with client.producer("clicks"):
                raise AssertionError


async def test_the_window_bounds_what_is_under_way(cluster: ScriptedCluster, client: Client) -> None:
    cluster.window_bytes = 3000
    unanswered: list[int] = []
    async with client.producer("clicks", batching=SINGLE) as producer:
        (lane,) = producer._lanes._row

        def look(shard: Shard, header: BatchHeader) -> Fate:
            unanswered.append(lane.chain.unanswered)
            return Fate.STORE

        cluster.on_batch = look
        await producer.send_many([bytes(800)] * 30)
        await producer.send(bytes(10_000))
    assert max(unanswered[:-1]) <= 3000
    assert unanswered[-1] > 10_000


@pytest.mark.parametrize("seed", range(6))
async def test_every_message_is_stored_once_and_each_key_in_order_under_random_failures(
    cluster: ScriptedCluster, seed: int
) -> None:
    """Keyed and keyless messages, four shards on two brokers; batches cut, refused, stored without an answer;
    shards that move."""
    rng = random.Random(seed)
    from magnetar.client import connect

    await cluster.broker()
    topic = cluster.create("clicks", shards=4)

    def fate(shard: Shard, header: BatchHeader) -> object:
        dice = rng.random()
        if dice < 0.03:
            cluster.move(shard, rng.choice(cluster.brokers))
        if dice < 0.12:
            return rng.choice([Fate.CUT, Fate.STORE_AND_CUT, error("UNAVAILABLE"), error("INTERNAL")])
        return Fate.STORE

    cluster.on_batch = fate  # type: ignore[assignment]
    async with connect(cluster.brokers[0].address, timeout=30) as client:
        batching = Batching(max_messages=7)
        async with client.producer("clicks", batching=batching) as producer:
            receipts = []
            for number in range(600):
                key = rng.choice([None, "a", "b", "c", "d", "e", "f"])
                receipts.append((number, key, producer.send_nowait(b"%d" % number, key=key)))
                if rng.random() < 0.1:
                    await asyncio.sleep(0)
            tail = await asyncio.gather(*(receipt for _, _, receipt in receipts), return_exceptions=True)
            assert not [result for result in tail if isinstance(result, BaseException)]
    stored = [(p, k) for shard in topic.shards.values() for p, k in zip(shard.payloads(), shard.keys(), strict=True)]
    assert Counter(int(p) for p, _ in stored) == Counter(range(600))
    for key in {k for _, k in stored if k is not None}:
        order = [int(p) for p, k in stored if k == key]
        assert order == sorted(order)
    for (number, _, _), message_id in zip(receipts, tail, strict=True):
        assert isinstance(message_id, MessageId)
        if message_id.offset is not None:
            assert topic.shards[message_id.shard].payloads()[message_id.offset] == b"%d" % number


class TestNamedProducers:
    """Sequences of the user's, across restarts."""

    async def send_all(self, producer: Producer, sequences: range) -> list[MessageId]:
        receipts = [producer.send_nowait(b"%d" % n, sequence=n) for n in sequences]
        return [await receipt for receipt in receipts]

    async def test_what_an_earlier_life_stored_is_not_stored_again(
        self, cluster: ScriptedCluster, client: Client
    ) -> None:
        async with client.producer("clicks", name="importer") as producer:
            before = await self.send_all(producer, range(10))
        async with client.producer("clicks", name="importer") as producer:
            again = await self.send_all(producer, range(5, 15))
        assert only_shard(cluster).payloads() == [b"%d" % n for n in range(15)]
        assert again[:5] == before[5:]
        assert [id.offset for id in again[5:]] == [10, 11, 12, 13, 14]

    async def test_a_sequence_that_is_still_under_way_gets_the_same_id(
        self, cluster: ScriptedCluster, client: Client
    ) -> None:
        async with client.producer("clicks", name="importer", batching=SINGLE) as producer:
            first, again = producer.send_nowait(b"7", sequence=7), producer.send_nowait(b"7", sequence=7)
            assert await first == await again
        assert only_shard(cluster).payloads() == [b"7"]

    async def test_a_sequence_stored_long_ago_has_an_id_without_an_offset(
        self, cluster: ScriptedCluster, client: Client
    ) -> None:
        async with client.producer("clicks", name="importer", batching=SINGLE) as producer:
            await self.send_all(producer, range(20))
            old = await producer.send(b"2", sequence=2)
            young = await producer.send(b"18", sequence=18)
        assert (old.offset, young.offset) == (None, 18)

    async def test_sequences_may_have_gaps_but_a_batch_has_none(self, cluster: ScriptedCluster, client: Client) -> None:
        async with client.producer("clicks", name="importer") as producer:
            receipts = [producer.send_nowait(b"%d" % n, sequence=n) for n in (3, 4, 10, 11, 12, 40)]
            await asyncio.gather(*receipts)
        assert [(h.first_sequence, h.last) for h in cluster.headers] == [(3, 4), (10, 12), (40, 40)]

    async def test_a_producer_that_counts_by_itself_goes_on_behind_its_earlier_life(
        self, cluster: ScriptedCluster, client: Client
    ) -> None:
        for number in range(3):
            async with client.producer("clicks", name="importer") as producer:
                await producer.send(b"%d" % number)
        assert only_shard(cluster).payloads() == [b"0", b"1", b"2"]

    async def test_numbering_is_for_named_producers_and_for_all_messages_from_then_on(self, client: Client) -> None:
        async with client.producer("clicks") as producer:
            with pytest.raises(InvalidArgument, match="name"):
                producer.send_nowait(b"x", sequence=1)
        async with client.producer("clicks", name="importer") as producer:
            await producer.send(b"x", sequence=1)
            with pytest.raises(InvalidArgument, match="sequence"):
                producer.send_nowait(b"x")
            with pytest.raises(InvalidArgument, match="sequence"):
                await producer.send_many([b"x"])

    async def test_keyless_messages_of_a_named_producer_stay_in_one_shard(
        self, cluster: ScriptedCluster, client: Client
    ) -> None:
        topic = cluster.create("clicks", shards=8)
        for _ in range(2):
            async with client.producer("clicks", name="importer", batching=SINGLE) as producer:
                await producer.send_many([b"x"] * 10)
        assert sorted(len(shard.log) for shard in topic.shards.values()) == [0] * 7 + [20]
