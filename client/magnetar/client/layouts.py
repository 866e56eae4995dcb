"""Which shards a topic has and who serves them, as the brokers last told; and calls that any broker answers.

A layout is a hint: the broker that is asked decides. While somebody uses a topic, a broker pushes its layout at each
change: if possible one that serves no shard of it, which can tell when their owner is gone. Whoever meets an answer
that contradicts its layout refreshes it here; one request serves all who ask at the same time. Everyone who uses the
topic is told of both.
"""

from __future__ import annotations

import asyncio
import logging
import math
import random
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from dataclasses import dataclass

from magnetar.client.backoff import Delays
from magnetar.client.errors import InvalidArgument
from magnetar.client.refusal import UNSUPPORTED, Refused, unavailable
from magnetar.client.rpc import BROKER_SERVICE, BrokerRpc, RpcStream
from magnetar.v1 import broker_pb2, metadata_pb2
from magnetar.wire.names import InvalidName, TopicName, check_name

ATTEMPT_S_MAX = 5.0
"""For one broker to answer a call that others could answer as well."""

ATTEMPT_S_MIN = 0.001

CHANGE_S_MAX = 15.0
"""For one broker to do what changes something, while others are known: it may have to wait for them."""

SILENCE_S_MAX = 1.0
"""Of one broker, after which another one is asked beside it, if it does no harm to be answered by both."""

KNOWN_BROKERS_MAX = 64

WATCHES_MAX = 100
"""Topics whose layouts are pushed: a connection holds 256 calls at a time. Of others they are asked for when something
goes wrong."""

WATCH_RETRY_S_MAX = 1.0
WATCH_STEADY_S = 1.0
"""A watch that held for so long has settled: when it ends, the next one begins at once."""


log = logging.getLogger("magnetar.client")


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

    def learn(self, addresses: Iterable[str]) -> None:
        """These brokers are in the cluster."""
        for address in addresses:
            if address and address not in self._servers:
                self._learned.pop(address, None)
                self._learned[address] = None
                if len(self._learned) > KNOWN_BROKERS_MAX:
                    del self._learned[next(iter(self._learned))]

    def known(self) -> list[str]:
        """The one that answered last, then those that the user named, then the others."""
        return list(dict.fromkeys((self._preferred, *self._servers, *reversed(self._learned))))

    async def ask(self, method: str, request: bytes, deadline: float) -> bytes:
        """One broker after the other until one answers, yes or no, or the time is over. Raises Refused."""
        loop = asyncio.get_running_loop()
        failure: Refused | None = None
        addresses = self.known()
        for left, address in zip(range(len(addresses), 0, -1), addresses, strict=True):
            remaining_s = deadline - loop.time()
            if failure is not None and remaining_s <= 0.0:
                break
            try:
                share_s = max(CHANGE_S_MAX, remaining_s / left)
                attempt_s = max(ATTEMPT_S_MIN, min(share_s, remaining_s))
                answer = await self._rpc.call(address, method, request, attempt_s)
            except Refused as refused:
                if refused.final:
                    raise
                failure = _telling(failure, refused)
            else:
                self._preferred = address
                return answer
        raise failure or unavailable("no broker is known")

    async def ask_several(self, method: str, request: bytes, deadline: float, attempt_s: float = math.inf) -> bytes:
        """As `ask`, but the next broker is asked as soon as one is silent: for calls that may be answered twice.

        attempt_s   for each of them
        """
        loop = asyncio.get_running_loop()
        addresses = iter(self.known())
        asked: dict[asyncio.Task[bytes], str] = {}
        failure: Refused | None = None
        try:
            while True:
                remaining_s = deadline - loop.time()
                address = None if failure is not None and remaining_s <= 0.0 else next(addresses, None)
                if address is not None:
                    time_s = max(ATTEMPT_S_MIN, min(attempt_s, remaining_s))
                    asked[asyncio.create_task(self._rpc.call(address, method, request, time_s))] = address
                elif not asked:
                    raise failure or unavailable("no broker is known")
                wait_s = None if address is None else SILENCE_S_MAX
                done, _ = await asyncio.wait(asked, timeout=wait_s, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    address = asked.pop(task)
                    error = task.exception()
                    if error is None:
                        self._preferred = address
                        return task.result()
                    if not isinstance(error, Refused) or error.final:
                        raise error
                    failure = _telling(failure, error)
        finally:
            for task in asked:
                task.cancel()
            await asyncio.gather(*asked, return_exceptions=True)

    def watch(self, address: str, method: str, request: bytes) -> RpcStream:
        return self._rpc.answers(address, method, request)

    async def answers(self, address: str, method: str, request: bytes) -> bool:
        """This broker answers this call, and soon."""
        try:
            await self._rpc.call(address, method, request, SILENCE_S_MAX)
        except Refused:
            return False
        return True

    async def call(self, method: str, request: bytes, *, attempt_s: float = math.inf, several: bool = False) -> bytes:
        """Ask until there is an answer. `several`: see `ask_several`; `attempt_s`: for each broker, then.

        Raises the public error: ClusterUnavailable after the timeout, however many brokers were asked.
        """
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self._timeout_s
        delays = Delays(random.random)
        failure: Refused | None = None
        while True:
            try:
                if several:
                    return await self.ask_several(method, request, deadline, attempt_s)
                return await self.ask(method, request, deadline)
            except Refused as refused:
                failure = _telling(failure, refused)
                wait_s = delays.next_s(at_least_s=refused.retry_after_s)
                if refused.final or loop.time() + wait_s >= deadline:
                    raise failure.public() from None
            await asyncio.sleep(wait_s)


def _telling(before: Refused | None, refused: Refused) -> Refused:
    """What to tell the user of two failures: the newer one, unless it is a silence and the other is not."""
    return before if before is not None and refused.silence and not before.silence else refused


class Layouts:
    """The layouts of the topics that this client uses."""

    def __init__(self, brokers: Brokers) -> None:
        self._brokers = brokers
        self._refreshing: dict[str, asyncio.Task[Layout]] = {}
        self._listeners: dict[str, list[Callable[[Layout], None]]] = {}
        self._watches: dict[str, tuple[_Watch, asyncio.Task[None]]] = {}
        self._can_watch = True

    async def get(self, topic: str, *, create: bool) -> Layout:
        """The layout now, the topic created if it is not there. Raises public errors."""
        request = broker_pb2.ResolveRequest(topic=topic, create=create).SerializeToString()
        answer = await self._brokers.call(BROKER_SERVICE + "Resolve", request, attempt_s=ATTEMPT_S_MAX, several=True)
        return self._learn(broker_pb2.ResolveResponse.FromString(answer))

    async def refresh(self, topic: str) -> Layout:
        """The layout now, in one attempt; everyone who listens to the topic is told. Raises Refused."""
        return await asyncio.shield(self.ask(topic))

    def ask(self, topic: str) -> asyncio.Task[Layout]:
        """As `refresh`, in the background; a failure is nobody's."""
        task = self._refreshing.get(topic)
        if task is None:
            task = self._refreshing[topic] = asyncio.create_task(self._refresh(topic), name=f"resolve {topic}")
            task.add_done_callback(lambda done: self._refreshed(topic, done))
        return task

    def doubt(self, topic: str) -> None:
        """Something is waited for in vain: asks for the layout, and leaves a watched broker that is silent."""
        self.ask(topic)
        if (watched := self._watches.get(topic)) is not None:
            watched[0].doubt()

    def listen(self, topic: str, listener: Callable[[Layout], None]) -> Callable[[], None]:
        """Tell of each layout of the topic that comes. Returns what ends it."""
        listeners = self._listeners.setdefault(topic, [])
        listeners.append(listener)
        if topic not in self._watches and len(self._watches) < WATCHES_MAX and self._can_watch:
            watch = _Watch(self._brokers, topic)
            self._watches[topic] = watch, asyncio.create_task(self._watch(topic, watch), name=f"watch {topic}")

        def end() -> None:
            if listener in listeners:
                listeners.remove(listener)
            if not listeners and self._listeners.get(topic) is listeners:
                del self._listeners[topic]
                if (watched := self._watches.pop(topic, None)) is not None:
                    watched[1].cancel()

        return end

    async def stop(self) -> None:
        """Nothing is watched any more, and nobody asks."""
        tasks = [task for _, task in self._watches.values()]
        self._watches = {}
        self._can_watch = False
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _refresh(self, topic: str) -> Layout:
        request = broker_pb2.ResolveRequest(topic=topic).SerializeToString()
        answer = await self._brokers.ask_several(BROKER_SERVICE + "Resolve", request, math.inf, ATTEMPT_S_MAX)
        layout = self._learn(broker_pb2.ResolveResponse.FromString(answer))
        self._tell(topic, layout)
        return layout

    def _tell(self, topic: str, layout: Layout) -> None:
        for listener in tuple(self._listeners.get(topic, ())):
            listener(layout)

    def _refreshed(self, topic: str, task: asyncio.Task[Layout]) -> None:
        self._refreshing.pop(topic, None)
        if not task.cancelled():
            # Marks the error as seen: whoever waited has it too.
            task.exception()

    def _learn(self, answer: broker_pb2.ResolveResponse | broker_pb2.WatchLayoutResponse) -> Layout:
        layout = Layout.of(answer.layout)
        self._brokers.learn([*answer.brokers, *(shard.owner for shard in layout.shards)])
        return layout

    # --- pushed layouts ---

    async def _watch(self, topic: str, watch: _Watch) -> None:
        """Until nobody listens: at one broker after the other, as long as each tells."""
        loop = asyncio.get_running_loop()
        delays = Delays(random.random, max_s=WATCH_RETRY_S_MAX)
        try:
            while self._can_watch:
                began = loop.time()
                try:
                    async for answer in watch.answers():
                        self._tell(topic, self._learn(answer))
                except Refused as refused:
                    if refused.reason == UNSUPPORTED:
                        self._can_watch = False
                if loop.time() - began >= WATCH_STEADY_S:
                    delays.reset()
                # Two brokers that each take the other for a bystander would send the client to and fro without a pause.
                await asyncio.sleep(delays.next_s(at_once=True))
                if watch.exhausted:
                    watch.start_over()
        except Exception:
            log.exception("watching a layout failed: topic=`%s`", topic)
        finally:
            await watch.close()


class _Watch:
    """A topic's layout, watched at one of the brokers."""

    def __init__(self, brokers: Brokers, topic: str) -> None:
        self._brokers = brokers
        self._request = broker_pb2.WatchLayoutRequest(topic=topic).SerializeToString()
        self._probe = broker_pb2.ResolveRequest(topic=topic).SerializeToString()
        self._owners: frozenset[str] = frozenset()
        self._tried: set[str] = set()
        self._silent: set[str] = set()
        self._better: str | None = None
        """A bystander that has just answered."""
        self._address = ""
        self._stream: RpcStream | None = None
        self._doubting: asyncio.Task[None] | None = None

    @property
    def exhausted(self) -> bool:
        """Each known broker was tried and did not go on telling."""
        return all(address in self._tried for address in self._brokers.known())

    def start_over(self) -> None:
        self._tried.clear()
        self._silent.clear()

    async def answers(self) -> AsyncIterator[broker_pb2.WatchLayoutResponse]:
        """What the next broker tells, until it ends or a better one is known. Raises Refused."""
        address = self._next()
        self._better = None
        self._tried.add(address)
        self._address = address
        stream = self._stream = self._brokers.watch(address, BROKER_SERVICE + "WatchLayout", self._request)
        try:
            async with asyncio.timeout(ATTEMPT_S_MAX):
                frame = await stream.read()
            while frame is not None:
                answer = broker_pb2.WatchLayoutResponse.FromString(frame)
                yield answer
                self._owners = frozenset(shard.owner for shard in answer.layout.shards)
                self._tried = {address}
                frame = await self._following(stream, address)
        except TimeoutError:
            raise unavailable(f"the broker does not answer: broker=`{address}`") from None
        finally:
            self._stream = None
            await stream.close()

    def doubt(self) -> None:
        """The broker that is watched is left unless it answers soon: one that stands still closes nothing."""
        if self._stream is not None and (self._doubting is None or self._doubting.done()):
            self._doubting = asyncio.create_task(self._leave_if_silent(self._address, self._stream))

    async def close(self) -> None:
        """Nobody is doubted any more."""
        if self._doubting is not None:
            self._doubting.cancel()
            await asyncio.gather(self._doubting, return_exceptions=True)

    async def _leave_if_silent(self, address: str, stream: RpcStream) -> None:
        answers = await self._brokers.answers(address, BROKER_SERVICE + "Resolve", self._probe)
        if not answers and stream is self._stream:
            self._silent.add(address)
            await stream.close()

    async def _following(self, stream: RpcStream, address: str) -> bytes | None:
        """The next frame; None at the end, and as soon as a broker that serves no shard answers instead of an owner.

        A bystander may be silent because it is the owner that was lost: the watch of the next owner is kept meanwhile.
        """
        bystanders = self._bystanders() if address in self._owners else []
        if not bystanders:
            return await stream.read()
        reading = asyncio.create_task(stream.read())
        probing = asyncio.create_task(self._brokers.answers(bystanders[0], BROKER_SERVICE + "Resolve", self._probe))
        try:
            await asyncio.wait({reading, probing}, return_when=asyncio.FIRST_COMPLETED)
            if not probing.done():
                return reading.result()
            if probing.result():
                self._better = bystanders[0]
                return None
            self._silent.add(bystanders[0])
            return await reading
        finally:
            for task in (reading, probing):
                task.cancel()
            await asyncio.gather(reading, probing, return_exceptions=True)

    def _next(self) -> str:
        untried = [address for address in self._brokers.known() if address not in self._tried]
        return self._better or next(iter(self._bystanders() or untried or self._brokers.known()))

    def _bystanders(self) -> list[str]:
        """Brokers that are not known to serve a shard of the topic, in random order: many clients ask."""
        unfit = self._owners | self._tried | self._silent
        known = [address for address in self._brokers.known() if address not in unfit]
        random.shuffle(known)
        return known


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
