"""What must hold of every single answer at the boundaries, whatever clients see of it later.

At a bookie:
1. An add that is answered OK is durable.
2. Once a fence was answered, no ordinary add stores anything more.
3. "Provably not" is never said of what stands there.

In the metadata store:
4. A ledger that is CLOSED never changes its end, and never opens again; it ends at or above all that its writer had
   seen acknowledged. Its epoch never falls.
5. A shard's epoch never falls. It gets an owner whose session lives; and it is taken from another one only when that
   one's session is over, or by itself.
6. What `copies.py` says of copies, and of the operations that move them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from simulation.copies import Copies
from simulation.disk import SimulatedDisk

from magnetar.ledger.bookie_rpc import AddGroup, AddResult, AddStatus, EntryOutcome, LacResult, ReadGroup, ReadResult
from magnetar.metadata.codec import decode_ledger, decode_shard
from magnetar.metadata.keyspace import KeyKind, Keyspace
from magnetar.metadata.memory import MemoryStore
from magnetar.metadata.records import LedgerRecord, LedgerState, Owner, ShardRecord
from magnetar.metadata.store import Operation, Put
from magnetar.v1 import admin_pb2
from magnetar.wire.envelope import peek


class Boundaries:
    """See the module. `fail` ends the run."""

    def __init__(
        self, fail: Callable[[str], NoReturn], disks: dict[str, SimulatedDisk], store: MemoryStore, keyspace: Keyspace
    ) -> None:
        self._fail = fail
        self._disks = disks
        self._store = store
        self._keyspace = keyspace
        self._fenced: dict[tuple[str, int], frozenset[int]] = {}
        """Which entries stood at a bookie when it answered a fence."""
        self._confirmed: dict[int, int] = {}
        """The highest LAC that a writer of the ledger has sent."""
        self._ledgers: dict[int, LedgerRecord] = {}
        self._shards: dict[int, ShardRecord] = {}
        self._owned: dict[tuple[str, int], int] = {}
        self.on_claim: Callable[[int], None] = lambda shard: None
        """Hears of each shard whose epoch grew."""
        self.copies = Copies(fail, keyspace)
        self._expected: set[tuple[int, Owner, str]] = set()
        """Shards that an owner was to pass on, and to whom: that one may claim them, should the owner be silent."""

    # --- brokers ---

    def called(self, address: str, method: str, data: bytes) -> None:
        """A broker, or an operator, calls a broker."""
        if method.endswith("/ReceiveShard"):
            request = admin_pb2.ReceiveShardRequest.FromString(data)
            source = Owner(request.source.broker_id, request.source.session)
            self._expected.add((request.shard_id, source, address.partition(":")[0]))

    # --- bookies ---

    def sent(self, item: Any) -> None:
        """A call was sent to a bookie."""
        if isinstance(item, AddGroup) and not item.recovery:
            lac = peek(item.entries[-1]).lac
            if lac > self._confirmed.get(item.ledger_id, -1):
                self._confirmed[item.ledger_id] = lac

    def answered(self, bookie: str, item: Any, result: Any) -> None:
        """A bookie answers."""
        if isinstance(item, AddGroup):
            self._added(bookie, item, result)
        elif isinstance(item, ReadGroup):
            self._read(bookie, item, result)
        else:
            self._told_lac(bookie, item, result)

    def _added(self, bookie: str, group: AddGroup, result: AddResult) -> None:
        if result.status is not AddStatus.OK:
            return
        stored = self._stored(bookie, group.ledger_id)
        ids = [peek(data).entry_id for data in group.entries]
        missing = [entry_id for entry_id in ids if entry_id not in stored]
        if missing:
            self._fail(f"durability: {bookie} acknowledged before it was durable: {group.ledger_id}:{missing}")
        before = self._fenced.get((bookie, group.ledger_id))
        if before is not None and not group.recovery and not before.issuperset(ids):
            self._fail(f"fence: {bookie} stored an ordinary add after it was fenced: {group.ledger_id}:{ids}")

    def _read(self, bookie: str, group: ReadGroup, result: ReadResult) -> None:
        stored = self._stored(bookie, group.ledger_id)
        for number, answer in enumerate(result.answers):
            if answer.outcome is EntryOutcome.PROVABLY_NOT and group.first_entry + number in stored:
                self._fail(f"negative: {bookie} denies what it has: {group.ledger_id}:{group.first_entry + number}")
        if group.fence and any(answer.outcome is not EntryOutcome.UNKNOWN for answer in result.answers):
            self._fence(bookie, group.ledger_id)

    def _told_lac(self, bookie: str, query: Any, result: LacResult) -> None:
        if result.outcome is EntryOutcome.PROVABLY_NOT and self._stored(bookie, query.ledger_id):
            self._fail(f"negative: {bookie} denies a ledger that it has: {query.ledger_id}")
        if query.fence and result.outcome is not EntryOutcome.UNKNOWN:
            self._fence(bookie, query.ledger_id)

    def _fence(self, bookie: str, ledger_id: int) -> None:
        if (bookie, ledger_id) not in self._fenced:
            self._fenced[bookie, ledger_id] = frozenset(self._stored(bookie, ledger_id))

    def _stored(self, bookie: str, ledger_id: int) -> Any:
        store = self._disks[bookie].store
        return store.durable_entries(ledger_id) if store is not None else ()

    def ledgers(self) -> list[LedgerRecord]:
        """As they were last written, deleted ones too."""
        return list(self._ledgers.values())

    def shard(self, shard_id: int) -> ShardRecord | None:
        """As it was last written."""
        return self._shards.get(shard_id)

    def owns(self, broker: str, shard_id: int) -> bool:
        """The shard is recorded as this broker's."""
        record = self._shards.get(shard_id)
        return record is not None and record.owner is not None and record.owner.broker_id == broker

    def owned(self, broker: str, shard_id: int) -> int:
        """The last epoch in which it was."""
        return self._owned.get((broker, shard_id), 0)

    def disk_lost(self, bookie: str) -> None:
        """What it had said before does not bind it."""
        for name, ledger_id in list(self._fenced):
            if name == bookie:
                del self._fenced[name, ledger_id]

    # --- metadata ---

    def applied(self, by: str, operations: Sequence[Operation]) -> None:
        """A transaction of this process was applied."""
        self.copies.applied(by, operations)
        for operation in operations:
            if not isinstance(operation, Put) or not operation.key.startswith(self._keyspace.root):
                continue
            kind, _ = self._keyspace.parse(operation.key)
            if kind in (KeyKind.SHARD_LEDGER, KeyKind.LEDGER):
                self._put_ledger(decode_ledger(operation.value))
            elif kind is KeyKind.SHARD:
                self._put_shard(by, decode_shard(operation.value))

    def _put_ledger(self, record: LedgerRecord) -> None:
        before = self._ledgers.get(record.ledger_id)
        self._ledgers[record.ledger_id] = record
        if before is not None and record.epoch < before.epoch:
            self._fail(f"epoch: a ledger's epoch fell: {before} {record}")
        if before is not None and before.state is LedgerState.CLOSED:
            kept = (record.state, record.last_entry, record.length)
            if kept != (LedgerState.CLOSED, before.last_entry, before.length):
                self._fail(f"one end: a closed ledger changed: {before} {record}")
        if record.state is LedgerState.CLOSED and record.last_entry < self._confirmed.get(record.ledger_id, -1):
            self._fail(f"one end: a ledger is closed below what was confirmed: {record}")

    def _put_shard(self, by: str, record: ShardRecord) -> None:
        before = self._shards.get(record.shard_id)
        self._shards[record.shard_id] = record
        if before is not None and record.epoch < before.epoch:
            self._fail(f"epoch: a shard's epoch fell: {before} {record}")
        owner, old = record.owner, None if before is None else before.owner
        if owner is not None:
            self._owned[owner.broker_id, record.shard_id] = record.epoch
        if before is not None and record.epoch > before.epoch:
            self.on_claim(record.shard_id)
        if owner is None or owner == old:
            return
        if not self._lives(owner.broker_id, owner.session):
            self._fail(f"claim: {by} gave a shard to a session that is over: shard={record.shard_id} owner={owner}")
        if old is None or by == old.broker_id or old.broker_id == owner.broker_id:
            return
        expected = (record.shard_id, old, by) in self._expected
        if not expected and self._lives(old.broker_id, old.session):
            self._fail(f"claim: {by} took a shard from a living owner: shard={record.shard_id} {old} -> {owner}")

    def _lives(self, broker_id: str, session: int) -> bool:
        found = self._store.get(self._keyspace.broker(broker_id))
        try:
            found.send(None)
        except StopIteration as done:
            return done.value is not None and done.value.create_revision == session
        raise AssertionError("the memory store suspended")
