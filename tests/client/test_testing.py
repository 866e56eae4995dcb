"""What applications test with: a server of their own."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from magnetar.client import EARLIEST
from magnetar.client.sync import connect
from magnetar.client.testing import ServerFailed, standalone

PROGRAM = """
import os, signal
from magnetar.client.testing import standalone
with standalone() as address:
    print(address, flush=True)
    signal.pause()
"""
WAIT_S = 60.0


def wait_until_nobody_listens(address: str) -> None:
    host, _, port = address.rpartition(":")
    deadline = time.monotonic() + WAIT_S
    while time.monotonic() < deadline:
        try:
            socket.create_connection((host, int(port)), WAIT_S).close()
        except ConnectionRefusedError:
            return
        time.sleep(0.01)
    raise AssertionError(f"{address} is still served")


def test_it_serves_until_the_block_ends_and_a_directory_of_ones_own_stays(tmp_path: Path) -> None:
    with standalone(data_dir=tmp_path / "data", bookies=2) as first, connect(first) as client:
        producer = client.producer("orders")
        with producer:
            producer.send(b"kept")
    wait_until_nobody_listens(first)
    with standalone(data_dir=tmp_path / "data", bookies=2) as second, connect(second) as client:
        consumer = client.stream_consumer("orders", subscription="test", start=EARLIEST)
        with consumer:
            assert consumer.receive(timeout=WAIT_S).payload == b"kept"


def test_why_it_does_not_start_is_said(tmp_path: Path) -> None:
    (tmp_path / "data").write_text("not a directory")
    with pytest.raises(ServerFailed, match="data"), standalone(data_dir=tmp_path / "data"):
        pass


def test_it_ends_with_the_process_that_started_it() -> None:
    with subprocess.Popen([sys.executable, "-c", PROGRAM], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        address = process.stdout.readline().strip()
        os.kill(process.pid, signal.SIGKILL)
    wait_until_nobody_listens(address)
