"""Entries that rot or vanish on a disk are found by reading, and come back from the other members."""

from __future__ import annotations

from typing import Any

from repair_world import RepairWorld, closed_ledger

from magnetar.metadata.records import CopyReason
from magnetar.repair.metrics import RepairMetrics
from magnetar.repair.scrub import Scrubber


def scrubber(world: RepairWorld, name: str, *, reborn: bool = False) -> Scrubber:
    return Scrubber(
        name,
        world.local(name),
        world.replicators[name],
        world.store,
        world.keyspace,
        RepairMetrics.of(world.registry),
        reborn=reborn,
        now_us=lambda: world.now_us,
    )


async def test_damage_and_holes_become_a_task_and_are_repaired(world: RepairWorld) -> None:
    await world.start("abc")
    await world.put_ledger(closed_ledger(5, 60, (0, ("a", "b", "c"))), missing={"b": [40, 41]})
    await world.put_ledger(closed_ledger(6, 60, (0, ("a", "b", "c"))))
    store: Any = world.stores["b"]
    rotten = bytearray(store._written.entries[5][7])
    rotten[-1] ^= 1
    store._written.entries[5][7] = bytes(rotten)
    assert await scrubber(world, "b").scrub() == 1
    await world.until_no_tasks()
    await world.check_complete(5)
    assert await scrubber(world, "b").scrub() == 0


async def test_what_is_whole_makes_no_task(world: RepairWorld) -> None:
    await world.start("abcd")
    await world.put_ledger(closed_ledger(5, 60, (0, ("a", "b", "c")), (30, ("a", "d", "c"))))
    await world.put_ledger(closed_ledger(6, 60, (0, ("a", "b", "c", "d")), write=2))
    for name in "abcd":
        assert await scrubber(world, name).scrub() == 0
    assert await world.tasks() == []


async def test_a_ledger_that_has_a_task_gets_no_other(world: RepairWorld) -> None:
    await world.start("abcd", replicate=False)
    for name in "bd":
        world.start_replicator(name)
    await world.put_ledger(closed_ledger(5, 60, (0, ("a", "b", "c"))), missing={"b": [3]})
    world.silenced |= {"a", "b", "c"}
    await world.put_task(5, "b", "d", CopyReason.DRAINING)
    await scrubber(world, "b").scrub()
    assert [(task.place, task.target) for task in await world.tasks()] == [("b", "d")]


async def test_a_bookie_reborn_without_its_data_gets_it_back(world: RepairWorld) -> None:
    await world.start("abc")
    lost = {"b": range(60)}
    for ledger_id in range(5, 9):
        await world.put_ledger(closed_ledger(ledger_id, 60, (0, ("a", "b", "c"))), missing=lost)
    reborn = scrubber(world, "b", reborn=True)
    reborn.start()

    await world.until(lambda: not reborn._reborn, "all of it was looked at")
    await world.until_no_tasks()
    await reborn.stop()
    for ledger_id in range(5, 9):
        await world.check_complete(ledger_id)
