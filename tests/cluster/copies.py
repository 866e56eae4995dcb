"""Compares the copies of a cluster's closed ledgers: every entry, on every bookie that the records name.

Bookies verify the entries that they store and answer their headers, which hold the checksums: equal headers are equal
entries.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

from magnetar.ledger.bookie_rpc import EntryOutcome, ReadGroup
from magnetar.ledger.grpc_bookie import GrpcBookie
from magnetar.metadata.codec import decode_bookie, decode_ledger
from magnetar.metadata.etcd import EtcdMetadata
from magnetar.metadata.keyspace import Keyspace
from magnetar.metadata.records import VACANT, LedgerRecord
from magnetar.metadata.store import MetadataStore

ATTEMPTS = 3
PAGE_KEYS = 200


@dataclass
class Comparison:
    ledgers: int = 0
    entries: int = 0
    copies: int = 0
    size_bytes: int = 0
    problems: list[str] = field(default_factory=list)


def compare_copies(metadata_address: str, cluster: str = "magnetar") -> Comparison:
    """Reads all of them; `problems` is empty if each entry has its copies, and they are equal."""
    return asyncio.run(_compare(metadata_address, Keyspace(cluster)))


async def _compare(metadata_address: str, keyspace: Keyspace) -> Comparison:
    found = Comparison()
    async with await EtcdMetadata.open(f"etcd://{metadata_address}") as store:
        registered = (await store.range(keyspace.bookies_prefix())).items
        addresses = {one.bookie_id: one.address for one in (decode_bookie(item.value) for item in registered)}
        bookies = {name: GrpcBookie(name, address) for name, address in addresses.items()}
        try:
            for record in await _closed(store, keyspace):
                await _compare_ledger(record, bookies, found)
        finally:
            for bookie in bookies.values():
                await bookie.close()
    return found


async def _closed(store: MetadataStore, keyspace: Keyspace) -> list[LedgerRecord]:
    records: list[LedgerRecord] = []
    after = ""
    while True:
        page = await store.range(keyspace.ledgers_prefix(), after=after, limit=PAGE_KEYS)
        records += [decode_ledger(item.value) for item in page.items]
        if not page.more:
            return records
        after = page.items[-1].key


async def _compare_ledger(record: LedgerRecord, bookies: dict[str, GrpcBookie], found: Comparison) -> None:
    found.ledgers += 1
    found.entries += record.last_entry + 1
    found.size_bytes += record.length
    ends = [fragment.first_entry for fragment in record.fragments[1:]] + [record.last_entry + 1]
    for fragment, end in zip(record.fragments, ends, strict=True):
        what = f"ledger {record.ledger_id} from {fragment.first_entry}"
        if VACANT in fragment.bookies or len(set(fragment.bookies)) != len(fragment.bookies):
            found.problems.append(f"{what}: copies are missing: {fragment.bookies}")
        copies: dict[str, list[bytes]] = {}
        for name in fragment.bookies:
            if name in bookies:
                copies[name] = await _headers(record, bookies[name], fragment.first_entry, end)
                found.copies += len(copies[name])
            else:
                found.problems.append(f"{what}: {name} is not there")
        for name, headers in copies.items():
            if len(headers) != end - fragment.first_entry:
                found.problems.append(f"{what}: {name} has {len(headers)} of {end - fragment.first_entry} entries")
        if len({tuple(headers) for headers in copies.values()}) > 1:
            found.problems.append(f"{what}: copies differ")


async def _headers(record: LedgerRecord, bookie: GrpcBookie, first: int, end: int) -> list[bytes]:
    """Of the entries from `first` on, up to the first that the bookie does not have."""
    headers: list[bytes] = []
    failures = 0
    while first + len(headers) < end:
        group = ReadGroup(
            record.ledger_id, record.epoch, record.token, first + len(headers), end - 1, headers_only=True
        )
        answers = (await bookie.read(group)).answers
        got = [a.entry for a in answers if a.outcome is EntryOutcome.HAVE and a.entry is not None]
        headers += got
        if len(got) < len(answers):
            failures += 1
            if failures == ATTEMPTS:
                return headers
    return headers
