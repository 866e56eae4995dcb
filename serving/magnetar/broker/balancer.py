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

from bisect import bisect_right
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from magnetar.broker.loads import ShardLoad

TRIGGER = 0.40
TARGET = 0.15
MOVES_PER_ROUND = 2
REST_S = 600.0
WORTH_BYTES_PER_S = 100_000.0
SHARDS_REMEMBERED_MAX = 10_000
ROUNDING = 1.0 + 1e-9
"""Sums of fractions that should be equal differ by less."""


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
        weights = weights_of(brokers)
        if len(brokers) < 2 or not weights:
            self.balancing = False
            return []
        levels = Levels(weights, {b.broker_id: [s.shard_id for s in b.shards] for b in brokers}, resting=self.moved_s)
        moves: list[Move] = []
        while len(moves) < MOVES_PER_ROUND and self._uneven(levels):
            move = self._next(levels)
            if move is None:
                break
            moves.append(move)
        return moves

    def moved(self, shard_id: int, now_s: float) -> None:
        """The shard rests from now on, whether the move succeeded or not."""
        self.moved_s[shard_id] = now_s

    def _uneven(self, levels: Levels) -> bool:
        excess = max(levels.loads.values()) / levels.average - 1.0
        self.balancing = excess > (TARGET if self.balancing else TRIGGER)
        return self.balancing

    def _next(self, levels: Levels) -> Move | None:
        source, target = levels.fullest_first()[0], levels.emptiest()
        busy, idle = levels.loads[source] / levels.average, levels.loads[target] / levels.average
        shard_id = levels.give(source, target)
        if shard_id is None:
            return None
        moved = levels.weights[shard_id] / levels.average
        reason = f"{source} has {busy:.2f} times the average load, {target} {idle:.2f}; the shard has {moved:.2f}"
        return Move(shard_id, source, target, reason)

    def _forget(self, now_s: float) -> None:
        resting = {shard: moved for shard, moved in self.moved_s.items() if now_s - moved < REST_S}
        newest = sorted(resting, key=resting.__getitem__)[-SHARDS_REMEMBERED_MAX:]
        self.moved_s = {shard: resting[shard] for shard in newest}


class Levels:
    """The loads of brokers while shards are given from one to another, each once at most.

    weights   of shards; one without a weight has none
    resting   shards that count and stay
    """

    def __init__(
        self, weights: Mapping[int, float], placed: Mapping[str, Collection[int]], resting: Collection[int] = ()
    ) -> None:
        self.weights = weights
        self.loads = {broker: sum(weights.get(shard, 0.0) for shard in shards) for broker, shards in placed.items()}
        self.average = sum(self.loads.values()) / max(1, len(self.loads))
        self._givable = {
            broker: sorted((weights[s], -s) for s in shards if weights.get(s, 0.0) > 0.0 and s not in resting)
            for broker, shards in placed.items()
        }

    def fullest_first(self) -> list[str]:
        return sorted(self.loads, key=lambda broker: (self.loads[broker], broker), reverse=True)

    def emptiest(self) -> str:
        return min(self.loads, key=lambda broker: (self.loads[broker], broker))

    def give(self, source: str, target: str) -> int | None:
        """The largest shard that fits into half the difference goes over; None if there is none."""
        room = (self.loads[source] - self.loads[target]) / 2 * ROUNDING
        place = bisect_right(self._givable[source], (room, 0)) - 1
        if place < 0:
            return None
        weight, negative_id = self._givable[source].pop(place)
        self.loads[source] -= weight
        self.loads[target] += weight
        return -negative_id


def weights_of(brokers: Iterable[BrokerLoad]) -> dict[int, float]:
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
