"""The boundary to the metadata store: each process reaches one store over the network, and may not.

The store is the real `MemoryStore`, in a process of its own. A call without an answer raises MetadataUnavailable, and
may still be applied, now or much later. Watches come late, in order, and are Reset at times. Leases are kept alive by
calls, and judged lost here before the store drops them.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from types import TracebackType
from typing import Any, Self, TypeVar

from simulation.boundaries import Boundaries
from simulation.loop import Process
from simulation.moments import Moments
from simulation.network import Network, Pipe

from magnetar.metadata.memory import MemoryStore
from magnetar.metadata.store import (
    Changes,
    Compare,
    KeyValue,
    LeaseExpired,
    MetadataError,
    MetadataUnavailable,
    Operation,
    RangeResult,
    Reset,
    TxnResult,
    WatchEvent,
)

CALL_S = 3.0
"""After which a call has no answer."""
LOOK_S = 0.05
"""How soon a stream that stood still goes on."""
KEEPALIVES_PER_LEASE = 3
JUDGED_LOST_AT = 0.9
"""Of a lease's time since the call that last prolonged it."""

T = TypeVar("T")


class MetadataFaults:
    """How often what goes wrong; all zero while the world heals."""

    def __init__(self) -> None:
        self.lost_request = 0.0
        self.lost_answer = 0.0
        self.reset = 0.0
        self.behind: set[str] = set()
        """Processes whose streams stand still, watches and keepalives, though calls of theirs are answered."""

    def mend(self) -> None:
        self.lost_request = self.lost_answer = self.reset = 0.0
        self.behind.clear()


class MetadataServer:
    """The store and the process that it runs in."""

    def __init__(self, network: Network, seed: str) -> None:
        self.process = Process("metadata")
        self.store = MemoryStore()
        self.network = network
        self.faults = MetadataFaults()
        self.rng = random.Random(seed)
        self.boundaries: Boundaries | None = None
        self.moments: Moments | None = None

    def perform(
        self, work: Callable[[], Coroutine[Any, Any, T]], answer: Callable[[T | None, Exception | None], None]
    ) -> None:
        """The store never suspends: the call is done at once."""
        coroutine = work()
        try:
            coroutine.send(None)
        except StopIteration as done:
            answer(done.value, None)
        except (MetadataError, ValueError) as error:
            answer(None, error)
        else:
            raise AssertionError("the memory store suspended")


class SimulatedMetadata:
    """See `store.MetadataStore`: the store as one process sees it."""

    def __init__(self, server: MetadataServer, process: Process) -> None:
        self._server = server
        self._network = server.network
        self._process = process
        self._closed = False

    async def get(self, key: str) -> KeyValue | None:
        return await self._ask("get", key, lambda: self._server.store.get(key))

    async def range(self, prefix: str, *, after: str = "", limit: int = 0) -> RangeResult:
        return await self._ask("range", prefix, lambda: self._server.store.range(prefix, after=after, limit=limit))

    async def txn(self, compares: Sequence[Compare], operations: Sequence[Operation]) -> TxnResult:
        what = compares[0].key if compares else ""
        if self._server.moments is not None:
            self._server.moments.reached(self._process.name, operations, applied=False)
        return await self._ask("txn", what, lambda: self._txn(compares, operations))

    async def _txn(self, compares: Sequence[Compare], operations: Sequence[Operation]) -> TxnResult:
        result = await self._server.store.txn(compares, operations)
        if result.succeeded and self._server.moments is not None:
            self._server.moments.reached(self._process.name, operations, applied=True)
        if result.succeeded and self._server.boundaries is not None:
            self._server.boundaries.applied(self._process.name, operations)
        return result

    def watch(self, prefix: str, *, from_revision: int) -> SimulatedWatch:
        return SimulatedWatch(self._server, self._process, prefix, from_revision)

    async def grant_lease(self, ttl_s: float) -> SimulatedLease:
        asked_at = self._network.loop.time()
        lease_id = await self._ask("grant", "", lambda: self._server.store.grant_remote_lease(ttl_s))
        return SimulatedLease(self, self._network, lease_id, ttl_s, asked_at)

    async def keep_alive(self, lease_id: int) -> float:
        while self._process.name in self._server.faults.behind:  # noqa: ASYNC110  # waiting costs nothing
            await asyncio.sleep(LOOK_S)
        return await self._ask("keepalive", lease_id, lambda: self._server.store.keep_alive(lease_id))

    async def revoke(self, lease_id: int) -> None:
        await self._ask("revoke", lease_id, lambda: self._server.store.revoke_lease(lease_id))

    async def close(self) -> None:
        self._closed = True

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()

    async def _ask(self, name: str, what: object, work: Callable[[], Coroutine[Any, Any, T]]) -> T:
        if self._closed:
            raise MetadataError("the metadata store is closed")
        server, faults = self._server, self._server.faults
        answer: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        note = self._network.transcript.note
        if server.rng.random() < faults.lost_request:
            note(self._process.name, name, what, "lost before it arrived")
        else:
            self._network.post(self._process.name, server.process, self._arrived, name, what, work, answer)
        deadline = self._network.loop.call_later(CALL_S, self._no_answer, name, what, answer)
        try:
            return await answer
        finally:
            deadline.cancel()

    def _no_answer(self, name: str, what: object, answer: asyncio.Future[Any]) -> None:
        self._network.transcript.note(self._process.name, name, what, "no answer")
        error = MetadataUnavailable(f"the metadata store did not answer: call=`{name}` key=`{what}`")
        _complete(answer, None, error)

    def _arrived(
        self, name: str, what: object, work: Callable[[], Coroutine[Any, Any, T]], answer: asyncio.Future[T]
    ) -> None:
        server = self._server

        def performed(result: T | None, error: Exception | None) -> None:
            succeeded = result.succeeded if isinstance(result, TxnResult) else error is None
            self._network.transcript.note(self._process.name, name, what, "done" if succeeded else "refused")
            if server.rng.random() < server.faults.lost_answer:
                self._network.transcript.note(self._process.name, name, what, "answer lost")
            else:
                self._network.post(server.process.name, self._process, _complete, answer, result, error)

        server.perform(work, performed)


def _complete(answer: asyncio.Future[Any], result: Any, error: Exception | None) -> None:
    if answer.done():
        return
    if error is None:
        answer.set_result(result)
    else:
        answer.set_exception(error)


class SimulatedWatch:
    """See `store.Watch`."""

    def __init__(self, server: MetadataServer, process: Process, prefix: str, from_revision: int) -> None:
        self._server = server
        self._process = process
        self._pipe = Pipe(server.network, server.process.name, process)
        self._events: list[WatchEvent] = []
        self._wake: asyncio.Future[None] | None = None
        self._ended = False
        self._far_end: Any = None
        server.network.post(process.name, server.process, self._begin, prefix, from_revision)

    def __aiter__(self) -> AsyncIterator[WatchEvent]:
        return self

    async def __anext__(self) -> WatchEvent:
        while not self._events:
            if self._ended:
                raise StopAsyncIteration
            self._wake = asyncio.get_running_loop().create_future()
            await self._wake
        event = self._events.pop(0)
        if isinstance(event, Reset):
            self._ended = True
            self._events.clear()
        return event

    async def close(self) -> None:
        self._ended = True
        self._notify()
        self._server.network.post(self._process.name, self._server.process, self._end)

    def _notify(self) -> None:
        if self._wake is not None and not self._wake.done():
            self._wake.set_result(None)

    def _arrived(self, event: WatchEvent) -> None:
        self._events.append(event)
        self._notify()

    # At the store.

    def _begin(self, prefix: str, from_revision: int) -> None:
        if self._far_end is None:
            self._far_end = self._server.store.watch(prefix, from_revision=from_revision)
            asyncio.get_running_loop().create_task(self._forward(), name=f"watch {prefix}")

    def _end(self) -> None:
        if self._far_end is None:
            self._far_end = ()
        elif self._far_end:
            self._far_end.end()

    async def _forward(self) -> None:
        server = self._server
        async for event in self._far_end:
            if isinstance(event, Changes) and server.rng.random() < server.faults.reset:
                event = Reset()
            while self._process.name in server.faults.behind:  # noqa: ASYNC110  # waiting costs nothing
                await asyncio.sleep(LOOK_S)
            self._pipe.send(self._arrived, event)
            if isinstance(event, Reset):
                self._far_end.end()
                return


class SimulatedLease:
    """See `store.Lease`."""

    def __init__(
        self, metadata: SimulatedMetadata, network: Network, lease_id: int, ttl_s: float, asked_at: float
    ) -> None:
        self._metadata = metadata
        self._network = network
        self._lease_id = lease_id
        self._ttl_s = ttl_s
        self._deadline = asked_at + ttl_s * JUDGED_LOST_AT
        self._over = asyncio.Event()
        self._task = asyncio.create_task(self._keep(), name=f"lease {lease_id}")

    @property
    def lease_id(self) -> int:
        return self._lease_id

    @property
    def ttl_s(self) -> float:
        return self._ttl_s

    @property
    def lost(self) -> bool:
        """What was lost stays lost, however late an answer comes."""
        if self._network.loop.time() >= self._deadline:
            self._over.set()
        return self._over.is_set()

    async def wait_lost(self) -> None:
        await self._over.wait()

    async def revoke(self) -> None:
        self._task.cancel()
        self._over.set()
        await self._metadata.revoke(self._lease_id)

    async def _keep(self) -> None:
        pause_s = self._ttl_s / KEEPALIVES_PER_LEASE
        while not self.lost:
            await asyncio.sleep(min(pause_s, max(0.0, self._deadline - self._network.loop.time())))
            try:
                await self._prolong(pause_s)
            except LeaseExpired:
                break
            except (MetadataUnavailable, TimeoutError):
                continue
        self._network.transcript.note("lease lost", self._lease_id)
        self._over.set()

    async def _prolong(self, attempt_s: float) -> None:
        asked_at = self._network.loop.time()
        async with asyncio.timeout(attempt_s):
            await self._metadata.keep_alive(self._lease_id)
        if not self.lost:
            self._deadline = max(self._deadline, asked_at + self._ttl_s * JUDGED_LOST_AT)
