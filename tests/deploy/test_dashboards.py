"""Alert rules and dashboard ask for metrics and labels that the processes really have."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client import CollectorRegistry
from prometheus_client.metrics import MetricWrapperBase

from magnetar.bookie.metrics import BookieMetrics
from magnetar.broker.metrics import BrokerMetrics
from magnetar.ledger.metrics import LedgerMetrics
from magnetar.metadata.server.metrics import ServerMetrics
from magnetar.repair.metrics import RepairMetrics

DEPLOY = Path(__file__).resolve().parents[2] / "deploy"
RULES: dict[str, Any] = yaml.safe_load((DEPLOY / "prometheus/alerts.yaml").read_text())
SCRAPES: dict[str, Any] = yaml.safe_load((DEPLOY / "prometheus/prometheus.yaml").read_text())
DASHBOARD: dict[str, Any] = json.loads((DEPLOY / "grafana/magnetar.json").read_text())
GUIDE = (DEPLOY / "OPERATIONS.md").read_text()
SUFFIXES = {"counter": ("_total",), "gauge": ("",), "histogram": ("_bucket", "_count", "_sum")}
ADDED_BY_PROMETHEUS = {"job", "instance", "le"}


def metrics_of_all_roles() -> dict[str, set[str]]:
    """The series by name, each with its labels."""
    registry = CollectorRegistry()
    BookieMetrics(registry, "bookie0")
    BrokerMetrics(registry)
    LedgerMetrics.of(registry)
    ServerMetrics(registry)
    RepairMetrics.of(registry)
    series: dict[str, set[str]] = {}
    for collector in registry._collector_to_names:
        assert isinstance(collector, MetricWrapperBase)
        (family,) = collector.describe()
        for suffix in SUFFIXES[family.type]:
            series[family.name + suffix] = set(collector._labelnames)
    return series


SERIES = metrics_of_all_roles()


def alerts() -> Iterator[Any]:
    for group in RULES["groups"]:
        yield from group["rules"]


def panels() -> list[Any]:
    return [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]


def expressions() -> Iterator[tuple[str, str]]:
    for alert in alerts():
        yield alert["alert"], alert["expr"]
    for panel in panels():
        for target in panel["targets"]:
            yield panel["title"], target["expr"]


def names_in(expression: str) -> set[str]:
    return set(re.findall(r"\bmagnetar_[a-z_]+", expression))


def labels_in(expression: str) -> set[str]:
    selected = re.findall(r"([a-z_]+)=~?\"", expression)
    grouped = [name for names in re.findall(r"\bby \(([^)]*)\)", expression) for name in names.split(", ")]
    return {*selected, *grouped}


@pytest.mark.parametrize(("title", "expression"), list(expressions()))
def test_an_expression_asks_for_metrics_and_labels_that_exist(title: str, expression: str) -> None:
    names = names_in(expression)
    assert names <= SERIES.keys(), f"{title}: no role has {names - SERIES.keys()}"
    known = ADDED_BY_PROMETHEUS.union(*(SERIES[name] for name in names))
    assert labels_in(expression) <= known, f"{title}: no metric of it has {labels_in(expression) - known}"


def test_texts_name_labels_that_their_expression_leaves() -> None:
    texts = [(a["expr"], " ".join(a["annotations"].values())) for a in alerts()]
    texts += [(t["expr"], t["legendFormat"]) for panel in panels() for t in panel["targets"]]
    for expression, text in texts:
        left = ADDED_BY_PROMETHEUS.union(*(SERIES[name] for name in names_in(expression)))
        grouped = re.findall(r"\bby \(([^)]*)\)", expression)
        if grouped:
            left = set(grouped[0].split(", "))
        named = set(re.findall(r"\{\{ ?(?:\$labels\.)?([a-z_]+) ?\}\}", text))
        assert named <= left, f"{text!r} names {named - left}, which {expression!r} does not leave"


def test_every_alert_says_what_is_wrong_and_what_to_do() -> None:
    names = [alert["alert"] for alert in alerts()]
    assert len(set(names)) == len(names)
    for alert in alerts():
        assert alert["labels"]["severity"] in ("warning", "critical"), alert["alert"]
        assert alert["annotations"].keys() == {"summary", "description"}, alert["alert"]


def test_jobs_are_those_that_are_scraped() -> None:
    jobs = {job["job_name"] for job in SCRAPES["scrape_configs"]}
    text = " ".join(expression for _, expression in expressions())
    assert set(re.findall(r"job=\"([^\"]*)\"", text)) == jobs
    assert all(re.fullmatch("magnetar-.*", job) for job in jobs)


def test_panels_neither_overlap_nor_share_an_id() -> None:
    places = [panel["gridPos"] for panel in DASHBOARD["panels"]]
    cells = [(x, y) for p in places for x in range(p["x"], p["x"] + p["w"]) for y in range(p["y"], p["y"] + p["h"])]
    assert len(set(cells)) == len(cells)
    assert len({panel["id"] for panel in DASHBOARD["panels"]}) == len(places)


def test_the_table_of_the_guide_names_metrics_that_exist() -> None:
    named = set(re.findall(r"^\| `(magnetar_[a-z_]+)`", GUIDE, re.MULTILINE))
    families = {name.removesuffix("_bucket") for name in SERIES}
    assert named
    assert named <= families
