"""A rebalancing while it is carried out: which copies to begin, which to take back, and how far it is. Pure.

An operation's moves stand in pages in the metadata store, so that whoever runs it next goes on where it stands. A move
becomes a copy task (`copies/<ledger>/<source>`), which the target's replicator carries out like every other one; what
came of it is read from the ledger's record, never remembered.

A step, in this order:

1. Of each target the first LOOK_MAX moves that are not done are looked at: with their tasks, and the records of the
   ledgers that something is to be decided about.
2. A move without a task, whose ledger names the target and no longer the source, is done. One that cannot be made any
   more is skipped, with the reason: the ledger was trimmed, somebody else moved the copy, the target is lost for good.
3. RUNNING: each target gets tasks for the next FEED_S seconds at the operation's rate. Moves that have to wait, for a
   ledger that is copied for another reason or for a target that has no session or no room, are passed over, and the
   operation says so.
4. PAUSED: tasks that nobody has claimed are taken back; claimed ones end as they will.
5. CANCELLED: all of its tasks are taken back, claims included. A move that is done stays done.
6. With no task left, and no move left to be made or no wish to make them, the operation has ended.

Tasks are only ever made for moves that are looked at, and moves only ever leave that list: no task is out of sight.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice

from magnetar.metadata.copy_txns import Stored, StoredTask, is_claim_of
from magnetar.metadata.records import BookieState, CopyReason, CopyTask, Move, MoveState, Operation, OperationState
from magnetar.repair.planner import Snapshot, objection
from magnetar.repair.progress import OperationProgress, Place

LOOK_MAX = 64
"""Moves of one target that are looked at in a step, and so the most tasks that it can have of an operation."""
FEED_S = 4.0
"""A target has tasks for so long: it must not run dry between two steps."""
FEED_TASKS_MIN = 2


@dataclass(frozen=True, slots=True)
class Observed:
    """What a step decides upon. Tasks are read before ledgers. `snapshot` needs no ledgers.

    given_up   lost bookies that were waited for long enough
    enabled    whether the cluster may begin copies at all
    tasks      all of the cluster
    ledgers    those of `to_read`, None = it does not exist
    """

    now_us: int
    snapshot: Snapshot
    given_up: Collection[str]
    enabled: bool
    tasks: Sequence[StoredTask]
    ledgers: Mapping[int, Stored | None]


@dataclass(slots=True)
class Step:
    """What is to be done now.

    create      tasks to make, each with its ledger as it was read
    take_back   tasks to delete, with their claims
    orphans     tasks to delete whose ledgers do not exist any more
    """

    create: list[tuple[Stored, CopyTask]] = field(default_factory=list)
    take_back: list[tuple[Stored, StoredTask]] = field(default_factory=list)
    orphans: list[StoredTask] = field(default_factory=list)


class RunningOperation(OperationProgress):
    """One operation that has not ended.

    _pending    of each target the places of the moves that are not done, in order
    _begun      places of moves that had a task, as last seen: what became of them is to be read
    """

    def __init__(self, operation: Operation, pages: Iterable[Sequence[Move]]) -> None:
        super().__init__(operation, pages)
        self._pending: dict[str, dict[Place, None]] = {}
        for place in self.pending_places():
            self._pending.setdefault(self.move(place).target, {})[place] = None
        # Whoever ran it before may have begun any of those that are looked at.
        self._begun = {place for places in self._looked_at().values() for place in places}

    def to_read(self, observed: Observed) -> list[int]:
        """The ledgers whose records the next step needs. Of `observed` all but the ledgers counts."""
        wanted: list[int] = []
        mine = self._mine(observed.tasks)
        for target, places in self._looked_at().items():
            feed = _Feed(self._feed_bytes())
            for place in places:
                move = self.move(place)
                task = mine.get(move.ledger_id)
                if task is not None:
                    feed.add(move.size_bytes)
                    if self.is_running and not _gone(target, observed):
                        continue
                elif place not in self._begun:
                    if not self.is_running or feed.is_full:
                        continue
                    feed.add(move.size_bytes)
                wanted.append(move.ledger_id)
        return wanted

    def step(self, observed: Observed) -> Step:
        """What to do now. Changes `operation` and `pages`: they are to be stored before anything of it is done."""
        step = Step()
        mine = self._mine(observed.tasks)
        others = {one.task.ledger_id for one in observed.tasks} - set(mine)
        begun: set[Place] = set()
        problems: list[str] = []
        for target, places in self._looked_at().items():
            problems += self._look_at(target, places, mine, others, observed, step)
            begun.update(place for place in places if self.move(place).ledger_id in mine)
        made = {task.ledger_id for _, task in step.create}
        looked_at = [place for places in self._looked_at().values() for place in places]
        self._begun = begun.union(place for place in looked_at if self.move(place).ledger_id in made)
        self.keep(observed.now_us, problems if self.is_running else [])
        if not mine and not made and (self.is_cancelled or not any(self._pending.values())):
            self.end(observed.now_us)
        return step

    def _look_at(
        self,
        target: str,
        places: Sequence[Place],
        mine: Mapping[int, StoredTask],
        others: Collection[int],
        observed: Observed,
        step: Step,
    ) -> list[str]:
        """Judges these moves to one target; returns why they do not go on."""
        problems: list[str] = []
        waits = _waits(target, observed)
        feed = _Feed(self._feed_bytes())
        for place in places:
            move = self.move(place)
            task = mine.get(move.ledger_id)
            if task is not None:
                feed.add(move.size_bytes)
                problems += [f"ledger {move.ledger_id}: {task.task.problem}"] if task.task.problem else []
                self._look_at_task(move, task, observed, step)
            elif move.ledger_id in observed.ledgers:
                ledger = observed.ledgers[move.ledger_id]
                if self._settle(place, ledger, observed) or not self.is_running or ledger is None:
                    continue
                if move.ledger_id in others or ledger.record.copy is not None:
                    problems.append(f"ledger {move.ledger_id}: a copy of it is being made for another reason")
                elif not waits and not feed.is_full:
                    step.create.append((ledger, self._task(move, observed.now_us)))
                    feed.add(move.size_bytes)
        return [waits, *problems] if waits else problems

    def _look_at_task(self, move: Move, task: StoredTask, observed: Observed, step: Step) -> None:
        if move.ledger_id not in observed.ledgers:
            return
        ledger = observed.ledgers[move.ledger_id]
        if ledger is None:
            step.orphans.append(task)
        elif (
            self.is_cancelled
            or _gone(move.target, observed)
            or (self.operation.state is OperationState.PAUSED and not is_claim_of(ledger.record, task.task))
        ):
            step.take_back.append((ledger, task))

    def _settle(self, place: Place, ledger: Stored | None, observed: Observed) -> bool:
        """Whether a move without a task is done, or cannot be made any more."""
        move = self.move(place)
        if ledger is None:
            return self._finish(place, MoveState.SKIPPED, "the ledger was trimmed or deleted")
        named = ledger.record.bookies()
        if move.source not in named:
            if move.target in named:
                return self._finish(place, MoveState.DONE, "")
            reason = f"{move.source} has no copy of it any more: somebody else moved or repaired it"
            return self._finish(place, MoveState.SKIPPED, reason)
        reason = _gone(move.target, observed)
        if not reason and ledger.record.copy is None and not _waits(move.target, observed):
            reason = objection(observed.snapshot, ledger.record, move.source, move.target)
        return bool(reason) and self._finish(place, MoveState.SKIPPED, reason)

    def _feed_bytes(self) -> float:
        """That each target should have before it."""
        targets = sum(1 for places in self._pending.values() if places)
        return FEED_S * self.operation.bytes_per_s / max(1, targets)

    def _task(self, move: Move, now_us: int) -> CopyTask:
        return CopyTask(
            ledger_id=move.ledger_id,
            place=move.source,
            target=move.target,
            reason=CopyReason.REBALANCE,
            operation=self.operation.operation_id,
            created_us=now_us,
        )

    # The moves.

    def _looked_at(self) -> dict[str, list[Place]]:
        return {target: list(islice(places, LOOK_MAX)) for target, places in self._pending.items() if places}

    def _mine(self, tasks: Iterable[StoredTask]) -> dict[int, StoredTask]:
        name = self.operation.operation_id
        return {one.task.ledger_id: one for one in tasks if one.task.operation == name}

    def _finish(self, place: Place, state: MoveState, reason: str) -> bool:
        self.finish(place, state, reason)
        del self._pending[self.move(place).target][place]
        return True


def _gone(target: str, observed: Observed) -> str:
    """Why the target will not take what it should, in words; empty if it may yet."""
    bookie = observed.snapshot.bookies.get(target)
    if bookie is None:
        return f"{target} is lost" if target in observed.given_up else ""
    if not observed.snapshot.is_counted(target):
        return f"{target} is draining"
    return ""


def _waits(target: str, observed: Observed) -> str:
    """Why nothing new can begin at the target now, in words; empty if it can."""
    if not observed.enabled:
        return "repair is switched off, and no copy is begun: `magnetar cluster repair --on`"
    bookie = observed.snapshot.bookies.get(target)
    if bookie is None:
        return f"{target} has no session: its moves wait for it"
    if bookie.state is BookieState.READ_ONLY:
        return f"{target} is read-only: its moves wait for room on its disk"
    return ""


class _Feed:
    """The tasks that one target has or gets in a step."""

    def __init__(self, bytes_max: float) -> None:
        self._bytes_max = bytes_max
        self._tasks = 0
        self._bytes = 0

    def add(self, size_bytes: int) -> None:
        self._tasks += 1
        self._bytes += size_bytes

    @property
    def is_full(self) -> bool:
        return self._tasks >= FEED_TASKS_MIN and self._bytes >= self._bytes_max
