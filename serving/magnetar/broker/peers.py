"""Calls from broker to broker: the same services that clients use, within a deadline."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Callable
from typing import TypeVar

import grpc
import grpc.aio
from google.protobuf.message import DecodeError, Message

from magnetar.broker.refusals import RETRY_AFTER_MS
from magnetar.node.rpc import ERROR_METADATA_KEY, MESSAGE_BYTES_MAX, Refused, unavailable
from magnetar.v1 import admin_pb2, common_pb2

ADMIN_SERVICE = f"/{admin_pb2.DESCRIPTOR.services_by_name['AdminService'].full_name}/"

CALL_S = 5.0
"""For another broker to answer; it may have to take a shard over first."""

PEERS_MAX = 64
"""Connections kept; beyond it the one not used for longest is closed."""

CLOSE_S = 1.0
"""For calls on a connection that is closed to make room."""

CHANNEL_OPTIONS: tuple[tuple[str, int], ...] = (
    ("grpc.max_receive_message_length", MESSAGE_BYTES_MAX),
    ("grpc.max_send_message_length", MESSAGE_BYTES_MAX),
    ("grpc.initial_reconnect_backoff_ms", 50),
    ("grpc.max_reconnect_backoff_ms", 1_000),
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.enable_retries", 0),
    ("grpc.enable_http_proxy", 0),
)

AnswerT = TypeVar("AnswerT", bound=Message)


def connect(address: str) -> grpc.aio.Channel:
    return grpc.aio.insecure_channel(address, options=CHANNEL_OPTIONS)


class Peers:
    """Connections to other brokers, made at first use. Only addresses of registered brokers come here."""

    def __init__(self, connect: Callable[[str], grpc.aio.Channel] = connect) -> None:
        self._connect = connect
        self._channels: OrderedDict[str, grpc.aio.Channel] = OrderedDict()

    async def call(
        self, address: str, method: str, request: Message, answer: type[AnswerT], timeout_s: float = CALL_S
    ) -> AnswerT:
        """`method` as `/package.Service/Method`. Raises Refused: what the other broker says, or UNAVAILABLE."""
        channel = await self._channel(address)
        try:
            data: bytes = await channel.unary_unary(method)(request.SerializeToString(), timeout=timeout_s)
            return answer.FromString(data)
        except grpc.aio.AioRpcError as error:
            raise _refused(address, error) from None
        except DecodeError:
            raise unavailable(f"the answer of another broker does not parse broker=`{address}`") from None
        except asyncio.CancelledError:
            # grpc.aio raises it also for a call that the other side cut off, which is an ordinary failure.
            task = asyncio.current_task()
            if task is None or task.cancelling():
                raise
            raise unavailable(f"another broker cut a call off broker=`{address}`") from None

    async def close(self) -> None:
        channels, self._channels = self._channels, OrderedDict()
        for channel in channels.values():
            await channel.close()

    async def _channel(self, address: str) -> grpc.aio.Channel:
        channel = self._channels.get(address)
        if channel is None:
            channel = self._channels[address] = self._connect(address)
            if len(self._channels) > PEERS_MAX:
                _, oldest = self._channels.popitem(last=False)
                await oldest.close(CLOSE_S)
        else:
            self._channels.move_to_end(address)
        return channel


def _refused(address: str, error: grpc.aio.AioRpcError) -> Refused:
    for key, value in error.trailing_metadata() or ():
        if key == ERROR_METADATA_KEY:
            try:
                told = common_pb2.Error.FromString(bytes(value))
            except DecodeError:
                break
            return Refused(told.reason, told.message, owner=told.owner, retry_after_ms=told.retry_after_ms)
    return unavailable(
        f"another broker does not answer: {error.details() or 'no details'} broker=`{address}`",
        retry_after_ms=RETRY_AFTER_MS,
    )
