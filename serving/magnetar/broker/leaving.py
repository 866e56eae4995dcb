"""The bookies that must be left: drained by an operator, or given up by the auditor. Hints, as watches give them.

Closed ledgers are copied away from them; ledgers that are open are never copied, so their owners end them.
"""

from __future__ import annotations

from collections.abc import Sequence

from magnetar.metadata.codec import decode_loss
from magnetar.metadata.follow import Follower
from magnetar.metadata.keyspace import Keyspace
from magnetar.metadata.store import Change, KeyValue, MetadataStore


class LeavingBookies:
    def __init__(self, store: MetadataStore, keyspace: Keyspace) -> None:
        self._keyspace = keyspace
        self._drained: set[str] = set()
        self._given_up: set[str] = set()
        self._followers = (
            Follower(store, keyspace.drains_prefix(), self._drains_listed, self._drains_changed),
            Follower(store, keyspace.losses_prefix(), self._losses_listed, self._losses_changed),
        )

    async def start(self) -> None:
        """Raises MetadataUnavailable."""
        for follower in self._followers:
            await follower.start()

    async def close(self) -> None:
        for follower in self._followers:
            await follower.close()

    def bookies(self) -> frozenset[str]:
        return frozenset(self._drained | self._given_up)

    def _drains_listed(self, items: Sequence[KeyValue]) -> None:
        self._drained = {self._keyspace.parse_drain(item.key) for item in items}

    def _drains_changed(self, changes: Sequence[Change]) -> None:
        for change in changes:
            _set(self._drained, self._keyspace.parse_drain(change.key), change.current is not None)

    def _losses_listed(self, items: Sequence[KeyValue]) -> None:
        self._given_up = {self._keyspace.parse_loss(item.key) for item in items if decode_loss(item.value).given_up}

    def _losses_changed(self, changes: Sequence[Change]) -> None:
        for change in changes:
            given_up = change.current is not None and decode_loss(change.current.value).given_up
            _set(self._given_up, self._keyspace.parse_loss(change.key), given_up)


def _set(names: set[str], name: str, member: bool) -> None:
    if member:
        names.add(name)
    else:
        names.discard(name)
