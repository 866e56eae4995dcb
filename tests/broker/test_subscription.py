"""Subscriptions and readers over a log whose reads and acknowledgements finish when the test says so."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from typing import Any, cast

import pytest

from magnetar.broker import pump
from magnetar.broker.dispatch import Deliver
from magnetar.broker.reader import Reader
from magnetar.broker.shard import ServedShard
from magnetar.broker.subscription import Subscription
from magnetar.managed_log.cursor import CursorTable
from magnetar.managed_log.errors import LogReleased, OffsetTrimmed, ReadFailed, Released
from magnetar.managed_log.log import InvalidAck, ManagedLog, StoredEntry
from magnetar.metadata.records import Anchor, AtOffset, ShardRecord, ShardState, SubscriptionType
from magnetar.node.rpc import Refused
from magnetar.v1 import common_pb2
from magnetar.wire.entry import EntryBatch
from magnetar.wire.selection import indices

BATCH = 10


class ScriptedLog:
    """Batches of BATCH messages; each read waits for `answer`."""

    shard_id = 5

    def __init__(self, batches: int, kind: SubscriptionType) -> None:
        self.table = CursorTable()
        self.table.create("s", 1, kind, 0)
        self.cursors = self.table.cursors
        self.record = ShardRecord(5, "public/default/orders", ShardState.OPEN, 1, None, 0, 65_535)
        self.start_offset = 0
        self.end_offset = batches * BATCH
        self.on_end: list[Any] = []
        self.reads: list[tuple[int, asyncio.Future[None]]] = []
        self.stored = asyncio.get_running_loop().create_future()
        self.asked = asyncio.Event()

    async def read(self, offset: int, *, max_bytes: int, tail: bool) -> list[StoredEntry]:
        answer: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.reads.append((offset, answer))
        self.asked.set()
        await answer
        first = offset // BATCH * BATCH
        return [
            StoredEntry(at, at + BATCH, 1, [EntryBatch(at, BATCH, b"batch")])
            for at in range(first, self.end_offset, BATCH)
        ]

    async def read_is_asked(self) -> int:
        """The offset of the oldest read not yet answered."""
        while not self.reads:
            self.asked.clear()
            await self.asked.wait()
        return self.reads[0][0]

    async def answer(self, error: Exception | None = None) -> int:
        offset = await self.read_is_asked()
        answer = self.reads.pop(0)[1]
        if not answer.done():
            _ = answer.set_result(None) if error is None else answer.set_exception(error)
        return offset

    def ack(self, name: str, *, floor: int = 0, ranges: Sequence[tuple[int, int]] = ()) -> asyncio.Future[None]:
        if max([floor, *(end for _, end in ranges)]) > self.end_offset:
            raise InvalidAck("beyond the end")
        self.table.ack(name, floor, ranges)
        return self.stored

    async def seek(self, name: str, floor: int) -> None:
        self.table.seek(name, min(floor, self.end_offset))
        await self.stored


class Session:
    """A consumer that remembers what it is told."""

    client = "test"

    def __init__(self, consumer: str = "") -> None:
        self.consumer = consumer
        self.full = False
        self.given: list[Deliver] = []
        self.ended: list[Refused] = []
        self.caught_up_at: list[int] = []
        self.active_at: list[int] = []
        self.told = asyncio.Event()

    def deliver(self, given: Deliver) -> None:
        self.given.append(given)
        self.told.set()

    def caught_up(self, offset: int) -> None:
        self.caught_up_at.append(offset)
        self.told.set()

    def activated(self, next_offset: int) -> None:
        self.active_at.append(next_offset)

    def drop_deliveries(self) -> tuple[int, int]:
        messages, size_bytes = sum(g.messages for g in self.given), sum(len(g.batch.data) for g in self.given)
        self.given.clear()
        return messages, size_bytes

    def end(self, refused: Refused) -> None:
        self.ended.append(refused)
        self.told.set()

    def offsets(self) -> list[int]:
        return [g.batch.first_offset + i for g in self.given for i in indices(g.selection, g.batch.count)]

    async def has(self, count: int) -> list[int]:
        while len(self.offsets()) < count and not self.ended:
            self.told.clear()
            await self.told.wait()
        return self.offsets()

    async def is_ended(self) -> common_pb2.ErrorReason:
        while not self.ended:
            self.told.clear()
            await self.told.wait()
        return self.ended[0].reason


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pump, "RETRY_FIRST_S", 0.0)
    monkeypatch.setattr(pump, "RETRY_MAX_S", 0.0)


@pytest.fixture
def opened() -> Iterator[list[Subscription]]:
    subscriptions: list[Subscription] = []
    yield subscriptions
    for subscription in subscriptions:
        subscription.close(Refused(common_pb2.ERROR_REASON_UNAVAILABLE, "the test is over"))


def subscription_of(
    log: ScriptedLog, opened: list[Subscription], kind: SubscriptionType = SubscriptionType.QUEUE
) -> Subscription:
    opened.append(Subscription(cast(ManagedLog, log), "s", kind, 1))
    return opened[-1]


def attached(subscription: Subscription, *sessions: Session, messages: int = 1000) -> None:
    for session in sessions:
        subscription.attach(session)
        subscription.credit(session, messages, 1 << 30)


async def test_what_was_read_before_a_seek_is_not_delivered_after_it(opened: list[Subscription]) -> None:
    log = ScriptedLog(3, SubscriptionType.QUEUE)
    subscription, session = subscription_of(log, opened), Session()
    attached(subscription, session)
    assert await log.read_is_asked() == 0
    log.stored.set_result(None)
    result = await subscription.seek(AtOffset(25))
    assert (result.next_offset, result.cursor_epoch) == (25, 2)
    await log.answer()
    assert await log.answer() == 25
    assert await session.has(5) == [25, 26, 27, 28, 29]
    assert {given.cursor_epoch for given in session.given} == {2}


async def test_nothing_is_delivered_while_a_seek_is_being_stored(opened: list[Subscription]) -> None:
    log = ScriptedLog(3, SubscriptionType.QUEUE)
    subscription, session = subscription_of(log, opened), Session()
    attached(subscription, session, messages=3)
    await log.answer()
    await session.has(3)
    seek = asyncio.create_task(subscription.seek(AtOffset(1)))
    await asyncio.sleep(0)
    subscription.ack(session, 0, [(1, 2)])
    subscription.credit(session, 10, 10)
    assert "a seek is being stored" in subscription.describe().waiting_for[0]
    log.stored.set_result(None)
    await seek
    assert session.offsets() == [], "what was not sent is dropped"
    await log.answer()
    assert await session.has(13) == list(range(1, 14)), "an acknowledgement from before it changes nothing"


async def test_a_read_that_fails_is_repeated_and_explained(opened: list[Subscription]) -> None:
    log = ScriptedLog(1, SubscriptionType.STREAM)
    subscription, session = subscription_of(log, opened, SubscriptionType.STREAM), Session()
    attached(subscription, session)
    for _ in range(3):
        assert await log.answer(ReadFailed("no bookie answers")) == 0
    await log.read_is_asked()
    assert "reading fails: no bookie answers" in subscription.describe().waiting_for[0]
    await log.answer()
    assert await session.has(10) == list(range(10))


async def test_a_subscription_goes_on_above_what_was_trimmed(opened: list[Subscription]) -> None:
    log = ScriptedLog(3, SubscriptionType.QUEUE)
    subscription, session = subscription_of(log, opened), Session()
    attached(subscription, session)
    await log.answer(OffsetTrimmed(0, 20))
    assert await log.answer() == 20
    assert await session.has(10) == list(range(20, 30))


async def test_a_fault_of_its_own_ends_its_consumers(opened: list[Subscription]) -> None:
    log = ScriptedLog(1, SubscriptionType.QUEUE)
    subscription, session = subscription_of(log, opened), Session()
    attached(subscription, session)
    await log.answer(ZeroDivisionError("a bug"))
    assert await session.is_ended() == common_pb2.ERROR_REASON_INTERNAL
    assert "ZeroDivisionError" not in session.ended[0].message
    assert log.on_end == []
    again = Session()
    attached(subscription, again)
    await log.answer()
    assert await again.has(10) == list(range(10))


async def test_a_released_log_leaves_the_news_to_its_shard(opened: list[Subscription]) -> None:
    log = ScriptedLog(1, SubscriptionType.QUEUE)
    subscription, session = subscription_of(log, opened), Session()
    attached(subscription, session)
    await log.answer(LogReleased(5, Released(None, "fenced")))
    subscription.close(Refused(common_pb2.ERROR_REASON_NOT_OWNER, "gone"))
    assert [refused.reason for refused in session.ended] == [common_pb2.ERROR_REASON_NOT_OWNER]


async def test_without_consumers_it_has_no_task_and_hears_nothing(opened: list[Subscription]) -> None:
    log = ScriptedLog(1, SubscriptionType.QUEUE)
    subscription, session = subscription_of(log, opened), Session()
    tasks = len(asyncio.all_tasks())
    attached(subscription, session)
    assert len(log.on_end) == 1
    await log.read_is_asked()
    subscription.detach(session)
    subscription.detach(session)
    assert log.on_end == []
    assert not log.reads[0][1].done() or log.reads[0][1].cancelled()
    await asyncio.sleep(0)
    assert len(asyncio.all_tasks()) == tasks
    log.reads.clear()
    attached(subscription, session)
    await log.answer()
    assert await session.has(10) == list(range(10))


async def test_a_full_session_gets_nothing_until_it_has_room(opened: list[Subscription]) -> None:
    log = ScriptedLog(1, SubscriptionType.QUEUE)
    subscription, full, other = subscription_of(log, opened), Session("full"), Session("other")
    full.full = True
    attached(subscription, full, other, messages=5)
    await log.answer()
    assert await other.has(5) == list(range(5))
    assert full.given == []
    subscription.has_room(full, True)
    assert await full.has(5) == list(range(5, 10))
    subscription.has_room(full, False)
    assert [words.partition(": ")[2] for words in subscription.describe().waiting_for] == [
        "everything was delivered and waits to be acknowledged"
    ]


async def test_with_nobody_attached_the_next_one_decides_about_the_order_of_keys(opened: list[Subscription]) -> None:
    log = ScriptedLog(1, SubscriptionType.QUEUE)
    subscription, session = subscription_of(log, opened), Session()
    attached(subscription, session, messages=4)
    await log.answer()
    await session.has(4)
    with pytest.raises(Refused) as refused:
        subscription.attach(Session(), key_ordered=True)
    assert refused.value.reason == common_pb2.ERROR_REASON_CONSUMER_BUSY
    subscription.detach(session)
    epoch = subscription.attach(session, key_ordered=True).cursor_epoch
    subscription.detach(session)
    again = Session()
    assert subscription.attach(again).cursor_epoch > epoch
    subscription.credit(again, 6, 100)
    await log.answer()
    assert await again.has(6) == list(range(6))
    assert again.given[0].redeliveries == (0, 1, 1, 1, 2, 1, 3, 1), "counts outlive the dispatcher"


async def test_a_reader_that_trimming_overtook_ends() -> None:
    log = ScriptedLog(3, SubscriptionType.STREAM)
    session, shard = Session(), Shard(log)
    reader = await Reader.open(cast(ServedShard, shard), session, Anchor.EARLIEST)
    reader.start()
    reader.credit(5, 100)
    assert shard.readers == 1
    await log.answer(OffsetTrimmed(0, 20))
    assert await session.is_ended() == common_pb2.ERROR_REASON_OFFSET_TRIMMED
    assert (log.on_end, shard.readers) == ([], 0)
    reader.close()
    assert shard.readers == 0


async def test_a_reader_cannot_begin_below_what_is_stored() -> None:
    log = ScriptedLog(3, SubscriptionType.STREAM)
    log.start_offset = 10
    with pytest.raises(Refused) as refused:
        await Reader.open(cast(ServedShard, Shard(log)), Session(), AtOffset(9))
    assert refused.value.reason == common_pb2.ERROR_REASON_OFFSET_TRIMMED


class Shard:
    """A served shard, as a reader sees it."""

    shard_id = 5
    readers = 0

    def __init__(self, log: ScriptedLog) -> None:
        self.log = log
        self.released = asyncio.Event()

    def check_served(self) -> None:
        return

    async def check_end(self) -> None:
        return
