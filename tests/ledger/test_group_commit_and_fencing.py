"""Pitfall 15 with a bookie's real queue: an add that passed the gate before a fence, and waits for its fsync.

The order that must not be possible: b1 has begun an fsync; the old writer's add is queued behind it; a fencing read
comes and is told PROVABLY_NOT; then the add is written and acknowledged.
"""

from __future__ import annotations

import asyncio

from ledger_world import TOKEN
from real_bookies import RealBookie

from magnetar.ledger.bookie_rpc import AddGroup, AddStatus, EntryOutcome, ReadGroup
from magnetar.wire import envelope


def add(entry_id: int) -> AddGroup:
    return AddGroup(7, 1, TOKEN, (envelope.encode(7, entry_id, entry_id - 1, entry_id + 1, b"x"),))


def fencing_read(entry_id: int) -> ReadGroup:
    return ReadGroup(7, 2, TOKEN, entry_id, entry_id, fence=True)


async def test_a_fencing_read_is_answered_after_the_adds_that_were_queued_before_it() -> None:
    disk, syncing = asyncio.Event(), asyncio.Event()

    async def sync() -> None:
        syncing.set()
        await disk.wait()

    bookie = RealBookie("b1", sync)
    first = bookie.add(add(0))
    await syncing.wait()
    queued = bookie.add(add(1))
    read = bookie.read(fencing_read(1))
    await asyncio.sleep(0)
    late = bookie.add(add(2))
    assert not any(call.done() for call in (first, queued, read, late))
    disk.set()
    assert (await first).status is AddStatus.OK
    # Queued before the fence: stored, and the read has it. Queued behind it: refused.
    assert (await queued).status is AddStatus.OK
    assert [answer.outcome for answer in (await read).answers] == [EntryOutcome.HAVE]
    assert (await late).status is AddStatus.FENCED
    await bookie.stop()


async def test_what_a_fencing_read_denied_is_never_stored_by_the_old_writer() -> None:
    bookie = RealBookie("b1")
    assert (await bookie.add(add(0))).status is AddStatus.OK
    assert [answer.outcome for answer in (await bookie.read(fencing_read(1))).answers] == [EntryOutcome.PROVABLY_NOT]
    assert (await bookie.add(add(1))).status is AddStatus.FENCED
    await bookie.stop()
