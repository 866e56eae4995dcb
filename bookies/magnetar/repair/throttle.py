"""A limit in bytes a second that can change at any time. Pure: `now` in seconds is an argument.

Bytes are spent when they are known, after they were moved, so the balance may fall below zero: whoever wants to move
more waits until it is paid back. The rate is held over any while that is long against BURST_S.
"""

from __future__ import annotations

BURST_S = 0.05
"""What was not used is kept for so long, unless told otherwise."""


class Throttle:
    __slots__ = ("_at", "_balance", "_burst_s", "bytes_per_s")

    def __init__(self, bytes_per_s: int, now: float, burst_s: float = BURST_S) -> None:
        self._burst_s = burst_s
        self.bytes_per_s = bytes_per_s
        self._balance = 0.0
        self._at = now

    def set_rate(self, bytes_per_s: int, now: float) -> None:
        """Holds from now on, also for what is owed."""
        self._earn(now)
        self.bytes_per_s = bytes_per_s

    def wait_s(self, now: float) -> float:
        """How long to wait before more may be moved; look again then, or when the rate has changed."""
        self._earn(now)
        return max(0.0, -self._balance / self.bytes_per_s)

    def spend(self, size_bytes: int, now: float) -> None:
        self._earn(now)
        self._balance -= size_bytes

    def _earn(self, now: float) -> None:
        elapsed = max(0.0, now - self._at)
        self._at = max(self._at, now)
        self._balance = min(self._balance + elapsed * self.bytes_per_s, self.bytes_per_s * self._burst_s)
