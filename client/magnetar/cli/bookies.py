"""`magnetar bookies`: the storage nodes."""

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
from magnetar.cli.output import Size, emit_json, emit_table, plain

if TYPE_CHECKING:
    from magnetar.client import BookieDescription, Client

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

    async def body(client: Client) -> list[BookieDescription]:
        return await client.admin.bookies.list()

    found = run_with_client(server, timeout, body)
    if output is Output.json:
        emit_json(plain(found))
    else:
        emit_table(
            ["bookie", "address", "state", "rack", "ledgers", "bytes", "disk free"],
            [
                (one.id, one.address, one.state, one.rack, one.ledgers, Size(one.bytes), Size(one.disk_free_bytes))
                for one in found
            ],
        )
