"""A reader: reads a shard from a position on and leaves nothing behind. It is a stream without a cursor.

It holds nothing back from being trimmed; one that is overtaken by trimming ends with OFFSET_TRIMMED.
"""

from __future__ import annotations

import asyncio

from magnetar.broker.dispatch import Activated, CaughtUp, Deliver, StreamDispatch
from magnetar.broker.flow import CreditRefused
from magnetar.broker.pump import Pump
from magnetar.broker.refusals import RETRY_AFTER_MS, not_owner
from magnetar.broker.shard import ServedShard
from magnetar.broker.subscription import Attached, ConsumerSession, offset_of
from magnetar.managed_log.errors import LogReleased, OffsetTrimmed, ReadFailed
from magnetar.metadata.records import StartPosition
from magnetar.node.rpc import Refused, invalid_argument, unavailable
from magnetar.v1 import common_pb2
from magnetar.wire.selection import ALL

_ONLY_CONSUMER = 0


class Unacknowledged:
    """What a reader has for a cursor: nothing above its start is ever acknowledged."""

    def __init__(self, floor: int) -> None:
        self.floor = floor

    def next_unacked(self, offset: int) -> int:
        return max(offset, self.floor)

    def unacked_selection(self, first_offset: int, count: int) -> bytes | None:
        below = self.floor - first_offset
        if below <= 0:
            return ALL
        if below >= count:
            return None
        return ((1 << count) - (1 << below)).to_bytes((count + 7) >> 3, "little")


class Reader:
    """Delivers to its session from `open` until `close`, or until it ends the session with an error."""

    def __init__(self, shard: ServedShard, session: ConsumerSession, start_offset: int) -> None:
        self._shard = shard
        self._session = session
        self._core = StreamDispatch(Unacknowledged(start_offset))
        self._core.attach(_ONLY_CONSUMER)
        self._pump = Pump(shard.log, self._core, self._carry_out, self._overtaken, self._fail)
        self._watch: asyncio.Task[None] | None = None

    @classmethod
    async def open(cls, shard: ServedShard, session: ConsumerSession, start: StartPosition) -> Reader:
        """Raises Refused: OFFSET_TRIMMED, INVALID_ARGUMENT beyond the end, UNAVAILABLE, NOT_OWNER."""
        shard.check_served()
        log = shard.log
        try:
            # It is told where the log ends, and may stop there.
            await shard.check_end()
            offset = await offset_of(log, start)
        except LogReleased as error:
            raise not_owner(shard.shard_id, why=str(error)) from None
        except ReadFailed as error:
            raise unavailable(str(error), retry_after_ms=RETRY_AFTER_MS) from None
        if offset < log.start_offset:
            raise _trimmed(OffsetTrimmed(offset, log.start_offset))
        if offset > log.end_offset:
            raise invalid_argument(f"the offset is beyond the end: offset=`{offset}` end_offset=`{log.end_offset}`")
        return cls(shard, session, offset)

    def start(self) -> Attached:
        """Begin to deliver, within the credit."""
        self._core.pause(_ONLY_CONSUMER, self._session.full)
        self._pump.start()
        self._shard.readers += 1
        self._watch = asyncio.create_task(self._end_with_the_shard(), name=f"reader of shard {self._shard.shard_id}")
        return Attached(self._core.next_offset(), self._shard.log.end_offset, True, self._core.cursor_epoch)

    def credit(self, messages: int, size_bytes: int) -> None:
        """Raises Refused(INVALID_ARGUMENT)."""
        try:
            self._core.credit(_ONLY_CONSUMER, messages, size_bytes)
        except CreditRefused as error:
            raise invalid_argument(str(error)) from None
        self._pump.wake()

    def has_room(self, room: bool) -> None:
        self._core.pause(_ONLY_CONSUMER, not room)
        if room:
            self._pump.wake()

    def close(self) -> None:
        self._pump.stop()
        if self._watch is not None:
            self._watch.cancel()
            self._watch = None
            self._shard.readers -= 1

    async def _end_with_the_shard(self) -> None:
        await self._shard.released.wait()
        self._fail(self._shard.refusal())

    def _overtaken(self, trimmed: OffsetTrimmed) -> None:
        self._fail(_trimmed(trimmed))

    def _fail(self, refused: Refused) -> None:
        self.close()
        self._session.end(refused)

    def _carry_out(self, effect: Deliver | CaughtUp | Activated) -> None:
        if isinstance(effect, Deliver):
            self._session.deliver(effect)
        elif isinstance(effect, CaughtUp):
            self._session.caught_up(effect.offset)


def _trimmed(trimmed: OffsetTrimmed) -> Refused:
    return Refused(common_pb2.ERROR_REASON_OFFSET_TRIMMED, f"{trimmed}: begin at the earliest message or at a time")
