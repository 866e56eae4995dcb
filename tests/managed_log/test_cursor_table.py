"""Cursors against sets of offsets; what is stored gives the table back."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from magnetar.managed_log import cursor as cursors
from magnetar.managed_log.cursor import (
    CursorNotFound,
    CursorReplay,
    CursorTable,
    SnapshotPart,
    joined,
)
from magnetar.managed_log.cursor_codec import encode_changes, encode_part, replay_entry
from magnetar.metadata.records import SubscriptionType
from magnetar.wire import selection

END = 120
QUEUE, STREAM = SubscriptionType.QUEUE, SubscriptionType.STREAM

ranges = st.lists(
    st.tuples(st.integers(0, END), st.integers(1, 20)).map(lambda r: (r[0], min(END + 1, r[0] + r[1]))), max_size=6
)
names = st.sampled_from(["a", "b", "c"])


def state(table: CursorTable) -> dict[str, tuple[object, ...]]:
    return {
        name: (c.subscription_id, c.type, c.floor, list(c.acked), dict(c.delivery_counts))
        for name, c in table.cursors.items()
    }


def replayed(payloads: list[bytes]) -> CursorReplay:
    replay = CursorReplay()
    for payload in payloads:
        replay_entry(payload, replay)
    return replay


class Cursors(RuleBasedStateMachine):
    """The model: the set of acknowledged offsets of each cursor, all below the floor included."""

    @initialize()
    def begin(self) -> None:
        self.table = CursorTable()
        self.acked: dict[str, set[int]] = {}
        self.ledger: list[bytes] = []
        self.snapshots = 0

    @rule(name=names, subscription_id=st.integers(1, 2), floor=st.integers(0, END))
    def create(self, name: str, subscription_id: int, floor: int) -> None:
        known = self.table.cursors.get(name)
        self.table.create(name, subscription_id, QUEUE, floor)
        if known is None or known.subscription_id != subscription_id:
            self.acked[name] = set(range(floor))

    @rule(name=names)
    def delete(self, name: str) -> None:
        if self.acked.pop(name, None) is not None:
            self.table.delete(name)

    @rule(name=names, floor=st.integers(0, END))
    def seek(self, name: str, floor: int) -> None:
        if name in self.acked:
            self.table.seek(name, floor)
            self.acked[name] = set(range(floor))

    @rule(name=names, floor=st.integers(0, END), ranges=ranges)
    def ack(self, name: str, floor: int, ranges: list[tuple[int, int]]) -> None:
        if name in self.acked:
            new = set(range(floor)).union(*(range(*r) for r in ranges)) - self.acked[name]
            assert self.table.ack(name, floor, ranges) == bool(new)
            self.acked[name] |= new

    @rule(name=names, counts=st.dictionaries(st.integers(0, END), st.integers(2, 9), max_size=3))
    def count(self, name: str, counts: dict[int, int]) -> None:
        if name in self.acked:
            self.table.count_deliveries(name, counts)

    @rule()
    def store(self) -> None:
        group = self.table.take()
        self.ledger += encode_changes(group.changes)
        self.table.stored(group)

    @rule()
    def store_snapshot(self) -> None:
        self.table.take()
        self.snapshots += 1
        self.ledger += [encode_part(part) for part in self.table.snapshot(self.snapshots, [b"p"], self.snapshots)]
        self.table.stored_are(self.table.floors())

    @invariant()
    def cursors_are_what_was_acknowledged(self) -> None:
        assert self.table.cursors.keys() == self.acked.keys()
        for name, cursor in self.table.cursors.items():
            cursor.check()
            acked = self.acked[name]
            assert all(cursor.is_acked(offset) == (offset in acked) for offset in range(END + 10))
            assert cursor.backlog(END) == len(set(range(END)) - acked)
            assert all(
                cursor.next_unacked(offset) == next(o for o in range(offset, 999) if o not in acked)
                for offset in range(cursor.floor, END, 7)
            )

    @invariant()
    def what_is_stored_gives_the_table_back(self) -> None:
        if not self.table.waiting:
            replay = replayed(self.ledger)
            assert state(replay.finish()) == state(self.table)
            assert replay.covered_offset == self.snapshots
            floors = [cursor.floor for cursor in self.table.cursors.values()]
            assert self.table.safe_floor() == (min(floors) if floors else None)


Cursors.TestCase.settings = settings(max_examples=60, stateful_step_count=25, deadline=None)
TestCursors = Cursors.TestCase


@given(first=st.integers(0, END), count=st.integers(1, 30), floor=st.integers(0, END), acked=ranges)
def test_the_selection_of_a_batch_holds_what_is_not_acknowledged(
    first: int, count: int, floor: int, acked: list[tuple[int, int]]
) -> None:
    table = CursorTable()
    table.create("s", 1, QUEUE, 0)
    table.ack("s", floor, acked)
    cursor = table.cursor("s")
    wanted = [i for i in range(count) if not cursor.is_acked(first + i)]
    found = cursor.unacked_selection(first, count)
    assert (selection.indices(found, count) if found is not None else []) == wanted
    assert (found is None) == (not wanted)
    assert (found == selection.ALL) == (len(wanted) == count)


@given(chosen=st.sets(st.integers(0, 19), min_size=1, max_size=19), acked=ranges)
def test_of_a_stored_selection_only_its_own_messages_have_offsets(
    chosen: set[int], acked: list[tuple[int, int]]
) -> None:
    table = CursorTable()
    table.create("s", 1, QUEUE, 0)
    table.ack("s", 0, acked)
    stored = selection.from_indices(20, chosen)
    offsets = {message: 5 + position for position, message in enumerate(sorted(chosen))}
    found = table.cursor("s").unacked_selection(5, len(chosen), stored)
    wanted = [m for m in sorted(chosen) if not table.cursor("s").is_acked(offsets[m])]
    assert (selection.indices(found, 20) if found is not None else []) == wanted


def test_trimming_may_not_trust_a_floor_that_is_not_stored() -> None:
    table = CursorTable()
    table.create("s", 1, STREAM, 10)
    table.stored(table.take())
    table.ack("s", 50, [])
    assert table.safe_floor() == 10
    group = table.take()
    table.ack("s", 60, [])
    table.stored(group)
    assert table.safe_floor() == 50


def test_trimming_trusts_neither_a_deletion_nor_a_seek_back_before_it_is_stored() -> None:
    table = CursorTable()
    table.create("s", 1, STREAM, 10)
    table.create("t", 2, STREAM, 40)
    table.stored(table.take())
    table.delete("s")
    assert table.safe_floor() == 10
    table.stored(table.take())
    assert table.safe_floor() == 40
    table.seek("t", 5)
    assert table.safe_floor() == 5


def test_an_unknown_cursor_is_named() -> None:
    with pytest.raises(CursorNotFound, match="no such cursor subscription=`ghost`"):
        CursorTable().ack("ghost", 1, [])


def test_acknowledgements_that_wait_together_are_stored_as_one_change() -> None:
    table = CursorTable()
    table.create("s", 1, QUEUE, 0)
    table.take()
    for offset in range(10, 1000, 2):
        table.ack("s", 0, [(offset, offset + 1)])
    table.ack("s", 300, [(11, 12), (401, 402)])
    (change,) = table.take().changes
    assert isinstance(change, cursors.CursorAcked)
    assert change.floor == 300
    assert change.ranges[0] == (300, 301)
    assert (400, 403) in change.ranges


def test_large_states_come_in_parts_of_bounded_size_and_are_united(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cursors, "PART_BYTES_MAX", 16_384)
    monkeypatch.setattr(cursors, "COUNTS_PER_PIECE", 500)
    table = CursorTable()
    for name in ("s", "t"):
        table.create(name, 1, QUEUE, 0)
        table.ack(name, 0, [(offset, offset + 1) for offset in range(2, 200_000, 2)])  # no runs to compress
        table.count_deliveries(name, dict.fromkeys(range(1, 3_001, 2), 3))
    table.take()
    parts = table.snapshot(1, [bytes(9_000)] * 3, 77)
    payloads = [encode_part(part) for part in parts]
    assert len(parts) > 4
    assert max(map(len, payloads)) <= 16_384
    replay = replayed(payloads)
    assert state(replay.finish()) == state(table)
    assert (replay.producers, replay.covered_offset) == ([bytes(9_000)] * 3, 77)


def test_a_snapshot_counts_from_its_last_part_only() -> None:
    table = CursorTable()
    table.create("s", 1, QUEUE, 5)
    old = encode_changes(table.take().changes)
    table.ack("s", 9, [])
    later = encode_changes(table.take().changes)
    unfinished = [encode_part(SnapshotPart(1, part, 3, (), (b"x",), 9)) for part in (0, 1)]
    replay = replayed([*old, *unfinished])
    assert replay.finish().cursors["s"].floor == 5
    assert replay.producers == []
    replay = replayed([*old, *unfinished, *later])
    assert replay.finish().cursors["s"].floor == 9


def test_delivery_counts_end_with_the_message() -> None:
    table = CursorTable()
    table.create("s", 1, QUEUE, 0)
    table.count_deliveries("s", {3: 2, 4: 5, 9: 2})
    table.ack("s", 0, [(4, 5)])
    assert dict(table.cursor("s").delivery_counts) == {3: 2, 9: 2}
    table.ack("s", 9, [])
    assert dict(table.cursor("s").delivery_counts) == {9: 2}


@given(ranges=ranges)
def test_joined_ranges_hold_the_same_offsets_and_do_not_touch(ranges: list[tuple[int, int]]) -> None:
    found = joined(ranges)
    assert {o for r in found for o in range(*r)} == {o for r in ranges for o in range(*r)}
    assert all(a[1] < b[0] for a, b in pairwise(found))
