"""`magnetar bench queue`: a backlog divided between the consumers of one queue, each message acknowledged by itself."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Annotated

import typer

from magnetar.cli.bench.backlog import Backlog, Form, FormOption, Left, drain_together, new_backlog
from magnetar.cli.bench.load import Load, Ready, Tally
from magnetar.cli.bench.target import Target
from magnetar.cli.bench.verb import BacklogOption, SizeOption, verb

if TYPE_CHECKING:
    from magnetar.client import Client

BACKLOG_BYTES = 32_000_000
PREFETCH = 20_000
"""Messages that wait at a consumer for its user, as for a fast one."""
CONSUMERS_MAX = 1000


@dataclass(frozen=True, slots=True)
class Queue(Load):
    """Each pass makes a queue that begins at the beginning, and takes and acknowledges all messages."""

    size: int
    bytes: int
    form: Form
    consumers: int
    prefetch: int

    verb = "queue"

    @asynccontextmanager
    async def ready(self, client: Client, target: Target) -> AsyncIterator[Ready]:
        async with new_backlog(client, self.size, self.bytes) as backlog:
            yield Ready(backlog.topic, partial(self._run, client, backlog))

    async def _run(self, client: Client, backlog: Backlog, seconds: float) -> Tally:
        tally = Tally()
        end = time.perf_counter() + seconds
        while not tally.messages or time.perf_counter() < end:
            begin = time.perf_counter()
            await self._pass(client, backlog)
            tally.elapsed_s += time.perf_counter() - begin
            tally.add(backlog.messages, backlog.messages * backlog.size)
            await client.admin.subscriptions.delete(backlog.topic, "pass")
        return tally

    async def _pass(self, client: Client, backlog: Backlog) -> None:
        """Ends when all is taken and every acknowledgement is durable."""
        from magnetar.client import EARLIEST

        async with AsyncExitStack() as stack:
            consumers = [
                await stack.enter_async_context(
                    client.queue_consumer(backlog.topic, subscription="pass", prefetch=self.prefetch, start=EARLIEST)
                )
                for _ in range(self.consumers)
            ]
            await drain_together([*consumers], self.form, Left(backlog.messages), individually=True)


@verb
def queue(
    size: SizeOption = 100,
    backlog: BacklogOption = BACKLOG_BYTES,
    form: FormOption = Form.messages,
    consumers: Annotated[int, typer.Option(min=1, max=CONSUMERS_MAX, help="That share the queue.")] = 1,
    prefetch: Annotated[
        int, typer.Option(min=1, max=1_000_000, help="Messages that wait at each consumer.")
    ] = PREFETCH,
) -> Load:
    """Takes a backlog by a queue, each message acknowledged by itself, until all acknowledgements are durable."""
    return Queue(size, backlog, form, consumers, prefetch)
