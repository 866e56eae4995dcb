"""Shards that this broker should have and nobody asked for: claimed together, and put to rest.

They are those of ended sessions, those that a leaving broker passed on, and those that a claim left behind. A round:

1. Their records are read, neighbours at once.
2. They are claimed, many in a transaction. First those with open ledgers, the newest before the others: they were in
   use when their owner went. If one of a transaction has changed since it was read, each of them is claimed alone.
3. Of those with open ledgers so many at a time are recovered and closed, in the same order. The others are at rest.

What clients ask for waits for none of this: it is claimed and opened at once, beside it, and left out here. Whoever
claims a shard excludes whoever else does, of this broker too. What fails is tried again a few times, then it waits for
the next sweep, or for a client.
"""

from __future__ import annotations

import asyncio
import itertools
import random
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import partial

import structlog

from magnetar.broker.metrics import BrokerMetrics
from magnetar.broker.ownership import Ownership
from magnetar.broker.refusals import refusal_of
from magnetar.broker.served import ServedShards
from magnetar.metadata.backoff import Backoff
from magnetar.metadata.shards import ShardMetadata, ShardSnapshot
from magnetar.v1 import common_pb2

ROUND_MAX = 10_000
"""Shards whose records are in memory at a time."""

TOGETHER_MAX = 32
"""Shards offered to one transaction of claims."""

RECOVERIES_MAX = 32
"""At a time. Each is a few round trips one after the other, to bookies and to the metadata store."""

ATTEMPTS = 5
"""At one shard, before it waits for the next sweep."""

log = structlog.get_logger("magnetar.takeovers")


class Takeovers:
    """See the module."""

    def __init__(self, ownership: Ownership, served: ServedShards, metrics: BrokerMetrics, rng: random.Random) -> None:
        self._ownership = ownership
        self._served = served
        self._metrics = metrics
        self._rng = rng
        self._waiting: dict[int, None] = {}
        self._round: dict[int, None] = {}
        self._claimed: dict[int, ShardMetadata] = {}
        self._recovering: dict[int, asyncio.Task[None]] = {}
        self._attempts: Counter[int] = Counter()
        self._rounds: asyncio.Task[None] | None = None
        self._idle = asyncio.Event()
        self._idle.set()
        self._stopped = False

    def __len__(self) -> int:
        """Those that wait and those under way."""
        return len(self._waiting) + len(self._round) + len(self._claimed) + len(self._recovering)

    def want(self, shards: Iterable[int]) -> None:
        """Each is taken over once, however often it is wanted meanwhile."""
        for shard_id in shards:
            under_way = shard_id in self._round or shard_id in self._claimed or shard_id in self._recovering
            if not under_way and not self._stopped:
                self._waiting[shard_id] = None
        self._go_on()

    async def idle(self) -> None:
        """Until everything wanted was taken over or given up."""
        await self._idle.wait()

    async def stop(self) -> None:
        """What is being recovered goes on."""
        self._stopped = True
        self._waiting.clear()
        self._claimed.clear()
        tasks = [*self._recovering.values(), *([self._rounds] if self._rounds is not None else [])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _go_on(self) -> None:
        if self._waiting and self._rounds is None:
            self._rounds = asyncio.create_task(self._run_rounds(), name="take shards over")
            self._rounds.add_done_callback(self._rounds_ended)
        while self._claimed and len(self._recovering) < RECOVERIES_MAX:
            shard_id = next(iter(self._claimed))
            task = asyncio.create_task(self._recover(self._claimed.pop(shard_id)), name=f"recover shard {shard_id}")
            self._recovering[shard_id] = task
            task.add_done_callback(partial(self._recovered, shard_id))
        if len(self):
            self._idle.clear()
        else:
            self._attempts.clear()
            self._idle.set()

    def _rounds_ended(self, _task: asyncio.Task[None]) -> None:
        self._rounds = None
        self._round = {}
        self._go_on()

    def _recovered(self, shard_id: int, _task: asyncio.Task[None]) -> None:
        del self._recovering[shard_id]
        self._go_on()

    # --- claiming ---

    async def _run_rounds(self) -> None:
        backoff = Backoff(self._rng)
        while self._waiting:
            self._round = dict.fromkeys(itertools.islice(self._waiting, ROUND_MAX))
            for shard_id in self._round:
                del self._waiting[shard_id]
            try:
                await self._claim_all(list(self._round))
                backoff = Backoff(self._rng)
            except Exception as error:
                if again := self._to_try_again(list(self._round), error):
                    await asyncio.sleep(backoff.next_s())
                    self._waiting.update(again)
            self._round = {}

    async def _claim_all(self, shards: Sequence[int]) -> None:
        found = self._wanted_still(await self._ownership.read(shards))
        found.sort(key=lambda snapshot: (-snapshot.newest_ledger, snapshot.record.shard_id))
        while found:
            some = self._wanted_still(found[:TOGETHER_MAX])
            del found[:TOGETHER_MAX]
            while some:
                claimed = await self._ownership.claim_together(some)
                if not claimed:
                    await self._claim_each([snapshot.record.shard_id for snapshot in some])
                    break
                self._take(claimed)
                del some[: len(claimed)]

    async def _claim_each(self, shards: Sequence[int]) -> None:
        """As they are by now. Who of others is first with one has it."""
        for snapshot in self._wanted_still(await self._ownership.read(shards)):
            if self._is_wanted(snapshot.record.shard_id):
                self._take(await self._ownership.claim_together([snapshot]))

    def _wanted_still(self, found: Iterable[ShardSnapshot]) -> list[ShardSnapshot]:
        """Those to be claimed: nobody here opens them, and they are not this session's and closed already."""
        wanted = []
        for snapshot in found:
            record = snapshot.record
            if not self._is_wanted(record.shard_id):
                continue
            if record.owner == self._ownership.session and not snapshot.newest_ledger:
                self._served.rests(record)
            else:
                wanted.append(snapshot)
        return wanted

    def _is_wanted(self, shard_id: int) -> bool:
        return self._served.get(shard_id) is None and not self._served.loading(shard_id)

    def _take(self, claimed: Sequence[ShardMetadata]) -> None:
        self._metrics.claimed_together.inc(len(claimed))
        for shard in claimed:
            self._round.pop(shard.shard_id, None)
            if shard.ledgers:
                self._claimed[shard.shard_id] = shard
            elif self._is_wanted(shard.shard_id):
                self._served.rests(shard.record)
        self._go_on()

    # --- recovering ---

    async def _recover(self, shard: ShardMetadata) -> None:
        if not self._is_wanted(shard.shard_id):
            return  # Somebody asked for it, and it is opened.
        try:
            await asyncio.shield(self._served.settle(shard))
        except Exception as error:
            if again := self._to_try_again([shard.shard_id], error):
                await asyncio.sleep(Backoff(self._rng).next_s() * (1 << self._attempts[shard.shard_id]))
                self._waiting.update(again)

    def _to_try_again(self, shards: Sequence[int], error: Exception) -> dict[int, None]:
        """Those of the failed ones that are not given up, after a pause."""
        refused = refusal_of(error)
        if refused is None:
            log.error("taking shards over failed", shards=len(shards), first=shards[:1], exc_info=error)
            return {}
        if refused.reason != common_pb2.ERROR_REASON_UNAVAILABLE:
            return {}  # Another broker was first.
        self._attempts.update(shards)
        again = dict.fromkeys(s for s in shards if self._attempts[s] < ATTEMPTS)
        if len(again) < len(shards):
            log.warning("shards were not taken over", shards=len(shards) - len(again), problem=refused.message)
        return again
