"""Numbers in what operators read."""

from __future__ import annotations

from collections.abc import Iterable

NAMED_MAX = 3
REASONS_MAX = 20


def number_of(number: int, noun: str) -> str:
    """1, "ledger" -> "1 ledger"; 2 -> "2 ledgers"."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def by_reason(problems: Iterable[tuple[str, int, str]]) -> list[str]:
    """What is wrong with things, each a noun, its number and the reason, in words: one line a reason.

    ("ledger", 4, "it is busy"), ("ledger", 3, "it is busy") -> ["ledgers 4, 3: it is busy"]. Of one reason the first
    NAMED_MAX are named, and the others counted; so it is with reasons beyond REASONS_MAX.
    """
    numbers: dict[tuple[str, str], list[int]] = {}
    for noun, number, reason in problems:
        numbers.setdefault((noun, reason), []).append(number)
    lines = [f"{_named(noun, same)}: {reason}" for (noun, reason), same in numbers.items()]
    if len(lines) > REASONS_MAX:
        return [*lines[:REASONS_MAX], f"and for {number_of(len(lines) - REASONS_MAX, 'more reason')}"]
    return lines


def _named(noun: str, numbers: list[int]) -> str:
    if len(numbers) == 1:
        return f"{noun} {numbers[0]}"
    named = ", ".join(map(str, numbers[:NAMED_MAX]))
    more = f" and {len(numbers) - NAMED_MAX:,} more" if len(numbers) > NAMED_MAX else ""
    return f"{noun}s {named}{more}"
