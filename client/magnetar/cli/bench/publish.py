"""`magnetar bench publish`: as much as goes, or at a rate, in the three ways to send."""

from __future__ import annotations

import asyncio
import enum
import time
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from magnetar.cli.bench.load import Load, Ready, Tally
from magnetar.cli.bench.payloads import Payloads, generated, rows_of
from magnetar.cli.bench.schedule import Schedule
from magnetar.cli.bench.target import Target
from magnetar.cli.bench.topics import TOPICS_MAX, new_producers, new_topics
from magnetar.cli.bench.verb import RateOption, SizeOption, verb
from magnetar.cli.command import EXIT_USAGE, CommandFailed
from magnetar.cli.produce import Compression

if TYPE_CHECKING:
    from magnetar.client import Client, Producer, Receipt

IN_FLIGHT_MAX = 10_000
IN_FLIGHT_AT_A_RATE = 1024
IN_FLIGHT_MANY = 8
NOWAIT_BURST = 100
"""Calls of send_nowait between two looks at the clock; the last one's latency is recorded."""
RECEIPTS_MAX = 1000
"""Of bursts, of which the oldest is waited for when the producer's budget is used up."""


class Mode(enum.StrEnum):
    many = "many"
    nowait = "nowait"
    single = "single"


@dataclass(frozen=True, slots=True)
class Publish(Load):
    """batch   messages of a call of send_many; of one batch at most in the other modes, None: as the client batches
    rate    messages a second, 0: as many as go
    file    rows of it are the payloads, instead of `size` bytes
    """

    size: int = 1024
    mode: Mode = Mode.many
    batch: int | None = None
    in_flight: int = IN_FLIGHT_MANY
    keys: int = 0
    topics: int = 1
    rate: float = 0.0
    compression: Compression = Compression.none
    file: str | None = None
    key_column: str | None = None

    verb = "publish"

    @property
    def fills_disk(self) -> bool:
        return self.compression is Compression.none

    @asynccontextmanager
    async def ready(self, client: Client, target: Target) -> AsyncIterator[Ready]:
        from magnetar.client import Batching

        group = {Mode.many: self.batch or 1000, Mode.nowait: NOWAIT_BURST, Mode.single: 1}[self.mode]
        batching = Batching(max_messages=self.batch) if self.batch and self.mode is not Mode.many else Batching()
        payloads = self._payloads(group)
        async with (
            new_topics(client, self.topics) as topics,
            new_producers(client, topics, compression=self.compression.value, batching=batching) as producers,
        ):
            yield Ready(topics[0], partial(self._run, producers, payloads, group))

    def _payloads(self, group: int) -> Payloads:
        if self.file is not None:
            return rows_of(Path(self.file), self.key_column, group)
        return generated(self.size, self.keys, group, compressible=self.compression is not Compression.none)

    async def _run(self, producers: list[Producer], payloads: Payloads, group: int, seconds: float) -> Tally:
        tally = Tally()
        send = {Mode.many: _send_many, Mode.nowait: _send_nowait, Mode.single: _send_single}[self.mode]
        begin = time.perf_counter()
        schedule = Schedule(seconds, self.rate / group)
        turns = _Turns(producers)
        async with asyncio.TaskGroup() as workers:
            for _ in range(1 if self.mode is Mode.nowait else self.in_flight):
                workers.create_task(send(schedule, turns, payloads, tally))
        for producer in producers:
            await producer.flush()
        tally.elapsed_s = time.perf_counter() - begin
        return tally


class _Turns:
    """The producers in turn."""

    def __init__(self, producers: list[Producer]) -> None:
        self._producers = producers
        self._next = 0

    def next(self) -> Producer:
        producer = self._producers[self._next]
        self._next = (self._next + 1) % len(self._producers)
        return producer


async def _send_many(schedule: Schedule, turns: _Turns, payloads: Payloads, tally: Tally) -> None:
    while (due := await schedule.next()) is not None:
        group = payloads.next()
        await turns.next().send_many(group.payloads, keys=group.keys)
        tally.latencies.record(time.perf_counter() - due)
        tally.add(len(group.payloads), group.payload_bytes)


async def _send_single(schedule: Schedule, turns: _Turns, payloads: Payloads, tally: Tally) -> None:
    while (due := await schedule.next()) is not None:
        group = payloads.next()
        await turns.next().send(group.payloads[0], key=group.keys[0] if group.keys else None)
        tally.latencies.record(time.perf_counter() - due)
        tally.add(1, group.payload_bytes)


async def _send_nowait(schedule: Schedule, turns: _Turns, payloads: Payloads, tally: Tally) -> None:
    from magnetar.client import QueueFull

    def stored(due: float, _receipt: Receipt) -> None:
        tally.latencies.record(time.perf_counter() - due)

    receipts: deque[Receipt] = deque(maxlen=RECEIPTS_MAX)
    while (due := await schedule.next()) is not None:
        group, producer = payloads.next(), turns.next()
        receipt: Receipt | None = None
        for payload, key in zip(group.payloads, group.keys or [None] * NOWAIT_BURST, strict=True):
            while True:
                try:
                    receipt = producer.send_nowait(payload, key=key)
                    break
                except QueueFull:
                    await (receipts.popleft() if receipts else producer.flush())
        assert receipt is not None
        receipt.add_done_callback(partial(stored, due))
        receipts.append(receipt)
        tally.add(len(group.payloads), group.payload_bytes)
        await asyncio.sleep(0)


@verb
def publish(
    size: SizeOption = 1024,
    mode: Annotated[
        Mode, typer.Option(help="many: send_many. nowait: send_nowait. single: send, awaited.")
    ] = Mode.many,
    batch: Annotated[
        int | None,
        typer.Option(min=1, max=100_000, help="Messages of one send_many, 1000; of a batch at most in other modes."),
    ] = None,
    in_flight: Annotated[
        int | None,
        typer.Option(min=1, max=IN_FLIGHT_MAX, help="Calls under way at once: many 8, single 1, at a rate 1024."),
    ] = None,
    keys: Annotated[int, typer.Option(min=0, max=1_000_000, help="Distinct keys; 0 sends without keys.")] = 0,
    topics: Annotated[int, typer.Option(min=1, max=TOPICS_MAX, help="Spread over so many topics, in turn.")] = 1,
    rate: RateOption = 0.0,
    compression: Annotated[Compression, typer.Option(help="Payloads are random unless it is set.")] = Compression.none,
    file: Annotated[
        Path | None,
        typer.Option(exists=True, dir_okay=False, help="Send the rows of this CSV file, .gz or not, without --size."),
    ] = None,
    key_column: Annotated[str | None, typer.Option(help="Column of --file that has the keys.")] = None,
) -> Load:
    """Publishes: rate, latency, CPU, memory and bytes written, next to the machine's own limits."""
    if key_column is not None and file is None:
        raise CommandFailed("--key-column needs --file: it names one of its columns", EXIT_USAGE)
    if in_flight is None:
        in_flight = IN_FLIGHT_AT_A_RATE if rate else IN_FLIGHT_MANY if mode is Mode.many else 1
    return Publish(
        size, mode, batch, in_flight, keys, topics, rate, compression, str(file) if file else None, key_column
    )
