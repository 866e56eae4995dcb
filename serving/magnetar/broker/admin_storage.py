"""Draining and removing bookies, and how copies are made: the part of the admin service that moves storage.

What is asked for is written down, and done by others: bookies, the auditor and the owners of shards follow these
records. So any broker can take the order, and it survives them all.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Awaitable, Callable, Collection, Mapping
from dataclasses import replace

from magnetar.broker.describe import Records
from magnetar.broker.refusals import RETRY_AFTER_MS, order_refused
from magnetar.metadata.codec import (
    decode_bookie,
    decode_copy,
    decode_loss,
    decode_repair,
    encode_drain,
    encode_repair,
)
from magnetar.metadata.keyspace import Keyspace
from magnetar.metadata.records import BookieRegistration, BookieState, CopyTask, Drain, RepairSettings
from magnetar.metadata.store import Compare, Delete, MetadataStore, Operation, Put, absent, exists, unchanged
from magnetar.node.rpc import Context, invalid_argument, parse, unavailable
from magnetar.v1 import metadata_pb2
from magnetar.v1 import repair_pb2 as pb

PROBLEMS_MAX = 20
DELAY_S_MAX = 7 * 24 * 3600.0


class StorageAdmin:
    """write_quorum: so many bookies must stay that take new ledgers. ensemble_size: a ledger needs no more racks."""

    def __init__(
        self,
        store: MetadataStore,
        keyspace: Keyspace,
        write_quorum: int,
        ensemble_size: int,
        now_us: Callable[[], int],
    ) -> None:
        self._store = store
        self._keyspace = keyspace
        self._records = Records(store, keyspace)
        self._write_quorum = write_quorum
        self._ensemble_size = ensemble_size
        self._now_us = now_us

    def methods(self) -> Mapping[str, Callable[[bytes, Context], Awaitable[bytes]]]:
        return {
            "DrainBookie": self.drain,
            "UndrainBookie": self.undrain,
            "DecommissionBookie": self.decommission,
            "ConfigureRepair": self.configure_repair,
        }

    async def drain(self, data: bytes, _context: Context) -> bytes:
        """Refused unless enough others take new ledgers, or it drains already. The transaction compares that these
        still do, so that of two drains that are asked for at the same time one is refused."""
        request = parse(pb.DrainBookieRequest, data)
        bookie, key = request.bookie_id, self._drain_key(request.bookie_id)
        await self._check_known(bookie)
        changed = await self._store.get(key) is None
        registered = await self._registered()
        staying = await self._staying(registered, bookie)
        if changed and len(staying) < self._write_quorum:
            raise order_refused(
                f"too few bookies would be left that take new ledgers: start another one first bookie=`{bookie}` "
                f"left=`{len(staying)}` needed=`{self._write_quorum}`"
            )
        ledgers = await self._count_ledgers(bookie)
        if changed and not request.dry_run:
            compares = [absent(key), exists(self._keyspace.cookie(bookie))]
            for other in staying[: self._write_quorum]:
                compares += [absent(self._keyspace.bookie_drain(other)), exists(self._keyspace.bookie(other))]
            await self._change(compares, [Put(key, encode_drain(Drain(bookie, self._now_us())))])
        warning = self._rack_warning(registered, bookie, staying) if ledgers else ""
        return pb.DrainBookieResponse(changed=changed, ledgers=ledgers, warning=warning).SerializeToString()

    async def undrain(self, data: bytes, _context: Context) -> bytes:
        request = parse(pb.UndrainBookieRequest, data)
        bookie, key = request.bookie_id, self._drain_key(request.bookie_id)
        await self._check_known(bookie)
        found = await self._store.get(key)
        if found is not None and not request.dry_run:
            await self._change([unchanged(key, found.mod_revision)], [Delete(key)])
        ledgers = await self._count_ledgers(bookie)
        return pb.UndrainBookieResponse(changed=found is not None, ledgers=ledgers).SerializeToString()

    async def decommission(self, data: bytes, _context: Context) -> bytes:
        """Its cookie, drain and loss go. A ledger that a broker puts on it meanwhile, because it had not heard that the
        session is over, names a bookie that nobody knows: the auditor treats it as lost."""
        request = parse(pb.DecommissionBookieRequest, data)
        bookie, keys = request.bookie_id, self._keyspace
        self._drain_key(bookie)
        cookie = await self._check_known(bookie)
        ledgers = await self._count_ledgers(bookie)
        if ledgers:
            raise order_refused(
                f"data stands on it: drain it first, with `magnetar bookies drain {bookie}`, or if it is lost wait "
                f"until repair has made its copies anew bookie=`{bookie}` ledgers=`{ledgers}`"
            )
        if await self._store.get(keys.bookie(bookie)) is not None:
            raise order_refused(f"the bookie runs: stop it first, for good bookie=`{bookie}`")
        if not request.dry_run:
            compares = [unchanged(keys.cookie(bookie), cookie), absent(keys.bookie(bookie))]
            await self._change(
                compares, [Delete(keys.cookie(bookie)), Delete(keys.bookie_drain(bookie)), Delete(keys.loss(bookie))]
            )
        return pb.DecommissionBookieResponse().SerializeToString()

    async def configure_repair(self, data: bytes, _context: Context) -> bytes:
        request = parse(pb.ConfigureRepairRequest, data)
        key = self._keyspace.repair()
        found = await self._store.get(key)
        before = RepairSettings() if found is None else decode_repair(found.value)
        after = _configured(before, request)
        if after != before and not request.dry_run:
            await self._change(
                [unchanged(key, 0 if found is None else found.mod_revision)], [Put(key, encode_repair(after))]
            )
        response = pb.ConfigureRepairResponse(
            settings=metadata_pb2.RepairSettings(
                enabled=after.enabled, delay_s=after.delay_s, bytes_per_s=after.bytes_per_s
            )
        )
        await self._add_waiting(response)
        async for item in self._records.under(self._keyspace.losses_prefix()):
            loss = decode_loss(item.value)
            response.lost.add(bookie_id=loss.bookie_id, since_us=loss.since_us, given_up=loss.given_up)
        return response.SerializeToString()

    async def _add_waiting(self, response: pb.ConfigureRepairResponse) -> None:
        waiting: Counter[int] = Counter()
        stalled: Counter[int] = Counter()
        async for item in self._records.under(self._keyspace.copies_prefix()):
            task = decode_copy(item.value)
            waiting[task.reason.value] += 1
            if task.problem:
                stalled[task.reason.value] += 1
                if task.place and task.place not in response.stalled_bookies:
                    response.stalled_bookies[task.place] = _problem(task)
                if len(response.problems) < PROBLEMS_MAX:
                    response.problems.append(_problem(task))
        if (unnamed := stalled.total() - len(response.problems)) > 0:
            response.problems.append(f"and {unnamed} more")
        for reason, copies in sorted(waiting.items()):
            response.copies.add(reason=reason, copies=copies, stalled=stalled[reason])

    def _drain_key(self, bookie: str) -> str:
        try:
            return self._keyspace.bookie_drain(bookie)
        except ValueError:
            raise invalid_argument(f"no bookie can have this id bookie=`{bookie}`") from None

    async def _check_known(self, bookie: str) -> int:
        """The revision of its cookie."""
        found = await self._store.get(self._keyspace.cookie(bookie))
        if found is None:
            raise order_refused(f"there is no such bookie: see `magnetar bookies list` bookie=`{bookie}`")
        return found.mod_revision

    async def _registered(self) -> dict[str, BookieRegistration]:
        found = [decode_bookie(i.value) async for i in self._records.under(self._keyspace.bookies_prefix())]
        return {one.bookie_id: one for one in found}

    async def _staying(self, registered: Mapping[str, BookieRegistration], bookie: str) -> list[str]:
        """The others that take new ledgers."""
        drained = {
            self._keyspace.parse_bookie_drain(i.key)
            async for i in self._records.under(self._keyspace.bookie_drains_prefix())
        }
        return sorted(
            name
            for name, one in registered.items()
            if one.state is BookieState.WRITABLE and name not in {*drained, bookie}
        )

    def _rack_warning(self, registered: Mapping[str, BookieRegistration], bookie: str, staying: Collection[str]) -> str:
        """What its drain costs if its ledgers lose their copies in its rack, and other racks do not make up for it."""
        racks = {registered[name].rack for name in staying}
        if bookie not in registered or registered[bookie].rack in racks or len(racks) >= self._ensemble_size:
            return ""
        rack = registered[bookie].rack
        return (
            f"{bookie} is the only bookie {f'of rack {rack}' if rack else 'without a rack'} that takes copies: its "
            "ledgers lose this rack; when it has a bookie again, `magnetar rebalance plan` says what wins it back"
        )

    async def _count_ledgers(self, bookie: str) -> int:
        count = 0
        async for _ in self._records.under(self._keyspace.index_prefix(bookie)):
            count += 1
        return count

    async def _change(self, compares: list[Compare], operations: list[Operation]) -> None:
        if not (await self._store.txn(compares, operations)).succeeded:
            raise unavailable("the cluster has changed meanwhile: try again", retry_after_ms=RETRY_AFTER_MS)


def _configured(before: RepairSettings, request: pb.ConfigureRepairRequest) -> RepairSettings:
    after = before
    if request.HasField("enabled"):
        after = replace(after, enabled=request.enabled)
    if request.HasField("delay_s"):
        if not 0 <= request.delay_s <= DELAY_S_MAX:
            raise invalid_argument(f"the delay is from 0 to {DELAY_S_MAX:g} seconds delay_s=`{request.delay_s:g}`")
        after = replace(after, delay_s=request.delay_s)
    if request.HasField("bytes_per_s"):
        if not request.bytes_per_s:
            raise invalid_argument("at a rate of zero repair would never end: switch it off instead")
        after = replace(after, bytes_per_s=request.bytes_per_s)
    return after


def _problem(task: CopyTask) -> str:
    place = f"the part of {task.place}" if task.place else "a vacant place"
    return f"ledger {task.ledger_id}, {place}: {task.problem}"
