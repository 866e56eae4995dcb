"""The SQLite engine: one thread that owns the tables, and the leases. The embedded store and the server stand on it.

The thread takes all requests that are waiting, judges them one by one in the order they came, and commits them as one
SQLite transaction with one sync; then all are answered. So a hundred concurrent transactions cost one sync, and each
still sees the effects of those before it. What was changed is told in the event loop after the commit and before the
answers.

A full disk refuses the group and leaves the engine usable. After any other error of the disk the content of the
database is in doubt (a failed sync cannot be repeated): the engine answers MetadataUnavailable until it is opened
again.
"""

from __future__ import annotations

import asyncio
import fcntl
import os
import queue
import sqlite3
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, Self, TypeVar

import structlog

from magnetar.metadata.leases import TICK_S, LeaseTable
from magnetar.metadata.sqlite_tables import Revision, Tables
from magnetar.metadata.store import MetadataError, MetadataUnavailable

GROUP_REQUESTS_MAX = 256
WAITING_REQUESTS_MAX = 10_000
RECENT_VERSIONS_MAX = 10_000
"""Of the newest versions, about so many are told when a database is opened."""

log = structlog.get_logger(__name__)
T = TypeVar("T")


@dataclass(slots=True)
class _Request:
    """What one call asks of the tables. `on_commit` runs in the event loop even if the caller has gone away."""

    run: Callable[[Tables], Any]
    writes: bool
    future: asyncio.Future[Any]
    on_commit: Callable[[Any], None] | None
    result: Any = None
    error: MetadataError | None = None


class DiskFull(MetadataUnavailable):
    """Nothing was changed; the engine goes on when there is space again."""


class Feed(Protocol):
    """Who is told of every revision, in order, once it is durable."""

    def start(self, oldest: int, revision: int) -> None:
        """`append` will tell all revisions from `oldest` to `revision` first, in the thread."""
        ...

    def append(self, revision: Revision) -> None: ...


@dataclass(frozen=True, slots=True)
class Opened:
    """What stood in a database when it was opened. The ids are random; `term` counts how often a server served it."""

    cluster_id: int
    member_id: int
    term: int
    compacted: int


class SqliteEngine:
    """Made by `open`."""

    opened: Opened

    def __init__(self, path: Path, feed: Feed, clock: Callable[[], float]) -> None:
        self.path = path
        self.clock = clock
        self.leases = LeaseTable()
        self._feed = feed
        self._loop = asyncio.get_running_loop()
        self._ended_leases: set[int] = set()
        self._requests: queue.SimpleQueue[_Request | None] = queue.SimpleQueue()
        self._waiting = 0
        self._broken = ""
        self._broke = asyncio.Event()
        self._closed = False
        self._ready: asyncio.Future[dict[int, float]] = self._loop.create_future()
        self._stopped: asyncio.Future[None] = self._loop.create_future()
        self._ticker: asyncio.Task[None] | None = None

    @classmethod
    async def open(
        cls,
        path: str | os.PathLike[str],
        feed: Feed,
        *,
        drop_leases: bool = False,
        serving: bool = False,
        clock: Callable[[], float] | None = None,
    ) -> Self:
        """Opens or creates the database and locks it against other processes.

        drop_leases   delete every leased key: their holders lived in the process that had it open before. Otherwise
                      each lease has its full time again
        serving       begin a new term
        Raises MetadataError, in one line, for what an operator has to change.
        """
        engine = cls(Path(path), feed, clock or asyncio.get_running_loop().time)
        thread = threading.Thread(
            target=engine._run_thread, args=(drop_leases, serving), name="metadata-sqlite", daemon=True
        )
        thread.start()
        try:
            leases = await asyncio.shield(engine._ready)
        except asyncio.CancelledError:
            engine._requests.put(None)
            engine._ready.add_done_callback(lambda ready: ready.cancelled() or ready.exception())
            raise
        now = engine.clock()
        for lease_id, ttl_s in leases.items():
            engine.leases.add(lease_id, ttl_s, now)
        engine._ticker = asyncio.create_task(engine._run_ticks(), name="metadata-leases")
        return engine

    async def ask(
        self,
        run: Callable[[Tables], T],
        *,
        writes: bool = False,
        on_commit: Callable[[T], None] | None = None,
    ) -> T:
        """What `run` returns, once it is durable. Raises the MetadataError that it raises before its first change."""
        self.check_open()
        if self._waiting >= WAITING_REQUESTS_MAX:
            raise MetadataUnavailable(f"the metadata store has too many requests: waiting=`{self._waiting}`")
        request = _Request(run, writes, self._loop.create_future(), on_commit)
        self._waiting += 1
        self._requests.put(request)
        result: T = await request.future
        return result

    async def grant_lease(self, ttl_s: float, lease_id: int = 0) -> int:
        """A lease for a holder elsewhere: it expires unless `keep_alive` is called for it. Id 0: one is chosen."""
        return await self.ask(
            lambda tables: tables.grant_lease(ttl_s, lease_id),
            writes=True,
            on_commit=lambda granted: self.add_lease(granted, ttl_s),
        )

    def add_lease(self, lease_id: int, ttl_s: float) -> None:
        """The lease's time begins: it is durable."""
        self.leases.add(lease_id, ttl_s, self.clock())

    def keep_alive(self, lease_id: int) -> float:
        """The lease's full time to live, which it has again; raises LeaseExpired."""
        self.check_open()
        return self.leases.keep_alive(lease_id, self.clock())

    async def revoke_lease(self, lease_id: int) -> None:
        """Ends a lease, whoever holds it, and deletes its keys; an unknown one is no error.

        When it raises MetadataUnavailable the lease is lost all the same, and the engine goes on deleting its keys.
        """
        if not self._closed:
            self.leases.remove(lease_id)
            self._ended_leases.add(lease_id)
            await self._delete_ended(lease_id)

    async def tick(self) -> None:
        """Ends the leases that have expired; called every TICK_S."""
        for lease_id in self.leases.tick(self.clock()):
            self.leases.remove(lease_id)
            self._ended_leases.add(lease_id)
        if self._ended_leases:
            calls = (self._delete_ended(lease_id) for lease_id in sorted(self._ended_leases)[:GROUP_REQUESTS_MAX])
            for outcome in await asyncio.gather(*calls, return_exceptions=True):
                if isinstance(outcome, BaseException):
                    raise outcome

    async def close(self) -> None:
        """Answers what was asked before, ends leases, and releases the file. Durable on return."""
        if not self._closed:
            self._closed = True
            if self._ticker is not None:
                self._ticker.cancel()
            self.leases.close()
            self._requests.put(None)
        await asyncio.shield(self._stopped)

    def check_open(self) -> None:
        if self._closed:
            raise MetadataError("the metadata store is closed")

    @property
    def ended_leases(self) -> int:
        """Leases whose keys are not deleted yet."""
        return len(self._ended_leases)

    @property
    def broken(self) -> str:
        """Why nothing can be asked until the database is opened again; empty if all is well."""
        return self._broken

    async def until_broken(self) -> str:
        """Returns `broken` when there is something to say."""
        await self._broke.wait()
        return self._broken

    # In the event loop.

    def _deliver(self, group: list[_Request], revisions: list[Revision]) -> None:
        if self._broken:
            self._broke.set()
        for revision in revisions:
            self._feed.append(revision)
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
        await self.ask(lambda tables: tables.revoke_lease(lease_id), writes=True)
        self._ended_leases.discard(lease_id)

    async def _run_ticks(self) -> None:
        while True:
            await asyncio.sleep(TICK_S)
            try:
                await self.tick()
            except MetadataUnavailable as error:
                log.warning("expired leases are not deleted yet", error=str(error), leases=len(self._ended_leases))

    # In the thread.

    def _run_thread(self, drop_leases: bool, serving: bool) -> None:
        try:
            lock = _lock(self.path)
            try:
                self._serve(self._open_tables(drop_leases, serving))
            finally:
                os.close(lock)  # before anybody is told, who may open it again at once
        except MetadataError as error:
            self._call_loop(self._fail_open, error)
        finally:
            self._call_loop(self._stopped.set_result, None)

    def _open_tables(self, drop_leases: bool, serving: bool) -> Tables:
        try:
            tables = Tables(self.path)
        except (sqlite3.Error, MetadataError) as error:
            raise MetadataError(
                f"cannot open the metadata database: restore the whole data directory from a backup, or use another: "
                f"path=`{self.path}` error=`{error}`"
            ) from error
        try:
            _sync_directory(self.path.parent)
            tables.begin()
            if drop_leases:
                tables.drop_leases()
                tables.end_request()
            if serving:
                tables.begin_term()
            tables.commit()
            oldest = tables.first_of_newest(RECENT_VERSIONS_MAX)
            self._feed.start(oldest, tables.revision)
            for revision in tables.revisions(oldest):
                self._feed.append(revision)
        except (sqlite3.Error, OSError) as error:
            tables.close()
            raise MetadataError(f"cannot read the metadata database: path=`{self.path}` error=`{error}`") from error
        self.opened = Opened(tables.cluster_id, tables.member_id, tables.term, tables.compacted)
        self._call_loop(self._ready.set_result, dict(tables.leases))
        return tables

    def _fail_open(self, error: MetadataError) -> None:
        self._closed = True
        self._ready.set_exception(error)

    def _serve(self, tables: Tables) -> None:
        closing = False
        while not closing:
            group, closing = self._next_group()
            revisions = self._run_group(tables, group)
            if not self._call_loop(self._deliver, group, revisions):
                break
        try:
            tables.close()
        except sqlite3.Error as error:
            log.warning("the metadata database did not close cleanly", path=str(self.path), error=str(error))

    def _call_loop(self, function: Callable[..., object], *arguments: object) -> bool:
        """False if the event loop has gone without closing the engine: then nobody waits for an answer."""
        try:
            self._loop.call_soon_threadsafe(function, *arguments)
        except RuntimeError:
            return False
        return True

    def _next_group(self) -> tuple[list[_Request], bool]:
        """Waits for a request, then takes all that are there. True if the engine is to close after them."""
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

    def _run_group(self, tables: Tables, group: list[_Request]) -> list[Revision]:
        """Gives every request its result or error, and returns the revisions that are now durable."""
        if self._broken:
            _fail(group, self._broken)
            return []
        try:
            return self._commit_group(tables, group)
        except sqlite3.Error as error:
            self._broken = self._after_error(tables, error)
            kind = MetadataUnavailable if self._broken else DiskFull
            _fail(group, f"the metadata database failed: path=`{self.path}` error=`{error}`", kind)
        except Exception as error:
            log.exception("the metadata thread failed", path=str(self.path))
            self._broken = f"the metadata thread failed: path=`{self.path}` error=`{error!r}`"
            _fail(group, self._broken)
        return []

    def _commit_group(self, tables: Tables, group: list[_Request]) -> list[Revision]:
        revisions: list[Revision] = []
        writes = any(request.writes for request in group)
        if writes:
            tables.begin()
        for request in group:
            try:
                request.result = request.run(tables)
            except MetadataError as error:
                assert not tables.changed, "a request is refused before its first change"
                request.error = error
                continue
            revision = tables.end_request()
            if revision is not None:
                revisions.append(revision)
        if writes:
            tables.sweep()
            tables.commit()
        return revisions

    def _after_error(self, tables: Tables, error: sqlite3.Error) -> str:
        """Undoes the group. Returns why the engine cannot go on, or nothing if it can."""
        try:
            tables.roll_back()
        except sqlite3.Error as second:
            error = second
        else:
            if getattr(error, "sqlite_errorcode", None) == sqlite3.SQLITE_FULL:
                return ""
        log.error("the metadata database failed: open it again", path=str(self.path), error=str(error))
        return f"the metadata database failed and must be opened again: path=`{self.path}` error=`{error}`"


def _fail(group: list[_Request], reason: str, kind: type[MetadataUnavailable] = MetadataUnavailable) -> None:
    for request in group:
        request.result = None
        request.error = kind(reason)


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
