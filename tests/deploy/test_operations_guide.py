"""What OPERATIONS.md names exists: verbs, options, settings and metrics. (`tests/cluster` runs its commands.)"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import typer
from prometheus_client import CollectorRegistry

from magnetar.bookie.metrics import BookieMetrics
from magnetar.broker.metrics import BrokerMetrics
from magnetar.cli.roles.process import SETTINGS
from magnetar.cli.verbs import app
from magnetar.ledger.metrics import LedgerMetrics
from magnetar.metadata.server.metrics import ServerMetrics
from magnetar.repair.metrics import RepairMetrics

DEPLOY = Path(__file__).resolve().parents[2] / "deploy"
GUIDE = (DEPLOY / "OPERATIONS.md").read_text()
BLOCKS = "".join(re.findall(r"^```sh\n(.*?)^```$", GUIDE, re.MULTILINE | re.DOTALL)).replace("\\\n", " ")
COMMANDS = sorted(
    set(re.findall(r"\bmagnetar ([a-z][^|<>&;)\n]*)", BLOCKS))
    | set(re.findall(r"^start \S+ ([a-z].*)$", BLOCKS, re.MULTILINE))
)


def metric_names() -> set[str]:
    registry = CollectorRegistry()
    BrokerMetrics(registry)
    BookieMetrics(registry, "bookie0")
    LedgerMetrics.of(registry)
    RepairMetrics.of(registry)
    ServerMetrics(registry)
    RepairMetrics.of(registry)
    names: set[str] = set()
    for family in registry.collect():
        names |= {family.name, f"{family.name}_total" if family.type == "counter" else f"{family.name}_count"}
    return names


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_names_verbs_options_and_settings_that_exist(command: str) -> None:
    words = command.split()
    verb: Any = typer.main.get_command(app)
    role = words[0]
    while hasattr(verb, "commands"):
        verb = verb.commands[words.pop(0)]
    options = {name for parameter in verb.params for name in parameter.opts}
    assert {word for word in words if word.startswith("--")} <= options
    keys = {words[place + 1].partition("=")[0] for place, word in enumerate(words) if word == "--set"}
    assert keys <= (set(SETTINGS[role].model_fields) if role in SETTINGS else set())


def test_every_metric_that_is_explained_exists() -> None:
    assert set(re.findall(r"`(magnetar_[a-z_]+)`", GUIDE)) <= metric_names()


def test_the_links_of_the_folder_lead_to_files() -> None:
    for page in DEPLOY.glob("*.md"):
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
            assert (DEPLOY / target).exists(), f"{page.name}: {target}"
