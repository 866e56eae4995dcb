"""`magnetar ledgers`: the replicated segments under the topics."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from magnetar.cli.command import (
    DEFAULT_SERVER,
    DEFAULT_TIMEOUT_S,
    EXIT_UNHEALTHY,
    Output,
    OutputOption,
    ServerOption,
    TimeoutOption,
    run_with_client,
    show_list,
)
from magnetar.cli.output import Size, emit_facts, emit_json, emit_table, plain
from magnetar.cli.rebalance_shown import compared

if TYPE_CHECKING:
    from magnetar.client import Client, LedgerDescription, LedgerVerification

app = typer.Typer(help="The replicated segments under the topics.", no_args_is_help=True)


@app.command("list")
def list_(
    topic: Annotated[str | None, typer.Argument(help="Only of this topic.")] = None,
    output: OutputOption = Output.table,
    server: ServerOption = DEFAULT_SERVER,
    timeout: TimeoutOption = DEFAULT_TIMEOUT_S,
) -> None:
    """Lists ledgers, oldest first."""
    show_list(
        lambda client: client.admin.ledgers.list(topic),
        ["ledger", "topic", "shard", "purpose", "state", "entries", "bytes", "bookies"],
        lambda one: (
            str(one.ledger), one.topic, str(one.shard), one.purpose, one.state, one.entries,
            _bytes(one), _bookies(one.fragments[-1].bookies),
        ),
        output, server, timeout,
    )  # fmt: skip


@app.command()
def describe(
    ledger: Annotated[int, typer.Argument(min=1, help="Id of the ledger.")],
    output: OutputOption = Output.table,
    server: ServerOption = DEFAULT_SERVER,
    timeout: TimeoutOption = DEFAULT_TIMEOUT_S,
) -> None:
    """Shows a ledger: its state, quorums, and which bookies hold which entries."""

    async def body(client: Client) -> LedgerDescription:
        return await client.admin.ledgers.describe(ledger)

    one = run_with_client(server, timeout, body)
    if output is Output.json:
        emit_json(plain(one))
        return
    emit_facts(
        [
            ("ledger", str(one.ledger)),
            ("topic", one.topic),
            ("shard", str(one.shard)),
            ("purpose", one.purpose),
            ("state", one.state),
            ("epoch", one.epoch),
            ("quorum", f"{one.ack_quorum} of {one.write_quorum} copies make an entry durable"),
            ("entries", one.entries),
            ("bytes", _bytes(one)),
            ("created", one.created.isoformat(timespec="seconds")),
        ]
    )
    print()
    emit_table(
        ["from entry", "bookies"], [(fragment.first_entry, _bookies(fragment.bookies)) for fragment in one.fragments]
    )


@app.command()
def verify(
    ledger: Annotated[int, typer.Argument(min=1, help="Id of a closed ledger.")],
    output: OutputOption = Output.table,
    server: ServerOption = DEFAULT_SERVER,
    timeout: TimeoutOption = DEFAULT_TIMEOUT_S,
) -> None:
    """Reads every copy of a closed ledger and compares their checksums; exit code 10 if any is wrong."""

    async def body(client: Client) -> LedgerVerification:
        return await client.admin.ledgers.verify(ledger)

    found = run_with_client(server, timeout, body)
    if output is Output.json:
        emit_json(plain(found))
    else:
        emit_facts(
            [
                ("ledger", str(found.ledger)),
                ("compared", compared(found)),
                ("bytes", f"{Size(found.bytes)}, of all copies"),
                ("bookies", _bookies(found.bookies)),
                ("problems", len(found.problems)),
                *(("problem", problem) for problem in found.problems),
            ]
        )
    if found.problems:
        raise typer.Exit(EXIT_UNHEALTHY)


def _bytes(ledger: LedgerDescription) -> Size | None:
    """Known when it is closed."""
    return None if ledger.bytes is None else Size(ledger.bytes)


def _bookies(names: Sequence[str]) -> str:
    return ", ".join(name or "(vacant)" for name in names)
