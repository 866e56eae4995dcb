"""Endpoints that die, hang, lie or are something else: what a caller is told, and how long it takes."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from magnetar.etcd import etcd_pb2 as pb
from magnetar.metadata.etcd import EtcdMetadata
from magnetar.metadata.etcd_channel import Times
from magnetar.metadata.store import (
    Changes,
    KeyValue,
    MetadataError,
    MetadataUnavailable,
    Put,
    RangeResult,
    absent,
    exists,
)

WAIT_S = 30.0
QUICK = Times(attempt_s=0.5, call_s=20.0, ping_s=0.2)
IMPATIENT = Times(attempt_s=0.2, call_s=0.5, ping_s=0.2)

Cluster = Callable[[int], list[Any]]
Proxies = Callable[[str], Awaitable[Any]]


def url_of(*members: Any) -> str:
    return "etcd://" + ",".join(member.url.removeprefix("etcd://") for member in members)


async def wait_value(store: EtcdMetadata, key: str, value: bytes) -> None:
    """Until a read shows it; reads that have no answer prove nothing."""
    async with asyncio.timeout(WAIT_S):
        while True:
            try:
                found = await store.get(key)
                if found is not None and found.value == value:
                    return
            except MetadataUnavailable:
                continue


async def put_surely(store: EtcdMetadata, key: str, value: bytes) -> None:
    """As every caller has to: a transaction of unknown outcome is followed by a read."""
    async with asyncio.timeout(WAIT_S):
        while True:
            try:
                found = await store.get(key)
                if found is not None and found.value == value:
                    return
                await store.txn([], [Put(key, value)])
            except MetadataUnavailable:
                continue


async def error_of(call: Awaitable[object]) -> str:
    """What a call that has no answer says; empty if it has one."""
    try:
        await call
    except MetadataUnavailable as error:
        return str(error)
    return ""


# Clusters.


async def test_calls_and_watches_go_on_when_members_are_killed_and_come_back(etcd_cluster: Cluster) -> None:
    members = etcd_cluster(3)
    async with await EtcdMetadata.open(url_of(*members), times=QUICK) as store:
        first = (await store.txn([], [Put("n", b"0")])).revision
        watch = store.watch("n", from_revision=first)
        for round_, member in enumerate(members, start=1):
            member.kill()
            await put_surely(store, "n", b"%d" % round_)
            member.start()
            assert member.wait_listening()
        values: list[bytes] = []
        async with asyncio.timeout(WAIT_S):
            async for event in watch:
                assert isinstance(event, Changes)
                values += [change.current.value for change in event.changes if change.current]
                if values[-1] == b"3":
                    break
        assert sorted(set(values)) == values == [b"0", b"1", b"2", b"3"]


async def test_an_endpoint_that_takes_connections_and_hangs_is_left(etcd_cluster: Cluster) -> None:
    members = etcd_cluster(3)
    async with await EtcdMetadata.open(url_of(*members), times=QUICK) as store:
        await store.txn([], [Put("n", b"0")])
        members[0].stop()
        await wait_value(store, "n", b"0")
    async with await EtcdMetadata.open(url_of(*members), times=QUICK) as store:
        await wait_value(store, "n", b"0")


async def test_a_member_without_a_majority_is_not_read_from(etcd_cluster: Cluster) -> None:
    members = etcd_cluster(3)
    async with await EtcdMetadata.open(url_of(members[2]), times=IMPATIENT) as store:
        await put_surely(store, "n", b"0")
        members[0].kill()
        members[1].kill()
        async with asyncio.timeout(WAIT_S):
            while "no leader" not in await error_of(store.get("n")):
                continue
        members[0].start()
        await wait_value(store, "n", b"0")


async def test_a_server_that_hangs_and_goes_on_is_unavailable_for_that_time(etcd_cluster: Cluster) -> None:
    (member,) = etcd_cluster(1)
    async with await EtcdMetadata.open(member.url, times=IMPATIENT) as store:
        await put_surely(store, "n", b"0")
        member.stop()
        for call in (
            lambda: store.get("n"),
            lambda: store.txn([], [Put("n", b"1")]),
            lambda: store.grant_lease(5),
            lambda: store.range(""),
        ):
            started = time.monotonic()
            with pytest.raises(MetadataUnavailable, match="metadata store"):
                await call()
            assert time.monotonic() - started < WAIT_S / 3
        member.go_on()
        await put_surely(store, "n", b"2")


# Lost replies.


async def test_a_transaction_whose_reply_is_lost_is_unknown_and_not_sent_again(etcd: Any, proxy_of: Proxies) -> None:
    proxy = await proxy_of(etcd.address)
    async with (
        await EtcdMetadata.open(etcd.url) as direct,
        await EtcdMetadata.open(proxy.url, times=QUICK) as store,
    ):
        await direct.txn([], [Put("lost", b"before")])
        proxy.lose_replies()
        sending = asyncio.create_task(store.txn([exists("lost")], [Put("lost", b"after")]))
        await wait_value(direct, "lost", b"after")
        revision = etcd.revision()
        proxy.cut()
        proxy.heal()
        with pytest.raises(MetadataUnavailable, match="may have been done or not"):
            await sending
        await wait_value(store, "lost", b"after")
        assert etcd.revision() == revision


async def test_a_transaction_whose_request_is_lost_is_unknown_too(etcd: Any, proxy_of: Proxies) -> None:
    proxy = await proxy_of(etcd.address)
    async with await EtcdMetadata.open(proxy.url, times=QUICK) as store:
        proxy.hang()
        sending = asyncio.create_task(store.txn([absent("never")], [Put("never", b"")]))
        await asyncio.sleep(0)
        proxy.cut()
        with pytest.raises(MetadataUnavailable):
            await sending
        proxy.heal()
        assert await store.get("never") is None


async def test_reads_are_asked_again_over_a_cut_connection(etcd: Any, proxy_of: Proxies) -> None:
    proxy = await proxy_of(etcd.address)
    async with await EtcdMetadata.open(proxy.url, times=QUICK) as store:
        await store.txn([], [Put("n", b"0")])
        for _ in range(5):
            proxy.cut()
            found = await store.get("n")
            assert found is not None
            proxy.cut()
            assert (await store.range("n")).items == (found,)
            proxy.cut()
            assert (await store.txn([exists("n")], [])).succeeded


async def test_closing_the_store_ends_what_is_under_way(etcd: Any, proxy_of: Proxies) -> None:
    proxy = await proxy_of(etcd.address)
    store = await EtcdMetadata.open(proxy.url)
    proxy.hang()
    calls = [asyncio.create_task(call) for call in (store.get("n"), store.txn([], [Put("n", b"")]))]
    await asyncio.sleep(0)
    await asyncio.wait_for(store.close(), WAIT_S)
    for call in calls:
        with pytest.raises(MetadataError):
            await asyncio.wait_for(call, WAIT_S)


# What is no etcd, or not the right one.


async def test_a_store_that_nobody_serves_is_named_with_its_endpoints_and_what_to_check(unused_ports: Any) -> None:
    one, two = unused_ports(2)
    with pytest.raises(
        MetadataUnavailable, match=rf"check that it runs.*127.0.0.1:{one}: .*127.0.0.1:{two}: .*nothing listens there"
    ):
        await EtcdMetadata.open(f"etcd://127.0.0.1:{one},127.0.0.1:{two}", open_s=0.3)


async def test_endpoints_of_two_clusters_are_never_mixed(etcd: Any, etcd_cluster: Cluster) -> None:
    (other,) = etcd_cluster(1)
    async with await EtcdMetadata.open(url_of(other, etcd), times=Times(attempt_s=10, call_s=0.5)) as store:
        await put_surely(store, "n", b"other")
        other.kill()
        async with asyncio.timeout(WAIT_S):
            while "belongs to another etcd cluster: name endpoints of one" not in await error_of(store.get("n")):
                continue


async def test_a_store_that_lost_its_data_is_not_believed(fake_etcd: Any) -> None:
    def answer(revision: int) -> bytes:
        return bytes(pb.RangeResponse(header=fake_etcd.header(revision)).SerializeToString())

    fake_etcd.answers["KV/Range"] = lambda request: answer(100)
    async with await EtcdMetadata.open(fake_etcd.url) as store:
        assert await store.get("n") is None
        fake_etcd.answers["KV/Range"] = lambda request: answer(99)
        with pytest.raises(MetadataUnavailable, match="went back in time: if it was restored from a backup, restart"):
            await store.get("n")


@asynccontextmanager
async def tcp_server(reply: bytes) -> AsyncIterator[str]:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(1 << 16)
        writer.write(reply)
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    yield f"etcd://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    server.close()


@pytest.mark.parametrize(
    "reply", [b"", b"SSH-2.0-OpenSSH_9.2\r\n", bytes(range(256)) * 20, b"HTTP/1.1 400 Bad Request\r\n\r\n"]
)
async def test_a_server_of_another_kind_is_refused(reply: bytes) -> None:
    async with tcp_server(reply) as url:
        with pytest.raises(MetadataError, match=r"check that .* are its client addresses"):
            await EtcdMetadata.open(url, open_s=0.5)


async def test_a_grpc_server_that_is_no_etcd_is_refused_without_waiting(fake_etcd: Any) -> None:
    for answers in ({}, {"Maintenance/Status": lambda request: b""}):
        fake_etcd.answers = answers
        async with asyncio.timeout(WAIT_S / 2):
            with pytest.raises(MetadataError, match="it is not an etcd"):
                await EtcdMetadata.open(fake_etcd.url, open_s=WAIT_S)


async def test_a_learner_is_refused_and_a_member_without_leader_waited_for(fake_etcd: Any) -> None:
    header = fake_etcd.header()
    states = [
        (pb.StatusResponse(header=header, leader=1, is_learner=True), MetadataError, "learner.*name voting members"),
        (pb.StatusResponse(header=header), MetadataUnavailable, "no leader: a majority"),
    ]
    for status, error, message in states:
        fake_etcd.answers["Maintenance/Status"] = lambda request, status=status: status.SerializeToString()
        with pytest.raises(error, match=message):
            await EtcdMetadata.open(fake_etcd.url, open_s=0.3)


async def test_an_etcd_that_wants_credentials_is_refused_with_what_it_says(etcd_cluster: Cluster) -> None:
    (member,) = etcd_cluster(1)
    for method, request in (
        ("Auth/RoleAdd", b"\x0a\x04root"),
        ("Auth/UserAdd", b"\x0a\x04root\x12\x01x"),
        ("Auth/UserGrantRole", b"\x0a\x04root\x12\x04root"),
        ("Auth/AuthEnable", b""),
    ):
        member.call(method, Raw(request), Raw)
    with pytest.raises(MetadataError, match=r"Magnetar sends no credentials.*user name is empty"):
        await EtcdMetadata.open(member.url)


class Raw:
    """A message of a service that we do not speak."""

    def __init__(self, data: bytes = b"") -> None:
        self._data = data

    def SerializeToString(self) -> bytes:
        return self._data

    @staticmethod
    def FromString(data: bytes) -> bytes:
        return data


# Lies.


async def ask_everything(store: EtcdMetadata) -> list[Any]:
    """What the calls return, or the error that they raise."""
    calls = (store.get("k"), store.range("k"), store.txn([], [Put("k", b"")]), store.grant_lease(5))
    answers: list[Any] = []
    for call in calls:
        answers += await asyncio.wait_for(asyncio.gather(call, return_exceptions=True), WAIT_S)
    return answers


MESSAGES = st.one_of(
    st.binary(max_size=40),
    st.builds(
        lambda cluster, revision, rest: (
            pb.RangeResponse(header=pb.ResponseHeader(cluster_id=cluster, revision=revision)).SerializeToString() + rest
        ),
        st.sampled_from([0, 7, 8]),
        st.integers(-1, 2),
        st.binary(max_size=20),
    ),
)


@given(data=MESSAGES)
@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_whatever_bytes_a_server_sends_there_is_no_wrong_answer(data: bytes, fake_runner: Any) -> None:
    async def lie(fake: Any) -> None:
        honest = dict(fake.answers)
        async with await EtcdMetadata.open(fake.url, times=IMPATIENT) as store:
            for method in ("KV/Range", "KV/Txn", "Lease/LeaseGrant", "Lease/LeaseKeepAlive", "Watch/Watch"):
                fake.answers[method] = lambda request: data
            watch = store.watch("k", from_revision=1)
            for answer in await ask_everything(store):
                assert not isinstance(answer, Exception) or isinstance(answer, MetadataError), answer
                assert (
                    not isinstance(answer, MetadataError) or "reason=`" in str(answer) or "endpoints=`" in str(answer)
                )
                assert not isinstance(answer, KeyValue) or answer.key == "k"
                assert not isinstance(answer, RangeResult) or answer.revision >= 1
            await watch.close()
        fake.answers = honest

    fake_runner(lie)


# Pages.


async def test_a_range_that_is_compacted_while_it_is_read_is_read_again(fake_etcd: Any) -> None:
    def page(key: bytes, revision: int, more: bool) -> bytes:
        kv = pb.KeyValue(key=key, create_revision=1, mod_revision=1)
        answer = pb.RangeResponse(header=fake_etcd.header(revision), kvs=[kv], more=more)
        return bytes(answer.SerializeToString())

    pages: list[bytes | None] = [page(b"a", 5, True), fake_etcd.COMPACTED, page(b"b", 9, True), page(b"c", 9, False)]
    async with await EtcdMetadata.open(fake_etcd.url) as store:
        asked: list[int] = []

        def answer(request: bytes) -> bytes | None:
            asked.append(pb.RangeRequest.FromString(request).revision)
            return pages.pop(0)

        fake_etcd.answers["KV/Range"] = answer
        found = await store.range("")
    assert ([item.key for item in found.items], found.revision, found.more) == (["b", "c"], 9, False)
    assert asked == [0, 5, 0, 9]
