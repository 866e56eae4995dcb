"""What goes wrong, and when: the seed chooses some kinds, how often each strikes, and for how long.

Every kind is a coroutine that strikes once and mends what it did. They overlap as they like; a calm mends everything.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable

from simulation.moments import CHANGES
from simulation.world import World

HOUR_US = 3_600_000_000
STORMS_S = (1.0, 4.0, 8.0, 16.0)
CALM_S = 6.0
KINDS_AT_ONCE = 4
BREAK_S = 0.02
"""For both ends to hear of a broken connection."""

Strike = Callable[[World, random.Random], Awaitable[None]]


async def kill_bookie(world: World, rng: random.Random) -> None:
    await _kill(world, rng, rng.choice(world.bookies()))


async def kill_broker(world: World, rng: random.Random) -> None:
    await _kill(world, rng, rng.choice(world.brokers()))


async def kill_client(world: World, rng: random.Random) -> None:
    world.kill_client(rng.choice(sorted(world.clients)))


async def kill_everything(world: World, rng: random.Random) -> None:
    """A power failure."""
    names = list(world.hosts)
    for name in names:
        world.kill(name)
    await asyncio.sleep(rng.random())
    for name in names:
        world.start_host(name)


async def kill_some(world: World, rng: random.Random) -> None:
    """At one instant."""
    names = rng.sample(list(world.hosts), rng.randrange(2, len(world.hosts)))
    for name in names:
        world.kill(name)
    for name in names:
        await asyncio.sleep(rng.random())
        world.start_host(name)


async def restart_server(world: World, rng: random.Random) -> None:
    """In an orderly way."""
    name = rng.choice(list(world.hosts))
    await world.stop(name)
    world.start_host(name)


async def pause(world: World, rng: random.Random) -> None:
    """A server or a client stands still."""
    name = rng.choice([*world.hosts, *sorted(world.clients)])
    world.pause(name)
    world.transcript.note(name, "stands still")
    await asyncio.sleep(_long(rng))
    world.resume(name)


async def pause_metadata(world: World, rng: random.Random) -> None:
    name = world.metadata.process.name
    world.pause(name)
    world.transcript.note(name, "stands still")
    await asyncio.sleep(_long(rng))
    world.resume(name)


async def partition(world: World, rng: random.Random) -> None:
    """Some hosts from the others, in one direction or both."""
    hosts = _everyone(world)
    some = set(rng.sample(hosts, rng.randrange(1, len(hosts))))
    cut = _cuts(rng, [(a, b) for a in hosts for b in hosts if (a in some) != (b in some)])
    await _cut(world, rng, cut)


async def cut_one(world: World, rng: random.Random) -> None:
    """One host from one other or from all, in one direction or both."""
    hosts = _everyone(world)
    one = rng.choice(hosts)
    others = [rng.choice(hosts)] if rng.random() < 0.6 else hosts
    await _cut(world, rng, _cuts(rng, [pair for other in others for pair in ((one, other), (other, one))]))


async def cut_metadata(world: World, rng: random.Random) -> None:
    """A server loses the metadata store but nothing else."""
    name, store = rng.choice(list(world.hosts)), world.metadata.process.name
    await _cut(world, rng, _cuts(rng, [(name, store), (store, name)]))


async def ambush(world: World, rng: random.Random) -> None:
    """A broker is struck at the moment when it asks the store for a change, or when that was made."""
    change, applied = rng.choice(CHANGES), rng.random() < 0.3
    name = await world.moments.next(change, applied=applied)
    strike = rng.choice([_cut_off, _cut_off, _usurp, _split])
    world.transcript.note("ambush:", name, change, "applied" if applied else "asked for", strike.__name__)
    await strike(world, rng, name)


async def usurp(world: World, rng: random.Random) -> None:
    """A broker is alone with the bookies and its clients: its session ends, and it does not hear of it."""
    await _usurp(world, rng, rng.choice(world.brokers()))


async def _usurp(world: World, rng: random.Random, name: str) -> None:
    store = world.metadata.process.name
    others = [other for other in world.brokers() if other != name]
    pairs = [(name, store), (store, name)]
    for source, target in pairs:
        world.network.cut(source, target)
    await _end_session(world, name)
    await _cut(world, rng, [*pairs, *((name, other) for other in others)])


async def split(world: World, rng: random.Random) -> None:
    """Brokers and clients are on two sides; bookies and the store serve both. One side's session ends unheard."""
    await _split(world, rng, rng.choice(world.brokers()))


async def _split(world: World, rng: random.Random, name: str) -> None:
    behind = world.metadata.faults.behind
    near, far = [name], [other for other in world.brokers() if other != name]
    for client in sorted(world.clients):
        rng.choice([near, far]).append(client)
    for one in near:
        for other in far:
            world.network.lose(one, other)
    behind.add(name)
    await _end_session(world, name)
    await asyncio.sleep(BREAK_S)
    await _cut(world, rng, [pair for one in near for other in far for pair in ((one, other), (other, one))])
    behind.discard(name)


async def still_streams(world: World, rng: random.Random) -> None:
    """A server's watches and keepalives stand still; the store answers its calls all the same."""
    name, behind = rng.choice(list(world.hosts)), world.metadata.faults.behind
    behind.add(name)
    await asyncio.sleep(_long(rng))
    behind.discard(name)


async def swizzle(world: World, rng: random.Random) -> None:
    """Hosts are cut off one after the other, and come back in another order."""
    hosts = rng.sample(list(world.hosts), rng.randrange(2, len(world.hosts) + 1))
    everyone = _everyone(world)
    for host in hosts:
        for other in everyone:
            world.network.cut(host, other)
            world.network.cut(other, host)
        await asyncio.sleep(rng.random())
    rng.shuffle(hosts)
    for host in hosts:
        for other in everyone:
            world.network.heal(host, other)
            world.network.heal(other, host)
        await asyncio.sleep(rng.random())


async def break_connections(world: World, rng: random.Random) -> None:
    pairs = world.network.connected()
    for one, other in rng.sample(pairs, min(len(pairs), rng.randrange(1, 6))):
        world.network.lose(one, other)


async def slow_host(world: World, rng: random.Random) -> None:
    name = rng.choice(_everyone(world))
    world.network.slow_down(name)
    await asyncio.sleep(_long(rng))
    world.network.speed_up(name)


async def lossy_metadata(world: World, rng: random.Random) -> None:
    faults = world.metadata.faults
    faults.lost_request, faults.lost_answer = rng.random() * 0.2, rng.random() * 0.2
    faults.reset = rng.random() * 0.2
    await asyncio.sleep(_long(rng))
    faults.lost_request = faults.lost_answer = faults.reset = 0.0


async def lose_session(world: World, rng: random.Random) -> None:
    """The store drops a server's lease."""
    await _end_session(world, rng.choice(list(world.hosts)))


async def full_disk(world: World, rng: random.Random) -> None:
    disk = world.disks[rng.choice(world.bookies())]
    disk.full = True
    await asyncio.sleep(_long(rng))
    disk.full = False


async def slow_disk(world: World, rng: random.Random) -> None:
    disk = world.disks[rng.choice(world.bookies())]
    disk.slow = rng.choice([20.0, 400.0])
    await asyncio.sleep(_long(rng))
    disk.slow = 1.0


async def failing_sync(world: World, rng: random.Random) -> None:
    world.disks[rng.choice(world.bookies())].fails_sync = True


async def lose_disk(world: World, rng: random.Random) -> None:
    """One disk of all breaks its word: what it had made durable is gone, and the bookie finds that out."""
    if world.lost_disks:
        return
    name = rng.choice(world.bookies())
    world.kill(name)
    world.lose_disk(name)
    await asyncio.sleep(rng.random())
    world.start_host(name)


async def unreadable(world: World, rng: random.Random) -> None:
    """A part of what a bookie has cannot be read for a while."""
    disk = world.disks[rng.choice(world.bookies())]
    disk.unreadable = rng.choice([0.2, 1.0])
    await asyncio.sleep(_long(rng))
    disk.unreadable = 0.0


async def jump_clock(world: World, rng: random.Random) -> None:
    host = world.hosts[rng.choice(list(world.hosts))]
    host.clock_offset_us += rng.choice([-1, 1]) * int(rng.random() * rng.choice([2_000_000, HOUR_US]))


async def repeat_calls(world: World, rng: random.Random) -> None:
    """Calls of bookies arrive twice."""
    world.reachable.again_chance = 0.05
    await asyncio.sleep(_long(rng))
    world.reachable.again_chance = 0.0


KINDS: dict[str, tuple[Strike, float]] = {
    "kill bookie": (kill_bookie, 2.0),
    "kill broker": (kill_broker, 2.0),
    "kill client": (kill_client, 1.0),
    "kill everything": (kill_everything, 6.0),
    "kill some": (kill_some, 4.0),
    "restart server": (restart_server, 3.0),
    "pause": (pause, 1.0),
    "pause metadata": (pause_metadata, 3.0),
    "partition": (partition, 2.0),
    "cut one": (cut_one, 1.0),
    "cut metadata": (cut_metadata, 1.0),
    "usurp": (usurp, 1.0),
    "split": (split, 1.0),
    "still streams": (still_streams, 1.0),
    "swizzle": (swizzle, 3.0),
    "break connections": (break_connections, 1.0),
    "slow host": (slow_host, 1.0),
    "lossy metadata": (lossy_metadata, 2.0),
    "lose session": (lose_session, 2.0),
    "full disk": (full_disk, 2.0),
    "slow disk": (slow_disk, 1.0),
    "failing sync": (failing_sync, 3.0),
    "lose disk": (lose_disk, 4.0),
    "unreadable": (unreadable, 1.0),
    "jump clock": (jump_clock, 1.0),
    "repeat calls": (repeat_calls, 1.0),
}
"""With the seconds between the end of a strike and the next one, about."""
AMBUSH = "ambush"
AMBUSH_S = 0.5
AMBUSHED = 0.5
"""Share of the storms in which brokers are ambushed, whatever else strikes."""


class Faults:
    """Those of one run: storms of a few kinds, and calms between them in which all is mended."""

    def __init__(self, world: World, seed: int) -> None:
        self._world = world
        self._rng = random.Random(f"faults {seed}")
        self.kinds = [name for name in KINDS if self._rng.random() < 0.5] or [self._rng.choice(list(KINDS))]
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        self._task = asyncio.create_task(self._weather(), name="faults")

    async def stop(self) -> None:
        """Everything runs and reaches everything from now on."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait({self._task})
        self._mend()
        self._world.transcript.note("all faults end")

    async def _weather(self) -> None:
        rng = self._rng
        while True:
            await asyncio.sleep(rng.random() * CALM_S)
            kinds = rng.sample(self.kinds, min(len(self.kinds), rng.randrange(1, KINDS_AT_ONCE + 1)))
            if rng.random() < AMBUSHED:
                kinds.append(AMBUSH)
            storm = [asyncio.create_task(self._repeat(name, rng.getrandbits(64)), name=name) for name in kinds]
            self._world.transcript.note("storm:", ", ".join(kinds))
            try:
                await asyncio.sleep(rng.choice(STORMS_S))
            finally:
                for task in storm:
                    task.cancel()
                await asyncio.wait(storm)
            self._mend()
            self._world.transcript.note("calm")

    async def _repeat(self, name: str, seed: int) -> None:
        strike, interval_s = (ambush, AMBUSH_S) if name == AMBUSH else KINDS[name]
        rng = random.Random(seed)
        await asyncio.sleep(rng.random())
        while True:
            self._world.transcript.note("fault:", name)
            await strike(self._world, rng)
            await asyncio.sleep(rng.expovariate(1.0 / interval_s))

    def _mend(self) -> None:
        world = self._world
        world.network.heal_all()
        world.metadata.faults.mend()
        world.reachable.again_chance = 0.0
        for disk in world.disks.values():
            disk.mend()
        for name in [*world.hosts, *world.clients, world.metadata.process.name]:
            world.resume(name)
        for name in world.hosts:
            world.start_host(name)


async def _end_session(world: World, name: str) -> None:
    key = world.keyspace.broker(name) if name in world.brokers() else world.keyspace.bookie(name)
    store = world.metadata.store
    found = await store.get(key)
    if found is not None:
        world.transcript.note(name, "loses its session")
        await store.revoke_lease(found.lease_id)


async def _cut_off(world: World, rng: random.Random, name: str) -> None:
    """A broker from the store, until its session is over; it may be killed when what it did meanwhile is known."""
    store, network = world.metadata.process.name, world.network
    pairs = [(name, store), (store, name)]
    for source, target in pairs:
        network.cut(source, target)
    if rng.random() < 0.5:
        await asyncio.sleep(rng.random() * rng.choice([0.01, 0.1, 1.0]))
        world.kill(name)
    await asyncio.sleep(world.shape.lease_s * (1.0 + rng.random()))
    for source, target in pairs:
        network.heal(source, target)
    world.start_host(name)


async def _kill(world: World, rng: random.Random, name: str) -> None:
    world.kill(name)
    await asyncio.sleep(rng.choice([0.05, 0.5, 3.0, 8.0]) * rng.random() * 2)
    world.start_host(name)


async def _cut(world: World, rng: random.Random, pairs: list[tuple[str, str]]) -> None:
    network = world.network
    for source, target in pairs:
        network.cut(source, target)
    world.transcript.note("cut", len(pairs), pairs[0])
    await asyncio.sleep(_long(rng))
    for source, target in pairs:
        network.heal(source, target)


def _cuts(rng: random.Random, pairs: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """All of them, or those in one direction."""
    return pairs if rng.random() < 0.6 else pairs[::2]


def _everyone(world: World) -> list[str]:
    return [*world.hosts, world.metadata.process.name, *sorted(world.clients)]


def _long(rng: random.Random) -> float:
    """Most faults are short; some outlast leases, timeouts and keepalives."""
    return rng.choice([0.2, 1.0, 3.0, 8.0, 18.0]) * (0.5 + rng.random())
