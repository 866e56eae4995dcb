"""When the calls of a load are due.

A load without a rate calls as soon as a worker is free: its latencies are those of calls. A load with a rate has a time
for each call, fixed from the beginning, and its latencies count from there: while all workers wait for a slow answer,
calls are due that nobody makes, and their waiting is not left out ("coordinated omission").
"""

from __future__ import annotations

import asyncio
import time


class Schedule:
    """Hands out the due times of calls, each once, until it ends. per_s 0: each is due when it is asked for."""

    def __init__(self, seconds: float, per_s: float = 0.0) -> None:
        self._begin = time.perf_counter()
        self._end = self._begin + seconds
        self._per_s = per_s
        self._given = 0

    async def next(self) -> float | None:
        """Waits until the next call is due and returns that time; None: there are no more."""
        now = time.perf_counter()
        due = self._begin + self._given / self._per_s if self._per_s else now
        if max(due, now) >= self._end:
            return None
        self._given += 1
        if due > now:
            await asyncio.sleep(due - now)
        return due
