"""What the metadata server counts. Labels are bounded: methods and status codes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import grpc
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from magnetar.node.rpc import Refused, RefusedWithStatus

LATENCY_BUCKETS_S = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0)


class ServerMetrics:
    """The metrics of one server, registered when it is made."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.requests = Counter(
            "magnetar_metadata_requests", "Requests answered", ("method", "status"), registry=registry
        )
        self.latency = Histogram(
            "magnetar_metadata_request_seconds",
            "From a request's arrival to its answer, which follows the sync of what it changed",
            ("method",),
            buckets=LATENCY_BUCKETS_S,
            registry=registry,
        )
        self.streams = Gauge("magnetar_metadata_streams", "Open streams of clients", ("kind",), registry=registry)
        self.size = Gauge("magnetar_metadata_db_bytes", "Size of the database file", registry=registry)
        self.size_in_use = Gauge("magnetar_metadata_db_used_bytes", "Of it in use", registry=registry)
        self._registry = registry

    def watch(self, gauges: dict[tuple[str, str], Callable[[], int]]) -> None:
        """Gauges, by name and text, that are read when they are asked for."""
        for (name, text), read in gauges.items():
            Gauge(f"magnetar_metadata_{name}", text, registry=self._registry).set_function(read)

    @contextmanager
    def request(self, method: str) -> Iterator[None]:
        """Counts a request by its outcome, and measures it."""
        began = time.perf_counter()
        status = "OK"
        try:
            yield
        except RefusedWithStatus as error:
            status = error.status.name
            raise
        except Refused:
            status = grpc.StatusCode.INVALID_ARGUMENT.name
            raise
        except Exception:
            status = grpc.StatusCode.INTERNAL.name
            raise
        except BaseException:
            status = grpc.StatusCode.CANCELLED.name
            raise
        finally:
            self.requests.labels(method, status).inc()
            self.latency.labels(method).observe(time.perf_counter() - began)

    @contextmanager
    def stream(self, kind: str) -> Iterator[None]:
        """Counts a stream while it is open."""
        open_streams = self.streams.labels(kind)
        open_streams.inc()
        try:
            yield
        finally:
            open_streams.dec()
