"""Watches of etcd: nothing is missed and nothing comes twice, however often the stream breaks."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from magnetar.etcd import etcd_pb2 as pb
from magnetar.metadata import etcd_watch
from magnetar.metadata.etcd import EtcdMetadata
from magnetar.metadata.etcd_channel import Times
from magnetar.metadata.etcd_codec import BadAnswer
from magnetar.metadata.etcd_watch import EVENTS_WAITING_MAX, WatchCanceled, WatchPosition
from magnetar.metadata.store import Change, Changes, DeletePrefix, KeyValue, Put, Reset, WatchEvent

WAIT_S = 30.0
QUICK = Times(attempt_s=0.5, call_s=20.0, ping_s=0.2)

# The position.


def put_event(key: bytes, revision: int) -> pb.Event:
    return pb.Event(kv=pb.KeyValue(key=key, create_revision=revision, mod_revision=revision))


def answer(*events: pb.Event, **fields: Any) -> pb.WatchResponse:
    revision = fields.pop("revision", events[-1].kv.mod_revision if events else 1)
    return pb.WatchResponse(header=pb.ResponseHeader(cluster_id=7, revision=revision), events=events, **fields)


def begun(prefix: str, from_revision: int, watch_id: int = 0) -> WatchPosition:
    position = WatchPosition(prefix, from_revision)
    position.begin()
    assert position.on_answer(answer(created=True, watch_id=watch_id)) is None
    return position


def changed(key: str, revision: int) -> Change:
    return Change(key, KeyValue(key, b"", revision, revision), revision)


def test_a_stream_begins_where_the_watch_has_come_to() -> None:
    position = WatchPosition("a/", 5)
    request = position.begin().create
    assert (request.key, request.range_end, request.start_revision) == (b"a/", b"a0", 5)
    assert request.fragment
    assert request.progress_notify
    position.on_answer(answer(created=True))
    position.on_answer(answer(put_event(b"a/1", 7), put_event(b"a/2", 9)))
    assert position.begin().create.start_revision == 10


def test_a_watch_from_before_the_beginning_is_one_from_the_beginning() -> None:
    assert WatchPosition("", 0).begin().create.start_revision == 1  # 0 would be: from now on


def test_events_are_delivered_as_one_group_up_to_the_last_revision() -> None:
    position = begun("a", 5)
    assert position.on_answer(answer(put_event(b"a", 7), put_event(b"a", 9))) == Changes(
        (changed("a", 7), changed("a", 9)), 9
    )


def test_fragments_are_held_until_the_revision_is_whole() -> None:
    position = begun("a", 5)
    assert position.on_answer(answer(put_event(b"a1", 5), fragment=True)) is None
    assert position.on_answer(answer(put_event(b"a2", 5), fragment=True)) is None
    assert position.next_revision == 5
    assert position.on_answer(answer(put_event(b"a3", 5))) == Changes(
        (changed("a1", 5), changed("a2", 5), changed("a3", 5)), 5
    )
    assert position.next_revision == 6


def test_fragments_of_a_broken_stream_are_dropped_and_asked_for_again() -> None:
    position = begun("a", 5)
    assert position.on_answer(answer(put_event(b"a1", 5), fragment=True)) is None
    assert position.begin().create.start_revision == 5
    position.on_answer(answer(created=True))
    event = position.on_answer(answer(put_event(b"a1", 5), put_event(b"a2", 5)))
    assert event == Changes((changed("a1", 5), changed("a2", 5)), 5)


def test_fragments_beyond_all_bounds_reset_the_watch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(etcd_watch, "FRAGMENTS_BYTES_MAX", 1000)
    position = begun("a", 5)
    events = [position.on_answer(answer(put_event(b"a", 5), fragment=True)) for _ in range(20)]
    assert Reset() in events


def test_what_was_delivered_is_not_delivered_again() -> None:
    position = begun("a", 5)
    position.on_answer(answer(put_event(b"a", 7)))
    assert position.on_answer(answer(put_event(b"a", 7))) is None
    assert position.on_answer(answer(put_event(b"a", 7), put_event(b"a", 8))) == Changes((changed("a", 8),), 8)


def test_progress_of_this_watch_moves_it_and_progress_of_the_stream_does_not() -> None:
    position = begun("a", 5, watch_id=3)
    position.on_answer(answer(watch_id=-1, revision=50))
    assert position.next_revision == 5
    position.on_answer(answer(watch_id=3, revision=20))
    assert position.next_revision == 21
    position.on_answer(answer(watch_id=3, revision=10))
    assert position.next_revision == 21


def test_the_creation_of_a_watch_is_no_progress() -> None:
    position = WatchPosition("a", 5)
    position.begin()
    position.on_answer(answer(created=True, revision=50))
    assert position.next_revision == 5


def test_compaction_resets_even_when_the_creation_is_refused_with_it() -> None:
    assert begun("a", 5).on_answer(answer(canceled=True, compact_revision=9)) == Reset()
    assert WatchPosition("a", 5).on_answer(answer(created=True, canceled=True, compact_revision=9)) == Reset()


def test_a_watch_that_the_server_cancels_is_no_event() -> None:
    with pytest.raises(WatchCanceled, match="no leader"):
        begun("a", 5).on_answer(answer(canceled=True, cancel_reason="etcdserver: no leader"))
    with pytest.raises(WatchCanceled):
        WatchPosition("a", 5).on_answer(answer(created=True, canceled=True))


@pytest.mark.parametrize(
    "wrong",
    [
        answer(put_event(b"b", 7)),
        answer(put_event(b"a", 7), watch_id=9),
        answer(put_event(b"a", 8), put_event(b"a", 7)),
        answer(put_event(b"a", 0)),
    ],
)
def test_events_that_cannot_be_are_not_believed(wrong: pb.WatchResponse) -> None:
    with pytest.raises(BadAnswer):
        begun("a", 5).on_answer(wrong)


# The real thing.


async def read_until(watch: Any, revision: int) -> list[Change]:
    seen: list[Change] = []
    async with asyncio.timeout(WAIT_S):
        async for event in watch:
            assert isinstance(event, Changes)
            seen += event.changes
            if event.revision >= revision:
                break
    return seen


async def test_a_watch_goes_on_over_cut_connections_without_a_gap_or_a_repeat(
    etcd: Any, proxy_of: Callable[[str], Awaitable[Any]]
) -> None:
    proxy = await proxy_of(etcd.address)
    async with (
        await EtcdMetadata.open(etcd.url) as direct,
        await EtcdMetadata.open(proxy.url, times=QUICK) as store,
    ):
        start = (await direct.range("")).revision + 1
        watch = store.watch("w/", from_revision=start)
        seen: list[Change] = []
        for i in range(100):
            revision = (await direct.txn([], [Put(f"w/{i}a", b""), Put(f"w/{i}b", b"")])).revision
            if i % 20 == 9:
                seen += await read_until(watch, revision)
            if i % 20 == 14:
                proxy.cut()
        seen += await read_until(watch, start + 99)
        assert [(change.key, change.revision) for change in seen] == [
            (f"w/{i}{half}", start + i) for i in range(100) for half in "ab"
        ]


async def test_a_watch_whose_stream_broke_over_a_compaction_is_reset(
    etcd: Any, proxy_of: Callable[[str], Awaitable[Any]]
) -> None:
    proxy = await proxy_of(etcd.address)
    async with (
        await EtcdMetadata.open(etcd.url) as direct,
        await EtcdMetadata.open(proxy.url, times=QUICK) as store,
    ):
        first = (await direct.txn([], [Put("w", b"0")])).revision
        watch = store.watch("w", from_revision=first)
        assert await read_until(watch, first)
        proxy.refuse()
        for i in range(3):
            await direct.txn([], [Put("w", b"%d" % i)])
        etcd.compact()
        await proxy.start()
        async with asyncio.timeout(WAIT_S):
            assert [event async for event in watch] == [Reset()]


async def test_a_watch_on_a_server_that_hung_for_a_while_delivers_all(
    etcd: Any, proxy_of: Callable[[str], Awaitable[Any]]
) -> None:
    proxy = await proxy_of(etcd.address)
    async with (
        await EtcdMetadata.open(etcd.url) as direct,
        await EtcdMetadata.open(proxy.url, times=QUICK) as store,
    ):
        first = (await direct.txn([], [Put("w", b"0")])).revision
        watch = store.watch("w", from_revision=first)
        assert await read_until(watch, first)
        proxy.hang()
        await direct.txn([], [Put("w", b"1")])
        last = (await direct.txn([], [Put("w", b"2")])).revision
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(anext(aiter(watch)), 0.1)
        proxy.heal()
        assert [change.revision for change in await read_until(watch, last)] == [last - 1, last]


async def test_a_slow_consumer_holds_few_events_and_misses_none(etcd: Any) -> None:
    async with await EtcdMetadata.open(etcd.url) as store:
        start = (await store.range("")).revision + 1
        watch = store.watch("w/", from_revision=start)
        for i in range(300):
            await store.txn([], [Put(f"w/{i}", bytes(10_000))])
        assert watch.waiting <= EVENTS_WAITING_MAX
        seen = await read_until(watch, start + 299)
        assert [change.revision for change in seen] == [start + i for i in range(300)]


async def test_a_revision_larger_than_a_message_arrives_whole(etcd: Any) -> None:
    """6,000 deletions of one transaction come in fragments."""
    async with await EtcdMetadata.open(etcd.url) as store:
        keys = [f"many/{'x' * 400}{i:04}" for i in range(6_000)]
        parts = [[Put(key, b"") for key in keys[i : i + 100]] for i in range(0, len(keys), 100)]
        await asyncio.gather(*(store.txn([], part) for part in parts))
        revision = (await store.txn([], [DeletePrefix("many/")])).revision
        async with asyncio.timeout(WAIT_S):
            event: WatchEvent = await anext(aiter(store.watch("many/", from_revision=revision)))
        assert isinstance(event, Changes)
        assert [change.key for change in event.changes] == keys
        assert {(change.revision, change.current) for change in event.changes} == {(revision, None)}


async def test_a_watch_whose_creation_is_refused_is_asked_for_again(fake_etcd: Any) -> None:
    refused = answer(created=True, canceled=True, cancel_reason="not now").SerializeToString()
    granted = [answer(created=True).SerializeToString(), answer(put_event(b"w", 5)).SerializeToString()]
    turns = [refused, refused, granted]
    fake_etcd.answers["Watch/Watch"] = lambda request: turns.pop(0)
    async with await EtcdMetadata.open(fake_etcd.url) as store:
        event = await asyncio.wait_for(anext(aiter(store.watch("w", from_revision=5))), WAIT_S)
        assert event == Changes((changed("w", 5),), 5)
        assert fake_etcd.asked.count("Watch/Watch") == 3


async def test_a_server_that_begins_no_watch_is_asked_again_on_a_new_connection(fake_etcd: Any) -> None:
    fake_etcd.answers["Watch/Watch"] = lambda request: []
    async with await EtcdMetadata.open(fake_etcd.url, times=Times(attempt_s=0.1, call_s=1, ping_s=5)) as store:
        watch = store.watch("w", from_revision=1)
        async with asyncio.timeout(WAIT_S):
            for _ in range(3):
                await fake_etcd.when_asked("Watch/Watch")
        await watch.close()
