"""Sizes and rates as people type them: 50MB/s, 1.5 GiB, 800kB."""

from __future__ import annotations

import re

import typer

_UNITS = {
    "": 1, "b": 1,
    "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12,
    "kib": 1 << 10, "mib": 1 << 20, "gib": 1 << 30, "tib": 1 << 40,
}  # fmt: skip
BYTES_MAX = 1 << 60


def parse_rate(text: str) -> int:
    """Bytes per second, above zero. Raises typer.BadParameter."""
    amount = re.sub(r"\s*(/|p)s$", "", text.strip(), flags=re.IGNORECASE)
    rate = _parse(amount, f"{text!r} is no rate: give one such as 50MB/s or 800kB/s")
    if rate <= 0:
        raise typer.BadParameter(f"{text!r} would never end: give a rate above zero, or pause what is to stop")
    return rate


def parse_size(text: str) -> int:
    """Bytes. Raises typer.BadParameter."""
    return _parse(text, f"{text!r} is no size: give one such as 500MB or 2GiB")


def _parse(text: str, problem: str) -> int:
    match = re.fullmatch(r"\s*(\d{1,20}(?:\.\d{1,20})?)\s*([a-z]*)\s*", text, flags=re.IGNORECASE | re.ASCII)
    if match is None or match[2].lower() not in _UNITS:
        raise typer.BadParameter(problem)
    size_bytes = round(float(match[1]) * _UNITS[match[2].lower()])
    if size_bytes > BYTES_MAX:
        raise typer.BadParameter(f"{problem}, at most {BYTES_MAX:,} bytes")
    return size_bytes


def human_rate(bytes_per_s: float) -> str:
    """50_000_000 -> "50.0 MB/s", as rates are typed."""
    for unit, scale in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if bytes_per_s >= scale:
            return f"{bytes_per_s / scale:.1f} {unit}/s"
    return f"{bytes_per_s:.0f} B/s"
