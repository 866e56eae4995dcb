"""The chain of a shard's segments: where an offset or a time stands, when to roll, what can be trimmed. Pure.

Rules:

1. The segments of a shard follow each other without gap or overlap. Every closed one holds messages; only the last may
   be open, and it may be empty.
2. The record lists the newest segments. When SEGMENTS_PER_PAGE closed ones stand before the last two, they become a
   page, which changes only by trimming. So while there are pages, the record lists a closed segment: it tells the end.
3. The log begins at the record's `start_offset`, the first offset of its oldest segment. Without a segment, this is
   also its end.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from typing import NamedTuple

from magnetar.metadata.records import Segment, ShardRecord

SEGMENTS_PER_PAGE = 256
TRIM_SEGMENTS_MAX = 16
"""Segments unlinked by one transaction."""

PAGES_CACHED_MAX = 8
SEGMENT_BYTES_CEILING = 2 << 30
RETAINED_PARTS = 256
"""A long log is kept in about this many segments."""

Pages = tuple[tuple[int, tuple[Segment, ...]], ...]


@dataclass(frozen=True, slots=True)
class PageNeeded:
    """The answer stands in a page that is not known yet: read it, `add_page` it, ask again."""

    page: int


class Chain:
    """The segments that the record lists, and what was read of its pages.

    open_first_time_us   publish time of the first entry of the last segment while this is open, 0 = it has none
    """

    def __init__(self, record: ShardRecord) -> None:
        self._record = record
        self._pages: OrderedDict[int, tuple[Segment, ...]] = OrderedDict()
        self._page_heads: dict[int, Segment] = {}
        self.open_first_time_us = 0

    def update(self, record: ShardRecord) -> None:
        """The record has changed; pages that it no longer names are forgotten."""
        self._record = record
        for page in [p for p in self._page_heads if not record.first_page <= p < record.first_page + record.pages]:
            del self._page_heads[page]
            self._pages.pop(page, None)

    def add_page(self, page: int, segments: tuple[Segment, ...]) -> None:
        self._page_heads[page] = segments[0]
        self._pages[page] = segments
        self._pages.move_to_end(page)
        if len(self._pages) > PAGES_CACHED_MAX:
            self._pages.popitem(last=False)

    def drop_page(self, page: int) -> None:
        """The page was changed by trimming."""
        self._page_heads.pop(page, None)
        self._pages.pop(page, None)

    @property
    def start_offset(self) -> int:
        return self._record.start_offset

    def segment_at(self, offset: int) -> Segment | PageNeeded | None:
        """The segment in which the offset stands, if it is not beyond the end; None below the start."""
        return self._last_where(lambda segment: segment.first_offset <= offset)

    def segment_before(self, time_us: int) -> Segment | PageNeeded | None:
        """The last segment that begins before the time: what was published since begins in it, or just behind it."""
        return self._last_where(lambda segment: 0 < self.first_time_us(segment) < time_us)

    def oldest(self) -> tuple[Segment, ...] | PageNeeded:
        """The oldest segments: those of the first page, or of the record."""
        record = self._record
        if record.pages == 0:
            return record.segments
        return self._pages.get(record.first_page) or PageNeeded(record.first_page)

    def bytes_above(self, offset: int, open_bytes: int, end_offset: int) -> int:
        """About how many bytes stand at and above the offset; older pages are taken to be like the newest segments."""
        segments = self._record.segments
        above = sum(segment.bytes for segment in segments if segment.first_offset >= offset)
        if segments and segments[-1].messages == 0:
            first = segments[-1].first_offset
            above += open_bytes if offset <= first else _share(open_bytes, offset, first, end_offset)
        for segment in segments:
            if segment.first_offset < offset < segment.end_offset:
                above += _share(segment.bytes, offset, segment.first_offset, segment.end_offset)
        if segments and offset < segments[0].first_offset:
            messages = sum(segment.messages for segment in segments) or 1
            older = segments[0].first_offset - max(offset, self._record.start_offset)
            above += older * sum(segment.bytes for segment in segments) // messages
        return above

    def first_time_us(self, segment: Segment) -> int:
        """Publish time of its first entry, 0 = it has none."""
        if segment.messages == 0 and self._record.segments and segment is self._record.segments[-1]:
            return self.open_first_time_us
        return segment.first_time_us

    def _last_where(self, holds: Callable[[Segment], bool]) -> Segment | PageNeeded | None:
        """The last segment for which the condition holds, where it holds for all before it too."""
        record = self._record
        if record.segments and holds(record.segments[0]):
            return _last_of(record.segments, holds)
        low, high = record.first_page, record.first_page + record.pages
        while low < high:
            middle = (low + high) // 2
            head = self._page_heads.get(middle)
            if head is None:
                return PageNeeded(middle)
            low, high = (middle + 1, high) if holds(head) else (low, middle)
        if low == record.first_page:
            return None
        page = self._pages.get(low - 1)
        return PageNeeded(low - 1) if page is None else _last_of(page, holds)


def _last_of(segments: Sequence[Segment], holds: Callable[[Segment], bool]) -> Segment:
    return segments[bisect_left(segments, True, key=lambda segment: not holds(segment)) - 1]


def _share(size: int, offset: int, first: int, end: int) -> int:
    return size * (end - offset) // max(1, end - first)


# --- changes of the record ---


def link_segment(record: ShardRecord, segment: Segment) -> tuple[ShardRecord, Pages]:
    """The segment becomes the last one. Returns the pages to write with the record."""
    segments = (*record.segments, segment)
    if len(segments) < SEGMENTS_PER_PAGE + 2:
        return replace(record, segments=segments), ()
    page = record.first_page + record.pages
    paged = replace(record, segments=segments[SEGMENTS_PER_PAGE:], pages=record.pages + 1)
    return paged, ((page, segments[:SEGMENTS_PER_PAGE]),)


@dataclass(frozen=True, slots=True)
class SegmentEnd:
    """Where the last segment ends, once its ledger was left for good."""

    ledger_id: int
    end_offset: int
    size_bytes: int
    first_time_us: int

    def close(self, record: ShardRecord) -> ShardRecord:
        """The record with the segment closed; without messages it is unlinked."""
        last = record.segments[-1]
        assert last.ledger_id == self.ledger_id, "only the last segment is open"
        messages = self.end_offset - last.first_offset
        if messages == 0:
            return replace(record, segments=record.segments[:-1])
        closed = replace(last, messages=messages, bytes=self.size_bytes, first_time_us=self.first_time_us)
        return replace(record, segments=(*record.segments[:-1], closed))

    def move_on(self, record: ShardRecord) -> tuple[ShardRecord, Pages]:
        """The same with the next ledger, if there is one, as the last segment."""
        closed = self.close(record)
        if closed.next_ledger == 0:
            return closed, ()
        return link_segment(replace(closed, next_ledger=0), Segment(closed.next_ledger, self.end_offset))

    def has_messages(self, record: ShardRecord) -> bool:
        """Whether the segment, still open in this record, stays linked."""
        return self.end_offset > record.segments[-1].first_offset


@dataclass(frozen=True, slots=True)
class Trimmed:
    """The record without its oldest segments, the pages to write and to delete with it, and what goes."""

    record: ShardRecord
    put_pages: Pages
    delete_pages: tuple[int, ...]
    segments: tuple[Segment, ...]


def drop_oldest(record: ShardRecord, oldest: tuple[Segment, ...], count: int) -> Trimmed:
    """Unlinks the first `count` (at least one) of the `oldest` segments, as Chain.oldest() gave them."""
    gone, left = oldest[:count], oldest[count:]
    start = gone[-1].end_offset
    if record.pages == 0:
        return Trimmed(replace(record, segments=left, start_offset=start), (), (), gone)
    if left:
        return Trimmed(replace(record, start_offset=start), ((record.first_page, left),), (), gone)
    later = replace(record, start_offset=start, first_page=record.first_page + 1, pages=record.pages - 1)
    return Trimmed(later, (), (record.first_page,), gone)


def trimmable_below(oldest: Sequence[Segment], boundary: int) -> int:
    """How many of the oldest segments lie wholly below the offset and are closed."""
    count = 0
    while (
        count < min(len(oldest), TRIM_SEGMENTS_MAX)
        and oldest[count].messages > 0
        and oldest[count].end_offset <= boundary
    ):
        count += 1
    return count


def boundary_before(oldest: Sequence[Segment], keep_from_us: int, next_time_us: int) -> int:
    """The first offset of the first segment that may hold a message published at or after `keep_from_us`.

    `next_time_us` bounds from above when the last of `oldest` was written to; 0 = not known.
    """
    boundary = oldest[0].first_offset if oldest else 0
    for position, segment in enumerate(oldest):
        after = oldest[position + 1].first_time_us if position + 1 < len(oldest) else 0
        until_us = after or next_time_us
        if segment.messages == 0 or until_us == 0 or until_us >= keep_from_us:
            break
        boundary = segment.end_offset
    return boundary


# --- rolling ---


class RollStep(Enum):
    STAY = "stay"
    LINK_AHEAD = "link ahead"
    """Create the next ledger; go on appending to this one."""
    SWITCH = "switch"
    """Leave this ledger for the next one, which is linked."""
    CLOSE = "close"
    """Leave this ledger without a next one."""


@dataclass(frozen=True, slots=True)
class RollRules:
    segment_bytes: int
    segment_us: int
    link_ahead: float


class OpenSegment(NamedTuple):
    """The ledger that is appended to.

    exhausted    it has so many fragments that it has to end
    asked        trimming or a drain wants it closed
    waiting      messages are queued, or in flight
    """

    size_bytes: int
    opened_us: int
    next_linked: bool
    exhausted: bool
    asked: bool
    waiting: bool


def roll_step(rules: RollRules, segment: OpenSegment, now_us: int) -> RollStep:
    """What to do next about the open segment. An empty one is left only if that is asked for, never for its age."""
    full = segment.size_bytes >= rules.segment_bytes or segment.exhausted
    old = now_us - segment.opened_us >= rules.segment_us
    if full or segment.asked or (old and segment.size_bytes > 0):
        if segment.next_linked:
            return RollStep.SWITCH
        return RollStep.LINK_AHEAD if full or segment.waiting else RollStep.CLOSE
    if segment.size_bytes >= rules.segment_bytes * rules.link_ahead and not segment.next_linked:
        return RollStep.LINK_AHEAD
    return RollStep.STAY


def segment_bytes_for(retained_bytes: int, floor_bytes: int) -> int:
    """The size at which segments of a log of this size end: about RETAINED_PARTS of them, within limits."""
    return max(floor_bytes, min(retained_bytes // RETAINED_PARTS, SEGMENT_BYTES_CEILING))
