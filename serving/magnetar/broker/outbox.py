"""What a Consume stream has to say and did not yet: put into frames, as much as fits.

Rules:

1. A frame has at most FRAME_BYTES_MAX, or exactly one delivery. It is read kind by kind (see `Kind`), so what concerns
   one handle goes into one frame only in that order; otherwise the rest waits for the next frame.
2. Answers to acknowledgements need no order, and go into any frame.
3. Deliveries count until they are written. At BUFFER_BYTES_MAX the outbox is full until half of that is written.
4. A notice that the end is reached is forgotten if something is delivered on its handle before it was sent.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from enum import IntEnum

from magnetar.broker.dispatch import Deliver
from magnetar.broker.flow import Watermarks
from magnetar.node.rpc import Refused
from magnetar.v1 import broker_pb2
from magnetar.wire.framing import Pieces, bytes_field, message_field

FRAME_BYTES_MAX = 1 << 20
BUFFER_BYTES_MAX = 4 << 20
ITEM_BYTES = 64
"""What a delivery costs beside its batch, its selection and its counts, about."""
NUMBER_BYTES = 4
"""Of a number in a list, about."""
ITEMS_PER_FRAME_MAX = 10_000
_DELIVERIES_FIELD = 3
_BATCH_FIELD = 5
"""Of ConsumeResponse and Delivery."""


class Kind(IntEnum):
    """In the order in which a client reads a frame."""

    OPENED = 1
    DELIVERY = 2
    ANSWER = 3
    ERROR = 4
    NOTICE = 5


class _Item:
    """`content` is None once it was taken back."""

    __slots__ = ("content", "handle", "kind", "size_bytes")

    def __init__(
        self,
        handle: int,
        kind: Kind,
        content: Deliver | Callable[[broker_pb2.ConsumeResponse], None] | None,
        size_bytes: int = ITEM_BYTES,
    ) -> None:
        self.handle = handle
        self.kind = kind
        self.content = content
        self.size_bytes = size_bytes


class Outbox:
    """See the module. `on_said` is called when there is something to send, `on_room` when it gets full or has room."""

    def __init__(self, on_said: Callable[[], None], on_room: Callable[[bool], None]) -> None:
        self._on_said = on_said
        self._on_room = on_room
        self._items: deque[_Item] = deque()
        self._answers: deque[broker_pb2.AckResult] = deque()
        self._caught_up: dict[int, _Item] = {}
        self._deliveries: dict[int, deque[_Item]] = {}
        self._taken_back = 0
        self._others = 0
        self._marks = Watermarks(BUFFER_BYTES_MAX, BUFFER_BYTES_MAX // 2)

    @property
    def full(self) -> bool:
        return self._marks.full

    @property
    def size_bytes(self) -> int:
        """Of deliveries that were not yet written."""
        return self._marks.size_bytes

    @property
    def answers(self) -> int:
        """How many things other than deliveries wait to be sent."""
        return self._others + len(self._answers)

    # --- what is to be said ---

    def deliver(self, handle: int, given: Deliver) -> None:
        overtaken = self._caught_up.pop(handle, None)
        if overtaken is not None:
            overtaken.content = None
        item = _Item(handle, Kind.DELIVERY, given, _delivery_bytes(given))
        self._deliveries.setdefault(handle, deque()).append(item)
        self._say(item)
        if self._marks.add(item.size_bytes):
            self._on_room(False)

    def opened(self, opened: broker_pb2.SubscriptionOpened) -> None:
        self._say(_Item(opened.handle, Kind.OPENED, lambda frame: frame.opened.append(opened)))

    def caught_up(self, handle: int, offset: int) -> None:
        item = _Item(handle, Kind.NOTICE, lambda frame: _add_notice(frame, handle, caught_up_to=offset))
        self._caught_up[handle] = item
        self._say(item)

    def activated(self, handle: int) -> None:
        self._say(_Item(handle, Kind.NOTICE, lambda frame: _add_notice(frame, handle, active=True)))

    def failed(self, handle: int, refused: Refused) -> None:
        error = broker_pb2.ConsumerError(handle=handle, error=refused.to_error())
        self._say(_Item(handle, Kind.ERROR, lambda frame: frame.errors.append(error)))

    def answer(self, result: broker_pb2.AckResult) -> None:
        """To an acknowledgement, or to a closing."""
        self._answers.append(result)
        self._on_said()

    def answer_in_order(self, handle: int, result: broker_pb2.AckResult) -> None:
        """To a seek: after what was delivered before it, before what is delivered after."""
        self._say(_Item(handle, Kind.ANSWER, lambda frame: frame.acks.append(result)))

    def drop_deliveries(self, handle: int) -> tuple[int, int]:
        """Takes back what was delivered on the handle and is not in a frame yet; returns its messages and bytes."""
        messages = size_bytes = freed = 0
        dropped = self._deliveries.pop(handle, ())
        for item in dropped:
            assert isinstance(item.content, Deliver)
            messages += item.content.messages
            size_bytes += len(item.content.batch.data)
            freed += item.size_bytes
            item.content = None
        self._taken_back += len(dropped)
        if 2 * self._taken_back > len(self._items):
            # Sweeping at each drop would cost a stream of many handles the product of both.
            self._items = deque(
                item for item in self._items if item.kind is not Kind.DELIVERY or item.content is not None
            )
            self._taken_back = 0
        self.written(freed)
        return messages, size_bytes

    # --- sending ---

    def next_frame(self) -> tuple[bytes, int] | None:
        """A frame, and the bytes to report to `written` after it; None if there is nothing to say."""
        if not self._items and not self._answers:
            return None
        frame = broker_pb2.ConsumeResponse()
        deliveries: Pieces = []
        delivered = self._fill(frame, deliveries)
        for _ in range(min(len(self._answers), ITEMS_PER_FRAME_MAX)):
            frame.acks.append(self._answers.popleft())
        return b"".join([frame.SerializeToString(), *deliveries]), delivered

    def written(self, size_bytes: int) -> None:
        if size_bytes and self._marks.remove(size_bytes):
            self._on_room(True)

    def _fill(self, frame: broker_pb2.ConsumeResponse, deliveries: Pieces) -> int:
        """Takes out what goes into one frame; returns what `written` counts of it."""
        items, kinds = self._items, dict[int, Kind]()
        total = delivered = 0
        for _ in range(ITEMS_PER_FRAME_MAX):
            if not items:
                break
            item = items[0]
            if (total and total + item.size_bytes > FRAME_BYTES_MAX) or item.kind < kinds.get(item.handle, item.kind):
                break
            items.popleft()
            self._others -= item.kind is not Kind.DELIVERY
            if item.content is None:
                self._taken_back -= item.kind is Kind.DELIVERY
                continue
            total += item.size_bytes
            kinds[item.handle] = item.kind
            if isinstance(item.content, Deliver):
                delivered += item.size_bytes
                self._sent(item.handle)
                deliveries += _delivery_field(item.handle, item.content)
            else:
                item.content(frame)
                if self._caught_up.get(item.handle) is item:
                    del self._caught_up[item.handle]
        return delivered

    def _sent(self, handle: int) -> None:
        """The oldest delivery on the handle is in a frame."""
        waiting = self._deliveries[handle]
        waiting.popleft()
        if not waiting:
            del self._deliveries[handle]

    def _say(self, item: _Item) -> None:
        self._items.append(item)
        self._others += item.kind is not Kind.DELIVERY
        self._on_said()


def _delivery_bytes(given: Deliver) -> int:
    """A selection can be far larger than its batch: nothing but the batch's producer says how many messages it has."""
    return len(given.batch.data) + len(given.selection) + NUMBER_BYTES * len(given.redeliveries) + ITEM_BYTES


def _delivery_field(handle: int, given: Deliver) -> Pieces:
    """Of ConsumeResponse."""
    batch = given.batch
    rest = broker_pb2.Delivery(
        handle=handle,
        cursor_epoch=given.cursor_epoch,
        first_offset=batch.first_offset,
        publish_time_us=batch.publish_time_us,
        selection=given.selection,
        redeliveries=given.redeliveries,
    )
    return message_field(_DELIVERIES_FIELD, [rest.SerializeToString(), *bytes_field(_BATCH_FIELD, batch.data)])


def _add_notice(
    frame: broker_pb2.ConsumeResponse, handle: int, *, active: bool | None = None, caught_up_to: int | None = None
) -> None:
    frame.notices.add(handle=handle, active=active, caught_up_to=caught_up_to)
