"""The metrics of the ledger layer, for prometheus. One set of families a registry."""

from __future__ import annotations

from weakref import WeakKeyDictionary

from prometheus_client import CollectorRegistry, Counter

from magnetar.ledger.effects import Report, ReportKind


class LedgerMetrics:
    """Get it with `of`: a registry takes each family once."""

    def __init__(self, registry: CollectorRegistry) -> None:
        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"magnetar_ledger_{name}", text, labels, registry=registry)

        self.confirmed_entries = counter("confirmed_entries", "entries confirmed by an ack quorum")
        self.lost = counter("lost", "open ledgers lost by their writer", "reason")
        self.unreplicated = counter("unreplicated_ranges", "ranges of entries that a member lacked when it was closed")
        self.recoveries = counter("recoveries", "recoveries by outcome", "outcome")
        self.hedges = counter("read_hedges", "reads that asked a further replica because nobody had answered")
        self.failed_reads = counter("failed_reads", "reads that no replica could serve")
        reports = counter("reports", "what happened to members of ensembles", "kind")
        self._reports = {kind: reports.labels(kind.name.lower()) for kind in ReportKind}

    @classmethod
    def of(cls, registry: CollectorRegistry) -> LedgerMetrics:
        metrics = _metrics.get(registry)
        if metrics is None:
            metrics = _metrics[registry] = cls(registry)
        return metrics

    def count(self, report: Report) -> None:
        self._reports[report.kind].inc()


_metrics: WeakKeyDictionary[CollectorRegistry, LedgerMetrics] = WeakKeyDictionary()
