"""An event loop in a thread of its own, for callers that block."""

from __future__ import annotations

import asyncio
import os
import threading
from collections import deque
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from typing import Any, TypeVar

from magnetar.client.errors import ClientClosed

T = TypeVar("T")


class Portal:
    """Runs coroutines and functions in its loop. Started once, stopped once, useless in a forked child."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._pid = os.getpid()
        self._posted: deque[Callable[[], object]] = deque()
        self._scheduled = False
        self._stopped = False
        # A daemon: a program that forgets to leave its `with` block can still end.
        self._thread = threading.Thread(target=self._loop.run_forever, name="magnetar-client", daemon=True)
        self._thread.start()

    @property
    def inherited(self) -> bool:
        """This is a copy in a child process, where the thread does not exist."""
        return os.getpid() != self._pid

    @property
    def stopped(self) -> bool:
        return self._stopped

    def check(self) -> None:
        """Raises ClientClosed if nothing can run here."""
        if self.inherited:
            raise ClientClosed(
                f"this client belongs to the parent process: connect again after a fork: pid=`{os.getpid()}`"
            )
        if self._stopped:
            raise ClientClosed("this client is closed")
        if threading.current_thread() is self._thread:
            raise ClientClosed("a blocking call was made from a callback: it would wait for itself")

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Wait for a coroutine's result. Ctrl-C, or whatever else interrupts the wait, cancels it."""
        try:
            self.check()
        except ClientClosed:
            work.close()
            raise
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise

    def post(self, function: Callable[[], object]) -> None:
        """Call it in the loop, soon, in the order of the posts. It must not raise."""
        self._posted.append(function)
        if not self._scheduled:
            self._scheduled = True
            self._loop.call_soon_threadsafe(self._drain)

    def stop(self) -> None:
        """End the thread. What still runs there is cancelled."""
        if self._stopped or self.inherited:
            return
        asyncio.run_coroutine_threadsafe(_cancel_all(), self._loop).result()
        self._stopped = True
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def _drain(self) -> None:
        # Lowered first: who posts from now on schedules again, who posted before is served here.
        self._scheduled = False
        while self._posted:
            self._posted.popleft()()


async def _cancel_all() -> None:
    tasks = asyncio.all_tasks() - {asyncio.current_task()}
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    await asyncio.get_running_loop().shutdown_asyncgens()


class Watched(Future[T]):
    """A future that knows whether anybody looked at it."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = False

    def result(self, timeout: float | None = None) -> T:
        self.seen = True
        return super().result(timeout)

    def exception(self, timeout: float | None = None) -> BaseException | None:
        self.seen = True
        return super().exception(timeout)

    def add_done_callback(self, fn: Callable[[Future[T]], object]) -> None:
        self.seen = True
        super().add_done_callback(fn)
