"""The task that drains a dispatcher: reads what it wants to read, hands on what it wants to deliver.

It runs while somebody is attached. Reads that fail are repeated with growing pauses; what a read brings after a seek
carries the old cursor epoch and is dropped by the dispatcher.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import structlog

from magnetar.broker.dispatch import Activated, CaughtUp, Deliver, Dispatch, LoadedBatch, Read
from magnetar.managed_log.errors import LogReleased, OffsetTrimmed, ReadFailed
from magnetar.managed_log.log import ManagedLog, StoredEntry
from magnetar.node.rpc import Refused
from magnetar.v1 import common_pb2

READ_BYTES_MAX = 1 << 20
RETRY_FIRST_S = 0.05
RETRY_MAX_S = 2.0

log = structlog.get_logger("magnetar.dispatch")


class Pump:
    """Owns the task. `carry_out` sends an effect to its consumer; `trimmed` hears that what was wanted is gone.

    problem     why the last read failed; empty once one succeeded
    suspended   while True nothing is handed out
    """

    def __init__(
        self,
        shard_log: ManagedLog,
        core: Dispatch,
        carry_out: Callable[[Deliver | CaughtUp | Activated], None],
        trimmed: Callable[[OffsetTrimmed], None],
        failed: Callable[[Refused], None],
    ) -> None:
        self.core = core
        self.problem = ""
        self.suspended = False
        self._log = shard_log
        self._carry_out = carry_out
        self._trimmed = trimmed
        self._failed = failed
        self._woken = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Follow the log from now on."""
        if self._task is None:
            self._log.on_end.append(self.wake)
            self._task = asyncio.create_task(self._run(), name=f"dispatch shard {self._log.shard_id}")

    def stop(self) -> None:
        """A read under way is abandoned, and its result lost."""
        if self._task is None:
            return
        self._log.on_end.remove(self.wake)
        self._task.cancel()
        self._task = None
        if self.core.reading is not None:
            self.core.read_failed(self.core.reading)

    def wake(self) -> None:
        """Something changed."""
        self._woken.set()

    async def _run(self) -> None:
        pause_s = RETRY_FIRST_S
        try:
            while True:
                self._woken.clear()
                delivered, read = (False, None) if self.suspended else self._hand_out()
                if read is not None:
                    await self._read(read)
                    if self.problem:
                        await asyncio.sleep(pause_s)
                        pause_s = min(2 * pause_s, RETRY_MAX_S)
                    else:
                        pause_s = RETRY_FIRST_S
                    continue
                if not delivered:
                    await self._woken.wait()
                await asyncio.sleep(0)
        except LogReleased:
            return  # Whoever released the shard tells the consumers.
        except Exception:
            log.exception("dispatch failed", shard=self._log.shard_id)
            reason = common_pb2.ERROR_REASON_INTERNAL
            self._failed(Refused(reason, "internal error: the broker's log has the details"))

    def _hand_out(self) -> tuple[bool, Read | None]:
        """Carries out one pass; returns whether it delivered anything, and what to read."""
        delivered, read = False, None
        for effect in self.core.dispatch(self._log.end_offset):
            if isinstance(effect, Read):
                read = effect
            else:
                delivered = delivered or isinstance(effect, Deliver)
                self._carry_out(effect)
        return delivered, read

    async def _read(self, read: Read) -> None:
        core = self.core
        try:
            entries = await self._log.read(read.offset, max_bytes=READ_BYTES_MAX, tail=read.tail)
            if not entries or not entries[0].first_offset <= read.offset < entries[-1].end_offset:
                raise ReadFailed(f"the log did not give what it should hold: offset=`{read.offset}`")
        except OffsetTrimmed as trimmed:
            core.read_failed(read)
            self._trimmed(trimmed)
            # It may have stopped this task, which ends where it waits next: and nothing here may ever make it wait.
            await asyncio.sleep(0)
        except ReadFailed as error:
            core.read_failed(read)
            self.problem = str(error)
            log.warning("read failed", shard=self._log.shard_id, offset=read.offset, problem=self.problem)
        else:
            self.problem = ""
            # What comes from the cache comes without waiting: let the others run, too. They may fill the buffer that
            # this was read for, and thousands of consumers would each keep what none of them may deliver.
            await asyncio.sleep(0)
            if core.takers:
                core.loaded(read, loaded_batches(entries))
            else:
                core.read_failed(read)


def loaded_batches(entries: list[StoredEntry]) -> list[LoadedBatch]:
    return [
        LoadedBatch(batch.first_offset, batch.count, batch.batch, entry.publish_time_us)
        for entry in entries
        for batch in entry.batches
    ]
