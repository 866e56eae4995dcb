"""Time and chance for everything in this process, from the seed alone, and the names of host and process.

The code under test takes both through its boundary; what a library, or a forgotten default, would take from the system
is caught here. It replaces functions of the standard library, so it is for a process that runs one seed and ends.
"""

from __future__ import annotations

import os
import random
import socket
import time
from typing import Any

from simulation.loop import SimulatedLoop

EPOCH_S = 1_700_000_000
"""The time at which every simulated clock starts."""
PID = 4711
"""Clients tell it, and the sizes of frames stand in the transcript."""


def take_over(seed: int, loop: SimulatedLoop) -> None:
    """From now on nothing in this process reads a real clock or a real random number."""
    source = random.Random(f"entropy {seed}")
    original = random.Random

    class SeededRandom(original):  # type: ignore[misc,valid-type]
        def __init__(self, x: Any = None) -> None:
            super().__init__(source.getrandbits(64) if x is None else x)

    random.seed(f"module {seed}")
    random.Random = SeededRandom  # type: ignore[misc]
    os.urandom = source.randbytes
    os.getpid = lambda: PID
    socket.gethostname = lambda: "simulated"
    random._urandom = source.randbytes  # type: ignore[attr-defined]
    for name in ("monotonic", "perf_counter"):
        setattr(time, name, loop.time)
        setattr(time, f"{name}_ns", lambda: int(loop.time() * 1e9))
    time.time = lambda: EPOCH_S + loop.time()
    time.time_ns = lambda: int((EPOCH_S + loop.time()) * 1e9)
