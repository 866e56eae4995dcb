"""The broker role: a server of topics in a process of its own, with its bookies in others."""

from __future__ import annotations

from collections.abc import Callable

from magnetar.broker.broker import Broker
from magnetar.cli.roles.connections import bookie_directory
from magnetar.cli.roles.process import Ready, join, run_role, start_http
from magnetar.node.lifecycle import Stack
from magnetar.node.settings import BrokerSettings
from magnetar.node.telemetry import new_registry


def run_broker(settings: BrokerSettings, on_ready: Callable[[Ready], None]) -> None:
    """Runs until SIGINT or SIGTERM. Raises RoleRefused, with everything stopped, when it cannot start."""

    async def start(parts: Stack) -> Ready:
        return await _start(settings, parts)

    run_role(settings, start, on_ready)


async def _start(settings: BrokerSettings, parts: Stack) -> Ready:
    registry = new_registry()
    started: list[Broker] = []

    def problems() -> list[str]:
        return started[0].problems() if started else [f"broker {settings.id} is starting"]

    http = start_http(settings, registry, problems, parts)
    store, keyspace = await join(settings, parts)
    directory = await bookie_directory(settings.cluster, store, keyspace, parts)
    broker = await Broker.start(settings, store, keyspace, directory, registry=registry, http_address=http)
    parts.push("broker", broker.stop)
    started.append(broker)
    return Ready("broker", settings.id, broker.address, http, settings.cluster)
