"""One consumer at one shard: what the broker delivers, and what the user acknowledges.

Three kinds: a stream's, a queue's, a reader's. They differ in what "delivered before" means after a reconnect.

- A stream and a reader count: the next offset to come. What is below it was given out by this consumer before, and is
  dropped, unless a seek moved the subscription back.
- A queue holds: each message that was delivered here and neither acknowledged nor given back is named to the broker
  when it is opened again, and dropped if it comes all the same.

`generation` grows with each seek. Batches of an older one are not given out, and acknowledging their messages does
nothing: it would move the subscription to where the seek took it away from.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import Protocol

from magnetar.client.acks import Credits, Hold
from magnetar.client.completion import Completion
from magnetar.client.connection import ConsumeStream
from magnetar.client.errors import ClusterUnavailable, InvalidArgument, MagnetarError
from magnetar.client.layouts import ShardPlace
from magnetar.client.links import Cluster, ShardLink
from magnetar.client.message import MessageBatch
from magnetar.client.refusal import INVALID_ARGUMENT, Refused, unavailable
from magnetar.v1 import broker_pb2, metadata_pb2
from magnetar.wire import selection
from magnetar.wire.batch import BatchHeader, MalformedBatch, parse_header


class FeedOwner(Protocol):
    """The consumer, as its feeds see it."""

    subscription: str
    consumer_name: str
    key_ordered: bool
    stop_at_end: bool
    hand_over: Callable[[Callable[[], object]], None] | None

    def start_of(self, shard_id: int) -> metadata_pb2.StartPosition: ...
    def arrived(self, batch: MessageBatch) -> None: ...
    def feed_opened(self, feed: Feed) -> None:
        """It is open, again or for the first time."""

    def feed_finished(self, feed: Feed) -> None:
        """A reader's feed gave everything up to its stop."""

    def drop_buffered(self, feed: Feed) -> None:
        """Forget what was delivered by this feed and not given out."""

    def drop_overtaken(self) -> None:
        """Forget what was delivered before a seek."""

    def feed_failed(self, error: MagnetarError) -> None:
        """The consumer cannot go on."""

    def feed_troubled(self, error: MagnetarError) -> None:
        """Something did not work that nobody waits for: the next call says so."""

    def feed_unreachable(self, feed: Feed, error: MagnetarError) -> None:
        """Its shard has not answered for the whole timeout: the next call says so, unless it has by then."""

    def shard_ended(self) -> None:
        """A sealed shard was delivered to its end: there may be others in its place."""


class Feed(ShardLink[ConsumeStream]):
    """See the module's docstring. Is the `Source` of its batches."""

    individual = False

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
        super().__init__(cluster, topic, place.shard_id, place.owner)
        self.generation = 0
        self.opened_once = False
        self.active = False
        self._consumer = owner
        self._is_open = False
        self._cursor_epoch = 0
        self._credits = Credits(messages, bytes_)
        self._first_grant: tuple[int, int] | None = None

    @property
    def hand_over(self) -> Callable[[Callable[[], object]], None] | None:
        return self._consumer.hand_over

    def start(self) -> None:
        self._watch()
        super().start()

    def wake(self) -> None:
        """There is something to tell the broker."""
        if self._is_open and isinstance(self._stream, ConsumeStream):
            self._stream.wake(self._number)

    # --- what kinds of feed do ---

    @abstractmethod
    def _request_open(self, request: broker_pb2.ConsumeRequest, number: int) -> int:
        """Put in the opening. Returns how many ranges it names."""

    @abstractmethod
    def _resume(self, opened: broker_pb2.SubscriptionOpened) -> None:
        """The broker goes on at `opened.next_offset`."""

    @abstractmethod
    def _overtaken(self, first_offset: int) -> None:
        """A seek that this consumer did not ask for: deliveries go on at this offset."""

    @abstractmethod
    def _choose(self, delivery: broker_pb2.Delivery, header: BatchHeader) -> tuple[bytes | None, Hold | None]:
        """Which of the delivered messages this consumer has not got before; None: none."""

    def _accepts(self, cursor_epoch: int) -> bool:
        return cursor_epoch >= self._cursor_epoch

    def _fill_more(self, request: broker_pb2.ConsumeRequest) -> int:
        return 0

    # --- what the broker says ---

    def opened(self, opened: broker_pb2.SubscriptionOpened) -> None:
        self._is_open = True
        self.active = opened.active
        self._resume(opened)
        self._cursor_epoch = opened.cursor_epoch
        self.opened_once = True
        self._first_grant = self._credits.opened()
        self._moved()
        self._consumer.feed_opened(self)
        self.wake()

    def delivered(self, delivery: broker_pb2.Delivery) -> None:
        data = delivery.batch
        try:
            header = parse_header(data)
            count = selection.count_of(delivery.selection, header.count)
        except (MalformedBatch, selection.InvalidSelection) as error:
            self._cut(unavailable(f"a delivery is damaged: {error}"))
            return
        self._moved()
        self._credits.delivered(count, len(data))
        chosen, hold = None, None
        if self._accepts(delivery.cursor_epoch):
            if delivery.cursor_epoch > self._cursor_epoch:
                self._cursor_epoch = delivery.cursor_epoch
                self._overtaken(delivery.first_offset + _first_selected(delivery.selection))
            chosen, hold = self._choose(delivery, header)
        if chosen is None:
            self._free(count, len(data))
            return
        counts = delivery.redeliveries
        batch = MessageBatch(
            self,
            data,
            header,
            first_offset=delivery.first_offset,
            publish_time_us=delivery.publish_time_us,
            chosen=chosen,
            redeliveries=dict(zip(counts[::2], counts[1::2], strict=False)) if counts else None,
            generation=self.generation,
            hold=hold,
        )
        if len(batch) < count:
            self._free(count - len(batch), 0)
        self._consumer.arrived(batch)

    def noticed(self, notice: broker_pb2.ConsumerNotice) -> None:
        match notice.WhichOneof("notice"):
            case "active":
                self.active = notice.active
            case "end_of_shard":
                self._consumer.shard_ended()

    # --- what the user does ---

    def took(self, batch: MessageBatch, start: int, stop: int) -> None:
        self._free(stop - start, batch.size_bytes if stop == len(batch) else 0)

    def dropped(self, batch: MessageBatch, start: int) -> None:
        self._free(len(batch) - start, batch.size_bytes)

    def _free(self, messages: int, bytes_: int) -> None:
        self._credits.taken(messages, bytes_)
        if self._credits.worthwhile:
            self.wake()

    # --- the link ---

    def fill(self, request: broker_pb2.ConsumeRequest) -> int:
        if self._stream is not None and not self._is_open:
            return self._request_open(request, self._number)
        granted = self._first_grant or self._credits.grant()
        self._first_grant = None
        if granted is not None and any(granted):
            request.credits.add(handle=self._number, messages=granted[0], bytes=granted[1])
        return self._fill_more(request)

    def _open(self, stream: ConsumeStream) -> int:
        number = stream.add(self)
        stream.wake(number)
        return number

    def _close(self, stream: ConsumeStream) -> None:
        stream.close(self._number)

    def _lost(self) -> None:
        self._is_open = False
        self.active = False
        self._watch()

    def _failed(self, refused: Refused) -> None:
        self._consumer.feed_failed(refused.public())

    def _waiting(self) -> bool:
        return not self._is_open

    def _timed_out(self, refused: Refused) -> None:
        self._consumer.feed_unreachable(self, self._impatience(refused))
        self._cut(unavailable("the client gave up waiting"))

    def _impatience(self, refused: Refused) -> ClusterUnavailable:
        return ClusterUnavailable(
            f"the shard was not reached within {self._cluster.timeout_s:g} s: topic=`{self.topic}` "
            f"shard=`{self.shard_id}` last_error=`{refused.message}`"
        )

    # --- as the source of messages: subscriptions do more ---

    def ack(self, batch: MessageBatch, index: int) -> Completion:
        raise InvalidArgument("a reader has nothing to acknowledge")

    def ack_batch(self, batch: MessageBatch) -> Completion:
        raise InvalidArgument("a reader has nothing to acknowledge")

    def nack(self, batch: MessageBatch, index: int) -> Completion:
        raise InvalidArgument("a reader has nothing to give back")


class ReaderFeed(Feed):
    """A reader at a shard: it keeps its place itself, the broker keeps nothing."""

    _next: int | None = None
    """The next offset to come; None before the first opening."""

    _stop: int | None = None
    """The offset that is not read any more; None: none."""

    @property
    def finished(self) -> bool:
        return self._next is not None and self._stop is not None and self._next >= self._stop

    def _request_open(self, request: broker_pb2.ConsumeRequest, number: int) -> int:
        start = self._consumer.start_of(self.shard_id)
        if self._next is not None:
            start = metadata_pb2.StartPosition(offset=self._next)
        request.open_readers.add(handle=number, topic=self.topic, shard_id=self.shard_id, start=start)
        return 0

    def _resume(self, opened: broker_pb2.SubscriptionOpened) -> None:
        if self._next is None:
            self._next = opened.next_offset
            if self._consumer.stop_at_end:
                self._stop = opened.end_offset

    def ended(self, refused: Refused, sequence: int = -1) -> None:
        if self._next is not None and refused.reason == INVALID_ARGUMENT:
            # Its place was good before: a log that ends below it is of an owner that was replaced and does not know it.
            refused = unavailable(f"another broker has the shard by now: {refused.message}")
        super().ended(refused, sequence)

    def _overtaken(self, first_offset: int) -> None:
        """Nobody can seek a reader: a higher epoch is just the broker's new count."""

    def _choose(self, delivery: broker_pb2.Delivery, header: BatchHeader) -> tuple[bytes | None, Hold | None]:
        first = delivery.first_offset
        stop = first + header.count if self._stop is None else min(self._stop, first + header.count)
        start = max(first, self._next or 0)
        if start >= stop:
            return None, None
        self._next = stop
        if self.finished:
            self._consumer.feed_finished(self)
        return selection_of(header.count, start - first, stop - first), None


def _first_selected(chosen: bytes) -> int:
    bits = int.from_bytes(chosen, "little")
    return (bits & -bits).bit_length() - 1 if bits else 0


def selection_of(count: int, start: int, stop: int) -> bytes:
    """The messages start <= index < stop of a batch."""
    return selection.ALL if stop - start == count else selection.from_ranges(count, [(start, stop)])
