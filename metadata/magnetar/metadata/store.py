"""The interface of the metadata store: a small, ordered, transactional key-value store with leases and watches.

It is the common part of etcd v3 and an MVCC table in SQLite. Rules that every engine keeps:

1. Revisions grow by one with each transaction that changes something; every key knows the revision that created it
   (`create_revision`) and the last that changed it (`mod_revision`).
2. A transaction compares revisions and applies all of its operations, or none. It is durable when it returns.
3. A watch delivers every change after its start revision, in order, grouped by revision, or an explicit `Reset`.
4. A call that raises `MetadataUnavailable` has an *unknown* outcome: it may still take effect. Read again.

Nothing here proves ownership: a lease or a watch is a hint, a compare inside a transaction decides.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from enum import Enum
from types import TracebackType
from typing import Protocol, Self

OPERATIONS_MAX = 100
COMPARES_MAX = 100
VALUE_BYTES_MAX = 1 << 20
TXN_BYTES_MAX = 1_400_000
"""Keys and values of a transaction together: etcd takes requests of 1.5 MiB."""


class MetadataError(Exception):
    """Something the store refuses or cannot do."""


class MetadataUnavailable(MetadataError):
    """No answer: the outcome of the call is unknown. Read again before believing anything."""


class LeaseExpired(MetadataError):
    """The lease of an operation does not exist (any more)."""


@dataclass(frozen=True, slots=True)
class KeyValue:
    key: str
    value: bytes
    create_revision: int
    mod_revision: int
    lease_id: int = 0


@dataclass(frozen=True, slots=True)
class RangeResult:
    """Keys in ascending order, as of `revision`. `more`: the limit cut it; go on after the last key."""

    items: tuple[KeyValue, ...]
    revision: int
    more: bool = False


class CompareTarget(Enum):
    MOD = "mod"
    CREATE = "create"


@dataclass(frozen=True, slots=True)
class Compare:
    """True if the key's revision is (or, with `equal=False`, is not) `revision`. An absent key has revision 0."""

    key: str
    target: CompareTarget
    revision: int
    equal: bool = True


def unchanged(key: str, mod_revision: int) -> Compare:
    """The key was last changed at `mod_revision`; 0 = it does not exist."""
    return Compare(key, CompareTarget.MOD, mod_revision)


def absent(key: str) -> Compare:
    return Compare(key, CompareTarget.MOD, 0)


def exists(key: str) -> Compare:
    return Compare(key, CompareTarget.MOD, 0, equal=False)


def created_at(key: str, create_revision: int) -> Compare:
    """The key exists and is the one created at `create_revision`: names a session."""
    return Compare(key, CompareTarget.CREATE, create_revision)


def not_created_at(key: str, create_revision: int) -> Compare:
    """The session `create_revision` of this key is over."""
    return Compare(key, CompareTarget.CREATE, create_revision, equal=False)


@dataclass(frozen=True, slots=True)
class Put:
    key: str
    value: bytes
    lease_id: int = 0


@dataclass(frozen=True, slots=True)
class Delete:
    key: str


@dataclass(frozen=True, slots=True)
class DeletePrefix:
    prefix: str


Operation = Put | Delete | DeletePrefix


@dataclass(frozen=True, slots=True)
class TxnResult:
    """`revision` is that of the change if it succeeded, else the store's at the time of comparing."""

    succeeded: bool
    revision: int


@dataclass(frozen=True, slots=True)
class Change:
    """One key's change. `current` is None when it was deleted."""

    key: str
    current: KeyValue | None
    revision: int


@dataclass(frozen=True, slots=True)
class Changes:
    """All watched changes of one or more whole revisions, the last of them `revision`."""

    changes: tuple[Change, ...]
    revision: int


@dataclass(frozen=True, slots=True)
class Reset:
    """History between the watch's position and the present is gone: list again and watch from there."""


WatchEvent = Changes | Reset


def check_txn(compares: Sequence[Compare], operations: Sequence[Operation]) -> None:
    """Refuses with ValueError what no engine accepts: more than the limits, or two operations that touch one key."""
    if len(compares) > COMPARES_MAX or len(operations) > OPERATIONS_MAX:
        raise ValueError(f"a transaction is too large: compares=`{len(compares)}` operations=`{len(operations)}`")
    size_bytes = sum(len(_check_key(compare.key).encode()) for compare in compares)
    keys: set[str] = set()
    prefixes: list[str] = []
    for operation in operations:
        size_bytes += _size_bytes(operation)
        if isinstance(operation, DeletePrefix):
            prefixes.append(_check_key(operation.prefix))
            continue
        if isinstance(operation, Put) and len(operation.value) > VALUE_BYTES_MAX:
            raise ValueError(f"a value is too large: key=`{operation.key}` bytes=`{len(operation.value)}`")
        if _check_key(operation.key) in keys:
            raise ValueError(f"two operations of a transaction touch one key: key=`{operation.key}`")
        keys.add(operation.key)
    if size_bytes > TXN_BYTES_MAX:
        raise ValueError(f"a transaction is too large: bytes=`{size_bytes}` max=`{TXN_BYTES_MAX}`")
    for i, prefix in enumerate(prefixes):
        others = prefixes[:i] + prefixes[i + 1 :]
        if any(k.startswith(prefix) for k in keys) or any(p.startswith(prefix) for p in others):
            raise ValueError(f"two operations of a transaction touch one key: prefix=`{prefix}`")


def _size_bytes(operation: Operation) -> int:
    if isinstance(operation, DeletePrefix):
        return len(operation.prefix.encode())
    return len(operation.key.encode()) + (len(operation.value) if isinstance(operation, Put) else 0)


def _check_key(key: str) -> str:
    if not key:
        raise ValueError("a key is not empty")
    key.encode()  # a lone surrogate has no stored form: UnicodeEncodeError is a ValueError
    return key


class Watch(Protocol):
    """An endless iterator of events, until it is closed. After a Reset it ends."""

    def __aiter__(self) -> AsyncIterator[WatchEvent]: ...

    async def close(self) -> None: ...


class Lease(Protocol):
    """Keeps itself alive in the background until it is revoked or lost."""

    @property
    def lease_id(self) -> int: ...

    @property
    def ttl_s(self) -> float: ...

    @property
    def lost(self) -> bool:
        """True once the store can have dropped the lease's keys; judged locally, before the store would."""
        ...

    async def wait_lost(self) -> None: ...

    async def revoke(self) -> None:
        """Ends the lease and deletes its keys; a lost or unknown lease is no error."""
        ...


class MetadataStore(Protocol):
    """See the module's rules. Every call raises MetadataUnavailable when its outcome is unknown."""

    async def get(self, key: str) -> KeyValue | None: ...

    async def range(self, prefix: str, *, after: str = "", limit: int = 0) -> RangeResult:
        """The keys that start with `prefix`, in order, those greater than `after` only; `limit` 0 = all of them."""
        ...

    async def txn(self, compares: Sequence[Compare], operations: Sequence[Operation]) -> TxnResult:
        """Applies the operations if every compare holds. Durable when it returns.

        Raises ValueError for what `check_txn` refuses, LeaseExpired when a put names a lease that is not there.
        """
        ...

    def watch(self, prefix: str, *, from_revision: int) -> Watch:
        """Changes of keys under `prefix` at revisions >= `from_revision` (use a range's revision + 1)."""
        ...

    async def grant_lease(self, ttl_s: float) -> Lease: ...

    async def close(self) -> None: ...

    async def __aenter__(self) -> Self: ...

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None: ...
