"""The engines under test, a clock that is moved by hand, and a store that loses requests and replies."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import pytest

from magnetar.metadata.keyspace import Keyspace
from magnetar.metadata.memory import MemoryStore
from magnetar.metadata.sqlite import SqliteStore
from magnetar.metadata.store import (
    Compare,
    KeyValue,
    Lease,
    MetadataStore,
    MetadataUnavailable,
    Operation,
    RangeResult,
    TxnResult,
    Watch,
)

HISTORY_CHANGES_MAX = 50


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


async def open_memory(path: Path, clock: Clock) -> MemoryStore:
    return MemoryStore(clock, history_changes_max=HISTORY_CHANGES_MAX)


async def open_sqlite(path: Path, clock: Clock) -> SqliteStore:
    return await SqliteStore.open(path / "metadata.sqlite", clock=clock, history_changes_max=HISTORY_CHANGES_MAX)


# An engine joins the contract suite by being named here.
ENGINES: dict[str, Callable[[Path, Clock], Awaitable[Any]]] = {"memory": open_memory, "sqlite": open_sqlite}


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture(params=sorted(ENGINES))
async def store(request: pytest.FixtureRequest, tmp_path: Path, clock: Clock) -> AsyncIterator[MetadataStore]:
    opened = await ENGINES[request.param](tmp_path, clock)
    yield opened
    await opened.close()


@pytest.fixture
def keyspace() -> Keyspace:
    return Keyspace("test")


Send = Callable[[], Awaitable[TxnResult]]
Fault = Callable[[Send], Awaitable[TxnResult]]


class FaultyStore:
    """A store behind a network: each transaction meets the next of `faults`, and the next `silent_reads` reads fail."""

    def __init__(self, store: MetadataStore) -> None:
        self.inner = store
        self.faults: deque[Fault] = deque()
        self.silent_reads = 0
        self.late: list[Send] = []
        self.hanging = asyncio.Event()
        self.sent = 0
        self.applied = 0

    # Faults.

    async def deliver(self, send: Send) -> TxnResult:
        return await send()

    async def lose_request(self, send: Send) -> TxnResult:
        raise MetadataUnavailable("the request was lost")

    async def lose_reply(self, send: Send) -> TxnResult:
        await send()
        raise MetadataUnavailable("the reply was lost")

    async def delay_request(self, send: Send) -> TxnResult:
        """No reply now; the request arrives when the test says so."""
        self.late.append(send)
        raise MetadataUnavailable("no reply in time")

    async def hang(self, send: Send) -> TxnResult:
        """Neither request nor reply gets through, until the caller is cancelled."""
        self.late.append(send)
        self.hanging.set()
        await asyncio.Event().wait()
        raise AssertionError

    def lose_reply_and(self, action: Callable[[], Awaitable[object]]) -> Fault:
        """Applies the transaction, then runs `action` before its sender can read again."""

        async def fault(send: Send) -> TxnResult:
            await send()
            await action()
            raise MetadataUnavailable("the reply was lost")

        return fault

    def before(self, action: Callable[[], Awaitable[object]]) -> Fault:
        """Runs `action` while the request is under way."""

        async def fault(send: Send) -> TxnResult:
            await action()
            return await send()

        return fault

    async def arrive(self) -> list[TxnResult]:
        late, self.late = self.late, []
        return [await send() for send in late]

    # The store.

    async def txn(self, compares: Sequence[Compare], operations: Sequence[Operation]) -> TxnResult:
        async def send() -> TxnResult:
            result = await self.inner.txn(compares, operations)
            self.applied += result.succeeded
            return result

        self.sent += 1
        await asyncio.sleep(0)
        fault = self.faults.popleft() if self.faults else self.deliver
        return await fault(send)

    async def _read(self) -> None:
        await asyncio.sleep(0)
        if self.silent_reads > 0:
            self.silent_reads -= 1
            raise MetadataUnavailable("no answer")

    async def get(self, key: str) -> KeyValue | None:
        await self._read()
        return await self.inner.get(key)

    async def range(self, prefix: str, *, after: str = "", limit: int = 0) -> RangeResult:
        await self._read()
        return await self.inner.range(prefix, after=after, limit=limit)

    def watch(self, prefix: str, *, from_revision: int) -> Watch:
        return self.inner.watch(prefix, from_revision=from_revision)

    async def grant_lease(self, ttl_s: float) -> Lease:
        await self._read()
        return await self.inner.grant_lease(ttl_s)

    async def close(self) -> None:
        await self.inner.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()


@pytest.fixture
async def faulty() -> AsyncIterator[FaultyStore]:
    async with FaultyStore(MemoryStore()) as faulty:
        yield faulty


@pytest.fixture
def pauses() -> list[float]:
    """What `sleep` was asked for."""
    return []


@pytest.fixture
def sleep(pauses: list[float]) -> Callable[[float], Awaitable[None]]:
    async def sleep(delay_s: float) -> None:
        pauses.append(delay_s)
        await asyncio.sleep(0)

    return sleep
