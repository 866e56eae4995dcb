"""Slots divided into shards, and the preferred broker of a shard."""

from __future__ import annotations

from collections import Counter

import pytest

from magnetar.broker.layout import SHARDS_MAX, deleting, even_ranges, new_topic, preferred_broker, shard_of
from magnetar.metadata.records import ShardState
from magnetar.wire.slots import SLOTS


@pytest.mark.parametrize("count", [1, 2, 3, 7, SHARDS_MAX])
def test_ranges_cover_every_slot_once_and_are_even(count: int) -> None:
    ranges = even_ranges(count)
    assert [slot for first, last in ranges for slot in (first, last + 1)][1:-1] == [
        bound for first, _ in ranges[1:] for bound in (first, first)
    ]
    assert (ranges[0][0], ranges[-1][1]) == (0, SLOTS - 1)
    sizes = {last - first + 1 for first, last in ranges}
    assert max(sizes) - min(sizes) <= 1


def test_a_new_topic_and_its_shards_say_the_same() -> None:
    record, shards = new_topic("a/b/c", [7, 9], 5)
    assert [(s.shard_id, s.first_slot, s.last_slot) for s in record.shards] == [(7, 0, 32767), (9, 32768, 65535)]
    assert [(s.shard_id, s.first_slot, s.last_slot, s.owner, s.epoch, s.topic) for s in shards] == [
        (7, 0, 32767, None, 0, "a/b/c"),
        (9, 32768, 65535, None, 0, "a/b/c"),
    ]
    assert shard_of(record, 9) == record.shards[1]
    assert shard_of(record, 8) is None


def test_a_topic_marked_as_going_has_a_new_layout_epoch() -> None:
    record, _ = new_topic("a/b/c", [7], 5)
    going = deleting(record)
    assert (going.deleting, going.layout_epoch, going.shards[0].state) == (True, 2, ShardState.DELETING)


def test_brokers_take_turns_and_those_that_stay_share_what_one_leaves_evenly() -> None:
    brokers = ["c", "a", "b"]
    before = {shard: preferred_broker(shard, brokers) for shard in range(1, 13)}
    assert Counter(before.values()) == {"a": 4, "b": 4, "c": 4}
    left = [shard for shard in before if before[shard] == "b"]
    assert Counter(preferred_broker(shard, {"a", "c"}) for shard in left) == {"a": 2, "c": 2}
    assert preferred_broker(1, []) is None
