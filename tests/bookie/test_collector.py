"""What the collector deletes, and above all what it does not."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from magnetar.bookie.collector import PAGE_KEYS, TOMBSTONE_US, Collector
from magnetar.bookie.disk import DiskUsage
from magnetar.bookie.entry_store import StoreUsage
from magnetar.bookie.metrics import BookieMetrics
from magnetar.ledger.bookie_rpc import AddStatus, EntryOutcome
from magnetar.metadata.codec import encode_ledger
from magnetar.metadata.keyspace import Keyspace
from magnetar.metadata.records import CopyClaim, Fragment, LedgerPurpose, LedgerRecord, LedgerState
from magnetar.metadata.store import Delete, MetadataStore, MetadataUnavailable, Operation, Put, RangeResult

ME = "bookie0"
SHARD = 1


def record(ledger_id: int, *bookies: str, state: LedgerState = LedgerState.OPEN) -> LedgerRecord:
    places = (*bookies, "", "", "")[:3]
    return LedgerRecord(
        ledger_id=ledger_id,
        shard_id=SHARD,
        purpose=LedgerPurpose.DATA,
        state=state,
        epoch=1,
        token=b"token-%010d" % ledger_id,
        write_quorum=3,
        ack_quorum=2,
        fragments=(Fragment(0, places),),
    )


class Records:
    """Writes ledger records the way brokers do: with their index keys, in one transaction."""

    def __init__(self, metadata: MetadataStore, keyspace: Keyspace) -> None:
        self.metadata = metadata
        self.keyspace = keyspace

    async def put(
        self, ledger_id: int, *bookies: str, closed: bool = False, index: bool = True, target: str = ""
    ) -> None:
        """`target`: of a copy that is claimed, without its index key."""
        keys = self.keyspace
        ledger = record(ledger_id, *bookies, state=LedgerState.CLOSED if closed else LedgerState.OPEN)
        value = encode_ledger(replace(ledger, copy=CopyClaim(target, bookies[0], b"mark") if target else None))
        places = [keys.ledger(ledger_id), keys.shard_ledger(SHARD, ledger_id)]
        here, there = places if closed else places[::-1]
        operations: list[Operation] = [Put(here, value), Delete(there)]
        operations += [Put(keys.index(bookie, ledger_id), b"") for bookie in bookies if index]
        await self.metadata.txn([], operations)

    async def unlink(self, ledger_id: int, *bookies: str) -> None:
        keys = self.keyspace
        operations: list[Operation] = [Delete(keys.ledger(ledger_id)), Delete(keys.shard_ledger(SHARD, ledger_id))]
        operations += [Delete(keys.index(bookie, ledger_id)) for bookie in bookies]
        await self.metadata.txn([], operations)


@pytest.fixture
def records(metadata: MetadataStore, keyspace: Keyspace) -> Records:
    return Records(metadata, keyspace)


async def stored_ids(bookie: Any) -> list[int]:
    return [facts.ledger_id for facts in await bookie.handlers.ledgers()]


async def test_ledgers_that_no_record_gives_to_this_bookie_are_deleted_and_no_others(
    bookies: Any, records: Records, writer: Any
) -> None:
    bookie = await bookies.start()
    local = bookie.local()
    for ledger_id in range(1, 10):
        await local.add(writer(ledger_id).add(0, 1))
    await records.put(1, ME, "b", "c")
    await records.put(2, "a", ME, "c", closed=True)
    await records.put(3, "a", "b", "c")
    await records.put(4, "a", "b", "c", closed=True)
    await records.put(5, ME, closed=True, index=False)
    await records.put(6, ME, index=False)
    await records.put(9, "a", "b", "c", closed=True, target=ME)
    done = await bookie.collector.collect()
    assert done.deleted == (4, 7, 8)
    kept = [1, 2, 3, 5, 6, 9]
    assert await stored_ids(bookie) == kept, "a recovery writes to a spare of an open ledger, a copy to its target"
    for ledger_id in (4, 7):
        read = await local.read(writer(ledger_id).read(0, 0))
        assert read.answers[0].outcome is EntryOutcome.UNKNOWN
        assert (await local.add(writer(ledger_id).add(0))).status is AddStatus.REFUSED
    assert (await local.read(writer(1).read(0, 1))).answers[1].outcome is EntryOutcome.HAVE
    assert (await bookie.collector.collect()).deleted == ()


async def test_a_ledger_with_a_fence_and_no_entries_is_collected_too(bookies: Any, writer: Any) -> None:
    bookie = await bookies.start()
    local = bookie.local()
    await local.read_lac(writer(7, 3).lac(fence=True))
    assert (await bookie.collector.collect()).deleted == (7,)
    assert (await local.add(writer(7, 3).add(0))).status is AddStatus.FENCED
    assert (await bookie.collector.collect()).deleted == ()


async def test_tombstones_outlive_a_restart_and_are_forgotten_after_their_time(bookies: Any, writer: Any) -> None:
    bookie = await bookies.start()
    await bookie.local().add(writer(7).add(0))
    await bookie.collector.collect()
    await bookie.stop()
    bookie = await bookies.start(store=bookies.store.crash())
    local = bookie.local()
    bookies.now_us += TOMBSTONE_US - 1
    assert (await bookie.collector.collect()).forgotten == ()
    assert (await local.add(writer(7).add(0))).status is AddStatus.REFUSED
    bookies.now_us += 2
    assert (await bookie.collector.collect()).forgotten == (7,)
    assert (await local.read(writer(7).read(0, 0))).answers[0].outcome is EntryOutcome.PROVABLY_NOT


async def test_a_copy_that_comes_back_to_this_bookie_is_kept_past_its_tombstone(
    bookies: Any, records: Records, writer: Any
) -> None:
    bookie = await bookies.start()
    local = bookie.local()
    await local.add(writer(7).add(0, 1))
    await bookie.collector.collect()
    await records.put(7, ME, "b", "c", closed=True)
    assert (await local.add(writer(7).add(0, recovery=True))).status is AddStatus.OK
    bookies.now_us += TOMBSTONE_US + 1
    done = await bookie.collector.collect()
    assert (done.deleted, done.forgotten) == ((), ())
    read = await local.read(writer(7).read(0, 1))
    assert [answer.outcome.name for answer in read.answers] == ["HAVE", "UNKNOWN"]


class Meddling:
    """The metadata store with something happening before or instead of a call."""

    def __init__(self, store: MetadataStore) -> None:
        self._store = store
        self.before_range: Callable[[str, str], Awaitable[None]] | None = None
        self.before_get: Callable[[str], Awaitable[None]] | None = None
        self.ranges: list[str] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    async def range(self, prefix: str, *, after: str = "", limit: int = 0) -> RangeResult:
        self.ranges.append(prefix)
        if self.before_range is not None:
            await self.before_range(prefix, after)
        return await self._store.range(prefix, after=after, limit=limit)

    async def get(self, key: str) -> Any:
        if self.before_get is not None:
            await self.before_get(key)
        return await self._store.get(key)


class Collection:
    """A bookie and a collector of it over a metadata store that meddles."""

    def __init__(self, bookie: Any, metadata: MetadataStore, keyspace: Keyspace) -> None:
        self.bookie = bookie
        self.local = bookie.local()
        self.metadata = Meddling(metadata)
        metrics = BookieMetrics(CollectorRegistry(), ME)
        self.collector = Collector(
            ME,
            bookie._store,
            bookie._commits,
            self.metadata,
            keyspace,
            metrics,
            lambda: 1_000_000,  # type: ignore[arg-type]
        )
        bookie.collector.collecting = self.collector.collecting


@pytest.fixture
async def collection(bookies: Any, metadata: MetadataStore, keyspace: Keyspace) -> Collection:
    return Collection(await bookies.start(), metadata, keyspace)


async def test_nobody_counts_on_what_was_read_while_it_was_being_collected(collection: Collection, writer: Any) -> None:
    """A copy that comes back here would find the entries, take them for its own, and lose them."""
    ledger = writer(7)
    await collection.local.add(ledger.add(0))

    async def outcome() -> EntryOutcome:
        answer: EntryOutcome = (await collection.local.read(ledger.read(0, 0))).answers[0].outcome
        return answer

    assert await outcome() is EntryOutcome.HAVE
    reading: list[asyncio.Task[EntryOutcome]] = []

    async def read_meanwhile(key: str) -> None:
        reading.append(asyncio.create_task(outcome()))
        await asyncio.sleep(0)

    collection.metadata.before_get = read_meanwhile
    assert (await collection.collector.collect()).deleted == (7,)
    assert {await task for task in reading} == {EntryOutcome.UNKNOWN}


async def test_an_incomplete_listing_deletes_nothing(
    collection: Collection, records: Records, writer: Any, keyspace: Keyspace
) -> None:
    """Silence at any page of any of the listings gives the pass up."""
    count = PAGE_KEYS + 10
    for ledger_id in range(1, 5):
        await collection.local.add(writer(ledger_id).add(0))
    await records.put(1, ME)
    await records.put(2, ME, closed=True, index=False)
    for ledger_id in range(1000, 1000 + count):
        await records.put(ledger_id, "a", closed=ledger_id % 2 == 0)
        await records.put(ledger_id + 5000, ME, closed=ledger_id % 2 == 1)
    complete = Collection(collection.bookie, records.metadata, keyspace)
    pages = 0

    async def silent_at(page: int) -> None:
        collection.metadata.ranges.clear()

        async def silence(prefix: str, after: str) -> None:
            if len(collection.metadata.ranges) > page:
                raise MetadataUnavailable("silent")

        collection.metadata.before_range = silence

    while True:
        await silent_at(pages)
        done = await collection.collector.collect()
        if not done.aborted:
            break
        assert done.deleted == ()
        assert await stored_ids(collection.bookie) == [1, 2, 3, 4]
        pages += 1
    assert pages == 6
    assert done.deleted == (3, 4)
    assert (await complete.collector.collect()).deleted == ()


async def test_a_listing_that_does_not_go_on_is_given_up(collection: Collection, writer: Any) -> None:
    await collection.local.add(writer(7).add(0))

    async def range_(prefix: str, *, after: str = "", limit: int = 0) -> RangeResult:
        return RangeResult((), 5, more=True)

    collection.metadata.range = range_  # type: ignore[method-assign]
    assert "does not end" in (await collection.collector.collect()).aborted
    assert await stored_ids(collection.bookie) == [7]


async def test_an_unreadable_record_or_strange_key_deletes_nothing(
    collection: Collection, metadata: MetadataStore, keyspace: Keyspace, writer: Any
) -> None:
    await collection.local.add(writer(7).add(0))
    for key in (keyspace.ledger(3), keyspace.shards_prefix() + "what/is/this", keyspace.index_prefix(ME) + "x"):
        await metadata.txn([], [Put(key, b"\xff\xff")])
        assert (await collection.collector.collect()).aborted
        await metadata.txn([], [Delete(key)])
    assert await stored_ids(collection.bookie) == [7]
    assert (await collection.collector.collect()).deleted == (7,)


async def test_a_ledger_that_closes_between_the_listings_is_kept(
    collection: Collection, records: Records, keyspace: Keyspace, writer: Any
) -> None:
    """It moves from the shard to the closed ledgers; whichever page is read when, it is seen once."""
    await collection.local.add(writer(7).add(0))
    await records.put(7, ME, index=False)

    async def close_it(prefix: str, after: str) -> None:
        if prefix == keyspace.ledgers_prefix():
            await records.put(7, ME, closed=True, index=False)

    collection.metadata.before_range = close_it
    assert (await collection.collector.collect()).deleted == ()


async def test_a_ledger_created_after_the_local_listing_is_not_judged(
    collection: Collection, records: Records, writer: Any
) -> None:
    async def add_one(prefix: str, after: str) -> None:
        collection.metadata.before_range = None
        assert (await collection.local.add(writer(9).add(0))).status is AddStatus.OK

    collection.metadata.before_range = add_one
    assert (await collection.collector.collect()).deleted == ()
    assert await stored_ids(collection.bookie) == [9]


async def test_a_copy_claimed_before_the_last_look_keeps_the_ledger(
    collection: Collection, records: Records, keyspace: Keyspace, writer: Any
) -> None:
    """The copy is claimed and begins after the listings said that no record names this bookie."""
    await collection.local.add(writer(7).add(0))
    await records.put(7, "a", "b", closed=True)
    statuses: list[AddStatus] = []

    async def claim(key: str) -> None:
        collection.metadata.before_get = None
        await records.put(7, "a", "b", ME, closed=True)
        statuses.append((await collection.local.add(writer(7).add(1, recovery=True))).status)

    collection.metadata.before_get = claim
    assert (await collection.collector.collect()).deleted == ()
    assert statuses == [AddStatus.BUSY]
    assert (await collection.local.add(writer(7).add(1, recovery=True))).status is AddStatus.OK
    read = await collection.local.read(writer(7).read(0, 1))
    assert [answer.outcome.name for answer in read.answers] == ["HAVE", "HAVE"]


async def test_a_copy_claimed_after_the_last_look_begins_after_the_deletion(
    collection: Collection, records: Records, keyspace: Keyspace, writer: Any, held_disk: Any
) -> None:
    """Until the deletion is durable the copy is told BUSY; then all of it stands, nothing half deleted."""
    local = collection.local
    await local.add(writer(7).add(0))
    store = collection.bookie._store
    store._sync = held_disk.sync
    held_disk.hold()
    pass_ = asyncio.create_task(collection.collector.collect())
    await held_disk.syncing.wait()
    await records.put(7, ME, "b", closed=True)
    early = local.add(writer(7).add(0, recovery=True))
    unknown = local.read(writer(7).read(0, 1))
    held_disk.release()
    assert (await pass_).deleted == (7,)
    assert (await early).status in (AddStatus.BUSY, AddStatus.OK)
    assert (await unknown).answers[0].outcome is EntryOutcome.UNKNOWN
    assert (await local.add(writer(7).add(0, 1, recovery=True))).status is AddStatus.OK
    read = await local.read(writer(7).read(0, 1))
    assert [answer.outcome.name for answer in read.answers] == ["HAVE", "HAVE"]
    assert (await collection.collector.collect()).deleted == ()


async def test_a_collector_that_is_cancelled_leaves_the_ledger_closed_until_its_removal_is_judged(
    collection: Collection, writer: Any, held_disk: Any
) -> None:
    local = collection.local
    await local.add(writer(7).add(0))
    collection.bookie._store._sync = held_disk.sync
    held_disk.hold()
    other = local.add(writer(8).add(0))
    await held_disk.syncing.wait()
    copy = local.add(writer(7).add(1, recovery=True))
    pass_ = asyncio.create_task(collection.collector._delete(7, 0))
    for _ in range(10):
        await asyncio.sleep(0)
    assert len(collection.bookie._commits._queue) == 2
    pass_.cancel()
    await asyncio.wait([pass_])
    held_disk.release()
    assert (await other).status is AddStatus.OK
    assert (await copy).status is AddStatus.BUSY
    assert await stored_ids(collection.bookie) == [8]


@pytest.mark.parametrize(
    ("used", "garbage", "free", "rewrites"),
    [
        (0.5, 34, 500, False),
        (0.5, 36, 500, True),
        (0.85, 4, 150, False),
        (0.85, 6, 150, True),
        (0.99, 60, 10, False),
    ],
)
async def test_files_are_rewritten_for_much_garbage_or_on_a_filling_disk_if_there_is_room(
    collection: Collection, monkeypatch: pytest.MonkeyPatch, used: float, garbage: int, free: int, rewrites: bool
) -> None:
    store = collection.bookie._store
    monkeypatch.setattr(store, "usage", lambda: StoreUsage(100, garbage))
    disk = DiskUsage(free, round(free / (1 - used)))
    assert await collection.collector.recover_space(disk) == rewrites
