"""Batches: round trips, the exact bytes, and what a decoder refuses."""

from __future__ import annotations

import struct
import tracemalloc
from array import array
from collections.abc import Sequence
from contextlib import suppress

import pytest
from fastcrc import crc32
from hypothesis import given, settings
from hypothesis import strategies as st

from magnetar.wire import batch, columns, compression, selection
from magnetar.wire.batch import (
    BODY_BYTES_MAX,
    COUNT_MAX,
    HEADER_SIZE,
    KEYED,
    MUST_UNDERSTAND,
    BatchBody,
    BatchHeader,
    Codec,
    Columns,
    MalformedBatch,
    UnknownExtension,
    decode_batch,
    encode_batch,
    parse_header,
    restamp,
    to_arrow,
)

PROPERTY = settings(derandomize=True, deadline=None, max_examples=200)
PRODUCER = bytes(range(16))

texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)


@st.composite
def messages(draw: st.DrawFn, max_size: int = 12) -> Columns:
    """Columns as they come back: no column without a value, no empty properties."""
    payloads = draw(st.lists(st.binary(max_size=300), min_size=1, max_size=max_size))

    def column(values: st.SearchStrategy) -> list | None:  # type: ignore[type-arg]
        drawn = draw(st.none() | st.lists(st.none() | values, min_size=len(payloads), max_size=len(payloads)))
        return drawn if drawn and any(value is not None for value in drawn) else None

    return Columns(
        payloads,
        column(st.binary(max_size=20)),
        column(st.dictionaries(texts, texts, min_size=1, max_size=3)),
        column(st.integers(-(1 << 63) + 1, (1 << 63) - 1)),
    )


def encode(
    content: Columns,
    codec: int = Codec.NONE,
    slots: Sequence[int] | None = None,
    extensions: Sequence[tuple[int, bytes]] = (),
) -> bytes:
    return encode_batch(
        content,
        producer_id=PRODUCER,
        epoch=3,
        previous=100,
        last=200,
        slots=None if slots is None else array("H", slots),
        slot=5,
        codec=codec,
        extensions=extensions,
    )


def reseal(data: bytes | bytearray) -> bytes:
    """The data with the length and checksum that a hostile producer would give it."""
    sealed = bytearray(data)
    struct.pack_into(">I", sealed, 4, len(sealed))
    struct.pack_into(">I", sealed, 8, crc32.iscsi(bytes(sealed[12:])))
    return bytes(sealed)


def changed(data: bytes, at: int, form: str, value: int) -> bytes:
    """The data with one number replaced, sealed again."""
    altered = bytearray(data)
    struct.pack_into(form, altered, at, value)
    return reseal(altered)


# --- round trips ---


@PROPERTY
@given(messages(), st.sampled_from(Codec))
def test_all_columns_come_back(content: Columns, codec: Codec) -> None:
    assert decode_batch(encode(content, codec)) == content
    assert decode_batch(memoryview(encode(content, codec))) == content


@PROPERTY
@given(messages(), st.data())
def test_a_selected_body_holds_the_selected_messages_of_each_column(content: Columns, draw: st.DataObject) -> None:
    count = len(content.payloads)
    subsets = st.sets(st.integers(0, count - 1))
    first, second = draw.draw(subsets), draw.draw(subsets)
    body = BatchBody(encode(content), selection=selection.from_indices(count, first))
    both = body.select(selection.from_indices(count, second))
    for found, wanted in ((body, sorted(first)), (both, sorted(first & second))):
        assert found.indices == wanted
        assert len(found) == len(wanted)
        assert found.payloads == [content.payloads[index] for index in wanted]
        for name in ("keys", "properties", "event_times"):
            column = getattr(content, name)
            assert getattr(found, name) == (column and [column[index] for index in wanted])
        assert found.columns().payloads is found.payloads


def test_columns_without_a_value_are_not_stored() -> None:
    bare = encode(Columns([b"a", b"b"]))
    assert encode(Columns([b"a", b"b"], [None, None], [None, {}], [None, None])) == bare
    assert decode_batch(bare) == Columns([b"a", b"b"])


@pytest.mark.parametrize("size", [255, 256, 65535, 65536])
def test_lengths_widen_with_the_longest_value(size: int) -> None:
    content = Columns([b"", b"x" * size, b"y"], [b"k" * (size - 1), None, b""])
    assert decode_batch(encode(content)) == content


def test_the_payload_column_is_the_batch_itself() -> None:
    data = encode(Columns([b"one", b"", b"three"], [b"k", b"k", None]))
    body = BatchBody(data)
    assert body.payload_column.obj is data
    assert bytes(body.payload_column) == b"onethree"
    assert body.payload_offsets.tolist() == [0, 3, 3, 8]


@PROPERTY
@given(st.lists(st.integers(0, 65535), min_size=1, max_size=50))
def test_slots_come_back_with_their_range(slots: list[int]) -> None:
    data = encode(Columns([b"p"] * len(slots)), slots=slots)
    header = parse_header(data)
    assert (header.keyed, header.min_slot, header.max_slot) == (True, min(slots), max(slots))
    assert batch.slots(data, header) == array("H", slots)


def test_a_keyless_batch_has_its_one_slot_for_each_message() -> None:
    data = encode(Columns([b"p"] * 3))
    header = parse_header(data)
    assert (header.keyed, header.min_slot, header.max_slot) == (False, 5, 5)
    assert batch.slots(data, header) == array("H", [5, 5, 5])


def test_the_header_says_what_was_encoded() -> None:
    data = encode(Columns([b"abc"] * 4), Codec.LZ4)
    header = parse_header(memoryview(data))
    assert header == BatchHeader(
        len(data), header.crc, 0, Codec.LZ4, 4, 5, 5, PRODUCER, 3, 100, 200, 4 + 4 + 4 + 12, HEADER_SIZE
    )
    assert header.first_sequence == 197
    assert batch.count_of(data) == 4


@PROPERTY
@given(messages(), st.sampled_from(Codec), st.integers(-1, 1 << 62), st.none() | st.integers(0, (1 << 64) - 1))
def test_a_restamped_batch_differs_in_its_place_in_the_chain_only(
    content: Columns, codec: Codec, previous: int, epoch: int | None
) -> None:
    data = encode(content, codec, extensions=[(7, b"origin")])
    stamped = restamp(data, previous=previous, epoch=epoch)
    header, before = parse_header(stamped), parse_header(data)
    assert (header.previous, header.epoch) == (previous, before.epoch if epoch is None else epoch)
    assert stamped[56:] == data[56:]
    assert stamped[12:40] == data[12:40]
    assert decode_batch(stamped) == content


def test_damage_is_not_restamped() -> None:
    data = bytearray(encode(Columns([b"abc"])))
    data[-1] ^= 1
    with pytest.raises(MalformedBatch, match="checksum"):
        restamp(bytes(data), previous=5)


# --- bytes ---

GOLDEN_COLUMNS = Columns(
    [b"first", b"", b"3rd"], [b"k1", None, b""], [None, {"a": "\u00e9"}, None], [None, 1_700_000_000_000_000, None]
)

GOLDEN_HEADER = """
    4d42 01 00 000000b5 7f6ae435
    0001 00 00 00000003 0007 ffff 000102030405060708090a0b0c0d0e0f 0000000000000003
    0000000000000064 00000000000000c8 00000046 00000057
    0007 0009 ffff
    0007 00000003 78797a
"""
GOLDEN_BODY = """
    0001 0000 00000000 00000003 0007 ffff 00000046 00000046
    07 000000
    01 000000 05 00 03
    01 000000 03 00 01 6b31
    01 000000 00 0b 00 0100 0100 61 02000000 c3a9
    0000000000000080 00401e18240a0600 0000000000000080
    6669727374 337264
"""
GOLDEN_LZ4 = """
    0001 0000 00000000 00000003 0007 ffff 00000046 00000042
    f2180700000001000000050003010000000300016b3101000000000b00010001006102000000c3a9000100828000401e18240a060e00b00000
    806669727374337264
"""
GOLDEN_ZSTD = """
    0001 0000 00000000 00000003 0007 ffff 00000046 00000047
    28b52ffd2046f50100140307000000010000000500030300016b31000b00010001006102000000c3a9008000401e18240a060080666972
    73743372640400201fb8a92cf1149439
"""


def test_the_bytes_of_a_batch_never_change() -> None:
    data = encode(GOLDEN_COLUMNS, slots=[7, 9, 65535], extensions=[(7, b"xyz")])
    assert data.hex() == "".join((GOLDEN_HEADER + GOLDEN_BODY).split())
    assert decode_batch(data) == GOLDEN_COLUMNS


@pytest.mark.parametrize(("codec", "body"), [(Codec.LZ4, GOLDEN_LZ4), (Codec.ZSTD, GOLDEN_ZSTD)])
def test_compressed_bytes_of_once_can_always_be_read(codec: Codec, body: str) -> None:
    data = bytearray.fromhex(GOLDEN_HEADER + body)
    data[14] = codec
    assert decode_batch(reseal(data)) == GOLDEN_COLUMNS


@pytest.mark.parametrize(
    ("content", "change", "reason"),
    [
        (Columns([]), {}, "no messages"),
        (Columns([b"a"], [b"k", b"k"]), {}, "columns differ"),
        (Columns([b"a"], event_times=[1 << 63]), {}, "event time"),
        (Columns([b"a"], properties=[{"k" * 65536: ""}]), {}, "properties"),
        (Columns([b"a"]), {"producer_id": b"short"}, "producer id"),
        (Columns([b"a"]), {"slots": array("H", [1, 2])}, "a slot for each"),
        (Columns([b"a"]), {"slot": 65536}, "slot"),
        (Columns([b"a"]), {"epoch": 1 << 64}, "epoch"),
        (Columns([b"a"]), {"previous": -2}, "sequence"),
        (Columns([b"a", b"b"]), {"last": 0}, "sequence"),
        (Columns([b"a"]), {"codec": 3}, "Codec"),
        (Columns([bytes(1 << 20)] * 64), {"last": 63}, "too large"),
    ],
)
def test_what_the_format_cannot_hold_is_not_encoded(content: Columns, change: dict[str, object], reason: str) -> None:
    arguments: dict[str, object] = {"producer_id": PRODUCER, "epoch": 0, "previous": -1, "last": 0, **change}
    with pytest.raises(ValueError, match=reason):
        encode_batch(content, **arguments)  # type: ignore[arg-type]


# --- headers ---

PLAIN = encode(Columns([b"first", b"second", b"third"]))
KEYS = encode(GOLDEN_COLUMNS, slots=[7, 9, 65535], extensions=[(7, b"xyz"), (1, b"")])


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "short"),
        (PLAIN[:71], "short"),
        (PLAIN + b"\0", "length"),
        (changed(PLAIN, 0, ">H", 0x4D43), "format"),
        (changed(PLAIN, 2, ">B", 2), "format"),
        (changed(PLAIN, 12, ">H", 2), "flags"),
        (changed(PLAIN, 14, ">B", 3), "codec"),
        (changed(PLAIN, 16, ">I", 0), "count"),
        (changed(PLAIN, 16, ">I", COUNT_MAX + 1), "count"),
        (changed(PLAIN, 20, ">H", 6), "slots"),
        (changed(PLAIN, 20, ">H", 4), "slots"),
        (changed(PLAIN, 48, ">q", -2), "sequences"),
        (changed(PLAIN, 56, ">q", 1), "sequences"),
        (changed(PLAIN, 64, ">I", BODY_BYTES_MAX + 1), "too large"),
        (changed(PLAIN, 68, ">I", HEADER_SIZE - 1), "body"),
        (changed(PLAIN, 68, ">I", len(PLAIN) + 1), "body"),
        (changed(PLAIN, 12, ">H", KEYED), "body"),
        (changed(changed(KEYS, 56, ">q", COUNT_MAX), 16, ">I", COUNT_MAX), "body"),
        (changed(KEYS, 20, ">H", 8), "slot is out of range"),
        (changed(KEYS, 22, ">H", 65534), "slot is out of range"),
        (changed(KEYS, HEADER_SIZE + 6 + 2, ">I", 100), "does not fit"),
        (changed(KEYS, HEADER_SIZE + 6 + 2, ">I", 4), "cut off"),
    ],
)
def test_a_header_that_contradicts_itself_or_the_data_is_refused(data: bytes, reason: str) -> None:
    with pytest.raises(MalformedBatch, match=reason):
        parse_header(data)


def test_extensions_come_back_and_only_those_that_must_be_understood_refuse_the_batch() -> None:
    assert batch.extensions(KEYS, parse_header(KEYS)) == [(7, b"xyz"), (1, b"")]
    assert batch.slots(KEYS, parse_header(KEYS)).tolist() == [7, 9, 65535]
    demanding = encode(Columns([b"a"]), extensions=[(9, b""), (MUST_UNDERSTAND | 6, b"key")])
    with pytest.raises(UnknownExtension, match="type=`6`"):
        parse_header(demanding)
    assert decode_batch(demanding, parse_header(demanding, check=False)) == Columns([b"a"])


@pytest.mark.parametrize("data", [PLAIN, KEYS, encode(GOLDEN_COLUMNS, Codec.LZ4)])
def test_each_flipped_bit_and_each_truncation_is_refused(data: bytes) -> None:
    for bit in range(len(data) * 8):
        damaged = bytearray(data)
        damaged[bit >> 3] ^= 1 << (bit & 7)
        if bit >> 3 != 3:
            with pytest.raises(MalformedBatch):
                parse_header(bytes(damaged))
    for size in range(len(data)):
        with pytest.raises(MalformedBatch):
            parse_header(data[:size])


# --- bodies ---

DIRECTORY = HEADER_SIZE
BLOCK = DIRECTORY + 4 + 20


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (reseal(PLAIN[:BLOCK]), "blocks are not"),
        (changed(PLAIN[: DIRECTORY + 2], 0, ">H", 0x4D42), "directory is cut off"),
        (changed(PLAIN, DIRECTORY, ">H", 0), "directory does not fit"),
        (changed(PLAIN, DIRECTORY, ">H", 60000), "directory does not fit"),
        (changed(PLAIN, DIRECTORY + 4, ">I", 1), "block is not one"),
        (changed(PLAIN, DIRECTORY + 8, ">I", 0), "block is not one"),
        (changed(PLAIN, DIRECTORY + 8, ">I", 4), "blocks are not"),
        (changed(PLAIN, DIRECTORY + 12, ">H", 4), "block is not one"),
        (changed(PLAIN, DIRECTORY + 14, ">H", 6), "block is not one"),
        (changed(PLAIN, DIRECTORY + 16, ">I", 1), "two sizes"),
        (changed(PLAIN, DIRECTORY + 20, ">I", 1), "two sizes"),
        (changed(PLAIN, 64, ">I", 1), "blocks are not"),
        (changed(PLAIN, BLOCK, ">B", 8), "unknown columns"),
        (changed(PLAIN, BLOCK, ">B", 1), "does not fit|unknown width"),
        (changed(PLAIN, BLOCK, ">B", 2), "does not fit|unknown width"),
        (changed(PLAIN, BLOCK, ">B", 4), "does not fit"),
        (changed(PLAIN, BLOCK + 4, ">B", 3), "unknown width"),
        (changed(PLAIN, BLOCK + 4, ">B", 4), "do not fill|does not fit"),
        (changed(PLAIN, BLOCK + 8, ">B", 4), "do not fill"),
        (changed(PLAIN, BLOCK + 8, ">B", 255), "do not fill"),
        (reseal(PLAIN + b"\0"), "blocks are not"),
    ],
)
def test_a_body_that_contradicts_itself_is_refused(data: bytes, reason: str) -> None:
    with pytest.raises(MalformedBatch, match=reason):
        BatchBody(data)


@pytest.mark.parametrize(
    "damaged",
    [
        b"\x00",
        b"\x00\x00",
        b"\x01\x00",
        b"\x01\x00\x01\x00k\x02\x00\x00\x00v",
        b"\x01\x00\xff\xffk\x01\x00\x00\x00v",
        b"\x01\x00\x01\x00k\x01\x00\x00\x00v!",
        b"\x01\x00\x01\x00\xff\x01\x00\x00\x00v",
        b"\x02\x00\x01\x00k\x01\x00\x00\x00v",
        b"\x02\x00\x01\x00k\x00\x00\x00\x00\x01\x00k\x00\x00\x00\x00",
    ],
)
def test_damaged_properties_are_refused_when_they_are_asked_for(damaged: bytes) -> None:
    block = b"\x02\0\0\0" + b"\x01\0\0\0\x01" + b"\x01\0\0\0" + bytes([len(damaged)]) + damaged + b"p"
    body = BatchBody(assemble([(1, block)]))
    assert body.payloads == [b"p"]
    with pytest.raises(MalformedBatch, match="propert"):
        _ = body.properties
    with pytest.raises(MalformedBatch, match="propert"):
        body.to_arrow()


def test_a_selection_of_another_batch_is_refused() -> None:
    for bitmap in (b"\x08", b"\x01\x01"):
        with pytest.raises(MalformedBatch, match="selection"):
            BatchBody(PLAIN, selection=bitmap)
        with pytest.raises(MalformedBatch, match="selection"):
            BatchBody(PLAIN).select(bitmap)


def assemble(blocks: list[tuple[int, bytes]], codec: Codec = Codec.NONE) -> bytes:
    """A keyless batch of blocks, written from the description of the format and not by the encoder."""
    stored = [compression.compress(codec, block) for _, block in blocks]
    directory, first = struct.pack(">HH", len(blocks), 0), 0
    for (count, block), compressed in zip(blocks, stored, strict=True):
        directory += struct.pack(">IIHHII", first, count, 5, 5, len(block), len(compressed))
        first += count
    header = struct.pack(">HBxIIHBxIHH", 0x4D42, 1, 0, 0, 0, codec, first, 5, 5) + PRODUCER
    header += struct.pack(">QqqII", 0, -1, first - 1, sum(len(block) for _, block in blocks), 72)
    return reseal(header + directory + b"".join(stored))


@PROPERTY
@given(st.lists(messages(max_size=4), min_size=1, max_size=4), st.sampled_from(Codec))
def test_several_blocks_are_one_batch(contents: list[Columns], codec: Codec) -> None:
    blocks = [(len(content.payloads), b"".join(columns.encode_block(content))) for content in contents]
    body = BatchBody(assemble(blocks, codec))
    assert body.payloads == [payload for content in contents for payload in content.payloads]
    for name in ("keys", "properties", "event_times"):
        parts = [getattr(content, name) or [None] * len(content.payloads) for content in contents]
        expected = [value for part in parts for value in part]
        assert getattr(body, name) == (expected if any(value is not None for value in expected) else None)
    assert body.to_arrow().column("payload").to_pylist() == body.payloads


# --- hostile data ---


def try_to_decode(data: bytes) -> None:
    """Reads all there is in every way; only MalformedBatch may come of it."""
    with suppress(MalformedBatch):
        header = parse_header(data)
        count = header.count
        assert len(batch.slots(data, header)) == count
        batch.extensions(data, header)
        body = BatchBody(data, header)
        assert len(body.payloads) == len(body.columns().payloads) == count
        assert to_arrow(data, selection.from_indices(count, [0])).num_rows == 1


SEEDS = [encode(GOLDEN_COLUMNS, codec, slots=[7, 9, 65535], extensions=[(7, b"xyz")]) for codec in Codec]
SEEDS += [encode(Columns([b"x" * 400] * 3, [b"k"] * 3), Codec.ZSTD), assemble([(1, b"\0\0\0\0\1\0\0\0\1p")] * 3)]


@settings(derandomize=True, deadline=None, max_examples=1500)
@given(st.sampled_from(SEEDS), st.data())
def test_sealed_damage_is_decoded_or_refused_and_nothing_else(seed: bytes, draw: st.DataObject) -> None:
    damaged = bytearray(seed)
    for at in draw.draw(st.lists(st.integers(12, len(seed) - 1), min_size=1, max_size=3)):
        damaged[at] = draw.draw(st.sampled_from([0, 1, 2, 127, 128, 255]) | st.integers(0, 255))
    size = draw.draw(st.just(len(seed)) | st.integers(12, len(seed)))
    try_to_decode(reseal(damaged[:size] + draw.draw(st.just(b"") | st.binary(max_size=4))))


def test_each_sealed_flip_and_truncation_is_decoded_or_refused_and_nothing_else() -> None:
    for seed in SEEDS:
        for bit in range(12 * 8, len(seed) * 8):
            damaged = bytearray(seed)
            damaged[bit >> 3] ^= 1 << (bit & 7)
            try_to_decode(reseal(damaged))
        for size in range(12, len(seed)):
            try_to_decode(reseal(seed[:size]))


@PROPERTY
@given(st.binary(max_size=200), st.booleans())
def test_random_bytes_are_refused(tail: bytes, sealed: bool) -> None:
    data = reseal(b"\x4d\x42\x01\x00" + bytes(8) + tail) if sealed else tail
    try_to_decode(data)
    if not sealed:
        with pytest.raises(MalformedBatch):
            parse_header(data)
        with pytest.raises(MalformedBatch):
            batch.count_of(data)


@pytest.mark.parametrize("codec", [Codec.LZ4, Codec.ZSTD])
def test_sizes_that_lie_allocate_nothing(codec: Codec) -> None:
    honest = encode(Columns([bytes(300_000)] * 100), codec)
    many = changed(changed(PLAIN, 56, ">q", COUNT_MAX), 16, ">I", COUNT_MAX)
    claims = [
        changed(changed(honest, 64, ">I", 500), DIRECTORY + 16, ">I", 500),
        changed(changed(SEEDS[codec], 64, ">I", BODY_BYTES_MAX), HEADER_SIZE + 6 + 9 + 16, ">I", BODY_BYTES_MAX),
        changed(many, DIRECTORY + 4, ">I", 0),
        changed(many, DIRECTORY + 8, ">I", COUNT_MAX),
    ]
    tracemalloc.start()
    for data in claims:
        tracemalloc.reset_peak()
        before = tracemalloc.get_traced_memory()[0]
        with pytest.raises(MalformedBatch, match=r"damaged|too short|another size|blocks are not|does not fit"):
            BatchBody(data)
        assert tracemalloc.get_traced_memory()[1] - before < 1 << 20
    with pytest.raises(MalformedBatch, match="max=`29999999`"):
        decode_batch(honest, max_body_bytes=29_999_999)
    assert tracemalloc.get_traced_memory()[1] < 2 << 20
    tracemalloc.stop()
