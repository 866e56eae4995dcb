"""From a bookie that is lost, drained or back to ledgers that are whole again, and nothing done for nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from repair_world import RepairWorld, closed_ledger

from magnetar.metadata.codec import encode_cookie
from magnetar.metadata.records import VACANT, Cookie, CopyClaim, CopyReason, RepairSettings
from magnetar.metadata.store import Compare, Delete, MetadataUnavailable, Operation, Put, RangeResult, TxnResult

LEDGERS = range(5, 12)


async def some_ledgers(world: RepairWorld) -> None:
    for ledger_id in LEDGERS:
        await world.put_ledger(closed_ledger(ledger_id, 30, (0, ("a", "b", "c"))))


async def members(world: RepairWorld) -> set[frozenset[str]]:
    found = [await world.record(ledger_id) for ledger_id in LEDGERS]
    return {record.roles() for record in found if record is not None}


async def test_a_bookie_lost_for_the_delay_is_replaced_everywhere(world: RepairWorld) -> None:
    await world.start("abcd")
    await some_ledgers(world)
    world.start_auditor()
    await world.stop_bookie("a")

    async def waited_for() -> bool:
        return await world.losses() == {"a": False}

    await world.until(waited_for, "the loss is on record")
    world.pass_time(59)
    assert await members(world) == {frozenset("abc")}
    world.pass_time(2)

    async def moved() -> bool:
        return await members(world) == {frozenset("bcd")}

    await world.until(moved, "all is copied")
    await world.until_no_tasks()
    assert await world.losses() == {"a": True}
    for ledger_id in LEDGERS:
        await world.check_complete(ledger_id)


async def test_a_bookie_that_is_back_in_time_changes_nothing(world: RepairWorld) -> None:
    await world.start("abcd")
    await some_ledgers(world)
    world.start_auditor()
    await world.stop_bookie("a")

    async def lost() -> bool:
        return await world.losses() == {"a": False}

    await world.until(lost, "the loss is on record")
    await world.start_bookie("a")

    async def found() -> bool:
        return await world.losses() == {}

    await world.until(found, "the loss is off the record")
    world.pass_time(100)
    assert await world.tasks() == []
    assert await members(world) == {frozenset("abc")}


async def test_a_bookie_that_is_back_ends_the_copies_that_are_not_finished(world: RepairWorld) -> None:
    await world.start("abcd")
    await some_ledgers(world)
    world.silenced |= {"a", "b", "c"}
    world.start_auditor()
    await world.stop_bookie("a")

    async def lost() -> bool:
        return bool(await world.losses())

    await world.until(lost, "the loss is on record")
    world.pass_time(61)

    async def claimed() -> bool:
        return frozenset("abcd") in await members(world)

    await world.until(claimed, "a copy is claimed")
    await world.start_bookie("a")
    await world.until_no_tasks()
    assert await members(world) == {frozenset("abc")}, "no claim is left"


async def test_ledgers_that_could_stand_in_more_racks_are_counted(world: RepairWorld) -> None:
    await world.directory.start()
    for name, rack in {"a": "r1", "b": "r1", "c": "r2", "d": "r3"}.items():
        await world.start_bookie(name, rack=rack)
    for ledger_id, bookies in enumerate((("a", "b", "c"), ("b", "c", "d"), ("a", "b", "d")), 5):
        await world.put_ledger(closed_ledger(ledger_id, 3, (0, bookies)))
    world.start_auditor()

    def counted() -> bool:
        return world.registry.get_sample_value("magnetar_repair_ledgers_lacking_racks") == 2

    await world.until(counted, "two ledgers stand twice in the first rack")


async def test_a_second_loss_is_repaired_at_once(world: RepairWorld) -> None:
    await world.start("abcde")
    await some_ledgers(world)
    world.start_auditor()
    await world.stop_bookie("a")
    await world.stop_bookie("b")

    async def moved() -> bool:
        return await members(world) == {frozenset("cde")}

    await world.until(moved, "both are replaced")
    await world.until_no_tasks()
    for ledger_id in LEDGERS:
        await world.check_complete(ledger_id)


async def test_a_drained_bookie_is_emptied_while_it_serves_and_takes_no_new_ledgers(world: RepairWorld) -> None:
    await world.start("abcd")
    await some_ledgers(world)
    world.silenced |= {"b", "c"}
    world.start_auditor()
    await world.drain("a")
    await world.until_no_tasks()

    async def moved() -> bool:
        return await members(world) == {frozenset("bcd")}

    await world.until(moved, "all is copied, and only from the drained one")
    await world.until_no_tasks()
    states = {bookie.bookie_id: bookie.state.name for bookie in world.directory.registered()}
    assert states == {"a": "DRAINING", "b": "WRITABLE", "c": "WRITABLE", "d": "WRITABLE"}
    await world.undrain("a")

    def writable() -> bool:
        return all(bookie.state.name == "WRITABLE" for bookie in world.directory.registered())

    await world.until(writable, "it takes ledgers again")


async def test_undraining_ends_the_copies_that_are_not_finished(world: RepairWorld) -> None:
    await world.start("abcd")
    await some_ledgers(world)
    world.silenced |= {"a", "b", "c"}
    world.start_auditor()
    await world.drain("a")

    async def claimed() -> bool:
        return frozenset("abcd") in await members(world)

    await world.until(claimed, "a copy is claimed")
    await world.undrain("a")
    await world.until_no_tasks()
    assert await members(world) == {frozenset("abc")}


async def test_a_target_that_dies_is_replaced_and_its_claim_goes(world: RepairWorld) -> None:
    await world.start("abcd")
    await some_ledgers(world)
    world.silenced |= {"b", "c"}
    world.start_auditor()
    await world.stop_bookie("a")

    async def lost() -> bool:
        return bool(await world.losses())

    await world.until(lost, "the loss is on record")
    world.pass_time(61)

    async def claimed() -> bool:
        return frozenset("abcd") in await members(world)

    await world.until(claimed, "a copy is claimed")
    await world.stop_bookie("d")
    await world.start_bookie("e")

    async def both_lost() -> bool:
        return "d" in await world.losses()

    await world.until(both_lost, "the target is lost too")
    world.pass_time(61)
    world.silenced.clear()

    async def moved() -> bool:
        return await members(world) == {frozenset("bce")}

    await world.until(moved, "another target has it all")
    await world.until_no_tasks()
    for ledger_id in LEDGERS:
        await world.check_complete(ledger_id)


async def test_while_repair_is_switched_off_nothing_begins(world: RepairWorld) -> None:
    await world.start("abcd")
    await some_ledgers(world)
    await world.set_repair(RepairSettings(enabled=False))
    world.start_auditor()
    await world.stop_bookie("a")

    async def lost() -> bool:
        return bool(await world.losses())

    await world.until(lost, "the loss is on record")
    world.pass_time(1_000)
    await world.drain("b")

    def draining() -> bool:
        return any(bookie.state.name == "DRAINING" for bookie in world.directory.registered())

    await world.until(draining, "a pass has seen the drain")
    assert await world.tasks() == []
    assert await world.losses() == {"a": False}
    await world.set_repair(RepairSettings())

    async def begun() -> bool:
        return frozenset("abc") not in await members(world)

    await world.until(begun, "repair goes on")


async def test_the_look_at_all_records_finds_what_no_change_told(world: RepairWorld) -> None:
    await world.start("abcd")
    await world.put_ledger(closed_ledger(5, 30, (0, ("a", VACANT, "c"))))
    await world.put_ledger(closed_ledger(6, 30, (0, ("a", "gone", "c"))))
    claimed = closed_ledger(7, 30, (0, ("a", "b", "c")))
    await world.put_ledger(claimed)
    await world.put_record(_claimed(claimed, "d"))
    await world.put_task(99, "a", "")
    world.start_auditor()

    async def whole() -> bool:
        roles = [record.roles() for i in (5, 6, 7) if (record := await world.record(i)) is not None]
        return all(len(names) == 3 and "gone" not in names for names in roles) and roles[2] == set("abc")

    await world.until(whole, "all are whole")
    await world.until_no_tasks()
    for ledger_id in (5, 6, 7):
        await world.check_complete(ledger_id)


def _claimed(record: Any, target: str) -> Any:
    return replace(record, copy=CopyClaim(target, "a", b"nobody's"))


async def test_nothing_is_concluded_from_a_listing_that_is_cut_off(world: RepairWorld) -> None:
    """Without its session a bookie looks lost; a store that shows only some sessions must not make it so."""
    await world.start("abcd")
    await some_ledgers(world)
    auditor = world.start_auditor()
    await world.until(lambda: auditor.elected, "it is elected")
    cut = CutOff(world.store, world.keyspace.bookies_prefix())
    auditor._store = cut  # type: ignore[assignment]
    for tries in (2, 4):
        world.pass_time(1_000)
        await world.until(lambda tries=tries: cut.asked >= tries, "it has tried")
    assert await world.losses() == {}
    assert await world.tasks() == []


class CutOff:
    """Fails behind the first page of a prefix, which is short."""

    def __init__(self, store: Any, prefix: str) -> None:
        self._store = store
        self._prefix = prefix
        self.asked = 0
        self.get, self.txn = store.get, store.txn

    async def range(self, prefix: str, *, after: str = "", limit: int = 0) -> RangeResult:
        if prefix != self._prefix:
            return await self._store.range(prefix, after=after, limit=limit)  # type: ignore[no-any-return]
        self.asked += 1
        if after:
            raise MetadataUnavailable("no answer")
        found = await self._store.range(prefix, limit=1)
        return RangeResult(found.items, found.revision, more=True)


async def test_an_auditor_of_an_earlier_term_changes_nothing(world: RepairWorld) -> None:
    """It stops in the middle of a pass, its term ends, and it goes on to send what it had decided."""
    await world.start("abcd")
    await some_ledgers(world)
    old = world.start_auditor("old")
    await world.until(lambda: old.elected, "it is elected")
    paused = Paused(world)
    old._store = paused  # type: ignore[assignment]
    await world.drain("a")
    await world.until(lambda: paused.results, "it sent what it had decided")
    assert not any(result.succeeded for result in paused.results)


class Paused:
    """Before each transaction of the auditor its term is ended by somebody else."""

    def __init__(self, world: RepairWorld) -> None:
        self._world = world
        self.results: list[TxnResult] = []
        self.get, self.range = world.store.get, world.store.range

    async def txn(self, compares: Sequence[Compare], operations: Sequence[Operation]) -> TxnResult:
        key = self._world.keyspace.election("auditor")
        found = await self._world.store.get(key)
        if found is not None:
            await self._world.store.txn([], [Delete(key)])
            await self._world.store.txn([], [Put(key, b"another")])
        result = await self._world.store.txn(compares, operations)
        self.results.append(result)
        return result


async def test_a_bookie_that_registers_before_its_task_is_made_gets_none(world: RepairWorld) -> None:
    """The look saw it lost; the transaction compares that it still is."""
    await world.start("abcd", replicate=False)
    await some_ledgers(world)
    auditor = world.start_auditor()
    await world.until(lambda: auditor.elected, "it is elected")
    cluster, _ = await auditor._look()
    compares = auditor._because(cluster, "a", CopyReason.LOST)
    assert not (await world.store.txn(compares, [])).succeeded
    cookie = Cookie("x", "i", "c", "d")
    compares = auditor._because(cluster, "x", CopyReason.LOST)
    assert (await world.store.txn(compares, [])).succeeded
    await world.store.txn([], [Put(world.keyspace.cookie("x"), encode_cookie(cookie))])
    assert not (await world.store.txn(compares, [])).succeeded, "it has appeared since the look"
