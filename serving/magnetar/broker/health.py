"""The state of a cluster, judged by its records: which ledgers miss a bookie, which shards nobody can serve.

A bookie without a session counts as missing. That is not yet a loss: it may come back, or be replaced. One that started
again with an empty directory lives, and lacks every ledger that it is still to complete.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

from magnetar.ledger.placement import lacks_racks
from magnetar.metadata.records import (
    VACANT,
    BookieRegistration,
    BookieState,
    CopyTask,
    LedgerRecord,
    LedgerState,
    Owner,
    ShardRecord,
)
from magnetar.node.wording import number_of

NAMED_PROBLEMS_MAX = 20
"""Of one kind named one by one; the rest is counted."""

REPAIR_IS_OFF = "repair is switched off, and no copy is made anew: `magnetar cluster repair --on`"


@dataclass(slots=True)
class Findings:
    """Takes all records of a cluster, one by one. `bookies` and `sessions` are those that live."""

    bookies: Mapping[str, BookieRegistration]
    sessions: Collection[Owner]
    repairs: bool = True
    """Repair is switched on."""
    under_replicated: set[int] = field(default_factory=set)
    vacant: int = 0
    lost_bookies: Counter[str] = field(default_factory=Counter)
    refilled: Counter[str] = field(default_factory=Counter)
    """Bookies that lost their directory, and how many ledgers each is to complete."""
    orphans: dict[str, set[int]] = field(default_factory=dict)
    unreadable: dict[int, set[int]] = field(default_factory=dict)
    halted: dict[int, set[str]] = field(default_factory=dict)
    """Shards whose open ledger takes nothing, and the bookies that it misses."""
    lacking_racks: int = 0
    """Closed ledgers that stand in fewer racks than they could."""
    _racks: dict[str, str] = field(init=False)

    def __post_init__(self) -> None:
        self._racks = {b.bookie_id: b.rack for b in self.bookies.values() if b.state is not BookieState.DRAINING}

    def ledger(self, record: LedgerRecord) -> None:
        missing = {bookie for bookie in record.bookies() if bookie not in self.bookies}
        vacant = any(bookie == VACANT for fragment in record.fragments for bookie in fragment.bookies)
        self.lost_bookies.update(missing)
        self.vacant += vacant
        if missing or vacant:
            self.under_replicated.add(record.ledger_id)
        if any(not any(bookie in self.bookies for bookie in fragment.bookies) for fragment in record.fragments):
            self.unreadable.setdefault(record.shard_id, set()).add(record.ledger_id)
        members = record.fragments[-1].bookies
        living = sum(bookie in self.bookies for bookie in members)
        if record.state is LedgerState.OPEN and living < record.ack_quorum:
            self.halted.setdefault(record.shard_id, set()).update({*members} - {VACANT} - {*self.bookies})
        self.lacking_racks += record.state is LedgerState.CLOSED and lacks_racks(record, self._racks)

    def copy(self, task: CopyTask) -> None:
        bookie = self.bookies.get(task.place)
        if bookie is not None and task.completes and task.ledger_id < bookie.ledger_floor:
            self.refilled[task.place] += 1
            self.under_replicated.add(task.ledger_id)

    def shard(self, record: ShardRecord) -> None:
        if record.owner is not None and record.owner not in self.sessions:
            self.orphans.setdefault(record.owner.broker_id, set()).add(record.shard_id)

    @property
    def unavailable_shards(self) -> int:
        return len(set(self.unreadable).union(self.halted, *self.orphans.values()))

    def problems(self, ensemble_size: int) -> list[str]:
        """What is wrong, in words, each with what to do about it; empty = nothing."""
        return [
            *self._bookie_problems(ensemble_size),
            *([REPAIR_IS_OFF] if self.under_replicated and not self.repairs else []),
            *_limited([_unreadable(shard, ledgers) for shard, ledgers in sorted(self.unreadable.items())], "shard"),
            *_limited([_halted(shard, bookies) for shard, bookies in sorted(self.halted.items())], "shard"),
            *(
                f"broker {broker} has no session and owns {number_of(len(shards), 'shard')}: the other brokers take "
                "over now; start it again"
                for broker, shards in sorted(self.orphans.items())
            ),
        ]

    def notices(self) -> list[str]:
        """What is well enough, and could be better, in words, each with what to do about it."""
        if not self.lacking_racks:
            return []
        return [
            f"{number_of(self.lacking_racks, 'closed ledger')} in fewer racks than possible: "
            "`magnetar rebalance plan` says what wins them back"
        ]

    def _bookie_problems(self, ensemble_size: int) -> list[str]:
        leave_it = ""
        if self.repairs:
            leave_it = ", or leave it: repair makes its part anew on others, see `magnetar cluster repair`"
        problems = _limited(
            [
                f"bookie {bookie} has no session and is named by {number_of(ledgers, 'ledger')}: start it "
                f"again{leave_it}; if its disk is lost, without a spare, start it with an empty directory and "
                f"--repair-bookie {bookie}"
                for bookie, ledgers in sorted(self.lost_bookies.items())
            ],
            "bookie",
        )
        problems += _limited(
            [
                f"bookie {bookie} started with an empty directory and is still to get {number_of(ledgers, 'ledger')} "
                "or more: wait, and stop no other bookie; `magnetar cluster repair` shows how it goes on"
                for bookie, ledgers in sorted(self.refilled.items())
            ],
            "bookie",
        )
        read_only = sorted(b.bookie_id for b in self.bookies.values() if b.state is BookieState.READ_ONLY)
        problems.extend(
            _limited([f"bookie {b} is read-only: free space on its disk, or add bookies" for b in read_only], "bookie")
        )
        writable = sum(1 for b in self.bookies.values() if b.state is BookieState.WRITABLE)
        if self.vacant:
            waiting = "wait, they are completed within minutes" if writable >= ensemble_size else "start more bookies"
            problems.append(f"{number_of(self.vacant, 'ledger')} with fewer copies than wanted: {waiting}")
        if writable < ensemble_size:
            problems.append(
                f"new ledgers want {number_of(ensemble_size, 'writable bookie')}, and there are {writable}: start "
                f"{ensemble_size - writable} more"
            )
        return problems


def _halted(shard: int, bookies: set[str]) -> str:
    missing = f"start {', '.join(sorted(bookies))} again" if bookies else "start more bookies"
    return f"shard {shard}: publishing stands still, fewer bookies live than must acknowledge an entry: {missing}"


def _unreadable(shard_id: int, ledgers: Collection[int]) -> str:
    unreadable = number_of(len(ledgers), "ledger")
    return f"shard {shard_id} has {unreadable} of which no copy can be reached: start the bookies again"


def _limited(problems: list[str], kind: str) -> list[str]:
    if len(problems) <= NAMED_PROBLEMS_MAX:
        return problems
    more = number_of(len(problems) - NAMED_PROBLEMS_MAX, f"more {kind}")
    return [*problems[:NAMED_PROBLEMS_MAX], f"and {more} like these"]
