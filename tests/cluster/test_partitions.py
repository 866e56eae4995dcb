"""Brokers cut from the metadata server or from bookies, each process a host of its own. Needs root and `ip`."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import closing

import pytest
from cluster.harness import LEASE_S, METADATA, Cluster, on_its_own, until
from cluster.load import Judge, Load
from cluster.network import Network

from magnetar.client.sync import Client

TAKEOVER_S = LEASE_S + 1.0
CUT_S = 2 * LEASE_S + 2.0
CUT_FROM_METADATA_S = LEASE_S + 3.0
"""Its session has ended by then; the cut lasts until others have noticed."""

ONE_BOOKIE_S = LEASE_S + 3.0
"""Longer than a bookie has to answer."""

GOES_ON_S = 2.0
QUIET_S = 2.0


@pytest.fixture(scope="module")
def cluster(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    metadata, bookies = request.param
    folder = tmp_path_factory.mktemp("cluster")
    with (
        closing(Network()) as network,
        Cluster(folder, metadata=metadata, bookies=bookies, network=network) as cluster,
    ):
        yield cluster


@on_its_own(("server", 3), ("etcd", 4))
def test_a_broker_that_is_cut_from_metadata_loses_its_shards_and_nothing_else(
    cluster: Cluster, load: Load, client: Client, judge: Judge
) -> None:
    assert cluster.network is not None
    load.run(QUIET_S)
    victim = cluster.owner(client, load.topic)
    assert victim is not None
    with load.fault(f"{victim} cut from metadata", redelivers=True):
        with cluster.network.cut(victim, [METADATA]):
            load.run(CUT_FROM_METADATA_S)
            until("another broker owns all", lambda: victim not in owners(client, load.topic))
        until("it is registered again", lambda: client.admin.cluster.health().brokers == len(cluster.brokers))
        load.run(QUIET_S)
    judge(load)
    assert load.history.longest_pause() < TAKEOVER_S


@on_its_own(("server", 3), long=[("etcd", 4)])
def test_brokers_that_are_cut_from_bookies_go_on_without_one_and_after_being_without_all(
    cluster: Cluster, load: Load, client: Client, judge: Judge
) -> None:
    network = cluster.network
    assert network is not None
    bookie = "bookie0"
    load.run(QUIET_S)
    begin = time.monotonic()
    for what, cut in (
        ("brokers cut from a bookie", network.cut(bookie, cluster.brokers)),
        # Nothing of what it is sent arrives; then nothing of what it answers: nobody hears of what it stores.
        ("brokers not heard by a bookie", network.cut_one_way(cluster.brokers, [bookie])),
        ("brokers that do not hear a bookie", network.cut_one_way([bookie], cluster.brokers)),
    ):
        with load.fault(what, redelivers=False):
            with cut:
                load.run(ONE_BOOKIE_S)
            load.run(QUIET_S)
    without_one = begin, time.monotonic()
    victim = cluster.owner(client, load.topic)
    assert victim is not None
    with load.fault(f"{victim} cut from all bookies", redelivers=True):
        with network.cut(victim, cluster.bookies):
            load.run(CUT_S)
        load.run_until_answered(10_000)
        load.run(QUIET_S)
    judge(load)
    assert load.history.longest_pause(*without_one) < GOES_ON_S


def owners(client: Client, topic: str) -> set[str | None]:
    return {shard.owner for shard in client.admin.topics.describe(topic).shards}
