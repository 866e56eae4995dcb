"""The transactions of a copy: what claiming, finishing and giving one up ask of the store. Pure.

A closed ledger is moved from bookie to bookie by tasks (`copies/<ledger>/<place>`), whatever the reason. The rules:

1. Only a CLOSED ledger is copied: its record stands at `ledgers/<id>` and never goes back.
2. Before the first byte, the copy is claimed in the ledger's record: the target has a role from then on, its index key
   stands, and the collector at the target keeps what is written. A ledger has one claim at a time.
3. The fragments change only in the transaction that ends the claim, after every entry is verified on the target. The
   place is replaced, never dropped before: at no moment there are fewer copies than there were.
4. Every transaction compares the record's revision and the task's. So of two who work on one ledger at most one goes
   on, whatever either believed: a copier that was stopped and wakes up after its copy was given to another bookie, an
   auditor of an earlier term, the owner that trims the ledger. Whose comparison fails reads both again.
5. No reply: read again. A claim is mine if it has my mark; a copy is finished if its task is gone, or is another one.

Why a copier that lost its claim does no harm: what it still adds to its own store stands under no role there, and the
next collection at that bookie deletes it (refusing adds meanwhile). The new target verifies its own copy by itself.

A place that is completed (`task.completes`) has its role already, and needs no claim.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from magnetar.metadata.codec import encode_copy, encode_ledger
from magnetar.metadata.keyspace import Keyspace
from magnetar.metadata.records import CopyClaim, CopyTask, Fragment, LedgerRecord
from magnetar.metadata.store import Compare, Delete, Operation, Put, unchanged


@dataclass(frozen=True, slots=True)
class Stored:
    """A ledger's record as it was read, and the revision of its key."""

    record: LedgerRecord
    revision: int


@dataclass(frozen=True, slots=True)
class StoredTask:
    """A task as it was read, and the revision of its key."""

    task: CopyTask
    revision: int


@dataclass(slots=True)
class CopyTxn:
    compares: list[Compare]
    operations: list[Operation]


# What a copy changes in a ledger.


def takes(record: LedgerRecord, place: str, target: str) -> tuple[int, ...]:
    """The fragments, by position, in which the target can replace the place: it must not stand in them already."""
    return tuple(
        position
        for position, fragment in enumerate(record.fragments)
        if place in fragment.bookies and target not in fragment.bookies
    )


def moved(record: LedgerRecord, place: str, target: str) -> LedgerRecord:
    """The record with the target in the place's stead, wherever it can be, and without a claim.

    A fragment with several vacant places gets the target once: it would hold the entries only once, too.
    """
    fragments = list(record.fragments)
    for position in takes(record, place, target):
        bookies = list(fragments[position].bookies)
        bookies[bookies.index(place)] = target
        fragments[position] = Fragment(fragments[position].first_entry, tuple(bookies))
    return replace(record, fragments=tuple(fragments), copy=None)


def names(record: LedgerRecord, place: str) -> bool:
    """The place is filled by this bookie somewhere; for VACANT: some place is vacant."""
    return any(place in fragment.bookies for fragment in record.fragments)


# Transactions. `replicator.py`, `auditor.py` and whoever else moves ledgers send nothing else.


def create_task(keyspace: Keyspace, ledger: Stored, task: CopyTask) -> CopyTxn:
    """A new task of a closed ledger."""
    key = keyspace.copy(task.ledger_id, task.place)
    return CopyTxn([_same(keyspace, ledger), unchanged(key, 0)], [Put(key, encode_copy(task))])


def change_task(keyspace: Keyspace, old: StoredTask, new: CopyTask) -> CopyTxn:
    """Only the task changes: its problem, or its target while nothing is claimed."""
    return CopyTxn([_same_task(keyspace, old)], [Put(_task_key(keyspace, old), encode_copy(new))])


def drop_orphan(keyspace: Keyspace, old: StoredTask) -> CopyTxn:
    """The ledger's record was not there: it was trimmed, for a ledger that was closed is never opened again."""
    compares = [unchanged(keyspace.ledger(old.task.ledger_id), 0), _same_task(keyspace, old)]
    return CopyTxn(compares, [Delete(_task_key(keyspace, old))])


def claim(keyspace: Keyspace, ledger: Stored, task: StoredTask, mark: bytes, now_us: int) -> CopyTxn:
    """The target may store entries from now on. A claim of the same copy, of an earlier life of the target, is taken
    over: the directory of a bookie is held by one process."""
    target = task.task.target
    assert takes(ledger.record, task.task.place, target), "the target stands in all fragments of the place"
    assert can_claim(ledger.record, task.task), "another copy of this ledger is under way"
    claimed = replace(ledger.record, copy=CopyClaim(target, task.task.place, mark, now_us))
    operations: list[Operation] = [
        Put(keyspace.ledger(task.task.ledger_id), encode_ledger(claimed)),
        Put(keyspace.index(target, task.task.ledger_id), b""),
    ]
    return CopyTxn([_same(keyspace, ledger), _same_task(keyspace, task)], operations)


def can_claim(record: LedgerRecord, task: CopyTask) -> bool:
    """No copy is under way, or this very one."""
    return record.copy is None or is_claim_of(record, task)


def is_claim_of(record: LedgerRecord, task: CopyTask) -> bool:
    copy = record.copy
    return copy is not None and (copy.target, copy.replaces) == (task.target, task.place)


def finish(keyspace: Keyspace, ledger: Stored, task: StoredTask) -> CopyTxn:
    """Every entry is verified on the target. The task stays, for another target, if the place is still named: the
    target stood in some of its fragments already, or a second place is vacant."""
    old = ledger.record
    compares = [_same(keyspace, ledger), _same_task(keyspace, task)]
    key = _task_key(keyspace, task)
    if task.task.completes:
        return CopyTxn(compares, [Delete(key)])
    assert is_claim_of(old, task.task), "a copy is claimed before it is made"
    new = moved(old, task.task.place, task.task.target)
    operations: list[Operation] = [Put(keyspace.ledger(old.ledger_id), encode_ledger(new))]
    operations += _index_changes(keyspace, old, new)
    if names(new, task.task.place):
        operations.append(Put(key, encode_copy(replace(task.task, target="", problem=""))))
    else:
        operations.append(Delete(key))
    return CopyTxn(compares, operations)


def give_up(keyspace: Keyspace, ledger: Stored, task: StoredTask, successor: CopyTask | None) -> CopyTxn:
    """The copy is not made, or not by this target: its claim goes, if it has one, and the task becomes `successor`
    (None: nothing is to be done any more)."""
    old = ledger.record
    operations: list[Operation] = []
    if is_claim_of(old, task.task):
        new = replace(old, copy=None)
        operations.append(Put(keyspace.ledger(old.ledger_id), encode_ledger(new)))
        operations += _index_changes(keyspace, old, new)
    key = _task_key(keyspace, task)
    operations.append(Delete(key) if successor is None else Put(key, encode_copy(successor)))
    return CopyTxn([_same(keyspace, ledger), _same_task(keyspace, task)], operations)


def drop_stray_claim(keyspace: Keyspace, ledger: Stored) -> CopyTxn:
    """A claim beside which no task stands. None of these transactions leaves one."""
    old = ledger.record
    assert old.copy is not None
    new = replace(old, copy=None)
    compares = [_same(keyspace, ledger), unchanged(keyspace.copy(old.ledger_id, old.copy.replaces), 0)]
    operations: list[Operation] = [Put(keyspace.ledger(old.ledger_id), encode_ledger(new))]
    return CopyTxn(compares, operations + _index_changes(keyspace, old, new))


def _index_changes(keyspace: Keyspace, old: LedgerRecord, new: LedgerRecord) -> list[Operation]:
    gone, come = sorted(old.roles() - new.roles()), sorted(new.roles() - old.roles())
    deleted: list[Operation] = [Delete(keyspace.index(bookie, old.ledger_id)) for bookie in gone]
    return deleted + [Put(keyspace.index(bookie, old.ledger_id), b"") for bookie in come]


def _same(keyspace: Keyspace, ledger: Stored) -> Compare:
    return unchanged(keyspace.ledger(ledger.record.ledger_id), ledger.revision)


def _same_task(keyspace: Keyspace, task: StoredTask) -> Compare:
    return unchanged(_task_key(keyspace, task), task.revision)


def _task_key(keyspace: Keyspace, task: StoredTask) -> str:
    return keyspace.copy(task.task.ledger_id, task.task.place)
