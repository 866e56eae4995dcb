"""Numbers that are never handed out twice in a cluster, taken from the metadata store in blocks."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable

from magnetar.metadata.backoff import Backoff
from magnetar.metadata.codec import decode_counter, encode_counter
from magnetar.metadata.keyspace import Keyspace
from magnetar.metadata.store import MetadataStore, MetadataUnavailable, Put, unchanged

BLOCK_SIZE = 100
FIRST_ID = 1
"""Ids start here; 0 stands for "none" in the records."""


class IdBlocks:
    """Hands out ids, each once, from blocks taken by compare-and-set.

    A block whose transaction has an unknown outcome is never used: ids may be skipped, never repeated.
    """

    def __init__(
        self,
        store: MetadataStore,
        keyspace: Keyspace,
        *,
        rng: random.Random | None = None,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._store = store
        self._keyspace = keyspace
        self._rng = rng or random.Random()
        self._sleep = sleep
        self._blocks: dict[str, range] = {}
        self._locks: dict[str, asyncio.Lock] = {}

    async def next_id(self, counter: str, *, at_least: int = FIRST_ID) -> int:
        """The counter's next id that is not below `at_least`. Waits while the store is silent; cancellable."""
        async with self._locks.setdefault(counter, asyncio.Lock()):
            block = self._blocks.get(counter, range(0))
            block = range(max(block.start, at_least), block.stop)
            if not block:
                block = await self._take_block(counter, at_least)
            self._blocks[counter] = block[1:]
            return block[0]

    async def _take_block(self, counter: str, at_least: int) -> range:
        key = self._keyspace.counter(counter)
        backoff = Backoff(self._rng)
        while True:
            try:
                found = await self._store.get(key)
                start = max(FIRST_ID if found is None else decode_counter(found.value), at_least)
                result = await self._store.txn(
                    [unchanged(key, 0 if found is None else found.mod_revision)],
                    [Put(key, encode_counter(start + BLOCK_SIZE))],
                )
                if result.succeeded:
                    return range(start, start + BLOCK_SIZE)
            except MetadataUnavailable:
                pass
            await self._sleep(backoff.next_s())
