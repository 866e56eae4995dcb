"""The metrics of repair, for prometheus. Bookies of one process share the families and differ by a label."""

from __future__ import annotations

from weakref import WeakKeyDictionary

from prometheus_client import CollectorRegistry, Counter, Gauge


class RepairMetrics:
    """Get it with `of`: a registry takes each family once."""

    def __init__(self, registry: CollectorRegistry) -> None:
        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"magnetar_repair_{name}", text, ("bookie", *labels), registry=registry)

        def gauge(name: str, text: str, *labels: str) -> Gauge:
            return Gauge(f"magnetar_repair_{name}", text, labels, registry=registry)

        self.copied_bytes = counter("copied_bytes", "bytes of entries copied to this bookie", "reason")
        self.copied_entries = counter("copied_entries", "entries copied to this bookie", "reason")
        self.copies = counter("copies", "copies of ledgers to this bookie, by how they ended", "reason", "outcome")
        self.scrubbed_bytes = counter("scrubbed_bytes", "bytes of entries read and verified by the scrub")
        self.scrub_findings = counter("scrub_findings", "ledgers in which the scrub missed an entry, or found damage")
        self.last_scrub = Gauge(
            "magnetar_repair_last_scrub_timestamp_seconds",
            "when all entries of this bookie had been read and verified, 0 = never in this process",
            ("bookie",),
            registry=registry,
        )
        self.tasks = gauge("tasks", "copies that are to be made, as the elected auditor sees them", "reason")
        self.unassigned = gauge("unassigned_tasks", "copies that no bookie can take now")
        self.lost_bookies = gauge("lost_bookies", "bookies without a session")
        self.under_replicated = gauge(
            "under_replicated_ledgers", "closed ledgers with fewer copies than they should have, as of the last audit"
        )
        self.lacking_racks = gauge(
            "ledgers_lacking_racks", "closed ledgers that stand in fewer racks than they could, looked at now and then"
        )
        self.rebalance_remaining = gauge(
            "rebalance_remaining_bytes", "bytes that rebalancing has still to move, as the elected process sees them"
        )
        self.rebalance_problems = gauge("rebalance_problems", "reasons why rebalancing does not go on")
        self.last_audit = gauge("last_audit_timestamp_seconds", "when this process last audited completely, 0 = never")

    @classmethod
    def of(cls, registry: CollectorRegistry) -> RepairMetrics:
        metrics = _metrics.get(registry)
        if metrics is None:
            metrics = _metrics[registry] = cls(registry)
        return metrics


_metrics: WeakKeyDictionary[CollectorRegistry, RepairMetrics] = WeakKeyDictionary()
