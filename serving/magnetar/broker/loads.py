"""How much is published to each shard that is served here: moving averages, for the balancer. Pure."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

HALF_LIFE_S = 60.0
"""After which what was counts half: a burst moves nothing, a new load counts within a few minutes."""

QUIET_BYTES_PER_S = 1.0
"""A shard with less is not told of."""


@dataclass(frozen=True, slots=True)
class ShardLoad:
    shard_id: int
    bytes_per_s: float
    messages_per_s: float


@dataclass(slots=True)
class _Meter:
    total_bytes: int
    total_messages: int
    bytes_per_s: float = 0.0
    messages_per_s: float = 0.0


class Loads:
    """Fed with totals that grow; a shard that is not in a sample is forgotten, and begins anew when it comes again."""

    def __init__(self) -> None:
        self._meters: dict[int, _Meter] = {}
        self._sampled_s: float | None = None

    def sample(self, now_s: float, totals: Iterable[tuple[int, int, int]]) -> None:
        """`totals`: of each shard its id, and the bytes and messages since it is served here."""
        elapsed_s = 0.0 if self._sampled_s is None else now_s - self._sampled_s
        self._sampled_s = now_s
        former, self._meters = self._meters, {}
        fresh = 1.0 - math.exp2(-elapsed_s / HALF_LIFE_S)
        for shard_id, total_bytes, total_messages in totals:
            meter = former.get(shard_id)
            if meter is not None and elapsed_s > 0.0:
                meter.bytes_per_s += fresh * ((total_bytes - meter.total_bytes) / elapsed_s - meter.bytes_per_s)
                gained = total_messages - meter.total_messages
                meter.messages_per_s += fresh * (gained / elapsed_s - meter.messages_per_s)
                meter.total_bytes, meter.total_messages = total_bytes, total_messages
            self._meters[shard_id] = meter or _Meter(total_bytes, total_messages)

    def report(self) -> list[ShardLoad]:
        """Of the shards that are not quiet."""
        return [
            ShardLoad(shard_id, meter.bytes_per_s, meter.messages_per_s)
            for shard_id, meter in self._meters.items()
            if meter.bytes_per_s >= QUIET_BYTES_PER_S
        ]
