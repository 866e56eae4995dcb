"""The life of a role process: settings, telemetry, the cluster it joins, one ready line, and a stop in order."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import structlog
from prometheus_client import CollectorRegistry

from magnetar.metadata.codec import DamagedRecord
from magnetar.metadata.etcd import EtcdMetadata
from magnetar.metadata.etcd_channel import NoMetadataStore
from magnetar.metadata.instance import join_cluster
from magnetar.metadata.keyspace import Keyspace
from magnetar.metadata.store import MetadataError, MetadataStore, MetadataUnavailable
from magnetar.node import lifecycle
from magnetar.node.registration import IdInUse
from magnetar.node.rpc import ListenError
from magnetar.node.settings import (
    BookieSettings,
    BrokerSettings,
    Joining,
    Listening,
    MetadataSettings,
    is_every_interface,
    is_loopback,
    split_address,
)
from magnetar.node.settings_loading import Loaded, SettingsError, load_settings
from magnetar.node.telemetry import HttpServer, configure_logging

__all__ = ["SETTINGS", "Ready", "RoleRefused", "SettingsError", "exposed", "load", "run_role"]

METADATA_WAIT_S_MIN = 1.0
NAME_ANOTHER = "name the right one with --set metadata=etcd://HOST:PORT"

SETTINGS: dict[str, type[Listening]] = {
    "metadata": MetadataSettings,
    "bookie": BookieSettings,
    "broker": BrokerSettings,
}

log = structlog.get_logger("magnetar.roles")
T = TypeVar("T")


class RoleRefused(Exception):
    """The role cannot start as asked, or did not end well; the message is one line with cause and remedy."""


@dataclass(frozen=True, slots=True)
class Ready:
    """Where a role that serves is reached; printed once."""

    role: str
    id: str
    address: str
    http: str
    cluster: str


async def never() -> str:
    """Of a role that nothing ends but a signal."""
    await asyncio.get_running_loop().create_future()
    raise AssertionError("nobody sets it")


def load(role: str, assignments: list[str], file: Path | None) -> Loaded[Any]:
    """The settings of a role, from command line, environment and file. Raises SettingsError."""
    return load_settings(SETTINGS[role], role, assignments=assignments, file=file, environment=os.environ)


def run_role(
    settings: Listening,
    start: Callable[[lifecycle.Stack], Coroutine[Any, Any, Ready]],
    on_ready: Callable[[Ready], None],
    refusals: tuple[type[Exception], ...] = (),
    until_broken: Callable[[], Coroutine[Any, Any, str]] = never,
) -> None:
    """Runs until SIGINT or SIGTERM, also during the start; a second signal ends the process at once.

    until_broken   of what was started: returns why it cannot go on, for a supervisor to start it again
    Raises RoleRefused, with everything stopped, when the role cannot start, or cannot go on.
    """
    configure_logging(os.environ.get("MAGNETAR_LOG", "warning"))
    _check_reachable(settings)
    expected: tuple[type[Exception], ...] = (MetadataError, DamagedRecord, ListenError, IdInUse, *refusals)

    async def main(stop: asyncio.Event) -> None:
        parts = lifecycle.Stack()
        try:
            ready = await unless_stopped(start(parts), stop)
            if ready is not None:
                on_ready(ready)
                broken = await unless_stopped(until_broken(), stop)
                if broken is not None:
                    raise RoleRefused(broken)
        except expected as refusal:
            raise RoleRefused(str(refusal)) from None
        finally:
            await parts.close_in_time()

    lifecycle.run(main)


async def unless_stopped(work: Coroutine[Any, Any, T], stop: asyncio.Event) -> T | None:
    """What it returns; None if the process was asked to stop before."""
    working = asyncio.create_task(work, name="start or run")
    stopping = asyncio.create_task(stop.wait(), name="stop asked for")
    try:
        await asyncio.wait({working, stopping}, return_when=asyncio.FIRST_COMPLETED)
        return await working if working.done() else None
    finally:
        stopping.cancel()
        working.cancel()
        await asyncio.wait({working, stopping})


def _check_reachable(settings: Listening) -> None:
    if is_every_interface(split_address(settings.listen)[0]) and not settings.advertised_address:
        raise RoleRefused(
            "listening on every interface, others must be told where to connect to: "
            f"give this host with --set advertised_address=HOST:PORT listen=`{settings.listen}`"
        )


def exposed(settings: Listening) -> list[str]:
    """Addresses that other hosts can reach, without security."""
    return [
        address for address in (settings.listen, settings.http_address) if not is_loopback(split_address(address)[0])
    ]


def start_http(
    settings: Listening, registry: CollectorRegistry, problems: Callable[[], list[str]], parts: lifecycle.Stack
) -> str:
    """Serves /metrics, /livez and /readyz and returns where. Raises ListenError."""
    http = HttpServer(registry, problems)
    port = http.start(settings.http_address)
    parts.push("http", http.stop)
    return f"{split_address(settings.http_address)[0]}:{port}"


async def join(settings: Joining, parts: lifecycle.Stack) -> tuple[MetadataStore, Keyspace]:
    """The metadata store, which has answered, and the keys of this cluster in it.

    Raises RoleRefused when it does not answer in time, MetadataError when it is not the right one.
    """
    try:
        store = await EtcdMetadata.open(settings.metadata, open_s=max(settings.metadata_wait_s, METADATA_WAIT_S_MIN))
    except MetadataUnavailable as error:
        raise RoleRefused(f"{error}; start one with `magnetar metadata`, or {NAME_ANOTHER}") from None
    except NoMetadataStore as error:
        raise RoleRefused(f"{error}; {NAME_ANOTHER}") from None
    parts.push("metadata", store.close)
    keyspace = Keyspace(settings.cluster)
    await join_cluster(store, keyspace, new_cluster=settings.new_cluster)
    return store, keyspace
