"""The connection to one of etcd's endpoints, and the way to the next when it fails.

One task owns the connection: it proves an endpoint (an etcd, of the same cluster as before, that has a leader), hands
it to the calls, asks it every PING_S whether it still answers, and leaves it when it does not, or when a call found out
first. Leaving ends the streams of the connection, which their owners open again on the next; calls under way have one
more `attempt_s` to be answered.

A request that was sent and not answered may have been applied. Only requests that may be applied twice are sent again.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import grpc
import grpc.aio
import structlog

from magnetar.etcd import etcd_pb2 as pb
from magnetar.metadata.etcd_codec import Answer, BadAnswer, StoreIdentity, parse
from magnetar.metadata.etcd_endpoints import EndpointChoice
from magnetar.metadata.store import LeaseExpired, MetadataError, MetadataUnavailable

RECEIVE_BYTES_MAX = 16 << 20
"""A pair, a page or a fragment of a watch is at most about 2 MiB, unless pairs grow from one page to the next."""
SEND_BYTES_MAX = 4 << 20
REASON_CHARS_MAX = 200
CALL_S_MIN = 0.001

CHANNEL_OPTIONS: tuple[tuple[str, int], ...] = (
    ("grpc.max_receive_message_length", RECEIVE_BYTES_MAX),
    ("grpc.max_send_message_length", SEND_BYTES_MAX),
    # etcd closes connections that ping more often than every 5 s.
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.http2.max_pings_without_data", 0),
    # Whether a request may be sent again is decided here.
    ("grpc.enable_retries", 0),
    ("grpc.service_config_disable_resolution", 1),
    ("grpc.enable_http_proxy", 0),
    # A connection that was left is not shared with the one that follows it.
    ("grpc.use_local_subchannel_pool", 1),
)
METADATA = (("hasleader", "true"),)
"""A member that has lost its leader refuses calls and ends streams, instead of being silent."""

log = structlog.get_logger(__name__)
AnswerT = TypeVar("AnswerT", bound=Answer)


@dataclass(frozen=True, slots=True)
class Method(Generic[AnswerT]):
    path: str
    from_bytes: Callable[[bytes], AnswerT]


RANGE = Method("/etcdserverpb.KV/Range", pb.RangeResponse.FromString)
TXN = Method("/etcdserverpb.KV/Txn", pb.TxnResponse.FromString)
WATCH = Method("/etcdserverpb.Watch/Watch", pb.WatchResponse.FromString)
LEASE_GRANT = Method("/etcdserverpb.Lease/LeaseGrant", pb.LeaseGrantResponse.FromString)
LEASE_REVOKE = Method("/etcdserverpb.Lease/LeaseRevoke", pb.LeaseRevokeResponse.FromString)
LEASE_KEEP_ALIVE = Method("/etcdserverpb.Lease/LeaseKeepAlive", pb.LeaseKeepAliveResponse.FromString)
STATUS = Method("/etcdserverpb.Maintenance/Status", pb.StatusResponse.FromString)

LINEARIZABLE: frozenset[str] = frozenset({RANGE.path, TXN.path})
LEASE_NOT_FOUND = "lease not found"
REFUSALS = (
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.UNAUTHENTICATED,
    grpc.StatusCode.PERMISSION_DENIED,
)


@dataclass(frozen=True, slots=True)
class Times:
    """How long to wait, in seconds."""

    attempt_s: float = 2.0
    """For one endpoint to answer what can be asked again elsewhere."""
    call_s: float = 5.0
    """For a connection, and then for an answer; of what can be asked again, for both."""
    ping_s: float = 2.0
    """Between two questions to the endpoint whether it is still there."""


class Unanswered(Exception):
    """The endpoint did not answer; the message says how. `definite`: it will not, however long one waits."""

    def __init__(self, reason: str, code: grpc.StatusCode | None = None, *, definite: bool = False) -> None:
        super().__init__(reason)
        self.code = code
        self.definite = definite


class NoMetadataStore(MetadataError):
    """What answers at the endpoints is something else, and waiting will not change that."""


class Compacted(MetadataError):
    """The revision that was asked for is no longer kept."""


class Exhausted(MetadataUnavailable):
    """The answer was larger than what is received, or etcd has no room or time for the request."""


def unanswered(error: grpc.aio.AioRpcError) -> Unanswered:
    code = error.code()
    details = " ".join((error.details() or code.name.lower()).split())[:REASON_CHARS_MAX]
    if code is grpc.StatusCode.DEADLINE_EXCEEDED:
        return Unanswered("no answer in time", code)
    if code is grpc.StatusCode.UNIMPLEMENTED:
        return Unanswered(f"it is not an etcd: {details}", code, definite=True)
    if "http1.x" in details:
        return Unanswered("it is not an etcd, but speaks HTTP/1", code, definite=True)
    if "Failed parsing HTTP/2" in details:
        return Unanswered("it is not an etcd: it speaks another protocol than gRPC", code, definite=True)
    if "Connection refused" in details:
        return Unanswered("nothing listens there", code)
    return Unanswered(details, code)


def remedy_of(refusal: Unanswered) -> str:
    wants_credentials = refusal.code is not grpc.StatusCode.INVALID_ARGUMENT or "user name" in str(refusal)
    return "Magnetar sends no credentials, so etcd must not ask for any: " if wants_credentials else ""


class Stream(Generic[AnswerT]):
    """A stream of requests and answers on a connection. One task at a time may use it."""

    def __init__(self, connection: Connection, method: Method[AnswerT], call: Any) -> None:
        self._connection = connection
        self._method = method
        self._call = call

    async def send(self, request: Any) -> None:
        """Raises Unanswered when the stream has ended."""
        cancels = _cancels()
        try:
            await self._call.write(request.SerializeToString())
        except grpc.aio.AioRpcError as error:
            raise unanswered(error) from error
        except asyncio.InvalidStateError:
            await self.receive()  # raises what ended it
        except asyncio.CancelledError as error:
            raise _left_or(error, cancels) from None

    async def receive(self) -> AnswerT:
        """Raises Unanswered when the stream has ended, BadAnswer."""
        cancels = _cancels()
        try:
            data = await self._call.read()
        except grpc.aio.AioRpcError as error:
            raise unanswered(error) from error
        except asyncio.CancelledError as error:
            raise _left_or(error, cancels) from None
        if data is grpc.aio.EOF:
            raise Unanswered("it ended the stream")
        answer = parse(data, self._method.from_bytes)
        self._connection.identity.check(answer.header)
        return answer

    def close(self) -> None:
        self._call.cancel()
        self._connection.forget(self)


def _cancels() -> int:
    """How often the current task was asked to end."""
    task = asyncio.current_task()
    return 0 if task is None else task.cancelling()


def _left_or(cancelled: asyncio.CancelledError, cancels_before: int) -> BaseException:
    """A call that was closed raises CancelledError as if its task had been cancelled: tells the one from the other."""
    return cancelled if _cancels() > cancels_before else Unanswered("its connection was left")


class Connection:
    """A channel to one endpoint, until it is left."""

    def __init__(self, index: int, endpoint: str, identity: StoreIdentity) -> None:
        self.index = index
        self.endpoint = endpoint
        self.identity = identity
        self.left = asyncio.Event()
        self._channel = grpc.aio.insecure_channel(endpoint, options=CHANNEL_OPTIONS)
        self._streams: set[Stream[Any]] = set()
        self._calls: set[Any] = set()

    async def ask(self, method: Method[AnswerT], request: Any, timeout_s: float) -> AnswerT:
        """Raises Unanswered, BadAnswer."""
        call = self._channel.unary_unary(method.path)
        cancels = _cancels()
        try:
            data: bytes = await call(request.SerializeToString(), timeout=timeout_s, metadata=METADATA)
        except grpc.aio.AioRpcError as error:
            raise unanswered(error) from error
        except grpc.aio.UsageError as error:
            raise Unanswered("its connection was left") from error
        except asyncio.CancelledError as error:
            raise _left_or(error, cancels) from None
        answer = parse(data, method.from_bytes)
        self.identity.check(answer.header)
        return answer

    def stream(self, method: Method[AnswerT]) -> Stream[AnswerT]:
        """Raises Unanswered if the connection has been left."""
        try:
            call = self._channel.stream_stream(method.path)(metadata=METADATA)
        except grpc.aio.UsageError as error:
            raise Unanswered("its connection was left") from error
        self._calls.add(call)
        call.add_done_callback(self._calls.discard)
        stream = Stream(self, method, call)
        self._streams.add(stream)
        return stream

    def forget(self, stream: Stream[Any]) -> None:
        self._streams.discard(stream)

    def leave(self, grace_s: float) -> asyncio.Task[None]:
        """Ends the streams now, and the calls under way when they are answered, or after `grace_s`."""
        self.left.set()
        for stream in list(self._streams):
            stream.close()
        return asyncio.create_task(self._close(grace_s), name=f"metadata-close {self.endpoint}")

    async def _close(self, grace_s: float) -> None:
        await self._channel.close(grace_s)
        # gRPC tells the ends of calls to the loop that began them, and must find it running.
        await asyncio.gather(*(call.code() for call in self._calls))


class EtcdChannel:
    """Asks whichever endpoint serves."""

    def __init__(
        self, endpoints: tuple[str, ...], times: Times, *, rng: random.Random, clock: Callable[[], float]
    ) -> None:
        self.times = times
        self.clock = clock
        self.rng = rng
        self._identity = StoreIdentity()
        self._choice = EndpointChoice(endpoints, rng)
        self._reasons: dict[int, Unanswered] = {}
        self._connection: Connection | None = None
        self._changed = asyncio.Event()
        self._closing: set[asyncio.Task[None]] = set()
        self._closed = False
        self._keeper = asyncio.create_task(self._run(), name="metadata-connection")

    # Calls.

    async def connected(self, timeout_s: float | None) -> Connection:
        """The connection, when there is one. Raises MetadataUnavailable, and MetadataError after `close`."""
        try:
            async with asyncio.timeout(timeout_s):
                while True:
                    self.check_open()
                    if self._connection is not None:
                        return self._connection
                    await self._changed.wait()
        except TimeoutError:
            raise MetadataUnavailable(self.explain()) from None

    async def ask(self, method: Method[AnswerT], request: Any, *, repeatable: bool) -> AnswerT:
        """Sends the request and returns the answer. See `ask_timed`."""
        return (await self.ask_timed(method, request, repeatable=repeatable))[0]

    async def ask_timed(self, method: Method[AnswerT], request: Any, *, repeatable: bool) -> tuple[AnswerT, float]:
        """Returns the answer, and when the request that it answers was sent.

        A `repeatable` request may be applied twice: it is sent again, elsewhere if possible, while there is time.
        Raises MetadataUnavailable when the outcome is unknown, LeaseExpired, MetadataError for what etcd refuses.
        """
        deadline = self.clock() + self.times.call_s
        while True:
            connection = await self.connected(deadline - self.clock())
            sent_at, asked_at = self.clock(), self._identity.revision
            timeout_s = min(self.times.attempt_s, deadline - sent_at) if repeatable else self.times.call_s
            try:
                answer = await connection.ask(method, request, max(CALL_S_MIN, timeout_s))
                if method.path in LINEARIZABLE:
                    self._identity.check_revision(answer.header, asked_at)
                return answer, sent_at
            except BadAnswer as error:
                self.leave(connection, str(error))
                raise _unavailable(connection, error) from error
            except Unanswered as error:
                self._judge(connection, error)
                if not repeatable or self.clock() >= deadline:
                    raise _unavailable(connection, error) from error

    def _judge(self, connection: Connection, error: Unanswered) -> None:
        """Raises what etcd says for sure. Otherwise leaves the endpoint: nothing is known of the request."""
        reason = f"endpoint=`{connection.endpoint}` reason=`{error}`"
        if self._closed:
            raise MetadataUnavailable("the metadata store was closed before it answered") from error
        if error.code is grpc.StatusCode.NOT_FOUND and LEASE_NOT_FOUND in str(error):
            raise LeaseExpired(f"no such lease: {reason}") from error
        if error.code is grpc.StatusCode.OUT_OF_RANGE:
            raise Compacted(f"the revision is no longer kept: {reason}") from error
        if error.code is grpc.StatusCode.RESOURCE_EXHAUSTED:
            raise Exhausted(f"the metadata store has no room for the request or its answer: {reason}") from error
        if error.code in REFUSALS:
            raise MetadataError(f"etcd refuses the request: {remedy_of(error)}{reason}") from error
        self.leave(connection, str(error))

    def leave(self, connection: Connection, reason: str) -> None:
        """Goes on to the next endpoint; nothing happens if it has been left already."""
        if connection is not self._connection:
            return
        log.warning("leaving a metadata endpoint", endpoint=connection.endpoint, reason=reason)
        self._connection = None
        self._changed.clear()
        self._reasons[connection.index] = Unanswered(reason)
        self._choice.failed(connection.index, self.clock())
        self._close_connection(connection, self.times.attempt_s)

    def check_open(self) -> None:
        if self._closed:
            raise MetadataError("the metadata store is closed")

    @property
    def closed(self) -> bool:
        return self._closed

    def explain(self) -> str:
        """Why there is no connection, in one line with a remedy."""
        reasons = [str(self._reasons.get(i, "no answer yet")) for i in range(len(self._choice.endpoints))]
        each = "; ".join(f"{e}: {reason}" for e, reason in zip(self._choice.endpoints, reasons, strict=True))
        tried = f"endpoints=`{each}`"
        if self.hopeless():
            return f"what answers there is no metadata store to use: check that these are its client addresses: {tried}"
        return (
            "the metadata store does not answer: check that it runs, that these are its client addresses and that this "
            f"machine can reach them: {tried}"
        )

    def hopeless(self) -> bool:
        """Every endpoint was tried, and waiting will not change what came of it."""
        tried = [self._reasons.get(i) for i in range(len(self._choice.endpoints))]
        return self._connection is None and all(reason is not None and reason.definite for reason in tried)

    async def close(self) -> None:
        """Ends the streams; requests under way have no answer."""
        self._closed = True
        self._keeper.cancel()
        await asyncio.gather(self._keeper, return_exceptions=True)
        if self._connection is not None:
            self._close_connection(self._connection, 0.0)
            self._connection = None
        self._changed.set()
        await asyncio.gather(*self._closing)

    # The task that owns the connection.

    async def _run(self) -> None:
        while True:
            connection = await self._connect()
            self._reasons.clear()
            self._choice.serves(connection.index, self.clock())
            self._connection = connection
            self._changed.set()
            log.info("a metadata endpoint serves", endpoint=connection.endpoint)
            while not connection.left.is_set():
                await self._check(connection)

    async def _connect(self) -> Connection:
        """Tries the endpoints until one is proven to serve."""
        while True:
            index, wait_s = self._choice.next(self.clock())
            await asyncio.sleep(wait_s)
            connection = Connection(index, self._choice.endpoints[index], self._identity)
            try:
                await self._prove(connection)
                return connection
            except Unanswered as error:
                self._reasons[index] = error
                self._choice.failed(index, self.clock())
                self._close_connection(connection, 0.0)
            except asyncio.CancelledError:
                self._close_connection(connection, 0.0)
                raise

    async def _check(self, connection: Connection) -> None:
        """Waits PING_S, then leaves the endpoint unless it still answers."""
        try:
            async with asyncio.timeout(self.times.ping_s):
                await connection.left.wait()
        except TimeoutError:
            try:
                await self._prove(connection)
            except Unanswered as error:
                self.leave(connection, str(error))

    async def _prove(self, connection: Connection) -> None:
        """Raises Unanswered unless the endpoint can be asked."""
        try:
            status = await connection.ask(STATUS, pb.StatusRequest(), self.times.attempt_s)
        except BadAnswer as error:
            raise Unanswered(str(error), definite=True) from error
        if not status.leader:
            raise Unanswered("it has no leader: a majority of its cluster must run and reach each other")
        if status.is_learner:
            raise Unanswered("it is a learner, which answers no reads: name voting members", definite=True)

    def _close_connection(self, connection: Connection, grace_s: float) -> None:
        closing = connection.leave(grace_s)
        self._closing.add(closing)
        closing.add_done_callback(self._closing.discard)


def _unavailable(connection: Connection, reason: Exception) -> MetadataUnavailable:
    return MetadataUnavailable(
        f"the metadata store gave no answer, so what was asked may have been done or not: "
        f"endpoint=`{connection.endpoint}` reason=`{reason}`"
    )
