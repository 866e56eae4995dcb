"""The metadata store in memory: the reference that other engines are compared with, and the store of tests.

Deterministic: no call suspends, revisions and lease ids are counted, and time is read from the given clock.
"""

from __future__ import annotations

import asyncio
from bisect import bisect_left, bisect_right, insort
from collections.abc import Callable, Iterator, Sequence
from types import TracebackType
from typing import Self

from magnetar.metadata.history import HISTORY_CHANGES_MAX, History, HistoryWatch
from magnetar.metadata.leases import TICK_S, HeldLease, LeaseTable, check_ttl
from magnetar.metadata.store import (
    Change,
    Changes,
    Compare,
    CompareTarget,
    DeletePrefix,
    KeyValue,
    LeaseExpired,
    MetadataError,
    Operation,
    Put,
    RangeResult,
    TxnResult,
    check_txn,
)

FIRST_REVISION = 1
"""Of a store that holds nothing yet, as in etcd."""


class MemoryStore:
    """See `store.MetadataStore`."""

    def __init__(
        self, clock: Callable[[], float] | None = None, *, history_changes_max: int = HISTORY_CHANGES_MAX
    ) -> None:
        self._clock = clock
        self._current: dict[str, KeyValue] = {}
        self._keys: list[str] = []
        self._leased: dict[int, set[str]] = {}
        self._leases = LeaseTable()
        self._next_lease_id = 1
        self._history = History(FIRST_REVISION, changes_max=history_changes_max)
        self._ticker: asyncio.Task[None] | None = None
        self._closed = False

    async def get(self, key: str) -> KeyValue | None:
        self._check_open()
        return self._current.get(key)

    async def range(self, prefix: str, *, after: str = "", limit: int = 0) -> RangeResult:
        self._check_open()
        start = bisect_left(self._keys, prefix) if after < prefix else bisect_right(self._keys, after)
        items: list[KeyValue] = []
        for key in self._keys_from(start, prefix):
            if len(items) == limit > 0:
                return RangeResult(tuple(items), self._history.revision, more=True)
            items.append(self._current[key])
        return RangeResult(tuple(items), self._history.revision)

    async def txn(self, compares: Sequence[Compare], operations: Sequence[Operation]) -> TxnResult:
        check_txn(compares, operations)
        self._check_open()
        if not all(self._holds(compare) for compare in compares):
            return TxnResult(False, self._history.revision)
        for operation in operations:
            if isinstance(operation, Put) and operation.lease_id and operation.lease_id not in self._leases:
                raise LeaseExpired(f"no such lease: lease=`{operation.lease_id:x}` key=`{operation.key}`")
        self._apply(operations)
        return TxnResult(True, self._history.revision)

    def watch(self, prefix: str, *, from_revision: int) -> HistoryWatch:
        return self._history.watch(prefix, from_revision)

    async def grant_lease(self, ttl_s: float) -> HeldLease:
        check_ttl(ttl_s)
        self._check_open()
        lease = HeldLease(self._new_lease_id(), ttl_s, self.revoke_lease)
        self._leases.add(lease.lease_id, ttl_s, self._now(), lease)
        return lease

    async def grant_remote_lease(self, ttl_s: float) -> int:
        """A lease for a holder elsewhere: it expires unless `keep_alive` is called for it."""
        check_ttl(ttl_s)
        self._check_open()
        lease_id = self._new_lease_id()
        self._leases.add(lease_id, ttl_s, self._now())
        if self._ticker is None:
            self._ticker = asyncio.create_task(self._run_ticks(), name="metadata-leases")
        return lease_id

    async def keep_alive(self, lease_id: int) -> float:
        """The lease's full time to live, which it has again; raises LeaseExpired."""
        self._check_open()
        return self._leases.keep_alive(lease_id, self._now())

    async def revoke_lease(self, lease_id: int) -> None:
        """Ends a lease, whoever holds it, and deletes its keys; an unknown one is no error."""
        if not self._closed:
            self._end_lease(lease_id)

    async def tick(self) -> None:
        """Ends the leases that have expired; called every TICK_S."""
        for lease_id in self._leases.tick(self._now()):
            self._end_lease(lease_id)

    async def close(self) -> None:
        """Ends watches and leases; what is stored stays in the object, but every call fails."""
        self._closed = True
        if self._ticker is not None:
            self._ticker.cancel()
            self._ticker = None
        self._leases.close()
        self._history.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()

    def _keys_from(self, start: int, prefix: str) -> Iterator[str]:
        for i in range(start, len(self._keys)):
            if not self._keys[i].startswith(prefix):
                return
            yield self._keys[i]

    def _check_open(self) -> None:
        if self._closed:
            raise MetadataError("the metadata store is closed")

    def _now(self) -> float:
        return self._clock() if self._clock is not None else asyncio.get_running_loop().time()

    def _new_lease_id(self) -> int:
        lease_id = self._next_lease_id
        self._next_lease_id += 1
        return lease_id

    async def _run_ticks(self) -> None:
        while True:
            await asyncio.sleep(TICK_S)
            await self.tick()

    def _end_lease(self, lease_id: int) -> None:
        self._leases.remove(lease_id)
        keys = sorted(self._leased.get(lease_id, ()))
        self._commit([self._delete(key) for key in keys])

    def _holds(self, compare: Compare) -> bool:
        item = self._current.get(compare.key)
        if item is None:
            revision = 0
        elif compare.target is CompareTarget.MOD:
            revision = item.mod_revision
        else:
            revision = item.create_revision
        return (revision == compare.revision) == compare.equal

    def _apply(self, operations: Sequence[Operation]) -> None:
        changes: list[Change] = []
        for operation in operations:
            if isinstance(operation, Put):
                changes.append(self._put(operation))
            elif isinstance(operation, DeletePrefix):
                start = bisect_left(self._keys, operation.prefix)
                changes += [self._delete(key) for key in list(self._keys_from(start, operation.prefix))]
            elif operation.key in self._current:
                changes.append(self._delete(operation.key))
        self._commit(changes)

    def _commit(self, changes: list[Change]) -> None:
        if changes:
            self._history.append(Changes(tuple(changes), self._history.revision + 1))

    def _put(self, put: Put) -> Change:
        revision = self._history.revision + 1
        before = self._current.get(put.key)
        if before is None:
            insort(self._keys, put.key)
        else:
            self._detach(before)
        created = revision if before is None else before.create_revision
        item = KeyValue(put.key, put.value, created, revision, put.lease_id)
        self._current[put.key] = item
        if put.lease_id:
            self._leased.setdefault(put.lease_id, set()).add(put.key)
        return Change(put.key, item, revision)

    def _delete(self, key: str) -> Change:
        self._detach(self._current.pop(key))
        del self._keys[bisect_left(self._keys, key)]
        return Change(key, None, self._history.revision + 1)

    def _detach(self, item: KeyValue) -> None:
        if item.lease_id:
            keys = self._leased[item.lease_id]
            keys.discard(item.key)
            if not keys:
                del self._leased[item.lease_id]
