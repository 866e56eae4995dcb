"""Joining a cluster: the one that the store holds, or one that is meant to begin there."""

from __future__ import annotations

import asyncio

import pytest

from magnetar.metadata.instance import ForeignStore, cluster_instance, join_cluster
from magnetar.metadata.keyspace import Keyspace, cluster_of
from magnetar.metadata.memory import MemoryStore
from magnetar.metadata.store import Put


async def test_who_asks_first_draws_the_instance_and_all_are_told_the_same() -> None:
    async with MemoryStore() as store:
        told = await asyncio.gather(*(join_cluster(store, Keyspace("one")) for _ in range(5)))
        assert len(set(told)) == 1
        assert await cluster_instance(store, Keyspace("one")) == told[0]


async def test_a_cluster_does_not_begin_in_the_store_of_another_one_by_a_slip_of_the_pen() -> None:
    async with MemoryStore() as store:
        first = await join_cluster(store, Keyspace("one"))
        with pytest.raises(ForeignStore, match="--set cluster=one"):
            await join_cluster(store, Keyspace("oen"))
        assert await store.get(Keyspace("oen").instance()) is None
        second = await join_cluster(store, Keyspace("oen"), new_cluster=True)
        assert second != first
        # From now on both are there.
        assert await join_cluster(store, Keyspace("oen")) == second
        assert await join_cluster(store, Keyspace("one")) == first


async def test_what_else_stands_in_the_store_is_no_cluster() -> None:
    async with MemoryStore() as store:
        await store.txn([], [Put("/registry/pods", b"")])
        assert await join_cluster(store, Keyspace("one"))


def test_a_key_tells_its_cluster() -> None:
    assert cluster_of(Keyspace("one").broker("b")) == "one"
    assert cluster_of("/registry/pods") == ""
