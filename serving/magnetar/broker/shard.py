"""A shard while this broker serves it: its log, the table of its producers, its subscriptions.

It joins the three; it decides nothing. The table is rebuilt from the log when the shard is opened, and changes with it:
a group of batches that became durable goes to the table first, then to the streams that wait for it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import NamedTuple, Protocol

import structlog

from magnetar.broker.budget import ByteBudget
from magnetar.broker.dedup import PersistedBatch, ProducerTable, StaleOpening, StoredBatch
from magnetar.broker.metrics import BrokerMetrics
from magnetar.broker.producer_table import decode_states, encode_states
from magnetar.broker.refusals import RETRY_AFTER_MS, not_owner, subscription_not_found
from magnetar.broker.subscription import Subscription
from magnetar.broker.topics import Topics
from magnetar.ledger.client import Standing
from magnetar.managed_log.errors import LogReleased
from magnetar.managed_log.log import Inheritance, ManagedLog, PendingBatch
from magnetar.metadata.records import (
    Anchor,
    AtOffset,
    LedgerRecord,
    Owner,
    StartPosition,
    SubscriptionRecord,
    SubscriptionType,
)
from magnetar.node.rpc import Refused, unavailable
from magnetar.v1 import common_pb2
from magnetar.wire.batch import BatchHeader, parse_header

REUNION_S = 1.0
"""After a shard is opened here, how long its queues wait for the consumers of its former owner."""

Consumers = Mapping[str, Sequence[str]]
"""By subscription the names of those that are attached: of a stream, the active one first. Empty = without a name."""

log = structlog.get_logger("magnetar.shard")


class ProducerPort(Protocol):
    """A producer opened at a shard, as the shard sees it: whom to tell."""

    @property
    def producer_id(self) -> bytes: ...
    @property
    def epoch(self) -> int: ...
    @property
    def opening(self) -> int: ...

    def opened(self, last_sequence: int, recent: list[StoredBatch], stored_epoch: int) -> None:
        """The barrier is passed: nothing sent before can be stored from now on."""

    def stored(self, first_sequence: int, last_sequence: int, first_offset: int, size_bytes: int) -> None:
        """A pushed batch is durable."""

    def fail(self, refused: Refused) -> None:
        """Nothing more is taken; what is pushed is still answered before this is told."""

    def end(self, refused: Refused) -> None:
        """Nothing more comes: what is pushed and not stored has an unknown outcome."""


class Pushed(NamedTuple):
    """The context of a batch in the log's queue."""

    producer: ProducerPort
    first_sequence: int
    last_sequence: int


class ServedShard:
    """`released` is set once the shard is no longer served; `release_reason` then says why, `owner` who has it now.

    While it is being given up, `owner` is the address of the broker that gets it. `used_at`: the loop's time when
    somebody asked for the shard, or was last seen to use it.
    """

    def __init__(
        self,
        shard_log: ManagedLog,
        producers: ProducerTable,
        topics: Topics,
        metrics: BrokerMetrics,
        budget: ByteBudget,
        pending_bytes_max: int,
        now_us: Callable[[], int],
        has_session: Callable[[], bool] = lambda: True,
    ) -> None:
        record = shard_log.record
        self.log = shard_log
        self.shard_id = shard_log.shard_id
        self.topic = record.topic
        self.first_slot = record.first_slot
        self.last_slot = record.last_slot
        self.producers = producers
        self.subscriptions: dict[str, Subscription] = {}
        self.pending = ByteBudget(pending_bytes_max)
        self.published_bytes = 0
        self.published_messages = 0
        self.readers = 0
        self.used_at = asyncio.get_running_loop().time()
        self.released = asyncio.Event()
        self.release_reason = ""
        self.owner = ""
        self._topics = topics
        self._metrics = metrics
        self._budget = budget
        self._now_us = now_us
        self._has_session = has_session
        self._closing = False
        self._inherited = set(shard_log.cursors)
        self._reunited_at = asyncio.get_running_loop().time() + REUNION_S
        self._awaited: Consumers | None = None
        self._handles: dict[ProducerPort, None] = {}
        self._openings: dict[int, ProducerPort] = {}
        # Held while a record is read and its cursor made: else a deletion in between leaves a cursor of no
        # subscription, and a creation is taken for one.
        self._subscription_changes = asyncio.Lock()
        shard_log.on_appended = self._appended
        shard_log.producer_snapshot = self._producer_snapshot

    # --- producers ---

    def open_producer(self, producer: ProducerPort) -> None:
        """Fences what was opened before; `opened` is called now or when nothing of the producer is in flight.

        Raises Refused if a newer connection was here first, or the shard is released.
        """
        self.check_served()
        try:
            opened = self.producers.open(producer.producer_id, producer.epoch, producer.opening, self._now_us())
        except StaleOpening as stale:
            raise fenced(str(stale)) if stale.fenced else superseded() from None
        waiting = self._openings.pop(opened.superseded, None)
        self._handles[producer] = None
        self._budget.join()
        if waiting is not None:
            waiting.end(fenced() if waiting.epoch < producer.epoch else superseded())
        if opened.settled:
            producer.opened(*self.producers.standing(producer.producer_id))
        else:
            self._openings[producer.opening] = producer

    def close_producer(self, producer: ProducerPort) -> None:
        """What is in flight is stored all the same; nobody is told."""
        if producer not in self._handles:
            return
        del self._handles[producer]
        self._budget.leave()
        self._openings.pop(producer.opening, None)
        self.producers.close(producer.producer_id, producer.opening)

    def push(self, producer: ProducerPort, header: BatchHeader, data: bytes) -> None:
        """Gives the log a batch that the table of producers wants to be appended."""
        self.producers.push(header)
        self.pending.take(len(data))
        self._budget.take(len(data))
        self.log.append(PendingBatch(data, header.count, Pushed(producer, header.first_sequence, header.last)))

    def forget_producers(self) -> None:
        self._metrics.forgotten_producers.inc(self.producers.forget(self._now_us()))

    def _appended(self, group: list[PendingBatch]) -> None:
        persisted = []
        messages = size_bytes = 0
        for batch in group:
            producer, first, last = batch.context
            persisted.append(PersistedBatch(producer.producer_id, producer.epoch, first, last, batch.first_offset))
            messages += batch.count
            size_bytes += len(batch.data)
        end_offset = group[-1].first_offset + group[-1].count
        settled = self.producers.persisted(persisted, end_offset, self._now_us())
        self.pending.give(size_bytes)
        self._budget.give(size_bytes)
        self.published_messages += messages
        self.published_bytes += size_bytes
        self._metrics.published_batches.inc(len(group))
        self._metrics.published_messages.inc(messages)
        self._metrics.published_bytes.inc(size_bytes)
        for batch in group:
            producer, first, last = batch.context
            producer.stored(first, last, batch.first_offset, len(batch.data))
        for opening in settled:
            waiting = self._openings.pop(opening, None)
            if waiting is not None:
                waiting.opened(*self.producers.standing(waiting.producer_id))

    def _producer_snapshot(self) -> tuple[list[bytes], int]:
        return encode_states(self.producers.states()), self.producers.covered_offset

    # --- subscriptions ---

    async def subscription(self, name: str, kind: SubscriptionType, start: StartPosition, create: bool) -> Subscription:
        """The subscription here, with a durable cursor; created in the topic if it is new and `create` says so.

        Raises Refused(SUBSCRIPTION_NOT_FOUND, CONSUMER_BUSY for another type, NOT_OWNER once released).
        """
        self.check_served()
        known = self.subscriptions.get(name)
        if known is not None and known.type is kind:
            return known
        async with self._subscription_changes:
            record = await self._topics.open_subscription(self.topic, name, kind, start if create else None)
            await self._ensure_cursor(record)
            return self._subscription(record)

    async def adopt(self) -> None:
        """Makes the cursors here those of the topic's subscriptions: all of these, and no others."""
        async with self._subscription_changes:
            wanted = {record.name: record for record in await self._topics.subscriptions(self.topic)}
            for name in [name for name in self.log.cursors if name not in wanted]:
                await self._drop(name)
            for record in wanted.values():
                await self._ensure_cursor(record)

    async def subscription_changed(self, name: str) -> None:
        """The topic's record of this subscription may have come, gone, or become another's."""
        async with self._subscription_changes:
            record = await self._topics.subscription(self.topic, name)
            if record is None:
                await self._drop(name)
            else:
                await self._ensure_cursor(record)

    async def position(self, start: StartPosition) -> int:
        """The offset where this begins here now, between the log's start and its end."""
        if start is Anchor.EARLIEST:
            return self.log.start_offset
        if start is Anchor.LATEST:
            await self.check_end()
            return self.log.end_offset
        if isinstance(start, AtOffset):
            return min(max(start.offset, self.log.start_offset), self.log.end_offset)
        assert not isinstance(start, Anchor)
        return await self.log.offset_at(start.time_us)

    async def check_end(self) -> None:
        """To be called before the end of the log is told to somebody as the latest.

        A broker without a session may have been replaced; its bookies know. Raises Refused(UNAVAILABLE) if they do not
        say that nobody had taken over.
        """
        if not self._has_session() and await self.log.standing() is not Standing.MINE:
            raise unavailable(
                f"this broker has lost its session, and cannot tell where the log ends: ask again, or another broker "
                f"shard=`{self.shard_id}`",
                retry_after_ms=RETRY_AFTER_MS,
            )

    async def seek(self, name: str, floor: int) -> None:
        """Moves the subscription here, consumers or none; durable on return. Raises Refused(SUBSCRIPTION_NOT_FOUND)."""
        async with self._subscription_changes:
            record = await self._topics.subscription(self.topic, name)
            if record is None:
                raise subscription_not_found(self.topic, name)
            await self._ensure_cursor(record)
            subscription = self.subscriptions.get(name)
            if subscription is not None:
                await subscription.seek(AtOffset(floor))
            else:
                await self.log.seek(name, floor)

    async def _ensure_cursor(self, record: SubscriptionRecord) -> None:
        cursor = self.log.cursors.get(record.name)
        if cursor is not None and cursor.subscription_id != record.subscription_id:
            await self._drop(record.name)
            cursor = None
        if cursor is None:
            floor = await self.position(record.start)
            await self.log.create_cursor(record.name, record.subscription_id, record.type, floor)

    def _subscription(self, record: SubscriptionRecord) -> Subscription:
        self.check_served()
        known = self.subscriptions.get(record.name)
        if known is None:
            reunited_at = self._reunited_at if record.name in self._inherited else 0.0
            known = Subscription(self.log, record.name, record.type, record.subscription_id, reunited_at)
            self.subscriptions[record.name] = known
            if self._awaited is not None:
                known.await_consumers(self._awaited.get(record.name, ()), self._reunited_at)
        return known

    async def _drop(self, name: str) -> None:
        subscription = self.subscriptions.pop(name, None)
        if subscription is not None:
            subscription.close(subscription_not_found(self.topic, name))
        if name in self.log.cursors:
            await self.log.delete_cursor(name)

    def await_consumers(self, consumers: Consumers) -> None:
        """The former owner had these. Each subscription waits for its own, until REUNION_S after the opening here."""
        self._awaited = consumers
        for subscription in self.subscriptions.values():
            subscription.await_consumers(consumers.get(subscription.name, ()), self._reunited_at)

    # --- rest ---

    @property
    def in_use(self) -> bool:
        """Somebody is attached, or waits for something."""
        return bool(
            self._handles
            or self.readers
            or self.pending.used_bytes
            or self._subscription_changes.locked()
            or any(subscription.consumers for subscription in self.subscriptions.values())
        )

    def begin_rest(self) -> None:
        """Nobody uses the shard, and from now on nobody can."""
        self._stop_accepting("the shard is being closed, because nobody used it", "")

    async def rest(self) -> None:
        """Closes the log after `begin_rest`; the shard stays this broker's. Raises what `ManagedLog.rest` does."""
        await self.log.rest()
        self.release(self.release_reason)

    def nobody_comes_back(self) -> None:
        """Nobody was attached when the shard was given up here: its queues need not wait for anybody."""
        self.await_consumers({})

    # --- release ---

    def check_served(self) -> None:
        """Raises Refused(NOT_OWNER) once the shard is released."""
        if self._closing or self.released.is_set():
            raise self.refusal()

    async def check_owned(self) -> None:
        """Reads that no other broker had claimed the shard before this was called; one that is lost is released.

        Raises Refused(NOT_OWNER), MetadataUnavailable.
        """
        with suppress(LogReleased):
            await self.log.check_owned()
        self.check_served()

    def refusal(self) -> Refused:
        """What to tell those who want something of a released shard."""
        return not_owner(self.shard_id, self.owner, self.release_reason)

    async def close(self) -> None:
        """Stops accepting, waits until what was accepted is stored and answered, closes the log, gives the shard up."""
        self._stop_accepting("the broker is stopping", "")
        await self.log.close()
        self.release(self.release_reason)

    def consumers(self) -> Consumers:
        return {name: subscription.consumers for name, subscription in self.subscriptions.items()}

    async def pass_on(self, heir: Owner, address: str, ledger: LedgerRecord | None) -> Inheritance:
        """As `close`, but the shard becomes the heir's, which expects it: everybody is sent to its address at once.

        Producers are told after the answers to what was accepted. What consumers acknowledged is stored and answered.
        Raises what `ManagedLog.pass_on` does; the shard is not served any more then.
        """
        self._stop_accepting("the shard moves to another broker", address)
        for subscription in self.subscriptions.values():
            subscription.close(self.refusal())
        inheritance = await self.log.pass_on(heir, ledger)
        self.release(self.release_reason, address)
        return inheritance

    def _stop_accepting(self, reason: str, address: str) -> None:
        self.release_reason = reason
        self.owner = address
        refused = self.refusal()
        for handle in list(self._handles):
            handle.fail(refused)
        self._closing = True

    def release(self, reason: str, owner: str = "") -> None:
        """Tells everybody who uses the shard that it is no longer served here. What is in flight is unknown to them."""
        if self.released.is_set():
            return
        self.release_reason = reason
        self.owner = owner
        self.released.set()
        refused = self.refusal()
        handles, self._handles = self._handles, {}
        self._openings.clear()
        self._budget.give(self.pending.used_bytes)
        self.pending.give(self.pending.used_bytes)
        for handle in handles:
            self._budget.leave()
            handle.end(refused)
        subscriptions, self.subscriptions = self.subscriptions, {}
        for subscription in subscriptions.values():
            subscription.close(refused)


async def rebuild_producers(shard_log: ManagedLog) -> ProducerTable:
    """The table as its last snapshot and the batches stored since say."""
    table = ProducerTable(max(shard_log.producers_covered_offset, shard_log.start_offset))
    table.restore(decode_states(shard_log.producer_chunks))
    while table.covered_offset < shard_log.end_offset:
        entries = await shard_log.read(table.covered_offset, tail=False)
        for entry in entries:
            for batch in entry.batches:
                if batch.selection:
                    continue  # A part of a batch is put there by the cluster itself, outside any producer's chain.
                header = parse_header(batch.batch, check=False)
                stored = PersistedBatch(
                    header.producer_id, header.epoch, header.first_sequence, header.last, batch.first_offset
                )
                table.replay(stored, batch.first_offset + header.count, entry.publish_time_us)
            table.covered_offset = max(table.covered_offset, entry.end_offset)
    return table


def fenced(why: str = "a newer connection holds this producer") -> Refused:
    return Refused(common_pb2.ERROR_REASON_PRODUCER_FENCED, why)


def superseded() -> Refused:
    return Refused(
        common_pb2.ERROR_REASON_OUT_OF_ORDER,
        "the producer was opened again with the same epoch, on another handle: open it again",
    )
