"""Administration: topics, subscriptions, ledgers, health.

What is described comes as frozen dataclasses whose fields are those of the documented JSON; `dataclasses.asdict` gives
it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime

from magnetar.client.admin_calls import AdminCalls
from magnetar.client.errors import InvalidArgument
from magnetar.client.layouts import Brokers, checked_name, full_topic
from magnetar.client.lifetime import Lifetime
from magnetar.client.message import MessageId, from_microseconds
from magnetar.client.positions import LATEST, Position, SubscriptionType, check_start, start_position
from magnetar.client.rebalancing import LedgerVerification, LedgerVerifier, Rebalance
from magnetar.v1 import admin_pb2, metadata_pb2, repair_pb2

SHARDS_MAX = 64
PAGE_SIZE = 1000

_TYPES = {
    None: metadata_pb2.SUBSCRIPTION_TYPE_UNSPECIFIED,
    "stream": metadata_pb2.SUBSCRIPTION_TYPE_STREAM,
    "queue": metadata_pb2.SUBSCRIPTION_TYPE_QUEUE,
}


@dataclass(frozen=True, slots=True)
class SegmentDescription:
    """One ledger of a shard's log. `messages` and `bytes` are counted when it is closed."""

    ledger: int
    first_offset: int
    messages: int
    bytes: int
    state: str
    ensemble: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class ShardDescription:
    """A shard: inclusive slots, OPEN, SEALED or DELETING, and where its offsets begin and end."""

    shard: int
    slots: tuple[int, int]
    state: str
    parents: tuple[int, ...]
    owner: str | None
    start_offset: int
    end_offset: int
    segments: tuple[SegmentDescription, ...]


@dataclass(frozen=True, slots=True)
class TopicDescription:
    """A topic's layout, and its subscriptions by name."""

    topic: str
    epoch: int
    shards: tuple[ShardDescription, ...]
    subscriptions: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class TopicDeletion:
    """What deleting a topic took away, or would."""

    topic: str
    shards: int
    messages: int
    bytes: int


@dataclass(frozen=True, slots=True)
class SubscriptionSummary:
    """A subscription in a list. type: stream, queue, or None before its first consumer."""

    subscription: str
    type: str | None
    backlog_messages: int
    consumers: int


@dataclass(frozen=True, slots=True)
class CursorDescription:
    """A subscription in one shard. floor: everything below it is acknowledged."""

    shard: int
    floor: int
    acked_above_floor: int
    end_offset: int
    backlog_messages: int
    backlog_bytes: int
    unacked_messages: int


@dataclass(frozen=True, slots=True)
class ConsumerDescription:
    """A consumer at one shard, and what the broker may still deliver to it."""

    consumer: str
    shard: int
    active: bool
    unacked_messages: int
    credit_messages: int
    credit_bytes: int
    client: str


@dataclass(frozen=True, slots=True)
class SubscriptionDescription:
    """A subscription in full. waiting_for: why nothing is delivered right now; empty when all is delivered."""

    subscription: str
    type: str | None
    backlog_messages: int
    backlog_bytes: int
    oldest_age_s: float
    shards: tuple[CursorDescription, ...]
    consumers: tuple[ConsumerDescription, ...]
    waiting_for: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class SubscriptionDeletion:
    """What deleting a subscription took away, or would."""

    subscription: str
    backlog_messages: int


@dataclass(frozen=True, slots=True)
class FragmentDescription:
    """From this entry on the ledger stands on these bookies; an empty name is a vacant place."""

    first_entry: int
    bookies: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class LedgerDescription:
    """A ledger. `entries` and `bytes` are None until it is closed."""

    ledger: int
    shard: int
    topic: str
    purpose: str
    state: str
    epoch: int
    write_quorum: int
    ack_quorum: int
    fragments: tuple[FragmentDescription, ...]
    entries: int | None
    bytes: int | None
    created: datetime


@dataclass(frozen=True, slots=True)
class ClusterHealth:
    """healthy: no ledger lacks a copy and every shard can be served.

    problems   what is wrong, in words
    notices    what is well enough, and could be better
    """

    healthy: bool
    brokers: int
    bookies: int
    under_replicated_ledgers: int
    unavailable_shards: int
    problems: tuple[str, ...]
    notices: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class BrokerDescription:
    """A broker that has a session: SERVING, DRAINING or LEAVING. `shards`: that the cluster's records give to it."""

    id: str
    address: str
    shards: int
    http_address: str
    version: str
    state: str


@dataclass(frozen=True, slots=True)
class BrokerDrain:
    """What a broker that is to be drained has to hand over, and how much of it goes to which broker."""

    broker: str
    shards: int
    targets: dict[str, int]


@dataclass(frozen=True, slots=True)
class BookieDescription:
    """A bookie: WRITABLE, READ_ONLY, DRAINING, or LOST when it has no session; then what it said of itself is gone.

    ledgers    that name it
    bytes      of its entries in those of them that are closed
    draining   it is to be emptied
    copies     of its parts that are to be made elsewhere, or completed here
    """

    id: str
    address: str
    state: str
    rack: str
    ledgers: int
    bytes: int
    disk_free_bytes: int
    disk_total_bytes: int
    http_address: str
    version: str
    draining: bool
    copies: int


@dataclass(frozen=True, slots=True)
class BookieOrder:
    """What a drain or its end changed: `changed` is False if it was so before.

    ledgers   that name the bookie
    warning   what its drain costs, in words; empty: nothing
    """

    id: str
    changed: bool
    ledgers: int
    warning: str = ""


@dataclass(frozen=True, slots=True)
class LostBookie:
    """A bookie without a session. given_up: it is not waited for any more, its part is made anew."""

    id: str
    since: datetime
    given_up: bool


@dataclass(frozen=True, slots=True)
class RepairStatus:
    """How the cluster repairs itself, and what is left to do.

    delay        seconds that a single lost bookie is waited for
    throttle     bytes per second that each bookie copies
    copies       that are to be made, by reason: unreplicated, lost, draining, rebalance, scrub
    stalled      of them, those that do not go on
    problems     why, in words; a few of them
    stalled_bookies   why a copy of what stands, or stood, on a bookie does not go on, by bookie
    """

    enabled: bool
    delay: float
    throttle: int
    copies: Mapping[str, int]
    stalled: int
    problems: tuple[str, ...]
    lost: tuple[LostBookie, ...]
    stalled_bookies: Mapping[str, str]


class Topics(AdminCalls):
    """Topics, by name or as `tenant/namespace/topic`."""

    async def create(self, topic: str, *, shards: int = 1, dry_run: bool = False) -> TopicDescription:
        """Create a topic with so many shards of equal slot ranges. Raises AlreadyExists.

        If the connection broke while it was created, AlreadyExists may speak of this very call.
        """
        if not 1 <= shards <= SHARDS_MAX:
            raise InvalidArgument(f"a new topic has 1 to {SHARDS_MAX} shards: shards=`{shards}`")
        request = admin_pb2.CreateTopicRequest(topic=full_topic(topic), shards=shards, dry_run=dry_run)
        response = await self._call("CreateTopic", request, admin_pb2.CreateTopicResponse)
        return _topic(response.topic)

    async def list(self, prefix: str = "") -> list[str]:
        """Names of all topics, or of those of a `tenant` or `tenant/namespace`, in order."""
        topics: list[str] = []
        more = True
        while more:
            request = admin_pb2.ListTopicsRequest(prefix=prefix, after=topics[-1] if topics else "", limit=PAGE_SIZE)
            page = await self._ask("ListTopics", request, admin_pb2.ListTopicsResponse)
            topics += page.topics
            more = page.more and bool(page.topics)
        return topics

    async def describe(self, topic: str) -> TopicDescription:
        """The topic's shards and subscriptions. Raises TopicNotFound."""
        request = admin_pb2.DescribeTopicRequest(topic=full_topic(topic))
        response = await self._ask("DescribeTopic", request, admin_pb2.DescribeTopicResponse)
        return _topic(response.topic)

    async def delete(self, topic: str, *, dry_run: bool = False) -> TopicDeletion:
        """Delete a topic with everything stored in it. Raises TopicNotFound."""
        name = full_topic(topic)
        request = admin_pb2.DeleteTopicRequest(topic=name, dry_run=dry_run)
        response = await self._call("DeleteTopic", request, admin_pb2.DeleteTopicResponse)
        return TopicDeletion(name, response.shards, response.messages, response.bytes)


class Subscriptions(AdminCalls):
    """Subscriptions of a topic. All raise TopicNotFound, and but for `create` and `list` SubscriptionNotFound."""

    async def create(
        self, topic: str, subscription: str, *, type: SubscriptionType | None = None, start: Position = LATEST
    ) -> None:
        """Create a subscription; it is durable on return. type None: that of its first consumer.

        Raises AlreadyExists.
        """
        if type not in _TYPES:
            raise InvalidArgument(f"a subscription is stream or queue: type=`{type}`")
        request = admin_pb2.CreateSubscriptionRequest(
            topic=full_topic(topic),
            subscription=checked_name("subscription", subscription),
            type=_TYPES[type],
            start=check_start(start),
        )
        await self._call("CreateSubscription", request, admin_pb2.CreateSubscriptionResponse)

    async def list(self, topic: str) -> list[SubscriptionSummary]:
        """The topic's subscriptions."""
        request = admin_pb2.ListSubscriptionsRequest(topic=full_topic(topic))
        response = await self._ask("ListSubscriptions", request, admin_pb2.ListSubscriptionsResponse)
        return [
            SubscriptionSummary(s.subscription, _type(s.type), s.backlog_messages, s.consumers)
            for s in response.subscriptions
        ]

    async def describe(self, topic: str, subscription: str) -> SubscriptionDescription:
        """Where the subscription stands, who consumes, and why it is not delivering if it is not."""
        request = admin_pb2.DescribeSubscriptionRequest(
            topic=full_topic(topic), subscription=checked_name("subscription", subscription)
        )
        response = await self._ask("DescribeSubscription", request, admin_pb2.DescribeSubscriptionResponse)
        return _subscription(response.subscription)

    async def seek(
        self, topic: str, subscription: str, position: Position, *, dry_run: bool = False
    ) -> tuple[CursorDescription, ...]:
        """Move the subscription, durable on return; a MessageId moves its own shard only. Returns where it stands."""
        request = admin_pb2.SeekSubscriptionRequest(
            topic=full_topic(topic),
            subscription=checked_name("subscription", subscription),
            position=start_position(position),
            shard_id=position.shard if isinstance(position, MessageId) else 0,
            dry_run=dry_run,
        )
        response = await self._call("SeekSubscription", request, admin_pb2.SeekSubscriptionResponse)
        return tuple(_cursor(cursor) for cursor in response.shards)

    async def delete(self, topic: str, subscription: str, *, dry_run: bool = False) -> SubscriptionDeletion:
        """Delete the subscription. Messages that only it kept are deleted in time."""
        name = checked_name("subscription", subscription)
        request = admin_pb2.DeleteSubscriptionRequest(topic=full_topic(topic), subscription=name, dry_run=dry_run)
        response = await self._call("DeleteSubscription", request, admin_pb2.DeleteSubscriptionResponse)
        return SubscriptionDeletion(name, response.backlog_messages)


class Ledgers(LedgerVerifier):
    """Ledgers, by id."""

    async def list(self, topic: str | None = None) -> list[LedgerDescription]:
        """All ledgers, or those of a topic, by ascending id."""
        ledgers: list[LedgerDescription] = []
        more = True
        while more:
            request = admin_pb2.AdminServiceListLedgersRequest(
                topic="" if topic is None else full_topic(topic),
                after=ledgers[-1].ledger if ledgers else 0,
                limit=PAGE_SIZE,
            )
            page = await self._ask("ListLedgers", request, admin_pb2.AdminServiceListLedgersResponse)
            ledgers += [_ledger(ledger) for ledger in page.ledgers]
            more = page.more and bool(page.ledgers)
        return ledgers

    async def describe(self, ledger: int) -> LedgerDescription:
        """One ledger. Raises LedgerNotFound."""
        if not 0 < ledger < 1 << 64:
            raise InvalidArgument(f"a ledger id is a positive number: ledger=`{ledger}`")
        request = admin_pb2.DescribeLedgerRequest(ledger_id=ledger)
        response = await self._ask("DescribeLedger", request, admin_pb2.DescribeLedgerResponse)
        return _ledger(response.ledger)

    async def verify(self, ledger: int) -> LedgerVerification:
        """Compares the copies of a closed ledger: every entry on every bookie that must have it, by its checksum.

        Raises LedgerNotFound, also for one that is not closed.
        """
        return await self._verify_ledger(ledger)


class BrokerServers(AdminCalls):
    """The cluster's brokers."""

    async def list(self) -> list[BrokerDescription]:
        """Those that have a session, by id."""
        response = await self._ask("ListBrokers", admin_pb2.ListBrokersRequest(), admin_pb2.ListBrokersResponse)
        return [
            BrokerDescription(b.broker_id, b.address, b.shards, b.http_address, b.version, _broker_state(b.state))
            for b in response.brokers
        ]

    async def drain(self, broker: str, *, dry_run: bool = False) -> BrokerDrain:
        """The broker is to have no shards from now on, also after a restart: it hands over what it has, one by one.

        Nobody sees an error. It is done when `list` shows it with no shards. Raises OrderRefused for an unknown
        broker, and when no other one could take its shards.
        """
        request = admin_pb2.DrainBrokerRequest(broker_id=broker, dry_run=dry_run)
        response = await self._ask("DrainBroker", request, admin_pb2.DrainBrokerResponse)
        return BrokerDrain(broker, response.shards, {share.broker_id: share.shards for share in response.shares})

    async def undrain(self, broker: str, *, dry_run: bool = False) -> bool:
        """The broker may have shards again. Returns whether it was being drained. Raises OrderRefused."""
        request = admin_pb2.UndrainBrokerRequest(broker_id=broker, dry_run=dry_run)
        return (await self._ask("UndrainBroker", request, admin_pb2.UndrainBrokerResponse)).was_draining


class BookieServers(AdminCalls):
    """The cluster's bookies."""

    async def list(self) -> list[BookieDescription]:
        """All that ever stored something or have a session, by id."""
        response = await self._ask("ListBookies", admin_pb2.ListBookiesRequest(), admin_pb2.ListBookiesResponse)
        return [_bookie(bookie) for bookie in response.bookies]

    async def drain(self, bookie: str, *, dry_run: bool = False) -> BookieOrder:
        """Empty a bookie while it serves: it takes no new ledgers, and what stands on it moves away.

        Returns at once; `list` shows how many ledgers still name it. Raises OrderRefused if too few others are left.
        """
        request = repair_pb2.DrainBookieRequest(bookie_id=bookie, dry_run=dry_run)
        response = await self._call("DrainBookie", request, repair_pb2.DrainBookieResponse)
        return BookieOrder(bookie, response.changed, response.ledgers, response.warning)

    async def undrain(self, bookie: str, *, dry_run: bool = False) -> BookieOrder:
        """Let a bookie keep what it still has, and take new ledgers again."""
        request = repair_pb2.UndrainBookieRequest(bookie_id=bookie, dry_run=dry_run)
        response = await self._call("UndrainBookie", request, repair_pb2.UndrainBookieResponse)
        return BookieOrder(bookie, response.changed, response.ledgers)

    async def decommission(self, bookie: str, *, dry_run: bool = False) -> None:
        """Remove a bookie that has stopped and that no ledger names. Raises OrderRefused while any does."""
        request = repair_pb2.DecommissionBookieRequest(bookie_id=bookie, dry_run=dry_run)
        await self._call("DecommissionBookie", request, repair_pb2.DecommissionBookieResponse)


class Cluster(AdminCalls):
    """The cluster as a whole."""

    async def health(self) -> ClusterHealth:
        """Counted from the records of all ledgers and shards."""
        response = await self._ask("ClusterHealth", admin_pb2.ClusterHealthRequest(), admin_pb2.ClusterHealthResponse)
        return ClusterHealth(
            response.healthy,
            response.brokers,
            response.bookies,
            response.under_replicated_ledgers,
            response.unavailable_shards,
            tuple(response.problems),
            tuple(response.notices),
        )

    async def repair(
        self,
        *,
        enabled: bool | None = None,
        delay: float | None = None,
        throttle: int | None = None,
        dry_run: bool = False,
    ) -> RepairStatus:
        """What repair has to do and how it goes on; what is given is changed first, for the whole cluster.

        enabled   off: no copy is begun, for the time of a maintenance
        delay     seconds that a single lost bookie is waited for
        throttle  bytes per second that each bookie copies
        """
        request = repair_pb2.ConfigureRepairRequest(delay_s=delay, bytes_per_s=throttle, dry_run=dry_run)
        if enabled is not None:
            request.enabled = enabled
        return _repair(await self._call("ConfigureRepair", request, repair_pb2.ConfigureRepairResponse))


class Admin:
    """What an administrator does, as `client.admin`."""

    def __init__(self, brokers: Callable[[], Brokers], lifetime: Lifetime) -> None:
        self.topics = Topics(brokers, lifetime)
        self.subscriptions = Subscriptions(brokers, lifetime)
        self.ledgers = Ledgers(brokers, lifetime)
        self.brokers = BrokerServers(brokers, lifetime)
        self.bookies = BookieServers(brokers, lifetime)
        self.cluster = Cluster(brokers, lifetime)
        self.rebalance = Rebalance(brokers, lifetime)


def _broker_state(state: admin_pb2.BrokerState) -> str:
    return admin_pb2.BrokerState.Name(state).removeprefix("BROKER_STATE_")


def _topic(topic: admin_pb2.TopicDescription) -> TopicDescription:
    return TopicDescription(
        topic.topic, topic.epoch, tuple(_shard(shard) for shard in topic.shards), tuple(topic.subscriptions)
    )


def _shard(shard: admin_pb2.ShardDescription) -> ShardDescription:
    segments = (
        SegmentDescription(s.ledger_id, s.first_offset, s.messages, s.bytes, _ledger_state(s.state), tuple(s.ensemble))
        for s in shard.segments
    )
    return ShardDescription(
        shard.shard_id,
        (shard.first_slot, shard.last_slot),
        metadata_pb2.ShardState.Name(shard.state).removeprefix("SHARD_STATE_"),
        tuple(shard.parents),
        shard.owner or None,
        shard.start_offset,
        shard.end_offset,
        tuple(segments),
    )


def _subscription(subscription: admin_pb2.SubscriptionDescription) -> SubscriptionDescription:
    return SubscriptionDescription(
        subscription.subscription,
        _type(subscription.type),
        subscription.backlog_messages,
        subscription.backlog_bytes,
        subscription.oldest_age_s,
        tuple(_cursor(cursor) for cursor in subscription.shards),
        tuple(
            ConsumerDescription(
                c.consumer, c.shard_id, c.active, c.unacked_messages, c.credit_messages, c.credit_bytes, c.client
            )
            for c in subscription.consumers
        ),
        tuple(subscription.waiting_for),
    )


def _cursor(cursor: admin_pb2.CursorDescription) -> CursorDescription:
    return CursorDescription(
        cursor.shard_id,
        cursor.floor,
        cursor.acked_above_floor,
        cursor.end_offset,
        cursor.backlog_messages,
        cursor.backlog_bytes,
        cursor.unacked_messages,
    )


def _ledger(ledger: admin_pb2.LedgerDescription) -> LedgerDescription:
    record = ledger.record
    closed = record.state == metadata_pb2.LEDGER_STATE_CLOSED
    return LedgerDescription(
        ledger=record.ledger_id,
        shard=record.shard_id,
        topic=ledger.topic,
        purpose=metadata_pb2.LedgerPurpose.Name(record.purpose).removeprefix("LEDGER_PURPOSE_"),
        state=_ledger_state(record.state),
        epoch=record.epoch,
        write_quorum=record.write_quorum,
        ack_quorum=record.ack_quorum,
        fragments=tuple(FragmentDescription(f.first_entry, tuple(f.bookies)) for f in record.fragments),
        entries=record.last_entry + 1 if closed else None,
        bytes=record.length if closed else None,
        created=from_microseconds(record.created_us),
    )


def _bookie(bookie: admin_pb2.BookieDescription) -> BookieDescription:
    lost = bookie.state == metadata_pb2.BOOKIE_STATE_UNSPECIFIED
    return BookieDescription(
        id=bookie.bookie_id,
        address=bookie.address,
        state="LOST" if lost else metadata_pb2.BookieState.Name(bookie.state).removeprefix("BOOKIE_STATE_"),
        rack=bookie.rack,
        ledgers=bookie.ledgers,
        bytes=bookie.bytes,
        disk_free_bytes=bookie.disk_free_bytes,
        disk_total_bytes=bookie.disk_total_bytes,
        http_address=bookie.http_address,
        version=bookie.version,
        draining=bookie.draining,
        copies=bookie.copies,
    )


def _ledger_state(state: metadata_pb2.LedgerState) -> str:
    return metadata_pb2.LedgerState.Name(state).removeprefix("LEDGER_STATE_")


def _type(kind: metadata_pb2.SubscriptionType) -> str | None:
    for name, value in _TYPES.items():
        if value == kind:
            return name
    return None


def _repair(response: repair_pb2.ConfigureRepairResponse) -> RepairStatus:
    return RepairStatus(
        enabled=response.settings.enabled,
        delay=response.settings.delay_s,
        throttle=response.settings.bytes_per_s,
        copies={
            metadata_pb2.CopyReason.Name(one.reason).removeprefix("COPY_REASON_").lower(): one.copies
            for one in response.copies
        },
        stalled=sum(one.stalled for one in response.copies),
        problems=tuple(response.problems),
        lost=tuple(LostBookie(one.bookie_id, from_microseconds(one.since_us), one.given_up) for one in response.lost),
        stalled_bookies=dict(response.stalled_bookies),
    )
