"""Which shards should move so that the brokers' loads come nearer to each other: a function of measured loads. Pure.

Rules:

1. The load of a shard is its share of the cluster's bytes/s plus its share of the messages/s, halved: 1.0 is all there
   is. A broker's load is the sum over its shards.
2. Nothing moves while the busiest broker is less than TRIGGER above the average; once a round has found more than that,
   moves go on until it is less than TARGET above it: the gap between the two keeps loads that waver from moving shards
   to and fro.
3. A move takes a shard from the busiest broker to the one with the least, if that leaves the two nearer to each other:
   the largest that fits into half their difference. A shard that moved rests for REST_S.
4. At most MOVES_PER_ROUND moves a round. A broker that takes no shards gets none and counts in no average.
5. A load below WORTH_BYTES_PER_S in the cluster moves nothing: a hand-off costs more than it gains.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from magnetar.broker.loads import ShardLoad

TRIGGER = 0.40
TARGET = 0.15
MOVES_PER_ROUND = 2
REST_S = 600.0
WORTH_BYTES_PER_S = 100_000.0
SHARDS_REMEMBERED_MAX = 10_000


@dataclass(frozen=True, slots=True)
class BrokerLoad:
    """What a broker that may have shards serves. Brokers to be drained, leaving or silent are not among them."""

    broker_id: str
    shards: tuple[ShardLoad, ...]


@dataclass(frozen=True, slots=True)
class Move:
    shard_id: int
    source: str
    target: str
    reason: str


@dataclass(slots=True)
class Balancer:
    """What it remembers between rounds: whether it is at work, and when each shard moved."""

    balancing: bool = False
    moved_s: dict[int, float] = field(default_factory=dict)

    def plan(self, brokers: Sequence[BrokerLoad], now_s: float) -> list[Move]:
        """The moves of this round, in order; each was counted when the next was chosen."""
        self._forget(now_s)
        weights = _weights(brokers)
        if len(brokers) < 2 or not weights:
            self.balancing = False
            return []
        loads = {b.broker_id: sum(weights[s.shard_id] for s in b.shards) for b in brokers}
        average = sum(loads.values()) / len(loads)
        placed = {b.broker_id: {s.shard_id for s in b.shards} for b in brokers}
        moves: list[Move] = []
        while len(moves) < MOVES_PER_ROUND and self._uneven(max(loads.values()), average):
            move = self._next(loads, placed, weights, average)
            if move is None:
                break
            weight = weights[move.shard_id]
            loads[move.source] -= weight
            loads[move.target] += weight
            placed[move.source].discard(move.shard_id)
            moves.append(move)
        return moves

    def moved(self, shard_id: int, now_s: float) -> None:
        """The shard rests from now on, whether the move succeeded or not."""
        self.moved_s[shard_id] = now_s

    def _uneven(self, busiest: float, average: float) -> bool:
        excess = busiest / average - 1.0
        self.balancing = excess > (TARGET if self.balancing else TRIGGER)
        return self.balancing

    def _next(
        self, loads: Mapping[str, float], placed: Mapping[str, set[int]], weights: Mapping[int, float], average: float
    ) -> Move | None:
        source = max(loads, key=lambda broker: (loads[broker], broker))
        target = min(loads, key=lambda broker: (loads[broker], broker))
        room = (loads[source] - loads[target]) / 2
        fitting = [s for s in placed[source] if 0.0 < weights[s] <= room and s not in self.moved_s]
        if not fitting:
            return None
        shard_id = max(fitting, key=lambda s: (weights[s], -s))
        busy, idle, moved = (load / average for load in (loads[source], loads[target], weights[shard_id]))
        reason = f"{source} has {busy:.2f} times the average load, {target} {idle:.2f}; the shard has {moved:.2f}"
        return Move(shard_id, source, target, reason)

    def _forget(self, now_s: float) -> None:
        resting = {shard: moved for shard, moved in self.moved_s.items() if now_s - moved < REST_S}
        newest = sorted(resting, key=resting.__getitem__)[-SHARDS_REMEMBERED_MAX:]
        self.moved_s = {shard: resting[shard] for shard in newest}


def _weights(brokers: Iterable[BrokerLoad]) -> dict[int, float]:
    """Each shard's share of all; nothing if there is too little to be worth a move."""
    shards = [shard for broker in brokers for shard in broker.shards]
    total_bytes = sum(shard.bytes_per_s for shard in shards)
    total_messages = sum(shard.messages_per_s for shard in shards)
    if total_bytes < WORTH_BYTES_PER_S:
        return {}
    return {
        shard.shard_id: (shard.bytes_per_s / total_bytes + shard.messages_per_s / max(total_messages, 1.0)) / 2
        for shard in shards
    }
