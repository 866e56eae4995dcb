"""A result as a table for eyes."""

from __future__ import annotations

from typing import Any

from magnetar.cli.output import emit_table, note

FACTS = {
    "pause_s": "longest pause after the fault",
    "p999_ratio": "p99.9 after the fault, by that in quiet",
    "tail_p99_ratio": "p99 of the tail beside the reading, by that in quiet",
}


def show(result: dict[str, Any]) -> None:
    emit_table(["what", "figure"], [*_load(result), *_limits(result), *_processes(result)])
    note(
        "mb = 10^6 bytes of payload; latency is that of a call, or since a message was due if there is a rate"
        + ("; of the run with the median rate" if len(result["runs"]) > 1 else "")
    )


def _load(result: dict[str, Any]) -> list[tuple[str, object]]:
    rows: list[tuple[str, object]] = [
        ("messages", f"{result['messages']:,}"),
        ("messages/s", f"{result['msgs_per_s']:,.0f}"),
        ("MB/s", f"{result['mb_per_s']:,.1f}"),
    ]
    if result["latency_ms"]:
        rows.append(("latency p50 / p99 / p99.9 / max", _latencies(result["latency_ms"])))
    for name in ("quiet_ms", "tail_quiet_ms", "tail_beside_ms"):
        if result.get(name):
            rows.append((name.removesuffix("_ms").replace("_", " ") + ", the same", _latencies(result[name])))
    rows += [(text, result[name]) for name, text in FACTS.items() if result.get(name) is not None]
    if len(result["runs"]) > 1:
        rows.append(("messages/s of each run", " / ".join(f"{run['msgs_per_s']:,.0f}" for run in result["runs"])))
    return rows


def _limits(result: dict[str, Any]) -> list[tuple[str, object]]:
    rows: list[tuple[str, object]] = [("disk, write + fdatasync of 512 KiB", f"{result['disk_mb_per_s']:,.0f} MB/s")]
    if result["disk_ratio"] is not None:
        rows.append(("share of the disk (all copies, written twice)", f"{result['disk_ratio']:.2f}"))
        rows.append(("bytes written per byte and copy", result["bytes_written_per_byte"] or "unknown"))
    frames = result["frames_per_message"]
    return [
        *rows,
        ("gRPC, frames/s of 100 bytes", f"{result['grpc_frames_per_s']:,.0f}"),
        ("gRPC, MB/s of 1 MiB frames", f"{result['grpc_mb_per_s']:,.0f}"),
        ("frames per message, at all servers", "unknown" if frames is None else f"{frames:.4f}"),
        ("cores busy, with all that runs here", f"{result['cpu_busy']:.0%}"),
    ]


def _processes(result: dict[str, Any]) -> list[tuple[str, object]]:
    return [
        (f"{one['role']}: CPU, peak memory, growth in the run",
         f"{one['cpu_s']:.1f} s, {one['peak_rss_mb']:,.0f} MB, {one['rss_growth_mb']:+,.0f} MB")
        for one in result["processes"]
    ]  # fmt: skip


def _latencies(figures: dict[str, float]) -> str:
    return " / ".join(f"{figures[at]:,.1f}" for at in ("p50", "p99", "p999", "max")) + " ms"
