"""What a bookie answers, decided. Pure: the state of the ledgers goes in, answers and writes come out.

A group is judged when it is built, in the order of its items, after the group before it became durable and with nothing
else being written. That is what makes a fence final: an add that waited in the queue while the fence was written is
judged against it.

Order of the checks of an add, and why:

1. What cannot be read is not judged: IO_ERROR.
2. While the collector decides about a ledger, nothing is added to it, repair's copies included: BUSY.
3. The token names the ledger that is meant: WRONG_TOKEN before anything is said about it.
4. FENCED comes before all reasons that name a failed bookie only, because it tells a writer that it lost its ledger.
5. STALE_EPOCH holds for recovery and repair as well.
6. Tombstone, floor and read-only refuse ordinary adds; a disk without room refuses all.
7. Other bytes under a stored id: CONFLICT. The same bytes: OK with this group's fsync.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from magnetar.bookie.entry_store import Damaged, GroupWrites, LedgerMark, LedgerState
from magnetar.ledger.bookie_rpc import (
    STORED,
    AddGroup,
    AddResult,
    AddStatus,
    EntryAnswer,
    EntryOutcome,
    LacResult,
    ReadResult,
)
from magnetar.metadata.records import NO_ENTRY
from magnetar.wire.envelope import HEADER_SIZE, DamagedEnvelope, Envelope, verify

_CHECKSUM_OFFSET = HEADER_SIZE - 4


class Add(NamedTuple):
    """Entries to store, their envelopes verified, ids ascending."""

    ledger_id: int
    group: AddGroup
    envelopes: tuple[Envelope, ...]
    size_bytes: int


@dataclass(frozen=True, slots=True)
class Fence:
    ledger_id: int
    epoch: int
    token: bytes


@dataclass(frozen=True, slots=True)
class Remove:
    """The collector found that no record names this bookie: entries go, a tombstone stays."""

    ledger_id: int
    now_us: int


@dataclass(frozen=True, slots=True)
class Forget:
    """The tombstone is old enough to go, unless the ledger came back."""

    ledger_id: int


@dataclass(frozen=True, slots=True)
class SetMeta:
    values: Mapping[str, bytes]


Item = Add | Fence | Remove | Forget | SetMeta


@dataclass(frozen=True, slots=True)
class Done:
    """The answer to everything but an add. With `refusal` set nothing was changed."""

    refusal: str = ""


Verdict = AddResult | Done


@dataclass(frozen=True, slots=True)
class Conditions:
    """What the bookie as a whole allows while a group is judged.

    floor       ids below it are in limbo here: fences may have been lost, so ordinary adds are refused
    collecting  ledgers the collector is deciding about
    full        no room even for recovery
    """

    floor: int = 0
    read_only: bool = False
    full: bool = False
    collecting: Set[int] = frozenset()


@dataclass(slots=True)
class Judgement:
    """Verdicts in the order of the items; what must be durable before any of them is told; the states from then on."""

    verdicts: list[Verdict] = field(default_factory=list)
    writes: GroupWrites = field(default_factory=GroupWrites)
    states: dict[int, LedgerState] = field(default_factory=dict)
    needs_sync: bool = False


def needed_lookups(items: Sequence[Item], states: Mapping[int, LedgerState]) -> list[tuple[int, int]]:
    """The stored entries that `judge` must see. Appends need none: their ids are above all that is stored."""
    keys: list[tuple[int, int]] = []
    for item in items:
        if isinstance(item, Add):
            state = states[item.ledger_id]
            for envelope in item.envelopes:
                if state.tail_damage or envelope.entry_id <= state.last_entry:
                    keys.append((item.ledger_id, envelope.entry_id))
    return keys


def judge(
    items: Sequence[Item],
    states: Mapping[int, LedgerState],
    stored: Mapping[tuple[int, int], bytes | Damaged | None],
    conditions: Conditions,
) -> Judgement:
    """Judges one group. `states` holds every ledger of the items, `stored` what `needed_lookups` asked for."""
    return _Judge(states, stored, conditions).judge(items)


@dataclass(slots=True)
class _Ledger:
    """A ledger while its group is judged: what it was, changed by the items so far."""

    mark: LedgerMark | Damaged | None
    last_entry: int
    lac: int
    tail_damage: str
    added: dict[int, bytes] = field(default_factory=dict)


class _Judge:
    def __init__(
        self,
        states: Mapping[int, LedgerState],
        stored: Mapping[tuple[int, int], bytes | Damaged | None],
        conditions: Conditions,
    ) -> None:
        self._states = states
        self._stored = stored
        self._conditions = conditions
        self._ledgers: dict[int, _Ledger] = {}
        self._result = Judgement()

    def judge(self, items: Sequence[Item]) -> Judgement:
        result = self._result
        result.verdicts = [self._judge_item(item) for item in items]
        writes = result.writes
        changed = writes.marks or writes.forgotten or writes.deleted or writes.meta
        result.needs_sync = bool(changed) or any(v == STORED for v in result.verdicts)
        for ledger_id, ledger in self._ledgers.items():
            result.states[ledger_id] = LedgerState(ledger.mark, ledger.last_entry, ledger.lac, ledger.tail_damage)
        return result

    def _judge_item(self, item: Item) -> Verdict:
        match item:
            case Add():
                return self._add(item, self._ledger(item.ledger_id))
            case Fence():
                return self._fence(item, self._ledger(item.ledger_id))
            case Remove():
                return self._remove(item, self._ledger(item.ledger_id))
            case Forget():
                return self._forget(item, self._ledger(item.ledger_id))
            case SetMeta():
                self._result.writes.meta.update(item.values)
                return Done()

    def _ledger(self, ledger_id: int) -> _Ledger:
        ledger = self._ledgers.get(ledger_id)
        if ledger is None:
            state = self._states[ledger_id]
            ledger = _Ledger(state.mark, state.last_entry, state.lac, state.tail_damage)
            self._ledgers[ledger_id] = ledger
        return ledger

    def _set_mark(self, ledger_id: int, ledger: _Ledger, mark: LedgerMark) -> None:
        if mark != ledger.mark:
            ledger.mark = mark
            self._result.writes.marks[ledger_id] = mark

    def _add(self, add: Add, ledger: _Ledger) -> AddResult:
        refusal = self._refusal(add.group, ledger.mark)
        if refusal is not None:
            return refusal
        fresh: list[tuple[Envelope, bytes]] = []
        for envelope, data in zip(add.envelopes, add.group.entries, strict=True):
            known = self._known(ledger, envelope)
            if known is None or (isinstance(known, Damaged) and add.group.recovery):
                fresh.append((envelope, data))
            elif isinstance(known, Damaged):
                return AddResult(AddStatus.IO_ERROR, known.message)
            elif known != data:
                return AddResult(AddStatus.CONFLICT, _conflict(envelope, known, data))
        self._accept(add.group, ledger, fresh)
        return STORED

    def _accept(self, group: AddGroup, ledger: _Ledger, fresh: list[tuple[Envelope, bytes]]) -> None:
        mark = ledger.mark
        assert not isinstance(mark, Damaged)
        if mark is None:
            self._set_mark(group.ledger_id, ledger, LedgerMark(group.token, group.epoch, stored=True))
        elif not mark.stored or group.epoch > mark.epoch:
            self._set_mark(group.ledger_id, ledger, replace(mark, stored=True, epoch=max(mark.epoch, group.epoch)))
        for envelope, data in fresh:
            ledger.added[envelope.entry_id] = data
            ledger.last_entry = max(ledger.last_entry, envelope.entry_id)
            ledger.lac = max(ledger.lac, envelope.lac)
            self._result.writes.entries.append((group.ledger_id, envelope.entry_id, data))

    def _refusal(self, group: AddGroup, mark: LedgerMark | Damaged | None) -> AddResult | None:
        conditions = self._conditions
        ledger_id = group.ledger_id
        ordinary = not group.recovery
        if isinstance(mark, Damaged):
            return AddResult(AddStatus.IO_ERROR, mark.message)
        if ledger_id in conditions.collecting:
            return AddResult(AddStatus.BUSY, f"ledger is being collected ledger=`{ledger_id}`")
        if mark is not None:
            if mark.token != group.token:
                return AddResult(AddStatus.WRONG_TOKEN, f"ledger has another token ledger=`{ledger_id}`")
            if mark.fenced and ordinary:
                return AddResult(AddStatus.FENCED, f"ledger is fenced ledger=`{ledger_id}` epoch=`{mark.epoch}`")
            if group.epoch < mark.epoch:
                return AddResult(
                    AddStatus.STALE_EPOCH,
                    f"epoch is stale ledger=`{ledger_id}` seen=`{mark.epoch}` sent=`{group.epoch}`",
                )
            if mark.deleted_us and ordinary:
                return AddResult(AddStatus.REFUSED, f"ledger was deleted here ledger=`{ledger_id}`")
        if ledger_id < conditions.floor and ordinary:
            return AddResult(
                AddStatus.REFUSED, f"ledger is older than this bookie ledger=`{ledger_id}` floor=`{conditions.floor}`"
            )
        if conditions.full or (conditions.read_only and ordinary):
            return AddResult(AddStatus.READ_ONLY, "the disk is full" if conditions.full else "bookie is read-only")
        return None

    def _known(self, ledger: _Ledger, envelope: Envelope) -> bytes | Damaged | None:
        """What stands under the envelope's id, this group included. What does not verify is damaged."""
        added = ledger.added.get(envelope.entry_id)
        if added is not None:
            return added
        known = self._stored.get((envelope.ledger_id, envelope.entry_id))
        return verified(known, envelope.ledger_id, envelope.entry_id)

    def _fence(self, fence: Fence, ledger: _Ledger) -> Done:
        mark = ledger.mark
        if isinstance(mark, Damaged):
            return Done(mark.message)
        if mark is None:
            self._set_mark(fence.ledger_id, ledger, LedgerMark(fence.token, fence.epoch, fenced=True))
            return Done()
        if mark.token != fence.token:
            return Done(f"ledger has another token ledger=`{fence.ledger_id}`")
        if fence.epoch < mark.epoch:
            return Done(f"epoch is stale ledger=`{fence.ledger_id}` seen=`{mark.epoch}` sent=`{fence.epoch}`")
        self._set_mark(fence.ledger_id, ledger, replace(mark, fenced=True, epoch=fence.epoch))
        return Done()

    def _remove(self, remove: Remove, ledger: _Ledger) -> Done:
        mark = ledger.mark
        if isinstance(mark, Damaged):
            return Done(mark.message)
        if mark is None:
            return Done(f"ledger is not here ledger=`{remove.ledger_id}`")
        assert not ledger.added, "a ledger that is being collected takes no adds"
        self._result.writes.deleted.append(remove.ledger_id)
        self._set_mark(remove.ledger_id, ledger, replace(mark, stored=False, deleted_us=remove.now_us))
        ledger.last_entry = ledger.lac = NO_ENTRY
        ledger.tail_damage = ""
        return Done()

    def _forget(self, forget: Forget, ledger: _Ledger) -> Done:
        mark = ledger.mark
        if not isinstance(mark, LedgerMark) or mark.stored or not mark.deleted_us:
            return Done(f"ledger is no tombstone ledger=`{forget.ledger_id}`")
        self._result.writes.forgotten.append(forget.ledger_id)
        self._result.writes.marks.pop(forget.ledger_id, None)
        ledger.mark = None
        return Done()


def verified(value: bytes | Damaged | None, ledger_id: int, entry_id: int) -> bytes | Damaged | None:
    """The value as it is, or Damaged if it is not the envelope of this entry."""
    if isinstance(value, bytes):
        try:
            verify(value, ledger_id, entry_id)
        except DamagedEnvelope as damage:
            return Damaged(str(damage))
    return value


def _conflict(envelope: Envelope, known: bytes, sent: bytes) -> str:
    return (
        f"other bytes stand under this id ledger=`{envelope.ledger_id}` entry=`{envelope.entry_id}` "
        f"stored_crc32c=`{_checksum(known)}` sent_crc32c=`{_checksum(sent)}`"
    )


def _checksum(data: bytes) -> str:
    return data[_CHECKSUM_OFFSET:HEADER_SIZE].hex()


# Reads. A negative is an answer that recovery acts upon: it is given only where everything that was ever acknowledged
# here is known to be seen.


@dataclass(frozen=True, slots=True)
class ReadConditions:
    """`limbo`: durable entries of this ledger may be missing here. `collecting`: they may go, or be gone by now."""

    limbo: bool = False
    collecting: bool = False


BEING_COLLECTED = "ledger is being collected"

_UNKNOWN = EntryAnswer(EntryOutcome.UNKNOWN)
_PROVABLY_NOT = EntryAnswer(EntryOutcome.PROVABLY_NOT)


def unknown_read(message: str) -> ReadResult:
    return ReadResult((_UNKNOWN,), message)


def unknown_lac(message: str) -> LacResult:
    return LacResult(EntryOutcome.UNKNOWN, message=message)


def judge_read(
    token: bytes,
    values: Sequence[bytes | Damaged | None],
    mark: LedgerMark | Damaged | None,
    conditions: ReadConditions,
) -> ReadResult:
    """Answers for `values`, verified by `verified`."""
    if isinstance(mark, Damaged):
        return unknown_read(mark.message)
    if mark is not None and mark.token != token:
        return unknown_read("ledger has another token")
    if conditions.collecting:
        return unknown_read(BEING_COLLECTED)
    doubt = _doubt(mark, conditions)
    absent = _UNKNOWN if doubt else _PROVABLY_NOT
    answers: list[EntryAnswer] = []
    message = ""
    for value in values:
        if isinstance(value, bytes):
            answers.append(EntryAnswer(EntryOutcome.HAVE, value))
        elif value is None:
            answers.append(absent)
            message = message or doubt
        else:
            answers.append(_UNKNOWN)
            message = value.message
    return ReadResult(tuple(answers), message)


def headers_of(result: ReadResult) -> ReadResult:
    """The answers with the headers of their envelopes only."""
    answers = tuple(
        answer if answer.entry is None else EntryAnswer(answer.outcome, answer.entry[:HEADER_SIZE])
        for answer in result.answers
    )
    return ReadResult(answers, result.message)


def judge_lac(token: bytes, state: LedgerState, conditions: ReadConditions) -> LacResult:
    mark = state.mark
    if isinstance(mark, Damaged):
        return unknown_lac(mark.message)
    if mark is not None and mark.token != token:
        return unknown_lac("ledger has another token")
    fenced = mark is not None and mark.fenced
    epoch = 0 if mark is None else mark.epoch
    doubt = _doubt(mark, conditions) or state.tail_damage
    if doubt:
        return LacResult(EntryOutcome.UNKNOWN, fenced=fenced, epoch=epoch, message=doubt)
    if state.last_entry == NO_ENTRY:
        return LacResult(EntryOutcome.PROVABLY_NOT, fenced=fenced, epoch=epoch)
    return LacResult(EntryOutcome.HAVE, state.lac, state.last_entry, fenced, epoch)


def _doubt(mark: LedgerMark | None, conditions: ReadConditions) -> str:
    """Why an absent entry may have been acknowledged here once; empty = it never was."""
    if conditions.limbo:
        return "bookie is in limbo for this ledger"
    if conditions.collecting:
        return BEING_COLLECTED
    return "ledger was deleted here" if mark is not None and mark.deleted_us else ""
