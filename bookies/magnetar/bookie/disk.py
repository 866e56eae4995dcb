"""How full the disk is, and what follows from it. Pure but for the gauge."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from magnetar.metadata.records import BookieState

FULL_AT = 0.99
"""Above this share not even recovery adds are taken: what is left is for flushes, and for deleting."""


@dataclass(frozen=True, slots=True)
class DiskUsage:
    """`total_bytes` is what this process could use of an empty disk."""

    free_bytes: int
    total_bytes: int

    @property
    def used_share(self) -> float:
        return 1.0 - self.free_bytes / self.total_bytes if self.total_bytes else 1.0


DiskGauge = Callable[[], DiskUsage]


def gauge_of(path: Path) -> DiskGauge:
    def measure() -> DiskUsage:
        status = os.statvfs(path)
        used_blocks = status.f_blocks - status.f_bfree
        return DiskUsage(status.f_bavail * status.f_frsize, (used_blocks + status.f_bavail) * status.f_frsize)

    return measure


class DiskState:
    """Read-only from `read_only_at` on, writable again below `writable_at`: between them it stays what it was.

    reserve_bytes   with less free than this, nothing is taken; a small disk is read-only until twice as much is free
    """

    def __init__(self, read_only_at: float, writable_at: float, reserve_bytes: int = 0) -> None:
        self.state = BookieState.WRITABLE
        self.full = False
        self.usage = DiskUsage(0, 0)
        self._read_only_at = read_only_at
        self._writable_at = writable_at
        self._reserve_bytes = reserve_bytes

    def update(self, usage: DiskUsage) -> None:
        """Takes a measurement."""
        share = usage.used_share
        self.full = share >= max(FULL_AT, self._read_only_at) or usage.free_bytes < self._reserve_bytes
        if self.full or share >= self._read_only_at:
            self.state = BookieState.READ_ONLY
        elif share < self._writable_at and usage.free_bytes >= 2 * self._reserve_bytes:
            self.state = BookieState.WRITABLE
        self.usage = usage
