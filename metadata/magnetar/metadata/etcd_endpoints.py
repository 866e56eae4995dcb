"""Where etcd listens, and which of several endpoints to ask next. Pure."""

from __future__ import annotations

import random
from collections.abc import Sequence

from magnetar.metadata.backoff import Backoff
from magnetar.metadata.store import MetadataError

SCHEME = "etcd://"
PORT = 2379
ENDPOINTS_MAX = 16
STEADY_S = 5.0
"""An endpoint that served this long before it failed is tried again as soon as one that never failed."""


def parse_endpoints(url: str) -> tuple[str, ...]:
    """The `host:port` of each endpoint in `etcd://host:port[,host:port]`, in order. Raises MetadataError."""
    if not url.startswith(SCHEME):
        raise MetadataError(f"not an address of a metadata store: write etcd://host:port[,host:port]: address=`{url}`")
    endpoints = tuple(_parse_endpoint(url, part.strip()) for part in url[len(SCHEME) :].rstrip("/").split(","))
    if len(set(endpoints)) != len(endpoints):
        raise MetadataError(f"an endpoint of the metadata store is named twice: address=`{url}`")
    if len(endpoints) > ENDPOINTS_MAX:
        raise MetadataError(f"too many endpoints of the metadata store: address=`{url}` max=`{ENDPOINTS_MAX}`")
    return endpoints


def _parse_endpoint(url: str, part: str) -> str:
    host, colon, port = part.rpartition(":")
    if not colon or part.endswith("]"):
        host, port = part, str(PORT)
    bare = host[1:-1] if host.startswith("[") and host.endswith("]") else host
    odd = not bare or any(c in bare for c in "/@?#[] ") or (":" in bare and bare == host)
    if odd or not (port.isascii() and port.isdigit() and 0 < int(port) < 1 << 16):
        raise MetadataError(
            f"not an address of a metadata store: write etcd://host:port[,host:port]: address=`{url}` part=`{part}`"
        )
    return f"{host}:{int(port)}"


class EndpointChoice:
    """Round the endpoints in the order they are named, staying with one for as long as it serves.

    An endpoint that fails is not tried again before its own pause has passed; the pauses grow with each failure.
    """

    def __init__(self, endpoints: Sequence[str], rng: random.Random) -> None:
        assert endpoints, "a store has an endpoint"
        self.endpoints = tuple(endpoints)
        self._rng = rng
        self._first = 0
        self._backoffs = [Backoff(rng) for _ in endpoints]
        self._not_before = [float("-inf")] * len(endpoints)
        self._serves_since = [float("inf")] * len(endpoints)

    def next(self, now: float) -> tuple[int, float]:
        """The endpoint to try, and the seconds to wait before."""
        count = len(self.endpoints)
        order = [(self._first + i) % count for i in range(count)]
        for index in order:
            if self._not_before[index] <= now:
                return index, 0.0
        soonest = min(order, key=lambda index: self._not_before[index])
        return soonest, self._not_before[soonest] - now

    def serves(self, index: int, now: float) -> None:
        self._first = index
        self._serves_since[index] = now

    def failed(self, index: int, now: float) -> None:
        if now - self._serves_since[index] >= STEADY_S:
            self._backoffs[index] = Backoff(self._rng)
        self._serves_since[index] = float("inf")
        self._not_before[index] = now + self._backoffs[index].next_s()
        self._first = (index + 1) % len(self.endpoints)
