"""Every verb as a user types it, against one real standalone."""

from __future__ import annotations

import fcntl
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

START_TIMEOUT_S = 40.0


@pytest.fixture(scope="module")
def cluster(magnetar: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """The command with MAGNETAR_SERVER set to a standalone of three bookies."""
    folder = tmp_path_factory.mktemp("standalone")
    server = magnetar.start(
        "standalone", "--data-dir", folder, "--port", 0, "--http-port", 0, "--bookies", 3, "--output", "json"
    )
    try:
        line = server.process.stdout.readline()
        assert line, server.end(None).err
        yield type(magnetar)(json.loads(line)["server"])
    finally:
        ended = server.end()
    assert (ended.code, ended.err) == (0, "")


def asked(cluster: Any, *arguments: object, code: int = 0, input: bytes = b"") -> Any:
    """The JSON that a command prints."""
    ran = cluster.call(*arguments, "--output", "json", input=input)
    assert ran.code == code, ran.err
    assert ran.out.count("\n") == 1
    return json.loads(ran.out)


def publish(cluster: Any, topic: str, *rows: str) -> None:
    data = "".join(row + "\n" for row in rows).encode()
    assert asked(cluster, "produce", topic, input=data)["messages"] == len(rows)


def consumed(cluster: Any, topic: str, *arguments: object, subscription: str = "s") -> list[str]:
    ran = cluster.call("consume", topic, "--subscription", subscription, "--from", "earliest", *arguments)
    assert ran.code == 0, ran.err
    return list(ran.out.splitlines())


# --- topics ---


def test_topics_are_created_listed_described_and_deleted(cluster: Any) -> None:
    created = asked(cluster, "topics", "create", "life/of/t1", "--shards", 3)
    assert created["topic"] == "life/of/t1"
    assert created["dry_run"] is False
    assert asked(cluster, "topics", "list", "life") == ["life/of/t1"]
    assert cluster.call("topics", "list", "life/of").out == "life/of/t1\n"

    description = asked(cluster, "topics", "describe", "life/of/t1")
    assert set(description) == {"topic", "epoch", "shards", "subscriptions"}
    assert [shard["slots"] for shard in description["shards"]] == [[0, 21844], [21845, 43689], [43690, 65535]]
    for shard in description["shards"]:
        assert set(shard) == {
            "shard", "slots", "state", "parents", "owner", "start_offset", "end_offset", "segments",
        }  # fmt: skip
        assert (shard["state"], shard["parents"], shard["start_offset"], shard["end_offset"]) == ("OPEN", [], 0, 0)
        assert shard["owner"] in (None, "broker0")
    table = cluster.call("topics", "describe", "life/of/t1").out
    assert "0000-5554" in table
    assert "OPEN" in table

    deleted = asked(cluster, "topics", "delete", "life/of/t1")
    assert deleted == {"topic": "life/of/t1", "shards": 3, "messages": 0, "bytes": 0, "dry_run": False}
    assert asked(cluster, "topics", "list", "life") == []
    assert cluster.call("topics", "describe", "life/of/t1").is_refused(1, "life/of/t1")


def test_segments_are_described_where_messages_stand(cluster: Any) -> None:
    publish(cluster, "segments", "a", "b", "c")
    shard = asked(cluster, "topics", "describe", "segments")["shards"][0]
    assert (shard["owner"], shard["end_offset"]) == ("broker0", 3)
    segment = shard["segments"][-1]
    assert set(segment) == {"ledger", "first_offset", "messages", "bytes", "state", "ensemble"}
    assert segment["state"] == "OPEN"
    assert sorted(segment["ensemble"]) == ["bookie0", "bookie1", "bookie2"]
    assert "bookie0" in cluster.call("topics", "describe", "segments", "--segments").out


def test_a_dry_run_changes_nothing(cluster: Any) -> None:
    publish(cluster, "dry/run/kept", "a", "b")
    assert consumed(cluster, "dry/run/kept", "--count", 1) == ["a"]
    before = asked(cluster, "subscriptions", "describe", "dry/run/kept", "s")["shards"]

    assert asked(cluster, "topics", "create", "dry/run/new", "--shards", 2, "--dry-run")["dry_run"] is True
    deleted = asked(cluster, "topics", "delete", "dry/run/kept", "--dry-run")
    assert (deleted["shards"], deleted["dry_run"]) == (1, True)
    assert asked(cluster, "produce", "dry/run/new", "--dry-run", input=b"a\nb\n")["messages"] == 2
    sought = asked(cluster, "subscriptions", "seek", "dry/run/kept", "s", "--to", "earliest", "--dry-run")
    assert [cursor["floor"] for cursor in sought["shards"]] == [0]
    assert asked(cluster, "subscriptions", "delete", "dry/run/kept", "s", "--dry-run")["backlog_messages"] == 1
    assert consumed(cluster, "dry/run/kept", "--no-wait", "--dry-run") == ["b"]
    assert consumed(cluster, "dry/run/kept", "--no-wait", "--dry-run", subscription="new") == ["a", "b"]
    nothing = cluster.call("consume", "dry/run/new", "--subscription", "s", "--no-wait", "--dry-run")
    assert nothing.is_refused(1, "dry/run/new")
    assert asked(cluster, "bench", "publish", "--dry-run")["dry_run"] is True

    assert asked(cluster, "topics", "list", "dry") == ["dry/run/kept"]
    assert asked(cluster, "topics", "describe", "dry/run/kept")["subscriptions"] == ["s"]
    assert asked(cluster, "subscriptions", "describe", "dry/run/kept", "s")["shards"] == before


def test_what_is_there_or_not_there_is_an_error_of_one_line(cluster: Any) -> None:
    publish(cluster, "there", "a")
    assert cluster.call("topics", "create", "there").is_refused(1, "there")
    assert cluster.call("topics", "create", "not a name").is_refused(2, "not a name")
    assert cluster.call("topics", "delete", "nowhere").is_refused(1, "nowhere")
    assert cluster.call("subscriptions", "list", "nowhere").is_refused(1, "nowhere")
    assert cluster.call("subscriptions", "describe", "there", "nobody").is_refused(1, "nobody")
    assert cluster.call("subscriptions", "seek", "there", "nobody", "--to", "latest").is_refused(1, "nobody")
    assert cluster.call("subscriptions", "delete", "there", "nobody").is_refused(1, "nobody")
    assert cluster.call("ledgers", "describe", 999999).is_refused(1, "999999")


# --- produce and consume ---


def test_lines_come_back_in_order_and_only_once(cluster: Any) -> None:
    rows = [f"row {number}" for number in range(5000)]
    publish(cluster, "order", *rows)
    assert consumed(cluster, "order", "--no-wait") == rows
    assert consumed(cluster, "order", "--no-wait") == []
    publish(cluster, "order", "later")
    assert consumed(cluster, "order", "--no-wait") == ["later"]


def test_no_wait_prints_everything_of_a_queue_and_ends(cluster: Any) -> None:
    asked(cluster, "topics", "create", "jobs", "--shards", 4)
    rows = [f"job {number}" for number in range(20_000)]
    data = "id\n" + "\n".join(rows)
    asked(cluster, "produce", "jobs", "--format", "csv", "--key-column", "id", "--count", 20_000, input=data.encode())
    assert sorted(consumed(cluster, "jobs", "--type", "queue", "--no-wait")) == sorted(rows)
    assert consumed(cluster, "jobs", "--type", "queue", "--no-wait") == []
    assert (
        consumed(
            cluster,
            "jobs",
            "--type",
            "queue",
            "--no-wait",
            subscription="other",
        )
        != []
    )


def test_messages_that_another_queue_consumer_holds_do_not_keep_no_wait(cluster: Any) -> None:
    publish(cluster, "held", *"abc")
    assert consumed(cluster, "held", "--type", "queue", "--count", 1) == ["a"]
    program = (
        "import asyncio, sys; from magnetar.client import connect\n"
        "async def main():\n"
        "    async with connect(sys.argv[1]) as client, client.queue_consumer('held', subscription='s') as queue:\n"
        "        await queue.receive(); await queue.receive(); print('held', flush=True)\n"
        "        await asyncio.to_thread(sys.stdin.read)\n"
        "asyncio.run(main())"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", program, cluster.environment["MAGNETAR_SERVER"]],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        publish(cluster, "held", "d")
        ran = cluster.run("consume", "held", "--subscription", "s", "--type", "queue", "--no-wait")
        assert ran.code == 0, ran.err
        assert set(ran.out.split()) <= {"d"}
        assert "other consumers have them" in ran.err
    finally:
        holder.communicate(b"", timeout=START_TIMEOUT_S)
    assert sorted(consumed(cluster, "held", "--type", "queue", "--no-wait")) in (["b", "c"], ["b", "c", "d"])


def test_json_has_keys_texts_and_bytes(cluster: Any) -> None:
    asked(
        cluster, "produce", "shapes", "--format", "jsonl", "--key-column", "k",
        input=b'{"k": "\xc3\xa4", "v": 1}\n{"v": 2}\n',
    )  # fmt: skip
    publish_bytes = cluster.call("produce", "shapes", input=b"\xff\x00\n")
    assert publish_bytes.code == 0
    messages = [json.loads(line) for line in consumed(cluster, "shapes", "--count", 3, "--output", "json")]
    assert [set(message) for message in messages] == [
        {"id", "key", payload, "properties", "event_time", "publish_time", "redelivery_count"}
        for payload in ("payload", "payload", "payload_base64")
    ]
    assert [message["key"] for message in messages] == ["ä", None, None]
    assert messages[0]["payload"] == '{"k": "ä", "v": 1}'
    assert messages[2]["payload_base64"] == "/wA="
    assert datetime.fromisoformat(messages[0]["publish_time"]).tzinfo is not None
    assert (messages[0]["properties"], messages[0]["event_time"], messages[0]["redelivery_count"]) == ({}, None, 0)


def test_consume_begins_where_it_is_told(cluster: Any) -> None:
    publish(cluster, "begin", "early")
    between = datetime.now(UTC).isoformat()
    publish(cluster, "begin", "late")
    ran = cluster.call("consume", "begin", "--subscription", "t", "--from", between, "--no-wait")
    assert ran.out == "late\n"
    assert cluster.call("consume", "begin", "--subscription", "l", "--no-wait").out == ""


def test_lines_are_sent_as_they_come(cluster: Any) -> None:
    publish(cluster, "typed", "first")
    assert consumed(cluster, "typed", "--no-wait") == ["first"]
    reading = cluster.start("consume", "typed", "--subscription", "s")
    typing = cluster.start("produce", "typed", "--compression", "zstd")
    for word in (b"one\n", b"two\n"):
        typing.process.stdin.write(word)
        typing.process.stdin.flush()
        assert reading.process.stdout.readline() == word
    stopped = typing.end()
    assert stopped.code == 130
    # The last one may have been read before its answer came here.
    assert re.fullmatch(
        r"magnetar: stopped early: (1 message is|2 messages are) stored, what came after may or may not be\n",
        stopped.err,
    )
    stopped = reading.end()
    assert (stopped.code, stopped.err) == (130, "")
    # What was printed is acknowledged, also when it was Ctrl-C that ended it.
    assert consumed(cluster, "typed", "--no-wait") == []


def test_a_reader_of_stdout_that_has_enough_ends_the_command_quietly(cluster: Any) -> None:
    publish(cluster, "enough", *(str(number) for number in range(100_000)))
    reading = cluster.start("consume", "enough", "--subscription", "s", "--from", "earliest")
    assert reading.process.stdout.readline() == b"0\n"
    reading.process.stdout.close()
    code = reading.process.wait(START_TIMEOUT_S)
    assert (code, reading.process.stderr.read()) == (0, b"")
    reading.process.stderr.close()
    # What could not be written is not acknowledged.
    assert asked(cluster, "subscriptions", "describe", "enough", "s")["backlog_messages"] > 0
    # Nothing more to write, and still it is noticed that nobody reads.
    idle = cluster.start("consume", "enough", "--subscription", "idle")
    idle.process.stdout.close()
    assert idle.process.wait(START_TIMEOUT_S) == 0
    idle.process.stderr.close()


def test_a_subscription_of_the_other_type_is_refused(cluster: Any) -> None:
    publish(cluster, "typed-once", "a")
    assert consumed(cluster, "typed-once", "--no-wait") == ["a"]
    refused = cluster.call("consume", "typed-once", "--subscription", "s", "--type", "queue", "--no-wait")
    assert refused.is_refused(1, "s")


# --- subscriptions ---


def test_subscriptions_are_listed_described_moved_and_deleted(cluster: Any) -> None:
    publish(cluster, "subs", *"abcdef")
    assert consumed(cluster, "subs", "--count", 2) == ["a", "b"]
    [summary] = asked(cluster, "subscriptions", "list", "subs")
    assert summary == {"subscription": "s", "type": "stream", "backlog_messages": 4, "consumers": 0}

    description = asked(cluster, "subscriptions", "describe", "subs", "s")
    assert {
        "subscription", "type", "backlog_messages", "backlog_bytes", "oldest_age_s", "shards", "consumers",
        "waiting_for",
    } <= set(description)  # fmt: skip
    assert (description["type"], description["backlog_messages"], description["consumers"]) == ("stream", 4, [])
    assert description["oldest_age_s"] > 0
    assert description["waiting_for"]
    [cursor] = description["shards"]
    assert (cursor["floor"], cursor["end_offset"], cursor["acked_above_floor"]) == (2, 6, 0)
    table = cluster.call("subscriptions", "describe", "subs", "s").out
    assert "waiting for: " in table
    assert "4 messages" in table

    moved = asked(cluster, "subscriptions", "seek", "subs", "s", "--to", f"{cursor['shard']}:5")
    assert moved["shards"][0]["floor"] == 5
    assert consumed(cluster, "subs", "--no-wait") == ["f"]
    asked(cluster, "subscriptions", "seek", "subs", "s", "--to", "earliest")
    assert consumed(cluster, "subs", "--count", 1) == ["a"]
    asked(cluster, "subscriptions", "seek", "subs", "s", "--to", "latest")
    assert consumed(cluster, "subs", "--no-wait") == []

    deleted = asked(cluster, "subscriptions", "delete", "subs", "s")
    assert deleted == {"topic": "subs", "subscription": "s", "backlog_messages": 0, "dry_run": False}
    assert asked(cluster, "subscriptions", "list", "subs") == []


def test_a_subscription_that_is_read_shows_its_consumer(cluster: Any) -> None:
    reading = cluster.start("consume", "watched", "--subscription", "s", "--from", "earliest", "--type", "queue")
    publish(cluster, "watched", "a")
    assert reading.process.stdout.readline() == b"a\n"
    [consumer] = asked(cluster, "subscriptions", "describe", "watched", "s")["consumers"]
    assert consumer["consumer"]
    assert reading.end().code == 130


# --- ledgers, health, bench ---


def test_ledgers_are_listed_and_described(cluster: Any) -> None:
    publish(cluster, "below", "a")
    [ledger, *_] = [one for one in asked(cluster, "ledgers", "list", "below") if one["purpose"] == "DATA"]
    assert ledger["state"] in ("OPEN", "CLOSED")
    assert ledger["topic"] == "public/default/below"
    assert asked(cluster, "ledgers", "describe", ledger["ledger"])["ledger"] == ledger["ledger"]
    assert {"ledger", "shard", "topic", "purpose", "state", "epoch", "write_quorum", "ack_quorum", "fragments"} <= set(
        ledger
    )
    assert "quorum" in cluster.call("ledgers", "describe", ledger["ledger"]).out
    assert any(one["ledger"] == ledger["ledger"] for one in asked(cluster, "ledgers", "list"))


def test_a_cluster_that_is_well_is_healthy(cluster: Any) -> None:
    health = asked(cluster, "cluster", "health")
    assert health == {
        "healthy": True, "brokers": 1, "bookies": 3, "under_replicated_ledgers": 0, "unavailable_shards": 0,
        "problems": [], "notices": [],
    }  # fmt: skip
    assert cluster.call("cluster", "health").out.startswith("healthy                   yes\n")


def test_brokers_and_bookies_are_listed(cluster: Any) -> None:
    publish(cluster, "held", "a")
    [broker] = asked(cluster, "brokers", "list")
    assert (broker["id"], broker["address"]) == ("broker0", cluster.environment["MAGNETAR_SERVER"])
    assert broker["shards"] > 0
    bookies = asked(cluster, "bookies", "list")
    assert [one["id"] for one in bookies] == ["bookie0", "bookie1", "bookie2"]
    assert {"id", "address", "state", "rack", "ledgers", "bytes", "disk_free_bytes"} <= set(bookies[0])
    assert all(one["state"] == "WRITABLE" and one["ledgers"] > 0 for one in bookies)
    assert broker["state"] == "SERVING"
    assert cluster.call("brokers", "list").out.startswith("broker ")
    assert cluster.call("bookies", "list").out.startswith("bookie ")


def test_bench_publish_starts_a_cluster_of_processes_and_leaves_nothing(magnetar: Any, tmp_path: Path) -> None:
    left, used = (tmp_path / f"magnetar-bench-{name}" for name in ("killed", "used"))
    for folder in (left, used):
        (folder / "metadata").mkdir(parents=True)
    lock = os.open(used, os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)
    ran = magnetar.run(
        "bench", "publish", "--local", "1,1", "--seconds", 0.3, "--data-dir", tmp_path, "--output", "json"
    )
    assert (ran.code, ran.err) == (0, "")
    result = json.loads(ran.out)
    assert result["messages"] > 0
    assert result["settings"]["local"]
    assert result["frames_per_message"] > 0
    assert [one["role"] for one in result["processes"]] == ["metadata", "bookie0", "broker0", "client"]
    assert all(one["peak_rss_mb"] > 0 for one in result["processes"])
    assert list(tmp_path.iterdir()) == [used]
    os.close(lock)
    assert magnetar.run("bench", "publish", "--data-dir", "/proc/x").is_refused(1, "/proc/x", "another --data-dir")


def test_bench_of_a_cluster_of_its_own_never_goes_to_another(cluster: Any) -> None:
    """MAGNETAR_SERVER, which is set here, is meant for other commands."""
    both = cluster.run("bench", "publish", "--server", "localhost:1", "--local", "1,1", "--dry-run")
    assert both.is_refused(2, "--local", "--server")
    alone = cluster.run("bench", "publish", "--local", "1,1", "--dry-run", "--output", "json")
    assert json.loads(alone.out)["server"] is None


def test_a_server_that_takes_connections_and_says_nothing_is_given_up(magnetar: Any) -> None:
    import socket

    with socket.create_server(("127.0.0.1", 0)) as silent:
        begin = time.monotonic()
        ran = magnetar.run("topics", "list", "--server", f"127.0.0.1:{silent.getsockname()[1]}", "--timeout", "0.5")
        assert ran.is_refused(124, "127.0.0.1")
        assert time.monotonic() - begin < 10


@pytest.mark.parametrize(
    "words",
    [
        "bookies drain", "bookies undrain", "bookies decommission", "brokers drain", "brokers undrain",
        "rebalance status", "rebalance pause", "rebalance resume", "rebalance cancel", "rebalance rollback",
        "rebalance verify", "rebalance throttle 1MB/s",
    ],
)  # fmt: skip
def test_an_order_about_what_does_not_exist_is_an_error_that_says_where_to_look(cluster: Any, words: str) -> None:
    assert cluster.call(*words.split(), "nope").is_refused(1, "there is no such", "nope")


def test_a_broker_that_nobody_could_relieve_is_not_drained(cluster: Any) -> None:
    assert cluster.call("brokers", "drain", "broker0", "--wait").is_refused(1, "no other broker", "start one")
    assert cluster.call("brokers", "drain", "broker9", "--dry-run").is_refused(1, "no such broker", "broker0")
    assert asked(cluster, "brokers", "undrain", "broker0", "--dry-run") == {
        "broker": "broker0", "was_draining": False, "dry_run": True,
    }  # fmt: skip
