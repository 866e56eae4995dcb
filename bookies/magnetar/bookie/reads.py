"""Reads, many of them in one trip to the store's threads.

A read shows only what is durable: what comes from a group that is still being committed is held back until it is. What
is read while its ledger is being collected is not known to be here any more when it is answered: a copy that counted
such entries would end with a hole. A collection that begins later than the read finds the claim of that copy.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence

import structlog

from magnetar.bookie.entry_store import Damaged, EntryQuery, EntryRead, EntryStore
from magnetar.bookie.group_commit import GroupCommit
from magnetar.bookie.judge import (
    ReadConditions,
    headers_of,
    judge_lac,
    judge_read,
    unknown_read,
    verified,
)
from magnetar.bookie.metrics import BookieMetrics
from magnetar.ledger.bookie_rpc import EntryOutcome, LacQuery, LacResult, ReadGroup, ReadResult

TRIPS_MAX = 2
TRIP_BYTES_MAX = 2 << 20
TRIP_READS_MAX = 64
READS_QUEUED_MAX = 4096
READ_BYTES_MAX = (1 << 20) - (16 << 10)
"""Of the envelopes in one answer: a frame holds the answer and stays below 1 MiB."""

DAMAGED_TOLD_MAX = 1000
"""Ledgers of which the log says that they are damaged; the metric counts all."""

log = structlog.get_logger("magnetar.bookie")

_Waiting = tuple[ReadGroup, "asyncio.Future[ReadResult]"]


class Reads:
    """At most TRIPS_MAX trips are under way; what comes meanwhile goes with the next one."""

    def __init__(
        self,
        store: EntryStore,
        commits: GroupCommit,
        conditions: Callable[[int], ReadConditions],
        metrics: BookieMetrics,
    ) -> None:
        self._store = store
        self._commits = commits
        self._conditions = conditions
        self._metrics = metrics
        self._queue: deque[_Waiting] = deque()
        self._trips: set[asyncio.Task[None]] = set()
        self._told: set[int] = set()

    def read(self, group: ReadGroup) -> asyncio.Future[ReadResult]:
        future: asyncio.Future[ReadResult] = asyncio.get_running_loop().create_future()
        if len(self._queue) >= READS_QUEUED_MAX:
            future.set_result(unknown_read("too many reads are queued"))
        else:
            self._queue.append((group, future))
            self._start_trip()
        return future

    async def read_lac(self, query: LacQuery) -> LacResult:
        ledger_id = query.ledger_id
        loaded = self._commits.remembered(ledger_id)
        if loaded is None:
            loaded = (await self._store.load([ledger_id]))[ledger_id]
            await self._commits.settled((ledger_id,))
        state = self._commits.remembered(ledger_id) or loaded
        result = judge_lac(query.token, state, self._conditions(ledger_id))
        if result.outcome is EntryOutcome.UNKNOWN:
            self._metrics.unknown_reads.inc()
        return result

    async def close(self) -> None:
        while self._trips:
            await asyncio.wait(self._trips)

    def _start_trip(self) -> None:
        if len(self._trips) < TRIPS_MAX and self._queue:
            trip = asyncio.create_task(self._travel(self._take()), name="bookie reads")
            self._trips.add(trip)
            trip.add_done_callback(self._trip_ended)

    def _trip_ended(self, trip: asyncio.Task[None]) -> None:
        self._trips.discard(trip)
        if not trip.cancelled():
            self._start_trip()

    def _take(self) -> list[_Waiting]:
        taken: list[_Waiting] = []
        size_bytes = 0
        while self._queue and len(taken) < TRIP_READS_MAX:
            size_bytes += min(self._queue[0][0].max_bytes, READ_BYTES_MAX)
            if taken and size_bytes > TRIP_BYTES_MAX:
                break
            taken.append(self._queue.popleft())
        return taken

    async def _travel(self, waiting: Sequence[_Waiting]) -> None:
        try:
            queries = [
                EntryQuery(g.ledger_id, g.first_entry, g.last_entry, min(max(g.max_bytes, 1), READ_BYTES_MAX))
                for g, _ in waiting
            ]
            before = [self._conditions(group.ledger_id) for group, _ in waiting]
            found = await self._store.read(queries)
            await self._commits.settled(group.ledger_id for group, _ in waiting)
            for (group, future), conditions, read in zip(waiting, before, found, strict=True):
                if not future.done():
                    future.set_result(self._judge(group, conditions, read))
        except Exception as error:
            log.exception("reads failed")
            for _, future in waiting:
                if not future.done():
                    future.set_result(unknown_read(f"read failed error=`{error}`"))

    def _judge(self, group: ReadGroup, before: ReadConditions, read: EntryRead) -> ReadResult:
        """The remembered mark is as new as the last durable group; the one that was read is at most older."""
        conditions = self._conditions(group.ledger_id)
        conditions = ReadConditions(conditions.limbo, before.collecting or conditions.collecting)
        remembered = self._commits.remembered(group.ledger_id)
        mark = read.mark if remembered is None else remembered.mark
        values = [verified(value, group.ledger_id, group.first_entry + n) for n, value in enumerate(read.values)]
        result = judge_read(group.token, values, mark, conditions)
        self._count(group, values, result)
        return headers_of(result) if group.headers_only else result

    def _count(self, group: ReadGroup, values: Sequence[bytes | Damaged | None], result: ReadResult) -> None:
        metrics = self._metrics
        sizes = [len(answer.entry) for answer in result.answers if answer.entry is not None]
        metrics.read_entries.inc(len(sizes))
        metrics.read_bytes.inc(sum(sizes))
        damaged = [(n, value) for n, value in enumerate(values, group.first_entry) if isinstance(value, Damaged)]
        if damaged:
            entry_id, first = damaged[0]
            metrics.damaged.inc(len(damaged))
            self._tell(group.ledger_id, entry_id, first.message)
        if any(answer.outcome is EntryOutcome.UNKNOWN for answer in result.answers):
            metrics.unknown_reads.inc()

    def _tell(self, ledger_id: int, entry_id: int, problem: str) -> None:
        """Once a ledger: whoever reads a damaged entry may read it again and again."""
        if ledger_id not in self._told and len(self._told) < DAMAGED_TOLD_MAX:
            self._told.add(ledger_id)
            log.warning("an entry is damaged", ledger=ledger_id, entry=entry_id, problem=problem)
