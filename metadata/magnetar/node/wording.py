"""Numbers in what operators read."""

from __future__ import annotations


def number_of(number: int, noun: str) -> str:
    """1, "ledger" -> "1 ledger"; 2 -> "2 ledgers"."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"
