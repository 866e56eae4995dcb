"""Junk on every method: the server refuses it, says why, and goes on serving everybody else."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable

import grpc
import grpc.aio
import pytest
from broker_world import TOPIC, Calls, ProduceClient, batch, refusal

from magnetar.v1 import admin_pb2, broker_pb2, common_pb2

BROKER = broker_pb2.DESCRIPTOR.services_by_name["BrokerService"]
ADMIN = admin_pb2.DESCRIPTOR.services_by_name["AdminService"]
UNARY = [
    (service.name, method.name)
    for service in (BROKER, ADMIN)
    for method in service.methods
    if not method.server_streaming and method.name != "ClusterHealth"
]
WITHOUT_FIELDS = (
    "ListTopics", "ListLedgers", "ListBrokers", "ListBookies", "ListRebalances", "ReportLoads", "ConfigureRepair",
)  # fmt: skip
"""Requests that may be empty."""

JUNK = b"\xff\xff\xff\xff"


@pytest.mark.parametrize(("service", "method"), UNARY)
async def test_bytes_that_do_not_parse_are_malformed(calls: Calls, service: str, method: str) -> None:
    assert (await refusal(calls.raw(service, method, JUNK))).reason == common_pb2.ERROR_REASON_MALFORMED


@pytest.mark.parametrize(("service", "method"), [case for case in UNARY if case[1] not in WITHOUT_FIELDS])
async def test_a_request_without_fields_is_refused_with_words(calls: Calls, service: str, method: str) -> None:
    error = await refusal(calls.raw(service, method, b""))
    assert error.reason in (
        common_pb2.ERROR_REASON_INVALID_ARGUMENT,
        common_pb2.ERROR_REASON_LEDGER_NOT_FOUND,
        common_pb2.ERROR_REASON_REFUSED,
    )
    assert error.message


@pytest.mark.parametrize("method", ["Produce", "Consume"])
async def test_junk_on_a_stream_ends_that_stream_with_its_reason(calls: Calls, method: str) -> None:
    response = broker_pb2.ProduceResponse if method == "Produce" else broker_pb2.ConsumeResponse
    greeting = common_pb2.Hello(protocol_min=1, protocol_max=1)
    request = broker_pb2.ProduceRequest if method == "Produce" else broker_pb2.ConsumeRequest
    for frames in ([JUNK], [request(hello=greeting).SerializeToString(), JUNK]):
        call = calls.channel.stream_stream(f"/magnetar.v1.BrokerService/{method}")()
        for frame in frames:
            await call.write(frame)
        last = b""
        while (data := await call.read()) is not grpc.aio.EOF:
            last = data
        assert response.FromString(last).error.reason == common_pb2.ERROR_REASON_MALFORMED


async def test_random_frames_never_take_the_server_down(calls: Calls, produce: Callable[[], ProduceClient]) -> None:
    rng = random.Random(7)
    shard = (await calls.resolve()).shards[0].shard_id
    async with produce() as good:
        await good.open(shard, producer_id=b"g" * 16)
        for round_number in range(40):
            async with produce() as bad:
                await bad.open(shard, producer_id=b"b" * 16)
                await bad.send_raw(mutated(rng, valid_frame(rng, shard)))
                await bad.done()
                while await bad.receive() is not None:
                    pass
            sent = batch(round_number, round_number - 1, producer_id=b"g" * 16)
            await good.publish(sent)
            [(_, first, _, offset)] = await good.answers(1)
            assert first == round_number
            assert offset >= round_number
        for service, method in UNARY:
            data = rng.randbytes(rng.randrange(40))
            [answer] = await asyncio.gather(calls.raw(service, method, data), return_exceptions=True)
            failed = isinstance(answer, grpc.aio.AioRpcError) and answer.code() is grpc.StatusCode.INTERNAL
            assert not failed, (method, data)
        await good.publish(batch(40, 39, producer_id=b"g" * 16))
        await good.answers(1)


def valid_frame(rng: random.Random, shard: int) -> bytes:
    items = [broker_pb2.ProduceBatch(handle=1, batch=batch(i, i - 1, producer_id=b"b" * 16)) for i in range(3)]
    frames = [
        broker_pb2.ProduceRequest(batches=broker_pb2.ProduceBatches(batches=items)),
        broker_pb2.ProduceRequest(
            open=broker_pb2.OpenProducer(handle=2, topic=TOPIC, shard_id=shard, producer_id=b"c" * 16)
        ),
        broker_pb2.ProduceRequest(close=broker_pb2.CloseProducer(handle=1)),
    ]
    return rng.choice(frames).SerializeToString()


def mutated(rng: random.Random, data: bytes) -> bytes:
    """A few bytes changed, cut off, or added."""
    changed = bytearray(data)
    for _ in range(rng.randrange(1, 4)):
        at = rng.randrange(len(changed))
        match rng.randrange(3):
            case 0:
                changed[at] = rng.randrange(256)
            case 1:
                del changed[at : at + rng.randrange(1, 20)]
            case _:
                changed[at:at] = rng.randbytes(rng.randrange(1, 20))
        if not changed:
            changed = bytearray(b"\x00")
    return bytes(changed)


@pytest.mark.parametrize(
    ("method", "request_message"),
    [
        ("CreateTopic", admin_pb2.CreateTopicRequest(topic="t", shards=0)),
        ("CreateTopic", admin_pb2.CreateTopicRequest(topic="t", shards=65)),
        ("CreateTopic", admin_pb2.CreateTopicRequest(topic="t", shards=0, dry_run=True)),
        ("ListTopics", admin_pb2.ListTopicsRequest(limit=1_000_000)),
        ("ListTopics", admin_pb2.ListTopicsRequest(prefix="a/b/c")),
        ("ListTopics", admin_pb2.ListTopicsRequest(after="/")),
        ("ListLedgers", admin_pb2.AdminServiceListLedgersRequest(limit=1_000_000)),
        ("ListLedgers", admin_pb2.AdminServiceListLedgersRequest(topic="//")),
        ("CreateSubscription", admin_pb2.CreateSubscriptionRequest(topic=TOPIC, subscription="a b")),
        ("CreateSubscription", admin_pb2.CreateSubscriptionRequest(topic=TOPIC, subscription="s", type=9)),  # type: ignore[arg-type]
        ("SeekSubscription", admin_pb2.SeekSubscriptionRequest(topic=TOPIC, subscription="s")),
    ],
)
async def test_a_field_out_of_range_is_an_invalid_argument(calls: Calls, method: str, request_message: object) -> None:
    await calls.resolve()
    data = request_message.SerializeToString()  # type: ignore[attr-defined]
    assert (await refusal(calls.raw("AdminService", method, data))).reason == common_pb2.ERROR_REASON_INVALID_ARGUMENT
