"""What a verb gives to be measured: a load with its settings, and what one run of it did."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from magnetar.cli.bench.latencies import Latencies
from magnetar.cli.bench.target import Target
from magnetar.cli.local_cluster import Size

if TYPE_CHECKING:
    from magnetar.client import Client


@dataclass(slots=True)
class Tally:
    """What one run did. Rates are counted over `elapsed_s`; `facts` are what only this verb reports."""

    latencies: Latencies = field(default_factory=Latencies)
    messages: int = 0
    payload_bytes: int = 0
    elapsed_s: float = 0.0
    facts: dict[str, Any] = field(default_factory=dict)

    def add(self, messages: int, payload_bytes: int) -> None:
        self.messages += messages
        self.payload_bytes += payload_bytes


Run = Callable[[float], Awaitable[Tally]]
"""Runs the load for about so many seconds."""


@dataclass(frozen=True, slots=True)
class Ready:
    """A load whose topics, producers and consumers stand. `topic` is one of them; warm_up None: as `run`."""

    topic: str
    run: Run
    warm_up: Run | None = None


class Load(ABC):
    """The settings of one verb, as the fields of a dataclass, and what it does with them."""

    verb: ClassVar[str]
    cluster: ClassVar[str] = "3,1"
    """Bookies and brokers that are started for it if nothing else is asked for."""

    @property
    def fills_disk(self) -> bool:
        """Its payloads are written as they are while it is measured: what the disk does can be compared with them."""
        return False

    def check(self, local: Size | None, runs: int) -> None:
        """Raises CommandFailed if this cluster cannot carry it; None: one that this command did not start."""
        return

    @abstractmethod
    def ready(self, client: Client, target: Target) -> AbstractAsyncContextManager[Ready]:
        """Makes all that stands before the measuring begins, and takes it away after it."""
