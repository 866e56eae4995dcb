"""The standalone: a metadata store, bookies and a broker put together in one process."""

from __future__ import annotations

import asyncio
import os
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import structlog
from prometheus_client import CollectorRegistry

from magnetar.bookie.bookie import Bookie
from magnetar.bookie.cookies import BookieRefusal, repair_identity
from magnetar.broker.broker import Broker
from magnetar.cli.roles.process import unless_stopped
from magnetar.ledger.bookie_directory import BookieDirectory
from magnetar.ledger.bookie_rpc import BookieRpc
from magnetar.metadata.codec import DamagedRecord
from magnetar.metadata.keyspace import Keyspace
from magnetar.metadata.records import BookieRegistration
from magnetar.metadata.sqlite import SqliteStore
from magnetar.metadata.store import MetadataError
from magnetar.node import lifecycle
from magnetar.node.registration import IdInUse
from magnetar.node.rpc import ListenError
from magnetar.node.settings import MIB, BookieSettings, BrokerSettings
from magnetar.node.settings_loading import SettingsError, make_settings
from magnetar.node.telemetry import HttpServer, configure_logging, new_registry
from magnetar.node.wording import number_of
from magnetar.repair.workers import RepairWorkers

CLUSTER = "standalone"
ENSEMBLE_MAX = 3
BOOKIES_MAX = 9
STANDALONE_LEASE_S = 5.0
BOOKIE_MEMORY_BYTES = 64 * MIB
PENDING_BYTES = 12 * MIB
"""What producers may have under way. A bookie queues a quarter of its memory: what fits there never finds it busy."""

REFUSALS = (BookieRefusal, MetadataError, DamagedRecord, ListenError, IdInUse, SettingsError)
"""What a role may refuse to start for; each message is one line with cause and remedy."""

log = structlog.get_logger("magnetar.roles")


class StandaloneRefused(Exception):
    """The standalone cannot start as asked; the message names cause and remedy."""


@dataclass(frozen=True, slots=True)
class Standalone:
    """What to start: `bookies` None = as many as the directory holds, or one.

    repair_bookie   a bookie whose directory was lost: it may start empty, and the others hold the data
    advertise       host:port where clients reach it; empty = what it listens on
    """

    data_dir: Path
    host: str = "127.0.0.1"
    port: int = 7650
    http_port: int | None = None
    bookies: int | None = None
    repair_bookie: str | None = None
    advertise: str = ""


@dataclass(frozen=True, slots=True)
class Ready:
    """Where a started standalone can be reached."""

    server: str
    http: str
    data_dir: str
    bookies: int


def run_standalone(standalone: Standalone, on_ready: Callable[[Ready], None]) -> None:
    """Runs until SIGINT or SIGTERM.

    Raises StandaloneRefused, with everything stopped, when it cannot start, or when its metadata database failed: it
    must be opened again then.
    """
    configure_logging(os.environ.get("MAGNETAR_LOG", "warning"))

    async def main(stop: asyncio.Event) -> None:
        parts = lifecycle.Stack()
        try:
            store = await _open_store(standalone.data_dir, parts)
            on_ready(await _start(standalone, store, parts))
            broken = await unless_stopped(store.engine.until_broken(), stop)
            if broken is not None:
                raise StandaloneRefused(broken)
        except REFUSALS as refusal:
            raise StandaloneRefused(str(refusal)) from None
        except OSError as error:
            reason = (error.strerror or str(error)).lower()
            raise StandaloneRefused(f"cannot use {standalone.data_dir}: {reason}; choose another --data-dir") from None
        finally:
            await parts.close_in_time()

    lifecycle.run(main)


async def _open_store(data_dir: Path, parts: lifecycle.Stack) -> SqliteStore:
    data_dir.mkdir(parents=True, exist_ok=True)  # noqa: ASYNC240  # before anything else runs
    # The lock on the metadata file keeps a second process out, so every lease in it belonged to a dead one.
    store = await SqliteStore.open(data_dir / "metadata.sqlite", drop_leases=True)
    parts.push("metadata", store.close)
    return store


async def _start(standalone: Standalone, store: SqliteStore, parts: lifecycle.Stack) -> Ready:
    data_dir = standalone.data_dir
    registry = new_registry()
    keyspace = Keyspace(CLUSTER)
    if standalone.repair_bookie is not None and not await repair_identity(store, keyspace, standalone.repair_bookie):
        raise StandaloneRefused(f"there is no bookie {standalone.repair_bookie} to repair: see magnetar cluster health")
    count = bookie_count(data_dir, standalone.bookies, await _stamped_bookies(store, keyspace))
    bookies = await _start_bookies(data_dir, count, store, keyspace, registry, parts)

    def connect(registration: BookieRegistration) -> BookieRpc:
        return bookies[registration.bookie_id].local()

    directory = BookieDirectory(store, keyspace, connect)
    await directory.start()
    parts.push("bookie directory", directory.stop)
    for bookie in bookies.values():
        reborn = bookie.identity.limbo_floor > 0
        workers = RepairWorkers(bookie.id, bookie.local(), directory, store, keyspace, registry, reborn=reborn)
        workers.start()
        parts.push(f"repair by {bookie.id}", workers.stop)

    write_quorum = min(ENSEMBLE_MAX, count)
    settings = make_settings(
        BrokerSettings,
        "broker",
        {
            "id": "broker0",
            "cluster": CLUSTER,
            "listen": f"{standalone.host}:{standalone.port}",
            "advertised_address": standalone.advertise,
            "ensemble_size": write_quorum,
            "write_quorum": write_quorum,
            "ack_quorum": write_quorum // 2 + 1,
            "pending_bytes": PENDING_BYTES,
            "lease_s": STANDALONE_LEASE_S,
        },
        "--host, --port or --advertise",
    )
    broker = await Broker.start(settings, store, keyspace, directory, registry=registry)
    parts.push("broker", broker.stop)

    def problems() -> list[str]:
        return [*broker.problems(), *(problem for bookie in bookies.values() for problem in bookie.problems())]

    http = HttpServer(registry, problems)
    http_port = standalone.http_port
    if http_port is None:
        http_port = broker.port + 1 if standalone.port else 0
    bound_port = http.start(f"{standalone.host}:{http_port}")
    parts.push("http", http.stop)
    log.info("standalone is ready", version=lifecycle.software_version(), bookies=count)
    return Ready(
        server=f"{standalone.host}:{broker.port}",
        http=f"http://{standalone.host}:{bound_port}",
        data_dir=str(data_dir),
        bookies=count,
    )


async def _start_bookies(
    data_dir: Path,
    count: int,
    store: SqliteStore,
    keyspace: Keyspace,
    registry: CollectorRegistry,
    parts: lifecycle.Stack,
) -> dict[str, Bookie]:
    bookies = {}
    for number in range(count):
        settings = BookieSettings(
            id=f"bookie{number}",
            data_dir=data_dir / f"bookie{number}",
            cluster=CLUSTER,
            memory_bytes=BOOKIE_MEMORY_BYTES,
            lease_s=STANDALONE_LEASE_S,
        )
        # It takes no connections: the broker is in this process.
        bookie = await Bookie.start(settings, store, keyspace, registry=registry, serve=False)
        parts.push(settings.id, bookie.stop)
        bookies[settings.id] = bookie
    return bookies


def bookie_count(data_dir: Path, asked: int | None, stamped: Iterable[str] = ()) -> int:
    """How many bookies to start. Raises StandaloneRefused when fewer are asked for than hold data.

    stamped   ids of all bookies that ever were, as metadata has them: a lost directory does not make one fewer
    """
    names = {*(path.name for path in data_dir.iterdir()), *stamped}
    present = 1 + max((int(name[6:]) for name in names if re.fullmatch(r"bookie\d{1,3}", name)), default=-1)
    if asked is None:
        return present or 1
    if asked < present:
        raise StandaloneRefused(
            f"{data_dir} holds the data of {number_of(present, 'bookie')}: start with --bookies {present} or more, "
            "or choose another --data-dir"
        )
    return asked


async def _stamped_bookies(store: SqliteStore, keyspace: Keyspace) -> list[str]:
    cookies = await store.range(keyspace.cookies_prefix())
    return [keyspace.parse_cookie(item.key) for item in cookies.items]
