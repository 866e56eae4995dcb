"""What the records of a cluster say about its health."""

from __future__ import annotations

from magnetar.broker.health import Findings
from magnetar.metadata.records import (
    BookieRegistration,
    BookieState,
    Fragment,
    LedgerPurpose,
    LedgerRecord,
    LedgerState,
)

RACKS = {"a": "r1", "b": "r1", "c": "r2", "d": "r3"}


def ledger(number: int, bookies: str, state: LedgerState = LedgerState.CLOSED) -> LedgerRecord:
    fragments = (Fragment(0, tuple(bookies)),)
    return LedgerRecord(number, 1, LedgerPurpose.DATA, state, 1, b"token", 3, 2, fragments, last_entry=9, length=100)


def findings(state_of_d: BookieState = BookieState.WRITABLE) -> Findings:
    """Of a cluster in which all ledgers but one miss the third rack."""
    found = Findings(
        {
            name: BookieRegistration(name, name, rack, state_of_d if name == "d" else BookieState.WRITABLE)
            for name, rack in RACKS.items()
        },
        sessions=(),
    )
    for record in (ledger(1, "abc"), ledger(2, "bac"), ledger(3, "bcd"), ledger(4, "abc", LedgerState.OPEN)):
        found.ledger(record)
    return found


def test_closed_ledgers_that_could_stand_in_more_racks_are_a_notice_and_no_problem() -> None:
    assert findings().problems(3) == []
    assert findings().notices() == [
        "2 closed ledgers in fewer racks than possible: `magnetar rebalance plan` says what wins them back"
    ]


def test_a_rack_that_is_being_emptied_or_away_is_missed_by_nobody() -> None:
    assert findings(BookieState.DRAINING).notices() == []
    lost = Findings({name: BookieRegistration(name, name, rack) for name, rack in RACKS.items() if name != "d"}, ())
    lost.ledger(ledger(1, "abc"))
    lost.ledger(ledger(2, "abd"))
    assert lost.notices() == []
