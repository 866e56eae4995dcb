"""The records of the metadata store, as the program thinks of them. Pure.

Frozen values: a change is a new record. `codec.py` converts them to and from their stored form, `keyspace.py` says
under which key each stands and who may write it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import Enum

NO_ENTRY = -1
"""Last entry id, or LAC, of a ledger without entries."""

VACANT = ""
"""A place of an ensemble that no bookie fills. It never acknowledges and counts as UNKNOWN."""


class ShardState(Enum):
    OPEN = 1
    SEALED = 2
    DELETING = 3


class LedgerState(Enum):
    OPEN = 1
    IN_RECOVERY = 2
    CLOSED = 3


class LedgerPurpose(Enum):
    DATA = 1
    CURSOR = 2


class SubscriptionType(Enum):
    UNDECIDED = 0
    STREAM = 1
    QUEUE = 2


class BookieState(Enum):
    WRITABLE = 1
    READ_ONLY = 2
    DRAINING = 3


class CopyReason(Enum):
    """Why a copy of a closed ledger is to be made."""

    UNREPLICATED = 1
    """A member missed entries when the ledger was closed, or a place is vacant."""
    LOST = 2
    DRAINING = 3
    REBALANCE = 4
    SCRUB = 5
    """A member's entries are damaged."""


class Goal(Enum):
    """What a rebalancing makes even: the bytes that bookies hold, the number of copies of ledgers, or what brokers own.

    The first two move copies of ledgers, the last one hands shards over.
    """

    BYTES = 1
    SEGMENTS = 2
    BROKERS = 3


class OperationState(Enum):
    """RUNNING <-> PAUSED, and from both to one of the others, which are final."""

    RUNNING = 1
    PAUSED = 2
    CANCELLED = 3
    DONE = 4


class MoveState(Enum):
    PENDING = 1
    DONE = 2
    SKIPPED = 3


@dataclass(frozen=True, slots=True)
class Owner:
    """A broker's session: the registration key `brokers/<broker_id>` as created at revision `session`."""

    broker_id: str
    session: int


@dataclass(frozen=True, slots=True)
class Segment:
    """One ledger in a shard's chain. Messages, bytes and time are counted when the segment is closed, 0 before."""

    ledger_id: int
    first_offset: int
    first_time_us: int = 0
    messages: int = 0
    bytes: int = 0

    @property
    def end_offset(self) -> int:
        """One past its last offset. Meaningful when closed."""
        return self.first_offset + self.messages


@dataclass(frozen=True, slots=True)
class ShardRecord:
    """A shard. Written by its owner only.

    segments      oldest first. While the shard has a ledger open for appending, it is the last one
    next_ledger   linked ahead: an empty OPEN ledger that becomes the next segment, 0 = none
    cursor_ledger / next_cursor   0 = none
    inline_cursors   what a clean close left of the cursor ledger: one encoded CursorEntry
    """

    shard_id: int
    topic: str
    state: ShardState
    epoch: int
    owner: Owner | None
    first_slot: int
    last_slot: int
    parents: tuple[int, ...] = ()
    start_offset: int = 0
    segments: tuple[Segment, ...] = ()
    first_page: int = 0
    pages: int = 0
    next_ledger: int = 0
    cursor_ledger: int = 0
    next_cursor: int = 0
    inline_cursors: bytes = b""
    created_us: int = 0
    floor_time_us: int = 0


@dataclass(frozen=True, slots=True)
class Fragment:
    """From `first_entry` on the ledger's entries stand on these bookies; the next fragment ends it."""

    first_entry: int
    bookies: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class CopyClaim:
    """A copy that is being made: `target` may store entries of the ledger, and is to replace `replaces` (VACANT: to
    fill a place that nobody fills). `mark` is random: it tells whose claim this is."""

    target: str
    replaces: str
    mark: bytes
    since_us: int = 0


@dataclass(frozen=True, slots=True)
class LedgerRecord:
    """A ledger. last_entry and length (payload bytes of all entries) are meaningful when CLOSED; `copy` only then."""

    ledger_id: int
    shard_id: int
    purpose: LedgerPurpose
    state: LedgerState
    epoch: int
    token: bytes
    write_quorum: int
    ack_quorum: int
    fragments: tuple[Fragment, ...]
    last_entry: int = NO_ENTRY
    length: int = 0
    created_us: int = 0
    copy: CopyClaim | None = None

    @property
    def ensemble_size(self) -> int:
        return len(self.fragments[-1].bookies)

    def bookies(self) -> frozenset[str]:
        """Every bookie that any fragment names."""
        return frozenset(b for fragment in self.fragments for b in fragment.bookies if b != VACANT)

    def bytes_held(self) -> dict[str, int]:
        """What each bookie holds when CLOSED: of each fragment its part of the entries, as large as the average."""
        if self.state is not LedgerState.CLOSED or self.last_entry == NO_ENTRY:
            return {}
        held: dict[str, int] = {}
        end_entry = self.last_entry + 1
        ends = [*(fragment.first_entry for fragment in self.fragments[1:]), end_entry]
        for fragment, end in zip(self.fragments, ends, strict=True):
            entries = max(0, min(end, end_entry) - fragment.first_entry)
            share = self.length * entries * self.write_quorum // (len(fragment.bookies) * end_entry)
            for bookie in fragment.bookies:
                if bookie != VACANT:
                    held[bookie] = held.get(bookie, 0) + share
        return held

    def roles(self) -> frozenset[str]:
        """Every bookie on which entries may stand: those that the index names. A claim's target counts for no copy."""
        return self.bookies() if self.copy is None else self.bookies() | {self.copy.target}

    def with_state(self, state: LedgerState, epoch: int | None = None) -> LedgerRecord:
        return replace(self, state=state, epoch=self.epoch if epoch is None else epoch)


@dataclass(frozen=True, slots=True)
class LayoutShard:
    shard_id: int
    first_slot: int
    last_slot: int
    state: ShardState
    parents: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class TopicRecord:
    topic: str
    layout_epoch: int
    shards: tuple[LayoutShard, ...]
    created_us: int = 0
    deleting: bool = False


class Anchor(Enum):
    EARLIEST = "earliest"
    LATEST = "latest"


@dataclass(frozen=True, slots=True)
class AtOffset:
    offset: int


@dataclass(frozen=True, slots=True)
class AtTime:
    time_us: int


StartPosition = Anchor | AtOffset | AtTime


@dataclass(frozen=True, slots=True)
class SubscriptionRecord:
    topic: str
    name: str
    subscription_id: int
    type: SubscriptionType
    start: StartPosition = Anchor.LATEST
    created_us: int = 0


@dataclass(frozen=True, slots=True)
class ProducerRecord:
    """Of a named producer: its id and the epoch of its newest connection."""

    producer_id: bytes
    epoch: int


@dataclass(frozen=True, slots=True)
class BookieRegistration:
    bookie_id: str
    address: str
    rack: str = ""
    state: BookieState = BookieState.WRITABLE
    disk_free_bytes: int = 0
    disk_total_bytes: int = 0
    ledger_floor: int = 0
    version: str = ""
    http_address: str = ""


@dataclass(frozen=True, slots=True)
class BrokerRegistration:
    broker_id: str
    address: str
    version: str = ""
    http_address: str = ""
    leaving: bool = False


@dataclass(frozen=True, slots=True)
class Cookie:
    bookie_id: str
    instance_id: str
    cluster: str
    directory_id: str


@dataclass(frozen=True, slots=True)
class CopyTask:
    """A copy of a closed ledger that is to be made. Any place that it is to be made for has at most one.

    place         the bookie whose part is meant; VACANT: a place that nobody fills
    target        "" = not assigned yet; `place` itself = it is to complete what it misses; else it takes over the part
    operation     of the rebalancing it belongs to
    first_entry..last_entry   what the place is known to miss or to hold damaged; empty if last_entry is the lower
    problem       why it does not go on, in words; empty while it does
    """

    ledger_id: int
    place: str
    target: str
    reason: CopyReason
    operation: str = ""
    first_entry: int = 0
    last_entry: int = NO_ENTRY
    created_us: int = 0
    problem: str = ""

    @property
    def completes(self) -> bool:
        """The target keeps its part and gets what it misses."""
        return self.target != "" and self.target == self.place


@dataclass(frozen=True, slots=True)
class Drain:
    """An operator's wish: the bookie takes no new ledgers, and what stands on it moves away."""

    bookie_id: str
    since_us: int = 0


@dataclass(frozen=True, slots=True)
class Loss:
    """A bookie without a session since a time. `given_up`: it was waited for long enough, its part is made anew."""

    bookie_id: str
    since_us: int
    given_up: bool = False


@dataclass(frozen=True, slots=True)
class RepairSettings:
    """How the cluster repairs itself. The defaults hold while nobody has written others.

    enabled       off: nothing new is begun, for maintenance
    delay_s       how long a single lost bookie is waited for
    bytes_per_s   at which each bookie takes copies, all together
    """

    enabled: bool = True
    delay_s: float = 60.0
    bytes_per_s: int = 10_000_000


@dataclass(frozen=True, slots=True)
class Move:
    """A ledger's copy at the bookie `source` goes to `target`, or with `shard_id` a shard, between brokers.

    reason   why it was skipped, in words
    """

    ledger_id: int
    source: str
    target: str
    size_bytes: int
    state: MoveState = MoveState.PENDING
    reason: str = ""
    shard_id: int = 0


@dataclass(frozen=True, slots=True)
class Operation:
    """A rebalancing: what its `moves` moves in `pages` pages are to do, and how far they are.

    state         an operator's word, and the runner's when all is done. Nothing new begins but in RUNNING
    bytes_per_s   of all its copies together; 0 where none are made
    revision      of the metadata that it was planned from
    rollback_of   the operation whose moves it takes back; empty = none
    mark          random: tells whose request created it
    problems      why it does not go on, in words; empty while it does
    rate          measured in the last seconds, in bytes per second; of all of it once it has ended
    ended_us      0 while copies of it are under way, in every state
    """

    operation_id: str
    goal: Goal
    state: OperationState
    bytes_per_s: int
    revision: int
    moves: int
    size_bytes: int
    pages: int
    mark: bytes
    rollback_of: str = ""
    created_us: int = 0
    updated_us: int = 0
    ended_us: int = 0
    moves_done: int = 0
    bytes_done: int = 0
    moves_skipped: int = 0
    bytes_skipped: int = 0
    rate: int = 0
    problems: tuple[str, ...] = ()
