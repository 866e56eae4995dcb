"""What must hold of every change of closed ledgers' copies, their tasks, and the operations that move them.

1. No two copies on one bookie; the fragments of a closed ledger change only where its claim says, from the bookie that
   it replaces to its target, in the transaction that ends the claim, and while the copy's task stands. So there are
   never fewer copies than before.
2. A task of an operation is made while the operation runs: not when it is paused, cancelled, or has ended.
3. Only a broker changes an operation's state and rate, as it was told. Who carries it out ends it, and goes not back.
   What has ended never changes, and leaves no task.
4. What an operation's tasks have moved stands in its moves when it has ended: else nothing would take it back.
5. A bookie that is removed is in no closed ledger.
6. What a rebalancing moves leaves no fragment in fewer racks, whatever happened since it was planned.
7. A shard of which an operation says that it moved it has been where it was to go since the operation began.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NoReturn

from magnetar.metadata.codec import decode_copy, decode_ledger, decode_moves, decode_operation, decode_shard
from magnetar.metadata.keyspace import Keyspace
from magnetar.metadata.records import (
    VACANT,
    CopyReason,
    CopyTask,
    Fragment,
    Goal,
    LedgerRecord,
    Move,
    MoveState,
    OperationState,
)
from magnetar.metadata.records import Operation as Rebalance
from magnetar.metadata.store import Delete, Operation, Put

Carried = tuple[int, str, str]
"""Ledger, source, target."""


class Copies:
    """See the module; told of every transaction that was applied. `fail` ends the run."""

    def __init__(self, fail: Callable[[str], NoReturn], keyspace: Keyspace) -> None:
        self._fail = fail
        self._ledgers_prefix = keyspace.ledgers_prefix()
        self._copies_prefix = keyspace.copies_prefix()
        self._operations_prefix = keyspace.operations_prefix()
        self._cookies_prefix = keyspace.cookies_prefix()
        self._shards_prefix = keyspace.shards_prefix()
        self._moves_root = keyspace.root + "moves/"
        self._keyspace = keyspace
        self.ledgers: dict[int, LedgerRecord] = {}
        """The closed ones that exist."""
        self.tasks: dict[str, CopyTask] = {}
        self.operations: dict[str, Rebalance] = {}
        self.moves: dict[str, dict[int, tuple[Move, ...]]] = defaultdict(dict)
        """Of each operation the pages of its moves."""
        self._carried: dict[str, set[Carried]] = defaultdict(set)
        self.owners: dict[int, str] = {}
        """Of each shard that has one."""
        self._arrived: dict[str, set[tuple[int, str]]] = {}
        """Of each operation that moves shards: which shards have been at which brokers since it began."""
        self.history: dict[int, list[tuple[Fragment, ...]]] = {}
        """All fragment lists that a closed ledger has had."""
        self.racks: dict[str, str] = {}
        """Of all bookies, whether they run or not."""
        self.on_removed: Callable[[str], None] = lambda bookie: None

    def applied(self, by: str, operations: Sequence[Operation]) -> None:
        """A transaction of this process. What it does to ledgers is judged by the tasks that stood before it."""
        kinds = (
            (self._ledgers_prefix, self._ledger),
            (self._shards_prefix, self._shard),
            (self._copies_prefix, self._task),
            (self._moves_root, self._page),
            (self._operations_prefix, lambda change: self._operation(by, change)),
            (self._cookies_prefix, self._cookie),
        )
        for prefix, look in kinds:
            for operation in operations:
                if not isinstance(operation, Put | Delete) or not operation.key.startswith(prefix):
                    continue
                look(operation)

    # --- ledgers ---

    def _ledger(self, change: Put | Delete) -> None:
        if isinstance(change, Delete):
            self.ledgers.pop(self._keyspace.parse_ledger(change.key), None)
            return
        record = decode_ledger(change.value)
        before = self.ledgers.get(record.ledger_id)
        self.ledgers[record.ledger_id] = record
        for fragment in record.fragments:
            named = [bookie for bookie in fragment.bookies if bookie != VACANT]
            if len(named) != len(set(named)):
                self._fail(f"copies: two copies on one bookie: {record}")
        if before is None:
            self.history[record.ledger_id] = [record.fragments]
        elif before.fragments != record.fragments:
            self.history[record.ledger_id].append(record.fragments)
            self._moved(before, record)

    def _moved(self, before: LedgerRecord, after: LedgerRecord) -> None:
        claim = before.copy
        if claim is None or after.copy is not None:
            self._fail(f"copies: the fragments changed beside a claim: {before} {after}")
        task = self.tasks.get(self._keyspace.copy(before.ledger_id, claim.replaces))
        if task is None or task.target != claim.target:
            self._fail(f"copies: the fragments changed without a task: {task} {before} {after}")
        for old, new in zip(before.fragments, after.fragments, strict=True):
            changed = {pair for pair in zip(old.bookies, new.bookies, strict=True) if pair[0] != pair[1]}
            if old.first_entry != new.first_entry or changed - {(claim.replaces, claim.target)}:
                self._fail(f"copies: the fragments changed otherwise than claimed: {before} {after}")
            if task.reason is CopyReason.REBALANCE and self._racks_of(new) < self._racks_of(old):
                self._fail(f"copies: a rebalancing cost a rack: {task} {before} {after} {self.racks}")
        if task.operation and claim.replaces not in after.bookies():
            self._carried[task.operation].add((before.ledger_id, claim.replaces, claim.target))

    def _racks_of(self, fragment: Fragment) -> int:
        return len({self.racks.get(bookie) for bookie in fragment.bookies if bookie != VACANT})

    # --- shards ---

    def _shard(self, change: Put | Delete) -> None:
        if isinstance(change, Delete):
            return
        record = decode_shard(change.value)
        self.owners.pop(record.shard_id, None)
        if record.owner is not None:
            self.owners[record.shard_id] = record.owner.broker_id
            for arrived in self._arrived.values():
                arrived.add((record.shard_id, record.owner.broker_id))

    # --- tasks ---

    def _task(self, change: Put | Delete) -> None:
        if isinstance(change, Delete):
            self.tasks.pop(change.key, None)
            return
        task = decode_copy(change.value)
        operation = self.operations.get(task.operation)
        runs = operation is None or operation.state is OperationState.RUNNING
        if change.key not in self.tasks and not runs:
            self._fail(f"operation: a task is made of one that does not run: {task} {operation}")
        self.tasks[change.key] = task

    def tasks_of(self, operation_id: str) -> list[CopyTask]:
        return [task for task in self.tasks.values() if task.operation == operation_id]

    # --- operations ---

    def moves_of(self, operation_id: str) -> list[Move]:
        return [move for _, page in sorted(self.moves[operation_id].items()) for move in page]

    def _page(self, change: Put | Delete) -> None:
        if isinstance(change, Put):
            name, page = self._keyspace.parse_moves(change.key)
            moves = self.moves[name][page] = decode_moves(change.value)
            arrived = self._arrived.setdefault(name, set(self.owners.items()))
            for move in moves:
                at_target = (move.shard_id, move.target) in arrived
                if move.shard_id and move.state is MoveState.DONE and not at_target:
                    self._fail(f"operation: it says that it moved what it did not: {name} {move}")
            self._check_known(name, [move for move in moves if move.state is MoveState.SKIPPED])

    def _check_known(self, name: str, moves: Sequence[Move]) -> None:
        """None of these was made by the operation's own task, and still is."""
        for move in moves:
            record = self.ledgers.get(move.ledger_id)  # none for a shard
            if record is None or (move.ledger_id, move.source, move.target) not in self._carried[name]:
                continue
            if move.target in record.bookies() and move.source not in record.bookies():
                self._fail(f"operation: it does not know what it has moved: {name} {move} {record}")

    def _operation(self, by: str, change: Put | Delete) -> None:
        if isinstance(change, Delete):
            self.operations.pop(self._keyspace.parse_operation(change.key), None)
            return
        after = decode_operation(change.value)
        before = self.operations.get(after.operation_id)
        self.operations[after.operation_id] = after
        if before is None:
            return
        if before.ended_us and before != after:
            self._fail(f"operation: one that has ended was changed by {by}: {before} {after}")
        if before.state is OperationState.CANCELLED and after.state is not OperationState.CANCELLED:
            self._fail(f"operation: one that was cancelled goes on: {before} {after}")
        ordered = after == replace(before, state=after.state, bytes_per_s=after.bytes_per_s)
        orders = by.startswith("broker")
        carries_out = orders if after.goal is Goal.BROKERS else not orders
        if orders and not carries_out and not ordered:
            self._fail(f"operation: an order changed the progress: {before} {after}")
        if carries_out and not (orders and ordered):
            self._carried_on(before, after)

    def _carried_on(self, before: Rebalance, after: Rebalance) -> None:
        done = after.ended_us and before.state is not OperationState.CANCELLED
        wanted = OperationState.DONE if done else before.state
        if (after.state, after.bytes_per_s) != (wanted, before.bytes_per_s):
            self._fail(f"operation: its runner gave it an order: {before} {after}")
        if after.moves_done < before.moves_done or after.moves_skipped < before.moves_skipped:
            self._fail(f"operation: its progress goes back: {before} {after}")
        if after.ended_us:
            self._ended(after)

    def _ended(self, operation: Rebalance) -> None:
        name = operation.operation_id
        if left := self.tasks_of(name):
            self._fail(f"operation: it ended and left tasks: {operation} {left}")
        moves = self.moves_of(name)
        done = [move for move in moves if move.state is MoveState.DONE]
        self._check_known(name, [move for move in moves if move.state is MoveState.PENDING])
        if operation.state is OperationState.DONE and any(move.state is MoveState.PENDING for move in moves):
            self._fail(f"operation: it is done, and a move is not: {operation} {moves}")
        if operation.moves_done != len(done):
            self._fail(f"operation: it counts otherwise than its moves: {operation} {len(done)}")

    # --- bookies ---

    def _cookie(self, change: Put | Delete) -> None:
        if isinstance(change, Delete):
            bookie = self._keyspace.parse_cookie(change.key)
            named = [ledger_id for ledger_id, record in self.ledgers.items() if bookie in record.bookies()]
            if named:
                self._fail(f"bookies: {bookie} was removed, and copies stand on it alone: ledgers={named[:5]}")
            self.on_removed(bookie)
