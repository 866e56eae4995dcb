"""`magnetar rebalance --goal brokers` as a user types it, against two brokers of which one is new."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

SHARDS = 8
ONE_COPY = ("ensemble_size=1", "write_quorum=1", "ack_quorum=1")


@pytest.fixture(scope="module")
def cluster(magnetar: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """The command, with MAGNETAR_SERVER set. The first broker owns all shards of a topic."""
    folder = tmp_path_factory.mktemp("cluster")
    started: list[Any] = []

    def address(role: str, *assignments: str) -> str:
        settings = [f"--set={one}" for one in ("listen=127.0.0.1:0", *assignments)]
        started.append(magnetar.start(role, "--output", "json", *settings))
        line = started[-1].process.stdout.readline()
        assert line, started[-1].end(None).err
        return str(json.loads(line)["address"])

    try:
        metadata = "metadata=etcd://" + address("metadata", f"data_dir={folder / 'metadata'}")
        address("bookie", "id=bookie", f"data_dir={folder / 'bookie'}", metadata)
        first = type(magnetar)(address("broker", "id=first", metadata, *ONE_COPY))
        assert first.call("topics", "create", "clicks", "--shards", SHARDS).code == 0
        rows = b"".join(b'{"id": "%d"}\n' % n for n in range(100))
        assert first.call("produce", "clicks", "--format", "jsonl", "--key-column", "id", input=rows).code == 0
        address("broker", "id=second", metadata, *ONE_COPY)
        yield first
    finally:
        for process in started:
            process.kill()


def asked(cluster: Any, *arguments: object) -> Any:
    """The JSON that a command prints."""
    ran = cluster.call(*arguments, "--output", "json")
    assert ran.code == 0, ran.err
    return json.loads(ran.out.splitlines()[-1])


def test_shards_are_planned_applied_watched_and_taken_back(cluster: Any, tmp_path: Path) -> None:
    ran = cluster.call("rebalance", "plan", "--goal", "brokers", "--output", "json")
    assert ran.code == 3
    plan = json.loads(ran.out)
    assert list(plan)[:7] == [
        "revision", "goal", "moves", "bytes", "skew_before", "skew_after", "seconds_at_throttle",
    ]  # fmt: skip
    assert [list(move) for move in plan["moves"]] == [["shard", "from", "to", "load"]] * (SHARDS // 2)
    assert {(move["from"], move["to"]) for move in plan["moves"]} == {("first", "second")}
    assert [list(broker.values())[:3] for broker in plan["brokers"]] == [["first", 8, 4], ["second", 0, 4]]
    assert (plan["skew_before"], plan["skew_after"]) == (1.0, 0.0)
    saved = tmp_path / "plan.json"
    saved.write_text(ran.out)
    table = cluster.call("rebalance", "plan", "--goal", "brokers", "--moves")
    assert table.code == 3
    assert "to move      4 shards" in table.out
    assert "skew before  100.0 %" in table.out

    tried = asked(cluster, "rebalance", "apply", saved, "--dry-run")
    assert (tried["dry_run"], tried["moves"], tried["goal"]) == (True, 4, "brokers")
    begun = cluster.call("rebalance", "apply", saved)
    assert (begun.code, begun.out) == (0, "rebalance-1\n")
    assert "begun: 4 shards; follow it with" in begun.err
    watched = cluster.call("rebalance", "status", "--watch")
    assert watched.code == 0
    assert "done        100.0 %, 4 of 4 shards" in watched.out
    assert [(one["id"], one["shards"]) for one in asked(cluster, "brokers", "list")] == [("first", 4), ("second", 4)]
    assert cluster.call("rebalance", "apply", saved).is_refused(1, "the plan holds no more", "its owner is second")
    assert "there is nothing to move" in cluster.call("rebalance", "apply", "--goal", "brokers").err

    back = asked(cluster, "rebalance", "rollback", "rebalance-1")
    assert (back["operation"], back["rollback_of"]) == ("rebalance-2", "rebalance-1")
    assert asked(cluster, "rebalance", "status", "--watch")["moves_done"] == 4
    assert [one["shards"] for one in asked(cluster, "brokers", "list")] == [8, 0]


def test_what_is_about_bytes_is_refused_with_the_reason(cluster: Any, tmp_path: Path) -> None:
    brokers = ("--goal", "brokers")
    assert cluster.call("rebalance", "plan", *brokers, "--max-bytes", "1GB").is_refused(2, "copies no bytes", "--topic")
    assert cluster.call("rebalance", "plan", *brokers, "--throttle", "1MB/s").is_refused(2, "leave --throttle out")
    assert cluster.call("rebalance", "apply", *brokers, "--throttle", "1MB/s").is_refused(2, "leave --throttle out")
    name = asked(cluster, "rebalance", "apply", *brokers)["operation"]
    assert cluster.call("rebalance", "throttle", "1MB/s", name).is_refused(1, "leave the throttle out")
    assert asked(cluster, "rebalance", "status", "--watch")["state"] == "DONE"
    assert cluster.call("rebalance", "verify", name).is_refused(2, "no bytes copied")
    mixed = {"revision": 1, "goal": "brokers", "moves": [{"ledger": 1, "from": "first", "to": "second", "bytes": 1}],
             "skew_before": 1, "skew_after": 0}  # fmt: skip
    (tmp_path / "mixed.json").write_text(json.dumps(mixed))
    assert cluster.call("rebalance", "apply", tmp_path / "mixed.json").is_refused(2, "it has no 'shard'")
