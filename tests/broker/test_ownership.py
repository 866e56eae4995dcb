"""Sessions and claims of two brokers on one metadata store; no shard is opened here."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from dataclasses import replace

import pytest
from broker_world import KEYSPACE, TOPIC

from magnetar.broker.cluster_view import ClusterView
from magnetar.broker.layout import preferred_broker
from magnetar.broker.ownership import Ownership
from magnetar.broker.topics import Topics
from magnetar.metadata.ids import IdBlocks
from magnetar.metadata.memory import MemoryStore
from magnetar.metadata.records import BrokerRegistration, Owner, TopicRecord
from magnetar.metadata.shards import OwnershipLost, ShardChange, ShardNotFound
from magnetar.node.registration import IdInUse
from magnetar.node.rpc import Refused
from magnetar.v1 import common_pb2


class Member:
    """A broker as far as ownership goes."""

    def __init__(self, store: MemoryStore, name: str, lease_s: float = 60.0) -> None:
        self.name = name
        self.sessions: list[Owner] = []
        self.refusals: list[int] = []
        self.view = ClusterView(store, KEYSPACE)
        self.ownership = Ownership(
            store,
            KEYSPACE,
            self.view,
            name,
            lease_s,
            random.Random(name),
            on_session=self.sessions.append,
            on_lost=self._lost,
        )

    def _lost(self) -> None:
        with pytest.raises(Refused) as refused:
            self.ownership.require_session()
        self.refusals.append(refused.value.reason)

    async def start(self) -> None:
        await self.ownership.register(BrokerRegistration(self.name, f"{self.name}:1"))
        await self.view.start()

    async def close(self) -> None:
        await self.ownership.close()
        await self.view.close()


@pytest.fixture
async def store() -> AsyncIterator[MemoryStore]:
    async with MemoryStore() as store:
        yield store


@pytest.fixture
async def topic(store: MemoryStore) -> TopicRecord:
    return await Topics(store, KEYSPACE, IdBlocks(store, KEYSPACE), lambda: 1).create(TOPIC, 16)


@pytest.fixture
async def members(store: MemoryStore) -> AsyncIterator[dict[str, Member]]:
    async with AsyncExitStack() as stack:
        members = {name: Member(store, name) for name in ("a", "b")}
        for member in members.values():
            await member.start()
            stack.push_async_callback(member.close)
        await turns()
        yield members


async def turns() -> None:
    """Lets watches and registrations run; the store in memory makes them wait for nothing else."""
    for _ in range(50):
        await asyncio.sleep(0)


def split(topic: TopicRecord) -> tuple[int, int]:
    """A shard that `a` should serve, and one that `b` should."""
    preferred = {preferred_broker(shard.shard_id, ["a", "b"]): shard.shard_id for shard in topic.shards}
    return preferred["a"], preferred["b"]


async def end_session(store: MemoryStore, name: str) -> None:
    found = await store.get(KEYSPACE.broker(name))
    assert found is not None
    await store.revoke_lease(found.lease_id)


async def test_only_the_preferred_broker_claims_a_shard_that_nobody_owns(
    members: dict[str, Member], topic: TopicRecord
) -> None:
    mine, other = split(topic)
    a = members["a"].ownership
    claimed = await a.claim(mine)
    assert (claimed.record.owner, claimed.record.epoch) == (a.session, 1)
    with pytest.raises(Refused) as refused:
        await a.claim(other)
    assert (refused.value.reason, refused.value.owner) == (common_pb2.ERROR_REASON_NOT_OWNER, "b:1")
    assert (await a.claim(other, preferred_or_not=True)).record.owner == a.session


async def test_a_living_owner_is_named_even_to_the_preferred_broker(
    members: dict[str, Member], topic: TopicRecord
) -> None:
    mine, _ = split(topic)
    await members["b"].ownership.claim(mine, preferred_or_not=True)
    with pytest.raises(Refused) as refused:
        await members["a"].ownership.claim(mine)
    assert refused.value.owner == "b:1"
    await turns()
    assert members["a"].view.address(mine) == "b:1"


async def test_what_an_ended_session_owned_is_found_and_claimed_in_a_new_epoch(
    store: MemoryStore, members: dict[str, Member], topic: TopicRecord
) -> None:
    mine, other = split(topic)
    a, b = members["a"], members["b"]
    before = await b.ownership.claim(other)
    await a.ownership.claim(mine)
    await turns()
    assert a.ownership.ended() == {}
    await b.close()
    await turns()
    assert a.view.orphaned(other)
    assert set(a.ownership.ended()) == {other}
    after = await a.ownership.claim(other)
    assert (after.record.owner, after.record.epoch) == (a.ownership.session, 2)
    with pytest.raises(OwnershipLost):
        await before.commit(ShardChange(before.record))
    await turns()
    assert a.ownership.ended() == {}
    assert set(a.ownership.mine()) == {mine, other}


async def test_without_a_session_nothing_is_claimed_and_the_next_one_is_told(
    store: MemoryStore, members: dict[str, Member], topic: TopicRecord
) -> None:
    mine, _ = split(topic)
    a = members["a"]
    claimed = await a.ownership.claim(mine)
    first = a.ownership.session
    await end_session(store, "a")
    await turns()
    assert a.refusals == [common_pb2.ERROR_REASON_UNAVAILABLE]
    second = a.ownership.session
    assert a.sessions == [second]
    assert second != first
    assert second is not None
    await claimed.renew_session(second)
    assert (claimed.record.owner, claimed.record.epoch) == (second, 1)
    with pytest.raises(Refused, match="serves this shard"):
        await members["b"].ownership.claim(mine)


async def test_between_a_lost_session_and_the_next_another_broker_may_be_first(
    store: MemoryStore, members: dict[str, Member], topic: TopicRecord
) -> None:
    mine, _ = split(topic)
    a, b = members["a"], members["b"]
    claimed = await a.ownership.claim(mine)
    await end_session(store, "a")
    taken = await b.ownership.claim(mine, preferred_or_not=True)
    await turns()
    assert a.ownership.session is not None
    with pytest.raises(OwnershipLost) as lost:
        await claimed.renew_session(a.ownership.session)
    assert lost.value.owner == taken.record.owner


async def test_a_restarted_broker_claims_what_its_earlier_session_owned(
    store: MemoryStore, members: dict[str, Member], topic: TopicRecord
) -> None:
    _, other = split(topic)
    a = members["a"]
    await a.ownership.claim(other, preferred_or_not=True)
    await a.close()
    again = Member(store, "a")
    await again.start()
    # The records still name its earlier session: no other broker is preferred over it.
    assert (await again.ownership.claim(other)).record.epoch == 2
    await again.close()


async def test_an_id_that_lives_already_is_refused(store: MemoryStore, members: dict[str, Member]) -> None:
    twin = Member(store, "a", lease_s=0.5)
    with pytest.raises(IdInUse):
        await twin.start()
    await twin.close()
    assert await store.get(KEYSPACE.broker("a")) is not None


async def test_claims_at_the_same_time_have_one_winner(
    store: MemoryStore, members: dict[str, Member], topic: TopicRecord
) -> None:
    mine, _ = split(topic)
    results = await asyncio.gather(
        *(member.ownership.claim(mine, preferred_or_not=True) for member in members.values()), return_exceptions=True
    )
    assert sorted(type(result).__name__ for result in results) == ["Refused", "ShardMetadata"]


async def test_a_shard_that_does_not_exist_is_told_apart(members: dict[str, Member]) -> None:
    with pytest.raises(ShardNotFound):
        await members["a"].ownership.claim(99)


async def test_a_view_follows_owners_and_tells_whose_changed(
    store: MemoryStore, members: dict[str, Member], topic: TopicRecord
) -> None:
    mine, _ = split(topic)
    told: list[set[int]] = []
    b = members["b"]
    b.view.on_owner_change(lambda shards: told.append(set(shards)))
    claimed = await members["a"].ownership.claim(mine)
    await turns()
    assert b.view.address(mine) == "a:1"
    await claimed.commit(ShardChange(replace(claimed.record, owner=None)))
    await turns()
    assert b.view.address(mine) == ""
    assert told == [{mine}, {mine}]
