"""Clients that mean ill, against a real standalone: it stays up, serves the others, and tells nobody of its insides."""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import socket
import struct
import subprocess
import sys
import urllib.request
from collections.abc import AsyncIterator, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
import zstandard

from magnetar.client import EARLIEST, Client, MagnetarError, connect
from magnetar.v1 import admin_pb2, broker_pb2, common_pb2, metadata_pb2
from magnetar.wire.batch import Codec, Columns, encode_batch, parse_header, restamp

PATIENCE_S = 20.0
KEEP_ALL = metadata_pb2.StartPosition(earliest=True)
MALFORMED = common_pb2.ERROR_REASON_MALFORMED
INSIDES = ("Traceback", "call failed", "internal error", 'File "')
"""What the server writes only about its own defects."""


class Server:
    """A standalone in a process of its own."""

    def __init__(self, directory: Path) -> None:
        self._stderr = directory / "stderr"
        command = [
            str(Path(sys.executable).with_name("magnetar")), "standalone", "--data-dir", str(directory / "data"),
            "--port", "0", "--http-port", "0", "--bookies", "3", "--output", "json",
        ]  # fmt: skip
        with self._stderr.open("w") as stderr:
            self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=stderr, text=True)
        assert self.process.stdout is not None
        ready = json.loads(self.process.stdout.readline())
        self.address: str = ready["server"]
        self.http: str = ready["http"]

    @property
    def said(self) -> str:
        return self._stderr.read_text()

    @property
    def rss_bytes(self) -> int:
        [line] = [line for line in Path(f"/proc/{self.process.pid}/status").read_text().splitlines() if "VmRSS" in line]
        return int(line.split()[1]) << 10

    @property
    def threads(self) -> int:
        return len(list(Path(f"/proc/{self.process.pid}/task").iterdir()))

    def stop(self) -> None:
        self.process.send_signal(signal.SIGTERM)
        self.process.wait(PATIENCE_S)
        assert self.process.stdout is not None
        self.process.stdout.close()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("hostile"))
    yield server
    server.stop()


@pytest.fixture(autouse=True)
def _nothing_of_its_insides(server: Server) -> Iterator[None]:
    yield
    assert server.process.poll() is None
    assert not [inside for inside in INSIDES if inside in server.said], server.said


@pytest.fixture
async def client(server: Server) -> AsyncIterator[Client]:
    async with connect(server.address, timeout=PATIENCE_S) as client:
        yield client


@pytest.fixture
async def channel(server: Server) -> AsyncIterator[grpc.aio.Channel]:
    options = (("grpc.use_local_subchannel_pool", 1), ("grpc.max_send_message_length", -1))
    async with grpc.aio.insecure_channel(server.address, options=options) as channel:
        yield channel


async def others_are_served(client: Client, topic: str = "others") -> None:
    async with asyncio.timeout(PATIENCE_S), client.producer(topic) as producer:
        assert (await producer.send(b"still here")).offset is not None


class Raw:
    """A greeted stream of hand-made frames."""

    def __init__(self, channel: grpc.aio.Channel, method: str) -> None:
        self._call = channel.stream_stream(f"/magnetar.v1.BrokerService/{method}")()
        self._frame, self._response = {
            "Produce": (broker_pb2.ProduceRequest, broker_pb2.ProduceResponse),
            "Consume": (broker_pb2.ConsumeRequest, broker_pb2.ConsumeResponse),
        }[method]

    async def greet(self) -> Raw:
        await self.send(hello=common_pb2.Hello(protocol_min=1, protocol_max=1, name="hostile"))
        assert (await self.receive()).hello.protocol == 1
        return self

    async def send(self, **frame: Any) -> None:
        await self.send_raw(self._frame(**frame).SerializeToString())

    async def send_raw(self, data: bytes) -> None:
        await self._call.write(data)

    async def receive(self) -> Any:
        async with asyncio.timeout(PATIENCE_S):
            data: Any = await self._call.read()
        return None if data is grpc.aio.EOF else self._response.FromString(data)

    async def reason(self) -> int:
        """Of the error that ends the stream."""
        while (frame := await self.receive()) is not None:
            if frame.HasField("error"):
                reason: int = frame.error.reason
                return reason
        raise AssertionError("the stream ended without an error")

    def cancel(self) -> None:
        self._call.cancel()


async def shard_of(channel: grpc.aio.Channel, topic: str) -> int:
    request = broker_pb2.ResolveRequest(topic=topic, create=True).SerializeToString()
    answer: Any = await channel.unary_unary("/magnetar.v1.BrokerService/Resolve")(request)
    return broker_pb2.ResolveResponse.FromString(answer).layout.shards[0].shard_id


async def publish_raw(channel: grpc.aio.Channel, topic: str, *batches: bytes) -> None:
    stream = await Raw(channel, "Produce").greet()
    shard = await shard_of(channel, topic)
    await stream.send(open=broker_pb2.OpenProducer(handle=1, topic=topic, shard_id=shard, producer_id=b"p" * 16))
    assert (await stream.receive()).opened
    for data in batches:
        await stream.send(batches=broker_pb2.ProduceBatches(batches=[broker_pb2.ProduceBatch(handle=1, batch=data)]))
        assert (await stream.receive()).stored
    stream.cancel()


def a_batch(first: int, payloads: list[bytes], codec: Codec = Codec.NONE) -> bytes:
    last = first + len(payloads) - 1
    return encode_batch(Columns(payloads), producer_id=b"p" * 16, epoch=0, previous=first - 1, last=last, codec=codec)


def sealed(data: bytes) -> bytes:
    """With its own length and a right checksum, whatever else it says."""
    from fastcrc import crc32

    changed = bytearray(data)
    struct.pack_into(">I", changed, 4, len(changed))
    struct.pack_into(">I", changed, 8, crc32.iscsi(bytes(changed[12:])))
    return bytes(changed)


def exchange(address: str, data: bytes, *, reset: bool = False) -> bytes:
    """What the server answers until it cuts the connection off; nothing if it is reset from here."""
    host, _, port = address.removeprefix("http://").rpartition(":")
    with closing(socket.create_connection((host, int(port)), timeout=PATIENCE_S)) as connection:
        connection.sendall(data)
        if reset:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            return b""
        answer = b""
        try:
            while part := connection.recv(65536):
                answer += part
        except ConnectionResetError:
            pass
        return answer


GARBAGE = [
    b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(500),
    b"\xff" * 5000,
]


@pytest.mark.parametrize("data", GARBAGE, ids=["http", "tls", "junk"])
async def test_strangers_on_the_port_for_clients_are_cut_off(server: Server, client: Client, data: bytes) -> None:
    await asyncio.to_thread(exchange, server.address, data)
    await others_are_served(client)


async def test_strangers_on_the_http_port_are_answered_or_cut_off_without_a_word(server: Server) -> None:
    for data in (*GARBAGE, b"GET /" + b"a" * 100_000 + b" HTTP/1.1\r\n\r\n", b"POST /metrics HTTP/1.1\r\n\r\n"):
        answer = await asyncio.to_thread(exchange, server.http, data + b"\r\n\r\n")
        assert b"Python" not in answer
    for data in (b"GET /metrics HTTP/1.0\r\n\r\n", b"GET /met", b""):
        for _ in range(10):
            await asyncio.to_thread(exchange, server.http, data, reset=True)
    with await asyncio.to_thread(urllib.request.urlopen, server.http + "/livez", timeout=PATIENCE_S) as response:
        assert response.status == 200


async def test_slow_requests_on_the_http_port_are_few_and_short(server: Server) -> None:
    host, _, port = server.http.removeprefix("http://").rpartition(":")
    slow = [socket.create_connection((host, int(port)), timeout=PATIENCE_S) for _ in range(100)]
    try:
        threads = server.threads
        cut_off = 0
        async with asyncio.timeout(PATIENCE_S):
            while cut_off < len(slow):
                cut_off = 0
                for connection in slow:
                    try:
                        connection.sendall(b"G")
                    except OSError:
                        cut_off += 1
                await asyncio.sleep(0.2)
        assert threads < 90
    finally:
        for connection in slow:
            connection.close()


SERVICES = (
    broker_pb2.DESCRIPTOR.services_by_name["BrokerService"],
    admin_pb2.DESCRIPTOR.services_by_name["AdminService"],
)
UNARY = [
    (service.full_name, method.name)
    for service in SERVICES
    for method in service.methods
    if not (method.server_streaming or method.client_streaming)
]


async def test_random_bytes_on_every_call_are_refused_with_a_reason(channel: grpc.aio.Channel, client: Client) -> None:
    rng = random.Random(11)
    for service, method in UNARY:
        for _ in range(40):
            data = rng.randbytes(rng.randrange(1, 50))
            try:
                await channel.unary_unary(f"/{service}/{method}")(data)
            except grpc.aio.AioRpcError as refused:
                error = common_pb2.Error.FromString(dict(refused.trailing_metadata() or ())["magnetar-error-bin"])
                assert error.reason not in (0, common_pb2.ERROR_REASON_INTERNAL), (method, data)
                assert error.message
                assert "Error" not in error.message
    await others_are_served(client)


async def test_large_junk_is_not_kept(server: Server, channel: grpc.aio.Channel) -> None:
    junk = b"\xff" * 8_000_000
    describe = channel.unary_unary("/magnetar.v1.AdminService/DescribeTopic")
    before = server.rss_bytes
    for _ in range(50):
        with pytest.raises(grpc.aio.AioRpcError):
            await describe(junk)
    assert server.rss_bytes - before < 100 << 20


CORRUPT = (
    b"\xff\xff\xff",
    b"\x0a\x05abc",
    b"\x0a\xff\xff\xff\xff\x0f",
    b"\x07",
)
"""No message at all to protobuf: a tag cut off, a field cut off, a length of 4 GiB, a wire type that does not exist.

Random bytes will not do: three of a hundred are a field that a later version might have, and those are let pass.
"""


@pytest.mark.parametrize("method", ["Produce", "Consume"])
async def test_frames_out_of_place_end_their_stream_with_the_reason(channel: grpc.aio.Channel, method: str) -> None:
    stream = await Raw(channel, method).greet()
    await stream.send(hello=common_pb2.Hello(protocol_min=1, protocol_max=1))
    assert await stream.reason() == common_pb2.ERROR_REASON_PROTOCOL_VIOLATION
    stream = Raw(channel, method)
    await stream.send_raw(b"")
    assert await stream.reason() == common_pb2.ERROR_REASON_PROTOCOL_VIOLATION
    stream = Raw(channel, method)
    await stream.send(hello=common_pb2.Hello(protocol_min=7, protocol_max=9))
    assert await stream.reason() == common_pb2.ERROR_REASON_UNSUPPORTED_VERSION
    for frame in CORRUPT:
        stream = await Raw(channel, method).greet()
        await stream.send_raw(frame)
        assert await stream.reason() == MALFORMED


async def test_batches_that_lie_are_skipped_by_consumers_with_words(client: Client, channel: grpc.aio.Channel) -> None:
    """The broker does not look into bodies; what consumers cannot decode costs them that batch, and no memory."""
    bomb = zstandard.ZstdCompressor().compress(bytes(1 << 28))
    honest = a_batch(0, [b"x" * 1000], Codec.ZSTD)
    directory_end = parse_header(honest).body_offset + 4 + 24
    lying = bytearray(honest[:directory_end])
    struct.pack_into(">I", lying, directory_end - 4, len(bomb))
    million = bytearray(a_batch(0, [b"x"]))
    struct.pack_into(">I", million, 16, 1_000_000)
    struct.pack_into(">qq", million, 48, 0, 1_000_000)
    cut = restamp(sealed(a_batch(1_000_001, [b"a", b"b"])[:-1]), previous=1_000_000)
    after = restamp(a_batch(1_000_003, [b"after"]), previous=1_000_002)
    await publish_raw(channel, "lies", sealed(bytes(lying) + bomb), sealed(bytes(million)), cut, after)
    async with client.stream_consumer("lies", subscription="s", start=EARLIEST) as consumer:
        for _ in range(3):
            with pytest.raises(MagnetarError, match="cannot be decoded"):
                await consumer.receive(timeout=PATIENCE_S)
        assert (await consumer.receive(timeout=PATIENCE_S)).payload == b"after"


async def test_clients_that_do_not_read_or_stand_still_hold_up_nobody(
    server: Server, client: Client, channel: grpc.aio.Channel
) -> None:
    payloads = [os.urandom(20_000) for _ in range(500)]
    async with client.producer("flood") as producer:
        await producer.send_many(payloads)
        shard = await shard_of(channel, "flood")
        credit = broker_pb2.Credit(handle=1, messages=(1 << 31) - 1, bytes=1 << 46)
        reader = broker_pb2.OpenReader(handle=1, topic="flood", shard_id=shard, start=KEEP_ALL)
        deaf = [await Raw(channel, "Consume").greet() for _ in range(20)]
        for stream in deaf:
            await stream.send(open_readers=[reader], credits=[credit])
        before = server.rss_bytes
        for _ in range(10):
            await producer.send_many(payloads)
    assert server.rss_bytes - before < 250 << 20
    for stream in deaf:
        stream.cancel()
    await others_are_served(client)


async def test_thousands_of_openings_and_a_sudden_leave_hold_up_nobody(
    client: Client, channel: grpc.aio.Channel
) -> None:
    async with client.producer("many") as producer:
        for _ in range(20):
            await producer.send_many([b"x"] * 50)
    shard = await shard_of(channel, "many")
    stream = await Raw(channel, "Consume").greet()
    handles = range(5000)
    await stream.send(
        open_readers=[
            broker_pb2.OpenReader(handle=handle, topic="many", shard_id=shard, start=KEEP_ALL) for handle in handles
        ],
        credits=[broker_pb2.Credit(handle=handle, messages=1 << 30, bytes=1 << 46) for handle in handles],
    )
    assert (await stream.receive()).opened
    await others_are_served(client)
    stream.cancel()
    await others_are_served(client)


async def test_many_connections_come_and_go(server: Server, client: Client) -> None:
    host, _, port = server.address.rpartition(":")
    half_open = [socket.create_connection((host, int(port)), timeout=PATIENCE_S) for _ in range(300)]
    try:
        await others_are_served(client)
        async with connect(server.address, timeout=PATIENCE_S) as newcomer:
            await others_are_served(newcomer)
    finally:
        for connection in half_open:
            connection.close()
