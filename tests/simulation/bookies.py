"""The boundary between brokers and bookies: see `ledger.bookie_rpc`. The far end is the real `BookieHandlers`.

Three streams to a bookie, as in `ledger.grpc_bookie`: adds, reads, queries of the LAC; each keeps its order. A stream
that breaks leaves what was sent without an answer; the next call opens another one. Now and then a call arrives a
second time, later, and nobody waits for its answer.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from simulation.boundaries import Boundaries
from simulation.loop import Process
from simulation.network import Circuit, Network

from magnetar.bookie.handlers import BookieHandlers
from magnetar.ledger.bookie_rpc import (
    AddGroup,
    AddResult,
    AddStatus,
    EntryAnswer,
    EntryOutcome,
    LacQuery,
    LacResult,
    ReadGroup,
    ReadResult,
)
from magnetar.ledger.deadlines import Deadlines

CALL_TIMEOUT_S = 5.0
AGAIN_S_MAX = 8.0
"""How late a call may arrive a second time."""


class Reachable:
    """The bookies that run, by id: where calls arrive."""

    def __init__(self) -> None:
        self.handlers: dict[str, tuple[Process, BookieHandlers]] = {}
        self.again_chance = 0.0
        """That a call arrives twice."""
        self.boundaries: Boundaries | None = None


class SimulatedBookie:
    """See `bookie_rpc.BookieRpc`."""

    def __init__(self, network: Network, process: Process, bookie_id: str, reachable: Reachable) -> None:
        self._bookie_id = bookie_id
        self._adds = _Lane(network, process, bookie_id, reachable, "add", _no_add)
        self._reads = _Lane(network, process, bookie_id, reachable, "read", _no_read)
        self._lacs = _Lane(network, process, bookie_id, reachable, "read_lac", _no_lac)

    @property
    def bookie_id(self) -> str:
        return self._bookie_id

    def add(self, group: AddGroup) -> asyncio.Future[AddResult]:
        return self._adds.call(group)

    def read(self, group: ReadGroup) -> asyncio.Future[ReadResult]:
        return self._reads.call(group)

    def read_lac(self, query: LacQuery) -> asyncio.Future[LacResult]:
        return self._lacs.call(query)

    def close(self) -> None:
        for lane in (self._adds, self._reads, self._lacs):
            lane.close()


class _Lane:
    """One stream, and the calls that wait for an answer on it."""

    def __init__(
        self,
        network: Network,
        process: Process,
        bookie_id: str,
        reachable: Reachable,
        method: str,
        lost: Callable[[str], Any],
    ) -> None:
        self._network = network
        self._process = process
        self._bookie_id = bookie_id
        self._reachable = reachable
        self._method = method
        self._lost_result = lost
        self._circuit: Circuit | None = None
        self._handlers: BookieHandlers | None = None
        self._waiting: dict[int, asyncio.Future[Any]] = {}
        self._next = 1
        self._closed = False
        self._deadlines = Deadlines(CALL_TIMEOUT_S)

    def call(self, item: Any) -> asyncio.Future[Any]:
        loop = self._network.loop
        future = loop.create_future()
        found = self._reachable.handlers.get(self._bookie_id)
        if self._circuit is None and (self._closed or found is None or not found[0].alive):
            delay_s = self._network.delay_s(self._process.name, self._bookie_id)
            loop.call_later(delay_s, self._complete, future, "connection refused")
            return future
        number = self._next
        self._next += 1
        self._waiting[number] = future
        circuit = self._connected()
        if self._reachable.boundaries is not None:
            self._reachable.boundaries.sent(item)
        circuit.to_answerer(self._serve, circuit, number, item)
        if self._reachable.again_chance and self._network.rng.random() < self._reachable.again_chance:
            circuit.to_answerer(self._serve_again, item)
        return self._deadlines.watch(future, lambda: self._lost_result("bookie did not answer in time"))

    def close(self) -> None:
        self._closed = True
        self._deadlines.close()
        if self._circuit is not None:
            self._circuit.hang_up(0)
        self._lost()

    def _connected(self) -> Circuit:
        if self._circuit is None:
            process, self._handlers = self._reachable.handlers[self._bookie_id]
            self._circuit = self._network.connect(self._process, process, self._lost, lambda: None)
        return self._circuit

    def _lost(self) -> None:
        self._circuit = None
        waiting, self._waiting = self._waiting, {}
        for future in waiting.values():
            self._complete(future, "connection lost")

    def _complete(self, future: asyncio.Future[Any], message: str) -> None:
        if not future.done():
            future.set_result(self._lost_result(message))

    def _answered(self, number: int, result: Any) -> None:
        future = self._waiting.pop(number, None)
        if future is not None and not future.done():
            future.set_result(result)

    # At the bookie.

    def _serve(self, circuit: Circuit, number: int, item: Any) -> None:
        first = item.entries[0][:48] if self._method == "add" else (item.ledger_id, item.fence)
        self._network.transcript.note(self._process.name, self._bookie_id, self._method, number, first)
        done = getattr(self._handlers, self._method)(item)
        done.add_done_callback(lambda done: self._answer(circuit, number, item, done.result()))

    def _answer(self, circuit: Circuit, number: int, item: Any, result: Any) -> None:
        if self._reachable.boundaries is not None:
            self._reachable.boundaries.answered(self._bookie_id, item, result)
        circuit.to_opener(self._answered, number, result)

    def _serve_again(self, item: Any) -> None:
        late_s = self._network.rng.random() * AGAIN_S_MAX
        self._network.loop.call_later(late_s, getattr(self._handlers, self._method), item)


def _no_add(message: str) -> AddResult:
    return AddResult(AddStatus.NO_ANSWER, message)


def _no_read(message: str) -> ReadResult:
    return ReadResult((EntryAnswer(EntryOutcome.UNKNOWN),), message)


def _no_lac(message: str) -> LacResult:
    return LacResult(EntryOutcome.UNKNOWN, message=message)
