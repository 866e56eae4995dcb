"""Several brokers on one metadata store: crashes, hand-offs, lost sessions, and who wins when they meet."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import pytest
from broker_world import KEYSPACE, PATIENCE_S, TOPIC, Calls, Cluster, ProduceClient, batch, eventually
from consume_world import EARLIEST, LATEST, ConsumeClient

from magnetar.broker.broker import Broker
from magnetar.broker.layout import preferred_broker
from magnetar.broker.shard import ServedShard
from magnetar.ledger.client import Standing
from magnetar.metadata.records import LedgerState, ShardRecord
from magnetar.metadata.shards import ShardMetadata, ShardSnapshot
from magnetar.node.rpc import Refused
from magnetar.v1 import broker_pb2, common_pb2

NOT_OWNER = common_pb2.ERROR_REASON_NOT_OWNER
UNAVAILABLE = common_pb2.ERROR_REASON_UNAVAILABLE
Connect = Callable[[Broker], Calls]


class Gate:
    """A call that waits before it is made until it is let through."""

    def __init__(self, call: Callable[..., Awaitable[Any]]) -> None:
        self.reached, self.let_through = asyncio.Event(), asyncio.Event()
        self._call = call

    async def __call__(self, *arguments: Any, **named: Any) -> Any:
        self.reached.set()
        await self.let_through.wait()
        return await self._call(*arguments, **named)


class Pair:
    """Brokers a and b, and a topic with shards that each of them should serve."""

    def __init__(self, cluster: Cluster, a: Broker, b: Broker, shards: list[int]) -> None:
        self.cluster = cluster
        self.a = a
        self.b = b
        preferred = {preferred_broker(shard, ["a", "b"]): shard for shard in shards}
        self.of_a, self.of_b = preferred["a"], preferred["b"]

    async def record(self, shard_id: int) -> ShardRecord:
        return (await ShardMetadata.load(self.cluster.store, KEYSPACE, shard_id)).record


@pytest.fixture
async def pair(cluster: Cluster, connect: Connect) -> Pair:
    a, b = await cluster.start_broker("a"), await cluster.start_broker("b")
    await eventually(lambda: len(a.view.brokers()) == len(b.view.brokers()) == 2)
    topic = await connect(a).create_topic(shards=16)
    return Pair(cluster, a, b, [shard.shard_id for shard in topic.shards])


@pytest.fixture
async def late_pair(cluster: Cluster, connect: Connect) -> Pair:
    """Broker a serves everything, because b came later: also what b should have, and claims as soon as it may."""
    a = await cluster.start_broker("a")
    topic = await connect(a).create_topic(shards=16)
    for shard in topic.shards:
        await a.shard(TOPIC, shard.shard_id)
    b = await cluster.start_broker("b")
    await eventually(lambda: len(a.view.brokers()) == len(b.view.brokers()) == 2)
    return Pair(cluster, a, b, [shard.shard_id for shard in topic.shards])


async def slot_of(broker: Broker, shard_id: int) -> int:
    record = await broker.topics.get(TOPIC)
    return next(shard.first_slot for shard in record.shards if shard.shard_id == shard_id)


async def served_by(broker: Broker, shard_id: int) -> ServedShard:
    """The shard, opened if the broker has it at rest."""
    await eventually(lambda: broker.served.get(shard_id) is not None or shard_id in broker.served.at_rest)
    return await broker.shard(TOPIC, shard_id)


# --- a crash ---


async def test_what_a_crashed_broker_stored_is_served_by_another_one_with_its_producers_and_cursors(
    pair: Pair, connect: Connect
) -> None:
    a, b, shard = pair.a, pair.b, pair.of_a
    slot = await slot_of(a, shard)
    async with ProduceClient(connect(a)) as producer, ConsumeClient(connect(a)) as consumer:
        await producer.open(shard)
        await producer.publish(*(batch(i, i - 1, slot=slot) for i in range(5)))
        await producer.answers(5)
        await consumer.open(shard, name="audit")
        await consumer.offsets(5, batch_size=1)
        assert not (await consumer.ack((0, 2), request_id=7)).HasField("error")  # type: ignore[union-attr]
    await pair.cluster.kill(a)
    # Its session stands: nobody else may serve what it has, and whoever asks is sent to it.
    with pytest.raises(Refused) as refused:
        await b.shard(TOPIC, shard)
    assert (refused.value.reason, refused.value.owner) == (NOT_OWNER, a.address)
    await pair.cluster.end_session(a)
    await served_by(b, shard)
    async with ProduceClient(connect(b)) as producer, ConsumeClient(connect(b)) as consumer:
        assert (await producer.open(shard)).last_sequence == 4
        await producer.publish(batch(4, 3, slot=slot), batch(5, 4, slot=slot))
        assert await producer.answers(2) == [(1, 4, 4, 4), (1, 5, 5, 5)]
        await consumer.open(shard, name="audit")
        assert await consumer.offsets(4, batch_size=1) == [2, 3, 4, 5]


async def test_each_shard_of_a_crashed_broker_goes_to_the_one_that_should_have_it(
    cluster: Cluster, connect: Connect
) -> None:
    names = ["a", "b", "c"]
    brokers = {name: await cluster.start_broker(name) for name in names}
    await eventually(lambda: all(len(broker.view.brokers()) == 3 for broker in brokers.values()))
    shards = [shard.shard_id for shard in (await connect(brokers["a"]).create_topic(shards=24)).shards]
    mine = [shard for shard in shards if preferred_broker(shard, names) == "a"]
    for shard in mine:
        await brokers["a"].shard(TOPIC, shard)
    await cluster.kill(brokers["a"])
    await cluster.end_session(brokers["a"])
    expected = {shard: preferred_broker(shard, ["b", "c"]) for shard in mine}
    assert len(set(expected.values())) == 2
    for shard, name in expected.items():
        assert name is not None
        await served_by(brokers[name], shard)
        other = brokers["c" if name == "b" else "b"]
        assert other.served.get(shard) is None
        assert shard not in other.served.at_rest


async def test_a_second_crash_while_shards_are_being_taken_over_is_handled_as_well(
    cluster: Cluster, connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    brokers = {name: await cluster.start_broker(name) for name in ("a", "b", "c")}
    await eventually(lambda: all(len(broker.view.brokers()) == 3 for broker in brokers.values()))
    shards = [shard.shard_id for shard in (await connect(brokers["a"]).create_topic(shards=24)).shards]
    of = {name: [s for s in shards if preferred_broker(s, list(brokers)) == name] for name in brokers}
    for name in ("a", "b"):
        for shard in of[name]:
            await brokers[name].shard(TOPIC, shard)
    # One of the first broker's shards hangs while it is recovered; the second crash does not wait for it.
    c = brokers["c"]
    stuck = next(s for s in of["a"] if preferred_broker(s, ["b", "c"]) == "c")
    async with ProduceClient(connect(brokers["a"])) as client:
        await client.open(stuck)
        await client.publish(batch(0, slot=await slot_of(brokers["a"], stuck)))
        await client.answers(1)
    gate = Gate(c.served._settle)
    monkeypatch.setattr(c.served, "_settle", gate)
    for name in ("a", "b"):
        await cluster.kill(brokers[name])
        await cluster.end_session(brokers[name])
    await gate.reached.wait()
    for shard in [*of["a"], *of["b"]]:
        if shard != stuck:
            await served_by(c, shard)
    gate.let_through.set()
    await served_by(c, stuck)


async def test_a_shard_whose_takeover_fails_at_first_is_tried_again(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    await pair.a.shard(TOPIC, pair.of_a)
    failures = iter([Refused(UNAVAILABLE, "not now"), Refused(UNAVAILABLE, "not now")])
    claim = pair.b.ownership.claim_together

    async def claim_or_fail(shards: Sequence[ShardSnapshot]) -> list[ShardMetadata]:
        for failure in failures:
            raise failure
        return await claim(shards)

    monkeypatch.setattr(pair.b.ownership, "claim_together", claim_or_fail)
    await pair.cluster.kill(pair.a)
    await pair.cluster.end_session(pair.a)
    await served_by(pair.b, pair.of_a)


# --- two at once ---


async def test_of_two_brokers_that_claim_a_shard_at_once_one_serves_it_and_the_other_sends_there(pair: Pair) -> None:
    a, b = pair.a, pair.b
    # Both have found it claimable when the first of them sends its claim.
    gates = [Gate(ShardMetadata.claim), Gate(ShardMetadata.claim)]

    async def claim(broker: Broker, gate: Gate) -> Any:
        metadata = await ShardMetadata.load(pair.cluster.store, KEYSPACE, pair.of_a)
        await broker.ownership._check_claimable(metadata.record, True)
        assert broker.ownership.session is not None
        return await gate(metadata, broker.ownership.session)

    claims = [asyncio.create_task(claim(broker, gate)) for broker, gate in zip((a, b), gates, strict=True)]
    for gate in gates:
        await gate.reached.wait()
    for gate in gates:
        gate.let_through.set()
    results = await asyncio.gather(*claims, return_exceptions=True)
    assert sorted(type(result).__name__ for result in results) == ["ClaimLost", "NoneType"]
    winner, loser = (a, b) if results[0] is None else (b, a)
    assert (await pair.record(pair.of_a)).owner == winner.ownership.session
    with pytest.raises(Refused) as refused:
        await loser.served.open(pair.of_a)
    assert (refused.value.reason, refused.value.owner) == (NOT_OWNER, winner.address)


async def test_an_old_owner_that_still_appends_confirms_nothing_after_the_takeover(
    pair: Pair, connect: Connect
) -> None:
    """It does not hear of its replacement: the store is silent for it, and it has entries under way."""
    a, b, shard = pair.a, pair.b, pair.of_a
    slot = await slot_of(a, shard)
    async with ProduceClient(connect(a)) as old, ProduceClient(connect(b)) as new:
        await old.open(shard)
        await old.publish(batch(0, slot=slot))
        await old.answers(1)
        served = await served_by(a, shard)
        pair.cluster.disk.clear()
        await old.publish(*(batch(i, i - 1, slot=slot) for i in range(1, 4)))
        await eventually(lambda: served.pending.used_bytes > 0)
        taking = asyncio.create_task(pair.b.ownership.claim(shard, preferred_or_not=True))
        with pytest.raises(Refused):
            await taking
        await a.ownership.close()
        await eventually(lambda: len(b._takeovers) > 0)
        pair.cluster.disk.set()
        await served_by(b, shard)
        error = (await old.error()).error
        assert error.reason == NOT_OWNER
        opened = await new.open(shard)
        # What was under way is stored or it is not; the producer's chain goes on after what is.
        last = opened.last_sequence
        assert 0 <= last <= 3
        await new.publish(*(batch(i, i - 1, slot=slot) for i in range(last + 1, 6)))
        assert [stored[3] for stored in await new.answers(5 - last)] == list(range(last + 1, 6))
    async with ConsumeClient(connect(b)) as reader:
        await reader.open_reader(shard)
        assert await reader.offsets(6, batch_size=1) == list(range(6))


# --- a planned hand-off ---


async def test_a_stopping_broker_passes_its_shards_on_at_once_and_names_the_next_owner(
    pair: Pair, connect: Connect
) -> None:
    a, b, shard = pair.a, pair.b, pair.of_a
    slot = await slot_of(a, shard)
    async with ProduceClient(connect(a)) as client:
        await client.open(shard)
        await client.publish(batch(0, slot=slot))
        await client.answers(1)
        before = await pair.record(shard)
        stopping = asyncio.create_task(a.stop())
        pair.cluster.brokers.remove(a)
        error = (await client.error()).error
        assert (error.reason, error.owner) == (NOT_OWNER, b.address)
        served = await served_by(b, shard)
        await stopping
    assert served.log.epoch == before.epoch + 1
    assert served.log.end_offset == 1
    # Nothing was recovered: its ledgers were closed by their owner.
    states = {
        ledger.state for ledger in (await ShardMetadata.load(pair.cluster.store, KEYSPACE, shard)).ledgers.values()
    }
    assert LedgerState.IN_RECOVERY not in states
    async with ProduceClient(connect(b)) as client:
        assert (await client.open(shard)).last_sequence == 0


async def test_a_broker_that_stops_is_asked_to_serve_nothing_new(
    pair: Pair, connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    a, b = pair.a, pair.b
    await a.shard(TOPIC, pair.of_a)
    served = await served_by(a, pair.of_a)
    gate = Gate(served.log.pass_on)
    monkeypatch.setattr(served.log, "pass_on", gate)
    stopping = asyncio.create_task(a.stop())
    pair.cluster.brokers.remove(a)
    await gate.reached.wait()
    # A shard that nobody has, and that it should serve, goes to the other one while it is still there.
    await eventually(lambda: any(broker.leaving for broker in b.view.brokers()))
    layout = await b.topics.get(TOPIC)
    free = [s.shard_id for s in layout.shards if preferred_broker(s.shard_id, ["a", "b"]) == "a" != pair.of_a]
    other = next(shard for shard in free if shard != pair.of_a)
    assert (await b.shard(TOPIC, other)).shard_id == other
    with pytest.raises(Refused) as refused:
        await a.ownership.claim(other)
    assert refused.value.reason == UNAVAILABLE
    # What it has not passed on yet is still its own, and whoever asks the next one waits.
    asked = asyncio.create_task(b.shard(TOPIC, pair.of_a))
    assert (await pair.record(pair.of_a)).owner == a.ownership.session
    gate.let_through.set()
    await stopping
    assert await asked is await served_by(b, pair.of_a)


async def test_the_last_broker_stops_without_a_successor(cluster: Cluster, connect: Connect) -> None:
    broker = await cluster.start_broker("a")
    shard = (await connect(broker).create_topic()).shards[0].shard_id
    await broker.shard(TOPIC, shard)
    await broker.stop()
    cluster.brokers.remove(broker)
    assert (await ShardMetadata.load(cluster.store, KEYSPACE, shard)).record.owner is None


async def test_a_shard_that_is_being_opened_when_its_broker_stops_is_free_afterwards(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    a, b = pair.a, pair.b
    gate = Gate(a.topics.subscriptions)
    monkeypatch.setattr(a.topics, "subscriptions", gate)
    opening = asyncio.create_task(a.shard(TOPIC, pair.of_a))
    await gate.reached.wait()
    stopping = asyncio.create_task(a.stop())
    pair.cluster.brokers.remove(a)
    await eventually(lambda: a.served._stopping)
    gate.let_through.set()
    with pytest.raises(Refused) as refused:
        await opening
    assert refused.value.reason == UNAVAILABLE
    await stopping
    assert a.served.get(pair.of_a) is None
    assert (await b.shard(TOPIC, pair.of_a)).log.epoch == 2


# --- a lost session ---


async def test_a_session_begun_anew_keeps_its_shards_against_a_claim_that_comes_later(
    late_pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    pair, a, b = late_pair, late_pair.a, late_pair.b
    epoch = (await pair.record(pair.of_b)).epoch
    gate = Gate(b.ownership.claim_together)
    monkeypatch.setattr(b.ownership, "claim_together", gate)
    first = a.ownership.session
    await pair.cluster.end_session(a)
    await gate.reached.wait()
    await eventually(lambda: a.ownership.session not in (None, first))
    served = await served_by(a, pair.of_b)
    await eventually(lambda: served.log.record.owner == a.ownership.session)
    gate.let_through.set()
    await b._takeovers.idle()
    record = await pair.record(pair.of_b)
    assert (record.owner, record.epoch) == (a.ownership.session, epoch)
    assert a.served.get(pair.of_b) is served
    assert b.served.get(pair.of_b) is None


async def test_a_session_begun_anew_after_a_claim_releases_the_shard_and_names_its_owner(
    late_pair: Pair, connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    pair, a, b = late_pair, late_pair.a, late_pair.b
    gate = Gate(a.served.renew)
    monkeypatch.setattr(a.served, "renew", gate)
    async with ProduceClient(connect(a)) as client:
        await client.open(pair.of_b)
        await pair.cluster.end_session(a)
        await gate.reached.wait()
        await served_by(b, pair.of_b)
        gate.let_through.set()
        error = (await client.error()).error
        assert (error.reason, error.owner) == (NOT_OWNER, b.address)
    assert a.served.get(pair.of_b) is None


async def test_a_shard_that_is_claimed_while_it_is_being_opened_is_not_served_twice(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    a, b = pair.a, pair.b
    gate = Gate(a.topics.subscriptions)
    monkeypatch.setattr(a.topics, "subscriptions", gate)
    opening = asyncio.create_task(a.shard(TOPIC, pair.of_a))
    await gate.reached.wait()
    await pair.cluster.end_session(a)
    await eventually(lambda: a.ownership.session is not None)
    metadata = await b.ownership.claim(pair.of_a, preferred_or_not=True)
    gate.let_through.set()
    with pytest.raises(Refused):
        await opening
    assert a.served.get(pair.of_a) is None
    assert (await pair.record(pair.of_a)).owner == metadata.session


async def test_without_a_session_the_end_of_a_log_is_told_only_if_its_bookies_vouch_for_it(
    pair: Pair, connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    a, shard = pair.a, pair.of_a
    slot = await slot_of(a, shard)
    async with ProduceClient(connect(a)) as producer, ConsumeClient(connect(a)) as reader:
        await reader.open_reader(shard, start=LATEST)
        # It loses its session, and the store does not give it another one: nobody knows what others do.
        monkeypatch.setattr(a.ownership, "_session", None)
        # Nothing is open that another owner would have had to fence.
        await reader.send_reader(shard, handle=2, start=LATEST)
        assert (await reader.error()).error.reason == UNAVAILABLE
        await producer.open(shard)
        await producer.publish(batch(0, slot=slot))
        await producer.answers(1)
        assert (await reader.open_reader(shard, handle=3, start=LATEST)).end_offset == 1
        served = await served_by(a, shard)

        async def unknown() -> Standing:
            return Standing.UNKNOWN

        monkeypatch.setattr(served.log, "standing", unknown)
        await reader.send_reader(shard, handle=4, start=LATEST)
        assert (await reader.error()).error.reason == UNAVAILABLE


async def test_a_reader_that_comes_to_a_replaced_broker_is_not_told_an_old_end(
    pair: Pair, connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would stop before messages that were confirmed before it began."""
    a, b, shard = pair.a, pair.b, pair.of_a
    slot = await slot_of(a, shard)
    async with ProduceClient(connect(a)) as old, ConsumeClient(connect(a)) as reader:
        await old.open(shard)
        await old.publish(batch(0, slot=slot))
        await old.answers(1)
        await a.ownership.close()
        await served_by(b, shard)
        async with ProduceClient(connect(b)) as new:
            await new.open(shard)
            await new.publish(batch(1, 0, slot=slot))
            await new.answers(1)
        await reader.send_reader(shard, start=EARLIEST)
        assert (await reader.error()).error.reason in (UNAVAILABLE, NOT_OWNER)


async def test_acknowledgements_at_a_replaced_broker_are_refused_also_if_it_has_no_open_segment(
    pair: Pair, connect: Connect
) -> None:
    a, b, shard = pair.a, pair.b, pair.of_a
    slot = await slot_of(a, shard)
    async with ProduceClient(connect(a)) as producer:
        await producer.open(shard)
        await producer.publish(*(batch(i, i - 1, slot=slot) for i in range(3)))
        await producer.answers(3)
    served = await served_by(a, shard)
    async with ConsumeClient(connect(a)) as consumer:
        await consumer.open(shard)
        await consumer.offsets(3, batch_size=1)
        await consumer.ack((0, 1), request_id=1)
        served.log._appender._end_asked = True
        await served.log.trim()
        await eventually(lambda: served.log._appender.handle is None)
        await a.ownership.close()
        await served_by(b, shard)
        await a.served.release_fenced()
        assert (await consumer.error()).error.reason == NOT_OWNER
    assert a.served.get(shard) is None


async def test_a_newer_connection_of_a_name_is_not_opened_at_a_broker_that_was_replaced(
    pair: Pair, connect: Connect
) -> None:
    a, b, shard = pair.a, pair.b, pair.of_a
    slot = await slot_of(a, shard)
    older = await connect(a).register("p")
    producer_id = older.producer_id
    async with ProduceClient(connect(a)) as at_a, ProduceClient(connect(b)) as at_b:
        await at_a.open(shard, producer_id=producer_id, epoch=1, name="p")
        await a.ownership.close()  # It hears of its replacement from nobody.
        await served_by(b, shard)
        await at_b.open(shard, producer_id=producer_id, epoch=1, name="p")
        newer = await connect(b).register("p")
        await at_a.send_open(shard, handle=2, producer_id=producer_id, epoch=newer.epoch, name="p")
        errors = [(await at_a.error()).error for _ in range(2)]
        assert [(error.reason, error.owner) for error in errors] == [(NOT_OWNER, b.address)] * 2
        assert a.served.get(shard) is None
        await at_b.open(shard, handle=2, producer_id=producer_id, epoch=newer.epoch, name="p")
        await at_b.publish(batch(0, producer_id=producer_id, epoch=1, slot=slot))
        assert (await at_b.error()).error.reason == common_pb2.ERROR_REASON_PRODUCER_FENCED


async def test_a_living_owner_whose_shard_was_claimed_by_another_broker_serves_it_no_more(pair: Pair) -> None:
    """Nobody uses the shard there: no bookie refuses anything."""
    a, b, shard = pair.a, pair.b, pair.of_a
    await a.shard(TOPIC, shard)
    session = a.ownership.session
    assert session is not None
    await b.ownership.claim_from(shard, session)
    await eventually(lambda: a.served.get(shard) is None)
    assert a.ownership.session == session


async def test_a_name_is_not_opened_while_the_store_does_not_say_whose_the_shard_is(
    pair: Pair, connect: Connect
) -> None:
    a, shard = pair.a, pair.of_a
    registered = await connect(a).register("p")
    producer_id, epoch = registered.producer_id, registered.epoch
    await a.shard(TOPIC, shard)
    async with ProduceClient(connect(a)) as client:
        pair.cluster.store.silent_reads[KEYSPACE.shard_prefix(shard)] = 1
        await client.send_open(shard, producer_id=producer_id, epoch=epoch, name="p")
        assert (await client.error()).error.reason == UNAVAILABLE
        await client.open(shard, handle=2, producer_id=producer_id, epoch=epoch, name="p")
        # What this very owner has opened before it opens again, whatever the store says.
        pair.cluster.store.silent_reads[KEYSPACE.shard_prefix(shard)] = 1
        await client.open(shard, handle=3, producer_id=producer_id, epoch=epoch, name="p")


async def test_every_broker_tells_clients_who_else_is_in_the_cluster(pair: Pair, connect: Connect) -> None:
    request = broker_pb2.ResolveRequest(topic=TOPIC).SerializeToString()
    answer = await connect(pair.a).raw("BrokerService", "Resolve", request)
    assert set(broker_pb2.ResolveResponse.FromString(answer).brokers) == {pair.a.address, pair.b.address}
    async with ProduceClient(connect(pair.a)) as client:
        assert client.hello.address == pair.a.address
    await pair.b.stop()
    pair.cluster.brokers.remove(pair.b)
    await eventually(lambda: len(pair.a.view.brokers()) == 1)
    answer = await connect(pair.a).raw("BrokerService", "Resolve", request)
    assert list(broker_pb2.ResolveResponse.FromString(answer).brokers) == [pair.a.address]


async def test_a_watch_at_a_stopping_broker_ends_before_its_shards_do(
    pair: Pair, connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Clients go to another broker with it, which tells them where the shards went."""
    from test_resolve import LayoutWatch

    served = await pair.a.shard(TOPIC, pair.of_a)
    watch = LayoutWatch(connect(pair.a))
    await watch.next()
    gate = Gate(served.log.close)
    monkeypatch.setattr(served.log, "close", gate)
    stopping = asyncio.create_task(pair.a.stop())
    pair.cluster.brokers.remove(pair.a)
    async with asyncio.timeout(PATIENCE_S):
        assert (await watch.error()).reason == UNAVAILABLE
    assert not stopping.done()
    gate.let_through.set()
    await stopping
