"""Shards that are opened without a client asking for them.

They are those of ended sessions, those that a leaving broker passed on, and those that a claim left behind. So many at
a time, in the order in which they were wanted; what clients ask for is opened at once, beside these. What fails is
tried again a few times, then it waits for the next sweep, or for a client.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable, Iterable
from functools import partial

import structlog

from magnetar.broker.refusals import refusal_of
from magnetar.metadata.backoff import Backoff
from magnetar.metadata.shards import ShardNotFound
from magnetar.v1 import common_pb2

OPENINGS_MAX = 32
"""At a time. Each is a dozen round trips one after the other, to the metadata store and to bookies."""

ATTEMPTS = 5
"""At one shard, before it waits for the next sweep."""

log = structlog.get_logger("magnetar.takeovers")


class Takeovers:
    """`open_shard` opens one; raises what `ServedShards.open` does."""

    def __init__(self, open_shard: Callable[[int], Awaitable[object]], rng: random.Random) -> None:
        self._open_shard = open_shard
        self._rng = rng
        self._waiting: dict[int, None] = {}
        self._running: dict[int, asyncio.Task[None]] = {}
        self._idle = asyncio.Event()
        self._idle.set()
        self._stopped = False

    def __len__(self) -> int:
        """Those that wait and those under way."""
        return len(self._waiting) + len(self._running)

    def want(self, shards: Iterable[int]) -> None:
        """Each is opened once, however often it is wanted meanwhile."""
        for shard_id in shards:
            if shard_id not in self._running and not self._stopped:
                self._waiting[shard_id] = None
        self._start_some()

    async def idle(self) -> None:
        """Until everything wanted was opened or given up."""
        await self._idle.wait()

    async def stop(self) -> None:
        """Whoever else waits for the same openings goes on."""
        self._stopped = True
        self._waiting.clear()
        tasks = list(self._running.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _start_some(self) -> None:
        while self._waiting and len(self._running) < OPENINGS_MAX:
            shard_id = next(iter(self._waiting))
            del self._waiting[shard_id]
            task = asyncio.create_task(self._open(shard_id), name=f"take over shard {shard_id}")
            self._running[shard_id] = task
            task.add_done_callback(partial(self._opened, shard_id))
        if self._running:
            self._idle.clear()
        else:
            self._idle.set()

    def _opened(self, shard_id: int, _task: asyncio.Task[None]) -> None:
        del self._running[shard_id]
        self._start_some()

    async def _open(self, shard_id: int) -> None:
        backoff = Backoff(self._rng)
        try:
            for _ in range(ATTEMPTS):
                try:
                    await self._open_shard(shard_id)
                    return
                except ShardNotFound:
                    return
                except Exception as error:
                    refused = refusal_of(error)
                    if refused is None:
                        raise
                    if refused.reason != common_pb2.ERROR_REASON_UNAVAILABLE:
                        return  # Another broker was first, or the topic is going.
                    problem = refused.message
                await asyncio.sleep(backoff.next_s())
            log.warning("shard was not taken over", shard=shard_id, problem=problem)
        except Exception:
            log.exception("taking a shard over failed", shard=shard_id)
