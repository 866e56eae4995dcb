"""Calls of the admin service: any broker answers."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from google.protobuf.message import Message as ProtobufMessage

from magnetar.client.layouts import Brokers
from magnetar.client.lifetime import Lifetime
from magnetar.client.rpc import ADMIN_SERVICE

ResponseT = TypeVar("ResponseT", bound=ProtobufMessage)


class AdminCalls:
    """What every part of `client.admin` is made of."""

    def __init__(self, brokers: Callable[[], Brokers], lifetime: Lifetime) -> None:
        self._brokers = brokers
        self._lifetime = lifetime

    async def _call(
        self, method: str, request: ProtobufMessage, response: type[ResponseT], *, several: bool = False
    ) -> ResponseT:
        self._lifetime.check()
        answer = await self._brokers().call(ADMIN_SERVICE + method, request.SerializeToString(), several=several)
        parsed = response()
        parsed.ParseFromString(answer)
        return parsed

    async def _ask(self, method: str, request: ProtobufMessage, response: type[ResponseT]) -> ResponseT:
        """A call that changes nothing: if one broker is silent, another one is asked beside it."""
        return await self._call(method, request, response, several=True)
