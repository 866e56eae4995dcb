"""A rebalancing step by step: what is begun and taken back, what is skipped and why, and that it ends."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from hypothesis import given, settings
from hypothesis import strategies as st

from magnetar.metadata.copy_txns import Stored, StoredTask, moved
from magnetar.metadata.records import (
    BookieRegistration,
    BookieState,
    CopyClaim,
    CopyReason,
    CopyTask,
    Fragment,
    Goal,
    LedgerPurpose,
    LedgerRecord,
    LedgerState,
    Move,
    MoveState,
    Operation,
    OperationState,
)
from magnetar.repair.operations import LOOK_MAX, Observed, RunningOperation, Step
from magnetar.repair.planner import Snapshot
from magnetar.repair.progress import NEGLECTED_US, PROBLEMS_MAX, neglected, paged, reverse

MIB = 1 << 20
REVISION = 5


def ledger(number: int, bookies: Iterable[str] = "abc") -> LedgerRecord:
    return LedgerRecord(
        number, 1, LedgerPurpose.DATA, LedgerState.CLOSED, 1, b"token", 3, 2, (Fragment(0, tuple(bookies)),),
        last_entry=9, length=MIB,
    )  # fmt: skip


@dataclass
class World:
    """A metadata store, and bookies whose replicators do what the test says."""

    operation: Operation
    pages: list[list[Move]]
    ledgers: dict[int, LedgerRecord]
    tasks: dict[int, CopyTask] = field(default_factory=dict)
    bookies: dict[str, BookieRegistration] = field(default_factory=dict)
    draining: set[str] = field(default_factory=set)
    given_up: set[str] = field(default_factory=set)
    enabled: bool = True
    now_us: int = 1_000_000
    runner: RunningOperation | None = None

    @classmethod
    def of(cls, count: int, *, bytes_per_s: int = 1 * MIB, targets: str = "d") -> World:
        moves = [Move(n, "a", targets[n % len(targets)], MIB) for n in range(1, count + 1)]
        operation = Operation(
            "rebalance-1", Goal.BYTES, OperationState.RUNNING, bytes_per_s, REVISION, count, count * MIB, 1, b"mark"
        )
        bookies = {name: BookieRegistration(name, f"{name}:1") for name in "abc" + targets}
        pages = [list(page) for page in paged(moves)]
        return cls(operation, pages, {n: ledger(n) for n in range(1, count + 1)}, bookies=bookies)

    def observed(self) -> Observed:
        tasks = [StoredTask(task, 1) for task in self.tasks.values()]
        snapshot = Snapshot(9, self.bookies, {}, (), {}, self.draining)
        seen = Observed(self.now_us, snapshot, self.given_up, self.enabled, tasks, {})
        assert self.runner is not None
        found = {n: self.ledgers.get(n) for n in self.runner.to_read(seen)}
        return replace(seen, ledgers={n: None if one is None else Stored(one, 1) for n, one in found.items()})

    def step(self) -> Step:
        """One pass of the runner, all of it carried out."""
        self.now_us += 500_000
        if self.runner is None:
            self.runner = RunningOperation(self.operation, self.pages)
        step = self.runner.step(self.observed())
        self.operation, self.pages = self.runner.operation, [list(page) for page in self.runner.pages]
        self.runner.changed.clear()
        for stored, task in step.create:
            assert task.ledger_id not in self.tasks
            assert stored.record == self.ledgers[task.ledger_id]
            self.tasks[task.ledger_id] = task
        for stored, taken in step.take_back:
            self.ledgers[taken.task.ledger_id] = replace(stored.record, copy=None)
            del self.tasks[taken.task.ledger_id]
        for orphan in step.orphans:
            del self.tasks[orphan.task.ledger_id]
        return step

    def crash(self) -> None:
        self.runner = None

    def become(self, state: OperationState) -> None:
        self.operation = replace(self.operation, state=state)
        self.crash()

    def claim(self, number: int) -> None:
        task = self.tasks[number]
        self.ledgers[number] = replace(self.ledgers[number], copy=CopyClaim(task.target, task.place, b"m"))

    def copy(self, *numbers: int) -> None:
        for number in numbers:
            task = self.tasks.pop(number)
            self.ledgers[number] = moved(self.ledgers[number], task.place, task.target)

    def moves(self) -> list[Move]:
        return [move for page in self.pages for move in page]

    def states(self) -> str:
        return "".join(move.state.name[0] for move in self.moves())

    def reason(self, number: int) -> str:
        return next(move.reason for move in self.moves() if move.ledger_id == number)


def test_a_target_gets_as_much_as_it_copies_until_it_is_looked_at_again_and_no_more() -> None:
    world = World.of(100)
    assert [task.ledger_id for _, task in world.step().create] == [1, 2, 3, 4]
    assert world.step().create == []
    world.copy(1, 2)
    world.step()
    world.step()
    assert set(world.tasks) == {3, 4, 5, 6}
    assert all(t.reason is CopyReason.REBALANCE and t.operation == "rebalance-1" for t in world.tasks.values())
    slow = World.of(100, bytes_per_s=10)
    assert len(slow.step().create) == 2
    fast = World.of(100, bytes_per_s=1 << 40)
    assert len(fast.step().create) == LOOK_MAX


def test_the_rate_is_shared_by_the_targets_that_have_something_to_do() -> None:
    world = World.of(100, bytes_per_s=2 * MIB, targets="de")
    assert [task.target for _, task in world.step().create] == list("eeee" + "dddd")


def test_it_ends_when_every_move_is_done_and_counts_what_was_moved() -> None:
    world = World.of(5)
    for _ in range(10):
        world.step()
        world.copy(*list(world.tasks))
    assert (world.operation.state, world.states()) == (OperationState.DONE, "DDDDD")
    assert (world.operation.moves_done, world.operation.bytes_done) == (5, 5 * MIB)
    assert world.operation.ended_us


def test_whoever_runs_it_next_goes_on_where_it_stands() -> None:
    world = World.of(8)
    world.step()
    world.copy(1, 3)
    world.crash()
    world.step()
    world.step()
    assert world.states() == "DPDPPPPP"
    assert set(world.tasks) == {2, 4, 5, 6}


def test_paused_it_begins_nothing_and_lets_claimed_copies_end() -> None:
    world = World.of(8)
    world.step()
    world.claim(1)
    world.become(OperationState.PAUSED)
    world.step()
    assert set(world.tasks) == {1}
    world.copy(1)
    assert not world.step().create
    assert world.states() == "DPPPPPPP"
    world.become(OperationState.RUNNING)
    assert [task.ledger_id for _, task in world.step().create] == [2, 3, 4, 5]


def test_cancelled_it_takes_back_what_is_not_done_claims_too() -> None:
    world = World.of(8)
    world.step()
    world.claim(1)
    world.copy(2)
    world.become(OperationState.CANCELLED)
    world.step()
    assert world.tasks == {}
    assert world.ledgers[1].copy is None
    assert not world.operation.ended_us
    world.step()
    assert world.operation.state is OperationState.CANCELLED
    assert world.operation.ended_us
    assert world.states() == "PDPPPPPP"


def test_what_was_done_is_taken_back_in_reverse() -> None:
    moves = [Move(1, "a", "d", 5, MoveState.DONE), Move(2, "a", "d", 5), Move(3, "b", "e", 6, MoveState.DONE)]
    assert reverse(moves) == [Move(3, "e", "b", 6), Move(1, "d", "a", 5)]


def test_a_ledger_that_was_trimmed_is_skipped_and_its_task_goes() -> None:
    world = World.of(6)
    world.step()
    del world.ledgers[2], world.tasks[2], world.ledgers[5]
    world.step()
    world.copy(1, 3, 4)
    world.step()
    assert world.reason(2) == world.reason(5) == "the ledger was trimmed or deleted"
    world.bookies.pop("d")
    world.given_up.add("d")
    world.step()
    del world.ledgers[6]
    world.step()
    world.step()
    assert world.operation.ended_us
    assert world.tasks == {}


def test_a_copy_that_somebody_else_moved_is_skipped() -> None:
    world = World.of(2)
    world.ledgers[1] = ledger(1, "xbc")
    world.ledgers[2] = ledger(2, "abd")
    world.step()
    assert world.reason(1) == "a has no copy of it any more: somebody else moved or repaired it"
    assert world.reason(2) == "d has a copy of it already"
    assert world.operation.state is OperationState.DONE
    assert world.operation.moves_skipped == 2


def test_a_ledger_that_is_copied_for_another_reason_waits_while_others_go_on() -> None:
    world = World.of(3)
    world.tasks[1] = CopyTask(1, "b", "d", CopyReason.LOST)
    world.ledgers[2] = replace(world.ledgers[2], copy=CopyClaim("e", "c", b"other"))
    assert [task.ledger_id for _, task in world.step().create] == [3]
    assert world.operation.problems == (
        "ledger 1: a copy of it is being made for another reason",
        "ledger 2: a copy of it is being made for another reason",
    )
    del world.tasks[1]
    world.ledgers[2] = replace(world.ledgers[2], copy=None)
    assert [task.ledger_id for _, task in world.step().create] == [1, 2]


def test_a_target_that_is_away_is_waited_for_and_one_that_is_lost_is_not() -> None:
    world = World.of(4, targets="de")
    gone = world.bookies.pop("d")
    assert {task.target for _, task in world.step().create} == {"e"}
    assert world.operation.problems == ("d has no session: its moves wait for it",)
    world.bookies["d"] = gone
    assert {task.target for _, task in world.step().create} == {"d"}
    assert not world.operation.problems
    world.claim(2)
    world.bookies.pop("d")
    world.given_up.add("d")
    world.copy(1, 3)
    world.step()
    assert world.ledgers[2].copy is None
    world.step()
    assert world.states() == "DSDS"
    assert world.reason(2) == "d is lost"
    assert world.operation.state is OperationState.DONE


def test_a_full_or_draining_target_gets_nothing() -> None:
    world = World.of(4)
    world.bookies["d"] = replace(world.bookies["d"], state=BookieState.READ_ONLY)
    assert not world.step().create
    assert "read-only" in world.operation.problems[0]
    world.draining.add("d")
    world.step()
    assert world.states() == "SSSS"


def test_while_copies_are_switched_off_nothing_begins_and_it_says_so() -> None:
    world = World.of(4)
    world.enabled = False
    assert not world.step().create
    assert "`magnetar cluster repair --on`" in world.operation.problems[0]


def test_the_problems_of_its_tasks_are_shown_and_counted_when_they_are_many() -> None:
    world = World.of(40, bytes_per_s=1 << 40)
    world.step()
    world.tasks = {n: replace(task, problem="no source answers") for n, task in world.tasks.items()}
    world.step()
    assert world.operation.problems[0] == "ledger 1: no source answers"
    assert len(world.operation.problems) == PROBLEMS_MAX + 1


def test_the_measured_rate_is_that_of_the_last_seconds() -> None:
    world = World.of(400, bytes_per_s=2 * MIB)
    for _ in range(80):
        world.step()
        if world.tasks:
            world.copy(min(world.tasks))
    assert abs(world.operation.rate - 2 * MIB) < 0.1 * MIB


EVENTS = st.sampled_from(["step", "step", "step", "copy", "claim", "crash", "trim", "pause", "resume", "lose", "back"])


@settings(max_examples=80, deadline=None)
@given(st.lists(st.tuples(EVENTS, st.integers(1, 12)), max_size=60), st.booleans())
def test_whatever_happens_it_ends_and_says_of_each_move_what_came_of_it(
    events: list[tuple[str, int]], cancel: bool
) -> None:
    world = World.of(12, bytes_per_s=3 * MIB, targets="de")
    gone: dict[str, BookieRegistration] = {}
    for event, number in events:
        match event:
            case "step":
                world.step()
            case "copy" if number in world.tasks:
                world.copy(number)
            case "claim" if number in world.tasks and world.tasks[number].target in world.bookies:
                world.claim(number)
            case "trim":
                world.ledgers.pop(number, None)
            case "crash":
                world.crash()
            case "pause" if world.operation.state is OperationState.RUNNING:
                world.become(OperationState.PAUSED)
            case "resume" if world.operation.state is OperationState.PAUSED:
                world.become(OperationState.RUNNING)
            case "lose" if "d" in world.bookies:
                gone["d"] = world.bookies.pop("d")
            case "back" if gone:
                world.bookies.update(gone)
        for n in [n for n in world.tasks if n not in world.ledgers]:
            del world.tasks[n]
        if world.operation.ended_us:
            break
    if not world.operation.ended_us:
        world.become(OperationState.CANCELLED if cancel else OperationState.RUNNING)
    if "d" not in world.bookies:
        world.given_up.add("d")
    for _ in range(40):
        if world.operation.ended_us:
            break
        world.step()
        for n in list(world.tasks):
            if world.tasks[n].target in world.bookies:
                world.copy(n)
    assert world.operation.ended_us
    assert world.tasks == {}
    for move in world.moves():
        record = world.ledgers.get(move.ledger_id)
        assert record is None or record.copy is None
        if record is not None:
            assert (move.target in record.bookies()) == (move.state is MoveState.DONE)
        if world.operation.state is OperationState.DONE:
            assert move.state is not MoveState.PENDING


def test_an_operation_that_nobody_goes_on_with_says_so() -> None:
    operation = World.of(1).operation
    late_us = operation.created_us + NEGLECTED_US
    assert neglected(operation, late_us - 1) == ""
    assert "no bookie has gone on with it for 30 s" in neglected(operation, late_us)
    assert neglected(replace(operation, updated_us=late_us), late_us) == ""
    for waiting in (replace(operation, state=OperationState.PAUSED), replace(operation, ended_us=1)):
        assert neglected(waiting, late_us) == ""
