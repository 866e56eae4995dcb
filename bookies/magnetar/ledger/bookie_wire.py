"""The bookie's calls as they travel: pairs of functions between `bookie_rpc` and `magnetar.v1.bookie_pb2`."""

from __future__ import annotations

from collections.abc import Mapping

from magnetar.ledger.bookie_rpc import (
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

PROTOCOL_MIN = 1
PROTOCOL_MAX = 1
FRAME_BYTES_MAX = 1 << 20
"""A frame has at most so many bytes, or exactly one item."""
ITEM_OVERHEAD_BYTES = 64
"""What an item takes in a frame beside its envelopes, generously."""

_STATUSES: Mapping[int, AddStatus] = {status.value: status for status in AddStatus if status is not AddStatus.NO_ANSWER}
_OUTCOMES: Mapping[int, EntryOutcome] = {outcome.value: outcome for outcome in EntryOutcome}


class UnexpectedAnswer(ValueError):
    """An answer that contradicts itself: nothing of what its sender says is believed."""


def add_to_message(request_id: int, group: AddGroup) -> pb.AddGroup:
    return pb.AddGroup(
        request_id=request_id,
        ledger_id=group.ledger_id,
        epoch=group.epoch,
        token=group.token,
        recovery=group.recovery,
        entries=group.entries,
    )


def add_from_message(message: pb.AddGroup, token: bytes) -> AddGroup:
    return AddGroup(message.ledger_id, message.epoch, token, tuple(message.entries), message.recovery)


def add_result_to_message(request_id: int, result: AddResult) -> pb.AddResult:
    return pb.AddResult(request_id=request_id, status=result.status.value, message=result.message)  # type: ignore[arg-type]


def add_result_from_message(message: pb.AddResult) -> AddResult:
    """A status this program does not know is a failure of the bookie, no more."""
    return AddResult(_STATUSES.get(message.status, AddStatus.IO_ERROR), message.message)


def read_to_message(request_id: int, group: ReadGroup) -> pb.ReadGroup:
    return pb.ReadGroup(
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


def read_result_to_message(request_id: int, result: ReadResult) -> pb.ReadResult:
    return pb.ReadResult(
        request_id=request_id,
        outcomes=[answer.outcome.value for answer in result.answers],  # type: ignore[misc]
        entries=[answer.entry for answer in result.answers if answer.entry is not None],
        message=result.message,
    )


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


def lac_to_message(request_id: int, query: LacQuery) -> pb.LacQuery:
    return pb.LacQuery(
        request_id=request_id, ledger_id=query.ledger_id, epoch=query.epoch, token=query.token, fence=query.fence
    )


def lac_from_message(message: pb.LacQuery, token: bytes) -> LacQuery:
    return LacQuery(message.ledger_id, message.epoch, token, message.fence)


def lac_result_to_message(request_id: int, result: LacResult) -> pb.LacResult:
    return pb.LacResult(
        request_id=request_id,
        outcome=result.outcome.value,  # type: ignore[arg-type]
        lac=result.lac,
        last_entry=result.last_entry,
        fenced=result.fenced,
        epoch=result.epoch,
        message=result.message,
    )


def lac_result_from_message(message: pb.LacResult) -> LacResult:
    outcome = _OUTCOMES.get(message.outcome, EntryOutcome.UNKNOWN)
    return LacResult(outcome, message.lac, message.last_entry, message.fenced, message.epoch, message.message)
