"""The shards that a broker serves: opened at first use, each once, put to rest when nobody uses them, and given up.

Opening a shard is: claim it, recover and open its log, rebuild the table of its producers, make its cursors those of
the topic's subscriptions. A shard that another broker is about to pass on is being opened, too, from the moment it is
expected. Whoever wants the shard meanwhile waits for the same opening.

A shard at rest is this broker's, all of its ledgers are closed, and nothing of it is in memory but its number. It comes
to rest when nobody has used it for a while, or when it was claimed from a broker that is gone (`takeovers.py`). Whoever
wants a shard that is coming to rest waits for that, and then opens it as any other: by a claim. So what a shard at rest
is remembered for is never a proof of anything; `at_rest` may be wrong, and costs a refused claim then.
"""

from __future__ import annotations

import asyncio
import gc
import itertools
from collections.abc import Awaitable, Callable, Collection, Coroutine, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import NamedTuple

import structlog

from magnetar.broker.budget import ByteBudget
from magnetar.broker.metrics import BrokerMetrics
from magnetar.broker.ownership import Ownership
from magnetar.broker.producer_table import DamagedProducerTable
from magnetar.broker.refusals import RETRY_AFTER_MS, not_owner, refusal_of
from magnetar.broker.shard import Consumers, ServedShard, rebuild_producers
from magnetar.broker.topics import Topics
from magnetar.ledger.client import LedgerClient, LedgerError, Standing
from magnetar.ledger.errors import NotEnoughBookies
from magnetar.managed_log.cache import ReadCache
from magnetar.managed_log.deletion import delete_shard
from magnetar.managed_log.errors import LogError, LogReleased, Released
from magnetar.managed_log.log import Inheritance, ManagedLog
from magnetar.managed_log.settings import LogSettings
from magnetar.metadata.ids import IdBlocks
from magnetar.metadata.keyspace import COUNTER_LEDGER
from magnetar.metadata.records import LedgerPurpose, LedgerRecord, Owner, ShardRecord
from magnetar.metadata.shards import (
    OutcomeUnknown,
    OwnershipLost,
    SessionEnded,
    ShardMetadata,
    ShardNotFound,
    StaleChange,
)
from magnetar.metadata.store import MetadataError
from magnetar.node.rpc import Refused, unavailable
from magnetar.v1 import common_pb2

LOADS_MAX = 64
"""Shards opened at a time, half of them because clients ask; the others wait their turn."""

SHARDS_AT_ONCE = 32
"""Of all that are served, when something is done with each."""

CLOSE_S = 20.0
"""How long a shard that is given up may take to store what it accepted; then its next owner recovers it."""

RESTING_AT_ONCE = 16
"""Shards that nobody uses, and that are being closed: each is a transaction, and a word with bookies."""

RESTING_PER_ROUND = 500
"""Of these, before what else is done with all shards has its turn."""

RESTS_PER_COLLECTION = 500
"""What a closed log leaves are objects that refer to each other and have been there for long. The collector looks at
such ones once in hours, so it is asked to after so many: that takes some 0.1 s, and returns 25 KiB for each."""

REVISIT_S = 24 * 3600.0
"""A shard at rest with messages is opened so often at least, for what time or a missed change makes superfluous."""

REVISITS_PER_ROUND = 16
NEVER_US = 1 << 63

CLOSE_ERRORS = (LogError, LedgerError, MetadataError, OwnershipLost, SessionEnded, StaleChange, OutcomeUnknown)
"""What a log that cannot be closed ends with: it is abandoned, and its next owner recovers it."""

SHARD_SHARE = 4
"""One shard holds at most this part of the broker's budget of bytes not yet stored."""

log = structlog.get_logger("magnetar.served")


@dataclass(frozen=True, slots=True)
class LogParts:
    """What every log of a broker is made with."""

    ledgers: LedgerClient
    ids: IdBlocks
    cache: ReadCache
    settings: LogSettings
    now_us: Callable[[], int]


@dataclass(frozen=True, slots=True)
class Arrival:
    """A shard that was passed on: what its former owner says beside the records. None: it did not say."""

    inheritance: Inheritance | None
    consumers: Consumers | None


class Rest(NamedTuple):
    """A shard at rest: when to open it for what it may have to trim, and the epoch in which nobody used it here.

    `epoch` 0: it was another broker's, and nobody knows who used it.
    """

    revisit_us: int
    epoch: int


Expected = Callable[[], Awaitable[tuple[ShardMetadata, Arrival | None]]]


class ServedShards:
    """See the module. `address_of` gives the address of an owner's living session, empty if there is none.

    `on_received` is called with each shard that was passed on to this broker, once it is served.
    """

    def __init__(
        self,
        ownership: Ownership,
        topics: Topics,
        parts: LogParts,
        metrics: BrokerMetrics,
        budget: ByteBudget,
        pending_bytes_max: int,
        address_of: Callable[[Owner], str],
        on_received: Callable[[ServedShard], None],
    ) -> None:
        self._ownership = ownership
        self._topics = topics
        self._parts = parts
        self._metrics = metrics
        self._budget = budget
        self._shard_pending_bytes_max = max(1, pending_bytes_max // SHARD_SHARE)
        self._address_of = address_of
        self._on_received = on_received
        self._served: dict[int, ServedShard] = {}
        self._by_topic: dict[str, dict[ServedShard, None]] = {}
        self._loads: dict[int, asyncio.Task[ServedShard]] = {}
        self._settling: dict[int, asyncio.Task[None]] = {}
        self._at_rest: dict[int, Rest] = {}
        self._uncollected = 0
        self._deletions: dict[int, asyncio.Task[None]] = {}
        self._load_slots = asyncio.Semaphore(LOADS_MAX)
        self._stopping = False

    def __len__(self) -> int:
        return len(self._served)

    def __iter__(self) -> Iterator[ServedShard]:
        return iter(list(self._served.values()))

    def get(self, shard_id: int) -> ServedShard | None:
        return self._served.get(shard_id)

    def of_topic(self, topic: str) -> list[ServedShard]:
        return list(self._by_topic.get(topic, ()))

    def _add(self, shard: ServedShard) -> None:
        self._served[shard.shard_id] = shard
        self._by_topic.setdefault(shard.topic, {})[shard] = None

    def remove(self, shard: ServedShard) -> bool:
        """False if it was not there any more."""
        if self._served.get(shard.shard_id) is not shard:
            return False
        del self._served[shard.shard_id]
        others = self._by_topic[shard.topic]
        others.pop(shard, None)
        if not others:
            del self._by_topic[shard.topic]
        return True

    def loading(self, shard_id: int) -> bool:
        """It is being opened, or deleted, or is coming to rest."""
        return shard_id in self._loads or shard_id in self._deletions or shard_id in self._settling

    async def loaded(self, shard_id: int) -> None:
        """Returns when the shard is not being opened any more: it is served, or is not."""
        await self._settled(shard_id)
        load = self._loads.get(shard_id)
        if load is not None:
            await asyncio.wait({load})

    async def _settled(self, shard_id: int) -> None:
        settling = self._settling.get(shard_id)
        if settling is not None:
            await asyncio.wait({settling})

    async def open(self, shard_id: int) -> ServedShard:
        """The shard, taken over if need be.

        Raises Refused(NOT_OWNER) naming its broker, Refused(UNAVAILABLE), ShardNotFound, MetadataUnavailable.
        """
        shard = self._served.get(shard_id)
        if shard is not None:
            shard.used_at = asyncio.get_running_loop().time()
            return shard
        if self._stopping:
            raise unavailable("the broker is stopping: ask another one", retry_after_ms=RETRY_AFTER_MS)
        if shard_id in self._deletions:
            raise unavailable(f"the shard is being deleted shard=`{shard_id}`", retry_after_ms=RETRY_AFTER_MS)
        load = self._loads.get(shard_id)
        if load is None:
            load = self._begin_load(shard_id, self._load(shard_id))
        # Whoever waits may be cancelled; the opening goes on for the others.
        return await asyncio.shield(load)

    def expect(self, shard_id: int, arrival: Expected) -> None:
        """The shard is being opened from now on: it is served when it arrives. It is neither served nor loading.

        `arrival` returns it claimed, or accepted with an Arrival. Raises Refused if it does not come, ShardNotFound,
        MetadataUnavailable.
        """
        self._begin_load(shard_id, self._receive(arrival))

    def _begin_load(self, shard_id: int, work: Coroutine[None, None, ServedShard]) -> asyncio.Task[ServedShard]:
        load = self._loads[shard_id] = asyncio.create_task(work, name=f"load shard {shard_id}")
        load.add_done_callback(lambda done: self._loaded(shard_id, done))
        return load

    def _loaded(self, shard_id: int, load: asyncio.Task[ServedShard]) -> None:
        del self._loads[shard_id]
        error = None if load.cancelled() else load.exception()
        sent_away = isinstance(error, Refused) and error.reason == common_pb2.ERROR_REASON_NOT_OWNER
        if error is not None and not sent_away:
            self._metrics.shard_load_failures.inc()
            log.warning("shard could not be opened", shard=shard_id, problem=str(error))

    async def take(self, shard_id: int) -> ServedShard:
        """As `open`, also if another broker should serve the shard: somebody wants it to be here."""
        await self.loaded(shard_id)
        if self._served.get(shard_id) is None and not self.loading(shard_id):
            self._begin_load(shard_id, self._load(shard_id, preferred_or_not=True))
        return await self.open(shard_id)

    async def _load(self, shard_id: int, *, preferred_or_not: bool = False) -> ServedShard:
        await self._settled(shard_id)
        async with self._load_slots:
            rest = self._at_rest.pop(shard_id, None)
            metadata = await self._ownership.claim(shard_id, preferred_or_not=preferred_or_not)
            shard = await self._open_claimed(metadata)
            if rest is not None and rest.epoch == metadata.epoch - 1:
                shard.nobody_comes_back()
            return shard

    async def give(self, shard_id: int, heir: Owner, address: str) -> None:
        """Makes a shard, neither served nor loading, another broker's without opening it.

        It is being opened meanwhile: whoever wants it waits, and is sent to that broker. Raises as `Ownership.give`.
        """
        given = not_owner(shard_id, address)

        async def give() -> ServedShard:
            await self._ownership.give(shard_id, heir)
            self._at_rest.pop(shard_id, None)
            raise given

        load = self._begin_load(shard_id, give())
        try:
            await asyncio.shield(load)
        except Refused as refused:
            if refused is not given:
                raise

    async def _receive(self, arrival: Expected) -> ServedShard:
        metadata, arrived = await arrival()
        shard = await self._open_claimed(metadata, arrived)
        if arrived is not None:
            self._on_received(shard)
        return shard

    async def plan_ledger(self, shard_id: int, epoch: int) -> LedgerRecord | None:
        """A new ledger for the messages of a shard; None if there are not enough bookies for one. Commits nothing."""
        parts = self._parts
        ledger_id = await parts.ids.next_id(COUNTER_LEDGER, at_least=parts.ledgers.lowest_id())
        try:
            return parts.ledgers.plan(ledger_id, shard_id, LedgerPurpose.DATA, epoch)
        except NotEnoughBookies:
            return None

    async def _open_claimed(self, metadata: ShardMetadata, arrived: Arrival | None = None) -> ServedShard:
        try:
            await self._topics.get(metadata.record.topic)
        except Refused:
            # A topic that is being deleted is not served any more, and nobody else can delete this shard now.
            if await self._topics.marked(metadata.record.topic) is not None:
                await delete_shard(metadata)
            raise
        try:
            return await self._open(metadata, arrived)
        except (LogError, LedgerError, DamagedProducerTable) as error:
            raise unavailable(f"the shard cannot be opened now: {error}", retry_after_ms=RETRY_AFTER_MS) from error

    async def _open(self, metadata: ShardMetadata, arrived: Arrival | None) -> ServedShard:
        shard: ServedShard | None = None
        losses: list[Released] = []

        def released(why: Released) -> None:
            losses.append(why)
            if shard is not None:
                self._released(shard, why)

        shard_log = await self._open_log(metadata, arrived, released)
        try:
            producers = await rebuild_producers(shard_log)
            shard = ServedShard(
                shard_log,
                producers,
                self._topics,
                self._metrics,
                self._budget,
                self._shard_pending_bytes_max,
                self._parts.now_us,
                lambda: self._ownership.session is not None,
            )
            if arrived is None:
                await shard.adopt()
            elif arrived.consumers is not None:
                shard.await_consumers(arrived.consumers)
            session = self._ownership.session
            if session is not None and session != metadata.session:
                # It was lost and begun anew meanwhile, when this shard was not among those to be told.
                await shard_log.renew_session(session)
        except BaseException:
            await self._give_up(shard_log)
            raise
        if losses or self._stopping:
            await self._give_up(shard_log)
            raise unavailable("the shard was lost while it was opened", retry_after_ms=RETRY_AFTER_MS)
        self._at_rest.pop(shard.shard_id, None)
        self._add(shard)
        self._metrics.shard_loads.inc()
        return shard

    async def _open_log(
        self, metadata: ShardMetadata, arrived: Arrival | None, released: Callable[[Released], None]
    ) -> ManagedLog:
        parts = self._parts
        given = (parts.ledgers, parts.ids, parts.cache, parts.settings, parts.now_us, released)
        if arrived is None:
            return await ManagedLog.open(metadata, *given)
        return await ManagedLog.open_passed_on(metadata, arrived.inheritance, *given)

    async def _give_up(self, shard_log: ManagedLog) -> None:
        """Closes a log that is not going to be served; its next owner does what is left undone here."""
        try:
            async with asyncio.timeout(CLOSE_S):
                await shard_log.close()
        except (*CLOSE_ERRORS, TimeoutError) as error:
            shard_log.abandon()
            log.warning("log was not closed", shard=shard_log.shard_id, problem=str(error))

    def _released(self, shard: ServedShard, why: Released) -> None:
        if self.remove(shard):
            self._metrics.shards_released.inc()
        log.warning("shard released", shard=shard.shard_id, topic=shard.topic, reason=why.reason)
        shard.release(why.reason, "" if why.owner is None else self._address_of(why.owner))

    # --- at rest ---

    @property
    def at_rest(self) -> Collection[int]:
        """Shards of this broker's session that are closed until somebody wants them."""
        return self._at_rest.keys()

    def forget_rest(self, shards: Iterable[int] | None = None) -> None:
        """These shards, or all, may be another's by now."""
        for shard_id in list(self._at_rest) if shards is None else shards:
            self._at_rest.pop(shard_id, None)

    async def rest_unused(self, idle_s: float, excepted: Callable[[int], bool]) -> None:
        """Puts the shards to rest that nobody has used for so long, but for those that are excepted at the moment."""
        now = asyncio.get_running_loop().time()
        unused = []
        for shard in self:
            if shard.in_use or excepted(shard.shard_id):
                shard.used_at = now
            elif now - shard.used_at >= idle_s and not shard.log.end_acknowledged():
                unused.append(shard)

        async def one(shard: ServedShard) -> None:
            served = self._served.get(shard.shard_id) is shard and not self._stopping
            if served and not shard.in_use and not excepted(shard.shard_id) and self._ownership.session is not None:
                # From here to the task in its place nothing else runs: nobody finds the shard half closed.
                self.remove(shard)
                shard.begin_rest()
                await asyncio.shield(self._begin_settling(shard.shard_id, self._rest(shard)))

        slots = asyncio.Semaphore(RESTING_AT_ONCE)
        await self._each(unused[:RESTING_PER_ROUND], one, slots)
        if self._uncollected >= RESTS_PER_COLLECTION:
            self._uncollected = 0
            gc.collect()

    async def _rest(self, shard: ServedShard) -> None:
        try:
            async with asyncio.timeout(CLOSE_S):
                await shard.rest()
        except (*CLOSE_ERRORS, TimeoutError) as error:
            self._metrics.rest_failures.inc()
            self.give_up(shard, "the shard could not be closed", error)
            return
        self._uncollected += 1
        self._metrics.rested_shards.inc()
        self.rests(shard.log.record, unused=True, has_cursors=bool(shard.log.cursors))

    def settle(self, metadata: ShardMetadata) -> asyncio.Task[None]:
        """Has the shard, just claimed and neither served nor loading, recovered and closed, without opening it.

        The task raises LogError, LedgerError: it is not at rest then.
        """
        return self._begin_settling(metadata.shard_id, self._settle(metadata))

    async def _settle(self, metadata: ShardMetadata) -> None:
        parts = self._parts
        await ManagedLog.settle(metadata, parts.ledgers, parts.ids, parts.settings, parts.now_us)
        self.rests(metadata.record)

    def _begin_settling(self, shard_id: int, work: Coroutine[None, None, None]) -> asyncio.Task[None]:
        settling = self._settling[shard_id] = asyncio.create_task(work, name=f"settle shard {shard_id}")
        settling.add_done_callback(lambda done: self._settling_ended(shard_id, done))
        return settling

    def _settling_ended(self, shard_id: int, settling: asyncio.Task[None]) -> None:
        del self._settling[shard_id]
        if not settling.cancelled():
            settling.exception()  # Whoever waits has it; nobody may wait any more.

    def rests(self, record: ShardRecord, *, unused: bool = False, has_cursors: bool = False) -> None:
        """The shard is at rest, if it is this session's still."""
        if record.owner is not None and record.owner == self._ownership.session:
            revisit_us = self._revisit_us(record, has_cursors)
            self._at_rest[record.shard_id] = Rest(revisit_us, record.epoch if unused else 0)

    def _revisit_us(self, record: ShardRecord, has_cursors: bool) -> int:
        """When to open it for trimming: it is not before the oldest segment has been kept long enough."""
        if not record.segments:
            return NEVER_US
        last_us = self._parts.now_us() + int(REVISIT_S * 1e6)
        if has_cursors:
            return last_us
        known = record.segments[:2]
        kept_us = int(self._parts.settings.retention_unsubscribed_s * 1e6)
        return min(last_us, known[-1].first_time_us + kept_us)

    async def revisit(self) -> None:
        """Opens some of the shards at rest that may have something to trim."""
        now_us = self._parts.now_us()
        due = (shard_id for shard_id, rest in self._at_rest.items() if rest.revisit_us <= now_us)
        for shard_id in list(itertools.islice(due, REVISITS_PER_ROUND)):
            try:
                await self.open(shard_id)
            except Exception as error:
                if refusal_of(error) is None and not isinstance(error, ShardNotFound):
                    log.exception("shard at rest could not be opened", shard=shard_id)
                self._at_rest.pop(shard_id, None)

    # --- trimming, doubts, a new session, the end ---

    async def trim(self, leaving: Collection[str] = ()) -> None:
        """Deletes what nobody needs, in every shard, and ends what stands on bookies that are given up or drained."""

        async def one(shard: ServedShard) -> None:
            try:
                if leaving:
                    shard.log.leave_bookies(leaving)
                await shard.log.trim()
            except LogReleased:
                return  # Whoever has it now trims it.
            except LogError as error:
                self._metrics.trim_failures.inc()
                log.warning("trimming failed", shard=shard.shard_id, problem=str(error))

        await self._for_each(one)

    async def release_fenced(self) -> None:
        """Asks bookies whether somebody took over while the metadata store could not tell, and releases what was."""

        async def one(shard: ServedShard) -> None:
            if await shard.log.standing() is Standing.LOST and self._ownership.session is None:
                shard.log.abandon("fenced")
                self._released(shard, Released(None, "the shard was taken over"))

        await self._for_each(one)

    async def release_claimed(self, shard_id: int) -> None:
        """Releases the shard if its record gives it to another broker. Raises MetadataUnavailable."""
        shard = self._served.get(shard_id)
        if shard is not None:
            with suppress(Refused):
                await shard.check_owned()

    async def renew(self, session: Owner) -> None:
        """Puts the broker's new session into the records of what it serves. What somebody else claimed is released."""

        async def one(shard: ServedShard) -> None:
            try:
                await shard.log.renew_session(session)
            except (SessionEnded, LogReleased):
                return  # One more session was lost, and the next follows; or the shard, and it is released.

        await self._for_each(one)

    def begin_stop(self) -> None:
        """Nothing is opened any more."""
        self._stopping = True

    async def close(self, pass_on: Callable[[ServedShard], Awaitable[bool]]) -> None:
        """Gives every shard up: what was accepted is stored and answered first.

        `pass_on` makes it another broker's, or says that it could not be begun: then it becomes nobody's.
        """
        self.begin_stop()
        for deletion in self._deletions.values():
            deletion.cancel()  # Whoever goes on with it begins where this one stopped.
        # What is being opened is given up by itself, unless a silent store keeps it waiting.
        under_way = [*self._deletions.values(), *self._settling.values(), *self._loads.values()]
        if under_way:
            _, stuck = await asyncio.wait(under_way, timeout=CLOSE_S)
            for task in stuck:
                task.cancel()
            await asyncio.gather(*stuck, return_exceptions=True)

        async def one(shard: ServedShard) -> None:
            if await pass_on(shard):
                return
            try:
                async with asyncio.timeout(CLOSE_S):
                    await shard.close()
            except (*CLOSE_ERRORS, TimeoutError) as error:
                self.give_up(shard, "the broker is stopping", error)
            self.remove(shard)

        await self._for_each(one)

    def give_up(self, shard: ServedShard, reason: str, error: Exception) -> None:
        """The shard could not be closed: its next owner recovers it."""
        log.warning("shard was not closed", shard=shard.shard_id, problem=str(error) or f"not within {CLOSE_S:g} s")
        shard.log.abandon()
        shard.release(reason)
        self.remove(shard)

    async def _for_each(self, act: Callable[[ServedShard], Awaitable[None]]) -> None:
        await self._each(self, act, asyncio.Semaphore(SHARDS_AT_ONCE))

    async def _each(
        self, shards: Iterable[ServedShard], act: Callable[[ServedShard], Awaitable[None]], slots: asyncio.Semaphore
    ) -> None:
        async def bounded(shard: ServedShard) -> None:
            async with slots:
                try:
                    await act(shard)
                except Exception as error:
                    if refusal_of(error) is None:
                        log.exception("shard failed", shard=shard.shard_id)

        await asyncio.gather(*(bounded(shard) for shard in shards))

    # --- deleting ---

    async def delete(self, shard_id: int) -> None:
        """Deletes the shard with all its ledgers; nothing if it is gone.

        Raises Refused(NOT_OWNER) if another broker serves it: that one deletes it when it sees the topic going.
        """
        deletion = self._deletions.get(shard_id)
        if deletion is None:
            deletion = asyncio.create_task(self._delete(shard_id), name=f"delete shard {shard_id}")
            self._deletions[shard_id] = deletion
            deletion.add_done_callback(lambda done: self._deleted(shard_id, done))
        await asyncio.shield(deletion)

    def _deleted(self, shard_id: int, deletion: asyncio.Task[None]) -> None:
        del self._deletions[shard_id]
        if not deletion.cancelled():
            deletion.exception()  # Whoever waits has it; nobody may wait any more.

    async def _delete(self, shard_id: int) -> None:
        await self.loaded(shard_id)
        shard = self._served.get(shard_id)
        try:
            if shard is not None:
                self.remove(shard)
                shard.release("the topic is being deleted")
                await shard.log.delete()
            else:
                metadata = await self._ownership.claim(shard_id, preferred_or_not=True)
                await delete_shard(metadata)
        except ShardNotFound:
            return
