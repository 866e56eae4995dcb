"""Several brokers on one host, a process each: they are started, watched, started again, and stopped together.

1. Worker i is a broker `<id>-<i>` at port + 2i, its HTTP at that port + 1; with port 0 all take free ports.
2. A worker that ends before it ever served ends all, with one line: what the first of them refused.
3. A worker that served and ended is started again after a pause that grows, at most RESTARTS_MAX times in
   RESTART_WINDOW_S seconds; then all end.
4. SIGINT and SIGTERM stop all of them as one broker stops; a second signal reaches them too.

Workers are in sessions of their own: Ctrl-C reaches the supervisor only. They end when the supervisor is killed.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from typing import TextIO

import structlog

from magnetar.cli.child import MAGNETAR, child_environment
from magnetar.cli.roles.process import RoleRefused
from magnetar.node.settings import BrokerSettings, split_address
from magnetar.node.telemetry import configure_logging

RESTARTS_MAX = 5
RESTART_WINDOW_S = 120.0
PAUSE_FIRST_S = 0.5
PAUSE_MAX_S = 10.0
PORTS_PER_WORKER = 2
LINE_BYTES_MAX = 1 << 16
LINE_START = b"magnetar: "
"""Of a line that is meant for people: at the end of a process it says why it refused."""

log = structlog.get_logger("magnetar.workers")


def worker_assignments(settings: BrokerSettings, number: int) -> list[str]:
    """The settings in which worker `number` differs from the broker that was asked for. Raises RoleRefused."""
    assignments = [f"id={settings.id}-{number}", f"listen={_shifted(settings.listen, number)}"]
    for key in ("http_listen", "advertised_address"):
        address = getattr(settings, key)
        if address:
            assignments.append(f"{key}={_shifted(address, number)}")
    return assignments


def _shifted(address: str, number: int) -> str:
    host, port = split_address(address)
    shifted = port + PORTS_PER_WORKER * number if port else 0
    if shifted > 65535:
        raise RoleRefused(f"there are not so many ports above it: choose a lower one or fewer workers `{address}`")
    return f"{host}:{shifted}"


def run_workers(settings: BrokerSettings, workers: int, arguments: Sequence[str]) -> None:
    """Runs until SIGINT or SIGTERM. `arguments` are those of the broker that was asked for.

    Raises RoleRefused, with all stopped, when a worker does not start, keeps ending, or does not stop well.
    """
    configure_logging(os.environ.get("MAGNETAR_LOG", "warning"))
    # A worker's own values come last and win, over the environment too.
    commands = [[*MAGNETAR, "broker", *arguments, *_options(worker_assignments(settings, i))] for i in range(workers)]
    asyncio.run(_supervise([Worker(f"{settings.id}-{i}", command) for i, command in enumerate(commands)]))


def _options(assignments: Sequence[str]) -> list[str]:
    return [word for assignment in assignments for word in ("--set", assignment)]


async def _supervise(workers: Sequence[Worker]) -> None:
    loop = asyncio.get_running_loop()
    asked: list[signal.Signals] = []

    def stop(number: signal.Signals) -> None:
        asked.append(number)
        for worker in workers:
            worker.stop()

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop, number)
    tasks = [asyncio.create_task(worker.run(), name=worker.id) for worker in workers]
    await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
    for worker in workers:
        if not asked:
            worker.stop()
    ends = await asyncio.gather(*tasks, return_exceptions=True)
    for end in ends:
        if isinstance(end, BaseException):
            raise end
    if len(asked) > 1:
        # As a process ends that was told twice.
        loop.remove_signal_handler(asked[-1])
        signal.raise_signal(asked[-1])


class Worker:
    """One worker process after another. `run` it once; `stop` may be called at any time."""

    def __init__(self, id: str, command: Sequence[str]) -> None:
        self.id = id
        self._command = command
        self._process: asyncio.subprocess.Process | None = None
        self._stopping = asyncio.Event()
        self._served = False
        self._refusal = b""
        """The line that a worker which has not served may have ended with."""
        self._ends: deque[float] = deque(maxlen=RESTARTS_MAX + 1)

    def stop(self) -> None:
        self._stopping.set()
        if self._process is not None:
            with suppress(ProcessLookupError):
                self._process.send_signal(signal.SIGTERM)

    async def run(self) -> None:
        """Returns when the worker was stopped. Raises RoleRefused."""
        while not self._stopping.is_set():
            code = await self._run_once()
            if self._stopping.is_set() and code in (0, -signal.SIGTERM):
                return
            if not self._served:
                reason = self._refusal.removeprefix(LINE_START).decode(errors="replace").strip()
                raise RoleRefused(f"worker {self.id} did not start: {reason or 'its log has the reason'}")
            if self._stopping.is_set():
                raise RoleRefused(f"worker {self.id} did not stop well: its log has the reason exit_code=`{code}`")
            await self._pause(code)

    async def _pause(self, code: int) -> None:
        now = asyncio.get_running_loop().time()
        self._ends.append(now)
        recent = sum(1 for end in self._ends if end > now - RESTART_WINDOW_S)
        if recent > RESTARTS_MAX:
            raise RoleRefused(
                f"worker {self.id} ended {recent} times within {RESTART_WINDOW_S:g} s: its log has the reason, "
                f"exit_code=`{code}`"
            )
        pause_s = min(PAUSE_FIRST_S * 2 ** (recent - 1), PAUSE_MAX_S)
        log.warning("worker ended and is started again", worker=self.id, exit_code=code, pause_s=pause_s)
        with suppress(TimeoutError):
            async with asyncio.timeout(pause_s):
                await self._stopping.wait()

    async def _run_once(self) -> int:
        process = await asyncio.create_subprocess_exec(
            *self._command,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            start_new_session=True,
            env=child_environment(),
            limit=LINE_BYTES_MAX,
        )
        self._process = process
        if self._stopping.is_set():
            self.stop()
        assert process.stdout is not None
        assert process.stderr is not None
        await asyncio.gather(self._pass_on_output(process.stdout), self._pass_on_errors(process.stderr))
        return await process.wait()

    async def _pass_on_output(self, output: asyncio.StreamReader) -> None:
        async for line in output:
            self._served = True
            _write(sys.stderr, self._refusal_so_far())
            _write(sys.stdout, line)

    async def _pass_on_errors(self, errors: asyncio.StreamReader) -> None:
        async for line in errors:
            _write(sys.stderr, self._refusal_so_far())
            if line.startswith(LINE_START) and not self._served:
                self._refusal = line
            else:
                _write(sys.stderr, line)

    def _refusal_so_far(self) -> bytes:
        """What was none: the worker went on."""
        line, self._refusal = self._refusal, b""
        return line


def _write(file: TextIO, line: bytes) -> None:
    with suppress(BrokenPipeError):
        file.write(line.decode(errors="replace"))
        file.flush()
