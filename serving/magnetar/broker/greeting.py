"""The greeting of a stream: which protocol both sides speak."""

from __future__ import annotations

from magnetar.node.rpc import MESSAGE_BYTES_MAX, Refused
from magnetar.v1 import common_pb2

PROTOCOL_MIN = 1
PROTOCOL_MAX = 1


def greet(
    hello: common_pb2.Hello, *, node_id: str, cluster: str, max_message_bytes: int, address: str = ""
) -> common_pb2.HelloReply:
    """The answer to a client's greeting: the newest protocol both know. Raises Refused(UNSUPPORTED_VERSION)."""
    low, high = hello.protocol_min, hello.protocol_max
    if not (low <= high and low <= PROTOCOL_MAX and high >= PROTOCOL_MIN):
        raise Refused(
            common_pb2.ERROR_REASON_UNSUPPORTED_VERSION,
            f"no protocol in common: use a client of another version "
            f"client=`{low}-{high}` server=`{PROTOCOL_MIN}-{PROTOCOL_MAX}`",
        )
    return common_pb2.HelloReply(
        protocol=min(high, PROTOCOL_MAX),
        node_id=node_id,
        cluster=cluster,
        max_message_bytes=max_message_bytes,
        max_frame_bytes=MESSAGE_BYTES_MAX,
        address=address,
    )
