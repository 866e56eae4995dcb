"""Leases of the engines that run in this process.

A lease granted to a holder in this process is *held*: it lives until it is revoked or the store closes, because holder
and store stop and go on together. A lease granted for a holder elsewhere has a deadline that only `keep_alive` moves.
The engine looks for expired ones every TICK_S; a tick that comes more than LATE_S late means that this process stood
still, and that holders could not reach it: every lease gets its full time again.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from magnetar.metadata.store import LeaseExpired

TICK_S = 0.25
LATE_S = 1.0
TTL_S_MIN = 0.5
TTL_S_MAX = 24 * 3600.0


def check_ttl(ttl_s: float) -> None:
    if not TTL_S_MIN <= ttl_s <= TTL_S_MAX:
        raise ValueError(f"a lease has no such time to live: ttl_s=`{ttl_s}` min=`{TTL_S_MIN}` max=`{TTL_S_MAX}`")


class HeldLease:
    """See `store.Lease`. Lost before its keys are deleted, whatever ends it."""

    def __init__(self, lease_id: int, ttl_s: float, revoke: Callable[[int], Awaitable[None]]) -> None:
        self._lease_id = lease_id
        self._ttl_s = ttl_s
        self._revoke = revoke
        self._lost = asyncio.Event()

    @property
    def lease_id(self) -> int:
        return self._lease_id

    @property
    def ttl_s(self) -> float:
        return self._ttl_s

    @property
    def lost(self) -> bool:
        return self._lost.is_set()

    async def wait_lost(self) -> None:
        await self._lost.wait()

    async def revoke(self) -> None:
        await self._revoke(self._lease_id)

    def become_lost(self) -> None:
        self._lost.set()


@dataclass(slots=True)
class _Entry:
    ttl_s: float
    deadline: float
    held: HeldLease | None


class LeaseTable:
    """The leases that are alive, and when they end."""

    def __init__(self) -> None:
        self._entries: dict[int, _Entry] = {}
        self._ticked_at: float | None = None

    def add(self, lease_id: int, ttl_s: float, now: float, held: HeldLease | None = None) -> None:
        if self._ticked_at is None:
            self._ticked_at = now
        deadline = math.inf if held is not None else now + ttl_s
        self._entries[lease_id] = _Entry(ttl_s, deadline, held)

    def remove(self, lease_id: int) -> None:
        """From now on it is lost. Its keys are the engine's to delete."""
        entry = self._entries.pop(lease_id, None)
        if entry is not None and entry.held is not None:
            entry.held.become_lost()

    def close(self) -> None:
        for lease_id in list(self._entries):
            self.remove(lease_id)

    def keep_alive(self, lease_id: int, now: float) -> float:
        """Returns the time to live it has again; raises LeaseExpired."""
        entry = self._entries.get(lease_id)
        if entry is None:
            raise LeaseExpired(f"no such lease: lease=`{lease_id:x}`")
        if entry.held is None:
            entry.deadline = now + entry.ttl_s
        return entry.ttl_s

    def remaining_s(self, lease_id: int, now: float) -> float | None:
        """None if there is no such lease."""
        entry = self._entries.get(lease_id)
        return None if entry is None else min(entry.ttl_s, max(0.0, entry.deadline - now))

    def ttl_s(self, lease_id: int) -> float:
        """Of a lease that is there."""
        return self._entries[lease_id].ttl_s

    def by_deadline(self) -> list[int]:
        return sorted(self._entries, key=lambda lease_id: (self._entries[lease_id].deadline, lease_id))

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, lease_id: int) -> bool:
        return lease_id in self._entries

    def tick(self, now: float) -> list[int]:
        """The leases that have expired, in the order of their ends."""
        late = self._ticked_at is not None and now - self._ticked_at > TICK_S + LATE_S
        self._ticked_at = now
        if late:
            for entry in self._entries.values():
                entry.deadline = max(entry.deadline, now + entry.ttl_s)
        ended = [(entry.deadline, lease_id) for lease_id, entry in self._entries.items() if entry.deadline <= now]
        return [lease_id for _, lease_id in sorted(ended)]
