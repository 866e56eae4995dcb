"""Producers: from `send` to a message id.

Rules:

1. A message costs two list appends and a receipt; everything else is done for whole batches, when a stream takes them.
2. Messages with one key go through one lane (a shard), in the order of the calls. So do keyless messages of a batch.
3. What was handed over ends: stored once, or failed with an error that says whether it may be stored. Budget and
   receipts are counted in the same place, `settled`.
"""

from __future__ import annotations

import asyncio
import os
import random
from array import array
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import datetime
from types import TracebackType
from typing import Literal, Self, TypeAlias

from magnetar.client.backoff import Delays
from magnetar.client.batching import (
    MESSAGE_OVERHEAD,
    Batch,
    Batching,
    Outbox,
    cost_of,
    properties_size,
    sealed_batch,
)
from magnetar.client.connection import ProduceStream
from magnetar.client.errors import (
    ClusterUnavailable,
    InvalidArgument,
    MagnetarError,
    QueueFull,
    RetriableError,
)
from magnetar.client.inflight import regroup
from magnetar.client.lane import Lane
from magnetar.client.layouts import Layout, checked_name, full_topic
from magnetar.client.lifetime import Lifetime
from magnetar.client.links import Cluster
from magnetar.client.message import MessageId, to_microseconds
from magnetar.client.outgoing import (
    MESSAGE_BYTES_MAX,
    check_sizes,
    checked_properties,
    key_column,
    key_to_bytes,
    payload_bytes,
    too_large,
)
from magnetar.client.receipts import MessageIds, Receipt, Settled
from magnetar.client.refusal import Refused
from magnetar.client.rpc import BROKER_SERVICE
from magnetar.v1 import broker_pb2
from magnetar.wire.compression import Codec
from magnetar.wire.slots import SLOTS, slot_of, slots_of

PENDING_BYTES_DEFAULT = 64 << 20
SEQUENCE_MAX = (1 << 62) - 1
ROUTES_MAX = 65_536
"""Keys whose lane is remembered; when it is full, all are forgotten."""

ROUTED_KEY_BYTES_MAX = 64
"""Longer keys are hashed each time, so that what is remembered is bounded in bytes too."""

SEND_MANY_CHUNK = 4096
"""Messages that `send_many` hands over before it looks at the budget again."""

Compression: TypeAlias = Literal["none", "lz4", "zstd"]
Access: TypeAlias = Literal["shared"]

_CODECS: Mapping[str, Codec] = {"none": Codec.NONE, "lz4": Codec.LZ4, "zstd": Codec.ZSTD}

Place: TypeAlias = tuple[Batch, int, int]
"""Batch, first index, count: where messages that were sent together stand."""

Route: TypeAlias = tuple[bytes, int, Outbox]
"""The bytes of a key, its slot, and where its messages go."""


class Producer:
    """Sends messages to one topic. Made by `Client.producer`, used with `async with`; leaving the block waits until
    everything is confirmed, at most the client's timeout.

    A message that was confirmed is durable and stored once. Retries and reconnects never duplicate or reorder; with a
    name this holds across restarts. A failure of a receipt that nobody awaited is raised by the next call.
    """

    def __init__(
        self,
        cluster: Cluster[ProduceStream],
        lifetime: Lifetime,
        topic: str,
        *,
        name: str | None,
        batching: Batching,
        compression: Compression,
        max_pending_bytes: int,
        access: Access,
    ) -> None:
        if compression not in _CODECS:
            raise InvalidArgument(f"compression is none, lz4 or zstd: compression=`{compression}`")
        if access != "shared":
            raise InvalidArgument(f"access is shared: access=`{access}`")
        if max_pending_bytes < 1:
            raise InvalidArgument(f"max_pending_bytes is at least 1: max_pending_bytes=`{max_pending_bytes}`")
        self.topic = full_topic(topic)
        self.name = "" if name is None else checked_name("producer", name)
        self.batching = batching
        self.codec = int(_CODECS[compression])
        self.producer_id = b""
        self.epoch = 0
        self.next_sequence = 0
        self._cluster = cluster
        self._lifetime = lifetime
        self._max_pending = max_pending_bytes
        self._max_messages = batching.max_messages
        self._pending = 0
        self._numbering = False
        self._keyless = sealed_batch()
        self._keyless_slot: int | None = None
        self._routes: dict[str | bytes, Route] = {}
        self._layout = Layout(self.topic, 0, ())
        self._lanes: dict[int, Lane] = {}
        self._row: list[Lane] = []
        self._row_of_slot: array[int] = array("H")
        self._waiting: deque[tuple[asyncio.Future[None], int]] = deque()
        self._admitted = False
        self._failed: Batch | None = None
        self._unlisten: Callable[[], None] | None = None

    # --- life ---

    async def __aenter__(self) -> Self:
        """The topic exists on return; with a name, older connections of it are fenced. Raises MagnetarError."""
        self._lifetime.begin()
        try:
            await self._find_shards()
            if self.name:
                await self._register()
            else:
                self.producer_id = os.urandom(16)
        except BaseException:
            self._lifetime.end()
            raise
        self._unlisten = self._cluster.layouts.listen(self.topic, self._adopt)
        self._lifetime.opened()
        return self

    async def _find_shards(self) -> None:
        """Adopt the topic's layout; while it is split there may be moments without a complete one."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self._cluster.timeout_s
        delays = Delays(random.random)
        self._adopt(await self._cluster.layouts.get(self.topic, create=True))
        while not self._row:
            if loop.time() >= deadline:
                raise RetriableError(f"no open shards cover the topic, try again later: topic=`{self.topic}`")
            await asyncio.sleep(delays.next_s())
            self._adopt(await self._cluster.layouts.get(self.topic, create=True))

    async def _register(self) -> None:
        request = broker_pb2.RegisterProducerRequest(topic=self.topic, name=self.name).SerializeToString()
        answer = await self._cluster.brokers.call(BROKER_SERVICE + "RegisterProducer", request)
        registered = broker_pb2.RegisterProducerResponse.FromString(answer)
        self.producer_id, self.epoch = registered.producer_id, registered.epoch
        self._keyless_slot = slot_of(self.producer_id)

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if kind is None:
            await self.close()
        else:
            # What went wrong in the block is the news; what happened to messages is in their receipts.
            try:
                await self.close()
            except MagnetarError:
                return

    async def close(self) -> None:
        """Wait until everything is confirmed, at most the client's timeout, and stop. Closing twice is fine.

        Raises the failure of a message if nobody has seen it yet.
        """
        if not self._lifetime.close():
            return
        try:
            await asyncio.wait_for(self._drain(), self._cluster.timeout_s)
        except TimeoutError:
            self._fail_all(
                ClusterUnavailable(
                    f"the producer was closed before everything was confirmed, the outcome is unknown: "
                    f"messages may or may not be stored: topic=`{self.topic}`"
                )
            )
        finally:
            await self._stop()
        if (error := self._unseen()) is not None:
            raise error

    async def _stop(self) -> None:
        if self._unlisten is not None:
            self._unlisten()
        self._fail_all(ClusterUnavailable(f"the producer was closed, the outcome is unknown: topic=`{self.topic}`"))
        self._lifetime.end()
        await asyncio.gather(*(lane.stop() for lane in self._lanes.values()))

    # --- sending ---

    def send_nowait(
        self,
        payload: bytes,
        *,
        key: str | bytes | None = None,
        properties: Mapping[str, str] | None = None,
        event_time: datetime | None = None,
        sequence: int | None = None,
    ) -> Receipt:
        """Hand over one message; the receipt tells when it is durable, and its id.

        Raises QueueFull while `max_pending_bytes` are unconfirmed, MessageTooLarge, InvalidArgument, ProducerFenced,
        ClientClosed, or what happened to an earlier message whose receipt nobody awaited. Then nothing was sent.
        """
        if self._lifetime.over is not None or self._failed is not None:
            self._raise_trouble()
        if type(payload) is not bytes:
            payload = payload_bytes(payload)
        if properties is not None or event_time is not None or sequence is not None or self._numbering:
            return self._send_full(payload, key, properties, event_time, sequence)
        if key is None:
            cost = len(payload) + MESSAGE_OVERHEAD
            if self._pending + cost > self._max_pending or cost > MESSAGE_BYTES_MAX or self._waiting:
                self._check_room(cost, cost - MESSAGE_OVERHEAD)
            batch = self._keyless
            if batch.size + cost > batch.limit or len(batch.payloads) >= self._max_messages:
                batch = self._keyless_batch(cost)
            index = len(batch.payloads)
        else:
            key_bytes, slot, outbox = self._route(key)
            cost = len(payload) + len(key_bytes) + MESSAGE_OVERHEAD
            if self._pending + cost > self._max_pending or cost > MESSAGE_BYTES_MAX or self._waiting:
                self._check_room(cost, cost - MESSAGE_OVERHEAD)
            batch = outbox.open
            if batch.size + cost > batch.limit or len(batch.payloads) >= self._max_messages:
                batch = outbox.begin(slot)
            index = len(batch.payloads)
            keys = batch.keys
            if len(keys) != index:
                batch.pad_keys(index)
            keys.append(key_bytes)
            batch.slots.append(slot)
        batch.payloads.append(payload)
        batch.size += cost
        self._pending += cost
        return Receipt(batch, index)

    async def send(
        self,
        payload: bytes,
        *,
        key: str | bytes | None = None,
        properties: Mapping[str, str] | None = None,
        event_time: datetime | None = None,
        sequence: int | None = None,
    ) -> MessageId:
        """Send one message, waiting for room in the budget; it is durable on return.

        payload     bytes, at most 5 MiB together with key and properties
        key         messages with one key are delivered in the order they were sent
        event_time  with a timezone
        sequence    a named producer's own number of the message, growing: one that is stored already is not stored
                    again; then the id's offset is None unless the message is among the last 16 batches of its shard

        Raises as `send_nowait`, but never QueueFull; and ClusterUnavailable after the client's timeout: then the
        message may or may not be stored. Cancelling it does not take the message back.
        """
        try:
            receipt = self.send_nowait(
                payload, key=key, properties=properties, event_time=event_time, sequence=sequence
            )
        except QueueFull:
            await self._turn(len(payload) + MESSAGE_OVERHEAD)
            self._admitted = True
            try:
                receipt = self.send_nowait(
                    payload, key=key, properties=properties, event_time=event_time, sequence=sequence
                )
            finally:
                self._admitted = False
        return await receipt

    async def send_many(
        self, payloads: Iterable[bytes], keys: Iterable[str | bytes | None] | None = None
    ) -> Sequence[MessageId]:
        """Send messages in bulk, the fast way, waiting for room; all are durable on return.

        keys   one for each payload

        Returns their ids in order, made when they are looked at. Raises as `send`: the first failure, whose `ids` has
        None for each message that is not known to be stored. What is refused at once is found before any is sent.
        """
        self._raise_trouble()
        values = [payload if type(payload) is bytes else payload_bytes(payload) for payload in payloads]
        encoded = None if keys is None else key_column(keys, values)
        check_sizes(values, encoded)
        if self._numbering:
            raise InvalidArgument("this producer numbers its messages: use send(..., sequence=) for each")
        places: list[Place] = []
        order: array[int] | None = None if encoded is None else array("Q")
        failure: MagnetarError | None = None
        try:
            await self._hand_over(values, encoded, places, order)
        except MagnetarError as error:
            failure = error
        for batch in dict.fromkeys(batch for batch, _, _ in places):
            for part in await Settled(batch, seen=True):
                failure = failure or part.error
        ids = MessageIds(places, order)
        if failure is None:
            return ids
        failure = failure.again()
        confirmed = ids.confirmed()
        failure.ids = confirmed + [None] * (len(values) - len(confirmed))
        raise failure

    async def flush(self) -> None:
        """Wait until everything that was sent before this call is confirmed.

        Raises the first failure that nobody has seen yet.
        """
        self._lifetime.check()
        await self._drain()
        if (error := self._unseen()) is not None:
            raise error

    async def _drain(self) -> None:
        batches = self._pending_batches()
        for lane in self._row:
            lane.press()
        for batch in batches:
            await Settled(batch, seen=False)

    def _pending_batches(self) -> list[Batch]:
        return [batch for lane in self._row for batch in lane.pending()]

    # --- handing over ---

    def _send_full(
        self,
        payload: bytes,
        key: str | bytes | None,
        properties: Mapping[str, str] | None,
        event_time: datetime | None,
        sequence: int | None,
    ) -> Receipt:
        """A message with more than a key."""
        pairs = None if properties is None else checked_properties(properties)
        time_us = None if event_time is None else to_microseconds(event_time)
        self._check_sequence(sequence)
        extra = properties_size(pairs) if pairs else 0
        key_bytes = None if key is None else self._route(key)[0]
        cost = cost_of(len(payload), key_bytes, extra, time_us)
        self._check_room(cost, len(payload) + extra + len(key_bytes or b""))
        if key is None:
            slot = self._slot_for_keyless()
            outbox = self._row[self._row_of_slot[slot]].outbox
        else:
            _, slot, outbox = self._route(key)
        if sequence is not None:
            batch = outbox.numbered_batch_for(cost, sequence, slot)
        elif key is None:
            batch = self._keyless
            if batch.size + cost > batch.limit or len(batch.payloads) >= self._max_messages:
                batch = self._keyless_batch(cost)
        else:
            batch = outbox.batch_for(cost, slot)
        self._pending += cost
        return Receipt(batch, batch.append(cost, payload, key_bytes, slot, pairs, time_us))

    def _check_sequence(self, sequence: int | None) -> None:
        if sequence is None:
            if self._numbering:
                raise InvalidArgument("this producer numbers its messages: pass sequence= with each")
            return
        if not self.name:
            raise InvalidArgument("sequence= needs a producer with a name: producer(topic, name=...)")
        if not isinstance(sequence, int) or not 0 <= sequence <= SEQUENCE_MAX:
            raise InvalidArgument(f"a sequence is 0 to {SEQUENCE_MAX}: sequence=`{sequence}`")
        self._numbering = True

    async def _hand_over(
        self,
        payloads: Sequence[bytes],
        keys: Sequence[bytes | None] | None,
        places: list[Place],
        order: array[int] | None,
    ) -> None:
        """Put messages into batches, as many at a time as there is room for. Notes where they went as it goes.

        order   for each message its number in the row of the places, if they do not stand as they were sent
        """
        for start in range(0, len(payloads), SEND_MANY_CHUNK):
            stop = start + SEND_MANY_CHUNK
            chunk = payloads[start:stop]
            chunk_keys = None if keys is None else keys[start:stop]
            cost = sum(map(len, chunk)) + MESSAGE_OVERHEAD * len(chunk)
            if chunk_keys is not None:
                cost += sum([len(key) for key in chunk_keys if key is not None])
            if self._waiting or not self._has_room(cost):
                await self._turn(cost)
                self._lifetime.check()
            self._pending += cost
            if chunk_keys is None:
                places += self._put_keyless(chunk)
            elif order is not None:
                self._put_keyed(chunk, chunk_keys, places, order)

    def _put_keyless(self, payloads: Sequence[bytes]) -> list[Place]:
        batch = self._keyless
        if batch.limit < 0:
            slot = self._slot_for_keyless()
            outbox = self._row[self._row_of_slot[slot]].outbox
        else:
            slot, outbox = batch.slot, self._lanes[batch.shard].outbox
        places = outbox.put_many(payloads, None, (), slot)
        # One batch, one slot: what comes next goes elsewhere unless there is room where this begins.
        self._keyless = outbox.open if places[0][0] is outbox.open else sealed_batch()
        return places

    def _put_keyed(
        self, payloads: Sequence[bytes], keys: Sequence[bytes | None], places: list[Place], order: array[int]
    ) -> None:
        slots = self._slots_of(keys)
        base = len(order)
        if len(self._row) == 1:
            places += self._row[0].outbox.put_many(payloads, keys, slots, slots[0])
            order.extend(range(base, base + len(payloads)))
            return
        indices: list[list[int]] = [[] for _ in self._row]
        for index, row in enumerate(map(self._row_of_slot.__getitem__, slots)):
            indices[row].append(index)
        numbers = array("Q", bytes(8 * len(payloads)))
        number = base
        for lane, chosen in zip(self._row, indices, strict=True):
            if chosen:
                places += lane.outbox.put_many(
                    [payloads[i] for i in chosen],
                    [keys[i] for i in chosen],
                    [slots[i] for i in chosen],
                    slots[chosen[0]],
                )
            for index in chosen:
                numbers[index] = number
                number += 1
        order.extend(numbers)

    def _slots_of(self, keys: Sequence[bytes | None]) -> array[int]:
        if None not in keys:
            return slots_of(keys)  # type: ignore[arg-type]  # there is no None
        keyless = self._slot_for_keyless()
        return array("H", [keyless if key is None else slot_of(key) for key in keys])

    # --- where messages go ---

    def _route(self, key: str | bytes) -> Route:
        try:
            route = self._routes.get(key)
        except TypeError:
            route = None
        if route is None:
            key_bytes = key_to_bytes(key)
            slot = slot_of(key_bytes)
            route = key_bytes, slot, self._row[self._row_of_slot[slot]].outbox
            if len(key_bytes) > MESSAGE_BYTES_MAX:
                raise too_large(len(key_bytes))
            if len(self._routes) >= ROUTES_MAX:
                self._routes.clear()
            if len(key_bytes) <= ROUTED_KEY_BYTES_MAX:
                self._routes[key if isinstance(key, str) else key_bytes] = route
        return route

    def _slot_for_keyless(self) -> int:
        """Varies from batch to batch; but a named producer's keyless messages stay together across restarts."""
        return random.getrandbits(16) if self._keyless_slot is None else self._keyless_slot

    def _keyless_batch(self, cost: int) -> Batch:
        """The batch for a keyless message when the one so far is full or gone."""
        slot = self._slot_for_keyless()
        self._keyless = self._row[self._row_of_slot[slot]].outbox.batch_for(cost, slot)
        return self._keyless

    def _adopt(self, layout: Layout) -> None:
        """Take a new layout. What waits for a shard that is not open any more goes to those that took its slots."""
        shards = [shard for shard in layout.shards if shard.open]
        if layout.epoch < self._layout.epoch or not _covers_all_slots(layout):
            return
        same = layout.same_shards(self._layout)
        self._layout = layout
        if same:
            return
        old = self._lanes
        self._lanes = {}
        for place in shards:
            known = old.pop(place.shard_id, None)
            self._lanes[place.shard_id] = known or Lane(self._cluster, self.topic, place, self)
        self._row = [self._lanes[place.shard_id] for place in shards]
        self._row_of_slot = array("H")
        for row, place in enumerate(shards):
            self._row_of_slot.extend(array("H", [row]) * (place.last_slot - place.first_slot + 1))
        self._routes.clear()
        self._keyless = sealed_batch()
        for lane in old.values():
            self._move(lane)

    def _move(self, lane: Lane) -> None:
        """Everything of a lane goes to those that serve its slots now, in order: a key is always in one lane."""
        batches = lane.take_all()
        lane.abandon()
        for batch in batches:
            parts = regroup(batch, lambda slot: self._row[self._row_of_slot[slot]].shard_id)
            self.replaced(batch, parts)
            for part in parts:
                self._lanes[part.shard].outbox.put(part)
                self._lanes[part.shard].wake()

    # --- budget and outcome ---

    def _has_room(self, cost: int) -> bool:
        """One message too large for the whole budget may go when nothing else is under way."""
        return self._pending + cost <= self._max_pending or self._pending == 0

    def _check_room(self, cost: int, size: int) -> None:
        """Raises MessageTooLarge or QueueFull. size: of payload, key and properties."""
        if size > MESSAGE_BYTES_MAX:
            raise too_large(size)
        if not self._admitted and (self._waiting or not self._has_room(cost)):
            raise QueueFull(
                f"too much is unconfirmed, wait for receipts or use send(): "
                f"pending_bytes=`{self._pending}` max_pending_bytes=`{self._max_pending}`"
            )

    async def _turn(self, cost: int) -> None:
        """Wait for room, first come, first served: a later message never overtakes one that waits."""
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append((future, cost))
        self._admit_waiting()
        try:
            await future
        except asyncio.CancelledError:
            if future.done() and not future.cancelled():
                self._pending -= cost
                self._admit_waiting()
            raise
        # What was set aside is counted again by whoever waited, before anyone else runs.
        self._pending -= cost

    def _admit_waiting(self) -> None:
        while self._waiting:
            future, cost = self._waiting[0]
            if not future.done():
                if self._lifetime.over is None and not self._has_room(cost):
                    return
                self._pending += cost
                future.set_result(None)
            self._waiting.popleft()

    def settled(self, batches: Sequence[Batch]) -> None:
        for batch in batches:
            self._pending -= batch.size
            if batch.error is not None and batch.listened < batch.count and self._failed is None:
                self._failed = batch
        if self._waiting and batches:
            self._admit_waiting()

    def replaced(self, batch: Batch, parts: Sequence[Batch]) -> None:
        self._pending += sum(part.size for part in parts) - batch.size

    def lane_failed(self, refused: Refused) -> None:
        error = refused.public()
        self._lifetime.fail(error)
        self._fail_all(error)
        for lane in self._row:
            lane.abandon()

    def _fail_all(self, error: MagnetarError) -> None:
        for lane in self._row:
            lane.fail(error)
        self._admit_waiting()

    def _unseen(self) -> MagnetarError | None:
        """The failure of a message that nobody waited for, once."""
        batch, self._failed = self._failed, None
        if batch is None or batch.error is None or batch.listened >= batch.count:
            return None
        return batch.error.again()

    @property
    def pending_bytes(self) -> int:
        """Bytes that are not confirmed yet, as they count against `max_pending_bytes`."""
        return self._pending

    @property
    def max_pending_bytes(self) -> int:
        """The budget that the producer was made with."""
        return self._max_pending

    def _raise_trouble(self) -> None:
        self._lifetime.check()
        if (error := self._unseen()) is not None:
            raise error


def _covers_all_slots(layout: Layout) -> bool:
    """The open shards have each slot exactly once. Between the sealing of a shard and the opening of its children a
    layout does not; then messages wait where they are."""
    next_slot = 0
    for shard in layout.shards:
        if shard.open:
            if shard.first_slot != next_slot:
                return False
            next_slot = shard.last_slot + 1
    return next_slot == SLOTS
