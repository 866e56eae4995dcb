"""The boundary to the disk: what a bookie asks of the place where its entries, marks and identity stand.

Implementations: `rocksdb.RocksEntryStore` and `memory.MemoryEntryStore`. Rules that both keep:

1. `commit` is called by one task at a time and returns when the whole group is durable: all of it, or (after a crash
   before that) any part of it or nothing.
2. Reads see what was committed, and may see a group that is still being committed: callers wait for it, see
   `group_commit`.
3. A read that fails is a `Damaged` value in the place of what was asked. It is never "not there".
4. Groups are counted. A store that opens with fewer groups than were made durable says so in `doubt`.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from magnetar.metadata.records import NO_ENTRY

ENTRIES_PER_READ_MAX = 1024
"""Answers to one query, absent entries included."""
ITEM_OVERHEAD_BYTES = 256
"""What the bounds on memory count for an item beside its bytes."""

_MARK = struct.Struct(">BBQq")
_MARK_VERSION = 1
_FENCED = 1
_STORED = 2


class StoreStalled(Exception):
    """The store takes no writes for a moment. Nothing of the group was written: try again."""


class StoreFailed(Exception):
    """A write or an fsync failed: what is durable is unknown, and stays so until the store is opened again."""


class StoreDamaged(Exception):
    """The store, or a list in it, cannot be read in full."""


class StoreUnopenable(Exception):
    """The store cannot be opened, for a reason outside of it: space, permissions, limits of the system."""


@dataclass(frozen=True, slots=True)
class Damaged:
    """In the place of a value that stands there, or may, and cannot be read."""

    message: str


@dataclass(frozen=True, slots=True)
class LedgerMark:
    """What a bookie remembers of a ledger beside its entries.

    token       the ledger's token, from the first touch
    epoch       the highest that was seen; it never falls
    fenced      ordinary adds fail from then on; it never goes back
    stored      entries may stand here
    deleted_us  when the ledger was last deleted here, 0 = never: a tombstone
    """

    token: bytes
    epoch: int
    fenced: bool = False
    stored: bool = False
    deleted_us: int = 0


def encode_mark(mark: LedgerMark) -> bytes:
    """`version u8 | flags u8 | epoch u64 | deleted_us i64`, big-endian, then the token."""
    flags = _FENCED * mark.fenced | _STORED * mark.stored
    return _MARK.pack(_MARK_VERSION, flags, mark.epoch, mark.deleted_us) + mark.token


def decode_mark(data: bytes) -> LedgerMark | Damaged:
    if len(data) < _MARK.size:
        return Damaged(f"ledger mark is short bytes=`{len(data)}`")
    version, flags, epoch, deleted_us = _MARK.unpack_from(data)
    if version != _MARK_VERSION or flags & ~(_FENCED | _STORED):
        return Damaged(f"ledger mark is of another version version=`{version}` flags=`{flags}`")
    return LedgerMark(data[_MARK.size :], epoch, bool(flags & _FENCED), bool(flags & _STORED), deleted_us)


class LedgerState(NamedTuple):
    """A ledger as it stands here. `last_entry` and its `lac` are NO_ENTRY without entries.

    A Damaged mark says nothing at all; with `tail_damage` set last_entry and lac mean nothing.
    """

    mark: LedgerMark | Damaged | None
    last_entry: int = NO_ENTRY
    lac: int = NO_ENTRY
    tail_damage: str = ""


@dataclass(slots=True)
class GroupWrites:
    """What one group changes. Deletions come before everything else in it."""

    entries: list[tuple[int, int, bytes]] = field(default_factory=list)
    """(ledger_id, entry_id, envelope)"""
    marks: dict[int, LedgerMark] = field(default_factory=dict)
    forgotten: list[int] = field(default_factory=list)
    """Ledgers whose marks go."""
    deleted: list[int] = field(default_factory=list)
    """Ledgers whose entries go."""
    meta: dict[str, bytes] = field(default_factory=dict)

    def ledgers(self) -> set[int]:
        return {ledger_id for ledger_id, _, _ in self.entries} | self.marks.keys() | {*self.forgotten, *self.deleted}


@dataclass(frozen=True, slots=True)
class EntryQuery:
    """Entries first..last, inclusive. The answer stops before the entry that would pass max_bytes, but has one."""

    ledger_id: int
    first: int
    last: int
    max_bytes: int


@dataclass(frozen=True, slots=True)
class EntryRead:
    """`values` for first, first + 1, ...: None = nothing stands there. `mark` was read after them."""

    values: list[bytes | Damaged | None]
    mark: LedgerMark | Damaged | None


@dataclass(frozen=True, slots=True)
class StoreUsage:
    """Bytes on disk, and how many of them belong to deleted entries, as far as the store knows by now."""

    stored_bytes: int
    garbage_bytes: int


class EntryStore(Protocol):
    @property
    def doubt(self) -> str:
        """Why durable groups may be missing, as found when it was opened; empty if all are there.

        The next commit ends the doubt, so it must write down what follows from it.
        """
        ...

    @property
    def empty(self) -> bool:
        """No group was ever committed here."""
        ...

    @property
    def meta(self) -> Mapping[str, bytes]: ...

    async def commit(self, writes: GroupWrites) -> None:
        """Durable on return, also when it is empty. Raises StoreStalled (nothing happened) or StoreFailed."""
        ...

    async def load(self, ledger_ids: Sequence[int]) -> dict[int, LedgerState]: ...

    async def lookup(self, keys: Sequence[tuple[int, int]]) -> dict[tuple[int, int], bytes | Damaged | None]: ...

    async def read(self, queries: Sequence[EntryQuery]) -> list[EntryRead]: ...

    async def marks(self) -> list[tuple[int, LedgerMark]]:
        """All marks, by ledger id. Raises StoreDamaged rather than leave one out."""
        ...

    async def reclaim(self, ledger_ids: Sequence[int]) -> None:
        """Frees the space of deleted ledgers, as far as that goes without rewriting others."""
        ...

    async def rewrite_oldest(self, bytes_per_s: int) -> None:
        """Rewrites what lives in the oldest quarter of the files, so that their garbage goes."""
        ...

    def usage(self) -> StoreUsage: ...

    async def close(self) -> None: ...
