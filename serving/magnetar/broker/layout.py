"""How a topic's slots are divided into shards, and which broker should serve one. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import pairwise

from magnetar.metadata.records import LayoutShard, ShardRecord, ShardState, TopicRecord
from magnetar.wire.slots import SLOTS

SHARDS_MAX = 64
"""Of a new topic: its record and its shards' stand in one transaction."""


def even_ranges(count: int) -> list[tuple[int, int]]:
    """`count` contiguous slot ranges (first, last), inclusive, that cover all slots and differ by one slot at most."""
    bounds = [SLOTS * i // count for i in range(count + 1)]
    return [(first, end - 1) for first, end in pairwise(bounds)]


def new_topic(topic: str, shard_ids: Sequence[int], now_us: int) -> tuple[TopicRecord, tuple[ShardRecord, ...]]:
    """The records of a new topic with one shard an id, nobody's yet."""
    ranges = even_ranges(len(shard_ids))
    layout = tuple(
        LayoutShard(shard_id, first, last, ShardState.OPEN)
        for shard_id, (first, last) in zip(shard_ids, ranges, strict=True)
    )
    records = tuple(
        ShardRecord(s.shard_id, topic, s.state, 0, None, s.first_slot, s.last_slot, created_us=now_us) for s in layout
    )
    return TopicRecord(topic, 1, layout, created_us=now_us), records


def deleting(record: TopicRecord) -> TopicRecord:
    """The record that marks a topic as going: nothing of it is served from then on."""
    shards = tuple(replace(shard, state=ShardState.DELETING) for shard in record.shards)
    return replace(record, layout_epoch=record.layout_epoch + 1, shards=shards, deleting=True)


def shard_of(record: TopicRecord, shard_id: int) -> LayoutShard | None:
    return next((shard for shard in record.shards if shard.shard_id == shard_id), None)


def preferred_broker(shard_id: int, brokers: Iterable[str]) -> str | None:
    """The broker whose turn the shard's id is, by name: a hint that needs no agreement. None without brokers.

    Ids follow each other, so brokers get equally many of the shards that come one after another; and the shards of one
    that goes are spread over the others as evenly, since n and n - 1 have no common divisor.
    """
    ordered = sorted(brokers)
    return ordered[shard_id % len(ordered)] if ordered else None
