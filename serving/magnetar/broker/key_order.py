"""Queue subscriptions that keep the order of keys: each slot's messages go to one consumer at a time. Pure.

Slots, not keys, are kept in order: what blocks a key blocks the few others of its slot. Rules:

1. Groups of slots are assigned to the consumers evenly; who comes or goes moves as few groups as possible.
2. A slot *drains* while a consumer that it is not assigned to has messages of it pending. It is delivered to nobody
   until these are acknowledged or returned.
3. A message is withheld if its slot drains, if an earlier one of its slot waits, or if its consumer can take no more.
   Withheld and returned messages wait together and are delivered lowest first, each to the consumer of its slot.
   So whoever gets a message of a slot next gets the earliest that is not acknowledged.
4. Looking ahead stops when `look_ahead()` messages wait; below that, no slot holds up another.

Batches are judged by bytes.translate and integers of bits; single messages are looked at only when they wait or drain.
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Iterable, Sequence
from heapq import heapify, heapreplace
from itertools import pairwise
from operator import mul

from magnetar.broker.dispatch import Consumer, CursorView, Effect, LoadedBatch, QueueDispatch, Read, Reason, Waiting
from magnetar.broker.offset_set import CHUNK, OffsetSet, first_bit, indices, lowest
from magnetar.wire import batch as wire_batch
from magnetar.wire.slots import SLOTS

GROUPS = 1024
"""Groups of slots that are assigned as one, evenly cut from the slots of the shard."""

CONSUMERS_MAX = 255
"""Consumers of a key-ordered subscription in one shard: their indices stand in bytes."""

LOOK_AHEAD_PER_CONSUMER = 4_000
LOOK_AHEAD_MAX = 40_000
"""Waiting messages at which no further ones are looked at, so that what blocks a slot costs bounded memory."""

LOOK_AHEAD_STEP = 1_000
"""Messages looked at in one step even at the limit, so that a batch is not taken apart."""

NOBODY = 255

_CLEAR, _SET = ord("0"), ord("1")
_ONLY = [bytes(_SET if byte == index else _CLEAR for byte in range(256)) for index in range(256)]


def bits_of(digits: bytes) -> int:
    """The integer whose bit i is set where digit i is "1"."""
    return int(digits[::-1], 2)


class Assignment:
    """Which consumer gets which slots of a shard.

    table       a byte for each slot: the index of its consumer, or NOBODY
    version     grows with each change
    """

    def __init__(self, first_slot: int = 0, last_slot: int = SLOTS - 1) -> None:
        self.first_slot = first_slot
        self.width = last_slot - first_slot + 1
        count = min(GROUPS, self.width)
        # Slots outside the shard's range, which it should not have, go with its first and its last group.
        edges = [0, *(first_slot + -(-group * self.width // count) for group in range(1, count)), SLOTS]
        self._widths = [after - before for before, after in pairwise(edges)]
        self.groups: list[int | None] = [None] * count
        self.index: dict[int, int] = {}
        self.consumer_at: dict[int, int] = {}
        self.table = b""
        self.version = 0
        self._rebuild()

    def join(self, consumer: int) -> None:
        """It takes its even share from those that have most."""
        at = next(i for i in range(CONSUMERS_MAX) if i not in self.consumer_at)
        self.index[consumer] = at
        self.consumer_at[at] = consumer
        owned = self._owned()
        donors = [(-len(groups), at, groups) for at, (other, groups) in enumerate(owned.items()) if other != consumer]
        heapify(donors)
        for _ in range(len(self.groups) // len(self.index)):
            left, at, groups = donors[0]
            self.groups[groups.pop()] = consumer
            heapreplace(donors, (left + 1, at, groups))
        self._rebuild()

    def leave(self, consumer: int) -> None:
        """Each of its groups goes to who has least."""
        del self.consumer_at[self.index.pop(consumer)]
        owned = self._owned()
        given_up = owned.pop(consumer, [])
        heirs = [(len(owned[other]), other) for other in self.index]
        heapify(heirs)
        for group in given_up:
            self.groups[group] = heirs[0][1] if heirs else None
            if heirs:
                heapreplace(heirs, (heirs[0][0] + 1, heirs[0][1]))
        self._rebuild()

    def owner(self, slot: int) -> int | None:
        return self.consumer_at.get(self.table[slot])

    def _owned(self) -> dict[int | None, list[int]]:
        owned: dict[int | None, list[int]] = {consumer: [] for consumer in self.index}
        for group, consumer in enumerate(self.groups):
            owned.setdefault(consumer, []).append(group)
        return owned

    def _rebuild(self) -> None:
        self.version += 1
        byte_of: dict[int | None, bytes] = {consumer: bytes([at]) for consumer, at in self.index.items()}
        byte_of[None] = bytes([NOBODY])
        self.table = b"".join(map(mul, map(byte_of.__getitem__, self.groups), self._widths))


class SlotIndex:
    """Slots of the messages that are pending or waiting, in chunks as those of an OffsetSet."""

    def __init__(self) -> None:
        self._chunks: dict[int, array[int]] = {}
        self._purge_at = 64

    def __getitem__(self, offset: int) -> int:
        return self._chunks[offset // CHUNK][offset % CHUNK]

    def __len__(self) -> int:
        return len(self._chunks)

    def record(self, first_offset: int, slots: array[int]) -> None:
        done, count = 0, len(slots)
        while done < count:
            number, within = divmod(first_offset + done, CHUNK)
            step = min(CHUNK - within, count - done)
            chunk = self._chunks.get(number)
            if chunk is None:
                chunk = self._chunks[number] = array("H", bytes(2 * CHUNK))
            chunk[within : within + step] = slots[done : done + step]
            done += step

    def mask(self, start: int, table: bytes | bytearray) -> int:
        """Bits of the offsets of the chunk from `start` on whose slot has a "1" in the table."""
        return bits_of(bytes(map(table.__getitem__, self._chunks[start // CHUNK])))

    def owners(self, start: int, table: bytes) -> bytes:
        """For each offset of the chunk from `start` on, the byte of its slot."""
        return bytes(map(table.__getitem__, self._chunks[start // CHUNK]))

    def crowded(self) -> bool:
        return len(self._chunks) > self._purge_at

    def keep(self, starts: Iterable[int], position: int) -> None:
        """Only the chunks of these offsets, and those from the position on, are needed."""
        needed = {start // CHUNK for start in starts}
        last = position // CHUNK
        self._chunks = {at: chunk for at, chunk in self._chunks.items() if at in needed or at >= last}
        self._purge_at = 2 * len(self._chunks) + 64

    def clear(self) -> None:
        self._chunks.clear()


class KeyOrderedDispatch(QueueDispatch):
    """A queue whose consumers never have messages of one slot at the same time.

    ready           waiting messages of each consumer's slots, without those of draining slots
    parked          waiting messages of draining slots
    stuck           pending messages of each consumer whose slot is not assigned to it
    draining        for each slot with stuck messages: how many are stuck at which consumer
    drained         slots that drain no more since the last pass; their messages are still parked
    waiting_slots   how many messages wait of each slot
    blocked         "1" for each slot that drains or has messages waiting: nothing new of it may be delivered
    unlearned       pending, held from before, and its slot not known yet: until it is, nothing is delivered
    """

    look_ahead_step = LOOK_AHEAD_STEP

    def __init__(self, cursor: CursorView, first_slot: int = 0, last_slot: int = SLOTS - 1) -> None:
        super().__init__(cursor)
        self.assignment = Assignment(first_slot, last_slot)
        self.slots = SlotIndex()
        self.ready: dict[int, OffsetSet] = {}
        self.parked = OffsetSet()
        self.stuck: dict[int, OffsetSet] = {}
        self.draining: dict[int, dict[int, int]] = {}
        self.drained: set[int] = set()
        self.waiting_slots: Counter[int] = Counter()
        self.blocked = bytearray(b"0" * SLOTS)
        self.unlearned = OffsetSet()

    # Events

    def attach(self, consumer: int, held: Iterable[tuple[int, int]] = ()) -> None:
        super().attach(consumer, held)
        self.assignment.join(consumer)
        self._sort_anew()

    def detach(self, consumer: int) -> None:
        super().detach(consumer)
        self.assignment.leave(consumer)
        self._sort_anew()

    def look_ahead(self) -> int:
        """How many messages may wait before nothing further is looked at."""
        return min(LOOK_AHEAD_MAX, LOOK_AHEAD_PER_CONSUMER * max(1, len(self.consumers)))

    # Decisions

    def explain(self, end_offset: int) -> list[Waiting]:
        causes = super().explain(end_offset)
        slots: Counter[int] = Counter()
        for slot, holders in self.draining.items():
            if slot in self.waiting_slots:
                slots.update(holders.keys())
        causes += [Waiting(Reason.DRAINING, consumer, count) for consumer, count in slots.items()]
        if len(self.returned.waiting) >= self.look_ahead() and self.consumers:
            causes.append(Waiting(Reason.LOOK_AHEAD, None, len(self.returned.waiting)))
        return causes

    def _hand_out(self, end_offset: int, bytes_max: int, effects: list[Effect]) -> None:
        if not self._learn_held():
            return
        self._unpark()
        bytes_max = self._hand_out_ready(bytes_max, effects)
        while bytes_max > 0 and len(self.returned.waiting) < self.look_ahead() and self._somebody_idle():
            batch = self._frontier(end_offset)
            if batch is None:
                return
            given = self._look_at(batch)
            effects.extend(given)
            bytes_max -= len(batch.data) * len(given)

    def _hand_out_ready(self, bytes_max: int, effects: list[Effect]) -> int:
        """Waiting messages, lowest first, to the consumers that can take some; returns what is left of the bytes."""
        while bytes_max > 0:
            able = [
                consumer
                for consumer in self.consumers.values()
                if self.ready[consumer.id] and self._allowance(consumer) > 0
            ]
            if not able:
                break
            consumer = min(able, key=lambda consumer: self.ready[consumer.id].first())
            offset = self.ready[consumer.id].first()
            batch = self.batches.find(offset)
            if batch is None:
                self._wanted = Read(offset, self.cursor_epoch, True)
                break
            bits = self.ready[consumer.id].window(batch.first_offset, batch.count)
            acked = bits & ~self._unacked(batch)
            bits = lowest(bits ^ acked, self._allowance(consumer))
            self.returned.waiting.remove(batch.first_offset, bits | acked)
            self._no_longer_waits([self.ready[consumer.id]], batch.first_offset, bits | acked)
            self._forget_loaded(batch)
            if bits:
                effects.append(self._deliver_pending(consumer, batch, bits))
                bytes_max -= len(batch.data)
        return bytes_max

    def _somebody_idle(self) -> bool:
        """Somebody could take more and nothing waits for him."""
        return any(not self.ready[c.id] and self._allowance(c) > 0 for c in self.consumers.values())

    def _look_at(self, batch: LoadedBatch) -> list[Effect]:
        """Deliver or withhold the batch's messages from the position on, and advance."""
        self._learn(batch)
        bits = self._unseen(batch)
        if self.held_ahead:
            bits &= ~self.held_ahead.window(batch.first_offset, batch.count)
        looked_at = lowest(bits, max(self.look_ahead() - len(self.returned.waiting), self.look_ahead_step))
        rest = bits ^ looked_at
        self._advance(batch.first_offset + first_bit(rest) if rest else batch.end_offset)
        withheld = looked_at
        given: list[Effect] = []
        free = looked_at & ~self._blocked_bits(batch) if looked_at else 0
        for consumer in self._consumers_of(batch) if free else []:
            mine = free & bits_of(batch.owners.translate(_ONLY[self.assignment.index[consumer.id]]))
            chosen = lowest(mine, self._allowance(consumer))
            if chosen:
                given.append(self._deliver_pending(consumer, batch, chosen))
                withheld ^= chosen
        if withheld:
            self.returned.waiting.add(batch.first_offset, withheld)
            self._came_back(batch.first_offset, withheld)
        self._forget_loaded(batch)
        return given

    def _learn(self, batch: LoadedBatch) -> None:
        """Note the slots of its messages, and their consumers."""
        if batch.slots is None:
            header = wire_batch.parse_header(batch.data, check=False)
            batch.slots = wire_batch.slots(batch.data, header)
        if self.slots.crowded():
            self._forget_slots()
        self.slots.record(batch.first_offset, batch.slots)
        if batch.owners_of != self.assignment.version:
            batch.owners = bytes(map(self.assignment.table.__getitem__, batch.slots))
            batch.owners_of = self.assignment.version

    def _learn_held(self) -> bool:
        """Whether the slots of all that consumers hold from before are known; if not, their batches are wanted."""
        while (offset := self.unlearned.first()) >= 0:
            batch = self.batches.find(offset)
            if batch is None:
                self._wanted = Read(offset, self.cursor_epoch, True)
                return False
            self._learn(batch)
            self._drain_held(batch)
        return True

    def _drain_held(self, batch: LoadedBatch) -> None:
        first, held = batch.first_offset, self.unlearned.window(batch.first_offset, batch.count)
        self.unlearned.remove(first, held)
        for consumer in self.consumers.values():
            theirs = held & consumer.pending.window(first, batch.count)
            if theirs:
                mine = bits_of(batch.owners.translate(_ONLY[self.assignment.index[consumer.id]]))
                self._drain(consumer.id, first, theirs & ~mine)
        if any(slot in self.waiting_slots for slot in self.draining):
            self._sort_anew()

    def _consumers_of(self, batch: LoadedBatch) -> list[Consumer]:
        return [self.consumers[self.assignment.consumer_at[at]] for at in sorted(set(batch.owners)) if at != NOBODY]

    def _blocked_bits(self, batch: LoadedBatch) -> int:
        if not self.waiting_slots and not self.draining:
            return 0
        assert batch.slots is not None
        return bits_of(bytes(map(self.blocked.__getitem__, batch.slots)))

    # What waits

    def _came_back(self, start: int, bits: int) -> None:
        slots, owner, waiting, draining = self.slots, self.assignment.owner, self.waiting_slots, self.draining
        parked = 0
        ready: dict[int, int] = {}
        for index in indices(bits):
            slot = slots[start + index]
            waiting[slot] += 1
            self.blocked[slot] = _SET
            if slot in draining:
                parked |= 1 << index
            elif (consumer := owner(slot)) is not None:
                ready[consumer] = ready.get(consumer, 0) | 1 << index
        self.parked.add(start, parked)
        for consumer, theirs in ready.items():
            self.ready[consumer].add(start, theirs)

    def _taken_up(self, start: int, bits: int) -> None:
        self._no_longer_waits([*self.ready.values(), self.parked], start, bits)

    def _drop_waiting(self, start: int, end: int) -> None:
        for piece, bits in self.returned.waiting.take_range(start, end):
            self._taken_up(piece, bits)

    def _no_longer_waits(self, places: Iterable[OffsetSet], start: int, bits: int) -> None:
        for place in places:
            place.remove(start, bits)
        slots, waiting = self.slots, self.waiting_slots
        for index in indices(bits):
            slot = slots[start + index]
            left = waiting[slot] - 1
            if left:
                waiting[slot] = left
                continue
            del waiting[slot]
            if slot not in self.draining:
                self.blocked[slot] = _CLEAR

    def _held(self, start: int, bits: int) -> None:
        self.unlearned.add(start, bits)

    def _give_back(self, pieces: Sequence[tuple[int, int]]) -> None:
        if self.unlearned:
            for start, bits in pieces:
                self.unlearned.remove(start, bits)
        super()._give_back(pieces)

    # What drains

    def _unstick(self, state: Consumer, pieces: Sequence[tuple[int, int]]) -> None:
        if self.unlearned:
            for start, bits in pieces:
                self.unlearned.remove(start, bits)
        stuck, consumer = self.stuck.get(state.id), state.id
        for start, bits in pieces if stuck else ():
            assert stuck is not None
            for index in indices(stuck.remove(start, bits)):
                slot = self.slots[start + index]
                holders = self.draining[slot]
                holders[consumer] -= 1
                if holders[consumer]:
                    continue
                del holders[consumer]
                if not holders:
                    del self.draining[slot]
                    self.drained.add(slot)
                    if slot not in self.waiting_slots:
                        self.blocked[slot] = _CLEAR

    def _unpark(self) -> None:
        """Messages of slots that drain no more are ready."""
        if self.drained and self.parked:
            table = bytearray(b"0" * SLOTS)
            for slot in self.drained:
                table[slot] = _SET
            for start, bits in self.parked.pieces():
                freed = bits & self.slots.mask(start, table)
                if freed:
                    self.parked.remove(start, freed)
                    self._make_ready(start, freed)
        self.drained.clear()

    def _make_ready(self, start: int, bits: int) -> None:
        """`start` begins a chunk."""
        owners = self.slots.owners(start, self.assignment.table)
        for consumer, at in self.assignment.index.items():
            theirs = bits & bits_of(owners.translate(_ONLY[at]))
            if theirs:
                self.ready[consumer].add(start, theirs)

    def _sort_anew(self) -> None:
        """Slots changed hands: find out what drains, and for whom each message waits."""
        self.stuck = {}
        self.draining = {}
        self.drained.clear()
        self.blocked = bytearray(b"0" * SLOTS)
        for slot in self.waiting_slots:
            self.blocked[slot] = _SET
        for consumer in self.consumers.values():
            at = self.assignment.index[consumer.id]
            for start, bits in consumer.pending.pieces():
                known = bits & ~self.unlearned.window(start, CHUNK)
                if known:
                    owners = self.slots.owners(start, self.assignment.table)
                    self._drain(consumer.id, start, known & ~bits_of(owners.translate(_ONLY[at])))
        draining = bytearray(b"0" * SLOTS)
        for slot in self.draining:
            draining[slot] = _SET
        self.ready = {consumer: OffsetSet() for consumer in self.consumers}
        self.parked.clear()
        for start, bits in self.returned.waiting.pieces():
            parked = bits & self.slots.mask(start, draining) if self.draining else 0
            self.parked.add(start, parked)
            self._make_ready(start, bits ^ parked)

    def _drain(self, consumer: int, start: int, bits: int) -> None:
        """These are pending there, and their slots belong to somebody else."""
        if not bits:
            return
        self.stuck.setdefault(consumer, OffsetSet()).add(start, bits)
        for index in indices(bits):
            slot = self.slots[start + index]
            self.blocked[slot] = _SET
            self.drained.discard(slot)
            holders = self.draining.setdefault(slot, {})
            holders[consumer] = holders.get(consumer, 0) + 1

    def _forget_slots(self) -> None:
        kept = [start for consumer in self.consumers.values() for start, _ in consumer.pending.pieces()]
        kept += [start for start, _ in self.returned.waiting.pieces()]
        self.slots.keep(kept, self.position)

    def _restart(self, offset: int) -> None:
        super()._restart(offset)
        self.slots.clear()
        self.waiting_slots.clear()
        self.unlearned.clear()
        self._sort_anew()

    def check(self, end_offset: int) -> None:
        super().check(end_offset)
        assert set(self.unlearned) <= set(self.held_ahead)
        waiting = list(self.returned.waiting)
        assert self.waiting_slots == Counter(self.slots[offset] for offset in waiting)
        ready = [offset for offsets in self.ready.values() for offset in offsets]
        if self.consumers:
            assert sorted([*ready, *self.parked]) == waiting
        assert set(self.ready) == set(self.consumers) == set(self.assignment.index)
        for consumer, offsets in self.ready.items():
            assert all(self.assignment.owner(self.slots[offset]) == consumer for offset in offsets)
            assert not {self.slots[offset] for offset in offsets} & set(self.draining)
        assert {self.slots[offset] for offset in self.parked} <= set(self.draining) | self.drained
        draining: dict[int, dict[int, int]] = {}
        for state in self.consumers.values():
            for offset in state.pending:
                if offset not in self.unlearned and self.assignment.owner(self.slots[offset]) != state.id:
                    holders = draining.setdefault(self.slots[offset], {})
                    holders[state.id] = holders.get(state.id, 0) + 1
        assert draining == self.draining
        blocked = bytearray(b"0" * SLOTS)
        for slot in (*self.draining, *self.waiting_slots):
            blocked[slot] = _SET
        assert blocked == self.blocked
