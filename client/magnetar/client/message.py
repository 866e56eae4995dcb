"""What a consumer gets: messages, and batches of them as columns.

A delivery stays the producer's columnar batch until somebody looks at it. A `Message` is a place in such a batch; its
values are cut out when they are asked for.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import cached_property
from itertools import repeat
from types import MappingProxyType, TracebackType
from typing import TYPE_CHECKING, Protocol, Self

from magnetar.client.errors import InvalidArgument, MagnetarError
from magnetar.wire import selection
from magnetar.wire.batch import BatchBody, BatchHeader, MalformedBatch

if TYPE_CHECKING:
    import pyarrow

    from magnetar.client.acks import Hold
    from magnetar.client.completion import Completion

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND = timedelta(microseconds=1)
_ID = re.compile(r"([0-9]{1,20}):([0-9]{1,20}|-)")
_NOTHING: Mapping[str, str] = MappingProxyType({})


def to_microseconds(time: datetime) -> int:
    """Microseconds since 1970, UTC. Raises InvalidArgument for a naive time: its zone is anybody's guess."""
    if not isinstance(time, datetime):
        raise InvalidArgument(f"a time must be a datetime: type=`{type(time).__name__}`")
    if time.utcoffset() is None:
        raise InvalidArgument(
            f"a time must have a timezone, for example datetime.now(timezone.utc): time=`{time.isoformat()}`"
        )
    return (time - _EPOCH) // _MICROSECOND


def from_microseconds(time_us: int) -> datetime:
    return _EPOCH + timedelta(microseconds=time_us)


@dataclass(frozen=True, slots=True)
class MessageId:
    """Where a message stands: an offset in a shard. Ordered within a shard; comparing two shards is a TypeError.

    offset   None: the message is stored, its place is no longer known to the broker
    """

    shard: int
    offset: int | None

    @classmethod
    def parse(cls, text: str) -> MessageId:
        """The inverse of `str`. Raises InvalidArgument."""
        match = _ID.fullmatch(text)
        if match is None:
            raise InvalidArgument(f"a message id looks like 'shard:offset': id=`{text}`")
        return cls(int(match[1]), None if match[2] == "-" else int(match[2]))

    def __str__(self) -> str:
        return f"{self.shard}:{'-' if self.offset is None else self.offset}"

    def __lt__(self, other: object) -> bool:
        mine, theirs = self._comparable(other)
        return NotImplemented if mine is None or theirs is None else mine < theirs

    def __le__(self, other: object) -> bool:
        mine, theirs = self._comparable(other)
        return NotImplemented if mine is None or theirs is None else mine <= theirs

    def __gt__(self, other: object) -> bool:
        mine, theirs = self._comparable(other)
        return NotImplemented if mine is None or theirs is None else mine > theirs

    def __ge__(self, other: object) -> bool:
        mine, theirs = self._comparable(other)
        return NotImplemented if mine is None or theirs is None else mine >= theirs

    def _comparable(self, other: object) -> tuple[int | None, int | None]:
        if isinstance(other, MessageId) and other.shard == self.shard:
            return self.offset, other.offset
        return None, None


class Source(Protocol):
    """The shard of a consumer from which a batch came.

    generation   grows with each seek: what an older one brought is not given out any more
    individual   its messages are acknowledged one by one (a queue)
    hand_over    for a blocking consumer: runs a function in its event loop; None: it is not blocking
    """

    topic: str
    shard_id: int
    generation: int

    @property
    def individual(self) -> bool: ...
    @property
    def hand_over(self) -> Callable[[Callable[[], object]], None] | None: ...
    def took(self, batch: MessageBatch, start: int, stop: int) -> None:
        """The user got the messages from index start up to stop."""

    def dropped(self, batch: MessageBatch, start: int) -> None:
        """Nobody will get the messages from this index on."""

    def ack(self, batch: MessageBatch, index: int) -> Completion:
        """One message; in a stream also everything before it."""

    def ack_batch(self, batch: MessageBatch) -> Completion: ...
    def nack(self, batch: MessageBatch, index: int) -> Completion: ...


class Message:
    """One message. Payload, key, properties and times are as the producer gave them."""

    __slots__ = ("_batch", "_index", "payload")

    def __init__(self, batch: MessageBatch, index: int, payload: bytes) -> None:
        self._batch = batch
        self._index = index
        self.payload = payload

    @property
    def key(self) -> str | bytes | None:
        """str if its bytes are valid UTF-8; None if the message has no key."""
        return readable_key(self._batch.key_column[self._index]) if self._batch.key_column else None

    @property
    def properties(self) -> Mapping[str, str]:
        """Read-only; empty if the message has none."""
        return self._batch.properties[self._index]

    @property
    def event_time(self) -> datetime | None:
        """What the producer said about when it happened, in UTC."""
        column = self._batch.event_time_column
        time_us = column[self._index] if column else None
        return None if time_us is None else from_microseconds(time_us)

    @property
    def publish_time(self) -> datetime:
        """When the broker took it, in UTC; never decreasing in a shard."""
        return self._batch.publish_time

    @property
    def id(self) -> MessageId:
        return MessageId(self._batch.shard, self._batch.offsets[self._index])

    @property
    def topic(self) -> str:
        """`tenant/namespace/topic`."""
        return self._batch.topic

    @property
    def redelivery_count(self) -> int:
        """How often the message was delivered before, to any consumer of the subscription."""
        return self._batch.redelivery_count(self._index)

    async def __aenter__(self) -> Self:
        """Only for messages of a queue consumer: ack when the block succeeds, nack when it raises."""
        self._check_scope(blocking=False)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._finish(failed=kind is not None)

    def __enter__(self) -> Self:
        """As `async with`, for messages of a blocking queue consumer."""
        self._check_scope(blocking=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        hand_over = self._batch.source.hand_over
        if hand_over is not None:
            hand_over(lambda: self._finish(failed=kind is not None))

    def _check_scope(self, *, blocking: bool) -> None:
        source = self._batch.source
        if not source.individual:
            raise InvalidArgument("only messages of a queue consumer are acknowledged one by one: call consumer.ack()")
        if (source.hand_over is not None) is not blocking:
            raise InvalidArgument(
                "use `async with message` with magnetar.client and `with message` with magnetar.client.sync"
            )

    def _finish(self, *, failed: bool) -> None:
        batch = self._batch
        if failed:
            batch.source.nack(batch, self._index)
        else:
            batch.source.ack(batch, self._index)

    @property
    def batch(self) -> MessageBatch:
        """The delivery that brought it."""
        return self._batch

    @property
    def index(self) -> int:
        """Its place in `batch`."""
        return self._index

    def __repr__(self) -> str:
        return f"<Message {self.id} of {self.topic}, {len(self.payload)} bytes>"


class MessageBatch:
    """Messages of one shard as columns: what one delivery brought, in order.

    Columns are decoded when they are asked for. All lists are as long as the batch.
    """

    def __init__(
        self,
        source: Source,
        data: bytes,
        header: BatchHeader,
        *,
        first_offset: int,
        publish_time_us: int,
        chosen: bytes = selection.ALL,
        redeliveries: Mapping[int, int] | None = None,
        generation: int = 0,
        hold: Hold | None = None,
    ) -> None:
        """first_offset   of message 0 of the stored batch, chosen or not
        chosen         selection of the messages that are meant
        redeliveries   index in the stored batch -> deliveries before
        generation     of the source when it came: an older one was overtaken by a seek
        """
        self.source = source
        self.generation = generation
        self.hold = hold
        self.first_offset = first_offset
        self.chosen = chosen
        self._data = data
        self._header = header
        self._publish_time_us = publish_time_us
        self._redeliveries = redeliveries
        self._length = selection.count_of(chosen, header.count)

    def __len__(self) -> int:
        return self._length

    def __repr__(self) -> str:
        return f"<MessageBatch of {len(self)} messages from shard {self.shard} of {self.topic}>"

    @property
    def topic(self) -> str:
        """`tenant/namespace/topic`."""
        return self.source.topic

    @property
    def shard(self) -> int:
        return self.source.shard_id

    @cached_property
    def offsets(self) -> Sequence[int]:
        """Ascending; dense unless the broker meant only some messages of a stored batch."""
        if not self.chosen:
            return range(self.first_offset, self.first_offset + self._length)
        return [self.first_offset + index for index in self.indices]

    @property
    def payloads(self) -> list[bytes]:
        return self.body.payloads

    @cached_property
    def keys(self) -> list[str | bytes | None]:
        """As `Message.key`."""
        return list(map(readable_key, self.key_column)) if self.key_column else [None] * self._length

    @cached_property
    def properties(self) -> list[Mapping[str, str]]:
        """Read-only mappings, empty where a message has none."""
        try:
            column = self.body.properties
        except MalformedBatch as error:
            raise self._undecodable(error) from error
        if column is None:
            return [_NOTHING] * self._length
        return [_NOTHING if pairs is None else MappingProxyType(dict(pairs)) for pairs in column]

    @cached_property
    def event_times(self) -> list[datetime | None]:
        """In UTC."""
        column = self.event_time_column or [None] * self._length
        return [None if time_us is None else from_microseconds(time_us) for time_us in column]

    @property
    def publish_time(self) -> datetime:
        """When the broker took it, in UTC: one time for all."""
        return from_microseconds(self._publish_time_us)

    def redelivery_count(self, index: int) -> int:
        """How often the message at this index was delivered before."""
        if not self._redeliveries:
            return 0
        return self._redeliveries.get(self.indices[index] if self.chosen else index, 0)

    def to_arrow(self) -> pyarrow.RecordBatch:
        """Columns payload, key, properties and event_time; payloads are not copied. Needs pyarrow."""
        return self.body.to_arrow()

    def messages(self, start: int = 0, stop: int | None = None) -> list[Message]:
        """Message objects for the messages from index start up to stop."""
        payloads = self.payloads[start:stop] if start or stop is not None else self.payloads
        return list(map(Message, repeat(self), range(start, start + len(payloads)), payloads))

    def __iter__(self) -> Iterator[Message]:
        return iter(self.messages())

    # --- for the consumers of this package ---

    @cached_property
    def body(self) -> BatchBody:
        try:
            return BatchBody(self._data, self._header, selection=self.chosen)
        except MalformedBatch as error:
            raise self._undecodable(error) from error

    @property
    def indices(self) -> Sequence[int]:
        """The place of each message in the stored batch."""
        return self.body.indices if self.chosen else range(self._length)

    @property
    def key_column(self) -> list[bytes | None] | None:
        return self.body.keys

    @property
    def event_time_column(self) -> list[int | None] | None:
        return self.body.event_times

    @property
    def size_bytes(self) -> int:
        """What it counts for in the broker's credit: the bytes of the stored batch."""
        return len(self._data)

    def part(self, start: int, stop: int | None = None) -> MessageBatch:
        """The messages from index start up to stop, as a batch of its own."""
        stop = len(self) if stop is None else stop
        if start == 0 and stop == len(self):
            return self
        return MessageBatch(
            self.source,
            self._data,
            self._header,
            first_offset=self.first_offset,
            publish_time_us=self._publish_time_us,
            chosen=selection.from_indices(self._header.count, self.indices[start:stop]),
            redeliveries=self._redeliveries,
            generation=self.generation,
            hold=self.hold,
        )

    def _undecodable(self, error: MalformedBatch) -> MagnetarError:
        return MagnetarError(
            f"a batch cannot be decoded, skip it or seek behind it: {error} topic=`{self.topic}` "
            f"shard=`{self.shard}` first_offset=`{self.first_offset}`"
        )


def readable_key(key: bytes | None) -> str | bytes | None:
    """A key as users see it."""
    if key is None:
        return None
    try:
        return key.decode()
    except UnicodeDecodeError:
        return key
