"""Which shards a topic has and who serves them, as the brokers last told; and calls that any broker answers.

A layout is a hint: the broker that is asked decides. Whoever meets an answer that contradicts its layout refreshes it
here; one request serves all who ask at the same time, and everyone who uses the topic is told of what changed.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from magnetar.client.backoff import Delays
from magnetar.client.errors import InvalidArgument
from magnetar.client.refusal import Refused, unavailable
from magnetar.client.rpc import BROKER_SERVICE, BrokerRpc
from magnetar.v1 import broker_pb2, metadata_pb2
from magnetar.wire.names import InvalidName, TopicName, check_name

ATTEMPT_S_MAX = 5.0
"""For one broker to answer a call that others could answer as well."""

KNOWN_BROKERS_MAX = 64


@dataclass(frozen=True, slots=True)
class ShardPlace:
    """A shard, its inclusive slots, and the address of its owner; empty: nobody owns it yet."""

    shard_id: int
    first_slot: int
    last_slot: int
    open: bool
    owner: str


@dataclass(frozen=True, slots=True)
class Layout:
    """The shards of a topic at an epoch."""

    topic: str
    epoch: int
    shards: tuple[ShardPlace, ...]

    @classmethod
    def of(cls, layout: broker_pb2.Layout) -> Layout:
        shards = (
            ShardPlace(s.shard_id, s.first_slot, s.last_slot, s.state == metadata_pb2.SHARD_STATE_OPEN, s.owner)
            for s in layout.shards
        )
        return cls(layout.topic, layout.epoch, tuple(sorted(shards, key=lambda shard: shard.first_slot)))

    def shard(self, shard_id: int) -> ShardPlace | None:
        return next((shard for shard in self.shards if shard.shard_id == shard_id), None)

    def same_shards(self, other: Layout) -> bool:
        """They differ at most in owners."""
        return [(s.shard_id, s.open) for s in self.shards] == [(s.shard_id, s.open) for s in other.shards]


class Brokers:
    """Brokers that can be asked anything: those the user named, first, and those that layouts told of."""

    def __init__(self, rpc: BrokerRpc, servers: Sequence[str], timeout_s: float) -> None:
        self._rpc = rpc
        self._servers = tuple(servers)
        self._learned: dict[str, None] = {}
        self._preferred = self._servers[0]
        self._timeout_s = timeout_s

    @property
    def preferred(self) -> str:
        """The one that answered last."""
        return self._preferred

    def learn(self, address: str) -> None:
        """A layout named this broker."""
        if address and address not in self._servers:
            self._learned.pop(address, None)
            self._learned[address] = None
            if len(self._learned) > KNOWN_BROKERS_MAX:
                del self._learned[next(iter(self._learned))]

    async def ask(self, method: str, request: bytes, attempt_s: float) -> bytes:
        """One attempt at each broker until one answers, yes or no. Raises Refused."""
        addresses = dict.fromkeys((self._preferred, *self._servers, *self._learned))
        failure = unavailable("no broker is known")
        for address in addresses:
            try:
                answer = await self._rpc.call(address, method, request, attempt_s)
            except Refused as refused:
                if refused.final:
                    raise
                failure = refused
            else:
                self._preferred = address
                return answer
        raise failure

    async def call(self, method: str, request: bytes, *, attempt_s: float | None = None) -> bytes:
        """Ask until there is an answer. Raises the public error: ClusterUnavailable after the timeout."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self._timeout_s
        delays = Delays(random.random)
        while True:
            remaining_s = max(0.001, deadline - loop.time())
            try:
                return await self.ask(method, request, min(remaining_s, attempt_s or remaining_s))
            except Refused as refused:
                wait_s = delays.next_s(at_least_s=refused.retry_after_s)
                if refused.final or loop.time() + wait_s >= deadline:
                    raise refused.public() from None
            await asyncio.sleep(wait_s)


class Layouts:
    """The layouts of the topics that this client uses."""

    def __init__(self, brokers: Brokers) -> None:
        self._brokers = brokers
        self._refreshing: dict[str, asyncio.Task[Layout]] = {}
        self._listeners: dict[str, list[Callable[[Layout], None]]] = {}

    async def get(self, topic: str, *, create: bool) -> Layout:
        """The layout now, the topic created if it is not there. Raises public errors."""
        request = broker_pb2.ResolveRequest(topic=topic, create=create).SerializeToString()
        answer = await self._brokers.call(BROKER_SERVICE + "Resolve", request, attempt_s=ATTEMPT_S_MAX)
        return self._learn(answer)

    async def refresh(self, topic: str) -> Layout:
        """The layout now, in one attempt; everyone who listens to the topic is told. Raises Refused."""
        task = self._refreshing.get(topic)
        if task is None:
            task = self._refreshing[topic] = asyncio.create_task(self._refresh(topic), name=f"resolve {topic}")
            task.add_done_callback(lambda done: self._refreshed(topic, done))
        return await asyncio.shield(task)

    def listen(self, topic: str, listener: Callable[[Layout], None]) -> Callable[[], None]:
        """Tell of each refresh of the topic. Returns what ends it."""
        listeners = self._listeners.setdefault(topic, [])
        listeners.append(listener)

        def end() -> None:
            if listener in listeners:
                listeners.remove(listener)
            if not listeners and self._listeners.get(topic) is listeners:
                del self._listeners[topic]

        return end

    async def _refresh(self, topic: str) -> Layout:
        request = broker_pb2.ResolveRequest(topic=topic).SerializeToString()
        layout = self._learn(await self._brokers.ask(BROKER_SERVICE + "Resolve", request, ATTEMPT_S_MAX))
        for listener in tuple(self._listeners.get(topic, ())):
            listener(layout)
        return layout

    def _refreshed(self, topic: str, task: asyncio.Task[Layout]) -> None:
        self._refreshing.pop(topic, None)
        if not task.cancelled():
            # Marks the error as seen: whoever waited has it too.
            task.exception()

    def _learn(self, answer: bytes) -> Layout:
        layout = Layout.of(broker_pb2.ResolveResponse.FromString(answer).layout)
        for shard in layout.shards:
            self._brokers.learn(shard.owner)
        return layout


def full_topic(topic: str) -> str:
    """`tenant/namespace/topic`. Raises InvalidArgument."""
    if not isinstance(topic, str):
        raise InvalidArgument(f"a topic is a str: type=`{type(topic).__name__}`")
    try:
        return str(TopicName.parse(topic))
    except InvalidName as error:
        raise InvalidArgument(str(error)) from None


def checked_name(kind: str, name: str) -> str:
    """Raises InvalidArgument."""
    if not isinstance(name, str):
        raise InvalidArgument(f"the name of a {kind} is a str: type=`{type(name).__name__}`")
    try:
        return check_name(kind, name)
    except InvalidName as error:
        raise InvalidArgument(str(error)) from None
