"""Deleting a shard by its records alone: bookies drop the ledgers when they see them gone.

Nothing is recovered or read, so it works whatever became of the ledgers. Each step is one transaction that unlinks some
ledgers and deletes them; a crash between two leaves a smaller shard, which its next owner goes on to delete.
"""

from __future__ import annotations

from dataclasses import replace

from magnetar.managed_log.chain import TRIM_SEGMENTS_MAX, drop_oldest
from magnetar.metadata.records import LedgerRecord, Segment, ShardRecord, ShardState
from magnetar.metadata.shards import ShardChange, ShardMetadata
from magnetar.metadata.store import OPERATIONS_MAX

OPERATIONS_BESIDE = 4
"""Of a transaction that deletes ledgers: the shard record, a page, and room."""


def fitting(ledgers: list[LedgerRecord]) -> int:
    """How many of them one transaction can delete: each costs its record and an index key for each bookie with a role,
    the target of a copy that is claimed meanwhile included."""
    room = OPERATIONS_MAX - OPERATIONS_BESIDE
    for position, ledger in enumerate(ledgers):
        room -= 2 + len(ledger.bookies())
        if room < 0:
            return max(position, 1)
    return len(ledgers)


async def delete_shard(metadata: ShardMetadata) -> None:
    """Deletes a claimed shard and all of its ledgers, also if an earlier attempt was cut off.

    Raises OwnershipLost, MetadataUnavailable (try again).
    """
    if metadata.record.state is not ShardState.DELETING:
        await metadata.update(lambda: ShardChange(replace(metadata.record, state=ShardState.DELETING)))
    while metadata.record.pages or metadata.record.segments:
        await _delete_oldest(metadata)
    record = metadata.record
    await _delete_linked(metadata, record.next_ledger, replace(record, next_ledger=0))
    await _delete_linked(metadata, record.next_cursor, replace(record, next_ledger=0, next_cursor=0))
    await _delete_linked(metadata, record.cursor_ledger, replace(record, next_ledger=0, next_cursor=0, cursor_ledger=0))
    left = tuple(metadata.ledgers.values())
    await metadata.update(lambda: ShardChange(metadata.record, delete_ledgers=left, delete_shard=True))


async def _delete_oldest(metadata: ShardMetadata) -> None:
    record = metadata.record
    oldest = await metadata.page(record.first_page) if record.pages else record.segments
    ledgers = await _ledgers_of(metadata, oldest[:TRIM_SEGMENTS_MAX])
    count = fitting(ledgers)
    dropped = drop_oldest(record, oldest, count)
    await metadata.update(
        lambda: ShardChange(
            replace(dropped.record, owner=metadata.record.owner),
            delete_ledgers=tuple(ledgers[:count]),
            put_pages=dropped.put_pages,
            delete_pages=dropped.delete_pages,
        )
    )


async def _ledgers_of(metadata: ShardMetadata, segments: tuple[Segment, ...]) -> list[LedgerRecord]:
    closed = await metadata.closed_ledgers([s.ledger_id for s in segments if s.ledger_id not in metadata.ledgers])
    known = {**closed, **metadata.ledgers}
    return [known[segment.ledger_id] for segment in segments]


async def _delete_linked(metadata: ShardMetadata, ledger_id: int, unlinked: ShardRecord) -> None:
    if ledger_id == 0:
        return
    found = metadata.ledgers.get(ledger_id) or await metadata.closed_ledger(ledger_id)
    gone = () if found is None else (found,)
    await metadata.update(lambda: ShardChange(replace(unlinked, owner=metadata.record.owner), delete_ledgers=gone))
