"""Follows a prefix of the metadata store: what stands there, then every change of it, through resets and silences.

What it gives is a hint, as old as the store's last answer. Nobody may take it for a proof.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

import structlog

from magnetar.metadata.listing import pages
from magnetar.metadata.store import Change, KeyValue, MetadataError, MetadataStore, Reset

RETRY_S = 0.2
"""Pause after the store did not answer."""

log = structlog.get_logger("magnetar.follow")


class Follower:
    """Calls `listed` with all keys under the prefix at first and after each gap, `changed` with each change between.

    With `list_keys=False` the listing is not read, and `listed` gets nothing: enough to drop what was remembered.
    Changes may repeat what a listing showed; within one key they come in order.
    """

    def __init__(
        self,
        store: MetadataStore,
        prefix: str,
        listed: Callable[[Sequence[KeyValue]], None],
        changed: Callable[[Sequence[Change]], None],
        *,
        list_keys: bool = True,
    ) -> None:
        self._store = store
        self._prefix = prefix
        self._listed = listed
        self._changed = changed
        self._list_keys = list_keys
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Returns after the first listing. Raises MetadataUnavailable."""
        revision = await self._list()
        self._task = asyncio.create_task(self._run(revision), name=f"follow {self._prefix}")

    async def close(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def _list(self) -> int:
        """Returns the revision from which changes count: that of the first page, so that none is missed."""
        if not self._list_keys:
            revision = (await self._store.range(self._prefix, limit=1)).revision
            self._listed(())
            return revision
        found = [page async for page in pages(self._store, self._prefix)]
        self._listed([item for page in found for item in page.items])
        return found[0].revision

    async def _run(self, revision: int) -> None:
        while True:
            try:
                revision = await self._watch(revision)
                revision = await self._list()
            except MetadataError:
                await asyncio.sleep(RETRY_S)
            except Exception:
                # A record that does not decode must not end the view of all others: list again, a little later.
                log.exception("following failed", prefix=self._prefix)
                await asyncio.sleep(RETRY_S)

    async def _watch(self, revision: int) -> int:
        """Until the watch ends; returns the revision it got to."""
        watch = self._store.watch(self._prefix, from_revision=revision + 1)
        try:
            async for event in watch:
                if isinstance(event, Reset):
                    break
                self._changed(event.changes)
                revision = event.revision
        finally:
            await watch.close()
        return revision
