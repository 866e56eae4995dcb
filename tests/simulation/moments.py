"""Moments at which a strike does most harm: a broker asks the metadata store for a change, or has just made it.

What stands between two transactions lasts milliseconds: what strikes at any time hardly ever meets it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence

from simulation.boundaries import Boundaries

from magnetar.metadata.codec import decode_shard
from magnetar.metadata.keyspace import KeyKind, Keyspace
from magnetar.metadata.store import Operation, Put

RECORDS = {KeyKind.PRODUCER: "producer", KeyKind.SUBSCRIPTION: "subscription"}
FIELDS = ("owner", "segments", "next_ledger", "cursor_ledger", "next_cursor", "inline_cursors", "start_offset")
CHANGES = (*RECORDS.values(), *FIELDS)
"""What a transaction may write: a record of some kind, or a field of a shard's record."""


class Moments:
    """Those that somebody waits for."""

    def __init__(self, keyspace: Keyspace, boundaries: Boundaries) -> None:
        self._keyspace = keyspace
        self._boundaries = boundaries
        self._awaited: dict[tuple[str, bool], asyncio.Future[str]] = {}

    async def next(self, change: str, *, applied: bool) -> str:
        """Who asks for the next change of this kind; with `applied`, whose was applied and is not answered yet."""
        moment = (change, applied)
        if moment not in self._awaited:
            self._awaited[moment] = asyncio.get_running_loop().create_future()
        return await asyncio.shield(self._awaited[moment])

    def reached(self, by: str, operations: Sequence[Operation], *, applied: bool) -> None:
        """This process asks for these changes, or they are applied now."""
        if self._awaited and by.startswith("broker"):
            for change in self._changes(operations):
                awaited = self._awaited.pop((change, applied), None)
                if awaited is not None:
                    awaited.set_result(by)

    def _changes(self, operations: Sequence[Operation]) -> Iterator[str]:
        for operation in operations:
            if not isinstance(operation, Put) or not operation.key.startswith(self._keyspace.root):
                continue
            kind, _ = self._keyspace.parse(operation.key)
            if kind in RECORDS:
                yield RECORDS[kind]
            elif kind is KeyKind.SHARD:
                after = decode_shard(operation.value)
                before = self._boundaries.shard(after.shard_id)
                yield from (name for name in FIELDS if getattr(before, name, None) != getattr(after, name))
