"""`magnetar topics`: topics and their shards."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from magnetar.cli.command import (
    DEFAULT_SERVER,
    DEFAULT_TIMEOUT_S,
    DryRunOption,
    Output,
    OutputOption,
    ServerOption,
    TimeoutOption,
    TopicArgument,
    run_with_client,
)
from magnetar.cli.output import Size, emit_facts, emit_json, emit_table, human_bytes, note, plain

if TYPE_CHECKING:
    from magnetar.client import Client, ShardDescription, TopicDeletion, TopicDescription

app = typer.Typer(help="Topics and their shards.", no_args_is_help=True)

SHARDS_MAX = 64
"""Of a new topic, as the servers have it."""
SLOTS = 65536


@app.command()
def create(
    topic: TopicArgument,
    shards: Annotated[int, typer.Option(min=1, max=SHARDS_MAX, help="In how many shards its keys are divided.")] = 1,
    dry_run: DryRunOption = False,
    output: OutputOption = Output.table,
    server: ServerOption = DEFAULT_SERVER,
    timeout: TimeoutOption = DEFAULT_TIMEOUT_S,
) -> None:
    """Creates a topic with so many shards."""

    async def body(client: Client) -> TopicDescription:
        return await client.admin.topics.create(topic, shards=shards, dry_run=dry_run)

    created = run_with_client(server, timeout, body)
    if output is Output.json:
        emit_json({**plain(created), "dry_run": dry_run})
    else:
        note(f"{created.topic} {'would be' if dry_run else 'is'} created with {_count(len(created.shards), 'shard')}")


@app.command("list")
def list_(
    prefix: Annotated[str, typer.Argument(help="Only of this tenant, or tenant/namespace; empty for all.")] = "",
    output: OutputOption = Output.table,
    server: ServerOption = DEFAULT_SERVER,
    timeout: TimeoutOption = DEFAULT_TIMEOUT_S,
) -> None:
    """Lists topics, a name a line."""

    async def body(client: Client) -> Sequence[str]:
        return await client.admin.topics.list(prefix)

    names = run_with_client(server, timeout, body)
    if output is Output.json:
        emit_json(names)
    else:
        for name in names:
            print(name)


@app.command()
def describe(
    topic: TopicArgument,
    segments: Annotated[bool, typer.Option("--segments", help="Also every segment, in the table.")] = False,
    output: OutputOption = Output.table,
    server: ServerOption = DEFAULT_SERVER,
    timeout: TimeoutOption = DEFAULT_TIMEOUT_S,
) -> None:
    """Shows a topic's shards: their slots, owners, offsets and bytes."""

    async def body(client: Client) -> TopicDescription:
        return await client.admin.topics.describe(topic)

    description = run_with_client(server, timeout, body)
    if output is Output.json:
        emit_json(plain(description))
        return
    emit_facts(
        [
            ("topic", description.topic),
            ("epoch", description.epoch),
            ("subscriptions", ", ".join(description.subscriptions)),
        ]
    )
    print()
    emit_table(
        ["shard", "slots", "state", "owner", "parents", "first offset", "end offset", "segments", "bytes"],
        [_shard_row(shard) for shard in description.shards],
    )
    if segments:
        print()
        emit_table(
            ["shard", "ledger", "state", "first offset", "messages", "bytes", "ensemble"],
            [
                (
                    str(shard.shard), str(segment.ledger), segment.state, segment.first_offset, segment.messages,
                    Size(segment.bytes), ", ".join(bookie or "(vacant)" for bookie in segment.ensemble),
                )
                for shard in description.shards
                for segment in shard.segments
            ],
        )  # fmt: skip


@app.command()
def delete(
    topic: TopicArgument,
    dry_run: DryRunOption = False,
    output: OutputOption = Output.table,
    server: ServerOption = DEFAULT_SERVER,
    timeout: TimeoutOption = DEFAULT_TIMEOUT_S,
) -> None:
    """Deletes a topic with all its messages and subscriptions."""

    async def body(client: Client) -> TopicDeletion:
        return await client.admin.topics.delete(topic, dry_run=dry_run)

    deleted = run_with_client(server, timeout, body)
    if output is Output.json:
        emit_json({**plain(deleted), "dry_run": dry_run})
    else:
        note(
            f"{deleted.topic} {'would be' if dry_run else 'is'} deleted: {_count(deleted.shards, 'shard')}, "
            f"{_count(deleted.messages, 'message')}, {human_bytes(deleted.bytes)}"
        )


def _shard_row(shard: ShardDescription) -> tuple[object, ...]:
    first, last = shard.slots
    return (
        str(shard.shard),
        f"{first:04x}-{last:04x} ({(last - first + 1) / SLOTS:.3g} of all)",
        shard.state,
        shard.owner,
        ", ".join(map(str, shard.parents)),
        shard.start_offset,
        shard.end_offset,
        len(shard.segments),
        Size(sum(segment.bytes for segment in shard.segments)),
    )


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}" + ("" if number == 1 else "s")
