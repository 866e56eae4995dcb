"""Brokers whose clocks are wrong by an hour, and clients of another time."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from magnetar.bookie.bookie import Bookie
from magnetar.bookie.entry_store import EntryStore
from magnetar.bookie.memory import MemoryEntryStore
from magnetar.broker.broker import Broker
from magnetar.client import EARLIEST, LATEST, Client, MagnetarError, RetriableError, connect
from magnetar.client import connection as client_connection
from magnetar.ledger.bookie_directory import BookieDirectory
from magnetar.metadata.keyspace import Keyspace
from magnetar.metadata.memory import MemoryStore
from magnetar.node.settings import BookieSettings, BrokerSettings

KEYSPACE = Keyspace("test")
HOUR_US = 3_600_000_000

StartBroker = Callable[[str, int], Awaitable[Broker]]


async def open_memory(directory: Path, memory_bytes: int) -> EntryStore:
    return MemoryEntryStore()


@pytest.fixture
async def start_broker(tmp_path: Path) -> AsyncIterator[StartBroker]:
    """Starts a broker whose clock is wrong by so many microseconds, on three bookies whose clocks differ too."""
    async with AsyncExitStack() as stack:
        store = await stack.enter_async_context(MemoryStore())
        bookies = {}
        for number in range(3):
            settings = BookieSettings(id=f"bookie{number}", cluster="test", data_dir=tmp_path / str(number))
            wrong_us = (number - 1) * HOUR_US
            bookie = await Bookie.start(
                settings, store, KEYSPACE, serve=False, open_store=open_memory, now_us=clock(wrong_us)
            )
            stack.push_async_callback(bookie.stop)
            bookies[settings.id] = bookie

        async def start(name: str, wrong_us: int) -> Broker:
            directory = BookieDirectory(store, KEYSPACE, lambda found: bookies[found.bookie_id].local())
            await stack.enter_async_context(directory)
            settings = BrokerSettings(id=name, cluster="test", listen="127.0.0.1:0", lease_s=1)
            return await Broker.start(settings, store, KEYSPACE, directory, now_us=clock(wrong_us))

        yield start


def clock(wrong_us: int) -> Callable[[], int]:
    return lambda: time.time_ns() // 1000 + wrong_us


async def publish(client: Client, numbers: range) -> None:
    async with client.producer("t", name="p") as producer:
        await producer.send_many([b"%d" % number for number in numbers])


@pytest.mark.parametrize(("first_us", "second_us"), [(HOUR_US, 0), (0, HOUR_US), (HOUR_US, -HOUR_US)])
async def test_a_clock_that_is_an_hour_off_harms_nothing(
    start_broker: StartBroker, first_us: int, second_us: int
) -> None:
    begin = datetime.now(UTC)
    first = await start_broker("broker0", first_us)
    async with connect(first.address) as client:
        await publish(client, range(100))
        async with client.stream_consumer("t", subscription="s", start=EARLIEST) as consumer:
            for _ in range(30):
                message = await consumer.receive()
            await consumer.ack(message)
    # The next owner has another time.
    await first.stop()
    second = await start_broker("broker1", second_us)
    async with connect(second.address) as client:
        await publish(client, range(100, 200))
        async with client.reader("t", start=EARLIEST, stop=LATEST) as reader:
            messages = [message async for message in reader]
        assert [int(message.payload) for message in messages] == list(range(200))
        times = [message.publish_time for message in messages]
        assert times == sorted(times), "a publish time went back"
        assert begin + timedelta(microseconds=min(first_us, 0)) <= times[0] + timedelta(seconds=1)
        async with client.stream_consumer("t", subscription="s") as consumer:
            found = await consumer.receive()
            assert int(found.payload) == 30
            await consumer.seek(messages[150].publish_time)
            found = await consumer.receive()
            # The first of those that were published at that time.
            assert found.publish_time == messages[150].publish_time
    await second.stop()


async def test_a_client_of_an_older_protocol_is_told_the_range_at_once(
    start_broker: StartBroker, monkeypatch: pytest.MonkeyPatch
) -> None:
    broker = await start_broker("broker0", 0)
    monkeypatch.setattr(client_connection, "PROTOCOL_VERSION", 0)
    async with connect(broker.address, timeout=20) as client:
        with pytest.raises(MagnetarError, match="use a client of another version client=`0-0` server=`1-1`") as told:
            await publish(client, range(1))
        assert not isinstance(told.value, RetriableError)
        with pytest.raises(MagnetarError, match="client=`0-0` server=`1-1`"):
            async with client.stream_consumer("t", subscription="s") as consumer:
                await consumer.receive()
    await broker.stop()
