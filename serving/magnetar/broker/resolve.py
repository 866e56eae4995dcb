"""Where a topic's shards are: resolved, watched; and the epochs of named producers."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import TypeVar

from magnetar.broker.ownership import Ownership
from magnetar.broker.refusals import RETRY_AFTER_MS, checked_name, topic_name
from magnetar.broker.topics import Topics
from magnetar.metadata.records import TopicRecord
from magnetar.node.rpc import Context, ServerStream, parse, unavailable
from magnetar.v1 import broker_pb2

KeyT = TypeVar("KeyT", bound=Hashable)

WATCHES_MAX = 10_000
"""Layouts watched at one broker."""

BROKERS_TOLD_MAX = 64
"""Of the cluster, with each layout."""


class Resolver:
    """`address` gives the address of a shard's owner, empty if nobody owns it; `brokers` those of all brokers."""

    def __init__(
        self,
        topics: Topics,
        ownership: Ownership,
        address: Callable[[int], str],
        brokers: Callable[[], Sequence[str]],
    ) -> None:
        self._topics = topics
        self._ownership = ownership
        self._address = address
        self._brokers = brokers
        self._by_topic: defaultdict[str, dict[asyncio.Event, None]] = defaultdict(dict)
        self._by_shard: defaultdict[int, dict[asyncio.Event, None]] = defaultdict(dict)
        self._watches = 0

    async def resolve(self, data: bytes, _context: Context) -> bytes:
        request = parse(broker_pb2.ResolveRequest, data)
        topic = topic_name(request.topic)
        self._ownership.require_session()
        record = await (self._topics.get_or_create(topic) if request.create else self._topics.get(topic))
        return broker_pb2.ResolveResponse(layout=self._layout(record), brokers=self._told()).SerializeToString()

    async def register_producer(self, data: bytes, _context: Context) -> bytes:
        request = parse(broker_pb2.RegisterProducerRequest, data)
        topic, name = topic_name(request.topic), checked_name("producer", request.name)
        newest_known = request.newest_known if request.HasField("newest_known") else None
        registered = await self._topics.register_producer(topic, name, newest_known)
        return broker_pb2.RegisterProducerResponse(
            producer_id=registered.producer_id, epoch=registered.epoch, outdated=not registered.taken
        ).SerializeToString()

    async def watch_layout(self, data: bytes, stream: ServerStream) -> None:
        """Sends the layout, and again whenever it is another one, until the client goes or the topic does."""
        topic = topic_name(parse(broker_pb2.WatchLayoutRequest, data).topic)
        if self._watches >= WATCHES_MAX:
            raise unavailable(
                f"this broker has {WATCHES_MAX} layout watches: ask another one", retry_after_ms=RETRY_AFTER_MS
            )
        changed = asyncio.Event()
        shards: set[int] = set()
        self._watches += 1
        self._by_topic[topic][changed] = None
        try:
            sent: broker_pb2.WatchLayoutResponse | None = None
            while True:
                changed.clear()
                self._ownership.require_session()
                record = await self._topics.get(topic)
                self._watch_shards(changed, shards, {shard.shard_id for shard in record.shards})
                response = broker_pb2.WatchLayoutResponse(layout=self._layout(record), brokers=self._told())
                if response != sent:
                    await stream.write(response.SerializeToString())
                    sent = response
                await changed.wait()
        finally:
            self._watches -= 1
            self._watch_shards(changed, shards, set())
            _discard(self._by_topic, topic, changed)

    def topic_changed(self, topic: str) -> None:
        for changed in self._by_topic.get(topic, ()):
            changed.set()

    def owners_changed(self, shards: Iterable[int]) -> None:
        for shard in shards:
            for changed in self._by_shard.get(shard, ()):
                changed.set()

    def everything_changed(self) -> None:
        """Every watch looks again: changes may have been missed, or the session is lost."""
        for watches in self._by_topic.values():
            for changed in watches:
                changed.set()

    def _told(self) -> list[str]:
        return sorted(self._brokers())[:BROKERS_TOLD_MAX]

    def _watch_shards(self, changed: asyncio.Event, watched: set[int], wanted: set[int]) -> None:
        for shard in wanted - watched:
            self._by_shard[shard][changed] = None
        for shard in watched - wanted:
            _discard(self._by_shard, shard, changed)
        watched.clear()
        watched.update(wanted)

    def _layout(self, record: TopicRecord) -> broker_pb2.Layout:
        return broker_pb2.Layout(
            topic=record.topic,
            epoch=record.layout_epoch,
            shards=[
                broker_pb2.ShardLocation(
                    shard_id=shard.shard_id,
                    first_slot=shard.first_slot,
                    last_slot=shard.last_slot,
                    state=shard.state.value,  # type: ignore[arg-type]  # same numbers
                    parents=shard.parents,
                    owner=self._address(shard.shard_id),
                )
                for shard in record.shards
            ],
        )


def _discard(watches: defaultdict[KeyT, dict[asyncio.Event, None]], key: KeyT, changed: asyncio.Event) -> None:
    found = watches.get(key)
    if found is not None:
        found.pop(changed, None)
        if not found:
            del watches[key]
