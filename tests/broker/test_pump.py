"""The task that drains a dispatcher, where its log says no at once."""

from __future__ import annotations

import asyncio
from typing import cast

from magnetar.broker.dispatch import StreamDispatch
from magnetar.broker.pump import Pump
from magnetar.broker.reader import Unacknowledged
from magnetar.managed_log.errors import OffsetTrimmed
from magnetar.managed_log.log import ManagedLog, StoredEntry

START_OFFSET = 100


class TrimmedLog:
    """A log that is trimmed up to START_OFFSET; it says so without waiting for anything, as the real one does."""

    shard_id = 5
    end_offset = 200

    def __init__(self) -> None:
        self.on_end: list[object] = []
        self.reads = 0

    async def read(self, offset: int, *, max_bytes: int, tail: bool) -> list[StoredEntry]:
        self.reads += 1
        assert self.reads < 1000, "the pump spins"
        raise OffsetTrimmed(offset, START_OFFSET)


async def test_a_reader_that_was_overtaken_by_trimming_stops_and_lets_the_broker_go_on() -> None:
    log = TrimmedLog()
    core = StreamDispatch(Unacknowledged(0))
    core.attach(1)
    core.credit(1, 10, 1000)
    overtaken: list[OffsetTrimmed] = []

    def trimmed(why: OffsetTrimmed) -> None:
        overtaken.append(why)
        pump.stop()

    pump = Pump(cast(ManagedLog, log), core, lambda effect: None, trimmed, lambda refused: None)
    pump.start()
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert [why.start_offset for why in overtaken] == [START_OFFSET]
    assert log.reads == 1
