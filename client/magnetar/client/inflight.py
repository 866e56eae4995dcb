"""The chain of one producer in one shard: what was encoded and is not known to be stored. Pure.

The broker appends a batch only if its `previous` is the last sequence it took from this producer. So the chain knows
what was sent since the producer was last opened at the shard, and in which order; when the opening is lost, all of it
is to be sent again, unless the next opening tells that it is stored. Nothing is ever sent out of order, or twice under
one opening.

    OPEN(last) ──send──▶ in flight ──store──▶ done
        ▲                   │ lost
        └──── to resend ◀───┘
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from enum import Enum
from itertools import pairwise
from typing import NamedTuple

from magnetar.client.batching import NO_SEQUENCE, Batch
from magnetar.client.errors import MagnetarError

REMEMBERED_BATCHES = 16
"""Of how many stored batches a place can be told again."""


class Stored(NamedTuple):
    """Sequences first..last stand at offsets from `offset` on; -1: not known where."""

    first: int
    last: int
    offset: int


class ParentRange(NamedTuple):
    """The last sequence that a parent shard stored for these slots."""

    first_slot: int
    last_slot: int
    last: int


class Known(Enum):
    """What a chain knows of a message that is to be sent."""

    NEW = "new"
    SENT = "its sequence was sent before"
    IN_PARENT = "its sequence is stored in a parent shard"


class Chain:
    """sent_last   last sequence sent or known to be stored: what the next batch has as `previous`
    stored      last sequence known to be stored
    parents     what the parents of the shard stored
    window      most unanswered bytes in flight
    unanswered  bytes in flight

    Lists of batches that the methods return have ended: their bytes no longer count.
    """

    __slots__ = (
        "_duplicates",
        "_in_flight",
        "_recent",
        "_resend",
        "open",
        "parents",
        "sent_last",
        "stored",
        "unanswered",
        "window",
    )

    def __init__(self) -> None:
        self.open = False
        self.sent_last = NO_SEQUENCE
        self.stored = NO_SEQUENCE
        self.window = 0
        self.unanswered = 0
        self.parents: Sequence[ParentRange] = ()
        self._in_flight: deque[Batch] = deque()
        self._resend: deque[Batch] = deque()
        self._duplicates: list[Batch] = []
        self._recent: deque[Stored] = deque(maxlen=REMEMBERED_BATCHES)

    def __bool__(self) -> bool:
        return bool(self._in_flight or self._resend or self._duplicates)

    # --- opening ---

    def opened(
        self, last: int, recent: Sequence[Stored], window: int, parents: Sequence[ParentRange] = ()
    ) -> list[Batch]:
        """The shard's owner answered: everything up to `last` is stored, and nothing sent before can be any more."""
        self.lost()
        self.open = True
        self.window = window
        self.parents = parents
        self.sent_last = self.stored = last
        self._recent.clear()
        self._recent.extend(recent)
        ended: list[Batch] = []
        while self._resend and self._resend[0].last <= last:
            batch = self._resend.popleft()
            batch.stored(self._offset_of(batch.first, batch.last))
            ended.append(batch)
        return ended + self._settle_duplicates()

    def lost(self) -> None:
        """The opening is over. What is in flight may or may not be stored: the next opening tells."""
        self.open = False
        self._resend.extendleft(reversed(self._in_flight))
        self._in_flight.clear()
        self.unanswered = 0

    def renumber(self, last: int, next_sequence: int) -> int:
        """Nothing that is to be sent again is stored, though others stored up to `last`: called before `opened`.

        What the library numbers gets new numbers, if its own are taken. Returns the next sequence that is free.
        """
        self.lost()
        if all(batch.numbered or batch.first > last for batch in self._resend):
            return next_sequence
        for batch in self._resend:
            if not batch.numbered:
                batch.renumber(next_sequence)
            next_sequence = max(next_sequence, batch.last + 1)
        return next_sequence

    # --- sending ---

    @property
    def batches(self) -> int:
        """Unanswered ones under this opening."""
        return len(self._in_flight)

    def fits(self, size: int) -> bool:
        """The window has room for a batch of so many bytes; one too large for any window goes alone."""
        return self.unanswered == 0 or self.unanswered + size <= self.window

    def resend_size(self) -> int:
        """Bytes of the next batch to send again; 0: there is none."""
        return len(self._resend[0].data) if self._resend else 0

    def resend(self) -> Batch:
        """The next batch to send again, put behind the one sent before it. Only if there is one."""
        batch = self._resend.popleft()
        batch.put_behind(self.sent_last)
        self.sent(batch)
        return batch

    def sent(self, batch: Batch) -> None:
        """An encoded batch goes to the broker, as the last of the chain."""
        self.sent_last = batch.last
        self.unanswered += len(batch.data)
        self._in_flight.append(batch)

    def runs(self, batch: Batch) -> list[tuple[Known, list[int]]]:
        """The messages of a batch that is to be sent, in runs of what is known of them before.

        Only a batch with the user's sequences can have others than NEW.
        """
        if not batch.numbered or (batch.first > self.sent_last and not self.parents):
            return [(Known.NEW, [])]
        found: list[tuple[Known, list[int]]] = []
        for index, slot in enumerate(batch.message_slots()):
            sequence = batch.first + index
            known = Known.NEW
            if sequence <= self.sent_last:
                known = Known.SENT
            elif any(p.first_slot <= slot <= p.last_slot and sequence <= p.last for p in self.parents):
                known = Known.IN_PARENT
            if not found or found[-1][0] is not known:
                found.append((known, []))
            found[-1][1].append(index)
        return found

    def answer_later(self, batch: Batch) -> list[Batch]:
        """A duplicate of what was sent before ends when that is stored."""
        self._duplicates.append(batch)
        return self._settle_duplicates()

    # --- answers ---

    def store(self, answer: Stored) -> list[Batch]:
        """The broker says that these sequences are durable. An answer may be for several batches."""
        ended: list[Batch] = []
        offset = answer.offset
        while self._in_flight and self._in_flight[0].last <= answer.last:
            batch = self._in_flight.popleft()
            self.unanswered -= len(batch.data)
            known = offset >= 0 and batch.first >= answer.first
            if known:
                self._recent.append(Stored(batch.first, batch.last, offset))
            batch.stored(offset if known else None)
            if known:
                offset += batch.count
            ended.append(batch)
        self.stored = max(self.stored, answer.last)
        return ended + self._settle_duplicates() if self._duplicates else ended

    def refuse(self, sequence: int, error: MagnetarError) -> list[Batch]:
        """The batch with this first sequence will never be stored. Those behind it keep their order without it."""
        for batches in (self._in_flight, self._resend):
            for batch in batches:
                if batch.first == sequence:
                    batches.remove(batch)
                    if batches is self._in_flight:
                        self.unanswered -= len(batch.data)
                    batch.failed(error)
                    return [batch]
        return []

    def take_all(self) -> list[Batch]:
        """Every batch, oldest first; nothing remains. For giving up, or for another shard."""
        self.lost()
        batches = [*self._resend, *self._duplicates]
        self._resend.clear()
        self._duplicates.clear()
        return batches

    def pending(self) -> list[Batch]:
        """Every batch, oldest first."""
        return [*self._in_flight, *self._resend, *self._duplicates]

    def _offset_of(self, first: int, last: int) -> int | None:
        for stored in self._recent:
            if stored.first <= first and last <= stored.last and stored.offset >= 0:
                return stored.offset + first - stored.first
        return None

    def _settle_duplicates(self) -> list[Batch]:
        ended = [batch for batch in self._duplicates if batch.last <= self.stored]
        if ended:
            self._duplicates = [batch for batch in self._duplicates if batch.last > self.stored]
        for batch in ended:
            batch.offsets = [self._offset_of(n, n) for n in range(batch.first, batch.last + 1)]
            batch.stored(None)
        return ended

    def check(self) -> None:
        """Asserts the invariants; for tests."""
        assert self.unanswered == sum(len(batch.data) for batch in self._in_flight)
        chain = [*self._in_flight, *self._resend]
        assert all(batch.data and not batch.ended for batch in chain)
        assert all(a.last < b.first for a, b in pairwise(chain))
        previous = [batch.previous for batch in self._in_flight][1:]
        assert previous == [batch.last for batch in self._in_flight][: len(previous)]
        assert not self._in_flight or self.open


def covered_by_parents(batch: Batch, parents: Iterable[ParentRange]) -> bool:
    """A batch that may be stored in a parent shard is, if the parent that had its slots stored its last sequence."""
    if batch.parent_last == NO_SEQUENCE:
        return False
    slot = batch.message_slots()[0]
    return any(p.first_slot <= slot <= p.last_slot and batch.parent_last <= p.last for p in parents)


def regroup(batch: Batch, shard_of: Callable[[int], int]) -> list[Batch]:
    """The batch as batches for the shards that its messages now belong to, each in order."""
    groups: list[tuple[int, list[int]]] = []
    places: dict[int, list[int]] = {}
    for index, slot in enumerate(batch.message_slots()):
        shard = shard_of(slot)
        indices = places.get(shard)
        if indices is None or (batch.numbered and indices[-1] != index - 1):
            indices = places[shard] = []
            groups.append((shard, indices))
        indices.append(index)
    return batch.divide(groups)
