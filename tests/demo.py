"""`make demo`: a real cluster in one process, real flights, two kinds of subscription, and a SIGKILL.

It starts `magnetar standalone` with three bookies in a temporary directory on free ports, publishes the flights of
January 2013 keyed by tail number while a stream subscription and a key-ordered queue subscription with three consumers
read them, checks what they got, kills the server, starts it again and checks that all is still there. Exits 1 if a fact
fails.
"""

from __future__ import annotations

import asyncio
import gzip
import json
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from magnetar.client import EARLIEST, LATEST, Client, Message, MessageId, connect

FLIGHTS = Path(__file__).parent / "data" / "flights-2013-01.csv.gz"
TOPIC = "flights"
SHARDS = 4
PACED_OVER_S = 5.0
GROUP = 100
START_TIMEOUT_S = 30.0
FINISH_TIMEOUT_S = 30.0
QUIET_S = 1.0

console = Console()


@dataclass
class Server:
    """A standalone in a process of its own, killed by its process id."""

    data_dir: Path
    process: subprocess.Popen[str]
    address: str

    @classmethod
    def start(cls, data_dir: Path) -> Server:
        command = [
            str(Path(sys.executable).with_name("magnetar")), "standalone", "--data-dir", str(data_dir),
            "--port", "0", "--http-port", "0", "--bookies", "3", "--output", "json",
        ]  # fmt: skip
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        line = process.stdout.readline()
        if not line:
            raise SystemExit(f"the server did not start: exit code {process.wait(START_TIMEOUT_S)}")
        return cls(data_dir, process, json.loads(line)["server"])

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.wait(START_TIMEOUT_S)

    def stop(self) -> None:
        if self.process.poll() is None:
            self.process.terminate()
            self.process.wait(START_TIMEOUT_S)


@dataclass(frozen=True)
class Flight:
    row: int
    aircraft: str
    text: bytes


@dataclass
class Seen:
    """What one subscription got: each row as often as it came, and each aircraft's rows in the order they came."""

    times: Counter[int] = field(default_factory=Counter)
    order: dict[str, list[int]] = field(default_factory=dict)
    damaged: int = 0

    def take(self, message: Message, flights: list[Flight]) -> None:
        row = int(message.properties["row"])
        self.times[row] += 1
        self.order.setdefault(str(message.key), []).append(row)
        self.damaged += message.payload != flights[row].text

    def misses(self, flights: list[Flight]) -> bool:
        """Something is still to come. Once nothing is, consumers stay for a while: a duplicate would come late."""
        return self.times.total() < len(flights)

    def exactly_once(self, flights: list[Flight]) -> tuple[bool, str]:
        once = sum(1 for flight in flights if self.times[flight.row] == 1)
        ok = once == len(flights) == self.times.total() and not self.damaged
        return ok, f"exactly once {once:,} of {len(flights):,}"

    def ordered(self, flights: list[Flight]) -> tuple[bool, str]:
        aircraft = {flight.aircraft for flight in flights}
        kept = sum(1 for name in aircraft if (rows := self.order.get(name, [])) and rows == sorted(rows))
        return kept == len(aircraft) == len(self.order), f"order kept for {kept:,} aircraft"


def read_flights() -> list[Flight]:
    with gzip.open(FLIGHTS, "rb") as file:
        column = file.readline().rstrip().split(b",").index(b"tailnum")
        rows = [line.rstrip(b"\r\n") for line in file]
    return [Flight(number, row.split(b",")[column].decode(), row) for number, row in enumerate(rows)]


@dataclass
class Published:
    ids: list[MessageId]
    latencies_ms: list[float]
    seconds: float


def stopwatch(latencies_ms: list[float]) -> Callable[[object], None]:
    begin = time.perf_counter()
    return lambda _receipt: latencies_ms.append((time.perf_counter() - begin) * 1e3)


async def publish(client: Client, flights: list[Flight], bar: Progress) -> Published:
    """Sends the flights, spread evenly over some seconds, and waits until all of them are stored."""
    task = bar.add_task("published", total=len(flights))
    latencies: list[float] = []
    receipts = []
    begin = time.perf_counter()
    async with client.producer(TOPIC, compression="lz4") as producer:
        for first in range(0, len(flights), GROUP):
            group = flights[first : first + GROUP]
            for flight in group:
                receipt = producer.send_nowait(flight.text, key=flight.aircraft, properties={"row": str(flight.row)})
                receipt.add_done_callback(stopwatch(latencies))
                receipts.append(receipt)
            bar.advance(task, len(group))
            due = begin + PACED_OVER_S * (first + len(group)) / len(flights)
            await asyncio.sleep(max(0.0, due - time.perf_counter()))
        ids = [await receipt for receipt in receipts]
    return Published(ids, latencies, time.perf_counter() - begin)


async def read_stream(client: Client, flights: list[Flight], seen: Seen, bar: Progress) -> None:
    task = bar.add_task("read by the stream subscription", total=len(flights))
    async with client.stream_consumer(TOPIC, subscription="audit", start=EARLIEST) as consumer:
        while (messages := await consumer.receive_batch(max_messages=1000, timeout=QUIET_S)) or seen.misses(flights):
            for message in messages:
                seen.take(message, flights)
                consumer.ack(message)
            bar.update(task, completed=seen.times.total())


async def read_queue(client: Client, flights: list[Flight], seen: Seen, bar: Progress) -> None:
    task = bar.add_task("read by three queue consumers", total=len(flights))

    async def one_consumer() -> None:
        async with client.queue_consumer(TOPIC, subscription="boards", key_ordered=True, start=EARLIEST) as consumer:
            while (messages := await consumer.receive_batch(max_messages=500, timeout=QUIET_S)) or seen.misses(flights):
                for message in messages:
                    seen.take(message, flights)
                    consumer.ack(message)
                bar.update(task, completed=seen.times.total())

    async with asyncio.TaskGroup() as consumers:
        for _ in range(3):
            consumers.create_task(one_consumer())


async def first_half(address: str, flights: list[Flight]) -> tuple[Published, dict[str, Seen]]:
    """Publishes and reads at the same time."""
    seen = {"stream": Seen(), "queue, key-ordered": Seen()}
    columns = (TextColumn("{task.description:<34}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    async with connect(address) as client:
        await client.admin.topics.create(TOPIC, shards=SHARDS)
        # What all subscriptions have acknowledged is deleted. This one acknowledges nothing.
        await client.admin.subscriptions.create(TOPIC, "archive", start=EARLIEST)
        with Progress(*columns, console=console) as bar:
            async with asyncio.timeout(PACED_OVER_S + FINISH_TIMEOUT_S), asyncio.TaskGroup() as group:
                group.create_task(read_stream(client, flights, seen["stream"], bar))
                group.create_task(read_queue(client, flights, seen["queue, key-ordered"], bar))
                published = await publish(client, flights, bar)
    return published, seen


async def second_half(address: str, flights: list[Flight], ids: list[MessageId]) -> list[tuple[bool, str]]:
    """After the crash: every message under the id it was acknowledged with, and no acknowledgement undone."""
    stored: dict[MessageId, bytes] = {}
    async with connect(address) as client:
        async with client.reader(TOPIC, start=EARLIEST, stop=LATEST) as reader:
            async for message in reader:
                stored[message.id] = message.payload
        same = sum(1 for flight, id in zip(flights, ids, strict=True) if stored.get(id) == flight.text)
        facts = [
            (
                same == len(flights) == len(stored),
                f"{same:,} of {len(flights):,} messages under the ids they were given",
            )
        ]
        for subscription in ("audit", "boards"):
            backlog = (await client.admin.subscriptions.describe(TOPIC, subscription)).backlog_messages
            facts.append((backlog == 0, f"subscription {subscription}: {backlog:,} acknowledgements undone"))
    return facts


def report(published: Published, seen: dict[str, Seen], flights: list[Flight]) -> list[tuple[bool, str]]:
    """Prints the table, returns the facts in it."""
    latencies = sorted(published.latencies_ms)
    megabytes = sum(len(flight.text) for flight in flights) / 1e6
    table = Table(title="27,004 flights of January 2013, three fsynced copies of each", title_justify="left")
    for column in ("messages", "MB/s", "publish p50", "publish p99"):
        table.add_column(column, justify="right")
    table.add_row(
        f"{len(published.ids):,}", f"{megabytes / published.seconds:.2f} (paced)",
        f"{latencies[len(latencies) // 2]:.1f} ms", f"{latencies[int(len(latencies) * 0.99)]:.1f} ms",
    )  # fmt: skip
    console.print(table)
    facts = []
    for name, one in seen.items():
        for ok, text in (one.exactly_once(flights), one.ordered(flights)):
            facts.append((ok, f"{name}: {text}"))
    return facts


def show(facts: list[tuple[bool, str]]) -> bool:
    for ok, text in facts:
        console.print(f"  [{'green' if ok else 'red'}]{'ok    ' if ok else 'FAILED'}[/] {text}", highlight=False)
    return all(ok for ok, _ in facts)


def main() -> int:
    flights = read_flights()
    with tempfile.TemporaryDirectory(prefix="magnetar-demo-") as folder:
        server = Server.start(Path(folder))
        try:
            published, seen = asyncio.run(first_half(server.address, flights))
            ok = show(report(published, seen, flights))
            console.print("\nSIGKILL to the server, and a new start on the same directory")
            server.kill()
            begin = time.perf_counter()
            server = Server.start(Path(folder))
            facts = asyncio.run(second_half(server.address, flights, published.ids))
            ok &= show(facts)
            console.print(f"  started and read everything in {time.perf_counter() - begin:.1f} s", highlight=False)
        finally:
            server.stop()
    console.print("all facts hold" if ok else "[red]a fact failed[/]")
    return 0 if ok else 1


if __name__ == "__main__":
    sys.exit(main())
