"""What a producer accepts, how it waits for room, and what its receipts are."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

import pytest
from scripted_broker import Fate, ScriptedBroker, ScriptedCluster, Shard, error

from magnetar.client import (
    EARLIEST,
    LATEST,
    Batching,
    Client,
    InvalidArgument,
    MagnetarError,
    MessageId,
    MessageTooLarge,
    QueueFull,
    Receipt,
)
from magnetar.client.lane import BATCHES_IN_FLIGHT
from magnetar.client.outgoing import MESSAGE_BYTES_MAX
from magnetar.wire.batch import BatchHeader

SINGLE = Batching(max_messages=1)
TOPIC = "public/default/clicks"


async def read_all(client: Client, topic: str = "clicks") -> list[Any]:
    async with client.reader(topic, start=EARLIEST, stop=LATEST) as reader:
        return [message async for message in reader]


async def test_everything_that_is_sent_is_what_is_read(client: Client) -> None:
    time = datetime(2013, 1, 31, 12, 0, 0, 123_456, tzinfo=UTC)
    async with client.producer("clicks") as producer:
        await producer.send(b"plain")
        await producer.send(b"", key="Ünï", properties={"page": "/cart", "": "ß"}, event_time=time)
        await producer.send(bytearray(b"array"), key=b"\xff\x00")  # type: ignore[arg-type]
        await producer.send(memoryview(b"view"), key="", properties={})  # type: ignore[arg-type]
    messages = await read_all(client)
    assert [message.payload for message in messages] == [b"plain", b"", b"array", b"view"]
    assert [message.key for message in messages] == [None, "Ünï", b"\xff\x00", ""]
    assert [dict(message.properties) for message in messages] == [{}, {"page": "/cart", "": "ß"}, {}, {}]
    assert [message.event_time for message in messages] == [None, time, None, None]
    assert [message.id for message in messages] == [MessageId(1, offset) for offset in range(4)]
    assert messages[0].publish_time.tzinfo is UTC
    assert messages[0].topic == TOPIC
    assert messages[0].redelivery_count == 0


@pytest.mark.parametrize("compression", ["lz4", "zstd"])
async def test_compressed_batches_are_small_and_read_back(
    cluster: ScriptedCluster, client: Client, compression: Any
) -> None:
    payloads = [b"the same thing again and again %d" % number for number in range(1000)]
    async with client.producer("clicks", compression=compression) as producer:
        await producer.send_many(payloads)
    assert [message.payload for message in await read_all(client)] == payloads
    assert sum(header.length for header in cluster.headers) < sum(map(len, payloads)) / 2


@pytest.mark.parametrize(
    ("arguments", "remedy"),
    [
        ({"payload": "text"}, r"encode\(\)"),
        ({"payload": 7}, "bytes"),
        ({"payload": b"", "key": 7}, "str or bytes"),
        ({"payload": b"", "key": "\ud800"}, "UTF-8"),
        ({"payload": b"", "properties": {"a": 1}}, "str to str"),
        ({"payload": b"", "properties": {1: "a"}}, "str to str"),
        ({"payload": b"", "properties": {"a": "\ud800"}}, "UTF-8"),
        ({"payload": b"", "properties": [1]}, "str to str"),
        ({"payload": b"", "event_time": datetime(2020, 1, 1)}, "timezone"),
        ({"payload": b"", "event_time": 12}, "datetime"),
    ],
)
async def test_what_cannot_be_sent_is_refused_at_once_with_the_remedy(
    cluster: ScriptedCluster, client: Client, arguments: dict[str, Any], remedy: str
) -> None:
    async with client.producer("clicks") as producer:
        with pytest.raises(InvalidArgument, match=remedy):
            producer.send_nowait(arguments.pop("payload"), **arguments)
        assert producer.pending_bytes == 0
    assert not cluster.headers


async def test_the_largest_message_travels_and_one_byte_more_is_refused_before_anything_is_sent(
    cluster: ScriptedCluster, client: Client
) -> None:
    async with client.producer("clicks") as producer:
        await producer.send(bytes(MESSAGE_BYTES_MAX))
        await producer.send(bytes(MESSAGE_BYTES_MAX - 3), key="key")
        for attempt in (
            lambda: producer.send_nowait(bytes(MESSAGE_BYTES_MAX + 1)),
            lambda: producer.send_nowait(bytes(MESSAGE_BYTES_MAX), key="k"),
            lambda: producer.send_nowait(bytes(MESSAGE_BYTES_MAX), properties={"a": "b"}),
        ):
            with pytest.raises(MessageTooLarge):
                attempt()
        with pytest.raises(MessageTooLarge):
            await producer.send_many([b"small", bytes(MESSAGE_BYTES_MAX + 1)])
        with pytest.raises(MessageTooLarge):
            await producer.send_many([bytes(MESSAGE_BYTES_MAX)], keys=["k"])
        assert producer.pending_bytes == 0
    assert len(cluster.headers) == 2


async def test_frames_hold_many_small_batches_but_no_more_than_a_mebibyte(
    cluster: ScriptedCluster, client: Client
) -> None:
    async with client.producer("clicks", batching=Batching(max_messages=10)) as producer:
        await producer.send_many([bytes(1000)] * 3000)
    assert max(cluster.frames) <= (1 << 20) + 65536
    assert len(cluster.frames) < 20
    assert len(cluster.headers) == 300


async def test_messages_gather_into_one_batch_while_the_stream_is_busy(
    cluster: ScriptedCluster, client: Client
) -> None:
    async with client.producer("clicks") as producer:
        await asyncio.gather(*(producer.send(b"x") for _ in range(500)))
    assert len(cluster.headers) < 5


async def test_messages_gather_into_one_batch_while_some_are_unanswered(
    cluster: ScriptedCluster, broker: ScriptedBroker, client: Client
) -> None:
    (other,) = cluster.create("other").shards.values()
    counts: list[int] = []

    def fate(shard: Shard, header: BatchHeader) -> Fate:
        if shard is other:
            return Fate.STORE
        counts.append(header.count)
        return Fate.STORE_SILENTLY if sum(counts) <= BATCHES_IN_FLIGHT else Fate.STORE

    cluster.on_batch = fate
    async with client.producer("clicks") as producer, client.producer("other") as another:
        receipts = []
        for number in range(BATCHES_IN_FLIGHT):
            receipts.append(producer.send_nowait(b"alone"))
            await cluster.until(lambda sent=number: len(counts) == sent + 1)  # type: ignore[misc]
        for _ in range(3):
            receipts.append(producer.send_nowait(b"together"))
            # What the same stream carries later is answered: what was to go before it has gone.
            await another.send(b"later")
        assert counts == [1] * BATCHES_IN_FLIGHT
        broker.cut()
        await asyncio.gather(*receipts)
    assert counts == [1] * BATCHES_IN_FLIGHT + [3]


async def test_a_lingering_batch_waits_for_more_and_flush_does_not(cluster: ScriptedCluster, client: Client) -> None:
    async with client.producer("clicks", batching=Batching(linger=30.0)) as producer:
        receipts = [producer.send_nowait(b"x") for _ in range(10)]
        await producer.flush()
        assert all(receipt.done() for receipt in receipts)
        assert len(cluster.headers) == 1
        producer.send_nowait(b"y")
    assert len(cluster.headers) == 2


async def test_a_lingering_batch_goes_when_its_time_has_come(cluster: ScriptedCluster, client: Client) -> None:
    async with client.producer("clicks", batching=Batching(linger=0.05)) as producer:
        await asyncio.gather(producer.send(b"x"), producer.send(b"y"))
        assert len(cluster.headers) == 1


async def test_send_nowait_refuses_what_is_over_budget_and_send_waits_in_order(
    cluster: ScriptedCluster, client: Client
) -> None:
    async with client.producer("clicks", batching=SINGLE, max_pending_bytes=1000) as producer:
        cluster.on_batch = lambda shard, header: Fate.DROP
        first = producer.send_nowait(bytes(700))
        with pytest.raises(QueueFull, match="max_pending_bytes=`1000`"):
            producer.send_nowait(bytes(700))
        waiting = [asyncio.create_task(producer.send(b"%d" % n + bytes(600))) for n in range(4)]
        await cluster.until(lambda: len(cluster.headers) == 1)
        with pytest.raises(QueueFull):
            # It would fit, and overtake those who wait.
            producer.send_nowait(b"")
        cluster.on_batch = lambda shard, header: Fate.STORE
        cluster.brokers[0].cut()
        await asyncio.gather(first, *waiting)
        assert producer.pending_bytes == 0
    payloads = cluster.topics[TOPIC].shards[1].payloads()
    assert [payload[:1] for payload in payloads[1:]] == [b"0", b"1", b"2", b"3"]


async def test_giving_up_waiting_for_room_gives_the_room_to_others(cluster: ScriptedCluster, client: Client) -> None:
    async with client.producer("clicks", batching=SINGLE, max_pending_bytes=1000) as producer:
        cluster.on_batch = lambda shard, header: Fate.DROP
        producer.send_nowait(bytes(900))
        given_up = asyncio.create_task(producer.send(bytes(800)))
        patient = asyncio.create_task(producer.send(bytes(700)))
        await cluster.until(lambda: len(cluster.headers) == 1)
        given_up.cancel()
        cluster.on_batch = lambda shard, header: Fate.STORE
        cluster.brokers[0].cut()
        await patient
        assert given_up.cancelled()
        assert producer.pending_bytes == 0


async def test_a_message_larger_than_the_budget_may_go_alone(client: Client) -> None:
    async with client.producer("clicks", max_pending_bytes=1000) as producer:
        assert (await producer.send(bytes(5000))).offset == 0
        assert (await producer.send_nowait(bytes(5000))).offset == 1


class TestSendMany:
    """The fast path."""

    async def test_ids_come_in_the_order_of_the_payloads(self, cluster: ScriptedCluster, client: Client) -> None:
        topic = cluster.create("clicks", shards=4)
        payloads = [b"%d" % number for number in range(10_000)]
        keys = [None if number % 7 == 0 else f"k{number % 50}" for number in range(10_000)]
        async with client.producer("clicks", batching=Batching(max_messages=1500)) as producer:
            ids = await producer.send_many(payloads, keys=keys)
        assert len(ids) == 10_000
        for number in [0, 1, 7, 4095, 4096, 9999]:
            offset = ids[number].offset
            assert offset is not None
            assert topic.shards[ids[number].shard].payloads()[offset] == payloads[number]
        assert ids[-1] == ids[9999]
        assert ids[10:12] == [ids[10], ids[11]]
        with pytest.raises(IndexError):
            ids[10_000]
        for key in (b"k1", b"k49"):
            found = [
                int(p)
                for shard in topic.shards.values()
                for p, k in zip(shard.payloads(), shard.keys(), strict=True)
                if k == key
            ]
            assert found == sorted(found)
            assert len(found) > 150

    async def test_it_waits_for_room(self, cluster: ScriptedCluster, client: Client) -> None:
        async with client.producer("clicks", max_pending_bytes=100_000) as producer:
            ids = await producer.send_many(bytes(100) for _ in range(20_000))
            assert [id.offset for id in ids] == list(range(20_000))
            assert producer.pending_bytes == 0

    async def test_nothing_is_an_empty_sequence(self, client: Client) -> None:
        async with client.producer("clicks") as producer:
            assert list(await producer.send_many([])) == []
            assert list(await producer.send_many([], keys=[])) == []

    async def test_one_key_for_each_payload(self, client: Client) -> None:
        async with client.producer("clicks") as producer:
            with pytest.raises(InvalidArgument, match="keys=`1` payloads=`2`"):
                await producer.send_many([b"a", b"b"], keys=["k"])
            with pytest.raises(InvalidArgument, match="UTF-8"):
                await producer.send_many([b"a"], keys=["\ud800"])
            with pytest.raises(InvalidArgument, match="bytes"):
                await producer.send_many("text")  # type: ignore[arg-type]

    async def test_a_failure_tells_which_messages_are_stored(self, cluster: ScriptedCluster, client: Client) -> None:
        async with client.producer("clicks", batching=Batching(max_messages=2)) as producer:
            cluster.on_batch = lambda shard, header: (
                error("MALFORMED", "bad one") if header.first_sequence == 2 else Fate.STORE
            )
            with pytest.raises(InvalidArgument, match="bad one") as caught:
                await producer.send_many([b"%d" % number for number in range(6)])
            ids = list(caught.value.ids)
            assert [None if id is None else id.offset for id in ids] == [0, 1, None, None, 2, 3]

    async def test_it_goes_behind_what_was_sent_before(self, cluster: ScriptedCluster, client: Client) -> None:
        async with client.producer("clicks") as producer:
            producer.send_nowait(b"0", key="k")
            await producer.send_many([b"1", b"2"], keys=["k", "k"])
            await producer.send(b"3", key="k")
        assert cluster.topics[TOPIC].shards[1].payloads() == [b"0", b"1", b"2", b"3"]


class TestReceipts:
    """What `send_nowait` gives."""

    async def test_giving_up_waiting_disturbs_nobody_else(self, cluster: ScriptedCluster, client: Client) -> None:
        async with client.producer("clicks") as producer:
            cluster.on_batch = lambda shard, header: Fate.DROP
            receipts = [producer.send_nowait(b"x") for _ in range(2)]
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(receipts[0], 0.05)
            with pytest.raises(asyncio.InvalidStateError):
                receipts[0].result()
            cluster.on_batch = lambda shard, header: Fate.STORE
            cluster.brokers[0].cut()
            assert [await receipt for receipt in receipts] == [MessageId(1, 0), MessageId(1, 1)]
            assert receipts[0].exception() is None

    async def test_callbacks_get_the_receipt_once_it_is_done(self, client: Client) -> None:
        done: list[Receipt] = []
        async with client.producer("clicks") as producer:
            receipt = producer.send_nowait(b"x")
            receipt.add_done_callback(done.append)
            await receipt
            await asyncio.sleep(0)
            assert done == [receipt]
            receipt.add_done_callback(done.append)
            await asyncio.sleep(0)
            assert done == [receipt, receipt]

    async def test_a_failure_that_nobody_awaited_is_raised_by_the_next_call_once(
        self, cluster: ScriptedCluster, client: Client
    ) -> None:
        async with client.producer("clicks", batching=SINGLE) as producer:
            cluster.on_batch = lambda shard, header: error("MALFORMED", "nobody saw this")
            receipt = producer.send_nowait(b"x")
            await cluster.until(lambda: len(cluster.headers) == 1)
            await cluster.until(lambda: cluster.opens == 2)
            assert receipt.done()
            cluster.on_batch = lambda shard, header: Fate.STORE
            with pytest.raises(InvalidArgument, match="nobody saw this"):
                producer.send_nowait(b"y")
            await producer.send(b"z")

    async def test_a_failure_that_was_awaited_is_not_raised_again(
        self, cluster: ScriptedCluster, client: Client
    ) -> None:
        async with client.producer("clicks", batching=SINGLE) as producer:
            cluster.on_batch = lambda shard, header: error("MALFORMED", "seen")
            with pytest.raises(InvalidArgument, match="seen"):
                await producer.send_nowait(b"x")
            with pytest.raises(InvalidArgument, match="seen"):
                await producer.send(b"x")
            cluster.on_batch = lambda shard, header: Fate.STORE
            await producer.send(b"y")
            await producer.flush()

    async def test_flush_and_close_raise_what_nobody_saw(self, cluster: ScriptedCluster, client: Client) -> None:
        cluster.on_batch = lambda shard, header: error("MALFORMED", "unseen")
        async with client.producer("clicks", batching=SINGLE) as producer:
            producer.send_nowait(b"x")
            with pytest.raises(InvalidArgument, match="unseen"):
                await producer.flush()
        with pytest.raises(InvalidArgument, match="unseen"):
            async with client.producer("clicks", batching=SINGLE) as producer:
                producer.send_nowait(b"x")


@pytest.mark.parametrize(
    "make",
    [
        lambda client: client.producer("not a name"),
        lambda client: client.producer("a/b"),
        lambda client: client.producer("clicks", name="no/slash"),
        lambda client: client.producer("clicks", compression="gzip"),
        lambda client: client.producer("clicks", access="exclusive"),
        lambda client: client.producer("clicks", max_pending_bytes=0),
        lambda client: client.stream_consumer("clicks", subscription=""),
        lambda client: client.queue_consumer("clicks", subscription="s", prefetch=0),
        lambda client: client.reader("clicks", stop=EARLIEST),
    ],
)
async def test_arguments_that_cannot_be_are_refused_where_they_are_given(
    client: Client, make: Callable[[Client], object]
) -> None:
    with pytest.raises(InvalidArgument):
        make(client)


async def test_errors_are_magnetar_errors_and_fresh_each_time(cluster: ScriptedCluster, client: Client) -> None:
    async with client.producer("clicks") as producer:
        cluster.on_batch = lambda shard, header: error("MALFORMED", "bad")
        receipts = [producer.send_nowait(b"x") for _ in range(2)]
        errors = await asyncio.gather(*receipts, return_exceptions=True)
        assert all(isinstance(e, MagnetarError) and isinstance(e, ValueError) for e in errors)
        assert errors[0] is not errors[1]
