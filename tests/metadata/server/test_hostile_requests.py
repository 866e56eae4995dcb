"""Bytes of all kinds on every method: the server refuses what is no request, serves the others, and goes on."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import grpc
import pytest
from google.protobuf.message import DecodeError
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from metadata_process import MetadataProcess

from magnetar.etcd import etcd_pb2 as pb

WAIT_S = 30.0

VALID: dict[str, list[Any]] = {
    "KV/Range": [pb.RangeRequest(key=b"a", range_end=b"b", limit=3, revision=1, sort_order=2, sort_target=4)],  # type: ignore[arg-type]
    "KV/Put": [pb.PutRequest(key=b"a", value=b"1", lease=7, want_previous=True, ignore_lease=True)],
    "KV/DeleteRange": [pb.DeleteRangeRequest(key=b"a", range_end=b"b", want_previous=True)],
    "KV/Txn": [
        pb.TxnRequest(
            compare=[pb.Compare(key=b"a", target=3, result=1, value=b"1", range_end=b"c")],  # type: ignore[arg-type]
            success=[pb.RequestOp(put=pb.PutRequest(key=b"b")), pb.RequestOp(range=pb.RangeRequest(key=b"b"))],
            failure=[
                pb.RequestOp(txn=pb.TxnRequest(success=[pb.RequestOp(delete_range=pb.DeleteRangeRequest(key=b"q"))]))
            ],
        )
    ],
    "KV/Compact": [pb.CompactionRequest(revision=1, physical=True)],
    "Lease/LeaseGrant": [pb.LeaseGrantRequest(id=9, ttl=-5), pb.LeaseGrantRequest(ttl=10)],
    "Lease/LeaseRevoke": [pb.LeaseRevokeRequest(id=9)],
    "Lease/LeaseTimeToLive": [pb.LeaseTimeToLiveRequest(id=9, keys=True)],
    "Lease/LeaseLeases": [pb.LeaseLeasesRequest()],
    "Cluster/MemberList": [pb.MemberListRequest(linearizable=True)],
    "Maintenance/Alarm": [pb.AlarmRequest(action=2, alarm=1)],  # type: ignore[arg-type]
    "Maintenance/Status": [pb.StatusRequest()],
    "Watch/Watch": [
        pb.WatchRequest(create=pb.WatchCreateRequest(key=b"a", range_end=b"z", start_revision=1, filters=[0, 1])),  # type: ignore[list-item]
        pb.WatchRequest(cancel=pb.WatchCancelRequest(watch_id=3)),
        pb.WatchRequest(progress=pb.WatchProgressRequest()),
    ],
    "Lease/LeaseKeepAlive": [pb.LeaseKeepAliveRequest(id=9)],
}
STREAMS = ("Watch/Watch", "Lease/LeaseKeepAlive")
FAULTS = {grpc.StatusCode.UNKNOWN, grpc.StatusCode.INTERNAL, grpc.StatusCode.UNAVAILABLE}


@pytest.fixture(scope="module")
def process(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MetadataProcess]:
    process = MetadataProcess(tmp_path_factory.mktemp("hostile") / "data")
    process.start()
    yield process
    process.kill()


@pytest.fixture(scope="module")
def channel(process: MetadataProcess) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(process.address) as channel:
        yield channel


@st.composite
def mutated(draw: st.DrawFn, method: str) -> bytes:
    """A valid message with some bytes changed, cut, repeated or put in."""
    data = bytearray(draw(st.sampled_from(VALID[method])).SerializeToString())
    for _ in range(draw(st.integers(1, 4))):
        place = draw(st.integers(0, max(0, len(data) - 1)))
        match draw(st.sampled_from(["change", "cut", "repeat", "insert"])):
            case "change" if data:
                data[place] = draw(st.integers(0, 255))
            case "cut":
                del data[place:]
            case "repeat":
                data += data[:place]
            case _:
                data[place:place] = draw(st.binary(max_size=8))
    return bytes(data)


def outcome(channel: grpc.Channel, method: str, data: bytes) -> grpc.RpcError | None:
    """How a call with this one request ended; a stream is given up after its first answer."""
    path = f"/etcdserverpb.{method}"
    try:
        if method not in STREAMS:
            channel.unary_unary(path)(data, timeout=WAIT_S)
            return None
        call = channel.stream_stream(path)(iter([data, b"\xff"]), timeout=WAIT_S)
        for _ in call:
            pass
    except grpc.RpcError as error:
        return error
    return None


def parses(method: str, data: bytes) -> bool:
    try:
        type(VALID[method][0]).FromString(data)
    except DecodeError:
        return False
    return True


@pytest.mark.parametrize("method", VALID)
@settings(max_examples=100, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_whatever_is_sent_is_answered_or_refused(channel: grpc.Channel, method: str, data: st.DataObject) -> None:
    sent = data.draw(st.binary(max_size=60) | mutated(method))
    error = outcome(channel, method, sent)
    if error is not None:
        assert error.code() not in FAULTS, error
        assert not any(word in error.details() for word in ("Error", "Exception", "Traceback", "object at")), error
    if method in STREAMS or not parses(method, sent):
        assert error is not None
        assert error.code() is grpc.StatusCode.INVALID_ARGUMENT, error


def test_afterwards_the_server_is_well(channel: grpc.Channel, process: MetadataProcess) -> None:
    put = pb.PutRequest(key=b"well", value=b"1").SerializeToString()
    assert outcome(channel, "KV/Put", put) is None
    log = process.log.read_text()
    assert log.count("\n") == 1, log


def test_a_message_beyond_the_limit_is_refused(channel: grpc.Channel) -> None:
    error = outcome(channel, "KV/Put", pb.PutRequest(key=b"a", value=bytes(3 << 20)).SerializeToString())
    assert error is not None
    assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


def test_a_transaction_nested_without_end_is_refused(channel: grpc.Channel) -> None:
    request = pb.TxnRequest()
    for _ in range(45):
        request = pb.TxnRequest(success=[pb.RequestOp(txn=request)])
    assert outcome(channel, "KV/Txn", request.SerializeToString()) is None
    data = b""
    for _ in range(500):
        inner = b"\x22" + varint(len(data)) + data
        data = b"\x12" + varint(len(inner)) + inner
    error = outcome(channel, "KV/Txn", data)
    assert error is not None
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT


def varint(number: int) -> bytes:
    encoded = bytearray()
    while number > 127:
        encoded.append(number & 127 | 128)
        number >>= 7
    return bytes([*encoded, number])


def test_a_transaction_of_very_many_operations_holds_up_nobody_for_long(channel: grpc.Channel) -> None:
    deletes = [
        pb.RequestOp(delete_range=pb.DeleteRangeRequest(key=b"x%05d" % i, range_end=b"x%05d~" % i)) for i in range(64)
    ]
    puts = [pb.RequestOp(put=pb.PutRequest(key=b"y%05d" % i)) for i in range(64)]
    nested = pb.TxnRequest(success=deletes, failure=puts)
    many = pb.TxnRequest(success=[pb.RequestOp(txn=nested)] * 64)
    error = outcome(channel, "KV/Txn", many.SerializeToString())
    assert error is not None
    assert error.details() == "etcdserver: duplicate key given in txn request"
