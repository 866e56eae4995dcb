"""The Produce stream over real gRPC, spoken to with raw frames."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest
from broker_world import TOPIC, Calls, Cluster, ProduceClient, batch, eventually, refusal

from magnetar.broker.broker import Broker
from magnetar.broker.dedup import named_producer_id
from magnetar.broker.produce import WINDOW_BYTES_MAX
from magnetar.broker.shard import ServedShard
from magnetar.v1 import broker_pb2, common_pb2
from magnetar.wire.batch import MUST_UNDERSTAND, Columns, encode_batch
from magnetar.wire.slots import slot_of

OTHER = b"q" * 16

Produce = Callable[[], ProduceClient]


@pytest.fixture
async def shard(calls: Calls) -> int:
    return (await calls.resolve()).shards[0].shard_id


async def stored_batches(broker: Broker, shard_id: int) -> list[bytes]:
    entries = await (await broker.shard(TOPIC, shard_id)).log.read(0, max_bytes=1 << 24)
    return [item.batch for entry in entries for item in entry.batches]


def _missing() -> ServedShard:
    raise AssertionError("the shard is not served")


async def test_a_chain_is_stored_as_it_was_sent(broker: Broker, produce: Produce, shard: int) -> None:
    async with produce() as client:
        opened = await client.open(shard)
        assert (opened.last_sequence, list(opened.recent), opened.window_bytes) == (-1, [], WINDOW_BYTES_MAX)
        sent = [batch(9, -1, 10), batch(10, 9), batch(14, 10, 4, keys=[b"a", b"b", b"a", b"c"])]
        await client.publish(*sent)
        assert await client.answers(3) == [(1, 0, 9, 0), (1, 10, 10, 10), (1, 11, 14, 11)]
    assert await stored_batches(broker, shard) == sent


async def test_a_batch_sent_again_is_answered_with_its_place_and_not_stored_again(
    broker: Broker, produce: Produce, shard: int
) -> None:
    async with produce() as client:
        await client.open(shard)
        await client.publish(batch(9, -1, 10), batch(14, 9, 5))
        await client.answers(2)
        await client.publish(batch(9, -1, 10), batch(14, 9, 5), batch(15, 14))
        assert await client.answers(3) == [(1, 0, 9, 0), (1, 10, 14, 10), (1, 15, 15, 15)]
    assert len(await stored_batches(broker, shard)) == 3


async def test_a_batch_sent_twice_at_once_is_answered_twice_and_stored_once(
    broker: Broker, produce: Produce, shard: int
) -> None:
    async with produce() as client:
        await client.open(shard)
        await client.publish(batch(0), batch(0), batch(1, 0), batch(0))
        assert sorted(await client.answers(4)) == [(1, 0, 0, 0), (1, 0, 0, 0), (1, 0, 0, 0), (1, 1, 1, 1)]
    assert len(await stored_batches(broker, shard)) == 2


async def test_a_gap_closes_the_handle_after_what_came_before_is_answered(
    broker: Broker, produce: Produce, shard: int
) -> None:
    async with produce() as client:
        await client.open(shard)
        await client.publish(batch(0), batch(5, 4), batch(1, 0), batch(6, 5))
        error = await client.error()
        assert client.stored == [(1, 0, 0, 0)]
        assert (error.handle, error.error.reason, error.sequence) == (1, common_pb2.ERROR_REASON_OUT_OF_ORDER, 5)
        assert (await client.open(shard)).last_sequence == 0
        await client.publish(batch(1, 0))
        assert await client.answers(2) == [(1, 0, 0, 0), (1, 1, 1, 1)]
    assert len(await stored_batches(broker, shard)) == 2


async def test_opening_again_elsewhere_is_a_barrier(produce: Produce, shard: int) -> None:
    async with produce() as old, produce() as new:
        await old.open(shard)
        await old.publish(batch(0), batch(1, 0))
        opened = await new.open(shard, handle=7)
        await old.answers(2)
        assert opened.last_sequence == 1
        assert [(r.first_sequence, r.first_offset) for r in opened.recent] == [(0, 0), (1, 1)]
        await old.publish(batch(2, 1))
        assert (await old.error()).error.reason == common_pb2.ERROR_REASON_OUT_OF_ORDER
        await new.publish(batch(2, 1), handle=7)
        assert await new.answers(1) == [(7, 2, 2, 2)]


async def test_a_newer_registration_fences_the_older_and_lasts_through_a_takeover(
    cluster: Cluster, broker: Broker, calls: Calls, connect: Callable[[Broker], Calls], produce: Produce, shard: int
) -> None:
    first, second = await calls.register("p"), await calls.register("p")
    assert (first.epoch, second.epoch, first.producer_id) == (1, 2, named_producer_id(TOPIC, "p"))
    producer_id = first.producer_id
    async with produce() as old, produce() as new:
        await old.send_open(shard, producer_id=producer_id, epoch=1, name="p")
        assert (await old.error()).error.reason == common_pb2.ERROR_REASON_PRODUCER_FENCED
        await new.open(shard, producer_id=producer_id, epoch=2, name="p")
        await new.publish(batch(0, producer_id=producer_id, epoch=2))
        await new.answers(1)
        third = await calls.register("p")
        await old.open(shard, handle=2, producer_id=producer_id, epoch=third.epoch, name="p")
        await new.publish(batch(1, 0, producer_id=producer_id, epoch=2))
        assert (await new.error()).error.reason == common_pb2.ERROR_REASON_PRODUCER_FENCED
    # Nothing of epoch 3 was stored. The next owner refuses epoch 2 all the same: it asks what was registered.
    await broker.stop()
    cluster.brokers.remove(broker)
    later = connect(await cluster.start_broker("broker1"))
    async with ProduceClient(later) as client:
        await client.send_open(shard, producer_id=producer_id, epoch=2, name="p")
        assert (await client.error()).error.reason == common_pb2.ERROR_REASON_PRODUCER_FENCED
        opened = await client.open(shard, handle=2, producer_id=producer_id, epoch=3, name="p")
        assert opened.last_sequence == 0


async def test_an_opening_that_lies_about_its_producer_is_refused(calls: Calls, produce: Produce, shard: int) -> None:
    registered = await calls.register("p")
    bad = [
        {"producer_id": b"short"},
        {"producer_id": OTHER, "epoch": 1},
        {"producer_id": OTHER, "epoch": 1, "name": "p"},
        {"producer_id": registered.producer_id, "epoch": 0, "name": "p"},
        {"producer_id": registered.producer_id, "epoch": 2, "name": "p"},
        {"producer_id": registered.producer_id, "epoch": 1, "name": "no/slash"},
        {"topic": "a/b"},
    ]
    async with produce() as client:
        for number, fields in enumerate(bad, 1):
            await client.send_open(shard, number, **fields)  # type: ignore[arg-type]
            assert (await client.error()).error.reason == common_pb2.ERROR_REASON_INVALID_ARGUMENT, fields
        await client.send_open(shard, 100, topic="public/default/none")
        assert (await client.error()).error.reason == common_pb2.ERROR_REASON_TOPIC_NOT_FOUND
        await client.send_open(99, 101)
        assert (await client.error()).error.reason == common_pb2.ERROR_REASON_NOT_OWNER
        await client.open(shard, 102)


async def test_a_batch_of_slots_outside_its_shard_is_refused_unless_it_is_a_duplicate(
    calls: Calls, produce: Produce
) -> None:
    low, _ = (await calls.create_topic(shards=2)).shards
    inside, outside = sorted((b"a", b"b", b"c", b"d"), key=slot_of)[::3]
    assert slot_of(inside) < 32768 <= slot_of(outside)
    async with produce() as client:
        await client.open(low.shard_id)
        await client.publish(batch(0, keys=[inside]), batch(1, 0, keys=[outside]))
        error = await client.error()
        assert (error.error.reason, error.sequence) == (common_pb2.ERROR_REASON_WRONG_SHARD, 1)
        await client.open(low.shard_id)
        await client.publish(batch(0, keys=[outside]))
        assert await client.answers(2) == [(1, 0, 0, 0), (1, 0, 0, 0)]


async def test_batches_that_do_not_fit_their_handle_or_themselves_are_malformed(produce: Produce, shard: int) -> None:
    good = batch(0)
    damaged = bytearray(good)
    damaged[-1] ^= 1
    columns = Columns([b"x"])
    unknown = encode_batch(
        columns, producer_id=b"p" * 16, epoch=0, previous=-1, last=0, extensions=[(MUST_UNDERSTAND | 99, b"")]
    )
    overlapping = batch(5, 2, 4)
    bad = {
        "checksum": bytes(damaged),
        "short": good[:40],
        "bytes": b"",
        "of its length": good + b"x",
        "extension": unknown,
        "another producer": batch(0, producer_id=OTHER),
        "another producer or epoch": batch(0, epoch=3),
    }
    async with produce() as client:
        for number, (words, data) in enumerate(bad.items(), 1):
            await client.open(shard, number)
            await client.publish(data, handle=number)
            error = (await client.error()).error
            assert error.reason == common_pb2.ERROR_REASON_MALFORMED, words
            assert words in error.message
        await client.open(shard, 50)
        await client.publish(batch(2, -1, 3), overlapping, handle=50)
        assert "overlaps" in (await client.error()).error.message


async def test_a_batch_that_is_too_large_is_refused_and_a_large_message_is_not(
    cluster: Cluster, connect: Callable[[Broker], Calls]
) -> None:
    calls = connect(await cluster.start_broker("small", max_message_bytes=1 << 17))
    shard = (await calls.resolve()).shards[0].shard_id
    async with ProduceClient(calls) as client:
        await client.open(shard)
        await client.publish(batch(0, size=1 << 17))
        assert await client.answers(1) == [(1, 0, 0, 0)]
        for number, data in enumerate([batch(1, 0, size=1 << 18), batch(10, 0, 10, size=1 << 15)], 2):
            await client.open(shard, number)
            await client.publish(data, handle=number)
            assert (await client.error()).error.reason == common_pb2.ERROR_REASON_MESSAGE_TOO_LARGE


async def test_more_than_twice_the_window_unanswered_ends_the_stream(
    cluster: Cluster, produce: Produce, shard: int
) -> None:
    async with produce() as client:
        window = (await client.open(shard)).window_bytes
        cluster.disk.clear()
        size = window // 4
        for i in range(9):
            await client.publish(batch(i, i - 1, size=size))
        frame = await client.receive()
        assert frame.error.reason == common_pb2.ERROR_REASON_PROTOCOL_VIOLATION
        assert "window" in frame.error.message
        assert await client.receive() is None
    cluster.disk.set()


@pytest.mark.parametrize(
    "frames",
    [
        [{"batches": broker_pb2.ProduceBatches(batches=[broker_pb2.ProduceBatch(handle=9, batch=b"")])}],
        [{"close": broker_pb2.CloseProducer(handle=9)}],
        [{"hello": common_pb2.Hello(protocol_min=1, protocol_max=1)}],
        [{}],
    ],
)
async def test_breaking_the_rules_ends_that_stream_and_no_other(
    produce: Produce, shard: int, frames: list[dict[str, object]]
) -> None:
    async with produce() as good, produce() as bad:
        await good.open(shard)
        for frame in frames:
            await bad.send(**frame)
        answer = await bad.receive()
        assert answer.error.reason == common_pb2.ERROR_REASON_PROTOCOL_VIOLATION
        assert await bad.receive() is None
        await good.publish(batch(0))
        assert await good.answers(1) == [(1, 0, 0, 0)]


async def test_a_stream_begins_with_hello_and_a_protocol_in_common(calls: Calls) -> None:
    def stream() -> ProduceClient:
        return ProduceClient(calls)

    silent = stream()
    await silent.send(close=broker_pb2.CloseProducer(handle=1))
    assert (await silent.receive()).error.reason == common_pb2.ERROR_REASON_PROTOCOL_VIOLATION
    newer = stream()
    await newer.send(hello=common_pb2.Hello(protocol_min=2, protocol_max=3))
    error = (await newer.receive()).error
    assert error.reason == common_pb2.ERROR_REASON_UNSUPPORTED_VERSION
    assert "`2-3`" in error.message
    assert "`1-1`" in error.message
    both = stream()
    await both.send(hello=common_pb2.Hello(protocol_min=1, protocol_max=9))
    assert (await both.receive()).hello.max_message_bytes == 5 << 20


async def test_what_was_sent_before_the_client_ends_its_side_is_answered(produce: Produce, shard: int) -> None:
    async with produce() as client:
        await client.open(shard)
        await client.publish(*(batch(i, i - 1) for i in range(100)))
        await client.done()
        assert len(await client.answers(100)) == 100
        assert await client.receive() is None


async def test_a_closed_handle_can_be_opened_again_and_another_is_untouched(produce: Produce, shard: int) -> None:
    async with produce() as client:
        await client.open(shard, 1)
        await client.open(shard, 2, producer_id=OTHER)
        await client.publish(batch(0))
        await client.answers(1)
        await client.send(close=broker_pb2.CloseProducer(handle=1))
        assert (await client.open(shard, 1)).last_sequence == 0
        await client.publish(batch(0, producer_id=OTHER), handle=2)
        assert await client.answers(1) == [(2, 0, 0, 1)]


async def test_a_client_that_vanishes_leaves_nothing_behind(broker: Broker, produce: Produce, shard: int) -> None:
    async with produce() as client:
        await client.open(shard)
        await client.publish(batch(0))
        await client.answers(1)
    served = await broker.shard(TOPIC, shard)
    await eventually(lambda: not served._handles)
    assert broker.budget.used_bytes == 0


async def test_the_next_owner_knows_what_is_a_duplicate(
    cluster: Cluster, broker: Broker, connect: Callable[[Broker], Calls], produce: Produce, shard: int
) -> None:
    async with produce() as client:
        await client.open(shard)
        for i in range(40):
            await client.publish(batch(i, i - 1))
        await client.answers(40)
        # Its session ends and it does not notice: the other broker takes the shard over and fences its ledger.
        other = await cluster.start_broker("broker1")
        await broker.ownership.close()
        await eventually(lambda: shard in other.served.at_rest)
        async with ProduceClient(connect(other)) as next_client:
            opened = await next_client.open(shard)
            assert opened.last_sequence == 39
            assert [r.first_offset for r in opened.recent] == list(range(24, 40))
            await client.publish(batch(40, 39))
            error = (await client.error()).error
            assert (error.reason, error.owner) == (common_pb2.ERROR_REASON_NOT_OWNER, other.address)
            await next_client.publish(batch(39, 38), batch(40, 39))
            assert await next_client.answers(2) == [(1, 39, 39, 39), (1, 40, 40, 40)]
    assert broker.served.get(shard) is None


async def test_a_broker_without_a_session_asks_bookies_whether_it_was_replaced(
    cluster: Cluster, broker: Broker, connect: Callable[[Broker], Calls], produce: Produce, shard: int
) -> None:
    async with produce() as client:
        await client.open(shard)
        await client.publish(batch(0))
        await client.answers(1)
        other = await cluster.start_broker("broker1")
        await broker.served.release_fenced()
        assert broker.served.get(shard) is not None
        await broker.ownership.close()
        await eventually(lambda: shard in other.served.at_rest)
        await broker.served.release_fenced()
        assert (await client.error()).error.reason == common_pb2.ERROR_REASON_NOT_OWNER
        assert broker.served.get(shard) is None


async def test_a_graceful_stop_answers_what_was_accepted_before_it_sends_clients_away(
    cluster: Cluster, broker: Broker, produce: Produce, shard: int
) -> None:
    async with produce() as client:
        await client.open(shard)
        await client.publish(batch(0))
        await client.answers(1)
        cluster.disk.clear()
        await client.publish(*(batch(i, i - 1) for i in range(1, 200)))
        await eventually(lambda: broker.budget.used_bytes > 0)
        stopping = asyncio.ensure_future(broker.stop())
        cluster.brokers.remove(broker)
        cluster.disk.set()
        assert [first for _, first, _, _ in await client.answers(199)] == list(range(1, 200))
        assert (await client.error()).error.reason == common_pb2.ERROR_REASON_NOT_OWNER
        await stopping
    later = await cluster.start_broker("broker1")
    served = await later.shard(TOPIC, shard)
    assert (served.log.epoch, served.log.end_offset) == (2, 200)


async def test_a_stream_waits_while_a_shard_holds_its_part_of_the_budget_and_others_go_on(
    cluster: Cluster, connect: Callable[[Broker], Calls]
) -> None:
    broker = await cluster.start_broker("small", pending_bytes=1 << 20)
    first, second = connect(broker), connect(broker)
    crowded = (await first.resolve()).shards[0].shard_id
    free = (await first.resolve("public/default/free")).shards[0].shard_id
    async with ProduceClient(first) as waiting, ProduceClient(second) as going:
        await waiting.open(crowded)
        await going.send_open(free, topic="public/default/free", producer_id=OTHER)
        await going.until(lambda: bool(going.opened))
        cluster.disk.clear()
        for i in range(8):
            await waiting.publish(batch(i, i - 1, size=1 << 17))
        await eventually(lambda: broker.budget.used_bytes >= 1 << 18)
        await going.publish(batch(0, producer_id=OTHER))
        await eventually(lambda: (broker.served.get(free) or _missing()).pending.used_bytes > 0)
        assert broker.budget.used_bytes < 1 << 19
        cluster.disk.set()
        assert await going.answers(1) == [(1, 0, 0, 0)]
        assert len(await waiting.answers(8)) == 8


async def test_a_missing_topic_is_not_created_by_an_opening(calls: Calls, produce: Produce) -> None:
    async with produce() as client:
        await client.send_open(1, topic="public/default/none")
        assert (await client.error()).error.reason == common_pb2.ERROR_REASON_TOPIC_NOT_FOUND
    error = await refusal(calls.resolve("none", create=False))
    assert error.reason == common_pb2.ERROR_REASON_TOPIC_NOT_FOUND
