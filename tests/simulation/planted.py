"""Bugs to plant: each replaces one function of the code under test by one that makes a classic mistake.

They show that the simulator finds what it is there for; see README.md for how many seeds each took.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

from magnetar.bookie import reads
from magnetar.bookie.collector import Collector
from magnetar.bookie.entry_store import Damaged, GroupWrites
from magnetar.bookie.group_commit import GroupCommit
from magnetar.bookie.handlers import BookieHandlers
from magnetar.bookie.judge import Fence, Remove
from magnetar.broker import served
from magnetar.broker.dedup import ProducerTable
from magnetar.broker.shard import ServedShard
from magnetar.broker.shard_runner import ShardRunner
from magnetar.ledger.errors import LedgerLost
from magnetar.ledger.recoverer import Recoverer
from magnetar.ledger.recovery import AskEntries, AskLac
from magnetar.managed_log.appender import Appender
from magnetar.managed_log.cursor_ledger import CursorLedger
from magnetar.managed_log.errors import Released
from magnetar.metadata import copy_txns, shards
from magnetar.metadata.copy_txns import CopyTxn, Stored, StoredTask
from magnetar.metadata.records import CopyClaim, OperationState
from magnetar.metadata.shards import ShardMetadata
from magnetar.metadata.store import MetadataUnavailable, Put
from magnetar.node.rpc import Refused
from magnetar.repair.operation_txns import StoredOperation
from magnetar.repair.operations import RunningOperation
from magnetar.repair.replicator import Replicator
from magnetar.repair.runner import Runner


def recovery_without_fencing() -> None:
    drive = Recoverer._drive

    def planted(self: Recoverer, effects: Sequence[Any]) -> None:
        unfenced: list[Any] = []
        for effect in effects:
            match effect:
                case AskLac(sequence, bookie, query):
                    unfenced.append(AskLac(sequence, bookie, replace(query, fence=False)))
                case AskEntries(sequence, bookie, group):
                    unfenced.append(AskEntries(sequence, bookie, replace(group, fence=False)))
                case _:
                    unfenced.append(effect)
        drive(self, unfenced)

    Recoverer._drive = planted  # type: ignore[method-assign]


def fence_answered_on_arrival() -> None:
    async def planted(self: BookieHandlers, ledger_id: int, epoch: int, token: bytes) -> str:
        self._commits.control(Fence(ledger_id, epoch, token))
        return ""

    BookieHandlers._fence = planted  # type: ignore[method-assign]


def io_error_as_provably_not() -> None:
    verified = reads.verified

    def planted(value: bytes | Damaged | None, ledger_id: int, entry_id: int) -> bytes | Damaged | None:
        found = verified(value, ledger_id, entry_id)
        return None if isinstance(found, Damaged) else found

    reads.verified = planted


def ack_before_fsync() -> None:
    async def planted(self: GroupCommit, writes: GroupWrites) -> None:
        asyncio.get_running_loop().create_task(self._store.commit(writes))

    GroupCommit._make_durable = planted  # type: ignore[method-assign]


def owner_goes_on_after_a_lost_claim() -> None:
    def planted(self: ShardMetadata, snapshot: Any) -> None:
        self._in_doubt = False
        if snapshot is not None:
            self._adopt(snapshot)

    ShardMetadata._lose = planted  # type: ignore[method-assign,assignment]


def dedup_table_forgotten_at_takeover() -> None:
    async def planted(shard_log: Any) -> ProducerTable:
        return ProducerTable(shard_log.end_offset)

    served.rebuild_producers = planted


def cursor_deltas_answered_before_the_linking_txn() -> None:
    async def planted(self: CursorLedger) -> None:
        await self._link_next()
        new = self._writer(self._shard.record.next_cursor)
        self._take()
        floors = self.table.floors()
        payloads, covered_offset = self._encode_snapshot()
        if not await self._add_all(new, payloads):
            new.abandon()
            await self._shard.change(self._drop_next)
            return
        self.covered_offset = covered_offset
        self.table.stored_are(floors)
        self._answer()
        await self._shard.change(self._make_current)
        if self._handle is not None:
            self._handle.abandon()
        self._handle, self._broken, self._roll_wanted = new, False, False

    CursorLedger._roll = planted  # type: ignore[method-assign]


def next_ledger_written_before_the_last_ack() -> None:
    async def planted(self: Appender) -> None:
        left = self._leave()
        waiting, self._in_flight = list(self._in_flight), deque()
        end = replace(self.segment_end(left.length), end_offset=self._next_offset)
        self._ending = end
        self._chain.update(self.view(self._shard.record))
        self._start(self._shard.ledgers[self._shard.record.next_ledger])
        try:
            await left.confirmed()
        except LedgerLost:
            self._shard.release(Released(None, "the ledger that was left is lost"))
            return
        self._complete(left.ledger_id, waiting)
        await self._commit_end(end, await self._closed(left))

    Appender._switch = planted  # type: ignore[method-assign]


def claim_that_compares_only_the_shard_record() -> None:
    claim_txn = shards.claim_txn

    def planted(keyspace: Any, snapshot: Any, session: Any, mark: bytes, *, from_owner_alive: bool) -> Any:
        txn = claim_txn(keyspace, snapshot, session, mark, from_owner_alive=from_owner_alive)
        txn.compares = [c for c in txn.compares if c.key == keyspace.shard(snapshot.record.shard_id)]
        return txn

    shards.claim_txn = planted


def collector_that_does_not_refuse_adds() -> None:
    async def planted(self: Collector, ledger_id: int, shard_id: int) -> bool:
        try:
            if await self._has_role(ledger_id, shard_id):
                return False
        except MetadataUnavailable:
            return False
        return not (await self._commits.control(Remove(ledger_id, self._now_us()))).refusal

    Collector._delete = planted  # type: ignore[method-assign]


def copy_without_a_claim() -> None:
    finish = copy_txns.finish

    async def planted_claim(self: Replicator, ledger: Stored, task: StoredTask) -> Stored:
        claimed = replace(ledger.record, copy=CopyClaim(self._bookie_id, task.task.place, b"planted"))
        return Stored(claimed, ledger.revision)

    def planted_finish(keyspace: Any, ledger: Stored, task: StoredTask) -> CopyTxn:
        txn = finish(keyspace, ledger, task)
        if not task.task.completes:
            txn.operations.append(Put(keyspace.index(task.task.target, task.task.ledger_id), b""))
        return txn

    Replicator._claim = planted_claim  # type: ignore[method-assign]
    copy_txns.finish = planted_finish


def end_of_a_copy_that_drops_a_concurrent_change() -> None:
    finish = copy_txns.finish

    def planted(keyspace: Any, ledger: Stored, task: StoredTask) -> CopyTxn:
        txn = finish(keyspace, ledger, task)
        txn.compares = [c for c in txn.compares if c.key != keyspace.ledger(task.task.ledger_id)]
        return txn

    copy_txns.finish = planted


def collector_that_trusts_a_partial_listing() -> None:
    """It takes what it got before the store fell silent for all there is."""

    async def planted(self: Collector, local: Iterable[int]) -> list[tuple[int, int]]:
        try:
            items = (await self._metadata.range(self._index_prefix())).items
        except MetadataUnavailable:
            items = ()
        indexed = {self._keyspace.parse_index(item.key)[1] for item in items}
        return [(ledger_id, 0) for ledger_id in local if ledger_id not in indexed]

    async def planted_role(self: Collector, ledger_id: int, shard_id: int) -> bool:
        return False

    Collector._unnamed = planted  # type: ignore[method-assign]
    Collector._has_role = planted_role  # type: ignore[method-assign]


def move_that_is_claimed_as_it_was_planned() -> None:
    """It does not look at the racks of those who have come to stand beside it meanwhile."""

    def planted(self: Replicator, record: Any, task: Any) -> bool:
        return False

    Replicator._loses_rack = planted  # type: ignore[method-assign]


def cancelled_rebalancing_that_forgets_late_moves() -> None:
    """It does not look any more at what became of the moves that were under way: no rollback takes them back."""
    settle = RunningOperation._settle

    def planted(self: RunningOperation, place: Any, ledger: Stored | None, observed: Any) -> bool:
        return False if self.is_cancelled else settle(self, place, ledger, observed)

    RunningOperation._settle = planted  # type: ignore[method-assign]


def cancelled_rebalancing_that_is_taken_up_again() -> None:
    """Who reads an operation that has not ended takes it for one that runs, and makes its tasks."""
    held_before = Runner._held

    async def planted(self: Runner, stored: StoredOperation) -> Any:
        held = await held_before(self, stored)
        if held.core.operation.state is OperationState.CANCELLED:
            held.core.operation = replace(held.core.operation, state=OperationState.RUNNING)
        return held

    Runner._held = planted  # type: ignore[method-assign]


def hand_off_counted_though_it_was_refused() -> None:
    move = ShardRunner._move

    async def planted(self: ShardRunner, move_to_make: Any, reason: str) -> None:
        with suppress(Refused):
            await move(self, move_to_make, reason)

    ShardRunner._move = planted  # type: ignore[method-assign]


def name_opened_at_a_replaced_owner() -> None:
    async def planted(self: ServedShard) -> None:
        self.check_served()

    ServedShard.check_owned = planted  # type: ignore[method-assign]


PLANTS: dict[str, Callable[[], None]] = {
    "recovery reads without fencing": recovery_without_fencing,
    "fencing read answered on arrival": fence_answered_on_arrival,
    "io error as provably not": io_error_as_provably_not,
    "ack before fsync": ack_before_fsync,
    "owner goes on after a lost claim": owner_goes_on_after_a_lost_claim,
    "dedup table forgotten at takeover": dedup_table_forgotten_at_takeover,
    "cursor deltas answered before the linking txn": cursor_deltas_answered_before_the_linking_txn,
    "next ledger written before the last add is acked": next_ledger_written_before_the_last_ack,
    "claim that compares only the shard record": claim_that_compares_only_the_shard_record,
    "collector that does not refuse adds": collector_that_does_not_refuse_adds,
    "name opened at a replaced owner": name_opened_at_a_replaced_owner,
    "copy without a claim": copy_without_a_claim,
    "end of a copy that drops a concurrent change": end_of_a_copy_that_drops_a_concurrent_change,
    "collector that trusts a partial listing": collector_that_trusts_a_partial_listing,
    "move that is claimed as it was planned": move_that_is_claimed_as_it_was_planned,
    "cancelled rebalancing that forgets late moves": cancelled_rebalancing_that_forgets_late_moves,
    "cancelled rebalancing that is taken up again": cancelled_rebalancing_that_is_taken_up_again,
    "hand-off counted though it was refused": hand_off_counted_though_it_was_refused,
}
