"""`magnetar bench consume`: what is in the broker's cache, by one stream subscription or several at once."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Annotated

import typer

from magnetar.cli.bench.backlog import Backlog, Form, FormOption, Left, drain, new_backlog
from magnetar.cli.bench.load import Load, Ready, Tally
from magnetar.cli.bench.target import Target
from magnetar.cli.bench.verb import BacklogOption, SizeOption, verb

if TYPE_CHECKING:
    from magnetar.client import Client

BACKLOG_BYTES = 32_000_000
"""Fits into a broker's cache as it is by default."""
SUBSCRIPTIONS_MAX = 1000


@dataclass(frozen=True, slots=True)
class Consume(Load):
    """Each pass makes subscriptions that begin at the beginning, and takes all messages on each of them."""

    size: int
    bytes: int
    form: Form
    subscriptions: int

    verb = "consume"

    @asynccontextmanager
    async def ready(self, client: Client, target: Target) -> AsyncIterator[Ready]:
        async with new_backlog(client, self.size, self.bytes) as backlog:
            yield Ready(backlog.topic, partial(self._run, client, backlog))

    async def _run(self, client: Client, backlog: Backlog, seconds: float) -> Tally:
        tally = Tally()
        end = time.perf_counter() + seconds
        while not tally.messages or time.perf_counter() < end:
            names = [f"pass-{number}" for number in range(self.subscriptions)]
            begin = time.perf_counter()
            async with asyncio.TaskGroup() as passes:
                for name in names:
                    passes.create_task(self._pass(client, backlog, name))
            tally.elapsed_s += time.perf_counter() - begin
            messages = backlog.messages * self.subscriptions
            tally.add(messages, messages * backlog.size)
            for name in names:
                await client.admin.subscriptions.delete(backlog.topic, name)
        return tally

    async def _pass(self, client: Client, backlog: Backlog, name: str) -> None:
        """Ends when all is taken and what was acknowledged is durable."""
        from magnetar.client import EARLIEST

        async with client.stream_consumer(backlog.topic, subscription=name, start=EARLIEST) as consumer:
            await drain(consumer, self.form, Left(backlog.messages), individually=False)


@verb
def consume(
    size: SizeOption = 100,
    backlog: BacklogOption = BACKLOG_BYTES,
    form: FormOption = Form.batches,
    subscriptions: Annotated[
        int, typer.Option(min=1, max=SUBSCRIPTIONS_MAX, help="That all get all messages, at the same time.")
    ] = 1,
) -> Load:
    """Takes a backlog from the broker's cache, again and again, after the publisher has stopped."""
    return Consume(size, backlog, form, subscriptions)
