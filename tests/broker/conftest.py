"""A cluster in one process with one broker, for the tests of this folder; `broker_world` has the parts."""

from __future__ import annotations

import sys
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import TYPE_CHECKING

import grpc.aio
import pytest

sys.path.insert(0, str(Path(__file__).parent))

from broker_world import Calls, Cluster, ProduceClient

if TYPE_CHECKING:
    from magnetar.broker.broker import Broker


@pytest.fixture
async def cluster(tmp_path: Path) -> AsyncIterator[Cluster]:
    async with AsyncExitStack() as stack:
        cluster = Cluster(tmp_path, stack)
        await stack.enter_async_context(cluster.store)
        for number in range(3):
            await cluster.start_bookie(f"bookie{number}")
        stack.push_async_callback(cluster.stop_brokers)
        yield cluster


@pytest.fixture
async def broker(cluster: Cluster) -> Broker:
    return await cluster.start_broker()


@pytest.fixture
async def connect() -> AsyncIterator[Callable[[Broker], Calls]]:
    async with AsyncExitStack() as stack:
        channels: list[grpc.aio.Channel] = []

        def open_channel(broker: Broker) -> Calls:
            # Each its own connection: channels to one address would share it.
            # And windows that do not grow: what a client that reads nothing takes in stays the same in every run.
            options = (
                ("grpc.use_local_subchannel_pool", 1),
                ("grpc.max_receive_message_length", 8 << 20),
                ("grpc.http2.bdp_probe", 0),
            )
            channels.append(grpc.aio.insecure_channel(f"127.0.0.1:{broker.port}", options=options))
            return Calls(channels[-1])

        yield open_channel
        for channel in channels:
            stack.push_async_callback(channel.close)


@pytest.fixture
async def calls(broker: Broker, connect: Callable[[Broker], Calls]) -> Calls:
    return connect(broker)


@pytest.fixture
def produce(calls: Calls) -> Callable[[], ProduceClient]:
    return lambda: ProduceClient(calls)
