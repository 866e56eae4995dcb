"""deploy/compose.yaml without containers: each service's very command, environment and health check, in a network of
its own under its own name, with its volume where the file mounts it. Needs root.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yaml
from cluster.harness import ETCD, MAGNETAR, Process, until
from cluster.network import Network

DEPLOY = Path(__file__).resolve().parents[2] / "deploy"
SERVICES: dict[str, dict[str, Any]] = yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"]
HEALTH_OF_THE_IMAGE: list[str] = json.loads(
    re.findall(r"^HEALTHCHECK .*?CMD (\[.*?\])$", (DEPLOY / "Dockerfile").read_text(), re.MULTILINE | re.DOTALL)[0]
)
PATH = f"{Path(sys.executable).parent}:/usr/local/bin:/usr/bin:/bin"
IN_A_CONTAINER = (
    'mount --bind "$1" /etc/hosts && mount --bind "$2" /var/lib && shift 2 && exec setpriv --no-new-privs "$@"'
)
COMMAND_S = 60.0


class Compose:
    """The services as processes."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._network = Network()
        self._processes: dict[str, Process] = {}
        self._hosts = folder / "hosts"
        names = [f"{self._network.add(name)} {name}" for name in SERVICES]
        self._hosts.write_text("\n".join(["127.0.0.1 localhost", *names]) + "\n")

    def up(self, name: str) -> None:
        """Returns when what it depends on is healthy, and it has started unless somebody else is to start it."""
        needed = SERVICES[name].get("depends_on", {})
        assert all(condition == {"condition": "service_healthy"} for condition in needed.values())
        for other in needed:
            self.up(other)
        for other in needed:
            try:
                until(f"{other} is healthy", partial(self._healthy, other))
            except AssertionError as error:
                raise AssertionError(f"{error}\n{self._processes[other].tail()}") from None
        if name not in self._processes and "profiles" not in SERVICES[name]:
            process = self._processes[name] = Process(name, self._folder, self._container(name))
            process.start([MAGNETAR, *SERVICES[name]["command"]] if "command" in SERVICES[name] else [ETCD])

    def run(self, name: str, *arguments: str, stdin: str = "") -> str:
        """docker compose run --rm NAME ...: what it printed."""
        self.up(name)
        result = subprocess.run(
            [*self._container(name), MAGNETAR, *arguments],
            input=stdin,
            capture_output=True,
            text=True,
            timeout=COMMAND_S,
        )
        assert result.returncode == 0, result.stderr
        return result.stdout

    def stop(self, name: str) -> int:
        """docker compose stop NAME: the exit code, if it ends within its grace period."""
        process = self._processes.pop(name)
        try:
            process.signal(15)
            return process.wait(float(SERVICES[name]["stop_grace_period"].removesuffix("s")))
        finally:
            process.kill()

    def close(self) -> None:
        for process in self._processes.values():
            process.kill()
        self._network.close()

    def _healthy(self, name: str) -> bool:
        assert self._processes[name].alive, f"{name} ended"
        test = SERVICES[name]["healthcheck"]["test"][1:] if "healthcheck" in SERVICES[name] else HEALTH_OF_THE_IMAGE
        return subprocess.run([*self._container(name), *test], capture_output=True, timeout=COMMAND_S).returncode == 0

    def _container(self, name: str) -> list[str]:
        root = self._folder / f"root-{name}"
        for mount in SERVICES[name].get("volumes", []):
            (root / Path(mount.partition(":")[2]).relative_to("/var/lib")).mkdir(
                parents=True, exist_ok=True, mode=0o700
            )
        root.mkdir(exist_ok=True)
        environment = [f"{key}={value}" for key, value in SERVICES[name]["environment"].items()]
        return [
            *self._network.inside(name), "unshare", "--mount", "sh", "-c", IN_A_CONTAINER, "sh",
            str(self._hosts), str(root), "env", "-i", f"PATH={PATH}", *environment,
        ]  # fmt: skip


@pytest.fixture
def compose(tmp_path: Path) -> Iterator[Compose]:
    if os.geteuid():
        pytest.skip("network namespaces need root")
    composed = Compose(tmp_path)
    try:
        yield composed
    finally:
        composed.close()


def test_compose_comes_up_serves_and_keeps_its_data_through_a_stop_of_everything(compose: Compose) -> None:
    compose.run("client", "topics", "create", "orders", "--shards", "4")
    compose.run("client", "produce", "orders", stdin="one\ntwo\nthree\n")
    health = json.loads(compose.run("client", "cluster", "health", "--output", "json"))
    assert (health["healthy"], health["brokers"], health["bookies"]) == (True, 2, 3)

    for name in ("broker0", "broker1", "bookie0", "bookie1", "bookie2"):
        assert compose.stop(name) == 0, name
    for name in ("etcd0", "etcd1", "etcd2"):
        compose.stop(name)

    read = compose.run("client", "consume", "orders", "--subscription", "s", "--from", "earliest", "--no-wait")
    assert sorted(read.split()) == ["one", "three", "two"]
