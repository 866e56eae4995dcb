"""Every command is documented, can be tried without effect, and speaks JSON: the command tree is walked."""

from __future__ import annotations

import re
import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

from magnetar.cli.verbs import app, run_command_line

README = (Path(__file__).resolve().parents[2] / "README.md").read_text()
BENCH = {"publish", "latency", "consume", "catch-up", "end-to-end", "queue", "failover"}
MUTATING = {
    "create", "delete", "seek", "produce", "consume", *BENCH,
    "drain", "undrain", "decommission", "repair",
    "apply", "throttle", "pause", "resume", "cancel", "rollback",
}  # fmt: skip
RUNS_A_ROLE = {"standalone", "metadata", "bookie", "broker"}
"""They are the cluster, and talk to none."""


def leaves(command: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Every verb with the words that lead to it."""
    for name, child in getattr(command, "commands", {}).items():
        if hasattr(child, "commands"):
            yield from leaves(child, (*path, name))
        else:
            yield (*path, name), child


COMMANDS = dict(leaves(typer.main.get_command(app)))
every_command = pytest.mark.parametrize("path", COMMANDS, ids=" ".join)


def options(path: tuple[str, ...]) -> set[str]:
    return {name for parameter in COMMANDS[path].params for name in parameter.opts}


def test_the_verbs_are_the_documented_ones() -> None:
    assert {" ".join(path) for path in COMMANDS} == {
        "standalone", "metadata", "bookie", "broker", "bookies list",
        "brokers list", "brokers drain", "brokers undrain",
        "produce", "consume", *(f"bench {verb}" for verb in BENCH),
        "cluster health", "ledgers list", "ledgers describe",
        "bookies drain", "bookies undrain", "bookies decommission", "cluster repair",
        "ledgers verify", "rebalance plan", "rebalance apply", "rebalance status", "rebalance throttle",
        "rebalance pause", "rebalance resume", "rebalance cancel", "rebalance rollback", "rebalance verify",
        "topics create", "topics list", "topics describe", "topics delete",
        "subscriptions list", "subscriptions describe", "subscriptions seek", "subscriptions delete",
    }  # fmt: skip


@every_command
def test_every_verb_and_every_parameter_has_a_help_text(path: tuple[str, ...]) -> None:
    assert COMMANDS[path].help
    for parameter in COMMANDS[path].params:
        assert parameter.help, f"{' '.join(path)}: {parameter.name}"


@every_command
def test_every_verb_is_named_in_the_readme(path: tuple[str, ...]) -> None:
    rows = [line for line in README.splitlines() if line.startswith(f"| `magnetar {path[0]}")]
    named = " ".join(rows)
    assert re.search(rf"`magnetar {' '.join(path)}\b", named) or f"`{path[-1]}`" in named


@every_command
def test_every_option_that_the_readme_shows_exists(path: tuple[str, ...]) -> None:
    for line in README.splitlines():
        if f"magnetar {' '.join(path)} " in line:
            for shown in re.findall(r"(?<![\w-])--[a-z-]+", line.partition("#")[0]):
                assert shown in options(path), line


@every_command
def test_every_verb_that_changes_something_has_a_dry_run(path: tuple[str, ...]) -> None:
    assert ("--dry-run" in options(path)) == (path[-1] in MUTATING)


@every_command
def test_every_verb_speaks_json_and_those_of_a_cluster_take_its_address(path: tuple[str, ...]) -> None:
    assert "--output" in options(path)
    if path[-1] not in RUNS_A_ROLE:
        assert {"--server", "--timeout"} <= options(path)
        server = next(parameter for parameter in COMMANDS[path].params if "--server" in parameter.opts)
        assert server.envvar == "MAGNETAR_SERVER"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nonsense"], "no such command 'nonsense'; see magnetar --help"),
        (["topics", "creat"], "Did you mean 'create'"),
        (["topics", "create"], "see magnetar topics create --help"),
        (["topics", "create", "t", "--shards", "0"], "'--shards'"),
        (["topics", "create", "t", "--shards", "many"], "'--shards'"),
        (["topics", "list", "--frobnicate"], "--frobnicate"),
        (["topics", "list", "--output", "yaml"], "'--output'"),
        (["topics", "list", "--server", "localhost"], "--server takes host:port"),
        (["topics", "list", "--server", "localhost:0"], "--server takes host:port"),
        (["produce", "t", "--key-column", "id"], "--key-column needs --format csv or jsonl"),
        (["consume", "t", "--subscription", "s", "--from", "noon"], "not a position: 'noon'"),
        (["subscriptions", "seek", "t", "s", "--to", "x"], "a message id such as 3:1200"),
        (["bench", "publish", "--local", "3"], "--local takes BOOKIES,BROKERS"),
        (["cluster", "repair", "--throttle", "0"], "'0' would never end: give a rate above zero"),
        (["cluster", "repair", "--delay", "-1"], "'--delay'"),
        (["bookies", "drain"], "see magnetar bookies drain --help"),
        (["rebalance", "plan", "--throttle", "0"], "'0' would never end: give a rate above zero"),
        (["rebalance", "plan", "--throttle", "fast"], "'fast' is no rate: give one such as 50MB/s"),
        (["rebalance", "throttle", "5 bananas/s"], "'5 bananas/s' is no rate"),
        (["rebalance", "plan", "--max-bytes", "-3"], "'-3' is no size: give one such as 500MB"),
        (["rebalance", "plan", "--goal", "fame"], "'--goal': 'fame' is not one of"),
        (["rebalance", "rollback"], "see magnetar rebalance rollback --help"),
        (["rebalance", "apply", "/dev/null"], "/dev/null: this is no saved plan"),
        (["rebalance", "apply", "plan.json", "--topic", "t"], "a saved plan has its goal"),
        (["rebalance", "status", "--all", "--watch"], "--all shows every operation"),
        (["standalone", "--bookies", "10"], "'--bookies'"),
        (["standalone", "--data-dir", ""], "'--data-dir': names no directory"),
        (["bench", "publish", "--data-dir", ""], "'--data-dir': names no directory"),
        (["bench", "publish", "--local", "3,10"], "1 to 9 brokers"),
        (["topics", "create", "t", "--shards", "65"], "'--shards': must be at most 64"),
        (["topics", "create", "t", "--shards", "many"], "'--shards': must be a whole number"),
        (["topics", "list", "--timeout", "soon"], "'--timeout': must be a number"),
        (["consume", "t", "--subscription", "s", "--type", "x"], "'--type': 'x' is not one of"),
        (["broker"], "id is required: give it with --set id="),
        (["broker", "--workers", "0"], "'--workers': must be at least 1"),
        (["broker", "--set", "id"], "--set takes key=value"),
        (["bookie", "--set", "id=b", "--set", "data_dri=/x"], "did you mean data_dir?"),
        (["metadata", "--config", "/no/such/file"], "no such file or directory file=`/no/such/file`"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_usage_error_is_one_line_and_exit_code_2(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command_line(arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert words in err
    assert err.startswith("magnetar: ")
    assert err.count("\n") == 1


def test_a_group_without_a_verb_shows_its_help(capfd: pytest.CaptureFixture[str]) -> None:
    assert run_command_line(["topics"]) == 2
    out, err = capfd.readouterr()
    assert "describe" in out
    assert err == ""


def test_the_version_is_that_of_the_package(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command_line(["--version"]) == 0
    assert re.fullmatch(r"magnetar \d+\.\d+\.\d+\n", capsys.readouterr().out)


def test_help_needs_neither_grpc_nor_a_table() -> None:
    program = (
        "import sys; from magnetar.cli import verbs; code = verbs.run_command_line(['--version']); "
        "heavy = {'grpc', 'google.protobuf', 'rich', 'magnetar.client'} & set(sys.modules); "
        "sys.exit(code or len(heavy))"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (0, "")


def test_help_is_there_at_once() -> None:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-m", "magnetar.cli.main", "--help"], capture_output=True, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    # CPU time, so that a busy machine is no failure.
    assert after.ru_utime - before.ru_utime < 1.0
