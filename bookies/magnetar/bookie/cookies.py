"""Who a bookie is: the cookie in the metadata store and its twin in the data directory.

An empty directory under an old name would answer "no such entry" for entries that were acknowledged, and recovery would
cut them off. So a bookie starts only where both cookies agree:

| in the metadata store | in the directory | the bookie |
|---|---|---|
| none | none, and empty | is new: stamps the directory, then the metadata store |
| none | pending stamp | goes on with it: the process died between the two |
| none | a cookie | refuses: it was decommissioned, or the directory is of another cluster |
| a cookie | none | refuses: the disk was lost or swapped |
| repaired | none, and empty | is reborn in limbo |
| a cookie | the same | starts |
| a cookie | another one | refuses |
| repaired | a cookie | refuses: the directory was given up |

Limbo: durable entries and fences may be missing here for every ledger id below the limbo floor, the cluster's ledger
counter when the doubt arose. Negatives for such ledgers are no answers, and ordinary adds to them are refused.
"""

from __future__ import annotations

import uuid
from dataclasses import dataclass

from magnetar.bookie.entry_store import EntryStore, GroupWrites
from magnetar.metadata.codec import (
    DamagedRecord,
    decode_cookie,
    decode_counter,
    encode_cookie,
    encode_counter,
)
from magnetar.metadata.instance import cluster_instance
from magnetar.metadata.keyspace import COUNTER_LEDGER, Keyspace
from magnetar.metadata.records import Cookie
from magnetar.metadata.store import KeyValue, MetadataStore, Put, absent, unchanged

REPAIRED = "repaired"
"""Stands for the directory id of an identity whose directory was given up: the next empty one takes its place."""

_COOKIE = "cookie"
_STAMPED = "stamped"
_LIMBO_FLOOR = "limbo_floor"


class BookieRefusal(Exception):
    """The bookie does not start: one line with cause and remedy."""


@dataclass(frozen=True, slots=True)
class Identity:
    """`limbo_floor`: ledger ids below it are in limbo here; 0 = none."""

    cookie: Cookie
    limbo_floor: int


async def establish_identity(
    entries: EntryStore, metadata: MetadataStore, keyspace: Keyspace, bookie_id: str
) -> Identity:
    """Compares the cookies and stamps a new bookie's. Returns when identity and limbo are durable.

    Raises BookieRefusal, and MetadataUnavailable: then starting again goes on where this stopped.
    """
    try:
        return await _establish(entries, metadata, keyspace, bookie_id)
    except DamagedRecord as damage:
        raise BookieRefusal(f"cookie or counter cannot be read: {damage}; restore the metadata store") from damage


async def _establish(entries: EntryStore, metadata: MetadataStore, keyspace: Keyspace, bookie_id: str) -> Identity:
    instance_id = await cluster_instance(metadata, keyspace)
    known = await metadata.get(keyspace.cookie(bookie_id))
    there = None if known is None else decode_cookie(known.value)
    here = decode_cookie(entries.meta[_COOKIE]) if _COOKIE in entries.meta else None
    _check_instance(instance_id, here, there)
    meta: dict[str, bytes] = {}
    reborn = False
    if here is None:
        reborn = _check_unstamped(entries, there, bookie_id)
        here = Cookie(bookie_id, instance_id, keyspace.cluster, uuid.uuid4().hex)
        meta[_COOKIE] = encode_cookie(here)
    if reborn or entries.doubt:
        floor = max(_limbo_floor(entries), await _ledger_counter(metadata, keyspace))
        meta[_LIMBO_FLOOR] = encode_counter(floor)
    pending = _STAMPED not in entries.meta
    _check_pair(here, there, pending, bookie_id)
    if meta:
        await entries.commit(GroupWrites(meta=meta))
    if pending:
        await _stamp_metadata(metadata, keyspace, here, known)
        await entries.commit(GroupWrites(meta={_STAMPED: b"1"}))
    return Identity(here, _limbo_floor(entries))


def _check_instance(instance_id: str, here: Cookie | None, there: Cookie | None) -> None:
    for place, cookie in (("data directory", here), ("metadata store", there)):
        if cookie is not None and cookie.instance_id != instance_id:
            raise BookieRefusal(
                f"the cookie in the {place} is of another cluster: cookie=`{cookie.instance_id}` "
                f"cluster=`{instance_id}`; use the metadata store and the directory that belong together"
            )


def _check_unstamped(entries: EntryStore, there: Cookie | None, bookie_id: str) -> bool:
    """Whether this is a repaired identity that takes an empty directory; False for a new bookie."""
    if not entries.empty:
        raise BookieRefusal(
            "the data directory holds a store without a cookie: it is not this bookie's or damaged; "
            f"use another directory id=`{bookie_id}`"
        )
    if there is not None and there.directory_id != REPAIRED:
        raise BookieRefusal(
            f"the data directory is empty but bookie `{bookie_id}` has another one, or its disk was lost or swapped; "
            f"bring the directory back, start empty with --repair-bookie {bookie_id} if other bookies hold the data, "
            "or take another id for a new bookie"
        )
    return there is not None


def _check_pair(here: Cookie, there: Cookie | None, pending: bool, bookie_id: str) -> None:
    if here.bookie_id != bookie_id:
        raise BookieRefusal(
            f"the data directory belongs to bookie `{here.bookie_id}`, not to `{bookie_id}`; use its own directory"
        )
    if there is None and not pending:
        raise BookieRefusal(
            f"the data directory is stamped but the metadata store knows no bookie `{bookie_id}`: it was "
            "replaced, or restored from a time before; start the bookie with an empty directory"
        )
    if there is not None and there.directory_id == REPAIRED and not pending:
        raise BookieRefusal(
            f"the identity of bookie `{bookie_id}` was repaired, which gave up its data directory; "
            "start it with an empty one"
        )
    if there is not None and there != here and not (pending and there.directory_id == REPAIRED):
        raise BookieRefusal(
            f"bookie `{bookie_id}` has another data directory: expected=`{there.directory_id}` "
            f"found=`{here.directory_id}`; use its own directory or another id"
        )


async def _stamp_metadata(metadata: MetadataStore, keyspace: Keyspace, cookie: Cookie, known: KeyValue | None) -> None:
    key = keyspace.cookie(cookie.bookie_id)
    compare = absent(key) if known is None else unchanged(key, known.mod_revision)
    wanted = encode_cookie(cookie)
    result = await metadata.txn([compare], [Put(key, wanted)])
    if not result.succeeded:
        found = await metadata.get(key)
        if found is None or found.value != wanted:
            raise BookieRefusal(
                f"another process took the identity of bookie `{cookie.bookie_id}` at the same time; use another id"
            )


async def repair_identity(metadata: MetadataStore, keyspace: Keyspace, bookie_id: str) -> bool:
    """Gives up the bookie's directory: the next empty one started under this id takes its place, in limbo.

    Returns whether the bookie is known.
    """
    key = keyspace.cookie(bookie_id)
    while (found := await metadata.get(key)) is not None:
        cookie = decode_cookie(found.value)
        repaired = Cookie(cookie.bookie_id, cookie.instance_id, cookie.cluster, REPAIRED)
        result = await metadata.txn([unchanged(key, found.mod_revision)], [Put(key, encode_cookie(repaired))])
        if result.succeeded:
            return True
    return False


async def _ledger_counter(metadata: MetadataStore, keyspace: Keyspace) -> int:
    found = await metadata.get(keyspace.counter(COUNTER_LEDGER))
    return 1 if found is None else decode_counter(found.value)


def _limbo_floor(entries: EntryStore) -> int:
    stored = entries.meta.get(_LIMBO_FLOOR)
    return 0 if stored is None else decode_counter(stored)
