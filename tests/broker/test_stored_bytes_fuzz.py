"""Whatever bytes the decoders of stored and received things meet: a value or the error they name, nothing else."""

from __future__ import annotations

from contextlib import suppress

import pytest
from google.protobuf.message import DecodeError
from hypothesis import given
from hypothesis import strategies as st

from magnetar.bookie.rocksdb import _SideFile
from magnetar.broker.dedup import ProducerState, StoredBatch
from magnetar.broker.producer_table import DamagedProducerTable, decode_states, encode_states
from magnetar.ledger.bookie_rpc import STORED, AddResult, AddStatus, EntryOutcome
from magnetar.ledger.bookie_wire import (
    UnexpectedAnswer,
    add_results_from_frame,
    frame_of_add_results,
    lac_results_from_frame,
    read_result_from_message,
)
from magnetar.v1 import bookie_pb2 as pb
from magnetar.wire.selection import InvalidSelection, count_of, indices

TABLE = encode_states([ProducerState(b"p" * 16, 3, 9, 1_000_000, (StoredBatch(0, 4, 100), StoredBatch(5, 9, 105)), 3)])[
    0
]


@st.composite
def damaged(draw: st.DrawFn, sound: bytes) -> bytes:
    """The sound bytes cut off, or with some of them changed."""
    data = bytearray(sound[: draw(st.integers(0, len(sound)))] if draw(st.booleans()) else sound)
    for _ in range(draw(st.integers(0, 4))):
        if data:
            data[draw(st.integers(0, len(data) - 1))] = draw(st.integers(0, 255))
    return bytes(data)


@given(data=st.binary(max_size=200) | damaged(TABLE))
def test_a_chunk_of_the_producers_table_is_states_or_damage(data: bytes) -> None:
    with suppress(DamagedProducerTable):
        assert all(isinstance(state, ProducerState) for state in decode_states([data]))


@given(data=st.binary(max_size=40) | damaged(bytes.fromhex("00000000000000054d474e31") + bytes(4)))
def test_a_side_file_is_a_number_or_nothing_that_can_be_trusted(data: bytes) -> None:
    number = _SideFile._parse(data)
    assert number is None or 0 <= number < 1 << 64


RESULTS = pb.ReadEntriesResponse(
    results=[pb.ReadResult(request_id=7, outcomes=[1, 2, 3, 1], entries=[b"first", b"second"], message="why")]
).SerializeToString()


@given(data=st.binary(max_size=80) | damaged(RESULTS))
def test_read_results_of_a_bookie_have_an_entry_for_each_they_say_to_have(data: bytes) -> None:
    with suppress(DecodeError, UnexpectedAnswer):
        for message in pb.ReadEntriesResponse.FromString(data).results:
            answers = read_result_from_message(message).answers
            assert answers
            assert all((answer.entry is not None) == (answer.outcome is EntryOutcome.HAVE) for answer in answers)


@pytest.mark.parametrize("kind", [pb.AddEntriesResponse, pb.ReadLacResponse])
@given(data=st.data())
def test_other_results_of_a_bookie_are_of_a_known_kind(kind: type, data: st.DataObject) -> None:
    sound = frame_of_add_results([(1, AddResult(AddStatus.FENCED, "x")), (2, STORED), (300, STORED)])
    with suppress(DecodeError):
        frame = kind.FromString(data.draw(st.binary(max_size=80) | damaged(sound)))  # type: ignore[attr-defined]
        if kind is pb.AddEntriesResponse:
            assert all(isinstance(result.status, AddStatus) for _, result in add_results_from_frame(frame))
        else:
            assert all(isinstance(result.outcome, EntryOutcome) for _, result in lac_results_from_frame(frame))


@given(chosen=st.binary(max_size=40), count=st.integers(0, 300))
def test_a_selection_from_elsewhere_is_in_its_batch_or_refused(chosen: bytes, count: int) -> None:
    with suppress(InvalidSelection):
        assert len(indices(chosen, count)) == count_of(chosen, count) <= count
