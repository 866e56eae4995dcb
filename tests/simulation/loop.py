"""An asyncio event loop under virtual time, shared by simulated processes, in an order that a seed decides.

Rules:

1. Nothing here reads a clock or a random source but the seed. Time stands still while anything is ready, but for
   TURN_S a callback, and then jumps to the next timer.
2. A process runs its callbacks in the order asyncio promises: first in, first out. Which process runs next, and for how
   many callbacks, the seed decides: that is all the freedom real processes have.
3. A callback belongs to the process in whose context it was scheduled. Those of a killed process never run again, so
   neither do its `finally` blocks; those of a paused one wait.
4. There are no threads: what is given to an executor runs at once, in the loop.

Tasks are hashed by the order in which they were made, futures by that of being hashed first: what iterates over sets of
them is repeatable.
"""

from __future__ import annotations

import asyncio
import random
from asyncio import events
from collections import deque
from collections.abc import Callable, Coroutine, Generator
from contextvars import Context, ContextVar, copy_context
from functools import partial
from heapq import heappop, heappush
from typing import Any, TypeVar

TURN_S = 0.000_02
"""What a callback takes, so that busy processes see time pass."""
TURNS_MAX = 12
"""Callbacks of one process before another may run."""
TURNS_PER_RUN_MAX = 1_000_000
"""Beyond it something spins without getting anywhere."""

T = TypeVar("T")


class Stuck(Exception):
    """Nothing is ready and no timer is set, or something spins: what was waited for can never happen."""


class Process:
    """What lives and dies together: callbacks that run in turn, on one host."""

    __slots__ = ("alive", "context", "name", "paused", "ready", "waiting")

    def __init__(self, name: str) -> None:
        self.name = name
        self.alive = True
        self.paused = False
        self.ready: deque[Callback] = deque()
        self.waiting = False
        """It stands in the loop's list of processes with something to run."""
        self.context = copy_context()
        self.context.run(PROCESS.set, self)

    def __repr__(self) -> str:
        return f"<{self.name}>"


PROCESS: ContextVar[Process] = ContextVar("PROCESS")


class Callback:
    """What call_soon and call_at return; see asyncio.TimerHandle."""

    __slots__ = ("_args", "_callback", "_cancelled", "_context", "_when", "process")

    def __init__(
        self, callback: Callable[..., Any], args: tuple[Any, ...], context: Context, process: Process, when: float
    ) -> None:
        self._callback: Callable[..., Any] | None = callback
        self._args = args
        self._context = context
        self._cancelled = False
        self._when = when
        self.process = process

    def cancel(self) -> None:
        self._cancelled = True
        self._callback = None
        self._args = ()

    def cancelled(self) -> bool:
        return self._cancelled

    def when(self) -> float:
        return self._when


class SimulatedFuture(asyncio.Future[T]):
    __slots__ = ("_serial",)

    def __hash__(self) -> int:
        try:
            return self._serial
        except AttributeError:
            self._serial = self.get_loop().next_serial()
            return self._serial


class SimulatedTask(asyncio.Task[T]):
    serial: int
    process: Process

    def __hash__(self) -> int:
        return self.serial


class SimulatedLoop(asyncio.AbstractEventLoop):
    """See the module. `on_error` hears what asyncio's exception handler would be told."""

    def __init__(self, seed: str, on_error: Callable[[dict[str, Any]], None]) -> None:
        self._rng = random.Random(seed)
        self._random = self._rng.random
        self._on_error = on_error
        self._now = 0.0
        self._serial = 0
        self._runnable: list[Process] = []
        self._timers: list[tuple[float, int, Callback]] = []
        self._closed = False
        self._running = False
        self._finished = False
        self._failure: BaseException | None = None
        self.turns = 0
        self.create_future = partial(SimulatedFuture, loop=self)
        self.outside = Process("world")
        """The process of whatever was not started in another one."""

    # --- what asyncio and the code under test use ---

    def time(self) -> float:
        return self._now

    get_debug = staticmethod(bool)
    """False, at once: every future and task asks."""

    def is_running(self) -> bool:
        return self._running

    def is_closed(self) -> bool:
        return self._closed

    def call_soon(self, callback: Callable[..., Any], *args: Any, context: Context | None = None) -> Any:
        if context is None:
            context = copy_context()
        process = context.get(PROCESS, self.outside)
        handle = Callback(callback, args, context, process, self._now)
        if process.alive:
            process.ready.append(handle)
            if not process.waiting and not process.paused:
                process.waiting = True
                self._runnable.append(process)
        return handle

    def call_at(self, when: float, callback: Callable[..., Any], *args: Any, context: Context | None = None) -> Any:
        if context is None:
            context = copy_context()
        handle = Callback(callback, args, context, context.get(PROCESS, self.outside), when)
        self._serial += 1
        heappush(self._timers, (when, self._serial, handle))
        return handle

    def call_later(self, delay: float, callback: Callable[..., Any], *args: Any, context: Context | None = None) -> Any:
        return self.call_at(self._now + delay, callback, *args, context=context)

    def call_soon_threadsafe(self, callback: Callable[..., Any], *args: Any, context: Context | None = None) -> Any:
        return self.call_soon(callback, *args, context=context)

    def next_serial(self) -> int:
        self._serial += 1
        return self._serial

    def create_task(
        self,
        coro: Coroutine[Any, Any, T] | Generator[Any, None, T],
        *,
        name: Any = None,
        context: Context | None = None,
    ) -> asyncio.Task[T]:
        # Hashed by asyncio already while it is made: the number comes first.
        task: SimulatedTask[T] = SimulatedTask.__new__(SimulatedTask)
        task.serial = self.next_serial()
        task.process = (context or copy_context()).get(PROCESS, self.outside)
        task.__init__(coro, loop=self, name=name, context=context)  # type: ignore[misc]
        return task

    def run_in_executor(self, executor: Any, func: Callable[..., T], *args: Any) -> asyncio.Future[T]:
        future = self.create_future()
        try:
            future.set_result(func(*args))
        except Exception as error:
            future.set_exception(error)
        return future

    def call_exception_handler(self, context: dict[str, Any]) -> None:
        if not self._closed:
            self._on_error(context)

    async def shutdown_asyncgens(self) -> None:
        """Nothing is kept of generators."""

    # --- processes ---

    def pause(self, process: Process) -> None:
        """Nothing of it runs until it is resumed; what becomes due meanwhile waits."""
        process.paused = True
        if process.waiting:
            process.waiting = False
            self._runnable.remove(process)

    def resume(self, process: Process) -> None:
        process.paused = False
        if process.ready and not process.waiting and process.alive:
            process.waiting = True
            self._runnable.append(process)

    def kill(self, process: Process) -> list[asyncio.Task[Any]]:
        """Nothing of it runs ever again. Returns its tasks: whoever lets go of them lets their clean-up code run."""
        process.alive = False
        # A task that has not begun is known to nobody but the callback that begins it.
        tasks = [t for t in asyncio.all_tasks(self) if isinstance(t, SimulatedTask) and t.process is process]
        process.ready.clear()
        if process.waiting:
            process.waiting = False
            self._runnable.remove(process)
        return tasks

    # --- running ---

    def run(self, main: Coroutine[Any, Any, T]) -> T:
        """Runs until `main` ends. Raises Stuck, what main raises, and what `fail` was given."""
        task = self.create_task(main, name="main")
        task.add_done_callback(self._stop)
        self._running = True
        before = events._get_running_loop()
        events._set_running_loop(self)
        try:
            self._turn()
        finally:
            events._set_running_loop(before)
            self._running = False
        if self._failure is not None:
            raise self._failure
        return task.result()

    def fail(self, error: BaseException) -> None:
        """Ends the run with this error."""
        self._failure = self._failure or error
        self._finished = True

    def close(self) -> None:
        self._closed = True

    def _stop(self, _task: asyncio.Task[Any]) -> None:
        self._finished = True

    def _turn(self) -> None:
        """Again and again lets time pass if nothing is ready; then one process runs some of its callbacks."""
        timers, runnable, chance = self._timers, self._runnable, self._random
        while not self._finished:
            if not runnable:
                self._now = max(self._now, self._next_timer())
            while timers and timers[0][0] <= self._now:
                self._due(heappop(timers)[2])
            if not runnable:
                continue
            process = runnable[int(chance() * len(runnable))] if len(runnable) > 1 else runnable[0]
            ready = process.ready
            for _ in range(min(1 + int(chance() * TURNS_MAX), len(ready))):
                if not ready or self._finished:
                    break
                self.turns += 1
                handle = ready.popleft()
                callback = handle._callback
                if callback is not None:
                    self._now += TURN_S
                    try:
                        handle._context.run(callback, *handle._args)
                    except Exception as error:
                        self.call_exception_handler({"message": f"a callback failed: {callback!r}", "exception": error})
            if not ready and process.waiting:
                process.waiting = False
                runnable.remove(process)
            if self.turns > TURNS_PER_RUN_MAX:
                raise Stuck(f"more than {TURNS_PER_RUN_MAX} callbacks ran: process=`{process.name}`")

    def _next_timer(self) -> float:
        timers = self._timers
        while timers:
            when, _, handle = timers[0]
            if handle._callback is not None and handle.process.alive:
                return when
            heappop(timers)
        raise Stuck("nothing is ready and no timer is set")

    def _due(self, handle: Callback) -> None:
        process = handle.process
        if handle._callback is None or not process.alive:
            return
        process.ready.append(handle)
        if not process.waiting and not process.paused:
            process.waiting = True
            self._runnable.append(process)
