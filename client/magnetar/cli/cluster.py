"""`magnetar cluster`: is everything well?"""

from __future__ import annotations

from typing import TYPE_CHECKING

import typer

from magnetar.cli.command import (
    DEFAULT_SERVER,
    DEFAULT_TIMEOUT_S,
    EXIT_UNHEALTHY,
    Output,
    OutputOption,
    ServerOption,
    TimeoutOption,
    run_with_client,
)
from magnetar.cli.output import emit_facts, emit_json, plain

if TYPE_CHECKING:
    from magnetar.client import Client, ClusterHealth

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
            ]
        )
    if not found.healthy:
        raise typer.Exit(EXIT_UNHEALTHY)
