"""Which cluster a metadata store holds: its instance id, and the refusal to begin a cluster by a slip of the pen."""

from __future__ import annotations

import uuid

from magnetar.metadata.codec import decode_text, encode_text
from magnetar.metadata.keyspace import CLUSTERS_PREFIX, Keyspace, cluster_of
from magnetar.metadata.store import MetadataError, MetadataStore, Put, absent


class ForeignStore(MetadataError):
    """The store is another cluster's."""


async def join_cluster(store: MetadataStore, keyspace: Keyspace, *, new_cluster: bool = False) -> str:
    """The instance id of the cluster. One that the store does not hold yet begins here, if the store holds no other.

    new_cluster   begin it beside others, too
    Raises ForeignStore, MetadataUnavailable.
    """
    if await store.get(keyspace.instance()) is None and not new_cluster:
        others = (await store.range(CLUSTERS_PREFIX, limit=1)).items
        held = cluster_of(others[0].key) if others else keyspace.cluster
        if held != keyspace.cluster:
            raise ForeignStore(
                f"the metadata store holds another cluster: give its name with --set cluster={held}, "
                f"or begin one of this name there with --set new_cluster=true cluster=`{keyspace.cluster}`"
            )
    return await cluster_instance(store, keyspace)


async def cluster_instance(store: MetadataStore, keyspace: Keyspace) -> str:
    """The cluster's instance id, drawn by whoever asks first. Raises MetadataError."""
    key = keyspace.instance()
    found = await store.get(key)
    if found is None:
        await store.txn([absent(key)], [Put(key, encode_text(uuid.uuid4().hex))])
        found = await store.get(key)
    if found is None:
        raise MetadataError(f"the cluster's instance id cannot be written key=`{key}`; check the metadata store")
    return decode_text(found.value)
