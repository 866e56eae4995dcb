"""Latencies in an HdrHistogram: any number of them in constant memory, exact to three digits."""

from __future__ import annotations

from typing import Any

from magnetar.cli.command import CommandFailed

LATENCY_US_MAX = 3600 * 10**6
DIGITS = 3
PERCENTILES = {"p50": 50.0, "p95": 95.0, "p99": 99.0, "p999": 99.9}


class Latencies:
    """Of calls, or of messages. Raises CommandFailed if the library for it is not installed."""

    def __init__(self) -> None:
        try:
            from hdrh.histogram import HdrHistogram
        except ModuleNotFoundError as error:
            raise CommandFailed(
                f"the benchmark needs HdrHistogram: pip install 'magnetar[server]' missing=`{error.name}`"
            ) from None
        self._histogram: Any = HdrHistogram(1, LATENCY_US_MAX, DIGITS)

    def record(self, latency_s: float, count: int = 1) -> None:
        self._histogram.record_value(min(max(1, round(latency_s * 1e6)), LATENCY_US_MAX), count)

    def __len__(self) -> int:
        return int(self._histogram.get_total_count())

    def figures_ms(self) -> dict[str, float]:
        """Percentiles by name, and the longest; empty if nothing was recorded."""
        if not len(self):
            return {}
        at = self._histogram.get_value_at_percentile
        figures = {name: at(percentile) / 1e3 for name, percentile in PERCENTILES.items()}
        return {**figures, "max": self._histogram.get_max_value() / 1e3}
