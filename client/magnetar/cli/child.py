"""Processes of this command that a command starts: they end with it, and Ctrl-C reaches them through it alone."""

from __future__ import annotations

import ctypes
import os
import signal
import sys

MAGNETAR = (sys.executable, "-m", "magnetar.cli.main")

PARENT = "MAGNETAR_PARENT"
"""The variable that tells a child whose it is."""

PR_SET_PDEATHSIG = 1
"""Of Linux's prctl.h: the signal a process gets when its parent has ended."""


def child_environment(**defaults: str) -> dict[str, str]:
    """The environment of a process that is to end with this one."""
    return {**defaults, **os.environ, PARENT: str(os.getpid())}


def end_with_parent() -> None:
    """A child asks to be told to stop when its parent has ended, however that ends.

    It asks by itself, before all else: code between fork and exec would run in a copy of a process with gRPC's threads.
    """
    parent = os.environ.pop(PARENT, "")
    if parent:
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
        if str(os.getppid()) != parent:
            sys.exit(1)
