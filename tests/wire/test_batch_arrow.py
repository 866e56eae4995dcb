"""Batches as pyarrow: the same messages, and the payloads where they are."""

from __future__ import annotations

from array import array
from datetime import UTC, datetime, timedelta

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from magnetar.wire import selection
from magnetar.wire.arrow import SCHEMA
from magnetar.wire.batch import BatchBody, Codec, Columns, encode_batch, to_arrow

COUNT = 1000
EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
COLUMNS = Columns(
    payloads=[b"payload-%d" % number * (number % 3) for number in range(COUNT)],
    keys=[b"key-%d" % number if number % 5 else None for number in range(COUNT)],
    properties=[{"n": str(number), "é": ""} if number % 7 else None for number in range(COUNT)],
    event_times=[number * 1_000_001 - 5 if number % 11 else None for number in range(COUNT)],
)


def encode(content: Columns, codec: Codec = Codec.NONE) -> bytes:
    count = len(content.payloads)
    slots = array("H", range(count))
    return encode_batch(content, producer_id=bytes(16), epoch=0, previous=-1, last=count - 1, slots=slots, codec=codec)


def rows(content: Columns, indices: list[int]) -> list[dict[str, object]]:
    def value(column: list | None, index: int) -> object:  # type: ignore[type-arg]
        return None if column is None else column[index]

    def time(index: int) -> datetime | None:
        found = value(content.event_times, index)
        return EPOCH + timedelta(microseconds=found) if isinstance(found, int) else None

    def pairs(index: int) -> list[tuple[str, str]] | None:
        found = value(content.properties, index)
        return list(found.items()) if isinstance(found, dict) else None

    return [
        {
            "payload": content.payloads[index],
            "key": value(content.keys, index),
            "properties": pairs(index),
            "event_time": time(index),
        }
        for index in indices
    ]


def address(data: bytes) -> int:
    return int(pa.py_buffer(data).address)


def payload_buffer(record_batch: pa.RecordBatch) -> pa.Buffer:
    return record_batch.column("payload").buffers()[2]


def test_payloads_are_not_copied() -> None:
    data = encode(COLUMNS)
    buffer = payload_buffer(to_arrow(data))
    assert buffer.size == sum(map(len, COLUMNS.payloads))
    assert buffer.address == address(data) + len(data) - buffer.size


def test_a_contiguous_selection_is_not_copied_either() -> None:
    data = encode(COLUMNS)
    sliced = to_arrow(data, selection.from_ranges(COUNT, [(100, 900)]))
    assert payload_buffer(sliced).address == payload_buffer(to_arrow(data)).address
    assert sliced.to_pylist() == rows(COLUMNS, list(range(100, 900)))


def test_decompressed_payloads_are_not_copied_again() -> None:
    body = BatchBody(encode(COLUMNS, Codec.LZ4))
    column = body.payload_column
    assert isinstance(column.obj, bytes)
    assert payload_buffer(body.to_arrow()).address == address(column.obj) + len(column.obj) - len(column)


@pytest.mark.parametrize("codec", Codec)
def test_each_column_holds_the_messages_of_the_batch(codec: Codec) -> None:
    found = to_arrow(encode(COLUMNS, codec))
    found.validate(full=True)
    assert found.to_pylist() == rows(COLUMNS, list(range(COUNT)))


def test_the_schema_is_the_same_without_keys_properties_and_times() -> None:
    bare = to_arrow(encode(Columns([b"a", b""])))
    assert bare.schema == SCHEMA == to_arrow(encode(COLUMNS)).schema
    assert bare.to_pylist() == rows(Columns([b"a", b""]), [0, 1])


def test_the_memory_of_the_batch_lives_as_long_as_its_columns() -> None:
    found = to_arrow(encode(COLUMNS))
    _ = [encode(COLUMNS) for _ in range(10)]
    assert found.column("payload").to_pylist() == COLUMNS.payloads


@settings(derandomize=True, deadline=None, max_examples=60)
@given(st.sets(st.integers(0, COUNT - 1)))
def test_a_selection_holds_the_selected_messages(wanted: set[int]) -> None:
    found = to_arrow(encode(COLUMNS), selection.from_indices(COUNT, wanted))
    found.validate(full=True)
    assert found.to_pylist() == rows(COLUMNS, sorted(wanted))
