"""Records survive their stored form, the stored form stays what it is, and damage is never decoded."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, is_dataclass, replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from magnetar.metadata import codec, records
from magnetar.metadata.records import (
    Anchor,
    AtOffset,
    AtTime,
    BookieRegistration,
    BookieState,
    BrokerRegistration,
    Cookie,
    CopyClaim,
    CopyReason,
    CopyTask,
    Drain,
    Fragment,
    Goal,
    LayoutShard,
    LedgerPurpose,
    LedgerRecord,
    LedgerState,
    Loss,
    Move,
    MoveState,
    Operation,
    OperationState,
    Owner,
    ProducerRecord,
    RepairSettings,
    Segment,
    ShardRecord,
    ShardState,
    SubscriptionRecord,
    SubscriptionType,
    TopicRecord,
)

TEXT = st.text(max_size=6)
NAME = st.text(min_size=1, max_size=6)
U32 = st.integers(0, (1 << 32) - 1)
U64 = st.integers(0, (1 << 64) - 1)
ID = st.integers(1, (1 << 64) - 1)
I64 = st.integers(-(1 << 63), (1 << 63) - 1)
SLOT_RANGE = st.tuples(st.integers(0, 65535), st.integers(0, 65535)).map(sorted)


def tuples(strategy: st.SearchStrategy[Any]) -> st.SearchStrategy[tuple[Any, ...]]:
    return st.lists(strategy, max_size=3).map(tuple)


SEGMENTS = st.builds(Segment, ID, U64, I64, U64, U64)
LAST_ENTRIES = st.integers(-1, (1 << 63) - 1)
CLAIMS = st.builds(CopyClaim, NAME, TEXT, st.binary(min_size=1, max_size=6), I64)
COPIES = st.builds(CopyTask, ID, TEXT, TEXT, st.sampled_from(CopyReason), TEXT, U64, LAST_ENTRIES, I64, TEXT)


@st.composite
def shards(draw: st.DrawFn) -> ShardRecord:
    first, last = draw(SLOT_RANGE)
    return ShardRecord(
        shard_id=draw(ID),
        topic=draw(TEXT),
        state=draw(st.sampled_from(ShardState)),
        epoch=draw(U64),
        owner=draw(st.none() | st.builds(Owner, NAME, ID)),
        first_slot=first,
        last_slot=last,
        parents=draw(tuples(U64)),
        start_offset=draw(U64),
        segments=draw(tuples(SEGMENTS)),
        first_page=draw(U64),
        pages=draw(U32),
        next_ledger=draw(U64),
        cursor_ledger=draw(U64),
        next_cursor=draw(U64),
        inline_cursors=draw(st.binary(max_size=6)),
        created_us=draw(I64),
        floor_time_us=draw(I64),
    )


@st.composite
def ledgers(draw: st.DrawFn) -> LedgerRecord:
    size = draw(st.integers(1, 4))
    write = draw(st.integers(1, size))
    starts = [0, *sorted(draw(st.sets(ID, max_size=2)))]
    ensembles = st.lists(TEXT, min_size=size, max_size=size).map(tuple)
    return LedgerRecord(
        ledger_id=draw(ID),
        shard_id=draw(ID),
        purpose=draw(st.sampled_from(LedgerPurpose)),
        state=draw(st.sampled_from(LedgerState)),
        epoch=draw(U64),
        token=draw(st.binary(min_size=16, max_size=16)),
        write_quorum=write,
        ack_quorum=draw(st.integers(1, write)),
        fragments=tuple(Fragment(start, draw(ensembles)) for start in starts),
        last_entry=draw(LAST_ENTRIES),
        length=draw(U64),
        created_us=draw(I64),
        copy=draw(st.none() | CLAIMS),
    )


@st.composite
def layout_shards(draw: st.DrawFn) -> LayoutShard:
    first, last = draw(SLOT_RANGE)
    return LayoutShard(draw(ID), first, last, draw(st.sampled_from(ShardState)), draw(tuples(U64)))


MOVES = st.builds(Move, ID, TEXT, TEXT, U64, st.sampled_from(MoveState), TEXT) | st.builds(
    Move, st.just(0), TEXT, TEXT, U64, st.sampled_from(MoveState), TEXT, ID
)


@st.composite
def operations(draw: st.DrawFn) -> Operation:
    goal = draw(st.sampled_from(Goal))
    return Operation(
        operation_id=draw(NAME),
        goal=goal,
        state=draw(st.sampled_from(OperationState)),
        bytes_per_s=0 if goal is Goal.BROKERS else draw(ID),
        revision=draw(U64),
        moves=draw(U64),
        size_bytes=draw(U64),
        pages=draw(U32),
        mark=draw(st.binary(min_size=1, max_size=6)),
        rollback_of=draw(TEXT),
        created_us=draw(I64),
        updated_us=draw(I64),
        ended_us=draw(I64),
        moves_done=draw(U64),
        bytes_done=draw(U64),
        moves_skipped=draw(U64),
        bytes_skipped=draw(U64),
        rate=draw(U64),
        problems=draw(tuples(TEXT)),
    )


STARTS = st.one_of(st.sampled_from(Anchor), st.builds(AtOffset, U64), st.builds(AtTime, I64))

CODECS: dict[str, st.SearchStrategy[Any]] = {
    "shard": shards(),
    "page": tuples(SEGMENTS),
    "ledger": ledgers(),
    "topic": st.builds(TopicRecord, NAME, U64, tuples(layout_shards()), I64, st.booleans()),
    "subscription": st.builds(SubscriptionRecord, NAME, NAME, U64, st.sampled_from(SubscriptionType), STARTS, I64),
    "producer": st.builds(ProducerRecord, st.binary(min_size=16, max_size=16), U64),
    "bookie": st.builds(BookieRegistration, NAME, TEXT, TEXT, st.sampled_from(BookieState), U64, U64, U64, TEXT, TEXT),
    "broker": st.builds(BrokerRegistration, NAME, TEXT, TEXT, TEXT, st.booleans()),
    "cookie": st.builds(Cookie, NAME, NAME, NAME, NAME),
    "copy": COPIES,
    "drain": st.builds(Drain, NAME, I64),
    "loss": st.builds(Loss, NAME, I64, st.booleans()),
    "repair": st.builds(RepairSettings, st.booleans(), st.floats(0, 1e9), ID),
    "operation": operations(),
    "moves": tuples(MOVES),
    "counter": st.integers(1, (1 << 64) - 1),
    "text": NAME,
}


def functions(name: str) -> tuple[Callable[[Any], bytes], Callable[[bytes], Any]]:
    return getattr(codec, f"encode_{name}"), getattr(codec, f"decode_{name}")


def test_every_codec_is_in_this_test() -> None:
    names = {name.split("_", 1)[1] for name in vars(codec) if name.startswith(("encode_", "decode_"))}
    assert names == set(CODECS)
    parts = {"Owner", "Segment", "Fragment", "CopyClaim", "Move", "LayoutShard", "AtOffset", "AtTime"}
    kinds = {name for name, value in vars(records).items() if is_dataclass(value)} - parts
    assert len(kinds) == len(set(CODECS) - {"page", "moves", "counter", "text"})


@pytest.mark.parametrize("name", CODECS)
@given(data=st.data())
@settings(max_examples=60, derandomize=True, database=None, deadline=None)
def test_a_record_survives_its_stored_form(name: str, data: st.DataObject) -> None:
    encode, decode = functions(name)
    record = data.draw(CODECS[name])
    assert decode(encode(record)) == record
    assert encode(decode(encode(record))) == encode(record)


@pytest.mark.parametrize("name", CODECS)
@given(data=st.data())
@settings(max_examples=150, derandomize=True, database=None, deadline=None)
def test_damage_raises_damaged_record_only(name: str, data: st.DataObject) -> None:
    encode, decode = functions(name)
    stored = bytearray(encode(data.draw(CODECS[name])))
    damage = data.draw(st.sampled_from(["random", "cut", "flip"]))
    if damage == "random":
        stored = bytearray(data.draw(st.binary(max_size=60)))
    elif damage == "cut":
        del stored[data.draw(st.integers(0, len(stored))) :]
    elif stored:
        stored[data.draw(st.integers(0, len(stored) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    try:
        record = decode(bytes(stored))
    except codec.DamagedRecord:
        return
    assert decode(encode(record)) == record


SHARD = ShardRecord(
    shard_id=7,
    topic="public/default/orders",
    state=ShardState.OPEN,
    epoch=3,
    owner=Owner("broker-1", 42),
    first_slot=0,
    last_slot=32767,
    parents=(5, 6),
    start_offset=1000,
    segments=(Segment(11, 1000, 1_700_000_000_000_000, 50, 4096), Segment(12, 1050)),
    first_page=1,
    pages=2,
    next_ledger=13,
    cursor_ledger=14,
    next_cursor=15,
    inline_cursors=b"\x01\x02",
    created_us=1_600_000_000_000_000,
    floor_time_us=-1,
)
LEDGER = LedgerRecord(
    ledger_id=11,
    shard_id=7,
    purpose=LedgerPurpose.CURSOR,
    state=LedgerState.CLOSED,
    epoch=3,
    token=bytes(range(16)),
    write_quorum=3,
    ack_quorum=2,
    fragments=(Fragment(0, ("b1", "b2", "")), Fragment(9, ("b1", "b4", "b3"))),
    last_entry=-1,
    length=0,
    created_us=1_600_000_000_000_000,
)
CLAIMED = replace(LEDGER, copy=CopyClaim("b5", "b2", b"\x07\x08", 1_600_000_000_000_001))
SHARD_BYTES = (
    "080712157075626c69632f64656661756c742f6f7264657273180120032a0c0a0862726f6b65722d31102a38ffff01420205"
    "0648e8075213080b10e807188080f9c0c1c4820320322880205205080c109a0858016002680d700e780f8201020102880180"
    "8090bd90e6eb029001ffffffffffffffffff01"
)
LEDGER_BYTES = (
    "080b10071802200328033210000102030405060708090a0b0c0d0e0f380340024a0a120262311202623212004a0e08091202"
    "62311202623412026233500160808090bd90e6eb02"
)
MOVES_BYTES = "0a0262310a026232120e08071801200928033204676f6e65"
CLAIM_BYTES = "6a150a026235120262321a02070820818090bd90e6eb02"


def test_the_stored_form_of_a_shard_does_not_change() -> None:
    assert codec.encode_shard(SHARD).hex() == SHARD_BYTES
    assert codec.decode_shard(bytes.fromhex(SHARD_BYTES)) == SHARD


def test_the_stored_form_of_a_ledger_does_not_change() -> None:
    assert codec.encode_ledger(LEDGER).hex() == LEDGER_BYTES
    assert codec.decode_ledger(bytes.fromhex(LEDGER_BYTES)) == LEDGER
    assert codec.encode_ledger(CLAIMED).hex() == LEDGER_BYTES + CLAIM_BYTES
    assert codec.decode_ledger(bytes.fromhex(LEDGER_BYTES + CLAIM_BYTES)) == CLAIMED


def test_a_page_of_moves_names_each_bookie_once_and_stays_small() -> None:
    moves = tuple(Move((1 << 40) + n, f"bookie-{n % 3}", "bookie-9", 64 << 20) for n in range(1000))
    stored = codec.encode_moves(moves)
    assert len(stored) < 25_000
    assert stored.count(b"bookie-9") == 1
    assert codec.encode_moves([Move(7, "b1", "b2", 9, MoveState.SKIPPED, "gone")]).hex() == MOVES_BYTES


def test_the_golden_records_set_every_field_but_defaults_that_mean_something() -> None:
    assert all(
        getattr(SHARD, field.name) not in (0, (), b"", None) or field.name == "first_slot" for field in fields(SHARD)
    )


@pytest.mark.parametrize("stored", [b"", b"0", b"-1", b"1x", b" 1", b"01", b"1" * 21, "١".encode()])
def test_a_counter_that_is_not_a_number_is_damaged(stored: bytes) -> None:
    with pytest.raises(codec.DamagedRecord):
        codec.decode_counter(stored)
