"""The bookie role: a storage node in a process of its own."""

from __future__ import annotations

from collections.abc import Callable

from magnetar.bookie.bookie import Bookie
from magnetar.bookie.cookies import BookieRefusal, repair_identity
from magnetar.cli.roles.connections import bookie_directory
from magnetar.cli.roles.process import Ready, RoleRefused, join, run_role, start_http
from magnetar.node.lifecycle import Stack
from magnetar.node.settings import BookieSettings
from magnetar.node.telemetry import new_registry
from magnetar.repair.workers import RepairWorkers


def run_bookie(settings: BookieSettings, on_ready: Callable[[Ready], None], repair_bookie: str | None = None) -> None:
    """Runs until SIGINT or SIGTERM.

    repair_bookie   the id of this bookie, whose directory was lost: it may start empty, and the others hold the data
    Raises RoleRefused, with everything stopped, when it cannot start.
    """

    async def start(parts: Stack) -> Ready:
        return await _start(settings, repair_bookie, parts)

    run_role(settings, start, on_ready, (BookieRefusal,))


async def _start(settings: BookieSettings, repair_bookie: str | None, parts: Stack) -> Ready:
    if repair_bookie not in (None, settings.id):
        raise RoleRefused(
            f"this is another bookie: --repair-bookie takes its own id id=`{settings.id}` asked=`{repair_bookie}`"
        )
    registry = new_registry()
    started: list[Bookie] = []

    def problems() -> list[str]:
        return started[0].problems() if started else [f"bookie {settings.id} is starting"]

    http = start_http(settings, registry, problems, parts)
    store, keyspace = await join(settings, parts)
    if repair_bookie is not None and not await repair_identity(store, keyspace, repair_bookie):
        raise RoleRefused(f"there is no bookie {repair_bookie} to repair: start it without --repair-bookie")
    bookie = await Bookie.start(settings, store, keyspace, registry=registry, http_address=http)
    parts.push("bookie", bookie.stop)
    started.append(bookie)
    directory = await bookie_directory(settings.cluster, store, keyspace, parts)
    reborn = bookie.identity.limbo_floor > 0
    workers = RepairWorkers(settings.id, bookie.local(), directory, store, keyspace, registry, reborn=reborn)
    workers.start()
    parts.push("repair", workers.stop)
    return Ready("bookie", settings.id, bookie.address, http, settings.cluster)
