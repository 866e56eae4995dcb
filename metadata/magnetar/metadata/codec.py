"""The stored form of the records: each record's encoder and decoder, side by side.

The form is the protobuf of `metadata.proto`. Decoding is strict: what is not a whole, valid record raises
DamagedRecord, never a guess. Unknown fields of a newer version are accepted and dropped.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from enum import Enum
from itertools import pairwise
from typing import TypeVar, cast

from google.protobuf.message import DecodeError, Message

from magnetar.metadata.records import (
    NO_ENTRY,
    Anchor,
    AtOffset,
    AtTime,
    BookieRegistration,
    BookieState,
    BrokerRegistration,
    Cookie,
    CopyClaim,
    CopyReason,
    CopyTask,
    Drain,
    Fragment,
    Goal,
    LayoutShard,
    LedgerPurpose,
    LedgerRecord,
    LedgerState,
    Loss,
    Move,
    MoveState,
    Operation,
    OperationState,
    Owner,
    ProducerRecord,
    RepairSettings,
    Segment,
    ShardRecord,
    ShardState,
    StartPosition,
    SubscriptionRecord,
    SubscriptionType,
    TopicRecord,
)
from magnetar.v1 import metadata_pb2 as pb
from magnetar.wire.slots import SLOTS

PRODUCER_ID_BYTES = 16
COUNTER_DIGITS_MAX = 20


class DamagedRecord(ValueError):
    """A stored value that is not the record it should be."""


M = TypeVar("M", bound=Message)
E = TypeVar("E", bound=Enum)


def _parse(message_class: type[M], data: bytes) -> M:
    try:
        return message_class.FromString(data)
    except DecodeError as error:
        raise DamagedRecord(f"a stored record does not parse: kind=`{message_class.DESCRIPTOR.name}`") from error


def _enum(enum_class: type[E], value: int) -> E:
    try:
        return enum_class(value)
    except ValueError:
        raise DamagedRecord(
            f"a stored record holds an unknown value: kind=`{enum_class.__name__}` value=`{value}`"
        ) from None


def _check(holds: bool, kind: str, what: str) -> None:
    if not holds:
        raise DamagedRecord(f"a stored record contradicts itself: kind=`{kind}` what=`{what}`")


def _slots_are_valid(first: int, last: int) -> bool:
    return 0 <= first <= last < SLOTS


# Shards.


def _segment_to_message(segment: Segment) -> pb.Segment:
    return pb.Segment(
        ledger_id=segment.ledger_id,
        first_offset=segment.first_offset,
        first_time_us=segment.first_time_us,
        messages=segment.messages,
        bytes=segment.bytes,
    )


def _segment_from_message(message: pb.Segment) -> Segment:
    _check(message.ledger_id > 0, "Segment", "no ledger")
    return Segment(
        ledger_id=message.ledger_id,
        first_offset=message.first_offset,
        first_time_us=message.first_time_us,
        messages=message.messages,
        bytes=message.bytes,
    )


def encode_shard(record: ShardRecord) -> bytes:
    owner = record.owner
    return pb.ShardRecord(
        shard_id=record.shard_id,
        topic=record.topic,
        state=cast("pb.ShardState", record.state.value),
        epoch=record.epoch,
        owner=None if owner is None else pb.Owner(broker_id=owner.broker_id, session=owner.session),
        first_slot=record.first_slot,
        last_slot=record.last_slot,
        parents=record.parents,
        start_offset=record.start_offset,
        segments=[_segment_to_message(segment) for segment in record.segments],
        first_page=record.first_page,
        pages=record.pages,
        next_ledger=record.next_ledger,
        cursor_ledger=record.cursor_ledger,
        next_cursor=record.next_cursor,
        inline_cursors=record.inline_cursors,
        created_us=record.created_us,
        floor_time_us=record.floor_time_us,
    ).SerializeToString(deterministic=True)


def decode_shard(data: bytes) -> ShardRecord:
    message = _parse(pb.ShardRecord, data)
    _check(message.shard_id > 0, "ShardRecord", "no id")
    _check(_slots_are_valid(message.first_slot, message.last_slot), "ShardRecord", "slot range")
    owner = None
    if message.HasField("owner"):
        _check(message.owner.broker_id != "" and message.owner.session > 0, "ShardRecord", "owner without a session")
        owner = Owner(message.owner.broker_id, message.owner.session)
    return ShardRecord(
        shard_id=message.shard_id,
        topic=message.topic,
        state=_enum(ShardState, message.state),
        epoch=message.epoch,
        owner=owner,
        first_slot=message.first_slot,
        last_slot=message.last_slot,
        parents=tuple(message.parents),
        start_offset=message.start_offset,
        segments=tuple(_segment_from_message(segment) for segment in message.segments),
        first_page=message.first_page,
        pages=message.pages,
        next_ledger=message.next_ledger,
        cursor_ledger=message.cursor_ledger,
        next_cursor=message.next_cursor,
        inline_cursors=message.inline_cursors,
        created_us=message.created_us,
        floor_time_us=message.floor_time_us,
    )


def encode_page(segments: Sequence[Segment]) -> bytes:
    message = pb.SegmentPage(segments=[_segment_to_message(segment) for segment in segments])
    return message.SerializeToString(deterministic=True)


def decode_page(data: bytes) -> tuple[Segment, ...]:
    return tuple(_segment_from_message(segment) for segment in _parse(pb.SegmentPage, data).segments)


# Ledgers.


def encode_ledger(record: LedgerRecord) -> bytes:
    return pb.LedgerRecord(
        ledger_id=record.ledger_id,
        shard_id=record.shard_id,
        purpose=cast("pb.LedgerPurpose", record.purpose.value),
        state=cast("pb.LedgerState", record.state.value),
        epoch=record.epoch,
        token=record.token,
        write_quorum=record.write_quorum,
        ack_quorum=record.ack_quorum,
        fragments=[pb.Fragment(first_entry=f.first_entry, bookies=f.bookies) for f in record.fragments],
        last_entry=record.last_entry,
        length=record.length,
        created_us=record.created_us,
        copy=None if record.copy is None else _claim_to_message(record.copy),
    ).SerializeToString(deterministic=True)


def decode_ledger(data: bytes) -> LedgerRecord:
    message = _parse(pb.LedgerRecord, data)
    record = LedgerRecord(
        ledger_id=message.ledger_id,
        shard_id=message.shard_id,
        purpose=_enum(LedgerPurpose, message.purpose),
        state=_enum(LedgerState, message.state),
        epoch=message.epoch,
        token=message.token,
        write_quorum=message.write_quorum,
        ack_quorum=message.ack_quorum,
        fragments=tuple(Fragment(f.first_entry, tuple(f.bookies)) for f in message.fragments),
        last_entry=message.last_entry,
        length=message.length,
        created_us=message.created_us,
        copy=_claim_from_message(message.copy) if message.HasField("copy") else None,
    )
    _check_ledger(record)
    return record


def _claim_to_message(claim: CopyClaim) -> pb.CopyClaim:
    return pb.CopyClaim(target=claim.target, replaces=claim.replaces, mark=claim.mark, since_us=claim.since_us)


def _claim_from_message(message: pb.CopyClaim) -> CopyClaim:
    _check(message.target != "" and message.mark != b"", "CopyClaim", "no target or mark")
    return CopyClaim(message.target, message.replaces, message.mark, message.since_us)


def _check_ledger(record: LedgerRecord) -> None:
    kind = "LedgerRecord"
    fragments = record.fragments
    _check(record.ledger_id > 0 and record.shard_id > 0, kind, "no id")
    _check(record.last_entry >= NO_ENTRY, kind, "last entry")
    _check(len(fragments) > 0 and fragments[0].first_entry == 0, kind, "no first fragment")
    ensemble_size = len(fragments[0].bookies)
    _check(all(len(f.bookies) == ensemble_size for f in fragments), kind, "ensembles of different sizes")
    _check(ensemble_size >= record.write_quorum >= record.ack_quorum >= 1, kind, "quorums")
    starts = [f.first_entry for f in fragments]
    _check(all(a < b for a, b in pairwise(starts)), kind, "order of fragments")


# Copies, and what makes them necessary.


def encode_copy(task: CopyTask) -> bytes:
    return pb.CopyTask(
        ledger_id=task.ledger_id,
        place=task.place,
        target=task.target,
        reason=cast("pb.CopyReason", task.reason.value),
        operation=task.operation,
        first_entry=task.first_entry,
        last_entry=task.last_entry,
        created_us=task.created_us,
        problem=task.problem,
    ).SerializeToString(deterministic=True)


def decode_copy(data: bytes) -> CopyTask:
    message = _parse(pb.CopyTask, data)
    _check(message.ledger_id > 0, "CopyTask", "no ledger")
    _check(message.last_entry >= NO_ENTRY, "CopyTask", "last entry")
    return CopyTask(
        ledger_id=message.ledger_id,
        place=message.place,
        target=message.target,
        reason=_enum(CopyReason, message.reason),
        operation=message.operation,
        first_entry=message.first_entry,
        last_entry=message.last_entry,
        created_us=message.created_us,
        problem=message.problem,
    )


def encode_drain(drain: Drain) -> bytes:
    return pb.Drain(bookie_id=drain.bookie_id, since_us=drain.since_us).SerializeToString(deterministic=True)


def decode_drain(data: bytes) -> Drain:
    message = _parse(pb.Drain, data)
    _check(message.bookie_id != "", "Drain", "no bookie")
    return Drain(message.bookie_id, message.since_us)


def encode_loss(loss: Loss) -> bytes:
    message = pb.Loss(bookie_id=loss.bookie_id, since_us=loss.since_us, given_up=loss.given_up)
    return message.SerializeToString(deterministic=True)


def decode_loss(data: bytes) -> Loss:
    message = _parse(pb.Loss, data)
    _check(message.bookie_id != "", "Loss", "no bookie")
    return Loss(message.bookie_id, message.since_us, message.given_up)


def encode_repair(settings: RepairSettings) -> bytes:
    return pb.RepairSettings(
        enabled=settings.enabled, delay_s=settings.delay_s, bytes_per_s=settings.bytes_per_s
    ).SerializeToString(deterministic=True)


def decode_repair(data: bytes) -> RepairSettings:
    message = _parse(pb.RepairSettings, data)
    _check(0 <= message.delay_s < math.inf, "RepairSettings", "delay")
    _check(message.bytes_per_s > 0, "RepairSettings", "rate")
    return RepairSettings(message.enabled, message.delay_s, message.bytes_per_s)


# Rebalancing.


def encode_operation(operation: Operation) -> bytes:
    return pb.Operation(
        operation_id=operation.operation_id,
        goal=cast("pb.Goal", operation.goal.value),
        state=cast("pb.OperationState", operation.state.value),
        bytes_per_s=operation.bytes_per_s,
        revision=operation.revision,
        moves=operation.moves,
        size_bytes=operation.size_bytes,
        pages=operation.pages,
        mark=operation.mark,
        rollback_of=operation.rollback_of,
        created_us=operation.created_us,
        updated_us=operation.updated_us,
        ended_us=operation.ended_us,
        moves_done=operation.moves_done,
        bytes_done=operation.bytes_done,
        moves_skipped=operation.moves_skipped,
        bytes_skipped=operation.bytes_skipped,
        rate=operation.rate,
        problems=operation.problems,
    ).SerializeToString(deterministic=True)


def decode_operation(data: bytes) -> Operation:
    message = _parse(pb.Operation, data)
    _check(message.operation_id != "" and message.mark != b"", "Operation", "no id or mark")
    goal = _enum(Goal, message.goal)
    _check((message.bytes_per_s > 0) == (goal is not Goal.BROKERS), "Operation", "rate")
    return Operation(
        operation_id=message.operation_id,
        goal=goal,
        state=_enum(OperationState, message.state),
        bytes_per_s=message.bytes_per_s,
        revision=message.revision,
        moves=message.moves,
        size_bytes=message.size_bytes,
        pages=message.pages,
        mark=message.mark,
        rollback_of=message.rollback_of,
        created_us=message.created_us,
        updated_us=message.updated_us,
        ended_us=message.ended_us,
        moves_done=message.moves_done,
        bytes_done=message.bytes_done,
        moves_skipped=message.moves_skipped,
        bytes_skipped=message.bytes_skipped,
        rate=message.rate,
        problems=tuple(message.problems),
    )


def encode_moves(moves: Sequence[Move]) -> bytes:
    """Bookies and brokers are named once: a page holds a thousand moves between a few of them."""
    names = sorted({name for move in moves for name in (move.source, move.target)})
    places = {name: place for place, name in enumerate(names)}
    return pb.MovePage(
        bookies=names,
        moves=[
            pb.Move(
                ledger_id=move.ledger_id,
                source=places[move.source],
                target=places[move.target],
                size_bytes=move.size_bytes,
                state=cast("pb.MoveState", move.state.value),
                reason=move.reason,
                shard_id=move.shard_id,
            )
            for move in moves
        ],
    ).SerializeToString(deterministic=True)


def decode_moves(data: bytes) -> tuple[Move, ...]:
    message = _parse(pb.MovePage, data)
    names = message.bookies
    return tuple(_move_from_message(move, names) for move in message.moves)


def _move_from_message(message: pb.Move, names: Sequence[str]) -> Move:
    _check((message.ledger_id > 0) != (message.shard_id > 0), "Move", "neither ledger nor shard, or both")
    _check(max(message.source, message.target) < len(names), "Move", "no such bookie")
    source, target = names[message.source], names[message.target]
    state = _enum(MoveState, message.state)
    return Move(message.ledger_id, source, target, message.size_bytes, state, message.reason, message.shard_id)


# Topics, subscriptions, producers.


def encode_topic(record: TopicRecord) -> bytes:
    return pb.TopicRecord(
        topic=record.topic,
        layout_epoch=record.layout_epoch,
        shards=[
            pb.LayoutShard(
                shard_id=shard.shard_id,
                first_slot=shard.first_slot,
                last_slot=shard.last_slot,
                state=cast("pb.ShardState", shard.state.value),
                parents=shard.parents,
            )
            for shard in record.shards
        ],
        created_us=record.created_us,
        deleting=record.deleting,
    ).SerializeToString(deterministic=True)


def decode_topic(data: bytes) -> TopicRecord:
    message = _parse(pb.TopicRecord, data)
    _check(message.topic != "", "TopicRecord", "no name")
    return TopicRecord(
        topic=message.topic,
        layout_epoch=message.layout_epoch,
        shards=tuple(_layout_shard_from_message(shard) for shard in message.shards),
        created_us=message.created_us,
        deleting=message.deleting,
    )


def _layout_shard_from_message(message: pb.LayoutShard) -> LayoutShard:
    _check(message.shard_id > 0, "LayoutShard", "no id")
    _check(_slots_are_valid(message.first_slot, message.last_slot), "LayoutShard", "slot range")
    return LayoutShard(
        shard_id=message.shard_id,
        first_slot=message.first_slot,
        last_slot=message.last_slot,
        state=_enum(ShardState, message.state),
        parents=tuple(message.parents),
    )


def start_position_to_message(start: StartPosition) -> pb.StartPosition:
    if isinstance(start, AtOffset):
        return pb.StartPosition(offset=start.offset)
    if isinstance(start, AtTime):
        return pb.StartPosition(time_us=start.time_us)
    return pb.StartPosition(earliest=start is Anchor.EARLIEST)


def start_position_from_message(message: pb.StartPosition) -> StartPosition:
    """The position; one that names nothing is LATEST."""
    kind = message.WhichOneof("position")
    if kind == "offset":
        return AtOffset(message.offset)
    if kind == "time_us":
        return AtTime(message.time_us)
    return Anchor.EARLIEST if message.earliest else Anchor.LATEST


def encode_subscription(record: SubscriptionRecord) -> bytes:
    return pb.SubscriptionRecord(
        topic=record.topic,
        name=record.name,
        subscription_id=record.subscription_id,
        type=cast("pb.SubscriptionType", record.type.value),
        start=start_position_to_message(record.start),
        created_us=record.created_us,
    ).SerializeToString(deterministic=True)


def decode_subscription(data: bytes) -> SubscriptionRecord:
    message = _parse(pb.SubscriptionRecord, data)
    _check(message.topic != "" and message.name != "", "SubscriptionRecord", "no name")
    return SubscriptionRecord(
        topic=message.topic,
        name=message.name,
        subscription_id=message.subscription_id,
        type=_enum(SubscriptionType, message.type),
        start=start_position_from_message(message.start),
        created_us=message.created_us,
    )


def encode_producer(record: ProducerRecord) -> bytes:
    return pb.ProducerRecord(producer_id=record.producer_id, epoch=record.epoch).SerializeToString(deterministic=True)


def decode_producer(data: bytes) -> ProducerRecord:
    message = _parse(pb.ProducerRecord, data)
    _check(len(message.producer_id) == PRODUCER_ID_BYTES, "ProducerRecord", "producer id")
    return ProducerRecord(producer_id=message.producer_id, epoch=message.epoch)


# Servers.


def encode_bookie(registration: BookieRegistration) -> bytes:
    return pb.BookieRegistration(
        bookie_id=registration.bookie_id,
        address=registration.address,
        rack=registration.rack,
        state=cast("pb.BookieState", registration.state.value),
        disk_free_bytes=registration.disk_free_bytes,
        disk_total_bytes=registration.disk_total_bytes,
        ledger_floor=registration.ledger_floor,
        version=registration.version,
        http_address=registration.http_address,
    ).SerializeToString(deterministic=True)


def decode_bookie(data: bytes) -> BookieRegistration:
    message = _parse(pb.BookieRegistration, data)
    _check(message.bookie_id != "", "BookieRegistration", "no id")
    return BookieRegistration(
        bookie_id=message.bookie_id,
        address=message.address,
        rack=message.rack,
        state=_enum(BookieState, message.state),
        disk_free_bytes=message.disk_free_bytes,
        disk_total_bytes=message.disk_total_bytes,
        ledger_floor=message.ledger_floor,
        version=message.version,
        http_address=message.http_address,
    )


def encode_broker(registration: BrokerRegistration) -> bytes:
    return pb.BrokerRegistration(
        broker_id=registration.broker_id,
        address=registration.address,
        version=registration.version,
        http_address=registration.http_address,
        leaving=registration.leaving,
    ).SerializeToString(deterministic=True)


def decode_broker(data: bytes) -> BrokerRegistration:
    message = _parse(pb.BrokerRegistration, data)
    _check(message.broker_id != "", "BrokerRegistration", "no id")
    return BrokerRegistration(
        broker_id=message.broker_id,
        address=message.address,
        version=message.version,
        http_address=message.http_address,
        leaving=message.leaving,
    )


def encode_cookie(cookie: Cookie) -> bytes:
    return pb.Cookie(
        bookie_id=cookie.bookie_id,
        instance_id=cookie.instance_id,
        cluster=cookie.cluster,
        directory_id=cookie.directory_id,
    ).SerializeToString(deterministic=True)


def decode_cookie(data: bytes) -> Cookie:
    message = _parse(pb.Cookie, data)
    _check(
        all((message.bookie_id, message.instance_id, message.cluster, message.directory_id)), "Cookie", "empty field"
    )
    return Cookie(
        bookie_id=message.bookie_id,
        instance_id=message.instance_id,
        cluster=message.cluster,
        directory_id=message.directory_id,
    )


# Values that are plain text.


def encode_counter(next_number: int) -> bytes:
    return b"%d" % next_number


def decode_counter(data: bytes) -> int:
    """The next number to hand out, from 1."""
    if not 0 < len(data) <= COUNTER_DIGITS_MAX or not data.isdigit() or data.startswith(b"0"):
        raise DamagedRecord(f"a stored counter is not a number: value=`{data[:COUNTER_DIGITS_MAX]!r}`")
    return int(data)


def encode_text(text: str) -> bytes:
    """An instance id, or the name of an elected leader."""
    return text.encode()


def decode_text(data: bytes) -> str:
    try:
        text = data.decode()
    except UnicodeDecodeError:
        text = ""
    if not text:
        raise DamagedRecord(f"a stored name is not text: bytes=`{len(data)}`")
    return text
