"""Descriptions of shards and ledgers out of the metadata store, with what the shard's owner knows beyond it."""

from __future__ import annotations

import heapq
from collections.abc import AsyncIterator, Iterable
from itertools import islice

from magnetar.broker.shard import ServedShard
from magnetar.metadata import listing
from magnetar.metadata.codec import decode_ledger, decode_repair, decode_shard, encode_ledger
from magnetar.metadata.keyspace import KeyKind, Keyspace
from magnetar.metadata.records import LedgerRecord, LedgerState, RepairSettings, Segment, ShardRecord
from magnetar.metadata.shards import PageNotFound, ShardMetadata, ShardNotFound
from magnetar.metadata.store import KeyValue, MetadataStore
from magnetar.v1 import admin_pb2, metadata_pb2


class Records:
    """Reads of the cluster's records for those who administer it."""

    def __init__(self, store: MetadataStore, keyspace: Keyspace) -> None:
        self._store = store
        self._keyspace = keyspace

    def under(self, prefix: str, after: str = "") -> AsyncIterator[KeyValue]:
        """All keys under the prefix."""
        return listing.items(self._store, prefix, after=after)

    async def repair(self) -> RepairSettings:
        found = await self._store.get(self._keyspace.repair())
        return RepairSettings() if found is None else decode_repair(found.value)

    async def closed_ledgers(self, after: int = 0) -> AsyncIterator[LedgerRecord]:
        start = self._keyspace.ledger(after) if after else ""
        async for item in self.under(self._keyspace.ledgers_prefix(), start):
            yield decode_ledger(item.value)

    async def shards(self) -> AsyncIterator[ShardRecord | LedgerRecord]:
        """Every shard's record, and those of its ledgers that are not CLOSED."""
        async for item in self.under(self._keyspace.shards_prefix()):
            kind, _ = self._keyspace.parse(item.key)
            yield decode_shard(item.value) if kind is KeyKind.SHARD else decode_ledger(item.value)

    async def shard(self, shard_id: int) -> ShardMetadata | None:
        try:
            return await ShardMetadata.load(self._store, self._keyspace, shard_id)
        except ShardNotFound:
            return None

    async def ledgers_of_shard(self, metadata: ShardMetadata) -> list[LedgerRecord]:
        """All ledgers of a shard, in the order of their ids."""
        record = metadata.record
        ids = [segment.ledger_id for segment in await segments(metadata)]
        ids.extend(filter(None, (record.next_ledger, record.cursor_ledger, record.next_cursor)))
        found = {**await metadata.closed_ledgers(ids), **metadata.ledgers}
        return [found[ledger_id] for ledger_id in sorted(found)]

    async def ledgers(self, after: int, limit: int) -> list[tuple[LedgerRecord, str]]:
        """The next ledgers of the cluster, each with its topic ("" = its shard is gone)."""
        topics: dict[int, str] = {}
        open_ledgers = []
        async for record in self.shards():
            if isinstance(record, ShardRecord):
                topics[record.shard_id] = record.topic
            elif record.ledger_id > after:
                open_ledgers.append(record)
        closed = []
        async for ledger in self.closed_ledgers(after):
            closed.append(ledger)
            if len(closed) == limit:
                break
        # One that was closed between the two readings stands in both.
        already = {ledger.ledger_id for ledger in closed}
        still_open = _by_id(ledger for ledger in open_ledgers if ledger.ledger_id not in already)
        merged = heapq.merge(closed, still_open, key=lambda ledger: ledger.ledger_id)
        return [(ledger, topics.get(ledger.shard_id, "")) for ledger in islice(merged, limit)]

    async def ledger(self, ledger_id: int) -> tuple[LedgerRecord, str] | None:
        """A ledger and its topic."""
        found = await self._store.get(self._keyspace.ledger(ledger_id))
        if found is not None:
            ledger = decode_ledger(found.value)
            shard = await self._store.get(self._keyspace.shard(ledger.shard_id))
            return ledger, "" if shard is None else decode_shard(shard.value).topic
        # One that is not closed stands below its shard, whose id is not known.
        topic = ""
        ahead: LedgerRecord | None = None
        async for record in self.shards():
            if isinstance(record, LedgerRecord):
                if record.ledger_id == ledger_id:
                    ahead = record
            elif ahead is not None and ahead.shard_id == record.shard_id:
                topic = record.topic
                break
        return None if ahead is None else (ahead, topic)


async def segments(metadata: ShardMetadata) -> list[Segment]:
    """All segments of a shard, oldest first, those in pages too."""
    record = metadata.record
    found: list[Segment] = []
    for number in range(record.first_page, record.first_page + record.pages):
        try:
            found.extend(await metadata.page(number))
        except PageNotFound:
            continue  # Trimmed meanwhile.
    return [*found, *record.segments]


async def describe_shard(metadata: ShardMetadata, served: ServedShard | None) -> admin_pb2.ShardDescription:
    """`served` is the shard if it is served here: it knows the end of the open segment."""
    record = metadata.record
    if served is not None and served.log.record.epoch != record.epoch:
        served = None  # It was replaced, and does not know it yet.
    chain = await segments(metadata)
    closed = await metadata.closed_ledgers(segment.ledger_id for segment in chain)
    ledgers = {**closed, **metadata.ledgers}
    start_offset = chain[0].first_offset if chain else record.start_offset
    end_offset = chain[-1].end_offset if chain else record.start_offset
    if served is not None:
        start_offset, end_offset = served.log.start_offset, served.log.end_offset
    return admin_pb2.ShardDescription(
        shard_id=record.shard_id,
        first_slot=record.first_slot,
        last_slot=record.last_slot,
        state=record.state.value,  # type: ignore[arg-type]  # same numbers
        parents=record.parents,
        owner="" if record.owner is None else record.owner.broker_id,
        start_offset=start_offset,
        end_offset=end_offset,
        segments=[_segment(segment, ledgers.get(segment.ledger_id), served) for segment in chain],
    )


def is_settled(metadata: ShardMetadata) -> bool:
    """The records tell everything: nothing of it is open, so nobody has appended since they were written."""
    return not metadata.ledgers and metadata.record.owner is None


def _segment(segment: Segment, ledger: LedgerRecord | None, served: ServedShard | None) -> admin_pb2.SegmentDescription:
    messages, size_bytes = segment.messages, segment.bytes
    is_open = ledger is not None and ledger.state is not LedgerState.CLOSED
    if served is not None and is_open:
        messages = max(0, served.log.end_offset - segment.first_offset)
        size_bytes = served.log.backlog_bytes(segment.first_offset)
    return admin_pb2.SegmentDescription(
        ledger_id=segment.ledger_id,
        first_offset=segment.first_offset,
        messages=messages,
        bytes=size_bytes,
        state=LedgerState.CLOSED.value if ledger is None else ledger.state.value,  # type: ignore[arg-type]
        ensemble=() if ledger is None else ledger.fragments[-1].bookies,
    )


def ledger_description(ledger: LedgerRecord, topic: str) -> admin_pb2.LedgerDescription:
    record = metadata_pb2.LedgerRecord.FromString(encode_ledger(ledger))
    return admin_pb2.LedgerDescription(record=record, topic=topic)


def _by_id(ledgers: Iterable[LedgerRecord]) -> list[LedgerRecord]:
    return sorted(ledgers, key=lambda ledger: ledger.ledger_id)
