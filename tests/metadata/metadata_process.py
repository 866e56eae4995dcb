"""`magnetar metadata` in a process of its own, that can be killed, stopped for a while, and started again."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc

from magnetar.etcd import etcd_pb2 as pb

WAIT_S = 30.0


class MetadataProcess:
    """Keeps its address over restarts. What it logs is in `log`."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.log = directory.with_suffix(".log")
        self.address = "127.0.0.1:0"
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"etcd://{self.address}"

    def start(self) -> None:
        """Returns when it serves."""
        options = (f"data_dir={self.directory}", f"listen={self.address}", "http_listen=127.0.0.1:0")
        command = [sys.executable, "-m", "magnetar.cli.main", "metadata", "--output", "json"]
        for option in options:
            command += ["--set", option]
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log)
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, self.log.read_text()
        self.address = json.loads(line)["address"]

    def kill(self) -> None:
        self._end(signal.SIGKILL)  # also ends one that is stopped

    def terminate(self) -> int:
        return self._end(signal.SIGTERM)

    def stop(self) -> None:
        """Stands still: connections stay open, and new ones are accepted, but nobody answers."""
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)

    def go_on(self) -> None:
        assert self._process is not None
        self._process.send_signal(signal.SIGCONT)

    def call(self, method: str, request: Any, answer: Callable[[], Any]) -> Any:
        with grpc.insecure_channel(self.address) as channel:
            return answer().FromString(
                channel.unary_unary(f"/etcdserverpb.{method}")(
                    request.SerializeToString(), timeout=WAIT_S, wait_for_ready=True
                )
            )

    def revision(self) -> int:
        answer = self.call("KV/Range", pb.RangeRequest(key=b"x"), pb.RangeResponse)
        return int(answer.header.revision)

    def delete_all(self) -> None:
        self.call("KV/DeleteRange", pb.DeleteRangeRequest(key=b"\0", range_end=b"\0"), pb.DeleteRangeResponse)

    def compact(self) -> None:
        """Forgets all changes so far."""
        self.call("KV/Compact", pb.CompactionRequest(revision=self.revision()), pb.CompactionResponse)

    def _end(self, number: signal.Signals) -> int:
        if self._process is None:
            return 0
        self._process.send_signal(number)
        code = self._process.wait(WAIT_S)
        assert self._process.stdout is not None
        self._process.stdout.close()
        self._process = None
        return code
