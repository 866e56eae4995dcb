"""The ledger layer on real bookies in this process: writing, losing, recovering, reading."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Callable
from dataclasses import replace

import pytest
from real_bookies import RealBookies

from magnetar.ledger.client import (
    CommitOutcome,
    EntryMissing,
    EntryUnavailable,
    LedgerBusy,
    LedgerClient,
    LedgerLost,
    LedgerSettings,
    LostReason,
    NotEnoughBookies,
    RecoverySuperseded,
    RecoveryUndecided,
    Standing,
    WriteHandle,
    WriterClosed,
)
from magnetar.metadata.records import VACANT, BookieState, Fragment, LedgerPurpose, LedgerRecord, LedgerState


class Ledgers:
    """A client, its bookies, and one ledger's record as the owner of the shard keeps it."""

    def __init__(self, bookies: RealBookies) -> None:
        self.bookies = bookies
        settings = LedgerSettings(hedge_s=0.01, recovery_give_up_s=0.3)
        self.client = LedgerClient(bookies, now_us=lambda: 17, rng=random.Random(1), settings=settings)
        self.record = self.client.plan(1, 2, LedgerPurpose.DATA, epoch=3)
        self.confirmed: list[int] = []
        self.lost: list[LedgerLost] = []
        self.commit_gate = asyncio.Event()
        self.commit_gate.set()

    async def commit(self, old: LedgerRecord, new: LedgerRecord) -> CommitOutcome:
        await self.commit_gate.wait()
        if old != self.record:
            return CommitOutcome.LOST
        self.record = new
        return CommitOutcome.COMMITTED

    def writer(self) -> WriteHandle:
        return self.client.writer(
            self.record, commit=self.commit, on_confirmed=self.confirmed.append, on_lost=self.lost.append
        )

    async def write(self, *payloads: bytes) -> WriteHandle:
        writer = self.writer()
        for payload in payloads:
            writer.add(payload)
        await writer.drain()
        return writer

    def claim(self) -> None:
        self.record = self.record.with_state(LedgerState.IN_RECOVERY, self.record.epoch + 1)


@pytest.fixture
async def ledgers() -> AsyncIterator[Ledgers]:
    bookies = RealBookies(["b1", "b2", "b3"])
    yield Ledgers(bookies)
    await bookies.stop()


async def until(holds: Callable[[], bool]) -> None:
    """Lets everybody run until it holds."""
    async with asyncio.timeout(10):
        while not holds():  # noqa: ASYNC110
            await asyncio.sleep(0)


async def test_what_is_written_closed_and_read_is_what_was_added(ledgers: Ledgers) -> None:
    writer = ledgers.writer()
    payloads = [f"payload {n}".encode() * 100 for n in range(500)]
    assert [writer.add(payload) for payload in payloads] == list(range(500))
    await writer.drain()
    assert ledgers.confirmed[-1] == writer.lac == 499
    assert ledgers.confirmed == sorted(ledgers.confirmed)
    record = await writer.close()
    assert (record.state, record.last_entry, record.length) == (LedgerState.CLOSED, 499, sum(map(len, payloads)))
    assert writer.unreplicated == []
    assert ledgers.bookies.listeners == 0

    reader = ledgers.client.reader(record)
    got: list[bytes] = []
    while len(got) < 500:
        entries = await reader.read(len(got), 10_000, 20_000)
        assert [entry.entry_id for entry in entries] == list(range(len(got), len(got) + len(entries)))
        got += [bytes(entry.payload) for entry in entries]
    assert got == payloads


async def test_entries_added_at_once_travel_together(ledgers: Ledgers) -> None:
    await ledgers.write(*[b"x"] * 100)
    assert ledgers.confirmed == [99]


async def test_adds_go_on_while_a_bookie_hangs_and_its_gaps_are_known(ledgers: Ledgers) -> None:
    ledgers.bookies["b3"].hung = True
    writer = await ledgers.write(b"a", b"b")
    record = await writer.close(settle_s=0.01)
    assert record.last_entry == 1
    (gap,) = writer.unreplicated
    assert (gap.bookie, gap.first_entry, gap.last_entry) == ("b3", 0, 1)


async def test_a_lost_member_is_replaced_when_idle(ledgers: Ledgers) -> None:
    writer = await ledgers.write(b"a")
    ledgers.bookies.set("b4", BookieState.WRITABLE)
    ledgers.bookies.set("b2", None)
    await writer.drain()
    assert [fragment.first_entry for fragment in ledgers.record.fragments] == [0, 1]
    assert writer.record == ledgers.record
    assert set(ledgers.record.fragments[-1].bookies) == {"b1", "b3", "b4"}
    writer.add(b"b")
    record = await writer.close()
    assert [bytes(e.payload) for e in await ledgers.client.reader(record).read(1, 1)] == [b"b"]


async def test_completions_go_on_while_a_change_is_of_unknown_outcome_but_nothing_is_closed(ledgers: Ledgers) -> None:
    writer = await ledgers.write(b"a")
    ledgers.commit_gate.clear()
    ledgers.bookies.set("b4", BookieState.WRITABLE)
    ledgers.bookies.set("b2", None)
    writer.add(b"b")
    await until(lambda: writer.lac == 1)
    with pytest.raises(LedgerBusy):
        writer.closed_record()
    closing = asyncio.ensure_future(writer.close())
    await asyncio.sleep(0)
    assert not closing.done()
    ledgers.commit_gate.set()
    assert (await closing).last_entry == 1


async def test_fewer_than_an_ack_quorum_make_adds_wait_not_fail(ledgers: Ledgers) -> None:
    writer = await ledgers.write(b"a")
    for name in ("b2", "b3"):
        ledgers.bookies[name].down = True
        ledgers.bookies.set(name, None)
    writer.add(b"b")
    await until(lambda: writer.stalled is not None)
    assert "b2 FAILED" in (writer.stalled or "")
    ledgers.bookies["b2"].down = False
    ledgers.bookies.set("b2", BookieState.WRITABLE)
    await writer.drain()
    assert writer.lac == 1
    assert writer.stalled is None


async def test_recovery_fences_the_writer_and_keeps_what_was_confirmed(ledgers: Ledgers) -> None:
    writer = await ledgers.write(b"a", b"b", b"c")
    ledgers.claim()
    recovered = await ledgers.client.recover(ledgers.record)
    assert (recovered.record.state, recovered.record.last_entry, recovered.record.length) == (LedgerState.CLOSED, 2, 3)
    assert recovered.last_payload == b"c"
    writer.add(b"d")
    with pytest.raises(LedgerLost):
        await writer.drain()
    assert [lost.reason for lost in ledgers.lost] == [LostReason.FENCED]
    assert (ledgers.lost[0].last_confirmed, writer.lost) == (2, ledgers.lost[0])
    with pytest.raises(LedgerLost):
        writer.add(b"e")
    with pytest.raises(LedgerLost):
        writer.closed_record()
    assert ledgers.confirmed[-1] == 2
    assert ledgers.bookies.listeners == 0


async def test_recovery_does_not_wait_for_a_hung_bookie(ledgers: Ledgers) -> None:
    await ledgers.write(b"a", b"b")
    ledgers.bookies["b2"].hung = True
    ledgers.claim()
    async with asyncio.timeout(0.2):
        assert (await ledgers.client.recover(ledgers.record)).record.last_entry == 1


async def test_an_empty_ledger_is_recovered_empty(ledgers: Ledgers) -> None:
    ledgers.claim()
    recovered = await ledgers.client.recover(ledgers.record)
    assert (recovered.record.last_entry, recovered.record.length, recovered.last_payload) == (-1, 0, None)


async def test_recoverers_at_once_agree(ledgers: Ledgers) -> None:
    await ledgers.write(*(b"%d" % n for n in range(300)))
    ledgers.claim()
    recovered = await ledgers.client.recover_all([ledgers.record] * 4)
    assert {(r.record.last_entry, r.record.length, r.last_payload) for r in recovered} == {(299, 790, b"299")}


async def test_recovery_without_enough_bookies_is_undecided_and_says_what_each_said(ledgers: Ledgers) -> None:
    await ledgers.write(b"a")
    ledgers.bookies["b1"].down = ledgers.bookies["b2"].hung = True
    ledgers.claim()
    with pytest.raises(RecoveryUndecided) as undecided:
        await ledgers.client.recover(ledgers.record)
    assert undecided.value.said["b1"] == "lac: UNKNOWN bookie is not registered"
    assert undecided.value.said["b2"] == "no answer yet"
    ledgers.bookies["b2"].hung = False
    assert (await ledgers.client.recover(ledgers.record)).record.last_entry == 0


async def test_a_recoverer_with_an_old_epoch_gives_way(ledgers: Ledgers) -> None:
    await ledgers.write(b"a")
    ledgers.claim()
    old = ledgers.record
    ledgers.claim()
    await ledgers.client.recover(ledgers.record)
    with pytest.raises(RecoveryUndecided):
        await ledgers.client.recover(old)


async def test_the_writer_can_ask_whether_the_ledger_is_still_its_own(ledgers: Ledgers) -> None:
    writer = await ledgers.write(b"a")
    assert await writer.standing() is Standing.MINE
    for name in ("b1", "b2"):
        ledgers.bookies[name].down = True
    assert await writer.standing() is Standing.UNKNOWN
    for name in ("b1", "b2"):
        ledgers.bookies[name].down = False
    ledgers.claim()
    await ledgers.client.recover(ledgers.record)
    assert await writer.standing() is Standing.LOST
    assert [lost.reason for lost in ledgers.lost] == [LostReason.STALE_EPOCH]


async def test_one_bookie_that_was_not_fenced_vouches_for_nobody_if_another_one_could_be(ledgers: Ledgers) -> None:
    pair = (Fragment(0, ("b1", "b2")),)
    ledgers.record = replace(ledgers.record, write_quorum=2, ack_quorum=2, fragments=pair)
    writer = ledgers.writer()
    assert await writer.standing() is Standing.MINE
    ledgers.bookies["b2"].down = True
    ledgers.claim()
    assert (await ledgers.client.recover(ledgers.record)).record.last_entry == -1
    ledgers.bookies["b1"].down, ledgers.bookies["b2"].down = True, False
    assert await writer.standing() is Standing.UNKNOWN
    ledgers.bookies["b1"].down = False
    assert await writer.standing() is Standing.LOST


async def test_a_reader_goes_to_the_next_replica_and_hedges_slow_ones(ledgers: Ledgers) -> None:
    record = await (await ledgers.write(b"a", b"b")).close()
    for first, second in (("b1", "b2"), ("b2", "b3"), ("b3", "b1")):
        ledgers.bookies[first].down = ledgers.bookies[second].hung = True
        entries = await ledgers.client.reader(record).read(0, 9)
        assert [bytes(entry.payload) for entry in entries] == [b"a", b"b"]
        ledgers.bookies[first].down = ledgers.bookies[second].hung = False


async def test_a_damaged_copy_is_never_returned(ledgers: Ledgers) -> None:
    record = await (await ledgers.write(b"a", b"b")).close()
    for name in ("b1", "b2"):
        entries = ledgers.bookies[name].store._written.entries[record.ledger_id]
        entries[1] = entries[1][:-1] + b"x"
    reader = ledgers.client.reader(record)
    assert [bytes(entry.payload) for entry in await reader.read(1, 1)] == [b"b"]


async def test_unknown_beats_absent(ledgers: Ledgers) -> None:
    record = await (await ledgers.write(b"a", b"b")).close()
    beyond = replace(record, last_entry=5)
    with pytest.raises(EntryMissing):
        await ledgers.client.reader(beyond).read(3, 3)
    ledgers.bookies["b2"].down = True
    with pytest.raises(EntryUnavailable) as unavailable:
        await ledgers.client.reader(beyond).read(3, 3)
    assert unavailable.value.said["b2"] == "UNKNOWN bookie is not registered"


async def test_an_open_ledger_is_read_up_to_its_lac_only(ledgers: Ledgers) -> None:
    writer = await ledgers.write(b"a", b"b")
    with pytest.raises(ValueError, match="up to its writer"):
        ledgers.client.reader(ledgers.record)
    reader = ledgers.client.reader(ledgers.record, lac=lambda: writer.lac)
    for name in ("b1", "b2"):
        ledgers.bookies[name].hung = True
    writer.add(b"c")
    await asyncio.sleep(0)
    assert [entry.entry_id for entry in await reader.read(0, 9)] == [0, 1]
    with pytest.raises(ValueError, match="no such confirmed entries"):
        await reader.read(2, 2)


async def test_a_reader_follows_its_record(ledgers: Ledgers) -> None:
    writer = await ledgers.write(b"a")
    reader = ledgers.client.reader(ledgers.record, lac=lambda: 0)
    record = await writer.close()
    reader.update(record)
    assert reader.last_entry == 0
    assert reader.record == record


async def test_a_planned_ledger_may_have_vacant_places_but_not_too_many(ledgers: Ledgers) -> None:
    ledgers.bookies.set("b3", None)
    record = ledgers.client.plan(9, 2, LedgerPurpose.CURSOR, epoch=1)
    assert sorted(record.fragments[0].bookies) == [VACANT, "b1", "b2"]
    assert (record.state, record.created_us, len(record.token)) == (LedgerState.OPEN, 17, 16)
    ledgers.bookies.set("b2", None)
    with pytest.raises(NotEnoughBookies):
        ledgers.client.plan(9, 2, LedgerPurpose.CURSOR, epoch=1)


async def test_a_change_that_cannot_be_committed_loses_the_ledger(ledgers: Ledgers) -> None:
    async def commit(old: LedgerRecord, new: LedgerRecord) -> CommitOutcome:
        raise OSError("no store")

    writer = ledgers.client.writer(
        ledgers.record, commit=commit, on_confirmed=ledgers.confirmed.append, on_lost=ledgers.lost.append
    )
    ledgers.bookies.set("b4", BookieState.WRITABLE)
    ledgers.bookies.set("b2", None)
    await until(lambda: bool(ledgers.lost))
    assert ledgers.lost[0].reason is LostReason.FAILED
    with pytest.raises(LedgerLost):
        await writer.drain()


async def test_an_abandoned_writer_calls_nothing_back(ledgers: Ledgers) -> None:
    writer = ledgers.writer()
    writer.add(b"a")
    draining = asyncio.ensure_future(writer.drain())
    await asyncio.sleep(0)
    writer.abandon()
    with pytest.raises(WriterClosed):
        await draining
    await until(lambda: ledgers.bookies["b1"].commits.held_bytes == 0)
    assert ledgers.confirmed == []
    with pytest.raises(WriterClosed):
        writer.add(b"b")


async def test_a_closed_writer_takes_nothing_more(ledgers: Ledgers) -> None:
    writer = await ledgers.write(b"a")
    assert writer.closed_record() == writer.closed_record()
    with pytest.raises(WriterClosed):
        writer.add(b"b")


def test_a_superseded_recovery_is_an_undecided_one() -> None:
    assert issubclass(RecoverySuperseded, RecoveryUndecided)
