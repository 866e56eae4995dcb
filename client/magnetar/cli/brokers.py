"""`magnetar brokers`: the servers of topics."""

from __future__ import annotations

from typing import TYPE_CHECKING

import typer

from magnetar.cli.command import (
    DEFAULT_SERVER,
    DEFAULT_TIMEOUT_S,
    Output,
    OutputOption,
    ServerOption,
    TimeoutOption,
    run_with_client,
)
from magnetar.cli.output import emit_json, emit_table, plain

if TYPE_CHECKING:
    from magnetar.client import BrokerDescription, Client

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

    async def body(client: Client) -> list[BrokerDescription]:
        return await client.admin.brokers.list()

    found = run_with_client(server, timeout, body)
    if output is Output.json:
        emit_json(plain(found))
    else:
        emit_table(
            ["broker", "address", "shards", "http", "version"],
            [(one.id, one.address, one.shards, one.http_address, one.version) for one in found],
        )
