"""The stored form of cursors: golden bytes, and damage that is named."""

from __future__ import annotations

from collections.abc import Iterable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from magnetar.managed_log.cursor import (
    PART_BYTES_MAX,
    CursorAcked,
    CursorChange,
    CursorCreated,
    CursorDeleted,
    CursorPiece,
    CursorReplay,
    CursorSeeked,
    SnapshotPart,
)
from magnetar.managed_log.cursor_codec import DamagedCursorEntry, encode_changes, encode_part, replay_entry
from magnetar.metadata.records import SubscriptionType
from magnetar.v1 import cursor_pb2

CHANGES: list[CursorChange] = [
    CursorCreated("audit", 7, SubscriptionType.STREAM, 1000),
    CursorAcked("audit", 1010, ((1012, 1015), (1300, 1301)), ((1011, 3),)),
    CursorSeeked("audit", 5),
    CursorDeleted("audit"),
]
PART = SnapshotPart(3, 0, 2, (CursorPiece("audit", 7, SubscriptionType.QUEUE, 9, b"", ((11, 2),)),), (b"chunk",), 12)


def test_changes_have_these_bytes() -> None:
    (payload,) = encode_changes(CHANGES)
    assert payload.hex() == (
        "0a43"  # delta
        "0a100a0561756469741207"
        "0807"
        "1001"
        "18e807"  # created: id 7, type STREAM, floor 1000
        "0a190a0561756469742210"
        "08f207"
        "1206f407039d0201"
        "1a03f30703"  # acked: floor, ranges against 0, count
        "0a090a0561756469742805"  # seeked to 5
        "0a090a0561756469741801"  # deleted
    ).replace(" ", "")


def test_a_snapshot_part_has_these_bytes() -> None:
    assert encode_part(PART).hex() == (
        "1220"  # snapshot
        "0803"
        "1802"  # id 3, part 0 of 2
        "22110a0561756469741007180220093202"
        "0b02"  # cursor, one delivery count
        "2a056368756e6b"
        "300c"  # producers and what they cover
    )


class Seen(CursorReplay):
    """Keeps what it is fed."""

    def __init__(self) -> None:
        super().__init__()
        self.fed: list[object] = []

    def changed(self, changes: Iterable[CursorChange]) -> None:
        self.fed += changes

    def snapshot_part(self, part: SnapshotPart) -> None:
        self.fed.append(part)


def decoded(*payloads: bytes) -> list[object]:
    seen = Seen()
    for payload in payloads:
        replay_entry(payload, seen)
    return seen.fed


names = st.text("abcdefgh-_.", min_size=1, max_size=20)
numbers = st.integers(0, (1 << 62) - 1)
types = st.sampled_from(SubscriptionType)
counts = st.lists(st.tuples(numbers, st.integers(1, 1 << 31)), max_size=4).map(tuple)
ascending = st.lists(st.tuples(st.integers(1, 1 << 40), st.integers(1, 1 << 32)), max_size=5).map(
    lambda steps: tuple(_ranges_of(steps))
)


def _ranges_of(steps: list[tuple[int, int]]) -> list[tuple[int, int]]:
    ranges = []
    at = 0
    for gap, length in steps:
        ranges.append((at + gap, at + gap + length))
        at += gap + length
    return ranges


changes = st.one_of(
    st.builds(CursorCreated, names, numbers, types, numbers),
    st.builds(CursorDeleted, names),
    st.builds(CursorAcked, names, numbers, ascending, counts),
    st.builds(CursorSeeked, names, numbers),
)
pieces = st.builds(CursorPiece, names, numbers, types, numbers, st.binary(max_size=20), counts)


@given(changed=st.lists(changes, max_size=10))
def test_changes_come_back(changed: list[CursorChange]) -> None:
    assert decoded(*encode_changes(changed)) == changed


@given(piece=st.lists(pieces, max_size=3), chunks=st.lists(st.binary(max_size=9), max_size=3), covered=numbers)
def test_snapshot_parts_come_back(piece: list[CursorPiece], chunks: list[bytes], covered: int) -> None:
    part = SnapshotPart(5, 1, 2, tuple(piece), tuple(chunks), covered)
    assert decoded(encode_part(part)) == [part]


def test_many_changes_become_deltas_of_bounded_size() -> None:
    changed: list[CursorChange] = [
        CursorAcked("s", 0, tuple((i, i + 1) for i in range(n, n + 30_000, 2))) for n in range(1, 900_000, 30_000)
    ]
    payloads = encode_changes(changed)
    assert len(payloads) > 1
    assert max(map(len, payloads)) <= PART_BYTES_MAX
    assert decoded(*payloads) == changed


@given(data=st.binary(max_size=60))
def test_arbitrary_bytes_are_refused_or_replayed(data: bytes) -> None:
    _replay_or_refuse(data)


@given(position=st.integers(0, 200), bit=st.integers(0, 7), changes=st.booleans())
def test_a_flipped_bit_is_refused_or_replayed(position: int, bit: int, changes: bool) -> None:
    data = bytearray(encode_changes(CHANGES)[0] if changes else encode_part(PART))
    data[position % len(data)] ^= 1 << bit
    _replay_or_refuse(bytes(data))


def _replay_or_refuse(data: bytes) -> None:
    replay = CursorReplay()
    try:
        replay_entry(data, replay)
    except DamagedCursorEntry:
        return
    for cursor in replay.finish().cursors.values():
        cursor.check()


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        (b"", "cursor entry is of another kind"),
        (b"\xff", "cursor entry does not parse"),
        (cursor_pb2.CursorEntry(delta={"changes": [{"subscription": "s"}]}), "cursor change is of another kind"),
        (cursor_pb2.CursorEntry(delta={"changes": [{"deleted": True}]}), "cursor has no subscription name"),
        (
            cursor_pb2.CursorEntry(delta={"changes": [{"subscription": "s", "acked": {"ranges": [1]}}]}),
            "a list of pairs has an odd length",
        ),
        (
            cursor_pb2.CursorEntry(delta={"changes": [{"subscription": "s", "acked": {"ranges": [1, 1 << 40]}}]}),
            "acknowledged range is impossible",
        ),
        (cursor_pb2.CursorEntry(snapshot={"part": 1, "parts": 1}), "snapshot part is beyond its parts"),
        (
            cursor_pb2.CursorEntry(snapshot={"parts": 1, "cursors": [{"subscription": "s", "acked": b"no bitmap"}]}),
            "cursor entry is impossible",
        ),
    ],
)
def test_damage_is_named(data: bytes | cursor_pb2.CursorEntry, problem: str) -> None:
    with pytest.raises(DamagedCursorEntry, match=problem):
        replay_entry(data if isinstance(data, bytes) else data.SerializeToString(), CursorReplay())
