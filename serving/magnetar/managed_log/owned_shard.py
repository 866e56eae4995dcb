"""A shard in the hands of its owner: changes of its records one at a time, its ledgers, and the end of ownership.

All parts of a log share one of these. A change is built from the record as it stands when its turn comes, so that parts
never overwrite each other. Whoever learns that the shard is lost calls `release`, which happens once.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from typing import Any, NoReturn, TypeVar
from weakref import WeakValueDictionary

import structlog

from magnetar.ledger.client import LedgerClient, RecoveredLedger
from magnetar.ledger.errors import LedgerLost, NotEnoughBookies, RecoverySuperseded, RecoveryUndecided
from magnetar.ledger.fragments import Unreplicated, copies_to_make
from magnetar.ledger.write_handle import WriteHandle
from magnetar.ledger.writer import CommitOutcome
from magnetar.managed_log.errors import LogReleased, Released
from magnetar.managed_log.settings import LogSettings
from magnetar.metadata.ids import IdBlocks
from magnetar.metadata.keyspace import COUNTER_LEDGER
from magnetar.metadata.records import LedgerPurpose, LedgerRecord, LedgerState, Owner, ShardRecord
from magnetar.metadata.shards import OwnershipLost, SessionEnded, ShardChange, ShardMetadata
from magnetar.metadata.store import MetadataUnavailable

log = structlog.get_logger(__name__)

T = TypeVar("T")

Build = Callable[[ShardRecord], ShardChange | None]
Link = Callable[[LedgerRecord, ShardRecord], ShardChange | None]


class Retry:
    """Grows from the first delay to the last."""

    def __init__(self, settings: LogSettings) -> None:
        self._next_s = settings.retry_first_s
        self._last_s = settings.retry_last_s

    async def wait(self) -> None:
        delay_s, self._next_s = self._next_s, min(self._next_s * 2, self._last_s)
        await asyncio.sleep(delay_s)


class OwnedShard:
    """See the module."""

    def __init__(
        self,
        metadata: ShardMetadata,
        ledgers: LedgerClient,
        ids: IdBlocks,
        settings: LogSettings,
        now_us: Callable[[], int],
        on_released: Callable[[Released], None],
    ) -> None:
        self.metadata = metadata
        self.client = ledgers
        self.settings = settings
        self.now_us = now_us
        self.released: Released | None = None
        self.closed_cursor: LedgerRecord | None = None
        """Of the cursor ledger as takeover found or left it: CLOSED."""
        self.on_changed: list[Callable[[ShardRecord], None]] = []
        self.on_ensemble: list[Callable[[LedgerRecord], None]] = []
        self.on_lost: list[Callable[[Released], None]] = []
        self._ids = ids
        self._on_released = on_released
        self._given_up: Released | None = None
        self._silent = False
        self._silence_watchers: dict[Callable[[], None], None] = {}
        self._tasks: set[asyncio.Task[Any]] = set()
        self._writers: WeakValueDictionary[int, WriteHandle] = WeakValueDictionary()
        self._writers_made = 0
        self._recovered: dict[int, tuple[Unreplicated, ...]] = {}

    @property
    def shard_id(self) -> int:
        return self.metadata.record.shard_id

    @property
    def record(self) -> ShardRecord:
        return self.metadata.record

    @property
    def ledgers(self) -> Mapping[int, LedgerRecord]:
        """Those that are not CLOSED."""
        return self.metadata.ledgers

    def linked(self, ledger_id: int) -> tuple[LedgerRecord, ...]:
        """The data or cursor ledger that the record links, as something to delete; nothing for 0."""
        if ledger_id == 0:
            return ()
        found = self.ledgers.get(ledger_id, self.closed_cursor)
        assert found is not None
        assert found.ledger_id == ledger_id
        return (found,)

    # --- changing the records ---

    async def change(self, build: Build, on_silence: Callable[[], None] | None = None) -> bool:
        """Commits what `build` makes of the current record; None = there is nothing to do, returns False.

        A caller that is cancelled leaves the change to complete by itself: one that is cut off has an unknown outcome.
        `on_silence` is called when the store does not answer, while this change waits for its turn too. Raises
        LogReleased when the shard is or gets lost.
        """
        with self._watching_silence(on_silence):
            change = self._track(self._change(build))
            try:
                return await asyncio.shield(change)
            except asyncio.CancelledError:
                if change.cancelled() and not _is_cancelled():
                    self.check_served()
                raise

    async def give_up(self, build: Build, released: Released) -> None:
        """The last change: the owner goes with it. Changes that wait behind it are refused.

        Raises like `change`, and SessionEnded if the record was to name a session that has ended: nothing is changed.
        """

        def last(record: ShardRecord) -> ShardChange | None:
            self._given_up = released
            return build(record)

        try:
            await self.change(last)
        except SessionEnded:
            self._given_up = None
            raise

    async def _change(self, build: Build) -> bool:
        changed = False

        def compute() -> ShardChange | None:
            nonlocal changed
            self.check_served()
            if self._given_up is not None:
                raise LogReleased(self.shard_id, self._given_up)
            change = build(self.record)
            changed = change is not None
            return None if change is None else self._with_copies(change)

        try:
            await self.metadata.update(compute, on_unknown=self._store_is_silent)
        except OwnershipLost as lost:
            self._claimed_by(lost.owner)
        if changed:
            for ledger_id in [ledger_id for ledger_id in self._recovered if ledger_id not in self.ledgers]:
                del self._recovered[ledger_id]
            self._store_answered()
            for listener in self.on_changed:
                listener(self.record)
        return changed

    def _with_copies(self, change: ShardChange) -> ShardChange:
        """What the ledgers that are closed miss is put down in the same transaction: no crash forgets it."""
        closed = [ledger for ledger in change.put_ledgers if ledger.state is LedgerState.CLOSED]
        copies = [
            task for ledger in closed for task in copies_to_make(ledger, self._missed(ledger.ledger_id), self.now_us())
        ]
        return replace(change, put_copies=tuple(copies))

    def _missed(self, ledger_id: int) -> Sequence[Unreplicated]:
        """As its recovery found it, or as its writer knows it."""
        if ledger_id in self._recovered:
            return self._recovered[ledger_id]
        return [
            gap for writer in self._writers.values() if writer.ledger_id == ledger_id for gap in writer.unreplicated
        ]

    def _claimed_by(self, owner: Owner | None) -> NoReturn:
        released = Released(owner, "another broker claimed the shard")
        self.release(released)
        raise LogReleased(self.shard_id, released)

    def _store_is_silent(self) -> None:
        self._silent = True
        for writer in list(self._writers.values()):
            writer.hold_changes(True)
        for watcher in list(self._silence_watchers):
            watcher()

    def _store_answered(self) -> None:
        if self._silent:
            self._silent = False
            for writer in list(self._writers.values()):
                writer.hold_changes(False)

    @contextmanager
    def _watching_silence(self, watcher: Callable[[], None] | None) -> Iterator[None]:
        if watcher is None:
            yield
            return
        if self._silent:
            watcher()
        self._silence_watchers[watcher] = None
        try:
            yield
        finally:
            self._silence_watchers.pop(watcher, None)

    async def renew_session(self, session: Owner) -> None:
        """The broker registered again: its new session owns the shard, in the same epoch. Raises LogReleased."""
        await self.change(lambda record: ShardChange(replace(record, owner=session)))

    # --- ledgers ---

    async def create_ledger(
        self, purpose: LedgerPurpose, link: Link, wanted: Callable[[], bool] = lambda: True
    ) -> LedgerRecord | None:
        """Creates a ledger and links it in one transaction; waits while there are not enough bookies.

        Returns None when it is `wanted` no more, or `link` says so.
        """
        ledger_id = await self._new_ledger_id()
        retry = Retry(self.settings)
        while wanted():
            self.check_served()
            try:
                planned = self.client.plan(ledger_id, self.shard_id, purpose, self.record.epoch)
            except NotEnoughBookies as error:
                log.warning("log waits for bookies", shard=self.shard_id, purpose=purpose.name, problem=str(error))
                await retry.wait()
                # A bookie that came back empty meanwhile takes newer ones only.
                ledger_id = await self._new_ledger_id()
            else:
                return planned if await self.change(partial(link, planned)) else None
        return None

    async def _new_ledger_id(self) -> int:
        return await self._ids.next_id(COUNTER_LEDGER, at_least=self.client.lowest_id())

    def writer(
        self,
        ledger: LedgerRecord,
        on_confirmed: Callable[[int], None],
        on_lost: Callable[[LedgerLost], None],
        on_wants_roll: Callable[[str], None] | None = None,
    ) -> WriteHandle:
        """The writer of a ledger that is linked; the end of ownership ends it."""
        handle = self.client.writer(
            ledger,
            commit=self._commit_ensemble,
            on_confirmed=on_confirmed,
            on_lost=on_lost,
            on_wants_roll=on_wants_roll,
        )
        self._writers[self._writers_made] = handle
        self._writers_made += 1
        return handle

    async def _commit_ensemble(self, old: LedgerRecord, new: LedgerRecord) -> CommitOutcome:
        def build(record: ShardRecord) -> ShardChange | None:
            return ShardChange(record, put_ledgers=(new,)) if self.ledgers.get(old.ledger_id) == old else None

        try:
            committed = await self.change(build)
        except LogReleased:
            return CommitOutcome.LOST
        if not committed:
            return CommitOutcome.LOST
        for listener in self.on_ensemble:
            listener(new)
        return CommitOutcome.COMMITTED

    async def begin_recovery(self, ledger_id: int, on_silence: Callable[[], None] | None = None) -> LedgerRecord | None:
        """Puts a ledger of this shard IN_RECOVERY, so that its own owner can recover it; None if it is not open.

        Its epoch is that of the next claim at most: whoever claims the shard meanwhile recovers beside this owner.
        """

        def build(record: ShardRecord) -> ShardChange | None:
            ledger = self.ledgers.get(ledger_id)
            if ledger is None:
                return None
            raised = ledger.with_state(LedgerState.IN_RECOVERY, max(ledger.epoch, record.epoch + 1))
            return ShardChange(record, put_ledgers=(raised,))

        await self.change(build, on_silence)
        return self.ledgers.get(ledger_id)

    async def recover(self, ledger: LedgerRecord, attempts: int | None = None) -> RecoveredLedger:
        """Recovers a ledger that is IN_RECOVERY. Without a limit of attempts it waits until it is decided.

        Raises RecoveryUndecided after the last attempt.
        """
        retry = Retry(self.settings)
        made = 0
        while True:
            try:
                recovered = await self.client.recover(ledger)
                self._recovered[ledger.ledger_id] = recovered.unreplicated
                return recovered
            except RecoveryUndecided as error:
                if isinstance(error, RecoverySuperseded):
                    with suppress(MetadataUnavailable):  # a silent store proves nothing
                        await self.check_owned()
                made += 1
                if made == attempts:
                    raise
                log.warning("recovery is undecided", shard=self.shard_id, ledger=ledger.ledger_id, problem=str(error))
            await retry.wait()
            self.check_served()

    async def check_owned(self) -> None:
        """Reads whose the shard is. Raises LogReleased if not this owner's; MetadataUnavailable proves nothing."""
        self.check_served()
        try:
            await self.metadata.verify()
        except OwnershipLost as lost:
            if self._given_up is not None:  # the change that does it ends this shard
                raise LogReleased(self.shard_id, self._given_up) from None
            self._claimed_by(lost.owner)

    # --- the end of ownership ---

    def check_served(self) -> None:
        if self.released is not None:
            raise LogReleased(self.shard_id, self.released)

    def release(self, released: Released) -> None:
        """The shard is lost: everything stops, once, and `on_released` is told."""
        if self.released is None:
            self.abandon(released)
            self._on_released(released)

    def abandon(self, released: Released) -> None:
        """Everything stops, once. A change under way has an unknown outcome then."""
        if self.released is None:
            self._end(released)
            self._cancel_tasks()

    async def quiesce(self, released: Released) -> None:
        """Everything stops, after the change under way: `metadata` can be used on."""
        if self.released is None:
            self._end(released)
            await self.metadata.update(lambda: None)
            self._cancel_tasks()

    def _end(self, released: Released) -> None:
        self.released = released
        for writer in list(self._writers.values()):
            writer.abandon()
        for stop in self.on_lost:
            stop(released)

    def _cancel_tasks(self) -> None:
        current = asyncio.current_task()
        for task in self._tasks:
            if task is not current:
                task.cancel()

    def fail(self, error: Exception) -> None:
        """A part failed in a way that nobody foresaw: the shard is released, so that it is taken over and recovered."""
        log.error("log failed", shard=self.shard_id, exc_info=error)
        self.release(Released(None, f"log failed: {error}"))

    def spawn(self, work: Callable[[], Awaitable[None]]) -> asyncio.Task[None]:
        """Runs a part's work."""
        return self._track(self._run(work))

    async def _run(self, work: Callable[[], Awaitable[None]]) -> None:
        try:
            await work()
        except LogReleased:
            return
        except Exception as error:
            self.fail(error)

    def _track(self, work: Coroutine[None, None, T]) -> asyncio.Task[T]:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._done)
        return task

    def _done(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled():
            task.exception()  # whoever waits for it gets it; who was cancelled meanwhile does not


def _is_cancelled() -> bool:
    """The running task itself was cancelled, not only what it waits for."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0
