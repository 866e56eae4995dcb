"""What a broker refuses, inside the client, and how it becomes one of the public errors."""

from __future__ import annotations

from collections.abc import Mapping

from magnetar.client.errors import (
    AlreadyExists,
    ClusterUnavailable,
    ConsumerBusy,
    InvalidArgument,
    LedgerNotFound,
    MagnetarError,
    MessageTooLarge,
    NotAuthorized,
    OrderRefused,
    ProducerFenced,
    RetriableError,
    SubscriptionNotFound,
    TopicNotFound,
)
from magnetar.v1 import common_pb2

INVALID_ARGUMENT = common_pb2.ERROR_REASON_INVALID_ARGUMENT
NOT_OWNER = common_pb2.ERROR_REASON_NOT_OWNER
WRONG_SHARD = common_pb2.ERROR_REASON_WRONG_SHARD
OUT_OF_ORDER = common_pb2.ERROR_REASON_OUT_OF_ORDER
UNAVAILABLE = common_pb2.ERROR_REASON_UNAVAILABLE
UNSUPPORTED = common_pb2.ERROR_REASON_UNSUPPORTED_VERSION
PROTOCOL_VIOLATION = common_pb2.ERROR_REASON_PROTOCOL_VIOLATION

_PUBLIC: Mapping[int, type[MagnetarError]] = {
    common_pb2.ERROR_REASON_MALFORMED: InvalidArgument,
    common_pb2.ERROR_REASON_INVALID_ARGUMENT: InvalidArgument,
    common_pb2.ERROR_REASON_TOPIC_NOT_FOUND: TopicNotFound,
    common_pb2.ERROR_REASON_SUBSCRIPTION_NOT_FOUND: SubscriptionNotFound,
    common_pb2.ERROR_REASON_LEDGER_NOT_FOUND: LedgerNotFound,
    common_pb2.ERROR_REASON_ALREADY_EXISTS: AlreadyExists,
    common_pb2.ERROR_REASON_MESSAGE_TOO_LARGE: MessageTooLarge,
    common_pb2.ERROR_REASON_PRODUCER_FENCED: ProducerFenced,
    common_pb2.ERROR_REASON_CONSUMER_BUSY: ConsumerBusy,
    common_pb2.ERROR_REASON_NOT_AUTHORIZED: NotAuthorized,
    common_pb2.ERROR_REASON_UNSUPPORTED_VERSION: MagnetarError,
    common_pb2.ERROR_REASON_OFFSET_TRIMMED: InvalidArgument,
    common_pb2.ERROR_REASON_REFUSED: OrderRefused,
}
"""Final ones. Every other reason passes: reconnect, resolve again, wait."""

OF_ONE_BATCH = frozenset(
    {
        common_pb2.ERROR_REASON_MALFORMED,
        common_pb2.ERROR_REASON_INVALID_ARGUMENT,
        common_pb2.ERROR_REASON_MESSAGE_TOO_LARGE,
    }
)
"""Reasons that condemn a batch, not its producer, if a batch is named."""


class Refused(Exception):
    """A broker said no, or nothing: `reason` decides what to do.

    owner          address of the broker that serves the shard; empty: not known
    retry_after_s  what the broker asked for
    one_batch      it condemns a batch that is known, and nothing else
    """

    def __init__(
        self, reason: common_pb2.ErrorReason, message: str, *, owner: str = "", retry_after_s: float = 0.0
    ) -> None:
        super().__init__(message)
        self.reason = reason
        self.message = message
        self.owner = owner
        self.retry_after_s = retry_after_s
        self.one_batch = False

    @classmethod
    def of(cls, error: common_pb2.Error) -> Refused:
        return cls(error.reason, error.message, owner=error.owner, retry_after_s=error.retry_after_ms / 1000.0)

    @property
    def final(self) -> bool:
        """Trying again is no use."""
        return self.reason in _PUBLIC

    def public(self) -> MagnetarError:
        """The error that users see."""
        kind = _PUBLIC.get(self.reason)
        if kind is not None:
            return kind(self.message)
        if self.reason == UNAVAILABLE:
            return ClusterUnavailable(self.message)
        return RetriableError(self.message)


def unavailable(message: str) -> Refused:
    """Nobody answered, or the connection broke."""
    return Refused(UNAVAILABLE, message)
