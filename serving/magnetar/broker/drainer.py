"""Hands over all shards of a broker that is to have none, for as long as that is wished.

The wish is a key in metadata: it outlives the broker, which begins anew where it stopped. A shard goes to the broker
that should have it among the others; so many at a time; what fails is tried again. Nothing is handed over while no
other broker could take it.
"""

from __future__ import annotations

import asyncio
import random

import structlog

from magnetar.broker.cluster_view import ClusterView, LiveBroker
from magnetar.broker.mover import Mover
from magnetar.broker.ownership import Ownership
from magnetar.broker.refusals import refusal_of
from magnetar.broker.served import ServedShards
from magnetar.metadata.backoff import Backoff
from magnetar.metadata.shards import ShardNotFound

DRAINED_AT_ONCE = 8
"""Shards: each pauses its producers for a moment, and few at a time pause for less long."""

log = structlog.get_logger("magnetar.drain")


class Drainer:
    """See the module. `changed` is to be called when brokers, wishes or owners may be others than before."""

    def __init__(
        self,
        broker_id: str,
        ownership: Ownership,
        view: ClusterView,
        served: ServedShards,
        mover: Mover,
        rng: random.Random,
    ) -> None:
        self._broker_id = broker_id
        self._ownership = ownership
        self._view = view
        self._served = served
        self._mover = mover
        self._rng = rng
        self._changed = asyncio.Event()

    def changed(self) -> None:
        self._changed.set()

    async def run(self) -> None:
        """Until it is cancelled; what is being handed over then goes on."""
        backoff = Backoff(self._rng)
        while True:
            await self._changed.wait()
            self._changed.clear()
            while self._view.drained(self._broker_id) and (shards := self._shards()):
                if await self._hand_over(shards):
                    backoff = Backoff(self._rng)
                else:
                    await asyncio.sleep(backoff.next_s())

    def _shards(self) -> set[int]:
        """That are this broker's, open or not, and that another one could take."""
        shards = {shard.shard_id for shard in self._served} | set(self._ownership.mine())
        return {shard_id for shard_id in shards if self._target(shard_id) is not None}

    def _target(self, shard_id: int) -> LiveBroker | None:
        """Never another broker that is being drained: the two would hand it to each other for ever."""
        target = self._ownership.successor(shard_id)
        return None if target is None or self._view.drained(target.owner.broker_id) else target

    async def _hand_over(self, shards: set[int]) -> bool:
        """Whether one of them at least is another broker's."""
        slots = asyncio.Semaphore(DRAINED_AT_ONCE)

        async def one(shard_id: int) -> bool:
            async with slots:
                return self._view.drained(self._broker_id) and await self._give(shard_id)

        log.info("draining", broker=self._broker_id, shards=len(shards))
        return any(await asyncio.gather(*map(one, sorted(shards))))

    async def _give(self, shard_id: int) -> bool:
        target = self._target(shard_id)
        if target is None:
            return False
        try:
            await self._mover.give_away(shard_id, target, "the broker is being drained")
        except ShardNotFound:
            return True
        except Exception as error:
            if refusal_of(error) is None:
                log.exception("handing a shard over failed", shard=shard_id)
            else:
                log.warning("shard was not handed over", shard=shard_id, problem=str(error))
            return False
        return True
