from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable

import pytest
from ledger_world import ledger_record, registration

from magnetar.ledger.bookie_directory import BookieDirectory, Unreachable
from magnetar.ledger.bookie_rpc import AddGroup, AddStatus, BookieRpc, EntryOutcome, LacQuery, ReadGroup
from magnetar.metadata.codec import encode_bookie
from magnetar.metadata.keyspace import Keyspace
from magnetar.metadata.memory import MemoryStore
from magnetar.metadata.records import BookieRegistration, BookieState
from magnetar.metadata.store import Delete, Put

KEYS = Keyspace("test")


class Connections:
    def __init__(self) -> None:
        self.made: list[tuple[str, str]] = []
        self.ended: list[BookieRpc] = []

    def connect(self, bookie: BookieRegistration) -> BookieRpc:
        self.made.append((bookie.bookie_id, bookie.address))
        return Unreachable(bookie.bookie_id)


class Directory:
    def __init__(self, store: MemoryStore) -> None:
        self.store = store
        self.connections = Connections()
        self.directory = BookieDirectory(
            store, KEYS, self.connections.connect, disconnect=self.connections.ended.append
        )
        self.changes = 0
        self.directory.on_change(self._changed)

    def _changed(self) -> None:
        self.changes += 1

    async def put(self, *bookies: BookieRegistration) -> None:
        await self.store.txn([], [Put(KEYS.bookie(b.bookie_id), encode_bookie(b)) for b in bookies])

    async def delete(self, bookie_id: str) -> None:
        await self.store.txn([], [Delete(KEYS.bookie(bookie_id))])

    def names(self) -> list[str]:
        return sorted(bookie.bookie_id for bookie in self.directory.registered())

    async def until(self, holds: Callable[[], bool]) -> None:
        async with asyncio.timeout(5):
            while not holds():  # noqa: ASYNC110
                await asyncio.sleep(0)


@pytest.fixture
async def world() -> AsyncIterator[Directory]:
    store = MemoryStore()
    world = Directory(store)
    yield world
    await world.directory.stop()
    await store.close()


async def test_it_knows_the_bookies_when_it_has_started_and_follows_them(world: Directory) -> None:
    await world.put(registration("a"), registration("b"))
    async with world.directory:
        assert world.names() == ["a", "b"]
        changes = world.changes
        await world.put(registration("b", state=BookieState.DRAINING), registration("c"))
        await world.until(lambda: world.names() == ["a", "b", "c"])
        assert world.changes == changes + 1, "one transaction is one change"
        await world.delete("a")
        await world.until(lambda: world.names() == ["b", "c"])


async def test_a_connection_is_kept_while_the_session_lasts_and_beyond_it(world: Directory) -> None:
    await world.put(registration("a"))
    await world.directory.start()
    connection = world.directory.rpc("a")
    await world.put(registration("a", disk_free_bytes=5))
    await world.until(lambda: world.directory.registered()[0].disk_free_bytes == 5)
    assert world.directory.rpc("a") is connection
    await world.delete("a")
    await world.until(lambda: not world.names())
    # A lost session does not prove that it does not answer.
    assert world.directory.rpc("a") is connection
    assert world.connections.made == [("a", "a:7660")]


async def test_a_bookie_that_registers_anew_is_connected_anew(world: Directory) -> None:
    await world.put(registration("a"))
    await world.directory.start()
    old = world.directory.rpc("a")
    await world.delete("a")
    await world.put(registration("a", address="elsewhere:1"))
    await world.until(lambda: [b.address for b in world.directory.registered()] == ["elsewhere:1"])
    assert world.directory.rpc("a") is not old
    assert world.connections.ended == [old]
    assert world.connections.made == [("a", "a:7660"), ("a", "elsewhere:1")]


async def test_an_unknown_bookie_does_not_answer(world: Directory) -> None:
    await world.directory.start()
    rpc = world.directory.rpc("nobody")
    record = ledger_record(("nobody",), "1/1/1")
    add = await rpc.add(AddGroup(record.ledger_id, 1, record.token, (b"",)))
    assert add.status is AddStatus.NO_ANSWER
    read = await rpc.read(ReadGroup(record.ledger_id, 1, record.token, 0, 0))
    assert [answer.outcome for answer in read.answers] == [EntryOutcome.UNKNOWN]
    assert (await rpc.read_lac(LacQuery(record.ledger_id, 1, record.token))).outcome is EntryOutcome.UNKNOWN


async def test_a_registration_that_cannot_be_read_is_none(world: Directory) -> None:
    await world.put(registration("a"))
    await world.store.txn([], [Put(KEYS.bookie("b"), b"\xff\xff")])
    await world.directory.start()
    assert world.names() == ["a"]


async def test_after_a_gap_it_lists_again(world: Directory) -> None:
    store = MemoryStore(history_changes_max=2)
    gapped = Directory(store)
    await gapped.put(registration("a"), registration("b"))
    await gapped.directory.start()
    # All before the directory's task runs again, so that its watch finds its history gone.
    for n in range(5):
        await gapped.put(registration(f"c{n}"))
    await gapped.delete("a")
    await gapped.until(lambda: gapped.names() == ["b", "c0", "c1", "c2", "c3", "c4"])
    await gapped.directory.stop()
    await store.close()


async def test_a_callback_that_was_taken_back_is_not_called(world: Directory) -> None:
    await world.directory.start()
    calls: list[int] = []
    forget = world.directory.on_change(lambda: calls.append(1))
    forget()
    forget()
    await world.put(registration("a"))
    await world.until(lambda: world.names() == ["a"])
    assert calls == []
