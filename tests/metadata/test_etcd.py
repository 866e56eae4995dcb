"""The store in a real etcd: what the suite of all engines does not ask."""

from __future__ import annotations

import asyncio
import random
from typing import Any

import pytest

from magnetar.metadata.etcd import EtcdMetadata
from magnetar.metadata.ids import IdBlocks
from magnetar.metadata.keyspace import Keyspace
from magnetar.metadata.store import Delete, MetadataError, Put, exists


async def test_ids_taken_by_several_processes_are_all_different(etcd: Any, keyspace: Keyspace) -> None:
    etcd.delete_all()
    async with await EtcdMetadata.open(etcd.url) as one, await EtcdMetadata.open(etcd.url) as two:
        blocks = [IdBlocks(store, keyspace, rng=random.Random(i)) for i, store in enumerate((one, two, one, two))]
        ids = await asyncio.gather(*(block.next_id("shard") for block in blocks for _ in range(150)))
    assert len(set(ids)) == 600
    assert max(ids) <= 800


async def test_a_range_of_many_bytes_is_read_in_pages_that_fit(etcd: Any) -> None:
    etcd.delete_all()
    async with await EtcdMetadata.open(etcd.url) as store:
        for i in range(30):
            await store.txn([], [Put(f"big/{i:02}", bytes([i]) * 700_000)])
        found = await store.range("big/")
        assert [(item.key, item.value[:1], len(item.value)) for item in found.items] == [
            (f"big/{i:02}", bytes([i]), 700_000) for i in range(30)
        ]
        assert not found.more
        some = await store.range("big/", after="big/03", limit=25)
        assert [item.key for item in some.items] == [f"big/{i:02}" for i in range(4, 29)]
        assert some.more


async def test_the_pages_of_a_range_are_of_one_revision(etcd: Any) -> None:
    """A token moves from key to key over the whole range: every range sees exactly one."""
    etcd.delete_all()
    count = 500
    async with await EtcdMetadata.open(etcd.url) as store, await EtcdMetadata.open(etcd.url) as mover:
        for i in range(0, count, 100):
            await store.txn([], [Put(f"k/{j:03}", b"") for j in range(i, i + 100)])
        await store.txn([], [Put("k/000", b"token")])
        done = asyncio.Event()

        async def move() -> None:
            at = 0
            while not done.is_set():
                to = (at + count // 2 + 1) % count
                await mover.txn([], [Put(f"k/{at:03}", b""), Put(f"k/{to:03}", b"token")])
                at = to

        moving = asyncio.create_task(move())
        for _ in range(20):
            items = (await store.range("k/")).items
            assert len(items) == count
            assert [item.value for item in items].count(b"token") == 1
        done.set()
        await moving


async def test_compares_alone_are_linearizable(etcd: Any) -> None:
    async with await EtcdMetadata.open(etcd.url) as one, await EtcdMetadata.open(etcd.url) as two:
        for _ in range(20):
            await one.txn([], [Put("x", b"")])
            assert (await two.txn([exists("x")], [])).succeeded
            await one.txn([], [Delete("x")])
            assert not (await two.txn([exists("x")], [])).succeeded


@pytest.mark.parametrize("address", ["", "http://127.0.0.1:2379", "zk://a:1"])
async def test_an_address_of_no_engine_is_refused_with_what_to_write(address: str) -> None:
    with pytest.raises(MetadataError, match="write etcd://host:port"):
        await EtcdMetadata.open(address)
