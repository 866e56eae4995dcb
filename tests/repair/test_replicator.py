"""Copies of closed ledgers: complete, byte for byte, claimed before they begin, and never in doubt."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

import pytest
from repair_world import RepairWorld, closed_ledger, envelopes

from magnetar.bookie.memory import MemoryEntryStore
from magnetar.ledger.bookie_rpc import AddGroup, AddResult, AddStatus
from magnetar.metadata.codec import encode_ledger, encode_repair
from magnetar.metadata.records import VACANT, CopyClaim, CopyReason, Fragment, RepairSettings
from magnetar.metadata.store import Delete, Put


async def test_a_ledger_of_a_lost_bookie_is_copied_and_all_three_copies_are_equal_on_real_disks(
    world: RepairWorld,
) -> None:
    await world.start("abcd", rocksdb=True)
    await world.put_ledger(closed_ledger(5, 700, (0, ("a", "b", "c"))))
    await world.stop_bookie("a")
    await world.put_task(5, "a", "d")
    await world.until_no_tasks()
    record = await world.check_complete(5)
    assert record.fragments == (Fragment(0, ("d", "b", "c")),)
    assert record.copy is None
    assert await world.index(5) == {"b", "c", "d"}


async def test_a_move_that_would_cost_a_rack_by_now_is_given_back_before_it_is_claimed(world: RepairWorld) -> None:
    """It was planned when b stood where d has stood since b was lost and repaired."""
    await racked(world, a="r1", b="r2", c="r3", d="r4", e="r4")
    await world.put_ledger(closed_ledger(5, 40, (0, ("a", "d", "c"))))
    await world.put_ledger(closed_ledger(6, 40, (0, ("a", "b", "c"))))
    for ledger_id in (5, 6):
        await world.put_task(ledger_id, "c", "e", CopyReason.REBALANCE)
    await world.until_no_tasks()
    assert (await world.check_complete(5)).fragments == (Fragment(0, ("a", "d", "c")),)
    assert (await world.check_complete(6)).fragments == (Fragment(0, ("a", "b", "e")),)
    ended = {"reason": "rebalance", "bookie": "e", "outcome": "would lose a rack"}
    assert world.registry.get_sample_value("magnetar_repair_copies_total", ended) == 1


async def test_a_move_waits_until_it_knows_the_racks_of_all_members(world: RepairWorld) -> None:
    await racked(world, a="r1", b="r2", c="r3", e="r2")
    await world.put_ledger(closed_ledger(5, 40, (0, ("a", "b", "c"))))
    await world.stop_bookie("b")
    await world.put_task(5, "c", "e", CopyReason.REBALANCE)

    async def stalled() -> bool:
        return [task.problem for task in await world.tasks()] == [
            "it waits for b to be back or repaired: racks could be lost meanwhile"
        ]

    await world.until(stalled, "the move says what it waits for")
    record = await world.record(5)
    assert record is not None
    assert record.copy is None
    await world.start_bookie("b", rack="r2")
    await world.until_no_tasks()
    assert (await world.check_complete(5)).fragments == (Fragment(0, ("a", "b", "c")),), "e stands in b's rack"


async def test_a_move_within_a_rack_or_without_racks_waits_for_nobody(world: RepairWorld) -> None:
    await racked(world, a="r1", b="r2", c="r3", e="r3")
    await world.put_ledger(closed_ledger(5, 40, (0, ("a", "b", "c"))))
    await world.stop_bookie("b")
    await world.put_task(5, "c", "e", CopyReason.REBALANCE)
    await world.until_no_tasks()
    record = await world.record(5)
    assert record is not None
    assert record.fragments == (Fragment(0, ("a", "b", "e")),)


async def racked(world: RepairWorld, **racks: str) -> None:
    await world.directory.start()
    for name, rack in racks.items():
        await world.start_bookie(name, rack=rack)


async def test_a_place_keeps_its_position_in_each_fragment_and_its_entries_only_are_copied(world: RepairWorld) -> None:
    await world.start("abcd")
    await world.put_ledger(closed_ledger(5, 90, (0, ("a", "b", "c")), (30, ("b", "d", "c")), (60, ("b", "c", "a"))))
    await world.put_task(5, "a", "d")
    await world.until_no_tasks()
    record = await world.check_complete(5)
    assert [fragment.bookies for fragment in record.fragments] == [("d", "b", "c"), ("b", "d", "c"), ("b", "c", "d")]


async def test_a_target_that_stands_in_a_fragment_already_takes_over_the_others_only(world: RepairWorld) -> None:
    """No single bookie can replace `a` here: the task goes on for what is left, and says so by having no target."""
    await world.start("abcde")
    await world.put_ledger(closed_ledger(5, 60, (0, ("a", "b", "c")), (30, ("a", "b", "d"))))
    await world.put_task(5, "a", "d")

    async def unassigned() -> bool:
        return [task.target for task in await world.tasks()] == [""]

    await world.until(unassigned, "the task waits for another target")
    record = await world.check_complete(5)
    assert [fragment.bookies for fragment in record.fragments] == [("d", "b", "c"), ("a", "b", "d")]
    await world.put_task(5, "a", "e")
    await world.until_no_tasks()
    record = await world.check_complete(5)
    assert [fragment.bookies for fragment in record.fragments] == [("d", "b", "c"), ("e", "b", "d")]


async def test_a_vacant_place_is_filled_and_a_second_one_stays_a_task(world: RepairWorld) -> None:
    await world.start("abc")
    await world.put_ledger(closed_ledger(5, 40, (0, ("a", VACANT, VACANT))))
    await world.put_task(5, VACANT, "b", CopyReason.UNREPLICATED)

    async def unassigned() -> bool:
        return [(task.place, task.target) for task in await world.tasks()] == [(VACANT, "")]

    await world.until(unassigned, "one place is left")
    await world.put_task(5, VACANT, "c", CopyReason.UNREPLICATED)
    await world.until_no_tasks()
    assert (await world.check_complete(5)).fragments == (Fragment(0, ("a", "b", "c")),)


async def test_what_a_member_missed_is_completed_without_a_claim(world: RepairWorld) -> None:
    await world.start("abc")
    missing = [3, 4, 5, 20, 39]
    await world.put_ledger(closed_ledger(5, 40, (0, ("a", "b", "c"))), missing={"b": missing})
    before = await world.record(5)
    await world.put_task(5, "b", "b", CopyReason.UNREPLICATED, first=3, last=39)
    await world.until_no_tasks()
    await world.check_complete(5)
    assert await world.record(5) == before


async def test_what_the_target_holds_counts_once_it_is_synced(world: RepairWorld) -> None:
    syncing = asyncio.Event()
    syncing.set()

    async def sync() -> None:
        await syncing.wait()

    world.stores["b"] = MemoryEntryStore(sync)
    await world.start("abc")
    record = closed_ledger(5, 10, (0, ("a", "b", "c")))
    await world.put_ledger(record, missing={"b": range(10)})
    syncing.clear()
    written = world.local("b").add(AddGroup(5, record.epoch, record.token, tuple(envelopes(record)), recovery=True))
    await world.put_task(5, "b", "b", CopyReason.UNREPLICATED, first=0, last=9)
    for _ in range(2000):
        await asyncio.sleep(0)
    assert not written.done()
    assert await world.tasks(), "a copy was counted that is not durable"
    syncing.set()
    await world.until_no_tasks()
    await world.check_complete(5)


async def test_striped_entries_go_where_their_place_is(world: RepairWorld) -> None:
    await world.start("abcde")
    await world.put_ledger(closed_ledger(5, 50, (0, ("a", "b", "c", "d")), write=2))
    await world.put_task(5, "c", "e")
    await world.until_no_tasks()
    record = await world.check_complete(5)
    held = [entry is not None for entry in (await world.copies(record))["e"]]
    assert held == [i % 4 in (1, 2) for i in range(50)], "no entry that the place does not hold"


async def test_an_empty_ledger_moves_without_a_byte(world: RepairWorld) -> None:
    await world.start("abcd")
    await world.put_ledger(closed_ledger(5, 0, (0, ("a", "b", "c"))))
    await world.put_task(5, "a", "d")
    await world.until_no_tasks()
    assert (await world.check_complete(5)).bookies() == {"b", "c", "d"}


async def test_damage_at_the_target_is_repaired_from_the_others(world: RepairWorld) -> None:
    await world.start("abc")
    await world.put_ledger(closed_ledger(5, 20, (0, ("a", "b", "c"))))
    store: Any = world.stores["b"]
    good = store._written.entries[5][7]
    store._written.entries[5][7] = good[:-1] + bytes([good[-1] ^ 1])
    await world.put_task(5, "b", "b", CopyReason.SCRUB)
    await world.until_no_tasks()
    await world.check_complete(5)
    assert store._written.entries[5][7] == good


async def test_a_damaged_or_silent_source_is_passed_over(world: RepairWorld) -> None:
    await world.start("abcd")
    record = closed_ledger(5, 20, (0, ("a", "b", "c")))
    await world.put_ledger(record)
    for name in "ab":
        store: Any = world.stores[name]
        good = store._written.entries[5][7]
        store._written.entries[5][7] = good[:-1] + bytes([good[-1] ^ 1])
    await world.put_task(5, "a", "d")
    await world.until_no_tasks()
    assert (await world.copies(record))["d"] == envelopes(record)


async def test_without_any_source_nothing_changes_and_the_task_says_why(world: RepairWorld) -> None:
    await world.start("abcd")
    await world.put_ledger(closed_ledger(5, 20, (0, ("a", "b", "c"))))
    world.silenced |= {"a", "b", "c"}
    await world.put_task(5, "a", "d")

    async def stalled() -> bool:
        return "no other bookie gives an entry" in (await world.tasks())[0].problem

    await world.until(stalled, "the task has a problem")
    record = await world.record(5)
    assert record is not None
    assert record.bookies() == {"a", "b", "c"}
    assert record.roles() == await world.index(5) == {"a", "b", "c", "d"}, "the claim stands: the copy goes on"
    world.silenced.clear()
    await world.until_no_tasks()
    await world.check_complete(5)


async def test_a_ledger_that_is_trimmed_while_it_is_copied_leaves_nothing(world: RepairWorld) -> None:
    await world.start("abcd")
    await world.put_ledger(closed_ledger(5, 20, (0, ("a", "b", "c"))))
    world.silenced |= {"a", "b", "c"}
    await world.put_task(5, "a", "d")
    await world.until(lambda: _has_claim(world, 5), "the copy is claimed")
    keys = [world.keyspace.ledger(5), *(world.keyspace.index(name, 5) for name in "abcd")]
    await world.store.txn([], [Delete(key) for key in keys])
    world.silenced.clear()
    await world.until_no_tasks()
    assert await world.record(5) is None
    assert await world.index(5) == set()
    await world.bookies["d"].collect()
    assert [facts.ledger_id for facts in await world.bookies["d"].handlers.ledgers()] == []


async def _has_claim(world: RepairWorld, ledger_id: int) -> bool:
    record = await world.record(ledger_id)
    return record is not None and record.copy is not None


async def test_a_copier_that_wakes_up_after_its_copy_was_given_to_another_changes_nothing(world: RepairWorld) -> None:
    """It was stopped before it finished. Another bookie has claimed the copy meanwhile; both have the entries."""
    await world.start("abcde", replicate=False)
    await world.put_ledger(closed_ledger(5, 20, (0, ("a", "b", "c"))))
    await world.put_task(5, "a", "d")
    held = HeldAdds(world.local("d"))
    sleeper = world.start_replicator("d")
    sleeper._target = held  # type: ignore[assignment]
    await held.asked.wait()
    record = await world.record(5)
    assert record is not None
    taken_over = replace(record, copy=CopyClaim("e", "a", b"another"))
    index = [Delete(world.keyspace.index("d", 5)), Put(world.keyspace.index("e", 5), b"")]
    await world.store.txn([], [Put(world.keyspace.ledger(5), encode_ledger(taken_over)), *index])
    sleeper._tasks_changed = lambda changes: None  # type: ignore[method-assign]  # it has not heard of it
    await world.put_task(5, "a", "e")
    held.release.set()
    world.start_replicator("e")
    await world.until_no_tasks()
    record = await world.check_complete(5)
    assert record.bookies() == {"b", "c", "e"}
    assert record.copy is None
    await world.bookies["d"].collect()
    assert [facts.ledger_id for facts in await world.bookies["d"].handlers.ledgers()] == [], "no role, no entries"


class HeldAdds:
    """The target, whose first add waits until the test lets it go."""

    def __init__(self, target: Any) -> None:
        self._target = target
        self.asked = asyncio.Event()
        self.release = asyncio.Event()
        self.bookie_id = target.bookie_id
        self.read = target.read

    def add(self, group: AddGroup) -> asyncio.Future[AddResult]:
        return asyncio.ensure_future(self._add(group))

    async def _add(self, group: AddGroup) -> AddResult:
        self.asked.set()
        await self.release.wait()
        return await self._target.add(group)  # type: ignore[no-any-return]


async def test_of_two_copies_of_one_ledger_the_second_waits_for_the_first(world: RepairWorld) -> None:
    await world.start("abcde")
    await world.put_ledger(closed_ledger(5, 50, (0, ("a", "b", "c"))))
    await world.put_task(5, "a", "d")
    await world.put_task(5, "b", "e", CopyReason.DRAINING)
    await world.until_no_tasks()
    assert (await world.check_complete(5)).fragments == (Fragment(0, ("d", "e", "c")),)


async def test_a_target_being_collected_takes_nothing_until_that_is_over(world: RepairWorld) -> None:
    await world.start("abcd")
    await world.put_ledger(closed_ledger(5, 20, (0, ("a", "b", "c"))))
    world.bookies["d"].collector.collecting.add(5)
    await world.put_task(5, "a", "d")

    async def stalled() -> bool:
        return "BUSY" in (await world.tasks())[0].problem

    await world.until(stalled, "the target refuses")
    world.bookies["d"].collector.collecting.discard(5)
    await world.until_no_tasks()
    await world.check_complete(5)


async def test_what_stands_at_a_target_that_is_being_collected_does_not_count(world: RepairWorld) -> None:
    """The collector looked at the records before the copy was claimed, and deletes after it was made."""
    await world.start("abcd")
    await world.put_ledger(closed_ledger(5, 20, (0, ("a", "b", "c"))))
    await world.put_task(5, "a", "d")
    await world.until_no_tasks()
    world.bookies["a"].collector.collecting.add(5)
    await world.put_task(5, "d", "a")

    async def stalled() -> bool:
        return "BUSY" in (await world.tasks())[0].problem

    await world.until(stalled, "the target refuses, though it has all of it")
    world.bookies["a"].collector.collecting.discard(5)
    await world.until_no_tasks()
    assert (await world.check_complete(5)).fragments == (Fragment(0, ("a", "b", "c")),)


async def test_nothing_is_begun_while_repair_is_switched_off(world: RepairWorld) -> None:
    await world.start("abcd")
    await world.put_ledger(closed_ledger(5, 20, (0, ("a", "b", "c"))))
    key = world.keyspace.repair()
    await world.store.txn([], [Put(key, encode_repair(RepairSettings(enabled=False)))])
    await world.until(lambda: not world.replicators["d"].settings.enabled, "it has heard of the switch")
    await world.put_task(5, "a", "d")
    await world.until(lambda: world.replicators["d"].tasks(), "it has heard of the task")
    await asyncio.sleep(0)
    assert not world.replicators["d"]._running
    await world.store.txn([], [Put(key, encode_repair(RepairSettings(enabled=True)))])
    await world.until_no_tasks()
    await world.check_complete(5)


@pytest.mark.parametrize("status", [AddStatus.READ_ONLY, AddStatus.NO_ANSWER])
async def test_a_target_that_refuses_leaves_the_record_as_it_was(world: RepairWorld, status: AddStatus) -> None:
    await world.start("abcd", replicate=False)
    await world.put_ledger(closed_ledger(5, 20, (0, ("a", "b", "c"))))
    target: Any = HeldAdds(world.local("d"))

    async def refuse(group: AddGroup) -> AddResult:
        return AddResult(status, "as it is")

    target._add = refuse
    await world.put_task(5, "a", "d")
    world.start_replicator("d")._target = target

    async def stalled() -> bool:
        return status.name in (await world.tasks())[0].problem

    await world.until(stalled, "the task has a problem")
    record = await world.record(5)
    assert record is not None
    assert record.bookies() == {"a", "b", "c"}
