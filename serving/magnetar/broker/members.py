"""Which brokers and bookies the cluster has, by their records: what they do and hold, and the wish for no shards."""

from __future__ import annotations

from collections import Counter
from collections.abc import Awaitable, Callable, Container, Mapping

from magnetar.broker.describe import Records
from magnetar.broker.layout import preferred_broker
from magnetar.broker.refusals import RETRY_AFTER_MS, order_refused
from magnetar.metadata.codec import decode_bookie, decode_broker
from magnetar.metadata.keyspace import Keyspace
from magnetar.metadata.records import BookieRegistration, BrokerRegistration, Owner, ShardRecord
from magnetar.metadata.store import Delete, MetadataStore, Put, absent, exists
from magnetar.node.rpc import Context, parse, unavailable
from magnetar.v1 import admin_pb2 as pb


class Members:
    """The part of the admin service that lists servers."""

    def __init__(self, store: MetadataStore, keyspace: Keyspace) -> None:
        self._store = store
        self._keyspace = keyspace
        self._records = Records(store, keyspace)

    def methods(self) -> Mapping[str, Callable[[bytes, Context], Awaitable[bytes]]]:
        return {
            "ListBrokers": self.list_brokers,
            "DrainBroker": self.drain_broker,
            "UndrainBroker": self.undrain_broker,
            "ListBookies": self.list_bookies,
        }

    async def list_brokers(self, data: bytes, _context: Context) -> bytes:
        parse(pb.ListBrokersRequest, data)
        owned: Counter[tuple[str, int]] = Counter()
        async for record in self._records.shards():
            if isinstance(record, ShardRecord) and record.owner is not None:
                owned[record.owner.broker_id, record.owner.session] += 1
        response = pb.ListBrokersResponse()
        drained = await self._drained()
        async for item in self._records.under(self._keyspace.brokers_prefix()):
            broker = decode_broker(item.value)
            response.brokers.add(
                broker_id=broker.broker_id,
                address=broker.address,
                http_address=broker.http_address,
                version=broker.version,
                shards=owned[broker.broker_id, item.create_revision],
                state=_state(broker, drained),
            )
        return response.SerializeToString()

    # --- draining ---

    async def drain_broker(self, data: bytes, _context: Context) -> bytes:
        """The transaction compares that another broker stays: of two drains asked for at once one is tried again."""
        request = parse(pb.DrainBrokerRequest, data)
        brokers, drained = await self._brokers(), await self._drained()
        owner = _known(brokers, request.broker_id)
        others = [name for name in brokers if name != request.broker_id and _may_have_shards(brokers[name][1], drained)]
        if not others:
            raise order_refused(
                f"no other broker could take its shards: start one, or undrain one broker=`{request.broker_id}`"
            )
        shares: Counter[str] = Counter()
        async for record in self._records.shards():
            if isinstance(record, ShardRecord) and record.owner == owner:
                shares[preferred_broker(record.shard_id, others) or ""] += 1
        if not request.dry_run:
            stays = [exists(self._keyspace.broker(others[0])), absent(self._keyspace.broker_drain(others[0]))]
            wish = Put(self._keyspace.broker_drain(request.broker_id), b"")
            if not (await self._store.txn(stays, [wish])).succeeded:
                raise unavailable("brokers changed meanwhile: ask again", retry_after_ms=RETRY_AFTER_MS)
        parts = [pb.BrokerShare(broker_id=name, shards=shares[name]) for name in sorted(shares)]
        return pb.DrainBrokerResponse(shards=shares.total(), shares=parts).SerializeToString()

    async def undrain_broker(self, data: bytes, _context: Context) -> bytes:
        request = parse(pb.UndrainBrokerRequest, data)
        was_draining = request.broker_id in await self._drained()
        if not was_draining:
            _known(await self._brokers(), request.broker_id)
        elif not request.dry_run:
            await self._store.txn([], [Delete(self._keyspace.broker_drain(request.broker_id))])
        return pb.UndrainBrokerResponse(was_draining=was_draining).SerializeToString()

    async def _brokers(self) -> dict[str, tuple[Owner, BrokerRegistration]]:
        found = {}
        async for item in self._records.under(self._keyspace.brokers_prefix()):
            broker = decode_broker(item.value)
            found[broker.broker_id] = Owner(broker.broker_id, item.create_revision), broker
        return found

    async def _drained(self) -> set[str]:
        return {
            self._keyspace.parse_broker_drain(item.key)
            async for item in self._records.under(self._keyspace.broker_drains_prefix())
        }

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
        drains = {
            self._keyspace.parse_bookie_drain(i.key)
            async for i in self._records.under(self._keyspace.bookie_drains_prefix())
        }
        places = [
            self._keyspace.parse_copy(i.key)[1] async for i in self._records.under(self._keyspace.copies_prefix())
        ]
        copies = Counter(places)
        for bookie in response.bookies:
            bookie.draining = bookie.bookie_id in drains
            bookie.copies = copies[bookie.bookie_id]


def _known(brokers: Mapping[str, tuple[Owner, BrokerRegistration]], broker_id: str) -> Owner:
    """Raises Refused."""
    if broker_id not in brokers:
        known = ", ".join(sorted(brokers))
        raise order_refused(f"there is no such broker: name one of {known} broker=`{broker_id}`")
    return brokers[broker_id][0]


def _may_have_shards(broker: BrokerRegistration, drained: Container[str]) -> bool:
    return not broker.leaving and broker.broker_id not in drained


def _state(broker: BrokerRegistration, drained: Container[str]) -> pb.BrokerState:
    if broker.leaving:
        return pb.BROKER_STATE_LEAVING
    return pb.BROKER_STATE_DRAINING if broker.broker_id in drained else pb.BROKER_STATE_SERVING


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
