"""Engines against a plain model, by random walks of transactions, leases, watches and restarts."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import AsyncIterator, Coroutine
from pathlib import Path
from typing import Any, TypeVar

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from magnetar.metadata.memory import MemoryStore
from magnetar.metadata.sqlite import SqliteStore
from magnetar.metadata.store import (
    Change,
    Changes,
    Compare,
    CompareTarget,
    Delete,
    DeletePrefix,
    KeyValue,
    Lease,
    LeaseExpired,
    MetadataStore,
    Operation,
    Put,
    RangeResult,
    Watch,
    WatchEvent,
)

T = TypeVar("T")

KEYS = st.text(alphabet="ab/", min_size=1, max_size=3)
PREFIXES = st.text(alphabet="ab/", max_size=2)
VALUES = st.binary(max_size=3)
COMPARES = st.tuples(KEYS, st.sampled_from(CompareTarget), st.integers(0, 3), st.booleans())
OPERATIONS = st.one_of(
    st.tuples(st.just("put"), KEYS, VALUES, st.integers(0, 3)),
    st.tuples(st.just("delete"), KEYS),
    st.tuples(st.just("prefix"), KEYS),
)
CONFLICT_MESSAGE = "touch one key"
WAIT_S = 10


class Model:
    """The rules of the interface, written as plainly as possible."""

    def __init__(self, revision: int) -> None:
        self.current: dict[str, KeyValue] = {}
        self.revision = revision
        self.log: list[Change] = []

    def holds(self, compare: Compare) -> bool:
        item = self.current.get(compare.key)
        found = 0
        if item is not None:
            found = item.mod_revision if compare.target is CompareTarget.MOD else item.create_revision
        return (found == compare.revision) is compare.equal

    def apply(self, operations: list[Operation]) -> None:
        changes: list[Change] = []
        revision = self.revision + 1
        for operation in operations:
            if isinstance(operation, Put):
                before = self.current.get(operation.key)
                created = before.create_revision if before else revision
                item = KeyValue(operation.key, operation.value, created, revision, operation.lease_id)
                self.current[operation.key] = item
                changes.append(Change(operation.key, item, revision))
            else:
                changes += [Change(key, None, revision) for key in self.doomed(operation)]
                for change in changes:
                    if change.current is None:
                        self.current.pop(change.key, None)
        self.record(changes)

    def doomed(self, operation: Operation) -> list[str]:
        if isinstance(operation, DeletePrefix):
            return sorted(key for key in self.current if key.startswith(operation.prefix))
        return [operation.key] if operation.key in self.current else []

    def end_lease(self, lease_id: int) -> None:
        keys = sorted(key for key, item in self.current.items() if item.lease_id == lease_id)
        for key in keys:
            del self.current[key]
        self.record([Change(key, None, self.revision + 1) for key in keys])

    def record(self, changes: list[Change]) -> None:
        if changes:
            self.revision += 1
            self.log += changes

    def range(self, prefix: str, after: str, limit: int) -> RangeResult:
        found = [self.current[key] for key in sorted(self.current) if key.startswith(prefix) and key > after]
        if limit and len(found) > limit:
            return RangeResult(tuple(found[:limit]), self.revision, more=True)
        return RangeResult(tuple(found), self.revision)


def conflicting(operations: list[Operation]) -> bool:
    """Whether two operations could touch one key."""

    def meet(a: Operation, b: Operation) -> bool:
        if isinstance(a, DeletePrefix) and isinstance(b, DeletePrefix):
            return a.prefix.startswith(b.prefix) or b.prefix.startswith(a.prefix)
        if isinstance(a, DeletePrefix):
            return not isinstance(b, DeletePrefix) and b.key.startswith(a.prefix)
        return meet(b, a) if isinstance(b, DeletePrefix) else a.key == b.key

    return any(meet(a, b) for i, a in enumerate(operations) for b in operations[:i])


class Watcher:
    """A watch, what it has delivered, and the revision it began at."""

    def __init__(self, prefix: str, start: int, watch: Watch) -> None:
        self.prefix = prefix
        self.start = start
        self.watch = watch
        self.events: AsyncIterator[WatchEvent] = aiter(watch)
        self.seen: list[Change] = []


class StoreMachine(RuleBasedStateMachine):
    store: MetadataStore
    shared_runner: asyncio.Runner | None = None

    def __init__(self) -> None:
        super().__init__()
        self.runner = self.shared_runner or asyncio.Runner()
        self.directory = tempfile.TemporaryDirectory()
        self.watchers: list[Watcher] = []
        self.leases: list[Lease] = []
        self.failed = False

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        return self.runner.run(asyncio.wait_for(coroutine, WAIT_S))

    async def open(self) -> MetadataStore:
        raise NotImplementedError

    @initialize()
    def begin(self) -> None:
        self.store = self.run(self.open())
        self.first_revision = self.run(self.store.range("")).revision
        self.model = Model(self.first_revision)

    def lease_id(self, choice: int) -> int:
        """0 = none; otherwise one of the leases so far, ended ones too, or one that never was."""
        if choice == 0:
            return 0
        return self.leases[choice % len(self.leases)].lease_id if self.leases else 999

    def compare(self, key: str, target: CompareTarget, choice: int, equal: bool) -> Compare:
        item = self.model.current.get(key)
        revisions = [0, self.model.revision, item.mod_revision if item else 0, item.create_revision if item else 1]
        return Compare(key, target, revisions[choice], equal)

    def operation(self, kind: str, key: str, value: bytes = b"", lease: int = 0) -> Operation:
        if kind == "put":
            return Put(key, value, self.lease_id(lease))
        return Delete(key) if kind == "delete" else DeletePrefix(key)

    @rule(compares=st.lists(COMPARES, max_size=2), operations=st.lists(OPERATIONS, max_size=4))
    def txn(self, compares: list[tuple[Any, ...]], operations: list[tuple[Any, ...]]) -> None:
        wanted = [self.compare(*compare) for compare in compares]
        todo = [self.operation(*operation) for operation in operations]
        if conflicting(todo):
            with pytest.raises(ValueError, match=CONFLICT_MESSAGE):
                self.run(self.store.txn(wanted, todo))
            return
        holds = all(self.model.holds(compare) for compare in wanted)
        alive = {lease.lease_id for lease in self.leases if not lease.lost} | {0}
        if holds and any(isinstance(o, Put) and o.lease_id not in alive for o in todo):
            with pytest.raises(LeaseExpired):
                self.run(self.store.txn(wanted, todo))
            return
        result = self.run(self.store.txn(wanted, todo))
        if holds:
            self.model.apply(todo)
        assert (result.succeeded, result.revision) == (holds, self.model.revision)

    @rule(keys=st.lists(KEYS, min_size=2, max_size=5, unique=True))
    def concurrent_txns(self, keys: list[str]) -> None:
        async def send() -> list[int]:
            results = await asyncio.gather(*(self.store.txn([], [Put(key, b"c")]) for key in keys))
            return [result.revision for result in results]

        revisions = self.run(send())
        assert sorted(revisions) == [self.model.revision + 1 + i for i in range(len(keys))]
        for _, key in sorted(zip(revisions, keys, strict=True)):
            self.model.apply([Put(key, b"c")])

    @rule(prefix=PREFIXES, after=st.one_of(st.just(""), KEYS), limit=st.integers(0, 4))
    def range(self, prefix: str, after: str, limit: int) -> None:
        found = self.run(self.store.range(prefix, after=after, limit=limit))
        assert found == self.model.range(prefix, after, limit)

    @precondition(lambda self: len(self.leases) < 3)
    @rule()
    def grant(self) -> None:
        self.leases.append(self.run(self.store.grant_lease(30)))

    @precondition(lambda self: self.leases)
    @rule(choice=st.integers(0, 2))
    def revoke(self, choice: int) -> None:
        lease = self.leases[choice % len(self.leases)]
        self.run(lease.revoke())
        assert lease.lost
        self.model.end_lease(lease.lease_id)

    @precondition(lambda self: len(self.watchers) < 4)
    @rule(prefix=PREFIXES, back=st.integers(0, 10))
    def watch(self, prefix: str, back: int) -> None:
        start = max(self.first_revision + 1, self.model.revision + 1 - back)
        self.watchers.append(Watcher(prefix, start, self.run(self.begin_watch(prefix, start))))

    async def begin_watch(self, prefix: str, start: int) -> Watch:
        return self.store.watch(prefix, from_revision=start)

    def expected(self, watcher: Watcher) -> list[Change]:
        return [c for c in self.model.log if c.revision >= watcher.start and c.key.startswith(watcher.prefix)]

    @precondition(lambda self: self.watchers)
    @rule(choice=st.integers(0, 3))
    def read_watch(self, choice: int) -> None:
        """It delivers all that happened, and each event whole revisions only."""
        self.catch_up(self.watchers[choice % len(self.watchers)])

    def catch_up(self, watcher: Watcher) -> None:
        expected = self.expected(watcher)
        self.failed = True
        while len(watcher.seen) < len(expected):
            event: WatchEvent = self.run(anext(watcher.events))  # type: ignore[arg-type]
            assert isinstance(event, Changes)
            assert event.changes
            watcher.seen += event.changes
            assert event.revision >= watcher.seen[-1].revision
            assert len(expected) == len(watcher.seen) or expected[len(watcher.seen)].revision > event.revision
        assert watcher.seen == expected
        self.failed = False

    @invariant()
    def current_keys_are_the_models(self) -> None:
        if hasattr(self, "store"):
            assert self.run(self.store.range("")) == self.model.range("", "", 0)

    def teardown(self) -> None:
        for watcher in self.watchers:
            if not self.failed:
                self.catch_up(watcher)
            self.run(watcher.watch.close())
        if hasattr(self, "store"):
            self.run(self.store.close())
        if self.shared_runner is None:
            self.runner.close()
        self.directory.cleanup()


class MemoryMachine(StoreMachine):
    async def open(self) -> MetadataStore:
        return MemoryStore()


class SqliteMachine(StoreMachine):
    async def open(self, *, drop_leases: bool = False) -> SqliteStore:
        return await SqliteStore.open(Path(self.directory.name) / "store", drop_leases=drop_leases)

    @rule(drop_leases=st.booleans())
    def reopen(self, drop_leases: bool) -> None:
        """Nothing answered is lost, and watches go on from where they were."""
        self.run(self.store.close())
        assert all(lease.lost for lease in self.leases)
        self.store = self.run(self.open(drop_leases=drop_leases))
        if drop_leases:
            keys = sorted(key for key, item in self.model.current.items() if item.lease_id)
            for key in keys:
                del self.model.current[key]
            self.model.record([Change(key, None, self.model.revision + 1) for key in keys])
        for watcher in self.watchers:
            start = watcher.seen[-1].revision + 1 if watcher.seen else watcher.start
            watcher.watch = self.store.watch(watcher.prefix, from_revision=start)
            watcher.events = aiter(watcher.watch)

    @precondition(lambda self: self.leases)
    @rule(choice=st.integers(0, 2))
    def revoke(self, choice: int) -> None:
        """Leases of an earlier opening are there until revoked."""
        lease = self.leases[choice % len(self.leases)]
        self.run(self.store.revoke_lease(lease.lease_id))  # type: ignore[attr-defined]
        self.model.end_lease(lease.lease_id)

    def lease_id(self, choice: int) -> int:
        """Never one of an earlier opening: whether it is alive is another test's matter."""
        alive = [lease for lease in self.leases if not lease.lost]
        if choice == 0 or not alive:
            return 0
        return alive[choice % len(alive)].lease_id


def test_a_store_in_a_server_keeps_the_rules(served_engine: Any, request: pytest.FixtureRequest, clock: Any) -> None:
    with asyncio.Runner() as runner:

        class ServedMachine(StoreMachine):
            shared_runner = runner

            async def open(self) -> MetadataStore:
                opened: MetadataStore = await served_engine.open(request, Path(self.directory.name), clock)
                return opened

        quick = settings(max_examples=12, stateful_step_count=30, **QUICK)  # type: ignore[arg-type]
        run_state_machine_as_test(ServedMachine, settings=quick)


QUICK = {"deadline": None, "derandomize": True, "database": None, "suppress_health_check": list(HealthCheck)}

TestMemoryModel = MemoryMachine.TestCase
TestMemoryModel.settings = settings(max_examples=40, stateful_step_count=40, **QUICK)  # type: ignore[arg-type]
TestSqliteModel = SqliteMachine.TestCase
TestSqliteModel.settings = settings(max_examples=15, stateful_step_count=40, **QUICK)  # type: ignore[arg-type]
