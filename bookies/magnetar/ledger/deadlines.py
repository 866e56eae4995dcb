"""Futures that must complete within one and the same time: one timer for all of them."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from typing import Any, TypeVar
from weakref import ref

T = TypeVar("T")


class Deadlines:
    """Gives each watched future its late answer when `timeout_s` seconds have passed and it has none.

    All wait equally long, so the oldest is always the next one that is due.
    """

    def __init__(self, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        # Weak, since a completed future may hold a megabyte that was read: the timer must not keep it.
        self._waiting: deque[tuple[float, ref[asyncio.Future[Any]], Callable[[], object]]] = deque()
        self._timer: asyncio.TimerHandle | None = None

    def watch(self, future: asyncio.Future[T], late: Callable[[], T]) -> asyncio.Future[T]:
        """Returns the same future."""
        loop = asyncio.get_running_loop()
        self._drop_done()
        self._waiting.append((loop.time() + self._timeout_s, ref(future), late))
        if self._timer is None:
            self._timer = loop.call_at(self._waiting[0][0], self._expire)
        return future

    def close(self) -> None:
        """Gives every future that waits its late answer now."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        while self._waiting:
            self._finish_oldest()

    def _expire(self) -> None:
        loop = asyncio.get_running_loop()
        now = loop.time()
        self._timer = None
        while self._waiting and self._waiting[0][0] <= now:
            self._finish_oldest()
        self._drop_done()
        if self._waiting:
            self._timer = loop.call_at(self._waiting[0][0], self._expire)

    def _finish_oldest(self) -> None:
        _, reference, late = self._waiting.popleft()
        future = reference()
        if future is not None and not future.done():
            future.set_result(late())

    def _drop_done(self) -> None:
        while self._waiting:
            future = self._waiting[0][1]()
            if future is not None and not future.done():
                return
            self._waiting.popleft()
