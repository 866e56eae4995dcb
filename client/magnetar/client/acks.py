"""What a consumer acknowledged in one shard and what it holds there. Pure.

Acknowledgements are queued at once and leave in groups: whatever is queued when the stream can take it becomes one
group, with one answer and one completion for all who asked. After a reconnect the groups without an answer are sent
again; acknowledging twice does no harm.

A `Hold` remembers, for each batch of a queue subscription, which messages were delivered here and neither acknowledged
nor given back: what the broker is told after a reconnect, so that it does not deliver them again, and what is dropped
if it does.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence

from magnetar.client.completion import Completion
from magnetar.client.errors import MagnetarError

GROUPS_IN_FLIGHT_MAX = 16
"""Of one shard. With more, acknowledgements wait for the next answer and form a larger group."""

RANGES_PER_GROUP_MAX = 10_000
"""About 200 KiB of a frame."""

OffsetRange = tuple[int, int]
"""start <= offset < end."""


class AckGroup(Completion):
    """Acknowledgements of one shard that are answered together.

    floor    everything below it is acknowledged; 0: nothing is said about that
    offsets  of single messages, as they came
    ranges   of single messages, ascending, disjoint
    rest     the group with what did not fit into this one, and with all who wait for both
    """

    __slots__ = ("_earlier", "floor", "offsets", "ranges", "rest")

    def __init__(self) -> None:
        super().__init__()
        self.floor = 0
        self.offsets: list[int] = []
        self.ranges: list[OffsetRange] = []
        self.rest: AckGroup | None = None
        self._earlier: MagnetarError | None = None

    def __bool__(self) -> bool:
        return bool(self.floor or self.offsets or self.ranges)

    def end(self, error: MagnetarError | None = None) -> None:
        error = error or self._earlier
        if self.rest is not None:
            self.rest._earlier = error
        super().end(error)


class ShardAcks:
    """The acknowledgements of one consumer in one shard: one group is open, some are in flight, oldest first."""

    __slots__ = ("_again", "_in_flight", "open")

    def __init__(self) -> None:
        self.open = AckGroup()
        self._again: deque[AckGroup] = deque()
        self._in_flight: dict[int, AckGroup] = {}

    def __bool__(self) -> bool:
        return bool(self.open) or bool(self._in_flight) or bool(self._again)

    @property
    def queued(self) -> bool:
        """`take` has something to give."""
        return bool(self._again or self.open) and len(self._in_flight) < GROUPS_IN_FLIGHT_MAX

    def take(self, request_id: int) -> AckGroup:
        """What is queued, as one group that is in flight under this id. Only if something is `queued`."""
        group = self._again.popleft() if self._again else self._close_group()
        self._in_flight[request_id] = group
        return group

    def _close_group(self) -> AckGroup:
        group = self.open
        ranges = merged([*group.ranges, *ranges_of(group.offsets)])
        if len(ranges) <= RANGES_PER_GROUP_MAX:
            self.open = AckGroup()
            group.ranges, group.offsets = ranges, []
            return group
        # Those who wait stay with the rest, which is answered last.
        leaving = AckGroup()
        leaving.floor, leaving.ranges, leaving.rest = group.floor, ranges[:RANGES_PER_GROUP_MAX], group
        group.floor, group.ranges, group.offsets = 0, ranges[RANGES_PER_GROUP_MAX:], []
        return leaving

    def in_flight(self, request_id: int) -> AckGroup | None:
        """The group that is in flight under this id."""
        return self._in_flight.get(request_id)

    def answered(self, request_id: int) -> AckGroup | None:
        """The group of this answer, which the caller ends; None if it was dropped."""
        return self._in_flight.pop(request_id, None)

    def lost(self) -> None:
        """The connection is lost: what was not answered is to be sent again, first."""
        self._again.extendleft(reversed(self._in_flight.values()))
        self._in_flight.clear()

    def unanswered(self) -> list[OffsetRange]:
        """Single messages that are acknowledged here, and perhaps not yet at the broker."""
        groups = [*self._again, *self._in_flight.values(), self.open]
        return merged(r for group in groups for r in (*group.ranges, *ranges_of(group.offsets)))

    def groups(self) -> list[AckGroup]:
        """Every group without an answer, oldest first."""
        return [*self._in_flight.values(), *self._again, *([self.open] if self.open else [])]

    def take_all(self) -> list[AckGroup]:
        """Every group without an answer, which the caller ends; nothing remains."""
        groups = self.groups()
        self._in_flight.clear()
        self._again.clear()
        self.open = AckGroup()
        return groups


class Hold:
    """The messages of one stored batch that this consumer holds: a byte of 1 for each.

    left   how many they are
    """

    __slots__ = ("first_offset", "left", "mask")

    def __init__(self, first_offset: int, count: int) -> None:
        self.first_offset = first_offset
        self.mask = bytearray(count)
        self.left = 0

    def add(self, wanted: bytes) -> bytes:
        """Messages were delivered. Returns the mask of those that were not held before.

        wanted   a byte of 1 for each delivered message of the batch, else 0
        """
        size = len(wanted)
        new = int.from_bytes(wanted, "little") & ~int.from_bytes(self.mask, "little")
        both = new | int.from_bytes(self.mask, "little")
        added = new.to_bytes(size, "little")
        self.mask[:] = both.to_bytes(size, "little")
        self.left += added.count(1)
        return added

    def drop(self, index: int) -> bool:
        """The message is acknowledged or given back. False: it is not held."""
        if not self.mask[index]:
            return False
        self.mask[index] = 0
        self.left -= 1
        return True

    def ranges(self) -> Iterator[OffsetRange]:
        """Offsets that are held, ascending."""
        start = self.mask.find(1)
        while start >= 0:
            end = self.mask.find(0, start)
            end = len(self.mask) if end < 0 else end
            yield self.first_offset + start, self.first_offset + end
            start = self.mask.find(1, end)


class Holds:
    """What a queue consumer holds in one shard, by batch."""

    __slots__ = ("_by_offset",)

    def __init__(self) -> None:
        self._by_offset: dict[int, Hold] = {}

    def __len__(self) -> int:
        return sum(hold.left for hold in self._by_offset.values())

    def of(self, first_offset: int, count: int) -> Hold:
        """The hold on the batch at this offset."""
        hold = self._by_offset.get(first_offset)
        if hold is None or len(hold.mask) != count:
            hold = self._by_offset[first_offset] = Hold(first_offset, count)
        return hold

    def forget(self, hold: Hold) -> None:
        """Drop the record of a batch of which nothing is held any more."""
        if hold.left == 0 and self._by_offset.get(hold.first_offset) is hold:
            del self._by_offset[hold.first_offset]

    def clear(self) -> None:
        self._by_offset.clear()

    def ranges(self, also: Iterable[OffsetRange] = ()) -> list[OffsetRange]:
        """Everything that is held, and these, ascending and disjoint."""
        return merged([*(r for hold in self._by_offset.values() for r in hold.ranges()), *also])


class Credits:
    """How much the broker may deliver: a budget of messages and bytes, part of which is always somewhere.

    What was delivered and not taken by the user counts against it. What was taken is granted again when it is worth a
    frame: at half of the budget.
    """

    __slots__ = ("_buffered_bytes", "_buffered_messages", "_freed_bytes", "_freed_messages", "bytes", "messages")

    def __init__(self, messages: int, bytes_: int) -> None:
        self.messages = messages
        self.bytes = bytes_
        self._buffered_messages = self._buffered_bytes = 0
        self._freed_messages = self._freed_bytes = 0

    def delivered(self, messages: int, bytes_: int) -> None:
        self._buffered_messages += messages
        self._buffered_bytes += bytes_

    def taken(self, messages: int, bytes_: int) -> None:
        """What was delivered needs no room any more."""
        self._buffered_messages -= messages
        self._buffered_bytes -= bytes_
        self._freed_messages += messages
        self._freed_bytes += bytes_

    def opened(self) -> tuple[int, int]:
        """The broker knows of no credit: what it may deliver beside what waits here for the user."""
        self._freed_messages = self._freed_bytes = 0
        return max(0, self.messages - self._buffered_messages), max(0, self.bytes - self._buffered_bytes)

    @property
    def worthwhile(self) -> bool:
        """There is enough to grant."""
        return self._freed_messages * 2 >= self.messages or self._freed_bytes * 2 >= self.bytes

    def grant(self) -> tuple[int, int] | None:
        """Messages and bytes to grant now, if it is worth it."""
        if not self.worthwhile:
            return None
        granted = self._freed_messages, self._freed_bytes
        self._freed_messages = self._freed_bytes = 0
        return granted


def ranges_of(offsets: Sequence[int]) -> list[OffsetRange]:
    """The offsets as ranges, ascending and disjoint."""
    found: list[OffsetRange] = []
    start = end = -1
    for offset in sorted(offsets):
        if offset == end:
            end += 1
        elif offset > end:
            if start >= 0:
                found.append((start, end))
            start, end = offset, offset + 1
    if start >= 0:
        found.append((start, end))
    return found


def merged(ranges: Iterable[OffsetRange]) -> list[OffsetRange]:
    """The same offsets as ranges that are ascending, disjoint and as few as can be."""
    found: list[OffsetRange] = []
    for start, end in sorted(ranges):
        if found and start <= found[-1][1]:
            if end > found[-1][1]:
                found[-1] = (found[-1][0], end)
        else:
            found.append((start, end))
    return found
