"""Moves shards between this broker and others by hand-off (`hand_off.py` has the protocol): the shell of both sides.

What is given away is a task of its own, whoever asked for it: a caller that goes away stops nothing. What is expected
is an opening like others (`served.py`), with a limit on how many.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass

import structlog

from magnetar.broker.cluster_view import ClusterView, LiveBroker
from magnetar.broker.describe import Records
from magnetar.broker.hand_off import SILENCE_S, Expectation, Source, Step
from magnetar.broker.metrics import BrokerMetrics
from magnetar.broker.ownership import Ownership
from magnetar.broker.peers import ADMIN_SERVICE, Peers
from magnetar.broker.refusals import RETRY_AFTER_MS, not_owner, topic_name
from magnetar.broker.served import CLOSE_ERRORS, CLOSE_S, Arrival, ServedShards
from magnetar.broker.shard import Consumers, ServedShard
from magnetar.broker.topics import Topics
from magnetar.managed_log.errors import LogReleased
from magnetar.managed_log.log import Inheritance
from magnetar.metadata.codec import decode_ledger, encode_ledger
from magnetar.metadata.records import LedgerRecord, Owner, ShardRecord
from magnetar.metadata.shards import ClaimLost, ShardMetadata
from magnetar.node.rpc import Context, Refused, invalid_argument, parse, unavailable
from magnetar.v1 import admin_pb2 as pb
from magnetar.v1 import common_pb2, metadata_pb2

GIVEN_MAX = 64
"""Shards given away at a time."""

EXPECTED_MAX = 64
"""Shards expected at a time; beyond it this broker takes no more for the moment."""

READY_S = 2.0
"""For a target to get ready. Nothing waits meanwhile."""

TAKE_S = 2 * CLOSE_S
"""For a target to serve what it was given."""

EXPECT_S = 2 * CLOSE_S
"""How long a shard is expected from a source that says it is about to come."""

TELLING_S = 0.1
"""For the source's words to come after a watch has shown that the shard is this broker's."""

MOVE_ATTEMPTS = 3

MOVE_S = READY_S + CLOSE_S + TAKE_S
"""For the owner of a shard to move it."""

log = structlog.get_logger("magnetar.hand_off")


class Incoming:
    """A shard that this broker expects."""

    def __init__(self, shard_id: int, topic: str, epoch: int, source: Owner, address: str) -> None:
        self.shard_id = shard_id
        self.topic = topic
        self.epoch = epoch
        self.source = source
        self.address = address
        self.expectation = Expectation()
        self.inheritance: Inheritance | None = None
        self.consumers: Consumers | None = None
        self.news = asyncio.Event()


@dataclass(frozen=True, slots=True)
class Moved:
    """`paused_s`: for how long the shard was not served, as its former owner saw it."""

    source: str
    paused_s: float = 0.0


class Mover:
    """The hand-offs of one broker. `open_again` has shards opened in the background that could not be passed on."""

    def __init__(
        self,
        broker_id: str,
        ownership: Ownership,
        view: ClusterView,
        served: ServedShards,
        topics: Topics,
        peers: Peers,
        records: Records,
        metrics: BrokerMetrics,
        open_again: Callable[[Iterable[int]], None],
    ) -> None:
        self.address = ""
        self._broker_id = broker_id
        self._ownership = ownership
        self._view = view
        self._served = served
        self._topics = topics
        self._peers = peers
        self._records = records
        self._metrics = metrics
        self._open_again = open_again
        self._given: dict[int, tuple[str, asyncio.Task[Moved]]] = {}
        self._incoming: dict[int, Incoming] = {}

    def methods(self) -> Mapping[str, Callable[[bytes, Context], Awaitable[bytes]]]:
        return {"MoveShard": self.move_shard, "ReceiveShard": self.receive_shard, "TakeShard": self.take_shard}

    def methods_of_a_stopping_broker(self) -> Mapping[str, Callable[[bytes, Context], Awaitable[bytes]]]:
        """What is answered to the end: a broker that stops gives its shards away."""
        return {"AskHandOff": self.ask_hand_off}

    async def stop(self) -> None:
        """What is expected is not waited for, what is being given goes on until it is done."""
        for incoming in self._incoming.values():
            incoming.expectation.told = False
            incoming.news.set()
        tasks = [task for _, task in self._given.values()]
        await asyncio.gather(*tasks, return_exceptions=True)

    # --- moving ---

    async def move_shard(self, data: bytes, _context: Context) -> bytes:
        """After a refusal the records are read again: the shard may be where it was to go, or changed hands."""
        request = parse(pb.MoveShardRequest, data)
        for _ in range(1 if request.passed_on else MOVE_ATTEMPTS):
            try:
                moved = await self._move(request)
            except Refused as refused:
                if refused.reason not in (common_pb2.ERROR_REASON_NOT_OWNER, common_pb2.ERROR_REASON_UNAVAILABLE):
                    raise
                failure = refused
            else:
                return pb.MoveShardResponse(from_broker_id=moved.source, paused_s=moved.paused_s).SerializeToString()
        raise failure

    async def _move(self, request: pb.MoveShardRequest) -> Moved:
        target = self._target(request.to_broker_id)
        metadata = await self._records.shard(request.shard_id)
        if metadata is None:
            raise invalid_argument(f"there is no such shard shard=`{request.shard_id}`")
        owner = metadata.record.owner
        source = None if owner is None else self._view.living(owner)
        if source is not None and source.owner == target.owner:
            return Moved(source.owner.broker_id)
        if source is not None and source.owner == self._ownership.session:
            return await self.give_away(request.shard_id, target, request.reason)
        if source is None and target.owner == self._ownership.session:
            await self._served.take(request.shard_id)
            return Moved("")
        if request.passed_on:
            raise not_owner(request.shard_id, "" if source is None else source.address)
        return await self._moved_by_another(request, source or target, metadata.record, target)

    def _target(self, broker_id: str) -> LiveBroker:
        found = next((broker for broker in self._view.brokers() if broker.owner.broker_id == broker_id), None)
        if found is None:
            raise invalid_argument(f"there is no such broker: see the list of brokers broker=`{broker_id}`")
        if found.leaving:
            raise invalid_argument(f"the broker is stopping: name another one broker=`{broker_id}`")
        if self._view.drained(broker_id):
            raise invalid_argument(f"the broker is being drained: undrain it first broker=`{broker_id}`")
        return found

    async def _moved_by_another(
        self, request: pb.MoveShardRequest, broker: LiveBroker, record: ShardRecord, target: LiveBroker
    ) -> Moved:
        """By the owner of the shard; by the target, if there is no living owner, or if the owner is silent."""
        passed_on = pb.MoveShardRequest(passed_on=True)
        passed_on.MergeFrom(request)
        if broker is not target and await self._ask(broker.address, request.shard_id) is Source.SILENT:
            log.warning("owner is silent", shard=request.shard_id, owner=broker.owner.broker_id)
            await self._ask_target(target, record, broker)
            waiting = pb.DescribeShardRequest(topic=record.topic, shard_id=record.shard_id)
            method = ADMIN_SERVICE + "DescribeShard"
            await self._peers.call(target.address, method, waiting, pb.DescribeShardResponse, timeout_s=TAKE_S)
            return Moved(broker.owner.broker_id)
        answer = await self._peers.call(
            broker.address, ADMIN_SERVICE + "MoveShard", passed_on, pb.MoveShardResponse, timeout_s=MOVE_S
        )
        return Moved(answer.from_broker_id, answer.paused_s)

    # --- giving ---

    async def give_away(self, shard_id: int, target: LiveBroker, reason: str) -> Moved:
        """Passes a shard of this broker on. One that is not open stays closed: one transaction, and the target owns it.

        Raises Refused, ShardNotFound, or an error of the store if it stays here, or if what became of it is not known.
        """
        if self._served.get(shard_id) is None:
            await self._served.loaded(shard_id)
        shard = self._served.get(shard_id)
        if shard is not None or self._served.loading(shard_id):
            return await self.give(shard or await self._served.open(shard_id), target, reason)
        await self._served.give(shard_id, target.owner, target.address)
        self._metrics.hand_offs.labels("unopened").inc()
        log.info("shard passed on unopened", shard=shard_id, to=target.owner.broker_id, reason=reason)
        return Moved(self._broker_id)

    def gives(self, shard_id: int) -> bool:
        """The shard is being passed on."""
        return shard_id in self._given

    async def give(self, shard: ServedShard, target: LiveBroker, reason: str) -> Moved:
        """Passes a shard that is served here on; on return the target serves it.

        Raises Refused if it stays here, or if it is not known what became of it.
        """
        known = self._given.get(shard.shard_id)
        if known is None:
            if len(self._given) >= GIVEN_MAX:
                raise unavailable("too many shards are being handed over: try again", retry_after_ms=RETRY_AFTER_MS)
            giving = asyncio.create_task(self._give(shard, target, reason), name=f"give shard {shard.shard_id}")
            self._given[shard.shard_id] = target.owner.broker_id, giving
            giving.add_done_callback(lambda done: self._gave(shard.shard_id, done))
        else:
            to, giving = known
            if to != target.owner.broker_id:
                raise unavailable(
                    f"the shard is being handed over to another broker shard=`{shard.shard_id}` to=`{to}`",
                    retry_after_ms=RETRY_AFTER_MS,
                )
        return await asyncio.shield(giving)

    def _gave(self, shard_id: int, giving: asyncio.Task[Moved]) -> None:
        del self._given[shard_id]
        if not giving.cancelled():
            giving.exception()  # Whoever waits has it; nobody may wait any more.

    async def _give(self, shard: ServedShard, target: LiveBroker, reason: str) -> Moved:
        facts = {"shard": shard.shard_id, "topic": shard.topic, "to": target.owner.broker_id, "reason": reason}
        session = self._ownership.session
        if session is None:
            raise unavailable("this broker has lost its session: it cannot hand over", retry_after_ms=RETRY_AFTER_MS)
        ready = await self._ask_target(target, shard.log.record, LiveBroker(session, self.address, ""))
        heir = Owner(target.owner.broker_id, ready.session)
        loop = asyncio.get_running_loop()
        began = loop.time()
        consumers = shard.consumers()
        told = pb.TakeShardRequest(shard_id=shard.shard_id, passed_on=True, consumers=_consumers_message(consumers))
        try:
            inheritance = await self._pass_on(shard, heir, target.address, _ledger_of(ready))
        except Refused:
            self._metrics.hand_offs.labels("stayed").inc()
            told.passed_on = False
            with suppress(Refused):
                await self._tell(target, told)
            raise
        if inheritance is not None:
            told.inheritance.CopyFrom(_inheritance_message(inheritance))
        passed_s = loop.time() - began
        with suppress(Refused):
            # It is the target's now, and the target knows by its watch.
            await self._tell(target, told)
        paused_s = loop.time() - began
        self._metrics.hand_offs.labels("passed on").inc()
        self._metrics.hand_off_pause.observe(paused_s)
        log.info("shard passed on", passed_s=round(passed_s, 4), paused_s=round(paused_s, 4), **facts)
        return Moved(self._broker_id, paused_s)

    async def _pass_on(
        self, shard: ServedShard, heir: Owner, address: str, ledger: LedgerRecord | None
    ) -> Inheritance | None:
        """The transaction. None: it is the heir's, and that is all that is known. Raises Refused if it is not."""
        try:
            async with asyncio.timeout(CLOSE_S):
                inheritance = await shard.pass_on(heir, address, ledger)
        except (*CLOSE_ERRORS, TimeoutError) as error:
            if isinstance(error, LogReleased) and error.released.owner == heir:
                return None
            log.warning("shard was not passed on", shard=shard.shard_id, problem=str(error) or "it took too long")
            self._open_again([shard.shard_id])
            raise unavailable(
                f"the shard could not be passed on: {error or 'it took too long'} shard=`{shard.shard_id}`",
                retry_after_ms=RETRY_AFTER_MS,
            ) from error
        finally:
            # Whatever happened, this broker does not serve it on: its next owner, if need be this one, opens it.
            shard.log.abandon()
            shard.release("the shard could not be passed on")
            self._served.remove(shard)
        return inheritance

    async def _ask_target(self, target: LiveBroker, record: ShardRecord, source: LiveBroker) -> pb.ReceiveShardResponse:
        """Has the target expect the shard. Raises Refused: nothing has happened then."""
        request = pb.ReceiveShardRequest(
            shard_id=record.shard_id,
            topic=record.topic,
            epoch=record.epoch,
            source=metadata_pb2.Owner(broker_id=source.owner.broker_id, session=source.owner.session),
            source_address=source.address,
        )
        return await self._peers.call(
            target.address, ADMIN_SERVICE + "ReceiveShard", request, pb.ReceiveShardResponse, timeout_s=READY_S
        )

    async def _tell(self, target: LiveBroker, told: pb.TakeShardRequest) -> None:
        method = ADMIN_SERVICE + "TakeShard"
        await self._peers.call(target.address, method, told, pb.TakeShardResponse, timeout_s=TAKE_S)

    async def ask_hand_off(self, data: bytes, _context: Context) -> bytes:
        request = parse(pb.AskHandOffRequest, data)
        if not request.to_broker_id:
            raise invalid_argument("the question names the broker that expects the shard")
        to, _ = self._given.get(request.shard_id, ("", None))
        under_way = to == request.to_broker_id and bool(to)
        return pb.AskHandOffResponse(under_way=under_way).SerializeToString()

    # --- receiving ---

    async def receive_shard(self, data: bytes, _context: Context) -> bytes:
        request = parse(pb.ReceiveShardRequest, data)
        session = self._ownership.require_session()
        topic = topic_name(request.topic)
        await self._topics.get(topic)
        await self._served.loaded(request.shard_id)
        ledger = await self._served.plan_ledger(request.shard_id, request.epoch + 1)
        self._check_expectable(request.shard_id)
        source = Owner(request.source.broker_id, request.source.session)
        incoming = Incoming(request.shard_id, topic, request.epoch + 1, source, request.source_address)
        self._incoming[request.shard_id] = incoming
        self._served.expect(request.shard_id, lambda: self._arrival(incoming))
        response = pb.ReceiveShardResponse(session=session.session)
        if ledger is not None:
            response.ledger.CopyFrom(_ledger_message(ledger))
        return response.SerializeToString()

    def _check_expectable(self, shard_id: int) -> None:
        """Raises Refused(UNAVAILABLE)."""
        if self._served.get(shard_id) is not None or self._served.loading(shard_id):
            raise unavailable(f"the shard is being opened here shard=`{shard_id}`", retry_after_ms=RETRY_AFTER_MS)
        if len(self._incoming) >= EXPECTED_MAX:
            raise unavailable("too many shards are expected here: try again", retry_after_ms=RETRY_AFTER_MS)

    async def take_shard(self, data: bytes, _context: Context) -> bytes:
        """Answered when the shard is served here."""
        request = parse(pb.TakeShardRequest, data)
        if not request.shard_id:
            raise invalid_argument("the message names the shard that it is about")
        consumers = {one.subscription: list(one.consumers) for one in request.consumers}
        incoming = self._incoming.get(request.shard_id)
        if incoming is not None:
            incoming.expectation.told = request.passed_on
            incoming.consumers = consumers
            if request.HasField("inheritance"):
                incoming.inheritance = _inheritance_of(request.inheritance)
            incoming.news.set()
        if request.passed_on:
            shard = await self._served.open(request.shard_id)
            if incoming is None:
                shard.await_consumers(consumers)
        return pb.TakeShardResponse().SerializeToString()

    def owners_changed(self, shards: Iterable[int]) -> None:
        """A watch says that these may have another owner."""
        for shard_id in shards:
            incoming = self._incoming.get(shard_id)
            if incoming is not None and self._view.recorded_owner(shard_id) == self._ownership.session:
                incoming.expectation.recorded = True
                incoming.news.set()

    async def _arrival(self, incoming: Incoming) -> tuple[ShardMetadata, Arrival | None]:
        """The shard, when it is this broker's; without an Arrival it was claimed. Raises as `Ownership.claim`."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + EXPECT_S
        expectation = incoming.expectation
        try:
            while (step := expectation.next_step()) is Step.WAIT and loop.time() < deadline:
                if not await _told_within(incoming, SILENCE_S):
                    expectation.source = await self._ask(incoming.address, incoming.shard_id)
            if step is Step.ACCEPT and expectation.told is None:
                await _told_within(incoming, TELLING_S)
            return await self._take(incoming, step)
        finally:
            del self._incoming[incoming.shard_id]

    async def _take(self, incoming: Incoming, step: Step) -> tuple[ShardMetadata, Arrival | None]:
        if step is Step.ACCEPT:
            try:
                metadata = await self._ownership.accept(incoming.shard_id, incoming.epoch)
                return metadata, Arrival(incoming.inheritance, incoming.consumers)
            except ClaimLost as error:
                log.info("shard was not passed on after all", shard=incoming.shard_id, problem=str(error))
        if step is Step.FENCE:
            self._metrics.hand_offs.labels("fenced").inc()
            return await self._ownership.claim_from(incoming.shard_id, incoming.source), None
        return await self._ownership.claim(incoming.shard_id), None

    async def _ask(self, address: str, shard_id: int) -> Source:
        request = pb.AskHandOffRequest(shard_id=shard_id, to_broker_id=self._broker_id)
        try:
            answer = await self._peers.call(
                address, ADMIN_SERVICE + "AskHandOff", request, pb.AskHandOffResponse, timeout_s=SILENCE_S
            )
        except Refused as refused:
            return Source.SILENT if refused.reason == common_pb2.ERROR_REASON_UNAVAILABLE else Source.NOT_GIVING
        return Source.GIVING if answer.under_way else Source.NOT_GIVING


async def _told_within(incoming: Incoming, seconds: float) -> bool:
    """Whether there was news."""
    with suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            await incoming.news.wait()
    told = incoming.news.is_set()
    incoming.news.clear()
    return told


# --- between messages and values ---


def _ledger_message(ledger: LedgerRecord) -> metadata_pb2.LedgerRecord:
    return metadata_pb2.LedgerRecord.FromString(encode_ledger(ledger))


def _ledger_of(ready: pb.ReceiveShardResponse) -> LedgerRecord | None:
    return decode_ledger(ready.ledger.SerializeToString()) if ready.HasField("ledger") else None


def _consumers_message(consumers: Consumers) -> list[pb.SubscriptionConsumers]:
    return [pb.SubscriptionConsumers(subscription=name, consumers=names) for name, names in consumers.items()]


def _inheritance_message(inheritance: Inheritance) -> pb.ShardInheritance:
    message = pb.ShardInheritance(last_time_us=inheritance.last_time_us, cursors=inheritance.cursors)
    if inheritance.cursor_ledger is not None:
        message.cursor_ledger.CopyFrom(_ledger_message(inheritance.cursor_ledger))
    return message


def _inheritance_of(message: pb.ShardInheritance) -> Inheritance:
    """Raises DamagedRecord."""
    ledger = decode_ledger(message.cursor_ledger.SerializeToString()) if message.HasField("cursor_ledger") else None
    return Inheritance(message.last_time_us, tuple(message.cursors), ledger)
