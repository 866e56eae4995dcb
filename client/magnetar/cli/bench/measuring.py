"""Measuring a load: the machine's limits, a warm-up, the runs, and what each run cost.

Steps:

1. Probe the disk and gRPC.
2. Make the load ready, and warm up.
3. For each run: read what the kernel and the servers have counted, run, read again.
4. Probe again. The better of both is the limit: whatever else runs here can only hide it.
"""

from __future__ import annotations

import asyncio
import os
import re
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from magnetar.cli.bench.load import Load, Tally
from magnetar.cli.bench.target import Target
from magnetar.cli.bench.topics import copies_of
from magnetar.cli.machine import Limits, ProcessFigures, cpu_times, probe
from magnetar.client import connect

if TYPE_CHECKING:
    from magnetar.client import Client

CLIENT = "client"
"""This process among the measured ones."""
SCRAPE_S = 5.0
FRAMES = re.compile(r"^magnetar_rpc_frames_total\{.*\} (\S+)$", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Counts:
    """What was counted up to a moment: of each process by its name, of the servers' streams, of the machine's cores.

    frames   sent and received on streams, by all servers; None if one of them does not tell
    """

    processes: dict[str, ProcessFigures]
    frames: float | None
    cpu_busy_s: float
    cpu_total_s: float

    @classmethod
    async def read(cls, client: Client, target: Target) -> Counts:
        processes = {
            member.name: ProcessFigures.read(member.process.pid)
            for member in target.members
            if member.process.poll() is None
        }
        processes[CLIENT] = ProcessFigures.read(os.getpid())
        return cls(processes, await _frames(client), *cpu_times())


async def _frames(client: Client) -> float | None:
    brokers, bookies = await client.admin.brokers.list(), await client.admin.bookies.list()
    addresses = {*(broker.http_address for broker in brokers), *(bookie.http_address for bookie in bookies)}
    try:
        texts = await asyncio.gather(*(asyncio.to_thread(_scraped, address) for address in addresses if address))
    except OSError:
        return None
    found = [FRAMES.findall(text) for text in texts]
    return sum(float(count) for counts in found for count in counts) if found and all(found) else None


def _scraped(address: str) -> str:
    with urllib.request.urlopen(f"http://{address}/metrics", timeout=SCRAPE_S) as answer:
        return str(answer.read().decode())


@dataclass(frozen=True, slots=True)
class Measured:
    """One run: what it did, and the counts around it."""

    tally: Tally
    before: Counts
    after: Counts

    @property
    def msgs_per_s(self) -> float:
        return self.tally.messages / self.tally.elapsed_s

    @property
    def mb_per_s(self) -> float:
        return self.tally.payload_bytes / self.tally.elapsed_s / 1e6

    @property
    def rates(self) -> dict[str, Any]:
        return {
            "messages": self.tally.messages,
            "msgs_per_s": round(self.msgs_per_s, 1),
            "mb_per_s": round(self.mb_per_s, 3),
            "latency_ms": self.tally.latencies.figures_ms(),
            **self.tally.facts,
        }

    @property
    def frames_per_message(self) -> float | None:
        if self.before.frames is None or self.after.frames is None or not self.tally.messages:
            return None
        return round((self.after.frames - self.before.frames) / self.tally.messages, 5)

    @property
    def cpu_busy(self) -> float:
        """The share of the machine's cores that was busy, with whatever else it did."""
        busy, total = self.after.cpu_busy_s - self.before.cpu_busy_s, self.after.cpu_total_s - self.before.cpu_total_s
        return round(busy / total, 3) if total else 0.0

    @property
    def processes(self) -> list[dict[str, Any]]:
        both = [name for name in self.after.processes if name in self.before.processes]
        return [{"role": name, **self.after.processes[name].since(self.before.processes[name])} for name in both]

    def written_per_byte(self, copies: int) -> float | None:
        """Bytes that the servers wrote to the disk, by byte of payload and copy; None if they are not ours to see."""
        servers = [name for name in self.after.processes if name != CLIENT]
        written = sum(self.after.processes[name].written - self.before.processes[name].written for name in servers)
        stored = self.tally.payload_bytes * copies
        return round(written / stored, 3) if written > 0 and stored else None


async def measured(load: Load, target: Target, settings: dict[str, Any], timeout_s: float) -> dict[str, Any]:
    """The result as it is documented: of the run with the median rate, and the rates of all."""
    limits = await probe(target.folder)
    seconds, runs = settings["seconds"], settings["runs"]
    async with connect(target.servers, timeout=timeout_s) as client, load.ready(client, target) as ready:
        if settings["warm_up"]:
            await (ready.warm_up or ready.run)(settings["warm_up"])
        done = [await _run_once(client, target, ready.run, seconds) for _ in range(runs)]
        copies = await copies_of(client, ready.topic)
    limits = limits.or_better(await probe(target.folder))
    return _result(load, {**settings, "copies": copies}, done, limits)


async def _run_once(client: Client, target: Target, run: Any, seconds: float) -> Measured:
    before = await Counts.read(client, target)
    tally = await run(seconds)
    return Measured(tally, before, await Counts.read(client, target))


def _result(load: Load, settings: dict[str, Any], done: Sequence[Measured], limits: Limits) -> dict[str, Any]:
    median = sorted(done, key=lambda run: run.msgs_per_s)[(len(done) - 1) // 2]
    copies = settings["copies"]
    ratio = round(median.mb_per_s * copies * 2 / limits.disk_mb_per_s, 3) if load.fills_disk else None
    return {
        "test": load.verb,
        "settings": settings,
        **median.rates,
        "disk_mb_per_s": round(limits.disk_mb_per_s, 1),
        "disk_ratio": ratio,
        "bytes_written_per_byte": median.written_per_byte(copies) if load.fills_disk else None,
        "frames_per_message": median.frames_per_message,
        "grpc_mb_per_s": round(limits.grpc_mb_per_s, 1),
        "grpc_frames_per_s": round(limits.grpc_frames_per_s, 1),
        "cpu_busy": median.cpu_busy,
        "processes": median.processes,
        "runs": [run.rates for run in done],
    }
