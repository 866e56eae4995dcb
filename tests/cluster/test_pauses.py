"""Processes that are stopped for 30 s and then go on as if nothing had happened (SIGSTOP, a frozen machine)."""

from __future__ import annotations

import pytest
from cluster.harness import LEASE_S, METADATA, Cluster, on, until
from cluster.load import Judge, Load

from magnetar.client.sync import Client
from magnetar.ledger.client import LedgerSettings

PAUSE_S = 30.0
QUIET_S = 10.0
"""Long enough for a 99.9th percentile that 30 s can be compared with."""

ASKING_S = 10.0

WORSE_AT_MOST = 2.0
GOES_ON_S = 2.0
"""No producer waits longer for an answer where publishing goes on."""

TAKEOVER_S = LEASE_S + 1.0
HEDGE_S = LedgerSettings().hedge_s
"""More, if a bookie stands still too: a read waits so long for it, and then others are asked first."""


@pytest.fixture
def cluster(shared_cluster: Cluster) -> Cluster:
    return shared_cluster


@on(("server", 3), long=[("etcd", 4)])
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


@on(("server", 3), ("etcd", 4))
def test_sigstop_of_a_broker_makes_no_second_writer(cluster: Cluster, load: Load, judge: Judge) -> None:
    load.run(2.0)
    with cluster.connect() as client:
        victim = owners(client, load.topic)[0]
    # With a spare a bookie stands still at the same time: who takes over recovers without it.
    stopped = [victim, *(["bookie0"] if len(cluster.bookies) > 3 else [])]
    with load.fault(f"SIGSTOP {' and '.join(stopped)}", redelivers=True):
        for name in stopped:
            cluster.pause(name)
        load.run(PAUSE_S - ASKING_S)
        # Whoever is asked: the one that stands still keeps nobody waiting for long.
        with cluster.connect(ASKING_S) as client:
            assert victim not in owners(client, load.topic)
        load.run(ASKING_S)
        for name in stopped:
            cluster.resume(name)
        # What it writes as the owner that it was is refused; some shards may be handed to it again.
        load.run(3.0)
    judge(load)
    assert load.history.longest_pause() < TAKEOVER_S + (HEDGE_S if "bookie0" in stopped else 0.0)


@on(("server", 3))
def test_sigstop_of_the_metadata_server_holds_up_nobody_and_ends_no_session(
    cluster: Cluster, load: Load, judge: Judge
) -> None:
    load.run(2.0)
    with cluster.connect() as client:
        before = owners(client, load.topic)
    # It gives leases their full time again when it goes on: nobody's session ends.
    with load.fault("SIGSTOP metadata", redelivers=False):
        cluster.pause(METADATA)
        load.run(PAUSE_S)
        cluster.resume(METADATA)
        load.run(LEASE_S + 3.0)
        with cluster.connect() as client:
            until("all are registered", lambda: is_well(client, cluster))
            after = owners(client, load.topic)
            client.admin.topics.create(f"{load.topic}-after")
    judge(load)
    assert load.history.longest_pause() < GOES_ON_S
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
