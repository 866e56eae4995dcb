"""Where the entries of a segment begin, as far as they were seen: narrows the search for an offset or time. Pure."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections import OrderedDict
from dataclasses import dataclass

POINTS_MAX = 1024
RECENT_MAX = 64


@dataclass(frozen=True, slots=True)
class Bracket:
    """The entry that is looked for has an id in low..high-1; `found` says that it is `low`."""

    low: int
    high: int

    @property
    def found(self) -> bool:
        return self.high - self.low == 1


class EntryIndex:
    """A bounded number of points (entry id, its first offset, its publish time), all three ascending.

    When they become too many every second one is dropped and later ones must stand further apart. Where sequential
    reads will go on is remembered exactly, for the latest few.
    """

    def __init__(self, first_offset: int) -> None:
        self._ids: list[int] = [0]
        self._offsets: list[int] = [first_offset]
        self._times: list[int] = [0]
        self._stride = 1
        self._recent: OrderedDict[int, int] = OrderedDict()

    def add(self, entry_id: int, first_offset: int, publish_time_us: int) -> None:
        if entry_id % self._stride:
            return
        at = bisect_left(self._ids, entry_id)
        if at < len(self._ids) and self._ids[at] == entry_id:
            self._times[at] = publish_time_us
            return
        self._ids.insert(at, entry_id)
        self._offsets.insert(at, first_offset)
        self._times.insert(at, publish_time_us)
        if len(self._ids) > POINTS_MAX:
            self._thin()

    def will_go_on(self, entry_id: int, offset: int) -> None:
        """A reader has all entries before this one and will ask for the offset at which it begins."""
        self._recent[offset] = entry_id
        self._recent.move_to_end(offset)
        if len(self._recent) > RECENT_MAX:
            self._recent.popitem(last=False)

    def with_offset(self, offset: int, end_entry: int) -> Bracket:
        """Where the last entry stands that begins at or before the offset, among entries 0..end_entry-1."""
        known = self._recent.get(offset)
        if known is not None and known < end_entry:
            return Bracket(known, known + 1)
        at = bisect_right(self._offsets, offset)
        low = self._ids[at - 1]
        if self._offsets[at - 1] == offset:
            return Bracket(low, low + 1)
        return Bracket(low, self._ids[at] if at < len(self._ids) else end_entry)

    def since(self, time_us: int, end_entry: int) -> Bracket:
        """Where the first entry stands that was published at or after the time; `high - 1` = end_entry is "none"."""
        at = bisect_left(self._times, time_us)
        low = self._ids[at - 1] if at else 0
        return Bracket(low, (self._ids[at] if at < len(self._ids) else end_entry) + 1)

    def _thin(self) -> None:
        self._stride *= 2
        kept = [at for at, entry_id in enumerate(self._ids) if entry_id % self._stride == 0]
        self._ids = [self._ids[at] for at in kept]
        self._offsets = [self._offsets[at] for at in kept]
        self._times = [self._times[at] for at in kept]
