"""Producers: from `send` to a message id.

Rules:

1. A message costs two list appends and a receipt; everything else is done for whole batches, when a stream takes them.
2. Messages with one key go through one lane (a shard), in the order of the calls. So do keyless messages of a batch.
"""

from __future__ import annotations

import asyncio
from array import array
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from types import TracebackType
from typing import Literal, Self, TypeAlias

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
    InvalidArgument,
    MagnetarError,
    QueueFull,
)
from magnetar.client.lanes import Lanes
from magnetar.client.layouts import checked_name, full_topic
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
from magnetar.wire.compression import Codec
from magnetar.wire.slots import slot_of, slots_of

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
        self._lifetime = lifetime
        self._timeout_s = cluster.timeout_s
        self._lanes = Lanes(
            cluster,
            lifetime,
            self.topic,
            name=self.name,
            batching=batching,
            codec=_CODECS[compression],
            max_pending=max_pending_bytes,
            rerouted=self._forget_routes,
        )
        self._max_messages = batching.max_messages
        self._numbering = False
        self._keyless = sealed_batch()
        self._routes: dict[str | bytes, Route] = {}

    # --- life ---

    async def __aenter__(self) -> Self:
        """The topic exists on return; with a name, older connections of it are fenced. Raises MagnetarError."""
        self._lifetime.begin()
        try:
            await self._lanes.open()
        except BaseException:
            await self._lanes.stop()
            self._lifetime.end()
            raise
        self._lifetime.opened()
        return self

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
            async with asyncio.timeout(self._timeout_s):
                await self._lanes.drain()
        except TimeoutError:
            pass  # What has not ended fails now, and says so.
        finally:
            await self._lanes.stop()
            self._lifetime.end()
        if (error := self._lanes.unseen()) is not None:
            raise error

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
        lanes = self._lanes
        if self._lifetime.over is not None or lanes.failed is not None:
            self._raise_trouble()
        if type(payload) is not bytes:
            payload = payload_bytes(payload)
        if properties is not None or event_time is not None or sequence is not None or self._numbering:
            return self._send_full(payload, key, properties, event_time, sequence)
        if key is None:
            cost = len(payload) + MESSAGE_OVERHEAD
            if lanes.pending + cost > lanes.max_pending or cost > MESSAGE_BYTES_MAX or lanes.waiting:
                lanes.check_room(cost, cost - MESSAGE_OVERHEAD)
            batch = self._keyless
            if batch.size + cost > batch.limit or len(batch.payloads) >= self._max_messages:
                batch = self._keyless_batch(cost)
            index = len(batch.payloads)
        else:
            key_bytes, slot, outbox = self._route(key)
            cost = len(payload) + len(key_bytes) + MESSAGE_OVERHEAD
            if lanes.pending + cost > lanes.max_pending or cost > MESSAGE_BYTES_MAX or lanes.waiting:
                lanes.check_room(cost, cost - MESSAGE_OVERHEAD)
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
        lanes.pending += cost
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
            await self._lanes.turn(len(payload) + MESSAGE_OVERHEAD)
            self._lanes.admitted = True
            try:
                receipt = self.send_nowait(
                    payload, key=key, properties=properties, event_time=event_time, sequence=sequence
                )
            finally:
                self._lanes.admitted = False
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
        try:
            check_sizes(values, encoded)
        except MagnetarError as error:
            error.ids = [None] * len(values)
            raise
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
        await self._lanes.drain()
        if (error := self._lanes.unseen()) is not None:
            raise error

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
        self._lanes.check_room(cost, len(payload) + extra + len(key_bytes or b""))
        if key is None:
            slot = self._lanes.slot_for_keyless()
            outbox = self._lanes.outbox_for(slot)
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
        self._lanes.pending += cost
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
                cost += sum(map(len, filter(None, chunk_keys)))
            if self._lanes.waiting or not self._lanes.has_room(cost):
                await self._lanes.turn(cost)
                self._lifetime.check()
            self._lanes.pending += cost
            if chunk_keys is None:
                places += self._put_keyless(chunk)
            elif order is not None:
                self._put_keyed(chunk, chunk_keys, places, order)

    def _put_keyless(self, payloads: Sequence[bytes]) -> list[Place]:
        batch = self._keyless
        if batch.limit < 0:
            slot = self._lanes.slot_for_keyless()
            outbox = self._lanes.outbox_for(slot)
        else:
            slot, outbox = batch.slot, self._lanes.outbox_of(batch.shard)
        places = outbox.put_many(payloads, None, (), slot)
        # One batch, one slot: what comes next goes elsewhere unless there is room where this begins.
        self._keyless = outbox.open if places[0][0] is outbox.open else sealed_batch()
        return places

    def _put_keyed(
        self, payloads: Sequence[bytes], keys: Sequence[bytes | None], places: list[Place], order: array[int]
    ) -> None:
        slots = self._slots_of(keys)
        base = len(order)
        outboxes = self._lanes.outboxes
        if len(outboxes) == 1:
            places += outboxes[0].put_many(payloads, keys, slots, slots[0])
            order.extend(range(base, base + len(payloads)))
            return
        indices: list[list[int]] = [[] for _ in outboxes]
        for index, outbox in enumerate(self._lanes.numbers_of(slots)):
            indices[outbox].append(index)
        numbers = array("Q", bytes(8 * len(payloads)))
        number = base
        for outbox_of_these, chosen in zip(outboxes, indices, strict=True):
            if chosen:
                places += outbox_of_these.put_many(
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
        keyless = self._lanes.slot_for_keyless()
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
            route = key_bytes, slot, self._lanes.outbox_for(slot)
            if len(key_bytes) > MESSAGE_BYTES_MAX:
                raise too_large(len(key_bytes))
            if len(self._routes) >= ROUTES_MAX:
                self._routes.clear()
            if len(key_bytes) <= ROUTED_KEY_BYTES_MAX:
                self._routes[key if isinstance(key, str) else key_bytes] = route
        return route

    def _keyless_batch(self, cost: int) -> Batch:
        """The batch for a keyless message when the one so far is full or gone."""
        slot = self._lanes.slot_for_keyless()
        self._keyless = self._lanes.outbox_for(slot).batch_for(cost, slot)
        return self._keyless

    def _forget_routes(self) -> None:
        """Shards took the place of others."""
        self._routes.clear()
        self._keyless = sealed_batch()

    # --- state ---

    @property
    def pending_bytes(self) -> int:
        """Bytes that are not confirmed yet, as they count against `max_pending_bytes`."""
        return self._lanes.pending

    @property
    def max_pending_bytes(self) -> int:
        """The budget that the producer was made with."""
        return self._lanes.max_pending

    def _raise_trouble(self) -> None:
        self._lifetime.check()
        if (error := self._lanes.unseen()) is not None:
            raise error
