"""`magnetar consume`: prints the messages of a subscription and acknowledges what it printed."""

from __future__ import annotations

import base64
import enum
import json
import os
import select
import socket
import sys
import time
from collections.abc import Awaitable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

from magnetar.cli.command import (
    DEFAULT_SERVER,
    DEFAULT_TIMEOUT_S,
    EXIT_TIMEOUT,
    CommandFailed,
    ServerOption,
    TimeoutOption,
    TopicArgument,
    run_with_client,
)
from magnetar.cli.output import note
from magnetar.cli.position import parse_position

if TYPE_CHECKING:
    from magnetar.client import (
        Client,
        CursorDescription,
        Message,
        Position,
        QueueConsumer,
        StreamConsumer,
        SubscriptionDescription,
    )

    Consumer = StreamConsumer | QueueConsumer

BATCH_MESSAGES = 1000
WAIT_S = 0.5
"""How long nothing has to come before the cluster is asked whether there is anything left."""


class Type(enum.StrEnum):
    stream = "stream"
    queue = "queue"


class Shape(enum.StrEnum):
    raw = "raw"
    json = "json"


@dataclass(frozen=True, slots=True)
class Wanted:
    """What to print."""

    topic: str
    subscription: str
    type: Type
    start: Position
    count: int | None
    no_wait: bool
    shape: Shape
    timeout_s: float


def consume(
    topic: TopicArgument,
    subscription: Annotated[str, typer.Option(help="The durable position to read from and to acknowledge in.")],
    type: Annotated[Type, typer.Option(help="stream: in order. queue: each message to one consumer.")] = Type.stream,
    start: Annotated[
        str, typer.Option("--from", help="Where a new subscription begins: earliest, latest or an ISO 8601 time.")
    ] = "latest",
    count: Annotated[int | None, typer.Option(min=1, help="End after so many messages.")] = None,
    no_wait: Annotated[bool, typer.Option("--no-wait", help="End when everything stored was printed.")] = False,
    output: Annotated[Shape, typer.Option("--output", help="raw: the payload and a line end.")] = Shape.raw,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print what the subscription has before it, and change nothing.")
    ] = False,
    server: ServerOption = DEFAULT_SERVER,
    timeout: TimeoutOption = DEFAULT_TIMEOUT_S,
) -> None:
    """Prints messages as they come, until Ctrl-C, --count or --no-wait; acknowledges what it printed."""
    position = parse_position(start, message_ids=False)
    wanted = Wanted(topic, subscription, type, position, count, no_wait, output, timeout)

    async def body(client: Client) -> None:
        await (_look(client, wanted) if dry_run else _consume(client, wanted))

    run_with_client(server, timeout, body)


async def _consume(client: Client, wanted: Wanted) -> None:
    open_consumer = client.stream_consumer if wanted.type is Type.stream else client.queue_consumer
    async with open_consumer(wanted.topic, subscription=wanted.subscription, start=wanted.start) as consumer:
        rest = Rest(wanted, await _describe(client, wanted)) if wanted.no_wait else None
        left = wanted.count
        while left != 0 and not (rest is not None and rest.is_empty):
            check_stdout()
            most = BATCH_MESSAGES if left is None else min(left, BATCH_MESSAGES)
            messages = await consumer.receive_batch(max_messages=most, timeout=WAIT_S)
            write(messages, wanted.shape)
            acks = _ack(consumer, messages, wanted.type)
            left = None if left is None else left - len(messages)
            if rest is not None and messages:
                rest.came(messages, acks)
            elif rest is not None:
                await rest.acknowledged()
                rest.silence(await _describe(client, wanted))


async def _describe(client: Client, wanted: Wanted) -> SubscriptionDescription:
    return await client.admin.subscriptions.describe(wanted.topic, wanted.subscription)


def _ack(consumer: Consumer, messages: Sequence[Message], type: Type) -> dict[int, Awaitable[None]]:
    """Queues the acknowledgements; closing the consumer sends what is queued. Returns the last one of each shard."""
    if type is Type.stream:
        # Cumulative: the last of each shard stands for those before it.
        messages = list({message.id.shard: message for message in messages}.values())
    return {message.id.shard: consumer.ack(message) for message in messages}


class Rest:
    """What --no-wait still has to print: what was stored when it began, as far as it can be delivered here.

    _ends   for each shard with something to print: the end offset at the beginning
    _acks   the last acknowledgement in each shard
    """

    def __init__(self, wanted: Wanted, description: SubscriptionDescription) -> None:
        self._wanted = wanted
        self._ends = {cursor.shard: cursor.end_offset for cursor in description.shards if cursor.backlog_messages}
        self._acks: dict[int, Awaitable[None]] = {}
        self._last_came_at = time.monotonic()

    @property
    def is_empty(self) -> bool:
        return not self._ends

    def came(self, messages: Sequence[Message], acks: Mapping[int, Awaitable[None]]) -> None:
        """Messages were printed. The last message of the beginning, or a later one, ends its shard."""
        self._last_came_at = time.monotonic()
        self._acks.update(acks)
        for message in messages:
            shard, offset = message.id.shard, message.id.offset
            if offset is not None and offset >= self._ends.get(shard, offset + 2) - 1:
                del self._ends[shard]

    async def acknowledged(self) -> None:
        """Returns when every acknowledgement is durable: the backlog then is what was not printed."""
        acks, self._acks = self._acks, {}
        for ack in acks.values():
            await ack

    def silence(self, description: SubscriptionDescription) -> None:
        """Nothing came for a while. Raises CommandFailed when what is deliverable does not come for too long."""
        cursors = {cursor.shard: cursor for cursor in description.shards}
        elsewhere = 0
        for shard, end in list(self._ends.items()):
            cursor = cursors.get(shard)
            if cursor is None or cursor.floor >= end or not cursor.backlog_messages:
                del self._ends[shard]
            elif not self._is_deliverable(cursor, description):
                elsewhere += cursor.backlog_messages
                del self._ends[shard]
        if elsewhere:
            note(f"magnetar: not printed, because other consumers have them: {elsewhere:,} messages")
        if self._ends and time.monotonic() - self._last_came_at >= self._wanted.timeout_s:
            left = sum(cursors[shard].backlog_messages for shard in self._ends)
            reasons = "; ".join(description.waiting_for) or "the server gives no reason"
            raise CommandFailed(
                f"{left:,} messages did not come within {self._wanted.timeout_s:g} s: {reasons}", EXIT_TIMEOUT
            )

    def _is_deliverable(self, cursor: CursorDescription, description: SubscriptionDescription) -> bool:
        """Whether this consumer can get something of the shard's backlog, or has it under way."""
        attached = [consumer for consumer in description.consumers if consumer.shard == cursor.shard]
        mine = [consumer for consumer in attached if is_of_this_process(consumer.consumer)]
        if not mine:
            # It is about to be attached again.
            return True
        if self._wanted.type is Type.stream:
            # One consumer of a shard is active; the others get nothing.
            return any(consumer.active for consumer in mine)
        others = sum(consumer.unacked_messages for consumer in attached if consumer not in mine)
        return cursor.backlog_messages > others


def is_of_this_process(consumer: str) -> bool:
    """The name of a consumer is its host, which may be cut, its process and something random."""
    host, process, _random = consumer.rsplit("-", 2) if consumer.count("-") >= 2 else ("", "", "")
    return host != "" and socket.gethostname().startswith(host) and process == str(os.getpid())


async def _look(client: Client, wanted: Wanted) -> None:
    """Prints through a reader, which leaves no trace, what the subscription has before it.

    What was acknowledged out of order is printed too: only the floors of the cursors are known here.
    """
    from magnetar.client import EARLIEST, LATEST, MessageId, SubscriptionNotFound

    start: Position = wanted.start
    floors: dict[int, int] = {}
    with suppress(SubscriptionNotFound):
        # Also makes sure that there is a topic: opening a reader would create it.
        floors = {cursor.shard: cursor.floor for cursor in (await _describe(client, wanted)).shards}
    if floors:
        start = EARLIEST if len(floors) > 1 else MessageId(*next(iter(floors.items())))
    left = wanted.count
    async with client.reader(wanted.topic, start=start, stop=LATEST if wanted.no_wait else None) as reader:
        async for batch in reader.batches():
            check_stdout()
            floor = floors.get(batch.shard, 0)
            messages = [message for message in batch if (message.id.offset or 0) >= floor][:left]
            write(messages, wanted.shape)
            left = None if left is None else left - len(messages)
            if left == 0:
                return


def check_stdout() -> None:
    """Raises BrokenPipeError if nobody reads stdout any more, before something is taken that nobody will see."""
    poll = select.poll()
    poll.register(sys.stdout.fileno(), 0)
    if any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0)):
        raise BrokenPipeError


def write(messages: Sequence[Message], shape: Shape) -> None:
    """Prints a group at once: a write a message would cost more than all the rest."""
    if shape is Shape.raw:
        data = b"".join(message.payload + b"\n" for message in messages)
    else:
        data = "".join(json.dumps(describe(message)) + "\n" for message in messages).encode()
    if data:
        sys.stdout.buffer.write(data)
        sys.stdout.buffer.flush()


def describe(message: Message) -> dict[str, Any]:
    """A message as JSON: text as text, other bytes as base64."""
    described: dict[str, Any] = {"id": str(message.id), "key": message.key}
    if isinstance(message.key, bytes):
        described["key"] = None
        described["key_base64"] = base64.b64encode(message.key).decode()
    try:
        described["payload"] = message.payload.decode()
    except UnicodeDecodeError:
        described["payload_base64"] = base64.b64encode(message.payload).decode()
    described["properties"] = dict(message.properties)
    described["event_time"] = message.event_time.isoformat() if message.event_time else None
    described["publish_time"] = message.publish_time.isoformat()
    described["redelivery_count"] = message.redelivery_count
    return described
