"""What is asked of etcd, and what is believed of its answers."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from magnetar.etcd import etcd_pb2 as pb
from magnetar.metadata.etcd_codec import (
    ALL_KEYS,
    PAGE_BYTES,
    PAGE_KEYS_MAX,
    BadAnswer,
    StoreIdentity,
    change,
    get_result,
    next_page_keys,
    parse,
    prefix_range,
    range_request,
    range_result,
    txn_request,
    txn_result,
)
from magnetar.metadata.etcd_watch import WatchCanceled, WatchPosition
from magnetar.metadata.store import (
    Change,
    Delete,
    DeletePrefix,
    KeyValue,
    MetadataError,
    Put,
    RangeResult,
    TxnResult,
    created_at,
    exists,
)

HEADER = pb.ResponseHeader(cluster_id=7, member_id=1, revision=9)


def pair(key: bytes = b"k", value: bytes = b"v", created: int = 3, changed: int = 5) -> pb.KeyValue:
    return pb.KeyValue(key=key, value=value, create_revision=created, mod_revision=changed, version=1)


def test_the_bytes_of_a_transaction_are_etcds() -> None:
    request = txn_request([exists("a"), created_at("b", 3)], [Put("c", b"v", 9), Delete("d"), DeletePrefix("e/")])
    assert request.SerializeToString() == bytes.fromhex(
        "0a09"  "08031002" "1a0161" "3000"
        "0a07"  "1001" "1a0162" "2803"
        "120a" "1208" "0a0163" "120176" "1809"
        "1205" "1a03" "0a0164"
        "120a" "1a08" "0a02652f" "12026530"
    )  # fmt: skip


def test_a_transaction_without_operations_carries_a_linearizable_read_either_way() -> None:
    request = txn_request([exists("a")], [])
    for branch in (request.success, request.failure):
        assert [operation.range.serializable for operation in branch] == [False]


@given(st.text(max_size=4), st.text(max_size=4))
def test_a_prefix_is_a_range_of_exactly_its_keys(prefix: str, key: str) -> None:
    start, end = prefix_range(prefix)
    encoded = key.encode()
    inside = start <= encoded and (end == ALL_KEYS or encoded < end) if key else False
    assert inside == (bool(key) and key.startswith(prefix) and key >= "\0")


@pytest.mark.parametrize(
    ("prefix", "after", "key"), [("a/", "", b"a/"), ("a/", "a/x", b"a/x\0"), ("b", "a", b"b"), ("", "a", b"a\0")]
)
def test_a_range_begins_after_the_key_it_goes_on_from(prefix: str, after: str, key: bytes) -> None:
    assert range_request(prefix, after, 10).key == key


def test_pages_are_sized_by_what_the_page_before_weighed() -> None:
    small = [KeyValue("k", b"", 1, 1)] * 64
    large = [KeyValue("k", bytes(PAGE_BYTES), 1, 1)] * 3
    middle = [KeyValue("k", bytes(PAGE_BYTES // 100), 1, 1)] * 64
    assert next_page_keys(64, small) == 256
    assert next_page_keys(PAGE_KEYS_MAX, small) == PAGE_KEYS_MAX
    assert next_page_keys(64, large) == 1
    assert 90 <= next_page_keys(64, middle) <= 100


@pytest.mark.parametrize(
    "answer",
    [
        pb.RangeResponse(header=HEADER, kvs=[pair(b"other")]),
        pb.RangeResponse(header=HEADER, kvs=[pair(), pair()]),
        pb.RangeResponse(header=HEADER, kvs=[pair(created=0)]),
        pb.RangeResponse(header=HEADER, kvs=[pair(created=6)]),
        pb.RangeResponse(header=HEADER, kvs=[pair(changed=10)]),
        pb.RangeResponse(header=HEADER, kvs=[pair(b"")]),
        pb.RangeResponse(header=HEADER, more=True),
    ],
)
def test_an_answer_about_a_key_that_cannot_be_is_not_believed(answer: pb.RangeResponse) -> None:
    with pytest.raises(BadAnswer):
        get_result(answer, "k")


@pytest.mark.parametrize(
    "answer",
    [
        pb.RangeResponse(header=HEADER, kvs=[pair(b"a/2"), pair(b"a/1")]),
        pb.RangeResponse(header=HEADER, kvs=[pair(b"a/2"), pair(b"a/2")]),
        pb.RangeResponse(header=HEADER, kvs=[pair(b"b")]),
        pb.RangeResponse(header=HEADER, kvs=[pair(b"a/0")]),
        pb.RangeResponse(header=HEADER, kvs=[pair(b"a/%d" % i) for i in range(1, 6)]),
        pb.RangeResponse(header=HEADER, more=True),
    ],
)
def test_a_page_that_cannot_be_is_not_believed(answer: pb.RangeResponse) -> None:
    with pytest.raises(BadAnswer):
        range_result(answer, "a/", "a/0", 4)


@pytest.mark.parametrize(
    "answer",
    [
        pb.TxnResponse(header=HEADER, succeeded=True),
        pb.TxnResponse(header=HEADER, responses=[pb.ResponseOp(put=pb.PutResponse())]),
        pb.TxnResponse(header=HEADER, succeeded=True, responses=[pb.ResponseOp(range=pb.RangeResponse())]),
    ],
)
def test_the_outcome_of_another_transaction_is_not_believed(answer: pb.TxnResponse) -> None:
    with pytest.raises(BadAnswer):
        txn_result(answer, txn_request([], [Put("a", b"")]))


def test_a_key_of_another_program_is_an_error_that_says_so() -> None:
    with pytest.raises(MetadataError, match="not Magnetar's"):
        get_result(pb.RangeResponse(header=HEADER, kvs=[pair(b"\xff")]), "k")


def test_the_first_answer_settles_which_store_it_is() -> None:
    identity = StoreIdentity()
    identity.check(HEADER)
    identity.check(HEADER)
    with pytest.raises(BadAnswer, match="another etcd cluster"):
        identity.check(pb.ResponseHeader(cluster_id=8, revision=9))
    with pytest.raises(BadAnswer, match="not an etcd"):
        identity.check(pb.ResponseHeader())


def test_a_store_that_went_back_in_time_is_not_believed() -> None:
    identity = StoreIdentity()
    identity.check_revision(pb.ResponseHeader(revision=9), asked_at=0)
    asked_at = identity.revision
    identity.check_revision(pb.ResponseHeader(revision=12), asked_at)
    identity.check_revision(pb.ResponseHeader(revision=10), asked_at)  # asked before 12 was known
    assert identity.revision == 12
    with pytest.raises(BadAnswer, match="back in time"):
        identity.check_revision(pb.ResponseHeader(revision=11), asked_at=12)
    with pytest.raises(BadAnswer, match="no revision"):
        identity.check_revision(pb.ResponseHeader(), asked_at=0)


PAIRS = st.builds(
    pb.KeyValue,
    key=st.one_of(st.binary(max_size=4), st.sampled_from([b"k", b"k/1"])),
    value=st.binary(max_size=4),
    create_revision=st.integers(-2, 12),
    mod_revision=st.integers(-2, 12),
)
HEADERS = st.one_of(st.none(), st.builds(pb.ResponseHeader, cluster_id=st.integers(0, 8), revision=st.integers(-1, 12)))
ANSWERS: dict[Any, st.SearchStrategy[Any]] = {
    pb.RangeResponse: st.builds(pb.RangeResponse, header=HEADERS, kvs=st.lists(PAIRS, max_size=3), more=st.booleans()),
    pb.TxnResponse: st.builds(
        pb.TxnResponse,
        header=HEADERS,
        succeeded=st.booleans(),
        responses=st.lists(st.sampled_from([pb.ResponseOp(), pb.ResponseOp(put=pb.PutResponse())]), max_size=3),
    ),
    pb.WatchResponse: st.builds(
        pb.WatchResponse,
        header=HEADERS,
        watch_id=st.integers(-1, 1),
        created=st.booleans(),
        canceled=st.booleans(),
        compact_revision=st.sampled_from([0, 0, 5]),
        fragment=st.booleans(),
        events=st.lists(st.builds(pb.Event, type=st.sampled_from([0, 1, 9]), kv=PAIRS), max_size=3),
    ),
}


def believe(kind: Any, data: bytes) -> Any:
    """What an answer of these bytes is taken for, or None."""
    request = txn_request([], [Put("k", b"")])
    try:
        answer: Any = parse(data, kind.FromString)
        StoreIdentity().check(answer.header)
        if kind is pb.WatchResponse:
            return WatchPosition("k", 4).on_answer(answer)
        StoreIdentity().check_revision(answer.header, 5)
        return txn_result(answer, request) if kind is pb.TxnResponse else range_result(answer, "k", "k", 2)
    except (BadAnswer, MetadataError, WatchCanceled):
        return None


@pytest.mark.parametrize("kind", list(ANSWERS), ids=lambda kind: kind.DESCRIPTOR.name)
@given(data=st.data())
@settings(max_examples=150)
def test_bytes_that_are_no_answer_never_become_one(kind: Any, data: st.DataObject) -> None:
    sent = data.draw(st.one_of(st.binary(max_size=60), ANSWERS[kind].map(lambda answer: answer.SerializeToString())))
    believed = believe(kind, sent)
    if isinstance(believed, RangeResult):
        assert believed.revision >= 5
        assert [item.key for item in believed.items] == sorted({item.key for item in believed.items})
        assert all(item.key.startswith("k") and item.key > "k" for item in believed.items)
        assert all(1 <= item.create_revision <= item.mod_revision <= believed.revision for item in believed.items)
    elif isinstance(believed, TxnResult):
        assert believed.revision >= 5
        assert not believed.succeeded or b"\x12\x00" in sent  # a put's answer


def test_a_change_is_what_became_of_the_key() -> None:
    put = pb.Event(type=pb.Event.EVENT_TYPE_PUT, kv=pair())
    delete = pb.Event(type=pb.Event.EVENT_TYPE_DELETE, kv=pb.KeyValue(key=b"k", mod_revision=6))
    assert change(put) == Change("k", KeyValue("k", b"v", 3, 5), 5)
    assert change(delete) == Change("k", None, 6)
