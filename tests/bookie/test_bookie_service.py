"""The real service on loopback, called by the real client and by clients that do not keep to the rules."""

from __future__ import annotations

import asyncio
import random
import signal
import sys
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest

from magnetar.bookie.memory import MemoryEntryStore
from magnetar.bookie.service import TOKENS_PER_STREAM_MAX, Tokens
from magnetar.ledger.bookie_rpc import AddResult, AddStatus, EntryOutcome
from magnetar.ledger.bookie_wire import (
    FRAME_BYTES_MAX,
    UnexpectedAnswer,
    encode_add,
    encode_lac,
    encode_read,
    frame_of_items,
    read_result_from_message,
)
from magnetar.ledger.grpc_bookie import ITEMS_PER_FRAME_MAX, GrpcBookie
from magnetar.v1 import bookie_pb2 as pb
from magnetar.v1 import common_pb2
from magnetar.wire.envelope import HEADER_SIZE

HELLO = common_pb2.Hello(protocol_min=1, protocol_max=1, name="test")
MALFORMED = common_pb2.ERROR_REASON_MALFORMED
VIOLATION = common_pb2.ERROR_REASON_PROTOCOL_VIOLATION


@pytest.fixture
async def bookie(bookies: Any, held_disk: Any) -> AsyncIterator[Any]:
    yield await bookies.start(serve=True, store=MemoryEntryStore(held_disk.sync))
    held_disk.release()


@pytest.fixture
async def client(bookie: Any) -> AsyncIterator[GrpcBookie]:
    client = GrpcBookie("bookie0", bookie.address)
    yield client
    await client.close()


class RawStream:
    """One stream of frames that are made by hand."""

    def __init__(self, channel: grpc.aio.Channel, method: str) -> None:
        self._call = channel.stream_stream(f"/magnetar.v1.BookieService/{method}")()
        self._response = {
            "AddEntries": pb.AddEntriesResponse,
            "ReadEntries": pb.ReadEntriesResponse,
            "ReadLac": pb.ReadLacResponse,
        }[method]

    async def send(self, data: bytes) -> None:
        await self._call.write(data)

    async def end(self) -> None:
        await self._call.done_writing()

    async def receive(self) -> Any:
        """The next frame; None at the end of the stream."""
        data: Any = await self._call.read()
        return None if data is grpc.aio.EOF else self._response.FromString(data)

    async def greet(self) -> Any:
        await self.send(pb.AddEntriesRequest(hello=HELLO).SerializeToString())
        return (await self.receive()).hello

    def cancel(self) -> None:
        self._call.cancel()


@pytest.fixture
async def channel(bookie: Any) -> AsyncIterator[grpc.aio.Channel]:
    async with grpc.aio.insecure_channel(bookie.address) as channel:
        yield channel


async def test_entries_go_there_and_come_back_as_the_same_bytes(client: GrpcBookie, writer: Any) -> None:
    ledger = writer(7)
    assert await client.add(ledger.add(0, 1, payload=b"x" * 70_000)) == AddResult(AddStatus.OK)
    read = await client.read(ledger.read(0, 2))
    assert [answer.outcome.name for answer in read.answers] == ["HAVE", "HAVE", "PROVABLY_NOT"]
    assert [answer.entry for answer in read.answers[:2]] == [ledger.entry(e, b"x" * 70_000) for e in (0, 1)]
    lac = await client.read_lac(ledger.lac())
    assert (lac.outcome, lac.lac, lac.last_entry, lac.fenced, lac.epoch) == (EntryOutcome.HAVE, 0, 1, False, 1)


async def test_every_refusal_arrives_as_what_it_is(client: GrpcBookie, writer: Any) -> None:
    ledger = writer(7, 3)
    await client.add(ledger.add(0))
    assert (await client.add(ledger.add(1, epoch=2))).status is AddStatus.STALE_EPOCH
    assert (await client.add(ledger.add(0, payload=b"other"))).status is AddStatus.CONFLICT
    assert (await client.add(ledger.add(1)._replace(token=b"other"))).status is AddStatus.WRONG_TOKEN
    assert (await client.add(ledger.add(1)._replace(entries=(b"junk",)))).status is AddStatus.MALFORMED
    fenced = await client.read(ledger.read(1, 1, fence=True, epoch=4))
    assert fenced.answers[0].outcome is EntryOutcome.PROVABLY_NOT
    assert (await client.add(ledger.add(1))).status is AddStatus.FENCED
    assert (await client.read_lac(ledger.lac())).fenced
    wrong = await client.read_lac(replace(ledger.lac(), token=b"other"))
    assert (wrong.outcome, bool(wrong.message)) == (EntryOutcome.UNKNOWN, True)


async def test_the_largest_entry_travels_alone(client: GrpcBookie, writer: Any) -> None:
    big = b"x" * (5 << 20)
    assert (await client.add(writer(7).add(0, payload=big))).status is AddStatus.OK
    read = await client.read(writer(7).read(0, 0))
    assert read.answers[0].entry == writer(7).entry(0, big)


async def test_an_answer_has_at_most_a_frame_of_entries_and_at_least_one(client: GrpcBookie, writer: Any) -> None:
    for entry_id in range(5):
        await client.add(writer(7).add(entry_id, payload=b"x" * 300_000))
    read = await client.read(replace(writer(7).read(0, 4), max_bytes=1 << 30))
    assert len(read.answers) == 3
    read = await client.read(replace(writer(7).read(0, 4), max_bytes=0))
    assert len(read.answers) == 1


async def test_headers_alone_are_answered_for_entries_that_verify(client: GrpcBookie, writer: Any) -> None:
    ledger = writer(7)
    assert (await client.add(ledger.add(0, 1, payload=b"x" * 10_000))).status is AddStatus.OK
    whole = await client.read(ledger.read(0, 2))
    headers = await client.read(replace(ledger.read(0, 2), headers_only=True))
    assert [answer.outcome for answer in headers.answers] == [answer.outcome for answer in whole.answers]
    assert [answer.entry for answer in headers.answers] == [
        None if answer.entry is None else answer.entry[:HEADER_SIZE] for answer in whole.answers
    ]


async def test_calls_that_wait_share_frames_both_ways(
    channel: grpc.aio.Channel, client: GrpcBookie, held_disk: Any, writer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    frames = {"sent": 0}
    parse = pb.AddEntriesRequest.ParseFromString
    assert parse is not None
    await client.add(writer(1).add(0))
    send = client._adds._next_frame

    def counting() -> bytes | None:
        frames["sent"] += 1
        return send()

    monkeypatch.setattr(client._adds, "_next_frame", counting)
    answers = await asyncio.gather(*(client.add(writer(i).add(0)) for i in range(2, 502)))
    assert {answer.status for answer in answers} == {AddStatus.OK}
    assert frames["sent"] <= 500 / ITEMS_PER_FRAME_MAX + 2


async def test_a_frame_stays_below_its_limit(client: GrpcBookie, writer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    send = client._adds._next_frame

    def measuring() -> bytes | None:
        frame = send()
        sizes.append(len(frame or b""))
        return frame

    monkeypatch.setattr(client._adds, "_next_frame", measuring)
    await asyncio.gather(*(client.add(writer(7).add(e, payload=b"x" * 100_000)) for e in range(40)))
    assert max(sizes) <= FRAME_BYTES_MAX
    assert len(sizes) <= 8


async def test_adds_of_a_ledger_are_judged_in_the_order_they_were_given(
    client: GrpcBookie, bookie: Any, writer: Any
) -> None:
    futures = [client.add(writer(7).add(0, payload=b"%d" % n)) for n in range(200)]
    statuses = [(await future).status for future in futures]
    assert statuses == [AddStatus.OK] + [AddStatus.CONFLICT] * 199


async def test_the_first_frame_is_a_hello_and_the_answer_names_the_bookie(channel: grpc.aio.Channel) -> None:
    stream = RawStream(channel, "AddEntries")
    reply = await stream.greet()
    assert (reply.protocol, reply.node_id, reply.cluster) == (1, "bookie0", "magnetar")
    assert reply.max_frame_bytes == FRAME_BYTES_MAX
    await stream.end()
    assert await stream.receive() is None


async def test_a_protocol_of_another_time_is_refused_naming_both_ranges(channel: grpc.aio.Channel) -> None:
    stream = RawStream(channel, "ReadLac")
    hello = common_pb2.Hello(protocol_min=3, protocol_max=9)
    await stream.send(pb.ReadLacRequest(hello=hello).SerializeToString())
    error = (await stream.receive()).error
    assert error.reason == common_pb2.ERROR_REASON_UNSUPPORTED_VERSION
    assert "offered=`3-9` spoken=`1-1`" in error.message
    assert await stream.receive() is None


def a_group(writer: Any, request_id: int = 1, **changes: Any) -> pb.AddGroup:
    return pb.AddGroup.FromString(b"".join(encode_add(request_id, writer(7).add(0)._replace(**changes))))


async def test_frames_that_break_the_rules_end_their_stream_and_no_other(
    channel: grpc.aio.Channel, client: GrpcBookie, writer: Any
) -> None:
    add = a_group(writer)
    hello = pb.AddEntriesRequest(hello=HELLO).SerializeToString()
    cases = [
        ([pb.AddEntriesRequest(groups=[add]).SerializeToString()], VIOLATION),
        ([pb.AddEntriesRequest(hello=HELLO, groups=[add]).SerializeToString()], VIOLATION),
        ([b"\xff\xff\xff"], MALFORMED),
        ([b""], VIOLATION),
        ([hello, hello], VIOLATION),
        ([hello, b"\x12\xff"], MALFORMED),
        ([hello, b""], MALFORMED),
    ]
    bystander = RawStream(channel, "AddEntries")
    await bystander.greet()
    for frames, reason in cases:
        stream = RawStream(channel, "AddEntries")
        for frame in frames:
            await stream.send(frame)
        answer = await stream.receive()
        if answer.HasField("hello"):
            answer = await stream.receive()
        assert answer.error.reason == reason, frames
        assert await stream.receive() is None
    await bystander.send(pb.AddEntriesRequest(groups=[add]).SerializeToString())
    assert (await bystander.receive()).stored == [1]
    assert (await client.add(writer(8).add(0))).status is AddStatus.OK
    bystander.cancel()


async def test_what_was_ready_is_answered_before_a_stream_ends_with_an_error(
    channel: grpc.aio.Channel, writer: Any
) -> None:
    stream = RawStream(channel, "AddEntries")
    await stream.greet()
    await stream.send(pb.AddEntriesRequest(groups=[a_group(writer, 17)]).SerializeToString())
    assert (await stream.receive()).stored == [17]
    await stream.send(b"\xff")
    assert (await stream.receive()).error.reason == MALFORMED


@pytest.mark.parametrize("method", ["AddEntries", "ReadEntries", "ReadLac"])
async def test_random_bytes_never_harm_more_than_their_stream(
    channel: grpc.aio.Channel, client: GrpcBookie, writer: Any, method: str
) -> None:
    rng = random.Random(f"random bytes for {method}")
    await client.add(writer(7).add(0))
    valid = {
        "AddEntries": pb.AddEntriesRequest(
            groups=[a_group(writer, ledger_id=9), a_group(writer, 2)]
        ).SerializeToString(),
        "ReadEntries": frame_of_items([encode_read(1, writer(7).read(0, 5, fence=True))]),
        "ReadLac": frame_of_items([encode_lac(1, writer(7).lac(fence=True))]),
    }[method]
    for _ in range(150):
        frame = bytearray(rng.randbytes(rng.randrange(60)) if rng.random() < 0.3 else valid)
        for _ in range(rng.randrange(6)):
            if frame:
                frame[rng.randrange(len(frame))] = rng.randrange(256)
        stream = RawStream(channel, method)
        if rng.random() < 0.9:
            await stream.greet()
        await stream.send(bytes(frame))
        await stream.end()
        while (answer := await stream.receive()) is not None:
            assert answer.HasField("error") or answer.results or answer.stored
    read = await client.read(writer(7).read(0, 0))
    assert read.answers[0].entry == writer(7).entry(0)


async def test_a_token_is_named_once_a_stream(channel: grpc.aio.Channel, writer: Any) -> None:
    stream = RawStream(channel, "AddEntries")
    await stream.greet()
    second = encode_add(2, writer(7).add(1)._replace(token=b""))
    await stream.send(frame_of_items([encode_add(1, writer(7).add(0)), second]))
    stored: list[int] = []
    while len(stored) < 2:
        stored += (await stream.receive()).stored
    assert stored == [1, 2]
    other = RawStream(channel, "AddEntries")
    await other.greet()
    await other.send(frame_of_items([second]))
    assert (await other.receive()).results[0].status == pb.ADD_STATUS_MALFORMED
    stream.cancel()
    other.cancel()


def test_the_tokens_a_stream_can_name_once_are_bounded() -> None:
    tokens = Tokens()
    for ledger_id in range(TOKENS_PER_STREAM_MAX + 10):
        assert tokens.of(ledger_id, b"t") == b"t"
    assert tokens.of(TOKENS_PER_STREAM_MAX - 1, b"") == b"t"
    assert tokens.of(TOKENS_PER_STREAM_MAX, b"") == b""


async def test_a_client_that_takes_no_answers_is_not_read_from_for_ever(
    channel: grpc.aio.Channel, client: GrpcBookie, bookie: Any, writer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ten thousand reads of a large entry are sent and none is taken: what they hold in the bookie is bounded."""
    await client.add(writer(7).add(0, payload=b"x" * 900_000))
    under_way = {"now": 0, "most": 0}
    read = bookie.handlers.read

    def counting(group: Any) -> Any:
        under_way["now"] += 1
        under_way["most"] = max(under_way["most"], under_way["now"])
        return read(group)

    monkeypatch.setattr(bookie.handlers, "read", counting)
    stream = RawStream(channel, "ReadEntries")
    await stream.send(pb.ReadEntriesRequest(hello=HELLO).SerializeToString())
    await stream.receive()
    await stream.send(frame_of_items([encode_read(n, writer(7).read(0, 0)) for n in range(10_000)]))
    for _ in range(3):
        await client.read_lac(writer(7).lac())
    await asyncio.wait_for(client.add(writer(8).add(0)), 5)
    assert 0 < under_way["most"] < 100
    stream.cancel()


async def test_a_bookie_that_does_not_answer_in_time_has_no_answer(bookie: Any, held_disk: Any, writer: Any) -> None:
    client = GrpcBookie("bookie0", bookie.address, timeout_s=0.3)
    assert (await client.add(writer(7).add(0))).status is AddStatus.OK
    held_disk.hold()
    add, fence, lac = await asyncio.gather(
        client.add(writer(7).add(1)),
        client.read(writer(8).read(0, 0, fence=True)),
        client.read_lac(writer(9).lac(fence=True)),
    )
    assert add.status is AddStatus.NO_ANSWER
    assert fence.answers[0].outcome is EntryOutcome.UNKNOWN
    assert lac.outcome is EntryOutcome.UNKNOWN
    held_disk.release()
    assert (await client.add(writer(7).add(1))).status is AddStatus.OK
    await client.close()


async def test_an_unreachable_bookie_answers_at_once_with_no_answer(writer: Any) -> None:
    client = GrpcBookie("nobody", "127.0.0.1:1", timeout_s=20)
    async with asyncio.timeout(10):
        assert (await client.add(writer(7).add(0))).status is AddStatus.NO_ANSWER
        read = await client.read(writer(7).read(0, 9))
        assert [answer.outcome for answer in read.answers] == [EntryOutcome.UNKNOWN]
        assert (await client.read_lac(writer(7).lac())).outcome is EntryOutcome.UNKNOWN
    await client.close()
    assert (await client.add(writer(7).add(0))).status is AddStatus.NO_ANSWER


@pytest.mark.parametrize(("bookie_id", "cluster"), [("bookie1", "magnetar"), ("bookie0", "another")])
async def test_another_bookie_at_the_address_is_not_written_to(
    bookie: Any, writer: Any, bookie_id: str, cluster: str
) -> None:
    client = GrpcBookie(bookie_id, bookie.address, cluster=cluster)
    result = await client.add(writer(7).add(0))
    assert result.status is AddStatus.NO_ANSWER
    assert "another bookie answers at this address id=`bookie0` cluster=`magnetar`" in result.message
    read = await client.read(writer(7).read(0, 0))
    assert [answer.outcome for answer in read.answers] == [EntryOutcome.UNKNOWN]
    await client.close()
    client = GrpcBookie("bookie0", bookie.address, cluster="magnetar")
    assert (await client.add(writer(7).add(0))).status is AddStatus.OK
    await client.close()


async def test_closing_a_client_completes_what_waits(bookie: Any, held_disk: Any, writer: Any) -> None:
    client = GrpcBookie("bookie0", bookie.address)
    held_disk.hold()
    add = client.add(writer(7).add(0))
    await held_disk.syncing.wait()
    late = client.add(writer(7).add(1))
    await client.close()
    assert (await add).status is AddStatus.NO_ANSWER
    assert (await late).status is AddStatus.NO_ANSWER


async def test_what_waits_for_a_bookie_is_bounded_and_told_busy(bookie: Any, held_disk: Any, writer: Any) -> None:
    client = GrpcBookie("bookie0", bookie.address, held_bytes_max=100_000)
    held_disk.hold()
    adds = [client.add(writer(7).add(e, payload=b"x" * 10_000)) for e in range(30)]
    busy = [add for add in adds if add.done()]
    assert len(busy) == 21
    assert {add.result().status for add in busy} == {AddStatus.BUSY}
    held_disk.release()
    statuses = [(await add).status for add in adds]
    assert statuses.count(AddStatus.OK) == 9
    assert (await client.add(writer(7).add(9))).status is AddStatus.OK
    await client.close()


async def started(directory: Path, port: int) -> tuple[asyncio.subprocess.Process, str]:
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        str(Path(__file__).with_name("serving_process.py")),
        str(directory),
        str(port),
        stdout=asyncio.subprocess.PIPE,
    )
    assert process.stdout is not None
    address = (await process.stdout.readline()).decode().strip()
    assert address, "the process ended by itself"
    return process, address


async def test_a_client_lives_through_the_kill_of_its_bookie_and_finds_it_again(tmp_path: Path, writer: Any) -> None:
    process, address = await started(tmp_path, 0)
    client = GrpcBookie("bookie0", address)
    adds = {e: client.add(writer(7).add(e, payload=b"x" * 2000)) for e in range(2000)}
    await adds[500]
    process.send_signal(signal.SIGKILL)
    results = {e: await add for e, add in adds.items()}
    acked = {e for e, result in results.items() if result.status is AddStatus.OK}
    assert {result.status for result in results.values()} <= {AddStatus.OK, AddStatus.NO_ANSWER, AddStatus.BUSY}
    await process.wait()
    assert (await client.add(writer(7).add(5000))).status is AddStatus.NO_ANSWER
    process, _ = await started(tmp_path, int(address.rpartition(":")[2]))
    async with asyncio.timeout(15):
        while (await client.add(writer(7).add(5001))).status is not AddStatus.OK:
            pass
    for e in acked:
        read = await client.read(writer(7).read(e, e))
        assert read.answers[0].entry == writer(7).entry(e, b"x" * 2000), (e, read.message)
    process.kill()
    await process.wait()
    await client.close()


async def test_ledgers_are_listed_and_the_status_told(
    channel: grpc.aio.Channel, client: GrpcBookie, writer: Any
) -> None:
    await client.add(writer(7, 2).add(0))
    await client.add(writer(9, 1).add(0))
    await client.read_lac(writer(9, 5).lac(fence=True))
    await client.read_lac(writer(11, 5).lac(fence=True))
    call = channel.unary_stream("/magnetar.v1.BookieService/ListLedgers")(b"")
    frames = [pb.ListLedgersResponse.FromString(data) async for data in call]
    found = [(ledger.ledger_id, ledger.fenced, ledger.limbo, ledger.epoch) for f in frames for ledger in f.ledgers]
    assert found == [(7, False, False, 2), (9, True, False, 5)]
    data = await channel.unary_unary("/magnetar.v1.BookieService/Status")(b"")
    status = pb.StatusResponse.FromString(data)
    assert (status.bookie_id, status.ledgers, status.limbo) == ("bookie0", 2, False)
    assert status.state == 1
    assert status.disk_total_bytes == 1000 << 20
    assert status.stored_bytes > 0


@pytest.mark.parametrize("outcomes", [[], [1], [1, 2], [1, 1, 1]])
def test_an_answer_that_contradicts_itself_is_not_believed(outcomes: list[Any]) -> None:
    message = pb.ReadResult(outcomes=outcomes, entries=[b"a", b"b"] if len(outcomes) != 1 else [])
    with pytest.raises(UnexpectedAnswer):
        read_result_from_message(message)


def test_an_outcome_of_a_later_version_is_unknown() -> None:
    result = read_result_from_message(pb.ReadResult(outcomes=[9, 0, 2]))  # type: ignore[list-item]
    assert [answer.outcome.name for answer in result.answers] == ["UNKNOWN", "UNKNOWN", "PROVABLY_NOT"]
