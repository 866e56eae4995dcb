"""What parses requests of strangers: the native runtime, which bounds how deep a message may be nested."""

from __future__ import annotations

import pytest
from google.protobuf.internal import api_implementation
from google.protobuf.message import DecodeError

from magnetar.etcd.etcd_pb2 import TxnRequest
from magnetar.v1.broker_pb2 import ResolveRequest

DEPTH = 2_000


def varint(number: int) -> bytes:
    out = bytearray()
    while number > 0x7F:
        out.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes([*out, number])


def within(field: int, data: bytes) -> bytes:
    return bytes([field << 3 | 2]) + varint(len(data)) + data


def test_messages_are_parsed_by_the_native_runtime() -> None:
    assert api_implementation.Type() == "upb"


def test_a_message_that_is_nested_too_deeply_is_refused_and_nothing_else() -> None:
    success = TxnRequest.DESCRIPTOR.fields_by_name["success"]
    (again,) = (field for field in success.message_type.fields if field.message_type is TxnRequest.DESCRIPTOR)
    data = b""
    for _ in range(DEPTH):
        data = within(success.number, within(again.number, data))
    with pytest.raises(DecodeError):
        TxnRequest.FromString(data)


def test_fields_of_a_later_version_are_passed_over() -> None:
    known = ResolveRequest(topic="orders").SerializeToString()
    later = varint(500 << 3 | 2) + varint(3) + b"new"
    assert ResolveRequest.FromString(later + known).topic == "orders"
