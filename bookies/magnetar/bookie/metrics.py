"""The metrics of a bookie, for prometheus. Several bookies of one process share the families and differ by a label."""

from __future__ import annotations

from collections import Counter as Tally
from collections.abc import Sequence
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from magnetar.ledger.bookie_rpc import AddResult, AddStatus

if TYPE_CHECKING:
    from magnetar.bookie.judge import Item, Judgement

_SECONDS = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0)
_ITEMS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
_LABELS = ("bookie",)


class _Families:
    def __init__(self, registry: CollectorRegistry) -> None:
        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"magnetar_bookie_{name}", text, (*_LABELS, *labels), registry=registry)

        def gauge(name: str, text: str) -> Gauge:
            return Gauge(f"magnetar_bookie_{name}", text, _LABELS, registry=registry)

        def histogram(name: str, text: str, buckets: Sequence[float]) -> Histogram:
            return Histogram(f"magnetar_bookie_{name}", text, _LABELS, registry=registry, buckets=buckets)

        self.entries = counter("added_entries", "entries stored")
        self.bytes = counter("added_bytes", "bytes of envelopes stored")
        self.adds = counter("adds", "groups of entries by answer", "status")
        self.groups = counter("groups", "groups committed")
        self.stalls = counter("stalls", "commits that the store put off")
        self.group_items = histogram("group_items", "adds and fences a group", _ITEMS)
        self.commit_seconds = histogram("commit_seconds", "time of a batch and its fsync", _SECONDS)
        self.queue_bytes = gauge("queue_bytes", "bytes queued or being committed")
        self.read_entries = counter("read_entries", "entries read")
        self.read_bytes = counter("read_bytes", "bytes of envelopes read")
        self.unknown_reads = counter("unknown_reads", "reads that were answered without a statement")
        self.damaged = counter("damaged_entries", "entries found damaged by a read")
        self.collected = counter("collected_ledgers", "ledgers deleted because no record names this bookie")
        self.aborted = counter("aborted_collections", "collections given up because a listing was incomplete")
        self.stored_bytes = gauge("stored_bytes", "bytes of the store on disk")
        self.garbage_bytes = gauge("garbage_bytes", "bytes on disk that belong to deleted entries")
        self.disk_free_bytes = gauge("disk_free_bytes", "free bytes of the disk")
        self.limbo = gauge("limbo", "1 if durable entries may be missing here")
        self.read_only = gauge("read_only", "1 if ordinary adds are refused")


_families: WeakKeyDictionary[CollectorRegistry, _Families] = WeakKeyDictionary()


class BookieMetrics:
    """One bookie's share of the families in `registry`."""

    def __init__(self, registry: CollectorRegistry, bookie_id: str) -> None:
        families = _families.get(registry)
        if families is None:
            families = _families[registry] = _Families(registry)
        self.entries = families.entries.labels(bookie_id)
        self.bytes = families.bytes.labels(bookie_id)
        self.adds = {status: families.adds.labels(bookie_id, status.name) for status in AddStatus}
        self.groups = families.groups.labels(bookie_id)
        self.stalls = families.stalls.labels(bookie_id)
        self.group_items = families.group_items.labels(bookie_id)
        self.commit_seconds = families.commit_seconds.labels(bookie_id)
        self.queue_bytes = families.queue_bytes.labels(bookie_id)
        self.read_entries = families.read_entries.labels(bookie_id)
        self.read_bytes = families.read_bytes.labels(bookie_id)
        self.unknown_reads = families.unknown_reads.labels(bookie_id)
        self.damaged = families.damaged.labels(bookie_id)
        self.collected = families.collected.labels(bookie_id)
        self.aborted = families.aborted.labels(bookie_id)
        self.stored_bytes = families.stored_bytes.labels(bookie_id)
        self.garbage_bytes = families.garbage_bytes.labels(bookie_id)
        self.disk_free_bytes = families.disk_free_bytes.labels(bookie_id)
        self.limbo = families.limbo.labels(bookie_id)
        self.read_only = families.read_only.labels(bookie_id)

    def count_group(self, items: Sequence[Item], judgement: Judgement, queue_bytes: int) -> None:
        self.groups.inc()
        self.queue_bytes.set(queue_bytes)
        self.group_items.observe(len(items))
        entries = judgement.writes.entries
        if entries:
            self.entries.inc(len(entries))
            self.bytes.inc(sum(len(data) for _, _, data in entries))
        statuses = Tally(verdict.status for verdict in judgement.verdicts if isinstance(verdict, AddResult))
        for status, count in statuses.items():
            self.adds[status].inc(count)
