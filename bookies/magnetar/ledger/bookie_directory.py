"""The bookies of the cluster as the metadata store shows them, and a connection to each.

What stands here is a hint: it says where to place a ledger and whom to ask, never what is true of a ledger. While the
store is silent it stays as it was.
"""

from __future__ import annotations

import asyncio
import random
from collections import OrderedDict
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Self, TypeVar

import structlog

from magnetar.ledger.bookie_rpc import (
    AddGroup,
    AddResult,
    AddStatus,
    BookieRpc,
    EntryAnswer,
    EntryOutcome,
    LacQuery,
    LacResult,
    ReadGroup,
    ReadResult,
)
from magnetar.metadata.backoff import Backoff
from magnetar.metadata.codec import DamagedRecord, decode_bookie
from magnetar.metadata.keyspace import Keyspace
from magnetar.metadata.records import BookieRegistration
from magnetar.metadata.store import Changes, KeyValue, MetadataStore, MetadataUnavailable

LOST_CONNECTIONS_MAX = 64
"""Connections kept to bookies without a session: a lost session does not prove that they do not answer."""

log = structlog.get_logger("magnetar.ledger")

T = TypeVar("T")


class BookieDirectory:
    """See `bookie_rpc.Bookies`. `start` it before use; `stop` ends its task and its connections.

    connect      makes the connection to a bookie; must not block
    disconnect   ends one that was made, when the bookie registered anew or the directory stops
    """

    def __init__(
        self,
        store: MetadataStore,
        keyspace: Keyspace,
        connect: Callable[[BookieRegistration], BookieRpc],
        *,
        disconnect: Callable[[BookieRpc], None] | None = None,
        rng: random.Random | None = None,
    ) -> None:
        self._store = store
        self._keyspace = keyspace
        self._connect = connect
        self._disconnect = disconnect
        self._rng = rng or random.Random()
        self._registered: dict[str, tuple[BookieRegistration, int]] = {}
        self._connections: dict[str, tuple[BookieRpc, str, int]] = {}
        self._lost: OrderedDict[str, None] = OrderedDict()
        self._callbacks: dict[object, Callable[[], None]] = {}
        self._task: asyncio.Task[None] | None = None
        self._listed = asyncio.Event()

    async def start(self) -> None:
        """Returns when the bookies were listed once."""
        self._task = asyncio.create_task(self._follow(), name="bookie directory")
        listed = asyncio.create_task(self._listed.wait())
        try:
            await asyncio.wait({self._task, listed}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            listed.cancel()
        if self._task.done():
            self._task.result()

    async def stop(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait({self._task})
            self._task = None
        for bookie_id in list(self._connections):
            self._hang_up(bookie_id)

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.stop()

    # Bookies.

    def registered(self) -> Sequence[BookieRegistration]:
        return [registration for registration, _ in self._registered.values()]

    def rpc(self, bookie_id: str) -> BookieRpc:
        entry = self._registered.get(bookie_id)
        held = self._connections.get(bookie_id)
        if entry is None:
            return held[0] if held is not None else Unreachable(bookie_id)
        registration, session = entry
        if held is not None and held[1:] == (registration.address, session):
            return held[0]
        self._hang_up(bookie_id)
        connection = self._connect(registration)
        self._connections[bookie_id] = (connection, registration.address, session)
        return connection

    def on_change(self, callback: Callable[[], None]) -> Callable[[], None]:
        key = object()
        self._callbacks[key] = callback

        def forget() -> None:
            self._callbacks.pop(key, None)

        return forget

    # Following the store.

    async def _follow(self) -> None:
        """Lists, watches, and starts again at each gap; only a defect ends it."""
        backoff = Backoff(self._rng)
        prefix = self._keyspace.bookies_prefix()
        while True:
            try:
                found = await self._store.range(prefix)
                self._replace_all(found.items)
                self._listed.set()
                backoff = Backoff(self._rng)
                await self._watch(prefix, found.revision + 1)
            except MetadataUnavailable:
                await asyncio.sleep(backoff.next_s())
            except Exception:
                log.exception("the directory of bookies stops following the metadata store")
                raise

    async def _watch(self, prefix: str, from_revision: int) -> None:
        """Returns at a gap, or when the watch ends."""
        watch = self._store.watch(prefix, from_revision=from_revision)
        try:
            async for event in watch:
                if not isinstance(event, Changes):
                    return
                for change in event.changes:
                    self._apply(change.key, change.current)
                self._tell()
        finally:
            await watch.close()

    def _replace_all(self, items: Sequence[KeyValue]) -> None:
        before = dict(self._registered)
        listed = {item.key for item in items}
        for bookie_id in list(self._registered):
            if self._keyspace.bookie(bookie_id) not in listed:
                self._apply(self._keyspace.bookie(bookie_id), None)
        for item in items:
            self._apply(item.key, item)
        if self._registered != before:
            self._tell()

    def _apply(self, key: str, current: KeyValue | None) -> None:
        bookie_id = self._keyspace.parse_bookie(key)
        registration = None if current is None else _decode(current)
        if current is None or registration is None:
            if self._registered.pop(bookie_id, None) is not None:
                self._lost[bookie_id] = None
        else:
            self._registered[bookie_id] = (registration, current.create_revision)
            self._lost.pop(bookie_id, None)
        while len(self._lost) > LOST_CONNECTIONS_MAX:
            self._hang_up(self._lost.popitem(last=False)[0])

    def _tell(self) -> None:
        for callback in list(self._callbacks.values()):
            callback()

    def _hang_up(self, bookie_id: str) -> None:
        held = self._connections.pop(bookie_id, None)
        if held is not None and self._disconnect is not None:
            self._disconnect(held[0])


def _decode(item: KeyValue) -> BookieRegistration | None:
    try:
        return decode_bookie(item.value)
    except DamagedRecord as damage:
        log.error("a bookie's registration cannot be read", key=item.key, error=str(damage))
        return None


class Unreachable:
    """A bookie that nobody knows: all its calls complete at once, without an answer."""

    def __init__(self, bookie_id: str) -> None:
        self._bookie_id = bookie_id

    @property
    def bookie_id(self) -> str:
        return self._bookie_id

    def add(self, group: AddGroup) -> asyncio.Future[AddResult]:
        return _done(AddResult(AddStatus.NO_ANSWER, "bookie is not registered"))

    def read(self, group: ReadGroup) -> asyncio.Future[ReadResult]:
        return _done(ReadResult((EntryAnswer(EntryOutcome.UNKNOWN),), "bookie is not registered"))

    def read_lac(self, query: LacQuery) -> asyncio.Future[LacResult]:
        return _done(LacResult(EntryOutcome.UNKNOWN, message="bookie is not registered"))


def _done(result: T) -> asyncio.Future[T]:
    future: asyncio.Future[T] = asyncio.get_running_loop().create_future()
    future.set_result(result)
    return future
