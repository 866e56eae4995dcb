"""The one queue through which everything that changes a bookie's store goes: group commit.

Steps of a group, by one task, one group after the other:

1. Take what is queued, up to a limit.
2. Load the state of its ledgers, and what is stored under ids that are not new.
3. Judge all of it (`judge.py`).
4. Commit the writes: one batch, one fsync.
5. Remember the new states, answer everything in order.

Meanwhile the next group gathers; nothing of it is written before step 5 of this one. So the state that step 3 sees is
durable and complete, and stays so until step 4: an add that was queued before a fence and comes after it in a group is
refused by it, and a read that waits for its fence's group can never be followed by an add that the fence should stop.

Only this task changes `states`; readers that find a ledger missing there load it for themselves and throw it away.
"""

from __future__ import annotations

import asyncio
import os
import sys
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Sequence
from typing import NoReturn, TypeVar, cast

import structlog

from magnetar.bookie.entry_store import (
    ITEM_OVERHEAD_BYTES,
    Damaged,
    EntryStore,
    GroupWrites,
    LedgerState,
    StoreFailed,
    StoreStalled,
)
from magnetar.bookie.judge import Add, Conditions, Done, Item, SetMeta, Verdict, judge, needed_lookups
from magnetar.bookie.metrics import BookieMetrics
from magnetar.ledger.bookie_rpc import AddResult, AddStatus

GROUP_BYTES_MAX = 2 << 20
"""Writing a batch holds the interpreter for its whole time: a few milliseconds at this size."""
GROUP_ITEMS_MAX = 4096
LEDGERS_REMEMBERED_MAX = 16_384
CONTROL_RESERVE_BYTES = 1 << 20
"""Room in the queue that adds do not get: fences must reach a bookie that is flooded."""
STALL_PAUSE_S = 0.002
STALL_PAUSE_MAX_S = 0.05

log = structlog.get_logger("magnetar.bookie")

T = TypeVar("T", bound=Verdict)


def die(message: str) -> NoReturn:
    """Ends the process at once: after a failed fsync nothing it knows about the disk is true any more."""
    print(f"magnetar bookie: {message}; exiting, other copies hold the data", file=sys.stderr, flush=True)
    os._exit(70)


class _Queued:
    __slots__ = ("future", "item", "size_bytes")

    def __init__(self, item: Item, size_bytes: int, future: asyncio.Future[Verdict]) -> None:
        self.item = item
        self.size_bytes = size_bytes
        self.future = future


class GroupCommit:
    """See the module. `conditions` is asked once a group, when it is judged."""

    def __init__(
        self,
        store: EntryStore,
        conditions: Callable[[], Conditions],
        metrics: BookieMetrics,
        *,
        queue_bytes: int,
        die: Callable[[str], object] = die,
    ) -> None:
        self._store = store
        self._conditions = conditions
        self._metrics = metrics
        self._queue_bytes_max = queue_bytes
        self._die = die
        self._queue: deque[_Queued] = deque()
        self._held_bytes = 0
        self._states: OrderedDict[int, LedgerState] = OrderedDict()
        self._in_flight: frozenset[int] = frozenset()
        self._group_done: asyncio.Future[None] | None = None
        self._work = asyncio.Event()
        self._room = asyncio.Event()
        self._room.set()
        self._closing = False
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        self._task = asyncio.create_task(self._run(), name="group commit")

    async def close(self) -> None:
        """Returns when everything queued is answered; what comes later is refused."""
        self._closing = True
        self._work.set()
        if self._task is not None:
            await self._task

    @property
    def held_bytes(self) -> int:
        """Of all that is queued or in the group that is being committed."""
        return self._held_bytes

    def add(self, add: Add) -> asyncio.Future[AddResult]:
        """Answered after the fsync that covers it, or BUSY at once when too much is queued."""
        size_bytes = add.size_bytes + ITEM_OVERHEAD_BYTES * len(add.group.entries)
        if self._closing or (self._held_bytes and self._held_bytes + size_bytes > self._queue_bytes_max):
            return _answered(AddResult(AddStatus.BUSY, "bookie stops" if self._closing else "too much is queued"))
        return cast("asyncio.Future[AddResult]", self._enqueue(add, size_bytes))

    def control(self, item: Item) -> asyncio.Future[Done]:
        """Anything but an add. Refused when too much is queued."""
        if self._closing or self._held_bytes + ITEM_OVERHEAD_BYTES > self._queue_bytes_max + CONTROL_RESERVE_BYTES:
            return _answered(Done("bookie stops" if self._closing else "too much is queued"))
        return cast("asyncio.Future[Done]", self._enqueue(item, ITEM_OVERHEAD_BYTES))

    @property
    def has_room(self) -> bool:
        return self._room.is_set()

    async def room(self) -> None:
        """Returns when the queue is less than half full: whoever reads from a network waits for it."""
        await self._room.wait()

    def remembered(self, ledger_id: int) -> LedgerState | None:
        """The ledger's state as of the last durable group, if it is remembered."""
        return self._states.get(ledger_id)

    async def settled(self, ledger_ids: Iterable[int]) -> None:
        """Returns when what the store shows of these ledgers by now is durable."""
        if self._group_done is not None and not self._in_flight.isdisjoint(ledger_ids):
            await asyncio.shield(self._group_done)

    def _enqueue(self, item: Item, size_bytes: int) -> asyncio.Future[Verdict]:
        future: asyncio.Future[Verdict] = asyncio.get_running_loop().create_future()
        self._queue.append(_Queued(item, size_bytes, future))
        self._held_bytes += size_bytes
        self._update_room()
        self._work.set()
        return future

    def _update_room(self) -> None:
        if self._held_bytes * 2 < self._queue_bytes_max:
            self._room.set()
        else:
            self._room.clear()

    async def _run(self) -> None:
        try:
            while self._queue or not self._closing:
                if not self._queue:
                    self._work.clear()
                    await self._work.wait()
                    continue
                await self._commit_group(self._take())
        except StoreFailed as failure:
            self._die(str(failure))
        except Exception as error:
            log.exception("group commit failed")
            self._die(f"group commit failed error=`{error}`")

    def _take(self) -> list[_Queued]:
        group: list[_Queued] = []
        size_bytes = 0
        while self._queue and len(group) < GROUP_ITEMS_MAX:
            size_bytes += self._queue[0].size_bytes
            if group and size_bytes > GROUP_BYTES_MAX:
                break
            group.append(self._queue.popleft())
        return group

    async def _commit_group(self, group: list[_Queued]) -> None:
        items = [queued.item for queued in group]
        states = await self._load(items)
        keys = needed_lookups(items, states)
        stored: dict[tuple[int, int], bytes | Damaged | None] = await self._store.lookup(keys) if keys else {}
        judgement = judge(items, states, stored, self._conditions())
        if judgement.needs_sync:
            await self._make_durable(judgement.writes)
        for ledger_id, state in judgement.states.items():
            self._remember(ledger_id, state)
        self._held_bytes -= sum(queued.size_bytes for queued in group)
        self._update_room()
        for queued, verdict in zip(group, judgement.verdicts, strict=True):
            if not queued.future.done():
                queued.future.set_result(verdict)
        self._metrics.count_group(items, judgement, self._held_bytes)

    async def _load(self, items: Sequence[Item]) -> dict[int, LedgerState]:
        ledger_ids = {item.ledger_id for item in items if not isinstance(item, SetMeta)}
        missing = [ledger_id for ledger_id in ledger_ids if ledger_id not in self._states]
        loaded = await self._store.load(missing) if missing else {}
        return {ledger_id: loaded.get(ledger_id) or self._states[ledger_id] for ledger_id in ledger_ids}

    def _remember(self, ledger_id: int, state: LedgerState) -> None:
        """A state that could not be read is not kept: the next group tries again."""
        self._states.pop(ledger_id, None)
        if isinstance(state.mark, Damaged) or state.tail_damage:
            return
        self._states[ledger_id] = state
        while len(self._states) > LEDGERS_REMEMBERED_MAX:
            self._states.popitem(last=False)

    async def _make_durable(self, writes: GroupWrites) -> None:
        self._in_flight = frozenset(writes.ledgers())
        self._group_done = asyncio.get_running_loop().create_future()
        started = time.perf_counter()
        pause_s = STALL_PAUSE_S
        while True:
            try:
                await self._store.commit(writes)
                break
            except StoreStalled:
                # The queue stays closed by its bound, since nothing leaves it.
                self._metrics.stalls.inc()
                await asyncio.sleep(pause_s)
                pause_s = min(pause_s * 2, STALL_PAUSE_MAX_S)
        self._metrics.commit_seconds.observe(time.perf_counter() - started)
        self._in_flight = frozenset()
        self._group_done.set_result(None)


def _answered(verdict: T) -> asyncio.Future[T]:
    future: asyncio.Future[T] = asyncio.get_running_loop().create_future()
    future.set_result(verdict)
    return future
