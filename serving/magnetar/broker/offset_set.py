"""Sets of offsets as bitmaps: what a dispatcher remembers of single messages. Pure.

Bits are Python integers, bit i for offset start + i, so that one operation covers a whole batch. A set is a dict of
chunks of CHUNK offsets each; empty chunks are absent, so its memory follows what it holds, not the span of the offsets.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Iterator

CHUNK = 2048
"""Offsets of a chunk."""

_SHIFT = CHUNK.bit_length() - 1
_WITHIN = CHUNK - 1
_FULL = (1 << CHUNK) - 1


def ones(count: int) -> int:
    """`count` bits, all set."""
    return (1 << count) - 1


def lowest(bits: int, count: int) -> int:
    """The `count` lowest of the set bits, or all of them if there are fewer."""
    if count <= 0:
        return 0
    if bits.bit_count() <= count:
        return bits
    low, high = count, bits.bit_length()
    while low < high:
        middle = (low + high) // 2
        if (bits & ((1 << middle) - 1)).bit_count() < count:
            low = middle + 1
        else:
            high = middle
    return bits & ((1 << low) - 1)


def first_bit(bits: int) -> int:
    """Index of the lowest set bit; -1 if there is none."""
    return (bits & -bits).bit_length() - 1


def indices(bits: int) -> list[int]:
    """Indices of the set bits, ascending."""
    if not bits:
        return []
    if bits & (bits + 1) == 0:
        return list(range(bits.bit_length()))
    return [i for i, digit in enumerate(reversed(f"{bits:b}")) if digit == "1"]


def pieces_of(ranges: Iterable[tuple[int, int]]) -> Iterable[tuple[int, int]]:
    """The offsets of these ranges as (start, bits), each chunk once: for ranges of a few chunks at most."""
    chunks: dict[int, int] = {}
    for start, end in ranges:
        while start < end:
            number, within = start >> _SHIFT, start & _WITHIN
            count = min(end - start, CHUNK - within)
            bits = 1 << within if count == 1 else ((1 << count) - 1) << within
            chunks[number] = chunks.get(number, 0) | bits
            start += count
    return [(number << _SHIFT, bits) for number, bits in chunks.items()]


class OffsetSet:
    """A set of offsets. Ranges are half-open; bits are relative to the offset given with them."""

    __slots__ = ("_chunks", "_heap", "_size")

    def __init__(self, ranges: Iterable[tuple[int, int]] = ()) -> None:
        self._chunks: dict[int, int] = {}
        self._heap: list[
            int
        ] = []  # every chunk's number is in it; numbers of dropped chunks are left until they surface
        self._size = 0
        for start, end in ranges:
            self.add_range(start, end)

    def __len__(self) -> int:
        return self._size

    def __contains__(self, offset: int) -> bool:
        return bool(self._chunks.get(offset >> _SHIFT, 0) >> (offset & _WITHIN) & 1)

    def __iter__(self) -> Iterator[int]:
        for start, bits in self.pieces():
            for index in indices(bits):
                yield start + index

    @property
    def chunks(self) -> int:
        """How many chunks it takes."""
        return len(self._chunks)

    def first(self) -> int:
        """The lowest offset; -1 of an empty set."""
        heap = self._heap
        while heap:
            bits = self._chunks.get(heap[0])
            if bits:
                return (heap[0] << _SHIFT) + first_bit(bits)
            heapq.heappop(heap)
        return -1

    def pieces(self) -> list[tuple[int, int]]:
        """(start, bits) of every chunk, ascending. Starts are multiples of CHUNK, bits are never 0."""
        return [(number << _SHIFT, self._chunks[number]) for number in sorted(self._chunks)]

    def add(self, start: int, bits: int) -> None:
        while bits:
            number, within = start >> _SHIFT, start & _WITHIN
            self._put(number, (bits << within) & _FULL)
            bits >>= CHUNK - within
            start += CHUNK - within

    def add_range(self, start: int, end: int) -> None:
        if end > start:
            self.add(start, ones(end - start))

    def remove(self, start: int, bits: int) -> int:
        """Take these out; returns the bits of those that were in it."""
        removed, done = 0, 0
        while bits:
            number, within = start >> _SHIFT, start & _WITHIN
            have = self._chunks.get(number)
            if have is not None:
                hit = have & (bits << within)
                if hit:
                    self._drop(number, have, hit)
                    removed |= (hit >> within) << done
            step = CHUNK - within
            bits >>= step
            start += step
            done += step
        return removed

    def remove_range(self, start: int, end: int) -> int:
        """Take out start <= offset < end; returns how many were in it."""
        before = self._size
        first, last = start >> _SHIFT, (end - 1) >> _SHIFT
        if last - first >= len(self._chunks):
            numbers: Iterable[int] = [number for number in self._chunks if first <= number <= last]
        else:
            numbers = range(first, last + 1)
        for number in numbers:
            have = self._chunks.get(number)
            if have is None:
                continue
            low = start - (number << _SHIFT) if number == first else 0
            high = end - (number << _SHIFT) if number == last else CHUNK
            hit = have & ((1 << high) - (1 << low))
            if hit:
                self._drop(number, have, hit)
        return before - self._size

    def take_range(self, start: int, end: int) -> list[tuple[int, int]]:
        """Take out start <= offset < end; returns what was in it as (start, bits), ascending."""
        taken = []
        for piece, bits in self._pieces_between(start, end):
            self.remove(piece, bits)
            taken.append((piece, bits))
        return taken

    def window(self, start: int, count: int) -> int:
        """Bits of those in start <= offset < start + count."""
        chunks = self._chunks
        number, within = start >> _SHIFT, start & _WITHIN
        bits = chunks.get(number, 0) >> within
        done = CHUNK - within
        while done < count:
            number += 1
            have = chunks.get(number)
            if have:
                bits |= have << done
            done += CHUNK
        return bits & ((1 << count) - 1) if bits else 0

    def clear(self) -> None:
        self._chunks.clear()
        self._heap.clear()
        self._size = 0

    def check(self) -> None:
        """Assert what must hold between its parts."""
        assert self._size == sum(bits.bit_count() for bits in self._chunks.values())
        assert all(0 < bits <= _FULL for bits in self._chunks.values())
        assert set(self._chunks) <= set(self._heap)

    def _pieces_between(self, start: int, end: int) -> list[tuple[int, int]]:
        first, last = start >> _SHIFT, (end - 1) >> _SHIFT
        if last - first >= len(self._chunks):
            numbers = sorted(number for number in self._chunks if first <= number <= last)
        else:
            numbers = [number for number in range(first, last + 1) if number in self._chunks]
        pieces = []
        for number in numbers:
            base = number << _SHIFT
            low, high = max(start - base, 0), min(end - base, CHUNK)
            bits = self._chunks[number] & ((1 << high) - (1 << low))
            if bits:
                pieces.append((base, bits))
        return pieces

    def _put(self, number: int, bits: int) -> None:
        have = self._chunks.get(number)
        if have is None:
            if not bits:
                return
            self._chunks[number] = bits
            self._size += bits.bit_count()
            self._remember(number)
            return
        both = have | bits
        if both != have:
            self._chunks[number] = both
            self._size += both.bit_count() - have.bit_count()

    def _drop(self, number: int, have: int, hit: int) -> None:
        left = have ^ hit
        if left:
            self._chunks[number] = left
        else:
            del self._chunks[number]
        self._size -= hit.bit_count()

    def _remember(self, number: int) -> None:
        if len(self._heap) > 2 * len(self._chunks) + 16:
            self._heap = sorted(self._chunks)
        else:
            heapq.heappush(self._heap, number)
