"""A promise about the future is an owner's: a producer's name is opened for a new connection only by a broker that
owned the shard after it was asked to. One that was replaced promises what its successor does not know of.

A connection that was opened before may be opened again by whoever knows of it: the promise is made already. So may one
that the broker was asked for before, if it was the owner since, whether it has answered or not.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, NoReturn

from simulation.boundaries import Boundaries

from magnetar.v1 import broker_pb2

OPEN = bytes([broker_pb2.ProduceRequest.OPEN_FIELD_NUMBER << 3 | 2])
"""What a frame begins with that asks for an opening; others are not looked into."""


class Asked(NamedTuple):
    shard: int
    name: str
    epoch: int
    owned: int
    """The last epoch in which the shard was this broker's, when it was asked."""
    replaced: bool
    """It was another's then."""


class Openings:
    """Hears of the frames of Produce streams. `fail` ends the run."""

    def __init__(self, fail: Callable[[str], NoReturn], boundaries: Boundaries) -> None:
        self._fail = fail
        self._boundaries = boundaries
        self._asked: dict[tuple[object, int], Asked] = {}
        self._opened: set[tuple[int, str, int]] = set()
        self._first: dict[tuple[str, int, str, int], Asked] = {}
        """When a broker was asked for a connection for the first time: it may open it once it is the owner."""

    def asked(self, stream: object, broker: str, frame: bytes) -> None:
        """This frame arrived at the broker."""
        if not frame.startswith(OPEN):
            return
        opening = broker_pb2.ProduceRequest.FromString(frame).open
        if opening.name:
            shard, boundaries = opening.shard_id, self._boundaries
            owned, replaced = boundaries.owned(broker, shard), not boundaries.owns(broker, shard)
            name = f"{opening.topic}/{opening.name}"
            asked = Asked(shard, name, opening.epoch, owned, replaced)
            first = self._first.setdefault((broker, shard, name, opening.epoch), asked)
            self._asked[stream, opening.handle] = first

    def answered(self, stream: object, broker: str, frame: bytes) -> None:
        """The broker sends this one."""
        if not self._asked:
            return
        for opened in broker_pb2.ProduceResponse.FromString(frame).opened:
            asked = self._asked.pop((stream, opened.handle), None)
            if asked is not None:
                self._check(broker, asked)

    def _check(self, broker: str, asked: Asked) -> None:
        connection = (asked.shard, asked.name, asked.epoch)
        if connection in self._opened:
            return
        self._opened.add(connection)
        boundaries = self._boundaries
        replaced = asked.replaced and not boundaries.owns(broker, asked.shard)
        if replaced and boundaries.owned(broker, asked.shard) == asked.owned:
            self._fail(f"fence: {broker} opened a producer's name for a new connection, and was replaced: {asked}")
