"""Messages that were handed out and came back: which ones, and how often each was delivered. Pure.

Counts are bit-sliced: plane p holds bit p of every offset's count, so that counting a whole batch costs a few
operations on bitmaps. A count is kept from the first return of a message until it is acknowledged; both are bounded
by what a subscription may have unacknowledged, since only delivered messages return.
"""

from __future__ import annotations

from magnetar.broker.offset_set import OffsetSet, indices

PLANES_MAX = 16
DELIVERIES_MAX = (1 << PLANES_MAX) - 1
"""Counts stop here."""


class DeliveryCounts:
    """How many times each offset was delivered before, for those that came back."""

    __slots__ = ("_planes",)

    def __init__(self) -> None:
        self._planes: list[OffsetSet] = []

    def __bool__(self) -> bool:
        return any(self._planes)

    def __getitem__(self, offset: int) -> int:
        return sum(1 << p for p, plane in enumerate(self._planes) if offset in plane)

    def increment(self, start: int, bits: int) -> None:
        """One delivery more for each of these; at DELIVERIES_MAX a count stays."""
        carry = bits & ~self._saturated(start, bits)
        for plane in self._planes:
            if not carry:
                return
            carried = plane.remove(start, carry)
            plane.add(start, carry ^ carried)
            carry = carried
        if carry:
            self._planes.append(OffsetSet())
            self._planes[-1].add(start, carry)

    def forget(self, start: int, end: int) -> None:
        """start <= offset < end are acknowledged."""
        for plane in self._planes:
            plane.remove_range(start, end)
        self._drop_empty_planes()

    def forget_bits(self, start: int, bits: int) -> None:
        for plane in self._planes:
            plane.remove(start, bits)
        self._drop_empty_planes()

    def pairs(self, start: int, bits: int) -> tuple[int, ...]:
        """Index, count, index, count... of those of these messages that were delivered before."""
        if not self._planes:
            return ()
        width = bits.bit_length()
        found: dict[int, int] = {}
        for p, plane in enumerate(self._planes):
            for index in indices(plane.window(start, width) & bits):
                found[index] = found.get(index, 0) | 1 << p
        return tuple(number for index in sorted(found) for number in (index, found[index]))

    def clear(self) -> None:
        self._planes.clear()

    def _drop_empty_planes(self) -> None:
        while self._planes and not self._planes[-1]:
            self._planes.pop()

    def _saturated(self, start: int, bits: int) -> int:
        if len(self._planes) < PLANES_MAX:
            return 0
        width = bits.bit_length()
        for plane in self._planes:
            bits &= plane.window(start, width)
            if not bits:
                break
        return bits


class Returned:
    """Offsets to deliver again, lowest first, and the counts of all that came back at least once."""

    __slots__ = ("counts", "waiting")

    def __init__(self) -> None:
        self.waiting = OffsetSet()
        self.counts = DeliveryCounts()

    def put(self, start: int, bits: int) -> None:
        """These were delivered and are to be delivered again."""
        self.waiting.add(start, bits)
        self.counts.increment(start, bits)

    def clear(self) -> None:
        self.waiting.clear()
        self.counts.clear()
