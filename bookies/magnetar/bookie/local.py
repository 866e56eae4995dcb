"""A bookie of the same process, as the ledger layer sees bookies: the same handlers, nothing serialised."""

from __future__ import annotations

import asyncio

from magnetar.bookie.handlers import BookieHandlers
from magnetar.bookie.judge import unknown_lac, unknown_read
from magnetar.ledger.bookie_rpc import AddGroup, AddResult, AddStatus, LacQuery, LacResult, ReadGroup, ReadResult
from magnetar.ledger.deadlines import Deadlines

CALL_TIMEOUT_S = 5.0


class LocalBookie:
    """See `bookie_rpc.BookieRpc`."""

    def __init__(self, bookie_id: str, handlers: BookieHandlers, *, timeout_s: float = CALL_TIMEOUT_S) -> None:
        self._bookie_id = bookie_id
        self._handlers = handlers
        self._deadlines = Deadlines(timeout_s)

    @property
    def bookie_id(self) -> str:
        return self._bookie_id

    def add(self, group: AddGroup) -> asyncio.Future[AddResult]:
        return self._deadlines.watch(self._handlers.add(group), _late_add)

    def read(self, group: ReadGroup) -> asyncio.Future[ReadResult]:
        return self._deadlines.watch(self._handlers.read(group), _late_read)

    def read_lac(self, query: LacQuery) -> asyncio.Future[LacResult]:
        return self._deadlines.watch(self._handlers.read_lac(query), _late_lac)

    def close(self) -> None:
        """Answers what still waits."""
        self._deadlines.close()


def _late_add() -> AddResult:
    return AddResult(AddStatus.NO_ANSWER, "bookie did not answer in time")


def _late_read() -> ReadResult:
    return unknown_read("bookie did not answer in time")


def _late_lac() -> LacResult:
    return unknown_lac("bookie did not answer in time")
