"""What every engine of the metadata store keeps. See `store.py` for the rules."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from magnetar.metadata.store import (
    COMPARES_MAX,
    OPERATIONS_MAX,
    TXN_BYTES_MAX,
    VALUE_BYTES_MAX,
    Change,
    Changes,
    Delete,
    DeletePrefix,
    KeyValue,
    LeaseExpired,
    MetadataError,
    MetadataStore,
    Operation,
    Put,
    Reset,
    absent,
    created_at,
    exists,
    not_created_at,
    unchanged,
)


async def put(store: MetadataStore, key: str, value: bytes = b"v", lease_id: int = 0) -> int:
    result = await store.txn([], [Put(key, value, lease_id)])
    assert result.succeeded
    return result.revision


async def keys(store: MetadataStore, prefix: str = "") -> list[str]:
    return [item.key for item in (await store.range(prefix)).items]


async def test_a_key_knows_the_revisions_that_created_and_last_changed_it(store: MetadataStore) -> None:
    created = await put(store, "a", b"1")
    changed = await put(store, "a", b"2")
    item = await store.get("a")
    assert item is not None
    assert (item.value, item.create_revision, item.mod_revision, item.lease_id) == (b"2", created, changed, 0)
    assert changed == created + 1


async def test_an_absent_key_is_none(store: MetadataStore) -> None:
    assert await store.get("a") is None


async def test_a_key_made_again_has_a_new_create_revision(store: MetadataStore) -> None:
    first = await put(store, "a")
    await store.txn([], [Delete("a")])
    second = await put(store, "a")
    item = await store.get("a")
    assert item is not None
    assert item.create_revision == item.mod_revision == second == first + 2


async def test_all_operations_of_a_transaction_have_one_revision(store: MetadataStore) -> None:
    before = await put(store, "c")
    result = await store.txn([], [Put("a", b"1"), Put("b", b"2"), Delete("c")])
    assert result.revision == before + 1
    assert [item.mod_revision for item in (await store.range("")).items] == [result.revision] * 2


async def test_a_transaction_that_changes_nothing_has_no_revision_of_its_own(store: MetadataStore) -> None:
    revision = await put(store, "a")
    for operations in ([], [Delete("nothing")], [DeletePrefix("no")]):
        result = await store.txn([], operations)
        assert result.succeeded
        assert result.revision == revision


async def test_a_failed_compare_applies_nothing_and_tells_the_revision(store: MetadataStore) -> None:
    revision = await put(store, "a")
    result = await store.txn([exists("a"), absent("a")], [Put("b", b""), Delete("a")])
    assert not result.succeeded
    assert result.revision == revision
    assert await keys(store) == ["a"]


async def test_every_kind_of_compare_holds_and_fails_as_it_should(store: MetadataStore) -> None:
    created = await put(store, "a")
    changed = await put(store, "a")
    holds = [
        unchanged("a", changed),
        unchanged("none", 0),
        absent("none"),
        exists("a"),
        created_at("a", created),
        not_created_at("a", changed),
        not_created_at("none", 7),
    ]
    fails = [
        unchanged("a", created),
        unchanged("none", 1),
        absent("a"),
        exists("none"),
        created_at("a", changed),
        created_at("none", 7),
        not_created_at("a", created),
    ]
    assert all([(await store.txn([compare], [])).succeeded for compare in holds])
    assert not any([(await store.txn([compare], [])).succeeded for compare in fails])


@pytest.mark.parametrize(
    "operations",
    [
        [Put("a", b""), Put("a", b"")],
        [Put("a", b""), Delete("a")],
        [Delete("a"), Delete("a")],
        [Put("ab", b""), DeletePrefix("a")],
        [DeletePrefix("a"), Delete("a")],
        [DeletePrefix("a"), DeletePrefix("ab")],
        [DeletePrefix("a"), DeletePrefix("a")],
        [Put("", b"")],
        [DeletePrefix("")],
        [Put("a", bytes(VALUE_BYTES_MAX + 1))],
        [Put("a", bytes(TXN_BYTES_MAX // 2)), Put("b", bytes(TXN_BYTES_MAX // 2))],
        [Put("\ud800", b"")],
        [Put(str(i), b"") for i in range(OPERATIONS_MAX + 1)],
    ],
)
async def test_a_transaction_beyond_the_limits_is_refused_whole(
    store: MetadataStore, operations: list[Operation]
) -> None:
    with pytest.raises(ValueError, match=r"."):
        await store.txn([], operations)
    assert await keys(store) == []


async def test_a_transaction_at_the_limits_is_applied(store: MetadataStore) -> None:
    rest = TXN_BYTES_MAX - VALUE_BYTES_MAX - 3 * (OPERATIONS_MAX + COMPARES_MAX)
    values = {0: bytes(VALUE_BYTES_MAX), 1: bytes(rest)}
    operations = [Put(f"{i:03}", values.get(i, b"")) for i in range(OPERATIONS_MAX)]
    compares = [absent(f"{i:03}") for i in range(COMPARES_MAX)]
    assert (await store.txn(compares, operations)).succeeded
    assert len(await keys(store)) == OPERATIONS_MAX


async def test_a_range_is_in_order_and_holds_its_prefix_only(store: MetadataStore) -> None:
    for key in ("b/", "a/é", "a", "a/\U0010ffff", "a/1", "a0", "a/", "a/￿"):
        await put(store, key)
    assert await keys(store, "a/") == ["a/", "a/1", "a/é", "a/￿", "a/\U0010ffff"]
    assert await keys(store) == ["a", "a/", "a/1", "a/é", "a/￿", "a/\U0010ffff", "a0", "b/"]


async def test_pages_of_a_range_join_to_the_whole(store: MetadataStore) -> None:
    names = [f"k{i}" for i in range(7)]
    for name in names:
        await put(store, name)
    found: list[str] = []
    result = await store.range("k", limit=3)
    found += [item.key for item in result.items]
    while result.more:
        result = await store.range("k", after=found[-1], limit=3)
        found += [item.key for item in result.items]
    assert found == names
    assert not (await store.range("k", limit=7)).more
    assert (await store.range("k", limit=6)).more


async def test_a_range_after_a_key_outside_the_prefix_is_right(store: MetadataStore) -> None:
    for key in ("a", "b1", "b2", "c"):
        await put(store, key)
    assert [i.key for i in (await store.range("b", after="a")).items] == ["b1", "b2"]
    assert [i.key for i in (await store.range("b", after="b1")).items] == ["b2"]
    assert (await store.range("b", after="c")).items == ()


async def test_a_range_has_the_stores_revision_even_when_empty(store: MetadataStore) -> None:
    revision = await put(store, "a")
    assert (await store.range("z")).revision == revision


async def test_deleting_a_prefix_takes_what_it_matches_and_no_more(store: MetadataStore) -> None:
    for key in ("a", "a/", "a/1", "a0"):
        await put(store, key)
    await store.txn([], [DeletePrefix("a/")])
    assert await keys(store) == ["a", "a0"]


async def test_of_concurrent_compare_and_sets_exactly_one_wins(store: MetadataStore) -> None:
    results = await asyncio.gather(*(store.txn([absent("a")], [Put("a", b"%d" % i)]) for i in range(20)))
    assert [result.succeeded for result in results].count(True) == 1


async def test_concurrent_transactions_get_consecutive_revisions(store: MetadataStore) -> None:
    start = (await store.range("")).revision
    results = await asyncio.gather(*(store.txn([], [Put(f"k{i}", b"")]) for i in range(50)))
    assert sorted(result.revision for result in results) == [start + 1 + i for i in range(50)]
    assert [(await store.get(f"k{i}")) for i in range(50)] == [
        KeyValue(f"k{i}", b"", result.revision, result.revision) for i, result in enumerate(results)
    ]


async def test_concurrent_transactions_in_this_process_are_applied_in_the_order_of_the_calls(
    local_store: MetadataStore,
) -> None:
    results = await asyncio.gather(*(local_store.txn([], [Put(f"k{i}", b"")]) for i in range(50)))
    assert [result.revision for result in results] == sorted(result.revision for result in results)


# Watches.


async def test_a_watch_delivers_past_and_coming_changes_in_order(store: MetadataStore) -> None:
    first = await put(store, "a/1", b"x")
    watch = store.watch("a/", from_revision=first)
    events = aiter(watch)
    await put(store, "b")
    last = (await store.txn([], [Put("a/2", b"y"), Delete("a/1"), Put("c", b"")])).revision
    seen: list[Change] = []
    while len(seen) < 3:
        event = await anext(events)
        assert isinstance(event, Changes)
        assert event.revision >= event.changes[-1].revision
        seen += event.changes
    assert [(c.key, c.revision, c.current.value if c.current else None) for c in seen] == [
        ("a/1", first, b"x"),
        ("a/2", last, b"y"),
        ("a/1", last, None),
    ]
    await watch.close()


async def test_a_waiting_watch_is_woken_by_a_change(store: MetadataStore) -> None:
    watch = store.watch("a", from_revision=(await store.range("")).revision + 1)
    waiting = asyncio.ensure_future(anext(aiter(watch)))
    await put(store, "z")
    revision = await put(store, "a")
    event = await waiting
    assert isinstance(event, Changes)
    assert [(c.key, c.revision) for c in event.changes] == [("a", revision)]
    await watch.close()


async def test_a_watch_from_a_future_revision_skips_what_comes_before(store: MetadataStore) -> None:
    revision = await put(store, "a")
    watch = store.watch("a", from_revision=revision + 2)
    await put(store, "a", b"too early")
    await put(store, "a", b"seen")
    event = await anext(aiter(watch))
    assert isinstance(event, Changes)
    assert [c.current.value for c in event.changes if c.current] == [b"seen"]
    await watch.close()


async def test_a_watch_never_splits_a_revision(store: MetadataStore) -> None:
    start = (await store.range("")).revision
    watch = store.watch("k", from_revision=start + 1)
    for _ in range(5):
        await store.txn([], [Put("k1", b""), Put("k2", b""), Put("k3", b"")])
    seen: list[int] = []
    async for event in watch:
        assert isinstance(event, Changes)
        assert len(event.changes) % 3 == 0
        seen += [c.revision for c in event.changes]
        if len(seen) == 15:
            break
    assert seen == [start + 1 + i // 3 for i in range(15)]
    await watch.close()


async def test_a_watch_from_compacted_history_is_reset_and_ends(
    store: MetadataStore, compact: Callable[[], None]
) -> None:
    first = await put(store, "a")
    for _ in range(60):
        await put(store, "a")
    compact()
    events = [event async for event in store.watch("a", from_revision=first)]
    assert events == [Reset()]


async def test_a_watch_that_was_overtaken_by_compaction_is_reset(local_store: MetadataStore) -> None:
    watch = local_store.watch("a", from_revision=await put(local_store, "a"))
    events = aiter(watch)
    assert isinstance(await anext(events), Changes)
    for _ in range(60):
        await put(local_store, "a")
    assert [event async for event in watch] == [Reset()]


async def test_a_watch_of_a_quiet_prefix_is_not_reset_by_changes_elsewhere(store: MetadataStore) -> None:
    watch = store.watch("quiet", from_revision=(await store.range("")).revision + 1)
    for _ in range(120):
        await put(store, "loud")
    await put(store, "quiet")
    event = await anext(aiter(watch))
    assert isinstance(event, Changes)
    assert [c.key for c in event.changes] == ["quiet"]
    await watch.close()


async def test_closing_a_watch_or_the_store_ends_the_iteration(store: MetadataStore) -> None:
    start = (await store.range("")).revision + 1
    watches = [store.watch("a", from_revision=start) for _ in range(2)]
    waiting = [asyncio.ensure_future(anext(aiter(watch), None)) for watch in watches]
    await asyncio.sleep(0)
    await watches[0].close()
    assert await waiting[0] is None
    await store.close()
    assert await waiting[1] is None


# Leases. The lower half (`grant_remote_lease` and what follows) is for holders in other processes.


async def test_a_put_with_an_unknown_lease_is_refused_whole(store: MetadataStore) -> None:
    with pytest.raises(LeaseExpired):
        await store.txn([], [Put("a", b""), Put("b", b"", lease_id=12345)])
    assert await keys(store) == []


async def test_an_unknown_lease_is_no_matter_when_a_compare_fails(store: MetadataStore) -> None:
    assert not (await store.txn([exists("a")], [Put("b", b"", lease_id=12345)])).succeeded


async def test_revoking_a_lease_deletes_its_keys_as_one_revision(store: MetadataStore) -> None:
    lease = await store.grant_lease(10)
    await put(store, "a", lease_id=lease.lease_id)
    await put(store, "b", lease_id=lease.lease_id)
    before = await put(store, "c")
    watch = store.watch("", from_revision=before + 1)
    assert not lease.lost
    await lease.revoke()
    assert lease.lost
    await lease.wait_lost()
    assert await keys(store) == ["c"]
    event = await anext(aiter(watch))
    assert event == Changes((Change("a", None, before + 1), Change("b", None, before + 1)), before + 1)
    await lease.revoke()
    await watch.close()


async def test_a_key_put_again_without_the_lease_outlives_it(store: MetadataStore) -> None:
    lease = await store.grant_lease(10)
    await put(store, "a", lease_id=lease.lease_id)
    await put(store, "a")
    await lease.revoke()
    assert await keys(store) == ["a"]


async def test_a_key_moved_to_another_lease_goes_with_that(store: MetadataStore) -> None:
    first, second = await store.grant_lease(10), await store.grant_lease(10)
    await put(store, "a", lease_id=first.lease_id)
    await put(store, "a", lease_id=second.lease_id)
    await first.revoke()
    assert await keys(store) == ["a"]
    await second.revoke()
    assert await keys(store) == []


async def test_a_revoked_lease_takes_no_more_keys(store: MetadataStore) -> None:
    lease = await store.grant_lease(10)
    await lease.revoke()
    with pytest.raises(LeaseExpired):
        await put(store, "a", lease_id=lease.lease_id)


async def test_closing_the_store_loses_the_leases_held_in_this_process(store: MetadataStore) -> None:
    lease = await store.grant_lease(10)
    await store.close()
    await lease.wait_lost()
    await lease.revoke()


async def test_a_lease_without_keepalive_expires_and_takes_its_keys(local_store: Any, clock: Any) -> None:
    lease_id = await local_store.grant_remote_lease(2)
    await put(local_store, "a", lease_id=lease_id)
    for _ in range(4):
        clock.now += 0.5
        assert await keys(local_store) == ["a"]
        await local_store.tick()
    assert await keys(local_store) == []
    with pytest.raises(LeaseExpired):
        await local_store.keep_alive(lease_id)


async def test_a_keepalive_gives_a_lease_its_full_time_again(local_store: Any, clock: Any) -> None:
    lease_id = await local_store.grant_remote_lease(2)
    await put(local_store, "a", lease_id=lease_id)
    for _ in range(10):
        clock.now += 0.5
        await local_store.tick()
        assert await local_store.keep_alive(lease_id) == 2
    assert await keys(local_store) == ["a"]


async def test_a_lease_held_in_this_process_does_not_expire(local_store: Any, clock: Any) -> None:
    lease = await local_store.grant_lease(2)
    await put(local_store, "a", lease_id=lease.lease_id)
    for _ in range(20):
        clock.now += 0.5
        await local_store.tick()
    assert await keys(local_store) == ["a"]
    assert not lease.lost


async def test_a_late_tick_gives_every_lease_its_full_time_again(local_store: Any, clock: Any) -> None:
    await put(local_store, "a", lease_id=await local_store.grant_remote_lease(2))
    await local_store.tick()
    clock.now += 60
    await local_store.tick()
    clock.now += 1
    await local_store.tick()
    assert await keys(local_store) == ["a"]
    clock.now += 1
    await local_store.tick()
    assert await keys(local_store) == []


@pytest.mark.parametrize("ttl_s", [0, -1, 0.1, 1e9, float("nan")])
async def test_a_senseless_time_to_live_is_refused(store: MetadataStore, ttl_s: float) -> None:
    with pytest.raises(ValueError, match="ttl_s"):
        await store.grant_lease(ttl_s)


# Closing.


async def test_a_closed_store_refuses_calls_and_closes_again(store: MetadataStore) -> None:
    await store.close()
    await store.close()
    for call in (store.get("a"), store.range(""), store.txn([], []), store.grant_lease(5)):
        with pytest.raises(MetadataError, match="closed"):
            await call
