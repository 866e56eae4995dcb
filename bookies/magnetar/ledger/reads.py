"""Reading confirmed entries: which replica is asked, and when the next. Pure.

1. A ledger's replicas have an order, the same for all its reads, so that one bookie's read-ahead serves them. Bookies
   that hedges of any ledger have outrun lately come last: one that stands still delays one read, and not one a ledger.
2. The next replica is asked when one fails, or when nobody has answered for a while (a hedge).
3. The first verified copy ends it. A copy that does not verify counts as UNKNOWN; the shell checks and says so.
4. If nobody has one: only if all members of the write set denied the entry it is missing. One that does not know, or a
   vacant place, makes it unavailable: "I do not know" is never "it is not there".
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf

from magnetar.ledger.bookie_rpc import EntryAnswer, EntryOutcome, ReadGroup
from magnetar.ledger.effects import AskEntries, Found, NotFound, ReadEffect, Wake
from magnetar.ledger.fragments import fragment_of
from magnetar.ledger.quorum import Quorum
from magnetar.metadata.records import VACANT, LedgerRecord

OUTRUN_S = 5.0
"""As long as a session takes to end: then placement knows, too, that the bookie is away."""


@dataclass(frozen=True, slots=True)
class ReadLimits:
    """hedge_s: without any answer for so long the next replica is asked too; doubles with each.
    entries_max: entries of one request."""

    hedge_s: float = 0.5
    entries_max: int = 1024


class OutrunBookies:
    """Bookies that hedges have outrun within the last OUTRUN_S. One object for all ledgers of a client."""

    __slots__ = ("_until",)

    def __init__(self) -> None:
        self._until: dict[str, float] = {}

    def add(self, bookie: str, now: float) -> None:
        self._until[bookie] = now + OUTRUN_S

    def holds(self, bookie: str, now: float) -> bool:
        return self._until.get(bookie, now) > now


class ReplicaOrder:
    """The order in which a ledger's bookies are asked. One that fails, or was outrun by a hedge, is asked last.

    One object a ledger, shared by its reads: that makes reads sticky. Different ledgers start at different places.
    """

    __slots__ = ("_demerits", "_outrun", "_turn")

    def __init__(self, ledger_id: int, outrun: OutrunBookies) -> None:
        self._turn = ledger_id
        self._outrun = outrun
        self._demerits: dict[str, int] = {}

    def order(self, bookies: Sequence[str], now: float) -> list[str]:
        """The filled places' bookies, the preferred one first."""
        turn = self._turn % len(bookies)
        filled = [bookie for bookie in (*bookies[turn:], *bookies[:turn]) if bookie != VACANT]
        return sorted(filled, key=lambda bookie: (self._outrun.holds(bookie, now), self._demerits.get(bookie, 0)))

    def demote(self, bookie: str) -> None:
        """Asked after all others from now on, until they are demoted too."""
        self._demerits[bookie] = 1 + max(self._demerits.values(), default=0)

    def outrun(self, bookie: str, now: float) -> None:
        """Demoted, and asked last in other ledgers too for a while."""
        self.demote(bookie)
        self._outrun.add(bookie, now)

    def describe(self) -> str:
        return " ".join(f"{bookie}:-{demerit}" for bookie, demerit in sorted(self._demerits.items())) or "no demerits"


class ReadCore:
    """One read of entries first..last: it ends with a prefix of them, at least one, or with why there is none.

    A prefix never passes the end of a fragment, nor what the asked bookie holds of a striped ledger.
    """

    def __init__(
        self,
        record: LedgerRecord,
        first: int,
        last: int,
        max_bytes: int,
        order: ReplicaOrder,
        limits: ReadLimits | None = None,
    ) -> None:
        assert 0 <= first <= last, "a read of nothing"
        self.record = record
        self.first = first
        self.max_bytes = max_bytes
        self.limits = limits or ReadLimits()
        self.done = False
        self._quorum = Quorum.of(record)
        fragment, end = fragment_of(record, first)
        if end is not None and end < first:
            raise ValueError(
                f"entry is beyond the ledger's end: ledger=`{record.ledger_id}` entry=`{first}` end=`{end}`"
            )
        self.last = min(last, first + self.limits.entries_max - 1, last if end is None else end)
        self._bookies = fragment.bookies
        self._order = order
        # By place, not in the entry's round robin: without striping the order must be the same for all entries.
        self._write_set = [fragment.bookies[place] for place in sorted(self._quorum.write_set(first))]
        self._waiting = [bookie for bookie in self._write_set if bookie != VACANT]
        self._asked: dict[int, str] = {}
        self._silent: set[str] = set()
        self._said = dict.fromkeys(self._waiting, "not asked")
        self._denied: set[str] = set()
        self._hedge_at = inf
        self._hedge_s = self.limits.hedge_s

    def begin(self, now: float) -> list[ReadEffect]:
        self._waiting = self._order.order(self._write_set, now)
        return self._ask_next(now)

    def answered(self, sequence: int, answers: Sequence[EntryAnswer], message: str, now: float) -> list[ReadEffect]:
        """What a bookie answered; its copies are verified, and UNKNOWN in place of those that did not."""
        bookie = self._asked.pop(sequence, None)
        if bookie is None or self.done:
            return []
        entries: list[bytes] = []
        for answer in answers:
            if answer.outcome is not EntryOutcome.HAVE or answer.entry is None:
                break
            entries.append(answer.entry)
        if entries:
            return self._found(bookie, tuple(entries), now)
        outcome = answers[0].outcome if answers else EntryOutcome.UNKNOWN
        self._said[bookie] = f"{outcome.name} {message}".rstrip()
        if outcome is EntryOutcome.PROVABLY_NOT:
            self._denied.add(bookie)
        self._order.demote(bookie)
        if self._waiting:
            return self._ask_next(now)
        return [] if self._asked else self._not_found()

    def tick(self, now: float) -> list[ReadEffect]:
        """Time has come for what Wake asked."""
        if self.done or not self._waiting:
            return []
        if now < self._hedge_at:
            return [Wake(self._hedge_at)]
        self._silent.update(self._asked.values())
        return self._ask_next(now)

    def _ask_next(self, now: float) -> list[ReadEffect]:
        if not self._waiting:
            return [] if self._asked else self._not_found()
        bookie = self._waiting.pop(0)
        sequence = len(self._said) - len(self._waiting)
        self._asked[sequence] = bookie
        self._said[bookie] = "no answer"
        effects: list[ReadEffect] = [AskEntries(sequence, bookie, self._group(bookie))]
        if self._waiting:
            self._hedge_at = now + self._hedge_s
            self._hedge_s *= 2
            effects.append(Wake(self._hedge_at))
        return effects

    def _group(self, bookie: str) -> ReadGroup:
        record = self.record
        last = self._last_held(self._bookies.index(bookie))
        return ReadGroup(record.ledger_id, record.epoch, record.token, self.first, last, max_bytes=self.max_bytes)

    def _last_held(self, place: int) -> int:
        """The end of the run, from `first` on, that stands at the place."""
        if not self._quorum.striped:
            return self.last
        last = self.first
        while last < self.last and self._quorum.write_mask(last + 1) >> place & 1:
            last += 1
        return last

    def _found(self, bookie: str, entries: tuple[bytes, ...], now: float) -> list[ReadEffect]:
        self.done = True
        for silent in sorted(self._silent - {bookie}):
            self._order.outrun(silent, now)
        return [Found(bookie, entries)]

    def _not_found(self) -> list[ReadEffect]:
        self.done = True
        proven = len(self._denied) == self._quorum.write_quorum
        return [NotFound(proven, dict(self._said))]

    def describe(self) -> str:
        said = " ".join(f"{bookie}=`{what}`" for bookie, what in self._said.items())
        return f"read of ledger {self.record.ledger_id} entries {self.first}..{self.last} done={self.done} {said}"

    def check(self) -> None:
        """Asserts every invariant."""
        asked = set(self._asked.values())
        assert not asked & set(self._waiting)
        assert self._denied <= set(self._said)
        assert self.done or self._asked or self._waiting, "nobody is asked and it is not over"
        assert asked | set(self._waiting) <= {bookie for bookie in self._write_set if bookie != VACANT}
