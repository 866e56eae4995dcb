"""The metadata store in one SQLite file: the embedded default. Not replicated.

One thread owns the database. It takes all requests that are waiting, judges them one by one in the order they came, and
commits them as one SQLite transaction with one sync; then all are answered. So a hundred concurrent transactions cost
one sync, and each still sees the effects of those before it. Watches are fed in the event loop after the commit.

A full disk refuses the group and leaves the store usable. After any other error of the disk the content of the database
is in doubt (a failed sync cannot be repeated): the store answers MetadataUnavailable until it is opened again.
"""

from __future__ import annotations

import asyncio
import fcntl
import os
import queue
import sqlite3
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

import structlog

from magnetar.metadata.history import HISTORY_CHANGES_MAX, History, HistoryWatch
from magnetar.metadata.leases import TICK_S, HeldLease, LeaseTable, check_ttl
from magnetar.metadata.sqlite_tables import Tables
from magnetar.metadata.store import (
    Changes,
    Compare,
    KeyValue,
    MetadataError,
    MetadataUnavailable,
    Operation,
    RangeResult,
    TxnResult,
    check_txn,
)

GROUP_REQUESTS_MAX = 256
WAITING_REQUESTS_MAX = 10_000

log = structlog.get_logger(__name__)
T = TypeVar("T")


@dataclass(slots=True)
class _Request:
    """What one call asks of the tables. `on_commit` runs in the event loop even if the caller has gone away."""

    run: Callable[[Tables], tuple[Any, Changes | None]]
    writes: bool
    future: asyncio.Future[Any]
    on_commit: Callable[[Any], None] | None
    result: Any = None
    error: MetadataError | None = None


class SqliteStore:
    """See `store.MetadataStore`. Made by `open`."""

    def __init__(self, path: Path, clock: Callable[[], float] | None, history_changes_max: int) -> None:
        self._path = path
        self._loop = asyncio.get_running_loop()
        self._clock = clock or self._loop.time
        self._history_changes_max = history_changes_max
        self._history = History(0)
        self._leases = LeaseTable()
        self._ended_leases: set[int] = set()
        self._requests: queue.SimpleQueue[_Request | None] = queue.SimpleQueue()
        self._waiting = 0
        self._broken = ""
        self._closed = False
        self._ready: asyncio.Future[dict[int, float]] = self._loop.create_future()
        self._stopped: asyncio.Future[None] = self._loop.create_future()
        self._ticker: asyncio.Task[None] | None = None

    @classmethod
    async def open(
        cls,
        path: str | os.PathLike[str],
        *,
        drop_leases: bool = False,
        clock: Callable[[], float] | None = None,
        history_changes_max: int = HISTORY_CHANGES_MAX,
    ) -> Self:
        """Opens or creates the database and locks it against other processes.

        drop_leases   delete every leased key: their holders lived in the process that had it open before. Otherwise
                      each lease has its full time again
        Raises MetadataError, in one line, for what an operator has to change.
        """
        store = cls(Path(path), clock, history_changes_max)
        thread = threading.Thread(target=store._run_thread, args=(drop_leases,), name="metadata-sqlite", daemon=True)
        thread.start()
        try:
            leases = await asyncio.shield(store._ready)
        except asyncio.CancelledError:
            store._requests.put(None)
            store._ready.add_done_callback(lambda ready: ready.cancelled() or ready.exception())
            raise
        now = store._clock()
        for lease_id, ttl_s in leases.items():
            store._leases.add(lease_id, ttl_s, now)
        store._ticker = asyncio.create_task(store._run_ticks(), name="metadata-leases")
        return store

    async def get(self, key: str) -> KeyValue | None:
        key.encode()  # a lone surrogate is the caller's ValueError, not the thread's
        return await self._ask(lambda tables: (tables.get(key), None))

    async def range(self, prefix: str, *, after: str = "", limit: int = 0) -> RangeResult:
        (prefix + after).encode()
        return await self._ask(lambda tables: (tables.range(prefix, after, limit), None))

    async def txn(self, compares: Sequence[Compare], operations: Sequence[Operation]) -> TxnResult:
        check_txn(compares, operations)
        # Frozen here: the caller may change its lists while the request waits.
        compares, operations = tuple(compares), tuple(operations)
        return await self._ask(lambda tables: tables.txn(compares, operations), writes=bool(operations))

    def watch(self, prefix: str, *, from_revision: int) -> HistoryWatch:
        return self._history.watch(prefix, from_revision)

    async def grant_lease(self, ttl_s: float) -> HeldLease:
        lease = HeldLease(await self.grant_remote_lease(ttl_s), ttl_s, self.revoke_lease)
        self._leases.add(lease.lease_id, ttl_s, self._clock(), lease)
        return lease

    async def grant_remote_lease(self, ttl_s: float) -> int:
        """A lease for a holder elsewhere: it expires unless `keep_alive` is called for it."""
        check_ttl(ttl_s)
        return await self._ask(
            lambda tables: (tables.grant_lease(ttl_s), None),
            writes=True,
            on_commit=lambda lease_id: self._leases.add(lease_id, ttl_s, self._clock()),
        )

    async def keep_alive(self, lease_id: int) -> float:
        """The lease's full time to live, which it has again; raises LeaseExpired."""
        self._check_open()
        return self._leases.keep_alive(lease_id, self._clock())

    async def revoke_lease(self, lease_id: int) -> None:
        """Ends a lease, whoever holds it, and deletes its keys; an unknown one is no error.

        When it raises MetadataUnavailable the lease is lost all the same, and the store goes on deleting its keys.
        """
        if not self._closed:
            self._leases.remove(lease_id)
            self._ended_leases.add(lease_id)
            await self._delete_ended(lease_id)

    async def tick(self) -> None:
        """Ends the leases that have expired; called every TICK_S."""
        for lease_id in self._leases.tick(self._clock()):
            self._leases.remove(lease_id)
            self._ended_leases.add(lease_id)
        for lease_id in sorted(self._ended_leases):
            await self._delete_ended(lease_id)

    async def close(self) -> None:
        """Answers what was asked before, ends watches and leases, and releases the file. Durable on return."""
        if not self._closed:
            self._closed = True
            if self._ticker is not None:
                self._ticker.cancel()
            self._leases.close()
            self._requests.put(None)
        await asyncio.shield(self._stopped)
        self._history.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()

    # In the event loop.

    def _check_open(self) -> None:
        if self._closed:
            raise MetadataError("the metadata store is closed")

    async def _ask(
        self,
        run: Callable[[Tables], tuple[T, Changes | None]],
        *,
        writes: bool = False,
        on_commit: Callable[[T], None] | None = None,
    ) -> T:
        self._check_open()
        if self._waiting >= WAITING_REQUESTS_MAX:
            raise MetadataUnavailable(f"the metadata store has too many requests: waiting=`{self._waiting}`")
        request = _Request(run, writes, self._loop.create_future(), on_commit)
        self._waiting += 1
        self._requests.put(request)
        result: T = await request.future
        return result

    def _deliver(self, group: list[_Request], changed: list[Changes]) -> None:
        for changes in changed:
            self._history.append(changes)
        for request in group:
            self._waiting -= 1
            if request.error is None and request.on_commit is not None:
                request.on_commit(request.result)
            if request.future.done():
                continue
            if request.error is None:
                request.future.set_result(request.result)
            else:
                request.future.set_exception(request.error)

    async def _delete_ended(self, lease_id: int) -> None:
        await self._ask(lambda tables: (None, tables.revoke_lease(lease_id)), writes=True)
        self._ended_leases.discard(lease_id)

    async def _run_ticks(self) -> None:
        while True:
            await asyncio.sleep(TICK_S)
            try:
                await self.tick()
            except MetadataUnavailable as error:
                log.warning("expired leases are not deleted yet", error=str(error), leases=len(self._ended_leases))

    # In the thread.

    def _run_thread(self, drop_leases: bool) -> None:
        try:
            lock = _lock(self._path)
            try:
                self._serve(self._open_tables(drop_leases))
            finally:
                os.close(lock)  # before anybody is told, who may open it again at once
        except MetadataError as error:
            self._call_loop(self._fail_open, error)
        finally:
            self._call_loop(self._stopped.set_result, None)

    def _open_tables(self, drop_leases: bool) -> Tables:
        try:
            tables = Tables(self._path)
        except (sqlite3.Error, MetadataError) as error:
            raise MetadataError(
                f"cannot open the metadata database: restore the whole data directory from a backup, or use another: "
                f"path=`{self._path}` error=`{error}`"
            ) from error
        try:
            _sync_directory(self._path.parent)
            if drop_leases:
                tables.begin()
                tables.drop_leases()
                tables.commit()
            history = History(tables.oldest, oldest=tables.oldest, changes_max=self._history_changes_max)
            for changes in tables.history():
                history.append(changes)
            history.revision = tables.revision
        except (sqlite3.Error, OSError) as error:
            tables.close()
            raise MetadataError(f"cannot read the metadata database: path=`{self._path}` error=`{error}`") from error
        self._history = history
        self._call_loop(self._ready.set_result, dict(tables.leases))
        return tables

    def _fail_open(self, error: MetadataError) -> None:
        self._closed = True
        self._ready.set_exception(error)

    def _serve(self, tables: Tables) -> None:
        closing = False
        while not closing:
            group, closing = self._next_group()
            changed = self._run_group(tables, group)
            if not self._call_loop(self._deliver, group, changed):
                break
        try:
            tables.close()
        except sqlite3.Error as error:
            log.warning("the metadata database did not close cleanly", path=str(self._path), error=str(error))

    def _call_loop(self, function: Callable[..., object], *arguments: object) -> bool:
        """False if the event loop has gone without closing the store: then nobody waits for an answer."""
        try:
            self._loop.call_soon_threadsafe(function, *arguments)
        except RuntimeError:
            return False
        return True

    def _next_group(self) -> tuple[list[_Request], bool]:
        """Waits for a request, then takes all that are there. True if the store is to close after them."""
        group: list[_Request] = []
        request = self._requests.get()
        while request is not None:
            group.append(request)
            if len(group) == GROUP_REQUESTS_MAX:
                return group, False
            try:
                request = self._requests.get_nowait()
            except queue.Empty:
                return group, False
        return group, True

    def _run_group(self, tables: Tables, group: list[_Request]) -> list[Changes]:
        """Gives every request its result or error, and returns the changes that are now durable."""
        if self._broken:
            _fail(group, self._broken)
            return []
        try:
            return self._commit_group(tables, group)
        except sqlite3.Error as error:
            self._broken = self._after_error(tables, error)
            _fail(group, f"the metadata database failed: path=`{self._path}` error=`{error}`")
        except Exception as error:
            log.exception("the metadata thread failed", path=str(self._path))
            self._broken = f"the metadata thread failed: path=`{self._path}` error=`{error!r}`"
            _fail(group, self._broken)
        return []

    def _commit_group(self, tables: Tables, group: list[_Request]) -> list[Changes]:
        changed: list[Changes] = []
        writes = any(request.writes for request in group)
        if writes:
            tables.begin()
        for request in group:
            try:
                request.result, changes = request.run(tables)
            except MetadataError as error:
                request.error = error
                continue
            if changes is not None:
                changed.append(changes)
        if writes:
            tables.trim_history(self._history.oldest)
            tables.commit()
        return changed

    def _after_error(self, tables: Tables, error: sqlite3.Error) -> str:
        """Undoes the group. Returns why the store cannot go on, or nothing if it can."""
        try:
            tables.roll_back()
        except sqlite3.Error as second:
            error = second
        else:
            if getattr(error, "sqlite_errorcode", None) == sqlite3.SQLITE_FULL:
                return ""
        log.error("the metadata database failed: open it again", path=str(self._path), error=str(error))
        return f"the metadata database failed and must be opened again: path=`{self._path}` error=`{error}`"


def _fail(group: list[_Request], reason: str) -> None:
    for request in group:
        request.result = None
        request.error = MetadataUnavailable(reason)


def _lock(path: Path) -> int:
    """Locks the database for this opening of it; the lock goes with the descriptor, and so with the process."""
    lock_path = path.with_name(path.name + ".lock")
    try:
        descriptor = os.open(lock_path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except OSError as error:
        raise MetadataError(
            f"cannot lock the metadata database: path=`{lock_path}` error=`{error.strerror}`"
        ) from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(descriptor)
        if isinstance(error, BlockingIOError):
            reason = "another process has the metadata database open: stop it or use another data directory"
            raise MetadataError(f"{reason}: path=`{path}`") from error
        raise MetadataError(
            f"cannot lock the metadata database: path=`{lock_path}` error=`{error.strerror}`"
        ) from error
    return descriptor


def _sync_directory(directory: Path) -> None:
    """Makes the database's name in its directory durable."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
