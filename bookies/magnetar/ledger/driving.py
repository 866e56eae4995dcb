"""What the shells of the cores have in common: an alarm clock, answers that never raise, and how reports are told."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TypeVar

import structlog

from magnetar.ledger.bookie_rpc import AddResult, AddStatus, EntryAnswer, EntryOutcome, LacResult, ReadResult
from magnetar.ledger.effects import Report, ReportKind
from magnetar.ledger.metrics import LedgerMetrics

T = TypeVar("T")

NO_ADD_ANSWER = AddResult(AddStatus.NO_ANSWER, "the call was broken off")
NO_READ_ANSWER = ReadResult((EntryAnswer(EntryOutcome.UNKNOWN),), "the call was broken off")
NO_LAC_ANSWER = LacResult(EntryOutcome.UNKNOWN, message="the call was broken off")

_NEVER = frozenset({ReportKind.CONFLICT, ReportKind.WRONG_TOKEN, ReportKind.DAMAGED_ENTRY})
_NEWS = frozenset({ReportKind.ENSEMBLE_CHANGED, ReportKind.MEMBER_BACK})

log = structlog.get_logger("magnetar.ledger")


def answer_of(future: asyncio.Future[T], instead: T) -> T:
    """The future's result; `instead` if there is none (the process stops, or an implementation breaks its rule)."""
    if future.cancelled():
        return instead
    error = future.exception()
    if error is not None:
        log.error("a bookie call raised", error=repr(error))
        return instead
    return future.result()


def tell(report: Report, metrics: LedgerMetrics) -> None:
    """Logs and counts the report; what must never happen is an error."""
    metrics.count(report)
    level = log.error if report.kind in _NEVER else log.info if report.kind in _NEWS else log.warning
    level(report.kind.value, bookie=report.bookie, detail=report.detail)


class Alarm:
    """Calls back once, at the earliest of the times it was set to."""

    __slots__ = ("_at", "_call", "_loop", "_ring")

    def __init__(self, loop: asyncio.AbstractEventLoop, ring: Callable[[], None]) -> None:
        self._loop = loop
        self._ring = ring
        self._at = 0.0
        self._call: asyncio.TimerHandle | None = None

    def set(self, at: float) -> None:
        if self._call is not None:
            if self._at <= at:
                return
            self._call.cancel()
        self._at = at
        self._call = self._loop.call_at(at, self._fire)

    def cancel(self) -> None:
        if self._call is not None:
            self._call.cancel()
            self._call = None

    def _fire(self) -> None:
        self._call = None
        self._ring()
