"""The metadata store in one SQLite file, in this process: the embedded default. Not replicated.

The engine keeps versions of bytes keys; here they are the keys and changes of `store`. Watches are fed in the event
loop, and read the newest changes only: who is behind them receives a Reset, so no more of the history is kept.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Self

from magnetar.metadata.history import HISTORY_CHANGES_MAX, History, HistoryWatch
from magnetar.metadata.leases import HeldLease, check_ttl
from magnetar.metadata.sqlite_engine import SqliteEngine
from magnetar.metadata.sqlite_tables import Revision, Span, Tables, Version, span_of_key, span_of_prefix
from magnetar.metadata.store import (
    Change,
    Changes,
    Compare,
    CompareTarget,
    DeletePrefix,
    KeyValue,
    Operation,
    Put,
    RangeResult,
    TxnResult,
    check_txn,
)

TRIM_REVISIONS = 256
"""Old versions are compacted so many revisions at a time."""


class SqliteStore:
    """See `store.MetadataStore`. Made by `open`."""

    def __init__(self, history_changes_max: int) -> None:
        self._feed = _Feed(history_changes_max)
        self.engine: SqliteEngine

    @classmethod
    async def open(
        cls,
        path: str | os.PathLike[str],
        *,
        drop_leases: bool = False,
        clock: Callable[[], float] | None = None,
        history_changes_max: int = HISTORY_CHANGES_MAX,
    ) -> Self:
        """Opens or creates the database and locks it against other processes.

        drop_leases   delete every leased key: their holders lived in the process that had it open before. Otherwise
                      each lease has its full time again
        Raises MetadataError, in one line, for what an operator has to change.
        """
        store = cls(history_changes_max)
        store.engine = await SqliteEngine.open(path, store._feed, drop_leases=drop_leases, clock=clock)
        return store

    async def get(self, key: str) -> KeyValue | None:
        encoded = key.encode()  # a lone surrogate is the caller's ValueError, not the thread's
        found = await self.engine.ask(lambda tables: tables.get(encoded))
        return None if found is None else _key_value(found)

    async def range(self, prefix: str, *, after: str = "", limit: int = 0) -> RangeResult:
        span = span_of_prefix(prefix.encode())
        if after >= prefix:
            span = Span(after.encode() + b"\0", span.high)
        return await self.engine.ask(lambda tables: _range(tables, span, limit))

    async def txn(self, compares: Sequence[Compare], operations: Sequence[Operation]) -> TxnResult:
        check_txn(compares, operations)
        # Frozen here: the caller may change its lists while the request waits.
        compares, operations = tuple(compares), tuple(operations)
        return await self.engine.ask(lambda tables: self._txn(tables, compares, operations), writes=bool(operations))

    def watch(self, prefix: str, *, from_revision: int) -> HistoryWatch:
        return self._feed.history.watch(prefix, from_revision)

    async def grant_lease(self, ttl_s: float) -> HeldLease:
        lease = HeldLease(await self.grant_remote_lease(ttl_s), ttl_s, self.revoke_lease)
        self.engine.leases.add(lease.lease_id, ttl_s, self.engine.clock(), lease)
        return lease

    async def grant_remote_lease(self, ttl_s: float) -> int:
        """A lease for a holder elsewhere: it expires unless `keep_alive` is called for it."""
        check_ttl(ttl_s)
        return await self.engine.grant_lease(ttl_s)

    async def keep_alive(self, lease_id: int) -> float:
        """The lease's full time to live, which it has again; raises LeaseExpired."""
        return self.engine.keep_alive(lease_id)

    async def revoke_lease(self, lease_id: int) -> None:
        """Ends a lease, whoever holds it, and deletes its keys; an unknown one is no error."""
        await self.engine.revoke_lease(lease_id)

    async def tick(self) -> None:
        """Ends the leases that have expired."""
        await self.engine.tick()

    async def close(self) -> None:
        """Answers what was asked before, ends watches and leases, and releases the file. Durable on return."""
        await self.engine.close()
        self._feed.history.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()

    # In the thread.

    def _txn(self, tables: Tables, compares: Sequence[Compare], operations: Sequence[Operation]) -> TxnResult:
        if not all(_holds(tables, compare) for compare in compares):
            return TxnResult(False, tables.revision)
        for operation in operations:
            if isinstance(operation, Put):
                tables.check_lease(operation.lease_id, operation.key)
        for operation in operations:
            if isinstance(operation, Put):
                tables.put(operation.key.encode(), operation.value, operation.lease_id)
            elif isinstance(operation, DeletePrefix):
                tables.delete(span_of_prefix(operation.prefix.encode()))
            else:
                tables.delete(span_of_key(operation.key.encode()))
        oldest = self._feed.history.oldest
        if oldest - tables.compacted >= TRIM_REVISIONS:
            tables.compact(oldest)
        return TxnResult(True, tables.revision + tables.changed)


class _Feed:
    """Keeps the newest changes for the watches."""

    def __init__(self, changes_max: int) -> None:
        self.history = History(0, changes_max=changes_max)
        self._changes_max = changes_max

    def start(self, oldest: int, revision: int) -> None:
        self.history = History(revision, oldest=oldest, changes_max=self._changes_max)

    def append(self, revision: Revision) -> None:
        number = revision.number
        changes = (
            Change(_text(key), None if current is None else _key_value(current), number)
            for key, current, _ in revision.changes
        )
        self.history.append(Changes(tuple(changes), number))


def _holds(tables: Tables, compare: Compare) -> bool:
    found = tables.get(compare.key.encode())
    revision = 0
    if found is not None:
        revision = found.mod_revision if compare.target is CompareTarget.MOD else found.create_revision
    return (revision == compare.revision) == compare.equal


def _range(tables: Tables, span: Span, limit: int) -> RangeResult:
    items = [_key_value(found) for found in tables.scan(span, limit=limit and limit + 1)]
    more = len(items) > limit > 0
    return RangeResult(tuple(items[:limit] if more else items), tables.revision, more)


def _key_value(found: Version) -> KeyValue:
    return KeyValue(_text(found.key), found.value, found.create_revision, found.mod_revision, found.lease_id)


def _text(key: bytes) -> str:
    """Keys of others, served from the same database, need not be UTF-8."""
    return key.decode(errors="surrogateescape")
