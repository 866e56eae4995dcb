"""How a command runs: shared options, one event loop, and what goes wrong as one line and an exit code."""

from __future__ import annotations

import asyncio
import enum
import os
import signal
import socket
import sys
import time
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn, TypeVar

import typer

from magnetar.cli.output import emit_json, emit_table, note, plain

if TYPE_CHECKING:
    from magnetar.client import Client

EXIT_ERROR = 1
EXIT_USAGE = 2
EXIT_SOMETHING_TO_DO = 3
EXIT_UNHEALTHY = 10
EXIT_TIMEOUT = 124
EXIT_INTERRUPTED = 130
EXIT_TERMINATED = 143

DEFAULT_SERVER = "localhost:7650"
DEFAULT_TIMEOUT_S = 30.0
REFUSED_GRACE_S = 2.0
"""How long a server may refuse connections, as one that restarts does, before the command says that none is there."""
CONNECT_PAUSE_S = 0.1
UNANSWERED_S = 300.0
"""How long somebody who watches long work waits for a cluster that does not answer."""
UNANSWERED_PAUSE_S = 1.0

T = TypeVar("T")


class Output(enum.StrEnum):
    table = "table"
    json = "json"


ServerOption = Annotated[
    str,
    typer.Option("--server", envvar="MAGNETAR_SERVER", help="host:port of one or more brokers, comma-separated."),
]
OutputOption = Annotated[Output, typer.Option("--output", help="A table for eyes, JSON for pipes.")]
TimeoutOption = Annotated[float, typer.Option("--timeout", min=0.1, help="Seconds to wait for the cluster.")]
DryRunOption = Annotated[bool, typer.Option("--dry-run", help="Say what would be done, and do nothing.")]
TopicArgument = Annotated[str, typer.Argument(help="tenant/namespace/topic, or a bare name in public/default.")]
SubscriptionArgument = Annotated[str, typer.Argument(help="Name of the subscription.")]


def directory(text: str) -> Path:
    """A directory that an option names; an empty name would be the current one."""
    if not text:
        raise typer.BadParameter("names no directory")
    return Path(text)


class CommandFailed(Exception):
    """Ends the command with one line on stderr."""

    def __init__(self, message: str, exit_code: int = EXIT_ERROR) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def fail(message: str, exit_code: int) -> NoReturn:
    """Prints one line on stderr and ends the command."""
    print("magnetar: " + " ".join(message.split()), file=sys.stderr)
    raise typer.Exit(exit_code)


def run(main: Coroutine[Any, Any, T]) -> T:
    """Runs a command's coroutine; what goes wrong becomes one line and an exit code.

    Ctrl-C and SIGTERM cancel it, so that what it has under way is finished or given back in order.
    """
    try:
        return asyncio.run(_until_terminated(main))
    except (CommandFailed, BrokenPipeError):
        raise
    except KeyboardInterrupt:
        raise typer.Exit(EXIT_INTERRUPTED) from None
    except asyncio.CancelledError:
        raise typer.Exit(EXIT_TERMINATED) from None
    except Exception as error:
        fail_for(error)


async def _until_terminated(main: Coroutine[Any, Any, T]) -> T:
    task = asyncio.current_task()
    assert task is not None
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
    return await main


def fail_for(error: BaseException) -> NoReturn:
    """Ends the command for any error: an expected one in its own words, any other without its traceback."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    if isinstance(error, CommandFailed):
        fail(str(error), error.exit_code)
    from magnetar.client.errors import InvalidArgument, MagnetarError, RetriableError

    match error:
        case InvalidArgument():
            fail(str(error), EXIT_USAGE)
        case RetriableError() | TimeoutError():
            fail(str(error) or "timed out; give it longer with --timeout", EXIT_TIMEOUT)
        case MagnetarError():
            fail(str(error), EXIT_ERROR)
        case OSError(strerror=str(reason)):
            fail(reason.lower() + (f": {error.filename}" if error.filename else ""), EXIT_ERROR)
    if os.environ.get("MAGNETAR_LOG") == "debug":
        raise error
    fail(
        f"this is a defect of the command, please report it: {type(error).__name__}: {error}; "
        "MAGNETAR_LOG=debug shows where",
        EXIT_ERROR,
    )


def run_with_client(server: str, timeout: float, body: Callable[[Client], Awaitable[T]]) -> T:
    """Connects, runs `body`, closes."""

    async def main() -> T:
        await find_server(server, timeout)
        from magnetar.client import connect

        async with connect(server, timeout=timeout) as client:
            return await body(client)

    return run(main())


async def until_answered(ask: Callable[[], Awaitable[T]]) -> T:
    """What it returns: while the cluster cannot answer, as when it elects, it is asked again, for UNANSWERED_S.

    Raises CommandFailed after that; what was ordered goes on in the cluster.
    """
    from magnetar.client import RetriableError

    start, told = time.monotonic(), ""
    while True:
        try:
            return await ask()
        except RetriableError as error:
            if time.monotonic() - start >= UNANSWERED_S:
                raise CommandFailed(
                    f"the cluster has not answered for {UNANSWERED_S:g} s; what was ordered stands, look again later: "
                    f"{error}",
                    EXIT_TIMEOUT,
                ) from None
            if str(error) != told:
                told = str(error)
                note(f"waiting for the cluster: {told}")
        await asyncio.sleep(UNANSWERED_PAUSE_S)


def show_list(
    found: Callable[[Client], Awaitable[Sequence[T]]],
    columns: Sequence[str],
    row: Callable[[T], Sequence[object]],
    output: Output,
    server: str,
    timeout: float,
) -> None:
    """Connects, finds what is to be listed, and prints it: a JSON array, or a table with a row for each."""
    ones = run_with_client(server, timeout, found)
    if output is Output.json:
        emit_json(plain(ones))
    else:
        emit_table(columns, [row(one) for one in ones])


async def find_server(server: str, timeout: float) -> None:
    """Returns when one of the addresses takes a connection.

    Raises CommandFailed: at once for what is no address, soon when all refuse, after `timeout` when all are silent.
    """
    addresses = [parse_address(part) for part in server.split(",")]
    start = time.monotonic()
    while True:
        left = timeout - (time.monotonic() - start)
        problems = await _first_success([_try(host, port, left) for host, port in addresses])
        if None in problems:
            return
        waited = time.monotonic() - start
        if waited >= timeout or TimeoutError in problems:
            raise CommandFailed(f"no answer from {server} within {timeout:g} s: is the address right?", EXIT_TIMEOUT)
        if ConnectionRefusedError not in problems:
            raise CommandFailed(f"cannot reach {server}: no such host, or no way to it; name another with --server")
        if waited >= REFUSED_GRACE_S:
            raise CommandFailed(
                f"nothing listens at {server}: start `magnetar standalone`, or `magnetar broker` in a cluster, or name "
                "another with --server"
            )
        await asyncio.sleep(min(CONNECT_PAUSE_S, timeout))


def parse_address(text: str) -> tuple[str, int]:
    """host:port or [v6]:port. Raises CommandFailed."""
    host, colon, port = text.strip().rpartition(":")
    if not colon or not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise CommandFailed(f"--server takes host:port, such as {DEFAULT_SERVER}; got {text!r}", EXIT_USAGE)
    return host.removeprefix("[").removesuffix("]"), int(port)


Problem = type[BaseException] | None
"""Why a server takes no connection; None: it does."""


async def _first_success(attempts: list[Coroutine[Any, Any, Problem]]) -> list[Problem]:
    """What came of the attempts, up to the first that succeeded: the others are given up."""
    tasks = [asyncio.create_task(attempt) for attempt in attempts]
    problems: list[Problem] = []
    for done in asyncio.as_completed(tasks):
        problems.append(await done)
        if problems[-1] is None:
            break
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    return problems


async def _try(host: str, port: int, timeout: float) -> type[BaseException] | None:
    """None: it takes connections. Otherwise the kind of problem."""
    try:
        async with asyncio.timeout(max(timeout, 0)):
            _, writer = await asyncio.open_connection(host, port)
    except TimeoutError:
        return TimeoutError
    except socket.gaierror:
        return socket.gaierror
    except OSError as error:
        # An address family without a listener hides in the message of an OSError that sums up several attempts.
        refused = isinstance(error, ConnectionRefusedError) or "Multiple exceptions" in str(error)
        return ConnectionRefusedError if refused else OSError
    writer.close()
    return None


def quiet_stdout() -> None:
    """The reader of stdout has gone: what is still buffered goes nowhere, without a complaint at exit."""
    descriptor = os.open(os.devnull, os.O_WRONLY)
    os.dup2(descriptor, sys.stdout.fileno())
    os.close(descriptor)
