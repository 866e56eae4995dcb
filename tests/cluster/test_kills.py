"""SIGKILL to each part of a cluster under full load, and to all of it at once: nothing lost or twice, all in order."""

from __future__ import annotations

import time

import pytest
from cluster.harness import LEASE_S, METADATA, Cluster, MetadataKind, on, until
from cluster.load import Judge, Load, Window

from magnetar.client.sync import Client

GOES_ON_S = 2.0
"""No producer waits longer for an answer where publishing goes on."""

EITHER_STORE: list[tuple[MetadataKind, int]] = [("server", 3), ("etcd", 4)]
"""Metadata store and bookies: three leave no spare, with four the ensemble changes."""

OTHER_CLUSTERS: list[tuple[MetadataKind, int]] = [("server", 4), ("etcd", 3)]

TAKEOVER_S = LEASE_S + 1.0
QUIET_S = 2.0


@pytest.fixture
def cluster(shared_cluster: Cluster) -> Cluster:
    return shared_cluster


def ensembles(client: Client, topic: str) -> list[tuple[str, ...]]:
    """Where the topic's open ledgers stand, or those of its newest segments."""
    ledgers = client.admin.ledgers.list(topic)
    return [ledger.fragments[-1].bookies for ledger in ledgers if ledger.state == "OPEN"]


@on(*EITHER_STORE, long=OTHER_CLUSTERS)
def test_sigkill_of_each_part_in_turn(cluster: Cluster, load: Load, client: Client, judge: Judge) -> None:
    load.run(QUIET_S)
    begin = time.monotonic()
    undisturbed = [kill_a_bookie(cluster, load, client)]
    kill_the_owner(cluster, load, client)
    if (cluster.metadata_kind, len(cluster.bookies)) in EITHER_STORE:
        undisturbed += kill_metadata(cluster, load)
    end = time.monotonic()
    if (cluster.metadata_kind, len(cluster.bookies)) in EITHER_STORE:
        kill_everything(cluster, load)
    judge(load)
    for window in undisturbed:
        assert load.history.longest_pause(*window) < GOES_ON_S
    assert load.history.longest_pause(begin, end) < TAKEOVER_S


def kill_a_bookie(cluster: Cluster, load: Load, client: Client) -> Window:
    victim = ensembles(client, load.topic)[0][0]
    with load.fault(f"SIGKILL {victim}", redelivers=False):
        cluster.kill(victim)
        down = load.run(LEASE_S + 2.0)
        if len(cluster.bookies) > 3:
            until("the spare takes the place", lambda: not any(victim in one for one in ensembles(client, load.topic)))
        cluster.restart(victim)
        load.run(QUIET_S)
    return down


def kill_the_owner(cluster: Cluster, load: Load, client: Client) -> None:
    victim = cluster.owner(client, load.topic)
    assert victim is not None
    with load.fault(f"SIGKILL {victim}", redelivers=True):
        cluster.kill(victim)
        load.run(TAKEOVER_S)
        load.run_until_answered(10_000)
        cluster.restart(victim)
        load.run(QUIET_S)


def kill_metadata(cluster: Cluster, load: Load) -> list[Window]:
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
    return [away, longer]


def kill_everything(cluster: Cluster, load: Load) -> None:
    with load.fault("SIGKILL everything", redelivers=True):
        cluster.kill_all()
        cluster.restart_all()
        load.run_until_answered(10_000)
        load.run(QUIET_S)
