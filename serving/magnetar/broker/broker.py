"""A broker: its parts put together, started and stopped in order.

It keeps nothing on disk. It listens first (only then its port is known), registers its session, and serves from then
on; before, every request is told to come again. Stopping passes every shard to another broker, answering what was
accepted, before the session ends, so that the next owners have nothing to recover.

Others' shards: the watches tell of sessions that ended and of shards that were passed on; these are taken over in the
background, many at a time. A sweep at the start and every minute finds what was missed. Shards that nobody uses are put
to rest: they stay this broker's, and cost next to nothing until somebody wants them.
"""

from __future__ import annotations

import asyncio
import itertools
import random
import time
from collections.abc import Awaitable, Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from typing import Self

import structlog
from prometheus_client import CollectorRegistry

from magnetar.broker.admin import Admin
from magnetar.broker.admin_rebalance import RebalanceAdmin
from magnetar.broker.admin_storage import StorageAdmin
from magnetar.broker.balancing import ELECTION, Balancing
from magnetar.broker.budget import ByteBudget
from magnetar.broker.cluster_view import ClusterView
from magnetar.broker.consume import consume
from magnetar.broker.describe import Records
from magnetar.broker.drainer import Drainer
from magnetar.broker.greeting import greet
from magnetar.broker.layout import shard_of
from magnetar.broker.leaving import LeavingBookies
from magnetar.broker.members import Members
from magnetar.broker.metrics import BrokerMetrics
from magnetar.broker.mover import Mover
from magnetar.broker.ownership import Ownership
from magnetar.broker.peers import Peers
from magnetar.broker.produce import ProduceStream
from magnetar.broker.refusals import RETRY_AFTER_MS, not_owner, refusal_of
from magnetar.broker.resolve import Resolver
from magnetar.broker.served import LogParts, ServedShards
from magnetar.broker.shard import ServedShard
from magnetar.broker.shard_orders import ShardOrders
from magnetar.broker.shard_runner import ShardRunner
from magnetar.broker.takeovers import Takeovers
from magnetar.broker.topics import Topics
from magnetar.ledger.bookie_rpc import Bookies
from magnetar.ledger.client import LedgerClient, LedgerSettings
from magnetar.managed_log.cache import ReadCache
from magnetar.managed_log.errors import LogReleased
from magnetar.managed_log.settings import LogSettings
from magnetar.metadata.backoff import Backoff
from magnetar.metadata.election import Election
from magnetar.metadata.ids import IdBlocks
from magnetar.metadata.keyspace import Keyspace
from magnetar.metadata.records import BrokerRegistration, Owner, SubscriptionRecord, TopicRecord
from magnetar.metadata.shards import ShardNotFound
from magnetar.metadata.store import MetadataStore
from magnetar.node.lifecycle import software_version
from magnetar.node.rpc import (
    Context,
    Refused,
    Serve,
    Server,
    ServerStream,
    Service,
    UnaryHandler,
    serve,
    unavailable,
)
from magnetar.node.settings import BrokerSettings
from magnetar.repair.listings import Listings
from magnetar.repair.orders import Orders
from magnetar.v1 import admin_pb2, broker_pb2, common_pb2

FORGET_INTERVAL_S = 60.0
SWEEP_INTERVAL_S = 60.0
DOUBT_INTERVAL_S = 2.0
STOP_GRACE_S = 0.5
DELETE_S = 10.0
"""For other brokers to delete the shards that they serve of a topic that is deleted here."""
GOING_TOPICS_MAX = 10_000
"""Topics seen being deleted that this broker remembers, to go on with what another one began."""

log = structlog.get_logger("magnetar.broker")


def system_time_us() -> int:
    return time.time_ns() // 1_000


class Broker:
    """`port` is the one it listens on, `address` where clients and other brokers reach it."""

    @classmethod
    async def start(
        cls,
        settings: BrokerSettings,
        store: MetadataStore,
        keyspace: Keyspace,
        bookies: Bookies,
        *,
        registry: CollectorRegistry | None = None,
        now_us: Callable[[], int] = system_time_us,
        rng: random.Random | None = None,
        serve: Serve = serve,
        peers: Peers | None = None,
        log_settings: LogSettings | None = None,
        http_address: str = "",
    ) -> Self:
        """Serves on return; `log_settings` are as the settings say, if none are given.

        Raises ListenError, IdInUse, MetadataError.
        """
        broker = cls(
            settings,
            store,
            keyspace,
            bookies,
            registry or CollectorRegistry(),
            now_us,
            rng or random.Random(),
            serve,
            peers or Peers(),
            log_settings or _log_settings(settings),
        )
        try:
            await broker._start(http_address)
        except BaseException:
            await broker.stop()
            raise
        return broker

    def __init__(
        self,
        settings: BrokerSettings,
        store: MetadataStore,
        keyspace: Keyspace,
        bookies: Bookies,
        registry: CollectorRegistry,
        now_us: Callable[[], int],
        rng: random.Random,
        serve: Serve,
        peers: Peers,
        log_settings: LogSettings,
    ) -> None:
        self.settings = settings
        self._rng = rng
        self._serve = serve
        self.max_message_bytes = settings.max_message_bytes
        self.port = 0
        self.address = settings.advertised_address
        self.metrics = BrokerMetrics(registry)
        self.budget = ByteBudget(settings.pending_bytes)
        self.view = ClusterView(store, keyspace)
        ids = IdBlocks(store, keyspace, rng=rng)
        self.topics = Topics(store, keyspace, ids, now_us)
        self.ownership = Ownership(
            store,
            keyspace,
            self.view,
            settings.id,
            settings.lease_s,
            rng,
            on_session=self._session_began,
            on_lost=self._session_lost,
        )
        ledger_settings = _ledger_settings(settings)
        ledgers = LedgerClient(bookies, now_us=now_us, rng=rng, settings=ledger_settings, registry=registry)
        parts = LogParts(ledgers, ids, ReadCache(settings.cache_bytes), log_settings, now_us)
        self.served = ServedShards(
            self.ownership,
            self.topics,
            parts,
            self.metrics,
            self.budget,
            settings.pending_bytes,
            self._address_of,
            self._received,
        )
        self._takeovers = Takeovers(self.ownership, self.served, self.metrics, rng)
        self._resolver = Resolver(self.topics, self.ownership, self._owner_address, self._broker_addresses)
        self.peers = peers
        self._members = Members(store, keyspace)
        self._make_movers(store, keyspace, now_us, rng)
        self._storage = StorageAdmin(store, keyspace, settings.write_quorum, settings.ensemble_size, now_us)
        self._leaving = LeavingBookies(store, keyspace)
        self._admin = Admin(self, store, keyspace, bookies, now_us, rng)
        orders = Orders(store, keyspace, now_us=now_us, rng=rng)
        shard_orders = ShardOrders(store, keyspace, orders, self.view, self.peers)
        self._rebalance_admin = RebalanceAdmin(self.topics, orders, shard_orders, bookies, Listings(store, keyspace))
        self._openings = itertools.count(1)
        self._streams = 0
        self._going: dict[str, None] = {}
        self._sweep_wanted = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()
        self._server: Server | None = None
        self._serving = False

    def _make_movers(
        self, store: MetadataStore, keyspace: Keyspace, now_us: Callable[[], int], rng: random.Random
    ) -> None:
        """What moves shards between brokers, and why: because it is asked to, to be drained, to balance."""
        settings, view, served = self.settings, self.view, self.served
        self._mover = Mover(
            settings.id,
            self.ownership,
            view,
            served,
            self.topics,
            self.peers,
            Records(store, keyspace),
            self.metrics,
            self._takeovers.want,
        )
        self._drainer = Drainer(settings.id, self.ownership, view, served, self._mover, rng)
        election = Election(store, keyspace, ELECTION, settings.id, lease_s=settings.lease_s, rng=rng)
        self._shard_runner = ShardRunner(store, keyspace, view, self.peers, self.metrics, now_us)
        interval_s = settings.balance_interval_s if settings.balance else None
        self._balancing = Balancing(election, view, served, self.peers, self.metrics, self._shard_runner, interval_s)

    # --- start and stop ---

    async def _start(self, http_address: str) -> None:
        self._listen_to_changes()
        self._server = await self._serve(self._services(), self.settings.listen)
        self.port = self._server.port
        self.address = self.address or f"{self.settings.listen.rpartition(':')[0]}:{self.port}"
        self._mover.address = self._balancing.address = self._shard_runner.address = self.address
        registration = BrokerRegistration(self.settings.id, self.address, software_version(), http_address)
        await self.ownership.register(registration)
        await self.view.start()
        await self.topics.start()
        await self._leaving.start()
        self._serving = True
        self._spawn(self._trim_loop, "trim")
        self._spawn(self._forget_loop, "forget producers")
        self._spawn(self._doubt_loop, "doubt")
        self._spawn(self._sweep_loop, "sweep")
        self._spawn(self._drainer.run, "drain")
        self._spawn(self._balancing.measure, "measure loads")
        self._spawn(self._balancing.lead, "balance")
        log.info("broker serves", broker=self.settings.id, address=self.address)

    async def stop(self) -> None:
        """Answers what was accepted, passes on every shard, ends the session. Call once, also after a failed start."""
        self._serving = False
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._takeovers.stop()
        await self.ownership.leave()
        self._resolver.everything_changed()
        self.served.begin_stop()
        await self._mover.stop()
        await self.served.close(self._pass_on)
        if self._server is not None:
            await self._server.stop(STOP_GRACE_S)
        await self.ownership.close()
        await self.topics.close()
        await self._leaving.close()
        await self.view.close()
        await self.peers.close()

    async def _pass_on(self, shard: ServedShard) -> bool:
        """To the broker that should have it when this one is gone; False if that cannot be begun."""
        successor = self.ownership.successor(shard.shard_id)
        if successor is None:
            return False
        try:
            await self._mover.give(shard, successor, "the broker is stopping")
        except Refused as refused:
            log.warning("shard was not passed on", shard=shard.shard_id, problem=refused.message)
        return shard.released.is_set()

    def problems(self) -> list[str]:
        """What keeps this broker from being ready, in words; empty = it is."""
        if not self._serving:
            return [f"broker {self.settings.id} is starting or stopping"]
        if self.ownership.session is None:
            return [f"broker {self.settings.id} has no session: the metadata store does not answer"]
        return []

    def _listen_to_changes(self) -> None:
        self.metrics.watch(
            pending_bytes=lambda: self.budget.used_bytes,
            served_shards=lambda: len(self.served),
            shards_at_rest=lambda: len(self.served.at_rest),
            owned_shards=lambda: len(self.ownership.mine()),
        )
        self.view.on_owner_change(self._owners_changed)
        self.view.on_broker_change(self._brokers_changed)
        self.topics.on_topic.append(self._topic_changed)
        self.topics.on_subscription.append(self._subscription_changed)
        self.topics.on_gap.append(self._changes_missed)

    # --- what streams and calls use ---

    async def shard(self, topic: str, shard_id: int) -> ServedShard:
        """The shard of this topic, served here from now on.

        Raises Refused: NOT_OWNER with the address of its broker, UNAVAILABLE, TOPIC_NOT_FOUND.
        """
        shard = self.served.get(shard_id)
        if shard is not None and shard.topic == topic:
            return await self.served.open(shard_id)
        if shard_of(await self.topics.get(topic), shard_id) is None:
            raise not_owner(shard_id, why="the topic has no such shard")
        try:
            return await self.served.open(shard_id)
        except ShardNotFound:
            raise not_owner(shard_id, why="the shard does not exist any more") from None

    async def producer_epoch(self, topic: str, name: str) -> int:
        return await self.topics.producer_epoch(topic, name)

    def greet(self, hello: common_pb2.Hello) -> common_pb2.HelloReply:
        return greet(
            hello,
            node_id=self.settings.id,
            cluster=self.settings.cluster,
            max_message_bytes=self.max_message_bytes,
            address=self.address,
        )

    def next_opening(self) -> int:
        return next(self._openings)

    async def delete_topic(self, topic: str) -> None:
        """Deletes a topic with all it has; again after a failure goes on where that one ended.

        Other brokers delete what they serve of it when they see it marked. Raises Refused(TOPIC_NOT_FOUND), or
        UNAVAILABLE when that takes too long.
        """
        record = await self.topics.mark_deleting(topic)
        backoff = Backoff(self._rng)
        deadline = asyncio.get_running_loop().time() + DELETE_S
        while True:
            try:
                return await self._delete_marked(record)
            except Refused as refused:
                if refused.reason != common_pb2.ERROR_REASON_UNAVAILABLE:
                    raise
                if asyncio.get_running_loop().time() >= deadline:
                    raise
            await asyncio.sleep(backoff.next_s())

    async def _delete_marked(self, record: TopicRecord) -> None:
        for shard in record.shards:
            with suppress_reason(common_pb2.ERROR_REASON_NOT_OWNER):
                await self.served.delete(shard.shard_id)
        await self.topics.finish_deleting(record.topic)

    async def _resume_deleting(self, topic: str) -> None:
        """Only what is still marked: by now the name may be a new topic's."""
        record = await self.topics.marked(topic)
        if record is None:
            self._going.pop(topic, None)
        else:
            await self._delete_marked(record)

    # --- requests ---

    def _services(self) -> list[Service]:
        resolver, admin = self._resolver, self._admin
        broker_methods = {
            "Resolve": self._unary(resolver.resolve),
            "RegisterProducer": self._unary(resolver.register_producer),
            "WatchLayout": self._answering(resolver.watch_layout),
            "Produce": self._streaming("produce", self._produce),
            "Consume": self._streaming("consume", self._consume),
        }
        parts = (admin, self._members, self._storage, self._balancing, self._mover, self._rebalance_admin)
        methods = {name: method for part in parts for name, method in part.methods().items()}
        admin_methods = {name: self._unary(self._administering(method)) for name, method in methods.items()}
        admin_methods |= self._mover.methods_of_a_stopping_broker()
        return [
            Service(broker_pb2.DESCRIPTOR.services_by_name["BrokerService"], broker_methods),
            Service(admin_pb2.DESCRIPTOR.services_by_name["AdminService"], admin_methods),
        ]

    async def _produce(self, stream: ServerStream) -> None:
        await ProduceStream(stream, self).run()

    async def _consume(self, stream: ServerStream) -> None:
        await consume(stream, self)

    def _unary(self, handler: UnaryHandler) -> UnaryHandler:
        async def call(data: bytes, context: Context) -> bytes:
            with self._translating():
                return await handler(data, context)

        return call

    def _administering(self, handler: UnaryHandler) -> UnaryHandler:
        """Without a session the metadata store is away, as far as this broker knows: it says so at once."""

        async def call(data: bytes, context: Context) -> bytes:
            if self.ownership.session is None:
                raise unavailable(
                    "the metadata store does not answer: check that it runs and that this broker reaches it "
                    f"broker=`{self.settings.id}`",
                    retry_after_ms=RETRY_AFTER_MS,
                )
            return await handler(data, context)

        return call

    def _answering(
        self, handler: Callable[[bytes, ServerStream], Awaitable[None]]
    ) -> Callable[[bytes, ServerStream], Awaitable[None]]:
        async def call(data: bytes, stream: ServerStream) -> None:
            with self._translating(), self.metrics.stream("watch_layout"):
                await handler(data, stream)

        return call

    def _streaming(
        self, kind: str, handler: Callable[[ServerStream], Awaitable[None]]
    ) -> Callable[[ServerStream], Awaitable[None]]:
        async def call(stream: ServerStream) -> None:
            with self._translating(), self.metrics.stream(kind):
                await handler(stream)

        return call

    @contextmanager
    def _translating(self) -> Iterator[None]:
        """Operating errors become refusals, and refusals are counted."""
        try:
            if not self._serving:
                raise unavailable("the broker is starting or stopping: ask another one", retry_after_ms=RETRY_AFTER_MS)
            yield
        except Refused as refused:
            # Raised from itself it would be a cycle, and keep the request until the collector comes by.
            self.metrics.refused(refused.reason)
            raise
        except Exception as error:
            translated = refusal_of(error)
            if translated is None:
                raise
            self.metrics.refused(translated.reason)
            raise translated from error

    # --- what the watches and the session say ---

    def _session_began(self, session: Owner) -> None:
        self._spawn(partial(self.served.renew, session), "renew session")
        self._sweep_wanted.set()

    def _session_lost(self) -> None:
        self.served.forget_rest()
        self._resolver.everything_changed()

    def _received(self, shard: ServedShard) -> None:
        """Subscriptions may have come and gone while the shard was on its way."""

        async def adopt() -> None:
            with suppress(LogReleased):
                await shard.adopt()

        self._spawn(partial(self._until_answered, adopt), "adopt subscriptions")

    def _owners_changed(self, shards: Iterable[int]) -> None:
        self._resolver.owners_changed(shards)
        self._forget_rest_of_others(shards)
        self._mover.owners_changed(shards)
        self._drainer.changed()
        if self._serving:
            self._take_over(self.ownership.to_open(shards))
            for shard_id in self.ownership.doubtful(s for s in shards if self.served.get(s) is not None):
                release = partial(self.served.release_claimed, shard_id)
                self._spawn(partial(self._until_answered, release), "look whose a shard is")

    def _brokers_changed(self) -> None:
        self._resolver.everything_changed()
        self._drainer.changed()
        if self._serving:
            # A shard of a session that ended before may have waited for the broker that is gone now.
            self._take_over(self.ownership.ended())
            if self._going:
                self._sweep_wanted.set()  # What is taken over may be of a topic that is being deleted.

    def _take_over(self, shards: Iterable[int]) -> None:
        # What is being opened now is among them: the claim was seen before the opening was done.
        wanted = list(shards)
        self._forget_rest_of_others(wanted)
        served, at_rest = self.served, self.served.at_rest
        self._takeovers.want(s for s in wanted if s not in at_rest and served.get(s) is None and not served.loading(s))

    def _forget_rest_of_others(self, shards: Iterable[int]) -> None:
        self.served.forget_rest(s for s in shards if self.view.recorded_owner(s) != self.ownership.session)

    def _topic_changed(self, topic: str, record: TopicRecord | None) -> None:
        self._resolver.topic_changed(topic)
        if record is None:
            self._going.pop(topic, None)
        elif record.deleting:
            self._remember_going(topic)
            for shard in record.shards:
                if self._is_mine(shard.shard_id):
                    self._spawn(partial(self.served.delete, shard.shard_id), "delete shard")

    def _remember_going(self, topic: str) -> None:
        if len(self._going) < GOING_TOPICS_MAX:
            self._going[topic] = None

    def _is_mine(self, shard_id: int) -> bool:
        """Served here, at rest, or on the way from one to the other."""
        owner = self.view.recorded_owner(shard_id)
        return self.served.get(shard_id) is not None or (owner is not None and owner == self.ownership.session)

    def _subscription_changed(self, topic: str, name: str, record: SubscriptionRecord | None) -> None:
        for shard in self.served.of_topic(topic):
            changed = partial(shard.subscription_changed, name)
            self._spawn(partial(self._until_answered, changed), "subscription changed")
        if record is None and self.served.at_rest:
            self._spawn(partial(self._until_answered, partial(self._wake, topic)), "subscription deleted")

    async def _wake(self, topic: str) -> None:
        """Opens the topic's shards that are at rest here: one that is opened knows of all that changed meanwhile."""
        try:
            record = await self.topics.get(topic)
        except Refused:
            return  # The topic is going.
        for shard in record.shards:
            if self._is_mine(shard.shard_id):
                with suppress(ShardNotFound):
                    await self.served.open(shard.shard_id)

    def _changes_missed(self) -> None:
        self._resolver.everything_changed()
        if len(self.served) or self.served.at_rest:
            self._spawn(partial(self._until_answered, self._catch_up), "catch up")

    async def _catch_up(self) -> None:
        """Topics may have begun to go, and subscriptions have come and gone, unseen."""
        if self.served.at_rest:
            await self._find_going()
            self._sweep_wanted.set()
        for shard in self.served:
            if await self.topics.marked(shard.topic) is not None:
                self._remember_going(shard.topic)
                self._sweep_wanted.set()
            else:
                with suppress(LogReleased):
                    await shard.adopt()

    def _address_of(self, owner: Owner) -> str:
        living = self.view.living(owner)
        return "" if living is None else living.address

    def _broker_addresses(self) -> list[str]:
        return [broker.address for broker in self.view.brokers() if not broker.leaving]

    def _owner_address(self, shard_id: int) -> str:
        """A shard that is being passed on is the next owner's already, for whoever asks where to go."""
        shard = self.served.get(shard_id)
        return self.view.address(shard_id) if shard is None else shard.owner or self.address

    # --- in the background ---

    def _spawn(self, work: Callable[[], Awaitable[None]], name: str) -> None:
        task = asyncio.create_task(self._run(work, name), name=f"{self.settings.id} {name}")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _run(self, work: Callable[[], Awaitable[None]], name: str) -> None:
        try:
            await work()
        except Exception as error:
            if refusal_of(error) is not None:
                log.warning("background work failed", work=name, problem=str(error))
            else:
                log.exception("background work failed", work=name)

    async def _until_answered(self, work: Callable[[], Awaitable[None]]) -> None:
        """Does what nobody else would do later, however long metadata store or bookies are silent."""
        backoff = Backoff(self._rng)
        while True:
            try:
                return await work()
            except Exception as error:
                refused = refusal_of(error)
                if refused is None or refused.reason != common_pb2.ERROR_REASON_UNAVAILABLE:
                    raise
                log.warning("background work waits", problem=str(error))
            await asyncio.sleep(backoff.next_s())

    async def _trim_loop(self) -> None:
        while True:
            await asyncio.sleep(self.settings.trim_interval_s)
            await self.served.trim(self._leaving.bookies())
            await self.served.rest_unused(self.settings.rest_after_s, self._mover.gives)
            await self.served.revisit()

    async def _doubt_loop(self) -> None:
        """Without a session this broker may have been replaced without hearing of it."""
        while True:
            await asyncio.sleep(DOUBT_INTERVAL_S)
            if self.ownership.session is None:
                await self.served.release_fenced()

    async def _forget_loop(self) -> None:
        while True:
            await asyncio.sleep(FORGET_INTERVAL_S)
            for shard in self.served:
                shard.forget_producers()
                await asyncio.sleep(0)  # A large table takes a while: let others run between two.

    async def _find_going(self) -> None:
        async for record in self.topics.all():
            if record.deleting:
                self._remember_going(record.topic)

    async def _sweep_loop(self) -> None:
        await self._until_answered(self._find_going)
        self._sweep_wanted.set()
        while True:
            with suppress(TimeoutError):
                async with asyncio.timeout(SWEEP_INTERVAL_S):
                    await self._sweep_wanted.wait()
            self._sweep_wanted.clear()
            await self.sweep()

    async def sweep(self) -> None:
        """Takes over shards whose owner is gone, or that a claim left behind, and goes on with topics being deleted."""
        if self.ownership.session is None:
            return
        self._take_over([*self.ownership.mine(), *self.ownership.ended()])
        await self._takeovers.idle()
        for topic in list(self._going):
            await self._run(partial(self._resume_deleting, topic), "delete topic")


@contextmanager
def suppress_reason(reason: common_pb2.ErrorReason) -> Iterator[None]:
    try:
        yield
    except Refused as refused:
        if refused.reason != reason:
            raise


def _ledger_settings(settings: BrokerSettings) -> LedgerSettings:
    return LedgerSettings(
        ensemble_size=settings.ensemble_size,
        write_quorum=settings.write_quorum,
        ack_quorum=settings.ack_quorum,
    )


def _log_settings(settings: BrokerSettings) -> LogSettings:
    return LogSettings(
        segment_bytes=settings.segment_bytes,
        segment_s=settings.segment_s,
        retention_unsubscribed_s=settings.retention_unsubscribed_s,
    )
