"""What an operator orders of rebalancing: a plan, an operation made of it, and every word about one that exists.

All of it stands in the metadata store when it returns; any server can take an order, and the runner follows.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace

from magnetar.metadata.backoff import Backoff
from magnetar.metadata.copy_txns import CopyTxn
from magnetar.metadata.keyspace import Keyspace
from magnetar.metadata.records import Goal, Move, Operation, OperationState
from magnetar.metadata.store import MetadataStore
from magnetar.repair.listings import Listings
from magnetar.repair.operation_txns import StoredOperation, change_operation, create_operation, next_id
from magnetar.repair.operations import reverse
from magnetar.repair.planner import MOVES_MAX, Plan, Snapshot, objection, objections, plan

ATTEMPTS = 20
"""Of one order, against others that change the same records."""
NOTES_MAX = 20
"""Named one by one; the rest is counted."""


class OrderRefused(Exception):
    """Cause and remedy, in words. Nothing was changed."""


class UnknownOperation(OrderRefused):
    def __init__(self, operation_id: str) -> None:
        super().__init__(
            f"there is no such operation: `magnetar rebalance status` lists those that are operation=`{operation_id}`"
        )


@dataclass(frozen=True, slots=True)
class Ordered:
    """An operation as it stands, or with a dry run as it would. `notes`: what is left out of it, and why."""

    operation: Operation
    moves: tuple[Move, ...]
    notes: tuple[str, ...] = ()


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
        if not moves:
            raise OrderRefused("the plan is empty: there is nothing to apply")
        if len(moves) > MOVES_MAX:
            raise OrderRefused(f"a plan has at most {MOVES_MAX:,} moves moves=`{len(moves)}`")

        def check(snapshot: Snapshot) -> tuple[Sequence[Move], tuple[str, ...]]:
            found = objections(snapshot, moves, revision)
            if found:
                changed = "; ".join(found)
                raise OrderRefused(f"the plan holds no more, plan again: {changed}")
            return _sized(snapshot, moves), ()

        return await self._begin(goal, revision, bytes_per_s, mark, "", check, dry_run)

    async def roll_back(self, operation_id: str, bytes_per_s: int, mark: bytes, *, dry_run: bool = False) -> Ordered:
        """Begins an operation that takes back what another one moved; at that one's rate if none (0) is given.

        Moves that cannot be taken back any more are left out, with the reason. Raises OrderRefused if it has not ended.
        """
        stored = await self._existing(operation_id)
        if not stored.operation.ended_us:
            raise OrderRefused(
                f"the operation has not ended: cancel it first, and wait for its end operation=`{operation_id}`"
            )
        wanted = reverse(await self._listings.moves(operation_id))

        def check(snapshot: Snapshot) -> tuple[Sequence[Move], tuple[str, ...]]:
            kept, notes = _possible(snapshot, wanted)
            if not kept:
                raise OrderRefused(
                    "; ".join(("there is nothing to take back", *notes)) + f" operation=`{operation_id}`"
                )
            return kept, notes

        rate = bytes_per_s or stored.operation.bytes_per_s
        goal, revision = stored.operation.goal, stored.operation.revision
        return await self._begin(goal, revision, rate, mark, operation_id, check, dry_run)

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
            _check_changeable(stored.operation, state)
            txn = change_operation(self._keyspace, stored, state=state, bytes_per_s=bytes_per_s)
            if dry_run or await self._send(txn):
                return stored.operation if dry_run else (await self._existing(operation_id)).operation
            await asyncio.sleep(backoff.next_s())
        raise OrderRefused(f"the operation changes all the time: order it again operation=`{operation_id}`")

    async def operations(self) -> list[Operation]:
        """All that are known, the oldest first."""
        return [stored.operation for stored in await self._listings.operations()]

    async def operation(self, operation_id: str) -> Ordered:
        """One operation with its moves. Raises UnknownOperation."""
        stored = await self._existing(operation_id)
        return Ordered(stored.operation, tuple(await self._listings.moves(operation_id)))

    async def newest(self) -> Ordered:
        """The operation that was begun last. Raises OrderRefused if there is none."""
        operations = await self.operations()
        if not operations:
            raise OrderRefused("nothing was ever rebalanced here: `magnetar rebalance plan` says what there is to do")
        return await self.operation(operations[-1].operation_id)

    async def _begin(
        self,
        goal: Goal,
        revision: int,
        bytes_per_s: int,
        mark: bytes,
        rollback_of: str,
        check: Callable[[Snapshot], tuple[Sequence[Move], tuple[str, ...]]],
        dry_run: bool,
    ) -> Ordered:
        for _ in range(ATTEMPTS):
            known = await self._listings.operations()
            mine = next((one.operation for one in known if one.operation.mark == mark), None)
            if mine is not None:
                return Ordered(mine, tuple(await self._listings.moves(mine.operation_id)))
            moves, notes = check(await self._listings.snapshot())
            operation = Operation(
                operation_id=next_id(known),
                goal=goal,
                state=OperationState.RUNNING,
                bytes_per_s=bytes_per_s,
                revision=revision,
                moves=len(moves),
                size_bytes=sum(move.size_bytes for move in moves),
                pages=0,
                mark=mark,
                rollback_of=rollback_of,
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


def _possible(snapshot: Snapshot, moves: Sequence[Move]) -> tuple[list[Move], tuple[str, ...]]:
    records = {record.ledger_id: record for record in snapshot.ledgers}
    kept: list[Move] = []
    notes: list[str] = []
    for move in moves:
        record = records.get(move.ledger_id)
        problem = "it was trimmed or deleted" if record is None else snapshot.busy.get(move.ledger_id, "")
        if record is not None and not problem:
            problem = objection(snapshot, record, move.source, move.target)
        if problem:
            notes.append(f"ledger {move.ledger_id}: {problem}")
        else:
            kept.append(move)
    if len(notes) > NOTES_MAX:
        notes = [*notes[:NOTES_MAX], f"and {len(notes) - NOTES_MAX} more like these"]
    return kept, tuple(notes)
