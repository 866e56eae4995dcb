"""Makes the copy that `copying.py` describes: reads, adds, compares, at the rate that is allowed."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence

import structlog

from magnetar.ledger.bookie_rpc import AddGroup, AddStatus, BookieRpc, Bookies, ReadGroup, ReadResult
from magnetar.metadata.records import CopyTask, LedgerRecord
from magnetar.repair.copying import (
    CopyStalled,
    Held,
    Lacking,
    Run,
    first_difference,
    first_group,
    runs_of,
    verified_prefix,
)

CHUNK_S = 0.025
CHUNK_BYTES_MIN = 256 << 10
CHUNK_BYTES_MAX = 1 << 20
"""Read and added at once: what the rate allows in CHUNK_S. More would make producers wait longer behind it."""
COMPARED_BYTES = 1 << 20
"""Of entries whose headers are read at once."""

log = structlog.get_logger("magnetar.repair")


class Copier:
    """One copy: `run` it once.

    turn      held while a chunk is added: two chunks at once would make producers wait behind both
    rate      bytes a second that are allowed
    pace      returns when more may be moved; told what was moved just before
    wanted    False: somebody decided otherwise, the copy stops
    """

    def __init__(
        self,
        record: LedgerRecord,
        task: CopyTask,
        target: BookieRpc,
        bookies: Bookies,
        turn: asyncio.Lock,
        rate: Callable[[], float],
        pace: Callable[[int, int], Awaitable[None]],
        wanted: Callable[[], bool],
    ) -> None:
        self._record = record
        self._task = task
        self._target = target
        self._bookies = bookies
        self._turn = turn
        self._rate = rate
        self._pace = pace
        self._wanted = wanted

    async def run(self) -> None:
        """On return every entry that the target must hold is verified on it. Raises CopyStalled."""
        for run in runs_of(self._record, self._task):
            following = run.first
            while following <= run.last:
                following += await self._advance(run, following)

    async def _advance(self, run: Run, first: int) -> int:
        """How many entries more are right."""
        self._check_wanted()
        group = await self._headers_at_target(first, run.last)
        if isinstance(group, Held):
            await self._compare(run, first, group.headers)
            return len(group.headers)
        last = min(run.last, first + group.entries - 1)
        following = first
        while following <= last:
            following += await self._copy(run, following, last)
        return following - first

    def _check_wanted(self) -> None:
        if not self._wanted():
            raise CopyStalled("the copy is not wanted any more, or by another bookie")

    async def _headers_at_target(self, first: int, last: int) -> Held | Lacking:
        result = await self._target.read(self._read(first, last, COMPARED_BYTES, headers_only=True))
        return first_group(self._record.ledger_id, first, result.answers)

    def _read(self, first: int, last: int, max_bytes: int, *, headers_only: bool = False) -> ReadGroup:
        record = self._record
        return ReadGroup(
            record.ledger_id,
            record.epoch,
            record.token,
            first,
            last,
            max_bytes=max_bytes,
            headers_only=headers_only,
        )

    async def _compare(self, run: Run, first: int, headers: Sequence[bytes]) -> None:
        """The target has verified these; whoever else has them has the same. Nobody else may have them any more."""
        compared = 0
        while compared < len(headers):
            compared += await self._compare_some(run, first + compared, headers[compared:])
        await self._pace(0, 0)

    async def _compare_some(self, run: Run, first: int, headers: Sequence[bytes]) -> int:
        for source in self._order(run.sources):
            read = self._read(first, first + len(headers) - 1, COMPARED_BYTES, headers_only=True)
            group = first_group(self._record.ledger_id, first, (await self._bookies.rpc(source).read(read)).answers)
            if isinstance(group, Held):
                self._check_equal(first, headers, group.headers, source)
                return len(group.headers)
        return 1

    def _check_equal(self, first: int, expected: Sequence[bytes], found: Sequence[bytes], source: str) -> None:
        position = first_difference(expected, found)
        if position is not None:
            facts = f"ledger=`{self._record.ledger_id}` entry=`{first + position}` bookie=`{source}`"
            log.error("copies of an entry differ", target=self._task.target, detail=facts)
            raise CopyStalled(f"copies of an entry differ: {facts}")

    def _order(self, sources: Sequence[str]) -> list[str]:
        """Those with a session first."""
        living = {bookie.bookie_id for bookie in self._bookies.registered()}
        turn = self._record.ledger_id % max(1, len(sources))
        return sorted((*sources[turn:], *sources[:turn]), key=lambda bookie: bookie not in living)

    async def _copy(self, run: Run, first: int, last: int) -> int:
        entries = await self._fetch(run, first, last)
        async with self._turn:
            self._check_wanted()
            await self._store(first, entries)
        await self._verify(first, entries)
        await self._pace(len(entries), sum(map(len, entries)))
        return len(entries)

    async def _store(self, first: int, entries: tuple[bytes, ...]) -> None:
        record = self._record
        group = AddGroup(record.ledger_id, record.epoch, record.token, entries, recovery=True)
        result = await self._target.add(group)
        if result.status is not AddStatus.OK:
            raise CopyStalled(f"the target refuses an entry: {result.status.name} {result.message}".rstrip())

    async def _fetch(self, run: Run, first: int, last: int) -> tuple[bytes, ...]:
        said: dict[str, str] = {}
        chunk_bytes = max(CHUNK_BYTES_MIN, min(round(self._rate() * CHUNK_S), CHUNK_BYTES_MAX))
        for source in self._order(run.sources):
            result = await self._bookies.rpc(source).read(self._read(first, last, chunk_bytes))
            entries = verified_prefix(self._record.ledger_id, first, result.answers)
            if entries:
                return entries
            said[source] = _said(result)
        facts = " ".join(f"{source}=`{what}`" for source, what in said.items())
        raise CopyStalled(f"no other bookie gives an entry: ledger=`{self._record.ledger_id}` entry=`{first}` {facts}")

    async def _verify(self, first: int, entries: Sequence[bytes]) -> None:
        verified = 0
        while verified < len(entries):
            group = await self._headers_at_target(first + verified, first + len(entries) - 1)
            if not isinstance(group, Held):
                raise CopyStalled(f"the target does not hold what it stored: entry=`{first + verified}`")
            self._check_equal(first + verified, entries[verified:], group.headers, self._task.target)
            verified += len(group.headers)


def _said(result: ReadResult) -> str:
    outcome = result.answers[0].outcome.name if result.answers else "UNKNOWN"
    return f"{outcome} {result.message}".rstrip()
