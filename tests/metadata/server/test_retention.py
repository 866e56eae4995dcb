"""How much history is kept."""

from __future__ import annotations

from magnetar.metadata.server.retention import COMPACT_REVISIONS_MIN, HISTORY_S, SAMPLE_EVERY_S, Retention


def test_an_hour_is_kept() -> None:
    retention = Retention()
    for i in range(2000):
        target = retention.compact_at(i * SAMPLE_EVERY_S, i * 100, 0, -1)
        hour_ago = i * 100 - int(HISTORY_S / SAMPLE_EVERY_S) * 100
        if hour_ago < COMPACT_REVISIONS_MIN:
            assert target is None
        else:
            assert target is not None
            assert hour_ago - 100 <= target <= hour_ago


def test_many_revisions_are_too_much_before_the_hour_is_over() -> None:
    retention = Retention(revisions_max=1000)
    assert retention.compact_at(0, 1000, 0, -1) is None
    assert retention.compact_at(1, 5000, 0, -1) == 4000


def test_many_bytes_are_too_much_before_the_hour_is_over() -> None:
    retention = Retention(bytes_max=100)
    assert retention.compact_at(0, 1000, 0, -1) is None
    assert retention.compact_at(10, 2000, 80, -1) is None
    assert retention.compact_at(20, 3000, 160, -1) == 1000
    assert retention.compact_at(30, 4000, 500, 1000) == 3000


def test_a_few_revisions_are_not_worth_it() -> None:
    retention = Retention(revisions_max=10)
    assert retention.compact_at(0, 10 + COMPACT_REVISIONS_MIN - 1, 0, 0) is None
    assert retention.compact_at(0, 10 + COMPACT_REVISIONS_MIN, 0, 0) == COMPACT_REVISIONS_MIN


def test_an_idle_store_is_not_compacted_again_and_again() -> None:
    retention = Retention(history_s=10)
    compacted = -1
    targets = []
    for i in range(100):
        target = retention.compact_at(i * SAMPLE_EVERY_S, 5000, 0, compacted)
        if target is not None:
            targets.append(target)
            compacted = target
    assert targets == [5000]
