"""Lists of brokers and bookies: what the records say of those that live and of those that do not."""

from __future__ import annotations

from magnetar.broker.members import Members
from magnetar.metadata.codec import encode_bookie, encode_broker, encode_cookie, encode_shard
from magnetar.metadata.keyspace import Keyspace
from magnetar.metadata.memory import MemoryStore
from magnetar.metadata.records import (
    NO_ENTRY,
    VACANT,
    BookieRegistration,
    BookieState,
    BrokerRegistration,
    Cookie,
    Fragment,
    LedgerPurpose,
    LedgerRecord,
    LedgerState,
    Owner,
    ShardRecord,
    ShardState,
)
from magnetar.metadata.store import Operation, Put
from magnetar.v1 import admin_pb2 as pb
from magnetar.v1 import metadata_pb2

KEYS = Keyspace("test")


def ledger(*fragments: Fragment, last_entry: int, length: int, state: LedgerState = LedgerState.CLOSED) -> LedgerRecord:
    return LedgerRecord(
        7, 1, LedgerPurpose.DATA, state, 1, b"token", 3, 2, fragments, last_entry=last_entry, length=length
    )


def test_each_bookie_of_a_closed_ledger_holds_its_part_of_each_fragment() -> None:
    all_three = Fragment(0, ("a", "b", "c"))
    assert ledger(all_three, last_entry=9, length=1000).bytes_held() == {"a": 1000, "b": 1000, "c": 1000}
    changed = ledger(all_three, Fragment(8, ("a", "b", "d")), last_entry=9, length=1000)
    assert changed.bytes_held() == {"a": 1000, "b": 1000, "c": 800, "d": 200}
    striped = ledger(Fragment(0, ("a", "b", "c", "d")), last_entry=9, length=1000)
    assert striped.bytes_held() == {"a": 750, "b": 750, "c": 750, "d": 750}


def test_what_is_empty_or_open_has_no_known_bytes() -> None:
    all_three = Fragment(0, ("a", "b", VACANT))
    assert ledger(all_three, last_entry=NO_ENTRY, length=0).bytes_held() == {}
    assert ledger(all_three, last_entry=9, length=9, state=LedgerState.OPEN).bytes_held() == {}
    # A fragment that begins after the end of the ledger holds nothing.
    beyond = ledger(all_three, Fragment(5, ("c", "d", "e")), last_entry=3, length=40)
    assert beyond.bytes_held()["e"] == 0


async def test_a_bookie_without_a_session_is_listed_as_lost() -> None:
    async with MemoryStore() as store:
        living = BookieRegistration("b1", "host:1", "rack7", BookieState.READ_ONLY, 10, 20, http_address="host:2")
        changes: list[Operation] = [
            Put(KEYS.bookie("b1"), encode_bookie(living)),
            *(Put(KEYS.cookie(name), encode_cookie(Cookie(name, "i", "test", "d"))) for name in ("b0", "b1")),
            *(Put(KEYS.index("b0", number), b"") for number in (7, 8)),
        ]
        await store.txn([], changes)
        answer = pb.ListBookiesResponse.FromString(await Members(store, KEYS).list_bookies(b"", None))
    lost, read_only = answer.bookies
    assert (lost.bookie_id, lost.state, lost.ledgers) == ("b0", metadata_pb2.BOOKIE_STATE_UNSPECIFIED, 2)
    assert (read_only.bookie_id, read_only.state) == ("b1", metadata_pb2.BOOKIE_STATE_READ_ONLY)
    assert (read_only.address, read_only.rack, read_only.disk_free_bytes) == ("host:1", "rack7", 10)


async def test_a_broker_is_listed_with_the_shards_of_its_present_session() -> None:
    async with MemoryStore() as store:
        registered = await store.txn([], [Put(KEYS.broker("b0"), encode_broker(BrokerRegistration("b0", "host:1")))])
        session = registered.revision
        owners = [Owner("b0", session), Owner("b0", session - 1), Owner("gone", 1), None]
        await store.txn(
            [],
            [
                Put(KEYS.shard(number), encode_shard(ShardRecord(number, "t", ShardState.OPEN, 1, owner, 0, 65535)))
                for number, owner in enumerate(owners, 1)
            ],
        )
        answer = pb.ListBrokersResponse.FromString(await Members(store, KEYS).list_brokers(b"", None))
    [broker] = answer.brokers
    assert (broker.broker_id, broker.address, broker.shards) == ("b0", "host:1", 1)
