"""Moves copies of closed ledgers between bookies, by the protocol that repair keeps: it gives the collector work.

1. Claim: put the target's index key in a transaction that compares and rewrites the ledger's record. From then on the
   collector of the target finds a role there.
2. Copy every entry of the fragments with recovery adds.
3. Switch: the record names the target in the source's place; the source's index key goes. If the record changed since
   the claim, the claim is dropped instead.
"""

from __future__ import annotations

import asyncio
import random
from dataclasses import replace

from simulation.bookies import SimulatedBookie
from simulation.loop import Process
from simulation.metadata import SimulatedMetadata
from simulation.world import World

from magnetar.ledger.bookie_rpc import AddGroup, AddStatus, ReadGroup
from magnetar.metadata.codec import decode_ledger, encode_ledger
from magnetar.metadata.records import Fragment, LedgerPurpose, LedgerRecord
from magnetar.metadata.store import Delete, KeyValue, MetadataUnavailable, Put, absent, unchanged

PAUSE_S = 0.1
ATTEMPTS = 4
MOVED_BACK = 0.7
"""Share of the moves to a bookie that has just been left, where a collector may be about to delete the old copy."""


class Repair:
    """One mover, which works until it is stopped, and leaves no claim behind."""

    def __init__(self, world: World, shards: set[int], seed: int) -> None:
        self._world = world
        self._shards = shards
        """Those whose ledgers are never deleted."""
        self._rng = random.Random(f"repair {seed}")
        self._stopping = False
        process = Process("repair")
        self._metadata = SimulatedMetadata(world.metadata, process)
        self._bookies = {
            name: SimulatedBookie(world.network, process, name, world.reachable) for name in world.bookies()
        }
        self.task = world.spawn(process, self._run(), "repair")
        self.moved = 0
        self._left: dict[int, str] = {}
        """Ledger -> the bookie that its last move left."""

    async def stop(self) -> None:
        self._stopping = True
        await self.task

    async def _run(self) -> None:
        while not self._stopping:
            await asyncio.sleep(self._rng.expovariate(1 / PAUSE_S))
            try:
                await self._move_one()
            except MetadataUnavailable:
                continue

    async def _move_one(self) -> None:
        keyspace = self._world.keyspace
        found = (await self._metadata.range(keyspace.ledgers_prefix())).items
        records = [(item, record) for item in found if (record := decode_ledger(item.value)).shard_id in self._shards]
        records = [(item, record) for item, record in records if record.purpose is LedgerPurpose.DATA]
        if not records:
            return
        item, record = self._rng.choice(records)
        targets = [name for name in self._world.bookies() if name not in record.bookies()]
        if not targets:
            return
        source, target = self._rng.choice(sorted(record.bookies())), self._rng.choice(targets)
        if self._left.get(record.ledger_id) in targets and self._rng.random() < MOVED_BACK:
            target = self._left[record.ledger_id]
        claim = await self._claim(item, target, record.ledger_id)
        if claim:
            copied = await self._copy(record, source, target)
            await self._settle(claim, record, source, target, copied)

    async def _claim(self, item: KeyValue, target: str, ledger_id: int) -> int:
        """The record's revision under the claim; 0 without one."""
        index = self._world.keyspace.index(target, ledger_id)
        compares = [unchanged(item.key, item.mod_revision), absent(index)]
        try:
            result = await self._metadata.txn(compares, [Put(item.key, item.value), Put(index, b"")])
        except MetadataUnavailable:
            await self._drop(ledger_id, target)
            return 0
        return result.revision if result.succeeded else 0

    async def _copy(self, record: LedgerRecord, source: str, target: str) -> bool:
        ends = [fragment.first_entry for fragment in record.fragments[1:]] + [record.last_entry + 1]
        for fragment, end in zip(record.fragments, ends, strict=True):
            if source in fragment.bookies:
                others = [name for name in fragment.bookies if name in self._bookies]
                for entry_id in range(fragment.first_entry, end):
                    if not await self._copy_entry(record, entry_id, others, target):
                        return False
        return True

    async def _copy_entry(self, record: LedgerRecord, entry_id: int, sources: list[str], target: str) -> bool:
        for attempt in range(ATTEMPTS):
            read = ReadGroup(record.ledger_id, record.epoch, record.token, entry_id, entry_id)
            answer = (await self._bookies[sources[attempt % len(sources)]].read(read)).answers[0]
            if answer.entry is not None:
                group = AddGroup(record.ledger_id, record.epoch, record.token, (answer.entry,), recovery=True)
                if (await self._bookies[target].add(group)).status is AddStatus.OK:
                    return True
        return False

    async def _settle(self, claim: int, record: LedgerRecord, source: str, target: str, copied: bool) -> None:
        """Switches, or drops the claim; waits for a store that is silent."""
        keyspace = self._world.keyspace
        key = keyspace.ledger(record.ledger_id)
        moved = replace(
            record,
            fragments=tuple(
                Fragment(f.first_entry, tuple(target if name == source else name for name in f.bookies))
                for f in record.fragments
            ),
        )
        if copied:
            operations = [Put(key, encode_ledger(moved)), Delete(keyspace.index(source, record.ledger_id))]
            try:
                result = await self._metadata.txn([unchanged(key, claim)], operations)
                if result.succeeded:
                    self.moved += 1
                    self._left[record.ledger_id] = source
                    return
            except MetadataUnavailable:
                pass
        await self._drop(record.ledger_id, target)

    async def _drop(self, ledger_id: int, target: str) -> None:
        """Removes the claim unless the record names the target."""
        keyspace = self._world.keyspace
        key, index = keyspace.ledger(ledger_id), keyspace.index(target, ledger_id)
        while True:
            try:
                found = await self._metadata.get(key)
                if found is None or target in decode_ledger(found.value).bookies():
                    return
                operations = [Put(key, found.value), Delete(index)]
                if (await self._metadata.txn([unchanged(key, found.mod_revision)], operations)).succeeded:
                    return
            except MetadataUnavailable:
                pass
            await asyncio.sleep(PAUSE_S)
