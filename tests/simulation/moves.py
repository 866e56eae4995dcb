"""An operator who moves shards between brokers, drains brokers and undrains them, at random and whatever happens."""

from __future__ import annotations

import asyncio
import random

from google.protobuf.message import Message
from grpc.aio import AioRpcError
from simulation.loop import Process
from simulation.rpc import SimulatedChannel
from simulation.world import World

from magnetar.broker.peers import ADMIN_SERVICE
from magnetar.v1 import admin_pb2

PAUSE_S = 0.5
CALL_S = 5.0
DRAINED = 0.1
"""Share of the calls that drain a broker or undrain it; the others move a shard."""


class Moves:
    """Works until it is stopped, and leaves no broker drained."""

    def __init__(self, world: World, shards: set[int], seed: int) -> None:
        self._world = world
        self._shards = sorted(shards)
        self._rng = random.Random(f"moves {seed}")
        self._stopping = False
        self._process = Process("operator")
        self.task = world.spawn(self._process, self._run(), "moves")
        self.moved = 0

    async def stop(self) -> None:
        self._stopping = True
        await self.task

    async def _run(self) -> None:
        brokers = self._world.brokers()
        while not self._stopping:
            await asyncio.sleep(self._rng.expovariate(1 / PAUSE_S))
            broker = self._rng.choice(brokers)
            if self._rng.random() >= DRAINED:
                shard = self._rng.choice(self._shards)
                request = admin_pb2.MoveShardRequest(shard_id=shard, to_broker_id=broker, reason="as it pleases")
                self.moved += await self._asked("MoveShard", request)
            elif self._rng.random() < 0.5:
                await self._asked("DrainBroker", admin_pb2.DrainBrokerRequest(broker_id=broker))
            else:
                await self._asked("UndrainBroker", admin_pb2.UndrainBrokerRequest(broker_id=broker))
        for broker in brokers:
            request = admin_pb2.UndrainBrokerRequest(broker_id=broker)
            while not await self._asked("UndrainBroker", request):  # noqa: ASYNC110  # waiting costs nothing
                await asyncio.sleep(PAUSE_S)

    async def _asked(self, method: str, request: Message) -> bool:
        """Whether a broker did it; what none did is left as it is."""
        address = self._world.address(self._rng.choice(self._world.brokers()))
        channel = SimulatedChannel(self._world.network, self._process, self._world.listeners, address)
        try:
            await channel.unary_unary(ADMIN_SERVICE + method)(request.SerializeToString(), timeout=CALL_S)
        except AioRpcError as error:
            self._world.transcript.note("operator", method, "failed:", error.details())
            return False
        return True
