"""Positions in a topic, as they are typed."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING

from magnetar.cli.command import EXIT_USAGE, CommandFailed

if TYPE_CHECKING:
    from magnetar.client import Position


def parse_position(text: str, *, message_ids: bool) -> Position:
    """earliest, latest, a time, which is UTC unless it says otherwise, or a message id. Raises CommandFailed."""
    from magnetar.client.errors import InvalidArgument
    from magnetar.client.message import MessageId
    from magnetar.client.positions import EARLIEST, LATEST

    if text in ("earliest", "latest"):
        return EARLIEST if text == "earliest" else LATEST
    if message_ids:
        try:
            return MessageId.parse(text)
        except InvalidArgument:
            pass
    try:
        time = datetime.fromisoformat(text)
        return time if time.tzinfo else time.replace(tzinfo=UTC)
    except ValueError:
        known = "earliest, latest, " + ("a message id such as 3:1200, " if message_ids else "")
        raise CommandFailed(
            f"not a position: {text!r}; use {known}or a time such as 2013-01-31T12:00:00Z", EXIT_USAGE
        ) from None
