"""What the auditor decides about one complete look at the cluster. Pure.

Bookies:

1. A bookie with a cookie and without a session is lost. One that is lost alone is waited for (`delay_s`); when a second
   one that holds data is lost, nobody is waited for any more. A bookie that was given up stays so until it is back.
2. The parts of a given-up bookie are to be made anew on others, those of a draining one to be moved away.

Tasks. A place must go (LOST, DRAINING, or because a rebalancing moves it) or may stay:

3. One that must go is assigned to a bookie in another rack than the other members will be in when the ledger's other
   tasks are done; of these, or where there is none of all, to one that takes most of its fragments; of these by free
   space. Without a bookie that can take it the task waits and says so; while those that should have enough to do, too.
4. A target that is lost, drained or full is replaced. A rebalancing's move is given up instead: its plan is obsolete.
5. One that may stay after all (it is back, or not drained any more) keeps its part, and its task ends: unless it is
   known to miss entries, or came back with an empty disk. Then it is completed.
6. With repair switched off nothing is created or assigned; what is not needed any more still ends.

Of these tasks there are at most TASKS_MAX, and TARGET_TASKS_MAX for one target: what is left to do stands in the index,
and is looked at again as tasks end. So a lost bookie of a million ledgers floods nothing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from magnetar.ledger.placement import Randomness, choose_replacements
from magnetar.metadata.copy_txns import names, takes
from magnetar.metadata.records import (
    NO_ENTRY,
    VACANT,
    BookieRegistration,
    BookieState,
    CopyReason,
    CopyTask,
    LedgerRecord,
    Loss,
    RepairSettings,
)

TASKS_MAX = 512
TARGET_TASKS_MAX = 64
REASSIGN_US = 10_000_000
"""A target without a session is waited for so long: what it has copied is not thrown away for a restart."""
WANTING = frozenset({CopyReason.LOST, CopyReason.UNREPLICATED, CopyReason.SCRUB})
"""Reasons of ledgers that have fewer copies than they should."""
_MADE_HERE = frozenset({CopyReason.LOST, CopyReason.DRAINING})
NOBODY = "no bookie can take it: start another one, or free space"


@dataclass(frozen=True, slots=True)
class Cluster:
    """One look, complete.

    bookies   those with a session
    known     those with a cookie
    holding   of the known ones without a session: those that some ledger names
    """

    bookies: Mapping[str, BookieRegistration]
    known: frozenset[str]
    holding: frozenset[str]
    drains: frozenset[str]
    losses: Mapping[str, Loss]
    settings: RepairSettings
    now_us: int

    @property
    def racks(self) -> dict[str, str]:
        """Of the bookies that are not to be emptied."""
        return {name: bookie.rack for name, bookie in self.bookies.items() if name not in self.drains}

    @property
    def missing(self) -> frozenset[str]:
        return self.known - self.bookies.keys()


# Bookies.


def judge_losses(cluster: Cluster) -> dict[str, Loss]:
    """The losses as they shall stand; who is not in it is not lost."""
    at_once = len(cluster.missing & cluster.holding) > 1
    return {bookie: _loss(cluster, bookie, at_once) for bookie in cluster.missing}


def _loss(cluster: Cluster, bookie: str, at_once: bool) -> Loss:
    known = cluster.losses.get(bookie)
    # A clock that was set back must not prolong the delay by as much.
    since_us = cluster.now_us if known is None else min(known.since_us, cluster.now_us)
    if known is not None and known.given_up:
        return replace(known, since_us=since_us)
    waited = cluster.now_us - since_us >= cluster.settings.delay_s * 1_000_000
    return Loss(bookie, since_us, given_up=cluster.settings.enabled and (waited or at_once))


def next_due_us(cluster: Cluster) -> int | None:
    """When the next bookie is given up if nothing changes."""
    waiting = [loss.since_us for loss in judge_losses(cluster).values() if not loss.given_up]
    if not waiting or not cluster.settings.enabled:
        return None
    return min(waiting) + int(cluster.settings.delay_s * 1_000_000)


def emptied(cluster: Cluster) -> dict[str, CopyReason]:
    """The bookies whose parts must go, and why."""
    reasons = dict.fromkeys(cluster.drains, CopyReason.DRAINING)
    given_up = (bookie for bookie, loss in cluster.losses.items() if loss.given_up)
    return {**reasons, **dict.fromkeys(given_up, CopyReason.LOST)}


# Tasks.


def load_of(tasks: Iterable[CopyTask]) -> Counter[str]:
    """How many copies each target must take over. What it completes of its own comes with closes, not from here, and
    what a rebalancing wants of it comes after these: it may itself wait for them."""
    must = (task for task in tasks if task.target and not task.completes)
    return Counter(task.target for task in must if task.reason is not CopyReason.REBALANCE)


def room_for(tasks: Iterable[CopyTask]) -> int:
    """So many tasks more may be made. Those of others, however many, do not keep a lost bookie from being replaced."""
    return max(0, TASKS_MAX - sum(task.reason in _MADE_HERE for task in tasks))


def needs_decision(cluster: Cluster, task: CopyTask) -> bool:
    """False: it is as `decide` would leave it, whatever its ledger's record says."""
    reason = _reason(cluster, task)
    if reason is None:
        return not task.completes
    return task.completes or task.reason is not reason or not _is_usable(cluster, task)


def decide(
    cluster: Cluster,
    task: CopyTask,
    record: LedgerRecord,
    load: Counter[str],
    rng: Randomness,
    others: Sequence[CopyTask] = (),
) -> CopyTask | None:
    """The task as it shall be; None = there is nothing to do. `load` counts what is assigned here.

    others   the ledger's other tasks
    """
    if not names(record, task.place):
        return None
    reason = _reason(cluster, task)
    if reason is None:
        return _completion(cluster, task, record)
    if reason is not CopyReason.REBALANCE:
        # What must be copied is not held up by the throttle, a pause or the end of a rebalancing.
        task = replace(task, operation="")
    if not task.completes and _is_usable(cluster, task) and takes(record, task.place, task.target):
        return replace(task, reason=reason)
    if reason is CopyReason.REBALANCE:
        return _completion(cluster, task, record)
    return _assigned(cluster, replace(task, reason=reason), record, load, rng, others)


def new_task(
    cluster: Cluster,
    record: LedgerRecord,
    place: str,
    reason: CopyReason,
    load: Counter[str],
    rng: Randomness,
    others: Sequence[CopyTask] = (),
) -> CopyTask:
    """For a place that must go, or is vacant. `others`: the ledger's other tasks."""
    task = CopyTask(record.ledger_id, place, "", reason, created_us=cluster.now_us)
    return _assigned(cluster, task, record, load, rng, others)


def _reason(cluster: Cluster, task: CopyTask) -> CopyReason | None:
    """Why the place must go; None = it may stay."""
    if task.place == VACANT:
        return CopyReason.UNREPLICATED
    must_go = _must_go(cluster, task.place)
    if must_go is None and task.reason is CopyReason.REBALANCE:
        return CopyReason.REBALANCE
    return must_go


def _must_go(cluster: Cluster, bookie: str) -> CopyReason | None:
    loss = cluster.losses.get(bookie)
    if (loss is not None and loss.given_up) or is_unknown(cluster, bookie):
        return CopyReason.LOST
    return CopyReason.DRAINING if bookie in cluster.drains else None


def is_unknown(cluster: Cluster, bookie: str) -> bool:
    """It has neither cookie nor session: it will not be back."""
    return bookie not in cluster.known and bookie not in cluster.bookies


def _is_usable(cluster: Cluster, task: CopyTask) -> bool:
    """The task has a target that can be left to it."""
    target = cluster.bookies.get(task.target)
    if target is None:
        loss = cluster.losses.get(task.target)
        # Without a loss on record it was lost just now, or never existed: then it has no cookie either.
        is_waited_for = loss is not None and not loss.given_up and cluster.now_us - loss.since_us < REASSIGN_US
        return is_waited_for and task.target not in cluster.drains
    is_full = target.state is BookieState.READ_ONLY and task.problem != ""
    return task.target not in cluster.drains and not is_full


def _completion(cluster: Cluster, task: CopyTask, record: LedgerRecord) -> CopyTask | None:
    """The place keeps its part: what it is known to miss, or all of it if its disk was lost, is to be completed."""
    if task.completes:
        return task
    bookie = cluster.bookies.get(task.place)
    reborn = bookie is not None and task.ledger_id < bookie.ledger_floor
    if record.last_entry == NO_ENTRY or (task.last_entry == NO_ENTRY and not reborn):
        return None
    first, last = (0, record.last_entry) if reborn else (task.first_entry, task.last_entry)
    return CopyTask(
        task.ledger_id,
        task.place,
        task.place,
        CopyReason.UNREPLICATED,
        first_entry=first,
        last_entry=last,
        created_us=task.created_us,
    )


def _assigned(
    cluster: Cluster,
    task: CopyTask,
    record: LedgerRecord,
    load: Counter[str],
    rng: Randomness,
    others: Sequence[CopyTask],
) -> CopyTask:
    if not cluster.settings.enabled:
        return replace(task, target="", problem="")
    able = [bookie for bookie in _able(cluster) if takes(record, task.place, bookie.bookie_id)]
    best = _best(cluster, task.place, record, able, others)
    free = [bookie for bookie in best if load[bookie.bookie_id] < TARGET_TASKS_MAX]
    if not free:
        return replace(task, target="", problem="" if able else NOBODY)
    target = _choose(cluster, task.place, record, free, rng)
    load[target] += 1
    return replace(task, target=target, problem="")


def _able(cluster: Cluster) -> list[BookieRegistration]:
    """Those that take copies. A floor keeps a bookie from new entries of old ledgers only."""
    return [
        replace(bookie, ledger_floor=0)
        for bookie in cluster.bookies.values()
        if bookie.state is BookieState.WRITABLE and bookie.bookie_id not in cluster.drains
    ]


def _best(
    cluster: Cluster, place: str, record: LedgerRecord, able: list[BookieRegistration], others: Sequence[CopyTask]
) -> list[BookieRegistration]:
    """Those that stand beside no other member of their rack, or all; of these, those that take most fragments."""
    leaving = {place, *emptied(cluster), *(task.place for task in others)}
    joining = {task.target for task in others}

    def rank(bookie: BookieRegistration) -> tuple[bool, int, int]:
        taken = takes(record, place, bookie.bookie_id)
        members = [(set(record.fragments[position].bookies) - leaving) | joining for position in taken]
        racks = [{cluster.bookies[name].rack for name in names if name in cluster.bookies} for names in members]
        shared = sum(bookie.rack in some for some in racks)
        return shared > 0, -len(taken), shared

    ranks = [rank(bookie) for bookie in able]
    best = min(ranks, default=None)
    return [bookie for bookie, its in zip(able, ranks, strict=True) if its == best]


def _choose(cluster: Cluster, place: str, record: LedgerRecord, free: list[BookieRegistration], rng: Randomness) -> str:
    """Whom the rules of placement prefer in the first fragment that all of these take."""
    best = {bookie.bookie_id: bookie for bookie in free}
    fragment = record.fragments[takes(record, place, min(best))[0]]
    # All registrations go in, for the racks of the other members; the rest is avoided.
    registered = [best.get(bookie_id, bookie) for bookie_id, bookie in cluster.bookies.items()]
    chosen = choose_replacements(
        fragment.bookies,
        [fragment.bookies.index(place)],
        registered,
        record.ledger_id,
        rng,
        avoid=cluster.bookies.keys() - best.keys(),
    )
    return next(iter(chosen.values()))


# What a look at all records finds.


def places_in_need(cluster: Cluster, record: LedgerRecord) -> dict[str, CopyReason]:
    """The places of a closed ledger that a task is to be made for; bookies that nobody knows are lost for good."""
    found: dict[str, CopyReason] = {}
    for place in sorted({bookie for fragment in record.fragments for bookie in fragment.bookies}):
        reason = CopyReason.UNREPLICATED if place == VACANT else _must_go(cluster, place)
        if reason is not None:
            found[place] = reason
    return found
