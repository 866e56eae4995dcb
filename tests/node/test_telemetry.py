"""/metrics, /livez and /readyz."""

from __future__ import annotations

import asyncio
import json
import urllib.error
import urllib.request
from collections.abc import AsyncIterator

import pytest
from prometheus_client import CollectorRegistry, Counter

from magnetar.node.rpc import ListenError
from magnetar.node.telemetry import HttpServer


def fetch(port: int, path: str) -> tuple[int, bytes]:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=10) as response:
            return response.status, response.read()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read()


@pytest.fixture
async def problems() -> list[str]:
    return []


@pytest.fixture
async def port(problems: list[str]) -> AsyncIterator[int]:
    registry = CollectorRegistry()
    Counter("magnetar_flights", "Flights.", registry=registry).inc(3)
    server = HttpServer(registry, lambda: problems)
    yield server.start("127.0.0.1:0")
    await server.stop()


async def test_metrics_are_served_in_the_text_format(port: int) -> None:
    status, body = await asyncio.to_thread(fetch, port, "/metrics")
    assert status == 200
    assert b"magnetar_flights_total 3.0" in body


async def test_a_process_with_problems_lives_but_is_not_ready(port: int, problems: list[str]) -> None:
    assert (await asyncio.to_thread(fetch, port, "/readyz"))[0] == 200
    problems.append("no session in the metadata store")
    status, body = await asyncio.to_thread(fetch, port, "/readyz")
    assert status == 503
    assert json.loads(body)["problems"] == problems
    assert (await asyncio.to_thread(fetch, port, "/livez"))[0] == 200


async def test_unknown_paths_are_not_found(port: int) -> None:
    assert (await asyncio.to_thread(fetch, port, "/etc/passwd"))[0] == 404


async def test_a_port_in_use_is_one_clear_line(port: int) -> None:
    with pytest.raises(ListenError, match="cannot listen on"):
        HttpServer(CollectorRegistry(), list).start(f"127.0.0.1:{port}")
