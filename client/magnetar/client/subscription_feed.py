"""Streams and queues at a shard: acknowledging, giving back, seeking, and going on after a reconnect."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from functools import partial

from magnetar.client.acks import RANGES_PER_GROUP_MAX, AckGroup, Hold, Holds, OffsetRange, ShardAcks, ranges_of
from magnetar.client.completion import Completion
from magnetar.client.connection import ConsumeStream
from magnetar.client.errors import ClusterUnavailable, InvalidArgument, MagnetarError
from magnetar.client.feed import Feed, FeedOwner, selection_of
from magnetar.client.layouts import ShardPlace
from magnetar.client.links import Cluster
from magnetar.client.message import MessageBatch
from magnetar.client.refusal import Refused, unavailable
from magnetar.v1 import broker_pb2, metadata_pb2
from magnetar.wire import selection
from magnetar.wire.batch import BatchHeader

HELD_MESSAGES_MAX = 50_000
"""That are named when a queue is opened again; brokers refuse more. What is beyond it may come twice."""


class Seek(Completion):
    """A seek, ended when the broker has moved the subscription in the shard.

    request_id   under which it was sent last: an answer to another one is late
    """

    __slots__ = ("position", "request_id")

    def __init__(self, position: metadata_pb2.StartPosition) -> None:
        super().__init__()
        self.position = position
        self.request_id = 0


class SubscriptionFeed(Feed):
    """What streams and queues share. Requests without an answer are sent again after a reconnect, in order."""

    _type: metadata_pb2.SubscriptionType

    def __init__(
        self,
        cluster: Cluster[ConsumeStream],
        topic: str,
        place: ShardPlace,
        owner: FeedOwner,
        *,
        messages: int,
        bytes_: int,
    ) -> None:
        super().__init__(cluster, topic, place, owner, messages=messages, bytes_=bytes_)
        self._acks = ShardAcks()
        self._seeks: list[Seek] = []
        self._unsent_seeks: list[Seek] = []
        self._epoch_before_seek = 0
        self._finish: Completion | None = None
        self._finish_id = 0
        self._dead = False

    # --- acknowledging ---

    def _acked(self, group: AckGroup, *, first: bool) -> Completion:
        """Something was put into the open group."""
        if first:
            self._watch()
            self.wake()
        return group

    def _fill_more(self, request: broker_pb2.ConsumeRequest) -> int:
        ranges = 0
        while self._acks.queued and ranges < RANGES_PER_GROUP_MAX:
            ranges += self._fill_ack(request)
        if self._acks.queued:
            self.wake()
            return ranges
        for seek in self._unsent_seeks:
            seek.request_id = self._request(partial(self._sought, seek))
            request.seeks.add(handle=self._number, request_id=seek.request_id, position=seek.position)
        self._unsent_seeks.clear()
        if self._finish is not None and not self._finish_id and not self._acks.open:
            self._finish_id = self._request(self._finished)
            request.close.add(handle=self._number, request_id=self._finish_id)
        return ranges

    def _fill_ack(self, request: broker_pb2.ConsumeRequest) -> int:
        request_id = self._request(self._ack_answered)
        group = self._acks.take(request_id)
        ack = request.acks.add(handle=self._number, request_id=request_id, floor=group.floor)
        for start, end in group.ranges:
            ack.ranges.add(start=start, end=end)
        return len(group.ranges) + 1

    def _request(self, answered: Callable[[broker_pb2.AckResult], None]) -> int:
        assert self._stream is not None
        return self._stream.request(self._number, answered)

    def _ack_answered(self, result: broker_pb2.AckResult) -> None:
        group = self._acks.in_flight(result.request_id)
        if group is None:
            return
        if result.HasField("error") and not (refused := Refused.of(result.error)).final:
            # It stays among those in flight: opening again sends it again.
            self._cut(refused)
            return
        self._acks.answered(result.request_id)
        if result.HasField("error"):
            self._end(group, refused.public())
        else:
            self._moved()
            self._confirmed(group)
            self._end(group, None)
        if self._acks.queued:
            self.wake()

    def _end(self, completion: Completion, error: MagnetarError | None) -> None:
        completion.end(error)
        if error is not None and not completion.listened:
            self._consumer.feed_troubled(error)

    def _confirmed(self, group: AckGroup) -> None:
        """The group is durable."""

    def nack_batch(self, batch: MessageBatch) -> Completion:
        """Give back all of a batch that is held."""
        return self.nack(batch, 0)

    # --- seeking ---

    def seek(self, position: metadata_pb2.StartPosition) -> Seek:
        """What was delivered before is overtaken from now on, also in the user's hands."""
        seek = Seek(position)
        self._seeks.append(seek)
        self._unsent_seeks.append(seek)
        self._epoch_before_seek = self._cursor_epoch
        self._overtake()
        self._watch()
        self.wake()
        return seek

    def _overtake(self) -> None:
        self.generation += 1
        self._consumer.drop_overtaken()

    def _sought(self, seek: Seek, result: broker_pb2.AckResult) -> None:
        if seek.ended or seek.request_id != result.request_id:
            return
        if result.HasField("error"):
            refused = Refused.of(result.error)
            if refused.final:
                self._seeks.remove(seek)
                seek.end(refused.public())
                self._start_over()
            # What was dropped for the seek comes again with the next opening.
            self._cut(unavailable(f"a seek was refused: {refused.message}"))
            return
        self._moved()
        self._seeks.remove(seek)
        # Acknowledgements that were queued meanwhile are of messages from before: sent now they would undo the seek.
        for group in self._acks.take_all():
            group.end()
        if result.cursor_epoch > self._cursor_epoch:
            self._cursor_epoch = result.cursor_epoch
            self._overtake()
            self._restart(result.next_offset)
        seek.end()

    def _overtaken(self, first_offset: int) -> None:
        self._overtake()
        self._restart(first_offset)

    @abstractmethod
    def _restart(self, next_offset: int) -> None:
        """The subscription was moved here: nothing counts as delivered."""

    @abstractmethod
    def _start_over(self) -> None:
        """It is not known where the subscription stands: nothing counts as delivered that is not acknowledged."""

    def _accepts(self, cursor_epoch: int) -> bool:
        """While a seek is under way, only what comes after it."""
        return cursor_epoch >= self._cursor_epoch and not (self._seeks and cursor_epoch <= self._epoch_before_seek)

    def opened(self, opened: broker_pb2.SubscriptionOpened) -> None:
        self._epoch_before_seek = opened.cursor_epoch
        super().opened(opened)

    # --- the end ---

    def _failed(self, refused: Refused) -> None:
        self._end_all(refused.public())
        super()._failed(refused)

    def abandon(self) -> None:
        super().abandon()
        self._end_all(ClusterUnavailable("the consumer was closed before an answer came: it may or may not be durable"))

    def _end_all(self, error: MagnetarError) -> None:
        """No answer will come any more."""
        waiting: list[Completion] = [*self._acks.take_all(), *self._seeks]
        self._seeks.clear()
        self._unsent_seeks.clear()
        for completion in waiting:
            self._end(completion, error)
        self._dead = True
        self._finish_if_idle()

    def finish(self) -> Completion:
        """Send what is queued, and close. Ends when everything acknowledged is durable and the rest was given back."""
        if self._finish is None:
            self._finish = Completion()
            self._watch()
            self.wake()
            self._finish_if_idle()
        return self._finish

    def _finish_if_idle(self) -> None:
        if self._finish is not None and not self._acks and (self._dead or not self._is_open):
            self._finish.end()

    def _finished(self, result: broker_pb2.AckResult) -> None:
        if self._finish is not None and self._finish_id == result.request_id:
            refused = Refused.of(result.error) if result.HasField("error") else None
            if refused is None and self._acks:
                # The shard was released before they came: the broker dropped them, and knew of nothing to close.
                refused = unavailable("acknowledgements were not answered before their handle was closed")
            if refused is not None and not refused.final:
                # What is not known to be durable is sent to the next owner, and then this is asked for again.
                self._cut(refused)
            else:
                self._finish.end(None if refused is None else refused.public())

    def _close(self, stream: ConsumeStream) -> None:
        if self._finish_id:
            stream.remove(self._number)
        else:
            super()._close(stream)

    def _lost(self) -> None:
        super()._lost()
        self._finish_id = 0
        self._acks.lost()
        self._unsent_seeks = list(self._seeks)
        for seek in self._seeks:
            seek.request_id = 0
        self._finish_if_idle()

    def _waiting(self) -> bool:
        return super()._waiting() or bool(self._acks) or bool(self._seeks)

    def _timed_out(self, refused: Refused) -> None:
        error = self._impatience(refused)
        waiting: list[Completion] = [*self._acks.take_all(), *self._seeks]
        if self._seeks:
            self._start_over()
        self._seeks.clear()
        self._unsent_seeks.clear()
        for completion in waiting:
            completion.end(
                ClusterUnavailable(f"no answer came, the acknowledgement or seek may or may not be durable: {error}")
            )
        if not any(completion.listened for completion in waiting):
            self._consumer.feed_unreachable(self, error)
        self._cut(unavailable("the client gave up waiting"))
        self._finish_if_idle()

    def _request_open(self, request: broker_pb2.ConsumeRequest, number: int) -> int:
        consumer = self._consumer
        opening = request.open.add(
            handle=number,
            topic=self.topic,
            shard_id=self.shard_id,
            subscription=consumer.subscription,
            type=self._type,
            key_ordered=consumer.key_ordered,
            start=consumer.start_of(self.shard_id),
            consumer=consumer.consumer_name,
        )
        room = HELD_MESSAGES_MAX
        for start, end in self._held():
            opening.held.add(start=start, end=min(end, start + room))
            room -= end - start
            if room <= 0:
                break
        return len(opening.held)

    def _held(self) -> list[OffsetRange]:
        return []


class StreamFeed(SubscriptionFeed):
    """A stream subscription at a shard.

    next     the next offset to come: everything below it came before
    given    everything below it was given to the user
    floor    everything below it is durably acknowledged
    standby  another consumer was the active one when this was opened, and nothing came since
    """

    _type = metadata_pb2.SUBSCRIPTION_TYPE_STREAM
    _next = 0
    _given = 0
    _floor = 0
    _standby = False

    def ack(self, batch: MessageBatch, index: int) -> Completion:
        if batch.generation != self.generation:
            return _nothing_to_do()
        return self._ack_floor(batch.offsets[index] + 1)

    def ack_batch(self, batch: MessageBatch) -> Completion:
        return self.ack(batch, len(batch) - 1)

    def _ack_floor(self, floor: int) -> Completion:
        group = self._acks.open
        first = group.floor == 0
        if floor > group.floor:
            group.floor = floor
        return self._acked(group, first=first)

    def nack(self, batch: MessageBatch, index: int) -> Completion:
        raise InvalidArgument("a stream consumer has no nack: seek to the message")

    def took(self, batch: MessageBatch, start: int, stop: int) -> None:
        super().took(batch, start, stop)
        if batch.generation == self.generation:
            self._given = batch.offsets[stop - 1] + 1

    def _confirmed(self, group: AckGroup) -> None:
        self._floor = max(self._floor, group.floor)

    def _resume(self, opened: broker_pb2.SubscriptionOpened) -> None:
        self._standby = not opened.active
        if self._standby:
            # Its place is that of the active one. What waits here is delivered there; should this consumer become
            # active, it begins at the floor, and what was not given out comes again.
            self._consumer.drop_buffered(self)
            self._next = self._given
        elif not self.opened_once or self._seeks:
            self._restart(opened.next_offset)
        else:
            self._go_on(opened.next_offset)

    def _overtaken(self, first_offset: int) -> None:
        if self._standby:
            self._standby, self.active = False, True
            self._go_on(first_offset)
        else:
            super()._overtaken(first_offset)

    def _go_on(self, next_offset: int) -> None:
        """The same subscription begins at its floor again."""
        if next_offset < self._floor:
            # What is durably acknowledged is to be delivered: somebody moved the subscription back meanwhile.
            self._overtake()
            self._restart(next_offset)
        elif next_offset > self._given:
            # More is acknowledged than was given out here: others went on, or somebody moved the subscription.
            self._consumer.drop_buffered(self)
            self._next = self._given = next_offset

    def _restart(self, next_offset: int) -> None:
        self._next = self._given = self._floor = next_offset

    def _start_over(self) -> None:
        self._next = self._given = self._floor

    def _choose(self, delivery: broker_pb2.Delivery, header: BatchHeader) -> tuple[bytes | None, Hold | None]:
        first, count = delivery.first_offset, header.count
        start = max(0, self._next - first)
        if start >= count:
            return None, None
        chosen = selection_of(count, start, count)
        if delivery.selection:
            chosen = selection.intersect(chosen, delivery.selection, count)
        self._next = first + count
        return chosen, None


class QueueFeed(SubscriptionFeed):
    """A queue subscription at a shard: a message is held from its delivery until it is acknowledged or given back."""

    individual = True
    _type = metadata_pb2.SUBSCRIPTION_TYPE_QUEUE

    def __init__(
        self,
        cluster: Cluster[ConsumeStream],
        topic: str,
        place: ShardPlace,
        owner: FeedOwner,
        *,
        messages: int,
        bytes_: int,
    ) -> None:
        super().__init__(cluster, topic, place, owner, messages=messages, bytes_=bytes_)
        self._holds = Holds()
        self._nacked: list[int] = []
        self._nacks = Completion()

    def ack(self, batch: MessageBatch, index: int) -> Completion:
        if not self._drop(batch, index):
            return _nothing_to_do()
        group = self._acks.open
        first = not group
        group.offsets.append(batch.offsets[index])
        return self._acked(group, first=first)

    def ack_batch(self, batch: MessageBatch) -> Completion:
        offsets = self._drop_batch(batch)
        if not offsets:
            return _nothing_to_do()
        group = self._acks.open
        first = not group
        group.ranges += ranges_of(offsets)
        return self._acked(group, first=first)

    def nack(self, batch: MessageBatch, index: int) -> Completion:
        return self._give_back([batch.offsets[index]] if self._drop(batch, index) else [])

    def nack_batch(self, batch: MessageBatch) -> Completion:
        """Give back all of a batch that is held."""
        return self._give_back(self._drop_batch(batch))

    def _give_back(self, offsets: list[int]) -> Completion:
        if not offsets:
            return _nothing_to_do()
        self._nacked += offsets
        self.wake()
        return self._nacks

    def _drop(self, batch: MessageBatch, index: int) -> bool:
        """The message is in nobody's hands any more. False: it was not held, or a seek overtook it."""
        hold = batch.hold
        if hold is None or batch.generation != self.generation or not hold.drop(batch.indices[index]):
            return False
        if hold.left == 0:
            self._holds.forget(hold)
        return True

    def _drop_batch(self, batch: MessageBatch) -> list[int]:
        hold = batch.hold
        if hold is None or batch.generation != self.generation:
            return []
        indices = [index for index in batch.indices if hold.drop(index)]
        self._holds.forget(hold)
        return [batch.first_offset + index for index in indices]

    def _fill_more(self, request: broker_pb2.ConsumeRequest) -> int:
        ranges = ranges_of(self._nacked)
        if len(ranges) > RANGES_PER_GROUP_MAX:
            # The rest follows in the next frame; those who wait, wait for it.
            ranges, rest = ranges[:RANGES_PER_GROUP_MAX], ranges[RANGES_PER_GROUP_MAX:]
            self._nacked = [offset for start, end in rest for offset in range(start, end)]
            self.wake()
        elif ranges:
            self._end_nacks()
        if ranges:
            nack = request.nacks.add(handle=self._number)
            for start, end in ranges:
                nack.ranges.add(start=start, end=end)
        return len(ranges) + super()._fill_more(request)

    def _end_nacks(self) -> None:
        """They are on their way; nothing needs to be durable: a consumer that is gone gives back everything."""
        self._nacked.clear()
        nacks, self._nacks = self._nacks, Completion()
        nacks.end()

    def _lost(self) -> None:
        self._end_nacks()
        super()._lost()

    def _held(self) -> list[OffsetRange]:
        return self._holds.ranges(self._acks.unanswered())

    def _resume(self, opened: broker_pb2.SubscriptionOpened) -> None:
        """The broker was told what is held, and delivers the rest."""

    def _restart(self, next_offset: int) -> None:
        self._holds.clear()

    def _start_over(self) -> None:
        self._holds.clear()

    def _overtake(self) -> None:
        super()._overtake()
        self._holds.clear()
        self._end_nacks()

    def _choose(self, delivery: broker_pb2.Delivery, header: BatchHeader) -> tuple[bytes | None, Hold | None]:
        first, count = delivery.first_offset, header.count
        hold = self._holds.of(first, count)
        wanted = bytearray(selection.to_mask(delivery.selection, count))
        if delivery.redeliveries and self._acks:
            for start, end in self._acks.unanswered():
                low, high = max(0, start - first), min(count, end - first)
                if low < high:
                    wanted[low:high] = bytes(high - low)
        added = hold.add(bytes(wanted))
        if not any(added):
            self._holds.forget(hold)
            return None, None
        return selection.from_mask(added), hold


def _nothing_to_do() -> Completion:
    """It was done before, or a seek made it meaningless."""
    done = Completion()
    done.end()
    return done
