"""`magnetar bench`: how fast a cluster is, next to what the machine under it could do.

A verb is a module: its own options, and its load. What all verbs share: `verb` (options, and the order of things),
`target` (the cluster that is measured), `measuring` (warm-up, runs, what they cost), `report` (JSON and table). What
loads are made of: `payloads`, `topics`, `schedule`, `latencies`, `backlog`, `tail`.
"""

from __future__ import annotations

import typer

from magnetar.cli.bench.catch_up import catch_up
from magnetar.cli.bench.consume import consume
from magnetar.cli.bench.end_to_end import end_to_end
from magnetar.cli.bench.failover import failover
from magnetar.cli.bench.latency import latency
from magnetar.cli.bench.publish import publish
from magnetar.cli.bench.queue import queue

app = typer.Typer(help="How fast this cluster is, next to what the machine could do.", no_args_is_help=True)


@app.callback()
def options() -> None:
    """How fast this cluster is, next to what the machine could do."""


for _command in (publish, latency, consume, catch_up, end_to_end, queue, failover):
    app.command(_command.__name__.replace("_", "-"))(_command)
