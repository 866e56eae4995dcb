"""Compose file, units and image name ports, paths and settings as the roles have them."""

from __future__ import annotations

import configparser
import itertools
import re
import shlex
import tomllib
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

from magnetar.cli.roles.process import SETTINGS
from magnetar.cli.verbs import app
from magnetar.node.lifecycle import OPEN_FILES_MAX
from magnetar.node.settings import Joining, split_address
from magnetar.node.settings_loading import Loaded, load_settings

ROOT = Path(__file__).resolve().parents[2]
DEPLOY = ROOT / "deploy"
DOCKERFILE = (DEPLOY / "Dockerfile").read_text()
COMPOSE = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
ROLES = {name: service for name, service in SERVICES.items() if service.get("command")}
UNITS = {path.name: path for path in (DEPLOY / "systemd").glob("*.service")}
STATE_ROOT = "/var/lib"
BOOKIE_DISTRUSTS_ITS_DISK = 70
SETTINGS_UNUSABLE = 2


def role_of(command: list[str]) -> str:
    return command[0]


def options(role: str) -> set[str]:
    verb = typer.main.get_command(app).commands[role]  # type: ignore[attr-defined]
    return {name for parameter in verb.params for name in parameter.opts}


def assignments(words: list[str]) -> list[str]:
    return [value for flag, value in itertools.pairwise(words) if flag == "--set"]


def compose_settings(name: str) -> Loaded[Any]:
    command = SERVICES[name]["command"]
    role = role_of(command)
    environment = {key: value for key, value in SERVICES[name]["environment"].items() if key.startswith("MAGNETAR_")}
    return load_settings(SETTINGS[role], role, assignments=assignments(command), environment=environment)


def unit(name: str) -> dict[str, str]:
    """The [Service] section; a key that stands twice has the last value."""
    parser = configparser.RawConfigParser(strict=False, delimiters="=", comment_prefixes="#")
    parser.optionxform = str  # type: ignore[assignment, method-assign]
    parser.read(UNITS[name])
    return dict(parser["Service"])


# --- compose ---


def test_compose_starts_three_etcd_three_bookies_and_two_brokers() -> None:
    running = sorted(name for name, service in SERVICES.items() if "profiles" not in service)
    assert running == ["bookie0", "bookie1", "bookie2", "broker0", "broker1", "etcd0", "etcd1", "etcd2"]


@pytest.mark.parametrize("name", ROLES)
def test_a_service_of_compose_has_settings_that_its_role_takes(name: str) -> None:
    command = SERVICES[name]["command"]
    assert {word for word in command if word.startswith("--")} <= options(role_of(command))
    settings = compose_settings(name).settings
    assert settings.id == name
    assert split_address(settings.advertised_address) == (name, split_address(settings.listen)[1])
    assert split_address(settings.listen)[0] == "0.0.0.0"


@pytest.mark.parametrize("name", ROLES)
def test_a_service_of_compose_finds_all_of_etcd(name: str) -> None:
    endpoints = compose_settings(name).settings.metadata.removeprefix("etcd://").split(",")
    assert endpoints == [f"etcd{number}:2379" for number in range(3)]
    for number in range(3):
        environment = SERVICES[f"etcd{number}"]["environment"]
        assert environment["ETCD_ADVERTISE_CLIENT_URLS"] == f"http://etcd{number}:2379"
        assert environment["ETCD_NAME"] == f"etcd{number}"
        assert f"etcd{number}={environment['ETCD_INITIAL_ADVERTISE_PEER_URLS']}" in environment["ETCD_INITIAL_CLUSTER"]


@pytest.mark.parametrize("name", ROLES)
def test_the_health_of_a_service_is_asked_where_it_serves_http(name: str) -> None:
    port = split_address(compose_settings(name).settings.http_address)[1]
    assert SERVICES[name]["environment"]["READYZ"] == f"http://127.0.0.1:{port}/readyz"
    assert "READYZ" in DOCKERFILE.partition("HEALTHCHECK")[2]


def test_compose_publishes_what_clients_need_on_loopback_and_nothing_of_the_storage() -> None:
    for name, service in SERVICES.items():
        published = service.get("ports", [])
        if not name.startswith("broker"):
            assert published == []
            continue
        settings = compose_settings(name).settings
        ports = [split_address(settings.listen)[1], split_address(settings.http_address)[1]]
        # The same number outside: clients are redirected to the advertised address.
        assert published == [f"127.0.0.1:{port}:{port}" for port in ports]


def test_the_client_of_compose_knows_every_broker() -> None:
    brokers = [name for name in SERVICES if name.startswith("broker")]
    addresses = [compose_settings(name).settings.advertised_address for name in brokers]
    assert SERVICES["client"]["environment"]["MAGNETAR_SERVER"] == ",".join(addresses)


def test_what_holds_data_has_a_volume_of_its_own_where_it_writes() -> None:
    volumes = []
    for name, service in SERVICES.items():
        if name.startswith(("etcd", "bookie")):
            (mount,) = service["volumes"]
            volume, _, path = mount.partition(":")
            volumes.append(volume)
            role_path = (
                service["environment"]["ETCD_DATA_DIR"]
                if name.startswith("etcd")
                else str(compose_settings(name).settings.data_dir)
            )
            assert path == role_path
        else:
            assert "volumes" not in service
    assert sorted(volumes) == sorted(COMPOSE["volumes"])


def test_services_wait_until_those_they_need_are_healthy() -> None:
    for name in ROLES:
        needed = {f"etcd{number}" for number in range(3)}
        if name.startswith("broker"):
            needed |= {f"bookie{number}" for number in range(3)}
        assert SERVICES[name]["depends_on"] == {other: {"condition": "service_healthy"} for other in needed}


def test_there_are_bookies_enough_for_the_ensembles_of_the_brokers() -> None:
    bookies = sum(name.startswith("bookie") for name in SERVICES)
    for name in ("broker0", "broker1"):
        assert compose_settings(name).settings.ensemble_size <= bookies


def test_compose_does_not_start_a_bookie_again_that_distrusts_its_disk() -> None:
    for name in ROLES:
        assert SERVICES[name]["restart"] == ("no" if name.startswith("bookie") else "unless-stopped")


# --- the image ---


def test_the_image_is_built_from_every_source_root_of_the_wheel() -> None:
    copied = re.findall(r"^COPY (?!--from)(.*) \S+$", DOCKERFILE, re.MULTILINE)
    copied = [path for line in copied for path in line.split()]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    packages = project["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]
    needed = {*packages, "pyproject.toml", project["project"]["readme"], *project["project"]["license-files"]}
    assert set(copied) == needed
    let_through = (DEPLOY / "Dockerfile.dockerignore").read_text().splitlines()
    assert {line.removeprefix("!") for line in let_through if line.startswith("!")} == needed


def test_the_image_exposes_the_ports_of_the_roles() -> None:
    exposed = {int(port) for port in re.findall(r"^EXPOSE (.*)$", DOCKERFILE, re.MULTILINE)[0].split()}
    addresses = [split_address(model.model_fields["listen"].default)[1] for model in SETTINGS.values()]
    assert exposed == {port + more for port in addresses for more in (0, 1)}


def test_the_image_runs_as_nobody_special_and_stops_on_the_signal_that_stops_a_role() -> None:
    user = re.findall(r"^USER (\d+):(\d+)$", DOCKERFILE, re.MULTILINE)
    assert len(user) == 1
    assert "0" not in user[0]
    assert f"--uid {user[0][0]}" in DOCKERFILE
    assert "\nSTOPSIGNAL SIGTERM\n" in DOCKERFILE
    assert '\nENTRYPOINT ["magnetar"]\n' in DOCKERFILE
    assert re.search(r"(?i)password|secret|token", DOCKERFILE) is None


def test_the_image_that_compose_names_has_the_version_of_the_package() -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    for name in ROLES:
        assert SERVICES[name]["image"] == f"magnetar:{version}"


# --- units ---


def test_there_is_one_unit_for_each_role() -> None:
    assert {re.split(r"[.@]", name)[0] for name in UNITS} == {f"magnetar-{role}" for role in SETTINGS}


@pytest.mark.parametrize("name", sorted(UNITS))
def test_a_unit_starts_its_role_with_the_settings_of_the_example(name: str) -> None:
    service = unit(name)
    line = service["ExecStart"].replace("%S", STATE_ROOT).replace("%i", "bookie0")
    _, *command = shlex.split(line)
    role = role_of(command)
    assert name.startswith(f"magnetar-{role}")
    assert {word for word in command if word.startswith("--")} <= options(role)
    assert command[command.index("--config") + 1] == f"/etc/magnetar/{role}.toml"
    example = DEPLOY / "settings" / f"{role}.toml"
    settings: Any = load_settings(
        SETTINGS[role], role, assignments=assignments(command), file=example, environment={}
    ).settings
    if isinstance(settings, Joining):
        assert settings.id == "bookie0"
    if hasattr(settings, "data_dir"):
        written = [f"{STATE_ROOT}/{path}" for path in service["StateDirectory"].replace("%i", "bookie0").split()]
        assert str(settings.data_dir) in written
        as_it_is: Any = load_settings(SETTINGS[role], role, file=example, environment={}).settings
        assert settings.data_dir == as_it_is.data_dir


@pytest.mark.parametrize("name", sorted(UNITS))
def test_a_unit_may_open_as_many_files_as_the_process_wants(name: str) -> None:
    assert int(unit(name)["LimitNOFILE"]) == OPEN_FILES_MAX


@pytest.mark.parametrize("name", sorted(UNITS))
def test_a_unit_is_started_again_unless_that_makes_it_worse(name: str) -> None:
    service = unit(name)
    assert service["Restart"] == "on-failure"
    never = {int(code) for code in service["RestartPreventExitStatus"].split()}
    assert never == {SETTINGS_UNUSABLE, *([BOOKIE_DISTRUSTS_ITS_DISK] if "bookie" in name else [])}


@pytest.mark.parametrize("name", sorted(UNITS))
def test_a_unit_is_confined_to_its_directory(name: str) -> None:
    service = unit(name)
    assert service["User"] == "magnetar"
    assert service["NoNewPrivileges"] == "yes"
    assert service["ProtectSystem"] == "strict"
    assert service["KillMode"] == "mixed"
    assert ("StateDirectory" in service) == ("broker" not in name)


def test_units_and_compose_wait_equally_long_for_a_stop() -> None:
    for role in ("bookie", "broker"):
        grace = SERVICES[f"{role}0"]["stop_grace_period"]
        assert grace == f"{unit(f'magnetar-{role}@.service')['TimeoutStopSec']}s"
