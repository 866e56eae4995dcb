"""`magnetar broker`: a server of topics, or several of them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from magnetar.cli.command import Output, OutputOption
from magnetar.cli.role_process import ConfigOption, PrintConfigOption, SetOption, run_role_process

if TYPE_CHECKING:
    from magnetar.cli.role_process import Start


def broker(
    config: ConfigOption = None,
    assignments: SetOption = None,
    workers: Annotated[
        int | None,
        typer.Option(
            min=1, max=64, help="So many brokers, a process each: <id>-0, <id>-1, ... at the port, port + 2, ..."
        ),
    ] = None,
    print_config: PrintConfigOption = False,
    output: OutputOption = Output.table,
) -> None:
    """Runs a broker, which serves topics, until Ctrl-C or SIGTERM. Needs an id: --set id=NAME."""

    def start() -> Start:
        if workers is not None:
            from magnetar.cli.roles.workers import run_workers

            given = _given(config, assignments, output)
            return lambda settings, _: run_workers(settings, workers, given)
        from magnetar.cli.roles.broker import run_broker

        return run_broker

    run_role_process("broker", start, config, assignments, print_config, output)


def _given(config: Path | None, assignments: list[str] | None, output: Output) -> list[str]:
    """What was asked for, as arguments of each worker."""
    files = [] if config is None else ["--config", str(config)]
    return [*files, *(word for one in assignments or [] for word in ("--set", one)), "--output", output.value]
