"""A shard is handed from one living broker to the other: what producers and consumers see, and who dies in between."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import grpc
import pytest
from broker_world import KEYSPACE, TOPIC, Calls, Cluster, ProduceClient, batch, eventually, refusal
from consume_world import QUEUE, STREAM, ConsumeClient

from magnetar.broker import balancing, mover
from magnetar.broker.balancer import BrokerLoad
from magnetar.broker.broker import Broker
from magnetar.broker.hand_off import Expectation, Source, Step
from magnetar.broker.layout import preferred_broker
from magnetar.broker.loads import ShardLoad
from magnetar.broker.members import Members
from magnetar.metadata.codec import encode_drain
from magnetar.metadata.records import Drain, LedgerState, ShardRecord
from magnetar.metadata.shards import ShardMetadata
from magnetar.metadata.store import Compare, Operation, Put, TxnResult
from magnetar.node.rpc import Refused
from magnetar.v1 import admin_pb2, common_pb2

NOT_OWNER = common_pb2.ERROR_REASON_NOT_OWNER
UNAVAILABLE = common_pb2.ERROR_REASON_UNAVAILABLE
SHARDS = 24
Connect = Callable[[Broker], Calls]


class Pair:
    """Broker a serves all shards of a topic, and b none."""

    def __init__(self, cluster: Cluster, a: Broker, b: Broker, shards: dict[int, int], connect: Connect) -> None:
        self.cluster = cluster
        self.a = a
        self.b = b
        self.slots = shards
        self.shard = next(iter(shards))
        self.connect = connect

    async def metadata(self) -> ShardMetadata:
        return await ShardMetadata.load(self.cluster.store, KEYSPACE, self.shard)

    async def record(self) -> ShardRecord:
        return (await self.metadata()).record

    async def move(self, to: Broker, through: Broker | None = None) -> admin_pb2.MoveShardResponse:
        request = admin_pb2.MoveShardRequest(shard_id=self.shard, to_broker_id=to.settings.id, reason="a test")
        return await self.connect(through or self.a).admin("MoveShard", request, admin_pb2.MoveShardResponse)

    def batch(self, last: int) -> bytes:
        return batch(last, last - 1, slot=self.slots[self.shard])


@pytest.fixture
async def pair(cluster: Cluster, connect: Connect) -> Pair:
    a = await cluster.start_broker("a")
    topic = await connect(a).create_topic(shards=SHARDS)
    for shard in topic.shards:
        await a.shard(TOPIC, shard.shard_id)
    b = await cluster.start_broker("b")
    await eventually(lambda: len(a.view.brokers()) == len(b.view.brokers()) == 2)
    return Pair(cluster, a, b, {shard.shard_id: shard.first_slot for shard in topic.shards}, connect)


# --- what a target does about what it hears ---


@pytest.mark.parametrize(
    ("told", "recorded", "source", "step"),
    [
        (None, False, None, Step.WAIT),
        (None, False, Source.GIVING, Step.WAIT),
        (None, False, Source.NOT_GIVING, Step.CLAIM),
        (None, False, Source.SILENT, Step.FENCE),
        (False, False, None, Step.CLAIM),
        (False, False, Source.SILENT, Step.CLAIM),
        (True, False, None, Step.ACCEPT),
        (True, True, Source.SILENT, Step.ACCEPT),
        (None, True, None, Step.ACCEPT),
        (None, True, Source.SILENT, Step.ACCEPT),
        (False, True, None, Step.ACCEPT),
    ],
)
def test_a_target_never_fences_what_it_was_given_or_told_about(
    told: bool | None, recorded: bool, source: Source | None, step: Step
) -> None:
    assert Expectation(told, recorded, source).next_step() is step


# --- what is not open ---


async def test_a_shard_that_is_not_open_passes_by_one_transaction_and_stays_closed(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    a, b = pair.a, pair.b
    async with ProduceClient(pair.connect(a)) as client:
        await client.open(pair.shard)
        await client.publish(*(pair.batch(i) for i in range(3)))
        await client.answers(3)
    for broker in (a, b):
        monkeypatch.setattr(broker._takeovers, "want", lambda shards: None)
    shard = a.served.get(pair.shard)
    assert shard is not None
    shard.log.abandon()
    a.served.remove(shard)
    before = await pair.record()
    sent: list[object] = []
    store_txn = pair.cluster.store.txn

    async def txn(compares: Sequence[Compare], operations: Sequence[Operation]) -> TxnResult:
        sent.append(operations)
        return await store_txn(compares, operations)

    monkeypatch.setattr(pair.cluster.store, "txn", txn)
    await pair.move(b)
    after = await pair.metadata()
    assert (after.record.owner, after.epoch) == (b.ownership.session, before.epoch + 1)
    assert {ledger.state for ledger in after.ledgers.values()} == {LedgerState.IN_RECOVERY}
    assert len(sent) == 1
    assert a.served.get(pair.shard) is b.served.get(pair.shard) is None
    assert not a.served.loading(pair.shard)
    async with ProduceClient(pair.connect(b)) as client:
        assert (await client.open(pair.shard)).last_sequence == 2


async def test_who_wants_a_shard_while_it_passes_unopened_is_sent_to_its_new_owner(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    a, b = pair.a, pair.b
    monkeypatch.setattr(a._takeovers, "want", lambda shards: None)
    shard = a.served.get(pair.shard)
    assert shard is not None
    await shard.close()
    a.served.remove(shard)
    await a.ownership.claim(pair.shard, preferred_or_not=True)
    [target] = [broker for broker in a.view.brokers() if broker.owner.broker_id == "b"]
    moving = asyncio.create_task(a._mover.give_away(pair.shard, target, "a test"))
    await asyncio.sleep(0)
    assert a.served.loading(pair.shard)
    with pytest.raises(Refused) as refused:
        await a.served.open(pair.shard)
    assert (refused.value.reason, refused.value.owner) == (NOT_OWNER, b.address)
    await moving
    assert (await pair.record()).owner == b.ownership.session


# --- what clients see ---


async def test_a_producer_is_told_of_the_new_owner_after_its_answers_and_goes_on_there(pair: Pair) -> None:
    a, b = pair.a, pair.b
    async with ProduceClient(pair.connect(a)) as client:
        await client.open(pair.shard)
        await client.publish(*(pair.batch(i) for i in range(20)))
        moving = asyncio.create_task(pair.move(b))
        error = await client.error()
        assert (error.error.reason, error.error.owner) == (NOT_OWNER, b.address)
        stored = len(client.stored)
    # Whoever comes to the target before the shard waits there.
    async with ProduceClient(pair.connect(b)) as client:
        assert (await client.open(pair.shard)).last_sequence == stored - 1
        await client.publish(*(pair.batch(i) for i in range(stored, 25)))
        assert [answer[3] for answer in await client.answers(25 - stored)] == list(range(stored, 25))
    assert (await moving).from_broker_id == "a"
    assert a.served.get(pair.shard) is None


async def test_a_busy_shard_is_passed_on_with_a_ledger_and_nothing_to_recover(pair: Pair) -> None:
    before = await pair.record()
    async with ProduceClient(pair.connect(pair.a)) as client:
        await client.open(pair.shard)
        await client.publish(pair.batch(0))
        await client.answers(1)
    await pair.move(pair.b, through=pair.b)
    metadata = await pair.metadata()
    assert metadata.record.owner == pair.b.ownership.session
    assert metadata.record.epoch == before.epoch + 1
    assert [ledger.state for ledger in metadata.ledgers.values()] == [LedgerState.OPEN]
    assert metadata.record.segments[-1].ledger_id in metadata.ledgers
    # There and back: what nobody appended to is not kept.
    await pair.move(pair.a)
    metadata = await pair.metadata()
    assert [segment.messages for segment in metadata.record.segments] == [1]
    assert not metadata.ledgers
    assert metadata.record.epoch == before.epoch + 2


async def test_what_was_acknowledged_and_what_consumers_hold_is_delivered_to_nobody_else(pair: Pair) -> None:
    a, b = pair.a, pair.b
    async with ProduceClient(pair.connect(a)) as producer:
        await producer.open(pair.shard)
        await producer.publish(*(pair.batch(i) for i in range(10)))
        await producer.answers(10)
    async with ConsumeClient(pair.connect(a)) as first, ConsumeClient(pair.connect(a)) as second:
        await first.open(pair.shard, name="jobs", kind=QUEUE, consumer="first", messages=6)
        assert len(await first.offsets(6, batch_size=1)) == 6
        await second.open(pair.shard, name="jobs", kind=QUEUE, consumer="second", messages=0)
        assert not (await first.ack((0, 2), request_id=5)).HasField("error")  # type: ignore[union-attr]
        await pair.move(b)
        for client in (first, second):
            error = (await client.error()).error
            assert (error.reason, error.owner) == (NOT_OWNER, b.address)
    loop = asyncio.get_running_loop()
    shard = b.served.get(pair.shard)
    assert shard is not None
    shard._reunited_at = loop.time() + 3600
    async with ConsumeClient(pair.connect(b)) as second, ConsumeClient(pair.connect(b)) as first:
        await second.open(pair.shard, name="jobs", kind=QUEUE, consumer="second", messages=100)
        assert "taken over" in " ".join(shard.subscriptions["jobs"].describe().waiting_for)
        # With the other one everybody whom the former owner named is there: the wait ends at once.
        await first.open(pair.shard, name="jobs", kind=QUEUE, consumer="first", messages=0, held=[(2, 6)])
        assert sorted(await second.offsets(4, batch_size=1)) == [6, 7, 8, 9]


async def test_the_active_consumer_of_a_stream_stays_the_active_one(pair: Pair) -> None:
    a, b = pair.a, pair.b
    async with ConsumeClient(pair.connect(a)) as active, ConsumeClient(pair.connect(a)) as standby:
        assert (await active.open(pair.shard, name="audit", kind=STREAM, consumer="active")).active
        assert not (await standby.open(pair.shard, name="audit", kind=STREAM, consumer="standby")).active
        await pair.move(b)
        shard = b.served.get(pair.shard)
        assert shard is not None
        shard._reunited_at = asyncio.get_running_loop().time() + 3600
        async with ConsumeClient(pair.connect(b)) as standby_there, ConsumeClient(pair.connect(b)) as active_there:
            opening = asyncio.create_task(standby_there.open(pair.shard, name="audit", kind=STREAM, consumer="standby"))
            await eventually(lambda: "audit" in shard.subscriptions)
            assert (await active_there.open(pair.shard, name="audit", kind=STREAM, consumer="active")).active
            assert not (await opening).active


async def test_a_subscription_without_consumers_waits_for_nobody(pair: Pair) -> None:
    async with ConsumeClient(pair.connect(pair.a)) as client:
        await client.open(pair.shard, name="jobs", kind=QUEUE, consumer="gone")
        await client.close()
        await pair.move(pair.b)
    shard = pair.b.served.get(pair.shard)
    assert shard is not None
    async with ConsumeClient(pair.connect(pair.b)) as client:
        await client.open(pair.shard, name="jobs", kind=QUEUE, consumer="new")
        assert shard.subscriptions["jobs"]._reunion is None


# --- who dies in between, and what fails ---


async def test_a_target_whose_session_ended_gets_nothing_and_the_source_serves_on(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def ready(*_: Any) -> admin_pb2.ReceiveShardResponse:
        return admin_pb2.ReceiveShardResponse(session=999_999)

    monkeypatch.setattr(pair.a._mover, "_ask_target", ready)
    # A second one may find the shard not open yet, and pass it on as it is.
    monkeypatch.setattr(mover, "MOVE_ATTEMPTS", 1)
    async with ProduceClient(pair.connect(pair.a)) as client:
        await client.open(pair.shard)
        await client.publish(pair.batch(0))
        await client.answers(1)
        assert (await refusal(pair.move(pair.b))).reason == UNAVAILABLE
        assert (await client.error()).error.reason == NOT_OWNER
        assert (await client.open(pair.shard)).last_sequence == 0
    assert (await pair.record()).owner == pair.a.ownership.session


async def test_a_source_that_dies_before_the_transaction_is_fenced_without_waiting_for_its_lease(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    a, b = pair.a, pair.b
    monkeypatch.setattr(mover, "SILENCE_S", 0.05)
    shard = await a.shard(TOPIC, pair.shard)
    reached = asyncio.Event()

    async def hang(*_: Any) -> None:
        reached.set()
        await asyncio.Event().wait()

    async with ProduceClient(pair.connect(a)) as client:
        await client.open(pair.shard)
        await client.publish(pair.batch(0))
        await client.answers(1)
    monkeypatch.setattr(shard.log, "pass_on", hang)
    moving = asyncio.create_task(pair.move(b))
    await reached.wait()
    await pair.cluster.kill(a)
    async with ProduceClient(pair.connect(b)) as client:
        assert (await client.open(pair.shard)).last_sequence == 0
    assert b.view.living(a.ownership.session) is not None  # type: ignore[arg-type]
    moving.cancel()
    await asyncio.gather(moving, return_exceptions=True)


async def test_a_source_that_dies_after_the_transaction_leaves_a_shard_that_the_target_finds(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    a, b = pair.a, pair.b
    reached = asyncio.Event()

    async def hang(*_: Any) -> None:
        reached.set()
        await asyncio.Event().wait()

    async with ProduceClient(pair.connect(a)) as client:
        await client.open(pair.shard)
        await client.publish(pair.batch(0))
        await client.answers(1)
    monkeypatch.setattr(a._mover, "_tell", hang)
    moving = asyncio.create_task(pair.move(b))
    await reached.wait()
    epoch = (await pair.record()).epoch
    await pair.cluster.kill(a)
    async with ProduceClient(pair.connect(b)) as client:
        assert (await client.open(pair.shard)).last_sequence == 0
        await client.publish(pair.batch(1))
        assert await client.answers(1) == [(1, 1, 1, 1)]
    assert (await pair.record()).epoch == epoch
    moving.cancel()
    await asyncio.gather(moving, return_exceptions=True)


async def owner_among(brokers: list[Broker], shard_id: int) -> Broker:
    """Who serves the shard when it is asked for, after redirects."""
    for broker in brokers:
        with suppress(Refused):
            await broker.shard(TOPIC, shard_id)
            return broker
    pytest.fail("nobody serves the shard")


async def test_a_hand_off_that_is_cut_off_anywhere_loses_nothing(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """At one shard after the other it is cut off a few turns of the loop later."""
    monkeypatch.setattr(mover, "SILENCE_S", 0.05)
    a, b = pair.a, pair.b
    [target] = [broker for broker in a.view.brokers() if broker.owner.broker_id == "b"]
    for turns, shard_id in enumerate(pair.slots):
        pair.shard = shard_id
        async with ProduceClient(pair.connect(a)) as client:
            await client.open(shard_id)
            await client.publish(pair.batch(0))
            await client.answers(1)
        giving = asyncio.create_task(a._mover._give(await a.shard(TOPIC, shard_id), target, "a test"))
        for _ in range(4 * turns):
            await asyncio.sleep(0)
        giving.cancel()
        await asyncio.gather(giving, return_exceptions=True)
        await b.served.loaded(shard_id)
        owner = await owner_among([a, b], shard_id)
        async with ProduceClient(pair.connect(owner)) as client:
            assert (await client.open(shard_id)).last_sequence == 0
            await client.publish(pair.batch(1))
            assert await client.answers(1) == [(1, 1, 1, 1)]
        assert (await pair.record()).owner == owner.ownership.session


async def test_what_cannot_be_moved_says_why(pair: Pair) -> None:
    calls = pair.connect(pair.a)
    for request, words in (
        (admin_pb2.MoveShardRequest(shard_id=pair.shard, to_broker_id="c"), "no such broker"),
        (admin_pb2.MoveShardRequest(shard_id=999, to_broker_id="b"), "no such shard"),
    ):
        error = await refusal(calls.admin("MoveShard", request, admin_pb2.MoveShardResponse))
        assert error.reason == common_pb2.ERROR_REASON_INVALID_ARGUMENT
        assert words in error.message
    assert (await pair.move(pair.a)).from_broker_id == "a"


# --- draining ---


async def drain(calls: Calls, broker: str, dry_run: bool = False) -> admin_pb2.DrainBrokerResponse:
    request = admin_pb2.DrainBrokerRequest(broker_id=broker, dry_run=dry_run)
    return await calls.admin("DrainBroker", request, admin_pb2.DrainBrokerResponse)


async def states(calls: Calls) -> dict[str, tuple[str, int]]:
    response = await calls.admin("ListBrokers", admin_pb2.ListBrokersRequest(), admin_pb2.ListBrokersResponse)
    return {b.broker_id: (admin_pb2.BrokerState.Name(b.state)[13:], b.shards) for b in response.brokers}


async def test_a_drained_broker_hands_everything_over_and_takes_nothing_until_it_is_undrained(pair: Pair) -> None:
    a, b, calls = pair.a, pair.b, pair.connect(pair.b)
    planned = await drain(calls, "a", dry_run=True)
    assert (planned.shards, [(s.broker_id, s.shards) for s in planned.shares]) == (SHARDS, [("b", SHARDS)])
    assert (await states(calls))["a"] == ("SERVING", SHARDS)
    await drain(calls, "a")
    await eventually(lambda: len(b.served) == SHARDS and len(a.served) == 0)
    assert await states(calls) == {"a": ("DRAINING", 0), "b": ("SERVING", SHARDS)}
    await pair.connect(a).create_topic("public/default/later", shards=8)
    for shard in (await a.topics.get("public/default/later")).shards:
        with pytest.raises(Refused) as refused:
            await a.shard("public/default/later", shard.shard_id)
        assert (refused.value.reason, refused.value.owner) == (NOT_OWNER, b.address)
    assert "undrain" in (await refusal(pair.move(a, through=b))).message
    assert "no other broker" in (await refusal(drain(calls, "b"))).message
    assert "no such broker" in (await refusal(drain(calls, "c"))).message
    undrain = admin_pb2.UndrainBrokerRequest(broker_id="a")
    assert (await calls.admin("UndrainBroker", undrain, admin_pb2.UndrainBrokerResponse)).was_draining
    assert not (await calls.admin("UndrainBroker", undrain, admin_pb2.UndrainBrokerResponse)).was_draining
    await eventually(lambda: not a.view.drained("a"))
    mine = [
        shard.shard_id
        for shard in (await a.topics.get("public/default/later")).shards
        if preferred_broker(shard.shard_id, ["a", "b"]) == "a"
    ]
    await a.shard("public/default/later", mine[0])


async def test_of_two_drains_asked_for_at_once_one_is_tried_again_and_refused(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    both = asyncio.Barrier(2)
    drained = Members._drained

    async def read_together(self: Members) -> set[str]:
        found = await drained(self)
        await both.wait()
        return found

    monkeypatch.setattr(Members, "_drained", read_together)
    asked = [drain(pair.connect(pair.a), "b"), drain(pair.connect(pair.b), "a")]
    answers = await asyncio.gather(*asked, return_exceptions=True)
    assert sum(isinstance(answer, grpc.aio.AioRpcError) for answer in answers) == 1
    await eventually(lambda: pair.a.view.drained("a") != pair.a.view.drained("b"))


async def test_of_two_drained_brokers_neither_hands_to_the_other(pair: Pair) -> None:
    a, b = pair.a, pair.b
    wishes: list[Operation] = [Put(KEYSPACE.broker_drain(name), encode_drain(Drain(name))) for name in ("a", "b")]
    await pair.cluster.store.txn([], wishes)
    await eventually(lambda: all(one.view.drained(name) for one in (a, b) for name in ("a", "b")))
    assert a._drainer._shards() == b._drainer._shards() == set()
    assert a.ownership.successor(pair.shard) is not None, "one that stops hands over all the same"


async def test_the_wish_to_drain_a_broker_outlives_it(pair: Pair) -> None:
    await drain(pair.connect(pair.b), "a")
    await eventually(lambda: len(pair.b.served) == SHARDS)
    await pair.a.stop()
    pair.cluster.brokers.remove(pair.a)
    again = await pair.cluster.start_broker("a")
    assert again.view.drained("a")
    assert (await states(pair.connect(pair.b)))["a"] == ("DRAINING", 0)


# --- balancing ---


async def test_the_elected_broker_moves_a_busy_shard_and_a_failed_move_is_no_error(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    a, b = pair.a, pair.b
    leader, other = (a, b) if a._balancing._election.leader else (b, a)
    await eventually(lambda: leader._balancing._election.leader)
    assert not other._balancing._election.leader
    loads = dict.fromkeys(list(pair.slots)[:4], 100000.0)
    moved: list[int] = []

    async def report(_peers: object, broker: Any) -> BrokerLoad:
        served = {shard.shard_id for shard in (a if broker.owner.broker_id == "a" else b).served}
        mine = (ShardLoad(shard, load, 100.0) for shard, load in loads.items() if shard in served)
        return BrokerLoad(broker.owner.broker_id, tuple(mine))

    monkeypatch.setattr(balancing, "_reported", report)
    await leader._balancing.round()
    moved = [shard.shard_id for shard in b.served]
    assert sorted(moved) == list(loads)[:2]
    # Now they are even.
    await leader._balancing.round()
    assert [shard.shard_id for shard in b.served] == moved
    # The next loads are of shards that do not exist.
    loads.clear()
    loads.update(dict.fromkeys(range(9001, 9005), 100_000.0))

    async def wrong(_peers: object, broker: Any) -> BrokerLoad:
        mine = loads if broker.owner.broker_id == "a" else {}
        return BrokerLoad(broker.owner.broker_id, tuple(ShardLoad(s, load, 100.0) for s, load in mine.items()))

    monkeypatch.setattr(balancing, "_reported", wrong)
    await leader._balancing.round()
    assert leader.metrics.balancer_moves.labels("failed")._value.get() == 2


async def test_a_broker_reports_what_is_published_to_its_shards(pair: Pair) -> None:
    shard = pair.a.served.get(pair.shard)
    assert shard is not None
    loop = asyncio.get_running_loop()
    async with ProduceClient(pair.connect(pair.a)) as client:
        await client.open(pair.shard)
        pair.a._balancing._loads.sample(loop.time(), [(pair.shard, shard.published_bytes, shard.published_messages)])
        await client.publish(*(pair.batch(i) for i in range(50)))
        await client.answers(50)
    totals = [(pair.shard, shard.published_bytes, shard.published_messages)]
    pair.a._balancing._loads.sample(loop.time() + 60, totals)
    answer = await pair.connect(pair.a).admin(
        "ReportLoads", admin_pb2.ReportLoadsRequest(), admin_pb2.ReportLoadsResponse
    )
    [load] = answer.loads
    assert load.shard_id == pair.shard
    assert load.bytes_per_s > load.messages_per_s > 0


async def test_a_shard_that_nobody_owns_is_moved_to_where_it_is_wanted(pair: Pair) -> None:
    shard = await pair.a.shard(TOPIC, pair.shard)
    await shard.close()
    pair.a.served.remove(shard)
    assert (await pair.record()).owner is None
    assert (await pair.move(pair.b)).from_broker_id == ""
    assert pair.b.served.get(pair.shard) is not None
    assert (await pair.record()).owner == pair.b.ownership.session


async def test_an_owner_that_stands_still_is_fenced_by_a_move(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = pair.a, pair.b
    monkeypatch.setattr(mover, "SILENCE_S", 0.05)
    async with ProduceClient(pair.connect(a)) as client:
        await client.open(pair.shard)
        await client.publish(pair.batch(0))
        await client.answers(1)

    async def silent(*_: Any) -> Source:
        return Source.SILENT

    monkeypatch.setattr(b._mover, "_ask", silent)
    assert (await pair.move(b, through=b)).from_broker_id == "a"
    assert (await pair.record()).owner == b.ownership.session
    async with ProduceClient(pair.connect(b)) as client:
        assert (await client.open(pair.shard)).last_sequence == 0
