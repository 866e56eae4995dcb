"""The collector: deletes ledgers whose records name this bookie no more, and gets their space back.

Steps of a pass:

1. List the local ledgers. A ledger's record stands before its first entry is sent, so every one of these had a record.
2. List the ledgers in which this bookie has a role, from its index. Incomplete or unreadable: give the pass up.
3. What is local and not in the index is a candidate. If there are any, list all ledger records, those under the
   shards before the closed ones (a closing ledger moves that way), and keep the candidates without a role here. A
   ledger that is not CLOSED is never one: a recovery may write to a spare that only the closing record will name.
4. For each candidate: refuse every add to it, read again its index key and every place its record can stand, delete it
   only if none names this bookie, accept adds again. Without the refusal: the collector reads the record, a copy to
   this bookie is claimed and half written, the collector deletes, the copy completes with a hole.
5. Compact the deleted ranges. Forget tombstones that are old enough.

Space: what is deleted among live entries is garbage in files that live on. Above a share of garbage, or on a filling
disk, the oldest quarter of the files is rewritten, slowly.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import structlog

from magnetar.bookie.disk import DiskUsage
from magnetar.bookie.entry_store import EntryStore, LedgerMark, StoreDamaged
from magnetar.bookie.group_commit import GroupCommit
from magnetar.bookie.judge import Done, Forget, Remove
from magnetar.bookie.metrics import BookieMetrics
from magnetar.metadata import listing
from magnetar.metadata.codec import DamagedRecord, decode_ledger
from magnetar.metadata.keyspace import KeyKind, Keyspace, UnknownKey
from magnetar.metadata.store import KeyValue, MetadataStore, MetadataUnavailable

TOMBSTONE_US = 7 * 24 * 3600 * 1_000_000
DELETIONS_PER_PASS_MAX = 10_000
GARBAGE_SHARE_MAX = 0.35
GARBAGE_SHARE_MIN = 0.05
"""On a filling disk: below it rewriting costs more than it frees."""
DISK_PRESSURE_AT = 0.80
REWRITE_BYTES_PER_S = 32 << 20

log = structlog.get_logger("magnetar.bookie")


@dataclass(frozen=True, slots=True)
class Pass:
    """What a pass did."""

    deleted: tuple[int, ...] = ()
    forgotten: tuple[int, ...] = ()
    aborted: str = ""


class Collector:
    """`collecting` is what the group commit refuses adds to; this class alone changes it."""

    def __init__(
        self,
        bookie_id: str,
        entries: EntryStore,
        commits: GroupCommit,
        metadata: MetadataStore,
        keyspace: Keyspace,
        metrics: BookieMetrics,
        now_us: Callable[[], int],
    ) -> None:
        self.collecting: set[int] = set()
        self._bookie_id = bookie_id
        self._entries = entries
        self._commits = commits
        self._metadata = metadata
        self._keyspace = keyspace
        self._metrics = metrics
        self._now_us = now_us

    async def collect(self) -> Pass:
        """One pass. What goes wrong in it deletes nothing."""
        try:
            local = await self._entries.marks()
            forgotten = await self._forget(local)
            candidates = [i for i, mark in local if mark.stored or not mark.deleted_us]
            places = await self._unnamed(candidates)
        except (MetadataUnavailable, StoreDamaged, DamagedRecord, UnknownKey) as reason:
            self._metrics.aborted.inc()
            log.warning("collection aborted", bookie=self._bookie_id, reason=str(reason))
            return Pass(aborted=str(reason) or type(reason).__name__)
        deleted = [ledger_id for ledger_id, shard_id in places if await self._delete(ledger_id, shard_id)]
        if deleted:
            self._metrics.collected.inc(len(deleted))
            log.info("ledgers deleted", bookie=self._bookie_id, ledgers=len(deleted), first=deleted[0])
            await self._entries.reclaim(deleted)
        return Pass(tuple(deleted), forgotten)

    async def recover_space(self, disk: DiskUsage) -> bool:
        """Rewrites a quarter of the files if there is enough garbage and room. Returns whether it did."""
        usage = self._entries.usage()
        if not usage.stored_bytes or disk.free_bytes < usage.stored_bytes // 4:
            return False
        share = usage.garbage_bytes / usage.stored_bytes
        if share <= (GARBAGE_SHARE_MIN if disk.used_share >= DISK_PRESSURE_AT else GARBAGE_SHARE_MAX):
            return False
        log.info("rewriting files with garbage", bookie=self._bookie_id, garbage_share=round(share, 3))
        await self._entries.rewrite_oldest(REWRITE_BYTES_PER_S)
        return True

    async def _unnamed(self, local: Iterable[int]) -> list[tuple[int, int]]:
        """(ledger, its shard or 0) of those that, as listed, give this bookie no role."""
        indexed = {
            self._keyspace.parse_index(item.key)[1]
            async for item in listing.items(self._metadata, self._index_prefix())
        }
        candidates = [ledger_id for ledger_id in local if ledger_id not in indexed]
        if not candidates:
            return []
        shards: dict[int, int] = {}
        named: set[int] = set()
        for prefix in (self._keyspace.shards_prefix(), self._keyspace.ledgers_prefix()):
            async for item in listing.items(self._metadata, prefix):
                kind, values = self._keyspace.parse(item.key)
                if kind is KeyKind.SHARD_LEDGER:
                    shards[int(values[1])] = int(values[0])
                    named.add(int(values[1]))
                elif kind is KeyKind.LEDGER and self._names_me(item):
                    named.add(int(values[-1]))
        found = [(ledger_id, shards.get(ledger_id, 0)) for ledger_id in candidates if ledger_id not in named]
        return found[:DELETIONS_PER_PASS_MAX]

    def _index_prefix(self) -> str:
        return self._keyspace.index_prefix(self._bookie_id)

    def _names_me(self, item: KeyValue) -> bool:
        return self._bookie_id in decode_ledger(item.value).roles()

    async def _delete(self, ledger_id: int, shard_id: int) -> bool:
        self.collecting.add(ledger_id)
        removal: asyncio.Future[Done] | None = None
        try:
            if await self._has_role(ledger_id, shard_id):
                return False
            removal = self._commits.control(Remove(ledger_id, self._now_us()))
            # Whoever gives up waiting leaves the ledger closed to adds until its removal is judged.
            removal.add_done_callback(lambda _: self.collecting.discard(ledger_id))
            return not (await asyncio.shield(removal)).refusal
        except (MetadataUnavailable, DamagedRecord) as reason:
            log.warning("ledger not deleted", bookie=self._bookie_id, ledger=ledger_id, reason=str(reason))
            return False
        finally:
            if removal is None:
                self.collecting.discard(ledger_id)

    async def _has_role(self, ledger_id: int, shard_id: int) -> bool:
        """The index key is written in the txn that gives the role; the records are looked at in case it was not."""
        if await self._metadata.get(self._keyspace.index(self._bookie_id, ledger_id)) is not None:
            return True
        if shard_id and await self._metadata.get(self._keyspace.shard_ledger(shard_id, ledger_id)) is not None:
            return True
        closed = await self._metadata.get(self._keyspace.ledger(ledger_id))
        return closed is not None and self._names_me(closed)

    async def _forget(self, local: Iterable[tuple[int, LedgerMark]]) -> tuple[int, ...]:
        """A stale writer must find the tombstone for longer than it can live."""
        horizon_us = self._now_us() - TOMBSTONE_US
        old = [i for i, mark in local if not mark.stored and 0 < mark.deleted_us < horizon_us]
        forgotten: list[int] = []
        for ledger_id in old[:DELETIONS_PER_PASS_MAX]:
            if not (await self._commits.control(Forget(ledger_id))).refusal:
                forgotten.append(ledger_id)
        return tuple(forgotten)
