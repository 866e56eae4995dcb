"""What the SQLite engine keeps beyond the contract: files, restarts, grouping, damage."""

from __future__ import annotations

import asyncio
import resource
import signal
import sqlite3
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from magnetar.metadata.sqlite import TRIM_REVISIONS, SqliteStore
from magnetar.metadata.sqlite_tables import Tables
from magnetar.metadata.store import (
    Changes,
    Delete,
    LeaseExpired,
    MetadataError,
    MetadataUnavailable,
    Put,
    Reset,
    absent,
)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "metadata.sqlite"


async def pragma(store: SqliteStore, name: str) -> Any:
    return await store.engine.ask(lambda tables: tables._connection.execute(f"PRAGMA {name}").fetchone()[0])


async def test_every_commit_is_synced(path: Path) -> None:
    async with await SqliteStore.open(path) as store:
        assert await pragma(store, "journal_mode") == "wal"
        assert await pragma(store, "synchronous") == 2


async def test_everything_is_there_after_a_restart(path: Path) -> None:
    async with await SqliteStore.open(path) as store:
        await store.txn([], [Put("a", b"1"), Put("b", b"")])
        await store.txn([], [Put("a", b"2")])
        before = await store.range("")
    async with await SqliteStore.open(path) as store:
        assert await store.range("") == before
        assert (await store.txn([], [Put("c", b"")])).revision == before.revision + 1


WRITE_AND_DIE = """
import asyncio, os, signal, sys
from magnetar.metadata.sqlite import SqliteStore
from magnetar.metadata.store import Put

async def main():
    store = await SqliteStore.open(sys.argv[1])
    for i in range(20):
        await store.txn([], [Put(f"{i:02}", b"")])
    os.kill(os.getpid(), signal.SIGKILL)

asyncio.run(main())
"""


async def test_what_was_answered_survives_a_killed_process(path: Path) -> None:
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", WRITE_AND_DIE, str(path))
    assert await process.wait() == -signal.SIGKILL
    async with await SqliteStore.open(path) as store:
        assert [item.key for item in (await store.range("")).items] == [f"{i:02}" for i in range(20)]


async def test_a_second_opening_is_refused_in_one_line_that_names_the_file(path: Path) -> None:
    async with await SqliteStore.open(path):
        with pytest.raises(
            MetadataError, match=r"^another process has .* open: stop it or use another .*metadata.sqlite`$"
        ):
            await SqliteStore.open(path)
    async with await SqliteStore.open(path):
        pass


async def test_a_file_that_is_no_database_is_refused(path: Path) -> None:
    write_file(path, b"not a database, but long enough to look like something" * 100)
    for _ in range(2):
        with pytest.raises(MetadataError, match=r"^cannot open .*metadata.sqlite.*not a database`$"):
            await SqliteStore.open(path)


def write_file(path: Path, content: bytes) -> None:
    path.write_bytes(content)


def read_file(path: Path) -> bytes:
    return path.read_bytes()


async def test_a_missing_directory_is_refused(tmp_path: Path) -> None:
    with pytest.raises(MetadataError, match="No such file or directory"):
        await SqliteStore.open(tmp_path / "none" / "metadata.sqlite")


async def test_a_database_of_another_format_is_refused(path: Path) -> None:
    async with await SqliteStore.open(path):
        pass
    with sqlite3.connect(path) as connection:
        connection.execute("UPDATE facts SET value = 99 WHERE name = 'format'")
    connection.close()
    with pytest.raises(MetadataError, match="format=`99`"):
        await SqliteStore.open(path)


async def test_a_damaged_database_is_refused(path: Path) -> None:
    async with await SqliteStore.open(path) as store:
        for start in range(0, 400, 100):
            await store.txn([], [Put(f"{i:04}", bytes(200)) for i in range(start, start + 100)])
    content = bytearray(read_file(path))
    for page in range(3, len(content) // 4096):
        content[page * 4096 : page * 4096 + 8] = b"\xff" * 8
    write_file(path, bytes(content))
    with pytest.raises(MetadataError, match=r"cannot open .*metadata.sqlite"):
        await SqliteStore.open(path)


# Leases and restarts.


async def test_leased_keys_stand_after_a_restart_and_expire_when_nobody_keeps_them(path: Path, clock: Any) -> None:
    async with await SqliteStore.open(path, clock=clock) as store:
        lease_id = await store.grant_remote_lease(2)
        await store.txn([], [Put("a", b"", lease_id)])
        clock.now += 1.9
    async with await SqliteStore.open(path, clock=clock) as store:
        clock.now += 1
        await store.tick()
        assert await store.get("a") is not None
        assert await store.keep_alive(lease_id) == 2
        for _ in range(2):
            clock.now += 1
            await store.tick()
        assert await store.get("a") is None


async def test_a_lease_id_is_never_used_again(path: Path) -> None:
    async with await SqliteStore.open(path) as store:
        first = await store.grant_lease(5)
        await first.revoke()
    async with await SqliteStore.open(path) as store:
        assert (await store.grant_lease(5)).lease_id > first.lease_id
        with pytest.raises(LeaseExpired):
            await store.txn([], [Put("a", b"", first.lease_id)])


async def test_dropping_leases_deletes_their_keys_as_one_change_that_watches_see(path: Path) -> None:
    async with await SqliteStore.open(path) as store:
        for key in ("a", "b"):
            lease = await store.grant_lease(5)
            await store.txn([], [Put(key, b"", lease.lease_id)])
        await store.txn([], [Put("c", b"")])
        revision = (await store.range("")).revision
    async with await SqliteStore.open(path, drop_leases=True) as store:
        assert [item.key for item in (await store.range("")).items] == ["c"]
        event = await anext(aiter(store.watch("", from_revision=revision + 1)))
        assert isinstance(event, Changes)
        assert [(c.key, c.current, c.revision) for c in event.changes] == [
            ("a", None, revision + 1),
            ("b", None, revision + 1),
        ]
        with pytest.raises(LeaseExpired):
            await store.keep_alive(lease.lease_id)


async def test_dropping_leases_without_any_is_no_change(path: Path) -> None:
    async with await SqliteStore.open(path) as store:
        revision = (await store.txn([], [Put("c", b"")])).revision
    async with await SqliteStore.open(path, drop_leases=True) as store:
        assert (await store.range("")).revision == revision


async def test_a_grant_whose_caller_went_away_expires(path: Path, clock: Any) -> None:
    async with await SqliteStore.open(path, clock=clock) as store:
        grant = asyncio.create_task(store.grant_lease(1))
        await asyncio.sleep(0)
        grant.cancel()
        await store.get("behind the grant in the queue")
        assert await lease_count(store) == 1
        for _ in range(2):
            clock.now += 0.5
            await store.tick()
        assert await lease_count(store) == 0


async def lease_count(store: SqliteStore) -> int:
    return await store.engine.ask(lambda tables: len(tables.leases))


# History.


async def test_a_watch_reads_history_from_before_the_restart(path: Path) -> None:
    async with await SqliteStore.open(path) as store:
        first = (await store.txn([], [Put("a", b"1")])).revision
        await store.txn([], [Put("a", b"2"), Put("b", b"")])
        await store.txn([], [Delete("a")])
    async with await SqliteStore.open(path) as store:
        event = await anext(aiter(store.watch("a", from_revision=first)))
        assert isinstance(event, Changes)
        assert [(c.revision - first, c.current and c.current.value) for c in event.changes] == [
            (0, b"1"),
            (1, b"2"),
            (2, None),
        ]
        assert [c.current.create_revision for c in event.changes if c.current] == [first, first]


async def test_history_is_bounded_on_disk_and_older_watches_are_reset_after_a_restart(path: Path) -> None:
    async with await SqliteStore.open(path, history_changes_max=10) as store:
        for _ in range(2 * TRIM_REVISIONS):
            await store.txn([], [Put("a", b"")])
        revision = (await store.range("")).revision
    with sqlite3.connect(path) as connection:
        assert connection.execute("SELECT count(*) FROM versions").fetchone()[0] <= TRIM_REVISIONS + 10
    connection.close()
    async with await SqliteStore.open(path, history_changes_max=10) as store:
        assert [event async for event in store.watch("a", from_revision=revision - 10)] == [Reset()]
        event = await anext(aiter(store.watch("a", from_revision=revision - 9)))
        assert isinstance(event, Changes)
        assert len(event.changes) == 10
    async with await SqliteStore.open(path) as store:
        assert [event async for event in store.watch("a", from_revision=1)] == [Reset()]


# Grouping.


async def trace(store: SqliteStore, callback: Callable[[str], object] | None) -> None:
    await store.engine.ask(lambda tables: tables._connection.set_trace_callback(callback))


async def test_concurrent_transactions_share_one_commit_and_see_each_other(path: Path) -> None:
    async with await SqliteStore.open(path) as store:
        statements: list[str] = []
        await trace(store, statements.append)
        begun, go_on = threading.Event(), threading.Event()
        held = asyncio.ensure_future(store.engine.ask(lambda tables: (begun.set(), go_on.wait(10))[1]))
        assert await asyncio.to_thread(begun.wait, 10)  # else it may share its group with the first calls
        calls = [store.txn([absent("k")], [Put("k", b"%d" % i)]) for i in range(100)]
        results = asyncio.gather(*calls)
        read = asyncio.ensure_future(store.get("k"))
        await asyncio.sleep(0)
        go_on.set()
        answers, found = await results, await read
        await trace(store, None)
        assert await held
        assert [answer.succeeded for answer in answers] == [True] + [False] * 99
        assert found is not None
        assert found.value == b"0"
        assert sum(statement.startswith("COMMIT") for statement in statements) == 1


async def test_a_refused_transaction_does_not_disturb_its_group(path: Path) -> None:
    async with await SqliteStore.open(path) as store:
        good, refused, later = await asyncio.gather(
            store.txn([], [Put("a", b"")]),
            store.txn([], [Put("b", b""), Put("c", b"", lease_id=77)]),
            store.txn([], [Put("d", b"")]),
            return_exceptions=True,
        )
        assert isinstance(refused, LeaseExpired)
        assert not isinstance(good, BaseException)
        assert not isinstance(later, BaseException)
        assert [item.key for item in (await store.range("")).items] == ["a", "d"]
        assert later.revision == good.revision + 1


async def test_a_cancelled_transaction_may_still_take_effect_and_harms_nobody(path: Path) -> None:
    async with await SqliteStore.open(path) as store:
        task = asyncio.create_task(store.txn([], [Put("a", b"")]))
        await asyncio.sleep(0)
        task.cancel()
        assert await store.get("a") is not None
        assert (await store.txn([], [Put("b", b"")])).succeeded


# A full or failing disk.


async def test_a_full_disk_refuses_the_change_and_goes_on_when_there_is_space_again(path: Path) -> None:
    async with await SqliteStore.open(path) as store:
        await store.txn([], [Put("a", b"")])
        before = await store.range("")
        pages = await pragma(store, "page_count")
        await pragma(store, f"max_page_count = {pages}")
        calls = [store.txn([], [Put("small", b"")]), store.txn([], [Put("big", bytes(100_000))])]
        for outcome in await asyncio.gather(*calls, store.grant_lease(5), return_exceptions=True):
            assert isinstance(outcome, MetadataUnavailable)
            assert "disk is full" in str(outcome)
        assert await store.range("") == before
        await pragma(store, "max_page_count = 100000")
        watch = store.watch("", from_revision=before.revision + 1)
        assert (await store.txn([], [Put("big", bytes(100_000))])).revision == before.revision + 1
        event = await anext(aiter(watch))
        assert isinstance(event, Changes)
        assert [c.key for c in event.changes] == ["big"]


async def test_keys_of_an_ended_lease_are_deleted_once_the_disk_has_space_again(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(tables: Tables, lease_id: int) -> None:
        error = sqlite3.OperationalError("database or disk is full")
        error.sqlite_errorcode = sqlite3.SQLITE_FULL
        raise error

    async with await SqliteStore.open(path) as store:
        lease = await store.grant_lease(5)
        await store.txn([], [Put("a", b"", lease.lease_id)])
        with monkeypatch.context() as patch:
            patch.setattr(Tables, "revoke_lease", full)
            with pytest.raises(MetadataUnavailable, match=r"disk is full"):
                await lease.revoke()
        assert lease.lost
        assert await store.get("a") is not None
        await store.tick()
        assert await store.get("a") is None
        assert store.engine.ended_leases == 0


async def test_after_an_io_error_nothing_is_believed_and_the_store_still_closes(path: Path) -> None:
    store = await SqliteStore.open(path)
    await store.txn([], [Put("a", b"")])
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (path.with_name(path.name + "-wal").stat().st_size, limits[1]))
    try:
        with pytest.raises(MetadataUnavailable, match=r"metadata.sqlite"):
            await store.txn([], [Put("b", bytes(1_000_000))])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    with pytest.raises(MetadataUnavailable, match="must be opened again"):
        await store.get("a")
    await store.close()
    async with await SqliteStore.open(path) as store:
        assert [item.key for item in (await store.range("")).items] == ["a"]


async def test_a_fault_in_the_thread_fails_the_store_and_it_still_closes(path: Path) -> None:
    def fault(tables: Tables) -> None:
        raise RuntimeError("a fault of the program")

    async with await SqliteStore.open(path) as store:
        await store.txn([], [Put("a", b"")])
        for _ in range(2):
            with pytest.raises(MetadataUnavailable, match="a fault of the program"):
                await store.engine.ask(fault)
    async with await SqliteStore.open(path) as store:
        assert await store.get("a") is not None
