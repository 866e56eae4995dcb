"""The verbs of the `magnetar` command, and what happens to errors that nobody else took care of."""

from __future__ import annotations

import re
import sys
from typing import Annotated

import typer

from magnetar.cli import bench, bookies, brokers, cluster, ledgers, rebalance, subscriptions, topics
from magnetar.cli.bookie import bookie
from magnetar.cli.broker import broker
from magnetar.cli.command import EXIT_ERROR, EXIT_INTERRUPTED, EXIT_USAGE, fail, fail_for, quiet_stdout
from magnetar.cli.consume import consume
from magnetar.cli.metadata import metadata
from magnetar.cli.produce import produce
from magnetar.cli.standalone import standalone

app = typer.Typer(
    name="magnetar",
    help="Streams and queues on replicated ledgers: run a cluster, publish, consume, look inside.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["--help", "-h"]},
)


def _show_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        print(f"magnetar {version('magnetar')}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_show_version, help="Print the version and end.")
    ] = False,
) -> None:
    """Streams and queues on replicated ledgers: run a cluster, publish, consume, look inside."""


app.command()(standalone)
app.command()(metadata)
app.command()(bookie)
app.command()(broker)
app.command()(produce)
app.command()(consume)
app.add_typer(topics.app, name="topics")
app.add_typer(subscriptions.app, name="subscriptions")
app.add_typer(brokers.app, name="brokers")
app.add_typer(bookies.app, name="bookies")
app.add_typer(ledgers.app, name="ledgers")
app.add_typer(rebalance.app, name="rebalance")
app.add_typer(cluster.app, name="cluster")
app.add_typer(bench.app, name="bench")


def run_command_line(arguments: list[str]) -> int:
    """Runs one command line. Returns its exit code; whatever goes wrong is one line on stderr."""
    try:
        if sys.stdout is None:
            fail("standard output is closed: let it go to a file, a pipe or /dev/null", EXIT_ERROR)
        try:
            _invoke(arguments)
            sys.stdout.flush()
        except BrokenPipeError:
            # Whoever read stdout has seen enough.
            quiet_stdout()
        except (typer.Exit, typer.Abort, typer.TyperException, KeyboardInterrupt):
            raise
        except Exception as error:
            fail_for(error)
    except typer.Exit as end:
        return end.exit_code
    except (typer.Abort, KeyboardInterrupt):
        return EXIT_INTERRUPTED
    return 0


def _invoke(arguments: list[str]) -> None:
    command = typer.main.get_command(app)
    try:
        with command.make_context("magnetar", list(arguments)) as context:
            command.invoke(context)
    except typer.TyperException as error:
        usage = error.format_message()
        if not usage:
            # A group without a verb: its help was printed.
            raise typer.Exit(EXIT_USAGE) from None
        failed = getattr(error, "ctx", None)
        fail(f"{_sentence(usage)}; see {failed.command_path if failed else 'magnetar'} --help", EXIT_USAGE)


_PLAINER = (
    (r"Value error, ", ""),
    (r"Input should be a valid integer\b.*", "must be a whole number"),
    (r"Input should be a valid number\b.*", "must be a number"),
    (r"Input should be greater than or equal to", "must be at least"),
    (r"Input should be less than or equal to", "must be at most"),
    (r"Input should be", "must be"),
)
"""The words of the library that checks values, and ours."""


def _sentence(text: str) -> str:
    for theirs, ours in _PLAINER:
        text = re.sub(theirs, ours, text)
    return text[:1].lower() + text[1:].rstrip(".")
