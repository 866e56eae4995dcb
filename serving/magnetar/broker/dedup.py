"""Which batches of a shard's producers are new: one table a shard, rebuilt from what is stored. Pure.

Rules:

1. A producer's batches form a chain: only a batch whose `previous` is the last sequence pushed to the log is appended.
2. A batch whose last sequence is persisted is a duplicate; one that is pushed and not yet persisted is pending, and
   answered when it is persisted. Anything else is out of order.
3. Opening is a barrier: from then on batches of lower epochs and of earlier openings are refused, and the opening is
   settled, that is: may be answered, when nothing of the producer is pushed and unpersisted. What it answers is then
   final: nothing sent before can be stored afterwards.
4. The table at `covered_offset` is a function of the log below it: a snapshot, and the headers of the batches stored
   since, give it back. So a duplicate is known as one by the next owner too.
5. Producers are forgotten when idle for long, never while one of their streams has them open or a batch is in flight.
   A batch that continues a forgotten chain has to open again.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from hashlib import blake2b
from itertools import pairwise
from typing import NamedTuple, Protocol

NO_SEQUENCE = -1
NO_OFFSET = -1
PRODUCER_ID_BYTES = 16

BATCHES_REMEMBERED = 16
"""How many of a producer's last batches the table can place."""

PRODUCERS_MAX = 100_000
"""Of one shard; beyond it those idle longest are forgotten early, unnamed ones first."""

UNNAMED_IDLE_US = 3_600 * 1_000_000
NAMED_IDLE_US = 7 * 24 * 3_600 * 1_000_000

FORGET_INTERVAL_US = 60 * 1_000_000
"""The whole table is looked through once in it, unless there are too many."""

_FIELDS = 3  # of a remembered batch: first sequence, last sequence, first offset


class Verdict(Enum):
    APPEND = "append"
    DUPLICATE = "duplicate"
    PENDING = "pending"
    OUT_OF_ORDER = "out of order"
    FENCED = "fenced"
    """A higher epoch of this producer was opened."""
    SUPERSEDED = "superseded"
    """The same epoch was opened again, on another handle or stream."""
    MUST_OPEN = "must open"


class ChainLink(Protocol):
    """What a batch's header says about its place in the chain."""

    @property
    def producer_id(self) -> bytes: ...
    @property
    def previous(self) -> int: ...
    @property
    def last(self) -> int: ...


class StoredBatch(NamedTuple):
    """Sequences first_sequence..last_sequence stand at offsets from first_offset on."""

    first_sequence: int
    last_sequence: int
    first_offset: int


class PersistedBatch(NamedTuple):
    """A batch that became durable, or was found in the log."""

    producer_id: bytes
    epoch: int
    first_sequence: int
    last_sequence: int
    first_offset: int


@dataclass(frozen=True, slots=True)
class ProducerState:
    """A producer as a snapshot keeps it."""

    producer_id: bytes
    epoch: int
    last_sequence: int
    last_time_us: int
    recent: tuple[StoredBatch, ...]
    stored_epoch: int
    """Under which `last_sequence` was stored; `epoch` may be that of a later opening."""

    @property
    def named(self) -> bool:
        return self.epoch > 0


@dataclass(frozen=True, slots=True)
class Opened:
    """settled     the opening may be answered now; else `persisted` names it when it may
    superseded  an opening that waited for its answer and will get none; 0 = none"""

    settled: bool
    superseded: int = 0


class StaleOpening(Exception):
    """A higher epoch, or a later opening of the same epoch, holds this producer."""

    def __init__(self, epoch: int, known_epoch: int) -> None:
        super().__init__(f"a newer connection holds this producer epoch=`{known_epoch}` refused=`{epoch}`")
        self.fenced = known_epoch > epoch


class _Producer:
    """opening     the newest opening, 0 = none since this table was built
    waiting     the newest opening is not answered yet
    attached    the newest opening's handle is still open
    pushed      last sequence given to the log; persisted <= pushed
    in_flight   batches pushed and not persisted
    stored_epoch  under which `persisted` was stored
    recent      flat triples of the last batches persisted, oldest first
    """

    __slots__ = (
        "attached",
        "epoch",
        "in_flight",
        "last_time_us",
        "opening",
        "persisted",
        "pushed",
        "recent",
        "stored_epoch",
        "waiting",
    )

    def __init__(self, epoch: int, now_us: int) -> None:
        self.epoch = epoch
        self.stored_epoch = 0
        self.opening = 0
        self.waiting = False
        self.attached = False
        self.pushed = NO_SEQUENCE
        self.persisted = NO_SEQUENCE
        self.in_flight = 0
        self.recent = array("q")
        self.last_time_us = now_us

    @property
    def forgettable(self) -> bool:
        return not self.attached and not self.waiting and self.in_flight == 0

    def remember(self, first_sequence: int, last_sequence: int, first_offset: int) -> None:
        self.persisted = last_sequence
        recent = self.recent
        recent.extend((first_sequence, last_sequence, first_offset))
        if len(recent) > BATCHES_REMEMBERED * _FIELDS:
            del recent[:_FIELDS]

    def batches(self) -> Iterator[StoredBatch]:
        recent = self.recent
        for at in range(0, len(recent), _FIELDS):
            yield StoredBatch(recent[at], recent[at + 1], recent[at + 2])


class ProducerTable:
    """The producers of one shard. See the module's rules."""

    def __init__(self, covered_offset: int = 0, producers_max: int = PRODUCERS_MAX) -> None:
        self._producers: dict[bytes, _Producer] = {}
        self._producers_max = producers_max
        self._next_forget_us = 0
        self.covered_offset = covered_offset
        """Every batch below this offset counts in what `states` returns, and none above it."""

    def __len__(self) -> int:
        return len(self._producers)

    # --- opening ---

    def open(self, producer_id: bytes, epoch: int, opening: int, now_us: int) -> Opened:
        """Begins a new chain; `opening` is a number that grows with each Open the broker received.

        Raises StaleOpening if a higher epoch, or a later opening of this epoch, was here first.
        """
        producer = self._producers.get(producer_id)
        if producer is None:
            producer = self._producers[producer_id] = _Producer(epoch, now_us)
        if (epoch, opening) < (producer.epoch, producer.opening):
            raise StaleOpening(epoch, producer.epoch)
        superseded = producer.opening if producer.waiting else 0
        producer.epoch = epoch
        producer.opening = opening
        producer.attached = True
        producer.waiting = producer.in_flight > 0
        producer.last_time_us = max(producer.last_time_us, now_us)
        return Opened(settled=not producer.waiting, superseded=superseded)

    def knows(self, producer_id: bytes, epoch: int) -> bool:
        """True if this very epoch was opened at this table before."""
        producer = self._producers.get(producer_id)
        return producer is not None and producer.epoch == epoch and producer.opening > 0

    def standing(self, producer_id: bytes) -> tuple[int, list[StoredBatch], int]:
        """The answer of a settled opening: the last sequence stored (-1 = none), the last batches, newest last, and the
        epoch under which that sequence was stored."""
        producer = self._producers.get(producer_id)
        if producer is None:
            return NO_SEQUENCE, [], 0
        return producer.persisted, list(producer.batches()), producer.stored_epoch

    def close(self, producer_id: bytes, opening: int) -> None:
        """The handle of this opening is closed. A later opening is not touched by it."""
        producer = self._producers.get(producer_id)
        if producer is not None and producer.opening == opening:
            producer.attached = False
            producer.waiting = False

    # --- batches ---

    def decide(self, header: ChainLink, epoch: int, opening: int) -> Verdict:
        """What to do with a batch that came through this opening. Changes nothing: `push` does."""
        producer = self._producers.get(header.producer_id)
        if producer is None:
            return Verdict.MUST_OPEN
        if opening != producer.opening:
            return self._stale(producer, epoch)
        if header.last <= producer.persisted:
            return Verdict.DUPLICATE
        if header.last <= producer.pushed:
            return Verdict.PENDING
        if header.previous == producer.pushed:
            return Verdict.APPEND
        # A chain of which nothing is known was forgotten, before or after a takeover.
        return Verdict.MUST_OPEN if producer.pushed == NO_SEQUENCE else Verdict.OUT_OF_ORDER

    def _stale(self, producer: _Producer, epoch: int) -> Verdict:
        if producer.opening == 0:
            return Verdict.MUST_OPEN
        return Verdict.FENCED if epoch < producer.epoch else Verdict.SUPERSEDED

    def push(self, header: ChainLink) -> None:
        """The batch goes to the log. Only after `decide` said APPEND, with nothing in between."""
        producer = self._producers[header.producer_id]
        assert header.previous == producer.pushed < header.last
        producer.pushed = header.last
        producer.in_flight += 1

    def persisted(self, batches: Sequence[PersistedBatch], end_offset: int, now_us: int) -> list[int]:
        """Pushed batches became durable, in the order of the log; it now ends at `end_offset`.

        Returns the openings that are settled by it.
        """
        settled = []
        producers = self._producers
        for producer_id, epoch, first_sequence, last_sequence, first_offset in batches:
            producer = producers[producer_id]
            producer.remember(first_sequence, last_sequence, first_offset)
            producer.stored_epoch = epoch
            producer.last_time_us = now_us
            producer.in_flight -= 1
            if producer.waiting and producer.in_flight == 0:
                producer.waiting = False
                settled.append(producer.opening)
        self.covered_offset = end_offset
        return settled

    def first_offset(self, producer_id: bytes, first_sequence: int, last_sequence: int) -> int:
        """Where a stored run of sequences begins, if it lies in one remembered batch; else -1."""
        producer = self._producers.get(producer_id)
        if producer is not None:
            for batch in producer.batches():
                if batch.first_sequence <= first_sequence and last_sequence <= batch.last_sequence:
                    return batch.first_offset + first_sequence - batch.first_sequence
        return NO_OFFSET

    # --- rebuilding ---

    def restore(self, states: Iterable[ProducerState]) -> None:
        """Takes over producers from a snapshot that counts up to `covered_offset`."""
        for state in states:
            producer = self._producers[state.producer_id] = _Producer(state.epoch, state.last_time_us)
            for batch in state.recent:
                producer.remember(*batch)
            producer.persisted = producer.pushed = state.last_sequence
            producer.stored_epoch = state.stored_epoch

    def replay(self, batch: PersistedBatch, end_offset: int, time_us: int) -> None:
        """A batch found in the log, ending at `end_offset`; those below `covered_offset` change nothing."""
        if batch.first_offset < self.covered_offset:
            return
        producer = self._producers.get(batch.producer_id)
        if producer is None:
            producer = self._producers[batch.producer_id] = _Producer(batch.epoch, time_us)
        producer.epoch = max(producer.epoch, batch.epoch)
        producer.stored_epoch = batch.epoch
        producer.remember(batch.first_sequence, batch.last_sequence, batch.first_offset)
        producer.pushed = batch.last_sequence
        producer.last_time_us = max(producer.last_time_us, time_us)
        self.covered_offset = end_offset

    def states(self) -> Iterator[ProducerState]:
        """Every producer of which something is stored, as of `covered_offset`."""
        for producer_id, producer in self._producers.items():
            if producer.persisted != NO_SEQUENCE:
                recent = tuple(producer.batches())
                yield ProducerState(
                    producer_id,
                    producer.epoch,
                    producer.persisted,
                    producer.last_time_us,
                    recent,
                    producer.stored_epoch,
                )

    # --- forgetting ---

    def forget(self, now_us: int) -> int:
        """Drops producers idle for too long, and the longest idle of too many. Returns how many."""
        excess = len(self._producers) - self._producers_max
        if now_us < self._next_forget_us and excess <= 0:
            return 0
        doomed = [i for i, p in self._producers.items() if p.forgettable and now_us >= self._expires_us(p)]
        if excess > len(doomed):
            doomed = self._longest_idle(excess)
        for producer_id in doomed:
            del self._producers[producer_id]
        self._next_forget_us = now_us + FORGET_INTERVAL_US
        return len(doomed)

    def _longest_idle(self, count: int) -> list[bytes]:
        idle = [(p.epoch > 0, p.last_time_us, i) for i, p in self._producers.items() if p.forgettable]
        return [producer_id for _, _, producer_id in sorted(idle)[:count]]

    @staticmethod
    def _expires_us(producer: _Producer) -> int:
        return producer.last_time_us + (NAMED_IDLE_US if producer.epoch > 0 else UNNAMED_IDLE_US)

    def check(self) -> None:
        """Asserts the invariants; for tests."""
        for producer in self._producers.values():
            assert producer.persisted <= producer.pushed
            assert producer.in_flight >= 0
            assert (producer.in_flight == 0) == (producer.persisted == producer.pushed)
            assert not producer.waiting or producer.in_flight > 0
            batches = list(producer.batches())
            assert len(batches) <= BATCHES_REMEMBERED
            assert all(a.last_sequence < b.first_sequence for a, b in pairwise(batches))
            assert all(a.first_offset < b.first_offset < self.covered_offset for a, b in pairwise(batches))


def named_producer_id(topic: str, name: str) -> bytes:
    """The id of a named producer: 128 bits of BLAKE2b over topic and name, which contain no zero byte."""
    return blake2b(f"{topic}\0{name}".encode(), digest_size=PRODUCER_ID_BYTES, person=b"magnetar-name").digest()
