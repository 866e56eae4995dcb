"""How the server starts, stops, refuses, and what it tells about itself."""

from __future__ import annotations

import asyncio
import sqlite3
import threading
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
import structlog.testing
from grpc_health.v1 import health_pb2
from metadata_process import MetadataProcess
from prometheus_client import CollectorRegistry, generate_latest

from magnetar.etcd import etcd_pb2 as pb
from magnetar.metadata.server import evaluation
from magnetar.metadata.server.retention import COMPACT_REVISIONS_MIN, Retention
from magnetar.metadata.server.server import MetadataServer
from magnetar.metadata.sqlite_tables import Tables
from magnetar.metadata.store import MetadataError
from magnetar.node.rpc import ListenError

WAIT_S = 30.0
ALL = {"key": b"\0", "range_end": b"\0"}

Ask = Callable[[str, Any, Any], Awaitable[Any]]


@pytest.fixture
def ask(channel: grpc.aio.Channel) -> Ask:
    async def ask(method: str, request: Any, answer: Any) -> Any:
        data = await channel.unary_unary(f"/etcdserverpb.{method}")(request.SerializeToString(), timeout=WAIT_S)
        return answer.FromString(data)

    return ask


async def put(ask: Ask, key: bytes, value: bytes = b"") -> int:
    answer = await ask("KV/Put", pb.PutRequest(key=key, value=value), pb.PutResponse)
    return int(answer.header.revision)


async def keys(ask: Ask) -> list[bytes]:
    return [item.key for item in (await ask("KV/Range", pb.RangeRequest(**ALL), pb.RangeResponse)).kvs]


async def open_at(data_dir: Path, listen: str = "127.0.0.1:0", **options: Any) -> MetadataServer:
    return await MetadataServer.open(data_dir, listen, CollectorRegistry(), **options)


# Starting and stopping.


async def test_the_start_tells_in_one_line_that_nothing_is_replicated(tmp_path: Path) -> None:
    with structlog.testing.capture_logs() as logs:
        server = await open_at(tmp_path / "not there" / "yet")
        await server.stop(0)
    (line,) = logs
    assert "not replicated" in line["event"]
    assert line["address"] == server.address == f"127.0.0.1:{server.port}"


async def test_a_second_server_on_the_same_data_is_refused_in_one_line(server: MetadataServer, tmp_path: Path) -> None:
    with pytest.raises(MetadataError, match=r"^another process has .* open: stop it or use another data directory.*`$"):
        await open_at(tmp_path / "data")


async def test_an_address_in_use_is_refused_and_the_database_is_free_again(
    server: MetadataServer, tmp_path: Path
) -> None:
    for _ in range(2):
        with pytest.raises(ListenError, match="cannot listen on"):
            await open_at(tmp_path / "other", server.address)


async def test_a_file_instead_of_a_directory_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(MetadataError, match="cannot make the data directory"):
        await open_at(tmp_path / "file")


async def test_a_database_of_something_else_is_refused_and_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "metadata.sqlite"
    with sqlite3.connect(path) as connection:
        connection.execute("CREATE TABLE facts (name TEXT, value TEXT)")
        connection.execute("CREATE TABLE birds (name TEXT)")
    connection.close()
    with pytest.raises(MetadataError, match=r"database of something else: tables=`birds,facts`"):
        await open_at(tmp_path)
    with sqlite3.connect(path) as connection:
        names = {row[0] for row in connection.execute("SELECT name FROM sqlite_schema")}
    connection.close()
    assert names == {"facts", "birds"}


async def test_the_ids_stay_and_the_term_grows_with_each_start(tmp_path: Path) -> None:
    headers = []
    for _ in range(2):
        server = await open_at(tmp_path)
        headers.append(server._header())
        await server.stop(0)
    assert headers[0].cluster_id == headers[1].cluster_id != 0
    assert headers[0].member_id == headers[1].member_id != 0
    assert [header.raft_term for header in headers] == [1, 2]


def test_a_terminated_server_ends_well_and_keeps_everything(process: MetadataProcess) -> None:
    request = pb.PutRequest(key=b"a", value=b"1")
    revision = process.call("KV/Put", request, pb.PutResponse).header.revision
    assert process.terminate() == 0
    process.start()
    answer = process.call("KV/Range", pb.RangeRequest(key=b"a"), pb.RangeResponse)
    assert (answer.header.revision, answer.kvs[0].value) == (revision, b"1")


# What it tells.


async def test_it_answers_health_checks_and_lists_its_services(channel: grpc.aio.Channel) -> None:
    check = channel.unary_unary("/grpc.health.v1.Health/Check")
    for name in ("", "etcdserverpb.KV"):
        data = await check(health_pb2.HealthCheckRequest(service=name).SerializeToString(), timeout=WAIT_S)
        assert health_pb2.HealthCheckResponse.FromString(data).status == health_pb2.HealthCheckResponse.SERVING


async def test_it_counts_what_it_does(tmp_path: Path) -> None:
    registry = CollectorRegistry()
    server = await MetadataServer.open(tmp_path, "127.0.0.1:0", registry)
    async with grpc.aio.insecure_channel(server.address) as channel:
        call = channel.unary_unary("/etcdserverpb.KV/Put")
        await call(pb.PutRequest(key=b"a").SerializeToString())
        with pytest.raises(grpc.aio.AioRpcError):
            await call(pb.PutRequest().SerializeToString())
        told = generate_latest(registry).decode()
    for line in (
        'magnetar_metadata_requests_total{method="Put",status="OK"} 1.0',
        'magnetar_metadata_requests_total{method="Put",status="INVALID_ARGUMENT"} 1.0',
        'magnetar_metadata_request_seconds_count{method="Put"} 2.0',
        "magnetar_metadata_revision 2.0",
        "magnetar_metadata_watches 0.0",
        "magnetar_metadata_leases 0.0",
    ):
        assert line in told
    assert server._metrics.size._value.get() > 0
    await server.stop(0)


# What it refuses.


@pytest.mark.parametrize("method", ["Maintenance/Defragment", "Auth/UserList", "KV/RangeStream", "Cluster/MemberAdd"])
async def test_what_is_not_served_is_unimplemented(channel: grpc.aio.Channel, method: str) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await channel.unary_unary(f"/etcdserverpb.{method}")(b"", timeout=WAIT_S)
    assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED


async def test_an_alarm_cannot_be_raised(ask: Ask) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await ask("Maintenance/Alarm", pb.AlarmRequest(action=1, alarm=1), pb.AlarmResponse)  # type: ignore[arg-type]
    assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED


async def test_a_put_under_a_deletion_without_an_end_is_a_duplicate_key(ask: Ask) -> None:
    operations = [
        pb.RequestOp(delete_range=pb.DeleteRangeRequest(key=b"a", range_end=b"\0")),
        pb.RequestOp(put=pb.PutRequest(key=b"b", ignore_value=True)),
    ]
    await put(ask, b"b")
    with pytest.raises(grpc.aio.AioRpcError, match="duplicate key given in txn request"):
        await ask("KV/Txn", pb.TxnRequest(success=operations), pb.TxnResponse)


async def test_an_answer_that_is_too_large_is_refused_and_its_transaction_changes_nothing(
    ask: Ask, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluation, "ANSWER_BYTES_MAX", 10_000)
    for i in range(9):
        revision = await put(ask, b"%d" % i, bytes(1000))
    operations = [
        pb.RequestOp(delete_range=pb.DeleteRangeRequest(key=b"0")),
        pb.RequestOp(put=pb.PutRequest(key=b"a", value=bytes(5000))),
        pb.RequestOp(range=pb.RangeRequest(**ALL)),
    ]
    with pytest.raises(grpc.aio.AioRpcError, match="set a limit") as caught:
        await ask("KV/Txn", pb.TxnRequest(success=operations), pb.TxnResponse)
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert await keys(ask) == [b"%d" % i for i in range(9)]
    assert await put(ask, b"a", bytes(2000)) == revision + 1
    with pytest.raises(grpc.aio.AioRpcError, match="set a limit"):
        await keys(ask)
    answer = await ask("KV/Range", pb.RangeRequest(**ALL, limit=3), pb.RangeResponse)
    assert (len(answer.kvs), answer.more, answer.count) == (3, True, 10)


# Durability, grouping, a full and a failing disk.


async def execute(server: MetadataServer, statement: str) -> Any:
    return await server._engine.ask(lambda tables: tables._connection.execute(statement).fetchone())


async def test_requests_that_wait_together_share_one_sync(server: MetadataServer, ask: Ask) -> None:
    statements: list[str] = []
    await server._engine.ask(lambda tables: tables._connection.set_trace_callback(statements.append))
    begun, go_on = threading.Event(), threading.Event()
    held = asyncio.ensure_future(server._engine.ask(lambda tables: (begun.set(), go_on.wait(WAIT_S))[1]))
    assert await asyncio.to_thread(begun.wait, WAIT_S)  # else it may share its group with the first calls
    calls = [asyncio.ensure_future(put(ask, b"%d" % i)) for i in range(50)]
    async with asyncio.timeout(WAIT_S):
        while server._engine._waiting < 51:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    go_on.set()
    assert await held
    revisions = await asyncio.gather(*calls)
    await server._engine.ask(lambda tables: tables._connection.set_trace_callback(None))
    assert sorted(revisions) == list(range(2, 52))
    assert sum(statement.startswith("COMMIT") for statement in statements) == 1
    assert (await execute(server, "PRAGMA synchronous"))[0] == 2


async def test_a_full_disk_refuses_the_change_and_goes_on_when_there_is_space_again(
    server: MetadataServer, ask: Ask
) -> None:
    await put(ask, b"a")
    (pages,) = await execute(server, "PRAGMA page_count")
    await execute(server, f"PRAGMA max_page_count = {pages}")
    with pytest.raises(grpc.aio.AioRpcError, match="mvcc: database space exceeded") as caught:
        await put(ask, b"b", bytes(100_000))
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert await keys(ask) == [b"a"]
    await execute(server, "PRAGMA max_page_count = 100000")
    assert await put(ask, b"b", bytes(100_000)) == 3
    assert server.problems() == []


async def test_after_a_failure_of_the_database_nothing_is_answered_and_it_says_why(
    server: MetadataServer, ask: Ask, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(tables: Tables) -> None:
        raise sqlite3.OperationalError("disk I/O error")

    with monkeypatch.context() as patch:
        patch.setattr(Tables, "commit", fail)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await put(ask, b"a")
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    with pytest.raises(grpc.aio.AioRpcError, match="the metadata database failed") as caught:
        await keys(ask)
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    (problem,) = server.problems()
    assert "must be opened again" in problem


async def test_history_is_compacted_by_itself_and_its_space_is_freed(tmp_path: Path) -> None:
    server = await open_at(tmp_path, retention=Retention(revisions_max=10))
    async with grpc.aio.insecure_channel(server.address) as channel:
        call = channel.unary_unary("/etcdserverpb.KV/Put")
        for i in range(COMPACT_REVISIONS_MIN + 20):
            await call(pb.PutRequest(key=b"a", value=b"%d" % i).SerializeToString())
        await server._compact_history()
        assert server._watches.compacted == server._watches.revision - 10
        (left,) = await execute(server, "SELECT count(*) FROM versions")
        assert left == 11
        call = channel.unary_unary("/etcdserverpb.KV/Range")
        request = pb.RangeRequest(key=b"a", revision=server._watches.compacted)
        assert len(pb.RangeResponse.FromString(await call(request.SerializeToString())).kvs) == 1
        request.revision -= 1
        with pytest.raises(grpc.aio.AioRpcError, match="required revision has been compacted"):
            await call(request.SerializeToString())
    await server.stop(0)
