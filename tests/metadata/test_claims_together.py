"""Claims of many shards in one transaction: all hold, or none; and reading neighbours at once."""

from __future__ import annotations

import random
from typing import Any

import pytest

from magnetar.metadata.codec import encode_broker
from magnetar.metadata.keyspace import Keyspace
from magnetar.metadata.memory import MemoryStore
from magnetar.metadata.records import (
    BrokerRegistration,
    Fragment,
    LedgerPurpose,
    LedgerRecord,
    LedgerState,
    Owner,
    Segment,
    ShardRecord,
    ShardState,
)
from magnetar.metadata.shard_txns import claim_txn, first_together
from magnetar.metadata.shards import ShardChange, ShardMetadata, ShardSnapshot, read_shards, shard_creation_operations
from magnetar.metadata.store import Delete, MetadataUnavailable, Put, RangeResult

SHARDS = range(5, 45)
RNG = random.Random(1)


class World:
    """Shards that were all the dead broker's; `claims` and `reads` count requests."""

    def __init__(self, faulty: Any, keyspace: Keyspace) -> None:
        self.faulty = faulty
        self.store: MemoryStore = faulty.inner
        self.keyspace = keyspace

    async def register(self, broker_id: str) -> Owner:
        put = Put(self.keyspace.broker(broker_id), encode_broker(BrokerRegistration(broker_id, "host:1")))
        return Owner(broker_id, (await self.store.txn([], [put])).revision)

    async def end(self, owner: Owner) -> None:
        await self.store.txn([], [Delete(self.keyspace.broker(owner.broker_id))])

    async def own(self, owner: Owner, shard_id: int, *, ledgers: int = 0) -> ShardMetadata:
        shard = await ShardMetadata.load(self.store, self.keyspace, shard_id, rng=RNG)
        await shard.claim(owner)
        for number in range(ledgers):
            ledger = LedgerRecord(
                ledger_id=100 * shard_id + number,
                shard_id=shard_id,
                purpose=LedgerPurpose.DATA,
                state=LedgerState.OPEN,
                epoch=shard.epoch,
                token=b"t" * 16,
                write_quorum=3,
                ack_quorum=2,
                fragments=(Fragment(0, ("x", "y", "z")),),
            )
            segments = (*shard.record.segments, Segment(ledger.ledger_id, 0))
            record = ShardRecord(**{**_fields(shard.record), "segments": segments})
            await shard.commit(ShardChange(record, put_ledgers=(ledger,)))
        return shard

    async def read(self, *shards: int) -> list[ShardSnapshot]:
        return await read_shards(self.faulty, self.keyspace, shards)

    async def claim(self, session: Owner, snapshots: list[ShardSnapshot]) -> list[ShardMetadata]:
        return await ShardMetadata.claim_together(self.faulty, self.keyspace, snapshots, session, rng=RNG)

    async def owners(self) -> set[Owner | None]:
        return {snapshot.record.owner for snapshot in await read_shards(self.store, self.keyspace, SHARDS)}


def _fields(record: ShardRecord) -> dict[str, Any]:
    return {name: getattr(record, name) for name in record.__dataclass_fields__}


@pytest.fixture
async def world(faulty: Any, keyspace: Keyspace) -> World:
    world = World(faulty, keyspace)
    for shard_id in SHARDS:
        record = ShardRecord(shard_id, "a/b/c", ShardState.OPEN, 0, None, 0, 65535)
        await world.store.txn(*shard_creation_operations(keyspace, record))
    return world


@pytest.fixture
async def dead(world: World) -> Owner:
    dead = await world.register("dead")
    for shard_id in SHARDS:
        await world.own(dead, shard_id)
    return dead


async def test_as_many_shards_as_fit_are_claimed_in_one_request(world: World, dead: Owner) -> None:
    await world.end(dead)
    ann = await world.register("ann")
    snapshots = await world.read(*SHARDS)
    world.faulty.sent = 0
    first = await world.claim(ann, snapshots)
    rest = await world.claim(ann, snapshots[len(first) :])
    assert (len(first), world.faulty.sent) == (33, 2)
    assert [shard.shard_id for shard in [*first, *rest]] == list(SHARDS)
    assert await world.owners() == {ann}
    assert {shard.epoch for shard in first} == {2}
    # Each is as claimed alone: its owner changes it.
    await first[3].renew_session(ann)
    owned = [world.keyspace.parse_owned(i.key) for i in (await world.store.range(world.keyspace.owned_prefix())).items]
    assert owned == [(ann, shard_id) for shard_id in SHARDS]


async def test_shards_of_a_living_broker_are_not_claimed(world: World, dead: Owner) -> None:
    ann = await world.register("ann")
    assert await world.claim(ann, await world.read(*SHARDS)) == []
    assert await world.owners() == {dead}


async def test_if_one_was_changed_since_it_was_read_none_is_claimed(world: World, dead: Owner) -> None:
    await world.end(dead)
    ann, bob = await world.register("ann"), await world.register("bob")
    snapshots = await world.read(*SHARDS)
    await world.own(bob, SHARDS[3])
    assert await world.claim(ann, snapshots) == []
    assert await world.owners() == {dead, bob}
    # The others of it can be had, read again or not.
    assert len(await world.claim(ann, snapshots[:3])) == 3


async def test_ledgers_that_are_open_are_in_recovery_under_the_new_epoch(world: World) -> None:
    dead = await world.register("dead")
    await world.own(dead, 5, ledgers=2)
    await world.own(dead, 6)
    await world.end(dead)
    ann = await world.register("ann")
    snapshots = await world.read(5, 6)
    assert [snapshot.newest_ledger for snapshot in snapshots] == [501, 0]
    busy, idle = await world.claim(ann, snapshots)
    assert {(r.state, r.epoch) for r in busy.ledgers.values()} == {(LedgerState.IN_RECOVERY, 2)}
    assert not idle.ledgers


async def test_a_claim_without_an_answer_excludes_nobody_and_is_excluded_by_the_next(world: World, dead: Owner) -> None:
    await world.end(dead)
    ann = await world.register("ann")
    snapshots = await world.read(*SHARDS[:8])
    world.faulty.faults.append(world.faulty.lose_reply)
    with pytest.raises(MetadataUnavailable):
        await world.claim(ann, snapshots)
    again = await world.read(*SHARDS[:8])
    assert {snapshot.record.owner for snapshot in again} == {ann}
    [alone] = await world.claim(ann, again[:1])
    assert alone.epoch == 3
    # The claims read before that are void, wherever they have been meanwhile.
    assert await world.claim(ann, snapshots) == []
    assert await world.claim(ann, again) == []
    await alone.renew_session(ann)


async def test_neighbours_are_read_at_once_and_what_is_not_there_is_left_out(
    world: World, dead: Owner, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads: list[str] = []
    read = world.store.range

    async def count(prefix: str, *, after: str = "", limit: int = 0) -> RangeResult:
        reads.append(prefix)
        return await read(prefix, after=after, limit=limit)

    monkeypatch.setattr(world.store, "range", count)
    found = await read_shards(world.store, world.keyspace, [44, 300, *SHARDS, 1000])
    assert [snapshot.record.shard_id for snapshot in found] == list(SHARDS)
    assert len(reads) == 5  # 5 to 15, 16 to 31, 32 to 44, and each of two that are not there.


async def test_claims_with_many_ledgers_or_large_records_are_fewer_in_a_transaction(world: World, dead: Owner) -> None:
    [snapshot] = await world.read(SHARDS[0])
    claim = claim_txn(world.keyspace, snapshot, Owner("ann", 1), b"m" * 16, from_owner_alive=True)
    assert first_together([claim] * 100) == 33
    claim.operations += [Put(f"k{number}", b"") for number in range(27)]
    assert first_together([claim] * 100) == 3
    claim.operations[0] = Put("large", b"x" * 400_000)
    assert first_together([claim] * 100) == 1
    claim.operations[0] = Put("large", b"x" * 1_000_000)
    assert first_together([claim] * 100) == 1
