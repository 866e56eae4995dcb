"""Topics, subscriptions and named producers in the metadata store: changed by compare-and-set.

A topic and its shards appear in one transaction. While a topic is marked as being deleted nothing of it is served, and
no subscription or producer can be added to it: those transactions compare the topic's record. Records of topics are
remembered while a watch keeps them fresh; that a topic does not exist is asked each time.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from magnetar.broker import layout
from magnetar.broker.dedup import named_producer_id
from magnetar.broker.layout import SHARDS_MAX
from magnetar.broker.refusals import RETRY_AFTER_MS, subscription_not_found, topic_going, topic_name, topic_not_found
from magnetar.metadata import listing
from magnetar.metadata.codec import (
    decode_producer,
    decode_subscription,
    decode_topic,
    encode_producer,
    encode_subscription,
    encode_topic,
)
from magnetar.metadata.follow import Follower
from magnetar.metadata.ids import IdBlocks
from magnetar.metadata.keyspace import COUNTER_SHARD, COUNTER_SUBSCRIPTION, Keyspace
from magnetar.metadata.records import (
    ProducerRecord,
    StartPosition,
    SubscriptionRecord,
    SubscriptionType,
    TopicRecord,
)
from magnetar.metadata.shards import shard_creation_operations
from magnetar.metadata.store import (
    Change,
    Compare,
    Delete,
    DeletePrefix,
    KeyValue,
    MetadataStore,
    MetadataUnavailable,
    Operation,
    Put,
    absent,
    unchanged,
)
from magnetar.node.rpc import Refused, invalid_argument, unavailable
from magnetar.v1 import common_pb2
from magnetar.wire.names import check_name

CACHED_TOPICS_MAX = 100_000
CAS_ATTEMPTS = 16
"""How often a compare-and-set is tried again because somebody else was first."""
PAGE_KEYS = 1_000


@dataclass(frozen=True, slots=True)
class _Stored:
    record: TopicRecord
    mod_revision: int


class RegisteredProducer(NamedTuple):
    """The newest epoch of a producer's name, and whether it was taken for who asks."""

    producer_id: bytes
    epoch: int
    taken: bool


class _Load:
    """A read of a topic's record under way; `overtaken` when a change of it was seen meanwhile."""

    overtaken = False


class Topics:
    """`on_topic` and `on_subscription` are called with each change the watches see; None = deleted.

    `on_gap` is called when changes may have been missed.
    """

    def __init__(self, store: MetadataStore, keyspace: Keyspace, ids: IdBlocks, now_us: Callable[[], int]) -> None:
        self._store = store
        self._keyspace = keyspace
        self._ids = ids
        self._now_us = now_us
        self._cache: OrderedDict[str, _Stored] = OrderedDict()
        self._loads: dict[str, set[_Load]] = {}
        self.on_topic: list[Callable[[str, TopicRecord | None], None]] = []
        self.on_gap: list[Callable[[], None]] = []
        self.on_subscription: list[Callable[[str, str, SubscriptionRecord | None], None]] = []
        self._followers = (
            Follower(store, keyspace.topics_prefix(), self._forget_all, self._topics_changed, list_keys=False),
            Follower(
                store, keyspace.root + "subscriptions/", self._forget_all, self._subscriptions_changed, list_keys=False
            ),
        )

    async def start(self) -> None:
        for follower in self._followers:
            await follower.start()

    async def close(self) -> None:
        for follower in self._followers:
            await follower.close()

    # --- topics ---

    async def get(self, topic: str) -> TopicRecord:
        """The topic's record, perhaps as old as the watch. Raises Refused(TOPIC_NOT_FOUND)."""
        stored = self._cache.get(topic)
        if stored is None:
            stored = await self._load(topic)
        else:
            self._cache.move_to_end(topic)
        if stored is None:
            raise topic_not_found(topic)
        if stored.record.deleting:
            raise topic_going(topic)
        return stored.record

    async def get_or_create(self, topic: str) -> TopicRecord:
        """The topic's record; a new topic has one shard."""
        for _ in range(CAS_ATTEMPTS):
            stored = self._cache.get(topic) or await self._load(topic)
            if stored is None:
                stored = await self._try_create(topic, 1)
            if stored is not None and stored.record.deleting:
                raise unavailable(f"the topic is being deleted topic=`{topic}`", retry_after_ms=RETRY_AFTER_MS)
            if stored is not None:
                return stored.record
        raise _contended("topic", topic)

    async def create(self, topic: str, shards: int) -> TopicRecord:
        """A new topic with so many shards of equal ranges. Raises Refused(ALREADY_EXISTS or INVALID_ARGUMENT)."""
        await self.check_creatable(topic, shards)
        created = await self._try_create(topic, shards)
        if created is None:
            raise _exists("topic", topic)
        return created.record

    async def check_creatable(self, topic: str, shards: int) -> None:
        """Raises what `create` would."""
        if not 1 <= shards <= SHARDS_MAX:
            raise invalid_argument(f"a new topic has 1 to {SHARDS_MAX} shards shards=`{shards}`")
        if await self._load(topic) is not None:
            raise _exists("topic", topic)

    async def _try_create(self, topic: str, shards: int) -> _Stored | None:
        """None if the topic exists by now."""
        shard_ids = [await self._ids.next_id(COUNTER_SHARD) for _ in range(shards)]
        record, shard_records = layout.new_topic(topic, shard_ids, self._now_us())
        key = self._keyspace.topic(topic)
        compares: list[Compare] = [absent(key)]
        operations: list[Operation] = [Put(key, encode_topic(record))]
        for shard_record in shard_records:
            more_compares, more_operations = shard_creation_operations(self._keyspace, shard_record)
            compares.extend(more_compares)
            operations.extend(more_operations)
        try:
            result = await self._store.txn(compares, operations)
        except MetadataUnavailable:
            # The shards' ids are used once: a record with them is ours. Absent says nothing, it may still appear.
            stored = await self._load(topic)
            if stored is None:
                raise
            return stored if stored.record == record else None
        return _Stored(record, result.revision) if result.succeeded else None

    async def page(self, prefix: str, after: str, limit: int) -> tuple[list[str], bool]:
        """At most `limit` names of topics after that one, and whether there are more; prefix as `tenant/namespace`."""
        key_prefix = self._keyspace.topics_prefix(*_namespace(prefix))
        names: list[str] = []
        last = self._keyspace.topic(topic_name(after)) if after else ""
        while True:
            page = await self._store.range(key_prefix, after=last, limit=min(limit + 1, PAGE_KEYS))
            for item in page.items:
                if not decode_topic(item.value).deleting:
                    names.append(self._keyspace.parse_topic(item.key))
            if len(names) > limit or not page.more:
                return names[:limit], len(names) > limit
            last = page.items[-1].key

    async def all(self) -> AsyncIterator[TopicRecord]:
        """Every topic's record, those being deleted too."""
        async for item in listing.items(self._store, self._keyspace.topics_prefix()):
            yield decode_topic(item.value)

    # --- deleting a topic: mark it, delete its shards, then what is left ---

    async def mark_deleting(self, topic: str) -> TopicRecord:
        """From now on nothing of the topic is served. Returns its record; again for a topic that is marked already.

        Raises Refused(TOPIC_NOT_FOUND).
        """
        for _ in range(CAS_ATTEMPTS):
            stored = await self._load(topic)
            if stored is None:
                raise topic_not_found(topic)
            if stored.record.deleting:
                return stored.record
            put = Put(self._keyspace.topic(topic), encode_topic(layout.deleting(stored.record)))
            await self._store.txn([self._is_still(topic, stored)], [put])
        raise _contended("topic", topic)

    async def marked(self, topic: str) -> TopicRecord | None:
        """The topic's record if it is marked as being deleted."""
        stored = await self._load(topic)
        return stored.record if stored is not None and stored.record.deleting else None

    async def finish_deleting(self, topic: str) -> None:
        """Deletes subscriptions, producers and record of a marked topic. Raises Refused while a shard is there."""
        for _ in range(CAS_ATTEMPTS):
            stored = await self._load(topic)
            if stored is None or not stored.record.deleting:
                return  # gone, and perhaps created anew
            shards = [self._keyspace.shard(shard.shard_id) for shard in stored.record.shards]
            result = await self._store.txn(
                [self._is_still(topic, stored), *(absent(key) for key in shards)],
                [
                    DeletePrefix(self._keyspace.subscriptions_prefix(topic)),
                    DeletePrefix(self._keyspace.producers_prefix(topic)),
                    Delete(self._keyspace.topic(topic)),
                ],
            )
            if result.succeeded:
                self._cache.pop(topic, None)
                return
            remaining = [key for key in shards if await self._store.get(key) is not None]
            if remaining:
                raise unavailable(
                    f"shards of the topic are still being deleted: try again topic=`{topic}` shards=`{len(remaining)}`",
                    retry_after_ms=RETRY_AFTER_MS,
                )
        raise _contended("topic", topic)

    # --- subscriptions ---

    async def subscription(self, topic: str, name: str) -> SubscriptionRecord | None:
        found = await self._store.get(self._keyspace.subscription(topic, name))
        return None if found is None else decode_subscription(found.value)

    async def subscriptions(self, topic: str) -> list[SubscriptionRecord]:
        """All of a topic's, by name."""
        return [decode_subscription(item.value) for item in await self._all(self._keyspace.subscriptions_prefix(topic))]

    async def create_subscription(
        self, topic: str, name: str, kind: SubscriptionType, start: StartPosition
    ) -> SubscriptionRecord:
        """Durable on return. Raises Refused(ALREADY_EXISTS or TOPIC_NOT_FOUND)."""
        key = self._keyspace.subscription(topic, name)
        number = await self._ids.next_id(COUNTER_SUBSCRIPTION)
        record = SubscriptionRecord(topic, name, number, kind, start, self._now_us())
        for _ in range(CAS_ATTEMPTS):
            stored = await self._existing(topic)
            try:
                compares = [self._is_still(topic, stored), absent(key)]
                if (await self._store.txn(compares, [Put(key, encode_subscription(record))])).succeeded:
                    return record
            except MetadataUnavailable:
                pass  # Its id is used once: a record with it is ours.
            found = await self.subscription(topic, name)
            if found is not None and found.subscription_id != number:
                raise _exists("subscription", name)
            if found is not None:
                return found
        raise _contended("subscription", name)

    async def open_subscription(
        self, topic: str, name: str, kind: SubscriptionType, start: StartPosition | None
    ) -> SubscriptionRecord:
        """The record of a subscription that a consumer of this type opens, created if a start is given.

        One without a type takes this one; UNDECIDED asks for no type. Raises Refused(CONSUMER_BUSY) for another type.
        """
        key = self._keyspace.subscription(topic, name)
        for _ in range(CAS_ATTEMPTS):
            found = await self._store.get(key)
            if found is None:
                if start is None:
                    raise subscription_not_found(topic, name)
                try:
                    return await self.create_subscription(topic, name, kind, start)
                except Refused as refused:
                    if refused.reason != common_pb2.ERROR_REASON_ALREADY_EXISTS:
                        raise
                    continue
            record = decode_subscription(found.value)
            if kind in (record.type, SubscriptionType.UNDECIDED):
                return record
            if record.type is not SubscriptionType.UNDECIDED:
                raise other_type(topic, name, record.type)
            record = replace(record, type=kind)
            if (await self._store.txn([_same(found)], [Put(key, encode_subscription(record))])).succeeded:
                return record
        raise _contended("subscription", name)

    async def delete_subscription(self, topic: str, name: str) -> SubscriptionRecord:
        """Deletes the record; whoever serves a shard of the topic then drops its cursor. Returns what was deleted.

        Raises Refused(SUBSCRIPTION_NOT_FOUND).
        """
        key = self._keyspace.subscription(topic, name)
        for _ in range(CAS_ATTEMPTS):
            found = await self._store.get(key)
            if found is None:
                raise subscription_not_found(topic, name)
            if (await self._store.txn([_same(found)], [Delete(key)])).succeeded:
                return decode_subscription(found.value)
        raise _contended("subscription", name)

    # --- named producers ---

    async def register_producer(self, topic: str, name: str, newest_known: int | None = None) -> RegisteredProducer:
        """Takes the next epoch of a name. Older connections are refused wherever this one opens.

        newest_known   take it only after this one: what a client asked for before it was answered, or before another
                       one came, may arrive much later, and must not take the name from whoever uses it by then
        """
        key = self._keyspace.producer(topic, name)
        producer_id = named_producer_id(topic, name)
        for _ in range(CAS_ATTEMPTS):
            stored = await self._existing(topic)
            found = await self._store.get(key)
            newest = 0 if found is None else decode_producer(found.value).epoch
            if newest_known not in (None, newest):
                return RegisteredProducer(producer_id, newest, taken=False)
            record = ProducerRecord(producer_id, newest + 1)
            compares = [self._is_still(topic, stored), absent(key) if found is None else _same(found)]
            # With an unknown outcome the error goes out: the epoch may be taken, and is then taken for nobody.
            if (await self._store.txn(compares, [Put(key, encode_producer(record))])).succeeded:
                return RegisteredProducer(producer_id, record.epoch, taken=True)
        raise _contended("producer", name)

    async def producer_epoch(self, topic: str, name: str) -> int:
        """The newest epoch of a name, 0 if it was never registered."""
        found = await self._store.get(self._keyspace.producer(topic, name))
        return 0 if found is None else decode_producer(found.value).epoch

    # --- what is remembered ---

    async def _existing(self, topic: str) -> _Stored:
        stored = await self._load(topic)
        if stored is None:
            raise topic_not_found(topic)
        if stored.record.deleting:
            raise topic_going(topic)
        return stored

    async def _load(self, topic: str) -> _Stored | None:
        """Reads the record; remembers it unless the watch saw it change meanwhile: then the read may be the older."""
        load = _Load()
        loads = self._loads.setdefault(topic, set())
        loads.add(load)
        try:
            found = await self._store.get(self._keyspace.topic(topic))
        finally:
            loads.discard(load)
            if not loads:
                self._loads.pop(topic, None)
        if found is None:
            self._cache.pop(topic, None)
            return None
        stored = _Stored(decode_topic(found.value), found.mod_revision)
        if not load.overtaken:
            self._remember(topic, stored)
        return stored

    def _remember(self, topic: str, stored: _Stored) -> None:
        self._cache[topic] = stored
        self._cache.move_to_end(topic)
        if len(self._cache) > CACHED_TOPICS_MAX:
            self._cache.popitem(last=False)

    def _forget_all(self, _keys: Sequence[KeyValue]) -> None:
        self._cache.clear()
        for loads in self._loads.values():
            for load in loads:
                load.overtaken = True
        for callback in self.on_gap:
            callback()

    def _topics_changed(self, changes: Sequence[Change]) -> None:
        for change in changes:
            topic = self._keyspace.parse_topic(change.key)
            for load in self._loads.get(topic, ()):
                load.overtaken = True
            cached = self._cache.get(topic)
            record = None if change.current is None else decode_topic(change.current.value)
            if record is None and (cached is None or cached.mod_revision < change.revision):
                self._cache.pop(topic, None)
            elif record is not None and cached is not None and cached.mod_revision < change.revision:
                self._cache[topic] = _Stored(record, change.revision)
            for callback in self.on_topic:
                callback(topic, record)

    def _subscriptions_changed(self, changes: Sequence[Change]) -> None:
        for change in changes:
            topic, name = self._keyspace.parse_subscription(change.key)
            record = None if change.current is None else decode_subscription(change.current.value)
            for callback in self.on_subscription:
                callback(topic, name, record)

    def _is_still(self, topic: str, stored: _Stored) -> Compare:
        return unchanged(self._keyspace.topic(topic), stored.mod_revision)

    async def _all(self, prefix: str) -> Sequence[KeyValue]:
        return [item async for item in listing.items(self._store, prefix)]


def other_type(topic: str, name: str, kind: SubscriptionType) -> Refused:
    return Refused(
        common_pb2.ERROR_REASON_CONSUMER_BUSY,
        f"the subscription has another type: use that or another name topic=`{topic}` subscription=`{name}` "
        f"type=`{kind.name.lower()}`",
    )


def _namespace(prefix: str) -> list[str]:
    """The parts of `tenant` or `tenant/namespace`; none for an empty prefix."""
    parts = [part for part in prefix.removesuffix("/").split("/") if prefix]
    if len(parts) > 2:
        raise invalid_argument(f"a prefix is a tenant or tenant/namespace prefix=`{prefix[:300]}`")
    try:
        return [check_name(kind, part) for kind, part in zip(("tenant", "namespace"), parts, strict=False)]
    except ValueError as error:
        raise invalid_argument(str(error)) from None


def _same(found: KeyValue) -> Compare:
    return unchanged(found.key, found.mod_revision)


def _exists(kind: str, name: str) -> Refused:
    return Refused(
        common_pb2.ERROR_REASON_ALREADY_EXISTS,
        f"the {kind} exists already: use it, delete it, or choose another name {kind}=`{name}`",
    )


def _contended(kind: str, name: str) -> Refused:
    return unavailable(f"others keep changing this {kind}: try again {kind}=`{name}`", retry_after_ms=RETRY_AFTER_MS)
