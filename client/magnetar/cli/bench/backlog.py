"""A backlog: messages that were published before the measuring begins, and consumers that take it to its end."""

from __future__ import annotations

import asyncio
import enum
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import typer

from magnetar.cli.bench.payloads import generated
from magnetar.cli.bench.topics import new_topics

if TYPE_CHECKING:
    from magnetar.client import Client, QueueConsumer, StreamConsumer

    Consumer = StreamConsumer | QueueConsumer

HOLDER = "holder"
"""A subscription that acknowledges nothing, so that nothing is deleted."""
GROUP_BYTES = 256 << 10
GROUP_MESSAGES_MAX = 2000
GROUPS_IN_FLIGHT = 8
STREAM_ACK_EVERY = 1000


class Form(enum.StrEnum):
    batches = "batches"
    messages = "messages"


FormOption = Annotated[Form, typer.Option(help="What is asked for: columns of a delivery, or a message object each.")]


@dataclass(frozen=True, slots=True)
class Backlog:
    """Messages of equal size in one topic."""

    topic: str
    messages: int
    size: int


@asynccontextmanager
async def new_backlog(client: Client, size: int, total_bytes: int) -> AsyncIterator[Backlog]:
    """A topic with so many bytes of payload; the publisher has stopped. It is deleted in the end."""
    from magnetar.client import EARLIEST

    group = max(1, min(GROUP_MESSAGES_MAX, GROUP_BYTES // max(1, size)))
    groups = max(1, -(-total_bytes // (max(1, size) * group)))
    payloads = generated(size, 0, group)
    async with new_topics(client) as [topic]:
        await client.admin.subscriptions.create(topic, HOLDER, start=EARLIEST)
        async with client.producer(topic) as producer:
            left = iter(range(groups))

            async def publish() -> None:
                for _ in left:
                    await producer.send_many(payloads.next().payloads)

            async with asyncio.TaskGroup() as publishers:
                for _ in range(GROUPS_IN_FLIGHT):
                    publishers.create_task(publish())
        yield Backlog(topic, groups * group, size)


class Left:
    """How many messages are still to come, to one consumer or to several together."""

    def __init__(self, messages: int) -> None:
        self._messages = messages
        self.none = asyncio.Event()

    def take(self, messages: int) -> None:
        self._messages -= messages
        if self._messages <= 0:
            self.none.set()


async def drain(consumer: Consumer, form: Form, left: Left, *, individually: bool) -> None:
    """Takes and acknowledges messages until none are left. individually: each message object by itself."""
    if form is Form.batches:
        async for batch in consumer.batches():
            consumer.ack(batch)
            left.take(len(batch.payloads))
            if left.none.is_set():
                return
    every = 1 if individually else STREAM_ACK_EVERY
    taken = 0
    async for message in consumer:
        taken += 1
        if taken % every == 0:
            consumer.ack(message)
        left.take(1)
        if left.none.is_set():
            consumer.ack(message)
            return


async def drain_together(consumers: list[Consumer], form: Form, left: Left, *, individually: bool) -> None:
    """Several consumers of one subscription: whoever waits when nothing is left has nothing more to come."""
    tasks = [asyncio.create_task(drain(one, form, left, individually=individually)) for one in consumers]
    ended = asyncio.create_task(left.none.wait())
    try:
        done, _ = await asyncio.wait({ended, *tasks}, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in (ended, *tasks):
            task.cancel()
        await asyncio.gather(ended, *tasks, return_exceptions=True)
    for task in done:
        task.result()
