"""`magnetar cluster`: is everything well?"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from magnetar.cli.command import (
    DEFAULT_SERVER,
    DEFAULT_TIMEOUT_S,
    EXIT_UNHEALTHY,
    DryRunOption,
    Output,
    OutputOption,
    ServerOption,
    TimeoutOption,
    run_with_client,
)
from magnetar.cli.output import emit_facts, emit_json, human_seconds, note, plain
from magnetar.cli.quantities import human_rate, parse_rate

if TYPE_CHECKING:
    from magnetar.client import Client, ClusterHealth, RepairStatus

app = typer.Typer(help="The cluster as a whole.", no_args_is_help=True)


@app.callback()
def options() -> None:
    """The cluster as a whole."""


@app.command()
def health(
    output: OutputOption = Output.table,
    server: ServerOption = DEFAULT_SERVER,
    timeout: TimeoutOption = DEFAULT_TIMEOUT_S,
) -> None:
    """Says whether everything is well; exit code 10 if not, with the problems in words."""

    async def body(client: Client) -> ClusterHealth:
        return await client.admin.cluster.health()

    found = run_with_client(server, timeout, body)
    if output is Output.json:
        emit_json(plain(found))
    else:
        emit_facts(
            [
                ("healthy", found.healthy),
                ("brokers", found.brokers),
                ("bookies", found.bookies),
                ("under-replicated ledgers", found.under_replicated_ledgers),
                ("unavailable shards", found.unavailable_shards),
                *(("problem", problem) for problem in found.problems),
                *(("notice", notice) for notice in found.notices),
            ]
        )
    if not found.healthy:
        raise typer.Exit(EXIT_UNHEALTHY)


@app.command()
def repair(
    on: Annotated[
        bool | None, typer.Option("--on/--off", help="Off: no copy is begun, for the time of a maintenance.")
    ] = None,
    throttle: Annotated[
        int | None,
        typer.Option("--throttle", parser=parse_rate, metavar="RATE", help="What each bookie copies: 50MB/s."),
    ] = None,
    delay: Annotated[
        float | None, typer.Option("--delay", min=0, help="Seconds that a single lost bookie is waited for.")
    ] = None,
    dry_run: DryRunOption = False,
    output: OutputOption = Output.table,
    server: ServerOption = DEFAULT_SERVER,
    timeout: TimeoutOption = DEFAULT_TIMEOUT_S,
) -> None:
    """Shows what copies are to be made, and changes how: for the whole cluster, at once."""

    async def body(client: Client) -> RepairStatus:
        return await client.admin.cluster.repair(enabled=on, delay=delay, throttle=throttle, dry_run=dry_run)

    found = run_with_client(server, timeout, body)
    if output is Output.json:
        emit_json({**plain(found), "dry_run": dry_run})
        return
    if dry_run:
        note("as it would be:")
    emit_facts(
        [
            ("repair", "on" if found.enabled else "off"),
            ("throttle", f"{human_rate(found.throttle)} each bookie"),
            ("delay", human_seconds(found.delay)),
            *((f"lost {one.id}", "given up" if one.given_up else "waited for") for one in found.lost),
            *((f"copies, {reason}", copies) for reason, copies in found.copies.items()),
            ("copies, stalled", found.stalled),
            *(("problem", problem) for problem in found.problems),
        ]
    )
