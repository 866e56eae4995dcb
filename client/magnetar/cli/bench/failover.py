"""`magnetar bench failover`: publishing at a rate while a broker is killed, or a bookie stopped."""

from __future__ import annotations

import asyncio
import enum
import signal
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Annotated

import typer

from magnetar.cli.bench.load import Load, Ready, Tally
from magnetar.cli.bench.payloads import Payloads, generated
from magnetar.cli.bench.schedule import Schedule
from magnetar.cli.bench.tail import ratio
from magnetar.cli.bench.target import Target
from magnetar.cli.bench.topics import new_topics
from magnetar.cli.bench.verb import SizeOption, verb
from magnetar.cli.command import EXIT_USAGE, CommandFailed
from magnetar.cli.local_cluster import Size

if TYPE_CHECKING:
    from magnetar.client import Client, Producer

IN_FLIGHT = 10_000
"""Sends that may wait for the fault to pass; those that are due after them wait here, and count from when they were."""


class Fault(enum.StrEnum):
    broker = "broker"
    bookie = "bookie"


@dataclass(frozen=True, slots=True)
class Failover(Load):
    """A run publishes for its seconds in quiet, then for as long from the fault on; `latency_ms` are those of then."""

    size: int
    rate: float
    fault: Fault

    verb = "failover"
    cluster = "3,2"

    def check(self, local: Size | None, runs: int) -> None:
        if local is None:
            raise CommandFailed("failover kills what it started: give it --local BOOKIES,BROKERS", EXIT_USAGE)
        if self.fault is Fault.broker and local.brokers <= runs:
            raise CommandFailed(
                f"each run kills a broker for good, and one must be left: --local {local.bookies},{runs + 1}",
                EXIT_USAGE,
            )
        if self.fault is Fault.bookie and local.bookies < 3:
            raise CommandFailed("a stopped bookie leaves no quorum: --local 3,1 at least", EXIT_USAGE)

    @property
    def fills_disk(self) -> bool:
        return True

    @asynccontextmanager
    async def ready(self, client: Client, target: Target) -> AsyncIterator[Ready]:
        async with new_topics(client) as [topic], client.producer(topic) as producer:
            publishing = _Publishing(producer, generated(self.size, 0, 1), self.rate)
            yield Ready(topic, partial(self._run, client, target, topic, publishing), warm_up=publishing.run)

    async def _run(self, client: Client, target: Target, topic: str, publishing: _Publishing, seconds: float) -> Tally:
        quiet = await publishing.run(seconds)
        victim = target.member(await self._victim(client, topic)).process
        publishing.longest_pause_s, publishing.last_stored = 0.0, time.perf_counter()
        victim.send_signal(signal.SIGKILL if self.fault is Fault.broker else signal.SIGSTOP)
        try:
            tally = await publishing.run(seconds)
        finally:
            if self.fault is Fault.bookie:
                victim.send_signal(signal.SIGCONT)
        tally.add(quiet.messages, quiet.payload_bytes)
        tally.elapsed_s += quiet.elapsed_s
        tally.facts = {
            "quiet_ms": quiet.latencies.figures_ms(),
            "pause_s": round(publishing.longest_pause_s, 3),
            "p999_ratio": ratio(tally.latencies, quiet.latencies, "p999"),
        }
        return tally

    async def _victim(self, client: Client, topic: str) -> str:
        """The process that owns the topic's shard, or one that stores it."""
        [shard] = (await client.admin.topics.describe(topic)).shards
        return str(shard.owner) if self.fault is Fault.broker else shard.segments[-1].ensemble[0]


class _Publishing:
    """Messages at a rate, each by itself, and the longest time in which none was stored."""

    def __init__(self, producer: Producer, payloads: Payloads, per_s: float) -> None:
        self._producer = producer
        self._payload = payloads.next().payloads[0]
        self._per_s = per_s
        self.last_stored = time.perf_counter()
        self.longest_pause_s = 0.0

    async def run(self, seconds: float) -> Tally:
        tally = Tally()
        begin = time.perf_counter()
        schedule = Schedule(seconds, self._per_s)
        room = asyncio.Semaphore(IN_FLIGHT)
        async with asyncio.TaskGroup() as sends:
            while (due := await schedule.next()) is not None:
                await room.acquire()
                sends.create_task(self._send(due, tally, room))
        tally.elapsed_s = time.perf_counter() - begin
        return tally

    async def _send(self, due: float, tally: Tally, room: asyncio.Semaphore) -> None:
        await self._producer.send(self._payload)
        room.release()
        now = time.perf_counter()
        self.longest_pause_s = max(self.longest_pause_s, now - self.last_stored)
        self.last_stored = now
        tally.latencies.record(now - due)
        tally.add(1, len(self._payload))


@verb
def failover(
    size: SizeOption = 1024,
    rate: Annotated[float, typer.Option(min=1.0, help="Messages a second.")] = 1000.0,
    fault: Annotated[
        Fault, typer.Option(help="broker: SIGKILL of the topic's owner. bookie: SIGSTOP of one that stores it.")
    ] = Fault.broker,
) -> Load:
    """Publishes at a rate on a cluster of its own, before and after a fault: the pause, and percentiles of both."""
    return Failover(size, rate, fault)
