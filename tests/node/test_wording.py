"""Words that operators read."""

from __future__ import annotations

from magnetar.node.wording import REASONS_MAX, by_reason, number_of


def test_numbers() -> None:
    assert number_of(1, "ledger") == "1 ledger"
    assert number_of(1200, "ledger") == "1,200 ledgers"


def test_things_with_one_reason_share_a_line() -> None:
    problems = [("ledger", 4, "busy"), ("ledger", 3, "gone"), ("ledger", 2, "busy"), ("shard", 2, "busy")]
    assert by_reason(problems) == ["ledgers 4, 2: busy", "ledger 3: gone", "shard 2: busy"]
    assert by_reason([("ledger", number, "gone") for number in range(1, 2004)]) == [
        "ledgers 1, 2, 3 and 2,000 more: gone"
    ]
    assert by_reason([]) == []


def test_of_many_reasons_the_first_are_told() -> None:
    told = by_reason(("ledger", number, f"because {number}") for number in range(REASONS_MAX + 2))
    assert len(told) == REASONS_MAX + 1
    assert told[-1] == "and for 2 more reasons"
