"""Leases as clients see them: granted, kept, lost, and given their full time again when the server was away."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
from metadata_process import MetadataProcess
from prometheus_client import CollectorRegistry

from magnetar.etcd import etcd_pb2 as pb
from magnetar.metadata.server import server as server_module
from magnetar.metadata.server.server import MetadataServer

WAIT_S = 30.0


class Client:
    def __init__(self, channel: grpc.aio.Channel) -> None:
        self.channel = channel

    async def ask(self, method: str, request: Any, answer: Any) -> Any:
        data = await self.channel.unary_unary(f"/etcdserverpb.{method}")(request.SerializeToString(), timeout=WAIT_S)
        return answer.FromString(data)

    async def grant(self, ttl: int, lease_id: int = 0) -> pb.LeaseGrantResponse:
        request = pb.LeaseGrantRequest(ttl=ttl, id=lease_id)
        granted: pb.LeaseGrantResponse = await self.ask("Lease/LeaseGrant", request, pb.LeaseGrantResponse)
        return granted

    async def put(self, key: bytes, lease_id: int) -> int:
        answer = await self.ask("KV/Put", pb.PutRequest(key=key, lease=lease_id), pb.PutResponse)
        return int(answer.header.revision)

    async def keys(self) -> list[bytes]:
        answer = await self.ask("KV/Range", pb.RangeRequest(key=b"\0", range_end=b"\0"), pb.RangeResponse)
        return [item.key for item in answer.kvs]

    async def time_to_live(self, lease_id: int) -> pb.LeaseTimeToLiveResponse:
        request = pb.LeaseTimeToLiveRequest(id=lease_id, keys=True)
        told: pb.LeaseTimeToLiveResponse = await self.ask("Lease/LeaseTimeToLive", request, pb.LeaseTimeToLiveResponse)
        return told

    async def keep_alive(self, *lease_ids: int) -> list[int]:
        requests = (pb.LeaseKeepAliveRequest(id=lease_id).SerializeToString() for lease_id in lease_ids)
        call = self.channel.stream_stream("/etcdserverpb.Lease/LeaseKeepAlive")(requests, timeout=WAIT_S)
        return [pb.LeaseKeepAliveResponse.FromString(data).ttl async for data in call]


@pytest.fixture
def client(channel: grpc.aio.Channel) -> Client:
    return Client(channel)


async def pass_time(server: MetadataServer, clock: Any, seconds: int) -> None:
    """Second by second: a tick that comes later would mean that the server stood still."""
    for _ in range(seconds):
        clock.now += 1
        await server._engine.tick()


async def test_a_lease_that_nobody_keeps_ends_and_takes_its_keys_in_one_revision(
    server: MetadataServer, client: Client, clock: Any
) -> None:
    lease = await client.grant(5)
    for key in (b"b", b"a"):
        revision = await client.put(key, lease.id)
    await client.put(b"other", 0)
    watch = client.channel.stream_stream("/etcdserverpb.Watch/Watch")()
    create = pb.WatchCreateRequest(key=b"\0", range_end=b"\0", start_revision=revision + 2)
    await watch.write(pb.WatchRequest(create=create).SerializeToString())
    await watch.read()
    await pass_time(server, clock, 4)
    assert await client.keys() == [b"a", b"b", b"other"]
    await pass_time(server, clock, 1)
    assert await client.keys() == [b"other"]
    answer = pb.WatchResponse.FromString(await watch.read())
    assert [(event.type, event.kv.key, event.kv.mod_revision) for event in answer.events] == [
        (pb.Event.EVENT_TYPE_DELETE, key, revision + 2) for key in (b"a", b"b")
    ]
    assert (await client.time_to_live(lease.id)).ttl == -1
    assert await client.keep_alive(lease.id) == [0]


async def test_a_lease_that_is_kept_lives(server: MetadataServer, client: Client, clock: Any) -> None:
    lease = await client.grant(2)
    await client.put(b"a", lease.id)
    for _ in range(5):
        await pass_time(server, clock, 1)
        assert await client.keep_alive(lease.id, 12345) == [2, 0]
    assert await client.keys() == [b"a"]


async def test_a_key_belongs_to_the_lease_of_its_last_put(server: MetadataServer, client: Client, clock: Any) -> None:
    short, long = await client.grant(1), await client.grant(60)
    for key, last in ((b"a", long.id), (b"b", 0), (b"c", short.id)):
        await client.put(key, short.id)
        await client.put(key, last)
    assert list((await client.time_to_live(short.id)).keys) == [b"c"]
    await pass_time(server, clock, 1)
    assert await client.keys() == [b"a", b"b"]


async def test_leases_tell_their_time_and_stand_in_the_order_of_their_ends(
    server: MetadataServer, client: Client, clock: Any
) -> None:
    first, second = await client.grant(60), await client.grant(30, lease_id=99)
    assert (second.id, second.ttl) == (99, 30)
    assert first.id > 0
    await pass_time(server, clock, 10)
    told = await client.time_to_live(99)
    assert (told.ttl, told.granted_ttl) == (20, 30)
    leases = await client.ask("Lease/LeaseLeases", pb.LeaseLeasesRequest(), pb.LeaseLeasesResponse)
    assert [lease.id for lease in leases.leases] == [99, first.id]


async def test_a_time_below_the_minimum_becomes_the_minimum(client: Client) -> None:
    assert [(await client.grant(ttl)).ttl for ttl in (-7, 0, 1)] == [1, 1, 1]


async def test_an_id_in_use_and_one_lease_too_many_are_refused(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    await client.grant(60, lease_id=99)
    with pytest.raises(grpc.aio.AioRpcError, match="lease already exists") as caught:
        await client.grant(60, lease_id=99)
    assert caught.value.code() is grpc.StatusCode.FAILED_PRECONDITION
    monkeypatch.setattr(server_module, "LEASES_MAX", 1)
    with pytest.raises(grpc.aio.AioRpcError, match="too many requests"):
        await client.grant(60)


@pytest.fixture
async def restarted(server: MetadataServer, tmp_path: Path, clock: Any) -> AsyncIterator[Callable[[], Any]]:
    started: list[MetadataServer] = []

    async def restart() -> Client:
        await server.stop(0)
        clock.now += 1000
        started.append(await MetadataServer.open(tmp_path / "data", "127.0.0.1:0", CollectorRegistry(), clock=clock))
        return Client(grpc.aio.insecure_channel(started[0].address))

    yield restart
    for one in started:
        await one.stop(0)


async def test_leases_have_their_full_time_again_after_a_restart(client: Client, restarted: Any) -> None:
    lease = await client.grant(5)
    await client.put(b"a", lease.id)
    client = await restarted()
    told = await client.time_to_live(lease.id)
    assert (told.ttl, list(told.keys)) == (5, [b"a"])
    await client.channel.close()


async def test_a_lease_lives_through_a_stop_of_the_server_and_ends_as_usual_afterwards(
    process: MetadataProcess,
) -> None:
    async with grpc.aio.insecure_channel(process.address) as channel:
        client = Client(channel)
        lease = await client.grant(3)
        await client.put(b"a", lease.id)
        process.stop()
        await asyncio.sleep(lease.ttl + 1)  # time that passes is what is tested
        process.go_on()
        assert await client.keys() == [b"a"]
        async with asyncio.timeout(WAIT_S):
            while await client.keys():  # noqa: ASYNC110
                await asyncio.sleep(0.05)
        assert (await client.time_to_live(lease.id)).ttl == -1
