"""What an operator orders of rebalancing: a plan, an operation made of it, and every word about one that exists.

All of it stands in the metadata store when it returns; any server can take an order, and the runner follows.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable, Collection, Sequence
from dataclasses import dataclass, replace

from magnetar.metadata.backoff import Backoff
from magnetar.metadata.copy_txns import CopyTxn
from magnetar.metadata.keyspace import Keyspace
from magnetar.metadata.records import Goal, LedgerRecord, Move, Operation, OperationState
from magnetar.metadata.store import MetadataStore
from magnetar.node.wording import by_reason
from magnetar.repair.listings import Listings
from magnetar.repair.operation_txns import StoredOperation, change_operation, create_operation, next_id
from magnetar.repair.planner import MOVES_MAX, Plan, Snapshot, objection, objections, plan
from magnetar.repair.progress import neglected, reverse

ATTEMPTS = 20
"""Of one order, against others that change the same records."""


class OrderRefused(Exception):
    """Cause and remedy, in words. Nothing was changed."""


class UnknownOperation(OrderRefused):
    def __init__(self, operation_id: str) -> None:
        super().__init__(
            f"there is no such operation: see `magnetar rebalance status --all` operation=`{operation_id}`"
        )


@dataclass(frozen=True, slots=True)
class Ordered:
    """An operation as it stands, or with a dry run as it would. `notes`: what is left out of it, and why."""

    operation: Operation
    moves: tuple[Move, ...]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Wanted:
    """An operation that is to begin, but for its moves. `mark`: the same order again is known by it."""

    goal: Goal
    revision: int
    bytes_per_s: int
    mark: bytes
    rollback_of: str = ""


Checked = tuple[Sequence[Move], tuple[str, ...]]
"""The moves that can be made as things stand, and notes of what is left out."""


class Orders:
    """Every call raises MetadataUnavailable when its outcome is unknown: it can be given again."""

    def __init__(
        self, store: MetadataStore, keyspace: Keyspace, *, now_us: Callable[[], int], rng: random.Random
    ) -> None:
        self._store = store
        self._keyspace = keyspace
        self._listings = Listings(store, keyspace)
        self._now_us = now_us
        self._rng = rng

    async def plan(self, goal: Goal, *, max_bytes: int | None = None, shards: Collection[int] | None = None) -> Plan:
        """The moves that are due now."""
        snapshot = await self._listings.snapshot()
        return await asyncio.to_thread(plan, snapshot, goal, max_bytes=max_bytes, shards=shards)

    async def apply(
        self, goal: Goal, revision: int, moves: Sequence[Move], bytes_per_s: int, mark: bytes, *, dry_run: bool = False
    ) -> Ordered:
        """Begins a plan. The same order again (by its `mark`) is answered as before.

        Raises OrderRefused for a plan that holds no more, with what has changed.
        """
        _check_rate(bytes_per_s)
        check_size(moves)

        async def check() -> Checked:
            snapshot = await self._listings.snapshot()
            check_fresh(objections(snapshot, moves, revision))
            return _sized(snapshot, moves), ()

        return await self.begin(Wanted(goal, revision, bytes_per_s, mark), check, dry_run=dry_run)

    async def roll_back(self, operation_id: str, bytes_per_s: int, mark: bytes, *, dry_run: bool = False) -> Ordered:
        """Begins an operation that takes back what another one moved; at that one's rate if none (0) is given.

        Moves that cannot be taken back any more are left out, with the reason. Raises OrderRefused if it has not ended.
        """
        operation, moves = await self.to_take_back(operation_id)

        async def check() -> Checked:
            snapshot = await self._listings.snapshot()
            records = {record.ledger_id: record for record in snapshot.ledgers}
            return possible(moves, lambda move: _objection_to(snapshot, records.get(move.ledger_id), move))

        rate = bytes_per_s or operation.bytes_per_s
        wanted = Wanted(operation.goal, operation.revision, rate, mark, operation_id)
        return await self.begin(wanted, check, dry_run=dry_run)

    async def to_take_back(self, operation_id: str) -> tuple[Operation, list[Move]]:
        """An operation, and the moves that take back what it did. Raises OrderRefused if it has not ended."""
        stored = await self._existing(operation_id)
        if not stored.operation.ended_us:
            raise OrderRefused(
                f"the operation has not ended: cancel it first, and wait for its end operation=`{operation_id}`"
            )
        return stored.operation, reverse(await self._listings.moves(operation_id))

    async def change(
        self,
        operation_id: str,
        *,
        state: OperationState | None = None,
        bytes_per_s: int = 0,
        dry_run: bool = False,
    ) -> Operation:
        """Pauses, resumes, cancels or throttles; durable on return. Raises OrderRefused once it has ended."""
        if state is None:
            _check_rate(bytes_per_s)
        backoff = Backoff(self._rng)
        for _ in range(ATTEMPTS):
            stored = await self._existing(operation_id)
            if bytes_per_s and stored.operation.goal is Goal.BROKERS:
                raise no_throttle()
            _check_changeable(stored.operation, state)
            txn = change_operation(self._keyspace, stored, state=state, bytes_per_s=bytes_per_s)
            if dry_run or await self._send(txn):
                return stored.operation if dry_run else (await self._existing(operation_id)).operation
            await asyncio.sleep(backoff.next_s())
        raise OrderRefused(f"the operation changes all the time: order it again operation=`{operation_id}`")

    async def operations(self) -> list[Operation]:
        """All that are known, the oldest first."""
        return [self._judged(stored.operation) for stored in await self._listings.operations()]

    async def operation(self, operation_id: str) -> Ordered:
        """One operation with its moves. Raises UnknownOperation."""
        stored = await self._existing(operation_id)
        return Ordered(self._judged(stored.operation), tuple(await self._listings.moves(operation_id)))

    def _judged(self, operation: Operation) -> Operation:
        """With a problem if nobody goes on with it."""
        problem = neglected(operation, self._now_us())
        return replace(operation, problems=(*operation.problems, problem)) if problem else operation

    async def current(self) -> Ordered:
        """Of those that go on, else of all, the one that was begun last. Raises OrderRefused if there is none."""
        operations = await self.operations()
        if not operations:
            raise OrderRefused("nothing was ever rebalanced here: `magnetar rebalance plan` says what there is to do")
        live = [operation for operation in operations if not operation.ended_us]
        return await self.operation((live or operations)[-1].operation_id)

    async def begin(self, wanted: Wanted, check: Callable[[], Awaitable[Checked]], *, dry_run: bool = False) -> Ordered:
        """An operation of what `check` finds to be possible; it is asked again if another operation begins meanwhile.

        Raises OrderRefused if it finds nothing.
        """
        for _ in range(ATTEMPTS):
            known = await self._listings.operations()
            mine = next((one.operation for one in known if one.operation.mark == wanted.mark), None)
            if mine is not None:
                return Ordered(mine, tuple(await self._listings.moves(mine.operation_id)))
            moves, notes = await check()
            if not moves:
                of = f" operation=`{wanted.rollback_of}`"
                raise OrderRefused("; ".join(("there is nothing to take back", *notes)) + of)
            operation = Operation(
                operation_id=next_id(known),
                goal=wanted.goal,
                state=OperationState.RUNNING,
                bytes_per_s=wanted.bytes_per_s,
                revision=wanted.revision,
                moves=len(moves),
                size_bytes=sum(move.size_bytes for move in moves),
                pages=0,
                mark=wanted.mark,
                rollback_of=wanted.rollback_of,
                created_us=self._now_us(),
            )
            if dry_run or await self._send(create_operation(self._keyspace, operation, moves, known)):
                return Ordered(operation, tuple(moves), notes)
        raise OrderRefused("others begin operations all the time: order it again")

    async def _existing(self, operation_id: str) -> StoredOperation:
        if "/" in operation_id or not operation_id:
            raise UnknownOperation(operation_id)
        stored = await self._listings.operation(operation_id)
        if stored is None:
            raise UnknownOperation(operation_id)
        return stored

    async def _send(self, txn: CopyTxn) -> bool:
        return (await self._store.txn(txn.compares, txn.operations)).succeeded


def check_size(moves: Sequence[Move]) -> None:
    if not moves:
        raise OrderRefused("the plan is empty: there is nothing to apply")
    if len(moves) > MOVES_MAX:
        raise OrderRefused(f"a plan has at most {MOVES_MAX:,} moves moves=`{len(moves)}`")


def check_fresh(objections: Sequence[str]) -> None:
    """`objections`: what speaks against a plan now, in words."""
    if objections:
        raise OrderRefused(f"the plan holds no more, plan again: {'; '.join(objections)}")


def no_throttle() -> OrderRefused:
    return OrderRefused(
        "shards move by hand-off, which copies no bytes: leave the throttle out; pause the operation to stop it"
    )


def _check_rate(bytes_per_s: int) -> None:
    if bytes_per_s <= 0:
        raise OrderRefused("a throttle is above zero: pause the operation to stop it, or cancel it")


def _check_changeable(operation: Operation, state: OperationState | None) -> None:
    if operation.ended_us or operation.state in (OperationState.CANCELLED, OperationState.DONE):
        if operation.state is OperationState.CANCELLED and state is OperationState.CANCELLED:
            return
        raise OrderRefused(
            f"the operation is {operation.state.name.lower()}, nothing about it can be changed any more "
            f"operation=`{operation.operation_id}`"
        )


def _sized(snapshot: Snapshot, moves: Sequence[Move]) -> list[Move]:
    """With the bytes that the records tell, whatever a saved plan says."""
    held = {record.ledger_id: record.bytes_held() for record in snapshot.ledgers}
    return [replace(move, size_bytes=held[move.ledger_id].get(move.source, 0)) for move in moves]


def _objection_to(snapshot: Snapshot, record: LedgerRecord | None, move: Move) -> str:
    if record is None:
        return "it was trimmed or deleted"
    busy = snapshot.busy.get(move.ledger_id, "")
    return busy or objection(snapshot, record, move.source, move.target)


def possible(moves: Sequence[Move], objection: Callable[[Move], str]) -> Checked:
    """The moves that nothing speaks against, and what speaks against the others."""
    kept: list[Move] = []
    problems: list[tuple[str, int, str]] = []
    for move in moves:
        problem = objection(move)
        if not problem:
            kept.append(move)
        elif move.shard_id:
            problems.append(("shard", move.shard_id, problem))
        else:
            problems.append(("ledger", move.ledger_id, problem))
    return kept, tuple(by_reason(problems))
