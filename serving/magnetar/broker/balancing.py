"""The shell of the balancer: measures what this broker's shards take, and while it is the leader, has shards moved.

Every broker samples its loads and is a candidate. The leader asks all brokers that may have shards for theirs; if one
does not answer, nothing moves in that round. Leadership is a hint: two leaders for a moment move shards twice as often.
The leader also carries out what operators order (`shard_runner.py`), and balances nothing meanwhile.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress

import structlog

from magnetar.broker.balancer import Balancer, BrokerLoad, Move
from magnetar.broker.cluster_view import ClusterView, LiveBroker
from magnetar.broker.loads import Loads, ShardLoad
from magnetar.broker.metrics import BrokerMetrics
from magnetar.broker.mover import MOVE_S
from magnetar.broker.peers import ADMIN_SERVICE, Peers
from magnetar.broker.refusals import refusal_of
from magnetar.broker.served import ServedShards
from magnetar.broker.shard_runner import ShardRunner
from magnetar.metadata.election import Election
from magnetar.metadata.store import MetadataError
from magnetar.node.rpc import Context, Refused, parse
from magnetar.v1 import admin_pb2 as pb

SAMPLE_S = 5.0

RESIGN_S = 1.0
"""For the store to be told; without it the next leader is elected when the lease ends."""

ELECTION = "balancer"

log = structlog.get_logger("magnetar.balancer")


class Balancing:
    """See the module. `address` is this broker's own, once it listens."""

    def __init__(
        self,
        election: Election,
        view: ClusterView,
        served: ServedShards,
        peers: Peers,
        metrics: BrokerMetrics,
        runner: ShardRunner,
        interval_s: float | None,
    ) -> None:
        """`interval_s`: None balances nothing."""
        self.address = ""
        self._election = election
        self._view = view
        self._served = served
        self._peers = peers
        self._metrics = metrics
        self._runner = runner
        self._interval_s = interval_s
        self._loads = Loads()
        self._balancer = Balancer()

    def methods(self) -> Mapping[str, Callable[[bytes, Context], Awaitable[bytes]]]:
        return {"ReportLoads": self.report_loads}

    async def report_loads(self, data: bytes, _context: Context) -> bytes:
        parse(pb.ReportLoadsRequest, data)
        self._sample()
        loads = [
            pb.ShardLoad(shard_id=load.shard_id, bytes_per_s=load.bytes_per_s, messages_per_s=load.messages_per_s)
            for load in self._loads.report()
        ]
        return pb.ReportLoadsResponse(loads=loads).SerializeToString()

    async def measure(self) -> None:
        """Until it is cancelled."""
        while True:
            self._sample()
            await asyncio.sleep(SAMPLE_S)

    def _sample(self) -> None:
        """Also when loads are asked for: shards that came since the last time are among them then."""
        totals = [(s.shard_id, s.published_bytes, s.published_messages) for s in self._served]
        self._loads.sample(asyncio.get_running_loop().time(), totals)

    async def lead(self) -> None:
        """Until it is cancelled: waits to be the leader, and does what a leader does while it is."""
        try:
            while True:
                await self._election.campaign()
                log.info("this broker balances the cluster")
                duties = [
                    asyncio.create_task(self._runner.run(self._election.still_leader()), name="rebalance brokers"),
                    asyncio.create_task(self._balance(), name="balance"),
                ]
                try:
                    await self._election.wait_lost()
                finally:
                    for duty in duties:
                        duty.cancel()
                    await asyncio.gather(*duties, return_exceptions=True)
        finally:
            with suppress(MetadataError, TimeoutError):
                async with asyncio.timeout(RESIGN_S):
                    await self._election.resign()

    async def _balance(self) -> None:
        """Until it is cancelled."""
        self._balancer = Balancer()
        while self._interval_s is not None:
            await asyncio.sleep(self._interval_s)
            if self._runner.at_work:
                continue
            try:
                await self.round()
            except Exception:
                log.exception("balancing failed")

    async def round(self) -> None:
        """Moves what this round's loads ask for, one after the other."""
        try:
            loads = await measured_loads(self._view, self._peers)
        except Refused as refused:
            log.info("loads are not known: nothing moves", problem=refused.message)
            return
        for move in self._balancer.plan(loads, asyncio.get_running_loop().time()):
            if not self._election.leader:
                return
            await self._move(move)

    async def _move(self, move: Move) -> None:
        log.info("balancing", shard=move.shard_id, source=move.source, target=move.target, reason=move.reason)
        self._balancer.moved(move.shard_id, asyncio.get_running_loop().time())
        request = pb.MoveShardRequest(shard_id=move.shard_id, to_broker_id=move.target, reason=move.reason)
        try:
            method = ADMIN_SERVICE + "MoveShard"
            await self._peers.call(self.address, method, request, pb.MoveShardResponse, timeout_s=MOVE_S)
        except Exception as error:
            if refusal_of(error) is None:
                raise
            self._metrics.balancer_moves.labels("failed").inc()
            log.warning("shard was not moved", shard=move.shard_id, target=move.target, problem=str(error))
        else:
            self._metrics.balancer_moves.labels("done").inc()


async def measured_loads(view: ClusterView, peers: Peers) -> list[BrokerLoad]:
    """Of all brokers that may have shards. Raises Refused if one does not tell."""
    brokers = [b for b in view.brokers() if not b.leaving and not view.drained(b.owner.broker_id)]
    ordered = sorted(brokers, key=lambda b: b.owner.broker_id)
    return list(await asyncio.gather(*(_reported(peers, broker) for broker in ordered)))


async def _reported(peers: Peers, broker: LiveBroker) -> BrokerLoad:
    method = ADMIN_SERVICE + "ReportLoads"
    answer = await peers.call(broker.address, method, pb.ReportLoadsRequest(), pb.ReportLoadsResponse)
    loads = (ShardLoad(load.shard_id, load.bytes_per_s, load.messages_per_s) for load in answer.loads)
    return BrokerLoad(broker.owner.broker_id, tuple(loads))
