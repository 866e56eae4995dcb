"""Clients that ask for too much at once: what they can make the broker keep, and how long others wait, is bounded."""

from __future__ import annotations

import asyncio
import gc
import time
import tracemalloc
from collections.abc import Callable
from typing import Any

import grpc
import grpc.aio
import pytest
from broker_world import TOPIC, Calls, Cluster, batch, refusal
from consume_world import STREAM, ConsumeClient
from test_outbox import Said

from magnetar.broker.consume import HANDLES_MAX, ITEMS_MAX, WAITING_MAX
from magnetar.broker.dispatch import Deliver, LoadedBatch, StreamDispatch
from magnetar.broker.outbox import FRAME_BYTES_MAX
from magnetar.broker.pump import Pump
from magnetar.broker.reader import Unacknowledged
from magnetar.managed_log.cache import StoredEntry
from magnetar.node import rpc
from magnetar.v1 import broker_pb2, common_pb2
from magnetar.wire.entry import EntryBatch

VIOLATION = common_pb2.ERROR_REASON_PROTOCOL_VIOLATION


async def ended(client: ConsumeClient) -> common_pb2.Error:
    """The error that a stream ends with; answers before it are dropped."""
    while (frame := await client.receive()) is not None:
        if frame.HasField("error"):
            error: common_pb2.Error = frame.error
            return error
    raise AssertionError("the stream ended without an error")


def openings(shard_id: int, handles: range) -> list[broker_pb2.OpenSubscription]:
    return [
        broker_pb2.OpenSubscription(handle=handle, topic=TOPIC, shard_id=shard_id, subscription="s", type=STREAM)
        for handle in handles
    ]


async def test_a_refused_call_keeps_nothing_of_its_request(calls: Calls) -> None:
    junk = b"\xff" * (4 << 20)
    await refusal(calls.raw("AdminService", "DescribeTopic", junk))
    gc.collect()
    gc.disable()
    tracemalloc.start()
    try:
        for _ in range(10):
            await refusal(calls.raw("AdminService", "DescribeTopic", junk))
        kept_bytes, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
        gc.enable()
    assert kept_bytes < 2 * len(junk)


async def test_openings_under_way_on_one_stream_are_bounded(calls: Calls, cluster: Cluster) -> None:
    shard = (await calls.resolve()).shards[0].shard_id
    await calls.describe_topic()
    cluster.disk.clear()
    async with ConsumeClient(calls) as client:
        handles = range(HANDLES_MAX // 2)
        for _ in range(3):
            await client.send(
                open=openings(shard, handles), close=[broker_pb2.CloseConsumer(handle=handle) for handle in handles]
            )
        error = await ended(client)
        assert (error.reason, str(HANDLES_MAX) in error.message) == (VIOLATION, True)
        cluster.disk.set()


async def test_a_frame_of_too_many_items_is_refused(calls: Calls) -> None:
    shard = (await calls.resolve()).shards[0].shard_id
    async with ConsumeClient(calls) as client:
        await client.open_reader(shard)
        await client.send(credits=[broker_pb2.Credit(handle=1, messages=1, bytes=1)] * (ITEMS_MAX + 1))
        assert (await ended(client)).reason == VIOLATION


async def test_a_stream_is_not_read_while_much_waits_for_its_handles_to_open(calls: Calls, cluster: Cluster) -> None:
    shard = (await calls.resolve()).shards[0].shard_id
    await calls.describe_topic()
    cluster.disk.clear()
    async with ConsumeClient(calls) as client:
        handles = range(20)
        await client.send(open=openings(shard, handles))
        credit = [broker_pb2.Credit(handle=handle, messages=1, bytes=1) for handle in handles for _ in range(600)]
        await client.send(credits=credit)
        # This would end the stream, if it was read.
        await client.send(credits=[broker_pb2.Credit(handle=1, messages=1, bytes=1)] * WAITING_MAX)
        await client.send(hello=common_pb2.Hello(protocol_min=1, protocol_max=1))
        end = asyncio.create_task(ended(client))
        for _ in range(5):
            await calls.resolve()
        assert not end.done()
        cluster.disk.set()
        assert (await end).message == "hello comes once"


def test_taking_back_costs_what_is_taken_back_however_much_else_waits() -> None:
    said = Said()
    handles = 10_000
    for offset in range(3):
        for handle in range(handles):
            said.outbox.deliver(handle, Deliver(1, 1, LoadedBatch(offset, 1, b"x", 1), b"", 1, ()))
    for offset in range(5 * handles):
        said.outbox.deliver(handles, Deliver(1, 1, LoadedBatch(offset, 1, b"x", 1), b"", 1, ()))
    said.outbox.activated(1)
    started = time.monotonic()
    for handle in range(handles):
        assert said.outbox.drop_deliveries(handle) == (3, 3)
    assert time.monotonic() - started < 5, "each swept everything"
    frames = said.frames()
    assert {delivery.handle for frame in frames for delivery in frame.deliveries} == {handles}
    assert sum(len(frame.deliveries) for frame in frames) == 5 * handles
    assert said.outbox.size_bytes == 0


def test_what_was_taken_back_is_let_go_of_although_nothing_is_sent() -> None:
    said = Said()
    said.outbox.deliver(2, Deliver(1, 1, LoadedBatch(7, 1, b"kept", 1), b"", 1, ()))
    for _ in range(1000):
        said.outbox.deliver(1, Deliver(1, 1, LoadedBatch(0, 1, b"x", 1), b"", 1, ()))
        said.outbox.drop_deliveries(1)
    assert len(said.outbox._items) < 5
    [frame] = said.frames()
    assert [delivery.batch for delivery in frame.deliveries] == [b"kept"]


def test_selections_far_larger_than_their_batches_count() -> None:
    said = Said()
    selection = b"\x55" * 125_000  # of a batch that says that it has a million messages
    for offset in range(40):
        said.outbox.deliver(1, Deliver(1, 1, LoadedBatch(offset, 1_000_000, b"tiny", 1), selection, 500_000, ()))
    assert said.outbox.full
    assert all(frame.ByteSize() <= FRAME_BYTES_MAX + 1000 for frame in said.frames())


class SlowLog:
    """A log of one entry whose read ends when the test says so."""

    shard_id = 1
    end_offset = 1

    def __init__(self) -> None:
        self.on_end: list[Callable[[], None]] = []
        self.reading = asyncio.Event()
        self.answer: asyncio.Future[list[StoredEntry]] = asyncio.get_running_loop().create_future()

    async def read(self, offset: int, *, max_bytes: int, tail: bool) -> list[StoredEntry]:
        self.reading.set()
        return await self.answer


async def test_what_was_read_for_a_buffer_that_is_full_by_then_is_not_kept() -> None:
    core, log = StreamDispatch(Unacknowledged(0)), SlowLog()
    core.attach(0)
    core.credit(0, 10, 1000)
    effects: list[Any] = []
    pump = Pump(log, core, effects.append, effects.append, effects.append)  # type: ignore[arg-type]
    pump.start()
    await log.reading.wait()
    core.pause(0, True)
    log.answer.set_result([entry_of_one_batch()])
    while core.reading is not None:  # noqa: ASYNC110  # the pump's own turns
        await asyncio.sleep(0)
    assert len(core.batches) == 0
    core.pause(0, False)
    pump.wake()
    while not any(isinstance(effect, Deliver) for effect in effects):  # noqa: ASYNC110
        await asyncio.sleep(0)
    pump.stop()


def entry_of_one_batch() -> StoredEntry:
    return StoredEntry(0, 1, 1, [EntryBatch(0, 1, batch(0))])


def test_an_answer_to_a_client_that_is_gone_is_no_defect_of_the_server(capsys: pytest.CaptureFixture[str]) -> None:
    """gRPC says so in several ways, one of them an internal error of its own."""
    method = broker_pb2.DESCRIPTOR.services_by_name["BrokerService"].methods_by_name["Consume"]
    for error in (grpc.aio.UsageError("x"), grpc.aio.InternalError("x"), asyncio.InvalidStateError()):
        assert rpc._told(method, error) is None
    assert "".join(capsys.readouterr()) == ""
