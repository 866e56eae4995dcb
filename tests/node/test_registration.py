"""A role's session: one leased key, taken once, lost aloud, taken again."""

from __future__ import annotations

import asyncio

import pytest
from structlog.testing import capture_logs

from magnetar.metadata.leases import HeldLease
from magnetar.metadata.memory import MemoryStore
from magnetar.metadata.store import Lease, Put
from magnetar.node.registration import IdInUse, Registration

KEY = "/magnetar/test/brokers/broker0"
LEASE_S = 0.5


async def test_the_session_is_the_create_revision_of_the_key() -> None:
    async with MemoryStore() as store:
        registration = Registration(store, KEY, b"value", LEASE_S)
        session = await registration.register()
        stored = await store.get(KEY)
        assert stored is not None
        assert stored.create_revision == session == registration.session
        await registration.update(b"other")
        updated = await store.get(KEY)
        assert updated is not None
        assert (updated.value, updated.create_revision) == (b"other", session)
        await registration.close()
        assert await store.get(KEY) is None


async def test_an_id_in_use_is_refused_after_one_lease() -> None:
    async with MemoryStore() as store:
        first = Registration(store, KEY, b"first", LEASE_S)
        await first.register()
        second = Registration(store, KEY, b"second", LEASE_S)
        with pytest.raises(IdInUse, match="stop it or choose another id"):
            await second.register()
        await second.close()
        stored = await store.get(KEY)
        assert stored is not None
        assert stored.value == b"first"
        await first.close()


class GenerousStore(MemoryStore):
    """Grants twice the time that was asked for, as etcd does for short leases."""

    async def grant_lease(self, ttl_s: float) -> Lease:
        return await super().grant_lease(2 * ttl_s)


async def test_who_takes_over_an_id_waits_as_long_as_the_store_granted() -> None:
    async with GenerousStore() as store:
        # Nobody keeps this lease: its holder was killed.
        await store.txn([], [Put(KEY, b"killed", await store.grant_remote_lease(2 * LEASE_S))])
        second = Registration(store, KEY, b"second", LEASE_S)
        assert await second.register()
        await second.close()


async def test_a_lost_session_is_told_and_replaced_by_a_new_one() -> None:
    async with MemoryStore() as store:
        told: list[str] = []
        again = asyncio.Event()

        def on_session(session: int) -> None:
            told.append("session")
            if len(told) == 3:
                again.set()

        registration = Registration(
            store, KEY, b"value", LEASE_S, on_session=on_session, on_lost=lambda: told.append("lost")
        )
        first = await registration.register()
        stored = await store.get(KEY)
        assert stored is not None
        with capture_logs() as logged:
            await store.revoke_lease(stored.lease_id)
            await again.wait()
        assert told == ["session", "lost", "session"]
        assert registration.session is not None
        assert registration.session > first
        # The end of the trouble is told as loudly as its begin.
        told_people = [(line["event"], line["session"]) for line in logged if line["log_level"] == "warning"]
        assert told_people == [("session lost", first), ("registered again", registration.session)]
        await registration.close()


class DoubtfulStore(MemoryStore):
    """Its leases can be lost to their holder alone."""

    def __init__(self) -> None:
        super().__init__()
        self.granted: list[HeldLease] = []

    async def grant_lease(self, ttl_s: float) -> HeldLease:
        self.granted.append(await super().grant_lease(ttl_s))
        return self.granted[-1]


async def test_a_lost_session_goes_on_if_its_key_still_stands() -> None:
    async with DoubtfulStore() as store:
        told: list[int | None] = []
        again = asyncio.Event()

        def on_session(session: int) -> None:
            told.append(session)
            if len(told) == 3:
                again.set()

        registration = Registration(
            store, KEY, b"value", LEASE_S, on_session=on_session, on_lost=lambda: told.append(None)
        )
        session = await registration.register()
        store.granted[0].become_lost()
        await again.wait()
        assert told == [session, None, session]
        stored = await store.get(KEY)
        assert stored is not None
        assert (stored.create_revision, stored.lease_id) == (session, store.granted[1].lease_id)
        # The first lease has nothing to do with it any more.
        await store.revoke_lease(store.granted[0].lease_id)
        assert await store.get(KEY) == stored
        await registration.close()
        assert await store.get(KEY) is None
