"""The part of the admin service that rebalances. Any broker answers: orders stand in the metadata store.

Who carries an operation out is the elected auditor's process, for brokers the elected balancer; nothing here waits for
them.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence

from magnetar.broker.refusals import topic_name
from magnetar.broker.shard_orders import ShardOrders
from magnetar.broker.shard_planner import ShardPlan
from magnetar.broker.topics import Topics
from magnetar.ledger.bookie_rpc import Bookies
from magnetar.metadata.codec import encode_operation
from magnetar.metadata.records import Goal, Move, MoveState, Operation, OperationState
from magnetar.node.rpc import Context, Refused, invalid_argument, parse
from magnetar.repair.listings import Listings
from magnetar.repair.orders import Ordered, OrderRefused, Orders, no_throttle
from magnetar.repair.planner import Plan
from magnetar.repair.verification import Verification, verify
from magnetar.v1 import common_pb2, metadata_pb2
from magnetar.v1 import rebalance_pb2 as pb

MOVES_PAGE_MAX = 5_000
SKIPPED_SHOWN_MAX = 20
MARK_BYTES_MAX = 64
VERIFY_S = 4.0
"""Of one call; who asks goes on where it ended."""
VERIFY_ATTEMPTS = 3
"""A copy that is moved meanwhile is missing where it was: the ledger is read again."""

Method = Callable[[bytes, Context], Awaitable[bytes]]


class RebalanceAdmin:
    def __init__(
        self,
        topics: Topics,
        orders: Orders,
        shard_orders: ShardOrders,
        bookies: Bookies,
        listings: Listings,
    ) -> None:
        self._topics = topics
        self._bookies = bookies
        self._orders = orders
        self._shard_orders = shard_orders
        self._listings = listings

    def methods(self) -> Mapping[str, Method]:
        return {
            "PlanRebalance": _refusing(self.plan),
            "ApplyRebalance": _refusing(self.apply),
            "RollBackRebalance": _refusing(self.roll_back),
            "ChangeRebalance": _refusing(self.change),
            "ListRebalances": _refusing(self.list),
            "DescribeRebalance": _refusing(self.describe),
            "ListRebalanceMoves": _refusing(self.list_moves),
            "VerifyLedger": _refusing(self.verify_ledger),
        }

    # --- orders ---

    async def plan(self, data: bytes, _context: Context) -> bytes:
        request = parse(pb.PlanRebalanceRequest, data)
        shards = None
        if request.topic:
            layout = await self._topics.get(topic_name(request.topic))
            shards = {shard.shard_id for shard in layout.shards}
        goal = _goal(request.goal)
        max_bytes = request.max_bytes if request.HasField("max_bytes") else None
        if goal is not Goal.BROKERS:
            return _plan(await self._orders.plan(goal, max_bytes=max_bytes, shards=shards)).SerializeToString()
        if max_bytes is not None:
            raise OrderRefused("shards move by hand-off, which copies no bytes: leave --max-bytes out, name a --topic")
        return _shard_plan(await self._shard_orders.plan(shards)).SerializeToString()

    async def apply(self, data: bytes, _context: Context) -> bytes:
        request = parse(pb.ApplyRebalanceRequest, data)
        goal, mark, dry_run = _goal(request.goal), _mark(request.mark), request.dry_run
        moves = [_move_from(move, goal) for move in request.moves]
        if goal is not Goal.BROKERS:
            rate = request.bytes_per_s
            ordered = await self._orders.apply(goal, request.revision, moves, rate, mark, dry_run=dry_run)
        elif request.bytes_per_s:
            raise no_throttle()
        else:
            ordered = await self._shard_orders.apply(request.revision, moves, mark, dry_run=dry_run)
        response = pb.ApplyRebalanceResponse(operation=_description(ordered), notes=ordered.notes)
        return response.SerializeToString()

    async def roll_back(self, data: bytes, _context: Context) -> bytes:
        request = parse(pb.RollBackRebalanceRequest, data)
        name, rate, mark = request.operation_id, request.bytes_per_s, _mark(request.mark)
        goal = (await self._orders.operation(name)).operation.goal
        if goal is not Goal.BROKERS:
            ordered = await self._orders.roll_back(name, rate, mark, dry_run=request.dry_run)
        elif rate:
            raise no_throttle()
        else:
            ordered = await self._shard_orders.roll_back(name, mark, dry_run=request.dry_run)
        response = pb.RollBackRebalanceResponse(operation=_description(ordered), notes=ordered.notes)
        return response.SerializeToString()

    async def change(self, data: bytes, _context: Context) -> bytes:
        request = parse(pb.ChangeRebalanceRequest, data)
        state = _wanted_state(request.state)
        changed = await self._orders.change(
            request.operation_id, state=state, bytes_per_s=request.bytes_per_s, dry_run=request.dry_run
        )
        return pb.ChangeRebalanceResponse(operation=_operation(changed)).SerializeToString()

    # --- what is known ---

    async def list(self, data: bytes, _context: Context) -> bytes:
        parse(pb.ListRebalancesRequest, data)
        operations = [_operation(one) for one in await self._orders.operations()]
        return pb.ListRebalancesResponse(operations=operations).SerializeToString()

    async def describe(self, data: bytes, _context: Context) -> bytes:
        name = parse(pb.DescribeRebalanceRequest, data).operation_id
        ordered = await (self._orders.operation(name) if name else self._orders.current())
        return pb.DescribeRebalanceResponse(operation=_description(ordered)).SerializeToString()

    async def list_moves(self, data: bytes, _context: Context) -> bytes:
        request = parse(pb.ListRebalanceMovesRequest, data)
        if request.limit > MOVES_PAGE_MAX:
            raise invalid_argument(f"a page has at most {MOVES_PAGE_MAX} moves limit=`{request.limit}`")
        moves = (await self._orders.operation(request.operation_id)).moves
        end = request.skip + (request.limit or MOVES_PAGE_MAX)
        page = [_move(move) for move in moves[request.skip : end]]
        return pb.ListRebalanceMovesResponse(moves=page, more=end < len(moves)).SerializeToString()

    async def verify_ledger(self, data: bytes, _context: Context) -> bytes:
        request = parse(pb.VerifyLedgerRequest, data)
        found = await self._verify(request.ledger_id, request.first_entry)
        return pb.VerifyLedgerResponse(
            next_entry=found.next_entry,
            entries=found.entries,
            copies=found.copies,
            bytes=found.size_bytes,
            bookies=sorted(found.bookies),
            problems=found.said(),
        ).SerializeToString()

    async def _verify(self, ledger_id: int, first_entry: int) -> Verification:
        deadline = time.monotonic() + VERIFY_S
        ledger = await self._listings.ledger(ledger_id)
        for _ in range(VERIFY_ATTEMPTS):
            if ledger is None:
                raise Refused(
                    common_pb2.ERROR_REASON_LEDGER_NOT_FOUND,
                    f"there is no closed ledger of this id: it is open still, or was trimmed ledger=`{ledger_id}`",
                )
            found = await verify(ledger.record, self._bookies, first_entry, lambda: time.monotonic() >= deadline)
            before, ledger = ledger, await self._listings.ledger(ledger_id)
            if not found.problems or (ledger is not None and ledger.revision == before.revision):
                break
        return found


def _refusing(method: Method) -> Method:
    async def answer(data: bytes, context: Context) -> bytes:
        try:
            return await method(data, context)
        except OrderRefused as refused:
            raise Refused(common_pb2.ERROR_REASON_REFUSED, str(refused)) from None

    return answer


# Requests.


def _goal(value: int) -> Goal:
    try:
        return Goal(value)
    except ValueError:
        raise invalid_argument(f"a rebalancing has a goal: bytes, segments or brokers goal=`{value}`") from None


def _wanted_state(value: int) -> OperationState | None:
    if value == metadata_pb2.OPERATION_STATE_UNSPECIFIED:
        return None
    wanted = {OperationState.RUNNING, OperationState.PAUSED, OperationState.CANCELLED}
    state = next((state for state in wanted if state.value == value), None)
    if state is None:
        raise invalid_argument(f"an operation is paused, resumed or cancelled state=`{value}`")
    return state


def _mark(mark: bytes) -> bytes:
    if not 0 < len(mark) <= MARK_BYTES_MAX:
        raise invalid_argument(f"an order has a random mark of at most {MARK_BYTES_MAX} bytes bytes=`{len(mark)}`")
    return mark


def _move_from(move: pb.RebalanceMove, goal: Goal) -> Move:
    ids = f"ledger=`{move.ledger_id}` shard=`{move.shard_id}`"
    if not move.source or not move.target:
        raise invalid_argument(f"a move has a source and a target {ids}")
    of_shard = goal is Goal.BROKERS
    if (move.shard_id > 0) != of_shard or (move.ledger_id > 0) == of_shard:
        what = "shards" if of_shard else "ledgers"
        raise invalid_argument(f"a plan with the goal {goal.name.lower()} moves {what}, and nothing else {ids}")
    return Move(move.ledger_id, move.source, move.target, move.size_bytes, shard_id=move.shard_id)


# Answers.


def _plan(plan: Plan) -> pb.PlanRebalanceResponse:
    return pb.PlanRebalanceResponse(
        revision=plan.revision,
        goal=plan.goal.value,  # type: ignore[arg-type]  # same numbers
        moves=[_move(move) for move in plan.moves],
        bookies=[
            pb.BookieShare(bookie_id=share.bookie_id, before=share.before, after=share.after, even=share.even)
            for share in plan.shares
        ],
        skew_before=plan.skew_before,
        skew_after=plan.skew_after,
        notes=plan.notes,
    )


def _shard_plan(plan: ShardPlan) -> pb.PlanRebalanceResponse:
    moves = [_move(move) for move in plan.moves]
    for move in moves:
        move.load = plan.weights.get(move.shard_id, 0.0)
    return pb.PlanRebalanceResponse(
        revision=plan.revision,
        goal=metadata_pb2.GOAL_BROKERS,
        moves=moves,
        brokers=[
            pb.BrokerBalance(
                broker_id=one.broker_id,
                shards_before=one.shards_before,
                shards_after=one.shards_after,
                load_before=one.load_before,
                load_after=one.load_after,
            )
            for one in plan.brokers
        ],
        skew_before=plan.skew_before,
        skew_after=plan.skew_after,
        notes=plan.notes,
    )


def _move(move: Move) -> pb.RebalanceMove:
    return pb.RebalanceMove(
        ledger_id=move.ledger_id,
        source=move.source,
        target=move.target,
        size_bytes=move.size_bytes,
        state=move.state.value,  # type: ignore[arg-type]  # same numbers
        reason=move.reason,
        shard_id=move.shard_id,
    )


def _operation(operation: Operation) -> metadata_pb2.Operation:
    return metadata_pb2.Operation.FromString(encode_operation(operation))


def _description(ordered: Ordered) -> pb.RebalanceDescription:
    skipped = [move for move in ordered.moves if move.state is MoveState.SKIPPED]
    of_shards = ordered.operation.goal is Goal.BROKERS
    return pb.RebalanceDescription(
        operation=_operation(ordered.operation),
        bookies=() if of_shards else _traffic(ordered.moves),
        brokers=_shard_traffic(ordered.moves) if of_shards else (),
        skipped=[_move(move) for move in skipped[:SKIPPED_SHOWN_MAX]],
    )


def _traffic(moves: Sequence[Move]) -> Iterable[pb.BookieTraffic]:
    bookies: defaultdict[str, pb.BookieTraffic] = defaultdict(pb.BookieTraffic)
    for move in moves:
        if move.state is MoveState.SKIPPED:
            continue
        done = move.size_bytes if move.state is MoveState.DONE else 0
        bookies[move.source].bytes_out += move.size_bytes
        bookies[move.source].bytes_out_done += done
        bookies[move.target].bytes_in += move.size_bytes
        bookies[move.target].bytes_in_done += done
    for name, traffic in sorted(bookies.items()):
        traffic.bookie_id = name
        yield traffic


def _shard_traffic(moves: Sequence[Move]) -> Iterable[pb.BrokerTraffic]:
    brokers: defaultdict[str, pb.BrokerTraffic] = defaultdict(pb.BrokerTraffic)
    for move in moves:
        if move.state is MoveState.SKIPPED:
            continue
        done = move.state is MoveState.DONE
        brokers[move.source].shards_out += 1
        brokers[move.source].shards_out_done += done
        brokers[move.target].shards_in += 1
        brokers[move.target].shards_in_done += done
    for name, traffic in sorted(brokers.items()):
        traffic.broker_id = name
        yield traffic
