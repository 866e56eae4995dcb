"""The transactions of a shard: what creating, claiming and changing one asks of the store. Pure.

Each compares the mod_revision of every record it changes. Each but creation also compares and puts the shard record,
even an unchanged one, so that all transactions of a shard exclude each other: of two that were built on one snapshot at
most one can be applied, and the shard record's mod_revision tells whether one was.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from magnetar.metadata.codec import (
    DamagedRecord,
    decode_ledger,
    decode_shard,
    encode_copy,
    encode_ledger,
    encode_page,
    encode_shard,
)
from magnetar.metadata.keyspace import Keyspace
from magnetar.metadata.records import CopyTask, LedgerRecord, LedgerState, Owner, Segment, ShardRecord
from magnetar.metadata.store import (
    COMPARES_MAX,
    OPERATIONS_MAX,
    TXN_BYTES_MAX,
    Compare,
    Delete,
    KeyValue,
    Operation,
    Put,
    absent,
    created_at,
    not_created_at,
    unchanged,
)

CLAIMED_BYTES_MAX = TXN_BYTES_MAX // 2
"""Of records in a transaction of several claims: keys and compares have room beside them."""


@dataclass(frozen=True, slots=True)
class ShardChange:
    """What the owner wants to be so, in one transaction.

    record          the shard record as it shall be; owner None releases the shard; another broker's session takes it
                    over, in the next epoch if it is to own the shard without a claim
    put_ledgers     new and changed ledgers in their new form; one that is now CLOSED moves to `ledgers/`
    delete_ledgers  open or closed; the index keys that go are those of the stored record
    put_pages       (number, segments)
    put_copies      of ledgers that this change closes: what their places miss
    delete_shard    the record goes too; nothing of the shard may be left then
    """

    record: ShardRecord
    put_ledgers: tuple[LedgerRecord, ...] = ()
    delete_ledgers: tuple[LedgerRecord, ...] = ()
    put_pages: tuple[tuple[int, tuple[Segment, ...]], ...] = ()
    delete_pages: tuple[int, ...] = ()
    put_copies: tuple[CopyTask, ...] = ()
    delete_shard: bool = False


@dataclass(frozen=True, slots=True)
class ShardSnapshot:
    """A shard as one range read found it. The ledgers are those that are not CLOSED."""

    record: ShardRecord
    revision: int
    ledgers: Mapping[int, LedgerRecord]
    ledger_revisions: Mapping[int, int]
    values: Mapping[str, bytes]

    @property
    def newest_ledger(self) -> int:
        """Of those that are not CLOSED; 0 = all are, nothing of the shard is to be recovered."""
        return max(self.ledgers, default=0)


@dataclass(slots=True)
class ShardTxn:
    """A transaction, and the shard after it."""

    record: ShardRecord
    ledgers: dict[int, LedgerRecord]
    compares: list[Compare] = field(default_factory=list)
    operations: list[Operation] = field(default_factory=list)

    def replace_record(self, key: str, mod_revision: int, value: bytes) -> None:
        self.compares.append(unchanged(key, mod_revision))
        self.operations.append(Put(key, value))

    def delete_record(self, key: str, mod_revision: int) -> None:
        self.compares.append(unchanged(key, mod_revision))
        if mod_revision:
            self.operations.append(Delete(key))

    def checked(self) -> ShardTxn:
        """Raises ValueError when it is too large for one transaction."""
        if len(self.operations) > OPERATIONS_MAX or len(self.compares) > COMPARES_MAX:
            sizes = f"operations=`{len(self.operations)}` compares=`{len(self.compares)}` max=`{OPERATIONS_MAX}`"
            raise ValueError(f"a change of a shard is too large for one transaction: {sizes}")
        return self


def parse_snapshot(keyspace: Keyspace, shard_id: int, items: Iterable[KeyValue]) -> ShardSnapshot | None:
    """The shard of a range read of `shard_prefix`; None without a shard record. Raises DamagedRecord."""
    found: KeyValue | None = None
    ledgers: dict[int, LedgerRecord] = {}
    revisions: dict[int, int] = {}
    values: dict[str, bytes] = {}
    for item in items:
        values[item.key] = item.value
        if item.key == keyspace.shard(shard_id):
            found = item
            continue
        record = decode_ledger(item.value)
        if keyspace.parse_shard_ledger(item.key) != (record.shard_id, record.ledger_id):
            raise DamagedRecord(f"a ledger record stands under another's key: key=`{item.key}`")
        ledgers[record.ledger_id] = record
        revisions[record.ledger_id] = item.mod_revision
    if found is None:
        return None
    record_of_shard = decode_shard(found.value)
    if record_of_shard.shard_id != shard_id:
        raise DamagedRecord(f"a shard record stands under another's key: key=`{found.key}`")
    return ShardSnapshot(record_of_shard, found.mod_revision, ledgers, revisions, values)


def snapshot_after(keyspace: Keyspace, before: ShardSnapshot, txn: ShardTxn, revision: int) -> ShardSnapshot:
    """The shard once `txn`, built on `before`, was applied at `revision`."""
    values = dict(before.values)
    ledger_revisions = dict(before.ledger_revisions)
    prefix = keyspace.shard_prefix(txn.record.shard_id)
    for key, value in wanted_values(prefix, txn).items():
        ledger_id = 0 if key == keyspace.shard(txn.record.shard_id) else keyspace.parse_shard_ledger(key)[1]
        if value is None:
            values.pop(key, None)
            ledger_revisions.pop(ledger_id, None)
        else:
            values[key] = value
            if ledger_id:
                ledger_revisions[ledger_id] = revision
    return ShardSnapshot(txn.record, revision, txn.ledgers, ledger_revisions, values)


def wanted_values(prefix: str, txn: ShardTxn) -> dict[str, bytes | None]:
    """What the transaction makes of the keys under `prefix`; None = deleted."""
    return {
        operation.key: operation.value if isinstance(operation, Put) else None
        for operation in txn.operations
        if isinstance(operation, Put | Delete) and operation.key.startswith(prefix)
    }


# Creation.


def shard_creation_operations(keyspace: Keyspace, record: ShardRecord) -> tuple[list[Compare], list[Operation]]:
    """For the transaction that creates a topic, or the children of a split."""
    compares = [absent(keyspace.shard(record.shard_id))]
    operations: list[Operation] = [Put(keyspace.shard(record.shard_id), encode_shard(record))]
    if record.owner is not None:
        compares.append(_session_lives(keyspace, record.owner))
        operations.append(Put(keyspace.owned(record.owner, record.shard_id), b""))
    return compares, operations


def _session_lives(keyspace: Keyspace, owner: Owner) -> Compare:
    return created_at(keyspace.broker(owner.broker_id), owner.session)


# CLAIM.


def claim_txn(
    keyspace: Keyspace, snapshot: ShardSnapshot, session: Owner, mark: bytes, *, from_owner_alive: bool
) -> ShardTxn:
    """A higher epoch, `session` the owner, all ledgers that are not CLOSED in recovery under the new epoch.

    It holds only while `session` lives and, unless the owner knows of it (`from_owner_alive`), the old owner does not.
    `mark` goes into the `owned/` key: two claims of one session write equal records, the mark tells whose was applied.
    """
    old = snapshot.record
    # A recovery without a claim raises a ledger's epoch past the shard's; bookies refuse whatever is lower.
    epoch = max(old.epoch, *(ledger.epoch for ledger in snapshot.ledgers.values()), 0) + 1
    record = replace(old, epoch=epoch, owner=session)
    ledgers = {i: ledger.with_state(LedgerState.IN_RECOVERY, epoch) for i, ledger in snapshot.ledgers.items()}
    txn = ShardTxn(record, ledgers)
    txn.replace_record(keyspace.shard(old.shard_id), snapshot.revision, encode_shard(record))
    for ledger_id, ledger in ledgers.items():
        key = keyspace.shard_ledger(old.shard_id, ledger_id)
        txn.replace_record(key, snapshot.ledger_revisions[ledger_id], encode_ledger(ledger))
    txn.compares.append(_session_lives(keyspace, session))
    if old.owner is not None and old.owner.broker_id != session.broker_id and not from_owner_alive:
        txn.compares.append(not_created_at(keyspace.broker(old.owner.broker_id), old.owner.session))
    if old.owner is not None and old.owner != session:
        txn.operations.append(Delete(keyspace.owned(old.owner, old.shard_id)))
    txn.operations.append(Put(keyspace.owned(session, old.shard_id), mark))
    return txn.checked()


def claims_together(claims: Sequence[ShardTxn]) -> tuple[list[Compare], list[Operation]]:
    """One transaction of several claims by one session: all hold, or none. What they compare alike is compared once."""
    compares = dict.fromkeys(compare for claim in claims for compare in claim.compares)
    return list(compares), [operation for claim in claims for operation in claim.operations]


def first_together(claims: Sequence[ShardTxn]) -> int:
    """How many of these fit into one transaction, at least one."""
    operations = compares = size_bytes = 0
    for count, claim in enumerate(claims):
        operations += len(claim.operations)
        compares += len(claim.compares)
        size_bytes += sum(len(operation.value) for operation in claim.operations if isinstance(operation, Put))
        if count and (operations > OPERATIONS_MAX or compares > COMPARES_MAX or size_bytes > CLAIMED_BYTES_MAX):
            return count
    return len(claims)


# Changes by the owner.


def outside_keys(keyspace: Keyspace, snapshot: ShardSnapshot, change: ShardChange) -> list[str]:
    """The records that a change touches and that do not stand beside the shard's: to be read before `commit_txn`."""
    shard_id = snapshot.record.shard_id
    closed = [keyspace.ledger(d.ledger_id) for d in change.delete_ledgers if d.ledger_id not in snapshot.ledgers]
    pages = [keyspace.page(shard_id, number) for number, _ in change.put_pages]
    return closed + pages + [keyspace.page(shard_id, number) for number in change.delete_pages]


def commit_txn(
    keyspace: Keyspace,
    snapshot: ShardSnapshot,
    change: ShardChange,
    outside: Mapping[str, KeyValue | None],
    mark: bytes,
) -> ShardTxn:
    """The transaction of a change, on top of `snapshot` and what `outside_keys` were found to be.

    Raises ValueError for a change that contradicts the snapshot or itself, or that is too large.
    """
    _check_change(snapshot, change)
    txn = ShardTxn(change.record, dict(snapshot.ledgers))
    key = keyspace.shard(change.record.shard_id)
    if change.delete_shard:
        txn.delete_record(key, snapshot.revision)
    else:
        txn.replace_record(key, snapshot.revision, encode_shard(change.record))
    for ledger in change.put_ledgers:
        _put_ledger(keyspace, snapshot, ledger, txn)
    for ledger in change.delete_ledgers:
        _delete_ledger(keyspace, snapshot, ledger, outside, txn)
    for task in change.put_copies:
        txn.replace_record(keyspace.copy(task.ledger_id, task.place), 0, encode_copy(task))
    _change_pages(keyspace, change, outside, txn)
    _change_owner(keyspace, snapshot, change, mark, txn)
    return txn.checked()


def _check_change(snapshot: ShardSnapshot, change: ShardChange) -> None:
    old, new = snapshot.record, change.record
    passed_on = new.epoch == old.epoch + 1 and new.owner is not None and new.owner != old.owner
    if new.shard_id != old.shard_id or not (new.epoch == old.epoch or passed_on):
        identities = f"shard=`{old.shard_id}` epoch=`{old.epoch}` wanted=`{new.shard_id}` wanted_epoch=`{new.epoch}`"
        raise ValueError(f"a change keeps the shard's id, and its epoch but for a new owner: {identities}")
    for ledger in change.put_ledgers + change.delete_ledgers:
        if ledger.shard_id != old.shard_id:
            raise ValueError(f"a ledger of another shard: shard=`{old.shard_id}` ledger=`{ledger.ledger_id}`")
    for ledger in change.put_ledgers:
        if ledger.state is LedgerState.CLOSED and ledger.ledger_id not in snapshot.ledgers:
            raise ValueError(f"only an open ledger of the shard can be closed: ledger=`{ledger.ledger_id}`")
    closed = {ledger.ledger_id for ledger in change.put_ledgers if ledger.state is LedgerState.CLOSED}
    if not closed >= {task.ledger_id for task in change.put_copies}:
        raise ValueError(f"only a ledger that is closed is copied: shard=`{old.shard_id}`")
    if change.delete_shard:
        deleted = {ledger.ledger_id for ledger in change.delete_ledgers}
        linked = {segment.ledger_id for segment in new.segments}
        pages = set(range(new.first_page, new.first_page + new.pages))
        if not (deleted >= linked | set(snapshot.ledgers) and pages <= set(change.delete_pages)):
            raise ValueError(f"a shard is deleted after all of its ledgers and pages: shard=`{old.shard_id}`")


def _put_ledger(keyspace: Keyspace, snapshot: ShardSnapshot, ledger: LedgerRecord, txn: ShardTxn) -> None:
    ledger_id = ledger.ledger_id
    old = snapshot.ledgers.get(ledger_id)
    key = keyspace.shard_ledger(ledger.shard_id, ledger_id)
    revision = snapshot.ledger_revisions.get(ledger_id, 0)
    if ledger.state is LedgerState.CLOSED:
        txn.delete_record(key, revision)
        txn.replace_record(keyspace.ledger(ledger_id), 0, encode_ledger(ledger))
        txn.ledgers.pop(ledger_id)
    else:
        txn.replace_record(key, revision, encode_ledger(ledger))
        txn.ledgers[ledger_id] = ledger
    before = frozenset[str]() if old is None else old.roles()
    after = ledger.roles()
    txn.operations += [Delete(keyspace.index(bookie_id, ledger_id)) for bookie_id in sorted(before - after)]
    txn.operations += [Put(keyspace.index(bookie_id, ledger_id), b"") for bookie_id in sorted(after - before)]


def _delete_ledger(
    keyspace: Keyspace,
    snapshot: ShardSnapshot,
    ledger: LedgerRecord,
    outside: Mapping[str, KeyValue | None],
    txn: ShardTxn,
) -> None:
    """Repair changes the roles in a closed ledger, so the index keys to delete are those of the record just read.

    A copy under way fails by that: its claim goes with the record. Its task is dropped by who finds no record.
    """
    ledger_id = ledger.ledger_id
    stored = snapshot.ledgers.get(ledger_id)
    if stored is not None:
        txn.delete_record(keyspace.shard_ledger(ledger.shard_id, ledger_id), snapshot.ledger_revisions[ledger_id])
        txn.ledgers.pop(ledger_id)
    else:
        key = keyspace.ledger(ledger_id)
        found = outside[key]
        txn.delete_record(key, 0 if found is None else found.mod_revision)
        if found is None:
            return
        stored = decode_ledger(found.value)
    txn.operations += [Delete(keyspace.index(bookie_id, ledger_id)) for bookie_id in sorted(stored.roles())]


def _change_pages(
    keyspace: Keyspace, change: ShardChange, outside: Mapping[str, KeyValue | None], txn: ShardTxn
) -> None:
    for number, segments in change.put_pages:
        key = keyspace.page(change.record.shard_id, number)
        txn.replace_record(key, _revision(outside[key]), encode_page(segments))
    for number in change.delete_pages:
        key = keyspace.page(change.record.shard_id, number)
        txn.delete_record(key, _revision(outside[key]))


def _revision(item: KeyValue | None) -> int:
    return 0 if item is None else item.mod_revision


def _change_owner(keyspace: Keyspace, snapshot: ShardSnapshot, change: ShardChange, mark: bytes, txn: ShardTxn) -> None:
    old = snapshot.record.owner
    new = None if change.delete_shard else change.record.owner
    if new == old:
        return
    if old is not None:
        txn.operations.append(Delete(keyspace.owned(old, change.record.shard_id)))
    if new is not None:
        txn.compares.append(_session_lives(keyspace, new))
        txn.operations.append(Put(keyspace.owned(new, change.record.shard_id), mark))
