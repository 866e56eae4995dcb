"""Orders about bookies: refused when they would cost copies, written down when not, and nothing changed by a trial."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from typing import Any

import pytest

from magnetar.broker.admin_storage import StorageAdmin
from magnetar.metadata.codec import (
    decode_drain,
    decode_repair,
    encode_bookie,
    encode_cookie,
    encode_copy,
    encode_drain,
    encode_loss,
)
from magnetar.metadata.keyspace import Keyspace
from magnetar.metadata.memory import MemoryStore
from magnetar.metadata.records import (
    BookieRegistration,
    BookieState,
    Cookie,
    CopyReason,
    CopyTask,
    Drain,
    Loss,
    RepairSettings,
)
from magnetar.metadata.store import Compare, Delete, Operation, Put, TxnResult
from magnetar.node.rpc import Refused
from magnetar.v1 import common_pb2, metadata_pb2
from magnetar.v1 import repair_pb2 as pb

KEYS = Keyspace("test")
REFUSED = common_pb2.ERROR_REASON_REFUSED


class World:
    def __init__(self, store: Any) -> None:
        self.store = store
        self.admin = StorageAdmin(store, KEYS, 3, 3, lambda: 7)

    async def add(self, *names: str, state: BookieState = BookieState.WRITABLE, rack: str = "") -> None:
        for name in names:
            cookie = Put(KEYS.cookie(name), encode_cookie(Cookie(name, "i", "c", "d")))
            await self.store.txn(
                [], [cookie, Put(KEYS.bookie(name), encode_bookie(BookieRegistration(name, name, rack, state)))]
            )

    async def drain(self, bookie: str, *, dry_run: bool = False) -> pb.DrainBookieResponse:
        request = pb.DrainBookieRequest(bookie_id=bookie, dry_run=dry_run)
        return pb.DrainBookieResponse.FromString(await self.admin.drain(request.SerializeToString(), None))

    async def undrain(self, bookie: str, *, dry_run: bool = False) -> pb.UndrainBookieResponse:
        request = pb.UndrainBookieRequest(bookie_id=bookie, dry_run=dry_run)
        return pb.UndrainBookieResponse.FromString(await self.admin.undrain(request.SerializeToString(), None))

    async def decommission(self, bookie: str, *, dry_run: bool = False) -> None:
        request = pb.DecommissionBookieRequest(bookie_id=bookie, dry_run=dry_run)
        await self.admin.decommission(request.SerializeToString(), None)

    async def repair(self, **changes: Any) -> pb.ConfigureRepairResponse:
        request = pb.ConfigureRepairRequest(**changes)
        return pb.ConfigureRepairResponse.FromString(
            await self.admin.configure_repair(request.SerializeToString(), None)
        )

    async def keys(self, prefix: str) -> list[str]:
        return [item.key for item in (await self.store.range(prefix)).items]


@pytest.fixture
async def world() -> AsyncIterator[World]:
    async with MemoryStore() as store:
        yield World(store)


async def test_a_drain_is_written_down_once_and_withdrawn(world: World) -> None:
    await world.add("a", "b", "c", "d")
    await world.store.txn([], [Put(KEYS.index("a", n), b"") for n in (1, 2)])
    assert await world.drain("a", dry_run=True) == pb.DrainBookieResponse(changed=True, ledgers=2)
    assert await world.keys(KEYS.bookie_drains_prefix()) == []
    assert await world.drain("a") == pb.DrainBookieResponse(changed=True, ledgers=2)
    found = await world.store.get(KEYS.bookie_drain("a"))
    assert decode_drain(found.value) == Drain("a", 7)
    assert await world.drain("a") == pb.DrainBookieResponse(changed=False, ledgers=2)
    assert await world.undrain("a", dry_run=True) == pb.UndrainBookieResponse(changed=True, ledgers=2)
    assert await world.undrain("a") == pb.UndrainBookieResponse(changed=True, ledgers=2)
    assert await world.undrain("a") == pb.UndrainBookieResponse(changed=False, ledgers=2)
    assert await world.keys(KEYS.bookie_drains_prefix()) == []


async def test_a_drain_is_refused_when_too_few_would_take_new_ledgers(world: World) -> None:
    await world.add("a", "b", "c")
    await world.add("d", state=BookieState.READ_ONLY)
    with pytest.raises(Refused, match=r"too few bookies would be left .* left=`2` needed=`3`") as refused:
        await world.drain("a")
    assert refused.value.reason == REFUSED
    await world.add("e")
    await world.drain("a")
    with pytest.raises(Refused, match="left=`2`"):
        await world.drain("b")
    await world.store.txn([], [Delete(KEYS.bookie("e"))])
    assert not (await world.drain("a")).changed, "who asks again is told how far it is"


async def test_a_drain_that_costs_ledgers_a_rack_is_warned_of_and_goes_on(world: World) -> None:
    for rack in ("r1", "r2"):
        await world.add(f"{rack}a", f"{rack}b", rack=rack)
    await world.add("only", rack="r3")
    await world.add("full", rack="r3", state=BookieState.READ_ONLY)
    await world.store.txn([], [Put(KEYS.index(name, 1), b"") for name in ("r1a", "only")])
    for dry_run in (True, False):
        told = await world.drain("only", dry_run=dry_run)
        assert told.changed
        assert told.warning.startswith("only is the only bookie of rack r3 that takes copies: its ledgers lose")
    assert (await world.undrain("only")).changed
    assert not (await world.drain("r1a", dry_run=True)).warning, "another bookie of its rack takes its part"
    await world.add("spare", rack="r4")
    assert not (await world.drain("only", dry_run=True)).warning, "three racks are left, for three copies"


async def test_of_two_drains_at_the_same_time_that_are_one_too_many_the_second_is_refused(world: World) -> None:
    await world.add("a", "b", "c", "d")
    late = World(Interrupted(world.store, [Put(KEYS.bookie_drain("b"), encode_drain(Drain("b")))]))
    with pytest.raises(Refused, match="has changed meanwhile"):
        await late.drain("a")
    with pytest.raises(Refused, match="left=`2`"):
        await late.drain("a")


class Interrupted:
    """Somebody else's change comes before the first transaction."""

    def __init__(self, store: Any, operations: Sequence[Operation]) -> None:
        self._store = store
        self._operations = list(operations)
        self.get, self.range = store.get, store.range

    async def txn(self, compares: Sequence[Compare], operations: Sequence[Operation]) -> TxnResult:
        if self._operations:
            await self._store.txn([], self._operations)
            self._operations = []
        return await self._store.txn(compares, operations)  # type: ignore[no-any-return]


@pytest.mark.parametrize("verb", ["drain", "undrain", "decommission"])
async def test_an_unknown_bookie_is_refused(world: World, verb: str) -> None:
    await world.add("a", "b", "c", "d")
    with pytest.raises(Refused, match="there is no such bookie"):
        await getattr(world, verb)("x")
    with pytest.raises(Refused, match="no bookie can have this id"):
        await getattr(world, verb)("../a")


async def test_a_bookie_is_removed_when_nothing_names_it_and_it_has_stopped(world: World) -> None:
    await world.add("a", "b", "c", "d")
    await world.store.txn([], [Put(KEYS.index("a", 1), b"")])
    with pytest.raises(Refused, match=r"data stands on it: drain it first.* ledgers=`1`"):
        await world.decommission("a")
    await world.drain("a")
    await world.store.txn([], [Delete(KEYS.index("a", 1)), Put(KEYS.loss("a"), encode_loss(Loss("a", 1)))])
    with pytest.raises(Refused, match="the bookie runs: stop it first"):
        await world.decommission("a")
    await world.store.txn([], [Delete(KEYS.bookie("a"))])
    await world.decommission("a", dry_run=True)
    assert KEYS.cookie("a") in await world.keys(KEYS.cookies_prefix())
    await world.decommission("a")
    for prefix in (KEYS.cookies_prefix(), KEYS.bookie_drains_prefix(), KEYS.losses_prefix()):
        assert not [key for key in await world.keys(prefix) if key.endswith("/a")]


async def test_a_bookie_that_starts_while_it_is_removed_stays(world: World) -> None:
    await world.add("a", "b", "c", "d")
    registered = await world.store.get(KEYS.bookie("a"))
    await world.store.txn([], [Delete(KEYS.bookie("a"))])
    late = World(Interrupted(world.store, [Put(KEYS.bookie("a"), registered.value)]))
    with pytest.raises(Refused, match="has changed meanwhile"):
        await late.decommission("a")
    assert KEYS.cookie("a") in await world.keys(KEYS.cookies_prefix())


async def test_repair_is_shown_and_changed(world: World) -> None:
    shown = await world.repair()
    default = RepairSettings()
    assert (shown.settings.enabled, shown.settings.bytes_per_s) == (True, default.bytes_per_s)
    assert (await world.repair(enabled=False, dry_run=True)).settings.enabled is False
    assert await world.store.get(KEYS.repair()) is None
    await world.repair(enabled=False)
    await world.repair(bytes_per_s=5, delay_s=0.0)
    found = await world.store.get(KEYS.repair())
    assert decode_repair(found.value) == RepairSettings(False, 0.0, 5)
    for wrong in ({"bytes_per_s": 0}, {"delay_s": -1.0}, {"delay_s": float("nan")}, {"delay_s": 1e9}):
        with pytest.raises(Refused) as refused:
            await world.repair(**wrong)
        assert refused.value.reason == common_pb2.ERROR_REASON_INVALID_ARGUMENT


async def test_repair_tells_what_waits_and_why(world: World) -> None:
    tasks = [
        CopyTask(1, "a", "b", CopyReason.LOST),
        CopyTask(2, "a", "", CopyReason.LOST, problem="no bookie can take it"),
        CopyTask(2, "", "b", CopyReason.UNREPLICATED),
    ]
    await world.store.txn([], [Put(KEYS.copy(task.ledger_id, task.place), encode_copy(task)) for task in tasks])
    await world.store.txn([], [Put(KEYS.loss("a"), encode_loss(Loss("a", 3, given_up=True)))])
    told = await world.repair()
    assert {one.reason: (one.copies, one.stalled) for one in told.copies} == {
        metadata_pb2.COPY_REASON_LOST: (2, 1),
        metadata_pb2.COPY_REASON_UNREPLICATED: (1, 0),
    }
    assert list(told.problems) == ["ledger 2, the part of a: no bookie can take it"]
    assert dict(told.stalled_bookies) == {"a": "ledger 2, the part of a: no bookie can take it"}
    assert [(one.bookie_id, one.since_us, one.given_up) for one in told.lost] == [("a", 3, True)]
