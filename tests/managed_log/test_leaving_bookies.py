"""What bookies missed is put down with the close of a ledger, and ledgers end that stand on bookies to be left."""

from __future__ import annotations

from dataclasses import replace

from log_world import SHARD_ID, Cluster, OpenLog, until

from magnetar.managed_log.log import LogSettings
from magnetar.metadata.codec import decode_bookie, decode_copy, encode_bookie, encode_drain
from magnetar.metadata.records import VACANT, CopyReason, CopyTask, Drain, LedgerRecord, SubscriptionType
from magnetar.metadata.shards import ShardMetadata
from magnetar.metadata.store import Put, exists

QUICK = LogSettings(retry_first_s=0.001, retry_last_s=0.01, recovery_attempts=3)


async def copies(cluster: Cluster) -> list[CopyTask]:
    return [decode_copy(i.value) for i in (await cluster.store.inner.range(cluster.keyspace.copies_prefix())).items]


async def open_ledgers(cluster: Cluster) -> list[LedgerRecord]:
    return list((await ShardMetadata.load(cluster.store.inner, cluster.keyspace, SHARD_ID)).ledgers.values())


async def append_some(owner: OpenLog, entries: int = 3) -> None:
    for number in range(entries):
        await owner.append(b"%d" % number)


async def test_a_member_that_missed_entries_gets_a_task_with_the_close(cluster: Cluster) -> None:
    owner = await cluster.open(settings=QUICK)
    await append_some(owner)
    cluster.cut.add("bookie2")
    await append_some(owner)
    await owner.log.close()
    (task,) = await copies(cluster)
    assert (task.place, task.target, task.reason) == ("bookie2", "bookie2", CopyReason.UNREPLICATED)
    assert (task.first_entry, task.last_entry) == (3, 5)
    assert (await cluster.ledgers())[task.ledger_id].last_entry == 5


async def test_a_close_to_which_all_members_said_yes_leaves_no_task(cluster: Cluster) -> None:
    owner = await cluster.open(settings=QUICK)
    await append_some(owner)
    await owner.log.close()
    assert await copies(cluster) == []


async def test_a_vacant_place_gets_a_task_with_the_close(two_bookies: Cluster) -> None:
    owner = await two_bookies.open(settings=QUICK)
    await append_some(owner)
    await owner.log.close()
    (task,) = await copies(two_bookies)
    assert (task.place, task.target) == (VACANT, "")


async def test_a_member_that_was_away_during_a_recovery_is_to_complete_the_whole_last_fragment(
    cluster: Cluster,
) -> None:
    owner = await cluster.open(settings=QUICK)
    await append_some(owner, 20)
    cluster.cut.add("bookie2")
    await append_some(owner, 1)
    owner.log.abandon()
    await cluster.take_over(owner, settings=QUICK)
    (task,) = await copies(cluster)
    assert (task.place, task.first_entry, task.last_entry) == ("bookie2", 0, 20)


async def test_open_ledgers_end_that_have_entries_on_a_drained_bookie(four_bookies: Cluster) -> None:
    cluster = four_bookies
    owner = await cluster.open(settings=QUICK)
    await append_some(owner)
    await owner.log.create_cursor("s", 1, SubscriptionType.QUEUE, 0)
    drained = sorted(frozenset.intersection(*(ledger.bookies() for ledger in await open_ledgers(cluster))))[0]
    key = cluster.keyspace.bookie_drain(drained)
    await cluster.store.inner.txn([], [Put(key, encode_drain(Drain(drained)))])

    def replaced() -> bool:
        return all(
            len(ledger.fragments) == 2 and drained not in ledger.fragments[-1].bookies
            for ledger in owner.log._shard.ledgers.values()
        )

    await until(replaced)

    def ended() -> bool:
        owner.log.leave_bookies({drained})
        return all(drained not in ledger.bookies() for ledger in owner.log._shard.ledgers.values())

    await until(ended)
    assert await owner.read_all() == [b"0", b"1", b"2"]
    await append_some(owner)
    assert all(drained not in ledger.bookies() for ledger in await open_ledgers(cluster))
    assert list(owner.log.cursors) == ["s"]
    before = {ledger.ledger_id for ledger in await open_ledgers(cluster)}
    owner.log.leave_bookies({drained})
    await append_some(owner)
    assert {ledger.ledger_id for ledger in await open_ledgers(cluster)} == before, "nothing ends twice"


async def test_idle_ledgers_end_that_have_a_vacant_place_when_a_new_one_would_have_none(two_bookies: Cluster) -> None:
    owner = await two_bookies.open(settings=replace(QUICK, vacant_s=0.0))
    await append_some(owner)
    await owner.log.create_cursor("s", 1, SubscriptionType.QUEUE, 0)
    before = await open_ledgers(two_bookies)
    assert all(VACANT in ledger.fragments[0].bookies for ledger in before)
    await owner.log.trim()
    assert not owner.log._appender._end_asked, "a new one would have that place, too"
    await two_bookies.start_bookie("bookie2")
    await until(owner.log._shard.client.fills_all_places)
    await owner.log.trim()

    def whole() -> bool:
        return all(
            VACANT not in fragment.bookies
            for ledger in owner.log._shard.ledgers.values()
            for fragment in ledger.fragments
        )

    await until(whole)
    assert await owner.read_all() == [b"0", b"1", b"2"]
    assert list(owner.log.cursors) == ["s"]


async def test_a_ledger_with_a_vacant_place_is_not_ended_at_once(two_bookies: Cluster) -> None:
    """A bookie that has a session and does not answer would have every ledger end at every trim."""
    owner = await two_bookies.open(settings=QUICK)
    await append_some(owner)
    before = await open_ledgers(two_bookies)
    await two_bookies.start_bookie("bookie2")
    await until(owner.log._shard.client.fills_all_places)
    await owner.log.trim()
    await append_some(owner)
    assert {ledger.ledger_id for ledger in before} <= {ledger.ledger_id for ledger in await open_ledgers(two_bookies)}


async def test_idle_ledgers_end_whose_member_cannot_be_replaced(four_bookies: Cluster) -> None:
    cluster = four_bookies
    owner = await cluster.open(settings=QUICK)
    await append_some(owner)
    await owner.log._appender._link_ahead()
    await owner.log.create_cursor("s", 1, SubscriptionType.QUEUE, 0)
    open_now = await open_ledgers(cluster)
    newer = max(ledger.ledger_id for ledger in open_now) + 1
    for number in range(4):
        # A bookie that came back with an empty disk takes no old ledgers: it is a spare for none of these.
        key = cluster.keyspace.bookie(f"bookie{number}")
        found = await cluster.store.inner.get(key)
        assert found is not None
        reborn = replace(decode_bookie(found.value), ledger_floor=newer)
        await cluster.store.inner.txn([exists(key)], [Put(key, encode_bookie(reborn), found.lease_id)])
    drained = sorted(frozenset.intersection(*(ledger.bookies() for ledger in open_now)))[0]
    await cluster.store.inner.txn([], [Put(cluster.keyspace.bookie_drain(drained), encode_drain(Drain(drained)))])

    def ended() -> bool:
        owner.log.leave_bookies({drained})
        ledgers = owner.log._shard.ledgers
        return not ledgers.keys() & {ledger.ledger_id for ledger in open_now}

    await until(ended)
    assert await owner.read_all() == [b"0", b"1", b"2"]
