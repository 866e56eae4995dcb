"""Bookies of this process, the real ones but for the disk: their queue, judgement and reads over memory."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence

from prometheus_client import CollectorRegistry

from magnetar.bookie.group_commit import GroupCommit
from magnetar.bookie.handlers import BookieHandlers
from magnetar.bookie.judge import Conditions, ReadConditions
from magnetar.bookie.local import LocalBookie
from magnetar.bookie.memory import MemoryEntryStore
from magnetar.bookie.metrics import BookieMetrics
from magnetar.bookie.reads import Reads
from magnetar.ledger.bookie_directory import Unreachable
from magnetar.ledger.bookie_rpc import AddGroup, AddResult, BookieRpc, LacQuery, LacResult, ReadGroup, ReadResult
from magnetar.metadata.records import BookieRegistration, BookieState


async def _at_once() -> None:
    pass


class RealBookie:
    """`hung`: calls are accepted and never answered. `down`: they fail at once."""

    def __init__(self, bookie_id: str, sync: Callable[[], Awaitable[None]] = _at_once) -> None:
        self.bookie_id = bookie_id
        self.store = MemoryEntryStore(sync)
        metrics = BookieMetrics(CollectorRegistry(), bookie_id)
        self.commits = GroupCommit(self.store, Conditions, metrics, queue_bytes=64 << 20)
        reads = Reads(self.store, self.commits, lambda ledger_id: ReadConditions(), metrics)
        self.handlers = BookieHandlers(self.store, self.commits, reads, lambda ledger_id: False)
        self.local = LocalBookie(bookie_id, self.handlers)
        self.hung = False
        self.down = False
        self.commits.start()

    async def stop(self) -> None:
        await self.handlers.close()
        await self.commits.close()
        self.local.close()

    def add(self, group: AddGroup) -> asyncio.Future[AddResult]:
        return self._to().add(group)

    def read(self, group: ReadGroup) -> asyncio.Future[ReadResult]:
        return self._to().read(group)

    def read_lac(self, query: LacQuery) -> asyncio.Future[LacResult]:
        return self._to().read_lac(query)

    def _to(self) -> BookieRpc:
        if self.hung:
            return _Hung(self.bookie_id)
        return Unreachable(self.bookie_id) if self.down else self.local


class _Hung(Unreachable):
    def add(self, group: AddGroup) -> asyncio.Future[AddResult]:
        return asyncio.get_running_loop().create_future()

    def read(self, group: ReadGroup) -> asyncio.Future[ReadResult]:
        return asyncio.get_running_loop().create_future()

    def read_lac(self, query: LacQuery) -> asyncio.Future[LacResult]:
        return asyncio.get_running_loop().create_future()


class RealBookies:
    """`Bookies` of a fixed set, registered or not as the test says."""

    def __init__(self, names: Sequence[str]) -> None:
        self.by_name = {name: RealBookie(name) for name in names}
        self._registered = {name: BookieRegistration(name, "here") for name in names}
        self._callbacks: list[Callable[[], None]] = []

    def __getitem__(self, name: str) -> RealBookie:
        return self.by_name[name]

    def registered(self) -> Sequence[BookieRegistration]:
        return list(self._registered.values())

    def rpc(self, bookie_id: str) -> BookieRpc:
        return self.by_name.get(bookie_id) or Unreachable(bookie_id)

    def on_change(self, callback: Callable[[], None]) -> Callable[[], None]:
        self._callbacks.append(callback)
        return lambda: self._callbacks.remove(callback)

    @property
    def listeners(self) -> int:
        return len(self._callbacks)

    def set(self, name: str, state: BookieState | None) -> None:
        """Registers the bookie in this state; None ends its session."""
        if state is None:
            self._registered.pop(name, None)
        else:
            self.by_name.setdefault(name, RealBookie(name))
            self._registered[name] = BookieRegistration(name, "here", state=state)
        for callback in list(self._callbacks):
            callback()

    async def stop(self) -> None:
        for bookie in self.by_name.values():
            await bookie.stop()
