"""What the requests of the KV service do to the tables, and what they answer. Synchronous; runs in the engine's thread.

The requests were checked by `checks`. What is refused here has changed nothing. The ids of an answer's header are
filled in by the caller.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, TypeAlias

from magnetar.etcd.etcd_pb2 import (
    CompactionRequest,
    CompactionResponse,
    Compare,
    DeleteRangeRequest,
    DeleteRangeResponse,
    KeyValue,
    PutRequest,
    PutResponse,
    RangeRequest,
    RangeResponse,
    RequestOp,
    ResponseHeader,
    ResponseOp,
    TxnRequest,
    TxnResponse,
)
from magnetar.metadata.server.checks import span_of
from magnetar.metadata.server.refusals import Reason, Refusal
from magnetar.metadata.sqlite_tables import Tables, Version

ANSWER_BYTES_MAX = 64 << 20
VERSION_OVERHEAD_BYTES = 64
"""Of a key and value in an answer, besides them."""

_SORT_KEYS: dict[int, Callable[[Version], Any]] = {
    RangeRequest.SORT_TARGET_KEY: lambda found: found.key,
    RangeRequest.SORT_TARGET_VERSION: lambda found: found.version,
    RangeRequest.SORT_TARGET_CREATE: lambda found: found.create_revision,
    RangeRequest.SORT_TARGET_MOD: lambda found: found.mod_revision,
    RangeRequest.SORT_TARGET_VALUE: lambda found: found.value,
}

_COMPARED: dict[int, Callable[[Compare, Version], tuple[Any, Any]]] = {
    Compare.COMPARE_TARGET_VERSION: lambda compare, found: (found.version, compare.version),
    Compare.COMPARE_TARGET_CREATE: lambda compare, found: (found.create_revision, compare.create_revision),
    Compare.COMPARE_TARGET_MOD: lambda compare, found: (found.mod_revision, compare.mod_revision),
    Compare.COMPARE_TARGET_VALUE: lambda compare, found: (found.value, compare.value),
    Compare.COMPARE_TARGET_LEASE: lambda compare, found: (found.lease_id, compare.lease),
}

_ABSENT = Version(b"", b"", 0, 0, 0, 0)


def to_key_value(version: Version) -> KeyValue:
    key, value, create_revision, mod_revision, number, lease_id = version
    return KeyValue(
        key=key,
        value=value,
        create_revision=create_revision,
        mod_revision=mod_revision,
        version=number,
        lease=lease_id,
    )


def run_range(tables: Tables, request: RangeRequest) -> RangeResponse:
    revision = _revision(tables)
    at = max(0, request.revision)
    if at > revision:
        raise Refusal(Reason.FUTURE_REVISION)
    if at and at < tables.compacted:
        raise Refusal(Reason.COMPACTED)
    span = span_of(request.key, request.range_end)
    response = RangeResponse(header=ResponseHeader(revision=revision))
    if request.count_only:
        response.count = tables.count(span, at=at)
        return response
    chooses = bool(
        request.sort_order
        or request.min_mod_revision
        or request.max_mod_revision
        or request.min_create_revision
        or request.max_create_revision
    )
    wanted = 0 if chooses or request.limit <= 0 else request.limit + 1
    by_value = request.sort_target == RangeRequest.SORT_TARGET_VALUE
    found = list(_bounded(tables.scan(span, at=at, limit=wanted, keys_only=request.keys_only and not by_value)))
    response.count = tables.count(span, at=at) if len(found) == wanted else len(found)
    found = _sorted(request, [version for version in found if _is_chosen(request, version)])
    if len(found) > request.limit > 0:
        del found[request.limit :]
        response.more = True
    for version in found:
        response.kvs.append(to_key_value(version._replace(value=b"") if request.keys_only else version))
    return response


def run_put(tables: Tables, request: PutRequest) -> PutResponse:
    if request.lease and request.lease not in tables.leases:
        raise Refusal(Reason.LEASE_NOT_FOUND)
    if (request.ignore_value or request.ignore_lease) and tables.get(request.key) is None:
        raise Refusal(Reason.KEY_NOT_FOUND)
    return _put(tables, request)


def run_delete(tables: Tables, request: DeleteRangeRequest) -> DeleteRangeResponse:
    deleted = tables.delete(span_of(request.key, request.range_end))
    header = ResponseHeader(revision=_revision(tables))
    previous = (to_key_value(version) for version in (deleted if request.want_previous else ()))
    return DeleteRangeResponse(header=header, deleted=len(deleted), previous=previous)


def run_txn(tables: Tables, request: TxnRequest) -> TxnResponse:
    plan = _plan(tables, request)
    # All of the checks, then all of the changes: a transaction is refused as a whole.
    operations = list(_flat(plan))
    for operation in operations:
        if operation.HasField("put"):
            _check_put(tables, operation.put)
    for operation in operations:
        if operation.HasField("range"):
            _check_revision(tables, operation.range.revision)
    with tables.all_or_nothing():  # An answer can grow too large after the first change.
        response = _apply(tables, plan)
    response.header.revision = _revision(tables)
    return response


def run_compact(tables: Tables, request: CompactionRequest) -> CompactionResponse:
    if request.revision <= tables.compacted:
        raise Refusal(Reason.COMPACTED)
    if request.revision > tables.revision:
        raise Refusal(Reason.FUTURE_REVISION)
    tables.compact(request.revision)
    return CompactionResponse(header=ResponseHeader(revision=tables.revision))


def _revision(tables: Tables) -> int:
    """Of the store as the running request sees it: its own changes are the next revision."""
    return tables.revision + tables.changed


def _bounded(versions: Iterator[Version]) -> Iterator[Version]:
    size_bytes = 0
    for version in versions:
        size_bytes += len(version.key) + len(version.value) + VERSION_OVERHEAD_BYTES
        if size_bytes > ANSWER_BYTES_MAX:
            raise Refusal(Reason.ANSWER_TOO_LARGE)
        yield version


def _is_chosen(request: RangeRequest, version: Version) -> bool:
    return (
        (not request.min_mod_revision or version.mod_revision >= request.min_mod_revision)
        and (not request.max_mod_revision or version.mod_revision <= request.max_mod_revision)
        and (not request.min_create_revision or version.create_revision >= request.min_create_revision)
        and (not request.max_create_revision or version.create_revision <= request.max_create_revision)
    )


def _sorted(request: RangeRequest, versions: list[Version]) -> list[Version]:
    """A target without an order is ascending; by key they are already."""
    order = request.sort_order
    sort_key = _SORT_KEYS.get(request.sort_target)
    if sort_key is None or (not order and request.sort_target == RangeRequest.SORT_TARGET_KEY):
        return versions
    if order not in (0, RangeRequest.SORT_ORDER_ASCEND, RangeRequest.SORT_ORDER_DESCEND):
        return versions
    return sorted(versions, key=sort_key, reverse=order == RangeRequest.SORT_ORDER_DESCEND)


def _put(tables: Tables, request: PutRequest) -> PutResponse:
    value, lease_id = request.value, request.lease
    if request.ignore_value or request.ignore_lease:
        before = tables.get(request.key) or _ABSENT
        value = before.value if request.ignore_value else value
        lease_id = before.lease_id if request.ignore_lease else lease_id
    previous = tables.put(request.key, value, lease_id)
    response = PutResponse(header=ResponseHeader(revision=_revision(tables)))
    if request.want_previous and previous is not None:
        response.previous.CopyFrom(to_key_value(previous))
    return response


# Transactions. All compares, the nested ones too, are judged before anything is changed: that gives the plan.

_Plan: TypeAlias = tuple[bool, list[tuple[RequestOp, "_Plan | None"]]]


def _plan(tables: Tables, request: TxnRequest) -> _Plan:
    """Whether it succeeds, and the operations to apply, with the plan of those that are transactions."""
    succeeded = all(_holds(tables, compare) for compare in request.compare)
    operations = request.success if succeeded else request.failure
    return succeeded, [
        (operation, _plan(tables, operation.txn) if operation.HasField("txn") else None) for operation in operations
    ]


def _flat(plan: _Plan) -> Iterator[RequestOp]:
    for operation, nested in plan[1]:
        if nested is None:
            yield operation
        else:
            yield from _flat(nested)


def _holds(tables: Tables, compare: Compare) -> bool:
    """A compare with a range holds if it holds for each of its keys; one with an absent key sees zeros."""
    nothing = True
    for version in tables.scan(span_of(compare.key, compare.range_end)):
        nothing = False
        if not _holds_for(compare, version):
            return False
    if nothing:
        # There is no way to write "no value", so a compare of values is false.
        return compare.target != Compare.COMPARE_TARGET_VALUE and _holds_for(compare, _ABSENT)
    return True


def _holds_for(compare: Compare, version: Version) -> bool:
    compared = _COMPARED.get(compare.target)
    found, wanted = compared(compare, version) if compared is not None else (0, 0)
    match compare.result:
        case Compare.COMPARE_RESULT_EQUAL:
            return bool(found == wanted)
        case Compare.COMPARE_RESULT_NOT_EQUAL:
            return bool(found != wanted)
        case Compare.COMPARE_RESULT_GREATER:
            return bool(found > wanted)
        case Compare.COMPARE_RESULT_LESS:
            return bool(found < wanted)
    return True


def _check_put(tables: Tables, request: PutRequest) -> None:
    if (request.ignore_value or request.ignore_lease) and tables.get(request.key) is None:
        raise Refusal(Reason.KEY_NOT_FOUND)
    if request.lease and request.lease not in tables.leases:
        raise Refusal(Reason.LEASE_NOT_FOUND)


def _check_revision(tables: Tables, revision: int) -> None:
    if revision > tables.revision:
        raise Refusal(Reason.FUTURE_REVISION)
    if revision and revision < tables.compacted:
        raise Refusal(Reason.COMPACTED)


def _apply(tables: Tables, plan: _Plan) -> TxnResponse:
    succeeded, operations = plan
    response = TxnResponse(header=ResponseHeader(), succeeded=succeeded)
    for operation, nested in operations:
        if nested is not None:
            response.responses.append(ResponseOp(txn=_apply(tables, nested)))
        elif operation.HasField("range"):
            response.responses.append(ResponseOp(range=run_range(tables, operation.range)))
        elif operation.HasField("put"):
            response.responses.append(ResponseOp(put=_put(tables, operation.put)))
        else:
            response.responses.append(ResponseOp(delete_range=run_delete(tables, operation.delete_range)))
    return response
