"""A bookie whose directory was wiped: it refuses to start, says what helps, and comes back empty and in limbo."""

from __future__ import annotations

import shutil
from collections.abc import Iterator

import pytest
from cluster.harness import LEASE_S, Cluster, on_its_own
from cluster.load import Judge, Load

LOST, OTHER = "bookie0", "bookie1"


@pytest.fixture(scope="module")
def cluster(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    metadata, bookies = request.param
    with Cluster(tmp_path_factory.mktemp("cluster"), metadata=metadata, bookies=bookies) as cluster:
        yield cluster


@on_its_own(("server", 3), long=[("etcd", 4)])
def test_a_bookie_without_its_directory_answers_for_nothing_that_it_lost(
    cluster: Cluster, load: Load, judge: Judge
) -> None:
    load.run(2.0)
    with cluster.connect() as client, load.fault(f"rm -rf of {LOST}", redelivers=True):
        cluster.kill(LOST)
        shutil.rmtree(cluster.data_dir(LOST))
        refuses_with_the_remedy(cluster)
        cluster.launch(LOST, "--repair-bookie", LOST)
        cluster.wait_ready(LOST)
        assert cluster.metric(LOST, "magnetar_bookie_limbo") == 1.0
        load.run(2.0)

        # Entries that stood on the lost bookie and on this one are on no other now. Whoever takes the shards over must
        # wait for it: the empty bookie's "not here" says nothing.
        owner = cluster.owner(client, load.topic)
        assert owner is not None
        cluster.kill(OTHER, owner)
        load.run(LEASE_S + 3.0)
        cluster.restart(OTHER)
        load.run_until_answered(10_000)
        cluster.restart(owner)
        load.run(2.0)
    judge(load)


def refuses_with_the_remedy(cluster: Cluster) -> None:
    process = cluster.processes[LOST]
    before = len(process.log.read_text()) if process.log.exists() else 0
    cluster.launch(LOST)
    assert process.wait() == 1
    assert process.lines() == []
    (line,) = process.log.read_text()[before:].splitlines()
    assert "its disk was lost or swapped" in line
    assert f"--repair-bookie {LOST}" in line
