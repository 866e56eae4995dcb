"""How much is published to each shard that is served here: moving averages, for balancer and plans. Pure.

An average is over the time for which the shard was seen here, and weighs what is recent more. So a shard that has just
moved counts as what it is, and not as one that was idle before.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

HALF_LIFE_S = 60.0
"""After which what was counts half: a burst moves nothing, a new load counts within a few minutes."""

SAMPLE_S_MIN = 0.5
"""What is asked for again before is answered from the last sample."""

QUIET_BYTES_PER_S = 1.0
"""A shard with less is not told of."""


@dataclass(frozen=True, slots=True)
class ShardLoad:
    shard_id: int
    bytes_per_s: float
    messages_per_s: float


@dataclass(slots=True)
class _Meter:
    """`seen`: the weights of what the averages are made of, together; 1 after a long time."""

    total_bytes: int = 0
    total_messages: int = 0
    bytes_per_s: float = 0.0
    messages_per_s: float = 0.0
    seen: float = 0.0


class Loads:
    """Fed with totals that grow from 0; a shard that is not in a sample is forgotten, and begins anew when it comes."""

    def __init__(self) -> None:
        self._meters: dict[int, _Meter] = {}
        self._sampled_s: float | None = None

    def sample(self, now_s: float, totals: Iterable[tuple[int, int, int]]) -> None:
        """`totals`: of each shard its id, and the bytes and messages since it is served here."""
        elapsed_s = 0.0 if self._sampled_s is None else now_s - self._sampled_s
        if 0.0 < elapsed_s < SAMPLE_S_MIN:
            return
        self._sampled_s = now_s
        former, self._meters = self._meters, {}
        fresh = 1.0 - math.exp2(-elapsed_s / HALF_LIFE_S)
        for shard_id, total_bytes, total_messages in totals:
            meter = self._meters[shard_id] = former.get(shard_id) or _Meter()
            if elapsed_s > 0.0:
                meter.bytes_per_s += fresh * ((total_bytes - meter.total_bytes) / elapsed_s - meter.bytes_per_s)
                gained = total_messages - meter.total_messages
                meter.messages_per_s += fresh * (gained / elapsed_s - meter.messages_per_s)
                meter.seen += fresh * (1.0 - meter.seen)
            meter.total_bytes, meter.total_messages = total_bytes, total_messages

    def report(self) -> list[ShardLoad]:
        """Of the shards that are not quiet."""
        return [
            ShardLoad(shard_id, meter.bytes_per_s / meter.seen, meter.messages_per_s / meter.seen)
            for shard_id, meter in self._meters.items()
            if meter.bytes_per_s >= QUIET_BYTES_PER_S * meter.seen > 0.0
        ]
