"""Where to begin in a topic: at its ends, at a message, at a time."""

from __future__ import annotations

from datetime import datetime
from enum import Enum
from typing import Final, Literal, TypeAlias

from magnetar.client.errors import InvalidArgument
from magnetar.client.message import MessageId, to_microseconds
from magnetar.v1 import metadata_pb2


class Edge(Enum):
    """The ends of what is stored. Use the names EARLIEST and LATEST."""

    EARLIEST = "earliest"
    LATEST = "latest"


EARLIEST: Final = Edge.EARLIEST
"""Everything that is still stored."""

LATEST: Final = Edge.LATEST
"""Only what comes from now on."""

Position: TypeAlias = Edge | MessageId | datetime
"""EARLIEST, LATEST, a message (which comes again, and moves its own shard only), or a publish time with a timezone."""

SubscriptionType: TypeAlias = Literal["stream", "queue"]


def start_position(position: Position) -> metadata_pb2.StartPosition:
    """The position as brokers read it. Raises InvalidArgument."""
    match position:
        case Edge():
            return metadata_pb2.StartPosition(earliest=position is EARLIEST)
        case MessageId(offset=None):
            raise InvalidArgument(f"this message id has no offset, its place is not known: id=`{position}`")
        case MessageId(offset=offset):
            return metadata_pb2.StartPosition(offset=offset)
        case datetime():
            return metadata_pb2.StartPosition(time_us=to_microseconds(position))
    raise InvalidArgument(
        f"a position is EARLIEST, LATEST, a MessageId or a datetime: type=`{type(position).__name__}`"
    )


def check_start(position: Position) -> metadata_pb2.StartPosition:
    """The start of a subscription, which is for all shards: not a message, which is in one. Raises InvalidArgument."""
    if isinstance(position, MessageId):
        raise InvalidArgument("a subscription starts at EARLIEST, LATEST or a time; seek() goes to a message")
    return start_position(position)
