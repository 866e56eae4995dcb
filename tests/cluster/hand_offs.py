"""What tests of hand-offs ask a cluster for."""

from __future__ import annotations

import grpc.aio

from magnetar.client.sync import Client
from magnetar.v1 import admin_pb2


def owners(client: Client, topic: str) -> dict[int, str | None]:
    """Each shard of a topic and the broker that its record names."""
    return {shard.shard: shard.owner for shard in client.admin.topics.describe(topic).shards}


async def move(channel: grpc.aio.Channel, shard: int, broker: str) -> None:
    """Returns when the shard is served there. Raises AioRpcError if it is not, or if that is not known."""
    request = admin_pb2.MoveShardRequest(shard_id=shard, to_broker_id=broker, reason="a test").SerializeToString()
    await channel.unary_unary("/magnetar.v1.AdminService/MoveShard")(request)
