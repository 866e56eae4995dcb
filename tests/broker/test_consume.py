"""The Consume stream over real gRPC, spoken to with raw frames."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable

import pytest
from broker_world import TOPIC, Calls, Cluster, ProduceClient, batch, eventually
from consume_world import EARLIEST, LATEST, QUEUE, STREAM, ConsumeClient

from magnetar.broker.broker import Broker
from magnetar.broker.flow import CREDIT_MESSAGES_MAX
from magnetar.broker.outbox import BUFFER_BYTES_MAX
from magnetar.v1 import admin_pb2, broker_pb2, common_pb2, metadata_pb2
from magnetar.wire.batch import decode_batch
from magnetar.wire.slots import slot_of

Publish = Callable[..., Awaitable[None]]
Consume = Callable[[], ConsumeClient]


@pytest.fixture
async def shard(calls: Calls) -> int:
    return (await calls.resolve()).shards[0].shard_id


@pytest.fixture
async def publish(produce: Callable[[], ProduceClient], shard: int) -> AsyncIterator[Publish]:
    async with produce() as client:
        await client.open(shard)
        last = -1

        async def send(count: int, keys: list[bytes] | None = None, size: int = 10, times: int = 1) -> None:
            nonlocal last
            for _ in range(times):
                previous, last = last, last + count
                await client.publish(batch(last, previous, count, keys=keys, size=size))
                await client.answers(1)

        yield send


@pytest.fixture
def consume(calls: Calls) -> Consume:
    return lambda: ConsumeClient(calls)


async def test_a_stream_gets_whole_batches_in_order_and_then_the_tail(
    consume: Consume, publish: Publish, shard: int
) -> None:
    await publish(10, times=3)
    async with consume() as client:
        opened = await client.open(shard, kind=STREAM)
        assert (opened.next_offset, opened.end_offset, opened.active) == (0, 30, True)
        deliveries = [await client.delivery() for _ in range(3)]
        assert [(d.first_offset, d.selection) for d in deliveries] == [(0, b""), (10, b""), (20, b"")]
        payloads = [payload for d in deliveries for payload in decode_batch(d.batch).payloads]
        assert payloads == [str(i).encode().ljust(10, b".") for i in range(30)]
        assert all(d.publish_time_us > 0 and d.cursor_epoch == opened.cursor_epoch for d in deliveries)
        assert await client.caught_up() == 30
        await publish(10)
        assert await client.offsets(10) == list(range(30, 40))
        assert await client.caught_up() == 40


async def test_a_new_subscription_with_nothing_to_read_is_told_at_once(consume: Consume, shard: int) -> None:
    async with consume() as client:
        await client.open(shard, kind=STREAM, start=LATEST)
        assert await client.caught_up() == 0
        await client.open(shard, 2, kind=QUEUE, name="q")
        assert await client.caught_up(2) == 0


async def test_what_was_acknowledged_stays_so_for_the_next_owner(
    cluster: Cluster, consume: Consume, publish: Publish, shard: int, connect: Callable[[Broker], Calls]
) -> None:
    await publish(10, times=2)
    async with consume() as client:
        await client.open(shard, kind=STREAM)
        await client.open(shard, 2, kind=QUEUE, name="work")
        await client.offsets(20)
        await client.offsets(20, handle=2)
        assert not (await client.ack(floor=12, request_id=1)).HasField("error")  # type: ignore[union-attr]
        assert not (await client.ack((3, 5), (9, 14), handle=2, request_id=2)).HasField("error")  # type: ignore[union-attr]
        await cluster.brokers.pop().stop()
        second = await cluster.start_broker("broker1")
        async with ConsumeClient(connect(second)) as heir:
            opened = await heir.open(shard, kind=STREAM)
            assert opened.next_offset == 12
            assert await heir.offsets(8) == list(range(12, 20))
            await heir.open(shard, 2, kind=QUEUE, name="work")
            left = [offset for offset in range(20) if offset not in (3, 4, 9, 10, 11, 12, 13)]
            assert sorted(await heir.offsets(len(left), handle=2)) == left


async def test_a_queue_at_its_next_owner_waits_for_those_who_hold_messages(
    cluster: Cluster, consume: Consume, publish: Publish, shard: int, connect: Callable[[Broker], Calls]
) -> None:
    await publish(10, times=2)
    async with consume() as client:
        await client.open(shard, consumer="slow", messages=10)
        assert await client.offsets(10) == list(range(10))
        await cluster.brokers.pop().stop()
        second = connect(await cluster.start_broker("broker1"))
        async with ConsumeClient(second) as quick, ConsumeClient(second) as slow:
            await quick.open(shard, consumer="quick")
            await slow.open(shard, consumer="slow", messages=0, held=[(0, 10)])
            assert await quick.offsets(10) == list(range(10, 20))
            assert await quick.caught_up() == 20
            assert not quick.deliveries


async def test_credit_bounds_what_a_queue_consumer_gets(consume: Consume, publish: Publish, shard: int) -> None:
    await publish(10, times=3)
    async with consume() as client:
        await client.open(shard, messages=14)
        assert await client.offsets(14) == list(range(14))
        await client.credit(3)
        assert await client.offsets(3) == [14, 15, 16]
        await client.credit(1000, 1)
        assert await client.offsets(13) == list(range(17, 30))


async def test_bytes_are_a_credit_too_and_a_batch_may_overdraw_them(
    consume: Consume, publish: Publish, shard: int
) -> None:
    await publish(10, times=3)
    async with consume() as client:
        await client.open(shard, kind=STREAM, messages=1000, size_bytes=1)
        size = len((await client.delivery()).batch)
        await client.credit(0, size)
        assert (await client.delivery()).first_offset == 10
        await client.open(shard, 2, name="other")
        assert await client.offsets(30, handle=2) == list(range(30))
        assert not client.deliveries


async def test_a_second_consumer_of_a_stream_stands_by_and_takes_over_what_is_not_acknowledged(
    consume: Consume, publish: Publish, shard: int
) -> None:
    await publish(10, times=2)
    async with consume() as first, consume() as second:
        epoch = (await first.open(shard, kind=STREAM)).cursor_epoch
        standby = await second.open(shard, kind=STREAM)
        assert not standby.active
        assert await first.offsets(20) == list(range(20))
        await first.ack(floor=7, request_id=1)
        await first.close()
        await second.active()
        taken = await second.delivery()
        assert taken.cursor_epoch > max(epoch, standby.cursor_epoch)
        assert decode_batch(taken.batch).payloads[7].startswith(b"7.")
        assert (taken.first_offset, taken.selection) == (0, bytes([0x80, 0x03]))
        assert await second.offsets(10) == list(range(10, 20))
        assert await second.caught_up() == 20


async def test_consumers_of_a_queue_share_the_messages_and_each_goes_to_one(
    consume: Consume, publish: Publish, shard: int
) -> None:
    async with consume() as first, consume() as second:
        await first.open(shard)
        await second.open(shard)
        await publish(10, times=10)
        got = await asyncio.gather(first.offsets(50), second.offsets(50))
        assert sorted(got[0] + got[1]) == list(range(100))


async def test_what_is_given_back_comes_again_at_once_and_says_so(
    consume: Consume, publish: Publish, shard: int
) -> None:
    await publish(10)
    async with consume() as client:
        await client.open(shard)
        assert not (await client.delivery()).redeliveries
        await client.nack((2, 4))
        again = await client.delivery()
        assert (again.selection, list(again.redeliveries)) == (bytes([0b1100, 0]), [2, 1, 3, 1])
        await client.nack((3, 4), (50, 60))
        assert list((await client.delivery()).redeliveries) == [3, 2]


async def test_messages_of_a_consumer_that_is_gone_go_to_another(
    consume: Consume, publish: Publish, shard: int
) -> None:
    await publish(10)
    async with consume() as heir:
        async with consume() as first:
            await first.open(shard)
            await first.offsets(10)
            await first.ack((0, 5), request_id=1)
            await heir.open(shard)
        again = await heir.delivery()
        assert (again.first_offset, again.selection) == (0, bytes([0b11100000, 0b11]))
        assert list(again.redeliveries) == [5, 1, 6, 1, 7, 1, 8, 1, 9, 1]


async def test_offsets_that_a_consumer_says_it_holds_are_not_delivered_again(
    consume: Consume, publish: Publish, shard: int
) -> None:
    await publish(10, times=2)
    async with consume() as first:
        await first.open(shard, held=[(4, 8), (15, 17), (19, 500)])
        assert await first.offsets(13) == [*range(4), *range(8, 15), 17, 18]
        await first.nack((15, 16))
        assert list((await first.delivery()).redeliveries) == [5, 1]


async def test_a_consumer_that_comes_again_under_its_name_takes_its_own_place(
    consume: Consume, publish: Publish, shard: int
) -> None:
    await publish(10)
    async with consume() as before, consume() as after:
        await before.open(shard, consumer="worker")
        await before.offsets(10)
        await after.open(shard, consumer="worker", held=[(0, 9)])
        assert await after.offsets(1) == [9]
        error = await before.error()
        assert (error.handle, error.error.reason) == (1, common_pb2.ERROR_REASON_CONSUMER_BUSY)


async def test_keys_go_to_one_consumer_each_and_wait_for_the_former_one(
    consume: Consume, publish: Publish, shard: int, broker: Broker
) -> None:
    keys = [f"key-{i}".encode() for i in range(10)]
    async with consume() as first, consume() as second:
        await first.open(shard, key_ordered=True)
        await publish(10, keys)
        assert await first.offsets(10) == list(range(10))
        await second.open(shard, key_ordered=True)
        await publish(10, keys)
        mine = await first.offsets(1)
        moved = sorted(set(range(10, 20)) - set(mine))
        assert 0 < len(moved) < 10
        facts = (await broker.shard(TOPIC, shard)).subscriptions["audit"].describe()
        assert facts.waiting_for
        slots = {slot_of(keys[offset - 10]) for offset in moved}
        assert f"{len(slots)} slots wait until consumer" in " ".join(facts.waiting_for)
        await first.ack(*[(offset - 10, offset - 9) for offset in moved])
        assert sorted(await second.offsets(len(moved))) == moved
        assert sorted({o % 10 for o in mine} | {o % 10 for o in moved}) == list(range(10))


async def test_consumers_of_one_queue_agree_on_the_order_of_keys(consume: Consume, shard: int) -> None:
    async with consume() as client:
        await client.open(shard, 1, key_ordered=True)
        await client.send(
            open=[
                broker_pb2.OpenSubscription(handle=2, topic=TOPIC, shard_id=shard, subscription="audit", type=QUEUE),
                broker_pb2.OpenSubscription(handle=3, topic=TOPIC, shard_id=shard, subscription="audit", type=STREAM),
            ]
        )
        reasons = {(await client.error()).error.reason for _ in range(2)}
        assert reasons == {common_pb2.ERROR_REASON_CONSUMER_BUSY}
        await client.close()
        await client.open(shard, 2)


@pytest.mark.parametrize("kind", [STREAM, QUEUE])
async def test_a_seek_begins_anew_from_its_position(consume: Consume, publish: Publish, shard: int, kind: int) -> None:
    await publish(10, times=2)
    async with consume() as client:
        opened = await client.open(shard, kind=kind)
        await client.offsets(20)
        await (client.ack(floor=20) if kind == STREAM else client.ack((0, 20)))
        result = await client.seek(metadata_pb2.StartPosition(offset=13))
        assert (result.next_offset, result.HasField("error")) == (13, False)
        assert result.cursor_epoch > opened.cursor_epoch
        delivery = await client.delivery()
        assert (delivery.first_offset, delivery.selection) == (10, bytes([0b11111000, 0b11]))
        assert delivery.cursor_epoch == result.cursor_epoch
        assert (await client.seek(EARLIEST)).next_offset == 0
        assert await client.offsets(20) == list(range(20))
        assert (await client.seek(LATEST)).next_offset == 20
        assert (await client.seek(metadata_pb2.StartPosition(offset=1 << 63))).next_offset == 20
        time_us = metadata_pb2.StartPosition(time_us=delivery.publish_time_us)
        assert (await client.seek(time_us)).next_offset == 10


async def test_a_reader_reads_from_its_position_and_follows_the_tail(
    consume: Consume, publish: Publish, shard: int, broker: Broker
) -> None:
    await publish(10, times=3)
    async with consume() as client:
        opened = await client.open_reader(shard, start=metadata_pb2.StartPosition(offset=14))
        assert (opened.next_offset, opened.end_offset, opened.active) == (14, 30, True)
        assert await client.offsets(16) == list(range(14, 30))
        assert await client.caught_up() == 30
        await client.open_reader(shard, 2, LATEST)
        assert await client.caught_up(2) == 30
        await publish(10)
        assert await client.offsets(10) == await client.offsets(10, handle=2) == list(range(30, 40))
        assert await client.caught_up() == await client.caught_up(2) == 40
        assert not (await broker.shard(TOPIC, shard)).subscriptions
        await client.send(acks=[broker_pb2.Ack(handle=1, request_id=5, ranges=[])])
        assert (await client.answer(5)).error.reason == common_pb2.ERROR_REASON_INVALID_ARGUMENT
        await client.close(2)
        await client.open_reader(shard, 2, metadata_pb2.StartPosition(offset=40))


async def test_a_consumer_that_is_ahead_of_the_log_is_sent_to_ask_for_the_owner(
    consume: Consume, publish: Publish, shard: int
) -> None:
    """What it acknowledges it got from somebody: from the next owner, of whom this broker has not heard."""
    await publish(10)
    async with consume() as client:
        await client.open(shard)
        answer = await client.ack((9, 11), request_id=5)
        assert answer is not None
        assert answer.error.reason == common_pb2.ERROR_REASON_NOT_OWNER


async def test_a_reader_cannot_begin_beyond_the_end(consume: Consume, publish: Publish, shard: int) -> None:
    await publish(10)
    async with consume() as client:
        start = metadata_pb2.StartPosition(offset=11)
        await client.send(open_readers=[broker_pb2.OpenReader(handle=1, topic=TOPIC, shard_id=shard, start=start)])
        assert (await client.error()).error.reason == common_pb2.ERROR_REASON_INVALID_ARGUMENT


async def test_readers_and_consumers_end_when_the_shard_is_given_up(
    cluster: Cluster, consume: Consume, publish: Publish, shard: int
) -> None:
    await publish(1)
    async with consume() as client:
        await client.open_reader(shard, 1)
        await client.open(shard, 2)
        await cluster.brokers.pop().stop()
        errors = [await client.error() for _ in range(2)]
        assert {error.handle for error in errors} == {1, 2}
        assert {error.error.reason for error in errors} == {common_pb2.ERROR_REASON_NOT_OWNER}


async def test_a_client_that_does_not_read_blocks_itself_only(
    consume: Consume, publish: Publish, shard: int, broker: Broker
) -> None:
    await publish(1, size=1 << 20, times=20)
    async with consume() as stuck, consume() as client:
        await stuck.open(shard, kind=STREAM, name="slow", messages=CREDIT_MESSAGES_MAX, size_bytes=1 << 40)
        slow = (await broker.shard(TOPIC, shard)).subscriptions["slow"]
        await eventually(lambda: "does not read its stream" in " ".join(slow.describe().waiting_for))
        await client.open(shard, kind=STREAM, name="quick", messages=1000, size_bytes=1 << 40)
        assert await client.offsets(20, 1) == list(range(20))
        consumers = slow.describe().consumers
        # The outbox, and what gRPC takes in on its way.
        assert 1 << 40 > consumers[0].credit_bytes > (1 << 40) - 2 * BUFFER_BYTES_MAX
        assert await stuck.offsets(20, 1) == list(range(20))


async def test_a_frame_has_a_megabyte_or_one_delivery(consume: Consume, publish: Publish, shard: int) -> None:
    await publish(1, size=300_000, times=12)
    await publish(1, size=3_000_000)
    async with consume() as client:
        await client.open(shard, kind=STREAM, messages=100, size_bytes=1 << 30)
        assert await client.offsets(13, 1) == list(range(13))
        sizes = [(frame.ByteSize(), len(frame.deliveries)) for frame in client.frames]
        assert all(size <= 1 << 20 or count == 1 for size, count in sizes)
        assert max(count for _, count in sizes) == 3


async def test_acknowledgements_are_answered_when_they_are_durable(
    cluster: Cluster, consume: Consume, publish: Publish, shard: int
) -> None:
    await publish(10)
    async with consume() as client:
        await client.open(shard)
        await client.offsets(10)
        await client.ack((0, 1), request_id=1)
        cluster.disk.clear()
        for i in range(2, 6):
            await client.ack((i, i + 1))
            await client.send(
                acks=[broker_pb2.Ack(handle=1, request_id=i, ranges=[common_pb2.Range(start=i, end=i + 1)])]
            )
        await client.open_reader(shard, 2)
        await client.offsets(10, handle=2)
        assert not client.answers
        cluster.disk.set()
        results = [await client.answer(i) for i in range(2, 6)]
        assert not any(result.HasField("error") for result in results)


async def test_closing_a_consumer_is_answered_after_its_acknowledgements(
    cluster: Cluster, consume: Consume, publish: Publish, shard: int
) -> None:
    await publish(10)
    async with consume() as client:
        await client.open(shard)
        await client.offsets(10)
        await client.ack((0, 1), request_id=1)
        cluster.disk.clear()
        await client.ack((1, 4))
        await client.send(close=[broker_pb2.CloseConsumer(handle=1, request_id=7)])
        await client.open(shard, 2)
        assert await client.offsets(6, handle=2) == [4, 5, 6, 7, 8, 9]
        assert 7 not in client.answers
        cluster.disk.set()
        assert not (await client.answer(7)).HasField("error")


async def test_a_client_that_sends_no_more_still_gets_the_answers_to_what_it_acknowledged(
    consume: Consume, publish: Publish, shard: int
) -> None:
    await publish(10)
    async with consume() as client:
        await client.open(shard)
        await client.offsets(10)
        item = broker_pb2.Ack(handle=1, request_id=3, ranges=[common_pb2.Range(start=0, end=10)])
        await client.send(acks=[item])
        await client.done()
        assert not (await client.answer(3)).HasField("error")
        assert await client.receive() is None


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"type": 0}, common_pb2.ERROR_REASON_INVALID_ARGUMENT),
        ({"type": 7}, common_pb2.ERROR_REASON_INVALID_ARGUMENT),
        ({"type": STREAM, "key_ordered": True}, common_pb2.ERROR_REASON_INVALID_ARGUMENT),
        ({"subscription": "no/name"}, common_pb2.ERROR_REASON_INVALID_ARGUMENT),
        ({"topic": "a/b"}, common_pb2.ERROR_REASON_INVALID_ARGUMENT),
        ({"consumer": "x" * 251}, common_pb2.ERROR_REASON_INVALID_ARGUMENT),
        ({"topic": "nothing"}, common_pb2.ERROR_REASON_TOPIC_NOT_FOUND),
        ({"shard_id": 12345}, common_pb2.ERROR_REASON_NOT_OWNER),
    ],
)
async def test_a_subscription_that_cannot_be_opened_is_refused_and_the_stream_goes_on(
    consume: Consume, shard: int, change: dict[str, object], reason: int
) -> None:
    fields = {"handle": 1, "topic": TOPIC, "shard_id": shard, "subscription": "audit", "type": QUEUE, **change}
    async with consume() as client:
        await client.send(
            open=[broker_pb2.OpenSubscription(**fields)],  # type: ignore[arg-type]
            credits=[broker_pb2.Credit(handle=1, messages=5, bytes=5)],
        )
        error = await client.error()
        assert (error.handle, error.error.reason) == (1, reason)
        await client.credit(1)
        assert (await client.ack(request_id=4)).error.reason == common_pb2.ERROR_REASON_UNAVAILABLE  # type: ignore[union-attr]
        await client.open(shard, 1)


async def test_what_is_wrong_on_one_handle_ends_that_handle(consume: Consume, publish: Publish, shard: int) -> None:
    await publish(10)
    async with consume() as client:
        await client.open(shard, 9)
        for handle, wrong in enumerate(
            [
                {"credits": [broker_pb2.Credit(handle=0, messages=CREDIT_MESSAGES_MAX + 1, bytes=1)]},
                {"credits": [broker_pb2.Credit(handle=0, messages=0, bytes=0)]},
                {"credits": [broker_pb2.Credit(handle=0, messages=1, bytes=(1 << 64) - 1)]},
                {"acks": [broker_pb2.Ack(handle=0, ranges=[common_pb2.Range(start=5, end=5)])]},
                {"acks": [broker_pb2.Ack(handle=0, floor=3)]},
                {"nacks": [broker_pb2.Nack(handle=0, ranges=[common_pb2.Range(start=5, end=4)])]},
            ]
        ):
            await client.open(shard, handle, messages=0)
            for items in wrong.values():
                items[0].handle = handle  # type: ignore[attr-defined]
            await client.send(**wrong)
            error = await client.error()
            assert (error.handle, error.error.reason) == (handle, common_pb2.ERROR_REASON_INVALID_ARGUMENT)
        assert (await client.ack((5, 5), handle=9, request_id=5)).error.reason == (  # type: ignore[union-attr]
            common_pb2.ERROR_REASON_INVALID_ARGUMENT
        )
        assert not (await client.ack((5, 10), handle=9, request_id=6)).HasField("error")  # type: ignore[union-attr]


@pytest.mark.parametrize(
    "frame",
    [
        {"hello": common_pb2.Hello(protocol_min=1, protocol_max=1)},
        {"credits": [broker_pb2.Credit(handle=5, messages=1)]},
        {"acks": [broker_pb2.Ack(handle=5)]},
        {"close": [broker_pb2.CloseConsumer(handle=5)]},
        {"open_readers": [broker_pb2.OpenReader(handle=5, topic=TOPIC), broker_pb2.OpenReader(handle=5, topic=TOPIC)]},
        {"open_readers": [broker_pb2.OpenReader(handle=5, topic=TOPIC)],
         "credits": [broker_pb2.Credit(handle=5, messages=1)] * 1001},
        {"acks": [broker_pb2.Ack(handle=5, ranges=[common_pb2.Range(start=1, end=2)] * 100_001)]},
    ],
)  # fmt: skip
async def test_breaking_the_rules_ends_the_stream(consume: Consume, shard: int, frame: dict[str, object]) -> None:
    async with consume() as client:
        await client.send(**frame)
        assert (await client.stream_error()).reason == common_pb2.ERROR_REASON_PROTOCOL_VIOLATION


async def test_junk_ends_its_stream_with_malformed_and_no_other(consume: Consume, publish: Publish, shard: int) -> None:
    await publish(10)
    async with consume() as client, consume() as junk:
        await junk.open(shard)
        await junk.offsets(10)
        await client.open(shard)
        await junk.send_raw(b"\xff\xff\xff\xff")
        assert (await junk.stream_error()).reason == common_pb2.ERROR_REASON_MALFORMED
        assert await client.offsets(10) == list(range(10))


async def test_a_stream_begins_with_hello_alone(calls: Calls) -> None:
    client = ConsumeClient(calls)
    await client.send(hello=common_pb2.Hello(protocol_min=1, protocol_max=1), acks=[broker_pb2.Ack(handle=1)])
    assert (await client.stream_error()).reason == common_pb2.ERROR_REASON_PROTOCOL_VIOLATION
    client = ConsumeClient(calls)
    await client.send(hello=common_pb2.Hello(protocol_min=3, protocol_max=9))
    assert (await client.stream_error()).reason == common_pb2.ERROR_REASON_UNSUPPORTED_VERSION


async def test_deleting_a_subscription_ends_its_consumers(
    consume: Consume, publish: Publish, shard: int, calls: Calls
) -> None:
    await publish(10)
    async with consume() as client:
        await client.open(shard)
        await client.offsets(10)
        request = admin_pb2.DeleteSubscriptionRequest(topic=TOPIC, subscription="audit")
        await calls.admin("DeleteSubscription", request, admin_pb2.DeleteSubscriptionResponse)
        assert (await client.error()).error.reason == common_pb2.ERROR_REASON_SUBSCRIPTION_NOT_FOUND


async def test_an_operator_is_told_who_consumes_and_why_nothing_moves(
    consume: Consume, publish: Publish, shard: int, calls: Calls
) -> None:
    async def described() -> admin_pb2.SubscriptionDescription:
        request = admin_pb2.DescribeSubscriptionRequest(topic=TOPIC, subscription="audit")
        answer = await calls.admin("DescribeSubscription", request, admin_pb2.DescribeSubscriptionResponse)
        return answer.subscription

    async with consume() as client:
        await client.open(shard, consumer="worker", messages=4, size_bytes=1000)
        await client.caught_up()
        assert not (await described()).waiting_for
        await publish(10)
        await client.offsets(4)
        facts = await described()
        assert [(c.consumer, c.active, c.unacked_messages, c.credit_messages) for c in facts.consumers] == [
            ("worker", True, 4, 0)
        ]
        assert facts.consumers[0].client.startswith("test ")
        assert list(facts.waiting_for) == [f"shard {shard}: consumer `worker` takes no more: it has not granted credit"]
        await client.credit(6)
        await client.offsets(6)
        assert "waits to be acknowledged" in (await described()).waiting_for[0]
        await client.close()
        assert "no consumer is attached" in (await described()).waiting_for[0]
