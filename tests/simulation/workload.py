"""What clients do: producers, consumers, readers and an administrator, each in a process that may be killed.

An actor is an application: it is started again after its process was killed, with what a real one would have kept. It
makes one call after the other, tells the oracle before and after each, and ends when the workload's calls are used up.
"""

from __future__ import annotations

import asyncio
import math
import random
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from simulation.loop import Process
from simulation.oracle import Oracle, Sent, SubscriptionOracle
from simulation.world import World

from magnetar.client import (
    EARLIEST,
    LATEST,
    AlreadyExists,
    Batching,
    InvalidArgument,
    MagnetarError,
    MessageId,
    ProducerFenced,
    SubscriptionNotFound,
)
from magnetar.client.client import Client
from magnetar.client.consumer import Consumer, QueueConsumer
from magnetar.client.message import Message
from magnetar.client.producer import Producer
from magnetar.metadata.codec import decode_topic

KEPT = "public/default/kept"
"""A subscription that nobody acknowledges keeps all of it."""
TRIMMED = "public/default/trimmed"
QUIET = "public/default/quiet"
"""Kept, too. Nobody writes to it but rivals, in some seeds: bookies do not tell its owner soon that it was replaced."""
TOPICS = (KEPT, QUIET, TRIMMED)
HOLD = "hold"
CALLS = 500
KEYS = 12
LARGE_BYTES = 24_000
"""One message in ten is up to this large, so that segments fill up."""
RECEIVE_S = 1.0
READ_AT_ONCE = 40
AGAIN_S = 1.5
"""A killed client is started again after up to this time."""


@dataclass(frozen=True, slots=True)
class Scene:
    """What the seed decides about the workload."""

    calls: int
    pause_s: float
    shards: dict[str, int]
    contested: str
    """The topic in which some contend for a producer's name."""

    @classmethod
    def draw(cls, rng: random.Random, calls: int = CALLS) -> Scene:
        shards = {KEPT: rng.choice([1, 2, 3]), TRIMMED: rng.choice([1, 2]), QUIET: 1}
        return cls(calls, rng.choice([0.2, 0.5, 0.8]), shards, rng.choice([KEPT, QUIET, QUIET]))


SUBSCRIPTIONS = (
    (KEPT, HOLD, "queue"),
    (KEPT, "stream", "stream"),
    (KEPT, "keys", "queue"),
    (KEPT, "seeks", "stream"),
    (QUIET, HOLD, "queue"),
    (TRIMMED, "queue", "queue"),
    (TRIMMED, "audit", "stream"),
)


class Workload:
    """All actors, and the calls that are left."""

    def __init__(self, world: World, oracle: Oracle, scene: Scene, seed: int) -> None:
        self.world = world
        self.oracle = oracle
        self.scene = scene
        self.left = scene.calls
        self.actors: list[Actor] = []
        self._seed = seed
        for topic, name, kind in SUBSCRIPTIONS:
            oracle.subscriptions[topic, name] = SubscriptionOracle(
                oracle, topic, name, ordered=kind == "stream", key_ordered=name == "keys"
            )
        self._add("unnamed", lambda actor: Producing(actor, KEPT, name=None, numbered=False, keyed=True))
        self._add("keyless", lambda actor: Producing(actor, KEPT, name=None, numbered=False, keyed=False))
        self._add("named", lambda actor: Producing(actor, KEPT, name="named", numbered=False, keyed=True))
        self._add("numbered", lambda actor: Producing(actor, KEPT, name="numbered", numbered=True, keyed=True))
        self._add("trimmed", lambda actor: Producing(actor, TRIMMED, name="trimmed", numbered=True, keyed=False))
        for number in range(2):
            self._add(f"stream{number}", lambda actor: Consuming(actor, KEPT, "stream"))
            self._add(f"keys{number}", lambda actor: Consuming(actor, KEPT, "keys"))
            self._add(f"queue{number}", lambda actor: Consuming(actor, TRIMMED, "queue"))
        self._add("audit", lambda actor: Consuming(actor, TRIMMED, "audit"))
        self._add("seeks", lambda actor: Consuming(actor, KEPT, "seeks"))
        rivals = Rivals(scene.contested)
        for number in range(3):
            self._add(f"rival{number}", lambda actor: Rivalling(actor, rivals))
        self._add("reader", Reading)
        self._add("admin", Administering)

    def _add(self, name: str, role: Callable[[Actor], Any]) -> None:
        actor = Actor(self, name, random.Random(f"actor {name} {self._seed}"))
        actor.role = role(actor)
        self.actors.append(actor)

    async def prepare(self) -> None:
        """Topics and subscriptions are there on return."""
        process = self.world.client_process("setup")

        async def work() -> None:
            async with self.world.client(process) as client:
                for topic, shards in self.scene.shards.items():
                    await client.admin.topics.create(topic, shards=shards)
                for topic, name, kind in SUBSCRIPTIONS:
                    await client.admin.subscriptions.create(topic, name, type=kind, start=EARLIEST)

        await self.world.spawn(process, work(), "setup")

    async def shards_of(self, topic: str) -> set[int]:
        found = await self.world.metadata.store.get(self.world.keyspace.topic(topic))
        assert found is not None
        return {shard.shard_id for shard in decode_topic(found.value).shards}

    async def run(self) -> None:
        """Returns when all calls are made."""
        await asyncio.gather(*(actor.run() for actor in self.actors))

    def take(self) -> bool:
        """One more call may be made."""
        if self.left <= 0:
            return False
        self.left -= 1
        return True

    def stop(self) -> None:
        """No more calls are begun."""
        self.left = 0


class Actor:
    """One application and the process that it runs in."""

    def __init__(self, workload: Workload, name: str, rng: random.Random) -> None:
        self.workload = workload
        self.world = workload.world
        self.oracle = workload.oracle
        self.name = name
        self.rng = rng
        self.role: Any = None
        self.lives = 0

    async def run(self) -> None:
        """Lives until the calls are used up, however often its process is killed."""
        await asyncio.sleep(self.rng.random())
        while self.workload.left > 0:
            self.lives += 1
            process = self.world.client_process(self.name)
            life = self.world.spawn(process, self._live(process), self.name)
            gone = asyncio.ensure_future(self.world.gone(process))
            await asyncio.wait({life, gone}, return_when=asyncio.FIRST_COMPLETED)
            gone.cancel()
            if life.done():
                life.result()
            await asyncio.sleep(self.rng.random() * AGAIN_S)

    async def _live(self, process: Process) -> None:
        async with self.world.client(process) as client:
            while self.workload.left > 0:
                await self.attempt("lives", self.role.live(client))
                await self.pause()

    async def attempt(self, what: str, call: Coroutine[Any, Any, None]) -> None:
        """The call, which may end with one of the role's errors and no other: what passes, the client waits for."""
        note = self.world.transcript.note
        try:
            await call
        except MagnetarError as error:
            note(self.name, what, "failed:", type(error).__name__, str(error))
            self.oracle.failed_calls += 1
            if not isinstance(error, self.role.errors):
                self.oracle.fail(f"availability: a call of {self.name} failed: {type(error).__name__} {error}")
        else:
            note(self.name, what, "done")

    async def pause(self) -> None:
        await asyncio.sleep(self.rng.expovariate(1.0 / self.workload.scene.pause_s))

    def take(self) -> bool:
        return self.workload.take()


class Producing:
    """Sends messages that each say who sent them, and which one it is.

    With `numbered` it has what a careful application has: it numbers its messages, and after a restart sends again what
    was not confirmed, under the same numbers.
    """

    errors: tuple[type[MagnetarError], ...] = ()

    def __init__(self, actor: Actor, topic: str, *, name: str | None, numbered: bool, keyed: bool) -> None:
        self._actor = actor
        self._topic = topic
        self._name = name
        self._numbered = numbered
        self._keyed = keyed
        self._next = 0
        self._unconfirmed: dict[int, tuple[bytes, str | None]] = {}

    async def live(self, client: Client) -> None:
        actor, rng = self._actor, self._actor.rng
        batching = Batching(linger=rng.choice([0.0, 0.0, 0.02]), max_messages=rng.choice([1, 5, 10_000]))
        compression = rng.choice(["none", "none", "lz4"])
        if not actor.take():
            return
        producer = client.producer(self._topic, name=self._name, batching=batching, compression=compression)
        self._settle(list(self._unconfirmed))
        async with producer:
            for number in list(self._unconfirmed):
                if actor.take():
                    await self._send(producer, [number])
            while actor.take():
                await self._some(producer)
                if rng.random() < 0.03:
                    return
                await actor.pause()

    async def _some(self, producer: Producer) -> None:
        roll = self._actor.rng.random()
        if roll < 0.5:
            await self._send(producer, [self._new()])
        elif roll < 0.8 or self._numbered:
            numbers = [self._new() for _ in range(self._actor.rng.randrange(2, 9))]
            for _ in numbers[1:]:
                self._actor.take()
            await self._send(producer, numbers)
        else:
            await self._send_many(producer, [self._new() for _ in range(self._actor.rng.randrange(2, 25))])

    def _new(self) -> int:
        """The number of a new message."""
        number, self._next = self._next, self._next + 1
        rng, actor = self._actor.rng, self._actor
        size = int(rng.expovariate(1 / 400)) if rng.random() < 0.9 else rng.randrange(LARGE_BYTES)
        producer = self._name or f"{actor.name}.{actor.lives}"
        payload = f"{producer}:{number}:".encode() + bytes(size)
        key = f"k{rng.randrange(KEYS)}" if self._keyed and rng.random() < 0.95 else None
        self._unconfirmed[number] = (payload, key)
        ordered = key is not None or self._name is not None
        actor.oracle.sending(payload, Sent(producer, number, self._topic, key, ordered))
        return number

    async def _send(self, producer: Producer, numbers: list[int]) -> None:
        """Raises what went wrong: then this producer is closed, and another one made."""
        receipts = []
        for number in numbers:
            payload, key = self._unconfirmed[number]
            sequence = number if self._numbered else None
            receipts.append((number, producer.send_nowait(payload, key=key, sequence=sequence)))
        failure: MagnetarError | None = None
        for number, receipt in receipts:
            try:
                self._confirmed(number, await receipt)
            except MagnetarError as error:
                failure = error
        self._settle(numbers)
        if failure is not None:
            raise failure

    async def _send_many(self, producer: Producer, numbers: list[int]) -> None:
        messages = [self._unconfirmed[number] for number in numbers]
        keys = [key for _, key in messages] if self._keyed else None
        failure: MagnetarError | None = None
        try:
            ids: Any = await producer.send_many([payload for payload, _ in messages], keys)
        except MagnetarError as error:
            ids, failure = error.ids, error
        for number, message_id in zip(numbers, ids, strict=False):
            if message_id is not None:
                self._confirmed(number, message_id)
        self._settle(numbers)
        if failure is not None:
            raise failure

    def _confirmed(self, number: int, message_id: MessageId) -> None:
        payload, _ = self._unconfirmed[number]
        self._actor.oracle.confirmed(payload, message_id.shard, message_id.offset)
        if self._numbered:
            del self._unconfirmed[number]

    def _settle(self, numbers: list[int]) -> None:
        """Who does not number its messages cannot know what became of those without an answer, and lets them be."""
        if not self._numbered:
            for number in numbers:
                self._unconfirmed.pop(number, None)


@dataclass(slots=True)
class Holding:
    """One connection of a producer's name: from when to when it was opened."""

    began: float
    opened: float = math.inf


@dataclass(frozen=True, slots=True)
class Rivals:
    topic: str
    holdings: list[Holding] = field(default_factory=list)


class Rivalling:
    """One of some that take the same producer's name from each other.

    From the return of one's opening on, what another begins to send is refused, if it was opened before that began.
    """

    errors = (ProducerFenced,)

    def __init__(self, actor: Actor, rivals: Rivals) -> None:
        self._actor = actor
        self._topic = rivals.topic
        self._holdings = rivals.holdings
        self._next = 0

    async def live(self, client: Client) -> None:
        actor = self._actor
        if not actor.take():
            return
        mine = Holding(actor.oracle.now())
        self._holdings.append(mine)
        async with client.producer(self._topic, name="rival") as producer:
            mine.opened = actor.oracle.now()
            while actor.take():
                now = actor.oracle.now()
                fenced = any(other.began > mine.opened and other.opened < now for other in self._holdings)
                self._next += 1
                payload = f"{actor.name}:{self._next}:{'fenced' if fenced else ''}".encode()
                label = f"{actor.name}.{mine.began}"
                actor.oracle.sending(payload, Sent(label, self._next, self._topic, None, ordered=True, fenced=fenced))
                place = await producer.send(payload)
                actor.oracle.confirmed(payload, place.shard, place.offset)
                await actor.pause()


class Consuming:
    """Receives and acknowledges; a queue's gives back at times, `seeks` moves its subscription."""

    errors: tuple[type[MagnetarError], ...] = ()

    def __init__(self, actor: Actor, topic: str, subscription: str) -> None:
        self._actor = actor
        self._topic = topic
        self._subscription = subscription
        self._oracle = actor.oracle.subscription(topic, subscription)

    async def live(self, client: Client) -> None:
        actor = self._actor
        if not actor.take():
            return
        opened_at = actor.oracle.now()
        alone = {shard: actor.world.served_alone(shard) for shard in self._oracle.cursors}
        async with self._consumer(client) as consumer:
            begun: set[int] = set()
            answered: set[tuple[int, int]] = set()
            while actor.take():
                messages = await consumer.receive_batch(actor.rng.choice([1, 10, 100]), timeout=RECEIVE_S)
                for message in messages:
                    self._received(message, opened_at, begun, answered, alone)
                if messages and actor.take():
                    await self._answer(consumer, messages, answered)
                if self._subscription == "seeks" and actor.rng.random() < 0.15 and actor.take():
                    await self._seek(consumer)
                if actor.rng.random() < 0.05:
                    return
                await actor.pause()

    def _consumer(self, client: Client) -> Any:
        if self._oracle.ordered:
            return client.stream_consumer(self._topic, subscription=self._subscription, start=EARLIEST)
        prefetch = self._actor.rng.choice([1, 20, 1000])
        return client.queue_consumer(
            self._topic,
            subscription=self._subscription,
            key_ordered=self._oracle.key_ordered,
            prefetch=prefetch,
            start=EARLIEST,
        )

    def _received(
        self,
        message: Message,
        opened_at: float,
        begun: set[int],
        answered: set[tuple[int, int]],
        alone: dict[int, int],
    ) -> None:
        """`answered`: what this very consumer acknowledged, and was told that it is durable; it never comes here again.

        What another one acknowledged may: a message that was given back can wait at two consumers. So may what it
        acknowledged while the shard had a replaced owner, which can have given it out once more before the answer.
        """
        shard, offset = place_of(message)
        self._actor.oracle.stands(message.payload, shard, offset, f"received by {self._actor.name}")
        world, epoch = self._actor.world, alone.get(shard, 0)
        alone_since_opening = epoch != 0 and epoch == world.served_alone(shard)
        if self._subscription == "seeks" and shard not in begun:
            begun.add(shard)
            if alone_since_opening:
                self._oracle.opened_at(shard, offset)
        again = self._subscription != "seeks" and (shard, offset) in answered
        self._oracle.received(shard, offset, opened_at, again=again, certain=partial(world.certain_since, shard))

    async def _answer(self, consumer: Consumer, messages: list[Message], answered: set[tuple[int, int]]) -> None:
        """Acknowledges all, some, or gives back."""
        rng = self._actor.rng
        if isinstance(consumer, QueueConsumer):
            back = [message for message in messages if rng.random() < 0.05]
            acked = [message for message in messages if message not in back and rng.random() < 0.95]
            for message in back:
                consumer.nack(message)
        else:
            acked = [rng.choice(messages)] if rng.random() < 0.8 else []
        world, began = self._actor.world, self._actor.oracle.now()
        waiting = []
        for message in acked:
            shard, offset = place_of(message)
            self._oracle.acking(shard, offset)
            waiting.append((shard, offset, world.served_alone(shard) != 0, consumer.ack(message)))
        if waiting and rng.random() < 0.6:
            for shard, offset, alone, acknowledgement in waiting:
                await acknowledgement
                if alone and world.certain_since(shard, began):
                    answered.add((shard, offset))
                self._oracle.acked(shard, offset, certain=world.served_alone(shard) != 0)

    async def _seek(self, consumer: Consumer) -> None:
        """To a message that was received before, in one shard, or to the beginning of all."""
        known = [(shard, list(cursor.first)) for shard, cursor in self._oracle.cursors.items() if cursor.first]
        if not known:
            return
        shard, offsets = self._actor.rng.choice(known)
        if self._actor.rng.random() < 0.3:
            targets = {shard: 0 for shard, _ in known}
            position: Any = EARLIEST
        else:
            targets = {shard: self._actor.rng.choice(offsets)}
            position = MessageId(shard, targets[shard])
        for shard, offset in targets.items():
            self._oracle.seeking(shard, offset)
        await consumer.seek(position)
        for shard, offset in targets.items():
            self._oracle.sought_to(shard, offset, certain=self._actor.world.served_alone(shard) != 0)


class Reading:
    """Reads a topic from its beginning to its end of the moment."""

    errors: tuple[type[MagnetarError], ...] = ()
    """But for what was trimmed before it was read."""

    def __init__(self, actor: Actor) -> None:
        self._actor = actor

    async def live(self, client: Client) -> None:
        actor = self._actor
        if not actor.take():
            return
        topic = actor.rng.choice([KEPT, TRIMMED])
        try:
            await self._read(client, topic)
        except InvalidArgument as overtaken:
            if topic == KEPT or "trimmed" not in str(overtaken):
                raise

    async def _read(self, client: Client, topic: str) -> None:
        actor = self._actor
        following: dict[int, int] = {}
        async with client.reader(topic, start=EARLIEST, stop=LATEST) as reader:
            while actor.take() and (messages := await reader.receive_batch(READ_AT_ONCE)):
                for message in messages:
                    shard, offset = place_of(message)
                    actor.oracle.stands(message.payload, shard, offset, "read")
                    check_dense(actor.oracle, following, shard, offset)
                await actor.pause()


class Administering:
    """Creates, looks at and deletes subscriptions that nobody uses."""

    errors = (AlreadyExists, SubscriptionNotFound)
    """Of a call that was made twice, because its first answer was lost."""

    def __init__(self, actor: Actor) -> None:
        self._actor = actor
        self._number = 0

    async def live(self, client: Client) -> None:
        actor = self._actor
        topic = actor.rng.choice([KEPT, TRIMMED])
        self._number += 1
        name = f"passing{self._number}"
        subscriptions = client.admin.subscriptions
        for call in (
            lambda: subscriptions.create(topic, name, start=actor.rng.choice([EARLIEST, LATEST])),
            lambda: subscriptions.describe(topic, name),
            lambda: client.admin.topics.describe(topic),
            lambda: subscriptions.delete(topic, name),
        ):
            if not actor.take():
                return
            await actor.attempt("administers", call())
            await actor.pause()


def place_of(message: Message) -> tuple[int, int]:
    identity = message.id
    assert identity.offset is not None
    return identity.shard, identity.offset


def check_dense(oracle: Oracle, following: dict[int, int], shard: int, offset: int) -> None:
    """Within one reading a shard's offsets have no holes."""
    expected = following.get(shard, offset)
    if offset != expected:
        oracle.fail(f"dense offsets: a reader got offset {offset} in the place of {expected}: shard={shard}")
    following[shard] = offset + 1
