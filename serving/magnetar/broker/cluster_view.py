"""What a broker knows of the cluster by watching: the brokers that live, and who owns which shard. Hints only."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from magnetar.broker.layout import preferred_broker
from magnetar.metadata.codec import decode_broker
from magnetar.metadata.follow import Follower
from magnetar.metadata.keyspace import Keyspace
from magnetar.metadata.records import Owner
from magnetar.metadata.store import Change, KeyValue, MetadataStore


@dataclass(frozen=True, slots=True)
class LiveBroker:
    """`leaving`: it is stopping, and takes no more shards."""

    owner: Owner
    address: str
    version: str
    leaving: bool = False


class ClusterView:
    """`on_owner_change` is called with shards that may have another owner, or whose owner's session ended or began."""

    def __init__(self, store: MetadataStore, keyspace: Keyspace) -> None:
        self._keyspace = keyspace
        self._brokers: dict[str, LiveBroker] = {}
        self._owners: dict[int, Owner] = {}
        self._callbacks: list[Callable[[Iterable[int]], None]] = []
        self._broker_callbacks: list[Callable[[], None]] = []
        self._followers = (
            Follower(store, keyspace.brokers_prefix(), self._brokers_listed, self._brokers_changed),
            Follower(store, keyspace.owned_prefix(), self._owned_listed, self._owned_changed),
        )

    async def start(self) -> None:
        for follower in self._followers:
            await follower.start()

    async def close(self) -> None:
        for follower in self._followers:
            await follower.close()

    def on_owner_change(self, callback: Callable[[Iterable[int]], None]) -> None:
        self._callbacks.append(callback)

    def on_broker_change(self, callback: Callable[[], None]) -> None:
        """Called when a broker came, went, or registered something else."""
        self._broker_callbacks.append(callback)

    def brokers(self) -> list[LiveBroker]:
        return list(self._brokers.values())

    def owned(self) -> Iterable[tuple[int, Owner]]:
        """Every shard with the owner its record names, living or not."""
        return list(self._owners.items())

    def recorded_owner(self, shard_id: int) -> Owner | None:
        """The owner that the shard's record names, living or not."""
        return self._owners.get(shard_id)

    def owner(self, shard_id: int) -> LiveBroker | None:
        """The living owner of a shard."""
        owner = self._owners.get(shard_id)
        return None if owner is None else self.living(owner)

    def living(self, owner: Owner) -> LiveBroker | None:
        """The broker, if this very session of it lives."""
        broker = self._brokers.get(owner.broker_id)
        return broker if broker is not None and broker.owner == owner else None

    def orphaned(self, shard_id: int) -> bool:
        """The shard has an owner, and that one's session is over."""
        owner = self._owners.get(shard_id)
        return owner is not None and self.living(owner) is None

    def address(self, shard_id: int) -> str:
        """Of the shard's living owner; empty when nobody is known."""
        broker = self.owner(shard_id)
        return "" if broker is None else broker.address

    def preferred(self, shard_id: int, me: LiveBroker) -> LiveBroker:
        """Who should claim a shard without an owner."""
        brokers = {**self._staying(), me.owner.broker_id: me}
        chosen = preferred_broker(shard_id, brokers)
        assert chosen is not None
        return brokers[chosen]

    def successor(self, shard_id: int, broker_id: str) -> LiveBroker | None:
        """Who should get a shard when this broker leaves; None if there is no other."""
        brokers = self._staying()
        brokers.pop(broker_id, None)
        chosen = preferred_broker(shard_id, brokers)
        return None if chosen is None else brokers[chosen]

    def _staying(self) -> dict[str, LiveBroker]:
        return {broker_id: broker for broker_id, broker in self._brokers.items() if not broker.leaving}

    # --- what the watches say ---

    def _brokers_listed(self, keys: Sequence[KeyValue]) -> None:
        before = set(self._brokers.values())
        self._brokers = {self._keyspace.parse_broker(key.key): self._broker(key) for key in keys}
        self._tell_owners_changed(before ^ set(self._brokers.values()))

    def _brokers_changed(self, changes: Sequence[Change]) -> None:
        touched: set[LiveBroker] = set()
        for change in changes:
            broker_id = self._keyspace.parse_broker(change.key)
            before = self._brokers.pop(broker_id, None)
            if before is not None:
                touched.add(before)
            if change.current is not None:
                after = self._brokers[broker_id] = self._broker(change.current)
                touched.add(after)
        self._tell_owners_changed(touched)

    def _owned_listed(self, keys: Sequence[KeyValue]) -> None:
        before = self._owners
        self._owners = {}
        # A shard stands twice only if the listing's pages lie on both sides of a change, which the watch then repeats.
        for key in keys:
            owner, shard_id = self._keyspace.parse_owned(key.key)
            self._owners[shard_id] = owner
        self._tell({s for s in before.keys() | self._owners.keys() if before.get(s) != self._owners.get(s)})

    def _owned_changed(self, changes: Sequence[Change]) -> None:
        shards = set()
        # Deletions first: one transaction takes a shard from one owner and gives it to the next.
        for change in sorted(changes, key=lambda change: (change.revision, change.current is not None)):
            owner, shard_id = self._keyspace.parse_owned(change.key)
            shards.add(shard_id)
            if change.current is not None:
                self._owners[shard_id] = owner
            elif self._owners.get(shard_id) == owner:
                del self._owners[shard_id]
        self._tell(shards)

    def _broker(self, key: KeyValue) -> LiveBroker:
        registration = decode_broker(key.value)
        owner = Owner(self._keyspace.parse_broker(key.key), key.create_revision)
        return LiveBroker(owner, registration.address, registration.version, registration.leaving)

    def _tell_owners_changed(self, brokers: Iterable[LiveBroker]) -> None:
        owners = {broker.owner for broker in brokers}
        if owners:
            for callback in self._broker_callbacks:
                callback()
            self._tell({shard for shard, owner in self._owners.items() if owner in owners})

    def _tell(self, shards: set[int]) -> None:
        if shards:
            for callback in self._callbacks:
                callback(shards)
