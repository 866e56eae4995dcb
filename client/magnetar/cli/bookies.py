"""`magnetar bookies`: the storage nodes."""

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
from magnetar.cli.output import Size

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
        ["bookie", "address", "state", "rack", "ledgers", "bytes", "disk free"],
        lambda one: (
            one.id, one.address, one.state, one.rack, one.ledgers, Size(one.bytes), Size(one.disk_free_bytes),
        ),
        output, server, timeout,
    )  # fmt: skip
