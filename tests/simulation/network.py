"""The network between hosts: delays, partitions in one direction or both, connections that break.

What TCP promises holds and nothing more. A connection carries frames in order, each way by itself. When it breaks, any
number of the frames under way still arrive, the others never do, and each end hears of it in its own time: at once when
a process died, at its keepalive when the other host is silent. What was under way in a partition may arrive long after
its sender has given up.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

from simulation.loop import Process, SimulatedLoop
from simulation.transcript import Transcript

DELAY_S = 0.000_3
JITTER_S = 0.001
RARELY = 0.01
LATE_S = 0.15
"""One frame in a hundred takes up to this much longer."""
SLOW_FACTOR = 40.0
OPENER_KEEPALIVE_S = 15.0
ANSWERER_KEEPALIVE_S = 30.0
CONNECT_S = 2.0
"""After which a connection that is not answered fails."""


class Network:
    """Hosts are named as their processes are; a process that is started again is on the same host."""

    def __init__(self, loop: SimulatedLoop, seed: str, transcript: Transcript) -> None:
        self.loop = loop
        self.transcript = transcript
        self.rng = random.Random(seed)
        self._random = self.rng.random
        self._cut: set[tuple[str, str]] = set()
        self._slow: dict[str, float] = {}
        self._silent: dict[str, float] = {}
        self._held: dict[tuple[str, str], list[Callable[[], None]]] = {}
        self._circuits: dict[Circuit, None] = {}

    # --- what travels ---

    def delay_s(self, source: str, target: str) -> float:
        roll = self._random()
        delay = DELAY_S + roll * JITTER_S
        if roll < RARELY:
            delay += self._random() * LATE_S
        if self._slow:
            delay *= self._slow.get(source, 1.0) * self._slow.get(target, 1.0)
        return delay

    def post(self, source: str, target: Process, deliver: Callable[..., None], *arguments: Any) -> None:
        """One message by itself, in no order with others; in a partition it waits."""
        when = self.loop.time() + self.delay_s(source, target.name)
        self.loop.call_at(when, self._posted, source, target, deliver, arguments, context=target.context)

    def _posted(self, source: str, target: Process, deliver: Callable[..., None], arguments: tuple[Any, ...]) -> None:
        if self.is_cut(source, target.name):
            self.hold(source, target.name, lambda: self.post(source, target, deliver, *arguments))
        else:
            deliver(*arguments)

    # --- partitions ---

    def is_cut(self, source: str, target: str) -> bool:
        return bool(self._cut) and (source, target) in self._cut

    def hold(self, source: str, target: str, again: Callable[[], None]) -> None:
        """Calls `again` when the partition is over."""
        self._held.setdefault((source, target), []).append(again)

    def cut(self, source: str, target: str) -> None:
        if source == target or (source, target) in self._cut:
            return
        self._cut.add((source, target))
        for circuit in self._between(source, target):
            circuit.watch()

    def heal(self, source: str, target: str) -> None:
        if (source, target) not in self._cut:
            return
        self._cut.discard((source, target))
        for again in self._held.pop((source, target), []):
            again()

    def heal_all(self) -> None:
        for source, target in sorted(self._cut):
            self.heal(source, target)
        self._slow.clear()

    def slow_down(self, host: str) -> None:
        self._slow[host] = SLOW_FACTOR

    def speed_up(self, host: str) -> None:
        self._slow.pop(host, None)

    # --- processes that stand still or end ---

    def silence(self, host: str) -> None:
        """The host's process stands still: it answers no keepalive."""
        self._silent[host] = self.loop.time()
        for circuit in self._of(host):
            circuit.watch()

    def unsilence(self, host: str) -> None:
        self._silent.pop(host, None)

    def died(self, process: Process) -> None:
        """Its host tells whoever is connected to it, as far as it reaches them."""
        for circuit in [circuit for circuit in self._circuits if process in circuit.ends]:
            circuit.end_died(process)

    def impaired(self, one: str, other: str) -> bool:
        silent = self._silent
        return self.is_cut(one, other) or self.is_cut(other, one) or one in silent or other in silent

    # --- connections ---

    def connect(
        self, opener: Process, answerer: Process, opener_lost: Callable[[], None], answerer_lost: Callable[[], None]
    ) -> Circuit:
        circuit = Circuit(self, opener, answerer, opener_lost, answerer_lost)
        self._circuits[circuit] = None
        if self.impaired(opener.name, answerer.name):
            circuit.watch(CONNECT_S)
        return circuit

    def forget(self, circuit: Circuit) -> None:
        self._circuits.pop(circuit, None)

    def lose(self, host: str, other: str) -> None:
        """Breaks every connection between two hosts."""
        for circuit in self._between(host, other):
            circuit.lose()

    def connected(self) -> list[tuple[str, str]]:
        """The pairs of hosts with connections, once each."""
        pairs = {tuple(sorted((c.ends[0].name, c.ends[1].name))): None for c in self._circuits}
        return [(pair[0], pair[1]) for pair in pairs]

    def _between(self, one: str, other: str) -> list[Circuit]:
        wanted = {one, other}
        return [circuit for circuit in self._circuits if {end.name for end in circuit.ends} == wanted]

    def _of(self, host: str) -> Iterator[Circuit]:
        yield from [circuit for circuit in self._circuits if host in (end.name for end in circuit.ends)]


class Pipe:
    """Frames in order from one host to a process. Runs in the context of the one that receives."""

    __slots__ = ("_due", "_network", "_source", "_target", "_under_way")

    def __init__(self, network: Network, source: str, target: Process) -> None:
        self._network = network
        self._source = source
        self._target = target
        self._under_way: deque[tuple[Callable[..., None], tuple[Any, ...]]] = deque()
        self._due = 0.0

    def send(self, deliver: Callable[..., None], *arguments: Any) -> None:
        self._under_way.append((deliver, arguments))
        self._arrive_later()

    def _arrive_later(self) -> None:
        network, target = self._network, self._target
        due = network.loop.time() + network.delay_s(self._source, target.name)
        if due > self._due:
            self._due = due
        network.loop.call_at(self._due, self._arrive, context=target.context)

    def lose_some(self) -> None:
        """Of what is under way, any number of the first arrive."""
        kept = int(self._network.rng.random() * (len(self._under_way) + 1))
        while len(self._under_way) > kept:
            self._under_way.pop()

    def _arrive(self) -> None:
        network = self._network
        if network.is_cut(self._source, self._target.name):
            network.hold(self._source, self._target.name, self._arrive_later)
        elif self._under_way:
            deliver, arguments = self._under_way.popleft()
            deliver(*arguments)


class Circuit:
    """A connection. `ends` are the opener and the answerer; each end is open until it has heard of the end."""

    def __init__(
        self,
        network: Network,
        opener: Process,
        answerer: Process,
        opener_lost: Callable[[], None],
        answerer_lost: Callable[[], None],
    ) -> None:
        self.ends = (opener, answerer)
        self._network = network
        self._pipes = (Pipe(network, answerer.name, opener), Pipe(network, opener.name, answerer))
        """By receiver."""
        self._lost = (opener_lost, answerer_lost)
        self._open = [True, True]

    @property
    def opener_open(self) -> bool:
        return self._open[0]

    @property
    def answerer_open(self) -> bool:
        return self._open[1]

    def to_answerer(self, deliver: Callable[..., None], *arguments: Any) -> None:
        """Nothing happens if this end is closed, or the other one when it arrives."""
        if self._open[0]:
            self._pipes[1].send(self._deliver, 1, deliver, arguments)

    def to_opener(self, deliver: Callable[..., None], *arguments: Any) -> None:
        if self._open[1]:
            self._pipes[0].send(self._deliver, 0, deliver, arguments)

    def hang_up(self, end: int) -> None:
        """This end is closed by its own will; the other one hears of it after all that was sent."""
        if self._open[end]:
            self._open[end] = False
            self._pipes[1 - end].send(self._break, 1 - end)
            self._forget_if_over()

    def lose(self) -> None:
        """The connection breaks: each end hears of it by itself."""
        for end in (0, 1):
            self._pipes[end].lose_some()
            self._pipes[end].send(self._break, end)

    def end_died(self, process: Process) -> None:
        for end in (0, 1):
            if self.ends[end] is process:
                self._open[end] = False
                self._pipes[1 - end].lose_some()
                self._pipes[1 - end].send(self._break, 1 - end)
        self._forget_if_over()

    def watch(self, opener_s: float = OPENER_KEEPALIVE_S) -> None:
        """The other host may be silent from now on: an end that hears nothing until its keepalive gives up."""
        loop = self._network.loop
        for end, patience_s in ((0, opener_s), (1, ANSWERER_KEEPALIVE_S)):
            loop.call_at(loop.time() + patience_s, self._keepalive, end, context=self.ends[end].context)

    def _keepalive(self, end: int) -> None:
        if self._open[end] and self._network.impaired(self.ends[0].name, self.ends[1].name):
            self._break(end)
            self._pipes[1 - end].send(self._break, 1 - end)

    def _deliver(self, end: int, deliver: Callable[..., None], arguments: tuple[Any, ...]) -> None:
        if self._open[end]:
            deliver(*arguments)

    def _break(self, end: int) -> None:
        if self._open[end]:
            self._open[end] = False
            self._lost[end]()
            self._forget_if_over()

    def _forget_if_over(self) -> None:
        if not any(self._open[i] and self.ends[i].alive for i in (0, 1)):
            self._network.forget(self)
