"""Copies of a ledger compared: what is whole is counted, what is missing, damaged or different is named."""

from __future__ import annotations

from dataclasses import replace

import pytest
from repair_world import RepairWorld, closed_ledger, envelopes

from magnetar.ledger.bookie_rpc import AddGroup
from magnetar.metadata.records import VACANT
from magnetar.repair import verification
from magnetar.repair.verification import Verification, verify
from magnetar.wire.envelope import encode

ABC = (0, ("a", "b", "c"))


async def compared(world: RepairWorld, ledger_id: int, first_entry: int = 0) -> Verification:
    record = await world.record(ledger_id)
    assert record is not None
    return await verify(record, world.directory, first_entry, lambda: True)


async def test_whole_copies_are_counted_and_their_bookies_named(world: RepairWorld) -> None:
    await world.start("abcd", replicate=False)
    await world.put_ledger(closed_ledger(1, 40, ABC, (30, ("a", "b", "d"))))
    found = await compared(world, 1)
    assert (found.entries, found.copies, found.said(), found.next_entry) == (40, 120, [], 0)
    assert found.bookies == set("abcd")
    await world.put_ledger(closed_ledger(2, 40, (0, ("a", "b", "c", "d")), write=2))
    assert (await compared(world, 2)).copies == 80


async def test_a_large_ledger_is_compared_in_parts(world: RepairWorld, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verification, "CHUNK_ENTRIES", 15)
    await world.start("abc", replicate=False)
    await world.put_ledger(closed_ledger(1, 40, ABC))
    parts = [await compared(world, 1, first) for first in (0, 15, 30)]
    assert [part.next_entry for part in parts] == [15, 30, 0]
    assert sum(part.copies for part in parts) == 120


async def test_a_missing_copy_is_named(world: RepairWorld) -> None:
    await world.start("abc", replicate=False)
    await world.put_ledger(closed_ledger(1, 40, ABC), missing={"b": [7]})
    found = await compared(world, 1)
    assert found.said() == ["ledger 1 entry 7: b does not have it"]
    assert found.copies == 119


async def test_a_silent_bookie_is_no_proof(world: RepairWorld) -> None:
    await world.start("abc", replicate=False)
    await world.put_ledger(closed_ledger(1, 2, ABC))
    world.silenced.add("c")
    problems = (await compared(world, 1)).said()
    assert len(problems) == 2
    assert problems[0].startswith("ledger 1 entry 0: c gives no copy of it:")


async def test_copies_that_differ_are_named_with_their_checksums(world: RepairWorld) -> None:
    await world.start("abc", replicate=False)
    record = closed_ledger(1, 3, ABC)
    await world.put_ledger(record, missing={"c": [1, 2]})
    other = [encode(1, 1, 0, 99, b"something else"), envelopes(record)[2]]
    added = await world.bookies["c"].local().add(AddGroup(1, 3, record.token, tuple(other)))
    assert added.status.name == "OK"
    found = await compared(world, 1)
    [problem] = found.said()
    assert problem.startswith("ledger 1 entry 1: copies differ, by their checksums a ")
    assert found.copies == 6


async def test_a_vacant_place_is_a_missing_copy_and_many_problems_are_counted(world: RepairWorld) -> None:
    await world.start("ab", replicate=False)
    await world.put_ledger(closed_ledger(1, 40, ABC), missing={"b": range(40)})
    record = await world.record(1)
    assert record is not None
    await world.put_record(replace(record, fragments=(replace(record.fragments[0], bookies=("a", "b", VACANT)),)))
    said = (await compared(world, 1)).said()
    assert said[-1] == f"and {41 - verification.PROBLEMS_MAX} more like these"
