"""What a broker counts. Labels are bounded: no topic, producer or subscription is one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from magnetar.v1 import common_pb2

PAUSE_BUCKETS_S = (0.005, 0.01, 0.02, 0.03, 0.05, 0.1, 0.2, 0.5, 1.0, 5.0)


class BrokerMetrics:
    """The metrics of one broker, registered when it is made."""

    def __init__(self, registry: CollectorRegistry) -> None:
        def counter(name: str, text: str) -> Counter:
            return Counter(f"magnetar_broker_{name}", text, registry=registry)

        def gauge(name: str, text: str, labels: tuple[str, ...] = ()) -> Gauge:
            return Gauge(f"magnetar_broker_{name}", text, labels, registry=registry)

        self.published_messages = counter("published_messages", "Messages stored")
        self.published_bytes = counter("published_bytes", "Bytes of batches stored")
        self.published_batches = counter("published_batches", "Batches stored")
        self.duplicate_batches = counter("duplicate_batches", "Batches answered because they were stored before")
        self.delivered_messages = counter("delivered_messages", "Messages sent to consumers and readers")
        self.delivered_bytes = counter("delivered_bytes", "Bytes of batches sent to consumers and readers")
        self.shard_loads = counter("shard_loads", "Shards claimed and opened")
        self.shard_load_failures = counter("shard_load_failures", "Shards that could not be claimed or opened")
        self.shards_released = counter("shards_released", "Shards that another broker took over")
        self.rested_shards = counter("rested_shards", "Shards closed because nobody used them")
        self.rest_failures = counter("rest_failures", "Shards that nobody used and that could not be closed")
        self.claimed_together = counter(
            "claimed_together", "Shards claimed from brokers that are gone, many in one request, and not opened"
        )
        self.forgotten_producers = counter("forgotten_producers", "Idle producers dropped from the tables of shards")
        self.trim_failures = counter("trim_failures", "Attempts to trim a shard that failed")
        self.hand_offs = Counter(
            "magnetar_broker_hand_offs",
            "Shards passed on, open or not, kept because that failed, or claimed from a silent owner that was to do it",
            ("outcome",),
            registry=registry,
        )
        self.hand_off_pause = Histogram(
            "magnetar_broker_hand_off_pause_seconds",
            "From when a shard accepts nothing more here until another broker serves it",
            buckets=PAUSE_BUCKETS_S,
            registry=registry,
        )
        self.balancer_moves = Counter(
            "magnetar_broker_balancer_moves",
            "Shards that the balancer asked for while it was elected here",
            ("outcome",),
            registry=registry,
        )
        self.rebalance_remaining = gauge(
            "rebalance_remaining_shards", "Shards that a rebalancing has still to move, while it is run here"
        )
        self.rebalance_problems = gauge(
            "rebalance_problems", "Reasons why a rebalancing that is run here does not go on"
        )
        self.pending_bytes = gauge("pending_bytes", "Bytes of batches accepted and not yet stored")
        self.served_shards = gauge("served_shards", "Shards open here")
        self.shards_at_rest = gauge("shards_at_rest", "Shards of this broker that are closed until somebody wants them")
        self.owned_shards = gauge("owned_shards", "Shards that the records give to this broker")
        self.streams = gauge("streams", "Open streams of clients", ("kind",))
        self.refusals = Counter(
            "magnetar_broker_refusals", "Requests, handles and streams refused", ("reason",), registry=registry
        )

    def refused(self, reason: common_pb2.ErrorReason) -> None:
        name = common_pb2.ErrorReason.Name(reason).removeprefix("ERROR_REASON_").lower()
        self.refusals.labels(name).inc()

    def watch(self, **gauges: Callable[[], int]) -> None:
        """What the gauges of these names show."""
        for name, value in gauges.items():
            getattr(self, name).set_function(value)

    @contextmanager
    def stream(self, kind: str) -> Iterator[None]:
        """Counts a stream while it is open."""
        open_streams = self.streams.labels(kind)
        open_streams.inc()
        try:
            yield
        finally:
            open_streams.dec()
