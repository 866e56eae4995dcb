"""Bytes of batches that were accepted and are not yet stored: how many there may be before reading stops."""

from __future__ import annotations

import asyncio


class ByteBudget:
    """Counts bytes taken and given back. Taking never waits, what was read is held already: readers wait for room."""

    def __init__(self, limit_bytes: int) -> None:
        self._limit_bytes = limit_bytes
        self._used_bytes = 0
        self._holders = 0
        self._room = asyncio.Event()
        self._room.set()

    @property
    def used_bytes(self) -> int:
        return self._used_bytes

    @property
    def exhausted(self) -> bool:
        return self._used_bytes >= self._limit_bytes

    def take(self, size_bytes: int) -> None:
        self._used_bytes += size_bytes
        if self._used_bytes >= self._limit_bytes:
            self._room.clear()

    def give(self, size_bytes: int) -> None:
        self._used_bytes -= size_bytes
        if self._used_bytes < self._limit_bytes:
            self._room.set()

    def join(self) -> None:
        """One more takes from this budget."""
        self._holders += 1

    def leave(self) -> None:
        self._holders -= 1

    def share(self, least_bytes: int, most_bytes: int) -> int:
        """What each of those who joined may hold, so that all together keep the limit."""
        return min(max(self._limit_bytes // max(self._holders, 1), least_bytes), most_bytes)

    async def room(self) -> None:
        """Waits until less than the limit is in use."""
        await self._room.wait()
