"""Opening, closing, forking: when a client may be used."""

from __future__ import annotations

import asyncio
import sys
import threading
from collections.abc import AsyncIterator, Callable
from functools import partial
from typing import Any

import pytest
from scripted_broker import Fate, ScriptedBroker, ScriptedCluster, error

from magnetar.client import (
    EARLIEST,
    Client,
    ClientClosed,
    ClusterUnavailable,
    InvalidArgument,
    MagnetarError,
    TopicNotFound,
    connect,
)

TOPIC = "public/default/clicks"


def test_connect_touches_no_loop_and_no_thread() -> None:
    threads = threading.active_count()
    client = connect("localhost:7650,other:1")
    assert threading.active_count() == threads
    with pytest.raises(ClientClosed, match="async with"):
        client.producer("clicks")


@pytest.mark.parametrize("servers", ["", "localhost", "localhost:", ":7650", "localhost:x", "a:1,,b:2", "a:70000", 7])
def test_addresses_that_are_none_are_refused(servers: Any) -> None:
    with pytest.raises(InvalidArgument):
        connect(servers)


@pytest.mark.parametrize("timeout", [0, -1.0, float("nan"), float("inf")])
def test_a_timeout_that_is_none_is_refused(timeout: float) -> None:
    with pytest.raises(InvalidArgument, match="timeout"):
        connect("localhost:7650", timeout=timeout)


async def test_a_client_is_entered_once(broker: ScriptedBroker) -> None:
    client = connect(broker.address)
    async with client:
        pass
    with pytest.raises(ClientClosed, match="only once"):
        async with client:
            raise AssertionError


async def test_what_was_closed_says_so(broker: ScriptedBroker) -> None:
    async with connect(broker.address) as client:
        async with client.producer("clicks") as producer:
            pass
        with pytest.raises(ClientClosed, match="producer is closed"):
            await producer.send(b"x")
        await producer.close()
        async with client.stream_consumer("clicks", subscription="s", start=EARLIEST) as consumer:
            pass
        for attempt in (consumer.receive(), consumer.receive_batch(), consumer.seek(EARLIEST), anext(consumer)):
            with pytest.raises(ClientClosed, match="consumer is closed"):
                await attempt
        unopened = client.producer("clicks")
        with pytest.raises(ClientClosed, match="not open"):
            unopened.send_nowait(b"x")
    with pytest.raises(ClientClosed, match="client is closed"):
        async with client.producer("clicks"):
            raise AssertionError
    with pytest.raises(ClientClosed, match="client is closed"):
        await client.admin.topics.list()


async def test_closing_a_client_closes_what_is_open_and_waits_for_it(
    cluster: ScriptedCluster, broker: ScriptedBroker
) -> None:
    async with connect(broker.address) as client:
        producer = await client.producer("clicks").__aenter__()
        receipt = producer.send_nowait(b"x")
        consumer = await client.stream_consumer("clicks", subscription="s", start=EARLIEST).__aenter__()
        consumer.ack(await consumer.receive(timeout=5))
    assert receipt.done()
    assert cluster.topics[TOPIC].shards[1].subscriptions["s"].floor == 1
    with pytest.raises(ClientClosed):
        producer.send_nowait(b"y")


async def test_what_is_closed_is_closed_at_the_broker_too_while_the_client_goes_on(
    cluster: ScriptedCluster, broker: ScriptedBroker
) -> None:
    """Else the broker keeps for ever what nobody uses."""
    async with connect(broker.address) as client:
        async with client.producer("clicks") as producer:
            await producer.send(b"x")
            async with client.reader("clicks", start=EARLIEST) as reader:
                await reader.receive(timeout=5)
            [stream] = [stream for stream in broker.streams if stream.sessions]
            await cluster.until(lambda: not stream.sessions)
        [stream] = [stream for stream in broker.streams if stream.handles]
        await cluster.until(lambda: not stream.handles)


async def test_a_receiver_that_waits_hears_of_the_closing(client: Client) -> None:
    async with client.stream_consumer("clicks", subscription="s") as consumer:
        waiting = asyncio.create_task(consumer.receive())
        await asyncio.sleep(0)
        await consumer.close()
        with pytest.raises(ClientClosed):
            await waiting


async def test_closing_gives_up_after_the_timeout_and_says_what_is_unknown(
    cluster: ScriptedCluster, connecting: Callable[[float], Client]
) -> None:
    cluster.on_batch = lambda shard, header: Fate.DROP
    async with connecting(0.5) as client:
        with pytest.raises(ClusterUnavailable, match="may or may not be stored"):
            async with client.producer("clicks") as producer:
                producer.send_nowait(b"x")


async def test_an_error_in_the_block_is_not_hidden_by_what_happens_to_messages(
    cluster: ScriptedCluster, connecting: Callable[[float], Client]
) -> None:
    cluster.on_batch = lambda shard, header: Fate.DROP
    async with connecting(0.5) as client:
        producer = client.producer("clicks")
        with pytest.raises(ZeroDivisionError):
            async with producer:
                raise ZeroDivisionError(producer.send_nowait(b"x"))


async def test_a_broker_that_refuses_the_topic_is_heard_at_the_door(cluster: ScriptedCluster, client: Client) -> None:
    from scripted_broker import error

    cluster.on_resolve = lambda topic: error("TOPIC_NOT_FOUND", "topics are not created here")
    for part in (client.producer("x"), client.reader("x"), client.queue_consumer("x", subscription="s")):
        with pytest.raises(TopicNotFound, match="not created here"):
            async with part:
                raise AssertionError


async def test_another_server_answers_when_the_first_is_gone(cluster: ScriptedCluster, broker: ScriptedBroker) -> None:
    gone = await cluster.broker()
    address = gone.address
    await gone.stop()
    async with connect(f"{address},{broker.address}", timeout=5) as client, client.producer("clicks") as producer:
        assert (await producer.send(b"x")).offset == 0


async def test_a_broker_that_does_not_answer_is_not_waited_for_longer_than_asked(broker: ScriptedBroker) -> None:
    async def say_nothing(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()
        writer.close()

    silent = await asyncio.start_server(say_nothing, "127.0.0.1", 0)
    async with silent, connect(f"127.0.0.1:{silent.sockets[0].getsockname()[1]}", timeout=0.3) as client:
        begin = asyncio.get_running_loop().time()
        with pytest.raises(ClusterUnavailable):
            async with client.producer("clicks"):
                raise AssertionError
        assert asyncio.get_running_loop().time() - begin < 5.0


async def test_what_is_not_a_broker_is_named(unused_tcp_port_server: str) -> None:
    async with connect(unused_tcp_port_server, timeout=0.5) as client:
        with pytest.raises(MagnetarError, match=unused_tcp_port_server):
            await client.admin.topics.list()


@pytest.fixture
async def unused_tcp_port_server() -> Any:
    """A server that speaks something else."""

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"220 mail.example ESMTP\r\n")
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(talk, "127.0.0.1", 0)
    async with server:
        yield f"127.0.0.1:{server.sockets[0].getsockname()[1]}"


async def test_no_task_is_left_behind(broker: ScriptedBroker) -> None:
    before = {task.get_name() for task in asyncio.all_tasks()}
    async with (
        connect(broker.address) as client,
        client.producer("clicks") as producer,
        client.stream_consumer("clicks", subscription="s", start=EARLIEST) as consumer,
    ):
        await producer.send(b"x")
        consumer.ack(await consumer.receive(timeout=5))
    left = {task.get_name() for task in asyncio.all_tasks()} - before
    assert not [name for name in left if name.startswith(("/magnetar", "Lane", "StreamFeed", "resolve"))]


ASYNCHRONOUS_PARENT = """
async def main():
    async with connect(sys.argv[1]) as client, client.producer("clicks") as producer:
        await producer.send(b"x")
        in_a_child(lambda: producer.send_nowait(b"y"), lambda: client.producer("clicks"))
        print("offset", (await producer.send(b"z")).offset)

from magnetar.client import connect
asyncio.run(main())
"""

BLOCKING_PARENT = """
from magnetar.client.sync import connect
with connect(sys.argv[1]) as client, client.producer("clicks") as producer:
    producer.send(b"x")
    in_a_child(lambda: producer.send(b"y"), lambda: client.producer("clicks").__enter__())
    in_a_child(lambda: client.__exit__(None, None, None))
    print("offset", producer.send(b"z").offset)
"""

IN_A_CHILD = """
import asyncio, os, sys

def in_a_child(*uses):
    child = os.fork()
    if child == 0:
        for use in uses:
            try:
                use()
            except Exception as error:
                print(type(error).__name__, error, flush=True)
        os._exit(0)
    os.waitpid(child, 0)
"""


@pytest.mark.parametrize("parent", [ASYNCHRONOUS_PARENT, BLOCKING_PARENT], ids=["asynchronous", "blocking"])
async def test_a_forked_child_gets_a_clear_error_and_the_parent_goes_on(broker: ScriptedBroker, parent: str) -> None:
    # In a process of its own: the client prepares gRPC for forks when it is the first to import it.
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", IN_A_CHILD + parent, broker.address, stdout=asyncio.subprocess.PIPE
    )
    said, _ = await process.communicate()
    lines = said.decode().splitlines()
    assert [line.split()[0] for line in lines] == ["ClientClosed", "ClientClosed", "offset"]
    assert all("connect again after a fork" in line for line in lines[:2])
    assert lines[2] == "offset 1"


# --- calls that any broker answers ---

SILENCE_TIMEOUT_S = 1.0


@pytest.fixture
async def two(cluster: ScriptedCluster, broker: ScriptedBroker) -> AsyncIterator[Client]:
    """A client of two brokers."""
    other = await cluster.broker()
    async with connect(f"{broker.address},{other.address}", timeout=SILENCE_TIMEOUT_S) as client:
        yield client


async def test_a_call_that_no_broker_answers_takes_one_timeout_however_many_there_are(
    cluster: ScriptedCluster, two: Client
) -> None:
    for broker in cluster.brokers:
        broker.answering.clear()
    for call in (two.admin.topics.list, partial(two.admin.topics.create, "t")):
        begin = asyncio.get_running_loop().time()
        with pytest.raises(
            ClusterUnavailable, match="no answer in time, so what was asked for may have been done or not"
        ):
            await call()
        assert asyncio.get_running_loop().time() - begin < 2 * SILENCE_TIMEOUT_S


async def test_what_a_broker_says_of_a_failure_is_told_though_the_last_one_that_was_asked_is_silent(
    cluster: ScriptedCluster, broker: ScriptedBroker, two: Client
) -> None:
    told = error("UNAVAILABLE", "the metadata store does not answer: start it")
    cluster.on_admin = lambda asked: told
    cluster.brokers[1].answering.clear()
    for call in (two.admin.topics.list, partial(two.admin.topics.create, "t")):
        with pytest.raises(ClusterUnavailable, match="the metadata store does not answer: start it"):
            await call()
