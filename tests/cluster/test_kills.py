"""SIGKILL to each part of a cluster under full load, and to all of it at once: nothing lost or twice, all in order."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pytest
from cluster.harness import LEASE_S, METADATA, Cluster, until
from cluster.load import Judge, Load

from magnetar.client.sync import Client

GOES_ON_S = 2.0
"""No producer waits longer for an answer where publishing goes on."""

EVERY_CLUSTER = [("server", 3), ("server", 4), ("etcd", 3), ("etcd", 4)]
"""Metadata store and bookies: three leave no spare, with four the ensemble changes."""

EITHER_STORE = [("server", 3), ("etcd", 4)]

TAKEOVER_S = LEASE_S + 1.0
QUIET_S = 2.0


def on(clusters: Sequence[tuple[str, int]]) -> pytest.MarkDecorator:
    names = [f"{store}-{bookies}" for store, bookies in clusters]
    return pytest.mark.parametrize("cluster", clusters, ids=names, indirect=True, scope="module")


@pytest.fixture(scope="module")
def cluster(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    kind, bookies = request.param
    cluster = Cluster(tmp_path_factory.mktemp("cluster"), metadata=kind, bookies=bookies)
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.close()


@pytest.fixture
def client(cluster: Cluster) -> Iterator[Client]:
    with cluster.connect() as client:
        yield client


def ensembles(client: Client, topic: str) -> list[tuple[str, ...]]:
    """Where the topic's open ledgers stand, or those of its newest segments."""
    ledgers = client.admin.ledgers.list(topic)
    return [ledger.fragments[-1].bookies for ledger in ledgers if ledger.state == "OPEN"]


@on(EVERY_CLUSTER)
def test_sigkill_of_a_bookie(cluster: Cluster, load: Load, client: Client, judge: Judge) -> None:
    load.run(QUIET_S)
    victim = ensembles(client, load.topic)[0][0]
    spare = len(cluster.bookies) > 3
    with load.fault(f"SIGKILL {victim}", redelivers=False):
        cluster.kill(victim)
        down = load.run(LEASE_S + 2.0)
        if spare:
            until("the spare takes the place", lambda: not any(victim in one for one in ensembles(client, load.topic)))
        cluster.restart(victim)
        load.run(QUIET_S)
    judge(load)
    assert load.history.longest_pause(*down) < GOES_ON_S


@on(EVERY_CLUSTER)
def test_sigkill_of_the_owning_broker(cluster: Cluster, load: Load, client: Client, judge: Judge) -> None:
    load.run(QUIET_S)
    victim = cluster.owner(client, load.topic)
    assert victim is not None
    with load.fault(f"SIGKILL {victim}", redelivers=True):
        cluster.kill(victim)
        load.run(TAKEOVER_S)
        load.run_until_answered(10_000)
        cluster.restart(victim)
        load.run(QUIET_S)
    judge(load)
    assert load.history.longest_pause() < TAKEOVER_S


@on(EITHER_STORE)
def test_sigkill_of_metadata(cluster: Cluster, load: Load, judge: Judge) -> None:
    load.run(QUIET_S)
    # Within a lease no session ends, and nobody is disturbed.
    with load.fault("SIGKILL metadata", redelivers=False):
        cluster.kill(METADATA)
        away = load.run(LEASE_S / 2)
        cluster.restart(METADATA)
        load.run(LEASE_S)
    # Later they end: a shard may then go to the other broker.
    with load.fault("SIGKILL metadata, for longer than a lease", redelivers=True):
        cluster.kill(METADATA)
        longer = load.run(LEASE_S + 2.0)
        cluster.restart(METADATA)
        load.run(LEASE_S)
    judge(load)
    assert load.history.longest_pause(*away) < GOES_ON_S
    assert load.history.longest_pause(*longer) < GOES_ON_S


@on(EITHER_STORE)
def test_sigkill_of_everything_at_once(cluster: Cluster, load: Load, judge: Judge) -> None:
    load.run(QUIET_S)
    with load.fault("SIGKILL everything", redelivers=True):
        cluster.kill_all()
        cluster.restart_all()
        load.run_until_answered(10_000)
        load.run(QUIET_S)
    judge(load)
