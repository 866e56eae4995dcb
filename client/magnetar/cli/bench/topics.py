"""Topics for one measurement, and producers for them."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from magnetar.client import Client, Producer

OPENED_AT_ONCE = 64
TOPICS_MAX = 10_000

T = TypeVar("T")


@asynccontextmanager
async def new_topics(client: Client, count: int = 1) -> AsyncIterator[list[str]]:
    """Topics of their own for the measurement, deleted after it."""
    mark = f"{random.getrandbits(32):08x}"
    names = [f"bench-{mark}-{number}" for number in range(count)]
    try:
        await in_groups(names, client.admin.topics.create)
        yield names
    finally:
        await in_groups(names, client.admin.topics.delete, return_exceptions=True)


@asynccontextmanager
async def new_producers(client: Client, topics: Sequence[str], **options: Any) -> AsyncIterator[list[Producer]]:
    async with AsyncExitStack() as stack:
        yield await in_groups(topics, lambda topic: stack.enter_async_context(client.producer(topic, **options)))


async def in_groups(
    items: Iterable[str], call: Callable[[str], Awaitable[T]], *, return_exceptions: bool = False
) -> list[T]:
    """The results of the calls in order, of which a bounded number are under way."""
    room = asyncio.Semaphore(OPENED_AT_ONCE)

    async def one(item: str) -> T:
        async with room:
            return await call(item)

    return await asyncio.gather(*map(one, items), return_exceptions=return_exceptions)  # type: ignore[return-value]


async def copies_of(client: Client, topic: str) -> int:
    """How many bookies hold each message."""
    segments = [segment for shard in (await client.admin.topics.describe(topic)).shards for segment in shard.segments]
    return len(segments[-1].ensemble) if segments else 1
