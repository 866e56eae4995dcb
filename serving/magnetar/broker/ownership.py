"""Which shards this broker may serve: its session, and claims under it.

1. The broker's session is its registration key. Without one nothing is claimed; what is open goes on being served.
2. A shard is claimed at first use. Owned by another living session: that broker is named. Nobody's: the preferred
   broker, by turns of ids, claims it, the others name that one. The turn and every watch are hints: the claim's
   transaction decides, and who loses it looks again.
3. With a new session after a lost one, the new session is put into the records still served, at the same epoch.
4. Who leaves says so in its registration, claims nothing more, and passes on each shard in the transaction that ends
   its log: nobody waits for a lease then, and nothing is to be recovered.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import replace

import structlog

from magnetar.broker.cluster_view import ClusterView, LiveBroker
from magnetar.broker.refusals import RETRY_AFTER_MS, not_owner
from magnetar.metadata.codec import DamagedRecord, decode_broker, encode_broker
from magnetar.metadata.keyspace import Keyspace
from magnetar.metadata.records import BrokerRegistration, Owner, ShardRecord
from magnetar.metadata.shards import ClaimLost, ShardMetadata, ShardSnapshot, read_shards
from magnetar.metadata.store import MetadataError, MetadataStore
from magnetar.node.registration import Registration
from magnetar.node.rpc import unavailable

CLAIM_ATTEMPTS = 8
"""How often a claim is tried again because the record changed under it."""

LEAVE_S = 1.0
"""For the store to be told that this broker leaves; without it others learn it from its redirects."""

log = structlog.get_logger("magnetar.ownership")


class Ownership:
    """The session of one broker and the claims made under it. See the module's rules."""

    def __init__(
        self,
        store: MetadataStore,
        keyspace: Keyspace,
        view: ClusterView,
        broker_id: str,
        lease_s: float,
        rng: random.Random,
        *,
        on_session: Callable[[Owner], None] = lambda session: None,
        on_lost: Callable[[], None] = lambda: None,
    ) -> None:
        """`on_session` is called with each session that follows a lost one, `on_lost` when one is lost."""
        self.broker_id = broker_id
        self._store = store
        self._keyspace = keyspace
        self._view = view
        self._lease_s = lease_s
        self._rng = rng
        self._on_session = on_session
        self._on_lost = on_lost
        self._record = BrokerRegistration(broker_id, "")
        self._registration: Registration | None = None
        self._session: Owner | None = None
        self._leaving = False

    async def register(self, record: BrokerRegistration) -> None:
        """Begins a session that others see. Raises IdInUse or MetadataUnavailable."""
        self._record = record
        registration = Registration(
            self._store,
            self._keyspace.broker(self.broker_id),
            encode_broker(record),
            self._lease_s,
            on_session=self._session_began,
            on_lost=self._session_lost,
        )
        await registration.register()
        self._registration = registration

    async def leave(self) -> None:
        """Claims nothing from now on, and says so to the others."""
        self._leaving = True
        self._record = replace(self._record, leaving=True)
        if self._registration is not None:
            with suppress(MetadataError, TimeoutError):
                async with asyncio.timeout(LEAVE_S):
                    await self._registration.update(encode_broker(self._record))

    def successor(self, shard_id: int) -> LiveBroker | None:
        """Who should have the shard when this broker leaves; None if nobody else lives, or this one has no session."""
        return None if self._session is None else self._view.successor(shard_id, self.broker_id)

    async def close(self) -> None:
        """Ends the session."""
        if self._registration is not None:
            await self._registration.close()
        self._session = None

    @property
    def session(self) -> Owner | None:
        """None while the session is lost."""
        return self._session

    def require_session(self) -> Owner:
        """Raises Refused(UNAVAILABLE) without a session, when others know more than this one, and when it leaves."""
        if self._leaving:
            raise unavailable(
                f"this broker is stopping: ask another one broker=`{self.broker_id}`", retry_after_ms=RETRY_AFTER_MS
            )
        if self._session is None:
            raise unavailable(
                f"this broker has lost its session in the metadata store: ask another broker broker=`{self.broker_id}`",
                retry_after_ms=RETRY_AFTER_MS,
            )
        return self._session

    async def claim(self, shard_id: int, *, preferred_or_not: bool = False) -> ShardMetadata:
        """The metadata of a shard that is now this broker's; `preferred_or_not` to claim what another one should serve.

        Raises Refused(NOT_OWNER) naming the broker to ask, Refused(UNAVAILABLE), ShardNotFound, MetadataUnavailable.
        """
        for attempt in range(CLAIM_ATTEMPTS):
            session = self.require_session()
            metadata = await ShardMetadata.load(self._store, self._keyspace, shard_id, rng=self._rng)
            # At first the view is believed when it says that the owner is gone: the claim itself compares that.
            await self._check_claimable(metadata.record, preferred_or_not, ask_store=attempt > 0)
            try:
                await metadata.claim(session)
            except ClaimLost as lost:
                log.info("claim lost", shard=shard_id, owner=lost.owner)
                continue
            log.info("claimed", shard=shard_id, topic=metadata.record.topic, epoch=metadata.record.epoch)
            return metadata
        raise unavailable(
            f"the shard keeps changing hands: try again shard=`{shard_id}`", retry_after_ms=RETRY_AFTER_MS
        )

    async def accept(self, shard_id: int, epoch: int) -> ShardMetadata:
        """The metadata of a shard that was passed on to this broker's session in this epoch.

        Raises ClaimLost if it was not, ShardNotFound, Refused(UNAVAILABLE), MetadataUnavailable.
        """
        session = self.require_session()
        return await ShardMetadata.accept(self._store, self._keyspace, shard_id, session, epoch, rng=self._rng)

    async def claim_from(self, shard_id: int, source: Owner) -> ShardMetadata:
        """Claims a shard from an owner that was to pass it on and is silent: its ledgers are fenced, be it dead or not.

        Raises as `claim`, also if the shard is not that owner's any more.
        """
        session = self.require_session()
        metadata = await ShardMetadata.load(self._store, self._keyspace, shard_id, rng=self._rng)
        if metadata.record.owner != source:
            return await self.claim(shard_id)
        try:
            await metadata.claim(session, from_owner_alive=True)
        except ClaimLost:
            return await self.claim(shard_id)
        log.info("claimed from a silent owner", shard=shard_id, owner=source.broker_id, epoch=metadata.record.epoch)
        return metadata

    async def give(self, shard_id: int, heir: Owner) -> None:
        """Makes a shard that is not open here the heir's, as a claim of the heir would: its open ledgers are fenced.

        Raises Refused(NOT_OWNER) if it is not this session's, Refused(UNAVAILABLE), ClaimLost, ShardNotFound,
        MetadataUnavailable: it stays whose it is then.
        """
        session = self.require_session()
        metadata = await ShardMetadata.load(self._store, self._keyspace, shard_id, rng=self._rng)
        if metadata.record.owner != session:
            raise not_owner(shard_id, self._view.address(shard_id))
        await metadata.claim(heir, from_owner_alive=True)

    async def read(self, shards: Iterable[int]) -> list[ShardSnapshot]:
        """Those of these shards that exist and are this session's, or nobody's as the view sees it: to be claimed.

        Raises Refused(UNAVAILABLE), MetadataUnavailable.
        """
        session = self.require_session()
        shards = list(shards)
        try:
            found = await read_shards(self._store, self._keyspace, shards)
        except DamagedRecord:
            found = [snapshot for shard_id in shards for snapshot in await self._read_one(shard_id)]
        return [s for s in found if s.record.owner == session or self._is_gone(s.record.owner)]

    async def _read_one(self, shard_id: int) -> list[ShardSnapshot]:
        """Empty also if a record of it is damaged: nobody claims it unseen, and others do not wait for it."""
        try:
            return await read_shards(self._store, self._keyspace, [shard_id])
        except DamagedRecord as damaged:
            log.error("a shard cannot be claimed", shard=shard_id, problem=str(damaged))
            return []

    async def claim_together(self, shards: Sequence[ShardSnapshot]) -> list[ShardMetadata]:
        """Claims the first of these shards in one request, as many as fit; none if one of them is not to be had.

        Raises Refused(UNAVAILABLE), MetadataUnavailable.
        """
        session = self.require_session()
        claimed = await ShardMetadata.claim_together(self._store, self._keyspace, shards, session, rng=self._rng)
        log.info("claimed together", shards=len(claimed), first=shards[0].record.shard_id)
        return claimed

    def _is_gone(self, owner: Owner | None) -> bool:
        return owner is not None and self._view.living(owner) is None

    def ended(self) -> dict[int, Owner]:
        """Shards whose recorded owner lives no more, as the watches see it, and whose preferred broker is this one."""
        return {shard_id: owner for shard_id, owner in self._view.owned() if self._is_to_be_claimed(shard_id, owner)}

    def mine(self) -> list[int]:
        """Shards that the records give to the present session."""
        return [shard_id for shard_id, owner in self._view.owned() if owner == self._session]

    def to_open(self, shards: Iterable[int]) -> list[int]:
        """Those of these shards that the records give to this session, or that it should claim from one that ended."""
        found = []
        for shard_id in shards:
            owner = self._view.recorded_owner(shard_id)
            if owner is not None and (owner == self._session or self._is_to_be_claimed(shard_id, owner)):
                found.append(shard_id)
        return found

    def doubtful(self, shards: Iterable[int]) -> list[int]:
        """Those of these shards that the records give to another broker, as the watches see it.

        A shard may be claimed from an owner that lives, if it is silent to who is to have it. Of one whose session is
        over nothing is said: it finds out with its next session, or from its bookies.
        """
        if self._session is None:
            return []
        owners = {shard_id: self._view.recorded_owner(shard_id) for shard_id in shards}
        return [shard_id for shard_id, owner in owners.items() if owner and owner.broker_id != self.broker_id]

    def _is_to_be_claimed(self, shard_id: int, owner: Owner) -> bool:
        session = self._session
        return (
            session is not None
            and owner != session
            and self._view.living(owner) is None
            and self._view.preferred(shard_id, self._me(session)).owner == session
        )

    async def _check_claimable(self, record: ShardRecord, preferred_or_not: bool, *, ask_store: bool = True) -> None:
        session = self.require_session()
        if record.owner is not None and record.owner.broker_id == self.broker_id:
            return
        if record.owner is not None and (ask_store or self._view.living(record.owner) is not None):
            found = await self._store.get(self._keyspace.broker(record.owner.broker_id))
            if found is not None and found.create_revision == record.owner.session:
                raise not_owner(record.shard_id, decode_broker(found.value).address)
        preferred = self._view.preferred(record.shard_id, self._me(session))
        if preferred.owner.broker_id != self.broker_id and not preferred_or_not:
            raise not_owner(record.shard_id, preferred.address, "another broker should serve this shard")

    def _me(self, session: Owner) -> LiveBroker:
        return LiveBroker(session, self._record.address, self._record.version)

    def _session_began(self, session: int) -> None:
        self._session = Owner(self.broker_id, session)
        if self._registration is not None:
            self._on_session(self._session)

    def _session_lost(self) -> None:
        self._session = None
        self._on_lost()
