"""`magnetar bench catch-up`: reading a backlog that no cache holds, alone or beside a tail."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Annotated

import typer

from magnetar.cli.bench.backlog import Backlog, new_backlog
from magnetar.cli.bench.load import Load, Ready, Run, Tally
from magnetar.cli.bench.tail import Tail, new_tail, ratio
from magnetar.cli.bench.target import Target
from magnetar.cli.bench.topics import new_topics
from magnetar.cli.bench.verb import BacklogOption, TimedSizeOption, verb

if TYPE_CHECKING:
    from magnetar.client import Client

BACKLOG_BYTES = 512_000_000
"""Several times a broker's cache as it is by default."""


@dataclass(frozen=True, slots=True)
class CatchUp(Load):
    """A run reads the backlog from its beginning, for its seconds or to the end.

    tail_rate   MB/s published to another topic and consumed at once: first alone, for as long, then beside the reading
    """

    size: int
    bytes: int
    tail_rate: float

    verb = "catch-up"

    @asynccontextmanager
    async def ready(self, client: Client, target: Target) -> AsyncIterator[Ready]:
        async with new_backlog(client, self.size, self.bytes) as backlog:
            read = partial(self._read, client, backlog)
            if not self.tail_rate:
                yield Ready(backlog.topic, read)
                return
            async with (
                new_topics(client) as [topic],
                new_tail(client, topic, self.size, self.tail_rate * 1e6 / self.size) as tail,
            ):
                yield Ready(backlog.topic, partial(self._read_beside, tail, read), warm_up=tail.run)

    async def _read(self, client: Client, backlog: Backlog, seconds: float) -> Tally:
        from magnetar.client import LATEST

        tally = Tally()
        begin = time.perf_counter()
        async with client.reader(backlog.topic, stop=LATEST) as reader:
            async for batch in reader.batches():
                messages = len(batch.payloads)
                tally.add(messages, messages * backlog.size)
                if time.perf_counter() - begin >= seconds:
                    break
            tally.elapsed_s = time.perf_counter() - begin
        return tally

    async def _read_beside(self, tail: Tail, read: Run, seconds: float) -> Tally:
        quiet = (await tail.run(seconds)).latencies
        running = asyncio.create_task(tail.run(seconds))
        tally = await read(seconds)
        beside = (await running).latencies
        tally.facts = {
            "tail_quiet_ms": quiet.figures_ms(),
            "tail_beside_ms": beside.figures_ms(),
            "tail_p99_ratio": ratio(beside, quiet, "p99"),
        }
        return tally


@verb
def catch_up(
    size: TimedSizeOption = 1024,
    backlog: BacklogOption = BACKLOG_BYTES,
    tail_rate: Annotated[float, typer.Option(min=0, help="MB/s of a tail beside it; 0: alone.")] = 0.0,
) -> Load:
    """Reads a backlog that is larger than the broker's cache; with --tail-rate, what that does to a tail beside it."""
    return CatchUp(size, backlog, tail_rate)
