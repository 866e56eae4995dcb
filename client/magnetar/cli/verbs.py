"""The verbs of the `magnetar` command, and what happens to errors that nobody else took care of."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from magnetar.cli import bench, cluster, ledgers, subscriptions, topics
from magnetar.cli.command import EXIT_INTERRUPTED, EXIT_USAGE, fail, fail_for, quiet_stdout
from magnetar.cli.consume import consume
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
app.command()(produce)
app.command()(consume)
app.add_typer(topics.app, name="topics")
app.add_typer(subscriptions.app, name="subscriptions")
app.add_typer(ledgers.app, name="ledgers")
app.add_typer(cluster.app, name="cluster")
app.add_typer(bench.app, name="bench")


def run_command_line(arguments: list[str]) -> int:
    """Runs one command line. Returns its exit code; whatever goes wrong is one line on stderr."""
    try:
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


def _sentence(text: str) -> str:
    return text[:1].lower() + text[1:].rstrip(".")
