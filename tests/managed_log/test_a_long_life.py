"""A shard through many owners, lost answers, fences and cut bookies, all drawn from a seed."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from itertools import pairwise
from random import Random

import pytest
from log_world import Cluster, OpenLog

from magnetar.managed_log import chain as chains
from magnetar.managed_log.log import LogError, LogSettings
from magnetar.metadata.records import SubscriptionType
from magnetar.metadata.store import Operation

SETTINGS = LogSettings(
    segment_bytes=1_200,
    entry_bytes=400,
    cursor_ledger_bytes=500,
    read_bytes=700,
    trim_open_bytes=600,
    retry_first_s=0.001,
    retry_last_s=0.01,
)
ROUNDS = 6
STEPS = 40


class Life:
    """told         payloads by offset, as owners confirmed them
    acked        offsets whose acknowledgement was answered
    asked        offsets whose acknowledgement was asked for
    """

    def __init__(self, cluster: Cluster, seed: int) -> None:
        self.cluster = cluster
        self.rng = Random(seed)
        self.told: dict[int, bytes] = {}
        self.acked: set[int] = set()
        self.asked: set[int] = set()
        self.count = 0
        self.owners: list[OpenLog] = []
        self.created = False

    async def owner(self) -> OpenLog:
        cache_bytes = self.rng.choice([0, 4_000, 1 << 20])
        opened = await self.cluster.open(f"broker{len(self.owners)}", SETTINGS, cache_bytes)
        self.owners.append(opened)
        await self.check(opened)
        if not self.created:
            await opened.log.create_cursor("s", 1, SubscriptionType.QUEUE, 0)
            self.created = True
        return opened

    async def check(self, opened: OpenLog) -> None:
        start, end = opened.log.start_offset, opened.log.end_offset
        assert end > max(self.told, default=-1)
        found = await opened.read_all()
        assert found == [self.told.setdefault(offset, payload) for offset, payload in enumerate(found, start)]
        assert all(before < after for before, after in pairwise(found)), "in the order of sending, and once"
        if self.created:
            cursor = opened.log.cursors["s"]
            assert all(cursor.is_acked(offset) for offset in self.acked)
            assert cursor.floor >= start, "trimmed before the acknowledgement was durable"
            assert not any(cursor.is_acked(offset) for offset in range(end) if offset not in self.asked)
            assert all(offset in self.asked for offset in range(start))

    async def live(self, opened: OpenLog) -> None:
        acks: list[tuple[asyncio.Future[None], set[int]]] = []
        try:
            for _ in range(STEPS):
                self.step(opened, acks)
                for _ in range(self.rng.choice([0, 1, 5, 30])):
                    await asyncio.sleep(0)
        except LogError:
            pass  # released: the next owner goes on
        self.hear(opened)
        for future, offsets in acks:
            if future.done() and future.exception() is None:
                self.acked |= offsets

    def hear(self, opened: OpenLog) -> None:
        """What this owner confirmed so far is what others confirmed and read at these offsets."""
        for batch in opened.appended:
            for position, payload in enumerate(batch.context):
                assert self.told.setdefault(batch.first_offset + position, payload) == payload

    def step(self, opened: OpenLog, acks: list[tuple[asyncio.Future[None], set[int]]]) -> None:
        match self.rng.randrange(12):
            case 0 | 1 | 2 | 3 | 4 | 5:
                payloads = [b"%040d" % (self.count + n) for n in range(self.rng.randrange(1, 4))]
                self.count += len(payloads)
                opened.send(*payloads)
            case 6 | 7 | 8:
                end = opened.log.end_offset
                if end:
                    first = self.rng.randrange(max(0, end - 30), end)
                    offsets = {*range(first, min(end, first + self.rng.randrange(1, 6)))}
                    self.asked |= offsets
                    acks.append((opened.log.ack("s", ranges=[(min(offsets), max(offsets) + 1)]), offsets))
            case 9:
                floor = opened.log.end_offset - self.rng.randrange(20)
                if floor > 0:
                    self.asked |= {*range(floor)}
                    acks.append((opened.log.ack("s", floor=floor), {*range(floor)}))
            case 10:
                self.disturb(opened)
            case 11:
                self.cluster.cut.clear()
                self.cluster.store.fault = lambda _: ""

    def disturb(self, opened: OpenLog) -> None:
        match self.rng.randrange(3):
            case 0:
                self.cluster.cut.add(f"bookie{self.rng.randrange(4)}")
                while len(self.cluster.cut) > 1:
                    self.cluster.cut.pop()
            case 1:
                lost = self.rng.choice(["request", "reply"])
                faults = [lost if self.rng.random() < 0.5 else "" for _ in range(4)]

                def fault(operations: Sequence[Operation]) -> str:
                    return faults.pop() if faults else ""

                self.cluster.store.fault = fault
            case 2:
                ledgers = list(opened.log._shard.ledgers.values())
                if ledgers:
                    self.fencing = asyncio.create_task(self.fence(opened, self.rng.randrange(len(ledgers))))

    async def fence(self, opened: OpenLog, which: int) -> None:
        await self.cluster.fence(list(opened.log._shard.ledgers.values())[which])

    async def end(self, opened: OpenLog) -> None:
        """Closed, crashed, or pushed aside while it still runs."""
        self.cluster.cut.clear()
        self.cluster.store.fault = lambda _: ""
        match self.rng.randrange(3):
            case 0:
                try:
                    await opened.log.close()
                except LogError:
                    assert opened.released
                self.hear(opened)
            case 1:
                opened.log.abandon()
        await self.cluster.vanish(opened.broker_id)


@pytest.mark.parametrize("seed", range(12))
async def test_nothing_that_was_answered_is_ever_lost(
    cluster: Cluster, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chains, "SEGMENTS_PER_PAGE", 6)
    await cluster.start_bookie("bookie3")
    life = Life(cluster, seed)
    for _ in range(ROUNDS):
        opened = await life.owner()
        await life.live(opened)
        await life.end(opened)
    last = await life.owner()
    for opened in life.owners:
        life.hear(opened)
    await last.log.close()
    await cluster.check()
