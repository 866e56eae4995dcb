"""`magnetar bench`: how fast this cluster is, and how fast the machine under it could be."""

from __future__ import annotations

import asyncio
import enum
import fcntl
import os
import random
import shutil
import tempfile
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager, suppress
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from magnetar.cli.command import (
    DEFAULT_TIMEOUT_S,
    EXIT_USAGE,
    CommandFailed,
    DryRunOption,
    Output,
    OutputOption,
    TimeoutOption,
    directory,
    find_server,
    run,
)
from magnetar.cli.local_cluster import Member, Size, local_cluster, parse_local
from magnetar.cli.output import emit_json, emit_table, note
from magnetar.cli.produce import Compression

if TYPE_CHECKING:
    from magnetar.cli.machine import ProcessFigures
    from magnetar.client import Client, Producer, Receipt

app = typer.Typer(help="How fast this cluster is, next to what the machine could do.", no_args_is_help=True)


WARM_UP_S = 1.0
PAYLOAD_POOL_BYTES = 8 << 20
LATENCY_SAMPLES_MAX = 1_000_000
NOWAIT_SAMPLE_EVERY = 100
TOPICS_OPENED_AT_ONCE = 64
FOLDER_PREFIX = "magnetar-bench-"
CLIENT = "client"
"""This process among the measured ones."""


class Mode(enum.StrEnum):
    many = "many"
    nowait = "nowait"
    single = "single"


@dataclass(frozen=True, slots=True)
class Plan:
    """What to run. Sizes in bytes, time in seconds."""

    size: int
    seconds: float
    mode: Mode
    batch: int
    in_flight: int
    keys: int
    topics: int
    compression: str


@dataclass(slots=True)
class Counted:
    messages: int = 0
    latencies_s: list[float] = field(default_factory=list)

    def add(self, messages: int, latency_s: float) -> None:
        self.messages += messages
        if len(self.latencies_s) < LATENCY_SAMPLES_MAX:
            self.latencies_s.append(latency_s)

    def add_receipt(self, begin: float, _receipt: Receipt) -> None:
        """A sampled message is stored; all are counted where they are sent."""
        self.add(0, time.perf_counter() - begin)


@app.callback()
def options() -> None:
    """How fast this cluster is, next to what the machine could do."""


LOCAL = "3,1"


@app.command()
def publish(
    context: typer.Context,
    server: Annotated[
        str | None, typer.Option(envvar="MAGNETAR_SERVER", help="Measure this cluster; else --local.")
    ] = None,
    local: Annotated[
        str | None,
        typer.Option(help="BOOKIES,BROKERS of a cluster started for the run, each in a process of its own; 3,1."),
    ] = None,
    data_dir: Annotated[
        Path, typer.Option(parser=directory, metavar="DIR", help="Where the cluster of --local keeps its data.")
    ] = Path("."),
    size: Annotated[int, typer.Option(min=0, max=5 << 20, help="Bytes of one payload.")] = 1024,
    seconds: Annotated[float, typer.Option(min=0.1, help="Length of the run.")] = 10.0,
    mode: Annotated[
        Mode, typer.Option(help="many: send_many. nowait: send_nowait. single: one at a time.")
    ] = Mode.many,
    batch: Annotated[int, typer.Option(min=1, max=100_000, help="Messages of one send_many.")] = 1000,
    in_flight: Annotated[int, typer.Option(min=1, max=1024, help="Calls of send_many under way at once.")] = 8,
    keys: Annotated[int, typer.Option(min=0, help="Distinct keys; 0 sends without keys.")] = 0,
    topics: Annotated[int, typer.Option(min=1, max=10_000, help="Spread over so many topics.")] = 1,
    compression: Annotated[Compression, typer.Option(help="Payloads are random unless it is set.")] = Compression.none,
    dry_run: DryRunOption = False,
    output: OutputOption = Output.table,
    timeout: TimeoutOption = DEFAULT_TIMEOUT_S,
) -> None:
    """Publishes for some seconds; prints rate, latency, CPU, memory, bytes written, and the machine's own limits."""
    plan = Plan(size, seconds, mode, batch, in_flight, keys, topics, compression.value)
    if local is not None and server is not None:
        source = context.get_parameter_source("server")
        if source is not None and source.name == "COMMANDLINE":
            raise CommandFailed("--server and --local exclude each other: measure a cluster, or start one", EXIT_USAGE)
        server = None  # The variable is there for other commands.
    cluster_size = parse_local(local or LOCAL)
    if dry_run:
        where = (
            server
            or f"a new cluster of {cluster_size.bookies} bookies and {cluster_size.brokers} brokers in {data_dir}"
        )
        settings = {**asdict(plan), "mode": mode.value, "local": server is None}
        if output is Output.json:
            emit_json({"test": "publish", "settings": settings, "server": server, "dry_run": True})
        else:
            note(f"would publish for {seconds:g} s to {where}: " + ", ".join(f"{k}={v}" for k, v in settings.items()))
        return

    async def main() -> dict[str, Any]:
        if server is not None:
            await find_server(server, timeout)
        with _cluster(server, cluster_size, data_dir) as cluster:
            return await _publish(plan, cluster, timeout)

    result = run(main())
    if output is Output.json:
        emit_json(result)
    else:
        _show(result)


@dataclass(frozen=True, slots=True)
class Measured:
    """The cluster to measure. `members`: its processes, if this command started them. `folder`: whose disk to probe."""

    servers: str
    folder: Path
    members: Sequence[Member] = ()


@contextmanager
def _cluster(server: str | None, size: Size, data_dir: Path) -> Iterator[Measured]:
    """The cluster at `server`, or one of its own that ends, with its data, when this does."""
    if server is not None:
        yield Measured(server, data_dir)
        return
    with _folder(data_dir) as folder, local_cluster(folder, size) as cluster:
        yield Measured(cluster.servers, folder, cluster.members)


@contextmanager
def _folder(data_dir: Path) -> Iterator[Path]:
    """For the time of this run. It is locked meanwhile: those of runs that were killed are not, and are removed."""
    try:
        data_dir.mkdir(parents=True, exist_ok=True)
        for left in data_dir.glob(FOLDER_PREFIX + "*"):
            with suppress(OSError):  # locked, or somebody else's
                _remove_unless_used(left)
        folder = Path(tempfile.mkdtemp(prefix=FOLDER_PREFIX, dir=data_dir))
        lock = os.open(folder, os.O_RDONLY)
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise CommandFailed(f"cannot use {data_dir}: {reason}; choose another --data-dir") from None
    fcntl.flock(lock, fcntl.LOCK_EX)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(lock)


def _remove_unless_used(folder: Path) -> None:
    lock = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if any(folder.iterdir()):  # an empty one may be another run's, which is about to lock it
            shutil.rmtree(folder, ignore_errors=True)
    finally:
        os.close(lock)


async def _publish(plan: Plan, cluster: Measured, timeout: float) -> dict[str, Any]:
    from magnetar.cli.machine import probe_disk, probe_grpc
    from magnetar.client import connect

    disk_mb_per_s = await asyncio.to_thread(probe_disk, cluster.folder)
    frames_per_s, grpc_mb_per_s = await probe_grpc()
    async with (
        connect(cluster.servers, timeout=timeout) as client,
        _topics(client, plan) as topics,
        _producers(client, topics, plan.compression) as producers,
    ):
        await _run(plan, producers, WARM_UP_S)
        before = _figures(cluster)
        begin = time.perf_counter()
        counted = await _run(plan, producers, plan.seconds)
        elapsed = time.perf_counter() - begin
        after = _figures(cluster)
        copies = await _copies(client, topics[0])
    mb_per_s = counted.messages * plan.size / elapsed / 1e6
    servers = [name for name in after if name != CLIENT]
    written = sum(after[name].written - before[name].written for name in servers)
    sent = counted.messages * plan.size
    return {
        "test": "publish",
        "settings": {
            **asdict(plan),
            "mode": plan.mode.value,
            "local": bool(cluster.members),
            "copies": copies,
        },
        "messages": counted.messages,
        "msgs_per_s": round(counted.messages / elapsed, 1),
        "mb_per_s": round(mb_per_s, 3),
        "latency_ms": _percentiles(counted.latencies_s),
        "disk_mb_per_s": round(disk_mb_per_s, 1),
        "disk_ratio": round(mb_per_s * copies * 2 / disk_mb_per_s, 3),
        "bytes_written_per_byte": round(written / (sent * copies), 3) if written and sent else None,
        "grpc_mb_per_s": round(grpc_mb_per_s, 1),
        "grpc_frames_per_s": round(frames_per_s, 1),
        "processes": [{"role": name, **figures.since(before[name])} for name, figures in after.items()],
    }


def _figures(cluster: Measured) -> dict[str, ProcessFigures]:
    """Of each process that this command can see, by its name."""
    from magnetar.cli.machine import ProcessFigures

    seen = {member.name: ProcessFigures.read(member.process.pid) for member in cluster.members}
    return {**seen, CLIENT: ProcessFigures.read(os.getpid())}


@asynccontextmanager
async def _topics(client: Client, plan: Plan) -> AsyncIterator[list[str]]:
    """Topics of their own for the run, deleted after it."""
    run_id = f"{random.getrandbits(32):08x}"
    topics = [f"bench-{run_id}-{number}" for number in range(plan.topics)]
    created: list[str] = []
    try:
        for start in range(0, len(topics), TOPICS_OPENED_AT_ONCE):
            group = topics[start : start + TOPICS_OPENED_AT_ONCE]
            created += group
            await asyncio.gather(*(client.admin.topics.create(topic) for topic in group))
        yield topics
    finally:
        for start in range(0, len(created), TOPICS_OPENED_AT_ONCE):
            group = created[start : start + TOPICS_OPENED_AT_ONCE]
            await asyncio.gather(*(client.admin.topics.delete(topic) for topic in group), return_exceptions=True)


@asynccontextmanager
async def _producers(client: Client, topics: list[str], compression: str) -> AsyncIterator[list[Producer]]:
    async with AsyncExitStack() as stack:
        yield [
            await stack.enter_async_context(client.producer(topic, compression=compression))  # type: ignore[arg-type]
            for topic in topics
        ]


async def _copies(client: Client, topic: str) -> int:
    """How many bookies hold each message."""
    segments = [segment for shard in (await client.admin.topics.describe(topic)).shards for segment in shard.segments]
    return len(segments[-1].ensemble) if segments else 1


async def _run(plan: Plan, producers: list[Producer], seconds: float) -> Counted:
    counted = Counted()
    stop_at = time.perf_counter() + seconds
    source = Source(plan)
    if plan.mode is Mode.many:
        workers = max(plan.in_flight, min(len(producers), 256))
        async with asyncio.TaskGroup() as group:
            for number in range(workers):
                group.create_task(_send_many(plan, producers, number, workers, source, stop_at, counted))
    elif plan.mode is Mode.nowait:
        await _send_nowait(producers, source, stop_at, counted)
    else:
        await _send_single(producers, source, stop_at, counted)
    return counted


class Source:
    """Payloads cut from a pool of random bytes (repeating ones with compression), and keys."""

    def __init__(self, plan: Plan) -> None:
        self._size = plan.size
        self._count = plan.batch
        random_bytes = os.urandom(PAYLOAD_POOL_BYTES + plan.size)
        if plan.compression != "none":
            random_bytes = (b"flight,of,a,real,airline,on,time," * (len(random_bytes) // 33 + 1))[: len(random_bytes)]
        self._pool = random_bytes
        self._keys = [f"key-{number}".encode() for number in range(plan.keys)]
        self._position = 0
        step = max(1, PAYLOAD_POOL_BYTES // 4096)
        self.payloads = [self._cut(number * step % PAYLOAD_POOL_BYTES) for number in range(4096)]

    def _cut(self, start: int) -> bytes:
        return self._pool[start : start + self._size]

    def one(self) -> tuple[bytes, bytes | None]:
        self._position += 1
        key = self._keys[self._position % len(self._keys)] if self._keys else None
        return self.payloads[self._position & 4095], key

    def many(self) -> tuple[list[bytes], list[bytes] | None]:
        start = self._position & 4095
        self._position += self._count
        payloads = self.payloads[start : start + self._count]
        while len(payloads) < self._count:
            payloads = payloads + self.payloads[: self._count - len(payloads)]
        if not self._keys:
            return payloads, None
        first = self._position
        return payloads, [self._keys[(first + index) % len(self._keys)] for index in range(self._count)]


async def _send_many(
    plan: Plan, producers: list[Producer], number: int, workers: int, source: Source, stop_at: float, counted: Counted
) -> None:
    turn = number
    while (begin := time.perf_counter()) < stop_at:
        payloads, keys = source.many()
        await producers[turn % len(producers)].send_many(payloads, keys=keys)
        counted.add(len(payloads), time.perf_counter() - begin)
        turn += workers


async def _send_nowait(producers: list[Producer], source: Source, stop_at: float, counted: Counted) -> None:
    from magnetar.client import QueueFull

    receipt: Receipt | None = None
    turn = 0
    while time.perf_counter() < stop_at:
        producer = producers[turn % len(producers)]
        turn += 1
        for _ in range(NOWAIT_SAMPLE_EVERY):
            payload, key = source.one()
            try:
                receipt = producer.send_nowait(payload, key=key)
            except QueueFull:
                await producer.flush()
                receipt = producer.send_nowait(payload, key=key)
        begin = time.perf_counter()
        assert receipt is not None
        receipt.add_done_callback(partial(counted.add_receipt, begin))
        counted.messages += NOWAIT_SAMPLE_EVERY
        await asyncio.sleep(0)
    for producer in producers:
        await producer.flush()


async def _send_single(producers: list[Producer], source: Source, stop_at: float, counted: Counted) -> None:
    turn = 0
    while (begin := time.perf_counter()) < stop_at:
        payload, key = source.one()
        await producers[turn % len(producers)].send(payload, key=key)
        turn += 1
        counted.add(1, time.perf_counter() - begin)


def _percentiles(latencies_s: list[float]) -> dict[str, float]:
    if not latencies_s:
        return {}
    ordered = sorted(latencies_s)

    def at(share: float) -> float:
        return round(ordered[min(len(ordered) - 1, int(len(ordered) * share))] * 1e3, 3)

    return {"p50": at(0.5), "p95": at(0.95), "p99": at(0.99), "p999": at(0.999), "max": at(1.0)}


def _show(result: dict[str, Any]) -> None:
    latency = result["latency_ms"]
    emit_table(
        ["what", "figure"],
        [
            ("messages", f"{result['messages']:,}"),
            ("messages/s", f"{result['msgs_per_s']:,.0f}"),
            ("MB/s", f"{result['mb_per_s']:,.1f}"),
            ("latency p50 / p99 / max", " / ".join(f"{latency.get(at, 0):.1f} ms" for at in ("p50", "p99", "max"))),
            ("disk, write + fdatasync of 512 KiB", f"{result['disk_mb_per_s']:,.0f} MB/s"),
            ("share of the disk (all copies, written twice)", f"{result['disk_ratio']:.2f}"),
            ("bytes written per byte and copy", result["bytes_written_per_byte"] or "unknown"),
            ("gRPC, frames/s of 100 bytes", f"{result['grpc_frames_per_s']:,.0f}"),
            ("gRPC, MB/s of 1 MiB frames", f"{result['grpc_mb_per_s']:,.0f}"),
            *((f"{one['role']}: CPU, peak memory", f"{one['cpu_s']:.1f} s, {one['peak_rss_mb']:,.0f} MB")
              for one in result["processes"]),
        ],
    )  # fmt: skip
    note("mb = 10^6 bytes of payload; latency is that of one call")
