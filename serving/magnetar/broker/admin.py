"""The admin service: topics, subscriptions, ledgers, health. Any broker answers for the whole cluster.

What an owner alone knows comes from the owner: of each shard that another broker serves, this one asks that broker
(`DescribeShard`, `SettleSubscription`, a seek that is passed on), within a deadline. Who is asked so answers for shards
that it serves itself, or with NOT_OWNER, and asks nobody: there are no circles. Where no owner answers, a description
says what the records say, and that the rest is missing; what would change something is refused.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Mapping, Sequence
from typing import Any, Protocol, TypeVar

from google.protobuf.message import Message

from magnetar.broker.describe import Records, describe_shard, is_settled, ledger_description
from magnetar.broker.health import Findings
from magnetar.broker.layout import even_ranges, shard_of
from magnetar.broker.peers import ADMIN_SERVICE, Peers
from magnetar.broker.refusals import RETRY_AFTER_MS, checked_name, subscription_not_found, topic_name
from magnetar.broker.shard import ServedShard
from magnetar.broker.topics import Topics
from magnetar.ledger.bookie_rpc import Bookies
from magnetar.metadata.backoff import Backoff
from magnetar.metadata.codec import decode_broker, decode_copy, start_position_from_message
from magnetar.metadata.keyspace import Keyspace
from magnetar.metadata.records import (
    LedgerRecord,
    Owner,
    ShardRecord,
    StartPosition,
    SubscriptionRecord,
    SubscriptionType,
    TopicRecord,
)
from magnetar.metadata.store import MetadataStore
from magnetar.node.rpc import Context, Refused, invalid_argument, parse, unavailable
from magnetar.node.settings import BrokerSettings
from magnetar.v1 import admin_pb2 as pb
from magnetar.v1 import common_pb2, metadata_pb2

PAGE_MAX = 1_000
"""Names or ledgers of one answer."""
SHARDS_AT_ONCE = 16

ASK_ATTEMPTS = 3
"""At the owner of a shard, which may change meanwhile, for a description."""

SETTLE_S = 10.0
"""For the owners of all shards to know a new subscription; a crashed one has to be replaced first."""

T = TypeVar("T")
AnswerT = TypeVar("AnswerT", bound=Message)


class AdministeredBroker(Protocol):
    """What the service needs of its broker."""

    settings: BrokerSettings
    topics: Topics
    peers: Peers

    async def shard(self, topic: str, shard_id: int) -> ServedShard: ...
    async def delete_topic(self, topic: str) -> None: ...


class Admin:
    def __init__(
        self,
        broker: AdministeredBroker,
        store: MetadataStore,
        keyspace: Keyspace,
        bookies: Bookies,
        now_us: Callable[[], int],
        rng: random.Random,
    ) -> None:
        self._broker = broker
        self._topics = broker.topics
        self._rng = rng
        self._bookies = bookies
        self._keyspace = keyspace
        self._now_us = now_us
        self._records = Records(store, keyspace)

    def methods(self) -> Mapping[str, Callable[[bytes, Context], Awaitable[bytes]]]:
        return {
            "CreateTopic": self.create_topic,
            "ListTopics": self.list_topics,
            "DescribeTopic": self.describe_topic,
            "DeleteTopic": self.delete_topic,
            "CreateSubscription": self.create_subscription,
            "ListSubscriptions": self.list_subscriptions,
            "DescribeSubscription": self.describe_subscription,
            "SeekSubscription": self.seek_subscription,
            "DeleteSubscription": self.delete_subscription,
            "ListLedgers": self.list_ledgers,
            "DescribeLedger": self.describe_ledger,
            "ClusterHealth": self.cluster_health,
            "DescribeShard": self.describe_shard,
            "SettleSubscription": self.settle_subscription,
        }

    # --- topics ---

    async def create_topic(self, data: bytes, _context: Context) -> bytes:
        request = parse(pb.CreateTopicRequest, data)
        topic = topic_name(request.topic)
        if request.dry_run:
            await self._topics.check_creatable(topic, request.shards)
            shards = [
                pb.ShardDescription(first_slot=first, last_slot=last, state=metadata_pb2.SHARD_STATE_OPEN)
                for first, last in even_ranges(request.shards)
            ]
            planned = pb.TopicDescription(topic=topic, epoch=1, shards=shards)
            return pb.CreateTopicResponse(topic=planned).SerializeToString()
        record = await self._topics.create(topic, request.shards)
        return pb.CreateTopicResponse(topic=await self._describe(record)).SerializeToString()

    async def list_topics(self, data: bytes, _context: Context) -> bytes:
        request = parse(pb.ListTopicsRequest, data)
        names, more = await self._topics.page(request.prefix, request.after, _page_size(request.limit))
        return pb.ListTopicsResponse(topics=names, more=more).SerializeToString()

    async def describe_topic(self, data: bytes, _context: Context) -> bytes:
        request = parse(pb.DescribeTopicRequest, data)
        record = await self._topics.get(topic_name(request.topic))
        return pb.DescribeTopicResponse(topic=await self._describe(record)).SerializeToString()

    async def delete_topic(self, data: bytes, _context: Context) -> bytes:
        request = parse(pb.DeleteTopicRequest, data)
        topic = topic_name(request.topic)
        if (marked := await self._topics.marked(topic)) is not None:
            described = await self._shards_as_recorded(marked)
        else:
            described = list((await self._describe(await self._topics.get(topic))).shards)
        shards = [shard for shard in described if shard is not None]
        if not request.dry_run:
            await self._broker.delete_topic(topic)
        segments = [segment for shard in shards for segment in shard.segments]
        return pb.DeleteTopicResponse(
            shards=len(shards),
            messages=sum(segment.messages for segment in segments),
            bytes=sum(segment.bytes for segment in segments),
        ).SerializeToString()

    async def _describe(self, record: TopicRecord) -> pb.TopicDescription:
        shards = await _gather(self._describe_shard(record.topic, shard.shard_id) for shard in record.shards)
        subscriptions = await self._topics.subscriptions(record.topic)
        return pb.TopicDescription(
            topic=record.topic,
            epoch=record.layout_epoch,
            shards=[shard for shard in shards if shard is not None],
            subscriptions=[subscription.name for subscription in subscriptions],
        )

    async def _describe_shard(self, topic: str, shard_id: int) -> pb.ShardDescription | None:
        metadata = await self._records.shard(shard_id)
        if metadata is None:
            return None
        if not is_settled(metadata):
            known = await self._ask(pb.DescribeShardRequest(topic=topic, shard_id=shard_id, segments=True))
            if known is not None:
                return known.shard
        return await describe_shard(metadata, None)

    async def _shards_as_recorded(self, record: TopicRecord) -> list[pb.ShardDescription | None]:
        async def one(shard_id: int) -> pb.ShardDescription | None:
            metadata = await self._records.shard(shard_id)
            return None if metadata is None else await describe_shard(metadata, None)

        return await _gather(one(shard.shard_id) for shard in record.shards)

    # --- what the owner of a shard knows ---

    async def describe_shard(self, data: bytes, _context: Context) -> bytes:
        request = parse(pb.DescribeShardRequest, data)
        shard = await self._broker.shard(topic_name(request.topic), request.shard_id)
        return (await self._known_here(shard, request)).SerializeToString()

    async def settle_subscription(self, data: bytes, _context: Context) -> bytes:
        request = parse(pb.SettleSubscriptionRequest, data)
        name = checked_name("subscription", request.subscription)
        shard = await self._broker.shard(topic_name(request.topic), request.shard_id)
        await shard.subscription_changed(name)
        return pb.SettleSubscriptionResponse().SerializeToString()

    async def _known_here(self, shard: ServedShard, request: pb.DescribeShardRequest) -> pb.DescribeShardResponse:
        response = pb.DescribeShardResponse()
        if request.segments:
            # Read now: taking the shard over may have closed ledgers.
            metadata = await self._records.shard(shard.shard_id)
            if metadata is not None:
                response.shard.CopyFrom(await describe_shard(metadata, shard))
        for name in request.subscriptions:
            described = response.subscriptions.add(subscription=name)
            _describe_in(described, shard)
            if request.ages:
                described.oldest_age_s = await self._oldest_age_s(name, shard)
        return response

    async def _ask(self, request: pb.DescribeShardRequest) -> pb.DescribeShardResponse | None:
        """What the shard's owner knows, be it this broker or another one; None if nobody answers for it now."""
        for _ in range(ASK_ATTEMPTS):
            try:
                place = await self._place(request.topic, request.shard_id)
                if isinstance(place, ServedShard):
                    return await self._known_here(place, request)
                return await self._at(place, "DescribeShard", request, pb.DescribeShardResponse)
            except Refused as refused:
                if refused.reason == common_pb2.ERROR_REASON_UNAVAILABLE:
                    return None
                if refused.reason != common_pb2.ERROR_REASON_NOT_OWNER:
                    raise
        return None

    async def _place(self, topic: str, shard_id: int) -> ServedShard | str:
        """The shard, if it is or may be served here; else its broker's address. Raises Refused if none is known."""
        try:
            return await self._broker.shard(topic, shard_id)
        except Refused as refused:
            if refused.reason != common_pb2.ERROR_REASON_NOT_OWNER or not refused.owner:
                raise
            return refused.owner

    async def _at(self, address: str, method: str, request: Message, answer: type[AnswerT]) -> AnswerT:
        return await self._broker.peers.call(address, ADMIN_SERVICE + method, request, answer)

    async def _settle(self, topic: str, shard_id: int, name: str) -> None:
        """The shard's cursor follows the subscription's record. Raises Refused."""
        place = await self._place(topic, shard_id)
        if isinstance(place, ServedShard):
            await place.subscription_changed(name)
        else:
            request = pb.SettleSubscriptionRequest(topic=topic, shard_id=shard_id, subscription=name)
            await self._at(place, "SettleSubscription", request, pb.SettleSubscriptionResponse)

    async def _settle_in_time(self, topic: str, shard_id: int, name: str) -> None:
        """Again while the shard changes hands. Raises Refused(UNAVAILABLE) after SETTLE_S."""
        backoff = Backoff(self._rng)
        loop = asyncio.get_running_loop()
        deadline = loop.time() + SETTLE_S
        while True:
            try:
                return await self._settle(topic, shard_id, name)
            except Refused as refused:
                passing = refused.reason in (common_pb2.ERROR_REASON_NOT_OWNER, common_pb2.ERROR_REASON_UNAVAILABLE)
                if not passing:
                    raise
                if loop.time() >= deadline:
                    raise unavailable(
                        f"a shard's owner does not answer: what was asked for stands in the records, and the shard "
                        f"follows by itself topic=`{topic}` shard=`{shard_id}` cause=`{refused.message}`",
                        retry_after_ms=RETRY_AFTER_MS,
                    ) from None
            await asyncio.sleep(backoff.next_s())

    # --- subscriptions ---

    async def create_subscription(self, data: bytes, _context: Context) -> bytes:
        request = parse(pb.CreateSubscriptionRequest, data)
        topic, name = topic_name(request.topic), checked_name("subscription", request.subscription)
        kind = _subscription_type(request.type)
        await self._topics.create_subscription(topic, name, kind, start_position_from_message(request.start))
        # On return every shard keeps what the subscription has not seen. A watch would tell the owners, but later.
        layout = await self._topics.get(topic)
        await _gather(self._settle_in_time(topic, shard.shard_id, name) for shard in layout.shards)
        return pb.CreateSubscriptionResponse().SerializeToString()

    async def list_subscriptions(self, data: bytes, _context: Context) -> bytes:
        topic = topic_name(parse(pb.ListSubscriptionsRequest, data).topic)
        records = await self._described(topic, await self._topics.subscriptions(topic))
        response = pb.ListSubscriptionsResponse()
        for record, described in records:
            response.subscriptions.add(
                subscription=record.name,
                type=described.type,
                backlog_messages=described.backlog_messages,
                consumers=len({consumer.consumer for consumer in described.consumers}),
            )
        return response.SerializeToString()

    async def describe_subscription(self, data: bytes, _context: Context) -> bytes:
        request = parse(pb.DescribeSubscriptionRequest, data)
        topic, name = topic_name(request.topic), checked_name("subscription", request.subscription)
        record = await self._subscription(topic, name)
        [(_, described)] = await self._described(topic, [record], ages=True)
        return pb.DescribeSubscriptionResponse(subscription=described).SerializeToString()

    async def seek_subscription(self, data: bytes, _context: Context) -> bytes:
        request = parse(pb.SeekSubscriptionRequest, data)
        topic, name = topic_name(request.topic), checked_name("subscription", request.subscription)
        if request.position.WhichOneof("position") is None:
            raise invalid_argument("a seek needs a position: earliest, latest, an offset or a time")
        position = start_position_from_message(request.position)
        record = await self._subscription(topic, name)
        layout = await self._topics.get(topic)
        if request.shard_id and shard_of(layout, request.shard_id) is None:
            raise invalid_argument(f"the topic has no such shard topic=`{topic}` shard=`{request.shard_id}`")
        if request.passed_on:
            shard = await self._broker.shard(topic, request.shard_id)
            return (await self._seek(shard, record, position, request.dry_run)).SerializeToString()
        wanted = [request.shard_id] if request.shard_id else [shard.shard_id for shard in layout.shards]
        # A shard that nobody serves now refuses before any cursor moves; a seek that is cut short can be asked again.
        places = await _gather(self._place(topic, shard_id) for shard_id in wanted)
        response = pb.SeekSubscriptionResponse()
        for shard_id, place in zip(wanted, places, strict=True):
            if isinstance(place, ServedShard):
                moved = await self._seek(place, record, position, request.dry_run)
            else:
                passed_on = pb.SeekSubscriptionRequest(passed_on=True)
                passed_on.MergeFrom(request)
                passed_on.shard_id = shard_id
                moved = await self._at(place, "SeekSubscription", passed_on, pb.SeekSubscriptionResponse)
            response.MergeFrom(moved)
        return response.SerializeToString()

    async def delete_subscription(self, data: bytes, _context: Context) -> bytes:
        request = parse(pb.DeleteSubscriptionRequest, data)
        topic, name = topic_name(request.topic), checked_name("subscription", request.subscription)
        record = await self._subscription(topic, name)
        [(_, described)] = await self._described(topic, [record])
        if not request.dry_run:
            await self._topics.delete_subscription(topic, name)
            layout = await self._topics.get(topic)
            await _gather(self._settle_or_leave(topic, shard.shard_id, name) for shard in layout.shards)
        return pb.DeleteSubscriptionResponse(backlog_messages=described.backlog_messages).SerializeToString()

    async def _settle_or_leave(self, topic: str, shard_id: int, name: str) -> None:
        """A shard whose owner does not answer now follows the record by itself: nothing is missed by that."""
        try:
            await self._settle(topic, shard_id, name)
        except Refused as refused:
            if refused.reason not in (common_pb2.ERROR_REASON_NOT_OWNER, common_pb2.ERROR_REASON_UNAVAILABLE):
                raise

    async def _subscription(self, topic: str, name: str) -> SubscriptionRecord:
        await self._topics.get(topic)
        record = await self._topics.subscription(topic, name)
        if record is None:
            raise subscription_not_found(topic, name)
        return record

    async def _seek(
        self, shard: ServedShard, record: SubscriptionRecord, position: StartPosition, dry_run: bool
    ) -> pb.SeekSubscriptionResponse:
        floor = await shard.position(position)
        if not dry_run:
            await shard.seek(record.name, floor)
        return pb.SeekSubscriptionResponse(shards=[_cursor_at(shard, floor)])

    async def _described(
        self, topic: str, records: Sequence[SubscriptionRecord], *, ages: bool = False
    ) -> list[tuple[SubscriptionRecord, pb.SubscriptionDescription]]:
        """Each subscription in all shards of the topic."""
        layout = await self._topics.get(topic)
        names = [record.name for record in records]
        shards = await _gather(
            self._ask(pb.DescribeShardRequest(topic=topic, shard_id=shard.shard_id, subscriptions=names, ages=ages))
            for shard in layout.shards
        )
        described = [(record, _description(record)) for record in records]
        for shard, known in zip(layout.shards, shards, strict=True):
            for number, (_, description) in enumerate(described):
                if known is None:
                    missing = f"shard {shard.shard_id}: nobody answers for it now, and it is not counted"
                    description.waiting_for.append(missing)
                else:
                    _merge(description, known.subscriptions[number])
        return described

    async def _oldest_age_s(self, name: str, shard: ServedShard) -> float:
        """Of the oldest message that is not acknowledged; 0 if all are."""
        cursor = shard.log.cursors.get(name)
        if cursor is None or not cursor.backlog(shard.log.end_offset):
            return 0.0
        first = max(cursor.next_unacked(cursor.floor), shard.log.start_offset)
        if first >= shard.log.end_offset:
            return 0.0
        return max(0.0, (self._now_us() - await shard.log.publish_time_of(first)) / 1e6)

    # --- ledgers and health ---

    async def list_ledgers(self, data: bytes, _context: Context) -> bytes:
        request = parse(pb.AdminServiceListLedgersRequest, data)
        limit = _page_size(request.limit)
        if request.topic:
            topic = topic_name(request.topic)
            found = await self._ledgers_of_topic(await self._topics.get(topic), request.after)
        else:
            found = await self._records.ledgers(request.after, limit + 1)
        return pb.AdminServiceListLedgersResponse(
            ledgers=[ledger_description(ledger, topic) for ledger, topic in found[:limit]], more=len(found) > limit
        ).SerializeToString()

    async def _ledgers_of_topic(self, record: TopicRecord, after: int) -> list[tuple[LedgerRecord, str]]:
        async def of_shard(shard_id: int) -> list[LedgerRecord]:
            metadata = await self._records.shard(shard_id)
            return [] if metadata is None else await self._records.ledgers_of_shard(metadata)

        shards = await _gather(of_shard(shard.shard_id) for shard in record.shards)
        ledgers = [ledger for shard in shards for ledger in shard if ledger.ledger_id > after]
        return [(ledger, record.topic) for ledger in sorted(ledgers, key=lambda ledger: ledger.ledger_id)]

    async def describe_ledger(self, data: bytes, _context: Context) -> bytes:
        ledger_id = parse(pb.DescribeLedgerRequest, data).ledger_id
        found = await self._records.ledger(ledger_id)
        if found is None:
            raise Refused(
                common_pb2.ERROR_REASON_LEDGER_NOT_FOUND,
                f"the ledger does not exist: it may have been trimmed ledger=`{ledger_id}`",
            )
        return pb.DescribeLedgerResponse(ledger=ledger_description(*found)).SerializeToString()

    async def cluster_health(self, data: bytes, _context: Context) -> bytes:
        parse(pb.ClusterHealthRequest, data)
        sessions = set()
        async for item in self._records.under(self._keyspace.brokers_prefix()):
            sessions.add(Owner(decode_broker(item.value).broker_id, item.create_revision))
        bookies = {bookie.bookie_id: bookie for bookie in self._bookies.registered()}
        findings = Findings(bookies, sessions, (await self._records.repair()).enabled)
        async for record in self._records.shards():
            if isinstance(record, ShardRecord):
                findings.shard(record)
            else:
                findings.ledger(record)
        async for ledger in self._records.closed_ledgers():
            findings.ledger(ledger)
        async for item in self._records.under(self._keyspace.copies_prefix()):
            findings.copy(decode_copy(item.value))
        problems = findings.problems(self._broker.settings.ensemble_size)
        return pb.ClusterHealthResponse(
            healthy=not problems,
            brokers=len(sessions),
            bookies=len(bookies),
            under_replicated_ledgers=len(findings.under_replicated),
            unavailable_shards=findings.unavailable_shards,
            problems=problems,
            notices=findings.notices(),
        ).SerializeToString()


def _description(record: SubscriptionRecord) -> pb.SubscriptionDescription:
    kind: metadata_pb2.SubscriptionType = record.type.value  # type: ignore[assignment]  # same numbers
    return pb.SubscriptionDescription(subscription=record.name, type=kind)


def _merge(description: pb.SubscriptionDescription, known: pb.SubscriptionDescription) -> None:
    """Adds what the owner of one more shard said."""
    description.backlog_messages += sum(cursor.backlog_messages for cursor in known.shards)
    description.backlog_bytes += sum(cursor.backlog_bytes for cursor in known.shards)
    description.oldest_age_s = max(description.oldest_age_s, known.oldest_age_s)
    description.shards.extend(known.shards)
    description.consumers.extend(known.consumers)
    description.waiting_for.extend(known.waiting_for)


def _describe_in(description: pb.SubscriptionDescription, shard: ServedShard) -> None:
    """Adds what one shard knows of the subscription."""
    name = description.subscription
    cursor = shard.log.cursors.get(name)
    if cursor is None:
        return
    place = _cursor_at(shard, cursor.floor)
    place.acked_above_floor = cursor.acked_above
    place.backlog_messages = cursor.backlog(place.end_offset)
    served = shard.subscriptions.get(name)
    if served is None:
        if place.backlog_messages:
            description.waiting_for.append(f"shard {shard.shard_id}: no consumer is attached")
    else:
        facts = served.describe()
        place.unacked_messages = facts.unacked_messages
        description.consumers.extend(facts.consumers)
        description.waiting_for.extend(facts.waiting_for)
    description.shards.append(place)


def _cursor_at(shard: ServedShard, floor: int) -> pb.CursorDescription:
    end_offset = shard.log.end_offset
    return pb.CursorDescription(
        shard_id=shard.shard_id,
        floor=floor,
        end_offset=end_offset,
        backlog_messages=max(0, end_offset - floor),
        backlog_bytes=shard.log.backlog_bytes(floor),
    )


def _subscription_type(value: int) -> SubscriptionType:
    try:
        return SubscriptionType(value)
    except ValueError:
        raise invalid_argument(f"unknown type of subscription type=`{value}`") from None


def _page_size(limit: int) -> int:
    if limit > PAGE_MAX:
        raise invalid_argument(f"a page has at most {PAGE_MAX} items: ask for the next one after it limit=`{limit}`")
    return limit or PAGE_MAX


async def _gather(work: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    """All results in order, SHARDS_AT_ONCE at a time."""
    slots = asyncio.Semaphore(SHARDS_AT_ONCE)

    async def bounded(one: Coroutine[Any, Any, T]) -> T:
        async with slots:
            return await one

    return await asyncio.gather(*(bounded(one) for one in work))
