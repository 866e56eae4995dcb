"""A cluster in one event loop: a metadata store, bookies, brokers and the processes of clients.

Every process can be killed and started again at any moment, stand still, lose its connections or its clock. A killed
process does nothing any more, not even clean up: what it leaves is what its disk has made durable and what stands in
the metadata store. What should run and does not is started again after a while, as an init system does.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from prometheus_client import CollectorRegistry
from simulation.bookies import Reachable, SimulatedBookie
from simulation.boundaries import Boundaries
from simulation.disk import NoLock, SimulatedDisk
from simulation.entropy import EPOCH_S
from simulation.loop import Process, SimulatedLoop
from simulation.metadata import MetadataServer, SimulatedMetadata
from simulation.moments import Moments
from simulation.network import Network
from simulation.openings import Openings
from simulation.rpc import Listeners, SimulatedChannel, SimulatedRpc, server_at
from simulation.transcript import Transcript

from magnetar.bookie.bookie import Bookie
from magnetar.bookie.cookies import BookieRefusal
from magnetar.broker.broker import Broker
from magnetar.broker.peers import Peers
from magnetar.client.client import Client
from magnetar.ledger.bookie_directory import BookieDirectory
from magnetar.managed_log.cursor import Cursor
from magnetar.managed_log.settings import LogSettings
from magnetar.metadata.keyspace import Keyspace
from magnetar.metadata.records import BookieRegistration
from magnetar.metadata.store import MetadataError
from magnetar.node.registration import IdInUse
from magnetar.node.settings import BookieSettings, BrokerSettings

CLUSTER = "simulated"
MIB = 1 << 20
RESTART_S = 1.0
LOOK_S = 0.05
STOP_S = 30.0
CLIENT_TIMEOUT_S = 60.0

NOT_YET = (MetadataError, BookieRefusal, IdInUse)
"""What a server may end with at its start: it is started again."""


@dataclass(frozen=True, slots=True)
class Shape:
    bookies: int = 4
    racks: tuple[str, ...] = ()
    brokers: int = 2
    write_quorum: int = 3
    ack_quorum: int = 2
    lease_s: float = 2.0
    segment_bytes: int = 64 << 10
    segment_s: float = 30.0
    cursor_ledger_bytes: int = 4 << 20
    gc_interval_s: float = 10.0
    rest_after_s: float = 3600.0
    trim_interval_s: float = 5.0


class ProcessDied(BaseException):
    """Unwinds what a process was doing when it killed itself."""


class Host:
    """A server's place: what it starts, and the process that runs there now."""

    def __init__(self, name: str, start: Callable[[Process], Awaitable[Any]]) -> None:
        self.name = name
        self.start = start
        self.process: Process | None = None
        self.running: Any = None
        """The Bookie or Broker, once it has started."""
        self.wanted = False
        self.clock_offset_us = 0


class World:
    """See the module."""

    def __init__(self, seed: int, shape: Shape, on_error: Callable[[str], None]) -> None:
        self.seed = seed
        self.shape = shape
        self.keyspace = Keyspace(CLUSTER)
        self.loop = SimulatedLoop(f"loop {seed}", lambda context: on_error(_words(context)))
        self.transcript = Transcript(self.loop.time)
        self.network = Network(self.loop, f"network {seed}", self.transcript)
        self.metadata = MetadataServer(self.network, f"metadata {seed}")
        self.reachable = Reachable()
        self.listeners = Listeners()
        self.rng = random.Random(f"world {seed}")
        self.hosts: dict[str, Host] = {}
        self.disks: dict[str, SimulatedDisk] = {}
        self.clients: dict[str, Process] = {}
        self._registries: list[CollectorRegistry] = []
        self._gone: dict[Process, asyncio.Future[None]] = {}
        self.lost_disks: list[str] = []
        self.with_workers: Callable[[str, Process, Bookie], Awaitable[Any]] | None = None
        """Starts what a bookie's process does beside storing; what it returns is stopped in its stead."""
        self.on_served: Callable[[int, Mapping[str, Cursor]], None] = lambda shard, cursors: None
        """Hears of each shard that has a new owner, and of the cursors that it found."""
        self._replaced_at: dict[int, float] = {}
        self._dead: list[Any] = []
        """Tasks of killed processes: were they let go, Python would run their clean-up code."""
        for number in range(shape.bookies):
            name = f"bookie{number}"
            self.disks[name] = SimulatedDisk(self.loop, f"disk {name} {seed}")
            self.hosts[name] = Host(name, lambda process, name=name: self._start_bookie(name, process))
        for number in range(shape.brokers):
            name = f"broker{number}"
            self.hosts[name] = Host(name, lambda process, name=name: self._start_broker(name, process))
        self.racks = dict(zip(self.bookies(), shape.racks, strict=False))

    def watch_boundaries(self, fail: Callable[[str], NoReturn]) -> None:
        """Looks at every answer of a bookie and every change of metadata from now on."""
        self.boundaries = Boundaries(fail, self.disks, self.metadata.store, self.keyspace)
        self.boundaries.on_claim = self._claimed
        self.boundaries.copies.racks = self.racks
        self.listeners.called = self.boundaries.called
        self.listeners.openings = Openings(fail, self.boundaries)
        self.reachable.boundaries = self.metadata.boundaries = self.boundaries
        self.moments = self.metadata.moments = Moments(self.keyspace, self.boundaries)

    @property
    def servers(self) -> str:
        return ",".join(self.address(name) for name in self.brokers())

    def address(self, broker: str) -> str:
        return f"{broker}:7650"

    def brokers(self) -> list[str]:
        return [name for name in self.hosts if name.startswith("broker")]

    def bookies(self) -> list[str]:
        return [name for name in self.hosts if name.startswith("bookie")]

    # --- starting and ending processes ---

    async def start(self) -> None:
        """Returns when all servers run."""
        for host in self.hosts.values():
            self.start_host(host.name)
        while any(host.running is None for host in self.hosts.values()):  # noqa: ASYNC110  # waiting costs nothing
            await asyncio.sleep(0.01)

    def start_host(self, name: str) -> None:
        host = self.hosts[name]
        host.wanted = True
        if host.process is None or not host.process.alive:
            process = host.process = Process(name)
            self.transcript.note(name, "starts")
            self.spawn(process, self._keep_running(host, process), name)

    def spawn(self, process: Process, work: Coroutine[Any, Any, Any], name: str) -> asyncio.Task[Any]:
        """A task of that process."""
        return self.loop.create_task(work, name=name, context=process.context.copy())

    async def _keep_running(self, host: Host, process: Process) -> None:
        try:
            host.running = await host.start(process)
        except NOT_YET as refusal:
            self.transcript.note(host.name, "does not start:", str(refusal))
            self.loop.call_soon(self._end, host, process, context=self.loop.outside.context)

    def kill(self, name: str) -> None:
        """The process is gone; it is started again when somebody wants it."""
        host = self.hosts[name]
        host.wanted = False
        if host.process is not None and host.process.alive:
            self._end(host, host.process, restart=False)

    def _end(self, host: Host, process: Process, restart: bool = True) -> None:
        if not process.alive:
            return
        self.transcript.note(host.name, "is gone")
        self._dead.append((process, host.running, self.loop.kill(process)))
        host.running = None
        self.network.unsilence(host.name)
        self.network.died(process)
        if restart:
            self.loop.call_later(RESTART_S, self._start_again, host, context=self.loop.outside.context)

    def _start_again(self, host: Host) -> None:
        if host.wanted:
            self.start_host(host.name)

    async def stop(self, name: str) -> None:
        """As SIGTERM does: the server stops by itself, or is killed when it takes too long."""
        host = self.hosts[name]
        host.wanted = False
        process, running = host.process, host.running
        try:
            if process is not None and process.alive and running is not None:
                self.transcript.note(name, "is asked to stop")
                stopping = self.spawn(process, running.stop(), f"stop {name}")
                await asyncio.wait({stopping}, timeout=STOP_S)
        finally:
            self.kill(name)

    def lose_disk(self, name: str) -> None:
        """What this bookie had made durable is gone when it starts again."""
        self.lost_disks.append(name)
        self.disks[name].lost = True
        self.boundaries.disk_lost(name)

    def replace_disk(self, name: str) -> None:
        """The bookie starts anew with an empty one."""
        self.kill(name)
        self.disks[name].replace()
        self.boundaries.disk_lost(name)
        self.start_host(name)

    def pause(self, name: str) -> None:
        """As SIGSTOP does."""
        process = self._process(name)
        if process is not None and process.alive and not process.paused:
            self.loop.pause(process)
            self.network.silence(name)

    def resume(self, name: str) -> None:
        process = self._process(name)
        if process is not None and process.paused:
            self.network.unsilence(name)
            self.loop.resume(process)

    def _process(self, name: str) -> Process | None:
        if name == self.metadata.process.name:
            return self.metadata.process
        return self.hosts[name].process if name in self.hosts else self.clients.get(name)

    def _claimed(self, shard: int) -> None:
        """If somebody else serves the shard still, it may go on for a while, and give out what it knows."""
        if not self.served_alone(shard):
            self._replaced_at[shard] = self.loop.time()
        self.loop.create_task(self._look_at_owner(shard), context=self.loop.outside.context.copy())

    async def _look_at_owner(self, shard: int) -> None:
        """Tells `on_served` what a new owner begins with, unless it is replaced before it serves the shard."""
        claimed = self.boundaries.shard(shard)
        while (record := self.boundaries.shard(shard)) is not None and record.owner is not None:
            if claimed is None or record.epoch != claimed.epoch:
                return
            running = self.hosts[record.owner.broker_id].running
            served = None if running is None else running.served.get(shard)
            if served is not None and served.log.record.epoch == record.epoch:
                self.on_served(shard, served.log.cursors)
                return
            await asyncio.sleep(LOOK_S)

    def certain_since(self, shard: int, since: float) -> bool:
        """No broker whose shard was claimed by another one has served it after that time, if none did then."""
        return self.served_alone(shard) != 0 and self._replaced_at.get(shard, -1.0) < since

    def served_alone(self, shard: int) -> int:
        """The shard's epoch if nobody but its recorded owner serves it, else 0."""
        record = self.boundaries.shard(shard)
        if record is None:
            return 0
        owner = "" if record.owner is None else record.owner.broker_id
        for name in self.brokers():
            running = self.hosts[name].running
            if running is not None and name != owner and running.served.get(shard) is not None:
                return 0
        return record.epoch

    # --- servers ---

    async def _start_bookie(self, name: str, process: Process) -> Any:
        shape, disk = self.shape, self.disks[name]
        settings = BookieSettings(
            id=name,
            data_dir=Path(name),
            cluster=CLUSTER,
            listen=f"{name}:7660",
            advertised_address=f"{name}:7660",
            memory_bytes=16 * MIB,
            lease_s=shape.lease_s,
            gc_interval_s=shape.gc_interval_s,
            rack=self.racks.get(name, ""),
        )
        bookie = await Bookie.start(
            settings,
            SimulatedMetadata(self.metadata, process),
            self.keyspace,
            registry=CollectorRegistry(),
            serve=False,
            gauge=disk.usage,
            now_us=self.clock(name),
            die=lambda message: self._die(name, process, message),
            open_store=disk.open,
            lock=NoLock,
        )
        self.reachable.handlers[name] = (process, bookie.handlers)
        return bookie if self.with_workers is None else await self.with_workers(name, process, bookie)

    def _die(self, name: str, process: Process, message: str) -> None:
        self.transcript.note(name, "ends itself:", message)
        self._end(self.hosts[name], process)
        raise ProcessDied(message)

    async def _start_broker(self, name: str, process: Process) -> Broker:
        shape = self.shape
        metadata = SimulatedMetadata(self.metadata, process)

        def connect(registration: BookieRegistration) -> SimulatedBookie:
            return SimulatedBookie(self.network, process, registration.bookie_id, self.reachable)

        directory = BookieDirectory(
            metadata,
            self.keyspace,
            connect,
            disconnect=lambda bookie: bookie.close(),  # type: ignore[attr-defined]
            rng=random.Random(f"directory {name} {self.seed} {self.loop.time()}"),
        )
        await directory.start()
        settings = BrokerSettings(
            id=name,
            cluster=CLUSTER,
            listen=self.address(name),
            advertised_address=self.address(name),
            ensemble_size=shape.write_quorum,
            write_quorum=shape.write_quorum,
            ack_quorum=shape.ack_quorum,
            lease_s=shape.lease_s,
            rest_after_s=shape.rest_after_s,
            trim_interval_s=shape.trim_interval_s,
        )
        registry = CollectorRegistry()
        self._registries.append(registry)
        return await Broker.start(
            settings,
            metadata,
            self.keyspace,
            directory,
            registry=registry,
            now_us=self.clock(name),
            rng=random.Random(f"broker {name} {self.seed} {self.loop.time()}"),
            serve=server_at(self.network, self.listeners, process),
            peers=Peers(lambda address: SimulatedChannel(self.network, process, self.listeners, address)),
            log_settings=LogSettings(
                segment_bytes=shape.segment_bytes,
                segment_s=shape.segment_s,
                cursor_ledger_bytes=shape.cursor_ledger_bytes,
                cursor_ledger_snapshots=0,
            ),
        )

    def counted(self, counter: str) -> int:
        """What all brokers have counted, those that were killed too."""
        return int(sum(registry.get_sample_value(counter) or 0 for registry in self._registries))

    def clock(self, name: str) -> Callable[[], int]:
        """The wall clock of a host, which may jump."""
        host = self.hosts[name]
        return lambda: int((EPOCH_S + self.loop.time()) * 1e6) + host.clock_offset_us

    # --- clients ---

    def client_process(self, name: str) -> Process:
        """A new process on this host; the one before is gone."""
        self.kill_client(name)
        process = self.clients[name] = Process(name)
        return process

    def kill_client(self, name: str) -> None:
        process = self.clients.get(name)
        if process is not None and process.alive:
            self.transcript.note(name, "is gone")
            self._dead.append((process, self.loop.kill(process)))
            self.network.unsilence(name)
            self.network.died(process)
            gone = self._gone.pop(process, None)
            if gone is not None and not gone.done():
                gone.set_result(None)

    async def gone(self, process: Process) -> None:
        """Returns when this client's process was killed."""
        if process.alive:
            await self._gone.setdefault(process, self.loop.create_future())

    def client(self, process: Process, timeout_s: float = CLIENT_TIMEOUT_S) -> Client:
        rpc = lambda: SimulatedRpc(self.network, process, self.listeners)  # noqa: E731
        return Client(self.servers, timeout=timeout_s, rpc=rpc)


def _words(context: dict[str, Any]) -> str:
    error = context.get("exception")
    return f"{context.get('message')} {error!r}"
