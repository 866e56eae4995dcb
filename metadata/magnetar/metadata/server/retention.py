"""How much history is kept: the last hour, unless that is too much. Pure; called every few seconds."""

from __future__ import annotations

from collections import deque
from typing import NamedTuple

HISTORY_S = 3600.0
HISTORY_REVISIONS_MAX = 200_000
HISTORY_BYTES_MAX = 1 << 30
SAMPLE_EVERY_S = 5.0
SAMPLES_MAX = 1000
"""Some more than HISTORY_S has of them."""
COMPACT_REVISIONS_MIN = 256
"""Fewer are not worth a compaction."""


class _Sample(NamedTuple):
    at: float
    revision: int
    written_bytes: int


class Retention:
    """Remembers when which revision was reached, and how much had been written by then."""

    def __init__(
        self,
        *,
        history_s: float = HISTORY_S,
        revisions_max: int = HISTORY_REVISIONS_MAX,
        bytes_max: int = HISTORY_BYTES_MAX,
    ) -> None:
        self._history_s = history_s
        self._revisions_max = revisions_max
        self._bytes_max = bytes_max
        self._samples: deque[_Sample] = deque(maxlen=SAMPLES_MAX)

    def compact_at(self, now: float, revision: int, written_bytes: int, compacted: int) -> int | None:
        """The revision to compact at now; None if there is nothing worth it."""
        if not self._samples or now - self._samples[-1].at >= SAMPLE_EVERY_S:
            self._samples.append(_Sample(now, revision, written_bytes))
        target = revision - self._revisions_max
        for at, reached, written in self._samples:
            if now - at >= self._history_s or written_bytes - written > self._bytes_max:
                target = max(target, reached)
        while len(self._samples) > 1 and self._samples[1].revision <= target:
            self._samples.popleft()
        return target if target - compacted >= COMPACT_REVISIONS_MIN else None
