"""Checks of what clients ask for, and the one place where this package's errors become answers."""

from __future__ import annotations

from magnetar.ledger.errors import LedgerError
from magnetar.managed_log.errors import LogError, LogReleased, OffsetTrimmed
from magnetar.metadata.shards import ClaimLost, OutcomeUnknown, OwnershipLost, StaleChange
from magnetar.metadata.store import MetadataError
from magnetar.node.rpc import Refused, invalid_argument, unavailable
from magnetar.v1 import common_pb2
from magnetar.wire.names import InvalidName, TopicName, check_name

RETRY_AFTER_MS = 100
"""Hint to clients for what usually passes soon."""


def topic_name(text: str) -> str:
    """`tenant/namespace/topic` for what a client calls a topic. Raises Refused(INVALID_ARGUMENT)."""
    try:
        return str(TopicName.parse(text))
    except InvalidName as error:
        raise invalid_argument(str(error)) from None


def checked_name(kind: str, value: str) -> str:
    """The name of a subscription, producer or consumer. Raises Refused(INVALID_ARGUMENT)."""
    try:
        return check_name(kind, value)
    except InvalidName as error:
        raise invalid_argument(str(error)) from None


def topic_not_found(topic: str) -> Refused:
    return Refused(
        common_pb2.ERROR_REASON_TOPIC_NOT_FOUND, f"the topic does not exist: create it first topic=`{topic}`"
    )


def topic_going(topic: str) -> Refused:
    return Refused(common_pb2.ERROR_REASON_TOPIC_NOT_FOUND, f"the topic is being deleted topic=`{topic}`")


def subscription_not_found(topic: str, name: str) -> Refused:
    return Refused(
        common_pb2.ERROR_REASON_SUBSCRIPTION_NOT_FOUND,
        f"the subscription does not exist: create it first topic=`{topic}` subscription=`{name}`",
    )


def not_owner(shard_id: int, owner: str = "", why: str = "another broker serves this shard") -> Refused:
    return Refused(
        common_pb2.ERROR_REASON_NOT_OWNER,
        f"{why}: resolve the topic again shard=`{shard_id}` owner=`{owner or 'unknown'}`",
        owner=owner,
        retry_after_ms=0 if owner else RETRY_AFTER_MS,
    )


def order_refused(message: str) -> Refused:
    """To an operator: what is asked for cannot be done, and why."""
    return Refused(common_pb2.ERROR_REASON_REFUSED, message)


def refusal_of(error: Exception) -> Refused | None:
    """The answer to an operating error that any request may meet; None for a fault of the program's own."""
    if isinstance(error, Refused):
        return error
    if isinstance(error, OffsetTrimmed):
        return Refused(common_pb2.ERROR_REASON_OFFSET_TRIMMED, f"{error}: go on at the start of the log")
    if isinstance(error, LogReleased):
        return Refused(
            common_pb2.ERROR_REASON_NOT_OWNER, f"{error}: resolve the topic again", retry_after_ms=RETRY_AFTER_MS
        )
    if isinstance(error, ClaimLost | OwnershipLost | StaleChange | OutcomeUnknown | LogError | LedgerError):
        return unavailable(str(error), retry_after_ms=RETRY_AFTER_MS)
    if isinstance(error, MetadataError):
        return unavailable(
            f"the metadata store does not answer: check that it runs, then try again cause=`{error}`",
            retry_after_ms=RETRY_AFTER_MS,
        )
    return None
