"""The command of a load: its own options and those of all verbs, and the order of things when it runs."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from magnetar.cli.bench.load import Load
from magnetar.cli.bench.target import target
from magnetar.cli.command import (
    DEFAULT_TIMEOUT_S,
    EXIT_USAGE,
    CommandFailed,
    DryRunOption,
    Output,
    OutputOption,
    TimeoutOption,
    directory,
    find_server,
    run,
)
from magnetar.cli.local_cluster import parse_local
from magnetar.cli.output import emit_json, note, number_of

RUNS_MAX = 100
SIZE_MAX = 5 << 20

SizeOption = Annotated[int, typer.Option(min=0, max=SIZE_MAX, help="Bytes of one payload.")]
TimedSizeOption = Annotated[
    int, typer.Option(min=8, max=SIZE_MAX, help="Bytes of one payload; the first eight tell when it was due.")
]
RateOption = Annotated[
    float, typer.Option(min=0, help="Messages a second; latencies count from when each was due. 0: as many as go.")
]
BacklogOption = Annotated[int, typer.Option("--bytes", min=1, help="Bytes of payload to publish before and read.")]


def verb(make: Callable[..., Load]) -> Callable[..., None]:
    """A command from a function that takes the verb's own options and returns its load. Its docstring is the help."""
    own = inspect.signature(make, eval_str=True).parameters
    shared = inspect.signature(_measure, eval_str=True).parameters

    def command(**values: Any) -> None:
        load = make(**{name: values.pop(name) for name in own})
        _measure(load, **values)

    options = [*own.values(), *(option for name, option in shared.items() if name != "load")]
    keywords = [option.replace(kind=inspect.Parameter.KEYWORD_ONLY) for option in options]
    command.__signature__ = inspect.Signature(keywords)  # type: ignore[attr-defined]
    command.__annotations__ = {option.name: option.annotation for option in options}
    command.__name__, command.__doc__ = make.__name__, make.__doc__
    return command


def _measure(
    load: Load,
    context: typer.Context,
    server: Annotated[
        str | None, typer.Option(envvar="MAGNETAR_SERVER", help="Measure this cluster; else --local.")
    ] = None,
    local: Annotated[
        str | None,
        typer.Option(
            help="BOOKIES,BROKERS of a cluster started for it, each in a process of its own; 3,1, failover 3,2."
        ),
    ] = None,
    data_dir: Annotated[
        Path, typer.Option(parser=directory, metavar="DIR", help="Where --local keeps its data; never in memory.")
    ] = Path("."),
    seconds: Annotated[float, typer.Option(min=0.1, help="Length of a run.")] = 10.0,
    warm_up: Annotated[float, typer.Option(min=0.0, help="Seconds of load before the first run.")] = 1.0,
    runs: Annotated[int, typer.Option(min=1, max=RUNS_MAX, help="Runs; the one with the median rate is shown.")] = 1,
    dry_run: DryRunOption = False,
    output: OutputOption = Output.table,
    timeout: TimeoutOption = DEFAULT_TIMEOUT_S,
) -> None:
    if server is not None and local is not None:
        source = context.get_parameter_source("server")
        if source is not None and source.name == "COMMANDLINE":
            raise CommandFailed("--server and --local exclude each other: measure a cluster, or start one", EXIT_USAGE)
        server = None  # The variable is there for other commands.
    size = parse_local(local or load.cluster)
    load.check(None if server else size, runs)
    timing = {"seconds": seconds, "warm_up": warm_up, "runs": runs, "local": server is None}
    settings = {**asdict(load), **timing}  # type: ignore[call-overload]
    if dry_run:
        cluster = f"{number_of(size.bookies, 'bookie')} and {number_of(size.brokers, 'broker')}"
        where = server or f"a new cluster of {cluster} in {data_dir}"
        if output is Output.json:
            emit_json({"test": load.verb, "settings": settings, "server": server, "dry_run": True})
        else:
            note(f"would measure {load.verb} at {where}: " + ", ".join(f"{k}={v}" for k, v in settings.items()))
        return

    async def main() -> dict[str, Any]:
        from magnetar.cli.bench.measuring import measured

        if server is not None:
            await find_server(server, timeout)
        with target(server, size, data_dir) as cluster:
            return await measured(load, cluster, settings, timeout)

    result = run(main())
    if output is Output.json:
        emit_json(result)
    else:
        from magnetar.cli.bench.report import show

        show(result)
