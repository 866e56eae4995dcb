"""Rebalancing of bookies and brokers: plans, operations that carry them out, and the comparison of copies."""

from __future__ import annotations

import json
import secrets
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from typing import Any, Literal

from magnetar.client.admin_calls import AdminCalls
from magnetar.client.errors import InvalidArgument, LedgerNotFound
from magnetar.client.layouts import full_topic
from magnetar.client.message import from_microseconds
from magnetar.v1 import metadata_pb2, rebalance_pb2

RebalanceGoal = Literal["bytes", "segments", "brokers"]

THROTTLE_DEFAULT = 50_000_000
"""Bytes per second of all copies of an operation together."""
MOVES_PAGE = 5_000
MARK_BYTES = 16

_GOALS: dict[str, metadata_pb2.Goal] = {
    "bytes": metadata_pb2.GOAL_BYTES,
    "segments": metadata_pb2.GOAL_SEGMENTS,
    "brokers": metadata_pb2.GOAL_BROKERS,
}


@dataclass(frozen=True, slots=True)
class RebalanceMove:
    """A ledger's copy at the bookie `source` goes to `target`; or a shard goes between brokers, and `ledger` is 0.

    state   PENDING, DONE or SKIPPED, then with a reason
    load    of the shard, when it was planned, as a part of the cluster's
    """

    ledger: int
    source: str
    target: str
    bytes: int
    state: str = "PENDING"
    reason: str = ""
    shard: int = 0
    load: float = 0.0

    def as_json(self) -> dict[str, Any]:
        """As it stands in the JSON of a plan."""
        if self.shard:
            return {"shard": self.shard, "from": self.source, "to": self.target, "load": self.load}
        return {"ledger": self.ledger, "from": self.source, "to": self.target, "bytes": self.bytes}


@dataclass(frozen=True, slots=True)
class BookieShare:
    """What a bookie holds before and after a plan, and its even share: in bytes or copies, as the goal counts."""

    bookie: str
    before: int
    after: int
    even: float


@dataclass(frozen=True, slots=True)
class BrokerBalance:
    """What a broker owns before and after a plan. Loads are parts of the cluster's; all 0.0 if it is quiet."""

    broker: str
    shards_before: int
    shards_after: int
    load_before: float
    load_after: float


@dataclass(frozen=True, slots=True)
class RebalancePlan:
    """Moves that make a cluster even, as of a revision of its metadata. An empty one: there is nothing to do.

    skew_before, skew_after   the largest distance of a bookie or broker from its even share, as a part of it: 0 = even
    bookies, brokers          one of them, as the goal says
    notes                     what the plan leaves alone, and why
    throttle                  bytes per second for which it was saved, used where no other is given
    """

    revision: int
    goal: str
    moves: tuple[RebalanceMove, ...]
    bytes: int
    skew_before: float
    skew_after: float
    bookies: tuple[BookieShare, ...] = ()
    brokers: tuple[BrokerBalance, ...] = ()
    notes: tuple[str, ...] = ()
    throttle: int | None = None

    @property
    def of_brokers(self) -> bool:
        return self.goal == "brokers"

    def seconds_at(self, throttle: int) -> float:
        """How long it takes at so many bytes per second."""
        return self.bytes / throttle

    def as_json(self, throttle: int = THROTTLE_DEFAULT) -> dict[str, Any]:
        """The documented JSON, to be saved and given to `from_json`."""
        if self.of_brokers:
            shares = {"brokers": [asdict(one) for one in self.brokers]}
        else:
            shares = {"bookies": [asdict(one) for one in self.bookies]}
        return {
            "revision": self.revision,
            "goal": self.goal,
            "moves": [move.as_json() for move in self.moves],
            "bytes": self.bytes,
            "skew_before": self.skew_before,
            "skew_after": self.skew_after,
            "seconds_at_throttle": self.seconds_at(throttle),
            **shares,
            "notes": list(self.notes),
            "throttle": None if self.of_brokers else throttle,
        }

    @classmethod
    def from_json(cls, text: str) -> RebalancePlan:
        """A saved plan. Raises InvalidArgument for what is none."""
        try:
            saved = json.loads(text)
            goal, revision = str(saved["goal"]), _saved_number(saved, "revision")
            moves = tuple(_saved_move(move, of_brokers=goal == "brokers") for move in saved["moves"])
            skews = float(saved["skew_before"]), float(saved["skew_after"])
            throttle = None if saved.get("throttle") is None else _saved_number(saved, "throttle")
        except (ValueError, TypeError, KeyError, OverflowError, RecursionError) as error:
            remedy = "make one with `magnetar rebalance plan --output json`"
            raise InvalidArgument(f"this is no saved plan: {remedy} ({_what_is_wrong(error)})") from None
        return cls(revision, goal, moves, sum(move.bytes for move in moves), *skews, throttle=throttle)


def _what_is_wrong(error: Exception) -> str:
    """With a saved plan, in words."""
    if isinstance(error, KeyError):
        return f"it has no {error}"
    return "its JSON has another structure" if isinstance(error, TypeError) else str(error)


@dataclass(frozen=True, slots=True)
class BookieTraffic:
    """What an operation brings to a bookie and takes from it, in bytes, and how much of that is done."""

    bookie: str
    bytes_in: int
    bytes_in_done: int
    bytes_out: int
    bytes_out_done: int


@dataclass(frozen=True, slots=True)
class BrokerTraffic:
    """How many shards an operation brings to a broker and takes from it, and how many of them have moved."""

    broker: str
    shards_in: int
    shards_in_done: int
    shards_out: int
    shards_out_done: int


@dataclass(frozen=True, slots=True)
class RebalanceOperation:
    """A plan that is carried out, in the cluster: it goes on whoever crashes.

    state      RUNNING, PAUSED, CANCELLING (copies are taken back), CANCELLED or DONE
    throttle   bytes per second of all its copies together; 0 if it moves shards
    rate       bytes or shards per second in the last seconds, on average once it has ended; `eta_s` follows from it,
               None = unknown
    problems   why it does not go on, in words; empty while it does
    skipped    the first moves that could not be made, with their reasons
    notes      what was left out when it was ordered
    """

    operation: str
    goal: str
    state: str
    throttle: int
    percent: float
    moves: int
    moves_done: int
    moves_skipped: int
    bytes: int
    bytes_done: int
    bytes_skipped: int
    bytes_remaining: int
    rate: int
    eta_s: float | None
    problems: tuple[str, ...]
    revision: int
    rollback_of: str
    created: datetime
    updated: datetime | None
    ended: datetime | None
    bookies: tuple[BookieTraffic, ...] = ()
    brokers: tuple[BrokerTraffic, ...] = ()
    skipped: tuple[RebalanceMove, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def of_brokers(self) -> bool:
        return self.goal == "brokers"


@dataclass(frozen=True, slots=True)
class LedgerVerification:
    """What was compared of a ledger. `copies`: entries that a bookie has, and that equal all others by their checksums.

    bytes      of all copies, about
    problems   what is missing, damaged or different, in words
    """

    ledger: int
    entries: int
    copies: int
    bytes: int
    bookies: tuple[str, ...]
    problems: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class RebalanceVerification:
    """The ledgers that an operation moved, compared. `trimmed`: of these are gone since."""

    operation: str
    ledgers: int
    trimmed: int
    entries: int
    copies: int
    bytes: int
    problems: tuple[str, ...]


class LedgerVerifier(AdminCalls):
    """The comparison that ledgers and rebalancing share."""

    async def _verify_ledger(self, ledger: int) -> LedgerVerification:
        if not 0 < ledger < 1 << 64:
            raise InvalidArgument(f"a ledger id is a positive number: ledger=`{ledger}`")
        found = LedgerVerification(ledger, 0, 0, 0, (), ())
        next_entry = 0
        while True:
            request = rebalance_pb2.VerifyLedgerRequest(ledger_id=ledger, first_entry=next_entry)
            part = await self._ask("VerifyLedger", request, rebalance_pb2.VerifyLedgerResponse)
            found = LedgerVerification(
                ledger,
                found.entries + part.entries,
                found.copies + part.copies,
                found.bytes + part.bytes,
                tuple(sorted({*found.bookies, *part.bookies})),
                (*found.problems, *part.problems),
            )
            next_entry = part.next_entry
            if not next_entry:
                return found


class Rebalance(LedgerVerifier):
    """Moves closed segments between bookies, or shards between brokers, until each has its even share.

    What is ordered goes on in the cluster. All orders raise OrderRefused for what cannot be as things stand.
    """

    async def plan(
        self, *, goal: RebalanceGoal = "bytes", max_bytes: int | None = None, topic: str | None = None
    ) -> RebalancePlan:
        """What is to be moved now: at most `max_bytes`, and only segments or shards of `topic` if they are given.

        The goals bytes and segments are about bookies. With brokers there are no bytes to be bounded.
        """
        request = rebalance_pb2.PlanRebalanceRequest(
            goal=_goal(goal), max_bytes=max_bytes, topic="" if topic is None else full_topic(topic)
        )
        return _plan(await self._ask("PlanRebalance", request, rebalance_pb2.PlanRebalanceResponse))

    async def apply(
        self, plan: RebalancePlan, *, throttle: int | None = None, dry_run: bool = False
    ) -> RebalanceOperation:
        """Begins to carry a plan out. It is refused when it holds no more, with what has changed since it was made.

        throttle   bytes per second, by default the plan's own, or THROTTLE_DEFAULT; shards move without one
        Returns the operation as it begins; it has an id, and goes on by itself.
        """
        request = rebalance_pb2.ApplyRebalanceRequest(
            revision=plan.revision,
            goal=_goal(plan.goal),
            moves=[
                rebalance_pb2.RebalanceMove(
                    ledger_id=m.ledger, shard_id=m.shard, source=m.source, target=m.target, size_bytes=m.bytes
                )
                for m in plan.moves
            ],
            bytes_per_s=_throttle(_throttle_of(plan) if throttle is None else throttle),
            mark=secrets.token_bytes(MARK_BYTES),
            dry_run=dry_run,
        )
        response = await self._call("ApplyRebalance", request, rebalance_pb2.ApplyRebalanceResponse)
        return replace(_described(response.operation), notes=tuple(response.notes))

    async def list(self) -> list[RebalanceOperation]:
        """All operations that the cluster remembers, the oldest first."""
        response = await self._ask(
            "ListRebalances", rebalance_pb2.ListRebalancesRequest(), rebalance_pb2.ListRebalancesResponse
        )
        return [_operation(one) for one in response.operations]

    async def status(self, operation: str | None = None) -> RebalanceOperation:
        """How far an operation is; if none is named, the newest that goes on, else the newest."""
        request = rebalance_pb2.DescribeRebalanceRequest(operation_id=operation or "")
        response = await self._ask("DescribeRebalance", request, rebalance_pb2.DescribeRebalanceResponse)
        return _described(response.operation)

    async def throttle(self, operation: str, throttle: int, *, dry_run: bool = False) -> RebalanceOperation:
        """Changes how many bytes per second all copies of the operation take together."""
        return await self._change(operation, bytes_per_s=_throttle(throttle), dry_run=dry_run)

    async def pause(self, operation: str, *, dry_run: bool = False) -> RebalanceOperation:
        """Begins no more copies; those under way end."""
        return await self._change(operation, metadata_pb2.OPERATION_STATE_PAUSED, dry_run=dry_run)

    async def resume(self, operation: str, *, dry_run: bool = False) -> RebalanceOperation:
        """Goes on after a pause."""
        return await self._change(operation, metadata_pb2.OPERATION_STATE_RUNNING, dry_run=dry_run)

    async def cancel(self, operation: str, *, dry_run: bool = False) -> RebalanceOperation:
        """Ends it, and drops copies that are not finished; what was moved stays: see `rollback`."""
        return await self._change(operation, metadata_pb2.OPERATION_STATE_CANCELLED, dry_run=dry_run)

    async def rollback(
        self, operation: str, *, throttle: int | None = None, dry_run: bool = False
    ) -> RebalanceOperation:
        """Begins an operation that takes back what this one moved, once it has ended; at its throttle by default."""
        request = rebalance_pb2.RollBackRebalanceRequest(
            operation_id=operation,
            bytes_per_s=_throttle(throttle),
            mark=secrets.token_bytes(MARK_BYTES),
            dry_run=dry_run,
        )
        response = await self._call("RollBackRebalance", request, rebalance_pb2.RollBackRebalanceResponse)
        return replace(_described(response.operation), notes=tuple(response.notes))

    async def verify(
        self, operation: str | None = None, *, on_ledger: Callable[[LedgerVerification], None] | None = None
    ) -> RebalanceVerification:
        """Compares all copies of every ledger that the operation moved. `on_ledger` is told of each.

        Raises InvalidArgument for one that moved shards: it copied nothing.
        """
        wanted = await self.status(operation)
        name = wanted.operation
        if wanted.of_brokers:
            raise InvalidArgument(
                f"shards were handed over, and no bytes copied that could be compared: operation=`{name}`"
            )
        found = RebalanceVerification(name, 0, 0, 0, 0, 0, ())
        skip, more = 0, True
        while more:
            request = rebalance_pb2.ListRebalanceMovesRequest(operation_id=name, skip=skip, limit=MOVES_PAGE)
            page = await self._ask("ListRebalanceMoves", request, rebalance_pb2.ListRebalanceMovesResponse)
            for move in page.moves:
                if move.state == metadata_pb2.MOVE_STATE_DONE:
                    found = await self._verify_one(found, move.ledger_id, on_ledger)
            skip, more = skip + len(page.moves), page.more and bool(page.moves)
        return found

    async def _verify_one(
        self,
        found: RebalanceVerification,
        ledger: int,
        on_ledger: Callable[[LedgerVerification], None] | None,
    ) -> RebalanceVerification:
        try:
            one = await self._verify_ledger(ledger)
        except LedgerNotFound:
            return replace(found, trimmed=found.trimmed + 1)
        if on_ledger is not None:
            on_ledger(one)
        return replace(
            found,
            ledgers=found.ledgers + 1,
            entries=found.entries + one.entries,
            copies=found.copies + one.copies,
            bytes=found.bytes + one.bytes,
            problems=(*found.problems, *one.problems),
        )

    async def _change(
        self,
        operation: str,
        state: metadata_pb2.OperationState = metadata_pb2.OPERATION_STATE_UNSPECIFIED,
        *,
        bytes_per_s: int = 0,
        dry_run: bool,
    ) -> RebalanceOperation:
        request = rebalance_pb2.ChangeRebalanceRequest(
            operation_id=operation, state=state, bytes_per_s=bytes_per_s, dry_run=dry_run
        )
        response = await self._call("ChangeRebalance", request, rebalance_pb2.ChangeRebalanceResponse)
        return _operation(response.operation)


def _goal(goal: str) -> metadata_pb2.Goal:
    if goal not in _GOALS:
        raise InvalidArgument(f"a rebalancing has a goal, {', '.join(_GOALS)}: goal=`{goal}`")
    return _GOALS[goal]


def _throttle(throttle: int | None) -> int:
    if throttle is None:
        return 0
    if throttle <= 0:
        raise InvalidArgument(
            f"a throttle is above zero bytes per second: pause the operation to stop it throttle=`{throttle}`"
        )
    return throttle


def _goal_name(goal: metadata_pb2.Goal) -> str:
    return metadata_pb2.Goal.Name(goal).removeprefix("GOAL_").lower()


def _plan(plan: rebalance_pb2.PlanRebalanceResponse) -> RebalancePlan:
    moves = tuple(_move(move) for move in plan.moves)
    return RebalancePlan(
        plan.revision,
        _goal_name(plan.goal),
        moves,
        sum(move.bytes for move in moves),
        plan.skew_before,
        plan.skew_after,
        tuple(BookieShare(b.bookie_id, b.before, b.after, b.even) for b in plan.bookies),
        tuple(
            BrokerBalance(b.broker_id, b.shards_before, b.shards_after, b.load_before, b.load_after)
            for b in plan.brokers
        ),
        tuple(plan.notes),
    )


def _move(move: rebalance_pb2.RebalanceMove) -> RebalanceMove:
    state = metadata_pb2.MoveState.Name(move.state).removeprefix("MOVE_STATE_")
    return RebalanceMove(
        move.ledger_id, move.source, move.target, move.size_bytes, state, move.reason, move.shard_id, move.load
    )


def _throttle_of(plan: RebalancePlan) -> int | None:
    if plan.of_brokers:
        return None
    return THROTTLE_DEFAULT if plan.throttle is None else plan.throttle


def _saved_move(move: Any, *, of_brokers: bool) -> RebalanceMove:
    source, target = _saved_name(move, "from"), _saved_name(move, "to")
    if of_brokers:
        return RebalanceMove(0, source, target, 0, shard=_saved_number(move, "shard"), load=float(move["load"]))
    return RebalanceMove(_saved_number(move, "ledger"), source, target, _saved_number(move, "bytes"))


def _saved_name(saved: Any, name: str) -> str:
    """Raises ValueError for what cannot be sent: half of a surrogate pair."""
    return str(saved[name]).encode().decode()


def _saved_number(saved: Any, name: str) -> int:
    number = saved[name]
    if type(number) is not int:
        raise ValueError(f"not a whole number: {name}=`{number}`")
    if not 0 <= number < 1 << 64:
        raise ValueError(f"out of range: {name}=`{number}`")
    return number


def _described(description: rebalance_pb2.RebalanceDescription) -> RebalanceOperation:
    traffic = tuple(
        BookieTraffic(b.bookie_id, b.bytes_in, b.bytes_in_done, b.bytes_out, b.bytes_out_done)
        for b in description.bookies
    )
    brokers = tuple(
        BrokerTraffic(b.broker_id, b.shards_in, b.shards_in_done, b.shards_out, b.shards_out_done)
        for b in description.brokers
    )
    skipped = tuple(_move(move) for move in description.skipped)
    return replace(_operation(description.operation), bookies=traffic, brokers=brokers, skipped=skipped)


def _operation(operation: metadata_pb2.Operation) -> RebalanceOperation:
    wanted = operation.size_bytes - operation.bytes_skipped
    remaining = max(0, wanted - operation.bytes_done)
    moves_wanted = operation.moves - operation.moves_skipped
    if wanted:
        percent = 100.0 * operation.bytes_done / wanted
    else:
        percent = 100.0 * operation.moves_done / moves_wanted if moves_wanted else 100.0
    running = operation.state == metadata_pb2.OPERATION_STATE_RUNNING
    speed = operation.rate or (0 if operation.problems else operation.bytes_per_s)
    of_brokers = operation.goal == metadata_pb2.GOAL_BROKERS
    to_do = max(0, moves_wanted - operation.moves_done) if of_brokers else remaining
    return RebalanceOperation(
        operation=operation.operation_id,
        goal=_goal_name(operation.goal),
        state=_state_name(operation),
        throttle=operation.bytes_per_s,
        percent=percent,
        moves=operation.moves,
        moves_done=operation.moves_done,
        moves_skipped=operation.moves_skipped,
        bytes=operation.size_bytes,
        bytes_done=operation.bytes_done,
        bytes_skipped=operation.bytes_skipped,
        bytes_remaining=remaining,
        rate=operation.rate,
        eta_s=to_do / speed if running and speed else None,
        problems=tuple(operation.problems),
        revision=operation.revision,
        rollback_of=operation.rollback_of,
        created=from_microseconds(operation.created_us),
        updated=_time(operation.updated_us),
        ended=_time(operation.ended_us),
    )


def _state_name(operation: metadata_pb2.Operation) -> str:
    if operation.state == metadata_pb2.OPERATION_STATE_CANCELLED and not operation.ended_us:
        return "CANCELLING"
    return metadata_pb2.OperationState.Name(operation.state).removeprefix("OPERATION_STATE_")


def _time(time_us: int) -> datetime | None:
    return from_microseconds(time_us) if time_us else None
