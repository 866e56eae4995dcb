"""A role's session: its one leased key in the metadata store.

The session is named by the create revision of that key, so that a transaction can ask whether it still exists. When the
lease is lost the role is told, and registers again by itself, for as long as it runs: with a new session, or with the
one before if its key still stands. A lease is taken for lost before the store would end it, and a store that comes back
gives leases their full time again: nobody has seen such a session end.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import suppress

import structlog

from magnetar.metadata.store import (
    Lease,
    LeaseExpired,
    MetadataStore,
    MetadataUnavailable,
    Put,
    absent,
    created_at,
)

RETRY_S = 0.5
"""Pause between two attempts to register again."""
POLLS_PER_LEASE = 10
EXPIRY_S = 2.0
"""What a store may take to find a lease over: etcd looks twice a second, and adds an election's time at its start."""

log = structlog.get_logger("magnetar.registration")


class IdInUse(Exception):
    """Another living process is registered under this id."""


class Registration:
    """Registers `key` with a value under a lease of `lease_s` seconds and keeps it there.

    `on_session` is called when a session begins or goes on, `on_lost` when one is lost without being asked to.
    """

    def __init__(
        self,
        store: MetadataStore,
        key: str,
        value: bytes,
        lease_s: float,
        *,
        on_session: Callable[[int], None] = lambda session: None,
        on_lost: Callable[[], None] = lambda: None,
    ) -> None:
        self.key = key
        self.session: int | None = None
        self._store = store
        self._value = value
        self._lease_s = lease_s
        self._lease: Lease | None = None
        self._on_session = on_session
        self._on_lost = on_lost
        self._keeper: asyncio.Task[None] | None = None
        self._lost_session: int | None = None

    async def register(self) -> int:
        """Returns the session. Waits one lease for a predecessor of the same id to go.

        Raises IdInUse when it did not, MetadataUnavailable when the store does not answer.
        """
        begin = asyncio.get_running_loop().time()
        waiting = False
        while (session := await self._try_register()) is None:
            if not waiting:
                waiting = True
                log.warning(
                    "the id is registered: waiting for that session to end, as one does whose process was killed",
                    key=self.key,
                    wait_s=round(self._patience_s(), 1),
                )
            if asyncio.get_running_loop().time() >= begin + self._patience_s():
                raise IdInUse(f"id is in use by a living process: stop it or choose another id key={self.key}")
            await asyncio.sleep(self._lease_s / POLLS_PER_LEASE)
        self._begin(session)
        self._keeper = asyncio.create_task(self._keep(), name=f"registration {self.key}")
        return session

    async def update(self, value: bytes) -> None:
        """Changes the registered value. Without a session it is kept for the next one.

        Raises MetadataUnavailable when the outcome is unknown.
        """
        self._value = value
        if self.session is None or self._lease is None:
            return
        try:
            await self._store.txn([created_at(self.key, self.session)], [Put(self.key, value, self._lease.lease_id)])
        except LeaseExpired:
            return

    async def close(self) -> None:
        """Ends the session: the key is gone at once if the store answers, else when its lease ends."""
        if self._keeper is not None:
            self._keeper.cancel()
            with suppress(asyncio.CancelledError):
                await self._keeper
        self.session = None
        if self._lease is not None:
            with suppress(MetadataUnavailable):
                await self._lease.revoke()

    def _patience_s(self) -> float:
        """A store may grant more than was asked for, as it did to the predecessor, and takes time to end it."""
        granted_s = self._lease_s if self._lease is None else max(self._lease_s, self._lease.ttl_s)
        return granted_s + granted_s / POLLS_PER_LEASE + EXPIRY_S

    async def _try_register(self) -> int | None:
        if self._lease is None or self._lease.lost:
            self._lease = await self._store.grant_lease(self._lease_s)
        put = Put(self.key, self._value, self._lease.lease_id)
        try:
            if self._lost_session is not None:
                result = await self._store.txn([created_at(self.key, self._lost_session)], [put])
                if result.succeeded:
                    return self._lost_session
            result = await self._store.txn([absent(self.key)], [put])
            if result.succeeded:
                return result.revision
        except LeaseExpired:
            self._lease = None
            return None
        except MetadataUnavailable:
            pass  # The put may have been applied: what stands there decides.
        current = await self._store.get(self.key)
        if current is not None and self._lease is not None and current.lease_id == self._lease.lease_id:
            return current.create_revision
        return None

    def _begin(self, session: int) -> None:
        self.session = session
        log.info("registered", key=self.key, session=session)
        self._on_session(session)

    async def _keep(self) -> None:
        while True:
            assert self._lease is not None
            await self._lease.wait_lost()
            log.warning("session lost", key=self.key, session=self.session)
            self._lost_session, self.session = self.session, None
            self._on_lost()
            session = await self._register_again()
            # As loud as the loss: whoever reads the log sees that it is over.
            log.warning("registered again", key=self.key, session=session)
            self._begin(session)

    async def _register_again(self) -> int:
        while True:
            with suppress(MetadataUnavailable):
                session = await self._try_register()
                if session is not None:
                    return session
            await asyncio.sleep(RETRY_S)
