"""An entry store in memory, with the line between written and durable drawn where a disk has it.

`commit` first writes, then awaits the `sync` it was made with, and only then counts the group as durable. A crash at
any moment (`crash`) leaves what was durable, and of the group that was being committed what the caller says.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field

from magnetar.bookie.entry_store import (
    ENTRIES_PER_READ_MAX,
    Damaged,
    EntryQuery,
    EntryRead,
    GroupWrites,
    LedgerMark,
    LedgerState,
    StoreFailed,
    StoreStalled,
    StoreUsage,
)
from magnetar.metadata.records import NO_ENTRY
from magnetar.wire.envelope import peek


async def _at_once() -> None:
    """The sync of a disk that takes no time."""


@dataclass(slots=True)
class _Contents:
    entries: dict[int, dict[int, bytes]] = field(default_factory=dict)
    marks: dict[int, LedgerMark] = field(default_factory=dict)
    meta: dict[str, bytes] = field(default_factory=dict)
    groups: int = 0

    def apply(self, writes: GroupWrites) -> None:
        for ledger_id in writes.deleted:
            self.entries.pop(ledger_id, None)
        for ledger_id in writes.forgotten:
            self.marks.pop(ledger_id, None)
        for ledger_id, entry_id, data in writes.entries:
            self.entries.setdefault(ledger_id, {})[entry_id] = data
        self.marks.update(writes.marks)
        self.meta.update(writes.meta)
        self.groups += 1

    def copy(self) -> _Contents:
        entries = {ledger_id: dict(stored) for ledger_id, stored in self.entries.items()}
        return _Contents(entries, dict(self.marks), dict(self.meta), self.groups)


class MemoryEntryStore:
    """See the module. `stalls` refuses that many commits; `damaged` holds the entries whose reads fail.

    is_damaged   is asked at each read of an entry whether it fails this time
    """

    def __init__(
        self,
        sync: Callable[[], Awaitable[None]] = _at_once,
        *,
        doubt: str = "",
        is_damaged: Callable[[], bool] = lambda: False,
    ) -> None:
        self.doubt = doubt
        self.stalls = 0
        self.damaged: set[tuple[int, int]] = set()
        self._sync = sync
        self._is_damaged = is_damaged
        self._written = _Contents()
        self._durable = _Contents()
        self._committing: GroupWrites | None = None

    def crash(
        self,
        sync: Callable[[], Awaitable[None]] = _at_once,
        *,
        lose_groups: bool = False,
        survives: Callable[[GroupWrites], GroupWrites | None] = lambda writes: None,
    ) -> MemoryEntryStore:
        """The store as the next process finds it. With `lose_groups` the disk broke its word and lost all of them.

        survives   what is found of the group that was being committed: none of it, all, or a part
        """
        # A doubt lasts until a group is committed, however often the process ends before that.
        doubt = "groups are missing" if lose_groups else self.doubt
        store = MemoryEntryStore(sync, doubt=doubt, is_damaged=self._is_damaged)
        kept = _Contents(meta=self._durable.meta, groups=1) if lose_groups else self._durable
        store._durable, store._written = kept.copy(), kept.copy()
        if self._committing is not None and (part := survives(self._committing)) is not None and not lose_groups:
            store._durable.apply(part)
            store._written.apply(part)
        store.damaged = set(self.damaged)
        return store

    def durable_entries(self, ledger_id: int) -> Mapping[int, bytes]:
        """What a crash at this moment would leave of a ledger."""
        return self._durable.entries.get(ledger_id, {})

    @property
    def empty(self) -> bool:
        return self._durable.groups == 0

    @property
    def meta(self) -> Mapping[str, bytes]:
        return self._written.meta

    async def commit(self, writes: GroupWrites) -> None:
        if self.stalls > 0:
            self.stalls -= 1
            raise StoreStalled("the store stalls")
        self._written.apply(writes)
        self._committing = writes
        try:
            await self._sync()
        except OSError as error:
            raise StoreFailed(f"fsync failed error=`{error}`") from error
        self._durable.apply(writes)
        self._committing = None
        self.doubt = ""

    async def load(self, ledger_ids: Sequence[int]) -> dict[int, LedgerState]:
        return {ledger_id: self._load(ledger_id) for ledger_id in ledger_ids}

    def _load(self, ledger_id: int) -> LedgerState:
        mark = self._written.marks.get(ledger_id)
        last_entry = max(self._written.entries.get(ledger_id, ()), default=NO_ENTRY)
        if last_entry == NO_ENTRY:
            return LedgerState(mark)
        value = self._value(ledger_id, last_entry)
        if not isinstance(value, bytes):
            return LedgerState(mark, tail_damage="the last entry is damaged")
        return LedgerState(mark, last_entry, peek(value).lac)

    async def lookup(self, keys: Sequence[tuple[int, int]]) -> dict[tuple[int, int], bytes | Damaged | None]:
        return {key: self._value(*key) for key in keys}

    async def read(self, queries: Sequence[EntryQuery]) -> list[EntryRead]:
        return [EntryRead(self._values(query), self._written.marks.get(query.ledger_id)) for query in queries]

    def _values(self, query: EntryQuery) -> list[bytes | Damaged | None]:
        values: list[bytes | Damaged | None] = []
        size_bytes = 0
        for entry_id in range(query.first, min(query.last, query.first + ENTRIES_PER_READ_MAX - 1) + 1):
            value = self._value(query.ledger_id, entry_id)
            size_bytes += len(value) if isinstance(value, bytes) else 0
            if values and size_bytes > query.max_bytes:
                break
            values.append(value)
        return values

    def _value(self, ledger_id: int, entry_id: int) -> bytes | Damaged | None:
        value = self._written.entries.get(ledger_id, {}).get(entry_id)
        if (ledger_id, entry_id) in self.damaged or (value is not None and self._is_damaged()):
            return Damaged("the entry is damaged")
        return value

    async def marks(self) -> list[tuple[int, LedgerMark]]:
        return sorted(self._written.marks.items())

    async def reclaim(self, ledger_ids: Sequence[int]) -> None:
        """Memory is free at once."""

    async def rewrite_oldest(self, bytes_per_s: int) -> None:
        """There are no files."""

    def usage(self) -> StoreUsage:
        stored = sum(len(data) for ledger in self._written.entries.values() for data in ledger.values())
        return StoreUsage(stored, 0)

    async def close(self) -> None:
        """Nothing is open."""
