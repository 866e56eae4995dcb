"""The stored form of the producers' table: chunks in the cursor ledger's snapshots."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from google.protobuf.message import DecodeError

from magnetar.broker.dedup import ProducerState, StoredBatch
from magnetar.v1 import cursor_pb2

CHUNK_BYTES_MAX = 256 * 1024


class DamagedProducerTable(ValueError):
    """A stored chunk does not parse."""


def encode_states(states: Iterable[ProducerState]) -> list[bytes]:
    """Chunks of at most CHUNK_BYTES_MAX each, together all of the states. No states, no chunks."""
    chunks = []
    chunk = cursor_pb2.ProducerTableChunk()
    size = 0
    for state in states:
        entry = _entry(state)
        entry_size = entry.ByteSize() + 4  # its tag and its length
        if size + entry_size > CHUNK_BYTES_MAX:
            chunks.append(chunk.SerializeToString())
            chunk, size = cursor_pb2.ProducerTableChunk(), 0
        chunk.producers.append(entry)
        size += entry_size
    if size:
        chunks.append(chunk.SerializeToString())
    return chunks


def decode_states(chunks: Iterable[bytes]) -> Iterator[ProducerState]:
    """The states of all chunks. Raises DamagedProducerTable."""
    for data in chunks:
        try:
            chunk = cursor_pb2.ProducerTableChunk.FromString(data)
        except DecodeError as error:
            raise DamagedProducerTable(f"a chunk of the producers' table does not parse bytes=`{len(data)}`") from error
        for entry in chunk.producers:
            recent = tuple(StoredBatch(b.first_sequence, b.last_sequence, b.first_offset) for b in entry.batches)
            yield ProducerState(
                entry.producer_id,
                entry.epoch,
                entry.last_sequence,
                entry.last_time_us,
                recent,
                entry.stored_epoch or entry.epoch,
            )


def _entry(state: ProducerState) -> cursor_pb2.ProducerTableEntry:
    return cursor_pb2.ProducerTableEntry(
        producer_id=state.producer_id,
        epoch=state.epoch,
        last_sequence=state.last_sequence,
        named=state.named,
        last_time_us=state.last_time_us,
        stored_epoch=state.stored_epoch,
        batches=[
            cursor_pb2.StoredBatch(
                first_sequence=b.first_sequence, last_sequence=b.last_sequence, first_offset=b.first_offset
            )
            for b in state.recent
        ],
    )
