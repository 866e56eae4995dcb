"""Many short histories of one ledger, each drawn from a seed: which faults it has, and what happens next.

What must hold is in `World.check`: what was confirmed is in the closed ledger, on an ack quorum, and nothing is
confirmed beyond its end. When all bookies answer again, a recovery finishes. The same seed gives the same history.
"""

from __future__ import annotations

import inspect
import random
import sys
import types
from collections.abc import Callable

import ledger_world
import pytest
from ledger_world import (
    BOOKIES,
    RECOVERERS_MAX,
    SHAPES,
    SMALL,
    SMALL_RECOVERY,
    Call,
    RecovererActor,
    World,
    ledger_record,
)

from magnetar.ledger import recovery, writer
from magnetar.ledger.writer import Phase
from magnetar.metadata.records import BookieState, LedgerState

SEEDS = 1000
STEPS_MAX = 90


class History:
    """One history. Every seed uses its own mix of actions, some of them not at all: rare orders become likely."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        quorums, ensemble = self.rng.choice(SHAPES)
        self.world = World(ledger_record(ensemble, quorums), BOOKIES, seed)
        self.writer = self.world.writer("w", SMALL)
        self.recoverers: list[RecovererActor] = []
        self.hung: set[str] = set()
        often: dict[Callable[[], None], float] = {
            self.add: 3, self.deliver: 12, self.handle: 3, self.recover: 0.7, self.close: 3, self.tell_change: 2,
        }  # fmt: skip
        rare: dict[Callable[[], None], float] = {
            self.lose: 2, self.hang: 1, self.pass_time: 1, self.register: 1, self.unregister: 1, self.doubt: 0.5,
        }  # fmt: skip
        self.actions = often | {action: weight for action, weight in rare.items() if self.rng.random() < 0.5}

    def run(self) -> list[str]:
        actions, weights = list(self.actions), list(self.actions.values())
        for _ in range(self.rng.randint(10, STEPS_MAX)):
            self.rng.choices(actions, weights)[0]()
            self.world.check()
        self.finish()
        return self.world.heard

    def call(self, handled: bool | None = None) -> Call | None:
        calls = [call for call in self.world.waiting(handled=handled) if call.bookie not in self.hung]
        return self.rng.choice(calls) if calls else None

    def add(self) -> None:
        if self.writer.core.phase is Phase.OPEN and len(self.writer.added) < 12:
            first = len(self.writer.added)
            self.writer.add(*(f"entry {first + n}".encode() for n in range(self.rng.randint(1, 3))))

    def deliver(self) -> None:
        call = self.call()
        if call is not None:
            if call.result is None:
                self.world.handle(call)
            self.world.answer(call)

    def handle(self) -> None:
        call = self.call(handled=False)
        if call is not None:
            self.world.handle(call)

    def lose(self) -> None:
        call = self.call()
        if call is not None:
            self.world.lose(call)

    def hang(self) -> None:
        self.hung = set(self.rng.sample(BOOKIES, self.rng.choice((0, 1, 1, 2))))

    def pass_time(self) -> None:
        self.world.pass_time(self.rng.choice((0.05, 0.3, 1.5, 6.0)))

    def register(self) -> None:
        self.world.register(self.rng.choice(BOOKIES), self.rng.choice((BookieState.WRITABLE, *BookieState)))

    def unregister(self) -> None:
        self.world.unregister(self.rng.choice(BOOKIES))

    def doubt(self) -> None:
        bookie = self.world.bookies[self.rng.choice(BOOKIES)]
        bookie.limbo, bookie.read_only = self.rng.random() < 0.4, self.rng.random() < 0.2

    def tell_change(self) -> None:
        """The store decides, and the writer hears of it now or later."""
        if self.writer.commits:
            if self.writer.commits[0][1] is None:
                self.writer.apply_commit()
            else:
                self.writer.answer_commit()

    def recover(self) -> None:
        if self.world.record.state is not LedgerState.CLOSED and len(self.recoverers) < RECOVERERS_MAX:
            if self.world.record.state is LedgerState.OPEN or self.rng.random() < 0.5:
                self.world.claim()
            self.recoverers.append(self.world.recoverer(f"r{len(self.recoverers)}", SMALL_RECOVERY))

    def close(self) -> None:
        found = [r for r in self.recoverers if r.found is not None]
        if found:
            self.rng.choice(found).close()
        elif self.writer.core.phase is Phase.OPEN and self.writer.core.is_settled and self.rng.random() < 0.05:
            old = self.writer.core.record
            self.world.close("w", old, self.writer.core.closed_record())

    def finish(self) -> None:
        """All bookies answer again; a recovery closes the ledger; then the old writer's last calls arrive."""
        world = self.world
        for name in BOOKIES:
            world.bookies[name].limbo = world.bookies[name].read_only = False
            world.register(name)
        if world.closed is None:
            if self.rng.random() < 0.5 or world.record.state is LedgerState.OPEN:
                world.claim()
            last = world.recoverer("last")
            world.run("last", sorted(self.hung)[:1] if len(world.record.fragments[-1].bookies) == 3 else ())
            if last.found is None:
                world.run("last")
            assert last.found is not None, last.describe()
            last.close()
        world.run()
        world.check()


@pytest.mark.parametrize("part", range(10))
def test_nothing_confirmed_is_ever_lost(part: int) -> None:
    for seed in range(part, SEEDS, 10):
        try:
            History(seed).run()
        except AssertionError as error:
            raise AssertionError(f"seed {seed}: {error}") from error


def test_a_seed_gives_the_same_history_twice() -> None:
    for seed in range(5):
        assert History(seed).run() == History(seed).run()


REACHED = (
    "has confirmed", "FENCED", "STALE_EPOCH", "wants the ensemble", "wants a roll", "as recovery", "found the end",
    "takes the record", "is undecided", "answers again", "closed elsewhere", "READ_ONLY", "w closed the ledger",
    "PROVABLY_NOT", "UNKNOWN",
)  # fmt: skip


def test_histories_reach_what_they_are_for() -> None:
    """A simulation that never gets anywhere finds nothing."""
    heard = "\n".join(line for seed in range(200) for line in History(seed).run())
    assert not [what for what in REACHED if what not in heard]


BUGS = {
    "reads do not fence": (
        recovery, "_range(witness, first, last, fence=True)", "_range(witness, first, last, fence=False)",
    ),
    "one denial is enough": (
        recovery, "self.quorum.is_denied(self.frontier, tally.denied, self._filled):", "tally.denied:",
    ),
    "unknown is a denial": (recovery, "tally.unknown |= witness.bit\n", "tally.denied |= witness.bit\n"),
    "closed before it is written back": (recovery, "        elif self._writer.is_settled:\n", "        else:\n"),
    "acknowledgements of replaced members count": (
        writer, "            entry.acks &= self._counted\n", "            pass\n",
    ),
    "a member that is being replaced counts": (
        writer, "        self._counted = self._all & ~replaced\n", "        self._counted = self._all\n",
    ),
    "a fragment begins too late": (writer, "first_entry = self.lac + 1\n", "first_entry = self.lac + 2\n"),
}  # fmt: skip


@pytest.mark.parametrize("bug", BUGS)
def test_the_simulation_finds_planted_bugs(bug: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module, right, wrong = BUGS[bug]
    source = inspect.getsource(module)
    assert source.count(right) == 1, "the line that is to be broken has changed"
    broken = types.ModuleType(module.__name__)
    broken.__dict__["__name__"] = module.__name__
    with monkeypatch.context() as patched:
        patched.setitem(sys.modules, module.__name__, broken)
        exec(compile(source.replace(right, wrong), str(module.__file__), "exec"), broken.__dict__)
    # The history compares these by identity.
    broken.__dict__.update(Phase=writer.Phase, CommitOutcome=writer.CommitOutcome)
    core = "RecoveryCore" if module is recovery else "WriterCore"
    monkeypatch.setattr(ledger_world, core, getattr(broken, core))
    monkeypatch.setattr(getattr(broken, core), "check", lambda self: None)
    assert any(_loses(seed) for seed in range(SEEDS))


def _loses(seed: int) -> bool:
    try:
        History(seed).run()
    except AssertionError:
        return True
    return False
