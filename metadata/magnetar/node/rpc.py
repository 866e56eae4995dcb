"""The gRPC server of a process: services declared by their descriptors, handlers that take raw bytes.

Handlers parse for themselves (`parse`), so that what does not parse is refused with reason MALFORMED. Whatever they
refuse is one exception, `Refused`, translated here and only here: trailing metadata on calls with one answer, an error
frame where the stream's response has a field `error`.
"""

from __future__ import annotations

import asyncio
import resource
import socket
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias, TypeVar

import grpc
import grpc.aio
import structlog
from google.protobuf.descriptor import MethodDescriptor, ServiceDescriptor
from google.protobuf.message import DecodeError, Message
from google.protobuf.message_factory import GetMessageClass
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from magnetar.v1 import common_pb2

ERROR_METADATA_KEY = "magnetar-error-bin"
MESSAGE_BYTES_MAX = 8 << 20
"""Hard limit of one frame on every channel."""
STREAMS_PER_CONNECTION_MAX = 256
METADATA_BYTES_MAX = 16 << 10
CONNECTIONS_MAX = 10_000
"""Of a server; at most half of the files that the process may open, so that its storage always has some."""

SERVER_OPTIONS: tuple[tuple[str, int], ...] = (
    ("grpc.so_reuseport", 0),
    ("grpc.max_receive_message_length", MESSAGE_BYTES_MAX),
    ("grpc.max_send_message_length", MESSAGE_BYTES_MAX),
    ("grpc.max_concurrent_streams", STREAMS_PER_CONNECTION_MAX),
    ("grpc.max_metadata_size", METADATA_BYTES_MAX),
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
)

_STATUS: Mapping[int, grpc.StatusCode] = {
    common_pb2.ERROR_REASON_MALFORMED: grpc.StatusCode.INVALID_ARGUMENT,
    common_pb2.ERROR_REASON_INVALID_ARGUMENT: grpc.StatusCode.INVALID_ARGUMENT,
    common_pb2.ERROR_REASON_MESSAGE_TOO_LARGE: grpc.StatusCode.INVALID_ARGUMENT,
    common_pb2.ERROR_REASON_TOPIC_NOT_FOUND: grpc.StatusCode.NOT_FOUND,
    common_pb2.ERROR_REASON_SUBSCRIPTION_NOT_FOUND: grpc.StatusCode.NOT_FOUND,
    common_pb2.ERROR_REASON_LEDGER_NOT_FOUND: grpc.StatusCode.NOT_FOUND,
    common_pb2.ERROR_REASON_ALREADY_EXISTS: grpc.StatusCode.ALREADY_EXISTS,
    common_pb2.ERROR_REASON_NOT_AUTHORIZED: grpc.StatusCode.PERMISSION_DENIED,
    common_pb2.ERROR_REASON_UNAVAILABLE: grpc.StatusCode.UNAVAILABLE,
    common_pb2.ERROR_REASON_OFFSET_TRIMMED: grpc.StatusCode.OUT_OF_RANGE,
    common_pb2.ERROR_REASON_INTERNAL: grpc.StatusCode.INTERNAL,
}

log = structlog.get_logger("magnetar.rpc")

GONE = (grpc.RpcError, grpc.aio.UsageError, grpc.aio.InternalError, grpc.aio.AbortError, asyncio.InvalidStateError)
"""What reading and writing raise when the client has ended the call, or its connection is lost."""

MessageT = TypeVar("MessageT", bound=Message)
Context: TypeAlias = grpc.aio.ServicerContext


class Refused(Exception):
    """A request that is not served: the reason decides what the client does, the message tells people."""

    def __init__(
        self, reason: common_pb2.ErrorReason, message: str, *, owner: str = "", retry_after_ms: int = 0
    ) -> None:
        super().__init__(message)
        self.reason = reason
        self.message = message
        self.owner = owner
        self.retry_after_ms = retry_after_ms

    def to_error(self) -> common_pb2.Error:
        return common_pb2.Error(
            reason=self.reason, message=self.message, owner=self.owner, retry_after_ms=self.retry_after_ms
        )


class RefusedWithStatus(Exception):
    """A refusal in the words of another protocol: its status and text, and nothing of ours."""

    def __init__(self, status: grpc.StatusCode, message: str) -> None:
        super().__init__(message)
        self.status = status
        self.message = message


class ListenError(Exception):
    """The address cannot be listened on; the message names cause and remedy."""


def malformed(message: str) -> Refused:
    return Refused(common_pb2.ERROR_REASON_MALFORMED, message)


def invalid_argument(message: str) -> Refused:
    return Refused(common_pb2.ERROR_REASON_INVALID_ARGUMENT, message)


def unavailable(message: str, *, retry_after_ms: int = 0) -> Refused:
    return Refused(common_pb2.ERROR_REASON_UNAVAILABLE, message, retry_after_ms=retry_after_ms)


def parse(message_class: type[MessageT], data: bytes) -> MessageT:
    """The message in these bytes. Raises Refused(MALFORMED)."""
    message = message_class()
    try:
        message.ParseFromString(data)
    except DecodeError:
        raise malformed(f"bytes are not a valid {message_class.DESCRIPTOR.name} length={len(data)}") from None
    return message


@dataclass(slots=True)
class FrameCounts:
    """Frames of all streams that this process served."""

    received: int = 0
    sent: int = 0


frames = FrameCounts()


class ServerStream:
    """One call with a stream of answers, raw bytes both ways. One task reads, one task writes."""

    def __init__(self, context: Context) -> None:
        self.context = context
        self.peer: str = context.peer()

    async def read(self) -> bytes | None:
        """The next request; None when the client sends no more."""
        data: Any = await self.context.read()
        if data is grpc.aio.EOF:
            return None
        frames.received += 1
        return bytes(data)

    async def write(self, data: bytes) -> None:
        frames.sent += 1
        await self.context.write(data)


UnaryHandler = Callable[[bytes, Context], Awaitable[bytes]]
StreamHandler = Callable[[ServerStream], Awaitable[None]]
ServerStreamHandler = Callable[[bytes, ServerStream], Awaitable[None]]
Handler = UnaryHandler | StreamHandler | ServerStreamHandler


@dataclass(frozen=True, slots=True)
class Service:
    """A service and one handler a method, in the shape its descriptor says.

    One answer: `async (request, context) -> bytes`. Streams both ways: `async (stream) -> None`. A stream of answers to
    one request: `async (request, stream) -> None`.
    """

    descriptor: ServiceDescriptor
    methods: Mapping[str, Any]


class Server(Protocol):
    """A server that listens, whatever carries the calls."""

    @property
    def port(self) -> int: ...

    async def stop(self, grace_s: float) -> None: ...


Serve = Callable[[Sequence["Service"], str], Awaitable[Server]]
"""Starts a server of these services on an address: `serve`, or what stands in for a network."""


@dataclass(slots=True)
class RunningServer:
    """A server that listens. `port` is the one it got."""

    server: grpc.aio.Server
    port: int
    _health: health.aio.HealthServicer

    async def stop(self, grace_s: float) -> None:
        """Takes no new calls, gives the running ones `grace_s` seconds, then cuts them off."""
        await self._health.enter_graceful_shutdown()
        await self.server.stop(grace_s)


async def serve(services: Sequence[Service], listen: str, *, options: Mapping[str, int] | None = None) -> RunningServer:
    """Listens on `host:port` (port 0: any free one); `options` go before SERVER_OPTIONS. Raises ListenError."""
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    connections = CONNECTIONS_MAX if files == resource.RLIM_INFINITY else min(CONNECTIONS_MAX, files // 2)
    allowed = {"grpc.max_allowed_incoming_connections": connections}
    server = grpc.aio.server(options=tuple((dict(SERVER_OPTIONS) | allowed | dict(options or {})).items()))
    health_servicer = health.aio.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(health_servicer, server)
    names = [service.descriptor.full_name for service in services]
    reflection.enable_server_reflection([*names, health.SERVICE_NAME, reflection.SERVICE_NAME], server)
    server.add_generic_rpc_handlers(tuple(generic_handler(service) for service in services))
    try:
        port = server.add_insecure_port(listen)
    except RuntimeError:
        raise _cannot_listen(listen) from None
    await server.start()
    for name in ["", *names]:
        await health_servicer.set(name, health_pb2.HealthCheckResponse.SERVING)
    return RunningServer(server, port, health_servicer)


def check_free(listen: str) -> None:
    """For who makes something before it serves. Raises ListenError if `serve` could not listen there now."""
    host, _, port = listen.rpartition(":")
    try:
        found = socket.getaddrinfo(host.removeprefix("[").removesuffix("]"), port, type=socket.SOCK_STREAM)
    except OSError:
        raise _cannot_listen(listen) from None
    for family, kind, protocol, _, address in found:
        with socket.socket(family, kind, protocol) as probe, suppress(OSError):
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
            return
    raise _cannot_listen(listen)


def _cannot_listen(listen: str) -> ListenError:
    return ListenError(f"cannot listen on {listen}: the address is in use or not of this machine; choose another one")


def generic_handler(service: Service) -> grpc.GenericRpcHandler:
    """The service's handlers as gRPC calls them: with raw bytes and a context, their errors translated."""
    handlers = {}
    for method in service.descriptor.methods:
        handler = service.methods[method.name]
        if method.client_streaming:
            handlers[method.name] = grpc.stream_stream_rpc_method_handler(_streaming(method, handler))
        elif method.server_streaming:
            handlers[method.name] = grpc.unary_stream_rpc_method_handler(_answering(method, handler))
        else:
            handlers[method.name] = grpc.unary_unary_rpc_method_handler(_unary(method, handler))
    return grpc.method_handlers_generic_handler(service.descriptor.full_name, handlers)


def _unary(method: MethodDescriptor, handler: UnaryHandler) -> UnaryHandler:
    async def call(request: bytes, context: Context) -> bytes:
        try:
            return await handler(request, context)
        except Exception as error:
            told = _told(method, error)
        # gRPC ties an aborted call, this frame and the error into a cycle, which lives until the collector comes by:
        # the request and the frames that parsed it must not be in it.
        del request
        await _abort(context, told)
        raise AssertionError("abort always raises")

    return call


def _streaming(method: MethodDescriptor, handler: StreamHandler) -> Callable[[Any, Context], Awaitable[None]]:
    async def call(_requests: Any, context: Context) -> None:
        stream = ServerStream(context)
        try:
            await handler(stream)
            return
        except Exception as error:
            told = _told(method, error)
        await _end_stream(method, stream, told)

    return call


def _answering(method: MethodDescriptor, handler: ServerStreamHandler) -> Callable[[bytes, Context], Awaitable[None]]:
    async def call(request: bytes, context: Context) -> None:
        stream = ServerStream(context)
        try:
            await handler(request, stream)
            return
        except Exception as error:
            told = _told(method, error)
        del request
        await _end_stream(method, stream, told)

    return call


def _told(method: MethodDescriptor, error: Exception) -> common_pb2.Error | RefusedWithStatus | None:
    """What the client is told of an error that ended its call; None if it is gone and cannot be told."""
    if isinstance(error, RefusedWithStatus):
        return RefusedWithStatus(error.status, error.message)  # without the frames that the raised one ties
    if isinstance(error, Refused):
        return error.to_error()
    if isinstance(error, GONE):
        return None
    log.error("call failed", method=method.full_name, exc_info=error)
    return common_pb2.Error(
        reason=common_pb2.ERROR_REASON_INTERNAL, message="internal error: the server's log has the details"
    )


async def _end_stream(
    method: MethodDescriptor, stream: ServerStream, told: common_pb2.Error | RefusedWithStatus | None
) -> None:
    if told is None or stream.context.done():
        return
    if isinstance(told, common_pb2.Error) and "error" in method.output_type.fields_by_name:
        frame = GetMessageClass(method.output_type)(error=told)
        try:
            await stream.write(frame.SerializeToString())
        except GONE:
            return
    else:
        await _abort(stream.context, told)


async def _abort(context: Context, told: common_pb2.Error | RefusedWithStatus | None) -> None:
    if told is None:
        await context.abort(grpc.StatusCode.CANCELLED, "the call was given up")
        return
    if isinstance(told, RefusedWithStatus):
        await context.abort(told.status, told.message)
        return
    status = _STATUS.get(told.reason, grpc.StatusCode.FAILED_PRECONDITION)
    metadata = ((ERROR_METADATA_KEY, told.SerializeToString()),)
    await context.abort(status, told.message, trailing_metadata=metadata)
