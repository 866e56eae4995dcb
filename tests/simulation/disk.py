"""The boundary to the disk: the in-memory entry store on a disk that outlives its process.

A commit takes time before it is durable; a crash in that time leaves any part of the group. The disk can be slow, can
fail an fsync, can be full, and can break its word.
"""

from __future__ import annotations

import asyncio
import errno
import random
from pathlib import Path

from simulation.loop import SimulatedLoop

from magnetar.bookie.disk import DiskUsage
from magnetar.bookie.entry_store import EntryStore, GroupWrites
from magnetar.bookie.memory import MemoryEntryStore

SYNC_S = 0.000_5
SYNC_JITTER_S = 0.003
STALL_CHANCE = 0.01
STALL_S = 0.3
LOOK_S = 0.5
"""How soon a sync that a slow disk is at ends when the disk is mended."""
SIZE_BYTES = 1 << 30


class SimulatedDisk:
    """One bookie's disk, through all its processes."""

    def __init__(self, loop: SimulatedLoop, seed: str) -> None:
        self.full = False
        self.fails_sync = False
        self.slow = 1.0
        self.unreadable = 0.0
        """The share of reads that fail."""
        self.lost = False
        """The next process finds that durable groups are missing."""
        self._mended = False
        self._loop = loop
        self._rng = random.Random(seed)
        self._store: MemoryEntryStore | None = None

    async def open(self, directory: Path, memory_bytes: int) -> EntryStore:
        """What the process before has left, or an empty store."""
        if self._store is None:
            self._store = MemoryEntryStore(self._sync, is_damaged=self._is_damaged)
        else:
            self._store = self._store.crash(self._sync, lose_groups=self.lost, survives=self._torn)
            self.lost = False
        return self._store

    @property
    def store(self) -> MemoryEntryStore | None:
        """As the present process, or the last one, sees it."""
        return self._store

    def mend(self) -> None:
        """Nothing is wrong with it any more, nor with what it is at."""
        self._mended = True
        self.full = self.fails_sync = False
        self.slow, self.unreadable = 1.0, 0.0

    def replace(self) -> None:
        """Another one stands in its place, empty."""
        self._store = None

    def usage(self) -> DiskUsage:
        return DiskUsage(0 if self.full else SIZE_BYTES // 2, SIZE_BYTES)

    async def _sync(self) -> None:
        roll = self._rng.random()
        delay_s = SYNC_S + roll * SYNC_JITTER_S
        if roll < STALL_CHANCE:
            delay_s += self._rng.random() * STALL_S
        await asyncio.sleep(delay_s)
        left_s = delay_s * (self.slow - 1.0)
        while left_s > 0.0 and not self._mended:
            await asyncio.sleep(min(left_s, LOOK_S))
            left_s -= LOOK_S
        if self.fails_sync:
            self.fails_sync = False
            raise OSError(errno.EIO, "input/output error")

    def _is_damaged(self) -> bool:
        return self.unreadable > 0.0 and self._rng.random() < self.unreadable

    def _torn(self, writes: GroupWrites) -> GroupWrites | None:
        """What is on the disk of a group that was being written: all, nothing, or any part."""
        roll = self._rng.random()
        if roll < 0.4:
            return None
        if roll < 0.6:
            return writes
        keep = self._rng.random
        return GroupWrites(
            entries=[entry for entry in writes.entries if keep() < 0.5],
            marks={ledger_id: mark for ledger_id, mark in writes.marks.items() if keep() < 0.5},
            forgotten=[ledger_id for ledger_id in writes.forgotten if keep() < 0.5],
            deleted=[ledger_id for ledger_id in writes.deleted if keep() < 0.5],
            meta={key: value for key, value in writes.meta.items() if keep() < 0.5},
        )


class NoLock:
    """The lock of a directory that no other process can hold."""

    def __init__(self, directory: Path) -> None:
        """Nothing is locked: one process at a time runs on a simulated host."""

    def close(self) -> None:
        """Nothing is held."""
