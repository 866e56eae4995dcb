"""What a bookie does for each call, whatever carried it: the gRPC service and `LocalBookie` both come here."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any, TypeVar

import structlog

from magnetar.bookie.entry_store import EntryStore, StoreUsage
from magnetar.bookie.group_commit import GroupCommit
from magnetar.bookie.judge import Add, Fence, unknown_lac, unknown_read
from magnetar.bookie.reads import Reads
from magnetar.ledger.bookie_rpc import AddGroup, AddResult, AddStatus, LacQuery, LacResult, ReadGroup, ReadResult
from magnetar.wire.envelope import DamagedEnvelope, Envelope, verify

GROUP_ENTRY_BYTES_MAX = 8 << 20
TOKEN_BYTES_MAX = 64
ID_MAX = (1 << 63) - 1
"""Of ledgers and entries; ledgers start at 1, and what the store counts stands under ledger 0."""
CALLS_MAX = 4096
"""Fencing reads and LAC queries under way."""

log = structlog.get_logger("magnetar.bookie")

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class LedgerFacts:
    ledger_id: int
    fenced: bool
    limbo: bool
    epoch: int


class BookieHandlers:
    """Every future completes with a value. Adds for one ledger are judged in the order of their calls."""

    def __init__(self, store: EntryStore, commits: GroupCommit, reads: Reads, limbo: Callable[[int], bool]) -> None:
        self._store = store
        self._commits = commits
        self._reads = reads
        self._limbo = limbo
        self._calls: set[asyncio.Task[None]] = set()

    def add(self, group: AddGroup) -> asyncio.Future[AddResult]:
        """Completes after the fsync that covers the entries, or when they are refused."""
        try:
            return self._commits.add(check_add(group))
        except DamagedEnvelope as damage:
            return _answered(AddResult(AddStatus.MALFORMED, str(damage)))

    def read(self, group: ReadGroup) -> asyncio.Future[ReadResult]:
        """With a fence, the entries are looked at after the fence is durable: nothing can follow a negative."""
        if not _is_readable(group):
            return _answered(unknown_read("no entry has such an id"))
        if group.fence:
            return self._call(self._fence_and_read(group), unknown_read)
        return self._reads.read(group)

    def read_lac(self, query: LacQuery) -> asyncio.Future[LacResult]:
        if not 0 < query.ledger_id <= ID_MAX:
            return _answered(unknown_lac("no ledger has this id"))
        return self._call(self._read_lac(query), unknown_lac)

    @property
    def has_room(self) -> bool:
        """`room` would return at once."""
        return self._commits.has_room

    async def room(self) -> None:
        """Returns when there is room for adds: whoever reads them from a network waits for it."""
        await self._commits.room()

    async def ledgers(self) -> list[LedgerFacts]:
        """Those whose entries may stand here, by id. Raises StoreDamaged rather than leave one out."""
        marks = await self._store.marks()
        return [LedgerFacts(i, mark.fenced, self._limbo(i), mark.epoch) for i, mark in marks if mark.stored]

    def usage(self) -> StoreUsage:
        return self._store.usage()

    async def close(self) -> None:
        while self._calls:
            await asyncio.wait(self._calls)
        await self._reads.close()

    async def _fence(self, ledger_id: int, epoch: int, token: bytes) -> str:
        """Why there is no fence; empty if it is durable."""
        if not 0 < len(token) <= TOKEN_BYTES_MAX:
            return "the token is missing"
        return (await self._commits.control(Fence(ledger_id, epoch, token))).refusal

    async def _fence_and_read(self, group: ReadGroup) -> ReadResult:
        refusal = await self._fence(group.ledger_id, group.epoch, group.token)
        return unknown_read(refusal) if refusal else await self._reads.read(group)

    async def _read_lac(self, query: LacQuery) -> LacResult:
        if query.fence:
            refusal = await self._fence(query.ledger_id, query.epoch, query.token)
            if refusal:
                return unknown_lac(refusal)
        return await self._reads.read_lac(query)

    def _call(self, work: Coroutine[Any, Any, T], unknown: Callable[[str], T]) -> asyncio.Future[T]:
        if len(self._calls) >= CALLS_MAX:
            work.close()
            return _answered(unknown("too many calls are under way"))
        future: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        task = asyncio.create_task(_fill(future, work, unknown))
        self._calls.add(task)
        task.add_done_callback(self._calls.discard)
        return future


def _answered(result: T) -> asyncio.Future[T]:
    future: asyncio.Future[T] = asyncio.get_running_loop().create_future()
    future.set_result(result)
    return future


def _is_readable(group: ReadGroup) -> bool:
    return 0 < group.ledger_id <= ID_MAX and 0 <= group.first_entry <= group.last_entry <= ID_MAX


async def _fill(future: asyncio.Future[T], work: Coroutine[Any, Any, T], unknown: Callable[[str], T]) -> None:
    """A task's root: the future completes whatever happens."""
    try:
        result = await work
    except Exception as error:
        log.exception("call failed")
        result = unknown(f"call failed error=`{error}`")
    if not future.done():
        future.set_result(result)


def check_add(group: AddGroup) -> Add:
    """The group with its envelopes verified. Raises DamagedEnvelope: these bytes would be unreadable for ever."""
    size_bytes = sum(map(len, group.entries))
    if not 0 < group.ledger_id <= ID_MAX:
        raise DamagedEnvelope(f"no ledger has this id: ledger=`{group.ledger_id}`")
    if not group.entries or size_bytes > GROUP_ENTRY_BYTES_MAX:
        raise DamagedEnvelope(f"a group has entries, and not too many: bytes=`{size_bytes}`")
    if not 0 < len(group.token) <= TOKEN_BYTES_MAX:
        raise DamagedEnvelope(f"the token is missing or too long: bytes=`{len(group.token)}`")
    envelopes: list[Envelope] = []
    previous = -1
    for data in group.entries:
        envelope = verify(data, group.ledger_id)
        if not previous < envelope.entry_id <= ID_MAX:
            raise DamagedEnvelope(f"entries are not in ascending order: entry=`{envelope.entry_id}`")
        if envelope.lac >= envelope.entry_id or envelope.lac < -1:
            raise DamagedEnvelope(f"lac is not below the entry: entry=`{envelope.entry_id}` lac=`{envelope.lac}`")
        previous = envelope.entry_id
        envelopes.append(envelope)
    return Add(group.ledger_id, group, tuple(envelopes), size_bytes)
