"""The one queue: what is answered was durable before, and nothing slips in between a fence and the read behind it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
from prometheus_client import CollectorRegistry
from structlog.testing import capture_logs

from magnetar.bookie.entry_store import EntryStore, LedgerMark, encode_mark
from magnetar.bookie.group_commit import GROUP_BYTES_MAX, GroupCommit
from magnetar.bookie.handlers import BookieHandlers
from magnetar.bookie.judge import Conditions, ReadConditions
from magnetar.bookie.local import LocalBookie
from magnetar.bookie.memory import MemoryEntryStore
from magnetar.bookie.metrics import BookieMetrics
from magnetar.bookie.reads import Reads
from magnetar.ledger.bookie_rpc import AddStatus, EntryOutcome

MIB = 1 << 20


class Node:
    """A bookie's queue and handlers over one store, without a server around them."""

    def __init__(self, store: EntryStore, die: Callable[[str], object], queue_bytes: int = 4 * MIB) -> None:
        self.registry = CollectorRegistry()
        metrics = BookieMetrics(self.registry, "b")
        self.commits = GroupCommit(store, Conditions, metrics, queue_bytes=queue_bytes, die=die)
        self.reads = Reads(store, self.commits, lambda ledger_id: ReadConditions(), metrics)
        self.handlers = BookieHandlers(store, self.commits, self.reads, lambda ledger_id: False)
        self.commits.start()

    async def close(self) -> None:
        await self.handlers.close()
        await self.commits.close()


@pytest.fixture
async def store(held_disk: Any) -> MemoryEntryStore:
    return MemoryEntryStore(held_disk.sync)


@pytest.fixture
async def node(store: MemoryEntryStore, deaths: Any, held_disk: Any) -> AsyncIterator[Node]:
    node = Node(store, deaths)
    yield node
    held_disk.release()
    await node.close()
    assert node.commits.held_bytes == 0
    assert not deaths.messages


async def spin() -> None:
    """Lets everything run that can."""
    for _ in range(50):
        await asyncio.sleep(0)


def outcomes(result: Any) -> list[str]:
    return [answer.outcome.name for answer in result.answers]


async def test_an_add_is_answered_only_after_its_fsync(node: Node, held_disk: Any, writer: Any) -> None:
    held_disk.hold()
    answer = node.handlers.add(writer().add(0))
    await held_disk.syncing.wait()
    await spin()
    assert not answer.done()
    held_disk.release()
    assert (await answer).status is AddStatus.OK


async def test_what_was_answered_survives_a_crash_and_what_was_written_only_does_not(
    node: Node, store: MemoryEntryStore, held_disk: Any, writer: Any
) -> None:
    await node.handlers.add(writer().add(0))
    held_disk.hold()
    node.handlers.add(writer().add(1))
    await held_disk.syncing.wait()
    after = store.crash()
    assert await after.lookup([(7, 0), (7, 1)]) == {(7, 0): writer().entry(0), (7, 1): None}


async def test_adds_that_wait_for_one_fsync_share_the_next(node: Node, held_disk: Any, writer: Any) -> None:
    held_disk.hold()
    first = node.handlers.add(writer(1).add(0))
    await held_disk.syncing.wait()
    rest = [node.handlers.add(writer(ledger_id).add(0, 1)) for ledger_id in range(2, 200)]
    await spin()
    held_disk.release()
    assert {result.status for result in await asyncio.gather(first, *rest)} == {AddStatus.OK}
    assert node.registry.get_sample_value("magnetar_bookie_groups_total", {"bookie": "b"}) == 2
    assert node.registry.get_sample_value("magnetar_bookie_added_entries_total", {"bookie": "b"}) == 397


async def test_an_add_queued_before_a_fence_cannot_follow_the_negative_told_after_it(
    node: Node, held_disk: Any, writer: Any
) -> None:
    """The old writer's add waits for the running fsync; the recoverer's fencing read comes after it in the queue.

    Whatever the read says must hold for ever: here the add is in an earlier place, so the read must see it.
    """
    old, new = writer(7, 1), writer(7, 2)
    await node.handlers.add(old.add(0))
    held_disk.hold()
    node.handlers.add(writer(8).add(0))
    await held_disk.syncing.wait()
    late = node.handlers.add(old.add(1))
    read = node.handlers.read(new.read(1, 1, fence=True))
    held_disk.release()
    assert (await late).status is AddStatus.OK
    assert outcomes(await read) == ["HAVE"]


async def test_an_add_that_comes_while_the_fence_is_written_is_fenced(node: Node, held_disk: Any, writer: Any) -> None:
    """The add arrives while the fence's group is being fsynced: it is judged with the next group, after the fence."""
    old, new = writer(7, 1), writer(7, 2)
    await node.handlers.add(old.add(0))
    held_disk.hold()
    read = node.handlers.read(new.read(1, 1, fence=True))
    await held_disk.syncing.wait()
    late = node.handlers.add(old.add(1))
    await spin()
    assert not read.done()
    held_disk.release()
    assert outcomes(await read) == ["PROVABLY_NOT"]
    assert (await late).status is AddStatus.FENCED
    assert outcomes(await node.handlers.read(new.read(1, 1))) == ["PROVABLY_NOT"]


async def test_an_add_queued_behind_the_fence_in_the_same_group_is_fenced(
    node: Node, held_disk: Any, writer: Any
) -> None:
    old, new = writer(7, 1), writer(7, 2)
    held_disk.hold()
    node.handlers.add(writer(8).add(0))
    await held_disk.syncing.wait()
    read = node.handlers.read(new.read(0, 0, fence=True))
    await spin()
    late = node.handlers.add(old.add(0))
    held_disk.release()
    assert outcomes(await read) == ["PROVABLY_NOT"]
    assert (await late).status is AddStatus.FENCED


async def test_a_fencing_read_is_answered_only_when_its_fence_is_durable(
    node: Node, store: MemoryEntryStore, held_disk: Any, writer: Any
) -> None:
    held_disk.hold()
    read = node.handlers.read(writer().read(0, 0, fence=True))
    lac = node.handlers.read_lac(writer(8).lac(fence=True))
    await held_disk.syncing.wait()
    await spin()
    assert not read.done()
    assert not lac.done()
    assert await store.crash().marks() == []
    held_disk.release()
    await asyncio.gather(read, lac)
    assert [(ledger_id, mark.fenced) for ledger_id, mark in await store.crash().marks()] == [(7, True), (8, True)]


async def test_a_fence_of_an_unknown_ledger_refuses_its_first_add(node: Node, writer: Any) -> None:
    lac = await node.handlers.read_lac(writer(7, 2).lac(fence=True))
    assert (lac.outcome, lac.fenced, lac.epoch) == (EntryOutcome.PROVABLY_NOT, True, 2)
    assert (await node.handlers.add(writer(7, 1).add(0))).status is AddStatus.FENCED
    assert (await node.handlers.add(writer(7, 2).add(0, recovery=True))).status is AddStatus.OK


async def test_a_read_does_not_show_an_entry_before_it_is_durable(node: Node, held_disk: Any, writer: Any) -> None:
    held_disk.hold()
    add = node.handlers.add(writer().add(0))
    await held_disk.syncing.wait()
    read = node.handlers.read(writer().read(0, 0))
    lac = node.handlers.read_lac(writer().lac())
    other = node.handlers.read(writer(8).read(0, 0))
    assert outcomes(await other) == ["PROVABLY_NOT"]
    await spin()
    assert not read.done()
    assert not lac.done()
    held_disk.release()
    assert outcomes(await read) == ["HAVE"]
    assert (await lac).last_entry == 0
    assert add.done()


async def test_a_repeated_add_waits_for_an_fsync_of_its_own(node: Node, held_disk: Any, writer: Any) -> None:
    await node.handlers.add(writer().add(0))
    held_disk.hold()
    again = node.handlers.add(writer().add(0))
    await held_disk.syncing.wait()
    assert not again.done()
    held_disk.release()
    assert (await again).status is AddStatus.OK


async def test_duplicates_are_recognised_after_a_restart(
    node: Node, store: MemoryEntryStore, deaths: Any, writer: Any
) -> None:
    await node.handlers.add(writer().add(0, 1, 2))
    after = Node(store.crash(), deaths)
    assert (await after.handlers.add(writer().add(1, 2, 3))).status is AddStatus.OK
    assert (await after.handlers.add(writer().add(2, payload=b"other"))).status is AddStatus.CONFLICT
    assert (await after.handlers.read_lac(writer().lac())).last_entry == 3
    await after.close()


async def test_a_fence_and_its_epoch_survive_a_restart(
    node: Node, store: MemoryEntryStore, deaths: Any, writer: Any
) -> None:
    await node.handlers.read_lac(writer(7, 5).lac(fence=True))
    after = Node(store.crash(), deaths)
    assert (await after.handlers.add(writer(7, 5).add(0))).status is AddStatus.FENCED
    stale = await after.handlers.add(writer(7, 4).add(0, recovery=True))
    assert stale.status is AddStatus.STALE_EPOCH
    assert outcomes(await after.handlers.read(writer(7, 4).read(0, 0, fence=True))) == ["UNKNOWN"]
    await after.close()


async def test_a_store_that_stalls_keeps_the_group_and_its_order(
    node: Node, store: MemoryEntryStore, writer: Any
) -> None:
    store.stalls = 3
    answers = await asyncio.gather(*(node.handlers.add(writer().add(entry_id)) for entry_id in range(5)))
    assert {answer.status for answer in answers} == {AddStatus.OK}
    assert node.registry.get_sample_value("magnetar_bookie_stalls_total", {"bookie": "b"}) == 3
    assert (await store.load([7]))[7].last_entry == 4


async def test_the_queue_is_bounded_in_bytes_and_tells_busy_beyond(
    store: MemoryEntryStore, held_disk: Any, deaths: Any, writer: Any
) -> None:
    node = Node(store, deaths, queue_bytes=100_000)
    held_disk.hold()
    answers = [node.handlers.add(writer().add(e, payload=b"x" * 10_000)) for e in range(20)]
    await spin()
    busy = [answer.result().status for answer in answers if answer.done()]
    assert busy == [AddStatus.BUSY] * 11
    assert node.commits.held_bytes <= 100_000
    room = asyncio.ensure_future(node.commits.room())
    await spin()
    assert not room.done()
    fence = node.handlers.read_lac(writer(8).lac(fence=True))
    held_disk.release()
    await room
    assert (await fence).fenced
    assert [answer.result().status.name for answer in answers].count("OK") == 9
    await node.close()


async def test_one_entry_larger_than_the_queue_is_taken_when_nothing_else_waits(
    store: MemoryEntryStore, deaths: Any, writer: Any
) -> None:
    node = Node(store, deaths, queue_bytes=100_000)
    assert (await node.handlers.add(writer().add(0, payload=b"x" * 200_000))).status is AddStatus.OK
    await node.close()


async def test_a_group_is_bounded_in_bytes(node: Node, held_disk: Any, writer: Any) -> None:
    held_disk.hold()
    first = node.handlers.add(writer(1).add(0))
    await held_disk.syncing.wait()
    size = GROUP_BYTES_MAX // 4
    rest = [node.handlers.add(writer(2).add(e, payload=b"x" * size)) for e in range(7)]
    held_disk.release()
    await asyncio.gather(first, *rest)
    assert node.registry.get_sample_value("magnetar_bookie_groups_total", {"bookie": "b"}) == 4


async def test_a_failed_fsync_ends_the_process_and_answers_nothing(
    store: MemoryEntryStore, held_disk: Any, deaths: Any, writer: Any
) -> None:
    node = Node(store, deaths)
    held_disk.error = OSError(5, "Input/output error")
    answer = node.handlers.add(writer().add(0))
    await deaths.died.wait()
    assert not answer.done()
    assert len(deaths.messages) == 1
    assert "fsync failed" in deaths.messages[0]


async def test_closing_answers_what_is_queued_and_refuses_what_comes_later(node: Node, writer: Any) -> None:
    answers = [node.handlers.add(writer().add(entry_id)) for entry_id in range(3)]
    await node.commits.close()
    assert [answer.result().status.name for answer in answers] == ["OK"] * 3
    assert (await node.handlers.add(writer().add(3))).status is AddStatus.BUSY


async def test_a_damaged_entry_reads_as_unknown_and_the_ones_beside_it_as_they_are(
    node: Node, store: MemoryEntryStore, writer: Any
) -> None:
    await node.handlers.add(writer().add(0, 1, 2))
    store.damaged.add((7, 1))
    with capture_logs() as logged:
        for _ in range(2):
            found = outcomes(await node.handlers.read(writer().read(0, 3)))
            assert found == ["HAVE", "UNKNOWN", "HAVE", "PROVABLY_NOT"]
    assert node.registry.get_sample_value("magnetar_bookie_damaged_entries_total", {"bookie": "b"}) == 2
    assert [(line["ledger"], line["entry"]) for line in logged if line["event"] == "an entry is damaged"] == [(7, 1)]


async def test_ids_that_no_entry_has_are_unknown_not_absent(node: Node, writer: Any) -> None:
    for first, last in ((5, 4), (-1, 0), (0, 1 << 63)):
        assert outcomes(await node.handlers.read(writer().read(first, last))) == ["UNKNOWN"]
    assert outcomes(await node.handlers.read(writer(0).read(0, 0, fence=True))) == ["UNKNOWN"]
    assert (await node.handlers.read_lac(writer(0).lac(fence=True))).outcome is EntryOutcome.UNKNOWN


async def test_the_ledgers_remembered_are_bounded_and_forgotten_ones_are_known_from_the_store(
    node: Node, writer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("magnetar.bookie.group_commit.LEDGERS_REMEMBERED_MAX", 10)
    for ledger_id in range(1, 50):
        await node.handlers.add(writer(ledger_id, 3).add(0, 1))
    assert sum(node.commits.remembered(ledger_id) is not None for ledger_id in range(1, 50)) == 10
    assert (await node.handlers.add(writer(1, 3).add(1, payload=b"other"))).status is AddStatus.CONFLICT
    assert (await node.handlers.add(writer(2, 2).add(2))).status is AddStatus.STALE_EPOCH
    assert (await node.handlers.read_lac(writer(3, 3).lac())).last_entry == 1


async def test_many_reads_share_their_trips_and_each_gets_its_own_answer(node: Node, writer: Any) -> None:
    for ledger_id in range(1, 20):
        await node.handlers.add(writer(ledger_id).add(0, 1, payload=b"%d" % ledger_id))
    reads = [node.handlers.read(writer(ledger_id).read(1, 2)) for ledger_id in range(1, 20)]
    for ledger_id, result in enumerate(await asyncio.gather(*reads), 1):
        assert outcomes(result) == ["HAVE", "PROVABLY_NOT"]
        assert result.answers[0].entry == writer(ledger_id).entry(1, b"%d" % ledger_id)


def test_the_mark_of_a_ledger_is_small() -> None:
    assert len(encode_mark(LedgerMark(b"t" * 16, 1))) == 34


async def test_adds_of_the_same_process_wait_for_room_in_their_order(node: Node, held_disk: Any, writer: Any) -> None:
    local = LocalBookie("b", node.handlers)
    ledger = writer()
    held_disk.hold()
    answers = [local.add(ledger.add(entry, payload=bytes(MIB))) for entry in range(12)]
    await held_disk.syncing.wait()
    await spin()
    assert not any(answer.done() for answer in answers)
    assert node.commits.held_bytes <= 4 * MIB
    held_disk.release()
    assert [result.status for result in await asyncio.gather(*answers)] == [AddStatus.OK] * 12
    local.close()


async def test_an_add_that_waits_for_room_is_answered_at_its_deadline(node: Node, held_disk: Any, writer: Any) -> None:
    local = LocalBookie("b", node.handlers, timeout_s=0.05)
    ledger = writer()
    held_disk.hold()
    answers = [local.add(ledger.add(entry, payload=bytes(MIB))) for entry in range(12)]
    assert {result.status for result in await asyncio.gather(*answers)} == {AddStatus.NO_ANSWER}
    local.close()
