"""The roles as processes: what each says, what it refuses and with which words, and how it ends."""

from __future__ import annotations

import asyncio
import json
import os
import resource
import shutil
import signal
import socket
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from magnetar.cli.roles import workers
from magnetar.cli.roles.process import RoleRefused
from magnetar.cli.roles.workers import Worker, worker_assignments
from magnetar.metadata.etcd import EtcdMetadata
from magnetar.metadata.store import MetadataUnavailable, Put
from magnetar.node.settings import BrokerSettings

pytestmark = pytest.mark.timeout(180)
PATIENCE_S = 40.0


def options(*assignments: object) -> list[str]:
    """Settings of a role on free ports; later ones go before earlier ones."""
    return ["--output", "json", *(f"--set={one}" for one in ("listen=127.0.0.1:0", *assignments))]


class Roles:
    """Starts roles and reads their ready lines; whatever still runs is killed at the end."""

    def __init__(self, magnetar: Any) -> None:
        self._magnetar = magnetar
        self._started: list[Any] = []

    def start(self, role: str, *assignments: object, more: tuple[object, ...] = ()) -> tuple[Any, dict[str, Any]]:
        started = self._magnetar.start(role, *options(*assignments), *more)
        self._started.append(started)
        return started, self.line(started)

    def start_silently(self, role: str, *assignments: object) -> Any:
        started = self._magnetar.start(role, *options(*assignments))
        self._started.append(started)
        return started

    def line(self, started: Any) -> dict[str, Any]:
        line = started.process.stdout.readline()
        assert line, started.end(None).err
        return dict(json.loads(line))

    def refused(self, role: str, *assignments: object, words: tuple[str, ...], more: tuple[object, ...] = ()) -> bool:
        return bool(self._magnetar.run(role, *options(*assignments), *more).is_refused(1, *words))

    def end(self) -> None:
        for started in self._started:
            started.kill()
            for pipe in (started.process.stdin, started.process.stdout, started.process.stderr):
                pipe.close()


@pytest.fixture
def roles(magnetar: Any) -> Iterator[Roles]:
    roles = Roles(magnetar)
    yield roles
    roles.end()


@pytest.fixture(scope="module")
def metadata(magnetar: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """The ready line of a metadata server, and `url`: how others find it."""
    roles = Roles(magnetar)
    try:
        _, line = roles.start("metadata", f"data_dir={tmp_path_factory.mktemp('metadata')}")
        yield {**line, "url": f"metadata=etcd://{line['address']}"}
    finally:
        roles.end()


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline, "it did not come about"
        time.sleep(0.05)


# --- settings ---


def test_every_setting_is_shown_with_where_it_came_from(magnetar: Any, tmp_path: Path) -> None:
    file = tmp_path / "bookie.toml"
    file.write_text('id = "b7"\n')
    shown = magnetar.call("bookie", "--config", file, "--print-config", *options("data_dir=/data"))
    assert (shown.code, shown.err) == (0, "")
    parsed = json.loads(shown.out)
    assert parsed["role"] == "bookie"
    assert parsed["settings"]["id"] == {"value": "b7", "source": str(file)}
    assert parsed["settings"]["data_dir"] == {"value": "/data", "source": "--set"}
    assert parsed["settings"]["lease_s"] == {"value": 5.0, "source": "default"}
    table = magnetar.call("broker", "--set", "id=b", "--print-config").out.splitlines()
    assert table[0].split() == ["setting", "value", "from"]
    assert ["id", "b", "--set"] in [line.split() for line in table]


def test_the_environment_of_a_role_is_read_and_its_unknown_keys_refused(
    magnetar: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(magnetar.environment, "MAGNETAR_BROKER__ID", "from-environment")
    shown = json.loads(magnetar.call("broker", "--print-config", "--output", "json").out)["settings"]
    assert shown["id"] == {"value": "from-environment", "source": "MAGNETAR_BROKER__ID"}
    monkeypatch.setitem(magnetar.environment, "MAGNETAR_BROKER__SEGMENT_BYTE", "1")
    refused = magnetar.call("broker", "--print-config")
    assert refused.is_refused(2, "MAGNETAR_BROKER__SEGMENT_BYTE", "did you mean segment_bytes?")


# --- the metadata store ---


def test_a_metadata_store_that_is_not_there_is_named_after_a_bounded_wait(roles: Roles, refusing_address: str) -> None:
    words = (
        refusing_address,
        "nothing listens there",
        "does not answer",
        "magnetar metadata",
        "--set metadata=etcd://HOST:PORT",
    )
    url = f"metadata=etcd://{refusing_address}"
    assert roles.refused("broker", "id=b", url, "metadata_wait_s=1", words=words)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        words = (address, refusing_address, "does not answer")
        urls = f"metadata=etcd://{address},{refusing_address}"
        assert roles.refused("bookie", "id=b", "data_dir=/never/made", urls, "metadata_wait_s=1", words=words)
    assert not Path("/never").exists()


def test_a_role_that_waits_for_its_metadata_store_can_be_stopped(roles: Roles, refusing_address: str) -> None:
    waiting = roles.start_silently("broker", "id=b", f"metadata=etcd://{refusing_address}", "http_listen=127.0.0.1:0")
    # It reads the signals from then on that it looks for the store.
    until(lambda: os.path.exists(f"/proc/{waiting.process.pid}/task") and catches(waiting.process.pid, signal.SIGTERM))
    ended = waiting.end(signal.SIGTERM)
    assert (ended.code, ended.out) == (0, "")


def catches(pid: int, number: signal.Signals) -> bool:
    status = Path(f"/proc/{pid}/status").read_text()
    caught = next(line for line in status.splitlines() if line.startswith("SigCgt:"))
    return bool(int(caught.split()[1], 16) & 1 << (number - 1))


def test_what_answers_but_is_no_metadata_store_is_named(roles: Roles, metadata: dict[str, Any], tmp_path: Path) -> None:
    # The HTTP of a role, and the gRPC of a bookie.
    _, bookie = roles.start("bookie", "id=foreign", f"data_dir={tmp_path}", metadata["url"])
    for address in (metadata["http"], bookie["address"]):
        words = (address, "is no metadata store", "not an etcd", "--set metadata=etcd://HOST:PORT")
        assert roles.refused("broker", "id=b", f"metadata=etcd://{address}", words=words)


def test_a_store_of_another_cluster_is_refused_unless_a_new_one_is_wanted(
    roles: Roles, metadata: dict[str, Any], tmp_path: Path
) -> None:
    first, _ = roles.start("bookie", "id=joins", f"data_dir={tmp_path / 'joins'}", metadata["url"])
    assert first.end(signal.SIGTERM).code == 0
    words = ("holds another cluster", "--set cluster=magnetar", "--set new_cluster=true")
    assert roles.refused("broker", "id=b", "cluster=magentar", metadata["url"], words=words)
    _, line = roles.start(
        "bookie", "id=joins", "cluster=second", "new_cluster=true", f"data_dir={tmp_path / 'second'}", metadata["url"]
    )
    assert line["cluster"] == "second"
    # Now it is there, and is joined without being told twice; a directory stays with its own cluster.
    words = ("data directory", "another cluster", "belong together")
    arguments = ("id=other", "cluster=second", f"data_dir={tmp_path / 'joins'}", metadata["url"])
    assert roles.refused("bookie", *arguments, words=words)


# --- ids, directories, ports ---


def test_a_second_broker_of_one_id_waits_one_lease_and_is_refused(roles: Roles, metadata: dict[str, Any]) -> None:
    first, line = roles.start("broker", "id=twin", "lease_s=1", metadata["url"])
    second = roles.start_silently("broker", "id=twin", "lease_s=1", metadata["url"])
    waits = json.loads(second.process.stderr.readline())
    assert "the id is registered: waiting for that session to end" in waits["event"]
    assert (waits["key"], waits["wait_s"]) == ("/magnetar/magnetar/brokers/twin", 3.1)
    words = ("id is in use by a living process", "stop it or choose another id", "twin")
    assert second.end(None).is_refused(1, *words)
    assert json.loads(fetch(line["http"], "readyz")[1]) == {"ok": True, "problems": []}
    assert first.end(signal.SIGTERM).code == 0
    # One that was killed leaves its id after its lease.
    killed, _ = roles.start("broker", "id=twin", "lease_s=1", metadata["url"])
    killed.kill()
    roles.start("broker", "id=twin", "lease_s=1", metadata["url"])


def test_a_bookie_is_one_process_with_its_own_directory(roles: Roles, metadata: dict[str, Any], tmp_path: Path) -> None:
    own = f"data_dir={tmp_path / 'own'}"
    first, _ = roles.start("bookie", "id=one", own, metadata["url"])
    assert roles.refused("bookie", "id=one", own, metadata["url"], words=("another process uses", "own"))
    words = ("is empty", "`one` has another one", "take another id", "--repair-bookie one")
    assert roles.refused("bookie", "id=one", f"data_dir={tmp_path / 'new'}", metadata["url"], words=words)
    assert first.end(signal.SIGTERM).code == 0
    words = ("belongs to bookie `one`", "use its own directory")
    assert roles.refused("bookie", "id=two", own, metadata["url"], words=words)


def test_a_bookie_whose_disk_was_lost_starts_empty_when_it_is_told_to(
    roles: Roles, metadata: dict[str, Any], tmp_path: Path
) -> None:
    settings = ("id=lost", f"data_dir={tmp_path / 'lost'}", metadata["url"])
    first, _ = roles.start("bookie", *settings)
    assert first.end(signal.SIGTERM).code == 0
    shutil.rmtree(tmp_path / "lost")
    assert roles.refused("bookie", *settings, words=("disk was lost", "--repair-bookie lost"))
    words = ("another bookie", "its own id")
    assert roles.refused("bookie", *settings, words=words, more=("--repair-bookie", "b"))
    unknown = ("id=never", f"data_dir={tmp_path / 'lost'}", metadata["url"])
    assert roles.refused("bookie", *unknown, words=("no bookie never",), more=("--repair-bookie", "never"))
    roles.start("bookie", *settings, more=("--repair-bookie", "lost"))


def test_a_directory_that_cannot_be_used_is_named(roles: Roles, metadata: dict[str, Any], tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("not a directory")
    for folder in (file, Path("/proc/magnetar")):
        words = (str(folder), "data directory", "choose another")
        assert roles.refused("bookie", "id=unwritable", f"data_dir={folder}", metadata["url"], words=words)
        assert roles.refused("metadata", f"data_dir={folder}", words=words)


def test_a_port_in_use_is_named(roles: Roles, metadata: dict[str, Any], tmp_path: Path) -> None:
    data_dir = f"data_dir={tmp_path}"
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        ports = (f"listen={address}", "http_listen=127.0.0.1:0")
        words = (address, "cannot listen", "choose another")
        assert roles.refused("metadata", f"data_dir={tmp_path / 'unmade'}", *ports, words=words)
        assert not (tmp_path / "unmade").exists()
        assert roles.refused("broker", "id=b", metadata["url"], *ports, words=words)
        assert roles.refused("bookie", "id=b", data_dir, metadata["url"], *ports, words=words)
        assert roles.refused("broker", "id=b", metadata["url"], f"http_listen={address}", words=words)


def test_listening_for_other_hosts_needs_an_address_for_them_and_is_warned_of(
    roles: Roles, metadata: dict[str, Any]
) -> None:
    everywhere = ("id=open", "listen=0.0.0.0:0", metadata["url"])
    words = ("every interface", "--set advertised_address=HOST:PORT")
    assert roles.refused("broker", *everywhere, words=words)
    broker, line = roles.start("broker", *everywhere, "advertised_address=host7.example:7650")
    assert line["address"] == "host7.example:7650"
    ended = broker.end(signal.SIGTERM)
    assert ended.code == 0
    assert ended.err.count("\n") == 1
    assert "warning: listening on 0.0.0.0:0" in ended.err
    assert "without security" in ended.err


# --- stopping ---


def fetch(address: str, path: str) -> tuple[int, bytes]:
    try:
        with urllib.request.urlopen(f"http://{address}/{path}", timeout=20) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        return error.code, error.read()


def test_a_second_signal_ends_a_role_that_still_stops(roles: Roles, tmp_path: Path) -> None:
    store, line = roles.start("metadata", f"data_dir={tmp_path}")
    broker, served = roles.start("broker", "id=b", f"metadata=etcd://{line['address']}")
    # It cannot give its session back: nobody answers.
    store.process.send_signal(signal.SIGSTOP)
    broker.process.send_signal(signal.SIGTERM)
    until(lambda: fetch(served["http"], "readyz")[0] == 503)
    assert broker.end(signal.SIGTERM).code == -signal.SIGTERM
    store.process.send_signal(signal.SIGCONT)


def test_a_metadata_server_whose_database_failed_ends_so_that_it_is_started_again(roles: Roles, tmp_path: Path) -> None:
    store, line = roles.start("metadata", f"data_dir={tmp_path}")

    async def write() -> None:
        async with await EtcdMetadata.open(f"etcd://{line['address']}") as metadata:
            await metadata.txn([], [Put("/magnetar/k", b"v")])

    asyncio.run(write())
    # Its disk takes nothing more.
    resource.prlimit(store.process.pid, resource.RLIMIT_FSIZE, (0, 0))
    with pytest.raises(MetadataUnavailable):
        asyncio.run(write())
    ended = store.end(None)
    assert ended.code == 1
    assert ended.err.splitlines()[-1].startswith("magnetar: the metadata database failed and must be opened again: ")
    store, line = roles.start("metadata", f"data_dir={tmp_path}")
    asyncio.run(write())


# --- workers ---


def test_workers_are_brokers_that_start_again_and_stop_together(roles: Roles, metadata: dict[str, Any]) -> None:
    supervisor, line = roles.start("broker", "id=w", "lease_s=1", metadata["url"], more=("--workers", 2))
    lines = {one["id"]: one for one in (line, roles.line(supervisor))}
    assert set(lines) == {"w-0", "w-1"}
    assert all(json.loads(fetch(one["http"], "readyz")[1])["ok"] for one in lines.values())
    children = children_of(supervisor.process.pid)
    os.kill(children[0], signal.SIGKILL)
    again = roles.line(supervisor)
    assert again["id"] in lines
    assert again["address"] != lines[again["id"]]["address"]
    children = children_of(supervisor.process.pid)
    assert len(children) == 2
    ended = supervisor.end(signal.SIGTERM)
    assert (ended.code, ended.out) == (0, "")
    assert "worker ended and is started again" in ended.err
    assert not any(Path(f"/proc/{pid}").exists() for pid in children)


def test_workers_end_with_a_supervisor_that_is_killed(roles: Roles, metadata: dict[str, Any]) -> None:
    supervisor, _ = roles.start("broker", "id=orphan", metadata["url"], more=("--workers", 1))
    [child] = children_of(supervisor.process.pid)
    supervisor.process.kill()
    until(lambda: not Path(f"/proc/{child}").exists() or is_zombie(child))


def test_workers_that_cannot_start_end_all_with_one_line(magnetar: Any, metadata: dict[str, Any]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        ports = ("listen=127.0.0.1:0", f"http_listen=127.0.0.1:{taken.getsockname()[1]}", metadata["url"])
        one = magnetar.run("broker", *options("id=x", *ports), "--workers", 1)
        assert one.is_refused(1, "worker x-0 did not start: cannot listen on 127.0.0.1:")
    silent = ("listen=127.0.0.1:0", "metadata=etcd://127.0.0.1:1", "metadata_wait_s=1")
    both = magnetar.run("broker", *options("id=x", *silent), "--workers", 2)
    assert both.is_refused(1, "did not start: the metadata store does not answer")


def children_of(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def is_zombie(pid: int) -> bool:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"


def test_workers_stand_two_ports_apart() -> None:
    settings = BrokerSettings(id="b", listen="127.0.0.1:7650", advertised_address="host7:17650")
    assert worker_assignments(settings, 0) == ["id=b-0", "listen=127.0.0.1:7650", "advertised_address=host7:17650"]
    assert worker_assignments(settings, 2) == ["id=b-2", "listen=127.0.0.1:7654", "advertised_address=host7:17654"]
    settings = BrokerSettings(id="b", listen="127.0.0.1:0", http_listen="127.0.0.1:9000")
    assert worker_assignments(settings, 1) == ["id=b-1", "listen=127.0.0.1:0", "http_listen=127.0.0.1:9002"]
    with pytest.raises(RoleRefused, match="choose a lower one or fewer workers"):
        worker_assignments(BrokerSettings(id="b", listen="127.0.0.1:65530"), 3)


async def test_a_worker_that_keeps_ending_is_given_up(monkeypatch: pytest.MonkeyPatch, capfd: Any) -> None:
    monkeypatch.setattr(workers, "PAUSE_FIRST_S", 0.0)
    worker = Worker("b-0", [sys.executable, "-S", "-c", "print('served'); raise SystemExit(7)"])
    async with asyncio.timeout(PATIENCE_S):
        with pytest.raises(RoleRefused, match=f"ended {workers.RESTARTS_MAX + 1} times .* exit_code=`7`"):
            await worker.run()
    assert capfd.readouterr().out.splitlines().count("served") == workers.RESTARTS_MAX + 1
