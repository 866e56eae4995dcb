from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
from ledger_world import ledger_record

from magnetar.ledger.bookie_rpc import EntryAnswer, EntryOutcome, ReadGroup
from magnetar.ledger.effects import AskEntries, Found, NotFound, Wake
from magnetar.ledger.fragments import closed, with_ensemble
from magnetar.ledger.reads import OUTRUN_S, OutrunBookies, ReadCore, ReadLimits, ReplicaOrder
from magnetar.metadata.records import VACANT, LedgerRecord

LIMITS = ReadLimits(hedge_s=1.0)
RECORD = closed(ledger_record(("a", "b", "c")), 9, 100)
DENIED = (EntryAnswer(EntryOutcome.PROVABLY_NOT),)
UNKNOWN = (EntryAnswer(EntryOutcome.UNKNOWN),)


def have(*data: bytes) -> tuple[EntryAnswer, ...]:
    return tuple(EntryAnswer(EntryOutcome.HAVE, item) for item in data)


class Reading:
    def __init__(self) -> None:
        self.order = ReplicaOrder(0, OutrunBookies())
        self.cores: list[ReadCore] = []

    def __call__(self, first: int, last: int, record: LedgerRecord = RECORD) -> ReadCore:
        self.cores.append(ReadCore(record, first, last, 1000, self.order, LIMITS))
        return self.cores[-1]


@pytest.fixture
def read() -> Iterator[Reading]:
    reading = Reading()
    yield reading
    for core in reading.cores:
        core.check()


def asks(sequence: int, bookie: str, first: int, last: int, record: LedgerRecord = RECORD) -> AskEntries:
    group = ReadGroup(record.ledger_id, record.epoch, record.token, first, last, max_bytes=1000)
    return AskEntries(sequence, bookie, group)


def test_one_replica_is_asked_and_its_prefix_is_the_answer(read: Reading) -> None:
    core = read(2, 5)
    assert core.begin(0.0) == [asks(1, "a", 2, 5), Wake(1.0)]
    assert core.answered(1, have(b"2", b"3"), "", 0.5) == [Found("a", (b"2", b"3"))]
    assert core.tick(1.0) == []


def test_the_next_replica_is_asked_when_one_fails_and_the_failed_one_is_last_from_then_on(read: Reading) -> None:
    core = read(2, 2)
    core.begin(0.0)
    assert core.answered(1, UNKNOWN, "disk", 0.1) == [asks(2, "b", 2, 2), Wake(2.1)]
    assert core.answered(2, have(b"2"), "", 0.2) == [Found("b", (b"2",))]
    assert read(3, 3).begin(0.3)[0] == asks(1, "b", 3, 3)


def test_a_slow_replica_is_hedged_and_the_first_copy_wins(read: Reading) -> None:
    core = read(2, 2)
    core.begin(0.0)
    assert core.tick(0.5) == [Wake(1.0)]
    assert core.tick(1.0) == [asks(2, "b", 2, 2), Wake(3.0)]
    assert core.tick(3.0) == [asks(3, "c", 2, 2)]
    assert core.answered(2, have(b"2"), "", 3.1) == [Found("b", (b"2",))]
    assert core.answered(1, have(b"2"), "", 3.2) == []
    # Both that were outrun are asked after b.
    assert read(3, 3).begin(4.0)[0] == asks(1, "b", 3, 3)


def test_a_copy_wins_although_others_deny_it(read: Reading) -> None:
    core = read(2, 2)
    core.begin(0.0)
    core.answered(1, DENIED, "", 0.1)
    core.answered(2, DENIED, "", 0.2)
    assert core.answered(3, have(b"2"), "", 0.3) == [Found("c", (b"2",))]


def test_an_entry_is_missing_only_if_all_of_its_write_set_deny_it(read: Reading) -> None:
    core = read(2, 2)
    core.begin(0.0)
    core.answered(1, DENIED, "", 0.1)
    core.answered(2, DENIED, "", 0.2)
    said = {"a": "PROVABLY_NOT", "b": "PROVABLY_NOT", "c": "PROVABLY_NOT"}
    assert core.answered(3, DENIED, "", 0.3) == [NotFound(True, said)]


def test_one_that_does_not_know_outweighs_all_that_deny(read: Reading) -> None:
    core = read(2, 2)
    core.begin(0.0)
    core.answered(1, DENIED, "", 0.1)
    core.answered(2, UNKNOWN, "limbo", 0.2)
    said = {"a": "PROVABLY_NOT", "b": "UNKNOWN limbo", "c": "PROVABLY_NOT"}
    assert core.answered(3, DENIED, "", 0.3) == [NotFound(False, said)]


def test_a_vacant_place_does_not_know(read: Reading) -> None:
    record = closed(ledger_record(("a", VACANT, "c")), 9, 100)
    core = read(2, 2, record)
    core.begin(0.0)
    core.answered(1, DENIED, "", 0.1)
    assert core.answered(2, DENIED, "", 0.2) == [NotFound(False, {"a": "PROVABLY_NOT", "c": "PROVABLY_NOT"})]


def test_a_read_ends_with_its_fragment_and_with_the_ledger(read: Reading) -> None:
    record = closed(with_ensemble(ledger_record(("a", "b", "c")), 4, ("a", "b", "d")), 9, 100)
    assert read(2, 50, record).begin(0.0)[0] == asks(1, "a", 2, 3, record)
    assert read(4, 50, record).begin(0.0)[0] == asks(1, "a", 4, 9, record)
    with pytest.raises(ValueError, match="beyond the ledger's end"):
        read(10, 12, record)


def test_a_striped_read_asks_each_replica_for_the_run_that_it_holds(read: Reading) -> None:
    record = replace(closed(ledger_record(("a", "b", "c", "d"), "4/2/2"), 9, 100))
    core = read(3, 9, record)
    # Entry 3 stands on d and a, entry 4 on a and b, entry 5 on b and c.
    assert core.begin(0.0)[0] == asks(1, "a", 3, 4, record)
    assert core.answered(1, UNKNOWN, "", 0.1) == [asks(2, "d", 3, 3, record)]


def test_different_ledgers_prefer_different_replicas() -> None:
    firsts = {ReplicaOrder(ledger_id, OutrunBookies()).order(("a", "b", "c"), 0.0)[0] for ledger_id in range(3)}
    assert firsts == {"a", "b", "c"}


def test_who_is_outrun_in_one_ledger_is_asked_last_in_others_for_a_while() -> None:
    outrun = OutrunBookies()
    ReplicaOrder(0, outrun).outrun("a", 1.0)
    other = ReplicaOrder(3, outrun)
    assert other.order(("a", "b", "c"), 1.0 + OUTRUN_S - 0.1) == ["b", "c", "a"]
    assert other.order(("a", "b", "c"), 1.0 + OUTRUN_S) == ["a", "b", "c"]
