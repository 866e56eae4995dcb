"""How a verb that is one server process runs: its settings, where they came from, and its one ready line."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from magnetar.cli.child import end_with_parent
from magnetar.cli.command import EXIT_ERROR, EXIT_USAGE, Output, fail
from magnetar.cli.output import emit_json, emit_table, note

if TYPE_CHECKING:
    from magnetar.cli.roles.process import Ready

ConfigOption = Annotated[
    Path | None, typer.Option("--config", metavar="FILE", help="Settings of this role in a TOML file.")
]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="One setting; goes before environment and file. Repeatable."),
]
PrintConfigOption = Annotated[
    bool, typer.Option("--print-config", help="Print every setting and where it came from, and end.")
]

Start = Callable[[Any, Callable[["Ready"], None]], None]
"""Takes settings and what to call when the role serves; runs until it is stopped."""


def run_role_process(
    role: str,
    start: Callable[[], Start],
    config: Path | None,
    assignments: list[str] | None,
    print_config: bool,
    output: Output,
) -> None:
    """Loads the settings of `role` and runs what `start` imports. Whatever refuses is one line and exit code 1 or 2."""
    end_with_parent()
    with _installed():
        from magnetar.cli.roles import process
    try:
        loaded = process.load(role, assignments or [], config)
    except process.SettingsError as error:
        fail(str(error), EXIT_USAGE)
    if print_config:
        show_settings(role, loaded.table(), output)
        return
    with _installed():
        run = start()

    def on_ready(ready: Ready) -> None:
        print_ready(ready, output)
        warn_of_exposure(process.exposed(loaded.settings))

    try:
        run(loaded.settings, on_ready)
    except process.RoleRefused as refused:
        fail(str(refused), EXIT_ERROR)


@contextmanager
def _installed() -> Iterator[None]:
    try:
        yield
    except ModuleNotFoundError as error:
        fail(f"the server is not installed: pip install 'magnetar[server]' missing=`{error.name}`", EXIT_ERROR)


def print_ready(ready: Ready, output: Output) -> None:
    """One line on stdout: the role serves."""
    if output is Output.json:
        emit_json(asdict(ready))
    else:
        name = f"{ready.role} {ready.id}".strip()
        print(f"magnetar {name}: serves at {ready.address}, http://{ready.http}")
    sys.stdout.flush()


def warn_of_exposure(addresses: list[str]) -> None:
    """Where other hosts can connect."""
    if addresses:
        where = " and ".join(addresses)
        note(f"magnetar: warning: listening on {where} without security: whoever reaches it can read and write")


def show_settings(role: str, table: list[tuple[str, Any, str]], output: Output) -> None:
    if output is Output.json:
        emit_json({"role": role, "settings": {key: {"value": value, "source": source} for key, value, source in table}})
    else:
        emit_table(["setting", "value", "from"], [(key, _cell(value), source) for key, value, source in table])


def _cell(value: Any) -> str:
    """As it is written in a file, without quotes and separators."""
    return str(value).lower() if isinstance(value, bool) else str(value)
