"""Real `etcdctl` on our server, and again after the server was killed and started again."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Iterator
from typing import Any

import pytest


class Watching:
    """`etcdctl watch` in the background, line by line."""

    def __init__(self, etcdctl: Any, *arguments: str) -> None:
        command = etcdctl.command("watch", *arguments)
        self.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=etcdctl.environment
        )

    def lines(self, count: int) -> list[str]:
        assert self.process.stdout is not None
        return [self.process.stdout.readline().rstrip("\n") for _ in range(count)]

    def end(self) -> str:
        self.process.kill()
        return self.process.communicate()[1]


@pytest.fixture
def watching() -> Iterator[list[Watching]]:
    started: list[Watching] = []
    yield started
    for watch in started:
        watch.end()


def test_keys_are_put_read_and_deleted(etcdctl: Any) -> None:
    assert etcdctl("put", "a", "1") == "OK\n"
    assert etcdctl("put", "a", "2", "--prev-kv") == "OK\na\n1\n"
    etcdctl("put", "ab", "3")
    etcdctl("put", "b", "4")
    assert etcdctl("get", "a") == "a\n2\n"
    assert etcdctl("get", "--prefix", "a") == "a\n2\nab\n3\n"
    assert etcdctl("get", "a", "b", "--order", "DESCEND", "--sort-by", "KEY") == "ab\n3\na\n2\n"
    assert etcdctl("get", "--prefix", "", "--keys-only", "--limit", "2").split() == ["a", "ab"]
    assert etcdctl("get", "--from-key", "ab") == "ab\n3\nb\n4\n"
    assert etcdctl("get", "--prefix", "a", "--count-only", "-w", "fields").count('"Count" : 2') == 1
    assert etcdctl("get", "a", "--rev", "2") == "a\n1\n"
    assert etcdctl("del", "--prefix", "a", "--prev-kv") == "2\na\n2\nab\n3\n"
    assert etcdctl("get", "--prefix", "") == "b\n4\n"
    assert etcdctl("get", "--prefix", "", "--rev", "4") == "a\n2\nab\n3\n"


def test_a_key_tells_its_revisions_version_and_lease(etcdctl: Any) -> None:
    lease = granted(etcdctl, 60)
    etcdctl("put", "a", "1")
    etcdctl("put", "a", "2", f"--lease={lease}")
    answer = json.loads(etcdctl("get", "a", "-w", "json"))
    (found,) = answer["kvs"]
    assert (found["create_revision"], found["mod_revision"], found["version"]) == (2, 3, 2)
    assert (answer["header"]["revision"], answer["count"]) == (3, 1)
    assert found["lease"] == int(lease, 16)


def test_a_transaction_takes_the_branch_that_its_compares_say(etcdctl: Any) -> None:
    etcdctl("put", "a", "1")
    script = 'value("a") = "1"\nmod("a") > "1"\n\nput b 2\nget a\n\nput b 3\n\n'
    assert "SUCCESS\n\nOK\n\na\n1\n" in etcdctl("txn", "-i", stdin=script)
    assert "FAILURE\n\nOK\n" in etcdctl("txn", "-i", stdin=script.replace('= "1"', '= "0"'))
    assert etcdctl("get", "b") == "b\n3\n"


def test_a_watch_tells_past_and_present(etcdctl: Any, watching: list[Watching]) -> None:
    etcdctl("put", "a", "1")
    etcdctl("put", "b", "x")
    etcdctl("put", "a", "2")
    watching.append(watch := Watching(etcdctl, "--prefix", "a", "--prev-kv", "--rev", "2"))
    assert watch.lines(8) == ["PUT", "a", "1", "PUT", "a", "1", "a", "2"]
    etcdctl("put", "ab", "new")
    assert watch.lines(3) == ["PUT", "ab", "new"]
    etcdctl("del", "ab")
    assert watch.lines(5) == ["DELETE", "ab", "new", "ab", ""]


def granted(etcdctl: Any, ttl_s: int) -> str:
    match = re.fullmatch(rf"lease ([0-9a-f]+) granted with TTL\({ttl_s}s\)\n", etcdctl("lease", "grant", str(ttl_s)))
    assert match is not None
    return match[1]


def test_a_lease_is_granted_kept_told_and_revoked(etcdctl: Any) -> None:
    lease = granted(etcdctl, 60)
    etcdctl("put", "a", "1", f"--lease={lease}")
    assert etcdctl("lease", "keep-alive", "--once", lease) == f"lease {lease} keepalived with TTL(60)\n"
    assert re.fullmatch(
        rf"lease {lease} granted with TTL\(60s\), remaining\(\d\ds\), attached keys\(\[a\]\)\n",
        etcdctl("lease", "timetolive", lease, "--keys"),
    )
    assert etcdctl("lease", "list") == f"found 1 leases\n{lease}\n"
    assert etcdctl("lease", "revoke", lease) == f"lease {lease} revoked\n"
    assert etcdctl("get", "a") == ""
    assert etcdctl("lease", "timetolive", lease) == f"lease {lease} already expired\n"
    assert "requested lease not found" in etcdctl.run("lease", "revoke", lease).stderr
    assert "requested lease not found" in etcdctl.run("put", "a", "1", f"--lease={lease}").stderr


def test_a_compaction_ends_reads_and_watches_of_what_was_before(etcdctl: Any) -> None:
    for value in "123":
        etcdctl("put", "a", value)
    assert etcdctl("compact", "3", "--physical") == "compacted revision 3\n"
    assert etcdctl("get", "a", "--rev", "3") == "a\n2\n"
    assert "required revision has been compacted" in etcdctl.run("get", "a", "--rev", "2").stderr
    assert "required revision has been compacted" in etcdctl.run("compact", "3").stderr
    assert "required revision is a future revision" in etcdctl.run("compact", "9").stderr
    assert "required revision has been compacted" in etcdctl.run("watch", "a", "--rev", "2").stderr


def test_the_endpoint_tells_its_status_and_health(etcdctl: Any) -> None:
    (status,) = json.loads(etcdctl("endpoint", "status", "-w", "json"))
    assert status["Status"]["leader"] == status["Status"]["header"]["member_id"] != 0
    assert status["Status"]["dbSize"] > 0
    health = etcdctl.run("endpoint", "health")
    assert "is healthy" in health.stdout + health.stderr
    assert etcdctl("alarm", "list") == ""
    (member,) = json.loads(etcdctl("member", "list", "-w", "json"))["members"]
    assert member["clientURLs"][0].startswith("http://127.0.0.1:")
    assert "true" in etcdctl("endpoint", "status", "--cluster")


def test_what_is_not_served_says_so(etcdctl: Any) -> None:
    assert "Unimplemented" in etcdctl.run("user", "list").stderr


def test_data_revisions_and_leases_are_there_after_a_kill(etcdctl: Any, process: Any, watching: list[Watching]) -> None:
    lease = granted(etcdctl, 60)
    etcdctl("put", "leased", "x", f"--lease={lease}")
    for value in "12":
        etcdctl("put", "a", value)
    etcdctl("compact", "3")
    watching.append(watch := Watching(etcdctl, "--prefix", "a", "--rev", "4"))
    assert watch.lines(3) == ["PUT", "a", "2"]
    before = json.loads(etcdctl("get", "--prefix", "", "-w", "json"))
    process.kill()
    process.start()
    after = json.loads(etcdctl("get", "--prefix", "", "-w", "json"))
    assert after["kvs"] == before["kvs"]
    assert after["header"].pop("raft_term") > before["header"].pop("raft_term")
    assert after["header"] == before["header"]
    assert etcdctl("get", "a", "--rev", "3") == "a\n1\n"
    assert "has been compacted" in etcdctl.run("get", "a", "--rev", "2").stderr
    assert "attached keys([leased])" in etcdctl("lease", "timetolive", lease, "--keys")
    assert etcdctl("lease", "keep-alive", "--once", lease) == f"lease {lease} keepalived with TTL(60)\n"
    etcdctl("put", "a", "3")
    assert watch.lines(3) == ["PUT", "a", "3"], "the client's watch goes on where it was"
    etcdctl("lease", "revoke", lease)
    assert etcdctl("get", "--prefix", "", "--keys-only").split() == ["a"]
