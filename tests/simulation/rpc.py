"""The boundary between clients and brokers: calls and streams of bytes, as gRPC gives them, over the simulated network.

At the broker the real dispatch of `node.rpc` runs (raw bytes in, errors translated), with a context that stands in for
gRPC's. At the client errors become the exceptions that the real `client.rpc` makes of them.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import Any

import grpc
import grpc.aio
from simulation.loop import Process
from simulation.network import Circuit, Network
from simulation.openings import Openings

from magnetar.client.refusal import unavailable
from magnetar.client.rpc import refused_by
from magnetar.node.rpc import Server, Service, generic_handler

PRODUCE = "/Produce"
WINDOW_BYTES = 256 << 10
"""Written and not yet read by the other side: beyond it a writer waits."""


class Listeners:
    """Who listens at which address."""

    def __init__(self) -> None:
        self.at: dict[str, SimulatedServer] = {}
        self.called: Callable[[str, str, bytes], None] = lambda address, method, request: None
        """Hears of each call from broker to broker."""
        self.openings: Openings | None = None


class SimulatedServer:
    """See `node.rpc.Server`."""

    def __init__(
        self, network: Network, listeners: Listeners, address: str, process: Process, services: Sequence[Service]
    ) -> None:
        self.process = process
        self._transcript = network.transcript
        self.calls: dict[ServedCall, None] = {}
        self._listeners = listeners
        self._address = address
        self._handlers = [generic_handler(service) for service in services]
        listeners.at[address] = self

    @property
    def port(self) -> int:
        return int(self._address.rpartition(":")[2])

    def arrived(self, call: ServedCall, peer: str, method: str, frame: bytes) -> None:
        self._transcript.note(self.process.name, "<-", peer, method[-7:], len(frame))
        if self._listeners.openings is not None and method.endswith(PRODUCE):
            self._listeners.openings.asked(call, self.process.name, frame)

    def sends(self, call: ServedCall, method: str, frame: bytes) -> None:
        if self._listeners.openings is not None and method.endswith(PRODUCE):
            self._listeners.openings.answered(call, self.process.name, frame)

    def handler(self, method: str) -> Any:
        details = _Details(method)
        return next((found for handler in self._handlers if (found := handler.service(details)) is not None), None)

    async def stop(self, grace_s: float) -> None:
        if self._listeners.at.get(self._address) is self:
            del self._listeners.at[self._address]
        tasks = {call.task for call in self.calls if call.task is not None}
        if tasks:
            _, late = await asyncio.wait(tasks, timeout=grace_s)
            for task in late:
                task.cancel()
            await asyncio.gather(*late, return_exceptions=True)


class _Details:
    def __init__(self, method: str) -> None:
        self.method = method
        self.invocation_metadata = ()


class Mailbox:
    """Frames that have arrived and were not yet read, and the end of them."""

    def __init__(self) -> None:
        self._frames: deque[bytes] = deque()
        self._end: Any = None
        self._reader: asyncio.Future[None] | None = None

    def put(self, frame: bytes) -> None:
        self._frames.append(frame)
        self._wake()

    def end(self, how: Any) -> None:
        """After what is there the reader gets `how`: None is the ordinary end, an exception is raised."""
        if self._end is None:
            self._end = (how,)
            self._wake()

    async def get(self) -> bytes | None:
        while not self._frames:
            if self._end is not None:
                (how,) = self._end
                if how is not None:
                    raise how
                return None
            self._reader = asyncio.get_running_loop().create_future()
            await self._reader
        return self._frames.popleft()

    def _wake(self) -> None:
        if self._reader is not None and not self._reader.done():
            self._reader.set_result(None)


class Window:
    """How much a writer has written that was not yet read."""

    def __init__(self) -> None:
        self._bytes = 0
        self._over = False
        self._writer: asyncio.Future[None] | None = None

    async def take(self, size: int) -> None:
        self._bytes += size
        while self._bytes > WINDOW_BYTES and not self._over:
            self._writer = asyncio.get_running_loop().create_future()
            await self._writer

    def give(self, size: int) -> None:
        self._bytes -= size
        self._wake()

    def close(self) -> None:
        """Nobody waits any more."""
        self._over = True
        self._wake()

    def _wake(self) -> None:
        if self._writer is not None and not self._writer.done():
            self._writer.set_result(None)


class ServedCall:
    """One call at the broker: stands in for grpc.aio's servicer context."""

    def __init__(self, server: SimulatedServer, method: str, peer: str) -> None:
        self.circuit: Circuit | None = None
        self.task: asyncio.Task[Any] | None = None
        self._server = server
        self._method = method
        self._peer = peer
        self._inbox = Mailbox()
        self._window = Window()
        self._status: tuple[grpc.StatusCode, str, Any] | None = None
        self._gone = False
        self._client: ClientCall

    # As grpc.aio.ServicerContext.

    def peer(self) -> str:
        return self._peer

    def done(self) -> bool:
        return self._gone or (self.task is not None and self.task.done())

    def cancelled(self) -> bool:
        return self._gone

    async def read(self) -> Any:
        frame = await self._inbox.get()
        if frame is None:
            return grpc.aio.EOF
        if self.circuit is not None:
            self.circuit.to_opener(self._client.window.give, len(frame))
        return frame

    async def write(self, frame: bytes) -> None:
        if self._gone or self.circuit is None:
            raise asyncio.InvalidStateError("the call is over")
        self._server.sends(self, self._method, frame)
        self.circuit.to_opener(self._client.receive, frame)
        await self._window.take(len(frame))

    async def abort(self, code: grpc.StatusCode, details: str = "", trailing_metadata: Any = ()) -> None:
        self._status = (code, details, trailing_metadata)
        raise grpc.aio.AbortError("aborted")

    # Called by the network.

    def begin(self, client: ClientCall, request: bytes | None) -> None:
        """The call has arrived. A dead or unknown place is found out here, too."""
        self._client = client
        handler = self._server.handler(self._method)
        if handler is None:
            self._finish((grpc.StatusCode.UNIMPLEMENTED, "no such method", ()), None)
            return
        one_request = handler.unary_unary or handler.unary_stream
        work = handler.stream_stream(None, self) if request is None else one_request(request, self)
        self._server.calls[self] = None
        self.task = asyncio.get_running_loop().create_task(work, name=f"{self._method} {self._peer}")
        self.task.add_done_callback(self._done)

    def receive(self, frame: bytes) -> None:
        self._server.arrived(self, self._peer, self._method, frame)
        self._inbox.put(frame)

    def give(self, size: int) -> None:
        self._window.give(size)

    def lost(self) -> None:
        self._gone = True
        self._window.close()
        self._inbox.end(asyncio.InvalidStateError("the call is over"))
        if self.task is not None:
            self.task.cancel()

    def _done(self, task: asyncio.Task[Any]) -> None:
        self._server.calls.pop(self, None)
        if task.cancelled():
            self._finish((grpc.StatusCode.CANCELLED, "cancelled", ()), None)
        elif self._status is not None:
            task.exception()
            self._finish(self._status, None)
        elif (error := task.exception()) is not None:
            self._finish((grpc.StatusCode.UNKNOWN, repr(error), ()), None)
        else:
            self._finish(None, task.result())

    def _finish(self, status: Any, answer: bytes | None) -> None:
        if self.circuit is not None:
            self.circuit.to_opener(self._client.finished, status, answer)
            self.circuit.hang_up(1)


class ClientCall:
    """One call at the client: see `client.rpc.RpcStream`."""

    def __init__(
        self,
        network: Network,
        process: Process,
        listeners: Listeners,
        address: str,
        method: str,
        translate: Callable[[grpc.aio.AioRpcError], Exception],
    ) -> None:
        self.window = Window()
        self._translate = translate
        self._address = address
        self._inbox = Mailbox()
        self._broken: Exception | None = None
        self._answer: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
        self._network = network
        self._process = process
        self._server = listeners.at.get(address)
        self._method = method
        self._circuit: Circuit | None = None
        self._served: ServedCall | None = None

    def open(self, request: bytes | None) -> None:
        """`request` of a call with one answer; None opens a stream."""
        server = self._server
        if server is None or not server.process.alive:
            delay_s = self._network.delay_s(self._process.name, self._address)
            self._network.loop.call_later(delay_s, self._refuse_connection)
            return
        self._served = served = ServedCall(server, self._method, self._process.name)
        self._circuit = self._network.connect(self._process, server.process, self._lost, served.lost)
        served.circuit = self._circuit
        self._circuit.to_answerer(served.begin, self, request)

    async def answer(self, timeout_s: float) -> bytes:
        try:
            async with asyncio.timeout(timeout_s):
                return await self._answer
        except TimeoutError:
            raise self._translate(_error(grpc.StatusCode.DEADLINE_EXCEEDED, "too late")) from None
        finally:
            self._hang_up()

    async def write(self, frame: bytes) -> None:
        if self._broken is not None:
            raise self._broken
        if self._circuit is not None and self._served is not None:
            self._circuit.to_answerer(self._served.receive, frame)
        await self.window.take(len(frame))
        if self._broken is not None:
            raise self._broken

    async def read(self) -> bytes | None:
        frame = await self._inbox.get()
        if frame is not None and self._circuit is not None and self._served is not None:
            self._circuit.to_answerer(self._served.give, len(frame))
        return frame

    async def close(self) -> None:
        self._break(unavailable(f"the connection was cut off: broker=`{self._address}`"))
        self._hang_up()

    # Called by the network.

    def receive(self, frame: bytes) -> None:
        self._network.transcript.note(self._process.name, "<-", self._address, self._method[-7:], len(frame))
        self._inbox.put(frame)

    def finished(self, status: Any, answer: bytes | None) -> None:
        if status is not None:
            self._break(self._translate(_error(*status)))
            return
        if not self._answer.done():
            self._answer.set_result(answer or b"")
        self._inbox.end(None)
        self.window.close()

    def _lost(self) -> None:
        self._break(self._translate(_error(grpc.StatusCode.UNAVAILABLE, "connection lost")))

    def _refuse_connection(self) -> None:
        self._break(self._translate(_error(grpc.StatusCode.UNAVAILABLE, "connection refused")))

    def _break(self, refused: Exception) -> None:
        if self._broken is None:
            self._broken = refused
            self._inbox.end(refused)
            self.window.close()
            if not self._answer.done():
                self._answer.set_exception(refused)
                self._answer.exception()

    def _hang_up(self) -> None:
        if self._circuit is not None:
            self._circuit.hang_up(0)


class SimulatedRpc:
    """See `client.rpc.BrokerRpc`: how one process reaches brokers."""

    def __init__(self, network: Network, process: Process, listeners: Listeners) -> None:
        self._network = network
        self._process = process
        self._listeners = listeners

    async def call(self, address: str, method: str, request: bytes, timeout_s: float) -> bytes:
        call = self._call(address, method)
        call.open(request)
        return await call.answer(timeout_s)

    def stream(self, address: str, method: str) -> ClientCall:
        call = self._call(address, method)
        call.open(None)
        return call

    def answers(self, address: str, method: str, request: bytes) -> ClientCall:
        call = self._call(address, method)
        call.open(request)
        return call

    async def close(self) -> None:
        """Calls end by themselves."""

    def _call(self, address: str, method: str) -> ClientCall:
        self._network.transcript.note(self._process.name, "calls", address, method)
        translate = partial(refused_by, address)
        return ClientCall(self._network, self._process, self._listeners, address, method, translate)


class SimulatedChannel:
    """What brokers use of grpc.aio.Channel to call each other."""

    def __init__(self, network: Network, process: Process, listeners: Listeners, address: str) -> None:
        self._network = network
        self._process = process
        self._listeners = listeners
        self._address = address

    def unary_unary(self, method: str) -> Callable[..., Awaitable[bytes]]:
        async def call(request: bytes, timeout: float) -> bytes:
            self._network.transcript.note(self._process.name, "calls", self._address, method)
            self._listeners.called(self._address, method, request)
            call = ClientCall(
                self._network, self._process, self._listeners, self._address, method, translate=lambda error: error
            )
            call.open(request)
            return await call.answer(timeout)

        return call

    async def close(self, grace: float | None = None) -> None:
        """Calls end by themselves."""


def server_at(network: Network, listeners: Listeners, process: Process) -> Any:
    """What a broker of this process listens with; see `node.rpc.Serve`."""

    async def serve(services: Sequence[Service], listen: str) -> Server:
        return SimulatedServer(network, listeners, listen, process, services)

    return serve


def _error(code: grpc.StatusCode, details: str, trailing: Any = ()) -> grpc.aio.AioRpcError:
    metadata = grpc.aio.Metadata(*trailing)
    return grpc.aio.AioRpcError(code, grpc.aio.Metadata(), metadata, details=details)
