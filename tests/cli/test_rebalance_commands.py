"""`magnetar rebalance` as a user types it, against a standalone whose fourth bookie is new."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from magnetar.cli.rebalance import _as_json
from magnetar.cli.rebalance_shown import left_out
from magnetar.client import RebalanceMove, RebalanceOperation

TOPICS = 8
RATE = "200MB/s"


def started(magnetar: Any, folder: Path, bookies: int) -> tuple[Any, Any]:
    """The process, and the command with MAGNETAR_SERVER set."""
    server = magnetar.start(
        "standalone", "--data-dir", folder, "--port", 0, "--http-port", 0, "--bookies", bookies, "--output", "json"
    )
    line = server.process.stdout.readline()
    assert line, server.end(None).err
    return server, type(magnetar)(json.loads(line)["server"])


@pytest.fixture(scope="module")
def cluster(magnetar: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    with uneven(magnetar, tmp_path_factory.mktemp("standalone")) as command:
        yield command


@contextmanager
def uneven(magnetar: Any, folder: Path) -> Iterator[Any]:
    """Each topic has a closed segment on three bookies; the fourth one is empty."""
    server, command = started(magnetar, folder, 3)
    for number in range(TOPICS):
        ran = command.call("produce", f"topic-{number}", input=b"x" * 20_000 + b"\n")
        assert ran.code == 0, ran.err
    assert server.end().code == 0
    server, command = started(magnetar, folder, 4)
    try:
        yield command
    finally:
        ended = server.end()
    assert (ended.code, ended.err) == (0, "")


def asked(cluster: Any, *arguments: object, code: int = 0) -> Any:
    """The JSON that a command prints."""
    ran = cluster.call(*arguments, "--output", "json")
    assert ran.code == code, ran.err
    assert ran.out.count("\n") == 1
    return json.loads(ran.out)


def ended(cluster: Any, operation: str, code: int = 0) -> Any:
    """The last line of watching an operation."""
    ran = cluster.call("rebalance", "status", operation, "--watch", "--output", "json")
    assert ran.code == code, ran.err
    return json.loads(ran.out.splitlines()[-1])


def test_a_plan_is_saved_applied_watched_verified_and_taken_back(cluster: Any, tmp_path: Path) -> None:
    assert cluster.call("rebalance", "status").is_refused(1, "nothing was ever rebalanced here")
    ran = cluster.call("rebalance", "plan", "--output", "json", "--throttle", "1MB/s")
    assert ran.code == 3
    plan = json.loads(ran.out)
    assert list(plan)[:7] == [
        "revision", "goal", "moves", "bytes", "skew_before", "skew_after", "seconds_at_throttle",
    ]  # fmt: skip
    assert [list(move) for move in plan["moves"]] == [["ledger", "from", "to", "bytes"]] * 6
    assert (plan["skew_before"], plan["skew_after"]) == (1.0, 0.0)
    assert plan["seconds_at_throttle"] == plan["bytes"] / 1e6
    assert {move["to"] for move in plan["moves"]} == {"bookie3"}
    saved = tmp_path / "plan.json"
    saved.write_text(ran.out)

    table = cluster.call("rebalance", "plan", "--moves")
    assert table.code == 3
    assert "skew before  100.0 %" in table.out
    assert "bookie3" in table.out

    assert asked(cluster, "rebalance", "apply", saved, "--dry-run")["throttle"] == 1_000_000
    tried = asked(cluster, "rebalance", "apply", saved, "--dry-run", "--throttle", RATE)
    assert (tried["dry_run"], tried["moves"], tried["throttle"]) == (True, 6, 200_000_000)
    assert asked(cluster, "rebalance", "status", "--all") == []
    begun = cluster.call("rebalance", "apply", saved, "--throttle", RATE)
    assert (begun.code, begun.out) == (0, "rebalance-1\n")
    assert "magnetar rebalance status rebalance-1 --watch" in begun.err
    done = ended(cluster, "rebalance-1")
    assert (done["state"], done["percent"], done["moves_done"], done["bytes_remaining"]) == ("DONE", 100.0, 6, 0)
    assert {one["bookie"]: one["bytes_in_done"] for one in done["bookies"]}["bookie3"] == done["bytes"]
    assert (done["problems"], done["rate_bytes_per_s"] > 0, "rate" in done) == ([], True, False)

    assert cluster.call("rebalance", "apply", saved).is_refused(
        1, "the plan holds no more, plan again", "it was changed"
    )
    nothing = cluster.call("rebalance", "plan", "--output", "json")
    assert (nothing.code, json.loads(nothing.out)["moves"]) == (0, [])
    saved.write_text(nothing.out)
    for applied in (cluster.call("rebalance", "apply"), cluster.call("rebalance", "apply", saved)):
        assert (applied.code, "there is nothing to move" in applied.err) == (0, True)
    assert asked(cluster, "rebalance", "apply") == {"operation": None, "moves": 0, "notes": [], "dry_run": False}

    verified = asked(cluster, "rebalance", "verify")
    assert (verified["operation"], verified["ledgers"], verified["problems"]) == ("rebalance-1", 6, [])
    assert verified["copies"] == 3 * verified["entries"] > 0
    ledger = asked(cluster, "ledgers", "verify", plan["moves"][0]["ledger"])
    assert ledger["problems"] == []
    assert len(ledger["bookies"]) == 3

    back = asked(cluster, "rebalance", "rollback", "rebalance-1")
    assert (back["operation"], back["rollback_of"], back["throttle"]) == ("rebalance-2", "rebalance-1", 200_000_000)
    assert ended(cluster, "rebalance-2")["moves_done"] == 6
    assert [one["operation"] for one in asked(cluster, "rebalance", "status", "--all")] == [
        "rebalance-1",
        "rebalance-2",
    ]


@pytest.fixture
def fresh(magnetar: Any, tmp_path: Path) -> Iterator[Any]:
    """Where no bookie has anything left of what was moved and taken back: that would be compared, and not copied."""
    with uneven(magnetar, tmp_path) as command:
        yield command


def test_an_operation_is_throttled_paused_resumed_and_cancelled(fresh: Any) -> None:
    cluster = fresh
    name = asked(cluster, "rebalance", "apply", "--throttle", "1kB/s")["operation"]
    assert asked(cluster, "rebalance", "throttle", "2kB/s", "--dry-run")["throttle"] == 1_000
    assert asked(cluster, "rebalance", "throttle", "2kB/s")["throttle"] == 2_000
    assert asked(cluster, "rebalance", "pause")["state"] == "PAUSED"
    shown = cluster.call("rebalance", "status").out
    assert "state       PAUSED" in shown
    assert "throttle    2.0 kB/s" in shown
    assert cluster.call("rebalance", "rollback", name).is_refused(1, "has not ended: cancel it first")
    assert asked(cluster, "rebalance", "resume", name)["state"] == "RUNNING"
    assert asked(cluster, "rebalance", "cancel")["state"] in ("CANCELLING", "CANCELLED")
    cluster.call("rebalance", "throttle", "1GB/s")  # the copies that are begun end at once
    assert ended(cluster, name, code=1)["state"] == "CANCELLED"
    watched = cluster.call("rebalance", "status", name, "--watch")
    assert watched.code == 1
    assert f"magnetar: {name} was cancelled" in watched.err
    assert "plan again with `magnetar rebalance plan --goal bytes`" in watched.err
    assert cluster.call("rebalance", "pause", name).is_refused(1, "the operation is cancelled")
    assert cluster.call("rebalance", "resume").is_refused(1, "no operation goes on")


def test_bad_input_is_refused_with_what_to_do(cluster: Any, tmp_path: Path) -> None:
    for text in ("", "{}", "[]", '{"moves": 3}', '{"revision": "x"}'):
        (tmp_path / "bad.json").write_text(text)
        refused = cluster.call("rebalance", "apply", tmp_path / "bad.json")
        assert refused.is_refused(2, "this is no saved plan")
        assert "indices" not in refused.err
    assert cluster.call("rebalance", "apply", tmp_path / "none.json").is_refused(1, "no such file")
    future = {"revision": 1 << 40, "goal": "bytes", "moves": [{"ledger": 1, "from": "a", "to": "b", "bytes": 1}],
              "skew_before": 1, "skew_after": 0}  # fmt: skip
    for number in (-1, 1 << 64, 5.9, True):
        (tmp_path / "bad.json").write_text(json.dumps({**future, "revision": number}))
        assert cluster.call("rebalance", "apply", tmp_path / "bad.json").is_refused(2, f"revision=`{number}`")
    (tmp_path / "bad.json").write_text(json.dumps({**future, "throttle": 0}))
    assert cluster.call("rebalance", "apply", tmp_path / "bad.json").is_refused(2, "a throttle is above zero")
    (tmp_path / "bad.json").write_text(json.dumps(future).replace('"a"', '"\\ud800"'))
    assert cluster.call("rebalance", "apply", tmp_path / "bad.json").is_refused(2, "surrogates not allowed")
    assert cluster.call("rebalance", "throttle", "9" * 400).is_refused(2, "is no rate")
    (tmp_path / "other.json").write_text(json.dumps(future))
    assert cluster.call("rebalance", "apply", tmp_path / "other.json").is_refused(1, "it is of another")
    assert cluster.call("rebalance", "status", "rebalance-99").is_refused(1, "there is no such operation")
    assert cluster.call("rebalance", "plan", "--topic", "nobody").is_refused(1, "nobody")
    assert cluster.call("ledgers", "verify", 999).is_refused(1, "there is no closed ledger of this id")


def test_what_an_operation_left_out_is_said_with_the_reasons_and_the_next_step() -> None:
    at = datetime(2026, 1, 1, tzinfo=UTC)
    move = RebalanceMove(7, "a", "b", 10, "SKIPPED", "it was trimmed or deleted")
    found = RebalanceOperation(
        operation="rebalance-3", goal="bytes", state="DONE", throttle=1, percent=100.0, moves=4, moves_done=2,
        moves_skipped=2, bytes=40, bytes_done=20, bytes_skipped=20, bytes_remaining=0, rate=5, eta_s=None, problems=(),
        revision=1, rollback_of="", created=at, updated=at, ended=at, skipped=(move, move),
    )  # fmt: skip
    assert left_out(found) == (
        "rebalance-3 left out 2 of 4 segments (it was trimmed or deleted): "
        "plan again with `magnetar rebalance plan --goal bytes`"
    )
    assert left_out(replace(found, moves_skipped=0)) == ""
    shown = _as_json(found)
    assert shown["skipped"][0] == {
        "ledger": 7, "from": "a", "to": "b", "bytes": 10, "reason": "it was trimmed or deleted",
    }  # fmt: skip
    assert (shown["rate_bytes_per_s"], "rate" in shown) == (5, False)
    assert _as_json(replace(found, goal="brokers"))["rate_shards_per_s"] == 5
