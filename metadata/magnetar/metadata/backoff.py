"""How long to wait before asking a silent or contended store again. Pure."""

from __future__ import annotations

import random

FIRST_S = 0.02
MAX_S = 2.0
GROWTH = 2.0


class Backoff:
    """Grows from FIRST_S to MAX_S; each delay is drawn from its upper half, so that the many do not come as one."""

    __slots__ = ("_ceiling_s", "_rng")

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng
        self._ceiling_s = FIRST_S

    def next_s(self) -> float:
        ceiling_s = self._ceiling_s
        self._ceiling_s = min(MAX_S, ceiling_s * GROWTH)
        return ceiling_s * (0.5 + self._rng.random() / 2)
