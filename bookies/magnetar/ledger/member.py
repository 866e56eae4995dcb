"""One place of an ensemble as the ledger's writer sees it: does it answer, what was sent, what has it stored. Pure.

VACANT ──────────────────────────────────────────────► LEAVING
LIVE ◄──► RESENDING ──► FAILED ◄──► PROBING ──► LIVE      ▲
  └───────────────────► REJECTED ─────────────────────────┘  (from every state)
"""

from __future__ import annotations

from enum import Enum

from magnetar.ledger.bookie_rpc import AddGroup
from magnetar.ledger.entry_ranges import EntryRanges
from magnetar.metadata.records import VACANT


class MemberState(Enum):
    VACANT = 1
    """No bookie fills the place."""
    LIVE = 2
    """It gets every entry at once."""
    RESENDING = 3
    """It was busy or gave no answer. It gets the same bytes again at `retry_at`; what comes meanwhile waits behind."""
    FAILED = 4
    """It gets nothing until it is replaced, or `retry_at` has come and no spare has."""
    PROBING = 5
    """It gets one group; if it stores that, it is LIVE again."""
    REJECTED = 6
    """What it said cannot change while this ledger lives: it is only waited for to be replaced."""
    LEAVING = 7
    """A change that replaces it was begun. Its acknowledgements complete nothing any more."""


_ASKABLE = {MemberState.FAILED, MemberState.REJECTED, MemberState.LEAVING}
TRANSITIONS: dict[MemberState, set[MemberState]] = {
    MemberState.VACANT: {MemberState.LEAVING},
    MemberState.LIVE: {MemberState.RESENDING, *_ASKABLE},
    MemberState.RESENDING: {MemberState.LIVE, *_ASKABLE},
    MemberState.FAILED: {MemberState.PROBING, MemberState.LEAVING},
    MemberState.PROBING: {MemberState.LIVE, *_ASKABLE},
    MemberState.REJECTED: {MemberState.LEAVING},
    MemberState.LEAVING: set(),
}
SENDING = frozenset({MemberState.LIVE, MemberState.RESENDING, MemberState.PROBING})
"""States in which groups are outstanding."""


class PendingEntry:
    """An entry from add() until it is confirmed and no member waits for it. `acks` is a mask of places."""

    __slots__ = ("acks", "data", "entry_id")

    def __init__(self, entry_id: int, data: bytes) -> None:
        self.entry_id = entry_id
        self.data = data
        self.acks = 0


class Chunk:
    """Consecutive entries sent together. A member gets those of them that its place holds.

    first, last   the whole run, so that a member that stored it misses nothing in between
    """

    __slots__ = ("entries", "first", "group", "last", "size")

    def __init__(self, first: int, last: int, entries: tuple[PendingEntry, ...], size: int, group: AddGroup) -> None:
        self.first = first
        self.last = last
        self.entries = entries
        self.size = size
        self.group = group


class Outstanding:
    """A chunk handed to a member and not yet answered. `waiting`: answered by BUSY or silence, to be sent again."""

    __slots__ = ("chunk", "member", "sequence", "since", "waiting")

    def __init__(self, sequence: int, member: Member, chunk: Chunk, since: float, waiting: bool) -> None:
        self.sequence = sequence
        self.member = member
        self.chunk = chunk
        self.since = since
        self.waiting = waiting


class Member:
    """A bookie at a place. One object per (place, bookie): a replacement is a new one, so no old answer can reach it.

    outstanding   by sequence, oldest first; its first entry's `since` bounds how long the member may stay silent
    stored        entries it acknowledged, those confirmed before included
    resends       resends since its last acknowledgement
    probes        failed attempts to reach it again since then
    retry_at      RESENDING: when to send again; FAILED: when to probe
    said          why it is not LIVE
    """

    __slots__ = (
        "bit", "bookie", "outstanding", "outstanding_bytes", "outstanding_entries", "place", "probes", "resends",
        "retry_at", "said", "state", "stored",
    )  # fmt: skip

    def __init__(self, place: int, bookie: str) -> None:
        self.place = place
        self.bit = 1 << place
        self.bookie = bookie
        self.state = MemberState.VACANT if bookie == VACANT else MemberState.LIVE
        self.outstanding: dict[int, Outstanding] = {}
        self.outstanding_bytes = 0
        self.outstanding_entries = 0
        self.stored = EntryRanges()
        self.resends = 0
        self.probes = 0
        self.retry_at = 0.0
        self.said = "no bookie fills this place" if bookie == VACANT else ""

    def become(self, state: MemberState) -> None:
        assert state in TRANSITIONS[self.state], f"no transition from {self.state.name} to {state.name}"
        self.state = state

    def take(self, outstanding: Outstanding) -> None:
        self.outstanding[outstanding.sequence] = outstanding
        self.outstanding_bytes += outstanding.chunk.size
        self.outstanding_entries += len(outstanding.chunk.entries)

    def give_back(self, outstanding: Outstanding) -> None:
        del self.outstanding[outstanding.sequence]
        self.outstanding_bytes -= outstanding.chunk.size
        self.outstanding_entries -= len(outstanding.chunk.entries)

    def oldest(self) -> Outstanding | None:
        return next(iter(self.outstanding.values()), None)

    def describe(self) -> str:
        facts = f"{self.place} {self.bookie or '(vacant)'} {self.state.name} stored={self.stored!r}"
        if self.outstanding:
            facts += f" outstanding={self.outstanding_entries}"
        return f"{facts} said=`{self.said}`" if self.said and self.state is not MemberState.LIVE else facts
