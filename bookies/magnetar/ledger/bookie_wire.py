"""The bookie's calls as they travel: pairs of functions between `bookie_rpc` and `magnetar.v1.bookie_pb2`.

What is sent is encoded into pieces, so that envelopes are copied once, into their frame.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

from magnetar.ledger.bookie_rpc import (
    STORED,
    AddGroup,
    AddResult,
    AddStatus,
    EntryAnswer,
    EntryOutcome,
    LacQuery,
    LacResult,
    ReadGroup,
    ReadResult,
)
from magnetar.v1 import bookie_pb2 as pb
from magnetar.wire.framing import Pieces, bytes_field, message_field

PROTOCOL_MIN = 1
PROTOCOL_MAX = 1
FRAME_BYTES_MAX = 1 << 20
"""A frame has at most so many bytes, or exactly one item."""
ITEM_OVERHEAD_BYTES = 64
"""What an item takes in a frame beside its envelopes, generously."""
_ITEMS_FIELD = 2
"""Groups, queries or results: in all requests and responses of streams."""
_ADDED_ENTRIES_FIELD = 6
_READ_ENTRIES_FIELD = 3

_STATUSES: Mapping[int, AddStatus] = {status.value: status for status in AddStatus if status is not AddStatus.NO_ANSWER}
_OUTCOMES: Mapping[int, EntryOutcome] = {outcome.value: outcome for outcome in EntryOutcome}


class UnexpectedAnswer(ValueError):
    """An answer that contradicts itself: nothing of what its sender says is believed."""


def frame_of_items(items: Sequence[Pieces]) -> bytes:
    """A request or response with these items, encoded by functions of this module."""
    return b"".join([piece for item in items for piece in message_field(_ITEMS_FIELD, item)])


def encode_add(request_id: int, group: AddGroup) -> Pieces:
    rest = pb.AddGroup(
        request_id=request_id,
        ledger_id=group.ledger_id,
        epoch=group.epoch,
        token=group.token,
        recovery=group.recovery,
    )
    return _with_entries(rest.SerializeToString(), _ADDED_ENTRIES_FIELD, group.entries)


def _with_entries(rest: bytes, field: int, entries: Iterable[bytes]) -> Pieces:
    pieces = [rest]
    for entry in entries:
        pieces += bytes_field(field, entry)
    return pieces


def add_from_message(message: pb.AddGroup, token: bytes) -> AddGroup:
    return AddGroup(message.ledger_id, message.epoch, token, tuple(message.entries), message.recovery)


def frame_of_add_results(answers: Iterable[tuple[int, AddResult]]) -> bytes:
    """A response with these answers, by request id."""
    frame = pb.AddEntriesResponse()
    stored = []
    for request_id, result in answers:
        if result == STORED:
            stored.append(request_id)
        else:
            frame.results.add(request_id=request_id, status=result.status.value, message=result.message)
    frame.stored.extend(stored)
    return frame.SerializeToString()


def add_results_from_frame(frame: pb.AddEntriesResponse) -> Iterator[tuple[int, AddResult]]:
    """The answers by request id."""
    for request_id in frame.stored:
        yield request_id, STORED
    for message in frame.results:
        yield message.request_id, add_result_from_message(message)


def add_result_from_message(message: pb.AddResult) -> AddResult:
    """A status this program does not know is a failure of the bookie, no more."""
    return AddResult(_STATUSES.get(message.status, AddStatus.IO_ERROR), message.message)


def encode_read(request_id: int, group: ReadGroup) -> Pieces:
    message = pb.ReadGroup(
        request_id=request_id,
        ledger_id=group.ledger_id,
        epoch=group.epoch,
        token=group.token,
        fence=group.fence,
        first_entry=group.first_entry,
        last_entry=group.last_entry,
        max_bytes=group.max_bytes,
        headers_only=group.headers_only,
    )
    return [message.SerializeToString()]


def read_from_message(message: pb.ReadGroup, token: bytes) -> ReadGroup:
    return ReadGroup(
        message.ledger_id,
        message.epoch,
        token,
        message.first_entry,
        message.last_entry,
        message.fence,
        message.max_bytes,
        message.headers_only,
    )


def encode_read_result(request_id: int, result: ReadResult) -> Pieces:
    rest = pb.ReadResult(
        request_id=request_id,
        outcomes=[answer.outcome.value for answer in result.answers],  # type: ignore[misc]
        message=result.message,
    )
    entries = [answer.entry for answer in result.answers if answer.entry is not None]
    return _with_entries(rest.SerializeToString(), _READ_ENTRIES_FIELD, entries)


def read_results_from_frame(frame: pb.ReadEntriesResponse) -> Iterator[tuple[int, ReadResult]]:
    """The answers by request id; one that contradicts itself is none."""
    for message in frame.results:
        try:
            yield message.request_id, read_result_from_message(message)
        except UnexpectedAnswer as unexpected:
            yield message.request_id, ReadResult((EntryAnswer(EntryOutcome.UNKNOWN),), str(unexpected))


def read_result_from_message(message: pb.ReadResult) -> ReadResult:
    """Raises UnexpectedAnswer if there are no outcomes, or not one entry for each HAVE."""
    outcomes = [_OUTCOMES.get(outcome, EntryOutcome.UNKNOWN) for outcome in message.outcomes]
    if not outcomes or outcomes.count(EntryOutcome.HAVE) != len(message.entries):
        raise UnexpectedAnswer(
            f"outcomes and entries differ outcomes=`{len(outcomes)}` entries=`{len(message.entries)}`"
        )
    entries = iter(message.entries)
    return ReadResult(
        tuple(EntryAnswer(o, next(entries)) if o is EntryOutcome.HAVE else EntryAnswer(o) for o in outcomes),
        message.message,
    )


def encode_lac(request_id: int, query: LacQuery) -> Pieces:
    message = pb.LacQuery(
        request_id=request_id, ledger_id=query.ledger_id, epoch=query.epoch, token=query.token, fence=query.fence
    )
    return [message.SerializeToString()]


def lac_from_message(message: pb.LacQuery, token: bytes) -> LacQuery:
    return LacQuery(message.ledger_id, message.epoch, token, message.fence)


def encode_lac_result(request_id: int, result: LacResult) -> Pieces:
    message = pb.LacResult(
        request_id=request_id,
        outcome=result.outcome.value,  # type: ignore[arg-type]
        lac=result.lac,
        last_entry=result.last_entry,
        fenced=result.fenced,
        epoch=result.epoch,
        message=result.message,
    )
    return [message.SerializeToString()]


def lac_results_from_frame(frame: pb.ReadLacResponse) -> Iterator[tuple[int, LacResult]]:
    """The answers by request id."""
    return ((message.request_id, lac_result_from_message(message)) for message in frame.results)


def lac_result_from_message(message: pb.LacResult) -> LacResult:
    outcome = _OUTCOMES.get(message.outcome, EntryOutcome.UNKNOWN)
    return LacResult(outcome, message.lac, message.last_entry, message.fenced, message.epoch, message.message)
