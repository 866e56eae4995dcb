"""`magnetar rebalance`: moves closed segments between bookies until each holds its even share."""

from __future__ import annotations

import asyncio
import enum
import sys
from collections import Counter
from collections.abc import Awaitable, Callable
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

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
)
from magnetar.cli.output import Size, emit_facts, emit_json, emit_table, human_bytes, human_seconds, note, plain
from magnetar.cli.quantities import human_rate, parse_rate, parse_size

if TYPE_CHECKING:
    from magnetar.client import Client, LedgerVerification, RebalanceOperation, RebalancePlan, RebalanceVerification

app = typer.Typer(help="Move segments between bookies until each holds its even share.", no_args_is_help=True)

WATCH_S = 1.0
PLAN_BYTES_MAX = 64 << 20
PROBLEMS_SHOWN_MAX = 20


class Goal(enum.StrEnum):
    bytes = "bytes"
    segments = "segments"


GoalOption = Annotated[Goal, typer.Option("--goal", help="What is to be even: stored bytes, or numbers of segments.")]
MaxBytesOption = Annotated[
    int | None, typer.Option("--max-bytes", parser=parse_size, metavar="SIZE", help="Move at most so much: 10GB.")
]
TopicOption = Annotated[str | None, typer.Option("--topic", help="Move only segments of this topic.")]
ThrottleOption = Annotated[
    int,
    typer.Option("--throttle", parser=parse_rate, metavar="RATE", help="Rate of all its copies together: 50MB/s."),
]
OperationArgument = Annotated[str, typer.Argument(help="Id of the operation.")]
NewestArgument = Annotated[str | None, typer.Argument(help="Id of the operation; the newest one by default.")]
LiveArgument = Annotated[str | None, typer.Argument(help="Id of the operation; by default the one that goes on.")]
THROTTLE_DEFAULT: Any = "50MB/s"


# Plans.


@app.command()
def plan(
    goal: GoalOption = Goal.bytes,
    max_bytes: MaxBytesOption = None,
    topic: TopicOption = None,
    throttle: ThrottleOption = THROTTLE_DEFAULT,
    moves: Annotated[bool, typer.Option("--moves", help="Also every segment, in the table.")] = False,
    output: OutputOption = Output.table,
    server: ServerOption = DEFAULT_SERVER,
    timeout: TimeoutOption = DEFAULT_TIMEOUT_S,
) -> None:
    """Says what is to be moved to make bookies even; exit code 3 if there is something. Its JSON goes to `apply`."""

    async def body(client: Client) -> RebalancePlan:
        return await client.admin.rebalance.plan(goal=goal.value, max_bytes=max_bytes, topic=topic)

    found = run_with_client(server, timeout, body)
    if output is Output.json:
        emit_json(found.as_json(throttle))
    else:
        _show_plan(found, throttle, moves)
    if found.moves:
        raise typer.Exit(EXIT_SOMETHING_TO_DO)


def _show_plan(found: RebalancePlan, throttle: int, moves: bool) -> None:
    emit_facts(
        [
            ("revision", str(found.revision)),
            ("goal", found.goal),
            ("to move", f"{len(found.moves):,} segments, {human_bytes(found.bytes)}"),
            ("skew before", _percent(found.skew_before)),
            ("skew after", _percent(found.skew_after)),
            ("time", f"{human_seconds(found.seconds_at(throttle))} at {human_rate(throttle)}"),
            *(("note", text) for text in found.notes),
        ]
    )
    amount: Callable[[float], object] = (lambda n: Size(round(n))) if found.goal == "bytes" else round
    print()
    emit_table(
        ["bookie", "before", "after", "even share"],
        [(b.bookie, amount(b.before), amount(b.after), amount(b.even)) for b in found.bookies],
    )
    if not found.moves:
        return
    segments, sizes = Counter[tuple[str, str]](), Counter[tuple[str, str]]()
    for move in found.moves:
        segments[move.source, move.target] += 1
        sizes[move.source, move.target] += move.bytes
    print()
    emit_table(
        ["from", "to", "segments", "bytes"],
        [(*pair, segments[pair], Size(sizes[pair])) for pair in sorted(segments)],
    )
    if moves:
        print()
        emit_table(
            ["ledger", "from", "to", "bytes"], [(str(m.ledger), m.source, m.target, Size(m.bytes)) for m in found.moves]
        )


@app.command()
def apply(
    file: Annotated[
        Path | None, typer.Argument(metavar="[PLAN]", help="A saved plan, - for stdin; without one it is made now.")
    ] = None,
    throttle: ThrottleOption = THROTTLE_DEFAULT,
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
    saved = None if file is None else _read_plan(file)

    async def body(client: Client) -> RebalanceOperation | None:
        rebalance = client.admin.rebalance
        wanted = saved or await rebalance.plan(goal=goal.value, max_bytes=max_bytes, topic=topic)
        if not wanted.moves and saved is None:
            return None
        return await rebalance.apply(wanted, throttle=throttle, dry_run=dry_run)

    begun = run_with_client(server, timeout, body)
    if begun is not None:
        _show_begun(begun, dry_run, output)
    elif output is Output.json:
        emit_json(None)
    else:
        note("there is nothing to move")


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
        emit_json({**plain(begun), "dry_run": dry_run})
        return
    what = f"{begun.moves:,} segments, {human_bytes(begun.bytes)}, at {human_rate(begun.throttle)}"
    for text in begun.notes:
        note(f"left out: {text}")
    if dry_run:
        note(f"would begin: {what}")
        return
    print(begun.operation)
    note(f"begun: {what}; follow it with: magnetar rebalance status {begun.operation} --watch")


# Progress.


@app.command()
def status(
    operation: NewestArgument = None,
    watch: Annotated[bool, typer.Option("--watch", help="Follow it to its end; Ctrl-C stops watching only.")] = False,
    every: Annotated[bool, typer.Option("--all", help="Every operation that the cluster remembers.")] = False,
    output: OutputOption = Output.table,
    server: ServerOption = DEFAULT_SERVER,
    timeout: TimeoutOption = DEFAULT_TIMEOUT_S,
) -> None:
    """Shows how far an operation is: percent, bytes, rate, time left, each bookie, and why it does not go on if so."""
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
        emit_json(plain(found))
    else:
        _show_status(found)


def _list(output: Output, server: str, timeout: float) -> None:
    async def body(client: Client) -> list[RebalanceOperation]:
        return await client.admin.rebalance.list()

    found = run_with_client(server, timeout, body)
    if output is Output.json:
        emit_json(plain(found))
        return
    emit_table(
        ["operation", "goal", "state", "percent", "segments", "bytes", "created", "takes back"],
        [
            (
                one.operation, one.goal, one.state, one.percent, one.moves, Size(one.bytes),
                one.created.isoformat(timespec="seconds"), one.rollback_of,
            )
            for one in found
        ],
    )  # fmt: skip


async def _follow(client: Client, found: RebalanceOperation, output: Output) -> RebalanceOperation:
    """Until it has ended. What is seen on the way: a bar on a terminal, else a line for each change."""
    with ExitStack() as stack:
        bar = stack.enter_context(_Bar(found)) if sys.stderr.isatty() else None
        shown = None
        while found.ended is None:
            line = (found.state, found.moves_done, found.moves_skipped, found.throttle, found.problems)
            if bar is not None:
                bar.show(found)
            elif line != shown and output is Output.json:
                emit_json(plain(found))
                sys.stdout.flush()
            elif line != shown:
                note(_line(found))
            shown = line
            await asyncio.sleep(WATCH_S)
            found = await client.admin.rebalance.status(found.operation)
        if bar is not None:
            bar.show(found)
    return found


def _line(found: RebalanceOperation) -> str:
    stalled = f", stalled: {'; '.join(found.problems)}" if found.problems else ""
    left = "" if found.eta_s is None else f", {human_seconds(found.eta_s)} left"
    return (
        f"{found.operation} {found.state}: {found.percent:.1f} %, {human_bytes(found.bytes_done)} of "
        f"{human_bytes(found.bytes)}, {human_rate(found.rate)}{left}{stalled}"
    )


class _Bar:
    """A progress bar on stderr."""

    def __init__(self, operation: RebalanceOperation) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, DownloadColumn, Progress, TaskProgressColumn, TextColumn

        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TaskProgressColumn(),
            DownloadColumn(binary_units=True),
            TextColumn("{task.fields[facts]}"),
            console=Console(stderr=True),
        )
        self._task = self._progress.add_task(operation.operation, total=max(1, operation.bytes), facts="")

    def __enter__(self) -> _Bar:
        self._progress.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._progress.stop()

    def show(self, found: RebalanceOperation) -> None:
        left = "" if found.eta_s is None else f"{human_seconds(found.eta_s)} left"
        facts = [found.state.lower(), human_rate(found.rate), left, *found.problems[:1]]
        done = found.bytes_done if found.ended is None or found.bytes else 1
        self._progress.update(
            self._task,
            completed=done,
            total=max(1, found.bytes - found.bytes_skipped),
            facts=", ".join(filter(None, facts)),
        )


def _show_status(found: RebalanceOperation) -> None:
    emit_facts(
        [
            ("operation", found.operation),
            ("state", found.state),
            ("goal", found.goal),
            ("takes back", found.rollback_of),
            ("done", f"{found.percent:.1f} %, {found.moves_done:,} of {found.moves:,} segments"),
            ("moved", human_bytes(found.bytes_done)),
            ("remaining", human_bytes(found.bytes_remaining)),
            ("skipped", f"{found.moves_skipped:,} segments, {human_bytes(found.bytes_skipped)}"),
            ("rate", human_rate(found.rate)),
            ("throttle", human_rate(found.throttle)),
            ("time left", None if found.eta_s is None else human_seconds(found.eta_s)),
            ("created", found.created.isoformat(timespec="seconds")),
            ("ended", None if found.ended is None else found.ended.isoformat(timespec="seconds")),
            *(("stalled", problem) for problem in found.problems),
        ]
    )
    print()
    emit_table(
        ["bookie", "gets", "of that done", "gives", "of that done"],
        [
            (b.bookie, Size(b.bytes_in), Size(b.bytes_in_done), Size(b.bytes_out), Size(b.bytes_out_done))
            for b in found.bookies
        ],
    )
    if found.skipped:
        print()
        emit_table(
            ["skipped ledger", "from", "to", "reason"],
            [(str(move.ledger), move.source, move.target, move.reason) for move in found.skipped],
        )


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


@app.command()
def pause(
    operation: LiveArgument = None,
    dry_run: DryRunOption = False,
    output: OutputOption = Output.table,
    server: ServerOption = DEFAULT_SERVER,
    timeout: TimeoutOption = DEFAULT_TIMEOUT_S,
) -> None:
    """Begins no more copies of an operation; those under way end."""

    async def order(client: Client, name: str) -> RebalanceOperation:
        return await client.admin.rebalance.pause(name, dry_run=dry_run)

    _order(order, operation, "is paused", dry_run, output, server, timeout)


@app.command()
def resume(
    operation: LiveArgument = None,
    dry_run: DryRunOption = False,
    output: OutputOption = Output.table,
    server: ServerOption = DEFAULT_SERVER,
    timeout: TimeoutOption = DEFAULT_TIMEOUT_S,
) -> None:
    """Lets a paused operation go on."""

    async def order(client: Client, name: str) -> RebalanceOperation:
        return await client.admin.rebalance.resume(name, dry_run=dry_run)

    _order(order, operation, "goes on", dry_run, output, server, timeout)


@app.command()
def cancel(
    operation: LiveArgument = None,
    dry_run: DryRunOption = False,
    output: OutputOption = Output.table,
    server: ServerOption = DEFAULT_SERVER,
    timeout: TimeoutOption = DEFAULT_TIMEOUT_S,
) -> None:
    """Ends an operation and drops copies that are not finished. What was moved stays; `rollback` takes it back."""

    async def order(client: Client, name: str) -> RebalanceOperation:
        return await client.admin.rebalance.cancel(name, dry_run=dry_run)

    _order(order, operation, "is cancelled", dry_run, output, server, timeout)


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
        emit_json({**plain(changed), "dry_run": dry_run})
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
    operation: NewestArgument = None,
    output: OutputOption = Output.table,
    server: ServerOption = DEFAULT_SERVER,
    timeout: TimeoutOption = DEFAULT_TIMEOUT_S,
) -> None:
    """Reads back what an operation moved and compares the checksums of every copy; exit code 10 if any is wrong."""

    async def body(client: Client) -> RebalanceVerification:
        wanted = await client.admin.rebalance.status(operation)
        with _Ledgers(wanted.moves_done) if sys.stderr.isatty() else nullcontext() as bar:
            told = None if bar is None else bar.compared
            return await client.admin.rebalance.verify(wanted.operation, on_ledger=told)

    found = run_with_client(server, timeout, body)
    if output is Output.json:
        emit_json(plain(found))
    else:
        emit_facts(
            [
                ("operation", found.operation),
                ("compared", f"{found.copies:,} copies of {found.entries:,} entries in {found.ledgers:,} ledgers"),
                ("bytes", f"{human_bytes(found.bytes)}, of all copies"),
                ("trimmed since", f"{found.trimmed:,} ledgers"),
                ("problems", len(found.problems)),
                *(("problem", problem) for problem in found.problems[:PROBLEMS_SHOWN_MAX]),
            ]
        )
    if found.problems:
        raise typer.Exit(EXIT_UNHEALTHY)


class _Ledgers:
    """A progress bar on stderr, a step for each ledger."""

    def __init__(self, ledgers: int) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (TextColumn("ledgers compared"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        self._progress = Progress(*columns, console=Console(stderr=True))
        self._task = self._progress.add_task("", total=max(1, ledgers))

    def __enter__(self) -> _Ledgers:
        self._progress.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._progress.stop()

    def compared(self, _found: LedgerVerification) -> None:
        self._progress.advance(self._task)


def _percent(share: float) -> str:
    return f"{share * 100:.1f} %"
