"""`magnetar bookies`: the storage nodes."""

from __future__ import annotations

import asyncio
import sys
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated

import typer

from magnetar.cli.command import (
    DEFAULT_SERVER,
    DEFAULT_TIMEOUT_S,
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
from magnetar.cli.output import Size, emit_json, human_seconds, note, number_of, plain

if TYPE_CHECKING:
    from magnetar.client import BookieDescription, BookieOrder, Client, RepairStatus

POLL_S = 1.0

BookieArgument = Annotated[str, typer.Argument(help="Id of the bookie.")]

app = typer.Typer(help="The storage nodes.", no_args_is_help=True)


@app.callback()
def options() -> None:
    """The storage nodes."""


@app.command("list")
def list_(
    output: OutputOption = Output.table,
    server: ServerOption = DEFAULT_SERVER,
    timeout: TimeoutOption = DEFAULT_TIMEOUT_S,
) -> None:
    """Lists the bookies, also lost ones: their state, and what they hold of the cluster's ledgers."""
    show_list(
        lambda client: client.admin.bookies.list(),
        ["bookie", "address", "state", "rack", "ledgers", "copies", "bytes", "disk free"],
        lambda one: (
            one.id, one.address, _state(one), one.rack, one.ledgers, one.copies, Size(one.bytes),
            Size(one.disk_free_bytes),
        ),
        output, server, timeout,
    )  # fmt: skip


def _state(bookie: BookieDescription) -> str:
    return f"{bookie.state}, DRAINING" if bookie.draining and bookie.state != "DRAINING" else bookie.state


@app.command()
def drain(
    bookie: BookieArgument,
    wait: Annotated[bool, typer.Option("--wait", help="Show how it goes on, and end when nothing names it.")] = False,
    dry_run: DryRunOption = False,
    output: OutputOption = Output.table,
    server: ServerOption = DEFAULT_SERVER,
    timeout: TimeoutOption = DEFAULT_TIMEOUT_S,
) -> None:
    """Empties a bookie while it serves: it takes no new ledgers, and what stands on it moves away.

    Ctrl-C ends the waiting, not the drain: undrain does.
    """

    async def body(client: Client) -> BookieOrder:
        order = await client.admin.bookies.drain(bookie, dry_run=dry_run)
        if order.warning:
            note(f"warning: {order.warning}")
        if wait and not dry_run:
            await _wait_until_empty(client, bookie)
            order = replace(order, ledgers=0)
        return order

    order = run_with_client(server, timeout, body)
    if output is Output.json:
        emit_json({**plain(order), "dry_run": dry_run})
    elif dry_run:
        note(f"{number_of(order.ledgers, 'ledger')} would move off {bookie}")
    elif order.ledgers:
        note(f"{number_of(order.ledgers, 'ledger')} to move off {bookie}: see `magnetar bookies list`")
    else:
        note(f"no ledger names {bookie}: stop it, then `magnetar bookies decommission {bookie}`, or keep it as a spare")


async def _wait_until_empty(client: Client, bookie: str) -> None:
    """Progress on stderr. A bookie that cannot be emptied is said once a problem is known."""
    start, most = time.monotonic(), 0
    told = ""
    while True:
        known = await until_answered(client.admin.bookies.list)
        found = next((one for one in known if one.id == bookie), None)
        left = 0 if found is None else found.ledgers
        if not left:
            if sys.stderr.isatty():
                note("")
            return
        if found is not None and not found.draining:
            raise CommandFailed(f"{bookie} is not drained any more, and {number_of(left, 'ledger')} still on it")
        problem = _problem(bookie, await until_answered(client.admin.cluster.repair))
        most = max(most, left)
        told = _tell(told, _progress(most, left, time.monotonic() - start), problem)
        await asyncio.sleep(POLL_S)


def _problem(bookie: str, repair: RepairStatus) -> str:
    """Why what stands on it does not move, as far as that is known."""
    if not repair.enabled:
        return "repair is switched off, and no copy is begun: `magnetar cluster repair --on`"
    return repair.stalled_bookies.get(bookie, "")


def _progress(most: int, left: int, elapsed_s: float) -> str:
    moved = most - left
    ending = f", about {human_seconds(elapsed_s / moved * left)} to go" if moved else ""
    return f"{100 * moved // most} %, {left:,} of {number_of(most, 'ledger')} left{ending}"


def _tell(told: str, progress: str, problem: str) -> str:
    """A line that is overwritten on a terminal; elsewhere a line for each change. Returns what must change for one."""
    line = f"{progress}; stalled: {problem}" if problem else progress
    change = f"{progress.partition(',')[0]} {problem}"
    if sys.stderr.isatty():
        print(f"\r{line:<100}", end="", file=sys.stderr, flush=True)
    elif change != told:
        note(line)
    return change


@app.command()
def undrain(
    bookie: BookieArgument,
    dry_run: DryRunOption = False,
    output: OutputOption = Output.table,
    server: ServerOption = DEFAULT_SERVER,
    timeout: TimeoutOption = DEFAULT_TIMEOUT_S,
) -> None:
    """Ends a drain: the bookie keeps what it still has, and takes new ledgers again."""

    async def body(client: Client) -> BookieOrder:
        return await client.admin.bookies.undrain(bookie, dry_run=dry_run)

    order = run_with_client(server, timeout, body)
    if output is Output.json:
        emit_json({**plain(order), "dry_run": dry_run})
    elif not order.changed:
        note(f"{bookie} was not draining")
    else:
        note(f"{bookie} {'would keep' if dry_run else 'keeps'} {number_of(order.ledgers, 'ledger')}")


@app.command()
def decommission(
    bookie: BookieArgument,
    dry_run: DryRunOption = False,
    output: OutputOption = Output.table,
    server: ServerOption = DEFAULT_SERVER,
    timeout: TimeoutOption = DEFAULT_TIMEOUT_S,
) -> None:
    """Removes a bookie that has stopped and that no ledger names; refuses while data stands only there."""

    async def body(client: Client) -> None:
        await client.admin.bookies.decommission(bookie, dry_run=dry_run)

    run_with_client(server, timeout, body)
    if output is Output.json:
        emit_json({"id": bookie, "removed": not dry_run})
    else:
        note(f"{bookie} {'would be' if dry_run else 'is'} removed: its directory can be deleted")
