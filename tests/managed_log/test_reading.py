"""Reading from bookies: by offset, by time, ahead, while segments roll and bookies fail."""

from __future__ import annotations

import asyncio
from itertools import pairwise
from random import Random

import pytest
from log_world import SHARD_ID, Cluster, OpenLog, payloads_of, until

from magnetar.managed_log import segment_reads
from magnetar.managed_log.log import LogSettings, ReadFailed

SMALL = LogSettings(segment_bytes=3_000, read_bytes=500, retry_first_s=0.001, retry_last_s=0.01)


async def filled(cluster: Cluster, messages: int, cache_bytes: int = 64 << 20) -> OpenLog:
    """Messages in entries of one to five, over several segments."""
    owner = await cluster.open(settings=SMALL, cache_bytes=cache_bytes)
    rng = Random(1)
    while owner.sent < messages:
        cluster.clock.now += 1_000
        await owner.append(*(b"%d" % n for n in range(owner.sent, owner.sent + rng.randrange(1, 6))))
    await until(lambda: owner.log._shard._tasks == set())
    return owner


async def test_any_offset_is_found_without_the_cache(cluster: Cluster) -> None:
    owner = await filled(cluster, 300)
    rng = Random(2)
    for offset in [rng.randrange(owner.log.end_offset) for _ in range(40)]:
        owner.log._cache.forget(SHARD_ID)
        entries = await owner.log.read(offset, tail=True)
        assert entries[0].first_offset <= offset < entries[0].end_offset
        assert all(a.end_offset == b.first_offset for a, b in pairwise(entries))


async def test_any_time_is_found(cluster: Cluster) -> None:
    owner = await filled(cluster, 300)
    offset, marks = 0, []
    while entries := await owner.log.read(offset):
        marks += [(entry.publish_time_us, entry.first_offset) for entry in entries]
        offset = entries[-1].end_offset
    for log in (owner.log, (await cluster.take_over(owner, settings=SMALL)).log):
        assert await log.offset_at(0) == 0
        assert await log.offset_at(marks[-1][0] + 1) == log.end_offset
        for time_us, first in marks[::7]:
            assert await log.offset_at(time_us) == first
            assert await log.offset_at(time_us - 1) == first


async def test_an_empty_log_has_no_offset_for_a_time_but_its_end(cluster: Cluster) -> None:
    owner = await cluster.open()
    assert await owner.log.offset_at(0) == await owner.log.offset_at(1 << 60) == 0


async def test_a_reader_of_history_finds_the_next_chunk_read_ahead(cluster: Cluster) -> None:
    owner = await filled(cluster, 300)
    owner.log._cache.forget(SHARD_ID)
    first = await owner.log.read(0)
    await until(lambda: owner.log._reads._reading == {})
    assert owner.log._cache.has(SHARD_ID, first[-1].end_offset)
    owner.log._cache.forget(SHARD_ID)
    first = await owner.log.read(0, tail=True)
    assert owner.log._reads._reading == {}
    assert not owner.log._cache.has(SHARD_ID, first[-1].end_offset)


async def test_several_reads_ahead_go_on_where_the_one_before_ends(cluster: Cluster) -> None:
    owner = await cluster.open(settings=LogSettings(segment_bytes=30_000, read_bytes=500), cache_bytes=64 << 20)
    for _ in range(200):
        await owner.append(b"%030d" % owner.sent)
    owner.log._cache.forget(SHARD_ID)
    first = await owner.log.read(0)
    await until(lambda: owner.log._reads._reading == {})
    ahead = owner.log._cache.get(SHARD_ID, first[-1].end_offset, 1 << 20)
    assert ahead[0].first_offset == first[-1].end_offset
    assert all(a.end_offset == b.first_offset for a, b in pairwise(ahead))
    assert sum(entry.size for entry in ahead) > 2 * 500
    assert len(ahead) < 5 * len(first)


async def test_little_is_read_ahead_where_the_cache_is_small(cluster: Cluster) -> None:
    owner = await cluster.open(settings=LogSettings(segment_bytes=30_000, read_bytes=500), cache_bytes=8 * 600)
    for _ in range(200):
        await owner.append(b"%030d" % owner.sent)
    owner.log._cache.forget(SHARD_ID)
    first = await owner.log.read(0)
    await until(lambda: owner.log._reads._reading == {})
    assert len(owner.log._cache.get(SHARD_ID, first[-1].end_offset, 1 << 20)) <= len(first)


async def test_history_is_whole_whatever_the_sizes_of_its_entries(cluster: Cluster) -> None:
    owner = await cluster.open(settings=SMALL, cache_bytes=64 << 20)
    rng = Random(3)
    sent = [rng.randbytes(rng.choice((1, 20, 300, 900))) for _ in range(300)]
    for payload in sent:
        await owner.append(payload)
    owner.log._cache.forget(SHARD_ID)
    found: list[bytes] = []
    while entries := await owner.log.read(len(found)):
        for entry in entries:
            found.extend(payloads_of(entry)[len(found) - entry.first_offset :])
    assert found == sent


async def test_readers_of_one_offset_share_one_read(cluster: Cluster) -> None:
    owner = await filled(cluster, 100)
    owner.log._cache.forget(SHARD_ID)
    found = await asyncio.gather(*(owner.log.read(50, tail=True) for _ in range(10)))
    assert all(entries[0] is found[0][0] for entries in found)


async def test_a_cancelled_reader_does_not_take_the_read_from_others(cluster: Cluster) -> None:
    owner = await filled(cluster, 100)
    owner.log._cache.forget(SHARD_ID)
    first = asyncio.create_task(owner.log.read(50, tail=True))
    second = asyncio.create_task(owner.log.read(50, tail=True))
    await asyncio.sleep(0)
    first.cancel()
    assert (await second)[0].first_offset <= 50


async def test_tailing_without_a_cache_follows_the_log_through_its_rolls(cluster: Cluster) -> None:
    owner = await cluster.open(settings=SMALL, cache_bytes=0)
    found: list[bytes] = []

    async def tail() -> None:
        offset = 0
        while len(found) < 200:
            await owner.log.wait_beyond(offset)
            for entry in await owner.log.read(offset, tail=True):
                found.extend(payloads_of(entry)[offset - entry.first_offset :])
                offset = entry.end_offset

    tailing = asyncio.create_task(tail())
    for number in range(200):
        await owner.append(b"%030d" % number)
    await tailing
    assert found == [b"%030d" % number for number in range(200)]
    assert len(owner.log.record.segments) > 3


async def test_the_next_ledger_is_read_before_the_roll_stands_in_the_records(cluster: Cluster) -> None:
    owner = await cluster.open(settings=SMALL, cache_bytes=0)
    while not owner.log.record.next_ledger:
        await owner.append(b"%030d" % owner.sent)
    cluster.store.silent = True
    linked = owner.log.record.next_ledger
    for _ in range(20):
        await owner.append(b"%030d" % owner.sent)
    assert owner.log.record.next_ledger == linked
    assert owner.log._appender.handle is not None
    assert owner.log._appender.handle.ledger_id == linked
    assert await owner.read_all() == [b"%030d" % number for number in range(owner.sent)]
    time_us = await owner.log.publish_time_of(owner.sent - 1)
    assert await owner.log.offset_at(time_us) == owner.sent - 1
    cluster.store.silent = False
    await until(lambda: owner.log._shard._tasks == set())
    assert await owner.read_all() == [b"%030d" % number for number in range(owner.sent)]
    await cluster.check()


async def test_one_bookie_is_enough_to_read_and_none_is_an_error_that_passes(cluster: Cluster) -> None:
    owner = await filled(cluster, 50)
    await owner.log.close()
    successor = await cluster.open("broker1", SMALL)
    cluster.cut |= {"bookie0", "bookie1"}
    assert len(await successor.read_all()) == owner.log.end_offset
    successor.log._cache.forget(SHARD_ID)
    cluster.cut.add("bookie2")
    with pytest.raises(ReadFailed, match="entry is unavailable"):
        await successor.log.read(0)
    cluster.cut.clear()
    assert len(await successor.read_all()) == owner.log.end_offset


async def test_a_silent_store_is_an_error_that_passes(cluster: Cluster) -> None:
    owner = await filled(cluster, 300)
    successor = await cluster.take_over(owner, settings=SMALL)
    cluster.store.silent = True
    with pytest.raises(ReadFailed, match="the record of a closed ledger is not known"):
        await successor.log.read(0)
    cluster.store.silent = False
    assert len(await successor.read_all()) == owner.log.end_offset


async def test_handles_of_old_segments_are_bounded(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(segment_reads, "SOURCES_MAX", 2)
    owner = await filled(cluster, 300)
    owner.log._cache.forget(SHARD_ID)
    assert len(await owner.read_all()) == owner.log.end_offset
    assert len(owner.log._reads._sources) <= 3


async def test_a_log_describes_itself(cluster: Cluster) -> None:
    owner = await filled(cluster, 100)
    facts = await owner.log.describe()
    assert (facts.start_offset, facts.end_offset) == (0, owner.log.end_offset)
    assert sum(segment.messages for segment in facts.segments) == owner.log.end_offset
    assert {segment.state.name for segment in facts.segments[:-1]} == {"CLOSED"}
    assert facts.segments[-1].state.name == "OPEN"
    assert all(len(segment.ensemble) == 3 for segment in facts.segments)
    total = sum(segment.bytes for segment in facts.segments)
    assert owner.log.backlog_bytes(0) == total
    assert owner.log.backlog_bytes(owner.log.end_offset) == 0
