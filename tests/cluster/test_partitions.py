"""Brokers cut from the metadata server or from bookies, each process a host of its own. Needs root and `ip`."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from cluster.harness import LEASE_S, METADATA, Cluster, until
from cluster.load import Judge, Load
from cluster.network import Network

from magnetar.client.sync import Client

TAKEOVER_S = LEASE_S + 1.0
CUT_S = 2 * LEASE_S + 2.0
ONE_WAY_S = LEASE_S + 2.0
GOES_ON_S = 2.0
QUIET_S = 2.0


@pytest.fixture(scope="module")
def cluster(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    network = Network()
    cluster = Cluster(tmp_path_factory.mktemp("cluster"), metadata=request.param, network=network)
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.close()
        network.close()


@pytest.fixture
def client(cluster: Cluster) -> Iterator[Client]:
    with cluster.connect() as client:
        yield client


@pytest.mark.parametrize("cluster", ["server", "etcd"], indirect=True, scope="module")
def test_a_broker_that_is_cut_from_metadata_loses_its_shards_and_nothing_else(
    cluster: Cluster, load: Load, client: Client, judge: Judge
) -> None:
    assert cluster.network is not None
    load.run(QUIET_S)
    victim = cluster.owner(client, load.topic)
    assert victim is not None
    with load.fault(f"{victim} cut from metadata", redelivers=True):
        with cluster.network.cut(victim, [METADATA]):
            load.run(CUT_S)
            until("another broker owns all", lambda: victim not in owners(client, load.topic))
        until("it is registered again", lambda: client.admin.cluster.health().brokers == len(cluster.brokers))
        load.run(QUIET_S)
    judge(load)
    assert load.history.longest_pause() < TAKEOVER_S


@pytest.mark.parametrize("cluster", ["server"], indirect=True, scope="module")
def test_a_broker_that_is_cut_from_all_bookies_goes_on_when_it_is_healed(
    cluster: Cluster, load: Load, client: Client, judge: Judge
) -> None:
    assert cluster.network is not None
    load.run(QUIET_S)
    victim = cluster.owner(client, load.topic)
    assert victim is not None
    with load.fault(f"{victim} cut from bookies", redelivers=True):
        with cluster.network.cut(victim, cluster.bookies):
            load.run(CUT_S)
        load.run_until_answered(10_000)
        load.run(QUIET_S)
    judge(load)


@pytest.mark.parametrize("cluster", ["server"], indirect=True, scope="module")
def test_brokers_that_are_cut_from_one_bookie_go_on_without_it(cluster: Cluster, load: Load, judge: Judge) -> None:
    assert cluster.network is not None
    load.run(QUIET_S)
    with load.fault("brokers cut from bookie0", redelivers=False):
        with cluster.network.cut("bookie0", cluster.brokers):
            load.run(CUT_S)
        load.run(QUIET_S)
    judge(load)
    assert load.history.longest_pause() < GOES_ON_S


@pytest.mark.parametrize("cluster", ["server"], indirect=True, scope="module")
def test_a_bookie_that_hears_or_is_heard_but_not_both_is_gone_without(
    cluster: Cluster, load: Load, judge: Judge
) -> None:
    """What it is sent is lost, then what it answers: of what is stored there nobody hears."""
    assert cluster.network is not None
    load.run(QUIET_S)
    ways = ([cluster.brokers, ["bookie0"]], [["bookie0"], cluster.brokers])
    for senders, receivers in ways:
        with load.fault(f"{senders} cut from {receivers}, one way", redelivers=False):
            with cluster.network.cut_one_way(senders, receivers):
                load.run(ONE_WAY_S)
            load.run(QUIET_S)
    judge(load)
    assert load.history.longest_pause() < GOES_ON_S


def owners(client: Client, topic: str) -> set[str | None]:
    return {shard.owner for shard in client.admin.topics.describe(topic).shards}
