"""Processes of this command that a command starts: they end with it, and Ctrl-C reaches them through it alone."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from collections.abc import Callable

MAGNETAR = (sys.executable, "-m", "magnetar.cli.main")

PR_SET_PDEATHSIG = 1
"""Of Linux's prctl.h: the signal a process gets when its parent has ended."""


def end_with_parent() -> Callable[[], None]:
    """What a child does before all else: it asks to be told to stop when its parent has ended, however that ends."""
    parent = os.getpid()
    prctl = ctypes.CDLL(None).prctl

    def ask() -> None:
        prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:
            os._exit(1)

    return ask
