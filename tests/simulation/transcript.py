"""What happened in a run, in order: the same for the same seed, to the last byte."""

from __future__ import annotations

import hashlib
from collections.abc import Callable

TAIL_LINES = 120


class Transcript:
    """Lines are tuples until somebody reads them: most runs only hash them."""

    def __init__(self, now: Callable[[], float]) -> None:
        self._now = now
        self._lines: list[tuple[object, ...]] = []

    def note(self, *words: object) -> None:
        self._lines.append((self._now(), *words))

    def __len__(self) -> int:
        return len(self._lines)

    def digest(self) -> str:
        return hashlib.sha256(repr(self._lines).encode()).hexdigest()[:16]

    def tail(self, lines: int = TAIL_LINES) -> str:
        return "\n".join(_line(line) for line in self._lines[-lines:])


def _line(words: tuple[object, ...]) -> str:
    now, *others = words
    return f"{now:11.5f}  " + " ".join(str(word) for word in others)
