"""The metadata role: a metadata store with etcd's API in a process of its own."""

from __future__ import annotations

from collections.abc import Callable

from magnetar.cli.roles.process import Ready, run_role, start_http
from magnetar.metadata.server.server import MetadataServer
from magnetar.node.lifecycle import Stack
from magnetar.node.settings import MetadataSettings
from magnetar.node.telemetry import new_registry


def run_metadata(settings: MetadataSettings, on_ready: Callable[[Ready], None]) -> None:
    """Runs until SIGINT or SIGTERM.

    Raises RoleRefused, with everything stopped, when it cannot start, or when its database failed: it must be opened
    again then.
    """
    started: list[MetadataServer] = []

    async def start(parts: Stack) -> Ready:
        return await _start(settings, parts, started)

    async def until_broken() -> str:
        return await started[0].until_broken()

    run_role(settings, start, on_ready, until_broken=until_broken)


async def _start(settings: MetadataSettings, parts: Stack, started: list[MetadataServer]) -> Ready:
    registry = new_registry()

    def problems() -> list[str]:
        return started[0].problems() if started else ["the metadata server is starting"]

    http = start_http(settings, registry, problems, parts)
    server = await MetadataServer.open(
        settings.data_dir, settings.listen, registry, advertised_address=settings.advertised_address
    )
    parts.push("metadata server", server.stop)
    started.append(server)
    return Ready("metadata", "", server.address, http, "")
