"""A disk that fills up: read-only, what is still taken then, and back."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

from prometheus_client import CollectorRegistry

from magnetar.bookie.disk import DiskState, DiskUsage, gauge_of
from magnetar.bookie.metrics import BookieMetrics
from magnetar.ledger.bookie_rpc import AddStatus
from magnetar.metadata.codec import decode_bookie
from magnetar.metadata.keyspace import Keyspace
from magnetar.metadata.records import BookieState
from magnetar.metadata.store import MetadataStore

W, R = BookieState.WRITABLE, BookieState.READ_ONLY


def test_read_only_begins_at_its_limit_and_ends_below_the_lower_one() -> None:
    disk = DiskState(read_only_at=0.95, writable_at=0.90)
    seen = []
    for used in (10, 94, 95, 94, 90, 89, 94, 99, 91, 50):
        disk.update(DiskUsage(100 - used, 100))
        seen.append((used, disk.state, disk.full))
    assert seen == [
        (10, W, False),
        (94, W, False),
        (95, R, False),
        (94, R, False),
        (90, R, False),
        (89, W, False),
        (94, W, False),
        (99, R, True),
        (91, R, False),
        (50, W, False),
    ]


def test_a_small_disk_is_full_before_its_reserve_is_touched() -> None:
    disk = DiskState(read_only_at=0.95, writable_at=0.90, reserve_bytes=20)
    seen = []
    for free in (90, 20, 19, 39, 40):
        disk.update(DiskUsage(free, 100))
        seen.append((free, disk.state, disk.full))
    assert seen == [(90, W, False), (20, W, False), (19, R, True), (39, R, False), (40, W, False)]


def test_a_disk_without_size_is_full() -> None:
    assert DiskUsage(0, 0).used_share == 1.0


def test_the_gauge_measures_the_disk_of_its_directory(tmp_path: Path) -> None:
    usage = gauge_of(tmp_path)()
    assert 0 < usage.free_bytes < usage.total_bytes
    assert 0 < usage.used_share < 1


async def registered_state(metadata: MetadataStore) -> BookieState:
    found = await metadata.get(Keyspace("test").bookie("bookie0"))
    assert found is not None
    return decode_bookie(found.value).state


async def test_a_nearly_full_bookie_takes_recovery_adds_only_and_comes_back(
    bookies: Any, disk: Any, metadata: MetadataStore, writer: Any
) -> None:
    bookie = await bookies.start(gauge=disk)
    local = bookie.local()
    assert (await local.add(writer(7).add(0))).status is AddStatus.OK
    disk.used_share = 0.96
    await bookie.check_disk()
    assert await registered_state(metadata) is R
    assert bookie.problems()
    assert (await local.add(writer(7).add(1))).status is AddStatus.READ_ONLY
    assert (await local.add(writer(7).add(1, recovery=True))).status is AddStatus.OK
    assert (await local.read_lac(writer(7).lac(fence=True))).fenced
    disk.used_share = 0.995
    await bookie.check_disk()
    assert (await local.add(writer(7).add(2, recovery=True))).status is AddStatus.READ_ONLY
    disk.used_share = 0.92
    await bookie.check_disk()
    assert await registered_state(metadata) is R
    disk.used_share = 0.80
    await bookie.check_disk()
    assert await registered_state(metadata) is W
    assert (await local.add(writer(8).add(0))).status is AddStatus.OK
    assert bookie.problems() == []


async def test_a_disk_that_fills_up_is_noticed_by_the_next_group_and_told_soon(
    bookies: Any, disk: Any, metadata: MetadataStore, writer: Any
) -> None:
    bookie = await bookies.start(gauge=disk)
    local = bookie.local()
    before = await metadata.get(Keyspace("test").bookie("bookie0"))
    assert before is not None
    disk.used_share = 0.995
    assert (await local.add(writer(7).add(0, recovery=True))).status is AddStatus.READ_ONLY
    async with asyncio.timeout(5):
        await anext(aiter(metadata.watch(before.key, from_revision=before.mod_revision + 1)))
    assert await registered_state(metadata) is R
    disk.used_share = 0.5
    assert (await local.add(writer(7).add(0))).status is AddStatus.OK


async def test_a_bookie_that_starts_on_a_full_disk_registers_as_read_only(
    bookies: Any, disk: Any, metadata: MetadataStore
) -> None:
    disk.used_share = 0.97
    await bookies.start(gauge=disk)
    assert await registered_state(metadata) is R


def test_the_metrics_of_two_bookies_share_a_registry() -> None:
    registry = CollectorRegistry()
    BookieMetrics(registry, "a").limbo.set(1)
    BookieMetrics(registry, "b").limbo.set(0)
    values = [registry.get_sample_value("magnetar_bookie_limbo", {"bookie": name}) for name in ("a", "b")]
    assert values == [1, 0]
