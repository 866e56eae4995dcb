"""deploy/OPERATIONS.md is true: its commands are run as they stand there, in one shell, from the first to the last.

In a network of their own, so that the ports they name are free. Needs root.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from cluster.network import Network

DOCUMENT = Path(__file__).resolve().parents[2] / "deploy" / "OPERATIONS.md"
BLOCKS: list[str] = re.findall(r"^```sh\n(.*?)^```$", DOCUMENT.read_text(), re.MULTILINE | re.DOTALL)
SESSION_S = 570
PROCESSES_OF_ITS_OWN = ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc"]
"""The end of the first of them ends all others."""


@pytest.fixture
def network() -> Iterator[Network]:
    if os.geteuid():
        pytest.skip("a network of its own needs root")
    network = Network()
    try:
        yield network
    finally:
        network.close()


@pytest.mark.timeout(SESSION_S + 30)
def test_every_command_of_the_operations_guide_works_as_it_is_written(network: Network, tmp_path: Path) -> None:
    network.add("host")
    script = tmp_path / "session.sh"
    # -v shows each command before it runs: the last one shown is the one that failed.
    script.write_text("set -ev\n" + "\n".join(BLOCKS))
    environment = {
        "PATH": f"{Path(sys.executable).parent}:/usr/local/bin:/usr/bin:/bin",
        "HOME": str(tmp_path),
    }
    with (tmp_path / "session.log").open("wb") as log:
        session = subprocess.Popen(
            [*network.inside("host"), *PROCESSES_OF_ITS_OWN, "bash", str(script)],
            cwd=tmp_path, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
        )  # fmt: skip
        try:
            code = session.wait(SESSION_S)
        except subprocess.TimeoutExpired:
            session.send_signal(signal.SIGKILL)
            code = session.wait()
    tails = [
        f"--- {path.name}\n{path.read_text()[-2000:]}" for path in sorted((tmp_path / "cluster" / "log").glob("*"))
    ]
    assert code == 0, (tmp_path / "session.log").read_text()[-4000:] + "\n" + "\n".join(tails)
