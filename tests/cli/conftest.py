"""The command as a user runs it: arguments, standard input, output, and an exit code.

`run` and `start` make processes. `call` runs the same command line in this process, on real descriptors, in a tenth of
the time: most of what a command takes is the start of Python.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from typing import IO, Any
from unittest.mock import patch

import pytest

from magnetar.cli.verbs import run_command_line

COMMAND = [sys.executable, "-m", "magnetar.cli.main"]
TIMEOUT_S = 40.0


@dataclass(frozen=True)
class Ran:
    """How a command ended."""

    code: int
    out: str
    err: str

    def is_refused(self, code: int, *words: str) -> bool:
        """It ended with this code and nothing but one line, which has these words."""
        assert self.out == "", self.out
        assert self.err.startswith("magnetar: "), self.err
        assert self.err.count("\n") == 1, self.err
        missing = [word for word in words if word not in self.err]
        assert not missing, f"{missing} not in {self.err}"
        assert self.code == code, self.err
        return True


class Started:
    """A command that goes on until it is ended, by its process id."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self.process = process

    def end(self, sign: int | None = signal.SIGINT) -> Ran:
        """Sends the signal, if any, and returns what was printed and not yet read."""
        if sign is not None:
            self.process.send_signal(sign)
        try:
            out, err = self.process.communicate(timeout=TIMEOUT_S)
        finally:
            self.kill()
        return Ran(self.process.returncode, (out or b"").decode(), (err or b"").decode())

    def kill(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()


class Magnetar:
    """Runs the command, against one server if it is given."""

    def __init__(self, server: str | None = None) -> None:
        # GRPC_*: importing the client library sets what a process of its own would set otherwise.
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("MAGNETAR", "GRPC_"))}
        self.environment = {**kept, "COLUMNS": "160", **({"MAGNETAR_SERVER": server} if server else {})}

    def run(self, *arguments: object, input: bytes = b"", closed: int | None = None, **popen: Any) -> Ran:
        """`closed`: a descriptor that the command does not have."""
        if "stdin" not in popen:
            popen["input"] = input
        shell = () if closed is None else ("sh", "-c", f'exec "$@" {closed}>&-', "sh")
        result = subprocess.run(
            [*shell, *COMMAND, *map(str, arguments)],
            capture_output=True,
            timeout=TIMEOUT_S,
            env=self.environment,
            **popen,
        )
        return Ran(result.returncode, result.stdout.decode(), result.stderr.decode())

    def call(self, *arguments: object, input: bytes = b"") -> Ran:
        with ExitStack() as stack:
            files = [stack.enter_context(tempfile.TemporaryFile()) for _ in range(3)]
            files[0].write(input)
            files[0].seek(0)
            for descriptor, file in enumerate(files):
                saved = os.dup(descriptor)
                stack.callback(os.close, saved)
                stack.callback(os.dup2, saved, descriptor)
                os.dup2(file.fileno(), descriptor)
            out = stack.enter_context(open(1, "w", closefd=False))
            err = stack.enter_context(open(2, "w", closefd=False))
            stack.enter_context(redirect_stdout(out))
            stack.enter_context(redirect_stderr(err))
            stack.enter_context(patch.dict(os.environ, self.environment, clear=True))
            code = run_command_line([str(argument) for argument in arguments])
            out.flush()
            err.flush()
            return Ran(code, *(_content(file) for file in files[1:]))

    def start(self, *arguments: object, **popen: Any) -> Started:
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | popen
        return Started(subprocess.Popen([*COMMAND, *map(str, arguments)], env=self.environment, **pipes))


def _content(file: IO[bytes]) -> str:
    file.seek(0)
    return file.read().decode()


@pytest.fixture(scope="session")
def magnetar() -> Magnetar:
    return Magnetar()


@pytest.fixture
def refusing_address() -> Iterator[str]:
    """Bound and not listening: it refuses, and nobody else takes it."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        yield f"127.0.0.1:{bound.getsockname()[1]}"
