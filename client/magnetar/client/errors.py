"""What can go wrong, by what to do about it.

    MagnetarError
    ├── RetriableError            the cluster could not do it in time: do it again later
    │   └── ClusterUnavailable    no broker answered, or no confirmation came: the outcome may be unknown
    ├── InvalidArgument           the call is wrong: change it (also a ValueError)
    ├── MessageTooLarge           send less in one message
    ├── QueueFull                 wait for receipts, or use `send`, which waits for room
    ├── TopicNotFound
    ├── SubscriptionNotFound
    ├── LedgerNotFound
    ├── AlreadyExists
    ├── NotAuthorized
    ├── OrderRefused              not as things stand: the message says why, and what to change
    ├── ProducerFenced            a newer connection holds the producer's name: stop this one
    ├── EndOfTopic                a reader with stop=LATEST has given everything
    ├── ConsumerBusy              the subscription has another type, or its consumers another order: use another name
    └── ClientClosed              it was closed, never entered, or belongs to another process: connect again

The client retries what is retriable until its `timeout`, so RetriableError says that waiting was tried.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from magnetar.client.message import MessageId


class MagnetarError(Exception):
    """Everything this library raises on purpose, but TimeoutError for a wait whose `timeout` the caller gave.

    ids   from `send_many`: the id of each message in order, None where nothing was confirmed; empty otherwise
    """

    ids: Sequence[MessageId | None] = ()

    def again(self) -> Self:
        """The same error as a fresh object: one outcome is raised at many places, each with its own traceback."""
        return type(self)(*self.args)


class RetriableError(MagnetarError):
    """It could not be done within the client's timeout, for a reason that passes."""


class ClusterUnavailable(RetriableError):
    """No broker answered in time. For a message: the outcome is unknown, it may or may not be stored."""


class InvalidArgument(MagnetarError, ValueError):
    """The call asks for something that cannot be."""


class MessageTooLarge(MagnetarError):
    """Payload, key and properties of one message are too many bytes together. Nothing was sent."""


class QueueFull(MagnetarError):
    """`send_nowait` was called while `max_pending_bytes` wait for confirmation. Nothing was sent."""


class TopicNotFound(MagnetarError):
    """There is no such topic."""


class SubscriptionNotFound(MagnetarError):
    """There is no such subscription."""


class LedgerNotFound(MagnetarError):
    """There is no such ledger."""


class AlreadyExists(MagnetarError):
    """Something with this name exists."""


class NotAuthorized(MagnetarError):
    """These credentials do not allow it."""


class OrderRefused(MagnetarError):
    """What an administrator orders cannot be as things stand. Nothing was changed."""


class ProducerFenced(MagnetarError):
    """A newer connection took the producer's name. What was not confirmed may or may not be stored."""


class ConsumerBusy(MagnetarError):
    """The subscription exists with another type, or its consumers ask for another order."""


class EndOfTopic(MagnetarError):
    """A reader with `stop=LATEST` has given everything up to there. Iteration just ends."""


class ClientClosed(MagnetarError):
    """The client, producer or consumer is closed, was not entered with `with`, or belongs to a parent process."""
