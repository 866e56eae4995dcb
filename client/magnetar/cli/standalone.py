"""`magnetar standalone`: everything in one process."""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from magnetar.cli.child import end_with_parent
from magnetar.cli.command import EXIT_ERROR, Output, OutputOption, directory, fail
from magnetar.cli.output import emit_json, number_of
from magnetar.cli.role_process import warn_of_exposure


def bracketed(host: str) -> str:
    """A host as it stands before a port."""
    return f"[{host}]" if ":" in host and not host.startswith("[") else host


def standalone(
    data_dir: Annotated[Path, typer.Option(parser=directory, metavar="DIR", help="Where everything is kept.")] = Path(
        "magnetar-data"
    ),
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port for clients; 0 takes any free one.")] = 7650,
    http_port: Annotated[
        int | None, typer.Option(min=0, max=65535, help="Port for /metrics, /livez, /readyz; default: port + 1.")
    ] = None,
    bookies: Annotated[
        int | None, typer.Option(min=1, max=9, help="Storage nodes; default: as many as the directory holds, or 1.")
    ] = None,
    repair_bookie: Annotated[
        str | None,
        typer.Option(metavar="ID", help="Let this bookie start empty: its directory was lost, others hold it."),
    ] = None,
    advertise: Annotated[
        str, typer.Option(metavar="HOST:PORT", help="Where clients on other hosts reach it; default: where it listens.")
    ] = "",
    output: OutputOption = Output.table,
) -> None:
    """Runs a whole cluster in one process until Ctrl-C; the data stays in --data-dir."""
    end_with_parent()
    try:
        from magnetar.cli.roles import standalone as roles
    except ModuleNotFoundError as error:
        fail(f"the server is not installed: pip install 'magnetar[server]' missing=`{error.name}`", EXIT_ERROR)

    def ready(where: roles.Ready) -> None:
        if output is Output.json:
            emit_json(asdict(where))
        else:
            bookies = number_of(where.bookies, "bookie")
            print(f"magnetar standalone: server {where.server}, {where.http}, {bookies}, {where.data_dir}")
        sys.stdout.flush()
        if host not in ("127.0.0.1", "localhost", "::1"):
            warn_of_exposure([host])

    asked = roles.Standalone(data_dir, bracketed(host), port, http_port, bookies, repair_bookie, advertise)
    try:
        roles.run_standalone(asked, ready)
    except roles.StandaloneRefused as refused:
        fail(str(refused), EXIT_ERROR)
