"""One leader among candidates: whoever creates the election's key, under a lease.

Leadership is a hint: for a moment two candidates may believe in theirs. What a leader must not do twice, it does in a
transaction that compares `still_leader()`.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable

from magnetar.metadata.backoff import Backoff
from magnetar.metadata.codec import decode_text, encode_text
from magnetar.metadata.keyspace import Keyspace
from magnetar.metadata.store import (
    Changes,
    Compare,
    KeyValue,
    Lease,
    LeaseExpired,
    MetadataStore,
    MetadataUnavailable,
    Put,
    absent,
    created_at,
)

LEASE_S = 5.0


class Election:
    """One candidate. Not for use by several tasks at once, but for `leader`."""

    def __init__(
        self,
        store: MetadataStore,
        keyspace: Keyspace,
        name: str,
        candidate: str,
        *,
        lease_s: float = LEASE_S,
        rng: random.Random | None = None,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._store = store
        self._key = keyspace.election(name)
        self._candidate = candidate
        self._lease_s = lease_s
        self._rng = rng or random.Random()
        self._sleep = sleep
        self._lease: Lease | None = None
        self._term = 0

    @property
    def leader(self) -> bool:
        """As far as this process knows."""
        return self._term != 0 and self._lease is not None and not self._lease.lost

    def still_leader(self) -> Compare:
        """Holds in a transaction exactly if no other term has begun and this one has not ended."""
        assert self._term, "not elected"
        return created_at(self._key, self._term)

    async def campaign(self) -> None:
        """Returns when this candidate is the leader. Waits while another is, or while the store is silent."""
        backoff = Backoff(self._rng)
        while True:
            try:
                lease = await self._living_lease()
                result = await self._store.txn(
                    [absent(self._key)], [Put(self._key, encode_text(self._candidate), lease.lease_id)]
                )
                if result.succeeded:
                    self._term = result.revision
                    return
                found = await self._store.get(self._key)
                if found is not None and found.lease_id == lease.lease_id:
                    self._term = found.create_revision  # elected by a transaction whose reply was lost
                    return
                if found is not None:
                    await self._wait_changed(found)
                    backoff = Backoff(self._rng)
            except LeaseExpired:
                self._lease = None
            except MetadataUnavailable:
                await self._sleep(backoff.next_s())

    async def wait_lost(self) -> None:
        """Returns when the leadership has ended: the lease, or the key under it."""
        while self.leader:
            assert self._lease is not None
            lease = asyncio.create_task(self._lease.wait_lost())
            key = asyncio.create_task(self._wait_key_lost())
            try:
                await asyncio.wait((lease, key), return_when=asyncio.FIRST_COMPLETED)
                if key.done():
                    key.result()
                    self._term = 0
            finally:
                lease.cancel()
                key.cancel()
                await asyncio.gather(lease, key, return_exceptions=True)
        self._term = 0

    async def resign(self) -> None:
        """Ends the leadership or the candidacy; others are elected at once. Raises MetadataUnavailable when the key may
        still stand: then it goes with its lease."""
        lease, self._lease, self._term = self._lease, None, 0
        if lease is not None:
            await lease.revoke()

    async def current_leader(self) -> str | None:
        found = await self._store.get(self._key)
        return None if found is None else decode_text(found.value)

    async def _living_lease(self) -> Lease:
        if self._lease is None or self._lease.lost:
            self._lease = await self._store.grant_lease(self._lease_s)
        return self._lease

    async def _wait_changed(self, seen: KeyValue) -> None:
        """Returns when the key may be another than `seen`."""
        watch = self._store.watch(self._key, from_revision=seen.mod_revision + 1)
        try:
            async for event in watch:
                # The watch is for a prefix: names that begin with this one are in it too.
                if not isinstance(event, Changes) or any(change.key == self._key for change in event.changes):
                    return
        finally:
            await watch.close()

    async def _wait_key_lost(self) -> None:
        backoff = Backoff(self._rng)
        while True:
            try:
                found = await self._store.get(self._key)
                if found is None or found.create_revision != self._term:
                    return
                await self._wait_changed(found)
            except MetadataUnavailable:
                await self._sleep(backoff.next_s())
