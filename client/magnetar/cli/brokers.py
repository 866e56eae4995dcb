"""`magnetar brokers`: the servers of topics."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated

import typer

from magnetar.cli.command import (
    DEFAULT_SERVER,
    DEFAULT_TIMEOUT_S,
    EXIT_TIMEOUT,
    CommandFailed,
    DryRunOption,
    Output,
    OutputOption,
    ServerOption,
    TimeoutOption,
    run_with_client,
    show_list,
    until_answered,
)
from magnetar.cli.output import emit_json, note, number_of, plain

if TYPE_CHECKING:
    from magnetar.client import BrokerDrain, Client

POLL_S = 0.5
BrokerArgument = Annotated[str, typer.Argument(help="Id of the broker, as `brokers list` shows it.")]

app = typer.Typer(help="The servers of topics.", no_args_is_help=True)


@app.callback()
def options() -> None:
    """The servers of topics."""


@app.command("list")
def list_(
    output: OutputOption = Output.table,
    server: ServerOption = DEFAULT_SERVER,
    timeout: TimeoutOption = DEFAULT_TIMEOUT_S,
) -> None:
    """Lists the brokers that have a session: what each does, and how many shards it has."""
    show_list(
        lambda client: client.admin.brokers.list(),
        ["broker", "state", "shards", "address", "http", "version"],
        lambda one: (one.id, one.state, one.shards, one.address, one.http_address, one.version),
        output, server, timeout,
    )  # fmt: skip


@app.command()
def drain(
    broker: BrokerArgument,
    wait: Annotated[
        bool, typer.Option("--wait", help="Until it has no shards; --timeout is for a standstill.")
    ] = False,
    dry_run: DryRunOption = False,
    output: OutputOption = Output.table,
    server: ServerOption = DEFAULT_SERVER,
    timeout: TimeoutOption = DEFAULT_TIMEOUT_S,
) -> None:
    """Has a broker hand its shards to the others and take no more, until it is undrained. Nobody sees an error."""

    async def body(client: Client) -> BrokerDrain:
        drained = await client.admin.brokers.drain(broker, dry_run=dry_run)
        if wait and not dry_run:
            await _until_drained(client, drained, timeout)
        return drained

    drained = run_with_client(server, timeout, body)
    if output is Output.json:
        emit_json({**plain(drained), "dry_run": dry_run})
        return
    to = ", ".join(f"{shards} to {target}" for target, shards in drained.targets.items())
    to = f": {to}" if to else ""
    done = "handed" if wait and not dry_run else "to be handed"
    shards = number_of(drained.shards, "shard")
    note(f"{broker} {'would be' if dry_run else 'is'} DRAINING: {shards} {done} over{to}")


@app.command()
def undrain(
    broker: BrokerArgument,
    dry_run: DryRunOption = False,
    output: OutputOption = Output.table,
    server: ServerOption = DEFAULT_SERVER,
    timeout: TimeoutOption = DEFAULT_TIMEOUT_S,
) -> None:
    """Lets a broker have shards again. What it handed over stays where it is until loads or brokers change."""

    async def body(client: Client) -> bool:
        return await client.admin.brokers.undrain(broker, dry_run=dry_run)

    was_draining = run_with_client(server, timeout, body)
    if output is Output.json:
        emit_json({"broker": broker, "was_draining": was_draining, "dry_run": dry_run})
    elif was_draining:
        note(f"{broker} {'would take' if dry_run else 'takes'} shards again")
    else:
        note(f"{broker} was not being drained")


async def _until_drained(client: Client, drained: BrokerDrain, timeout: float) -> None:
    """Shows what is left on a terminal. Raises CommandFailed when nothing moves for `timeout` seconds."""
    loop = asyncio.get_running_loop()
    left, moved_at = drained.shards, loop.time()
    with _bar(drained) as show:
        while left:
            await asyncio.sleep(POLL_S)
            asked_at = loop.time()
            living = await until_answered(client.admin.brokers.list)
            moved_at += loop.time() - asked_at  # Silence is no standstill.
            found = next((one for one in living if one.id == drained.broker), None)
            if found is None:
                raise CommandFailed(f"{drained.broker} is gone: others claim what it had left when its session ends")
            if found.shards and found.state == "SERVING":
                raise CommandFailed(f"{drained.broker} was undrained by somebody: shards=`{found.shards}`")
            if found.shards != left:
                left, moved_at = found.shards, loop.time()
                show(left)
            elif loop.time() - moved_at > timeout:
                raise CommandFailed(
                    f"{drained.broker} has {number_of(left, 'shard')}, and none was handed over for {timeout:g} s: "
                    "it goes on trying, and its log says why",
                    EXIT_TIMEOUT,
                )


@contextmanager
def _bar(drained: BrokerDrain) -> Iterator[Callable[[int], None]]:
    """A progress bar on stderr, if that is a terminal; is told how many shards are left."""
    if not sys.stderr.isatty() or not drained.shards:
        yield lambda left: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("shards handed over"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task("", total=drained.shards)
        yield lambda left: progress.update(task, completed=max(0, drained.shards - left))
