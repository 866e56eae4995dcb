"""Ownership of shards: every way in which a claim and a change can meet silence and each other."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any

import pytest

from magnetar.metadata.codec import decode_copy, decode_ledger, decode_shard, encode_broker, encode_ledger
from magnetar.metadata.keyspace import Keyspace
from magnetar.metadata.memory import MemoryStore
from magnetar.metadata.records import (
    BrokerRegistration,
    CopyClaim,
    CopyReason,
    CopyTask,
    Fragment,
    LedgerPurpose,
    LedgerRecord,
    LedgerState,
    Owner,
    Segment,
    ShardRecord,
    ShardState,
)
from magnetar.metadata.shards import (
    ClaimLost,
    OutcomeUnknown,
    OwnershipLost,
    PageNotFound,
    SessionEnded,
    ShardChange,
    ShardMetadata,
    ShardNotFound,
    StaleChange,
    shard_creation_operations,
)
from magnetar.metadata.store import Delete, MetadataUnavailable, Operation, Put, unchanged

SHARD = 7
Sleep = Callable[[float], Awaitable[None]]


def ledger(ledger_id: int, state: LedgerState = LedgerState.OPEN, bookies: str = "xyz", epoch: int = 1) -> LedgerRecord:
    return LedgerRecord(
        ledger_id=ledger_id,
        shard_id=SHARD,
        purpose=LedgerPurpose.DATA,
        state=state,
        epoch=epoch,
        token=b"t" * 16,
        write_quorum=3,
        ack_quorum=2,
        fragments=(Fragment(0, tuple(bookies)),),
    )


def closed(record: LedgerRecord) -> LedgerRecord:
    return replace(record, state=LedgerState.CLOSED, last_entry=9, length=99)


class World:
    """A cluster with one shard, some brokers, and a faulty way to its store."""

    def __init__(self, faulty: Any, keyspace: Keyspace, sleep: Sleep, pauses: list[float]) -> None:
        self.faulty = faulty
        self.store: MemoryStore = faulty.inner
        self.keyspace = keyspace
        self.sleep = sleep
        self.pauses = pauses

    async def register(self, broker_id: str) -> Owner:
        value = encode_broker(BrokerRegistration(broker_id, "host:1"))
        key = self.keyspace.broker(broker_id)
        await self.store.txn([], [Delete(key)])
        return Owner(broker_id, (await self.store.txn([], [Put(key, value)])).revision)

    async def die(self, owner: Owner) -> None:
        await self.store.txn([], [Delete(self.keyspace.broker(owner.broker_id))])

    async def create(self) -> None:
        record = ShardRecord(SHARD, "a/b/c", ShardState.OPEN, 0, None, 0, 65535)
        assert (await self.store.txn(*shard_creation_operations(self.keyspace, record))).succeeded

    async def load(self, *, faulty: bool = True) -> ShardMetadata:
        store = self.faulty if faulty else self.store
        return await ShardMetadata.load(store, self.keyspace, SHARD, rng=random.Random(1), sleep=self.sleep)

    async def owned(self, owner: Owner, *ledgers: LedgerRecord) -> ShardMetadata:
        """The shard, owned by `owner`, with these ledgers; nothing has failed yet."""
        shard = await self.load(faulty=False)
        await shard.claim(owner)
        if ledgers:
            await shard.commit(ShardChange(with_segments(shard.record, ledgers), put_ledgers=ledgers))
        shard._store = self.faulty
        self.faulty.sent = self.faulty.applied = 0
        return shard

    async def stored(self) -> ShardRecord:
        found = await self.store.get(self.keyspace.shard(SHARD))
        assert found is not None
        return decode_shard(found.value)

    async def stored_ledgers(self) -> dict[int, LedgerRecord]:
        prefix = self.keyspace.shard_prefix(SHARD) + "ledgers/"
        return {r.ledger_id: r for r in (decode_ledger(i.value) for i in (await self.store.range(prefix)).items)}

    async def owned_keys(self) -> list[tuple[Owner, int]]:
        prefix = self.keyspace.owned_prefix()
        return [self.keyspace.parse_owned(item.key) for item in (await self.store.range(prefix)).items]

    async def index(self) -> set[tuple[str, int]]:
        prefix = self.keyspace.index_prefix()
        return {self.keyspace.parse_index(item.key) for item in (await self.store.range(prefix)).items}


def with_segments(record: ShardRecord, ledgers: tuple[LedgerRecord, ...]) -> ShardRecord:
    return replace(record, segments=record.segments + tuple(Segment(one.ledger_id, 0) for one in ledgers))


def ensemble_change(shard: ShardMetadata, ledger_id: int, bookies: str) -> ShardChange:
    old = shard.ledgers[ledger_id]
    fragments = (*old.fragments, Fragment(len(old.fragments) * 10, tuple(bookies)))
    return ShardChange(shard.record, put_ledgers=(replace(old, fragments=fragments),))


def roll(shard: ShardMetadata, old: int, new: int) -> ShardChange:
    """Closes `old` and opens `new`."""
    record = with_segments(shard.record, (ledger(new, epoch=shard.epoch),))
    return ShardChange(record, put_ledgers=(closed(shard.ledgers[old]), ledger(new, epoch=shard.epoch)))


@pytest.fixture
async def world(faulty: Any, keyspace: Keyspace, sleep: Sleep, pauses: list[float]) -> World:
    world = World(faulty, keyspace, sleep, pauses)
    await world.create()
    return world


@pytest.fixture
async def ann(world: World) -> Owner:
    return await world.register("ann")


@pytest.fixture
async def bob(world: World) -> Owner:
    return await world.register("bob")


# Claiming, without faults.


async def test_a_claim_raises_the_epoch_and_puts_open_ledgers_into_recovery(
    world: World, ann: Owner, bob: Owner
) -> None:
    await world.owned(ann, ledger(1), ledger(2, LedgerState.IN_RECOVERY))
    await world.die(ann)
    shard = await world.load()
    await shard.claim(bob)
    assert shard.session == bob
    assert (shard.record.epoch, shard.record.owner) == (2, bob)
    assert {(i, r.state, r.epoch) for i, r in shard.ledgers.items()} == {
        (1, LedgerState.IN_RECOVERY, 2),
        (2, LedgerState.IN_RECOVERY, 2),
    }
    assert await world.stored() == shard.record
    assert await world.stored_ledgers() == dict(shard.ledgers)
    assert await world.owned_keys() == [(bob, SHARD)]


async def test_a_shard_with_a_living_owner_cannot_be_claimed(world: World, ann: Owner, bob: Owner) -> None:
    await world.owned(ann, ledger(1))
    before = await world.stored()
    with pytest.raises(ClaimLost) as raised:
        await (await world.load()).claim(bob)
    assert raised.value.owner == ann
    assert await world.stored() == before


async def test_a_living_owner_can_hand_its_shard_over(world: World, ann: Owner, bob: Owner) -> None:
    old = await world.owned(ann, ledger(1))
    new = await world.load()
    await new.claim(bob, from_owner_alive=True)
    assert await world.owned_keys() == [(bob, SHARD)]
    with pytest.raises(OwnershipLost) as raised:
        await old.commit(ensemble_change(old, 1, "xyw"))
    assert (raised.value.owner, raised.value.epoch) == (bob, 2)


async def test_an_owner_of_an_ended_session_with_the_same_broker_id_is_no_obstacle(world: World, ann: Owner) -> None:
    await world.owned(ann)
    again = await world.register("ann")
    shard = await world.load()
    await shard.claim(again)
    assert await world.owned_keys() == [(again, SHARD)]


async def test_a_claim_by_the_recorded_owner_starts_a_new_epoch(world: World, ann: Owner) -> None:
    await world.owned(ann)
    shard = await world.load()
    await shard.claim(ann)
    assert shard.epoch == 2
    await shard.claim(ann)
    assert shard.epoch == 2


async def test_a_claimer_without_a_session_claims_nothing(world: World, ann: Owner) -> None:
    await world.die(ann)
    with pytest.raises(SessionEnded):
        await (await world.load()).claim(ann)
    assert (await world.stored()).owner is None


async def test_a_shard_that_is_not_there_is_not_found(world: World, ann: Owner) -> None:
    shard = await world.load()
    await world.store.txn([], [Delete(world.keyspace.shard(SHARD))])
    with pytest.raises(ShardNotFound):
        await shard.claim(ann)
    with pytest.raises(ShardNotFound):
        await world.load()


# Claiming: silence and rivals.


@pytest.mark.parametrize("silent_reads", [0, 3])
async def test_a_claim_whose_reply_is_lost_is_recognised(world: World, ann: Owner, silent_reads: int) -> None:
    shard = await world.load()
    unknown: list[None] = []

    async def fall_silent() -> None:
        world.faulty.silent_reads = silent_reads

    world.faulty.faults.append(world.faulty.lose_reply_and(fall_silent))
    await shard.claim(ann, on_unknown=lambda: unknown.append(None))
    assert (shard.epoch, world.faulty.sent, world.faulty.applied) == (1, 1, 1)
    assert unknown == [None]
    assert await world.stored() == shard.record


async def test_a_claim_whose_request_is_lost_is_sent_again(world: World, ann: Owner) -> None:
    shard = await world.load()
    world.faulty.faults += [world.faulty.lose_request] * 5
    await shard.claim(ann)
    assert (shard.epoch, world.faulty.sent, world.faulty.applied) == (1, 6, 1)


async def test_a_claim_request_that_arrives_after_its_repetition_changes_nothing(world: World, ann: Owner) -> None:
    shard = await world.load()
    world.faulty.faults.append(world.faulty.delay_request)
    await shard.claim(ann)
    assert [result.succeeded for result in await world.faulty.arrive()] == [False]
    assert (await world.stored()).epoch == 1


async def test_a_claim_request_that_arrives_before_its_repetition_is_recognised(world: World, ann: Owner) -> None:
    shard = await world.load()
    world.faulty.faults += [world.faulty.delay_request, world.faulty.before(world.faulty.arrive)]
    await shard.claim(ann)
    assert (shard.epoch, world.faulty.applied) == (1, 1)
    await shard.commit(ShardChange(with_segments(shard.record, (ledger(1),)), put_ledgers=(ledger(1),)))


async def test_of_two_claimers_one_wins_and_the_other_learns_who(world: World, ann: Owner, bob: Owner) -> None:
    first, second = await world.load(), await world.load()
    results = await asyncio.gather(first.claim(ann), second.claim(bob), return_exceptions=True)
    lost = [result for result in results if result is not None]
    assert len(lost) == 1
    assert isinstance(lost[0], ClaimLost)
    assert lost[0].owner == (await world.stored()).owner
    assert (await world.stored()).epoch == 1


async def test_two_claims_of_one_session_are_told_apart_by_their_marks(world: World, ann: Owner) -> None:
    first, second = await world.load(), await world.load()
    second._rng = random.Random(2)
    results = await asyncio.gather(first.claim(ann), second.claim(ann), return_exceptions=True)
    assert [type(result) for result in results] == [type(None), ClaimLost]


async def test_a_lost_reply_does_not_make_a_twins_claim_mine(world: World, ann: Owner) -> None:
    """The request is lost; meanwhile another claim of the same session writes the very same records."""
    first, second = await world.load(), await world.load(faulty=False)
    second._rng = random.Random(2)
    world.faulty.faults += [world.faulty.lose_request, world.faulty.before(lambda: second.claim(ann))]
    with pytest.raises(ClaimLost):
        await first.claim(ann)
    await second.commit(ShardChange(with_segments(second.record, (ledger(1),)), put_ledgers=(ledger(1),)))


async def test_a_claim_applied_and_overtaken_before_it_was_read_is_lost(world: World, ann: Owner, bob: Owner) -> None:
    shard = await world.load()

    async def overtake() -> None:
        await world.die(ann)
        await (await world.load(faulty=False)).claim(bob)

    world.faulty.faults.append(world.faulty.lose_reply_and(overtake))
    with pytest.raises(ClaimLost):
        await shard.claim(ann)
    assert (await world.stored()).owner == bob
    with pytest.raises(AssertionError):
        _ = shard.session


async def test_a_claim_that_meets_the_old_owners_last_roll_takes_the_new_ledger_too(
    world: World, ann: Owner, bob: Owner
) -> None:
    """The old owner's session has ended, but its request was still under way."""
    old = await world.owned(ann, ledger(1))
    await world.die(ann)
    new = await world.load()

    async def roll_late() -> None:
        old._store = world.store
        await old.commit(roll(old, 1, 2))

    world.faulty.faults.append(world.faulty.before(roll_late))
    await new.claim(bob)
    assert {(i, r.state, r.epoch) for i, r in new.ledgers.items()} == {(2, LedgerState.IN_RECOVERY, 2)}
    assert [segment.ledger_id for segment in new.record.segments] == [1, 2]
    assert await new.closed_ledger(1) == closed(ledger(1))


@pytest.mark.parametrize("kind", ["roll", "ensemble change"])
async def test_a_change_that_meets_a_claim_is_refused_and_the_owner_steps_down(
    world: World, ann: Owner, bob: Owner, kind: str
) -> None:
    old = await world.owned(ann, ledger(1))

    async def claim() -> None:
        await world.die(ann)
        await (await world.load(faulty=False)).claim(bob)

    world.faulty.faults.append(world.faulty.before(claim))
    change = roll(old, 1, 2) if kind == "roll" else ensemble_change(old, 1, "xyw")
    with pytest.raises(OwnershipLost) as raised:
        await old.commit(change)
    assert (raised.value.owner, raised.value.epoch) == (bob, 2)
    stored = await world.stored_ledgers()
    assert {(i, r.state, r.fragments) for i, r in stored.items()} == {(1, LedgerState.IN_RECOVERY, ledger(1).fragments)}
    with pytest.raises(OwnershipLost):
        await old.commit(change)
    assert world.faulty.sent == 1


async def test_a_claim_is_not_stolen_back_by_a_late_request_of_the_old_owner(
    world: World, ann: Owner, bob: Owner
) -> None:
    old = await world.owned(ann, ledger(1))

    async def claim() -> None:
        await world.die(ann)
        await (await world.load(faulty=False)).claim(bob)

    async def delay_and_claim(send: Any) -> Any:
        await claim()
        return await world.faulty.delay_request(send)

    world.faulty.faults.append(delay_and_claim)
    with pytest.raises(OwnershipLost):
        await old.commit(roll(old, 1, 2))
    assert [result.succeeded for result in await world.faulty.arrive()] == [False]
    assert (await world.stored()).owner == bob


async def test_a_claim_gives_up_when_the_shard_changes_each_time(world: World, ann: Owner, bob: Owner) -> None:
    old = await world.owned(ann, ledger(1))
    old._store = world.store
    new = await world.load()
    bookies = iter("abcdefghijklm")

    async def change() -> None:
        await old.commit(ensemble_change(old, 1, "xy" + next(bookies)))

    world.faulty.faults += [world.faulty.before(change)] * 10
    with pytest.raises(ClaimLost):
        await new.claim(bob, from_owner_alive=True)
    assert world.faulty.sent == 10


async def test_a_cancelled_claim_that_was_applied_can_be_claimed_again_by_its_session(world: World, ann: Owner) -> None:
    shard = await world.load()
    world.faulty.faults.append(world.faulty.hang)
    task = asyncio.create_task(shard.claim(ann))
    await world.faulty.hanging.wait()
    task.cancel()
    await asyncio.wait([task])
    await world.faulty.arrive()
    with pytest.raises(OutcomeUnknown):
        await shard.claim(ann)
    again = await world.load()
    await again.claim(ann)
    assert again.epoch == 2


# Changing, without faults.


async def test_ledgers_and_their_index_are_created_moved_and_deleted_with_the_shard_record(
    world: World, ann: Owner
) -> None:
    shard = await world.owned(ann)
    await shard.commit(ShardChange(with_segments(shard.record, (ledger(1),)), put_ledgers=(ledger(1),)))
    assert await world.index() == {("x", 1), ("y", 1), ("z", 1)}

    await shard.commit(ensemble_change(shard, 1, "xyw"))
    assert await world.index() == {("x", 1), ("y", 1), ("z", 1), ("w", 1)}
    assert await world.stored_ledgers() == dict(shard.ledgers)

    final = replace(closed(shard.ledgers[1]), fragments=(Fragment(0, ("x", "y", "w")),))
    await shard.commit(ShardChange(shard.record, put_ledgers=(final,)))
    assert await world.index() == {("x", 1), ("y", 1), ("w", 1)}
    assert shard.ledgers == {}
    assert await world.stored_ledgers() == {}
    assert await shard.closed_ledger(1) == final
    assert await shard.closed_ledgers([1, 2]) == {1: final}

    await shard.commit(ShardChange(replace(shard.record, segments=()), delete_ledgers=(final,)))
    assert await world.index() == set()
    assert await shard.closed_ledger(1) is None
    assert await world.stored() == shard.record


async def test_deleting_a_closed_ledger_follows_what_repair_made_of_it(world: World, ann: Owner) -> None:
    """The owner read the record before repair moved a copy; the index keys of the new place must not stay behind."""
    shard = await world.owned(ann, ledger(1))
    await shard.commit(ShardChange(shard.record, put_ledgers=(closed(shard.ledgers[1]),)))
    known = await shard.closed_ledger(1)
    assert known is not None
    world.faulty.faults.append(world.faulty.before(lambda: repair(world, 1, "w")))
    await shard.commit(ShardChange(replace(shard.record, segments=()), delete_ledgers=(known,)))
    assert await world.index() == set()
    assert await shard.closed_ledger(1) is None


async def repair(world: World, ledger_id: int, bookie_id: str) -> None:
    """Replaces the first bookie of a closed ledger."""
    key = world.keyspace.ledger(ledger_id)
    found = await world.store.get(key)
    assert found is not None
    record = decode_ledger(found.value)
    gone, *others = record.fragments[0].bookies
    moved = replace(record, fragments=(Fragment(0, (bookie_id, *others)),))
    operations: list[Operation] = [
        Put(key, encode_ledger(moved)),
        Delete(world.keyspace.index(gone, ledger_id)),
        Put(world.keyspace.index(bookie_id, ledger_id), b""),
    ]
    assert (await world.store.txn([unchanged(key, found.mod_revision)], operations)).succeeded


async def test_deleting_a_ledger_that_is_being_copied_takes_the_claim_and_its_index_key(
    world: World, ann: Owner
) -> None:
    shard = await world.owned(ann, ledger(1))
    await shard.commit(ShardChange(shard.record, put_ledgers=(closed(shard.ledgers[1]),)))
    known = await shard.closed_ledger(1)
    assert known is not None
    world.faulty.faults.append(world.faulty.before(lambda: claim(world, 1, "w")))
    await shard.commit(ShardChange(replace(shard.record, segments=()), delete_ledgers=(known,)))
    assert await world.index() == set()
    assert await shard.closed_ledger(1) is None


async def claim(world: World, ledger_id: int, target: str) -> None:
    """Begins a copy of a closed ledger."""
    key = world.keyspace.ledger(ledger_id)
    found = await world.store.get(key)
    assert found is not None
    claimed = replace(decode_ledger(found.value), copy=CopyClaim(target, "x", b"mark"))
    operations: list[Operation] = [
        Put(key, encode_ledger(claimed)),
        Put(world.keyspace.index(target, ledger_id), b""),
    ]
    assert (await world.store.txn([unchanged(key, found.mod_revision)], operations)).succeeded


async def test_what_a_ledger_misses_is_written_with_its_close_and_only_with_it(world: World, ann: Owner) -> None:
    shard = await world.owned(ann, ledger(1))
    task = CopyTask(1, "x", "x", CopyReason.UNREPLICATED, first_entry=3, last_entry=5)
    with pytest.raises(ValueError, match="only a ledger that is closed is copied"):
        await shard.commit(ShardChange(shard.record, put_copies=(task,)))
    change = ShardChange(shard.record, put_ledgers=(closed(shard.ledgers[1]),), put_copies=(task,))
    await shard.commit(change)
    found = await world.store.get(world.keyspace.copy(1, "x"))
    assert found is not None
    assert decode_copy(found.value) == task


async def test_pages_are_written_and_deleted_with_the_record(world: World, ann: Owner) -> None:
    shard = await world.owned(ann)
    segments = (Segment(1, 0), Segment(2, 10))
    await shard.commit(ShardChange(replace(shard.record, pages=1), put_pages=((0, segments),)))
    assert await shard.page(0) == segments
    await shard.commit(ShardChange(shard.record, put_pages=((0, segments[1:]),)))
    assert await shard.page(0) == segments[1:]
    await shard.commit(ShardChange(replace(shard.record, first_page=1, pages=0), delete_pages=(0,)))
    with pytest.raises(PageNotFound):
        await shard.page(0)


async def test_releasing_a_shard_takes_its_owner_and_ends_the_ownership(world: World, ann: Owner, bob: Owner) -> None:
    shard = await world.owned(ann)
    await shard.commit(ShardChange(replace(shard.record, owner=None)))
    assert await world.owned_keys() == []
    with pytest.raises(OwnershipLost):
        await shard.commit(ShardChange(shard.record))
    await (await world.load()).claim(bob)


async def test_passing_a_shard_needs_the_targets_session(world: World, ann: Owner, bob: Owner) -> None:
    shard = await world.owned(ann)
    await world.die(bob)
    with pytest.raises(SessionEnded):
        await shard.commit(ShardChange(replace(shard.record, owner=bob)))
    again = await world.register("bob")
    await shard.commit(ShardChange(replace(shard.record, owner=again)))
    assert await world.owned_keys() == [(again, SHARD)]
    with pytest.raises(OwnershipLost):
        await shard.commit(ShardChange(shard.record))


async def test_a_new_session_of_the_owner_is_put_in_place_in_the_same_epoch(world: World, ann: Owner) -> None:
    shard = await world.owned(ann, ledger(1))
    again = await world.register("ann")
    await shard.renew_session(again)
    assert shard.session == again
    assert (shard.epoch, (await world.stored()).owner) == (1, again)
    assert await world.owned_keys() == [(again, SHARD)]
    await shard.commit(ensemble_change(shard, 1, "xyw"))


async def test_a_new_session_is_not_put_over_another_claim(world: World, ann: Owner, bob: Owner) -> None:
    shard = await world.owned(ann)
    again = await world.register("ann")
    await (await world.load(faulty=False)).claim(bob)
    with pytest.raises(OwnershipLost):
        await shard.renew_session(again)


async def test_deleting_a_shard_leaves_no_key_of_it(world: World, ann: Owner) -> None:
    shard = await world.owned(ann, ledger(1), ledger(2))
    await shard.commit(ShardChange(shard.record, put_ledgers=(closed(shard.ledgers[1]),)))
    one = await shard.closed_ledger(1)
    assert one is not None
    with pytest.raises(ValueError, match="after all of its ledgers"):
        await shard.commit(ShardChange(shard.record, delete_ledgers=(one,), delete_shard=True))
    world.faulty.faults.append(world.faulty.lose_reply)
    await shard.commit(ShardChange(shard.record, delete_ledgers=(one, shard.ledgers[2]), delete_shard=True))
    left = [item.key for item in (await world.store.range(world.keyspace.root)).items]
    assert left == [world.keyspace.broker("ann")]
    with pytest.raises(OwnershipLost):
        await shard.commit(ShardChange(shard.record))


async def test_verify_tells_whose_the_shard_is(world: World, ann: Owner, bob: Owner) -> None:
    shard = await world.owned(ann)
    await shard.verify()
    world.faulty.silent_reads = 1
    with pytest.raises(MetadataUnavailable):
        await shard.verify()
    await (await world.load(faulty=False)).claim(bob, from_owner_alive=True)
    with pytest.raises(OwnershipLost):
        await shard.verify()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda s: ShardChange(replace(s.record, epoch=9)), "epoch"),
        (lambda s: ShardChange(replace(s.record, shard_id=8)), "id"),
        (lambda s: ShardChange(s.record, put_ledgers=(replace(ledger(5), shard_id=8),)), "another shard"),
        (lambda s: ShardChange(s.record, put_ledgers=(closed(ledger(5)),)), "open ledger of the shard"),
        (lambda s: ShardChange(s.record, put_ledgers=tuple(ledger(i) for i in range(10, 60))), "too large"),
        (lambda s: ShardChange(s.record, put_ledgers=(ledger(1),), delete_ledgers=(ledger(1),)), "one key"),
    ],
)
async def test_a_change_that_contradicts_itself_or_is_too_large_is_refused(
    world: World, ann: Owner, change: Callable[[ShardMetadata], ShardChange], reason: str
) -> None:
    shard = await world.owned(ann, ledger(1))
    before = (await world.store.range("")).items
    with pytest.raises(ValueError, match=reason):
        await shard.commit(change(shard))
    assert (await world.store.range("")).items == before
    await shard.commit(ensemble_change(shard, 1, "xyw"))


async def test_a_trim_of_sixteen_segments_fits_one_transaction(world: World, ann: Owner) -> None:
    shard = await world.owned(ann)
    for i in range(1, 17):
        await shard.commit(ShardChange(with_segments(shard.record, (ledger(i),)), put_ledgers=(ledger(i),)))
        await shard.commit(ShardChange(shard.record, put_ledgers=(closed(shard.ledgers[i]),)))
    gone = tuple((await shard.closed_ledgers(range(1, 17))).values())
    world.faulty.sent = 0
    await shard.commit(ShardChange(replace(shard.record, segments=()), delete_ledgers=gone, delete_pages=(0,)))
    assert world.faulty.sent == 1
    assert await world.index() == set()


# Changing: silence.


@pytest.mark.parametrize("silent_reads", [0, 4])
@pytest.mark.parametrize("kind", ["roll", "ensemble change"])
async def test_a_change_whose_reply_is_lost_is_recognised(
    world: World, ann: Owner, silent_reads: int, kind: str
) -> None:
    shard = await world.owned(ann, ledger(1))

    async def fall_silent() -> None:
        world.faulty.silent_reads = silent_reads

    world.faulty.faults.append(world.faulty.lose_reply_and(fall_silent))
    unknown: list[None] = []
    change = roll(shard, 1, 2) if kind == "roll" else ensemble_change(shard, 1, "xyw")
    await shard.commit(change, on_unknown=lambda: unknown.append(None))
    assert unknown == [None]
    assert (world.faulty.sent, world.faulty.applied) == (1, 1)
    assert await world.stored() == shard.record
    assert await world.stored_ledgers() == dict(shard.ledgers)
    last = max(shard.ledgers)
    await shard.commit(ensemble_change(shard, last, "xyv"))
    assert await world.stored_ledgers() == dict(shard.ledgers)


@pytest.mark.parametrize("touch", [repair, claim])
async def test_repair_may_touch_a_ledger_between_its_close_and_the_recognition_of_the_close(
    world: World, ann: Owner, touch: Callable[[World, int, str], Awaitable[None]]
) -> None:
    shard = await world.owned(ann, ledger(1))
    world.faulty.faults.append(world.faulty.lose_reply_and(lambda: touch(world, 1, "w")))
    await shard.commit(roll(shard, 1, 2))
    assert set(shard.ledgers) == {2}
    assert (world.faulty.sent, world.faulty.applied) == (1, 1)


async def test_a_change_whose_request_is_lost_is_sent_again(world: World, ann: Owner) -> None:
    shard = await world.owned(ann, ledger(1))
    world.faulty.faults += [world.faulty.lose_request] * 3
    await shard.commit(roll(shard, 1, 2))
    assert (world.faulty.sent, world.faulty.applied) == (4, 1)


async def test_a_request_that_arrives_after_its_repetition_is_applied_once(world: World, ann: Owner) -> None:
    shard = await world.owned(ann, ledger(1))
    world.faulty.faults.append(world.faulty.delay_request)
    await shard.commit(ensemble_change(shard, 1, "xyw"))
    await shard.commit(ensemble_change(shard, 1, "xyv"))
    assert [result.succeeded for result in await world.faulty.arrive()] == [False]
    assert await world.stored_ledgers() == dict(shard.ledgers)


async def test_a_request_that_arrives_between_reading_and_repeating_is_recognised(world: World, ann: Owner) -> None:
    shard = await world.owned(ann, ledger(1))
    world.faulty.faults += [world.faulty.delay_request, world.faulty.before(world.faulty.arrive)]
    await shard.commit(roll(shard, 1, 2))
    assert (world.faulty.sent, world.faulty.applied) == (2, 1)
    assert await world.stored() == shard.record


async def test_a_change_applied_and_then_overwritten_by_a_claim_is_lost(world: World, ann: Owner, bob: Owner) -> None:
    shard = await world.owned(ann, ledger(1))

    async def claim() -> None:
        await world.die(ann)
        await (await world.load(faulty=False)).claim(bob)

    world.faulty.faults.append(world.faulty.lose_reply_and(claim))
    with pytest.raises(OwnershipLost) as raised:
        await shard.commit(roll(shard, 1, 2))
    assert raised.value.owner == bob
    assert [segment.ledger_id for segment in (await world.stored()).segments] == [1, 2]


async def test_a_shard_deleted_by_the_next_owner_is_lost_without_an_owner(world: World, ann: Owner, bob: Owner) -> None:
    shard = await world.owned(ann, ledger(1))

    async def claim_and_delete() -> None:
        await world.die(ann)
        other = await world.load(faulty=False)
        await other.claim(bob)
        gone = tuple(other.ledgers.values())
        await other.commit(ShardChange(other.record, delete_ledgers=gone, delete_shard=True))

    world.faulty.faults.append(world.faulty.lose_reply_and(claim_and_delete))
    with pytest.raises(OwnershipLost) as raised:
        await shard.commit(ensemble_change(shard, 1, "xyw"))
    assert raised.value.owner is None


async def test_records_that_nobody_claimed_and_that_are_not_mine_are_lost_too(world: World, ann: Owner) -> None:
    """Two objects that own one shard in one epoch are a fault; neither may build on the other's records."""
    shard = await world.owned(ann, ledger(1))
    twin = await world.load(faulty=False)
    twin._session, twin._mark = shard._session, shard._mark
    await twin.commit(ensemble_change(twin, 1, "xyv"))
    with pytest.raises(OwnershipLost):
        await shard.commit(ensemble_change(shard, 1, "xyw"))


async def test_a_change_waits_as_long_as_the_store_is_silent_with_bounded_pauses(world: World, ann: Owner) -> None:
    shard = await world.owned(ann, ledger(1))
    world.faulty.faults.append(world.faulty.lose_reply)
    world.faulty.silent_reads = 200
    await shard.commit(roll(shard, 1, 2))
    assert len(world.pauses) == 201
    assert all(0.01 <= pause <= 2.0 for pause in world.pauses)
    assert world.pauses[0] <= 0.02
    assert all(pause >= 1.0 for pause in world.pauses[10:])


async def test_silence_before_anything_was_sent_is_reported_and_waited_out(world: World, ann: Owner) -> None:
    shard = await world.owned(ann, ledger(1))
    await shard.commit(roll(shard, 1, 2))
    one = await shard.closed_ledger(1)
    assert one is not None
    world.faulty.silent_reads = 2
    unknown: list[None] = []
    record = replace(shard.record, segments=shard.record.segments[1:])
    change = ShardChange(record, delete_ledgers=(one,))
    await shard.commit(change, on_unknown=lambda: unknown.append(None))
    assert unknown == [None]
    assert await shard.closed_ledger(1) is None


@pytest.mark.parametrize("arrives", [True, False])
async def test_after_a_cancelled_change_nothing_is_believed(world: World, ann: Owner, arrives: bool) -> None:
    shard = await world.owned(ann, ledger(1))
    world.faulty.faults.append(world.faulty.hang)
    task = asyncio.create_task(shard.commit(ensemble_change(shard, 1, "xyw")))
    await world.faulty.hanging.wait()
    task.cancel()
    await asyncio.wait([task])
    if arrives:
        await world.faulty.arrive()
    with pytest.raises(OutcomeUnknown):
        await shard.commit(ensemble_change(shard, 1, "xyv"))
    again = await world.load()
    await again.claim(ann)
    late = await world.faulty.arrive()
    assert not any(result.succeeded for result in late)
    assert await world.stored_ledgers() == dict(again.ledgers)
    assert len(again.ledgers[1].fragments) == (2 if arrives else 1)


async def test_a_change_cancelled_before_anything_was_sent_leaves_no_doubt(world: World, ann: Owner) -> None:
    shard = await world.owned(ann, ledger(1))
    async with shard._lock:
        task = asyncio.create_task(shard.commit(ensemble_change(shard, 1, "xyw")))
        await asyncio.sleep(0)
        task.cancel()
        await asyncio.wait([task])
    await shard.commit(ensemble_change(shard, 1, "xyv"))


# Changing: several at once.


async def test_concurrent_changes_of_different_ledgers_are_both_kept(world: World, ann: Owner) -> None:
    shard = await world.owned(ann, ledger(1), ledger(2))
    record = replace(shard.record, next_ledger=3)
    await asyncio.gather(
        shard.commit(ShardChange(record, put_ledgers=(ledger(3),))),
        shard.commit(ensemble_change(shard, 1, "xyw")),
        shard.commit(ensemble_change(shard, 2, "xyv")),
    )
    assert await world.stored() == shard.record == record
    assert await world.stored_ledgers() == dict(shard.ledgers)
    assert [len(shard.ledgers[i].fragments) for i in (1, 2, 3)] == [2, 2, 1]


async def test_an_ensemble_change_that_waited_for_the_close_does_not_open_the_ledger_again(
    world: World, ann: Owner
) -> None:
    shard = await world.owned(ann, ledger(1))
    results = await asyncio.gather(
        shard.commit(roll(shard, 1, 2)), shard.commit(ensemble_change(shard, 1, "xyw")), return_exceptions=True
    )
    assert [type(result) for result in results] == [type(None), StaleChange]
    assert set(await world.stored_ledgers()) == {2}
    await shard.commit(ensemble_change(shard, 2, "xyw"))


async def test_of_two_changes_of_the_record_computed_from_one_state_the_second_is_stale(
    world: World, ann: Owner
) -> None:
    shard = await world.owned(ann)
    results = await asyncio.gather(
        shard.commit(ShardChange(replace(shard.record, created_us=1))),
        shard.commit(ShardChange(replace(shard.record, created_us=2))),
        return_exceptions=True,
    )
    assert [type(result) for result in results] == [type(None), StaleChange]


async def test_updates_are_computed_one_after_the_other(world: World, ann: Owner) -> None:
    shard = await world.owned(ann)
    world.faulty.faults += [world.faulty.lose_reply, world.faulty.lose_request]

    def add(i: int) -> Callable[[], ShardChange]:
        return lambda: ShardChange(with_segments(shard.record, (ledger(i),)), put_ledgers=(ledger(i),))

    await asyncio.gather(*(shard.update(add(i)) for i in range(1, 6)), shard.update(lambda: None))
    assert [segment.ledger_id for segment in (await world.stored()).segments] == [1, 2, 3, 4, 5]
    assert world.faulty.applied == 5


# Everything at once.


@pytest.mark.parametrize("seed", range(150))
async def test_no_interleaving_loses_or_repeats_a_change_or_gives_an_epoch_to_two(
    keyspace: Keyspace, faulty: Any, seed: int
) -> None:
    """Three brokers claim, append a segment at a time, lose sessions, requests and replies, at random.

    Afterwards the history of the shard record must be that of one owner at a time: each epoch has one owner, each
    change adds one segment, every change that was confirmed is there, once, and none but by the epoch's owner.
    """
    rng = random.Random(seed)

    async def yield_s(_: float) -> None:
        for _ in range(rng.randrange(4)):
            await asyncio.sleep(0)

    world = World(faulty, keyspace, yield_s, [])
    start = (await world.store.range("")).revision + 1
    await world.create()
    confirmed: dict[int, int] = {}
    attempted: dict[int, int] = {}
    numbers = iter(range(1, 10_000))
    arrivals: set[asyncio.Task[Any]] = set()

    async def arrive_later(send: Any) -> None:
        for _ in range(rng.randrange(20)):
            await asyncio.sleep(0)
        await send()

    async def chaos(send: Any) -> Any:
        luck = rng.random()
        for _ in range(rng.randrange(3)):
            await asyncio.sleep(0)
        if luck < 0.1:
            raise MetadataUnavailable("lost request")
        if luck < 0.2:
            await send()
            raise MetadataUnavailable("lost reply")
        if luck < 0.3:
            arrivals.add(asyncio.create_task(arrive_later(send)))
            raise MetadataUnavailable("late")
        world.faulty.silent_reads += rng.random() < 0.05
        return await send()

    world.faulty.deliver = chaos

    async def append(shard: ShardMetadata) -> None:
        number = next(numbers)
        attempted[number] = shard.epoch

        def change() -> ShardChange:
            previous = [closed(one) for one in shard.ledgers.values()]
            new = ledger(number, epoch=shard.epoch)
            return ShardChange(with_segments(shard.record, (new,)), put_ledgers=(*previous, new))

        await shard.update(change)
        confirmed[number] = shard.epoch

    async def broker(name: str) -> None:
        session = await world.register(name)
        for _ in range(12):
            try:
                shard = await ShardMetadata.load(world.faulty, keyspace, SHARD, rng=rng, sleep=yield_s)
                await shard.claim(session, from_owner_alive=rng.random() < 0.3)
                for _ in range(rng.randrange(5)):
                    await append(shard)
                if rng.random() < 0.3:
                    await shard.commit(ShardChange(replace(shard.record, owner=None)))
            except (ClaimLost, OwnershipLost, MetadataUnavailable):
                await yield_s(0)
            if rng.random() < 0.3:
                session = await world.register(name)

    await asyncio.gather(broker("ann"), broker("bob"), broker("cat"))
    await asyncio.gather(*arrivals)

    owners: dict[int, str] = {}
    before = ShardRecord(SHARD, "a/b/c", ShardState.OPEN, 0, None, 0, 65535)
    watch = world.store.watch(keyspace.shard(SHARD), from_revision=start)
    last = (await world.store.range("")).revision
    records: list[ShardRecord] = []
    reached = 0
    stored = await world.store.get(keyspace.shard(SHARD))
    assert stored is not None
    async for event in watch:
        records += [decode_shard(c.current.value) for c in event.changes]  # type: ignore[union-attr]
        reached = event.revision  # type: ignore[union-attr]
        if reached >= min(last, stored.mod_revision):
            break
    for record in records:
        assert record.epoch - before.epoch in (0, 1)
        if record.epoch > before.epoch:
            assert record.owner is not None
            owners[record.epoch] = record.owner.broker_id
            assert record.segments == before.segments
        elif record.owner is not None:
            assert record.owner.broker_id == owners.get(record.epoch, record.owner.broker_id)
        added = record.segments[len(before.segments) :]
        assert record.segments[: len(before.segments)] == before.segments
        assert all(attempted[segment.ledger_id] == record.epoch for segment in added)
        before = record
    chain = [segment.ledger_id for segment in before.segments]
    assert len(set(chain)) == len(chain)
    assert set(confirmed) <= set(chain)
    # Everything else agrees with the chain: one record for each ledger, and the index of its bookies.
    assert await world.index() == {(bookie, number) for number in chain for bookie in "xyz"}
