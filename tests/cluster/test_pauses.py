"""Processes that are stopped for 30 s and then go on as if nothing had happened (SIGSTOP, a frozen machine)."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from cluster.harness import LEASE_S, METADATA, Cluster, until
from cluster.load import Judge, Load

from magnetar.client.sync import Client

PAUSE_S = 30.0
QUIET_S = 10.0
"""Long enough for a 99.9th percentile that 30 s can be compared with."""

ASKING_S = 10.0

WORSE_AT_MOST = 2.0
GOES_ON_S = 2.0
"""No producer waits longer for an answer where publishing goes on."""

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
    pause_s = load.history.longest_pause(*stopped)
    assert pause_s < GOES_ON_S
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


def test_sigstop_of_the_metadata_store_holds_up_nobody(cluster: Cluster, load: Load, judge: Judge) -> None:
    load.run(2.0)
    with cluster.connect() as client:
        before = owners(client, load.topic)
    # Sessions may end when it goes on: etcd counts the time it stood still, our server does not.
    with load.fault("SIGSTOP metadata", redelivers=True):
        cluster.pause(METADATA)
        stopped = load.run(PAUSE_S)
        cluster.resume(METADATA)
        load.run(LEASE_S + 3.0)
        with cluster.connect() as client:
            until("all are registered", lambda: is_well(client, cluster))
            after = owners(client, load.topic)
            client.admin.topics.create(f"{load.topic}-after")
    judge(load)
    assert load.history.longest_pause(*stopped) < GOES_ON_S
    assert load.history.longest_pause() < TAKEOVER_S
    if cluster.metadata_kind == "server":
        assert after == before


def is_well(client: Client, cluster: Cluster) -> bool:
    health = client.admin.cluster.health()
    return (health.brokers, health.bookies, health.unavailable_shards) == (
        len(cluster.brokers),
        len(cluster.bookies),
        0,
    )


def owners(client: Client, topic: str) -> list[str]:
    found = [shard.owner for shard in client.admin.topics.describe(topic).shards]
    assert None not in found
    return [owner for owner in found if owner]
