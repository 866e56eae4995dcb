"""The chain of segments against a plain list, and the decisions about rolling and trimming."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from magnetar.managed_log import chain as chains
from magnetar.managed_log.chain import (
    Chain,
    OpenSegment,
    PageNeeded,
    RollRules,
    RollStep,
    SegmentEnd,
    boundary_before,
    drop_oldest,
    link_segment,
    roll_step,
    segment_bytes_for,
    trimmable_below,
)
from magnetar.metadata.records import Segment, ShardRecord, ShardState

EMPTY = ShardRecord(1, "t/n/x", ShardState.OPEN, 1, None, 0, 65535)
RULES = RollRules(segment_bytes=1000, segment_us=60, link_ahead=0.75)


class Model:
    """A record, its pages, and all segments in one list."""

    def __init__(self) -> None:
        self.record = EMPTY
        self.pages: dict[int, tuple[Segment, ...]] = {}
        self.all: list[Segment] = []

    def add(self, messages: int, time_us: int) -> None:
        segment = Segment(len(self.pages) * 1000 + len(self.all) + 1, self.end, time_us, messages, messages * 10)
        self.record, pages = link_segment(self.record, segment)
        self.pages.update(pages)
        self.all.append(segment)

    @property
    def end(self) -> int:
        return self.all[-1].end_offset if self.all else self.record.start_offset

    def listed(self) -> list[Segment]:
        record = self.record
        paged = [s for n in range(record.first_page, record.first_page + record.pages) for s in self.pages[n]]
        return [*paged, *record.segments]

    def ask(self, chain: Chain, look: str, value: int) -> Segment | None:
        for _ in range(20):
            found: Segment | PageNeeded | None = getattr(chain, look)(value)
            if not isinstance(found, PageNeeded):
                return found
            chain.add_page(found.page, self.pages[found.page])
        raise AssertionError("a search needs few pages")

    def trim(self, chain: Chain, count: int) -> None:
        oldest = chain.oldest()
        if isinstance(oldest, PageNeeded):
            chain.add_page(oldest.page, self.pages[oldest.page])
            oldest = chain.oldest()
            assert not isinstance(oldest, PageNeeded)
        if not oldest:
            return
        page = self.record.first_page if self.record.pages else None
        dropped = drop_oldest(self.record, oldest, min(count, len(oldest)))
        self.record = dropped.record
        self.pages.update(dropped.put_pages)
        for number in dropped.delete_pages:
            del self.pages[number]
        assert list(dropped.segments) == self.all[: len(dropped.segments)]
        del self.all[: len(dropped.segments)]
        chain.update(self.record)
        if page is not None:
            chain.drop_page(page)


@pytest.fixture(autouse=True)
def _small_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chains, "SEGMENTS_PER_PAGE", 4)
    monkeypatch.setattr(chains, "PAGES_CACHED_MAX", 2)


steps = st.lists(st.one_of(st.tuples(st.just("add"), st.integers(1, 9)), st.tuples(st.just("trim"), st.integers(1, 6))))


@given(steps=steps, looks=st.lists(st.integers(0, 400), max_size=20))
def test_every_offset_and_time_is_found_where_a_plain_list_finds_it(
    steps: list[tuple[str, int]], looks: list[int]
) -> None:
    model = Model()
    chain = Chain(model.record)
    for kind, value in steps:
        if kind == "add":
            model.add(value, time_us=100 + 10 * model.end)
            chain.update(model.record)
        else:
            model.trim(chain, value)
        assert model.listed() == model.all
        assert len(model.record.segments) <= 5
        assert model.record.pages == 0 or model.record.segments
    for offset in looks:
        holding = [s for s in model.all if s.first_offset <= offset]
        assert model.ask(chain, "segment_at", offset) == (holding[-1] if holding else None)
        before = [s for s in model.all if s.first_time_us < offset * 10]
        assert model.ask(chain, "segment_before", offset * 10) == (before[-1] if before else None)
    assert chain.start_offset == (model.all[0].first_offset if model.all else model.end)


def test_a_segment_is_closed_with_its_counts_and_the_next_ledger_follows() -> None:
    record, _ = link_segment(replace(EMPTY, next_ledger=8), Segment(7, 100))
    end = SegmentEnd(7, end_offset=130, size_bytes=999, first_time_us=5)
    closed, pages = end.move_on(record)
    assert closed.segments == (Segment(7, 100, 5, 30, 999), Segment(8, 130))
    assert (closed.next_ledger, pages) == (0, ())


def test_a_segment_without_messages_is_unlinked() -> None:
    record, _ = link_segment(EMPTY, Segment(7, 100))
    end = SegmentEnd(7, end_offset=100, size_bytes=0, first_time_us=0)
    assert not end.has_messages(record)
    assert end.close(record).segments == ()


def test_only_closed_segments_below_the_boundary_can_be_trimmed() -> None:
    segments = (Segment(1, 0, 10, 5, 1), Segment(2, 5, 20, 5, 1), Segment(3, 10))
    assert [trimmable_below(segments, boundary) for boundary in (0, 4, 5, 9, 10, 99)] == [0, 0, 1, 1, 2, 2]


def test_without_subscriptions_a_segment_goes_when_its_last_message_is_too_old() -> None:
    segments = (Segment(1, 0, 10, 5, 1), Segment(2, 5, 20, 5, 1))
    assert boundary_before(segments, 20, next_time_us=30) == 0  # segment 1 may hold a message of time 20
    assert boundary_before(segments, 21, next_time_us=30) == 5
    assert boundary_before(segments, 31, next_time_us=30) == 10
    assert boundary_before(segments, 31, next_time_us=0) == 5


def test_bytes_above_an_offset_count_parts_of_segments() -> None:
    record = EMPTY
    for segment in (Segment(1, 0, 10, 10, 100), Segment(2, 10, 20, 10, 300), Segment(3, 20)):
        record, _ = link_segment(record, segment)
    chain = Chain(record)
    assert [chain.bytes_above(o, 50, 30) for o in (0, 5, 10, 20, 25, 30)] == [450, 400, 350, 50, 25, 0]


@pytest.mark.parametrize(
    ("changes", "now_us", "step"),
    [
        ({"size_bytes": 0}, 1000, RollStep.STAY),
        ({"size_bytes": 749}, 0, RollStep.STAY),
        ({"size_bytes": 750}, 0, RollStep.LINK_AHEAD),
        ({"size_bytes": 750, "next_linked": True}, 0, RollStep.STAY),
        ({"size_bytes": 1000}, 0, RollStep.LINK_AHEAD),
        ({"size_bytes": 1000, "next_linked": True}, 0, RollStep.SWITCH),
        ({"size_bytes": 1, "exhausted": True}, 0, RollStep.LINK_AHEAD),
        ({"size_bytes": 1}, 60, RollStep.CLOSE),
        ({"size_bytes": 1, "waiting": True}, 60, RollStep.LINK_AHEAD),
        ({"size_bytes": 1, "next_linked": True}, 60, RollStep.SWITCH),
        ({"size_bytes": 1, "asked": True}, 0, RollStep.CLOSE),
        ({"size_bytes": 0, "asked": True}, 0, RollStep.CLOSE),
        ({"size_bytes": 0, "asked": True, "next_linked": True}, 0, RollStep.SWITCH),
    ],
)
def test_a_segment_ends_when_it_is_full_old_or_wanted(changes: dict[str, Any], now_us: int, step: RollStep) -> None:
    fresh = OpenSegment(size_bytes=0, opened_us=0, next_linked=False, exhausted=False, asked=False, waiting=False)
    assert roll_step(RULES, fresh._replace(**changes), now_us) is step


def test_long_logs_have_larger_segments_within_limits() -> None:
    assert [segment_bytes_for(n, 64) for n in (0, 64 * 256, 100 * 256, 1 << 50)] == [64, 64, 100, 2 << 30]
