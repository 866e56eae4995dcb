"""Clients of a cluster under test, in processes of their own, and what they saw.

`python workload.py publish|consume CONFIG` writes its history into a file (`history.py` says how) and its progress, a
JSON line now and then, to stdout. SIGTERM ends it in order: producers wait for what they have sent, consumers for what
they have acknowledged.

Producers are closed loops: each keeps a window of messages under way, and is as fast as the answers come.
"""

from __future__ import annotations

import asyncio
import json
import signal
import sys
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random
from typing import Any, TextIO

from magnetar.client import (
    EARLIEST,
    Acknowledgement,
    Batching,
    MagnetarError,
    Message,
    QueueConsumer,
    Receipt,
    StreamConsumer,
    connect,
)

PROGRESS_S = 0.2
RECEIVE_MESSAGES = 500
RECEIVE_S = 0.2
PADDING_MAX = 200
STREAM, QUEUE = "stream", "queue"
GROUPS = (1, 50, 50, 200, 50)
KEYLESS = 4
"""The number of the producer whose messages have no key; it has no name either, and so is bound to no shard."""


@dataclass(frozen=True, slots=True)
class PublishConfig:
    """`groups`: for each producer how many messages it hands over at a time; every second producer has a name.

    window     groups that each producer has under way
    timeout_s  of the client: an error before that is one that users would see
    """

    servers: str
    topic: str
    history: str
    groups: tuple[int, ...] = GROUPS
    window: int = 4
    keys: int = 20
    timeout_s: float = 90.0


@dataclass(frozen=True, slots=True)
class ConsumeConfig:
    """Consumers of one subscription."""

    servers: str
    topic: str
    history: str
    subscription: str
    kind: str
    consumers: int
    timeout_s: float = 90.0


class Recorder:
    """Writes events, and the progress that is asked for from outside."""

    def __init__(self, file: TextIO) -> None:
        self._file = file
        self.progress: dict[str, int] = defaultdict(int)

    def event(self, event: str, at: float | None = None, **facts: object) -> None:
        time_s = time.monotonic() if at is None else at
        self._file.write(json.dumps({"event": event, "time": time_s, **facts}, separators=(",", ":")) + "\n")

    def count(self, what: str, number: int) -> None:
        self.progress[what] += number

    async def report(self) -> None:
        """Tells the progress for ever."""
        while True:
            self.tell()
            await asyncio.sleep(PROGRESS_S)

    def tell(self) -> None:
        self._file.flush()
        sys.stdout.write(json.dumps(self.progress) + "\n")
        sys.stdout.flush()


# --- producers ---


@dataclass(slots=True)
class Publisher:
    config: PublishConfig
    number: int
    recorder: Recorder
    stop: asyncio.Event

    async def run(self) -> None:
        config, number = self.config, self.number
        name = f"producer{number}" if number % 2 else None
        keys = 0 if number == KEYLESS else config.keys
        self.recorder.event("producer", producer=number, name=name, keys=keys)
        window = asyncio.Semaphore(config.window)
        group = config.groups[number]
        random = Random(number)
        padding = b"." * PADDING_MAX
        first = 0
        async with connect(config.servers, timeout=config.timeout_s) as client:
            producer = client.producer(config.topic, name=name, batching=Batching(max_messages=1000))
            async with producer, asyncio.TaskGroup() as settling:
                while not self.stop.is_set():
                    await window.acquire()
                    sent_at = time.monotonic()
                    receipts = []
                    for n in range(first, first + group):
                        payload = b"%d:%d:" % (number, n) + padding[: random.randrange(PADDING_MAX)]
                        key = f"{number}/{n % keys}" if keys else None
                        receipts.append(producer.send_nowait(payload, key=key))
                    self.recorder.event("sent", sent_at, producer=number, count=group)
                    self.recorder.count("sent", group)
                    settling.create_task(self._settle(first, receipts, window))
                    first += group
                    # A window that is never full must not keep the loop from reading answers.
                    await asyncio.sleep(0)

    async def _settle(self, first: int, receipts: Sequence[Receipt], window: asyncio.Semaphore) -> None:
        numbers, shards, offsets, failed = [], [], [], []
        error = None
        for number, receipt in enumerate(receipts, first):
            try:
                id = await receipt
            except MagnetarError as failure:
                error = failure
                failed.append(number)
            else:
                numbers.append(number)
                shards.append(id.shard)
                offsets.append(id.offset)
        window.release()
        if numbers:
            self.recorder.event("answered", producer=self.number, numbers=numbers, shards=shards, offsets=offsets)
            self.recorder.count("answered", len(numbers))
        if failed:
            told = f"{type(error).__name__}: {error}"
            self.recorder.event("failed", producer=self.number, numbers=failed, error=told)
            self.recorder.count("failed", len(failed))


async def publish(config: PublishConfig, recorder: Recorder, stop: asyncio.Event) -> None:
    async with asyncio.TaskGroup() as group:
        for number in range(len(config.groups)):
            group.create_task(Publisher(config, number, recorder, stop).run())


# --- consumers ---


@dataclass(slots=True)
class Reading:
    """One consumer: notes what it gets, and acknowledges it."""

    config: ConsumeConfig
    name: str
    recorder: Recorder
    stop: asyncio.Event

    async def run(self, consumer: StreamConsumer | QueueConsumer) -> None:
        subscription = self.config.subscription
        self.recorder.event("consumer", subscription=subscription, consumer=self.name, kind=self.config.kind)
        async with consumer, asyncio.TaskGroup() as settling:
            self.recorder.count("consumers", 1)
            while not self.stop.is_set():
                messages = await consumer.receive_batch(RECEIVE_MESSAGES, timeout=RECEIVE_S)
                if not messages:
                    continue
                for shard, of_shard in _by_shard(messages).items():
                    offsets = self._note(shard, of_shard)
                    acked = of_shard[-1:] if self.config.kind == STREAM else of_shard
                    acks = [consumer.ack(message) for message in acked]
                    settling.create_task(self._settle(shard, offsets, acks, time.monotonic()))
                await asyncio.sleep(0)

    def _note(self, shard: int, messages: Sequence[Message]) -> list[int | None]:
        sent = [message.payload.split(b":", 2) for message in messages]
        offsets = [message.id.offset for message in messages]
        self.recorder.event(
            "delivered", subscription=self.config.subscription, consumer=self.name, shard=shard, offsets=offsets,
            producers=[int(parts[0]) for parts in sent], numbers=[int(parts[1]) for parts in sent],
        )  # fmt: skip
        self.recorder.count("delivered", len(messages))
        return offsets

    async def _settle(
        self, shard: int, offsets: list[int | None], acks: Sequence[Acknowledgement], asked: float
    ) -> None:
        for ack in acks:
            await ack
        which: dict[str, Any] = {"through": offsets[-1]} if self.config.kind == STREAM else {"offsets": offsets}
        self.recorder.event(
            "acked", subscription=self.config.subscription, consumer=self.name, shard=shard, asked=asked, **which
        )
        self.recorder.count("acked", len(offsets))


def _by_shard(messages: Sequence[Message]) -> dict[int, list[Message]]:
    found: defaultdict[int, list[Message]] = defaultdict(list)
    for message in messages:
        found[message.id.shard].append(message)
    return found


async def consume(config: ConsumeConfig, recorder: Recorder, stop: asyncio.Event) -> None:
    async with connect(config.servers, timeout=config.timeout_s) as client, asyncio.TaskGroup() as group:
        for number in range(config.consumers):
            reading = Reading(config, f"{config.subscription}/{number}", recorder, stop)
            if config.kind == STREAM:
                stream = client.stream_consumer(config.topic, subscription=config.subscription, start=EARLIEST)
                group.create_task(reading.run(stream))
            else:
                queue = client.queue_consumer(
                    config.topic, subscription=config.subscription, key_ordered=True, start=EARLIEST
                )
                group.create_task(reading.run(queue))


# --- a process of them ---


async def run(config: PublishConfig | ConsumeConfig, recorder: Recorder) -> None:
    """Until SIGTERM."""
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    reporting = asyncio.create_task(recorder.report())
    try:
        if isinstance(config, PublishConfig):
            await publish(config, recorder, stop)
        else:
            await consume(config, recorder, stop)
    finally:
        reporting.cancel()
        recorder.tell()


def main(kind: str, facts: str) -> None:
    config = (PublishConfig if kind == "publish" else ConsumeConfig)(**json.loads(facts))
    with Path(config.history).open("w") as file:
        asyncio.run(run(config, Recorder(file)))


def command(config: PublishConfig | ConsumeConfig) -> list[str]:
    """What starts a process of clients."""
    kind = "publish" if isinstance(config, PublishConfig) else "consume"
    return [sys.executable, __file__, kind, json.dumps(asdict(config))]


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
