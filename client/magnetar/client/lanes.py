"""All that a producer has under way: its lanes by shard, its identity, its budget.

Rules:

1. The open shards of the layout have each slot once, and so do the lanes. A layout that does not cover all slots, as
   between the sealing of a shard and the opening of its children, is not taken: messages wait where they are.
2. What was handed over ends: stored once, or failed with an error that says whether it may be stored. The budget is
   given back in one place, `settled`.
3. Room is given in the order in which it was asked for: a later message never overtakes one that waits.
"""

from __future__ import annotations

import asyncio
import os
import random
from array import array
from collections import deque
from collections.abc import Callable, Sequence

from magnetar.client.backoff import Delays
from magnetar.client.batching import Batch, Batching, Outbox
from magnetar.client.connection import ProduceStream
from magnetar.client.errors import ClusterUnavailable, MagnetarError, QueueFull, RetriableError
from magnetar.client.inflight import regroup
from magnetar.client.lane import Lane
from magnetar.client.layouts import Layout
from magnetar.client.lifetime import Lifetime
from magnetar.client.links import Cluster
from magnetar.client.outgoing import MESSAGE_BYTES_MAX, too_large
from magnetar.client.receipts import Settled
from magnetar.client.refusal import Refused
from magnetar.client.rpc import BROKER_SERVICE
from magnetar.v1 import broker_pb2
from magnetar.wire.slots import SLOTS, slot_of


class Lanes:
    """See the module's docstring.

    producer_id    of its name, or random; the broker knows the producer by it
    epoch          of the name's newest connection; 0 without a name
    next_sequence  for messages that the user does not number: one counter for all shards, as chains are by shard
    pending        bytes that are not confirmed, and that were promised to those who waited
    waiting        those who wait for room, and how many bytes each wants
    admitted       whoever sends now has waited for its room
    failed         a batch with messages that failed and that nobody waited for
    """

    def __init__(
        self,
        cluster: Cluster[ProduceStream],
        lifetime: Lifetime,
        topic: str,
        *,
        name: str,
        batching: Batching,
        codec: int,
        max_pending: int,
        rerouted: Callable[[], None],
    ) -> None:
        self.producer_id = b""
        self.epoch = 0
        self.name = name
        self.codec = codec
        self.batching = batching
        self.next_sequence = 0
        self.pending = 0
        self.max_pending = max_pending
        self.waiting: deque[tuple[asyncio.Future[None], int]] = deque()
        self.admitted = False
        self.failed: Batch | None = None
        self._cluster = cluster
        self._lifetime = lifetime
        self._topic = topic
        self._rerouted = rerouted
        self._layout = Layout(topic, 0, ())
        self._lanes: dict[int, Lane] = {}
        self._row: list[Lane] = []
        self._row_of_slot: array[int] = array("H")
        self._keyless_slot: int | None = None
        self._unlisten: Callable[[], None] | None = None
        self._refusal: MagnetarError | None = None

    # --- life ---

    async def open(self) -> None:
        """The topic exists on return; with a name, older connections of it are fenced. Raises MagnetarError."""
        await self._find_shards()
        self._unlisten = self._cluster.layouts.listen(self._topic, self._adopt)
        if self.name:
            await self._register()
            await self._fence_older()
        else:
            self.producer_id = os.urandom(16)

    async def _find_shards(self) -> None:
        """Adopt the topic's layout; while it is split there may be moments without a complete one."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self._cluster.timeout_s
        delays = Delays(random.random)
        self._adopt(await self._cluster.layouts.get(self._topic, create=True))
        while not self._row:
            if loop.time() >= deadline:
                raise RetriableError(f"no open shards cover the topic, try again later: topic=`{self._topic}`")
            await asyncio.sleep(delays.next_s())
            self._adopt(await self._cluster.layouts.get(self._topic, create=True))

    async def _register(self) -> None:
        """Take the name's next epoch.

        Each request names the newest one that is known, and takes nothing if another one is: a copy of it that arrives
        when this producer, or one that came later, has its epoch already is harmless.
        """
        registered = await self._take_epoch_after(0)
        deadline = asyncio.get_running_loop().time() + self._cluster.timeout_s
        while registered.outdated:
            if asyncio.get_running_loop().time() >= deadline:
                raise RetriableError(
                    f"others keep taking the producer's name, try again later: "
                    f"producer=`{self.name}` topic=`{self._topic}` epoch=`{registered.epoch}`"
                )
            registered = await self._take_epoch_after(registered.epoch)
        self.producer_id, self.epoch = registered.producer_id, registered.epoch
        self._keyless_slot = slot_of(self.producer_id)

    async def _take_epoch_after(self, newest_known: int) -> broker_pb2.RegisterProducerResponse:
        request = broker_pb2.RegisterProducerRequest(topic=self._topic, name=self.name, newest_known=newest_known)
        answer = await self._cluster.brokers.call(BROKER_SERVICE + "RegisterProducer", request.SerializeToString())
        return broker_pb2.RegisterProducerResponse.FromString(answer)

    async def _fence_older(self) -> None:
        """Open at every shard: the brokers refuse older connections of the name from then on."""
        for lane in self._row:
            lane.start()
        try:
            async with asyncio.timeout(self._cluster.timeout_s):
                while unopened := [lane for lane in self._row if not lane.was_opened.is_set()]:
                    unopened[0].start()
                    await unopened[0].was_opened.wait()
        except TimeoutError:
            raise ClusterUnavailable(
                f"the producer could not be opened within {self._cluster.timeout_s:g} s, nothing was sent: "
                f"producer=`{self.name}` topic=`{self._topic}`"
            ) from None
        if self._refusal is not None:
            raise self._refusal

    async def drain(self) -> None:
        """Until everything that is here now has ended."""
        batches = [batch for lane in self._row for batch in lane.pending()]
        for lane in self._row:
            lane.press()
        for batch in batches:
            await Settled(batch, seen=False)

    async def stop(self) -> None:
        """Everything that has not ended fails."""
        if self._unlisten is not None:
            self._unlisten()
        self.fail_all(
            ClusterUnavailable(
                f"the producer was closed before everything was confirmed, the outcome is unknown: "
                f"messages may or may not be stored: topic=`{self._topic}`"
            )
        )
        await asyncio.gather(*(lane.stop() for lane in self._row))

    # --- where messages go ---

    @property
    def outboxes(self) -> list[Outbox]:
        """One a shard, by slot."""
        return [lane.outbox for lane in self._row]

    def outbox_for(self, slot: int) -> Outbox:
        """Where messages of this slot go."""
        return self._row[self._row_of_slot[slot]].outbox

    def outbox_of(self, shard: int) -> Outbox:
        """That of a shard which is open."""
        return self._lanes[shard].outbox

    def numbers_of(self, slots: Sequence[int]) -> list[int]:
        """For each slot the number of its outbox among all."""
        return list(map(self._row_of_slot.__getitem__, slots))

    def slot_for_keyless(self) -> int:
        """Varies from batch to batch; but a named producer's keyless messages stay together across restarts.

        A slot whose shard does not serve now is passed over while others do; it is opened meanwhile.
        """
        if self._keyless_slot is not None:
            return self._keyless_slot
        slot = random.getrandbits(16)
        lane = self._row[self._row_of_slot[slot]]
        if lane.serves:
            return slot
        lane.start()
        serving = [shard for shard in self._layout.shards if shard.open and self._lanes[shard.shard_id].serves]
        if not serving:
            return slot
        shard = random.choice(serving)
        return random.randint(shard.first_slot, shard.last_slot)

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
            self._lanes[place.shard_id] = known or Lane(self._cluster, self._topic, place, self)
        self._row = [self._lanes[place.shard_id] for place in shards]
        self._row_of_slot = array("H")
        for row, place in enumerate(shards):
            self._row_of_slot.extend(array("H", [row]) * (place.last_slot - place.first_slot + 1))
        self._rerouted()
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

    def has_room(self, cost: int) -> bool:
        """One message too large for the whole budget may go when nothing else is under way."""
        return self.pending + cost <= self.max_pending or self.pending == 0

    def check_room(self, cost: int, size: int) -> None:
        """Raises MessageTooLarge or QueueFull. size: of payload, key and properties."""
        if size > MESSAGE_BYTES_MAX:
            raise too_large(size)
        if not self.admitted and (self.waiting or not self.has_room(cost)):
            raise QueueFull(
                f"too much is unconfirmed, wait for receipts or use send(): "
                f"pending_bytes=`{self.pending}` max_pending_bytes=`{self.max_pending}`"
            )

    async def turn(self, cost: int) -> None:
        """Wait for room, first come, first served: a later message never overtakes one that waits."""
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.waiting.append((future, cost))
        self._admit()
        try:
            await future
        except asyncio.CancelledError:
            if future.done() and not future.cancelled():
                self.pending -= cost
            self._admit()
            raise
        # What was set aside is counted again by whoever waited, before anyone else runs.
        self.pending -= cost

    def _admit(self) -> None:
        while self.waiting:
            future, cost = self.waiting[0]
            if not future.done():
                if self._lifetime.over is None and not self.has_room(cost):
                    return
                self.pending += cost
                future.set_result(None)
            self.waiting.popleft()

    def settled(self, batches: Sequence[Batch]) -> None:
        for batch in batches:
            self.pending -= batch.size
            if batch.error is not None and batch.listened < batch.count and self.failed is None:
                self.failed = batch
        if self.waiting and batches:
            self._admit()

    def replaced(self, batch: Batch, parts: Sequence[Batch]) -> None:
        self.pending += sum(part.size for part in parts) - batch.size

    def lane_lost(self) -> None:
        """The keyless batch that is open goes where it was to go; the next message begins one elsewhere."""
        self._rerouted()

    def lane_failed(self, refused: Refused) -> None:
        error = self._refusal = refused.public()
        self._lifetime.fail(error)
        self.fail_all(error)
        for lane in self._row:
            lane.abandon()

    def fail_all(self, error: MagnetarError) -> None:
        for lane in self._row:
            lane.fail(error)
        self._admit()

    def unseen(self) -> MagnetarError | None:
        """The failure of a message that nobody waited for, once."""
        batch, self.failed = self.failed, None
        if batch is None or batch.error is None or batch.listened >= batch.count:
            return None
        return batch.error.again()


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
