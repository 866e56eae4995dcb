"""`magnetar bookie`: a storage node."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from magnetar.cli.command import Output, OutputOption
from magnetar.cli.role_process import ConfigOption, PrintConfigOption, SetOption, run_role_process

if TYPE_CHECKING:
    from magnetar.cli.role_process import Start


def bookie(
    config: ConfigOption = None,
    assignments: SetOption = None,
    print_config: PrintConfigOption = False,
    repair_bookie: Annotated[
        str | None,
        typer.Option(metavar="ID", help="Let this bookie start empty: its directory was lost, others hold it."),
    ] = None,
    output: OutputOption = Output.table,
) -> None:
    """Runs a bookie, which stores entries, until Ctrl-C or SIGTERM. Needs id and data_dir; see --print-config."""

    def start() -> Start:
        from magnetar.cli.roles.bookie import run_bookie

        return lambda settings, on_ready: run_bookie(settings, on_ready, repair_bookie)

    run_role_process("bookie", start, config, assignments, print_config, output)
