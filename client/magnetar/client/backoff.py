"""How long to wait before the next attempt: doubling, with jitter, bounded. Pure: randomness is an argument."""

from __future__ import annotations

from collections.abc import Callable

FIRST_DELAY_S = 0.02
DELAY_S_MAX = 2.0


class Delays:
    """The waits between attempts at one thing. `reset` when an attempt got somewhere.

    uniform   a number drawn evenly from 0 to 1
    """

    __slots__ = ("_attempts", "_first_s", "_max_s", "_uniform")

    def __init__(
        self, uniform: Callable[[], float], *, first_s: float = FIRST_DELAY_S, max_s: float = DELAY_S_MAX
    ) -> None:
        self._uniform = uniform
        self._first_s = first_s
        self._max_s = max_s
        self._attempts = 0

    def next_s(self, *, at_least_s: float = 0.0, at_once: bool = False) -> float:
        """Seconds to wait now: between half and all of a bound that doubles with each attempt, up to the maximum.

        at_once      the first attempt after a success needs no wait: the broker told where to go
        at_least_s   what the broker asked for, itself bounded by the maximum
        """
        attempts = self._attempts
        self._attempts += 1
        if at_once and attempts == 0:
            return 0.0
        # The exponent is bounded: a float overflows after a thousand attempts.
        bound_s = min(self._max_s, self._first_s * 2.0 ** min(attempts, 30))
        return max(min(at_least_s, self._max_s), bound_s * (0.5 + 0.5 * self._uniform()))

    def reset(self) -> None:
        self._attempts = 0
