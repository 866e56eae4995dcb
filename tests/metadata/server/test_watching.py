"""Watches over real gRPC: what they tell, at whatever pace the client reads."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import grpc
import grpc.aio
import pytest

from magnetar.etcd import etcd_pb2 as pb
from magnetar.metadata.server import watch_stream, watches
from magnetar.metadata.server.server import MetadataServer

WAIT_S = 30.0
ALL = {"key": b"\0", "range_end": b"\0"}


class Watcher:
    """One stream, read when the test says so."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self.call: Any = channel.stream_stream("/etcdserverpb.Watch/Watch")()

    async def send(self, **union: Any) -> None:
        await self.call.write(pb.WatchRequest(**union).SerializeToString())

    async def read(self) -> pb.WatchResponse:
        data = await asyncio.wait_for(self.call.read(), WAIT_S)
        assert data is not grpc.aio.EOF
        return pb.WatchResponse.FromString(data)

    async def create(self, **fields: Any) -> pb.WatchResponse:
        await self.send(create=pb.WatchCreateRequest(**fields))
        answer = await self.read()
        assert answer.created
        return answer

    async def events(self, count: int) -> list[tuple[int, bytes, bytes | None]]:
        """Revision, key and value (None = deleted) of the next events."""
        found: list[tuple[int, bytes, bytes | None]] = []
        while len(found) < count:
            answer = await self.read()
            assert not answer.canceled, answer
            found += [told(event) for event in answer.events]
        assert len(found) == count
        return found


def told(event: pb.Event) -> tuple[int, bytes, bytes | None]:
    gone = event.type == pb.Event.EVENT_TYPE_DELETE
    return event.kv.mod_revision, event.kv.key, None if gone else event.kv.value


Ask = Callable[[str, Any, Any], Awaitable[Any]]


@pytest.fixture
def ask(channel: grpc.aio.Channel) -> Ask:
    async def ask(method: str, request: Any, answer: Any) -> Any:
        data = await channel.unary_unary(f"/etcdserverpb.{method}")(request.SerializeToString(), timeout=WAIT_S)
        return answer.FromString(data)

    return ask


@pytest.fixture
def put(ask: Ask) -> Callable[..., Awaitable[int]]:
    async def put(key: bytes, value: bytes = b"", **fields: Any) -> int:
        answer = await ask("KV/Put", pb.PutRequest(key=key, value=value, **fields), pb.PutResponse)
        return int(answer.header.revision)

    return put


@pytest.fixture
async def watcher(channel: grpc.aio.Channel) -> AsyncIterator[Watcher]:
    watcher = Watcher(channel)
    yield watcher
    watcher.call.cancel()


@pytest.fixture
def small_window(monkeypatch: pytest.MonkeyPatch) -> None:
    """Almost everything is read from the tables, in small pages."""
    monkeypatch.setattr(watches, "WINDOW_CHANGES_MAX", 3)
    monkeypatch.setattr(watches, "PAGE_CHANGES_MAX", 2)


async def compact(ask: Ask, revision: int) -> None:
    await ask("KV/Compact", pb.CompactionRequest(revision=revision), pb.CompactionResponse)


async def test_a_watch_tells_what_comes_after_it_was_created(watcher: Watcher, put: Any) -> None:
    before = await put(b"a", b"0")
    created = await watcher.create(key=b"a")
    assert (created.header.revision, created.canceled, list(created.events)) == (before, False, [])
    await put(b"b")
    revision = await put(b"a", b"1")
    answer = await watcher.read()
    assert [told(event) for event in answer.events] == [(revision, b"a", b"1")]
    assert (answer.header.revision, answer.watch_id) == (revision, created.watch_id)


async def test_several_watches_of_one_stream_have_ids_of_their_own(watcher: Watcher, put: Any) -> None:
    first = await watcher.create(key=b"a")
    given = await watcher.create(key=b"b", watch_id=7)
    last = await watcher.create(**ALL)
    assert (first.watch_id, given.watch_id, last.watch_id) == (0, 7, 1)
    await put(b"b")
    assert {(await watcher.read()).watch_id for _ in range(2)} == {7, 1}


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"key": b"b", "range_end": b"a"}, watch_stream.EMPTY_RANGE),
        ({"key": b"b", "watch_id": 5}, watch_stream.DUPLICATE_ID),
        ({"key": bytes(watch_stream.KEYS_BYTES_PER_STREAM_MAX // 8)}, ""),
    ],
)
async def test_a_watch_that_cannot_be_is_refused_and_the_stream_goes_on(
    watcher: Watcher, put: Any, fields: dict[str, Any], reason: str
) -> None:
    await watcher.create(key=b"a", watch_id=5)
    refused = await watcher.create(**fields)
    assert (refused.canceled, refused.cancel_reason) == (bool(reason), reason)
    assert (refused.watch_id == -1) == bool(reason)
    await put(b"a")
    assert (await watcher.read()).watch_id == 5


@pytest.mark.parametrize("limit", ["WATCHES_PER_STREAM_MAX", "WATCHES_MAX", "KEYS_BYTES_PER_STREAM_MAX"])
async def test_watches_are_limited(watcher: Watcher, monkeypatch: pytest.MonkeyPatch, limit: str) -> None:
    monkeypatch.setattr(watch_stream, limit, 1 if limit != "KEYS_BYTES_PER_STREAM_MAX" else 4)
    await watcher.create(key=b"a")
    assert (await watcher.create(key=b"b")).cancel_reason == watch_stream.TOO_MANY_WATCHES
    await watcher.send(cancel=pb.WatchCancelRequest(watch_id=0))
    assert (await watcher.read()).canceled
    assert not (await watcher.create(key=b"b")).canceled


async def test_a_cancelled_watch_tells_nothing_more(watcher: Watcher, put: Any) -> None:
    await watcher.create(key=b"a", watch_id=1)
    await watcher.create(key=b"b", watch_id=2)
    await watcher.send(cancel=pb.WatchCancelRequest(watch_id=1))
    await watcher.send(cancel=pb.WatchCancelRequest(watch_id=9))
    answer = await watcher.read()
    assert (answer.watch_id, answer.canceled, answer.compact_revision) == (1, True, 0)
    await put(b"a")
    revision = await put(b"b")
    assert await watcher.events(1) == [(revision, b"b", b"")]


async def test_a_transaction_is_told_whole_and_in_its_order(watcher: Watcher, ask: Ask, put: Any) -> None:
    for key in (b"a", b"b", b"c"):
        await put(key)
    await watcher.create(**ALL)
    operations = [
        pb.RequestOp(put=pb.PutRequest(key=b"z", value=b"1")),
        pb.RequestOp(delete_range=pb.DeleteRangeRequest(key=b"a", range_end=b"c")),
        pb.RequestOp(put=pb.PutRequest(key=b"c", value=b"2")),
    ]
    answer = await ask("KV/Txn", pb.TxnRequest(success=operations), pb.TxnResponse)
    revision = answer.header.revision
    told_events = await watcher.read()
    assert [told(event) for event in told_events.events] == [
        (revision, b"z", b"1"),
        (revision, b"a", None),
        (revision, b"b", None),
        (revision, b"c", b"2"),
    ]


async def test_filters_leave_out_what_is_not_wanted(watcher: Watcher, ask: Ask, put: Any) -> None:
    await watcher.create(key=b"a", watch_id=1, filters=[pb.WatchCreateRequest.FILTER_TYPE_NO_PUT])
    await watcher.create(key=b"a", watch_id=2, filters=[pb.WatchCreateRequest.FILTER_TYPE_NO_DELETE])
    revision = await put(b"a", b"1")
    await ask("KV/DeleteRange", pb.DeleteRangeRequest(key=b"a"), pb.DeleteRangeResponse)
    answers = [await watcher.read() for _ in range(2)]
    assert {answer.watch_id: [told(event) for event in answer.events] for answer in answers} == {
        2: [(revision, b"a", b"1")],
        1: [(revision + 1, b"a", None)],
    }


@pytest.mark.parametrize("tables", [False, True])
async def test_previous_values_are_told_from_memory_and_from_the_tables(
    watcher: Watcher, ask: Ask, put: Any, request: pytest.FixtureRequest, tables: bool
) -> None:
    if tables:
        request.getfixturevalue("small_window")
    first = await put(b"a", b"1")
    await put(b"a", b"2")
    await ask("KV/DeleteRange", pb.DeleteRangeRequest(key=b"a"), pb.DeleteRangeResponse)
    await put(b"a", b"3")
    for i in range(10):
        await put(b"%d" % i)
    await watcher.create(key=b"a", start_revision=first, want_previous=True)
    events: list[pb.Event] = []
    while len(events) < 4:
        events += (await watcher.read()).events
    assert [event.previous.value if event.HasField("previous") else None for event in events] == [
        None, b"1", b"2", None,
    ]  # fmt: skip
    assert [(event.kv.version, event.kv.create_revision - first) for event in events] == [
        (1, 0), (2, 0), (0, -first), (1, 3),
    ]  # fmt: skip


async def test_a_watch_of_a_future_revision_waits_for_it(watcher: Watcher, put: Any) -> None:
    revision = await put(b"a")
    await watcher.create(key=b"a", start_revision=revision + 3)
    for i in range(4):
        await put(b"a", b"%d" % i)
    assert await watcher.events(2) == [(revision + 3, b"a", b"2"), (revision + 4, b"a", b"3")]


async def test_watches_that_start_at_any_revision_tell_everything_once_while_writing_goes_on(
    channel: grpc.aio.Channel, ask: Ask, put: Any, small_window: None
) -> None:
    first = await put(b"k0", b"0")
    written = [(first, b"k0", b"0")]
    watchers: list[tuple[int, Watcher]] = []
    for i in range(1, 60):
        key, value = b"k%d" % (i % 4), b"%d" % i
        written.append((await put(key, value), key, value))
        if i % 6 == 0:
            watchers.append((i // 2, Watcher(channel)))
            await watchers[-1][1].create(key=b"k", range_end=b"l", start_revision=first + i // 2)
    for start, watcher in watchers:
        assert await watcher.events(60 - start) == written[start:]
        watcher.call.cancel()


async def test_a_client_that_does_not_read_holds_up_nobody_and_loses_nothing(
    channel: grpc.aio.Channel, server: MetadataServer, put: Any, small_window: None
) -> None:
    slow, quick = Watcher(channel), Watcher(channel)
    await slow.create(**ALL)
    await quick.create(**ALL)
    written = []
    for i in range(200):  # far more than gRPC keeps for one stream
        value = b"%d" % i + bytes(100_000)
        written.append((await put(b"k", value), b"k", value))
        assert await quick.events(1) == written[-1:]
    assert len(server._watches._window) <= 3
    assert await slow.events(200) == written
    for watcher in (slow, quick):
        watcher.call.cancel()


async def test_a_watch_of_compacted_revisions_is_cancelled_and_told_what_is_left(
    watcher: Watcher, ask: Ask, put: Any
) -> None:
    revisions = [await put(b"a", b"%d" % i) for i in range(5)]
    await compact(ask, revisions[3])
    await watcher.create(key=b"a", start_revision=revisions[2], watch_id=1)
    answer = await watcher.read()
    assert (answer.watch_id, answer.canceled, answer.compact_revision) == (1, True, revisions[3])
    await watcher.create(key=b"a", start_revision=answer.compact_revision, watch_id=1)
    assert [event[0] for event in await watcher.events(2)] == revisions[3:]


async def test_a_slow_watch_that_is_overtaken_by_a_compaction_is_cancelled_not_silently_shortened(
    channel: grpc.aio.Channel, ask: Ask, put: Any, small_window: None
) -> None:
    slow = Watcher(channel)
    await slow.create(**ALL)
    written = [(await put(b"k", bytes(100_000)), b"k", bytes(100_000)) for _ in range(200)]
    await compact(ask, written[-2][0])
    seen: list[Any] = []
    while not (answer := await slow.read()).canceled:
        seen += [told(event) for event in answer.events]
    assert answer.compact_revision == written[-2][0]
    assert seen == written[: len(seen)]
    assert len(seen) < len(written)
    slow.call.cancel()


async def test_a_compaction_does_not_disturb_watches_that_are_up_to_date(watcher: Watcher, ask: Ask, put: Any) -> None:
    await watcher.create(**ALL)
    for i in range(20):
        revision = await put(b"k", b"%d" % i)
        assert await watcher.events(1) == [(revision, b"k", b"%d" % i)]
        await compact(ask, revision)
    quiet = await watcher.create(key=b"other")
    revision = await put(b"other")
    assert {(await watcher.read()).watch_id, (await watcher.read()).watch_id} == {0, quiet.watch_id}


async def test_progress_that_is_asked_for_comes_after_all_events(
    watcher: Watcher, put: Any, small_window: None
) -> None:
    first = await put(b"k")
    for _ in range(20):
        revision = await put(b"k")
    await watcher.create(**ALL, start_revision=first)
    await watcher.send(progress=pb.WatchProgressRequest())
    seen = 0
    while (answer := await watcher.read()).watch_id != -1:
        seen += len(answer.events)
    assert (seen, answer.header.revision, len(answer.events)) == (21, revision, 0)


async def test_quiet_watches_are_told_their_progress_if_they_want_it(
    watcher: Watcher, server: MetadataServer, put: Any
) -> None:
    await watcher.create(key=b"a", watch_id=1, progress_notify=True)
    await watcher.create(key=b"b", watch_id=2, progress_notify=True)
    await watcher.create(key=b"c", watch_id=3)
    await put(b"b")
    revision = await put(b"d")
    assert (await watcher.read()).watch_id == 2
    (stream,) = server._streams
    stream.tell_progress()
    answer = await watcher.read()
    assert (answer.watch_id, answer.header.revision, len(answer.events)) == (1, revision, 0)
    stream.tell_progress()
    assert {(await watcher.read()).watch_id for _ in range(2)} == {1, 2}


async def test_a_large_revision_is_told_in_fragments_to_who_takes_them(
    watcher: Watcher, ask: Ask, put: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watch_stream, "FRAGMENT_BYTES_MAX", 1000)
    await watcher.create(**ALL, watch_id=1, fragment=True)
    operations = [pb.RequestOp(put=pb.PutRequest(key=b"%d" % i, value=bytes(300))) for i in range(9)]
    await ask("KV/Txn", pb.TxnRequest(success=operations), pb.TxnResponse)
    answers = [await watcher.read()]
    while answers[-1].fragment:
        answers.append(await watcher.read())
    assert len(answers) == 3
    assert [event.kv.key for answer in answers for event in answer.events] == [b"%d" % i for i in range(9)]


async def test_a_client_that_has_stopped_sending_still_receives(watcher: Watcher, put: Any) -> None:
    await watcher.create(key=b"a")
    await watcher.call.done_writing()
    revision = await put(b"a")
    assert await watcher.events(1) == [(revision, b"a", b"")]


async def test_watches_end_with_their_stream(server: MetadataServer, channel: grpc.aio.Channel, put: Any) -> None:
    watchers = [Watcher(channel) for _ in range(3)]
    for watcher in watchers:
        await watcher.create(key=b"a")
        await watcher.create(**ALL)
    assert server._watches.total == 6
    for watcher in watchers:
        watcher.call.cancel()
    await wait_until(lambda: server._watches.total == 0 and not server._streams)
    assert not server._watches._of_key
    assert not server._watches._of_ranges


async def test_a_server_that_stops_sends_its_watches_elsewhere(watcher: Watcher, server: MetadataServer) -> None:
    await watcher.create(key=b"a")
    await server.stop(0)
    assert await watcher.call.code() is grpc.StatusCode.UNAVAILABLE


async def test_bytes_that_are_no_request_end_the_stream(watcher: Watcher) -> None:
    await watcher.call.write(b"\xff\xff\xff")
    assert await watcher.call.code() is grpc.StatusCode.INVALID_ARGUMENT


async def test_a_client_that_asks_and_does_not_read_is_not_read_any_more(
    server: MetadataServer, watcher: Watcher, put: Any
) -> None:
    for _ in range(12):
        first = await put(b"k", bytes(1_000_000))  # together more than gRPC takes for a stream that is not read

    async def flood() -> None:
        await watcher.send(create=pb.WatchCreateRequest(key=b"k", start_revision=first - 11))
        while True:
            await watcher.send(create=pb.WatchCreateRequest(key=b"b", range_end=b"a"))

    flooding = asyncio.create_task(flood())
    await wait_until(lambda: bool(server._streams))
    (stream,) = server._streams
    await wait_until(lambda: len(stream._answers) == watch_stream.WAITING_ANSWERS_MAX)
    for _ in range(20):
        await put(b"others are served")
        assert len(stream._answers) <= watch_stream.WAITING_ANSWERS_MAX
    flooding.cancel()


async def wait_until(holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(WAIT_S):
        while not holds():  # noqa: ASYNC110
            await asyncio.sleep(0.01)
