"""Any order of deliveries, losses, fences, changes of membership and of the record, by Hypothesis.

What must hold (`World.check`): an entry that was confirmed to the writer is in the closed ledger, with the same bytes;
all entries of a closed ledger stand on an ack quorum; nothing is confirmed beyond its end. And at the end of every
history: when all bookies answer again, a recovery finishes.
"""

from __future__ import annotations

import hypothesis.strategies as st
from hypothesis import HealthCheck, settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from ledger_world import (
    BOOKIES,
    RECOVERERS_MAX,
    SHAPES,
    SMALL,
    SMALL_RECOVERY,
    Call,
    RecovererActor,
    World,
    WriterActor,
    ledger_record,
)

from magnetar.ledger.writer import Phase
from magnetar.metadata.records import BookieState, LedgerState

index = st.integers(0, 63)


class LedgerHistory(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.world: World = None  # type: ignore[assignment]
        self.writer: WriterActor = None  # type: ignore[assignment]
        self.recoverers: list[RecovererActor] = []

    @initialize(shape=st.sampled_from(SHAPES), seed=st.integers(0, 3))
    def begin(self, shape: tuple[str, tuple[str, ...]], seed: int) -> None:
        quorums, ensemble = shape
        self.world = World(ledger_record(ensemble, quorums), BOOKIES, seed)
        self.writer = self.world.writer("w", SMALL)

    def call(self, index: int, handled: bool | None = None) -> Call | None:
        calls = self.world.waiting(handled=handled)
        return calls[index % len(calls)] if calls else None

    # The writer.

    @precondition(lambda self: self.writer.core.phase is Phase.OPEN)
    @rule(count=st.integers(1, 4))
    def add(self, count: int) -> None:
        first = len(self.writer.added)
        self.writer.add(*(f"entry {first + n}".encode() for n in range(count)))

    @precondition(lambda self: self.writer.commits and self.writer.commits[0][1] is None)
    @rule()
    def apply_ensemble_change(self) -> None:
        self.writer.apply_commit()

    @precondition(lambda self: self.writer.commits and self.writer.commits[0][1] is not None)
    @rule()
    def tell_ensemble_change(self) -> None:
        self.writer.answer_commit()

    @precondition(lambda self: self.writer.core.phase is Phase.OPEN and self.writer.core.is_settled)
    @rule()
    def close_by_writer(self) -> None:
        core = self.writer.core
        old = core.record
        self.world.close("w", old, core.closed_record())

    # The network.

    @rule(index=index)
    def deliver(self, index: int) -> None:
        call = self.call(index)
        if call is not None:
            if call.result is None:
                self.world.handle(call)
            self.world.answer(call)

    @rule(index=index)
    def handle(self, index: int) -> None:
        call = self.call(index, handled=False)
        if call is not None:
            self.world.handle(call)

    @rule(index=index)
    def lose(self, index: int) -> None:
        call = self.call(index)
        if call is not None:
            self.world.lose(call)

    @rule(without=st.sets(st.sampled_from(BOOKIES), max_size=2), actor=st.sampled_from(("w", "r0", "r1", "r2", "r3")))
    def run(self, without: set[str], actor: str) -> None:
        self.world.run(actor, sorted(without))

    @rule(seconds=st.sampled_from((0.05, 0.3, 1.5, 6.0, 11.0)))
    def pass_time(self, seconds: float) -> None:
        self.world.pass_time(seconds)

    # Bookies.

    @rule(name=st.sampled_from(BOOKIES), state=st.sampled_from(BookieState))
    def register(self, name: str, state: BookieState) -> None:
        self.world.register(name, state)

    @rule(name=st.sampled_from(BOOKIES))
    def unregister(self, name: str) -> None:
        self.world.unregister(name)

    @rule(name=st.sampled_from(BOOKIES), limbo=st.booleans(), read_only=st.booleans())
    def doubt(self, name: str, limbo: bool, read_only: bool) -> None:
        self.world.bookies[name].limbo = limbo
        self.world.bookies[name].read_only = read_only

    # Recovery.

    @precondition(lambda self: self.world.record.state is not LedgerState.CLOSED)
    @precondition(lambda self: len(self.recoverers) < RECOVERERS_MAX)
    @rule(raise_epoch=st.booleans())
    def recover(self, raise_epoch: bool) -> None:
        if raise_epoch or self.world.record.state is LedgerState.OPEN:
            self.world.claim()
        self.recoverers.append(self.world.recoverer(f"r{len(self.recoverers)}", SMALL_RECOVERY))

    @precondition(lambda self: any(r.found for r in self.recoverers))
    @rule(index=index)
    def close_by_recoverer(self, index: int) -> None:
        found = [r for r in self.recoverers if r.found is not None]
        found[index % len(found)].close()

    # What must hold.

    @invariant()
    def nothing_is_lost(self) -> None:
        if self.world is not None:
            self.world.check()

    def teardown(self) -> None:
        world = self.world
        if world is None:
            return
        for name in BOOKIES:
            world.bookies[name].limbo = world.bookies[name].read_only = False
            world.register(name)
        if world.closed is None:
            world.claim()
            last = world.recoverer("last")
            world.run("last")
            assert last.found is not None, last.describe()
            last.close()
        assert world.closed is not None
        world.run()
        world.check()
        for call in list(world.calls):
            world.lose(call)
        world.check()


TestLedgerHistories = LedgerHistory.TestCase
TestLedgerHistories.settings = settings(
    max_examples=120,
    stateful_step_count=60,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.filter_too_much, HealthCheck.too_slow],
)
