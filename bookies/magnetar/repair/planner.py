"""Which closed ledgers to move so that each stands in all racks it can, and every bookie holds its even share. Pure: a
function of one metadata snapshot.

Words:

load        of a bookie: what it holds of closed ledgers, in bytes (goal bytes) or in copies of ledgers (goal segments)
even share  of a bookie: its part of the sum of all loads. By bytes it is in proportion to the size of its disk, so that
            disks of different sizes fill up at the same time; equal disks have equal shares. By segments it is the same
            number for all. A read-only bookie that holds less than its share cannot take more: it keeps what it has,
            and the others share the rest
skew        the largest |load - even share| / even share of any counted bookie; 0 = even, 1 = one is empty
distance    the sum of |load - even share| over all counted bookies: twice what has to move at least

Counted are bookies that have a session and are not draining; the others are emptied or repaired by other means. Left
alone are ledgers that are being copied, that miss a copy, or that a draining bookie holds: they move anyway.

Rules of every plan:

1. A move takes one member's copy away and gives it to a bookie without a role in that ledger, and changes nothing else:
   as many copies as before, never two on one bookie.
2. No fragment of the ledger stands in fewer racks than before.
3. The target is writable for this ledger, is not draining, and keeps FREE_SHARE_MIN of its disk free.
4. First come moves that gain a rack, whatever they do to the shares. A fragment can stand in as many racks as it has
   members, or as counted bookies have; where it stands in fewer, one of two members in the same rack gives its copy to
   a bookie in a rack that the fragment lacks: of such members the one that has most too much, of such bookies the one
   that lacks most. By rule 2 no move takes that back. Bookies without a rack stand in one together, as in placement.
5. Then those that even. One takes from above the even share and gives to below it, and one of the two is outside of the
   tolerance. First moves that fall short of both shares: each lowers the distance by twice its bytes. Then, less being
   left than any ledger holds, moves that still lower the distance by their own bytes. Last, where racks or roles let
   nobody else give, those from one that lacks less than another (or has more too much): the distance stays, and both
   come nearer to each other. Two bookies of one rack share what the rack must hold, whatever the others have.
6. A ledger moves once in a plan: its moves depend on nothing that another one does, and there are never more of them
   than ledgers. Where that is not enough (more bookies joined than there were), the next plan goes on.
7. Large ledgers move before those of half their size, newer before older ones, and one bookie gives all it has to give
   before the next one does. So there are few moves, little is moved that is trimmed soon, and what leaves a bookie
   stood side by side in its files: these vanish as a whole, where ledgers here and there would only leave holes. New is
   what was created late: brokers take ids in blocks, so those in a row can be one broker's of a long time.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum

from magnetar.ledger.placement import is_eligible, lacks_racks, loses_rack
from magnetar.metadata.records import VACANT, BookieRegistration, BookieState, Goal, LedgerRecord, LedgerState, Move
from magnetar.node.wording import by_reason, number_of

TOLERANCE = 0.02
"""Of the even share: nearer than this nothing moves, so that a plan that was carried out leaves nothing to do."""
FREE_SHARE_MIN = 0.10
"""Of the target's disk after all moves: a bookie that is filled by them would soon be read-only."""
MOVES_MAX = 40_000
"""Of one plan. All of them stand in the metadata store."""
REASONS_MAX = 3
"""Why ledgers keep to fewer racks: the most frequent."""


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The records of a cluster as of `revision`.

    bookies    those with a session
    sessions   the revision at which each of these sessions began
    ledgers    every CLOSED ledger
    changed    the revision at which each ledger's record was last changed
    draining   bookies that an operator wants to be empty
    busy       ledgers that somebody moves or completes, each with who it is, in words
    under_way  of these the moves whose end is known: loads count as if they were done
    """

    revision: int
    bookies: Mapping[str, BookieRegistration]
    sessions: Mapping[str, int]
    ledgers: Sequence[LedgerRecord]
    changed: Mapping[int, int]
    draining: Collection[str] = ()
    busy: Mapping[int, str] = field(default_factory=dict)
    under_way: Mapping[int, Move] = field(default_factory=dict)

    def is_counted(self, bookie_id: str) -> bool:
        bookie = self.bookies.get(bookie_id)
        return bookie is not None and bookie.state is not BookieState.DRAINING and bookie_id not in self.draining


@dataclass(frozen=True, slots=True)
class BookieShare:
    """A bookie's load before and after, and its even share, in bytes or copies as the goal counts."""

    bookie_id: str
    before: int
    after: int
    even: float


@dataclass(frozen=True, slots=True)
class Plan:
    """Moves, and what they change. `notes`: what the plan leaves alone and why, in words."""

    revision: int
    goal: Goal
    moves: tuple[Move, ...]
    shares: tuple[BookieShare, ...]
    skew_before: float
    skew_after: float
    notes: tuple[str, ...] = ()

    @property
    def size_bytes(self) -> int:
        return sum(move.size_bytes for move in self.moves)


def plan(
    snapshot: Snapshot,
    goal: Goal = Goal.BYTES,
    *,
    max_bytes: int | None = None,
    shards: Collection[int] | None = None,
    tolerance: float = TOLERANCE,
) -> Plan:
    """The moves that bring the cluster to its goal; none if it is there.

    max_bytes   all moves together are at most so large
    shards      only ledgers of these shards move; what is even is still judged by all ledgers
    """
    found = _plan(snapshot, goal, max_bytes, shards, tolerance)
    if max_bytes is None or found.moves or found.skew_after <= tolerance:
        return found
    sizes = [move.size_bytes for move in _plan(snapshot, goal, None, shards, tolerance).moves]
    return replace(found, notes=(*found.notes[:-1], _too_large(max_bytes, min(sizes)))) if sizes else found


def _plan(
    snapshot: Snapshot, goal: Goal, max_bytes: int | None, shards: Collection[int] | None, tolerance: float
) -> Plan:
    balance = _Balance(snapshot, goal, tolerance, max_bytes)
    movable = [record for record in snapshot.ledgers if _is_movable(snapshot, record)]
    wanted = [record for record in movable if shards is None or record.shard_id in shards]
    # By segments every move counts the same: small ones first.
    sign = 1 if goal is Goal.SEGMENTS else -1
    wanted.sort(key=lambda record: (sign * _size_class(record), -record.created_us, -record.ledger_id))
    before, skew_before = dict(balance.loads), balance.skew()
    lacking = _gain_racks(balance, wanted)
    notes = [*_left_alone(snapshot, len(movable)), *_rack_notes(len(balance.moves), lacking)]
    _even_out(balance, wanted)
    after = balance.loads
    return Plan(
        snapshot.revision,
        goal,
        tuple(balance.moves.values()),
        tuple(BookieShare(name, round(before[name]), round(after[name]), balance.even[name]) for name in sorted(after)),
        skew_before,
        balance.skew(),
        (*notes, *_limits(balance, tolerance)),
    )


def _size_class(record: LedgerRecord) -> int:
    """One more for each doubling. Full segments, about a power of two in size, are in the middle of one."""
    return (record.length + record.length // 2).bit_length()


def _too_large(max_bytes: int, smallest_bytes: int) -> str:
    return (
        "--max-bytes is less than any segment that would move: allow at least the smallest of them "
        f"max_bytes=`{max_bytes}` smallest_bytes=`{smallest_bytes}`"
    )


def _gain_racks(balance: _Balance, ledgers: Sequence[LedgerRecord]) -> Counter[str]:
    """Why ledgers that stand in fewer racks than they could do not move, in words, and how many."""
    lacking: Counter[str] = Counter()
    for record in ledgers:
        if lacks_racks(record, balance.racks):
            found = balance.rack_move(record)
            if isinstance(found, Move):
                balance.apply(found)
            else:
                lacking[found] += 1
    return lacking


def _even_out(balance: _Balance, ledgers: Sequence[LedgerRecord]) -> None:
    for step in _Step:
        for record in ledgers:
            if balance.is_even() or balance.is_full:
                return
            move = balance.best_move(record, step)
            if move is not None:
                balance.apply(move)


class _Step(Enum):
    """What a move must do for evenness: see rule 5."""

    SHORT_OF_BOTH = 1
    NEARER = 2
    LEVEL = 3


class _Balance:
    """The loads of the counted bookies while moves are chosen.

    loads, even   by bookie, in the unit of the goal
    racks, room   by bookie; room: bytes that its disk takes from moves
    moves         that are chosen, by ledger
    _left         bytes that may still move
    _needy        bookies, the one that lacks most first; None = to be sorted again
    _giving       the source of the last move
    """

    def __init__(self, snapshot: Snapshot, goal: Goal, tolerance: float, max_bytes: int | None) -> None:
        self._snapshot = snapshot
        self._goal = goal
        self._tolerance = tolerance
        self._left: float = float("inf") if max_bytes is None else max_bytes
        self.moves: dict[int, Move] = {}
        counted = [name for name in snapshot.bookies if snapshot.is_counted(name)]
        self.loads = dict.fromkeys(counted, 0.0)
        for record in snapshot.ledgers:
            for bookie, size_bytes in _held_soon(snapshot, record).items():
                if bookie in self.loads:
                    self.loads[bookie] += self._unit(size_bytes)
        self.even = _even_shares(snapshot.bookies, self.loads, goal)
        self.racks = {name: snapshot.bookies[name].rack for name in counted}
        self.room = {name: _room(snapshot.bookies[name]) for name in counted}
        self._needy: list[str] | None = None
        self._giving = ""

    def _unit(self, size_bytes: int) -> float:
        return float(size_bytes if self._goal is Goal.BYTES else size_bytes > 0)

    def excess(self, bookie_id: str) -> float:
        return self.loads[bookie_id] - self.even[bookie_id]

    def skew(self) -> float:
        return max((abs(self.excess(name)) / even for name, even in self.even.items() if even > 0), default=0.0)

    def _is_near(self, bookie_id: str) -> bool:
        return abs(self.excess(bookie_id)) <= self._tolerance * self.even[bookie_id]

    def is_even(self) -> bool:
        return all(self._is_near(name) for name in self.loads)

    @property
    def is_full(self) -> bool:
        return len(self.moves) >= MOVES_MAX

    def needy(self) -> list[str]:
        if self._needy is None:
            self._needy = sorted(self.loads, key=lambda name: (self.excess(name), name))
        return self._needy

    def rack_move(self, record: LedgerRecord) -> Move | str:
        """One that gains a rack for a ledger that lacks some, or why there is none, in words."""
        if self.is_full:
            return "the plan has all the moves it can have"
        held = record.bytes_held()
        reasons: list[str] = []
        for source, target in self._rack_gains(record):
            size_bytes = held.get(source, 0)
            if size_bytes > self._left:
                reason = "it is larger than --max-bytes leaves"
            elif size_bytes > self.room[target]:
                reason = f"{target} has no room for it"
            else:
                reason = objection(self._snapshot, record, source, target)
            if not reason:
                return Move(record.ledger_id, source, target, size_bytes)
            reasons.append(reason)
        return reasons[0]

    def _rack_gains(self, record: LedgerRecord) -> Iterator[tuple[str, str]]:
        """Pairs of a source and a target by which a fragment of the ledger gains a rack, the best one first."""
        fragments = [[self.racks[name] for name in fragment.bookies] for fragment in record.fragments]
        for source in sorted(record.bookies(), key=lambda name: (-self.excess(name), name)):
            shared = [
                racks
                for fragment, racks in zip(record.fragments, fragments, strict=True)
                if source in fragment.bookies and racks.count(self.racks[source]) > 1
            ]
            for target in self.needy():
                if any(self.racks[target] not in racks for racks in shared):
                    yield source, target

    def best_move(self, record: LedgerRecord, step: _Step) -> Move | None:
        """From who gives already, or has most too much, to who lacks most and may have it; None if it helps nobody."""
        if record.ledger_id in self.moves:
            return None
        held = record.bytes_held()
        level = step is _Step.LEVEL
        sources = [name for name in held if (level or self.excess(name) > 0) and 0 < held[name] <= self._left]
        for source in sorted(sources, key=lambda name: (name != self._giving, -self.excess(name), name)):
            size_bytes = held[source]
            for target in self.needy():
                if self.excess(target) >= (self.excess(source) if level else 0):
                    break
                if (
                    self._helps(source, target, self._unit(size_bytes), step)
                    and size_bytes <= self.room[target]
                    and not objection(self._snapshot, record, source, target)
                ):
                    return Move(record.ledger_id, source, target, size_bytes)
        return None

    def _helps(self, source: str, target: str, unit: float, step: _Step) -> bool:
        if self._is_near(source) and self._is_near(target):
            return False
        excess, lack = self.excess(source), -self.excess(target)
        if step is _Step.SHORT_OF_BOTH:
            return unit <= excess and unit <= lack
        nearer = abs(excess) + abs(lack) - abs(excess - unit) - abs(lack - unit)
        return nearer >= unit if step is _Step.NEARER else nearer >= 0 and unit < excess + lack

    def apply(self, move: Move) -> None:
        self.loads[move.source] -= self._unit(move.size_bytes)
        self.loads[move.target] += self._unit(move.size_bytes)
        self.room[move.target] -= move.size_bytes
        self.moves[move.ledger_id] = move
        self._left -= move.size_bytes
        self._needy = None
        self._giving = move.source


def _held_soon(snapshot: Snapshot, record: LedgerRecord) -> dict[str, int]:
    held = record.bytes_held()
    move = snapshot.under_way.get(record.ledger_id)
    if move is not None and move.source in held:
        held[move.target] = held.get(move.target, 0) + held.pop(move.source)
    return held


def _even_shares(bookies: Mapping[str, BookieRegistration], loads: Mapping[str, float], goal: Goal) -> dict[str, float]:
    sized = goal is Goal.BYTES and all(bookies[name].disk_total_bytes > 0 for name in loads)
    weights = {name: float(bookies[name].disk_total_bytes) if sized else 1.0 for name in loads}
    kept: dict[str, float] = {}
    while True:
        rest = sum(loads.values()) - sum(kept.values())
        weight = sum(weight for name, weight in weights.items() if name not in kept)
        shares = {name: rest * weights[name] / weight for name in loads if name not in kept}
        full = {
            name: loads[name]
            for name, share in shares.items()
            if bookies[name].state is BookieState.READ_ONLY and loads[name] < share
        }
        if not full:
            return {**shares, **kept}
        kept |= full


def _room(bookie: BookieRegistration) -> float:
    if bookie.disk_total_bytes <= 0:
        return float("inf")
    return bookie.disk_free_bytes - FREE_SHARE_MIN * bookie.disk_total_bytes


def _is_movable(snapshot: Snapshot, record: LedgerRecord) -> bool:
    """A whole ledger that nobody else is going to move."""
    if record.state is not LedgerState.CLOSED or record.copy is not None or record.ledger_id in snapshot.busy:
        return False
    if any(VACANT in fragment.bookies for fragment in record.fragments):
        return False
    return all(snapshot.is_counted(bookie) for bookie in record.bookies())


def objection(snapshot: Snapshot, record: LedgerRecord, source: str, target: str) -> str:
    """Why this copy must not move there, in words; empty if it may."""
    bookie = snapshot.bookies.get(target)
    if bookie is None:
        return f"{target} has no session"
    if not snapshot.is_counted(target):
        return f"{target} is draining"
    if not is_eligible(bookie, record.ledger_id):
        what = "is read-only" if bookie.state is BookieState.READ_ONLY else "takes no old ledgers since its repair"
        return f"{target} {what}"
    if target in record.roles():
        return f"{target} has a copy of it already"
    if source not in record.bookies():
        return f"{source} has no copy of it"
    racks = {name: bookie.rack for name, bookie in snapshot.bookies.items()}
    if loses_rack(record, source, target, racks):
        return f"it would stand in fewer racks without {source}"
    return ""


def objections(snapshot: Snapshot, moves: Sequence[Move], revision: int) -> list[str]:
    """What speaks against a plan of that revision now, in words: what has changed since, and what it must not do.

    Ledgers that it does not name may come and go.
    """
    found: list[str] = []
    if revision > snapshot.revision:
        return [f"the plan is of revision {revision}, and this store has come to {snapshot.revision}: it is of another"]
    found += (
        f"bookie {name} registered after the plan was made"
        for name, session in sorted(snapshot.sessions.items())
        if session > revision
    )
    records = {record.ledger_id: record for record in snapshot.ledgers}
    seen: set[int] = set()
    problems: list[tuple[str, int, str]] = []
    for move in moves:
        problem = _objection_to(snapshot, records.get(move.ledger_id), move, revision)
        if move.ledger_id in seen:
            problem = "the plan moves it twice"
        seen.add(move.ledger_id)
        if problem:
            problems.append(("ledger", move.ledger_id, problem))
    return [*found, *by_reason(problems)]


def _objection_to(snapshot: Snapshot, record: LedgerRecord | None, move: Move, revision: int) -> str:
    if record is None:
        return "it was trimmed or deleted"
    if move.ledger_id in snapshot.busy:
        return snapshot.busy[move.ledger_id]
    if record.copy is not None:
        return f"a copy of it is being made at {record.copy.target}"
    if snapshot.changed[move.ledger_id] > revision:
        return "it was changed: it was closed, moved or repaired after the plan was made"
    away = sorted(bookie for bookie in record.bookies() if not snapshot.is_counted(bookie))
    if away:
        return f"{', '.join(away)}, where it stands, is draining or has no session"
    return objection(snapshot, record, move.source, move.target)


def _left_alone(snapshot: Snapshot, movable: int) -> list[str]:
    draining = sorted(name for name in snapshot.bookies if not snapshot.is_counted(name))
    notes = [f"bookie {name} is draining and not counted" for name in draining]
    known = {record.ledger_id for record in snapshot.ledgers}
    busy = Counter(why for ledger_id, why in snapshot.busy.items() if ledger_id in known)
    notes += (f"left alone: {number_of(count, 'ledger')}, as {why}" for why, count in busy.most_common(REASONS_MAX))
    alone = len(snapshot.ledgers) - movable - busy.total()
    if alone:
        notes.append(
            f"left alone, as they are being copied, miss a copy, or stand on a bookie that is draining or lost: "
            f"{number_of(alone, 'ledger')}"
        )
    return notes


def _rack_notes(gained: int, lacking: Counter[str]) -> list[str]:
    notes = [f"first come those that gain a rack for a ledger: {number_of(gained, 'move')}"] if gained else []
    if lacking:
        named = lacking.most_common(REASONS_MAX)
        reasons = "; ".join(f"{reason} ({ledgers})" for reason, ledgers in named)
        more = "" if len(named) == len(lacking) else "; and more like these"
        notes.append(
            f"in fewer racks than possible: {number_of(lacking.total(), 'ledger')} that cannot move there now: "
            f"{reasons}{more}"
        )
    return notes


def _limits(balance: _Balance, tolerance: float) -> list[str]:
    if balance.is_full:
        return [f"a plan has at most {MOVES_MAX:,} moves: plan again when they are done"]
    if balance.skew() > tolerance:
        again = "; plan again when it is done" if balance.moves else ""
        return [
            "no more can be moved by this plan: a ledger moves once in it, never to a bookie that holds it or to fewer "
            f"racks or to a disk without room, and within --max-bytes and --topic{again}"
        ]
    return []
