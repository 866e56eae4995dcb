"""Messages joined from pieces are the messages that protobuf reads."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from magnetar.ledger.bookie_rpc import AddGroup, EntryAnswer, EntryOutcome, ReadResult
from magnetar.ledger.bookie_wire import (
    add_from_message,
    encode_add,
    encode_read_result,
    frame_of_items,
    read_result_from_message,
)
from magnetar.v1 import bookie_pb2 as pb
from magnetar.v1 import broker_pb2
from magnetar.wire.framing import bytes_field, message_field

PROPERTY = settings(derandomize=True, deadline=None, max_examples=50)
ENTRIES = st.lists(st.binary(max_size=300), min_size=1, max_size=4)


@pytest.mark.parametrize("size", [0, 1, 127, 128, 16_383, 16_384, 1 << 21])
def test_a_length_of_any_size_is_read_back(size: int) -> None:
    batch = bytes_field(2, b"x" * size)
    data = b"".join(message_field(3, message_field(1, [broker_pb2.ProduceBatch(handle=9).SerializeToString(), *batch])))
    expected = broker_pb2.ProduceRequest()
    expected.batches.batches.add(handle=9, batch=b"x" * size)
    assert broker_pb2.ProduceRequest.FromString(data) == expected


@PROPERTY
@given(st.lists(ENTRIES, min_size=1, max_size=5))
def test_groups_of_adds_are_read_back(groups: list[list[bytes]]) -> None:
    adds = [AddGroup(number + 1, 1 << 40, b"token", tuple(entries)) for number, entries in enumerate(groups)]
    frame = pb.AddEntriesRequest.FromString(frame_of_items([encode_add(n, add) for n, add in enumerate(adds)]))
    assert [group.request_id for group in frame.groups] == list(range(len(adds)))
    assert [add_from_message(group, group.token) for group in frame.groups] == adds


@PROPERTY
@given(ENTRIES)
def test_answers_with_entries_are_read_back(entries: list[bytes]) -> None:
    have = [EntryAnswer(EntryOutcome.HAVE, entry) for entry in entries]
    result = ReadResult((*have, EntryAnswer(EntryOutcome.UNKNOWN)), "the last one is damaged")
    [read] = pb.ReadEntriesResponse.FromString(frame_of_items([encode_read_result(7, result)])).results
    assert read.request_id == 7
    assert read_result_from_message(read) == result
