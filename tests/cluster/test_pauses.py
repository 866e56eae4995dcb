"""Processes that are stopped for 30 s and then go on as if nothing had happened (SIGSTOP, a frozen machine)."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from cluster.harness import LEASE_S, Cluster
from cluster.load import Judge, Load

from magnetar.client.sync import Client

PAUSE_S = 30.0
QUIET_S = 10.0
"""Long enough for a 99.9th percentile that 30 s can be compared with."""

ASKING_S = 10.0

WORSE_AT_MOST = 2.0
TAKEOVER_S = LEASE_S + 1.0


@pytest.fixture(scope="module", params=[("server", 3), ("etcd", 4)], ids=lambda param: f"{param[0]}-{param[1]}")
def cluster(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    kind, bookies = request.param
    cluster = Cluster(tmp_path_factory.mktemp("cluster"), metadata=kind, bookies=bookies)
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.close()


def test_sigstop_of_a_bookie_is_hidden_by_the_others(cluster: Cluster, load: Load, judge: Judge) -> None:
    load.run(2.0)
    quiet = load.run(QUIET_S)
    with load.fault("SIGSTOP bookie0", redelivers=False):
        cluster.pause("bookie0")
        stopped = load.run(PAUSE_S)
        cluster.resume("bookie0")
        load.run(2.0)
    judge(load)
    before, meanwhile = (load.history.latencies(*window) for window in (quiet, stopped))
    print(f"p99.9 of publishing: quiet {before.p999:.0f} ms, a bookie stopped {meanwhile.p999:.0f} ms")
    assert meanwhile.p999 <= WORSE_AT_MOST * before.p999


def test_sigstop_of_a_broker_makes_no_second_writer(cluster: Cluster, load: Load, judge: Judge) -> None:
    load.run(2.0)
    with cluster.connect() as client:
        victim = owners(client, load.topic)[0]
    with load.fault(f"SIGSTOP {victim}", redelivers=True):
        cluster.pause(victim)
        load.run(PAUSE_S - ASKING_S)
        # Whoever is asked: the one that stands still keeps nobody waiting for long.
        with cluster.connect(ASKING_S) as client:
            assert victim not in owners(client, load.topic)
        load.run(ASKING_S)
        cluster.resume(victim)
        load.run(3.0)
        with cluster.connect() as client:
            assert victim not in owners(client, load.topic)
    judge(load)
    assert load.history.longest_pause() < TAKEOVER_S


def owners(client: Client, topic: str) -> list[str]:
    found = [shard.owner for shard in client.admin.topics.describe(topic).shards]
    assert None not in found
    return [owner for owner in found if owner]
