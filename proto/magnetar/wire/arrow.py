"""The columns of a batch as a pyarrow RecordBatch. The only module here that needs pyarrow.

A column of payloads or keys is what Arrow calls binary: offsets and one buffer. The buffer is the batch's own. Arrow's
bitmaps are like selections: lowest bit first.
"""

from __future__ import annotations

from array import array
from itertools import accumulate

import pyarrow as pa

from magnetar.wire import columns as columnar
from magnetar.wire import selection
from magnetar.wire.columns import NO_EVENT_TIME, Block

SCHEMA = pa.schema(
    [
        pa.field("payload", pa.binary(), nullable=False),
        pa.field("key", pa.binary()),
        pa.field("properties", pa.map_(pa.string(), pa.string())),
        pa.field("event_time", pa.timestamp("us", tz="UTC")),
    ]
)


def record_batch(block: Block, payload_offsets: array[int], chosen: bytes) -> pa.RecordBatch:
    """The chosen messages of a block; raises MalformedBatch if properties are damaged.

    payload_offsets   in bytes from the block's payload_start, one more than messages
    """
    count = len(block.payload_lengths)
    payload = _binary(block.source, block.payload_start, payload_offsets, None)
    everything = pa.RecordBatch.from_arrays(
        [payload, _keys(block, count), _properties(block, count), _event_times(block, count)], schema=SCHEMA
    )
    if not chosen:
        return everything
    indices = selection.indices(chosen, count)
    if indices and indices[-1] - indices[0] == len(indices) - 1:
        return everything.slice(indices[0], len(indices))
    return everything.filter(pa.Array.from_buffers(pa.bool_(), count, [None, pa.py_buffer(chosen)]))


def _binary(source: bytes, start: int, offsets: array[int], validity: pa.Buffer | None) -> pa.Array:
    values = pa.py_buffer(source).slice(start, offsets[-1])
    return pa.Array.from_buffers(pa.binary(), len(offsets) - 1, [validity, pa.py_buffer(offsets), values])


def _keys(block: Block, count: int) -> pa.Array:
    sizes = columnar.key_sizes(block)
    if sizes is None or block.key_lengths is None:
        return pa.nulls(count, pa.binary())
    offsets = array("i", accumulate(sizes, initial=0))
    return _binary(block.source, block.key_start, offsets, _validity(block.key_lengths, 0))


def _properties(block: Block, count: int) -> pa.Array:
    found = columnar.properties_of(block)
    if found is None:
        return pa.nulls(count, pa.map_(pa.string(), pa.string()))
    pairs = [None if properties is None else list(properties.items()) for properties in found]
    return pa.array(pairs, type=pa.map_(pa.string(), pa.string()))


def _event_times(block: Block, count: int) -> pa.Array:
    if block.event_times is None:
        return pa.nulls(count, pa.timestamp("us", tz="UTC"))
    validity = _validity(block.event_times, NO_EVENT_TIME)
    return pa.Array.from_buffers(pa.timestamp("us", tz="UTC"), count, [validity, pa.py_buffer(block.event_times)])


def _validity(column: array[int], absent: int) -> pa.Buffer | None:
    """A bitmap of the values that are there; None if all are."""
    if absent not in column:
        return None
    return pa.py_buffer(selection.pack(bytes([value != absent for value in column])))
