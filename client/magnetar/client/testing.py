"""For the tests of applications: a real cluster in a process of its own, gone when the test is.

    import pytest
    from magnetar.client.sync import connect
    from magnetar.client.testing import standalone

    @pytest.fixture(scope="session")
    def server():
        with standalone() as address:
            yield address

    def test_orders_arrive(server):
        with connect(server) as client: ...

It starts in about a second; one for a whole test session will do, with a topic for each test. Needs `magnetar[server]`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from magnetar.client.errors import MagnetarError

__all__ = ["ServerFailed", "standalone"]

STOP_TIMEOUT_S = 30.0
PARENT = "MAGNETAR_PARENT"
"""The variable that makes a server process end with the one whose id it holds."""


class ServerFailed(MagnetarError):
    """The server did not start; the message is what it said."""


@contextmanager
def standalone(*, bookies: int = 1, data_dir: str | os.PathLike[str] | None = None) -> Iterator[str]:
    """Runs `magnetar standalone` on free ports of 127.0.0.1 and gives its address, for `connect`.

    bookies    storage nodes, 1 to 9
    data_dir   kept, and used again by the next one on it; without it a temporary directory, deleted at the end
    What was acknowledged is as durable as anywhere: fsynced. The process also ends when the thread that entered ends.
    Raises ServerFailed when it does not start.
    """
    with tempfile.TemporaryDirectory(prefix="magnetar-") as temporary:
        log = Path(temporary, "log")
        process = _start(Path(data_dir or Path(temporary, "data")), bookies, log)
        try:
            yield _address(process, log)
        finally:
            _stop(process)


def _start(data_dir: Path, bookies: int, log: Path) -> subprocess.Popen[str]:
    options = ("--port", "0", "--http-port", "0", "--bookies", str(bookies), "--output", "json")
    with log.open("w") as stderr:
        return subprocess.Popen(
            [sys.executable, "-m", "magnetar.cli.main", "standalone", "--data-dir", str(data_dir), *options],
            env={**os.environ, PARENT: str(os.getpid())},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
        )


def _address(process: subprocess.Popen[str], log: Path) -> str:
    assert process.stdout is not None
    ready = process.stdout.readline()
    if not ready:
        said = log.read_text(errors="replace").strip()
        raise ServerFailed(f"the server did not start: exit_code=`{process.wait(STOP_TIMEOUT_S)}` said=`{said}`")
    return str(json.loads(ready)["server"])


def _stop(process: subprocess.Popen[str]) -> None:
    with process:
        process.terminate()
        try:
            process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.kill()
