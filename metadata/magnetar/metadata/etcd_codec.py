"""What is asked of etcd and what it answers, from and to the types of the store. Pure.

Nothing that an endpoint says is believed unseen: an answer that does not parse, names keys or revisions that cannot be,
or comes from another store than the answers before is a `BadAnswer`. It says nothing about the store.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol, TypeVar

from google.protobuf.message import DecodeError

from magnetar.etcd import etcd_pb2 as pb
from magnetar.metadata.store import (
    Change,
    Compare,
    CompareTarget,
    Delete,
    KeyValue,
    MetadataError,
    Operation,
    Put,
    RangeResult,
    TxnResult,
)

ALL_KEYS = b"\0"
PAGE_KEYS_FIRST = 64
PAGE_KEYS_MAX = 1_000
PAGE_BYTES = 1 << 20
"""What a page of a range should hold; a single pair may be more."""
REVISION_MAX = (1 << 63) - 1


class BadAnswer(Exception):
    """An answer that etcd would not give; the message says why."""


class Answer(Protocol):
    """Any message that answers a request."""

    @property
    def header(self) -> pb.ResponseHeader: ...


AnswerT = TypeVar("AnswerT", bound=Answer)


def parse(data: bytes, from_bytes: Callable[[bytes], AnswerT]) -> AnswerT:
    try:
        return from_bytes(data)
    except DecodeError as error:
        raise BadAnswer(f"it sent bytes that are no answer of etcd: bytes=`{len(data)}`") from error


class StoreIdentity:
    """Which store the answers come from, and how far it was seen to have come.

    The first answer settles the store. Reads are linearizable, so an answer whose revision is below one that was known
    when it was asked for comes from a store that was replaced or put back to an older state.
    """

    def __init__(self) -> None:
        self.cluster_id = 0
        self.revision = 0

    def check(self, header: pb.ResponseHeader) -> None:
        if not header.cluster_id:
            raise BadAnswer("it is not an etcd: its answer names no cluster")
        if self.cluster_id and header.cluster_id != self.cluster_id:
            raise BadAnswer(
                f"it belongs to another etcd cluster: name endpoints of one cluster only: "
                f"cluster=`{header.cluster_id:x}` expected=`{self.cluster_id:x}`"
            )
        self.cluster_id = header.cluster_id

    def check_revision(self, header: pb.ResponseHeader, asked_at: int) -> None:
        """`asked_at` is the revision that was known when the request was sent."""
        if header.revision < 1:
            raise BadAnswer(f"its answer has no revision: revision=`{header.revision}`")
        if header.revision < asked_at:
            raise BadAnswer(
                f"its store went back in time: if it was restored from a backup, restart what uses it: "
                f"revision=`{header.revision}` seen=`{asked_at}`"
            )
        self.revision = max(self.revision, header.revision)


# Ranges.


def prefix_range(prefix: str) -> tuple[bytes, bytes]:
    """The `key` and `range_end` of all keys that start with `prefix`.

    No byte of UTF-8 is 255, so the last one can always be counted up.
    """
    start = prefix.encode()
    if not start:
        return ALL_KEYS, ALL_KEYS
    return start, start[:-1] + bytes([start[-1] + 1])


def range_request(prefix: str, after: str, limit: int, revision: int = 0) -> pb.RangeRequest:
    """A page of the range, as of `revision`, 0 = now."""
    start, end = prefix_range(prefix)
    if after >= prefix and after:
        start = after.encode() + b"\0"
    return pb.RangeRequest(key=start, range_end=end, limit=limit, revision=revision)


def get_request(key: str) -> pb.RangeRequest:
    return pb.RangeRequest(key=key.encode())


def get_result(answer: pb.RangeResponse, key: str) -> KeyValue | None:
    items = [_key_value(kv) for kv in answer.kvs]
    if len(items) > 1 or answer.more or any(item.key != key for item in items):
        raise BadAnswer(f"it answered with other keys than it was asked for: key=`{key}` keys=`{len(items)}`")
    _check_revisions(items, answer.header.revision)
    return items[0] if items else None


def range_result(answer: pb.RangeResponse, prefix: str, after: str, limit: int) -> RangeResult:
    """One page."""
    items = tuple(_key_value(kv) for kv in answer.kvs)
    before = after
    for i, item in enumerate(items):
        if not item.key.startswith(prefix) or (item.key <= before and (i > 0 or before)):
            raise BadAnswer(f"it answered with keys out of the range or its order: prefix=`{prefix}` key=`{item.key}`")
        before = item.key
    if len(items) > limit or (answer.more and not items):
        raise BadAnswer(f"it answered with a page that cannot be: keys=`{len(items)}` limit=`{limit}`")
    _check_revisions(items, answer.header.revision)
    return RangeResult(items, answer.header.revision, answer.more)


def next_page_keys(asked: int, found: Sequence[KeyValue]) -> int:
    """How many keys to ask for so that a page holds about PAGE_BYTES, going by the page before."""
    size_bytes = sum(len(item.key) + len(item.value) for item in found)
    if not found or not size_bytes:
        return PAGE_KEYS_MAX
    return max(1, min(PAGE_KEYS_MAX, 4 * asked, PAGE_BYTES * len(found) // size_bytes))


# Transactions.


def txn_request(compares: Sequence[Compare], operations: Sequence[Operation]) -> pb.TxnRequest:
    request = pb.TxnRequest(compare=[_compare(c) for c in compares], success=[_operation(o) for o in operations])
    if not operations:
        # Without an operation a member compares what it has, which may be old. A linearizable read asks the leader.
        read = pb.RequestOp(range=pb.RangeRequest(key=ALL_KEYS, count_only=True))
        request.success.append(read)
        request.failure.append(read)
    return request


def txn_result(answer: pb.TxnResponse, request: pb.TxnRequest) -> TxnResult:
    branch = request.success if answer.succeeded else request.failure
    asked = [operation.WhichOneof("request") for operation in branch]
    answered = [response.WhichOneof("response") for response in answer.responses]
    if asked != answered:
        raise BadAnswer(f"it answered other operations than were sent: answers=`{len(answer.responses)}`")
    return TxnResult(answer.succeeded, answer.header.revision)


def _compare(compare: Compare) -> pb.Compare:
    equal = pb.Compare.COMPARE_RESULT_EQUAL if compare.equal else pb.Compare.COMPARE_RESULT_NOT_EQUAL
    key = compare.key.encode()
    if compare.target is CompareTarget.MOD:
        return pb.Compare(result=equal, target=pb.Compare.COMPARE_TARGET_MOD, key=key, mod_revision=compare.revision)
    return pb.Compare(result=equal, target=pb.Compare.COMPARE_TARGET_CREATE, key=key, create_revision=compare.revision)


def _operation(operation: Operation) -> pb.RequestOp:
    if isinstance(operation, Put):
        put = pb.PutRequest(key=operation.key.encode(), value=operation.value, lease=operation.lease_id)
        return pb.RequestOp(put=put)
    if isinstance(operation, Delete):
        return pb.RequestOp(delete_range=pb.DeleteRangeRequest(key=operation.key.encode()))
    start, end = prefix_range(operation.prefix)
    return pb.RequestOp(delete_range=pb.DeleteRangeRequest(key=start, range_end=end))


# Pairs and changes.


def change(event: pb.Event) -> Change:
    revision = event.kv.mod_revision
    if revision < 1:
        raise BadAnswer(f"its event has no revision: revision=`{revision}`")
    if event.type == pb.Event.EVENT_TYPE_DELETE:
        return Change(_key(event.kv.key), None, revision)
    if event.type != pb.Event.EVENT_TYPE_PUT:
        raise BadAnswer(f"its event is of no known type: type=`{event.type}`")
    return Change(_key(event.kv.key), _key_value(event.kv), revision)


def _key_value(kv: pb.KeyValue) -> KeyValue:
    if not 1 <= kv.create_revision <= kv.mod_revision:
        raise BadAnswer(
            f"its pair has impossible revisions: created=`{kv.create_revision}` changed=`{kv.mod_revision}`"
        )
    return KeyValue(_key(kv.key), kv.value, kv.create_revision, kv.mod_revision, kv.lease)


def _key(key: bytes) -> str:
    if not key:
        raise BadAnswer("it answered with an empty key")
    try:
        return key.decode()
    except UnicodeDecodeError as error:
        raise MetadataError(
            f"the metadata store holds a key that is not Magnetar's: use an etcd, or a cluster name, that no other "
            f"program writes under: key=`{key!r}`"
        ) from error


def _check_revisions(items: Sequence[KeyValue], revision: int) -> None:
    if any(item.mod_revision > revision for item in items):
        raise BadAnswer(f"its pair is newer than its store: revision=`{revision}`")
