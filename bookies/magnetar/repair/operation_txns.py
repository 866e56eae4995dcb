"""The transactions of rebalancing operations, for those who order them and for the runner. Pure.

1. An operation and all pages of its moves come in one transaction: there are no halves of it. Its id is the next free
   number, so that of two that are ordered at once one finds its id taken, and looks again at what the other one moves.
2. The operator's word (state, rate) and the runner's progress stand in one record: each compares its revision, and who
   loses reads it again.
3. Tasks are made in transactions that compare the operation's record: none is made after a pause or a cancellation.
4. Operations that ended long ago go when new ones come.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from magnetar.metadata.codec import encode_moves, encode_operation
from magnetar.metadata.copy_txns import CopyTxn, Stored, create_task
from magnetar.metadata.keyspace import Keyspace
from magnetar.metadata.records import CopyTask, Move, Operation, OperationState
from magnetar.metadata.store import COMPARES_MAX, Compare, Delete, DeletePrefix, Put, absent, unchanged
from magnetar.metadata.store import Operation as StoreOperation
from magnetar.repair.progress import paged

KEPT_MAX = 50
"""Operations that have ended."""
ID_PREFIX = "rebalance-"
TASKS_PER_TXN = (COMPARES_MAX - 2) // 2
FORGOTTEN_PER_TXN = 10


@dataclass(frozen=True, slots=True)
class StoredOperation:
    """An operation as it was read, and the revision of its key."""

    operation: Operation
    revision: int


def number(stored: StoredOperation) -> int:
    """Tells the order in which operations were begun: the clocks of the servers that took the orders do not."""
    return int(stored.operation.operation_id.removeprefix(ID_PREFIX))


def next_id(operations: Iterable[StoredOperation]) -> str:
    return f"{ID_PREFIX}{max(map(number, operations), default=0) + 1}"


def create_operation(
    keyspace: Keyspace, operation: Operation, moves: Sequence[Move], known: Sequence[StoredOperation]
) -> CopyTxn:
    """`operation.pages` is set here. Of the `known` ones, those that ended long ago go."""
    pages = paged(moves)
    name = operation.operation_id
    record = replace(operation, pages=len(pages))
    operations: list[StoreOperation] = [Put(keyspace.operation(name), encode_operation(record))]
    operations += (Put(keyspace.moves(name, number), encode_moves(page)) for number, page in enumerate(pages))
    compares = [absent(keyspace.operation(name))]
    ended = sorted((one for one in known if one.operation.ended_us), key=number)
    for one in ended[: max(0, len(ended) - KEPT_MAX)][:FORGOTTEN_PER_TXN]:
        key = keyspace.operation(one.operation.operation_id)
        compares.append(unchanged(key, one.revision))
        operations += [Delete(key), DeletePrefix(keyspace.moves_prefix(one.operation.operation_id))]
    return CopyTxn(compares, operations)


def change_operation(
    keyspace: Keyspace, old: StoredOperation, *, state: OperationState | None = None, bytes_per_s: int = 0
) -> CopyTxn:
    """The operator's word: another state, another rate, or both."""
    new = replace(
        old.operation, state=state or old.operation.state, bytes_per_s=bytes_per_s or old.operation.bytes_per_s
    )
    key = keyspace.operation(new.operation_id)
    return CopyTxn([unchanged(key, old.revision)], [Put(key, encode_operation(new))])


def store_progress(
    keyspace: Keyspace,
    operation: Operation,
    revision: int,
    pages: Mapping[int, Sequence[Move]],
    revisions: Mapping[int, int],
    leader: Compare,
) -> CopyTxn:
    """The runner's: the record, and those pages that have changed, with the revisions at which they were read."""
    name = operation.operation_id
    key = keyspace.operation(name)
    compares = [leader, unchanged(key, revision)]
    compares += (unchanged(keyspace.moves(name, number), revisions[number]) for number in pages)
    operations: list[StoreOperation] = [Put(key, encode_operation(operation))]
    operations += (Put(keyspace.moves(name, number), encode_moves(page)) for number, page in pages.items())
    return CopyTxn(compares, operations)


def create_tasks(
    keyspace: Keyspace, operation_id: str, revision: int, tasks: Sequence[tuple[Stored, CopyTask]], leader: Compare
) -> list[CopyTxn]:
    """The runner's: tasks of an operation that still stands as it was read."""
    txns = []
    for start in range(0, len(tasks), TASKS_PER_TXN):
        txn = CopyTxn([leader, unchanged(keyspace.operation(operation_id), revision)], [])
        for ledger, task in tasks[start : start + TASKS_PER_TXN]:
            made = create_task(keyspace, ledger, task)
            txn.compares += made.compares
            txn.operations += made.operations
        txns.append(txn)
    return txns
