"""`magnetar standalone`: what it refuses and how it ends. Real processes, ended by their ids."""

from __future__ import annotations

import json
import resource
import shutil
import signal
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from magnetar.bookie.metrics import BookieMetrics
from magnetar.broker.metrics import BrokerMetrics
from magnetar.cli.roles.standalone import StandaloneRefused, bookie_count
from magnetar.ledger.metrics import LedgerMetrics
from magnetar.repair.metrics import RepairMetrics

Start = Callable[..., tuple[Any, dict[str, Any]]]


@pytest.fixture
def start(magnetar: Any) -> Iterator[Start]:
    """Starts a standalone on free ports; returns it and what it printed. Whatever still runs is killed at the end."""
    servers = []

    def start_one(folder: Path, *options: object) -> tuple[Any, dict[str, Any]]:
        server = magnetar.start(*ARGUMENTS, "--data-dir", folder, *options)
        servers.append(server)
        line = server.process.stdout.readline()
        assert line, server.end(None).err
        return server, json.loads(line)

    yield start_one
    for server in servers:
        server.kill()
        for pipe in (server.process.stdin, server.process.stdout, server.process.stderr):
            pipe.close()


ARGUMENTS = ("standalone", "--port", 0, "--http-port", 0, "--output", "json")


def refused(magnetar: Any, folder: Path | str, *words: str, options: tuple[object, ...] = ()) -> bool:
    return bool(magnetar.run(*ARGUMENTS, "--data-dir", folder, *options).is_refused(1, *words))


def send(magnetar: Any, where: dict[str, Any], rows: bytes) -> None:
    ran = magnetar.call("produce", "t", "--server", where["server"], input=rows)
    assert ran.code == 0, ran.err


def read(magnetar: Any, where: dict[str, Any], *options: str) -> str:
    ran = magnetar.call(
        "consume", "t", "--subscription", "s", "--from", "earliest", "--server", where["server"], *options
    )
    assert ran.code == 0, ran.err
    return str(ran.out)


@pytest.mark.parametrize("sign", [signal.SIGINT, signal.SIGTERM])
def test_it_stops_cleanly_and_the_data_stays(magnetar: Any, start: Start, tmp_path: Path, sign: int) -> None:
    server, where = start(tmp_path, "--bookies", 3)
    assert set(where) == {"server", "http", "data_dir", "bookies"}
    assert (where["bookies"], where["data_dir"]) == (3, str(tmp_path))
    send(magnetar, where, b"a\nb\n")
    assert read(magnetar, where, "--count", "1") == "a\n"
    ended = server.end(sign)
    assert (ended.code, ended.out, ended.err) == (0, "", "")
    # As many bookies as the directory holds.
    server, where = start(tmp_path)
    assert where["bookies"] == 3
    assert read(magnetar, where, "--no-wait") == "b\n"


def test_what_was_acknowledged_survives_a_sigkill(magnetar: Any, start: Start, tmp_path: Path) -> None:
    server, where = start(tmp_path, "--bookies", 3)
    rows = "".join(f"row {number}\n" for number in range(3000))
    send(magnetar, where, rows.encode())
    assert read(magnetar, where, "--count", "1000") == "".join(f"row {number}\n" for number in range(1000))
    server.kill()
    server, where = start(tmp_path)
    assert read(magnetar, where, "--no-wait") == "".join(f"row {number}\n" for number in range(1000, 3000))


def families_of_all_roles_but_metadata() -> list[str]:
    registry = CollectorRegistry()
    BookieMetrics(registry, "bookie0")
    BrokerMetrics(registry)
    LedgerMetrics.of(registry)
    RepairMetrics.of(registry)
    return [family.name + "_total" * (family.type == "counter") for family in registry.collect()]


def test_it_serves_http_and_keeps_a_second_one_out(magnetar: Any, start: Start, tmp_path: Path) -> None:
    server, where = start(tmp_path)
    for path, words in (("livez", b'"ok": true'), ("readyz", b'"ok": true'), ("metrics", b"magnetar_")):
        with urllib.request.urlopen(f"{where['http']}/{path}", timeout=10) as answer:
            assert words in answer.read()
    families = families_of_all_roles_but_metadata()
    with urllib.request.urlopen(f"{where['http']}/metrics", timeout=10) as answer:
        shown = answer.read().decode()
    assert [name for name in families if f"# TYPE {name} " not in shown] == []
    assert refused(magnetar, tmp_path, str(tmp_path), "another process", "another data directory")
    # The first one did not notice.
    send(magnetar, where, b"still here\n")
    assert server.end().code == 0


def test_it_tells_others_the_address_that_it_is_given_for_them(magnetar: Any, start: Start, tmp_path: Path) -> None:
    _, where = start(tmp_path, "--advertise", "host7.example:7650")
    ran = magnetar.call("brokers", "list", "--output", "json", "--server", where["server"])
    assert [one["address"] for one in json.loads(ran.out)] == ["host7.example:7650"]
    options = ("--advertise", "host7.example")
    assert refused(magnetar, tmp_path / "other", "advertised_address must be host:port", options=options)


def test_a_port_in_use_is_named(magnetar: Any, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert refused(magnetar, tmp_path / "a", str(port), options=("--port", port))
        assert refused(magnetar, tmp_path / "b", str(port), options=("--http-port", port))
    # Nothing of the refused start stands in the way.
    assert refused(magnetar, tmp_path / "a", "999.999.999.999", options=("--host", "999.999.999.999"))


def test_a_directory_that_cannot_be_used_is_named(magnetar: Any, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("not a directory")
    for folder in (file, file / "below", Path("/proc/magnetar")):
        assert refused(magnetar, folder, f"cannot use {folder}", "choose another --data-dir")


@pytest.fixture(scope="module")
def stopped(magnetar: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a standalone that was stopped; tests damage a copy of it."""
    folder = tmp_path_factory.mktemp("stopped")
    server = magnetar.start(*ARGUMENTS, "--data-dir", folder)
    try:
        send(magnetar, json.loads(server.process.stdout.readline()), b"a\n")
    finally:
        assert server.end().code == 0
    return folder


def test_a_bookie_whose_disk_is_gone_is_refused(magnetar: Any, stopped: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(stopped, tmp_path / "copy")
    shutil.rmtree(folder / "bookie0")
    assert refused(magnetar, folder, "bookie0", "disk was lost or swapped")


def test_a_lost_bookie_starts_empty_when_told_to_and_the_others_have_the_data(
    magnetar: Any, start: Start, tmp_path: Path
) -> None:
    server, where = start(tmp_path, "--bookies", 3)
    send(magnetar, where, b"a\nb\n")
    assert server.end().code == 0
    shutil.rmtree(tmp_path / "bookie2")
    # The last of them: it is missed though no directory tells.
    assert refused(magnetar, tmp_path, "disk was lost or swapped", "--repair-bookie bookie2")
    assert refused(magnetar, tmp_path, "no bookie bookie7", options=("--repair-bookie", "bookie7"))
    server, where = start(tmp_path, "--repair-bookie", "bookie2")
    assert where["bookies"] == 3
    send(magnetar, where, b"c\n")
    assert read(magnetar, where, "--count", "2") == "a\nb\n"
    server.kill()
    server, where = start(tmp_path)
    assert read(magnetar, where, "--no-wait") == "c\n"


def test_a_bookie_of_another_cluster_is_refused(magnetar: Any, start: Start, stopped: Path, tmp_path: Path) -> None:
    server, _ = start(tmp_path / "other")
    assert server.end().code == 0
    shutil.rmtree(tmp_path / "other" / "bookie0")
    shutil.copytree(stopped / "bookie0", tmp_path / "other" / "bookie0")
    assert refused(magnetar, tmp_path / "other", "another cluster")


def test_a_damaged_store_is_refused_and_not_started_empty(magnetar: Any, stopped: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(stopped, tmp_path / "copy")
    [current] = (folder / "bookie0").rglob("CURRENT")
    current.write_bytes(b"garbage\n")
    assert refused(magnetar, folder, "the store is damaged", "bookie0")


def test_damaged_metadata_is_refused_and_not_started_empty(magnetar: Any, stopped: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(stopped, tmp_path / "copy")
    (folder / "metadata.sqlite").write_bytes(b"garbage" * 1000)
    assert refused(magnetar, folder, "metadata.sqlite", "not a database")


def test_fewer_bookies_than_hold_data_are_refused(tmp_path: Path) -> None:
    assert bookie_count(tmp_path, None) == 1
    assert bookie_count(tmp_path, 3) == 3
    for name in ("bookie0", "bookie1", "bookie1.old", "other"):
        (tmp_path / name).mkdir()
    assert bookie_count(tmp_path, None) == 2
    assert bookie_count(tmp_path, 2) == 2
    with pytest.raises(StandaloneRefused, match="holds the data of 2 bookies: start with --bookies 2 or more"):
        bookie_count(tmp_path, 1)


def test_without_the_server_packages_the_command_says_what_to_install() -> None:
    program = (
        "import sys; sys.modules['structlog'] = None; from magnetar.cli.verbs import run_command_line; "
        "sys.exit(run_command_line(['standalone']))"
    )
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert ran.returncode == 1
    assert ran.stderr == ("magnetar: the server is not installed: pip install 'magnetar[server]' missing=`structlog`\n")


def test_a_standalone_whose_metadata_database_failed_ends_so_that_it_is_started_again(
    magnetar: Any, start: Start, tmp_path: Path
) -> None:
    server, where = start(tmp_path)
    # Its disk takes nothing more.
    resource.prlimit(server.process.pid, resource.RLIMIT_FSIZE, (0, 0))
    assert magnetar.call("topics", "create", "t", "--server", where["server"], "--timeout", 2).code
    ended = server.end(None)
    assert ended.code == 1
    assert ended.err.splitlines()[-1].startswith("magnetar: the metadata database failed and must be opened again: ")
    _, where = start(tmp_path)
    assert magnetar.call("topics", "create", "t", "--server", where["server"]).code == 0
