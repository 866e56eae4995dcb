"""The boundary to brokers: calls and streams of bytes, and gRPC behind it."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import Any, Protocol

import grpc
import grpc.aio
from google.protobuf.message import DecodeError

from magnetar.client.refusal import Refused, unavailable
from magnetar.v1 import common_pb2

MESSAGE_BYTES_MAX = 8 << 20
"""Hard limit of one frame on every channel."""

CLOSE_S_MAX = 1.0
"""For gRPC to end a call that was broken off here."""

ERROR_METADATA_KEY = "magnetar-error-bin"

BROKER_SERVICE = "/magnetar.v1.BrokerService/"
ADMIN_SERVICE = "/magnetar.v1.AdminService/"

CHANNEL_OPTIONS: tuple[tuple[str, int], ...] = (
    ("grpc.max_receive_message_length", MESSAGE_BYTES_MAX),
    ("grpc.max_send_message_length", MESSAGE_BYTES_MAX),
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
    # Attempts to connect are paced by this client's own waits, which are shorter than gRPC's.
    ("grpc.initial_reconnect_backoff_ms", 50),
    ("grpc.min_reconnect_backoff_ms", 2_000),
    ("grpc.max_reconnect_backoff_ms", 1_000),
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.enable_retries", 0),
    ("grpc.enable_http_proxy", 0),
)


class RpcStream(Protocol):
    """One bidirectional call. One task reads, one task writes. Whatever breaks it is Refused."""

    async def write(self, frame: bytes) -> None: ...

    async def read(self) -> bytes | None:
        """The next frame; None when the broker sends no more."""

    async def close(self) -> None:
        """Break it off. On return nothing of it is under way in the event loop."""


class BrokerRpc(Protocol):
    """How brokers are reached by address."""

    async def call(self, address: str, method: str, request: bytes, timeout_s: float) -> bytes:
        """Raises Refused."""

    def stream(self, address: str, method: str) -> RpcStream: ...

    def answers(self, address: str, method: str, request: bytes) -> RpcStream:
        """A call with many answers: there is nothing to write."""

    async def close(self) -> None: ...


class GrpcRpc:
    """One channel a broker, made at the first call to it."""

    def __init__(self) -> None:
        self._channels: dict[str, grpc.aio.Channel] = {}

    async def call(self, address: str, method: str, request: bytes, timeout_s: float) -> bytes:
        call = self._channel(address).unary_unary(method)
        try:
            response: bytes = await call(request, timeout=timeout_s)
        except grpc.aio.AioRpcError as error:
            raise refused_by(address, error) from None
        except asyncio.CancelledError:
            _pass_on_cancellation()
            raise unavailable(f"the call was cut off: broker=`{address}`") from None
        return response

    def stream(self, address: str, method: str) -> RpcStream:
        return GrpcStream(address, self._channel(address).stream_stream(method)())

    def answers(self, address: str, method: str, request: bytes) -> RpcStream:
        return GrpcStream(address, self._channel(address).unary_stream(method)(request))

    async def close(self) -> None:
        channels, self._channels = self._channels, {}
        for channel in channels.values():
            await channel.close()

    def _channel(self, address: str) -> grpc.aio.Channel:
        channel = self._channels.get(address)
        if channel is None:
            channel = self._channels[address] = grpc.aio.insecure_channel(address, options=CHANNEL_OPTIONS)
        return channel


class GrpcStream:
    """A call of grpc.aio with a stream of answers."""

    def __init__(self, address: str, call: Any) -> None:
        self._address = address
        self._call = call

    async def write(self, frame: bytes) -> None:
        try:
            await self._call.write(frame)
        except grpc.aio.AioRpcError as error:
            raise refused_by(self._address, error) from None
        except asyncio.InvalidStateError:
            raise self._cut_off() from None
        except asyncio.CancelledError:
            _pass_on_cancellation()
            raise self._cut_off() from None

    async def read(self) -> bytes | None:
        try:
            frame = await self._call.read()
        except grpc.aio.AioRpcError as error:
            raise refused_by(self._address, error) from None
        except asyncio.InvalidStateError:
            raise self._cut_off() from None
        except asyncio.CancelledError:
            _pass_on_cancellation()
            raise self._cut_off() from None
        return None if frame is grpc.aio.EOF else bytes(frame)

    async def close(self) -> None:
        self._call.cancel()
        with suppress(TimeoutError, asyncio.CancelledError):
            async with asyncio.timeout(CLOSE_S_MAX):
                await self._call.code()

    def _cut_off(self) -> Refused:
        return unavailable(f"the connection was cut off: broker=`{self._address}`")


def _pass_on_cancellation() -> None:
    """grpc.aio raises CancelledError also for a call that the other side cancelled, which is an ordinary failure."""
    task = asyncio.current_task()
    if task is None or task.cancelling():
        raise asyncio.CancelledError


def refused_by(address: str, error: grpc.aio.AioRpcError) -> Refused:
    """The broker's own error if it sent one, else what gRPC says."""
    for key, value in error.trailing_metadata() or ():
        if key == ERROR_METADATA_KEY:
            try:
                return Refused.of(common_pb2.Error.FromString(bytes(value)))
            except DecodeError:
                break
    detail = f"{error.details() or 'no details'}: broker=`{address}` status=`{error.code().name}`"
    match error.code():
        case grpc.StatusCode.UNIMPLEMENTED:
            return Refused(
                common_pb2.ERROR_REASON_UNSUPPORTED_VERSION, f"this is not a Magnetar broker, or an old one: {detail}"
            )
        case grpc.StatusCode.PERMISSION_DENIED | grpc.StatusCode.UNAUTHENTICATED:
            return Refused(common_pb2.ERROR_REASON_NOT_AUTHORIZED, detail)
        case grpc.StatusCode.INVALID_ARGUMENT:
            return Refused(common_pb2.ERROR_REASON_INVALID_ARGUMENT, detail)
        case grpc.StatusCode.DEADLINE_EXCEEDED:
            return Refused(
                common_pb2.ERROR_REASON_UNAVAILABLE,
                "no answer in time, so what was asked for may have been done or not: the broker, or the metadata store "
                f"or bookies that it asks, may be away: see what its host and `magnetar cluster health` say: {detail}",
                silence=True,
            )
        case grpc.StatusCode.UNAVAILABLE:
            return unavailable(f"no broker answers: start one, or name another server: {detail}")
        case _:
            return unavailable(detail)
