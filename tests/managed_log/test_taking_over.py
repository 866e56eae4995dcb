"""Taking over a shard whose owner vanished, is still there, or crashed at any of its transactions."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace

import pytest
from log_world import Cluster, OpenLog, make_batch, until

from magnetar.ledger.client import CommitOutcome, WriteHandle
from magnetar.managed_log.log import LogDamaged, LogReleased, LogSettings, LogUndecided
from magnetar.metadata.records import LedgerPurpose, LedgerRecord, LedgerState, Segment, SubscriptionType
from magnetar.metadata.shards import ShardChange
from magnetar.metadata.store import Operation
from magnetar.wire.entry import encode_entry

SMALL = LogSettings(
    segment_bytes=1_500, cursor_ledger_bytes=600, retry_first_s=0.001, retry_last_s=0.01, recovery_attempts=2
)
QUEUE = SubscriptionType.QUEUE


async def test_all_that_was_answered_is_there_after_the_owner_vanished(cluster: Cluster) -> None:
    owner = await cluster.open(settings=SMALL)
    sent = [b"%d" % number for number in range(60)]
    for payload in sent:
        await owner.append(payload)
    owner.log.abandon()
    successor = await cluster.take_over(owner, settings=SMALL)
    assert await successor.read_all() == sent
    assert await successor.append(b"next") == 60
    await cluster.check()


async def test_an_idle_shard_is_taken_over_without_creating_a_ledger(cluster: Cluster) -> None:
    owner = await cluster.open()
    await owner.append(b"a")
    successor = await cluster.take_over(owner)
    before = set(await cluster.ledgers())
    third = await cluster.take_over(successor, "broker2")
    assert set(await cluster.ledgers()) == before
    assert await third.read_all() == [b"a"]
    assert all(ledger.state is LedgerState.CLOSED for ledger in (await cluster.ledgers()).values())


async def test_the_old_owners_appends_fail_after_the_claim_and_what_it_was_told_stays(cluster: Cluster) -> None:
    owner = await cluster.open(settings=LogSettings(entry_bytes=200, entries_before_grouping=8))

    async def produce() -> None:
        number = 0
        while not owner.released:
            owner.send(b"%d" % number)
            number += 1
            await asyncio.sleep(0)

    producing = asyncio.create_task(produce())
    await until(lambda: owner.log.end_offset > 50)
    successor = await cluster.take_over(owner)
    found = await successor.read_all()
    await producing
    with pytest.raises(LogReleased, match="owner=`broker1`"):
        owner.send(b"x")
    told = [payload for batch in owner.appended for payload in batch.context]
    assert found[: len(told)] == told
    assert found == [b"%d" % number for number in range(len(found))]
    assert len(owner.released) == 1
    assert await successor.append(b"x") == len(found)
    await cluster.check()


async def test_a_ledger_without_entries_is_unlinked_and_deleted(cluster: Cluster) -> None:
    owner = await cluster.open(settings=SMALL)
    while not owner.log.record.next_ledger:
        await owner.append(b"0" * 50)
    ahead = owner.log.record.next_ledger
    successor = await cluster.take_over(owner, settings=SMALL)
    assert ahead not in await cluster.ledgers()
    assert len(await successor.read_all()) == owner.log.end_offset
    await cluster.check()


@pytest.mark.parametrize("crash", ["crash before", "crash after"])
@pytest.mark.parametrize("at", [0, 1])
async def test_a_takeover_that_crashes_is_begun_again_by_the_next_owner(cluster: Cluster, crash: str, at: int) -> None:
    owner = await cluster.open(settings=SMALL)
    while not owner.log.record.next_ledger:
        await owner.append(b"%050d" % owner.sent)
    await owner.log.create_cursor("s", 1, QUEUE, 0)
    await owner.log.ack("s", floor=2)
    owner.log.abandon()
    await cluster.vanish("broker0")
    seen = iter(range(9))
    cluster.store.fault = lambda _: crash if next(seen) >= at else ""
    taking_over = asyncio.create_task(cluster.open("broker1", SMALL))
    await cluster.store.crashed.wait()
    taking_over.cancel()
    cluster.store.fault = lambda _: ""
    await cluster.vanish("broker1")
    third = await cluster.open("broker2", SMALL)
    assert await third.read_all() == [b"%050d" % number for number in range(owner.sent)]
    assert third.log.cursors["s"].floor == 2
    await cluster.check()


async def test_a_broker_that_renewed_its_session_goes_on(cluster: Cluster) -> None:
    owner = await cluster.open(settings=SMALL)
    await owner.append(b"a")
    session = await cluster.register("broker0")
    await owner.log.renew_session(session)
    for _ in range(40):
        await owner.append(b"0" * 50)
    assert len((await cluster.shard_record()).segments) > 1
    assert (await cluster.shard_record()).owner == session
    assert owner.released == []


# --- the next ledger ---


class Handmade:
    """A shard whose ledgers a test writes itself."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster

    async def write(self, *ledgers: list[tuple[int, list[bytes]]]) -> list[LedgerRecord]:
        """The first is the open segment, beginning at 0, the second is linked ahead; entries are (offset, payloads)."""
        client = self.cluster.client()
        metadata = await self.cluster.claim("broker0")
        records = [client.plan(90 + n, 1, LedgerPurpose.DATA, 1) for n in range(len(ledgers))]
        record = replace(metadata.record, segments=(Segment(90, 0),), next_ledger=91 if len(ledgers) > 1 else 0)
        await metadata.commit(ShardChange(record, put_ledgers=tuple(records)))
        for ledger, entries in zip(records, ledgers, strict=True):
            handle = client.writer(ledger, commit=_refuse, on_confirmed=lambda _: None, on_lost=lambda _: None)
            await _write(handle, entries)
        await self.cluster.vanish("broker0")
        return records


async def _refuse(old: LedgerRecord, new: LedgerRecord) -> CommitOutcome:
    return CommitOutcome.LOST


async def _write(handle: WriteHandle, entries: list[tuple[int, list[bytes]]]) -> None:
    for first_offset, payloads in entries:
        handle.add(encode_entry(first_offset, 1000 + first_offset, [(make_batch(*payloads), b"", len(payloads))]))
    await handle.drain()
    handle.abandon()


async def test_the_ledger_linked_ahead_counts_if_it_begins_where_the_one_before_ends(cluster: Cluster) -> None:
    await Handmade(cluster).write([(0, [b"a", b"b"])], [(2, [b"c"]), (3, [b"d"])])
    successor = await cluster.open("broker1")
    assert await successor.read_all() == [b"a", b"b", b"c", b"d"]
    first, second = (await cluster.shard_record()).segments
    assert (first.ledger_id, first.messages, first.first_time_us) == (90, 2, 1000)
    assert (second.ledger_id, second.messages, second.first_time_us) == (91, 2, 1002)
    await cluster.check()


async def test_a_ledger_linked_ahead_that_begins_elsewhere_is_dropped(cluster: Cluster) -> None:
    await Handmade(cluster).write([(0, [b"a", b"b"])], [(3, [b"stale"])])
    successor = await cluster.open("broker1")
    assert await successor.read_all() == [b"a", b"b"]
    assert set(await cluster.ledgers()) == {90}
    await cluster.check()


async def test_an_empty_segment_gives_way_to_the_ledger_linked_ahead(cluster: Cluster) -> None:
    await Handmade(cluster).write([], [(0, [b"c"])])
    successor = await cluster.open("broker1")
    assert await successor.read_all() == [b"c"]
    assert set(await cluster.ledgers()) == {91}
    await cluster.check()


async def test_a_segment_that_contradicts_its_record_is_not_opened(cluster: Cluster) -> None:
    await Handmade(cluster).write([(7, [b"a"])])
    with pytest.raises(LogDamaged, match="segment does not begin where its record says"):
        await cluster.open("broker1")


async def test_a_takeover_that_cannot_be_decided_changes_nothing_and_works_later(cluster: Cluster) -> None:
    owner = await cluster.open(settings=SMALL)
    await owner.append(b"a")
    owner.log.abandon()
    await cluster.bookies["bookie0"].stop()
    await cluster.bookies["bookie1"].stop()
    with pytest.raises(LogUndecided, match="recovery is undecided"):
        await cluster.take_over(owner, settings=SMALL)
    (ledger,) = (await cluster.ledgers()).values()
    assert ledger.state is LedgerState.IN_RECOVERY
    await cluster.start_bookie("bookie0")
    await until(lambda: len(cluster.directory.registered()) == 2)
    await cluster.vanish("broker1")
    successor = await cluster.open("broker2", SMALL)
    assert await successor.read_all() == [b"a"]


# --- fenced without a claim ---


@pytest.mark.parametrize("linked_ahead", [False, True])
async def test_a_ledger_that_somebody_fenced_is_recovered_by_its_own_owner(
    cluster: Cluster, linked_ahead: bool
) -> None:
    owner = await cluster.open(settings=replace(SMALL, entry_bytes=200, entries_before_grouping=8))
    await owner.append(b"first")
    while linked_ahead and not owner.log.record.next_ledger:
        await owner.append(b"0" * 50)
    count = owner.log.end_offset
    ledger = owner.log._shard.ledgers[owner.log.record.segments[-1].ledger_id]
    fencing = asyncio.create_task(cluster.fence(ledger))
    batches = [owner.send(b"%d" % number) for number in range(100)]
    await owner.stored(batches[-1])
    await fencing
    batches.append(owner.send(b"last"))
    await owner.stored(batches[-1])
    found = await owner.read_all()
    assert found[count:] == [*(b"%d" % number for number in range(100)), b"last"]
    assert [batch.first_offset for batch in owner.appended] == list(range(len(found)))
    assert owner.released == []
    assert ledger.ledger_id != owner.log.record.segments[-1].ledger_id
    await until(lambda: owner.log._shard._tasks == set())
    await cluster.check()
    successor = await cluster.take_over(owner)
    assert await successor.read_all() == found


async def test_fenced_in_a_silent_store_the_shard_is_given_up_without_naming_an_owner(cluster: Cluster) -> None:
    owner = await cluster.open(settings=SMALL)
    await owner.append(b"a")
    cluster.store.silent = True
    await cluster.fence(owner.log._shard.ledgers[owner.log.record.segments[-1].ledger_id])
    owner.send(b"b")
    await until(lambda: owner.released != [])
    assert owner.released[0].owner is None


async def test_a_fenced_cursor_ledger_is_replaced(cluster: Cluster) -> None:
    owner = await cluster.open(settings=SMALL)
    for _ in range(10):
        await owner.append(b"a")
    await owner.log.create_cursor("s", 1, QUEUE, 0)
    fenced = owner.log.record.cursor_ledger
    await cluster.fence(owner.log._shard.ledgers[fenced])
    await owner.log.ack("s", floor=3, ranges=[(5, 7)])
    assert owner.log.record.cursor_ledger != fenced
    assert fenced not in await cluster.ledgers()
    successor = await cluster.take_over(owner)
    cursor = successor.log.cursors["s"]
    assert (cursor.floor, list(cursor.acked)) == (3, [5, 6])


# --- a crash at any transaction ---


class Workload:
    """Appends and acknowledges; knows what it was answered."""

    def __init__(self, owner: OpenLog) -> None:
        self.owner = owner
        self.payloads: list[bytes] = []
        self.answered = 0
        self.floor = 0
        self.acked: set[int] = set()
        self.created = False
        self.pending: set[int] = set()

    async def run(self, count: int) -> None:
        for number in range(count):
            self.payloads.append(b"%050d" % number)
            await self.owner.append(self.payloads[-1])
            self.answered = len(self.payloads)
            if number == 2:
                await self.owner.log.create_cursor("s", 1, QUEUE, 0)
                self.created = True
            if number > 2:
                floor, ranges = (number - 3, []) if number % 5 == 0 else (0, [(number - 1, number)])
                self.pending = {*range(floor), *(o for r in ranges for o in range(*r))}
                await self.owner.log.ack("s", floor=floor, ranges=ranges)
                self.floor = max(self.floor, floor)
                self.acked |= {o for r in ranges for o in range(*r)}

    async def check(self, successor: OpenLog) -> None:
        start = successor.log.start_offset
        found = await successor.read_all()
        stored = self.payloads[start : start + len(found)]
        assert found == stored
        assert start + len(found) >= self.answered
        asked = self.acked | {*range(self.floor), *self.pending}
        assert start <= next(offset for offset in range(1000) if offset not in asked)
        if self.created:
            cursor = successor.log.cursors["s"]
            assert all(cursor.is_acked(offset) for offset in {*self.acked, *range(self.floor)})
            assert not any(cursor.is_acked(offset) for offset in range(300) if offset not in asked)


@pytest.mark.parametrize("crash", ["crash before", "crash after"])
@pytest.mark.parametrize("at", range(36))
async def test_a_crash_at_any_transaction_loses_nothing_that_was_answered(
    cluster: Cluster, crash: str, at: int
) -> None:
    owner = await cluster.open(settings=SMALL)
    seen = 0

    def fault(operations: Sequence[Operation]) -> str:
        nonlocal seen
        seen += 1
        return crash if seen > at else ""

    cluster.store.fault = fault
    work = Workload(owner)
    running = asyncio.create_task(work.run(200))
    crashed = asyncio.create_task(cluster.store.crashed.wait())
    await asyncio.wait({running, crashed}, return_when=asyncio.FIRST_COMPLETED)
    assert crashed.done(), "the workload makes more transactions than that"
    for _ in range(at % 7):
        await asyncio.sleep(0)
    owner.log.abandon()
    running.cancel()
    await asyncio.wait({running})
    cluster.store.fault = lambda _: ""
    successor = await cluster.take_over(owner, settings=SMALL)
    await work.check(successor)
    await cluster.check()
    end = successor.log.end_offset
    assert await successor.append(b"next") == end
    if work.created:
        await successor.log.ack("s", floor=end)
    third = await cluster.take_over(successor, "broker2", SMALL)
    await third.append(b"z")
    assert not work.created or third.log.cursors["s"].floor == end
    await cluster.check()
