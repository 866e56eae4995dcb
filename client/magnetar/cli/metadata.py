"""`magnetar metadata`: the metadata store of a cluster."""

from __future__ import annotations

from typing import TYPE_CHECKING

from magnetar.cli.command import Output, OutputOption
from magnetar.cli.role_process import ConfigOption, PrintConfigOption, SetOption, run_role_process

if TYPE_CHECKING:
    from magnetar.cli.role_process import Start


def metadata(
    config: ConfigOption = None,
    assignments: SetOption = None,
    print_config: PrintConfigOption = False,
    output: OutputOption = Output.table,
) -> None:
    """Runs a metadata store with the API of etcd v3 on one file, not replicated, until Ctrl-C or SIGTERM."""

    def start() -> Start:
        from magnetar.cli.roles.metadata import run_metadata

        return run_metadata

    run_role_process("metadata", start, config, assignments, print_config, output)
