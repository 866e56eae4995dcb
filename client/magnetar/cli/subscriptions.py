"""`magnetar subscriptions`: durable positions in topics."""

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
    SubscriptionArgument,
    TimeoutOption,
    TopicArgument,
    run_with_client,
    show_list,
)
from magnetar.cli.output import Size, emit_facts, emit_json, emit_table, human_seconds, note, plain
from magnetar.cli.position import parse_position

if TYPE_CHECKING:
    from magnetar.client import (
        Client,
        CursorDescription,
        SubscriptionDeletion,
        SubscriptionDescription,
    )

app = typer.Typer(help="Durable positions in topics.", no_args_is_help=True)


@app.command("list")
def list_(
    topic: TopicArgument,
    output: OutputOption = Output.table,
    server: ServerOption = DEFAULT_SERVER,
    timeout: TimeoutOption = DEFAULT_TIMEOUT_S,
) -> None:
    """Lists the subscriptions of a topic with their backlogs."""
    show_list(
        lambda client: client.admin.subscriptions.list(topic),
        ["subscription", "type", "backlog", "consumers"],
        lambda one: (one.subscription, one.type, one.backlog_messages, one.consumers),
        output, server, timeout,
    )  # fmt: skip


@app.command()
def describe(
    topic: TopicArgument,
    subscription: SubscriptionArgument,
    output: OutputOption = Output.table,
    server: ServerOption = DEFAULT_SERVER,
    timeout: TimeoutOption = DEFAULT_TIMEOUT_S,
) -> None:
    """Shows a subscription's backlog, cursors and consumers, and why nothing is delivered."""

    async def body(client: Client) -> SubscriptionDescription:
        return await client.admin.subscriptions.describe(topic, subscription)

    description = run_with_client(server, timeout, body)
    if output is Output.json:
        emit_json(plain(description))
    else:
        _show(description)


def _show(description: SubscriptionDescription) -> None:
    emit_facts(
        [
            ("subscription", description.subscription),
            ("type", description.type),
            ("backlog", f"{description.backlog_messages:,} messages, {Size(description.backlog_bytes)}"),
            ("oldest", human_seconds(description.oldest_age_s) if description.backlog_messages else None),
        ]
    )
    print()
    emit_table(
        ["shard", "floor", "acked above", "end", "backlog", "bytes", "delivered, not acked"],
        [
            (
                str(cursor.shard), cursor.floor, cursor.acked_above_floor, cursor.end_offset, cursor.backlog_messages,
                Size(cursor.backlog_bytes), cursor.unacked_messages,
            )
            for cursor in description.shards
        ],
    )  # fmt: skip
    if description.consumers:
        print()
        emit_table(
            ["consumer", "shard", "active", "not acked", "credit", "credit bytes", "client"],
            [
                (
                    one.consumer, str(one.shard), one.active, one.unacked_messages, one.credit_messages,
                    Size(one.credit_bytes), one.client,
                )
                for one in description.consumers
            ],
        )  # fmt: skip
    for reason in description.waiting_for:
        print(f"\nwaiting for: {reason}")


@app.command()
def seek(
    topic: TopicArgument,
    subscription: SubscriptionArgument,
    to: Annotated[str, typer.Option(help="earliest, latest, a message id, or an ISO 8601 publish time.")],
    dry_run: DryRunOption = False,
    output: OutputOption = Output.table,
    server: ServerOption = DEFAULT_SERVER,
    timeout: TimeoutOption = DEFAULT_TIMEOUT_S,
) -> None:
    """Moves a subscription; a message id moves its own shard only."""
    position = parse_position(to, message_ids=True)

    async def body(client: Client) -> Sequence[CursorDescription]:
        return await client.admin.subscriptions.seek(topic, subscription, position, dry_run=dry_run)

    cursors = run_with_client(server, timeout, body)
    if output is Output.json:
        emit_json({"topic": topic, "subscription": subscription, "shards": plain(cursors), "dry_run": dry_run})
    else:
        for cursor in cursors:
            verb = "would go to" if dry_run else "is at"
            note(f"shard {cursor.shard} {verb} offset {cursor.floor:,} of {cursor.end_offset:,}")


@app.command()
def delete(
    topic: TopicArgument,
    subscription: SubscriptionArgument,
    dry_run: DryRunOption = False,
    output: OutputOption = Output.table,
    server: ServerOption = DEFAULT_SERVER,
    timeout: TimeoutOption = DEFAULT_TIMEOUT_S,
) -> None:
    """Deletes a subscription; the messages stay for the others."""

    async def body(client: Client) -> SubscriptionDeletion:
        return await client.admin.subscriptions.delete(topic, subscription, dry_run=dry_run)

    deleted = run_with_client(server, timeout, body)
    if output is Output.json:
        emit_json({"topic": topic, **plain(deleted), "dry_run": dry_run})
    else:
        verb = "would be" if dry_run else "is"
        note(
            f"subscription {subscription} of {topic} {verb} deleted; its backlog: {deleted.backlog_messages:,} messages"
        )
