"""One subscription in one shard that is served here: its consumers, its dispatcher, its cursor.

What is acknowledged goes to the log first (in memory at once, durable when the future completes), then to the
dispatcher. A seek suspends dispatch until it is durable; acknowledgements that arrive meanwhile are of before it.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Protocol

from magnetar.broker.dispatch import (
    Activated,
    CaughtUp,
    Deliver,
    QueueDispatch,
    Reason,
    StreamDispatch,
    Waiting,
)
from magnetar.broker.flow import CONSUMER_UNACKED_MAX, CreditRefused
from magnetar.broker.key_order import CONSUMERS_MAX, KeyOrderedDispatch
from magnetar.broker.pump import Pump
from magnetar.broker.redelivery import DeliveryCounts
from magnetar.broker.refusals import RETRY_AFTER_MS, not_owner, subscription_not_found
from magnetar.managed_log.errors import LogReleased, OffsetTrimmed, ReadFailed
from magnetar.managed_log.log import AckBeyondEnd, Cursor, CursorNotFound, InvalidAck, ManagedLog
from magnetar.metadata.records import Anchor, AtOffset, StartPosition, SubscriptionType
from magnetar.node.rpc import Refused, invalid_argument, unavailable
from magnetar.v1 import admin_pb2, common_pb2

CONSUMERS_PER_SUBSCRIPTION_MAX = 10_000
"""In one shard, those that stand by included."""

Range = tuple[int, int]


class ConsumerSession(Protocol):
    """A consumer at its stream, as its subscription sees it. `end` is called at most once, and nothing after it."""

    @property
    def consumer(self) -> str:
        """Its name; a newer one of this name takes its place. Empty = none."""

    @property
    def client(self) -> str: ...
    @property
    def full(self) -> bool:
        """Its buffer holds as much as it may: nothing is delivered until `Subscription.has_room`."""

    def deliver(self, given: Deliver) -> None: ...
    def caught_up(self, offset: int) -> None: ...
    def activated(self, next_offset: int) -> None: ...
    def drop_deliveries(self) -> tuple[int, int]:
        """Forget what was delivered and not yet sent; returns its messages and bytes of batches."""

    def end(self, refused: Refused) -> None: ...


@dataclass(frozen=True, slots=True)
class Attached:
    """What a consumer is told when it was attached."""

    next_offset: int
    end_offset: int
    active: bool
    cursor_epoch: int


@dataclass(frozen=True, slots=True)
class SubscriptionFacts:
    """A subscription in one shard for an operator. `waiting_for`: why nothing is delivered right now, in words."""

    unacked_messages: int
    consumers: tuple[admin_pb2.ConsumerDescription, ...]
    waiting_for: tuple[str, ...]


class Subscription:
    """See the module. It has a task while consumers are attached.

    reunited_at   the loop's time until which nothing is delivered: consumers of the shard's former owner may be on
                  their way with messages in their hands, and what they hold is not given to others. It ends earlier
                  when all that the former owner named are here (`await_consumers`)
    """

    def __init__(
        self,
        shard_log: ManagedLog,
        name: str,
        type: SubscriptionType,
        subscription_id: int,
        reunited_at: float = 0.0,
    ) -> None:
        self.name = name
        self.type = type
        self.subscription_id = subscription_id
        self._log = shard_log
        self._cursor: Cursor = shard_log.cursors[name]
        self._sessions: dict[int, ConsumerSession] = {}
        self._ids: dict[ConsumerSession, int] = {}
        self._named: dict[str, ConsumerSession] = {}
        self._next_id = itertools.count()
        self._seeks = 0
        self._reunited_at = reunited_at if type is SubscriptionType.QUEUE else 0.0
        self._reunion: asyncio.TimerHandle | None = None
        self._awaited: dict[str, None] | None = None
        self._arrived = asyncio.Event()
        self._core: StreamDispatch | QueueDispatch = self._new_core(key_ordered=False)
        self._pump = Pump(shard_log, self._core, self._carry_out, self._skip_trimmed, self.close)

    # --- consumers ---

    def attach(self, session: ConsumerSession, *, key_ordered: bool = False, held: Sequence[Range] = ()) -> Attached:
        """From now on it gets messages, within its credit. One attached before with its name is ended.

        `held`: offsets delivered to it before that it neither acknowledged nor gave back.
        Raises Refused: CONSUMER_BUSY if others are attached with another order, or are too many; INVALID_ARGUMENT.
        """
        assert not key_ordered or self.type is SubscriptionType.QUEUE
        held = self._checked_held(held)
        self._replace(session)
        self._make_room_for(key_ordered)
        consumer = next(self._next_id)
        self._sessions[consumer] = session
        self._ids[session] = consumer
        if session.consumer:
            self._named[session.consumer] = session
        self._core.attach(consumer, held)
        self._core.pause(consumer, session.full)
        self._came(session.consumer)
        self._wait_for_reunion()
        self._pump.start()
        self._pump.wake()
        return Attached(
            next_offset=self._core.next_offset(),
            end_offset=self._log.end_offset,
            active=not isinstance(self._core, StreamDispatch) or self._core.active == consumer,
            cursor_epoch=self._core.cursor_epoch,
        )

    @property
    def consumers(self) -> list[str]:
        """The names of those that are attached, in the order in which they came: of a stream, the active one first."""
        return [session.consumer for session in self._sessions.values()]

    def await_consumers(self, names: Iterable[str], until: float) -> None:
        """The former owner named its consumers: nothing is delivered until all are here, or until the loop's time.

        Without a name nobody can be told from a new one: then it is the time alone.
        """
        self._awaited = dict.fromkeys(name for name in names if name not in self._named or not name)
        self._reunited_at = until if self._awaited else 0.0
        self._end_reunion_if_complete()

    async def turn_of(self, consumer: str) -> None:
        """Returns when this consumer may be attached: to a stream after the one that was active at the former owner."""
        if self.type is not SubscriptionType.STREAM or not self._awaited or self._sessions:
            return
        active = next(iter(self._awaited))
        with suppress(TimeoutError):
            async with asyncio.timeout_at(self._reunited_at):
                while consumer != active and active in self._awaited:
                    await self._arrived.wait()
                    self._arrived.clear()

    def detach(self, session: ConsumerSession) -> None:
        """What it has and did not acknowledge goes to others. One that is not attached is no error."""
        consumer = self._ids.pop(session, None)
        if consumer is None:
            return
        del self._sessions[consumer]
        self._named.pop(session.consumer, None)
        self._core.detach(consumer)
        if self._sessions:
            self._pump.wake()
        else:
            self._pump.stop()

    def credit(self, session: ConsumerSession, messages: int, size_bytes: int) -> None:
        """Raises Refused(INVALID_ARGUMENT)."""
        try:
            self._core.credit(self._ids[session], messages, size_bytes)
        except CreditRefused as error:
            raise invalid_argument(str(error)) from None
        self._pump.wake()

    def has_room(self, session: ConsumerSession, room: bool) -> None:
        """Its buffer became full, or has room again."""
        consumer = self._ids.get(session)
        if consumer is not None:
            self._core.pause(consumer, not room)
            if room:
                self._pump.wake()

    def ack(self, session: ConsumerSession | None, floor: int, ranges: Sequence[Range]) -> asyncio.Future[None]:
        """Acknowledges below the floor (streams only) and in the ranges. The future, shared, says that it is durable.

        Raises Refused: INVALID_ARGUMENT, NOT_OWNER, SUBSCRIPTION_NOT_FOUND; the future raises LogReleased.
        """
        if floor and self.type is SubscriptionType.QUEUE:
            raise invalid_argument(f"a queue is acknowledged message by message: subscription=`{self.name}`")
        if self._seeks:
            floor, ranges = 0, ()
        with self._translating():
            durable = self._log.ack(self.name, floor=floor, ranges=ranges)
        consumer = None if session is None else self._ids.get(session)
        self._core.acked(consumer, [(0, floor), *ranges] if floor else ranges)
        self._pump.wake()
        return durable

    def nack(self, session: ConsumerSession, ranges: Sequence[Range]) -> None:
        """What it has of these is delivered again at once. Raises Refused(INVALID_ARGUMENT)."""
        if not isinstance(self._core, QueueDispatch):
            raise invalid_argument(f"messages of a stream are not given back: subscription=`{self.name}`")
        consumer = self._ids[session]
        for start, end in ranges:
            if not start < end:
                raise invalid_argument(f"range is empty: start=`{start}` end=`{end}`")
            self._core.nack(consumer, start, end)
        self._pump.wake()

    def flushed(self) -> asyncio.Future[None]:
        """Everything acknowledged before is durable when it completes. Raises as `ack`."""
        with self._translating():
            return self._log.ack(self.name)

    # --- the position ---

    async def seek(self, position: StartPosition) -> Attached:
        """Everything from the position on is delivered anew. Durable on return; positions outside the log are moved in.

        Raises Refused: NOT_OWNER, SUBSCRIPTION_NOT_FOUND, UNAVAILABLE.
        """
        self._suspend(1)
        try:
            with self._translating():
                await self._log.seek(self.name, await offset_of(self._log, position))
            for session, consumer in self._ids.items():
                self._core.refund(consumer, *session.drop_deliveries())
            self._core.seek(self._cursor.floor)
        finally:
            self._suspend(-1)
        return Attached(self._core.next_offset(), self._log.end_offset, True, self._core.cursor_epoch)

    def _suspend(self, seeks: int) -> None:
        self._seeks += seeks
        self._resume()

    def _resume(self) -> None:
        self._pump.suspended = self._seeks > 0 or self._reunion is not None
        self._pump.wake()

    def _came(self, consumer: str) -> None:
        if self._awaited and consumer and consumer in self._awaited:
            del self._awaited[consumer]
            self._arrived.set()
            self._end_reunion_if_complete()

    def _end_reunion_if_complete(self) -> None:
        if not self._awaited:
            self._reunited_at = 0.0
            if self._reunion is not None:
                self._reunion.cancel()
                self._reunited()

    def _wait_for_reunion(self) -> None:
        loop = asyncio.get_running_loop()
        waits = self.type is SubscriptionType.QUEUE
        if waits and self._reunion is None and loop.time() < self._reunited_at:
            self._reunion = loop.call_at(self._reunited_at, self._reunited)
            self._resume()

    def _reunited(self) -> None:
        self._reunion, self._reunited_at = None, 0.0
        self._resume()

    def _skip_trimmed(self, trimmed: OffsetTrimmed) -> None:
        self._core.trimmed(trimmed.start_offset)

    # --- the end ---

    def close(self, refused: Refused) -> None:
        """Ends every consumer with this error: the shard is released, or the subscription deleted."""
        self._pump.stop()
        if self._reunion is not None:
            self._reunion.cancel()
        sessions, self._sessions, self._ids, self._named = self._sessions, {}, {}, {}
        for consumer, session in sessions.items():
            self._core.detach(consumer)
            session.end(refused)

    # --- facts ---

    def describe(self) -> SubscriptionFacts:
        core = self._core
        consumers = [
            admin_pb2.ConsumerDescription(
                consumer=session.consumer,
                shard_id=self._log.shard_id,
                active=not isinstance(core, StreamDispatch) or core.active == consumer,
                unacked_messages=len(core.consumers[consumer].pending),
                credit_messages=max(0, core.consumers[consumer].credits.messages),
                credit_bytes=max(0, core.consumers[consumer].credits.size_bytes),
                client=session.client,
            )
            for consumer, session in self._sessions.items()
        ]
        return SubscriptionFacts(
            unacked_messages=core.unacked if isinstance(core, QueueDispatch) else 0,
            consumers=tuple(consumers),
            waiting_for=tuple(f"shard {self._log.shard_id}: {reason}" for reason in self._reasons()),
        )

    def _reasons(self) -> list[str]:
        """Empty when all is delivered."""
        if self._cursor.backlog(self._log.end_offset) == 0:
            return []
        reasons = ["a seek is being stored"] if self._seeks else []
        if self._reunion is not None:
            reasons.append("the shard was just taken over: consumers that held messages of it may come back")
        if self._pump.problem:
            reasons.append(f"reading fails: {self._pump.problem}")
        causes = self._core.explain(self._log.end_offset)
        return reasons + [self._words(cause) for cause in causes]

    def _words(self, cause: Waiting) -> str:
        session = None if cause.consumer is None else self._sessions.get(cause.consumer)
        who = session.consumer if session is not None else ""
        return _WORDS[cause.reason].format(who=who, number=cause.number)

    # --- parts ---

    def _carry_out(self, effect: Deliver | CaughtUp | Activated) -> None:
        session = self._sessions[effect.consumer]
        if isinstance(effect, Deliver):
            session.deliver(effect)
        elif isinstance(effect, CaughtUp):
            session.caught_up(effect.offset)
        else:
            session.activated(effect.next_offset)

    def _replace(self, newer: ConsumerSession) -> None:
        """A client that lost its connection comes again before the broker sees that the old one is gone."""
        older = self._named.get(newer.consumer)
        if older is not None:
            self.detach(older)
            older.end(_busy(f"a newer connection took this consumer's place: consumer=`{newer.consumer}`"))

    def _make_room_for(self, key_ordered: bool) -> None:
        """Raises Refused(CONSUMER_BUSY). With nobody attached, the new one decides whether keys are kept in order."""
        if self.type is SubscriptionType.QUEUE and key_ordered != isinstance(self._core, KeyOrderedDispatch):
            if self._sessions:
                others = "without" if key_ordered else "with"
                raise _busy(f"others consume {others} key_ordered: subscription=`{self.name}`")
            self._core = self._new_core(key_ordered)
            self._pump.core = self._core
        limit = CONSUMERS_MAX if key_ordered else CONSUMERS_PER_SUBSCRIPTION_MAX
        if len(self._sessions) >= limit:
            raise _busy(f"too many consumers: subscription=`{self.name}` shard=`{self._log.shard_id}` max=`{limit}`")

    def _new_core(self, key_ordered: bool) -> StreamDispatch | QueueDispatch:
        """A dispatcher at the cursor's floor; what was delivered before keeps its count."""
        if self.type is not SubscriptionType.QUEUE:
            return StreamDispatch(self._cursor)
        former = getattr(self, "_core", None)
        core: QueueDispatch
        if key_ordered:
            record = self._log.record
            core = KeyOrderedDispatch(self._cursor, record.first_slot, record.last_slot)
        else:
            core = QueueDispatch(self._cursor)
        if isinstance(former, QueueDispatch):
            counts: DeliveryCounts = former.returned.counts
            core.returned.counts = counts
            core.cursor_epoch = former.cursor_epoch + 1
        return core

    def _checked_held(self, held: Sequence[Range]) -> list[Range]:
        """What of it is in the log. Raises Refused(INVALID_ARGUMENT)."""
        low, high = self._log.start_offset, self._log.end_offset
        ranges = [(max(start, low), min(end, high)) for start, end in held]
        ranges = [(start, end) for start, end in ranges if start < end]
        if sum(end - start for start, end in ranges) > CONSUMER_UNACKED_MAX:
            raise invalid_argument(f"a consumer holds at most {CONSUMER_UNACKED_MAX} messages of a shard")
        return ranges

    @contextmanager
    def _translating(self) -> Iterator[None]:
        """Errors of the log become refusals."""
        try:
            yield
        except AckBeyondEnd as error:
            raise not_owner(
                self._log.shard_id, why=f"another broker has given out what this one lacks: {error}"
            ) from None
        except InvalidAck as error:
            raise invalid_argument(str(error)) from None
        except CursorNotFound:
            raise subscription_not_found(self._log.record.topic, self.name) from None
        except LogReleased as error:
            raise not_owner(self._log.shard_id, why=str(error)) from None
        except ReadFailed as error:
            raise unavailable(str(error), retry_after_ms=RETRY_AFTER_MS) from None


_WORDS = {
    Reason.NO_CONSUMER: "no consumer is attached",
    Reason.NO_CREDIT: "consumer `{who}` takes no more: it has not granted credit",
    Reason.BUFFER_FULL: "consumer `{who}` does not read its stream: what waits for it is at its limit",
    Reason.CONSUMER_UNACKED: "consumer `{who}` has {number} messages that it did not acknowledge: that is the limit",
    Reason.SUBSCRIPTION_UNACKED: "{number} delivered messages are not acknowledged: that is the limit",
    Reason.DRAINING: "{number} slots wait until consumer `{who}`, which had them before, is done with their messages",
    Reason.LOOK_AHEAD: "{number} messages are held back to keep the order of keys: that is the limit",
    Reason.STANDBY: "consumer `{who}` stands by: another one is active",
    Reason.READING: "messages are being read",
    Reason.NOTHING_TO_READ: "everything was delivered and waits to be acknowledged",
}


async def offset_of(shard_log: ManagedLog, position: StartPosition) -> int:
    """The offset where this is now; it may lie outside the log. Raises ReadFailed, LogReleased."""
    if position is Anchor.EARLIEST:
        return shard_log.start_offset
    if position is Anchor.LATEST:
        return shard_log.end_offset
    if isinstance(position, AtOffset):
        return position.offset
    assert not isinstance(position, Anchor)
    return await shard_log.offset_at(position.time_us)


def _busy(message: str) -> Refused:
    return Refused(common_pb2.ERROR_REASON_CONSUMER_BUSY, message)
