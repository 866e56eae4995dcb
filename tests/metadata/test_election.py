from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from magnetar.metadata.election import Election
from magnetar.metadata.keyspace import Keyspace
from magnetar.metadata.store import Delete, MetadataStore, Put

Sleep = Callable[[float], Awaitable[None]]
Candidate = Callable[[str], Election]


@pytest.fixture
def candidate(faulty: Any, keyspace: Keyspace, sleep: Sleep) -> Candidate:
    return lambda name: Election(faulty, keyspace, "balancer", name, rng=random.Random(1), sleep=sleep)


async def settle() -> None:
    for _ in range(20):
        await asyncio.sleep(0)


async def test_the_first_candidate_leads_until_it_resigns_and_then_the_next(
    store: MetadataStore, keyspace: Keyspace
) -> None:
    ann, bob = (Election(store, keyspace, "balancer", name) for name in ("ann", "bob"))
    await ann.campaign()
    waiting = asyncio.create_task(bob.campaign())
    lost = asyncio.create_task(ann.wait_lost())
    assert await bob.current_leader() == "ann"
    assert (ann.leader, bob.leader) == (True, False)
    await ann.resign()
    await lost
    await waiting
    assert (ann.leader, bob.leader) == (False, True)
    assert await ann.current_leader() == "bob"


async def test_an_election_whose_reply_was_lost_is_recognised(candidate: Candidate, faulty: Any) -> None:
    ann = candidate("ann")
    faulty.faults += [faulty.lose_request, faulty.lose_reply]
    await ann.campaign()
    assert ann.leader
    assert faulty.applied == 1


async def test_one_of_many_leads(candidate: Candidate) -> None:
    candidates = [candidate(str(i)) for i in range(5)]
    tasks = [asyncio.create_task(one.campaign()) for one in candidates]
    await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    await settle()
    for _ in range(5):
        leaders = [one for one in candidates if one.leader]
        assert len(leaders) == 1
        await leaders[0].resign()
        await settle()
    assert all(task.done() for task in tasks)


async def test_a_leader_whose_key_is_taken_away_has_lost(candidate: Candidate, keyspace: Keyspace, faulty: Any) -> None:
    ann = candidate("ann")
    await ann.campaign()
    lost = asyncio.create_task(ann.wait_lost())
    await settle()
    await faulty.txn([], [Put(keyspace.election("balancer2"), b"x"), Put(keyspace.election("balancer"), b"ann")])
    await settle()
    assert not lost.done()
    faulty.silent_reads = 2
    await faulty.txn([], [Delete(keyspace.election("balancer"))])
    await lost
    assert not ann.leader


async def test_a_leader_whose_lease_ends_has_lost(candidate: Candidate, faulty: Any) -> None:
    ann = candidate("ann")
    await ann.campaign()
    lost = asyncio.create_task(ann.wait_lost())
    await settle()
    await faulty.inner.revoke_lease(ann._lease.lease_id)  # type: ignore[union-attr]
    assert not ann.leader
    await lost


async def test_a_transaction_of_an_earlier_term_is_refused(candidate: Candidate, faulty: Any) -> None:
    ann, bob = candidate("ann"), candidate("bob")
    await ann.campaign()
    proof = ann.still_leader()
    assert (await faulty.txn([proof], [Put("decision", b"1")])).succeeded
    await ann.resign()
    await bob.campaign()
    assert not (await faulty.txn([proof], [Put("decision", b"2")])).succeeded


async def test_a_candidate_whose_lease_ended_while_it_waited_takes_a_new_one(candidate: Candidate, faulty: Any) -> None:
    ann, bob = candidate("ann"), candidate("bob")
    await ann.campaign()
    waiting = asyncio.create_task(bob.campaign())
    await settle()
    await faulty.inner.revoke_lease(bob._lease.lease_id)  # type: ignore[union-attr]
    await ann.resign()
    await waiting
    assert bob.leader
