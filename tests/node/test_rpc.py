"""The RPC server: what it does with requests that do not parse, handlers that fail, and strangers."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import grpc
import grpc.aio
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from magnetar.node.rpc import (
    ERROR_METADATA_KEY,
    ListenError,
    Refused,
    RunningServer,
    ServerStream,
    Service,
    parse,
    serve,
    unavailable,
)
from magnetar.v1 import broker_pb2, common_pb2

DESCRIPTOR = broker_pb2.DESCRIPTOR.services_by_name["BrokerService"]


async def resolve(request: bytes, context: grpc.aio.ServicerContext) -> bytes:
    topic = parse(broker_pb2.ResolveRequest, request).topic
    if topic == "bug":
        raise KeyError("a secret of the inside")
    if topic == "refused":
        raise Refused(common_pb2.ERROR_REASON_NOT_OWNER, "not mine", owner="elsewhere:1")
    return broker_pb2.ResolveResponse(layout=broker_pb2.Layout(topic=topic)).SerializeToString()


async def register(request: bytes, context: grpc.aio.ServicerContext) -> bytes:
    raise unavailable("later", retry_after_ms=7)


async def watch(request: bytes, stream: ServerStream) -> None:
    parse(broker_pb2.WatchLayoutRequest, request)
    await stream.write(broker_pb2.WatchLayoutResponse().SerializeToString())


async def echo(stream: ServerStream) -> None:
    while (data := await stream.read()) is not None:
        parse(broker_pb2.ProduceRequest, data)
        await stream.write(b"")


@pytest.fixture
async def server() -> AsyncIterator[RunningServer]:
    service = Service(
        DESCRIPTOR,
        {"Resolve": resolve, "RegisterProducer": register, "WatchLayout": watch, "Produce": echo, "Consume": echo},
    )
    running = await serve([service], "127.0.0.1:0")
    yield running
    await running.stop(0)


@pytest.fixture
async def channel(server: RunningServer) -> AsyncIterator[grpc.aio.Channel]:
    async with grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel:
        yield channel


async def refusal(call: grpc.aio.Call) -> tuple[grpc.StatusCode, str, common_pb2.Error]:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    metadata = dict(caught.value.trailing_metadata() or ())
    return caught.value.code(), caught.value.details(), common_pb2.Error.FromString(metadata[ERROR_METADATA_KEY])


async def test_random_bytes_are_malformed_and_others_are_served(channel: grpc.aio.Channel) -> None:
    call = channel.unary_unary("/magnetar.v1.BrokerService/Resolve")
    code, _, error = await refusal(call(b"\xff\xff\xff"))
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert error.reason == common_pb2.ERROR_REASON_MALFORMED
    good = broker_pb2.ResolveRequest(topic="t").SerializeToString()
    assert broker_pb2.ResolveResponse.FromString(await call(good)).layout.topic == "t"


async def test_a_bug_in_a_handler_shows_no_class_name(channel: grpc.aio.Channel) -> None:
    call = channel.unary_unary("/magnetar.v1.BrokerService/Resolve")
    code, details, error = await refusal(call(broker_pb2.ResolveRequest(topic="bug").SerializeToString()))
    assert code is grpc.StatusCode.INTERNAL
    assert error.reason == common_pb2.ERROR_REASON_INTERNAL
    assert "KeyError" not in details
    assert "secret" not in details


async def test_a_refusal_carries_owner_and_retry(channel: grpc.aio.Channel) -> None:
    resolve_call = channel.unary_unary("/magnetar.v1.BrokerService/Resolve")
    _, _, error = await refusal(resolve_call(broker_pb2.ResolveRequest(topic="refused").SerializeToString()))
    assert error.owner == "elsewhere:1"
    code, _, error = await refusal(channel.unary_unary("/magnetar.v1.BrokerService/RegisterProducer")(b""))
    assert code is grpc.StatusCode.UNAVAILABLE
    assert error.retry_after_ms == 7


async def test_a_stream_that_sends_junk_gets_an_error_frame(channel: grpc.aio.Channel) -> None:
    call = channel.stream_stream("/magnetar.v1.BrokerService/Produce")()
    await call.write(b"\xff\xff")
    frame = broker_pb2.ProduceResponse.FromString(await call.read())
    assert frame.error.reason == common_pb2.ERROR_REASON_MALFORMED
    assert await call.read() is grpc.aio.EOF


async def test_a_stream_without_error_frames_is_aborted_with_metadata(channel: grpc.aio.Channel) -> None:
    call = channel.unary_stream("/magnetar.v1.BrokerService/WatchLayout")(b"\xff")
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call.read()
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT


async def test_a_client_that_does_not_speak_grpc_is_cut_off(server: RunningServer, channel: grpc.aio.Channel) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
    writer.write(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n" * 10)
    async with asyncio.timeout(30):
        while await reader.read(1 << 16):
            pass
    writer.close()
    call = channel.unary_unary("/magnetar.v1.BrokerService/Resolve")
    assert await call(broker_pb2.ResolveRequest(topic="t").SerializeToString())


async def test_health_answers_for_each_service(channel: grpc.aio.Channel) -> None:
    stub = health_pb2_grpc.HealthStub(channel)
    answer = await stub.Check(health_pb2.HealthCheckRequest(service="magnetar.v1.BrokerService"))
    assert answer.status == health_pb2.HealthCheckResponse.SERVING


async def test_an_address_in_use_is_one_clear_line(server: RunningServer) -> None:
    with pytest.raises(ListenError, match=r"cannot listen on 127\.0\.0\.1:\d+: the address is in use"):
        await serve([], f"127.0.0.1:{server.port}")
