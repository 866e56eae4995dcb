"""Shards of a busy topic are handed to and fro between two brokers: clients notice nothing."""

from __future__ import annotations

import sys
from contextlib import AsyncExitStack
from pathlib import Path

import grpc.aio
import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "broker"))
sys.path.insert(0, str(Path(__file__).parents[1] / "performance"))

from broker_world import Calls, Cluster
from hand_off import measure

from magnetar.client import connect

HAND_OFFS = 20
MESSAGES_PER_S = 300.0


@pytest.mark.timeout(120)
async def test_hand_offs_under_load_lose_duplicate_reorder_and_fail_nothing(tmp_path: Path) -> None:
    async with AsyncExitStack() as stack:
        cluster = Cluster(tmp_path, stack)
        await stack.enter_async_context(cluster.store)
        for bookie in range(3):
            await cluster.start_bookie(f"bookie{bookie}")
        stack.push_async_callback(cluster.stop_brokers)
        servers = ",".join([(await cluster.start_broker(f"broker{number}")).address for number in range(2)])
        client = await stack.enter_async_context(connect(servers))
        channel = await stack.enter_async_context(grpc.aio.insecure_channel(servers.split(",")[0]))
        # It judges what was stored, and what came to the consumers.
        figures = await measure(client, Calls(channel), HAND_OFFS, MESSAGES_PER_S, between_s=0.05, warm_up_s=0.2)
    assert figures["hand_offs"] == HAND_OFFS
    print({name: round(figure, 1) for name, figure in figures.items()})
