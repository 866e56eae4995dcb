from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from magnetar.metadata.ids import BLOCK_SIZE, IdBlocks
from magnetar.metadata.keyspace import COUNTER_LEDGER, COUNTER_SHARD, Keyspace
from magnetar.metadata.memory import MemoryStore

Sleep = Callable[[float], Awaitable[None]]


@pytest.fixture
def ids(faulty: Any, keyspace: Keyspace, sleep: Sleep) -> IdBlocks:
    return IdBlocks(faulty, keyspace, sleep=sleep)


async def test_ids_start_at_one_and_each_counter_counts_for_itself(ids: IdBlocks) -> None:
    assert [await ids.next_id(COUNTER_LEDGER) for _ in range(3)] == [1, 2, 3]
    assert await ids.next_id(COUNTER_SHARD) == 1


async def test_a_block_costs_one_transaction(ids: IdBlocks, faulty: Any) -> None:
    found = [await ids.next_id(COUNTER_LEDGER) for _ in range(BLOCK_SIZE + 1)]
    assert found == list(range(1, BLOCK_SIZE + 2))
    assert faulty.sent == 2


async def test_two_processes_never_get_the_same_id(faulty: Any, keyspace: Keyspace, sleep: Sleep) -> None:
    processes = [IdBlocks(faulty, keyspace, sleep=sleep) for _ in range(4)]
    found = await asyncio.gather(*(p.next_id(COUNTER_LEDGER) for p in processes for _ in range(150)))
    assert len(set(found)) == 600


async def test_a_block_whose_reply_was_lost_is_skipped(ids: IdBlocks, faulty: Any) -> None:
    faulty.faults += [faulty.lose_reply, faulty.lose_request]
    faulty.silent_reads = 2
    assert await ids.next_id(COUNTER_LEDGER) == BLOCK_SIZE + 1


async def test_a_block_that_arrives_late_is_nobodys(ids: IdBlocks, faulty: Any) -> None:
    faulty.faults.append(faulty.delay_request)
    assert await ids.next_id(COUNTER_LEDGER) == 1
    assert [result.succeeded for result in await faulty.arrive()] == [False]


async def test_ids_below_a_floor_are_skipped_for_good(ids: IdBlocks, keyspace: Keyspace, faulty: Any) -> None:
    assert await ids.next_id(COUNTER_LEDGER) == 1
    assert await ids.next_id(COUNTER_LEDGER, at_least=50) == 50
    assert await ids.next_id(COUNTER_LEDGER) == 51
    assert await ids.next_id(COUNTER_LEDGER, at_least=BLOCK_SIZE + 1) == BLOCK_SIZE + 1
    assert await ids.next_id(COUNTER_LEDGER, at_least=5000) == 5000
    store: MemoryStore = faulty.inner
    assert await IdBlocks(store, keyspace).next_id(COUNTER_LEDGER) == 5000 + BLOCK_SIZE
