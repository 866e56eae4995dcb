"""Which shards to hand over so that brokers own even parts of them. Pure: a function of one snapshot.

What the balancer does a little of at a time, and only when it is worth it, a plan does as a whole, and for shards that
are quiet too. The load of a shard is the balancer's: half its part of the bytes/s of the cluster, half its part of the
messages/s. Two steps:

1. Shards that are published to move until the loads are even, or no shard fits between two brokers any more.
2. Quiet shards move until the numbers of shards are even. No load changes by that. In a cluster that is quiet as a
   whole this is all there is.

Rules of every plan:

1. Nothing moves while all are nearer than TRIGGER to the average: measured loads waver. Once one is not, moves go on
   until all are nearer than TARGET, or nothing fits any more.
2. A move gives a shard from a broker that has more than the average to the one that has least: the largest that leaves
   these two nearer to each other.
3. A shard moves once in a plan: its moves depend on nothing that another one does.
4. Brokers that are stopping or drained are not counted: they hand their shards over anyway, and get none.
5. Shards without a living owner stay: they are claimed as soon as somebody wants them.

skew   the largest |part - average| / average of any counted broker, of the loads or of the numbers, whichever is larger
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from magnetar.broker.balancer import WORTH_BYTES_PER_S, BrokerLoad, Levels, weights_of
from magnetar.broker.loads import ShardLoad
from magnetar.metadata.records import Move, Owner
from magnetar.node.wording import by_reason, number_of
from magnetar.repair.planner import MOVES_MAX

TRIGGER = 0.05
TARGET = 0.01


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The brokers and what they own, as of `revision`, and what was measured then.

    sessions   of the brokers that live
    leaving    brokers that are stopping
    draining   brokers that an operator wants to have no shards
    owners     of every shard that has one, living or not
    changed    the revision at which each of these became the owner
    loads      of the shards that are not quiet
    busy       shards that an operation moves, each with which one, in words
    """

    revision: int
    sessions: Mapping[str, int]
    owners: Mapping[int, Owner]
    changed: Mapping[int, int]
    leaving: Collection[str] = ()
    draining: Collection[str] = ()
    loads: Mapping[int, ShardLoad] = field(default_factory=dict)
    busy: Mapping[int, str] = field(default_factory=dict)

    def counted(self) -> list[str]:
        return sorted(name for name in self.sessions if name not in self.leaving and name not in self.draining)

    def lives(self, owner: Owner) -> bool:
        return self.sessions.get(owner.broker_id) == owner.session


@dataclass(frozen=True, slots=True)
class BrokerBalance:
    """What a broker owns before and after. Loads are parts of the cluster's; all 0.0 if it is quiet."""

    broker_id: str
    shards_before: int
    shards_after: int
    load_before: float
    load_after: float


@dataclass(frozen=True, slots=True)
class ShardPlan:
    """Moves, and what they change. `weights`: the load of each shard that is not quiet."""

    revision: int
    moves: tuple[Move, ...]
    brokers: tuple[BrokerBalance, ...]
    weights: Mapping[int, float]
    skew_before: float
    skew_after: float
    notes: tuple[str, ...] = ()


def plan(snapshot: Snapshot, shards: Collection[int] | None = None) -> ShardPlan:
    """The moves that make brokers even; none if they are. `shards`: only these move, all count."""
    placed: dict[str, set[int]] = {name: set() for name in snapshot.counted()}
    for shard_id, owner in snapshot.owners.items():
        if owner.broker_id in placed and snapshot.lives(owner):
            placed[owner.broker_id].add(shard_id)
    counted = {shard_id for owned in placed.values() for shard_id in owned}
    resting = {shard_id for shard_id in counted if shard_id in snapshot.busy or _is_left_out(shard_id, shards)}
    weights = weights_of([_measured(snapshot, name, owned) for name, owned in placed.items()])
    loads = Levels(weights, placed, resting)
    numbers = Levels(dict.fromkeys(counted, 1.0), placed, counted)
    before = dict(loads.loads), dict(numbers.loads), _skew(loads, numbers)
    moves = list(_even_out(loads, MOVES_MAX))
    after = _placed_after(placed, moves)
    numbers = Levels(dict.fromkeys(counted, 1.0), after, resting | weights.keys())
    moves += _even_out(numbers, MOVES_MAX - len(moves))
    return ShardPlan(
        snapshot.revision,
        tuple(moves),
        tuple(
            BrokerBalance(name, round(before[1][name]), round(numbers.loads[name]), before[0][name], loads.loads[name])
            for name in placed
        ),
        weights,
        before[2],
        _skew(loads, numbers),
        tuple(_notes(snapshot, loads, numbers, counted, len(moves))),
    )


def _is_left_out(shard_id: int, shards: Collection[int] | None) -> bool:
    return shards is not None and shard_id not in shards


def _measured(snapshot: Snapshot, broker_id: str, shards: Collection[int]) -> BrokerLoad:
    return BrokerLoad(broker_id, tuple(snapshot.loads[s] for s in sorted(shards) if s in snapshot.loads))


def _even_out(levels: Levels, moves_max: int) -> Iterator[Move]:
    if _skew(levels) <= TRIGGER:
        return
    for _ in range(moves_max):
        move = _next(levels)
        if move is None:
            return
        yield move


def _next(levels: Levels) -> Move | None:
    target = levels.emptiest()
    lacks = levels.loads[target] < levels.average * (1 - TARGET)
    for source in levels.fullest_first():
        if levels.loads[source] <= levels.average * (1.0 if lacks else 1 + TARGET):
            return None
        shard_id = levels.give(source, target)
        if shard_id is not None:
            return Move(0, source, target, 0, shard_id=shard_id)
    return None


def _placed_after(placed: Mapping[str, set[int]], moves: Sequence[Move]) -> dict[str, set[int]]:
    after = {name: set(shards) for name, shards in placed.items()}
    for move in moves:
        after[move.source].discard(move.shard_id)
        after[move.target].add(move.shard_id)
    return after


def _skew(*levels: Levels) -> float:
    return max(
        (abs(load - one.average) / one.average for one in levels if one.average for load in one.loads.values()),
        default=0.0,
    )


def _notes(snapshot: Snapshot, loads: Levels, numbers: Levels, counted: Collection[int], moves: int) -> Iterator[str]:
    for name in sorted(snapshot.sessions):
        if name in snapshot.leaving or name in snapshot.draining:
            yield f"broker {name} is {_why_not(snapshot, name)} and not counted: it hands its shards over anyway"
    ownerless = sum(not snapshot.lives(owner) for owner in snapshot.owners.values())
    if ownerless:
        yield f"not counted, as another broker claims them: {number_of(ownerless, 'shard')} without a living owner"
    busy = sum(shard_id in snapshot.busy for shard_id in counted)
    if busy:
        yield f"left alone, as another rebalancing moves them: {number_of(busy, 'shard')}"
    if len(loads.loads) > 1 and counted and not loads.weights and not moves:
        yield (
            f"less than {WORTH_BYTES_PER_S / 1000:g} kB/s is published in the cluster, too little to judge loads "
            "by: only the numbers of shards are made even"
        )
    if moves >= MOVES_MAX:
        yield f"a plan has at most {MOVES_MAX:,} moves: plan again when they are done"
    elif _skew(loads, numbers) > TRIGGER:
        yield (
            "no more can be moved by this plan: a shard moves once in it, whole, within --topic, and a busy one is not "
            "moved for the sake of numbers"
        )


def _why_not(snapshot: Snapshot, broker_id: str) -> str:
    """Why a broker takes no shards, in words; empty if it does."""
    if broker_id not in snapshot.sessions:
        return "gone"
    if broker_id in snapshot.leaving:
        return "stopping"
    return "being drained" if broker_id in snapshot.draining else ""


def objection(snapshot: Snapshot, move: Move) -> str:
    """Why this shard must not move there now, in words; empty if it may."""
    owner = snapshot.owners.get(move.shard_id)
    if owner is None:
        return "it has no owner: its topic was deleted, or nobody has used it yet"
    if move.shard_id in snapshot.busy:
        return snapshot.busy[move.shard_id]
    if owner.broker_id != move.source:
        return f"its owner is {owner.broker_id}, not {move.source}"
    if move.source == move.target:
        return f"it is at {move.target} already"
    for broker_id in (move.target, move.source):
        why_not = _why_not(snapshot, broker_id)
        if why_not:
            return f"{broker_id} is {why_not}"
    return ""


def objections(snapshot: Snapshot, moves: Sequence[Move], revision: int) -> list[str]:
    """What speaks against a plan of that revision now, in words: what has changed since, and what it must not do."""
    if revision > snapshot.revision:
        return [f"the plan is of revision {revision}, and this store has come to {snapshot.revision}: it is of another"]
    found = [
        f"broker {name} registered after the plan was made"
        for name, session in sorted(snapshot.sessions.items())
        if session > revision
    ]
    seen: set[int] = set()
    problems: list[tuple[str, int, str]] = []
    for move in moves:
        problem = objection(snapshot, move)
        if not problem and snapshot.changed[move.shard_id] > revision:
            problem = "its owner changed after the plan was made"
        if move.shard_id in seen:
            problem = "the plan moves it twice"
        seen.add(move.shard_id)
        if problem:
            problems.append(("shard", move.shard_id, problem))
    return [*found, *by_reason(problems)]
