"""A role's session: one leased key, taken once, lost aloud, taken again."""

from __future__ import annotations

import asyncio

import pytest

from magnetar.metadata.memory import MemoryStore
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
        await store.revoke_lease(stored.lease_id)
        await again.wait()
        assert told == ["session", "lost", "session"]
        assert registration.session is not None
        assert registration.session > first
        await registration.close()
