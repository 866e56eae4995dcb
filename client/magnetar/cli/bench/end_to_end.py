"""`magnetar bench end-to-end`: how long a message takes from its producer to its consumer."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import typer

from magnetar.cli.bench.load import Load, Ready
from magnetar.cli.bench.tail import new_tail
from magnetar.cli.bench.target import Target
from magnetar.cli.bench.topics import new_topics
from magnetar.cli.bench.verb import TimedSizeOption, verb

if TYPE_CHECKING:
    from magnetar.client import Client


@dataclass(frozen=True, slots=True)
class EndToEnd(Load):
    """rate   messages a second"""

    size: int
    rate: float

    verb = "end-to-end"

    @property
    def fills_disk(self) -> bool:
        return True

    @asynccontextmanager
    async def ready(self, client: Client, target: Target) -> AsyncIterator[Ready]:
        async with new_topics(client) as [topic], new_tail(client, topic, self.size, self.rate) as tail:
            yield Ready(topic, tail.run)


@verb
def end_to_end(
    size: TimedSizeOption = 1024,
    rate: Annotated[float, typer.Option(min=0.1, help="Messages a second.")] = 1000.0,
) -> Load:
    """Publishes at a rate and consumes at once: percentiles of the time from when a message was due to its receipt."""
    return EndToEnd(size, rate)
