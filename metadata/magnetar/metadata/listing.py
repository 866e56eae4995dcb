"""Lists all keys under a prefix of the metadata store, page by page: the whole of them, or an error."""

from __future__ import annotations

from collections.abc import AsyncIterator

from magnetar.metadata.store import KeyValue, MetadataStore, MetadataUnavailable, RangeResult

PAGE_KEYS = 500
PAGES_MAX = 100_000
"""A listing that is longer is given up, not cut."""


class IncompleteListing(MetadataUnavailable):
    """It does not come to an end: nothing may be concluded from what it has not shown."""


async def pages(
    store: MetadataStore, prefix: str, *, after: str = "", page_keys: int = PAGE_KEYS
) -> AsyncIterator[RangeResult]:
    """At least one page; only a consumer who gets to the end of them has seen all.

    Keys that change meanwhile are seen as they are when their page is read. Raises MetadataUnavailable.
    """
    for _ in range(PAGES_MAX):
        page = await store.range(prefix, after=after, limit=page_keys)
        yield page
        if not page.more:
            return
        if not page.items:
            break
        after = page.items[-1].key
    raise IncompleteListing(f"a listing does not end, the metadata store is at fault prefix=`{prefix}`")


async def items(
    store: MetadataStore, prefix: str, *, after: str = "", page_keys: int = PAGE_KEYS
) -> AsyncIterator[KeyValue]:
    """One by one what `pages` gives."""
    async for page in pages(store, prefix, after=after, page_keys=page_keys):
        for item in page.items:
            yield item
