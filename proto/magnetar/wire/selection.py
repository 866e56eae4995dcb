"""Selections: which messages of a batch are meant.

A selection is a bitmap: bit i, that is byte i // 8, lowest bit first, stands for message i of the batch. It is exactly
as long as the count of the batch needs, with no bit beyond the count. Empty bytes mean all messages, and a selection
of all messages has no other form; a selection of none is a bitmap of zeros.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import compress

ALL = b""

_UNPACKED = [bytes(byte >> bit & 1 for bit in range(8)) for byte in range(256)]
_TO_DIGITS = bytes([ord("0"), ord("1")]) + bytes(254)


class InvalidSelection(ValueError):
    """A bitmap that does not fit the count of its batch, or indices outside of it."""


def all_of(count: int) -> bytes:
    """The selection of all messages of a batch."""
    if count < 0:
        raise InvalidSelection(f"count is negative: count=`{count}`")
    return ALL


def from_indices(count: int, indices: Iterable[int]) -> bytes:
    """The selection of these messages; raises InvalidSelection if one is not in the batch."""
    mask = bytearray(count)
    for index in indices:
        if not 0 <= index < count:
            raise InvalidSelection(f"message is not in the batch: index=`{index}` count=`{count}`")
        mask[index] = 1
    return from_mask(mask)


def from_ranges(count: int, ranges: Iterable[tuple[int, int]]) -> bytes:
    """The selection of the messages start <= i < end of each (start, end); raises InvalidSelection beyond the batch."""
    mask = bytearray(count)
    for start, end in ranges:
        if not 0 <= start <= end <= count:
            raise InvalidSelection(f"range is not in the batch: start=`{start}` end=`{end}` count=`{count}`")
        mask[start:end] = b"\x01" * (end - start)
    return from_mask(mask)


def from_mask(mask: bytes | bytearray) -> bytes:
    """The selection of the messages whose byte in the mask is 1; all other bytes are 0."""
    return ALL if 0 not in mask else pack(mask)


def pack(mask: bytes | bytearray) -> bytes:
    """The mask, a byte of 0 or 1 for each message, as a bitmap, also where all are set."""
    if not mask:
        return b""
    # A base of 2 makes int() linear; the digits stand highest bit first, the bitmap lowest first.
    return int(mask.translate(_TO_DIGITS)[::-1], 2).to_bytes(_size(len(mask)), "little")


def to_mask(selection: bytes, count: int) -> bytes:
    """A byte for each message: 1 if it is selected, else 0; raises InvalidSelection."""
    check(selection, count)
    if not selection:
        return b"\x01" * count
    return b"".join(map(_UNPACKED.__getitem__, selection))[:count]


def indices(selection: bytes, count: int) -> list[int]:
    """The selected messages, ascending; raises InvalidSelection."""
    if not selection:
        return list(range(count))
    return list(compress(range(count), to_mask(selection, count)))


def count_of(selection: bytes, count: int) -> int:
    """How many messages are selected; raises InvalidSelection."""
    check(selection, count)
    return int.from_bytes(selection, "little").bit_count() if selection else count


def intersect(first: bytes, second: bytes, count: int) -> bytes:
    """The messages that stand in both; raises InvalidSelection."""
    check(first, count)
    check(second, count)
    if not first or not second:
        return normalise(first or second, count)
    both = int.from_bytes(first, "little") & int.from_bytes(second, "little")
    return normalise(both.to_bytes(len(first), "little"), count)


def normalise(selection: bytes, count: int) -> bytes:
    """The one form of a selection: empty if all are selected; raises InvalidSelection."""
    return ALL if count_of(selection, count) == count else bytes(selection)


def check(selection: bytes, count: int) -> None:
    """Raise InvalidSelection unless it is empty, or as long as the count needs with no bit beyond it."""
    if not selection:
        return
    if len(selection) != _size(count):
        raise InvalidSelection(f"selection does not fit the batch: bytes=`{len(selection)}` count=`{count}`")
    if count & 7 and selection[-1] >> (count & 7):
        raise InvalidSelection(f"selection has a bit beyond the batch: count=`{count}`")


def _size(count: int) -> int:
    """Bytes of the bitmap of so many messages."""
    return (count + 7) >> 3
