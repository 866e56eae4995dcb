"""A bookie of the same process, as the ledger layer sees bookies: the same handlers, nothing serialised.

Adds wait for room in the bookie's queue, as frames wait in a network; their deadline runs meanwhile.
"""

from __future__ import annotations

import asyncio
from collections import deque
from functools import partial

from magnetar.bookie.handlers import BookieHandlers
from magnetar.bookie.judge import unknown_lac, unknown_read
from magnetar.ledger.bookie_rpc import AddGroup, AddResult, AddStatus, LacQuery, LacResult, ReadGroup, ReadResult
from magnetar.ledger.deadlines import Deadlines

CALL_TIMEOUT_S = 5.0
WAITING_MAX = 4096
"""Groups of adds that wait for room. Their entries are in memory anyway: whoever sent them keeps them for a retry."""


class LocalBookie:
    """See `bookie_rpc.BookieRpc`."""

    def __init__(self, bookie_id: str, handlers: BookieHandlers, *, timeout_s: float = CALL_TIMEOUT_S) -> None:
        self._bookie_id = bookie_id
        self._handlers = handlers
        self._deadlines = Deadlines(timeout_s)
        self._waiting: deque[tuple[AddGroup, asyncio.Future[AddResult]]] = deque()
        self._feeding: asyncio.Task[None] | None = None

    @property
    def bookie_id(self) -> str:
        return self._bookie_id

    def add(self, group: AddGroup) -> asyncio.Future[AddResult]:
        if not self._waiting and self._handlers.has_room:
            return self._deadlines.watch(self._handlers.add(group), _late_add)
        return self._deadlines.watch(self._wait(group), _late_add)

    def read(self, group: ReadGroup) -> asyncio.Future[ReadResult]:
        return self._deadlines.watch(self._handlers.read(group), _late_read)

    def read_lac(self, query: LacQuery) -> asyncio.Future[LacResult]:
        return self._deadlines.watch(self._handlers.read_lac(query), _late_lac)

    def close(self) -> None:
        """Answers what still waits."""
        if self._feeding is not None:
            self._feeding.cancel()
        self._deadlines.close()

    def _wait(self, group: AddGroup) -> asyncio.Future[AddResult]:
        future: asyncio.Future[AddResult] = asyncio.get_running_loop().create_future()
        if len(self._waiting) >= WAITING_MAX:
            future.set_result(AddResult(AddStatus.BUSY, "too much is queued"))
            return future
        self._waiting.append((group, future))
        if self._feeding is None or self._feeding.done():
            self._feeding = asyncio.create_task(self._feed(), name=f"adds of {self._bookie_id}")
        return future

    async def _feed(self) -> None:
        while self._waiting:
            await self._handlers.room()
            group, future = self._waiting.popleft()
            self._handlers.add(group).add_done_callback(partial(_answer, future))


def _answer(future: asyncio.Future[AddResult], done: asyncio.Future[AddResult]) -> None:
    if not future.done():
        future.set_result(done.result())


def _late_add() -> AddResult:
    return AddResult(AddStatus.NO_ANSWER, "bookie did not answer in time")


def _late_read() -> ReadResult:
    return unknown_read("bookie did not answer in time")


def _late_lac() -> LacResult:
    return unknown_lac("bookie did not answer in time")
