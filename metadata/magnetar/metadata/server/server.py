"""`magnetar metadata`: the etcd v3 API over one SQLite database. Not replicated.

An answer follows the sync of what it tells. Requests that wait together share one sync (`sqlite_engine`). Leases have
their full time again after a restart, and after the process stood still. History is compacted by itself (`retention`).
What of the API is not here is UNIMPLEMENTED: members, users, roles, snapshots, hashes, defragmentation.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Awaitable, Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

import structlog
from google.protobuf.message import Message
from prometheus_client import CollectorRegistry

from magnetar.etcd import etcd_pb2 as pb
from magnetar.metadata.server import checks
from magnetar.metadata.server.evaluation import run_compact, run_delete, run_put, run_range, run_txn
from magnetar.metadata.server.metrics import ServerMetrics
from magnetar.metadata.server.refusals import Reason, Refusal
from magnetar.metadata.server.retention import Retention
from magnetar.metadata.server.watch_stream import WatchStream
from magnetar.metadata.server.watches import Watches, cut_page
from magnetar.metadata.sqlite_engine import DiskFull, SqliteEngine
from magnetar.metadata.sqlite_tables import Revision, Tables
from magnetar.metadata.store import LeaseExpired, MetadataError, MetadataUnavailable
from magnetar.node.rpc import Context, RunningServer, ServerStream, Service, check_free, parse, serve

DATABASE_NAME = "metadata.sqlite"
API_VERSION = "3.5.0"
"""The version of etcd's API that is spoken, as its clients ask for it."""
MEMBER_NAME = "magnetar"
LEASE_TTL_S_MIN = 1
LEASE_TTL_S_MAX = 9_000_000_000
LEASES_MAX = 100_000
STREAMS_MAX = 4096
"""Streams of watches and of keep-alives, each."""
PROGRESS_EVERY_S = 600.0
HOUSEKEEPING_EVERY_S = 5.0
RECEIVED_BYTES_MAX = checks.REQUEST_BYTES_MAX + (512 << 10)
_OPTIONS = {"grpc.max_receive_message_length": RECEIVED_BYTES_MAX, "grpc.max_send_message_length": -1}

log = structlog.get_logger("magnetar.metadata")
T = TypeVar("T")
MessageT = TypeVar("MessageT", bound=Message)


class MetadataServer:
    """Made by `open`. Serves from then on, until `stop`."""

    port: int
    address: str

    def __init__(
        self, watches: Watches, engine: SqliteEngine, registry: CollectorRegistry, retention: Retention
    ) -> None:
        self._watches = watches
        self._engine = engine
        self._retention = retention
        self._streams: set[WatchStream] = set()
        self._stream_counts = {"watch": 0, "keep_alive": 0}
        self._problem = ""
        self._server: RunningServer | None = None
        self._housekeeper: asyncio.Task[None] | None = None
        self._metrics = ServerMetrics(registry)
        self._metrics.watch(
            {
                ("revision", "Revision of the store"): lambda: watches.revision,
                ("compacted_revision", "Oldest revision that can be read"): lambda: watches.compacted,
                ("watches", "Open watches"): lambda: watches.total,
                ("leases", "Leases alive"): lambda: len(engine.leases),
            }
        )

    @classmethod
    async def open(
        cls,
        data_dir: Path,
        listen: str,
        registry: CollectorRegistry,
        *,
        advertised_address: str = "",
        clock: Callable[[], float] | None = None,
        retention: Retention | None = None,
    ) -> Self:
        """Opens or creates the database in `data_dir`, and serves it on `listen` (`host:port`, port 0: any free one).

        Raises MetadataError or rpc.ListenError, in one line, for what an operator has to change.
        """
        await asyncio.to_thread(check_free, listen)
        watches = Watches()
        try:
            await asyncio.to_thread(data_dir.mkdir, parents=True, exist_ok=True)
        except OSError as error:
            raise MetadataError(
                f"cannot make the data directory: choose another: data_dir=`{data_dir}` error=`{error.strerror}`"
            ) from error
        engine = await SqliteEngine.open(data_dir / DATABASE_NAME, watches, serving=True, clock=clock)
        watches.compacted = engine.opened.compacted
        server = cls(watches, engine, registry, retention or Retention())
        try:
            await server._start(listen, advertised_address)
        except BaseException:
            await engine.close()
            raise
        log.warning(
            "serving metadata from one database that is not replicated: back up data_dir, or use etcd",
            data_dir=str(data_dir), address=server.address, revision=watches.revision, leases=len(engine.leases),
        )  # fmt: skip
        return server

    async def stop(self, grace_s: float = 1.0) -> None:
        """Ends the streams, gives running calls `grace_s` seconds, and closes the database. Durable on return."""
        if self._housekeeper is not None:
            self._housekeeper.cancel()
        for stream in self._streams:
            stream.end()
        if self._server is not None:
            await self._server.stop(grace_s)
        await self._engine.close()

    def problems(self) -> list[str]:
        """Why it cannot serve; empty if it can. A broken database is repaired by starting the process again."""
        return [problem for problem in (self._engine.broken, self._problem) if problem]

    async def until_broken(self) -> str:
        """Returns why it will never serve again, when that comes about."""
        return await self._engine.until_broken()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.stop()

    async def _start(self, listen: str, advertised_address: str) -> None:
        await self._measure()
        self._server = await serve(self._services(), listen, options=_OPTIONS)
        self.port = self._server.port
        self.address = advertised_address or f"{listen.rpartition(':')[0]}:{self.port}"
        self._housekeeper = asyncio.create_task(self._keep_house(), name="metadata-housekeeping")

    def _services(self) -> list[Service]:
        unary: dict[str, Callable[[bytes], Awaitable[Message | bytes]]] = {
            "Range": self._range,
            "Put": self._put,
            "DeleteRange": self._delete_range,
            "Txn": self._txn,
            "Compact": self._compact,
            "LeaseGrant": self._lease_grant,
            "LeaseRevoke": self._lease_revoke,
            "LeaseTimeToLive": self._lease_time_to_live,
            "LeaseLeases": self._lease_leases,
            "MemberList": self._member_list,
            "Alarm": self._alarm,
            "Status": self._status,
        }
        methods: dict[str, Any] = {name: self._counted(name, answer) for name, answer in unary.items()}
        methods |= {"Watch": self._watch, "LeaseKeepAlive": self._lease_keep_alive}
        return [
            Service(service, {method.name: methods[method.name] for method in service.methods})
            for service in pb.DESCRIPTOR.services_by_name.values()
        ]

    def _counted(self, name: str, answer: Callable[[bytes], Awaitable[Message | bytes]]) -> Any:
        async def call(data: bytes, context: Context) -> bytes:
            with self._metrics.request(name):
                response = await answer(data)
                return response if isinstance(response, bytes) else response.SerializeToString()

        return call

    def _header(self, revision: int | None = None) -> pb.ResponseHeader:
        opened = self._engine.opened
        return pb.ResponseHeader(
            cluster_id=opened.cluster_id,
            member_id=opened.member_id,
            revision=self._watches.revision if revision is None else revision,
            raft_term=opened.term,
        )

    async def _ask(
        self, run: Callable[[Tables], T], *, writes: bool = False, on_commit: Callable[[T], None] | None = None
    ) -> T:
        """What `run` returns, once it is durable, or the refusal that tells why not."""
        try:
            return await self._engine.ask(run, writes=writes, on_commit=on_commit)
        except Refusal:
            raise
        except DiskFull:
            raise Refusal(Reason.NO_SPACE) from None
        except MetadataUnavailable:
            raise Refusal(Reason.DATABASE_FAILED if self._engine.broken else Reason.TOO_MANY_REQUESTS) from None
        except MetadataError:
            raise Refusal(Reason.STOPPED) from None

    # KV. Answers are serialized in the engine's thread: a large one does not hold up the event loop.

    async def _range(self, data: bytes) -> bytes:
        request = parse(pb.RangeRequest, data)
        checks.check_range(request)
        return await self._ask(lambda tables: self._filled(run_range(tables, request)))

    async def _put(self, data: bytes) -> bytes:
        request = parse(pb.PutRequest, data)
        checks.check_put(request)
        checks.check_size(data)
        return await self._ask(lambda tables: self._filled(run_put(tables, request)), writes=True)

    async def _delete_range(self, data: bytes) -> bytes:
        request = parse(pb.DeleteRangeRequest, data)
        checks.check_delete(request)
        checks.check_size(data)
        return await self._ask(lambda tables: self._filled(run_delete(tables, request)), writes=True)

    async def _txn(self, data: bytes) -> bytes:
        request = parse(pb.TxnRequest, data)
        checks.check_txn(request)
        writes = not checks.is_read_only(request)
        if writes:
            checks.check_size(data)
        return await self._ask(lambda tables: self._filled(run_txn(tables, request)), writes=writes)

    async def _compact(self, data: bytes) -> bytes:
        request = parse(pb.CompactionRequest, data)
        answer = await self._ask(
            lambda tables: self._filled(run_compact(tables, request)),
            writes=True,
            on_commit=lambda _: self._note_compaction(request.revision),
        )
        if request.physical:
            await self._sweep()
        return answer

    def _filled(self, response: Any) -> bytes:
        header = response.header
        opened = self._engine.opened
        header.cluster_id, header.member_id, header.raft_term = opened.cluster_id, opened.member_id, opened.term
        return bytes(response.SerializeToString())

    def _note_compaction(self, revision: int) -> None:
        self._watches.compacted = max(self._watches.compacted, revision)

    # Watch.

    async def _watch(self, stream: ServerStream) -> None:
        with self._counted_stream("watch"):
            watch_stream = WatchStream(stream, self._watches, self._read_page, self._header)
            self._streams.add(watch_stream)
            try:
                await watch_stream.run()
            finally:
                self._streams.discard(watch_stream)

    async def _read_page(self, first: int) -> list[Revision] | None:
        def read(tables: Tables) -> list[Revision] | None:
            if first < tables.compacted:
                return None
            with closing(tables.revisions(first)) as revisions:
                return cut_page(revisions)

        return await self._ask(read)

    # Lease.

    async def _lease_grant(self, data: bytes) -> Message:
        request = parse(pb.LeaseGrantRequest, data)
        if request.ttl > LEASE_TTL_S_MAX:
            raise Refusal(Reason.LEASE_TTL_TOO_LARGE)
        if len(self._engine.leases) >= LEASES_MAX:
            raise Refusal(Reason.TOO_MANY_REQUESTS)
        ttl_s = max(request.ttl, LEASE_TTL_S_MIN)
        lease_id = request.id or 1 + secrets.randbelow((1 << 63) - 1)

        def grant(tables: Tables) -> int:
            if lease_id in tables.leases:
                raise Refusal(Reason.LEASE_EXISTS)
            return tables.grant_lease(ttl_s, lease_id)

        await self._ask(grant, writes=True, on_commit=lambda granted: self._engine.add_lease(granted, ttl_s))
        return pb.LeaseGrantResponse(header=self._header(), id=lease_id, ttl=ttl_s)

    async def _lease_revoke(self, data: bytes) -> Message:
        request = parse(pb.LeaseRevokeRequest, data)
        if request.id not in self._engine.leases:
            raise Refusal(Reason.LEASE_NOT_FOUND)
        try:
            await self._engine.revoke_lease(request.id)
        except MetadataUnavailable:
            raise Refusal(Reason.DATABASE_FAILED) from None
        return pb.LeaseRevokeResponse(header=self._header())

    async def _lease_keep_alive(self, stream: ServerStream) -> None:
        with self._counted_stream("keep_alive"):
            while (data := await stream.read()) is not None:
                with self._metrics.request("LeaseKeepAlive"):
                    request = parse(pb.LeaseKeepAliveRequest, data)
                    # The header first: a revision at which the lease is gone must not be told with its renewal.
                    response = pb.LeaseKeepAliveResponse(header=self._header(), id=request.id)
                    try:
                        response.ttl = int(self._engine.keep_alive(request.id))
                    except LeaseExpired:
                        response.ttl = 0
                    except MetadataError:
                        raise Refusal(Reason.STOPPED) from None
                await stream.write(response.SerializeToString())

    async def _lease_time_to_live(self, data: bytes) -> Message:
        request = parse(pb.LeaseTimeToLiveRequest, data)
        keys = await self._ask(lambda tables: tables.keys_of_lease(request.id) if request.keys else [])
        remaining_s = self._engine.leases.remaining_s(request.id, self._engine.clock())
        if remaining_s is None:
            return pb.LeaseTimeToLiveResponse(header=self._header(), id=request.id, ttl=-1)
        granted_s = int(self._engine.leases.ttl_s(request.id))
        return pb.LeaseTimeToLiveResponse(
            header=self._header(), id=request.id, ttl=int(remaining_s), granted_ttl=granted_s, keys=keys
        )

    async def _lease_leases(self, data: bytes) -> Message:
        parse(pb.LeaseLeasesRequest, data)
        leases = (pb.LeaseStatus(id=lease_id) for lease_id in self._engine.leases.by_deadline())
        return pb.LeaseLeasesResponse(header=self._header(), leases=leases)

    # Cluster and Maintenance: as much as clients need to see that it is well.

    async def _member_list(self, data: bytes) -> Message:
        parse(pb.MemberListRequest, data)
        member = pb.Member(id=self._engine.opened.member_id, name=MEMBER_NAME, client_urls=[f"http://{self.address}"])
        return pb.MemberListResponse(header=self._header(), members=[member])

    async def _alarm(self, data: bytes) -> Message:
        request = parse(pb.AlarmRequest, data)
        if request.action == pb.AlarmRequest.ALARM_ACTION_ACTIVATE:
            raise Refusal(Reason.UNIMPLEMENTED)
        return pb.AlarmResponse(header=self._header())

    async def _status(self, data: bytes) -> Message:
        parse(pb.StatusRequest, data)
        size_bytes, in_use_bytes = await self._measure()
        header = self._header()
        return pb.StatusResponse(
            header=header,
            version=API_VERSION,
            db_size_bytes=size_bytes,
            db_size_in_use_bytes=in_use_bytes,
            leader=header.member_id,
            raft_index=header.revision,
            raft_applied_index=header.revision,
            raft_term=header.raft_term,
            errors=self.problems(),
        )

    # Housekeeping.

    async def _keep_house(self) -> None:
        clock = self._engine.clock
        progress_at = clock() + PROGRESS_EVERY_S
        while True:
            await asyncio.sleep(HOUSEKEEPING_EVERY_S)
            if clock() >= progress_at:
                progress_at = clock() + PROGRESS_EVERY_S
                for stream in self._streams:
                    stream.tell_progress()
            try:
                await self._measure()
                await self._compact_history()
            except Refusal as error:
                log.warning("housekeeping of the metadata database failed", error=error.message)
            except Exception:
                log.exception("housekeeping of the metadata database failed")
                self._problem = "housekeeping failed: start the process again; its log has the details"
                return

    async def _compact_history(self) -> None:
        """Compacts what the retention does not keep."""
        watches = self._watches
        revision = self._retention.compact_at(
            self._engine.clock(), watches.revision, watches.written_bytes, watches.compacted
        )
        if revision is not None:
            await self._ask(
                lambda tables: tables.compact(max(revision, tables.compacted)),
                writes=True,
                on_commit=lambda _: self._note_compaction(revision),
            )
        await self._sweep()

    async def _sweep(self) -> None:
        """Frees what is compacted, in small parts, so that nobody waits long."""
        while await self._ask(lambda tables: tables.sweep(), writes=True):
            pass

    async def _measure(self) -> tuple[int, int]:
        size_bytes, in_use_bytes = await self._ask(lambda tables: tables.size_bytes())
        self._metrics.size.set(size_bytes)
        self._metrics.size_in_use.set(in_use_bytes)
        return size_bytes, in_use_bytes

    @contextmanager
    def _counted_stream(self, kind: str) -> Iterator[None]:
        if self._stream_counts[kind] >= STREAMS_MAX:
            raise Refusal(Reason.TOO_MANY_REQUESTS)
        self._stream_counts[kind] += 1
        try:
            with self._metrics.stream(kind):
                yield
        finally:
            self._stream_counts[kind] -= 1
