"""What must hold when all is well again. `verify` reads everything and looks at what stands where.

1. Whatever is deliverable is delivered, within bounded time: every call returns, every subscription gives what was not
   acknowledged, every topic can be read.
2. What was confirmed to a producer is there, with the same bytes; a topic's offsets have no holes.
3. Messages of one producer with one key stand in the order in which they were sent.
4. What was acknowledged durably does not come again; nothing was trimmed that was not acknowledged by all.
5. A key-ordered subscription gave each key's messages in order.
6. The records fit together, and every entry of a closed ledger stands on an ack quorum, the same bytes everywhere.
"""

from __future__ import annotations

import asyncio
import itertools
from collections import defaultdict

from simulation.oracle import Oracle, SubscriptionOracle
from simulation.workload import TOPICS, TRIMMED, Workload, check_dense, place_of
from simulation.world import World

from magnetar.client import EARLIEST, LATEST
from magnetar.client.client import Client
from magnetar.client.errors import InvalidArgument
from magnetar.metadata.codec import decode_ledger, decode_page, decode_shard
from magnetar.metadata.keyspace import KeyKind
from magnetar.metadata.records import LedgerPurpose, LedgerRecord, LedgerState, Segment, ShardRecord

HEALED_S = 90.0
"""After which everything must have been delivered, faults being over."""
DRAINED_S = 3.0
"""Without a delivery: then a subscription has given all it has."""


async def verify(world: World, workload: Workload) -> None:
    """Everything in the module's list. Ends the run with a Violation if something does not hold."""
    oracle = workload.oracle
    process = world.client_process("verifier")
    started = world.loop.time()
    await _wait_for_replaced_owners(world, workload)
    task = world.spawn(process, _read_everything(world, oracle), "verify")
    done, _ = await asyncio.wait({task}, timeout=HEALED_S)
    if not done:
        oracle.fail(f"delivery: not everything was delivered within {HEALED_S} s after all faults ended")
    await task
    world.transcript.note("verified in", world.loop.time() - started)
    check_producers(oracle)
    for subscription in oracle.subscriptions.values():
        check_trimming(oracle, subscription)
        if subscription.key_ordered:
            check_key_order(oracle, subscription)
    await check_storage(world, oracle)


async def _wait_for_replaced_owners(world: World, workload: Workload) -> None:
    """A broker whose shard was claimed by another one serves it until it hears of that: then it must stop."""
    shards = [shard for topic in TOPICS for shard in sorted(await workload.shards_of(topic))]
    deadline = world.loop.time() + HEALED_S
    while replaced := [shard for shard in shards if not world.served_alone(shard)]:
        if world.loop.time() > deadline:
            workload.oracle.fail(f"ownership: a replaced owner goes on serving: shards={replaced}")
        await asyncio.sleep(0.1)


async def _read_everything(world: World, oracle: Oracle) -> None:
    async with world.client(world.clients["verifier"]) as client:
        ends = {topic: await _read(client, oracle, topic) for topic in TOPICS}
        check_stored(oracle, ends)
        drains = [_drain(client, oracle, each, ends[each.topic]) for each in oracle.subscriptions.values()]
        await asyncio.gather(*drains)


async def _read(client: Client, oracle: Oracle, topic: str) -> dict[int, tuple[int, int]]:
    """Reads to the end; returns first offset and end of each shard. Begins again when trimming overtakes it."""
    while True:
        try:
            return await _read_once(client, oracle, topic)
        except InvalidArgument as error:
            if topic != TRIMMED or "messages were trimmed" not in str(error):
                raise


async def _read_once(client: Client, oracle: Oracle, topic: str) -> dict[int, tuple[int, int]]:
    following: dict[int, int] = {}
    first: dict[int, int] = {}
    async with client.reader(topic, start=EARLIEST, stop=LATEST) as reader:
        async for message in reader:
            shard, offset = place_of(message)
            oracle.stands(message.payload, shard, offset, "read at the end")
            check_dense(oracle, following, shard, offset)
            first.setdefault(shard, offset)
    return {shard: (first[shard], following[shard]) for shard in following}


async def _drain(
    client: Client, oracle: Oracle, subscription: SubscriptionOracle, ends: dict[int, tuple[int, int]]
) -> None:
    """Receives what the subscription still has, and acknowledges nothing."""
    missing = {
        (shard, offset)
        for shard, (first, end) in ends.items()
        for offset in range(first, end)
        if subscription.must_come(shard, offset)
    }
    opened_at = oracle.now()
    consumer = (
        client.stream_consumer(subscription.topic, subscription=subscription.name)
        if subscription.ordered
        else client.queue_consumer(
            subscription.topic, subscription=subscription.name, key_ordered=subscription.key_ordered, prefetch=100_000
        )
    )
    async with consumer:
        while True:
            messages = await consumer.receive_batch(10_000, timeout=DRAINED_S)
            for message in messages:
                place = place_of(message)
                oracle.stands(message.payload, *place, f"drained from {subscription.name}")
                subscription.received(*place, opened_at, certain=lambda since: True)
                missing.discard(place)
            if not messages and not missing:
                return


def check_stored(oracle: Oracle, ends: dict[str, dict[int, tuple[int, int]]]) -> None:
    """What was confirmed, or seen by anyone, is in the log, unless it was trimmed."""
    shards = {shard: extent for extents in ends.values() for shard, extent in extents.items()}
    for payload, sent in oracle.sent.items():
        if sent.place is None:
            # Everything was read by now, but for what was trimmed: who was not told where it stands finds it there.
            if sent.confirmed and sent.topic != TRIMMED:
                oracle.fail(f"lost: a message that was confirmed is nowhere: {payload[:40]!r}")
            continue
        shard, offset = sent.place
        first, end = shards.get(shard, (0, 0))
        if not (first <= offset < end or (sent.topic == TRIMMED and (offset < first or shard not in shards))):
            what = "confirmed" if sent.confirmed else "seen"
            oracle.fail(f"lost: a message that was {what} is not there: {payload[:40]!r} shard={shard} offset={offset}")


def check_producers(oracle: Oracle) -> None:
    """Order: of a key for every producer, of everything keyless for a named one."""
    places: dict[tuple[str, str | None, int], list[tuple[int, int]]] = defaultdict(list)
    for sent in oracle.sent.values():
        if sent.place is not None and sent.ordered:
            places[sent.producer, sent.key, sent.place[0]].append((sent.order, sent.place[1]))
    for (producer, key, shard), pairs in places.items():
        pairs.sort()
        for (order, offset), (following, after) in itertools.pairwise(pairs):
            if after <= offset:
                oracle.fail(
                    f"key order: {producer} sent {order} before {following}, stored at {offset} and {after}: "
                    f"key={key} shard={shard}"
                )


def check_trimming(oracle: Oracle, subscription: SubscriptionOracle) -> None:
    """What nobody can read any more was acknowledged, or at least tried to be."""
    for shard, log in oracle.log.items():
        if oracle.topics[shard] == subscription.topic:
            for offset in log:
                if subscription.must_come(shard, offset) and offset not in subscription.cursor(shard).first:
                    oracle.fail(
                        f"trimmed too early: nobody got offset {offset}: subscription={subscription.name} shard={shard}"
                    )


def check_key_order(oracle: Oracle, subscription: SubscriptionOracle) -> None:
    for shard, cursor in subscription.cursors.items():
        newest: dict[str, int] = {}
        for offset in cursor.first:
            key = oracle.sent[oracle.log[shard][offset]].key
            if key is None:
                continue
            if offset < newest.get(key, -1):
                oracle.fail(f"key order: offset {offset} came after {newest[key]}: key={key} shard={shard}")
            newest[key] = offset


# --- what stands in the metadata store and on the disks ---


async def check_storage(world: World, oracle: Oracle) -> None:
    """See the module, number 6."""
    keyspace, store = world.keyspace, world.metadata.store
    items = (await store.range(keyspace.root)).items
    shards: dict[int, ShardRecord] = {}
    ledgers: dict[int, LedgerRecord] = {}
    pages: dict[int, list[Segment]] = defaultdict(list)
    index: set[tuple[str, int]] = set()
    for item in items:
        kind, values = keyspace.parse(item.key)
        if kind is KeyKind.SHARD:
            shards[int(values[0])] = decode_shard(item.value)
        elif kind is KeyKind.PAGE:
            pages[int(values[0])] += decode_page(item.value)
        elif kind in (KeyKind.LEDGER, KeyKind.SHARD_LEDGER):
            record = decode_ledger(item.value)
            if record.ledger_id in ledgers:
                oracle.fail(f"metadata: a ledger has two records: ledger={record.ledger_id}")
            ledgers[record.ledger_id] = record
        elif kind is KeyKind.INDEX:
            index.add((str(values[0]), int(values[1])))
    for shard in shards.values():
        _check_chain(oracle, shard, [*pages[shard.shard_id], *shard.segments], ledgers)
    named = {(bookie, ledger.ledger_id) for ledger in ledgers.values() for bookie in ledger.bookies()}
    if named != index:
        oracle.fail(f"metadata: the index of bookies does not fit the records: {sorted(named ^ index)[:5]}")
    for ledger in ledgers.values():
        _check_copies(world, oracle, ledger)


def _check_chain(oracle: Oracle, shard: ShardRecord, segments: list[Segment], ledgers: dict[int, LedgerRecord]) -> None:
    linked = {segment.ledger_id for segment in segments} | {shard.next_ledger, shard.cursor_ledger, shard.next_cursor}
    for ledger in ledgers.values():
        if ledger.shard_id == shard.shard_id and ledger.ledger_id not in linked:
            oracle.fail(f"metadata: a ledger is linked nowhere: shard={shard.shard_id} ledger={ledger.ledger_id}")
    for ledger_id in linked - {0}:
        if ledger_id not in ledgers:
            oracle.fail(f"metadata: a linked ledger has no record: shard={shard.shard_id} ledger={ledger_id}")
    for segment, following in itertools.pairwise(segments):
        if ledgers[segment.ledger_id].state is not LedgerState.CLOSED or segment.end_offset != following.first_offset:
            oracle.fail(
                f"metadata: the chain has a gap: shard={shard.shard_id} ledger={segment.ledger_id} "
                f"end={segment.end_offset} next={following.first_offset}"
            )


def _check_copies(world: World, oracle: Oracle, ledger: LedgerRecord) -> None:
    """One byte string for each entry, everywhere; of a closed ledger each on an ack quorum."""
    stored = {name: disk.store.durable_entries(ledger.ledger_id) for name, disk in world.disks.items() if disk.store}
    seen: dict[int, bytes] = {}
    for name, entries in stored.items():
        for entry_id, data in entries.items():
            if seen.setdefault(entry_id, data) != data:
                oracle.fail(f"one entry: two byte strings: ledger={ledger.ledger_id} entry={entry_id} bookie={name}")
    if ledger.state is not LedgerState.CLOSED or ledger.purpose is not LedgerPurpose.DATA:
        return
    for number, fragment in enumerate(ledger.fragments):
        last = ledger.fragments[number + 1].first_entry - 1 if number + 1 < len(ledger.fragments) else ledger.last_entry
        for entry_id in range(fragment.first_entry, last + 1):
            copies = sum(entry_id in stored.get(name, ()) for name in fragment.bookies)
            if copies < ledger.ack_quorum - len(world.lost_disks):
                oracle.fail(
                    f"copies: an entry stands on {copies} of its bookies: ledger={ledger.ledger_id} "
                    f"entry={entry_id} fragment={fragment.bookies} last={ledger.last_entry}"
                )
