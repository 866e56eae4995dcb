"""The life of a server process: run on uvloop until a signal asks it to stop, then stop in the reverse order."""

from __future__ import annotations

import asyncio
import ctypes
import gc
import resource
import signal
from collections.abc import Awaitable, Callable, Coroutine
from contextlib import suppress
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import structlog
import uvloop

log = structlog.get_logger("magnetar.lifecycle")

GC_THRESHOLDS = (50_000, 20, 20)
"""The cycle collector runs rarely: the hot paths make no cycles, and its pauses show in the latency."""


MALLOPT_ARENA_MAX = -8
"""M_ARENA_MAX of glibc's malloc.h."""
ARENAS_MAX = 2


OPEN_FILES_MAX = 65_536
"""Connections and files of one process."""


STOP_S = 10.0
"""For all parts of a process together to stop in order."""


class Stack:
    """What was started, to be stopped in the reverse order. Every stop runs, whatever the others raise."""

    def __init__(self) -> None:
        self._stops: list[tuple[str, Callable[[], Awaitable[None]]]] = []

    def push(self, name: str, stop: Callable[[], Awaitable[None]]) -> None:
        self._stops.append((name, stop))

    async def close(self) -> None:
        while self._stops:
            name, stop = self._stops[-1]
            try:
                await stop()
            except Exception:
                log.exception("stopping failed", part=name)
            self._stops.pop()

    async def close_in_time(self, limit_s: float = STOP_S) -> bool:
        """As `close`; False if it is given up, and the process is to end as it is.

        What is left then is as after a crash: nothing that was answered is lost, others wait for the session to end.
        """
        closing = asyncio.create_task(self.close(), name="stop")
        done, _ = await asyncio.wait({closing}, timeout=limit_s)
        if not done:
            left = [name for name, _ in reversed(self._stops)]
            log.warning("stopping takes too long and is given up, as if by a crash", limit_s=limit_s, left=left)
            closing.cancel()
        return bool(done)


def limit_malloc_arenas() -> None:
    """Gives glibc's allocator ARENAS_MAX arenas, where there is one.

    By default it makes eight for each core and returns none of their memory while a block of them is in use: with the
    threads of storage and gRPC that are hundreds of megabytes after a burst of large frames.
    """
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).mallopt(MALLOPT_ARENA_MAX, ARENAS_MAX)


def run(main: Callable[[asyncio.Event], Coroutine[Any, Any, None]]) -> None:
    """Runs `main(stop)` on uvloop; SIGINT and SIGTERM set `stop`, a second one ends the process at once."""
    gc.set_threshold(*GC_THRESHOLDS)
    gc.freeze()  # What was imported is there for good: no collection looks at it again.
    _allow_open_files()
    limit_malloc_arenas()
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(_with_signals(main))


def _allow_open_files() -> None:
    """As many as the system lets this process have: connections must not take those that the storage needs."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = OPEN_FILES_MAX if hard == resource.RLIM_INFINITY else min(hard, OPEN_FILES_MAX)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


async def _with_signals(main: Callable[[asyncio.Event], Coroutine[Any, Any, None]]) -> None:
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()

    def asked_to_stop(number: signal.Signals) -> None:
        if stop.is_set():
            loop.remove_signal_handler(number)
            signal.raise_signal(number)
        stop.set()

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, asked_to_stop, number)
    await main(stop)


@cache
def software_version() -> str:
    """Of the installed package; empty where it runs without being installed."""
    try:
        return version("magnetar")
    except PackageNotFoundError:
        return ""
