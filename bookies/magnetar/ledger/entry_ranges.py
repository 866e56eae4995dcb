"""A set of entry ids that grows mostly at its end: which entries a member has stored. Pure."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator


class EntryRanges:
    """Disjoint, ordered, inclusive ranges; neighbours are merged. One range, unless a member missed something."""

    __slots__ = ("_firsts", "_lasts")

    def __init__(self) -> None:
        self._firsts: list[int] = []
        self._lasts: list[int] = []

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return iter(zip(self._firsts, self._lasts, strict=True))

    def __len__(self) -> int:
        return len(self._firsts)

    def __repr__(self) -> str:
        return ",".join(f"{first}-{last}" for first, last in self) or "none"

    def add(self, first: int, last: int) -> None:
        assert first <= last
        lasts = self._lasts
        if lasts and self._firsts[-1] <= first <= lasts[-1] + 1:
            lasts[-1] = max(last, lasts[-1])
        else:
            self._insert(first, last)

    def _insert(self, first: int, last: int) -> None:
        firsts, lasts = self._firsts, self._lasts
        low = bisect_right(lasts, first - 2)
        high = bisect_right(firsts, last + 1)
        if low < high:
            first, last = min(first, firsts[low]), max(last, lasts[high - 1])
        firsts[low:high] = [first]
        lasts[low:high] = [last]

    def missing(self, first: int, last: int) -> Iterator[tuple[int, int]]:
        """The ranges of first..last that are not in the set."""
        for held_first, held_last in self:
            if held_last < first:
                continue
            if held_first > last:
                break
            if held_first > first:
                yield first, held_first - 1
            first = held_last + 1
        if first <= last:
            yield first, last
