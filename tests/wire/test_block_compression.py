"""Compression: sizes are known before, lies are refused, bombs do not go off."""

from __future__ import annotations

import tracemalloc
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from magnetar.wire.compression import Codec, DecompressionFailed, compress, decompress

MIB = 1 << 20
COMPRESSING = [Codec.LZ4, Codec.ZSTD]


@pytest.fixture
def little_memory() -> Iterator[None]:
    """Fails the test if it allocates more than 1 MiB."""
    tracemalloc.start()
    yield
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < MIB


@settings(derandomize=True, deadline=None)
@given(st.sampled_from(Codec), st.binary(max_size=500), st.integers(1, 50))
def test_data_comes_back(codec: Codec, piece: bytes, times: int) -> None:
    data = piece * times
    assert decompress(codec, memoryview(compress(codec, data)), len(data)) == data


@pytest.mark.parametrize("codec", COMPRESSING)
def test_repetition_gets_smaller(codec: Codec) -> None:
    assert len(compress(codec, b"magnetar" * 1000)) < 200


@pytest.mark.parametrize("codec", Codec)
@pytest.mark.parametrize("difference", [-100, -1, 1, 100])
def test_a_claimed_size_that_is_wrong_is_refused(codec: Codec, difference: int) -> None:
    data = b"0123456789" * 100
    with pytest.raises(DecompressionFailed):
        decompress(codec, compress(codec, data), len(data) + difference)


@pytest.mark.parametrize("codec", Codec)
def test_trailing_and_missing_bytes_are_refused(codec: Codec) -> None:
    data = bytes(range(256)) * 3
    compressed = compress(codec, data)
    for damaged in (compressed + b"\0", compressed + compressed, compressed[:-1], b""):
        with pytest.raises(DecompressionFailed):
            decompress(codec, damaged, len(data))


@pytest.mark.parametrize("codec", Codec)
def test_empty_data_is_stored_as_nothing(codec: Codec) -> None:
    assert compress(codec, b"") == b""
    with pytest.raises(DecompressionFailed):
        decompress(codec, b"\0", 0)


def test_an_unknown_codec_is_refused() -> None:
    with pytest.raises(DecompressionFailed):
        decompress(3, b"abc", 3)
    with pytest.raises(ValueError, match="3"):
        compress(3, b"abc")


BOMBS = {codec: compress(codec, bytes(32 * MIB)) for codec in COMPRESSING}


@pytest.mark.parametrize("codec", COMPRESSING)
@pytest.mark.usefixtures("little_memory")
def test_a_bomb_that_claims_to_be_small_is_not_unpacked(codec: Codec) -> None:
    with pytest.raises(DecompressionFailed):
        decompress(codec, BOMBS[codec], 1000)


@pytest.mark.parametrize("codec", COMPRESSING)
@pytest.mark.usefixtures("little_memory")
def test_a_size_that_so_few_bytes_cannot_reach_is_not_allocated(codec: Codec) -> None:
    with pytest.raises(DecompressionFailed, match="too short"):
        decompress(codec, compress(codec, b"abc" * 100), 32 * MIB)


@pytest.mark.usefixtures("little_memory")
def test_what_a_zstd_frame_claims_is_not_allocated() -> None:
    """The frame's own size says 32 MiB, the batch 300 bytes; and one frame that does not say."""
    with pytest.raises(DecompressionFailed, match="another size"):
        decompress(Codec.ZSTD, BOMBS[Codec.ZSTD][:100], 300)
    silent = zstandard.ZstdCompressor(write_content_size=False).compress(b"abc" * 100)
    with pytest.raises(DecompressionFailed, match="another size"):
        decompress(Codec.ZSTD, silent, 300)


@settings(derandomize=True, deadline=None, max_examples=300)
@given(st.sampled_from(COMPRESSING), st.binary(max_size=60), st.integers(0, 1000))
def test_random_bytes_are_data_of_exactly_the_size_or_refused(codec: Codec, data: bytes, size: int) -> None:
    with suppress(DecompressionFailed):
        assert len(decompress(codec, data, size)) == size


@settings(derandomize=True, deadline=None, max_examples=300)
@given(st.sampled_from(COMPRESSING), st.data())
def test_flipped_bits_give_data_of_the_size_or_are_refused(codec: Codec, draw: st.DataObject) -> None:
    damaged = bytearray(compress(codec, b"the quick brown fox " * 20))
    for bit in draw.draw(st.lists(st.integers(0, len(damaged) * 8 - 1), min_size=1, max_size=4)):
        damaged[bit >> 3] ^= 1 << (bit & 7)
    with suppress(DecompressionFailed):
        assert len(decompress(codec, bytes(damaged), 400)) == 400


def test_threads_compress_at_the_same_time() -> None:
    texts = [b"%d " % number * 20_000 for number in range(40)]

    def there_and_back(data: bytes) -> bytes:
        return decompress(Codec.ZSTD, compress(Codec.ZSTD, data), len(data))

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(there_and_back, texts)) == texts
