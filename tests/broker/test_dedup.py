"""The table of producers, alone and against a naive model that keeps everything."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from magnetar.broker.dedup import (
    BATCHES_REMEMBERED,
    NAMED_IDLE_US,
    NO_OFFSET,
    NO_SEQUENCE,
    UNNAMED_IDLE_US,
    PersistedBatch,
    ProducerState,
    ProducerTable,
    StaleOpening,
    StoredBatch,
    Verdict,
    named_producer_id,
)
from magnetar.broker.producer_table import CHUNK_BYTES_MAX, DamagedProducerTable, decode_states, encode_states

A, B = b"a" * 16, b"b" * 16
MINUTE_US = 60_000_000


@dataclass(frozen=True)
class Link:
    producer_id: bytes
    previous: int
    last: int
    count: int = 1

    @property
    def first(self) -> int:
        return self.last - self.count + 1


@dataclass
class Driver:
    """A table with a log beside it."""

    table: ProducerTable = field(default_factory=ProducerTable)
    queue: list[tuple[Link, int]] = field(default_factory=list)
    end: int = 0
    now_us: int = 0

    def push(self, link: Link, epoch: int, opening: int) -> Verdict:
        verdict = self.table.decide(link, epoch, opening)
        if verdict is Verdict.APPEND:
            self.table.push(link)
            self.queue.append((link, epoch))
        return verdict

    def persist(self, count: int = 1_000) -> list[int]:
        group, self.queue = self.queue[:count], self.queue[count:]
        batches = []
        for link, epoch in group:
            batches.append(PersistedBatch(link.producer_id, epoch, link.first, link.last, self.end))
            self.end += link.count
        return self.table.persisted(batches, self.end, self.now_us)


@pytest.fixture
def driver() -> Driver:
    return Driver()


def test_a_chain_is_appended_and_what_came_before_is_a_duplicate_with_its_place(driver: Driver) -> None:
    assert driver.table.open(A, 0, 1, 0).settled
    assert driver.push(Link(A, -1, 9, 10), 0, 1) is Verdict.APPEND
    assert driver.push(Link(A, 9, 14, 5), 0, 1) is Verdict.APPEND
    driver.persist()
    assert driver.push(Link(A, -1, 9, 10), 0, 1) is Verdict.DUPLICATE
    assert driver.table.first_offset(A, 10, 14) == 10
    assert driver.table.first_offset(A, 12, 13) == 12
    assert driver.table.first_offset(A, 8, 12) == NO_OFFSET
    assert driver.table.standing(A) == (14, [StoredBatch(0, 9, 0), StoredBatch(10, 14, 10)], 0)


def test_an_opening_tells_in_which_life_of_the_name_the_last_sequence_was_stored(driver: Driver) -> None:
    driver.table.open(A, 3, 1, 0)
    driver.push(Link(A, -1, 4, 5), 3, 1)
    driver.persist()
    driver.table.open(A, 7, 2, 0)
    assert driver.table.standing(A) == (4, [StoredBatch(0, 4, 0)], 3)
    driver.push(Link(A, 4, 5), 7, 2)
    driver.persist()
    assert driver.table.standing(A)[2] == 7


def test_a_batch_that_is_pushed_and_not_persisted_is_pending_and_a_gap_is_out_of_order(driver: Driver) -> None:
    driver.table.open(A, 0, 1, 0)
    driver.push(Link(A, -1, 0), 0, 1)
    assert driver.push(Link(A, -1, 0), 0, 1) is Verdict.PENDING
    assert driver.push(Link(A, 1, 2), 0, 1) is Verdict.OUT_OF_ORDER
    assert driver.push(Link(A, -1, 2), 0, 1) is Verdict.OUT_OF_ORDER
    assert driver.push(Link(A, 0, 2), 0, 1) is Verdict.APPEND


def test_opening_waits_until_nothing_is_in_flight_and_refuses_what_was_opened_before(driver: Driver) -> None:
    driver.table.open(A, 0, 1, 0)
    driver.push(Link(A, -1, 0), 0, 1)
    driver.push(Link(A, 0, 1), 0, 1)
    assert not driver.table.open(A, 0, 2, 0).settled
    assert driver.push(Link(A, 1, 2), 0, 1) is Verdict.SUPERSEDED
    assert driver.persist(1) == []
    assert driver.persist(1) == [2]
    assert driver.push(Link(A, 1, 2), 0, 2) is Verdict.APPEND


def test_a_second_opening_supersedes_one_that_still_waits(driver: Driver) -> None:
    driver.table.open(A, 0, 1, 0)
    driver.push(Link(A, -1, 0), 0, 1)
    driver.table.open(A, 0, 2, 0)
    assert driver.table.open(A, 0, 3, 0).superseded == 2
    assert driver.persist() == [3]


def test_a_higher_epoch_fences_and_a_lower_one_cannot_open(driver: Driver) -> None:
    driver.table.open(A, 1, 1, 0)
    driver.push(Link(A, -1, 0), 1, 1)
    driver.persist()
    driver.table.open(A, 2, 2, 0)
    assert driver.push(Link(A, 0, 1), 1, 1) is Verdict.FENCED
    with pytest.raises(StaleOpening) as stale:
        driver.table.open(A, 1, 3, 0)
    assert stale.value.fenced


def test_an_opening_that_was_overtaken_by_a_later_one_is_refused_and_not_fenced(driver: Driver) -> None:
    driver.table.open(A, 1, 7, 0)
    with pytest.raises(StaleOpening) as stale:
        driver.table.open(A, 1, 6, 0)
    assert not stale.value.fenced


def test_a_chain_that_is_not_known_must_open(driver: Driver) -> None:
    assert driver.push(Link(A, 5, 6), 0, 1) is Verdict.MUST_OPEN
    driver.table.open(A, 0, 1, 0)
    assert driver.push(Link(A, 5, 6), 0, 1) is Verdict.MUST_OPEN
    driver.table.replay(PersistedBatch(B, 0, 0, 0, 0), 1, 0)
    assert driver.push(Link(B, 0, 1), 0, 2) is Verdict.MUST_OPEN


def test_the_last_sixteen_batches_are_remembered(driver: Driver) -> None:
    driver.table.open(A, 0, 1, 0)
    for i in range(20):
        driver.push(Link(A, i - 1, i), 0, 1)
    driver.persist()
    assert driver.table.first_offset(A, 20 - BATCHES_REMEMBERED, 20 - BATCHES_REMEMBERED) == 20 - BATCHES_REMEMBERED
    assert driver.table.first_offset(A, 3, 3) == NO_OFFSET
    assert driver.push(Link(A, 2, 3), 0, 1) is Verdict.DUPLICATE


def test_idle_producers_are_forgotten_unless_open_or_in_flight() -> None:
    driver = Driver()
    named, open_one = named_producer_id("t", "n"), b"o" * 16
    for opening, (producer, epoch) in enumerate([(A, 0), (named, 1), (open_one, 0)], 1):
        driver.table.open(producer, epoch, opening, 0)
        driver.push(Link(producer, -1, 0), epoch, opening)
    driver.table.close(A, 1)
    driver.table.close(named, 2)
    assert driver.table.forget(UNNAMED_IDLE_US) == 0  # in flight
    driver.persist()
    assert driver.table.forget(UNNAMED_IDLE_US + MINUTE_US) == 1
    assert driver.table.standing(A) == (NO_SEQUENCE, [], 0)
    assert driver.table.forget(NAMED_IDLE_US + MINUTE_US) == 1
    assert driver.table.standing(open_one)[0] == 0


def test_too_many_producers_lose_the_longest_idle_and_unnamed_first() -> None:
    table = ProducerTable(producers_max=2)
    ids = [bytes([i]) * 16 for i in range(4)]
    table.restore([ProducerState(ids[0], 1, 0, 0, (StoredBatch(0, 0, 0),), 1)])
    table.restore([ProducerState(ids[i], 0, 0, i, (StoredBatch(0, 0, i),), 0) for i in (1, 2, 3)])
    assert table.forget(10) == 2
    assert [state.producer_id for state in table.states()] == [ids[0], ids[3]]


def test_a_table_restored_from_its_chunks_is_the_same_and_chunks_are_small() -> None:
    states = [
        ProducerState(
            i.to_bytes(16, "big"),
            i % 3 * 2,
            1 << 60,
            1 << 50,
            tuple(StoredBatch(1 << 59, 1 << 60, n) for n in range(16)),
            i % 3,
        )
        for i in range(2_000)
    ]
    chunks = encode_states(states)
    assert len(chunks) > 1
    assert max(map(len, chunks)) <= CHUNK_BYTES_MAX
    assert list(decode_states(chunks)) == states
    assert encode_states([]) == []
    with pytest.raises(DamagedProducerTable):
        list(decode_states([chunks[0][:-1]]))


def test_the_id_of_a_name_depends_on_topic_and_name() -> None:
    assert named_producer_id("a/b/c", "d").hex() == "698d279061a724d5b426f48cc5b87b35"
    assert len({named_producer_id(*pair) for pair in [("a", "b"), ("ab", ""), ("", "ab"), ("b", "a")]}) == 4


class TableAgainstModel(RuleBasedStateMachine):
    """The model keeps every batch of every producer, and what the log holds."""

    def __init__(self) -> None:
        super().__init__()
        self.driver = Driver()
        self.chains: dict[bytes, list[Link]] = {}
        self.current: dict[bytes, tuple[int, int]] = {}  # epoch and opening
        self.waiting: dict[bytes, int] = {}
        self.log: list[PersistedBatch] = []
        self.snapshot: tuple[list[bytes], int] = ([], 0)
        self.openings = 0

    producers = st.sampled_from([A, B])

    def in_flight(self, producer: bytes) -> list[Link]:
        return [link for link, _ in self.driver.queue if link.producer_id == producer]

    @rule(producer=producers, epoch=st.integers(0, 3))
    def open(self, producer: bytes, epoch: int) -> None:
        self.openings += 1
        known = self.current.get(producer, (-1, -1))[0]
        if epoch < known:
            with pytest.raises(StaleOpening) as stale:
                self.driver.table.open(producer, epoch, self.openings, 0)
            assert stale.value.fenced
            return
        opened = self.driver.table.open(producer, epoch, self.openings, 0)
        assert opened.settled == (not self.in_flight(producer))
        assert opened.superseded == self.waiting.get(producer, 0)
        self.current[producer] = (epoch, self.openings)
        if not opened.settled:
            self.waiting[producer] = self.openings

    @rule(
        producer=producers, at=st.integers(0, 30), count=st.integers(1, 4), gap=st.integers(0, 2), stale=st.booleans()
    )
    def send(self, producer: bytes, at: int, count: int, gap: int, stale: bool) -> None:
        chain = self.chains.get(producer, [])
        if at < len(chain):
            link = chain[at]
        else:
            last = chain[-1].last if chain else NO_SEQUENCE
            link = Link(producer, last + gap, last + gap + count, count)
        epoch, opening = self.current.get(producer, (0, -1))
        if opening > 0 and producer in self.waiting:
            return  # A client waits for the answer of its opening.
        if stale:
            epoch, opening = max(epoch - 1, 0), opening - 1
        persisted = max((b.last_sequence for b in self.log if b.producer_id == producer), default=NO_SEQUENCE)
        verdict = self.driver.push(link, epoch, opening)
        known = producer in self.current or persisted != NO_SEQUENCE
        if not known or self.current.get(producer, (0, -1))[1] < 0:
            assert verdict is Verdict.MUST_OPEN
        elif stale:
            assert verdict in (Verdict.FENCED, Verdict.SUPERSEDED)
        elif link.last <= persisted:
            assert verdict is Verdict.DUPLICATE
            offsets = [b.first_offset for b in self.log if b.producer_id == producer and b.last_sequence == link.last]
            found = self.driver.table.first_offset(producer, link.first, link.last)
            mine = [b for b in self.log if b.producer_id == producer][-BATCHES_REMEMBERED:]
            assert found == (offsets[0] if any(b.last_sequence == link.last for b in mine) else NO_OFFSET)
        elif at < len(chain):
            assert verdict is Verdict.PENDING
        elif gap == 0:
            assert verdict is Verdict.APPEND
            self.chains.setdefault(producer, []).append(link)
        else:
            assert verdict is (Verdict.OUT_OF_ORDER if chain else Verdict.MUST_OPEN)

    @precondition(lambda self: self.driver.queue)
    @rule(count=st.integers(1, 5))
    def persist(self, count: int) -> None:
        group = self.driver.queue[:count]
        end = self.driver.end
        settled = self.driver.persist(count)
        for link, epoch in group:
            self.log.append(PersistedBatch(link.producer_id, epoch, link.first, link.last, end))
            end += link.count
        expected = [opening for producer, opening in self.waiting.items() if not self.in_flight(producer)]
        assert sorted(settled) == sorted(expected)
        self.waiting = {p: opening for p, opening in self.waiting.items() if self.in_flight(p)}

    @rule()
    def take_snapshot(self) -> None:
        table = self.driver.table
        self.snapshot = (encode_states(table.states()), table.covered_offset)

    @rule(lost=st.booleans())
    def take_over(self, lost: bool) -> None:
        """Another owner rebuilds the table; what was not persisted is stored first, or is lost."""
        if not lost:
            self.persist(1_000)
        chunks, covered = self.snapshot
        table = ProducerTable(covered)
        table.restore(decode_states(chunks))
        for batch in self.log:
            table.replay(batch, batch.first_offset + batch.last_sequence - batch.first_sequence + 1, 0)
        before = {s.producer_id: (s.last_sequence, s.recent, s.stored_epoch) for s in self.driver.table.states()}
        assert {s.producer_id: (s.last_sequence, s.recent, s.stored_epoch) for s in table.states()} == before
        newest = {b.producer_id: b.epoch for b in self.log}
        assert {producer: epoch for producer, (_, _, epoch) in before.items()} == newest
        self.driver = Driver(table, [], self.driver.end)
        self.waiting.clear()
        for producer, chain in self.chains.items():
            stored = {b.last_sequence for b in self.log if b.producer_id == producer}
            self.chains[producer] = [link for link in chain if link.last in stored]
        epochs = {s.producer_id: s.epoch for s in table.states()}
        self.current = {producer: (epoch, -1) for producer, epoch in epochs.items()}

    @invariant()
    def check(self) -> None:
        self.driver.table.check()


TestTableAgainstModel = TableAgainstModel.TestCase
TestTableAgainstModel.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
