"""The boundary to a bookie: what the ledger layer asks of one storage node, whatever carries it.

Implementations: gRPC streams (`grpc_bookie.py`), a bookie in the same process (`magnetar.bookie.local`), the simulator.
All of them run the same handlers at the far end. Calls never raise for what a bookie or a network does: every outcome,
a lost connection and a timeout included, is a value, because the protocol must count it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, NamedTuple, Protocol

from magnetar.metadata.records import BookieRegistration

if TYPE_CHECKING:
    import asyncio


class AddStatus(Enum):
    OK = 1
    """Stored and fsynced."""
    FENCED = 2
    STALE_EPOCH = 3
    READ_ONLY = 4
    REFUSED = 5
    BUSY = 6
    CONFLICT = 7
    WRONG_TOKEN = 8
    MALFORMED = 9
    IO_ERROR = 10
    NO_ANSWER = 11
    """Connection lost or timed out: the entries may or may not be stored."""


class EntryOutcome(Enum):
    HAVE = 1
    PROVABLY_NOT = 2
    UNKNOWN = 3


class AddGroup(NamedTuple):
    """Entries of one ledger, judged, stored and answered as one. At most 1 MiB of envelopes, or exactly one entry."""

    ledger_id: int
    epoch: int
    token: bytes
    entries: tuple[bytes, ...]
    recovery: bool = False


class AddResult(NamedTuple):
    status: AddStatus
    message: str = ""


STORED = AddResult(AddStatus.OK)
"""What almost every add is answered with."""


@dataclass(frozen=True, slots=True)
class ReadGroup:
    """Entries first_entry..last_entry (inclusive). With `fence`, raises the ledger's epoch and fences it first.

    headers_only   the bookie verifies what it stores and answers the envelopes' headers alone: enough to compare copies
    """

    ledger_id: int
    epoch: int
    token: bytes
    first_entry: int
    last_entry: int
    fence: bool = False
    max_bytes: int = 1 << 20
    headers_only: bool = False


@dataclass(frozen=True, slots=True)
class EntryAnswer:
    """`entry` (the whole envelope, or its header as asked) is there exactly if the outcome is HAVE."""

    outcome: EntryOutcome
    entry: bytes | None = None


@dataclass(frozen=True, slots=True)
class ReadResult:
    """Answers for first_entry, first_entry + 1, ...: a prefix of what was asked, at least one.

    A lost connection or timeout is one UNKNOWN. Envelopes are not yet verified: the reader does that.
    """

    answers: tuple[EntryAnswer, ...]
    message: str = ""


@dataclass(frozen=True, slots=True)
class LacQuery:
    ledger_id: int
    epoch: int
    token: bytes
    fence: bool = False


@dataclass(frozen=True, slots=True)
class LacResult:
    """HAVE: `lac` and `last_entry` count. PROVABLY_NOT: nothing of this ledger is stored. UNKNOWN: no statement.

    `lac` is the highest LAC in any stored envelope, `last_entry` the highest stored id; -1 = none.
    """

    outcome: EntryOutcome
    lac: int = -1
    last_entry: int = -1
    fenced: bool = False
    epoch: int = 0
    message: str = ""


class BookieRpc(Protocol):
    """One bookie. Every future completes, within the connection's timeout, and never with an exception.

    Adds given to one connection for one ledger are judged in the order they were given.
    """

    @property
    def bookie_id(self) -> str: ...

    def add(self, group: AddGroup) -> asyncio.Future[AddResult]: ...

    def read(self, group: ReadGroup) -> asyncio.Future[ReadResult]: ...

    def read_lac(self, query: LacQuery) -> asyncio.Future[LacResult]: ...


class Bookies(Protocol):
    """The bookies of the cluster as last heard of: a hint for placement, and the way to reach each."""

    def registered(self) -> Sequence[BookieRegistration]:
        """Those with a living session, in any state."""
        ...

    def rpc(self, bookie_id: str) -> BookieRpc:
        """Always answers; an unknown or lost bookie's calls complete with NO_ANSWER / UNKNOWN."""
        ...

    def on_change(self, callback: Callable[[], None]) -> Callable[[], None]:
        """Calls back after each change of registered(); returns what ends that."""
        ...
