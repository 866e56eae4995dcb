"""What the server refuses, in etcd's words: its clients compare status and text."""

from __future__ import annotations

from enum import Enum

from grpc import StatusCode

from magnetar.metadata.store import MetadataError
from magnetar.node.rpc import RefusedWithStatus


class Reason(Enum):
    EMPTY_KEY = (StatusCode.INVALID_ARGUMENT, "etcdserver: key is not provided")
    KEY_NOT_FOUND = (StatusCode.INVALID_ARGUMENT, "etcdserver: key not found")
    VALUE_PROVIDED = (StatusCode.INVALID_ARGUMENT, "etcdserver: value is provided")
    LEASE_PROVIDED = (StatusCode.INVALID_ARGUMENT, "etcdserver: lease is provided")
    TOO_MANY_OPERATIONS = (StatusCode.INVALID_ARGUMENT, "etcdserver: too many operations in txn request")
    DUPLICATE_KEY = (StatusCode.INVALID_ARGUMENT, "etcdserver: duplicate key given in txn request")
    REQUEST_TOO_LARGE = (StatusCode.INVALID_ARGUMENT, "etcdserver: request is too large")
    COMPACTED = (StatusCode.OUT_OF_RANGE, "etcdserver: mvcc: required revision has been compacted")
    FUTURE_REVISION = (StatusCode.OUT_OF_RANGE, "etcdserver: mvcc: required revision is a future revision")
    NO_SPACE = (StatusCode.RESOURCE_EXHAUSTED, "etcdserver: mvcc: database space exceeded")
    TOO_MANY_REQUESTS = (StatusCode.RESOURCE_EXHAUSTED, "etcdserver: too many requests")
    ANSWER_TOO_LARGE = (StatusCode.RESOURCE_EXHAUSTED, "etcdserver: answer is too large: set a limit")
    LEASE_NOT_FOUND = (StatusCode.NOT_FOUND, "etcdserver: requested lease not found")
    LEASE_EXISTS = (StatusCode.FAILED_PRECONDITION, "etcdserver: lease already exists")
    LEASE_TTL_TOO_LARGE = (StatusCode.OUT_OF_RANGE, "etcdserver: too large lease TTL")
    STOPPED = (StatusCode.UNAVAILABLE, "etcdserver: server stopped")
    DATABASE_FAILED = (StatusCode.UNAVAILABLE, "etcdserver: the metadata database failed: see the server's log")
    UNIMPLEMENTED = (StatusCode.UNIMPLEMENTED, "magnetar metadata does not implement this")


class Refusal(MetadataError, RefusedWithStatus):
    """A request that changes nothing."""

    def __init__(self, reason: Reason) -> None:
        RefusedWithStatus.__init__(self, *reason.value)
        self.reason = reason
