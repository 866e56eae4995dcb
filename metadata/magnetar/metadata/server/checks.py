"""What a request must be before it is evaluated: etcd's rules, in etcd's order. Pure."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable

from magnetar.etcd.etcd_pb2 import DeleteRangeRequest, PutRequest, RangeRequest, RequestOp, TxnRequest
from magnetar.metadata.server.refusals import Reason, Refusal
from magnetar.metadata.sqlite_tables import Span, span_of_key

REQUEST_BYTES_MAX = 1536 << 10
TXN_OPERATIONS_MAX = 128


def span_of(key: bytes, range_end: bytes) -> Span:
    """The keys that a request's `key` and `range_end` name."""
    if not range_end:
        return span_of_key(key)
    return Span(key, None if range_end == b"\0" else range_end)


def check_range(request: RangeRequest) -> None:
    if not request.key:
        raise Refusal(Reason.EMPTY_KEY)


def check_put(request: PutRequest) -> None:
    if not request.key:
        raise Refusal(Reason.EMPTY_KEY)
    if request.ignore_value and request.value:
        raise Refusal(Reason.VALUE_PROVIDED)
    if request.ignore_lease and request.lease:
        raise Refusal(Reason.LEASE_PROVIDED)


def check_delete(request: DeleteRangeRequest) -> None:
    if not request.key:
        raise Refusal(Reason.EMPTY_KEY)


def check_txn(request: TxnRequest) -> None:
    _check_txn(request, TXN_OPERATIONS_MAX)
    _check_overlaps(request.success)
    _check_overlaps(request.failure)


def check_size(data: bytes) -> None:
    if len(data) > REQUEST_BYTES_MAX:
        raise Refusal(Reason.REQUEST_TOO_LARGE)


def is_read_only(request: TxnRequest) -> bool:
    """As etcd judges it: a nested transaction counts as a change."""
    return all(
        operation.WhichOneof("request") == "range"
        for operations in (request.success, request.failure)
        for operation in operations
    )


def _check_txn(request: TxnRequest, operations_max: int) -> None:
    size = max(len(request.compare), len(request.success), len(request.failure))
    if size > operations_max:
        raise Refusal(Reason.TOO_MANY_OPERATIONS)
    if not all(compare.key for compare in request.compare):
        raise Refusal(Reason.EMPTY_KEY)
    for operations in (request.success, request.failure):
        for operation in operations:
            _check_operation(operation, operations_max - size)


def _check_operation(operation: RequestOp, operations_max: int) -> None:
    match operation.WhichOneof("request"):
        case "range":
            check_range(operation.range)
        case "put":
            check_put(operation.put)
        case "delete_range":
            check_delete(operation.delete_range)
        case "txn":
            _check_txn(operation.txn, operations_max)
        case _:
            raise Refusal(Reason.KEY_NOT_FOUND)


class _Spans:
    """A union of spans."""

    def __init__(self) -> None:
        self.lows: list[bytes] = []
        self.highs: list[bytes] = []
        self.to_the_end: bytes | None = None
        """Every key from here on is in it."""

    def add(self, span: Span) -> None:
        low, high = span
        if high is None:
            self.to_the_end = low if self.to_the_end is None else min(low, self.to_the_end)
            return
        if high <= low:
            return
        first = bisect_left(self.highs, low)
        last = bisect_right(self.lows, high)
        if first < last:
            low, high = min(low, self.lows[first]), max(high, self.highs[last - 1])
        self.lows[first:last] = [low]
        self.highs[first:last] = [high]

    def update(self, other: _Spans) -> None:
        for span in zip(other.lows, other.highs, strict=True):
            self.add(Span(*span))
        if other.to_the_end is not None:
            self.add(Span(other.to_the_end, None))

    def __contains__(self, key: bytes) -> bool:
        place = bisect_right(self.lows, key) - 1
        return (place >= 0 and key < self.highs[place]) or (self.to_the_end is not None and key >= self.to_the_end)


def _check_overlaps(operations: Iterable[RequestOp]) -> tuple[set[bytes], _Spans]:
    """Refuses a key that is put twice, or put and deleted. Returns what is put and what is deleted.

    etcd overlooks a put under a deletion without an end; applied in that order, some of those take it down. Here they
    overlap like any other.
    """
    puts: set[bytes] = set()
    deletes = _Spans()
    for operation in operations:
        if operation.HasField("delete_range"):
            deletes.add(span_of(operation.delete_range.key, operation.delete_range.range_end))
    for operation in operations:
        if operation.HasField("txn"):
            then_puts, then_deletes = _check_overlaps(operation.txn.success)
            else_puts, else_deletes = _check_overlaps(operation.txn.failure)
            # Only one of the two branches is taken: they may put the same key.
            if not puts.isdisjoint(then_puts | else_puts) or any(key in deletes for key in then_puts | else_puts):
                raise Refusal(Reason.DUPLICATE_KEY)
            puts |= then_puts | else_puts
            deletes.update(then_deletes)
            deletes.update(else_deletes)
    for operation in operations:
        if operation.HasField("put"):
            if operation.put.key in puts or operation.put.key in deletes:
                raise Refusal(Reason.DUPLICATE_KEY)
            puts.add(operation.put.key)
    return puts, deletes
