"""One producer at one shard: its outbox, its chain, and the handle that carries both to the shard's owner.

Every batch goes outbox -> chain -> stored, and never back; what a new layout takes away from this shard goes to the
front of other lanes' outboxes, in order. Batches are encoded when the stream pulls them.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Protocol

from magnetar.client.batching import Batch, Batching, Outbox
from magnetar.client.connection import ProduceStream
from magnetar.client.errors import ClusterUnavailable, MagnetarError, MessageTooLarge
from magnetar.client.inflight import Chain, Known, ParentRange, Stored, covered_by_parents
from magnetar.client.layouts import ShardPlace
from magnetar.client.links import Cluster, ShardLink
from magnetar.client.refusal import OF_ONE_BATCH, Refused, unavailable
from magnetar.v1 import broker_pb2

BATCHES_IN_FLIGHT = 4
"""With so many unanswered, a batch that is not full takes more messages until one is answered."""


class LaneOwner(Protocol):
    """The producer, as its lanes see it.

    next_sequence   for messages that the user does not number: one counter for all shards, as chains are by shard
    """

    producer_id: bytes
    epoch: int
    name: str
    codec: int
    batching: Batching
    next_sequence: int

    def settled(self, batches: Sequence[Batch]) -> None:
        """These have ended."""

    def replaced(self, batch: Batch, parts: Sequence[Batch]) -> None:
        """These stand in the place of that one."""

    def lane_lost(self) -> None:
        """One of them is not open any more."""

    def lane_failed(self, refused: Refused) -> None:
        """The producer cannot go on."""


class Lane(ShardLink[ProduceStream]):
    """See the module's docstring."""

    def __init__(self, cluster: Cluster[ProduceStream], topic: str, place: ShardPlace, owner: LaneOwner) -> None:
        super().__init__(cluster, topic, place.shard_id, place.owner)
        self.chain = Chain()
        self.outbox = Outbox(place.shard_id, owner.batching, self._begun)
        self.was_opened = asyncio.Event()
        """Set once the broker has answered an opening, or none will be answered any more."""
        self._producer = owner

    @property
    def serves(self) -> bool:
        """It is open, and the broker answers as far as is known."""
        return self.chain.open and not self.silent

    # --- sending ---

    def wake(self) -> None:
        """There may be something to send."""
        self._watch()
        if self._task is None:
            self.start()
        if self.chain.open and isinstance(self._stream, ProduceStream):
            self._stream.wake(self._number)

    def _begun(self, batch: Batch) -> None:
        if batch.ripe:
            self.wake()
        else:
            self._watch()
            self._loop.call_later(self._producer.batching.linger, self._ripen, batch)

    def _ripen(self, batch: Batch) -> None:
        if not batch.ripe:
            batch.ripe = True
            self.wake()

    def press(self) -> None:
        """What is open need not linger."""
        if self.outbox:
            self.outbox.open.ripe = True
            self.wake()

    def next_size(self) -> int:
        if not self.chain.open:
            return 0
        size = self.chain.resend_size() or self.outbox.next_size(full=self.chain.batches >= BATCHES_IN_FLIGHT)
        return size if size and self.chain.fits(size) else 0

    def next_batch(self) -> bytes | None:
        if self.chain.resend_size():
            return self.chain.resend().data
        while self.outbox.next_size():
            batch = self._new_part(self.outbox.take())
            if batch is not None and self._encoded(batch):
                self.chain.sent(batch)
                return batch.data
        return None

    def _encoded(self, batch: Batch) -> bool:
        producer = self._producer
        if not batch.numbered:
            batch.first = producer.next_sequence
        producer.next_sequence = max(producer.next_sequence, batch.first + batch.count)
        try:
            batch.encode(
                producer_id=producer.producer_id,
                epoch=producer.epoch,
                previous=self.chain.sent_last,
                codec=producer.codec,
            )
        except ValueError as error:
            batch.failed(MessageTooLarge(f"a batch cannot be encoded: {error}"))
            producer.settled([batch])
            return False
        return True

    def _new_part(self, batch: Batch) -> Batch | None:
        """The batch, if all of it is new. Else it is divided; new parts wait their turn, of the others none is sent."""
        runs = self.chain.runs(batch)
        if len(runs) == 1 and runs[0][0] is Known.NEW:
            return batch
        parts = batch.divide([(self.shard_id, indices) for _, indices in runs])
        self._producer.replaced(batch, parts)
        for (known, _), part in zip(runs, parts, strict=True):
            match known:
                case Known.SENT:
                    self._producer.settled(self.chain.answer_later(part))
                case Known.IN_PARENT:
                    part.stored(None)
                    self._producer.settled([part])
        new = [part for (known, _), part in zip(runs, parts, strict=True) if known is Known.NEW]
        self.outbox.put_first(new)
        return None

    # --- what the broker says ---

    def opened(self, opened: broker_pb2.ProducerOpened) -> None:
        recent = [Stored(s.first_sequence, s.last_sequence, s.first_offset) for s in opened.recent]
        parents = [ParentRange(p.first_slot, p.last_slot, p.last_sequence) for p in opened.parents]
        producer = self._producer
        producer.next_sequence = max(producer.next_sequence, opened.last_sequence + 1)
        for parent in parents:
            producer.next_sequence = max(producer.next_sequence, parent.last + 1)
        if 0 < opened.stored_epoch < producer.epoch:
            # What stands there is of the name's life before. This producer began to number at an owner that had been
            # replaced without knowing it: its numbers are taken, but not by what it sent.
            producer.next_sequence = self.chain.renumber(opened.last_sequence, producer.next_sequence)
        ended = self.chain.opened(opened.last_sequence, recent, opened.window_bytes, parents)
        if parents:
            ended += self._drop_covered(parents)
        if ended:
            self._moved()
        producer.settled(ended)
        self.was_opened.set()
        self.wake()

    def _drop_covered(self, parents: Sequence[ParentRange]) -> list[Batch]:
        """Batches that came from a parent shard and are stored there end; the others are to be sent here."""
        waiting = self.outbox.take_all()
        covered = [batch for batch in waiting if covered_by_parents(batch, parents)]
        for batch in covered:
            batch.stored(None)
        self.outbox.put_first([batch for batch in waiting if not batch.ended])
        return covered

    def stored(self, stored: broker_pb2.BatchStored) -> None:
        ended = self.chain.store(Stored(stored.first_sequence, stored.last_sequence, stored.first_offset))
        if ended:
            self._moved()
            self._producer.settled(ended)
        if self.outbox or self.chain.resend_size():
            self.wake()

    def windowed(self, window_bytes: int) -> None:
        self.chain.window = window_bytes
        self.wake()

    def ended(self, refused: Refused, sequence: int = -1) -> None:
        condemned: list[Batch] = []
        if sequence >= 0 and refused.reason in OF_ONE_BATCH:
            condemned = self.chain.refuse(sequence, refused.public())
            refused.one_batch = bool(condemned)
        super().ended(refused, sequence)
        if condemned:
            self._moved()
            self._producer.settled(condemned)

    # --- the link ---

    def _open(self, stream: ProduceStream) -> int:
        number = stream.add(self)
        stream.open(
            broker_pb2.OpenProducer(
                handle=number,
                topic=self.topic,
                shard_id=self.shard_id,
                producer_id=self._producer.producer_id,
                epoch=self._producer.epoch,
                name=self._producer.name,
            )
        )
        return number

    def _close(self, stream: ProduceStream) -> None:
        stream.close(self._number)

    def _lost(self) -> None:
        self.chain.lost()
        self._producer.lane_lost()

    def _failed(self, refused: Refused) -> None:
        self._producer.lane_failed(refused)

    def _waiting(self) -> bool:
        return bool(self.chain) or bool(self.outbox)

    def _timed_out(self, refused: Refused) -> None:
        """Everything for this shard fails together: had the front failed alone, what is behind would overtake it."""
        in_flight = bool(self.chain)
        outcome = (
            "the outcome is unknown: messages may or may not be stored"
            if in_flight
            else "the messages were not sent, or are not stored"
        )
        error = ClusterUnavailable(
            f"nothing was confirmed within {self._cluster.timeout_s:g} s, {outcome}: "
            f"topic=`{self.topic}` shard=`{self.shard_id}` last_error=`{refused.message}`"
        )
        self.fail(error)
        self._cut(unavailable("the client gave up waiting"))

    # --- the end ---

    def abandon(self) -> None:
        super().abandon()
        self.was_opened.set()

    def fail(self, error: MagnetarError) -> None:
        """Give up everything, oldest first."""
        batches = self.take_all()
        for batch in batches:
            batch.failed(error)
        self._producer.settled(batches)

    def take_all(self) -> list[Batch]:
        """Every batch, oldest first; nothing remains."""
        return [*self.chain.take_all(), *self.outbox.take_all()]

    def pending(self) -> list[Batch]:
        """Every batch, oldest first."""
        return [*self.chain.pending(), *self.outbox.pending()]
