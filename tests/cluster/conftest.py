"""Tests of clusters of real processes take minutes: they run when this folder is asked for (`make cluster-test`).

What is pure here runs with all other tests. A failed test shows the last lines that each process wrote.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))

from cluster.harness import Cluster
from cluster.load import Judge, Load, row, table

from magnetar.client.sync import Client

HERE = Path(__file__).parent
PURE = {"test_history.py"}
ROWS = pytest.StashKey[list[list[str]]]()
TEST_TIMEOUT_S = 300


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    asked = any(Path(arg.partition("::")[0]).resolve().is_relative_to(HERE) for arg in config.args)
    is_test = collection_path.name.startswith("test_") and collection_path.name not in PURE
    return True if is_test and not asked else None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.parent == HERE and item.path.name not in PURE:
            item.add_marker(pytest.mark.timeout(TEST_TIMEOUT_S))


def pytest_configure(config: pytest.Config) -> None:
    config.stash[ROWS] = []


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if config.stash[ROWS]:
        terminalreporter.section("what clients saw")
        for line in table(config.stash[ROWS]):
            terminalreporter.line(line)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    report = yield
    if report.failed:
        for value in getattr(item, "funcargs", {}).values():
            if isinstance(value, Cluster | Load):
                report.sections += [(f"log of {name}", tail) for name, tail in value.tails() if tail]
    return report


@pytest.fixture(scope="session")
def shared_cluster(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Of a metadata store and so many bookies, for all tests that ask for such a one: see `on`."""
    kind, bookies = request.param
    with Cluster(tmp_path_factory.mktemp("cluster"), metadata=kind, bookies=bookies) as cluster:
        yield cluster


@pytest.fixture
def client(cluster: Cluster) -> Iterator[Client]:
    """Of the cluster that the test's file makes."""
    with cluster.connect() as client:
        yield client


@pytest.fixture
def load(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Load]:
    """Clients of the test's cluster, which is mended first; they run on return."""
    cluster: Cluster = request.getfixturevalue("cluster")
    cluster.mend()
    load = Load(cluster, tmp_path, topic=f"t{len(request.config.stash[ROWS])}-{abs(hash(request.node.name)) % 10**6}")
    try:
        load.start()
        yield load
    finally:
        load.close()


@pytest.fixture
def judge(request: pytest.FixtureRequest, tmp_path: Path) -> Judge:
    """Ends the load, prints its numbers, writes them to `verdict.json`, and fails for what must not be."""

    def end(load: Load) -> None:
        verdict = load.finish()
        rows = request.config.stash[ROWS]
        rows.append(row(request.node.name.removeprefix("test_"), verdict))
        print("\n" + "\n".join([*table(rows[-1:]), "longest pauses:", *load.pauses()]))
        (tmp_path / "verdict.json").write_text(json.dumps({"run": request.node.name, **verdict.as_json()}, indent=2))
        assert not verdict.problems, "\n".join(verdict.problems)

    return end
