"""`magnetar brokers`: the servers of topics."""

from __future__ import annotations

import typer

from magnetar.cli.command import (
    DEFAULT_SERVER,
    DEFAULT_TIMEOUT_S,
    Output,
    OutputOption,
    ServerOption,
    TimeoutOption,
    show_list,
)

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
    """Lists the brokers that have a session, and how many shards each has."""
    show_list(
        lambda client: client.admin.brokers.list(),
        ["broker", "address", "shards", "http", "version"],
        lambda one: (one.id, one.address, one.shards, one.http_address, one.version),
        output, server, timeout,
    )  # fmt: skip
