"""A listing is whole, or an error."""

from __future__ import annotations

import pytest

from magnetar.metadata.listing import IncompleteListing, items, pages
from magnetar.metadata.memory import MemoryStore
from magnetar.metadata.store import MetadataUnavailable, Put, RangeResult


async def stored(keys: int) -> MemoryStore:
    store = MemoryStore()
    for number in range(keys):
        await store.txn([], [Put(f"/a/{number:02}", b"")])
    await store.txn([], [Put("/b", b"")])
    return store


@pytest.mark.parametrize("keys", [0, 1, 3, 4, 7])
async def test_all_keys_come_once_and_in_order_whatever_the_size_of_a_page(keys: int) -> None:
    store = await stored(keys)
    wanted = [f"/a/{number:02}" for number in range(keys)]
    assert [item.key async for item in items(store, "/a/", page_keys=3)] == wanted
    assert [item.key async for item in items(store, "/a/", after="/a/01", page_keys=3)] == wanted[2:]


async def test_an_empty_listing_is_one_page_with_its_revision() -> None:
    store = await stored(0)
    assert [(page.items, page.revision) async for page in pages(store, "/a/")] == [((), 2)]


async def test_a_store_that_falls_silent_ends_the_listing_with_an_error() -> None:
    store = await stored(7)
    answered = store.range

    async def silent(prefix: str, *, after: str = "", limit: int = 0) -> RangeResult:
        if after:
            raise MetadataUnavailable("silent")
        return await answered(prefix, after=after, limit=limit)

    store.range = silent  # type: ignore[method-assign]
    listing = items(store, "/a/", page_keys=3)
    assert [(await anext(listing)).key for _ in range(3)] == ["/a/00", "/a/01", "/a/02"]
    with pytest.raises(MetadataUnavailable):
        await anext(listing)


async def test_a_page_that_promises_more_and_has_nothing_is_no_end() -> None:
    store = await stored(0)

    async def endless(prefix: str, *, after: str = "", limit: int = 0) -> RangeResult:
        return RangeResult((), 5, more=True)

    store.range = endless  # type: ignore[method-assign]
    with pytest.raises(IncompleteListing, match="does not end"):
        assert not [item async for item in items(store, "/a/")]
