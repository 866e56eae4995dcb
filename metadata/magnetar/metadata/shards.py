"""The metadata of a shard as its owner sees it: loading, claiming, changing.

Every change is one compare-and-set transaction (`shard_txns.py`). What happens when it does not simply succeed:

1. No reply: the outcome is unknown. Wait, read the shard again, for as long as the store is silent.
2. A failed compare: read the shard again, at once.
3. The shard record was changed and all of its records are as I wanted them: my transaction was applied; done. (A claim
   is mine only if its random mark stands in the `owned/` key: two claims of one session write equal records.)
4. The shard record has its old mod_revision: nothing was applied *yet*. Send the transaction again. The first one may
   still be under way; both compare the same revisions, so that at most one of them is applied.
5. Anything else was written by somebody else: the ownership is lost, or the claim.

Whoever is cancelled between sending and judging does not know what is stored, and nothing read later proves that the
transaction will not be applied still. So this object refuses further changes then: load and claim again.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from enum import Enum
from types import MappingProxyType
from typing import Self, TypeVar

from magnetar.metadata.backoff import Backoff
from magnetar.metadata.codec import decode_ledger, decode_page
from magnetar.metadata.keyspace import Keyspace
from magnetar.metadata.records import LedgerRecord, LedgerState, Owner, Segment, ShardRecord
from magnetar.metadata.shard_txns import (
    ShardChange,
    ShardSnapshot,
    ShardTxn,
    claim_txn,
    claims_together,
    commit_txn,
    first_together,
    outside_keys,
    parse_snapshot,
    shard_creation_operations,
    snapshot_after,
    wanted_values,
)
from magnetar.metadata.store import KeyValue, MetadataError, MetadataStore, MetadataUnavailable, Put, TxnResult

__all__ = [
    "ClaimLost",
    "OutcomeUnknown",
    "OwnershipLost",
    "PageNotFound",
    "SessionEnded",
    "ShardChange",
    "ShardMetadata",
    "ShardNotFound",
    "ShardSnapshot",
    "StaleChange",
    "read_shards",
    "shard_creation_operations",
]

CLAIM_ATTEMPTS_MAX = 10
"""Claims refused by a compare in a row, while the shard looks claimable each time."""

READS_AT_ONCE = 16
MARK_BYTES = 16

T = TypeVar("T")


class ShardNotFound(Exception):
    """The shard does not exist (any more)."""

    def __init__(self, shard_id: int) -> None:
        super().__init__(f"no such shard: shard=`{shard_id}`")
        self.shard_id = shard_id


class PageNotFound(Exception):
    """The page of older segments does not exist: it was trimmed."""


class ClaimLost(Exception):
    """The shard has an owner that lives; `owner` is None only if the claimer's own session has ended."""

    def __init__(self, owner: Owner | None, reason: str) -> None:
        super().__init__(f"{reason}: owner=`{_show(owner)}`")
        self.owner = owner


class SessionEnded(ClaimLost):
    """The session that was to own the shard is over."""


class OwnershipLost(Exception):
    """Somebody else has written the shard's records; `owner` is None if it has none or was deleted."""

    def __init__(self, shard_id: int, owner: Owner | None, epoch: int) -> None:
        super().__init__(f"the shard is somebody else's: shard=`{shard_id}` owner=`{_show(owner)}` epoch=`{epoch}`")
        self.shard_id = shard_id
        self.owner = owner
        self.epoch = epoch


class StaleChange(Exception):
    """A change was computed from records that another change, committed before it, has replaced. Compute it again."""


class OutcomeUnknown(Exception):
    """An earlier change was cancelled before its outcome was known: load and claim the shard again."""


def _show(owner: Owner | None) -> str:
    return "none" if owner is None else f"{owner.broker_id}/{owner.session}"


class _Verdict(Enum):
    APPLIED = 1
    NOT_YET = 2
    FOREIGN = 3


class ShardMetadata:
    """One shard, for its owner or who wants to be. Changes are committed one at a time, in the order of the calls."""

    def __init__(
        self,
        store: MetadataStore,
        keyspace: Keyspace,
        snapshot: ShardSnapshot,
        rng: random.Random,
        sleep: Callable[[float], Awaitable[None]],
    ) -> None:
        self._store = store
        self._keyspace = keyspace
        self._snapshot = snapshot
        self._rng = rng
        self._sleep = sleep
        self._lock = asyncio.Lock()
        self._mark = b""
        self._session: Owner | None = None
        self._lost: OwnershipLost | None = None
        self._in_doubt = False

    @classmethod
    async def load(
        cls,
        store: MetadataStore,
        keyspace: Keyspace,
        shard_id: int,
        *,
        rng: random.Random | None = None,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> Self:
        """The shard as one range read finds it. Raises ShardNotFound, MetadataUnavailable."""
        snapshot = await _read_snapshot(store, keyspace, shard_id)
        if snapshot is None:
            raise ShardNotFound(shard_id)
        return cls(store, keyspace, snapshot, rng or random.Random(), sleep)

    @classmethod
    async def accept(
        cls,
        store: MetadataStore,
        keyspace: Keyspace,
        shard_id: int,
        session: Owner,
        epoch: int,
        *,
        rng: random.Random | None = None,
    ) -> Self:
        """The shard as its former owner passed it on to this session in this epoch: owned without a claim.

        One range read. Should this session claim the shard beside it, the changes of one of the two fail.
        Raises ClaimLost if the shard was not passed on to this session, ShardNotFound, MetadataUnavailable.
        """
        found = await cls.load(store, keyspace, shard_id, rng=rng)
        record = found.record
        fresh = {segment.ledger_id for segment in record.segments[-1:]}
        expected = record.owner == session and record.epoch == epoch
        if not expected or not found.ledgers.keys() <= fresh or not _all_open(found.ledgers.values()):
            raise ClaimLost(record.owner, "the shard was not passed on")
        found._become_owner(session, found._rng.randbytes(MARK_BYTES), found._snapshot)
        return found

    @classmethod
    async def claim_together(
        cls,
        store: MetadataStore,
        keyspace: Keyspace,
        snapshots: Sequence[ShardSnapshot],
        session: Owner,
        *,
        rng: random.Random,
    ) -> list[Self]:
        """Claims the first of these shards, as many as fit into one transaction: all of these, or none.

        Returns them; nothing if one of them has a living owner, or was changed since it was read. One request.
        Raises MetadataUnavailable: read again, whoever of this session claims them then excludes this claim.
        """
        marks = [rng.randbytes(MARK_BYTES) for _ in snapshots]
        txns = [
            claim_txn(keyspace, snapshot, session, mark, from_owner_alive=False)
            for snapshot, mark in zip(snapshots, marks, strict=True)
        ]
        txns = txns[: first_together(txns)]
        result = await store.txn(*claims_together(txns))
        if not result.succeeded:
            return []
        claimed = []
        for before, mark, txn in zip(snapshots, marks, txns, strict=False):
            shard = cls(store, keyspace, before, rng, asyncio.sleep)
            shard._become_owner(session, mark, snapshot_after(keyspace, before, txn, result.revision))
            claimed.append(shard)
        return claimed

    @property
    def shard_id(self) -> int:
        return self._snapshot.record.shard_id

    @property
    def record(self) -> ShardRecord:
        return self._snapshot.record

    @property
    def epoch(self) -> int:
        return self._snapshot.record.epoch

    @property
    def ledgers(self) -> Mapping[int, LedgerRecord]:
        """The ledgers that are not CLOSED."""
        return MappingProxyType(self._snapshot.ledgers)

    @property
    def session(self) -> Owner:
        """The session that claimed the shard through this object."""
        assert self._session is not None, "not claimed"
        return self._session

    # Claiming.

    async def claim(
        self, session: Owner, *, from_owner_alive: bool = False, on_unknown: Callable[[], None] | None = None
    ) -> None:
        """Makes `session` the owner in a new epoch; nothing if it is already, by an earlier call of this.

        from_owner_alive   a planned hand-off: the recorded owner lives and knows of it
        Waits while the store is silent. Raises ClaimLost, SessionEnded, ShardNotFound.
        """
        async with self._lock:
            self._check_settled()
            if self._lost is None and self._session == session:
                return
            await self._claim(session, from_owner_alive, _Silence(self._rng, self._sleep, on_unknown))

    async def _claim(self, session: Owner, from_owner_alive: bool, silence: _Silence) -> None:
        handing_over = self.record.owner if from_owner_alive else None
        mark = self._rng.randbytes(MARK_BYTES)
        refused = 0
        while refused < CLAIM_ATTEMPTS_MAX:
            alive = handing_over is not None and self.record.owner == handing_over
            txn = claim_txn(self._keyspace, self._snapshot, session, mark, from_owner_alive=alive)
            result = await self._send(txn, silence)
            if result is not None and result.succeeded:
                self._become_owner(session, mark, snapshot_after(self._keyspace, self._snapshot, txn, result.revision))
                return
            snapshot = await silence.outlast(self._read)
            if snapshot is None:
                raise ShardNotFound(self.shard_id)
            verdict = await self._judge(snapshot, txn, silence)
            if verdict is _Verdict.APPLIED and await self._is_marked(session, mark, silence):
                self._become_owner(session, mark, snapshot)
                return
            before, self._snapshot = self._snapshot, snapshot
            await self._check_claimable(before, session, handing_over, silence)
            if result is not None:
                refused += 1
                await silence.pause()
        raise ClaimLost(self.record.owner, "the shard changes too fast to be claimed")

    async def _is_marked(self, session: Owner, mark: bytes, silence: _Silence) -> bool:
        key = self._keyspace.owned(session, self.shard_id)
        found = await silence.outlast(lambda: self._store.get(key))
        return found is not None and found.value == mark

    def _become_owner(self, session: Owner, mark: bytes, snapshot: ShardSnapshot) -> None:
        self._session = session
        self._mark = mark
        self._adopt(snapshot)
        self._lost = None

    async def _check_claimable(
        self, before: ShardSnapshot, session: Owner, handing_over: Owner | None, silence: _Silence
    ) -> None:
        """Raises when trying again is pointless: I have no session, or the shard has a living owner."""
        if not await self._lives(session, silence):
            raise SessionEnded(None, "the session of the claimer has ended")
        owner = self._snapshot.record.owner
        if owner is None or owner == handing_over:
            return
        if owner == session:
            if self._snapshot.record.epoch != before.record.epoch:
                raise ClaimLost(owner, "the shard was claimed at the same time by the same session")
        elif await self._lives(owner, silence):
            raise ClaimLost(owner, "the shard has an owner")

    async def _lives(self, owner: Owner, silence: _Silence) -> bool:
        key = self._keyspace.broker(owner.broker_id)
        found = await silence.outlast(lambda: self._store.get(key))
        return found is not None and found.create_revision == owner.session

    # Changing.

    async def commit(self, change: ShardChange, *, on_unknown: Callable[[], None] | None = None) -> None:
        """Applies the change; durable on return. Only after `claim`.

        While the store is silent it waits and asks again; `on_unknown` is called once, at the first silence. A commit
        that waits for another keeps its change only if nothing it touches was changed by that: else StaleChange.
        Raises ValueError (a change that contradicts the shard, or of more than 100 operations), OwnershipLost,
        SessionEnded (the change names an owner whose session is over), StaleChange, OutcomeUnknown.
        """
        base = self._snapshot
        async with self._lock:
            if self._snapshot is not base:
                change = _rebase(base, self._snapshot, change)
            await self._commit(change, on_unknown)

    async def update(
        self, compute: Callable[[], ShardChange | None], *, on_unknown: Callable[[], None] | None = None
    ) -> None:
        """Like `commit`, of a change that is computed when its turn has come; None changes nothing."""
        async with self._lock:
            change = compute()
            if change is not None:
                await self._commit(change, on_unknown)

    async def renew_session(self, session: Owner, *, on_unknown: Callable[[], None] | None = None) -> None:
        """Puts the broker's new session in place of its old one, in the same epoch. Raises like `commit`."""
        await self.update(lambda: ShardChange(replace(self.record, owner=session)), on_unknown=on_unknown)

    async def _commit(self, change: ShardChange, on_unknown: Callable[[], None] | None) -> None:
        self._check_settled()
        if self._lost is not None:
            raise self._lost
        assert self._session is not None, "a shard is claimed before it is changed"
        silence = _Silence(self._rng, self._sleep, on_unknown)
        while True:
            outside = await silence.outlast(lambda: self._read_outside(change))
            txn = commit_txn(self._keyspace, self._snapshot, change, outside, self._mark)
            result = await self._send(txn, silence)
            if result is not None and result.succeeded:
                self._adopt(snapshot_after(self._keyspace, self._snapshot, txn, result.revision))
                break
            snapshot = await silence.outlast(self._read)
            verdict = await self._judge(snapshot, txn, silence)
            if verdict is _Verdict.APPLIED:
                if snapshot is not None:
                    self._adopt(snapshot)
                break
            if verdict is _Verdict.FOREIGN:
                self._lose(snapshot)
            await self._check_new_owner(change.record.owner, silence)
            if result is not None:
                await silence.pause()
        self._in_doubt = False
        self._become_owned_by(None if change.delete_shard else change.record.owner)

    def _become_owned_by(self, owner: Owner | None) -> None:
        assert self._session is not None
        if owner is not None and owner.broker_id == self._session.broker_id:
            self._session = owner
        else:
            self._lost = OwnershipLost(self.shard_id, owner, self.epoch)

    async def _check_new_owner(self, owner: Owner | None, silence: _Silence) -> None:
        if owner is not None and owner != self.record.owner and not await self._lives(owner, silence):
            self._in_doubt = False  # what may still be under way compares that session too
            raise SessionEnded(owner, "the session of the new owner has ended")

    def _lose(self, snapshot: ShardSnapshot | None) -> None:
        self._in_doubt = False
        if snapshot is None:
            self._lost = OwnershipLost(self.shard_id, None, self.epoch)
        else:
            self._lost = OwnershipLost(self.shard_id, snapshot.record.owner, snapshot.record.epoch)
        raise self._lost

    async def verify(self) -> None:
        """Reads whose the shard is. Raises OwnershipLost if not this broker's; MetadataUnavailable proves nothing."""
        if self._lost is not None:
            raise self._lost
        snapshot = await self._read()
        if snapshot is None:
            raise OwnershipLost(self.shard_id, None, self.epoch)
        record = snapshot.record
        # The broker and not its session: a new session may just be on its way into the record, in the same epoch.
        if record.epoch != self.epoch or record.owner is None or record.owner.broker_id != self.session.broker_id:
            raise OwnershipLost(self.shard_id, record.owner, record.epoch)

    # Reading what does not stand beside the shard record. All of these raise MetadataUnavailable.

    async def closed_ledger(self, ledger_id: int) -> LedgerRecord | None:
        found = await self._store.get(self._keyspace.ledger(ledger_id))
        return None if found is None else decode_ledger(found.value)

    async def closed_ledgers(self, ledger_ids: Iterable[int]) -> dict[int, LedgerRecord]:
        """The closed ledgers among these; those that do not exist are left out."""
        found = await self._get_all([self._keyspace.ledger(ledger_id) for ledger_id in ledger_ids])
        records = [decode_ledger(item.value) for item in found.values() if item is not None]
        return {record.ledger_id: record for record in records}

    async def page(self, number: int) -> tuple[Segment, ...]:
        """Raises PageNotFound."""
        found = await self._store.get(self._keyspace.page(self.shard_id, number))
        if found is None:
            raise PageNotFound(f"no such page of segments: shard=`{self.shard_id}` page=`{number}`")
        return decode_page(found.value)

    # The steps.

    def _check_settled(self) -> None:
        if self._in_doubt:
            raise OutcomeUnknown(f"an earlier change was cancelled: load the shard again: shard=`{self.shard_id}`")

    def _adopt(self, snapshot: ShardSnapshot) -> None:
        self._snapshot = snapshot
        self._in_doubt = False

    async def _send(self, txn: ShardTxn, silence: _Silence) -> TxnResult | None:
        """None: no reply, the outcome is unknown, and some time has passed since."""
        doubted, self._in_doubt = self._in_doubt, True
        try:
            result = await self._store.txn(txn.compares, txn.operations)
        except MetadataUnavailable:
            await silence.pause(unknown=True)
            return None
        except (MetadataError, ValueError):
            self._in_doubt = doubted  # refused: this one was not applied
            raise
        self._in_doubt = doubted
        return result

    async def _read(self) -> ShardSnapshot | None:
        return await _read_snapshot(self._store, self._keyspace, self.shard_id)

    async def _read_outside(self, change: ShardChange) -> Mapping[str, KeyValue | None]:
        return await self._get_all(outside_keys(self._keyspace, self._snapshot, change))

    async def _get_all(self, keys: list[str]) -> dict[str, KeyValue | None]:
        found: dict[str, KeyValue | None] = {}
        for start in range(0, len(keys), READS_AT_ONCE):
            some = keys[start : start + READS_AT_ONCE]
            found.update(zip(some, await asyncio.gather(*(self._store.get(key) for key in some)), strict=True))
        return found

    async def _judge(self, found: ShardSnapshot | None, txn: ShardTxn, silence: _Silence) -> _Verdict:
        """What the shard, read after `txn` was sent, says about it."""
        wanted = wanted_values(self._keyspace.shard_prefix(self.shard_id), txn)
        if found is None:
            deleted = wanted[self._keyspace.shard(self.shard_id)] is None
            return _Verdict.APPLIED if deleted else _Verdict.FOREIGN
        if found.revision == self._snapshot.revision:
            return _Verdict.NOT_YET
        if any(found.values.get(key) != value for key, value in wanted.items()):
            return _Verdict.FOREIGN
        closed = await silence.outlast(lambda: self._closed_as_wanted(txn))
        return _Verdict.APPLIED if closed else _Verdict.FOREIGN

    async def _closed_as_wanted(self, txn: ShardTxn) -> bool:
        """Repair may have moved a closed ledger to other bookies by now; all else is as it was written."""
        prefix = self._keyspace.ledgers_prefix()
        for operation in txn.operations:
            if isinstance(operation, Put) and operation.key.startswith(prefix):
                found = await self._store.get(operation.key)
                wanted = decode_ledger(operation.value)
                if found is None:
                    return False
                if replace(decode_ledger(found.value), fragments=wanted.fragments, copy=wanted.copy) != wanted:
                    return False
        return True


async def read_shards(store: MetadataStore, keyspace: Keyspace, shard_ids: Iterable[int]) -> list[ShardSnapshot]:
    """Those of these shards that exist, by number; neighbours are read together. Raises MetadataUnavailable."""
    wanted: dict[str, list[int]] = {}
    for shard_id in sorted(set(shard_ids)):
        wanted.setdefault(keyspace.shard_neighbours(shard_id), []).append(shard_id)

    async def read(neighbours: str, ids: list[int]) -> list[ShardSnapshot]:
        items = (await store.range(neighbours if len(ids) > 1 else keyspace.shard_prefix(ids[0]))).items
        parts = [
            parse_snapshot(keyspace, shard_id, [item for item in items if item.key.startswith(prefix)])
            for shard_id, prefix in zip(ids, map(keyspace.shard_prefix, ids), strict=True)
        ]
        return [part for part in parts if part is not None]

    found: list[ShardSnapshot] = []
    groups = list(wanted.items())
    for start in range(0, len(groups), READS_AT_ONCE):
        some = groups[start : start + READS_AT_ONCE]
        for parts in await asyncio.gather(*(read(neighbours, ids) for neighbours, ids in some)):
            found += parts
    return found


class _Silence:
    """How one call waits for a store that does not answer."""

    def __init__(
        self, rng: random.Random, sleep: Callable[[float], Awaitable[None]], on_unknown: Callable[[], None] | None
    ) -> None:
        self._backoff = Backoff(rng)
        self._sleep = sleep
        self._on_unknown = on_unknown

    async def pause(self, *, unknown: bool = False) -> None:
        if unknown and self._on_unknown is not None:
            on_unknown, self._on_unknown = self._on_unknown, None
            on_unknown()
        await self._sleep(self._backoff.next_s())

    async def outlast(self, read: Callable[[], Awaitable[T]]) -> T:
        """Reads until there is an answer."""
        while True:
            try:
                return await read()
            except MetadataUnavailable:
                await self.pause(unknown=True)


async def _read_snapshot(store: MetadataStore, keyspace: Keyspace, shard_id: int) -> ShardSnapshot | None:
    result = await store.range(keyspace.shard_prefix(shard_id))
    return parse_snapshot(keyspace, shard_id, result.items)


def _all_open(ledgers: Iterable[LedgerRecord]) -> bool:
    return all(ledger.state is LedgerState.OPEN for ledger in ledgers)


def _rebase(base: ShardSnapshot, current: ShardSnapshot, change: ShardChange) -> ShardChange:
    """The change of `base` as a change of `current`; raises StaleChange if both changed one record."""
    touched = [ledger.ledger_id for ledger in change.put_ledgers + change.delete_ledgers]
    stale = any(base.ledgers.get(ledger_id) != current.ledgers.get(ledger_id) for ledger_id in touched)
    if change.record == base.record and not change.delete_shard:
        change = replace(change, record=current.record)
    elif current.record != base.record:
        stale = True
    if stale:
        raise StaleChange(f"another change was committed first: shard=`{base.record.shard_id}`")
    return change
