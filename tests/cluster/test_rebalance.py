"""An empty bookie joins three filled ones: moved, throttled, interrupted, taken back, while clients notice nothing."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pytest
from cluster.harness import LEASE_S, Cluster, pass_time, until
from cluster.load import Judge, Load
from cluster.rebalancing import (
    average_rate,
    copied_bytes,
    disk_bytes,
    fill,
    join,
    runner,
    skew,
    until_ended,
    until_moved,
)

from magnetar.client import OrderRefused, RebalanceOperation
from magnetar.client.sync import Client

MIB = 1 << 20
FILL_BYTES = 300 * MIB
SETTINGS = {"bookie": {"memory_bytes": 32 * MIB, "gc_interval_s": 2}, "broker": {"segment_bytes": 4 * MIB}}
NEW = "bookie3"
EVEN = 0.05
GOES_ON_S = 2.0
SPACE_RETURNS_S = 120.0
THROTTLE = 6_000_000
QUIET_S = 3.0


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Three filled bookies, and an empty one that has just joined."""
    with Cluster(tmp_path_factory.mktemp("cluster"), settings=SETTINGS) as cluster:
        with cluster.connect() as client:
            fill(client, "filled", FILL_BYTES)
        join(cluster, NEW)
        yield cluster


def emptied(client: Client) -> None:
    """The new bookie holds nothing of what was filled before: what was moved is taken back."""
    operations = client.admin.rebalance.list()
    taken_back = {operation.rollback_of for operation in operations}
    for operation in reversed(operations):
        if operation.moves_done and not operation.rollback_of and operation.operation not in taken_back:
            until_ended(client, client.admin.rebalance.rollback(operation.operation, throttle=1 << 40).operation)


def begin(client: Client, throttle: int) -> RebalanceOperation:
    plan = client.admin.rebalance.plan(topic="filled")
    assert plan.moves
    return client.admin.rebalance.apply(plan, throttle=throttle)


def check_copies(client: Client, operation: str) -> None:
    verified = client.admin.rebalance.verify(operation)
    assert verified.problems == ()
    moved = client.admin.rebalance.status(operation).moves_done
    assert verified.ledgers == moved
    assert verified.copies == 3 * verified.entries


@pytest.mark.timeout(600)
def test_an_empty_bookie_gets_its_share_though_the_runner_is_killed(
    cluster: Cluster, load: Load, client: Client, judge: Judge
) -> None:
    begun = begin(client, 8 * MIB)
    until_moved(client, begun.operation, 3)
    victim = runner(cluster)
    with load.fault(f"SIGKILL {victim}, the runner", redelivers=False):
        cluster.kill(victim)
        down = load.run(LEASE_S + 1.0)
        cluster.restart(victim)
    ended = until_ended(client, begun.operation)
    assert (ended.state, ended.moves_skipped) == ("DONE", 0)
    judge(load)
    assert load.history.longest_pause(*down) < GOES_ON_S
    check_copies(client, begun.operation)
    restart(cluster, cluster.brokers)
    even_out(client)
    restart(cluster, cluster.bookies)
    try:
        until("the disks are even", lambda: skew(disk_bytes(cluster)) <= EVEN, SPACE_RETURNS_S)
    finally:
        print(disk_bytes(cluster))


def even_out(client: Client) -> None:
    """Moves what the load has written meanwhile, too."""
    plan = client.admin.rebalance.plan()
    if plan.moves:
        until_ended(client, client.admin.rebalance.apply(plan, throttle=1 << 30).operation)
    assert client.admin.rebalance.plan().skew_after <= EVEN


def restart(cluster: Cluster, names: Sequence[str]) -> None:
    """Brokers close their ledgers: only these move. Bookies clear their logs, where a small test's bytes are still."""
    for name in names:
        assert cluster.processes[name].terminate() == 0
        cluster.restart(name)


@pytest.mark.long
@pytest.mark.timeout(600)
def test_a_throttle_is_held_within_a_tenth_and_changed_while_it_goes_on(cluster: Cluster, client: Client) -> None:
    emptied(client)
    before = copied_bytes(cluster)
    held = until_ended(client, begin(client, THROTTLE).operation)
    moved = copied_bytes(cluster)
    assert abs(average_rate(held, moved - before) - THROTTLE) <= 0.1 * THROTTLE
    back = client.admin.rebalance.rollback(held.operation, throttle=THROTTLE // 4)
    until_moved(client, back.operation, 1)
    assert client.admin.rebalance.throttle(back.operation, THROTTLE).throttle == THROTTLE
    ended = until_ended(client, back.operation)
    assert THROTTLE // 4 < average_rate(ended, copied_bytes(cluster) - moved) <= 1.1 * THROTTLE
    check_copies(client, back.operation)


@pytest.mark.long
@pytest.mark.timeout(600)
def test_pause_resume_cancel_and_rollback_though_source_and_target_are_killed(
    cluster: Cluster, load: Load, client: Client, judge: Judge
) -> None:
    emptied(client)
    begun = begin(client, THROTTLE).operation
    until_moved(client, begun, 2)
    with load.fault(f"SIGKILL {NEW}, the target", redelivers=False):
        cluster.kill(NEW)
        until("it says why it waits", lambda: any(NEW in problem for problem in status(client, begun).problems))
        cluster.restart(NEW)
    until_moved(client, begun, status(client, begun).moves_done + 1)

    client.admin.rebalance.pause(begun)
    paused = until("claimed copies have ended", lambda: still(client, begun))
    assert paused.state == "PAUSED"
    with pytest.raises(OrderRefused, match="has not ended: cancel it first"):
        client.admin.rebalance.rollback(begun)
    client.admin.rebalance.resume(begun)
    until_moved(client, begun, paused.moves_done + 1)

    client.admin.rebalance.cancel(begun)
    cancelled = until_ended(client, begun)
    assert cancelled.state == "CANCELLED"
    assert 0 < cancelled.moves_done < cancelled.moves
    back = client.admin.rebalance.rollback(begun, throttle=THROTTLE).operation
    until_moved(client, back, 1)
    victim = runner(cluster)
    with load.fault(f"SIGKILL {victim}, the runner of a rollback", redelivers=False):
        cluster.kill(victim)
        load.run(1.0)
        cluster.restart(victim)
    ended = until_ended(client, back)
    assert (ended.state, ended.moves_done) == ("DONE", cancelled.moves_done)
    judge(load)
    check_copies(client, back)
    held = [ledger for ledger in client.admin.ledgers.list("filled") if ledger.state == "CLOSED"]
    assert not any(NEW in fragment.bookies for ledger in held for fragment in ledger.fragments)


def status(client: Client, operation: str) -> RebalanceOperation:
    return client.admin.rebalance.status(operation)


def still(client: Client, operation: str) -> RebalanceOperation | None:
    """The operation, if nothing of it has ended for some seconds."""
    before = status(client, operation)
    pass_time(QUIET_S)
    after = status(client, operation)
    return after if after.moves_done == before.moves_done else None
