"""Compression of the blocks of a batch. The size of the result is known before: whatever differs from it is refused.

What was compressed may come from anyone, so nothing is allocated that the size does not allow, and no size is believed
that so few compressed bytes cannot reach. Empty data is stored as empty data by every codec. The zstandard contexts are
made for each call: they must not be shared between threads, and one costs 15 microseconds.
"""

from __future__ import annotations

from enum import IntEnum

import lz4.block
import zstandard

ZSTD_LEVEL = 3

# The most bytes that one compressed byte can stand for. LZ4: a match grows by 255 for each byte of its length.
# Zstandard: the smallest block is 3 bytes of header and 1 byte to repeat, and yields at most 128 KiB.
_LZ4_EXPANSION_MAX = 255
_ZSTD_EXPANSION_MAX = 128 * 1024 // 4
_SMALLEST_EXPANSION = 64


class Codec(IntEnum):
    NONE = 0
    LZ4 = 1
    ZSTD = 2


class DecompressionFailed(ValueError):
    """The data is not what its codec and its size say."""


def compress(codec: int, data: bytes) -> bytes:
    """The data in the form of the codec; raises ValueError for an unknown codec."""
    codec = Codec(codec)
    if codec is Codec.NONE or not data:
        return data
    if codec is Codec.LZ4:
        block: bytes = lz4.block.compress(data, store_size=False)
        return block
    return zstandard.ZstdCompressor(level=ZSTD_LEVEL, write_content_size=True).compress(data)


def decompress(codec: int, data: bytes | memoryview, size: int) -> bytes:
    """What was compressed, exactly `size` bytes of it; raises DecompressionFailed. Allocates no more than the size.

    The caller has checked that it can bear the size.
    """
    if codec not in (Codec.NONE, Codec.LZ4, Codec.ZSTD):
        raise DecompressionFailed(f"codec is unknown: codec=`{codec}`")
    if codec == Codec.NONE or size == 0:
        if len(data) != size:
            raise DecompressionFailed(f"data is not of its size: size=`{size}` bytes=`{len(data)}`")
        return bytes(data)
    result = _decompress_lz4(data, size) if codec == Codec.LZ4 else _decompress_zstd(data, size)
    if len(result) != size:
        raise DecompressionFailed(f"data decompresses to another size: size=`{size}` bytes=`{len(result)}`")
    return result


def _decompress_lz4(data: bytes | memoryview, size: int) -> bytes:
    _check_expansion(data, size, _LZ4_EXPANSION_MAX)
    try:
        result: bytes = lz4.block.decompress(data, uncompressed_size=size)
    except lz4.block.LZ4BlockError as error:
        raise DecompressionFailed(f"lz4 data is damaged: size=`{size}` bytes=`{len(data)}`") from error
    return result


def _decompress_zstd(data: bytes | memoryview, size: int) -> bytes:
    _check_expansion(data, size, _ZSTD_EXPANSION_MAX)
    try:
        # The library allocates what the frame claims: that must be the size which the caller bears.
        claimed = zstandard.frame_content_size(data)
        if claimed != size:
            raise DecompressionFailed(f"zstd frame is of another size: size=`{size}` frame=`{claimed}`")
        return zstandard.ZstdDecompressor().decompress(
            data, max_output_size=size, read_across_frames=False, allow_extra_data=False
        )
    except zstandard.ZstdError as error:
        raise DecompressionFailed(f"zstd data is damaged: size=`{size}` bytes=`{len(data)}`") from error


def _check_expansion(data: bytes | memoryview, size: int, expansion_max: int) -> None:
    if size > _SMALLEST_EXPANSION + len(data) * expansion_max:
        raise DecompressionFailed(f"data is too short for its size: size=`{size}` bytes=`{len(data)}`")
