"""`magnetar rebalance`: moves segments between bookies, or shards between brokers, until each has its even share."""

from __future__ import annotations

import asyncio
import enum
import sys
from collections.abc import Awaitable, Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from magnetar.cli import rebalance_shown as shown
from magnetar.cli.command import (
    DEFAULT_SERVER,
    DEFAULT_TIMEOUT_S,
    EXIT_SOMETHING_TO_DO,
    EXIT_UNHEALTHY,
    EXIT_USAGE,
    CommandFailed,
    DryRunOption,
    Output,
    OutputOption,
    ServerOption,
    TimeoutOption,
    run_with_client,
    until_answered,
)
from magnetar.cli.output import emit_json, note, plain
from magnetar.cli.quantities import human_rate, parse_rate, parse_size

if TYPE_CHECKING:
    from magnetar.client import Client, RebalanceOperation, RebalancePlan, RebalanceVerification

app = typer.Typer(
    help="Move segments between bookies, or shards between brokers, until each has its even share.",
    no_args_is_help=True,
)

WATCH_S = 1.0
PLAN_BYTES_MAX = 64 << 20


class Goal(enum.StrEnum):
    bytes = "bytes"
    segments = "segments"
    brokers = "brokers"


GoalOption = Annotated[
    Goal,
    typer.Option(
        "--goal", help="What is to be even: bytes or segments of bookies, or loads and numbers of shards of brokers."
    ),
]
MaxBytesOption = Annotated[
    int | None, typer.Option("--max-bytes", parser=parse_size, metavar="SIZE", help="Move at most so much: 10GB.")
]
TopicOption = Annotated[str | None, typer.Option("--topic", help="Move only segments or shards of this topic.")]
ThrottleOption = Annotated[
    int | None,
    typer.Option(
        "--throttle",
        parser=parse_rate,
        metavar="RATE",
        help="Rate of all its copies together; by default that of the saved plan, or 50MB/s.",
    ),
]
OperationArgument = Annotated[str, typer.Argument(help="Id of the operation.")]
CurrentArgument = Annotated[
    str | None, typer.Argument(help="Id of the operation; by default the newest that goes on, else the newest.")
]
LiveArgument = Annotated[str | None, typer.Argument(help="Id of the operation; by default the one that goes on.")]


# Plans.


@app.command()
def plan(
    goal: GoalOption = Goal.bytes,
    max_bytes: MaxBytesOption = None,
    topic: TopicOption = None,
    throttle: ThrottleOption = None,
    moves: Annotated[bool, typer.Option("--moves", help="Also every move, in a table.")] = False,
    output: OutputOption = Output.table,
    server: ServerOption = DEFAULT_SERVER,
    timeout: TimeoutOption = DEFAULT_TIMEOUT_S,
) -> None:
    """Says what is to be moved to make them even; exit code 3 if there is something. Its JSON goes to `apply`."""
    from magnetar.client.rebalancing import THROTTLE_DEFAULT

    _check_bytes(goal, throttle, max_bytes)
    rate = throttle or THROTTLE_DEFAULT

    async def body(client: Client) -> RebalancePlan:
        return await client.admin.rebalance.plan(goal=goal.value, max_bytes=max_bytes, topic=topic)

    found = run_with_client(server, timeout, body)
    if output is Output.json:
        emit_json(found.as_json(rate))
    else:
        shown.show_plan(found, rate, moves)
    if found.moves:
        raise typer.Exit(EXIT_SOMETHING_TO_DO)


@app.command()
def apply(
    file: Annotated[
        Path | None, typer.Argument(metavar="[PLAN]", help="A saved plan, - for stdin; without one it is made now.")
    ] = None,
    throttle: ThrottleOption = None,
    goal: GoalOption = Goal.bytes,
    max_bytes: MaxBytesOption = None,
    topic: TopicOption = None,
    dry_run: DryRunOption = False,
    output: OutputOption = Output.table,
    server: ServerOption = DEFAULT_SERVER,
    timeout: TimeoutOption = DEFAULT_TIMEOUT_S,
) -> None:
    """Begins to carry a plan out, in the cluster, and prints the operation's id. A stale plan is refused."""
    if file is not None and (max_bytes is not None or topic is not None or goal is not Goal.bytes):
        raise CommandFailed(
            "a saved plan has its goal, size and topic: leave --goal, --max-bytes and --topic out", EXIT_USAGE
        )
    _check_bytes(goal, throttle, max_bytes)
    saved = None if file is None else _read_plan(file)

    async def body(client: Client) -> RebalanceOperation | tuple[str, ...]:
        """The operation; without a move, the notes of the plan."""
        rebalance = client.admin.rebalance
        wanted = saved or await rebalance.plan(goal=goal.value, max_bytes=max_bytes, topic=topic)
        if not wanted.moves:
            return wanted.notes
        return await rebalance.apply(wanted, throttle=throttle, dry_run=dry_run)

    begun = run_with_client(server, timeout, body)
    if not isinstance(begun, tuple):
        _show_begun(begun, dry_run, output)
    elif output is Output.json:
        emit_json({"operation": None, "moves": 0, "notes": list(begun), "dry_run": dry_run})
    else:
        note("; ".join(("there is nothing to move", *begun)))


def _check_bytes(goal: Goal, throttle: int | None, max_bytes: int | None) -> None:
    if max_bytes == 0:
        raise CommandFailed("--max-bytes 0 moves nothing: give a size such as 10GB, or leave it out", EXIT_USAGE)
    if goal is Goal.brokers and not (throttle is None and max_bytes is None):
        remedy = "--throttle out" if max_bytes is None else "--max-bytes out, name a --topic"
        raise CommandFailed(f"shards move by hand-off, which copies no bytes: leave {remedy}", EXIT_USAGE)


def _read_plan(file: Path) -> RebalancePlan:
    from magnetar.client import InvalidArgument, RebalancePlan

    try:
        if str(file) == "-":
            text = sys.stdin.read(PLAN_BYTES_MAX)
        else:
            with file.open(encoding="utf-8") as opened:
                text = opened.read(PLAN_BYTES_MAX)
        return RebalancePlan.from_json(text)
    except UnicodeDecodeError:
        raise CommandFailed(f"{file} is no saved plan: it is not text", EXIT_USAGE) from None
    except InvalidArgument as error:
        raise CommandFailed(f"{file}: {error}", EXIT_USAGE) from None


def _show_begun(begun: RebalanceOperation, dry_run: bool, output: Output) -> None:
    if output is Output.json:
        emit_json({**_as_json(begun), "dry_run": dry_run})
    else:
        shown.show_begun(begun, dry_run)


def _as_json(found: RebalanceOperation) -> dict[str, Any]:
    """The documented JSON: its rate has a unit, and moves are named as in plans, with why they were skipped."""
    rate = "rate_shards_per_s" if found.of_brokers else "rate_bytes_per_s"
    skipped = [{**move.as_json(), "reason": move.reason} for move in found.skipped]
    fields = {**plain(found), "skipped": skipped}
    return {rate if name == "rate" else name: value for name, value in fields.items()}


# Progress.


@app.command()
def status(
    operation: CurrentArgument = None,
    watch: Annotated[bool, typer.Option("--watch", help="Follow it to its end; Ctrl-C stops watching only.")] = False,
    every: Annotated[bool, typer.Option("--all", help="Every operation that the cluster remembers.")] = False,
    output: OutputOption = Output.table,
    server: ServerOption = DEFAULT_SERVER,
    timeout: TimeoutOption = DEFAULT_TIMEOUT_S,
) -> None:
    """Shows how far an operation is: percent, rate, time left, each node, and why it does not go on if so.

    With --watch the exit code is 1 if it was cancelled, or left something out.
    """
    if every:
        if watch or operation is not None:
            raise CommandFailed("--all shows every operation: leave its id and --watch out", EXIT_USAGE)
        _list(output, server, timeout)
        return

    async def body(client: Client) -> RebalanceOperation:
        found = await client.admin.rebalance.status(operation)
        return await _follow(client, found, output) if watch else found

    found = run_with_client(server, timeout, body)
    if output is Output.json:
        emit_json(_as_json(found))
    else:
        shown.show_status(found)
    if watch and (left_out := shown.left_out(found)):
        raise CommandFailed(left_out)


def _list(output: Output, server: str, timeout: float) -> None:
    async def body(client: Client) -> list[RebalanceOperation]:
        return await client.admin.rebalance.list()

    found = run_with_client(server, timeout, body)
    if output is Output.json:
        emit_json([_as_json(one) for one in found])
        return
    shown.show_operations(found)


async def _follow(client: Client, found: RebalanceOperation, output: Output) -> RebalanceOperation:
    """Until it has ended."""
    with shown.Progress(found) as progress:
        write = _write_json if output is Output.json else None
        while found.ended is None:
            progress.show(found, write)
            await asyncio.sleep(WATCH_S)
            found = await until_answered(partial(client.admin.rebalance.status, found.operation))
        progress.show(found, write)
    return found


def _write_json(found: RebalanceOperation) -> None:
    emit_json(_as_json(found))
    sys.stdout.flush()


# Orders.


@app.command()
def throttle(
    rate: Annotated[int, typer.Argument(parser=parse_rate, metavar="RATE", help="Such as 50MB/s.")],
    operation: LiveArgument = None,
    dry_run: DryRunOption = False,
    output: OutputOption = Output.table,
    server: ServerOption = DEFAULT_SERVER,
    timeout: TimeoutOption = DEFAULT_TIMEOUT_S,
) -> None:
    """Changes the rate of all copies of an operation together; it holds at once, and ends with the operation."""
    said = f"takes {human_rate(rate)}"

    async def order(client: Client, name: str) -> RebalanceOperation:
        return await client.admin.rebalance.throttle(name, rate, dry_run=dry_run)

    _order(order, operation, said, dry_run, output, server, timeout)


def _add_order(
    verb: str, said: str, text: str, give: Callable[[Client, str, bool], Awaitable[RebalanceOperation]]
) -> None:
    """A verb that changes the state of an operation."""

    @app.command(verb, help=text)
    def order(
        operation: LiveArgument = None,
        dry_run: DryRunOption = False,
        output: OutputOption = Output.table,
        server: ServerOption = DEFAULT_SERVER,
        timeout: TimeoutOption = DEFAULT_TIMEOUT_S,
    ) -> None:
        _order(lambda client, name: give(client, name, dry_run), operation, said, dry_run, output, server, timeout)


_add_order(
    "pause",
    "is paused",
    "Begins no more copies or hand-offs of an operation; those under way end.",
    lambda client, name, dry_run: client.admin.rebalance.pause(name, dry_run=dry_run),
)
_add_order(
    "resume",
    "goes on",
    "Lets a paused operation go on.",
    lambda client, name, dry_run: client.admin.rebalance.resume(name, dry_run=dry_run),
)
_add_order(
    "cancel",
    "is cancelled",
    "Ends an operation and drops copies that are not finished. What was moved stays; `rollback` takes it back.",
    lambda client, name, dry_run: client.admin.rebalance.cancel(name, dry_run=dry_run),
)


def _order(
    order: Callable[[Client, str], Awaitable[RebalanceOperation]],
    operation: str | None,
    said: str,
    dry_run: bool,
    output: Output,
    server: str,
    timeout: float,
) -> None:
    async def body(client: Client) -> RebalanceOperation:
        return await order(client, operation or await _live(client))

    changed = run_with_client(server, timeout, body)
    if output is Output.json:
        emit_json({**_as_json(changed), "dry_run": dry_run})
    else:
        note(f"{changed.operation} {'would change: it ' if dry_run else ''}{said}")


async def _live(client: Client) -> str:
    """The operation that goes on. Raises CommandFailed unless there is exactly one."""
    live = [one.operation for one in await client.admin.rebalance.list() if one.ended is None]
    if len(live) != 1:
        what = f"these go on: {', '.join(live)}; name one" if live else "no operation goes on"
        raise CommandFailed(f"{what}; see magnetar rebalance status --all")
    return live[0]


@app.command()
def rollback(
    operation: OperationArgument,
    throttle: Annotated[
        int | None,
        typer.Option("--throttle", parser=parse_rate, metavar="RATE", help="By default that of the operation."),
    ] = None,
    dry_run: DryRunOption = False,
    output: OutputOption = Output.table,
    server: ServerOption = DEFAULT_SERVER,
    timeout: TimeoutOption = DEFAULT_TIMEOUT_S,
) -> None:
    """Begins an operation that takes back what another one moved, once that one has ended."""

    async def body(client: Client) -> RebalanceOperation:
        return await client.admin.rebalance.rollback(operation, throttle=throttle, dry_run=dry_run)

    _show_begun(run_with_client(server, timeout, body), dry_run, output)


# Verification.


@app.command()
def verify(
    operation: CurrentArgument = None,
    output: OutputOption = Output.table,
    server: ServerOption = DEFAULT_SERVER,
    timeout: TimeoutOption = DEFAULT_TIMEOUT_S,
) -> None:
    """Reads back what an operation moved and compares the checksums of every copy; exit code 10 if any is wrong."""

    async def body(client: Client) -> RebalanceVerification:
        wanted = await client.admin.rebalance.status(operation)
        with shown.LedgersBar(wanted.moves_done) if sys.stderr.isatty() else nullcontext() as bar:
            told = None if bar is None else bar.compared
            return await client.admin.rebalance.verify(wanted.operation, on_ledger=told)

    found = run_with_client(server, timeout, body)
    if output is Output.json:
        emit_json(plain(found))
    else:
        shown.show_verification(found)
    if found.problems:
        raise typer.Exit(EXIT_UNHEALTHY)
