"""What the kernel says of a process and of the cores, and what the disk and gRPC of this machine can do at best."""

from __future__ import annotations

import asyncio
import os
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import grpc.aio

CLOCK_TICKS_PER_S = os.sysconf("SC_CLK_TCK")
DISK_PROBE_S = 0.8
DISK_PROBE_BYTES = 512 << 10
GRPC_PROBE_FRAMES = 2000
GRPC_PROBE_FRAME_BYTES = 100
GRPC_PROBE_BLOCKS = 200
GRPC_PROBE_BLOCK_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class ProcessFigures:
    """What the kernel counted for a process, from /proc; zeros where it cannot be read. `written`: bytes to disks."""

    cpu_s: float = 0.0
    rss_mb: float = 0.0
    peak_rss_mb: float = 0.0
    written: int = 0

    @classmethod
    def read(cls, pid: int | None) -> ProcessFigures:
        try:
            stat = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            status = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
            io = dict(line.split(": ") for line in Path(f"/proc/{pid}/io").read_text().splitlines())
        except OSError:
            return cls()
        ticks = int(stat[11]) + int(stat[12])
        rss_mb, peak_rss_mb = (int(status.get(name, "0 kB").split()[0]) * 1024 / 1e6 for name in ("VmRSS", "VmHWM"))
        return cls(ticks / CLOCK_TICKS_PER_S, rss_mb, peak_rss_mb, int(io["write_bytes"]))

    def since(self, before: ProcessFigures) -> dict[str, float]:
        """rss_growth_mb: of the peak, over what was in memory before; 0 if the peak was earlier."""
        grown = self.peak_rss_mb - before.rss_mb if self.peak_rss_mb > before.peak_rss_mb else 0.0
        return {
            "cpu_s": round(self.cpu_s - before.cpu_s, 2),
            "peak_rss_mb": round(self.peak_rss_mb, 1),
            "rss_growth_mb": round(grown, 1),
        }


def cpu_times() -> tuple[float, float]:
    """Seconds that all cores together were busy, and seconds in total, since the machine started."""
    first = Path("/proc/stat").read_text().splitlines()[0]
    times = [int(field) / CLOCK_TICKS_PER_S for field in first.split()[1:9]]
    return sum(times) - times[3] - times[4], sum(times)  # without idle and iowait


@dataclass(frozen=True, slots=True)
class Limits:
    """What this machine can do at best: see `probe_disk` and `probe_grpc`."""

    disk_mb_per_s: float
    grpc_frames_per_s: float
    grpc_mb_per_s: float

    def or_better(self, other: Limits) -> Limits:
        return Limits(
            max(self.disk_mb_per_s, other.disk_mb_per_s),
            max(self.grpc_frames_per_s, other.grpc_frames_per_s),
            max(self.grpc_mb_per_s, other.grpc_mb_per_s),
        )


async def probe(folder: Path) -> Limits:
    return Limits(await asyncio.to_thread(probe_disk, folder), *await probe_grpc())


def probe_disk(folder: Path) -> float:
    """MB/s of write + fdatasync of 512 KiB on the same directory: what a log at full speed could reach."""
    block = os.urandom(DISK_PROBE_BYTES)
    path = folder / "disk-probe"
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    rates = []
    try:
        stop_at = time.perf_counter() + DISK_PROBE_S
        while time.perf_counter() < stop_at:
            begin = time.perf_counter()
            for _ in range(8):
                os.write(descriptor, block)
                os.fdatasync(descriptor)
            rates.append(8 * DISK_PROBE_BYTES / (time.perf_counter() - begin) / 1e6)
    finally:
        os.close(descriptor)
        path.unlink()
    return statistics.median(rates)


async def probe_grpc() -> tuple[float, float]:
    """Frames/s of 100 bytes and MB/s of 1 MiB frames over one stream on loopback, both ends in this process."""

    async def echo(_requests: Any, context: Any) -> None:
        while await context.read() is not grpc.aio.EOF:
            await context.write(b"")

    handler = grpc.stream_stream_rpc_method_handler(echo)
    server = grpc.aio.server()
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("probe", {"Echo": handler}),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            frames_s = await _echo(channel, os.urandom(GRPC_PROBE_FRAME_BYTES), GRPC_PROBE_FRAMES, 256)
            blocks_s = await _echo(channel, os.urandom(GRPC_PROBE_BLOCK_BYTES), GRPC_PROBE_BLOCKS, 16)
    finally:
        await server.stop(0)
    return GRPC_PROBE_FRAMES / frames_s, GRPC_PROBE_BLOCKS * GRPC_PROBE_BLOCK_BYTES / blocks_s / 1e6


async def _echo(channel: Any, frame: bytes, count: int, window: int) -> float:
    call = channel.stream_stream("/probe/Echo")()
    room = asyncio.Semaphore(window)

    async def read() -> None:
        for _ in range(count):
            await call.read()
            room.release()

    begin = time.perf_counter()
    reader = asyncio.create_task(read())
    for _ in range(count):
        await room.acquire()
        await call.write(frame)
    await reader
    elapsed = time.perf_counter() - begin
    await call.done_writing()
    return elapsed
