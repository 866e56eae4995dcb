"""Leases that etcd keeps: until when a holder may believe in them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial
from typing import Any

import grpc
import pytest
from hypothesis import given
from hypothesis import strategies as st

from magnetar.etcd import etcd_pb2 as pb
from magnetar.metadata.etcd import EtcdMetadata
from magnetar.metadata.etcd_channel import Times
from magnetar.metadata.etcd_lease import LeaseTerm
from magnetar.metadata.store import Changes, MetadataUnavailable, Put

WAIT_S = 30.0
QUICK = Times(attempt_s=0.5, call_s=20.0, ping_s=0.2)

# The term.


def test_a_term_counts_from_the_sending_and_ends_before_the_servers() -> None:
    term = LeaseTerm(5.0, sent_at=100.0)
    assert not term.lost(104.4)
    assert term.ends_at == 104.5
    assert term.lost(104.5)


def test_an_answered_keepalive_extends_the_term_from_when_it_was_sent() -> None:
    term = LeaseTerm(5.0, sent_at=100.0)
    term.renewed(101.0, 5.0, now=103.0)
    assert term.ends_at == 105.5


def test_a_lost_lease_is_not_found_again() -> None:
    term = LeaseTerm(5.0, sent_at=100.0)
    term.renewed(104.0, 5.0, now=104.6)
    assert term.lost(104.6)
    term.renewed(104.6, 5.0, now=104.7)
    assert term.lost(100.0)


def test_a_lease_that_the_server_does_not_know_is_lost_at_once() -> None:
    term = LeaseTerm(5.0, sent_at=100.0)
    term.renewed(100.5, 0, now=100.6)
    assert term.lost(100.6)


def test_a_server_that_promises_more_than_it_granted_is_not_believed() -> None:
    term = LeaseTerm(5.0, sent_at=100.0)
    term.renewed(101.0, 1e9, now=101.0)
    assert term.ends_at == 105.5


def test_a_shorter_time_that_remains_is_believed() -> None:
    term = LeaseTerm(10.0, sent_at=100.0)
    term.renewed(108.0, 4.0, now=108.1)
    assert term.ends_at == pytest.approx(111.6)


def test_keepalives_are_due_three_times_in_a_term() -> None:
    term = LeaseTerm(6.0, sent_at=100.0)
    assert term.pause_s(100.5) == 1.5
    assert term.pause_s(103.0) == 0


@given(
    st.floats(1, 100),
    st.lists(st.tuples(st.floats(0, 20), st.floats(0, 5), st.floats(0, 5), st.sampled_from([0.9, 1.0]))),
)
def test_a_holder_never_believes_longer_than_the_server(
    ttl_s: float, rounds: list[tuple[float, float, float, float]]
) -> None:
    """The server counts from when it handles a request, `there_s` after it was sent, and may answer late."""
    now = 0.0
    term, server_ends_at = LeaseTerm(ttl_s, sent_at=now), now + ttl_s
    for pause_s, there_s, back_s, answered in rounds:
        now += pause_s
        handled_at = now + there_s
        alive = handled_at < server_ends_at
        server_ends_at = handled_at + ttl_s if alive else server_ends_at
        if answered == 1.0:
            term.renewed(now, ttl_s if alive else 0, handled_at + back_s)
        now = handled_at + back_s
        assert term.lost(now) or now < server_ends_at


# The real thing.


@pytest.fixture
def alone(etcd_cluster: Callable[[int], list[Any]]) -> Any:
    return etcd_cluster(1)[0]


async def surely(call: Callable[[], Any]) -> Any:
    """Asks again for as long as the members elect a leader."""
    while True:
        try:
            return await asyncio.to_thread(call)
        except grpc.RpcError:
            continue


async def expiry(etcd: Any, store: EtcdMetadata, ttl_s: int) -> None:
    """Returns when a lease of `ttl_s` without keepalives has expired: so much of the server's time has passed."""
    grant = partial(etcd.call, "Lease/LeaseGrant", pb.LeaseGrantRequest(ttl=ttl_s), pb.LeaseGrantResponse)
    control = pb.PutRequest(key=b"control", lease=(await surely(grant)).id)
    put = await surely(partial(etcd.call, "KV/Put", control, pb.PutResponse))
    async for event in store.watch("control", from_revision=put.header.revision + 1):
        assert isinstance(event, Changes)
        return


async def test_a_lease_outlives_its_time_for_as_long_as_it_is_held(etcd: Any, clock: Any) -> None:
    async with await EtcdMetadata.open(etcd.url, clock=clock) as store:
        lease = await store.grant_lease(1.2)
        assert lease.ttl_s == 2
        await store.txn([], [Put("held", b"", lease.lease_id)])
        await asyncio.wait_for(expiry(etcd, store, 3), WAIT_S)
        assert not lease.lost
        assert await store.get("held") is not None
        await lease.revoke()
        assert await store.get("held") is None


async def test_a_lease_that_somebody_else_ended_is_lost_although_its_time_is_not_over(etcd: Any, clock: Any) -> None:
    async with await EtcdMetadata.open(etcd.url, clock=clock) as store:
        lease = await store.grant_lease(2)
        etcd.call("Lease/LeaseRevoke", pb.LeaseRevokeRequest(id=lease.lease_id), pb.LeaseRevokeResponse)
        await asyncio.wait_for(lease.wait_lost(), WAIT_S)
        assert lease.lost
        await lease.revoke()


async def test_a_holder_takes_its_lease_for_lost_while_the_server_still_has_it(alone: Any, clock: Any) -> None:
    async with await EtcdMetadata.open(alone.url, times=QUICK, clock=clock) as store:
        lease = await store.grant_lease(60)
        await store.txn([], [Put("held", b"", lease.lease_id)])
        alone.stop()
        clock.now += 53.9
        assert not lease.lost
        clock.now += 0.2
        assert lease.lost
        alone.go_on()
        async with await EtcdMetadata.open(alone.url) as other:
            assert await other.get("held") is not None
        clock.now -= 10
        assert lease.lost


async def test_who_waits_is_told_of_a_lease_that_the_server_does_not_keep_alive(alone: Any) -> None:
    async with await EtcdMetadata.open(alone.url, times=QUICK) as store:
        lease = await store.grant_lease(1)
        revision = (await store.txn([], [Put("held", b"", lease.lease_id)])).revision
        alone.stop()
        await asyncio.wait_for(lease.wait_lost(), WAIT_S)
        assert lease.lost
        alone.go_on()
        event = await asyncio.wait_for(anext(aiter(store.watch("held", from_revision=revision + 1))), WAIT_S)
        assert isinstance(event, Changes)
        assert event.changes[0].current is None


async def test_a_lease_goes_on_at_the_next_endpoint_when_its_own_hangs(
    etcd_cluster: Callable[[int], list[Any]], clock: Any
) -> None:
    members = etcd_cluster(3)
    url = "etcd://" + ",".join(member.address for member in members)
    async with await EtcdMetadata.open(url, times=QUICK, clock=clock) as store:
        lease = await store.grant_lease(4)
        await store.txn([], [Put("held", b"", lease.lease_id)])
        members[0].stop()
        await asyncio.wait_for(expiry(members[1], store, 4), WAIT_S)
        assert not lease.lost
        assert await store.get("held") is not None


async def test_closing_the_store_loses_a_lease_and_leaves_its_keys_to_the_server(etcd: Any) -> None:
    async with await EtcdMetadata.open(etcd.url) as other:
        store = await EtcdMetadata.open(etcd.url)
        lease = await store.grant_lease(1)
        revision = (await store.txn([], [Put("held", b"", lease.lease_id)])).revision
        await store.close()
        assert lease.lost
        assert await other.get("held") is not None
        event = await asyncio.wait_for(anext(aiter(other.watch("held", from_revision=revision + 1))), WAIT_S)
        assert isinstance(event, Changes)
        assert event.changes[0].current is None


async def test_revoking_a_lease_of_a_store_that_is_silent_says_that_the_outcome_is_unknown(alone: Any) -> None:
    async with await EtcdMetadata.open(alone.url, times=Times(attempt_s=0.5, call_s=2.0, ping_s=0.2)) as store:
        lease = await store.grant_lease(30)
        alone.stop()
        with pytest.raises(MetadataUnavailable):
            await lease.revoke()
        assert lease.lost
