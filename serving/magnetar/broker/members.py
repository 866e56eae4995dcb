"""Which brokers and bookies the cluster has, by their records: what they do and what they hold."""

from __future__ import annotations

from collections import Counter
from collections.abc import Awaitable, Callable, Mapping

from magnetar.broker.describe import Records
from magnetar.metadata.codec import decode_bookie, decode_broker
from magnetar.metadata.keyspace import Keyspace
from magnetar.metadata.records import BookieRegistration, ShardRecord
from magnetar.metadata.store import MetadataStore
from magnetar.node.rpc import Context, parse
from magnetar.v1 import admin_pb2 as pb


class Members:
    """The part of the admin service that lists servers."""

    def __init__(self, store: MetadataStore, keyspace: Keyspace) -> None:
        self._keyspace = keyspace
        self._records = Records(store, keyspace)

    def methods(self) -> Mapping[str, Callable[[bytes, Context], Awaitable[bytes]]]:
        return {"ListBrokers": self.list_brokers, "ListBookies": self.list_bookies}

    async def list_brokers(self, data: bytes, _context: Context) -> bytes:
        parse(pb.ListBrokersRequest, data)
        owned: Counter[tuple[str, int]] = Counter()
        async for record in self._records.shards():
            if isinstance(record, ShardRecord) and record.owner is not None:
                owned[record.owner.broker_id, record.owner.session] += 1
        response = pb.ListBrokersResponse()
        async for item in self._records.under(self._keyspace.brokers_prefix()):
            broker = decode_broker(item.value)
            response.brokers.add(
                broker_id=broker.broker_id,
                address=broker.address,
                http_address=broker.http_address,
                version=broker.version,
                shards=owned[broker.broker_id, item.create_revision],
            )
        return response.SerializeToString()

    async def list_bookies(self, data: bytes, _context: Context) -> bytes:
        parse(pb.ListBookiesRequest, data)
        living: dict[str, BookieRegistration] = {}
        async for item in self._records.under(self._keyspace.bookies_prefix()):
            living[self._keyspace.parse_bookie(item.key)] = decode_bookie(item.value)
        known = set(living)
        async for item in self._records.under(self._keyspace.cookies_prefix()):
            known.add(self._keyspace.parse_cookie(item.key))
        held: Counter[str] = Counter()
        ledgers: Counter[str] = Counter()
        async for item in self._records.under(self._keyspace.index_prefix()):
            ledgers[self._keyspace.parse_index(item.key)[0]] += 1
        async for ledger in self._records.closed_ledgers():
            held.update(ledger.bytes_held())
        response = pb.ListBookiesResponse(
            bookies=[_bookie(one, living.get(one), ledgers[one], held[one]) for one in sorted(known | set(ledgers))]
        )
        await self._add_moves(response)
        return response.SerializeToString()

    async def _add_moves(self, response: pb.ListBookiesResponse) -> None:
        """Who is draining, and how many copies of each one's parts are to be made."""
        drains = {self._keyspace.parse_drain(i.key) async for i in self._records.under(self._keyspace.drains_prefix())}
        places = [
            self._keyspace.parse_copy(i.key)[1] async for i in self._records.under(self._keyspace.copies_prefix())
        ]
        copies = Counter(places)
        for bookie in response.bookies:
            bookie.draining = bookie.bookie_id in drains
            bookie.copies = copies[bookie.bookie_id]


def _bookie(bookie_id: str, living: BookieRegistration | None, ledgers: int, held: int) -> pb.BookieDescription:
    if living is None:
        return pb.BookieDescription(bookie_id=bookie_id, ledgers=ledgers, bytes=held)
    return pb.BookieDescription(
        bookie_id=bookie_id,
        address=living.address,
        http_address=living.http_address,
        version=living.version,
        rack=living.rack,
        state=living.state.value,  # type: ignore[arg-type]  # same numbers
        ledgers=ledgers,
        bytes=held,
        disk_free_bytes=living.disk_free_bytes,
        disk_total_bytes=living.disk_total_bytes,
    )
