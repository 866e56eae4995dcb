"""A tail: messages at a constant rate, and a consumer that takes each of them as soon as it comes."""

from __future__ import annotations

import asyncio
import os
import struct
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from magnetar.cli.bench.latencies import Latencies
from magnetar.cli.bench.load import Tally

if TYPE_CHECKING:
    from magnetar.client import Client, Producer, StreamConsumer

TICK_S = 0.001
"""Messages that are due by then are sent together."""
DUE = struct.Struct("<d")
"""The first bytes of each payload: when it was due, on this process's clock."""
ARRIVE_S = 30.0
"""How long what was sent may take to come."""


class Tail:
    """Latencies count from when a message was due until it is in the hands of the consumer's user."""

    def __init__(self, producer: Producer, consumer: StreamConsumer, size: int, per_s: float) -> None:
        self._producer = producer
        self._consumer = consumer
        self._filler = os.urandom(max(0, size - DUE.size))
        self._per_s = per_s
        self._tally = Tally()
        self._sent = 0
        self._came = asyncio.Event()

    async def run(self, seconds: float) -> Tally:
        """Sends for so long; returns when all of it was received. Raises TimeoutError."""
        self._tally, self._sent = Tally(), 0
        begin = time.perf_counter()
        await self._send(begin, seconds)
        async with asyncio.timeout(ARRIVE_S):
            while self._tally.messages < self._sent:
                self._came.clear()
                await self._came.wait()
        self._tally.elapsed_s = time.perf_counter() - begin
        return self._tally

    async def _send(self, begin: float, seconds: float) -> None:
        from magnetar.client import QueueFull

        while (passed := time.perf_counter() - begin) < seconds:
            due_by_now = int(passed * self._per_s) + 1
            while self._sent < due_by_now:
                payload = DUE.pack(begin + self._sent / self._per_s) + self._filler
                try:
                    self._producer.send_nowait(payload)
                    self._sent += 1
                except QueueFull:
                    await self._producer.flush()
            next_due = begin + self._sent / self._per_s
            await asyncio.sleep(max(TICK_S, next_due - time.perf_counter()))
        await self._producer.flush()

    async def receive(self) -> None:
        """Until it is cancelled."""
        async for batch in self._consumer.batches():
            now = time.perf_counter()
            tally = self._tally
            for payload in batch.payloads:
                tally.latencies.record(now - DUE.unpack_from(payload)[0])
                tally.add(1, len(payload))
            self._consumer.ack(batch)
            self._came.set()


@asynccontextmanager
async def new_tail(
    client: Client, topic: str, size: int, per_s: float, compression: str = "none"
) -> AsyncIterator[Tail]:
    async with (
        client.producer(topic, compression=compression) as producer,  # type: ignore[arg-type]
        client.stream_consumer(topic, subscription="tail") as consumer,
    ):
        tail = Tail(producer, consumer, size, per_s)
        receiving = asyncio.create_task(tail.receive())
        try:
            yield tail
        finally:
            receiving.cancel()
            await asyncio.gather(receiving, return_exceptions=True)


def ratio(beside: Latencies, quiet: Latencies, percentile: str) -> float | None:
    """How many times as long as in quiet; None if one of them has no latencies."""
    slow, fast = beside.figures_ms().get(percentile), quiet.figures_ms().get(percentile)
    return round(slow / fast, 2) if slow and fast else None
