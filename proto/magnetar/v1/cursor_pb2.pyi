from magnetar.v1 import metadata_pb2 as _metadata_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class CursorEntry(_message.Message):
    __slots__ = ("delta", "snapshot")
    DELTA_FIELD_NUMBER: _ClassVar[int]
    SNAPSHOT_FIELD_NUMBER: _ClassVar[int]
    delta: CursorDelta
    snapshot: CursorSnapshotPart
    def __init__(self, delta: _Optional[_Union[CursorDelta, _Mapping]] = ..., snapshot: _Optional[_Union[CursorSnapshotPart, _Mapping]] = ...) -> None: ...

class CursorDelta(_message.Message):
    __slots__ = ("changes",)
    CHANGES_FIELD_NUMBER: _ClassVar[int]
    changes: _containers.RepeatedCompositeFieldContainer[CursorChange]
    def __init__(self, changes: _Optional[_Iterable[_Union[CursorChange, _Mapping]]] = ...) -> None: ...

class CursorChange(_message.Message):
    __slots__ = ("subscription", "created", "deleted", "acked", "seeked_to")
    SUBSCRIPTION_FIELD_NUMBER: _ClassVar[int]
    CREATED_FIELD_NUMBER: _ClassVar[int]
    DELETED_FIELD_NUMBER: _ClassVar[int]
    ACKED_FIELD_NUMBER: _ClassVar[int]
    SEEKED_TO_FIELD_NUMBER: _ClassVar[int]
    subscription: str
    created: CursorCreated
    deleted: bool
    acked: CursorAcked
    seeked_to: int
    def __init__(self, subscription: _Optional[str] = ..., created: _Optional[_Union[CursorCreated, _Mapping]] = ..., deleted: bool = ..., acked: _Optional[_Union[CursorAcked, _Mapping]] = ..., seeked_to: _Optional[int] = ...) -> None: ...

class CursorCreated(_message.Message):
    __slots__ = ("subscription_id", "type", "floor")
    SUBSCRIPTION_ID_FIELD_NUMBER: _ClassVar[int]
    TYPE_FIELD_NUMBER: _ClassVar[int]
    FLOOR_FIELD_NUMBER: _ClassVar[int]
    subscription_id: int
    type: _metadata_pb2.SubscriptionType
    floor: int
    def __init__(self, subscription_id: _Optional[int] = ..., type: _Optional[_Union[_metadata_pb2.SubscriptionType, str]] = ..., floor: _Optional[int] = ...) -> None: ...

class CursorAcked(_message.Message):
    __slots__ = ("floor", "ranges", "delivery_counts")
    FLOOR_FIELD_NUMBER: _ClassVar[int]
    RANGES_FIELD_NUMBER: _ClassVar[int]
    DELIVERY_COUNTS_FIELD_NUMBER: _ClassVar[int]
    floor: int
    ranges: _containers.RepeatedScalarFieldContainer[int]
    delivery_counts: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, floor: _Optional[int] = ..., ranges: _Optional[_Iterable[int]] = ..., delivery_counts: _Optional[_Iterable[int]] = ...) -> None: ...

class CursorSnapshotPart(_message.Message):
    __slots__ = ("snapshot_id", "part", "parts", "cursors", "producers", "producers_covered_offset")
    SNAPSHOT_ID_FIELD_NUMBER: _ClassVar[int]
    PART_FIELD_NUMBER: _ClassVar[int]
    PARTS_FIELD_NUMBER: _ClassVar[int]
    CURSORS_FIELD_NUMBER: _ClassVar[int]
    PRODUCERS_FIELD_NUMBER: _ClassVar[int]
    PRODUCERS_COVERED_OFFSET_FIELD_NUMBER: _ClassVar[int]
    snapshot_id: int
    part: int
    parts: int
    cursors: _containers.RepeatedCompositeFieldContainer[CursorState]
    producers: _containers.RepeatedScalarFieldContainer[bytes]
    producers_covered_offset: int
    def __init__(self, snapshot_id: _Optional[int] = ..., part: _Optional[int] = ..., parts: _Optional[int] = ..., cursors: _Optional[_Iterable[_Union[CursorState, _Mapping]]] = ..., producers: _Optional[_Iterable[bytes]] = ..., producers_covered_offset: _Optional[int] = ...) -> None: ...

class CursorState(_message.Message):
    __slots__ = ("subscription", "subscription_id", "type", "floor", "acked", "delivery_counts")
    SUBSCRIPTION_FIELD_NUMBER: _ClassVar[int]
    SUBSCRIPTION_ID_FIELD_NUMBER: _ClassVar[int]
    TYPE_FIELD_NUMBER: _ClassVar[int]
    FLOOR_FIELD_NUMBER: _ClassVar[int]
    ACKED_FIELD_NUMBER: _ClassVar[int]
    DELIVERY_COUNTS_FIELD_NUMBER: _ClassVar[int]
    subscription: str
    subscription_id: int
    type: _metadata_pb2.SubscriptionType
    floor: int
    acked: bytes
    delivery_counts: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, subscription: _Optional[str] = ..., subscription_id: _Optional[int] = ..., type: _Optional[_Union[_metadata_pb2.SubscriptionType, str]] = ..., floor: _Optional[int] = ..., acked: _Optional[bytes] = ..., delivery_counts: _Optional[_Iterable[int]] = ...) -> None: ...

class ProducerTableChunk(_message.Message):
    __slots__ = ("producers",)
    PRODUCERS_FIELD_NUMBER: _ClassVar[int]
    producers: _containers.RepeatedCompositeFieldContainer[ProducerTableEntry]
    def __init__(self, producers: _Optional[_Iterable[_Union[ProducerTableEntry, _Mapping]]] = ...) -> None: ...

class ProducerTableEntry(_message.Message):
    __slots__ = ("producer_id", "epoch", "last_sequence", "named", "last_time_us", "batches", "stored_epoch")
    PRODUCER_ID_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    LAST_SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    NAMED_FIELD_NUMBER: _ClassVar[int]
    LAST_TIME_US_FIELD_NUMBER: _ClassVar[int]
    BATCHES_FIELD_NUMBER: _ClassVar[int]
    STORED_EPOCH_FIELD_NUMBER: _ClassVar[int]
    producer_id: bytes
    epoch: int
    last_sequence: int
    named: bool
    last_time_us: int
    batches: _containers.RepeatedCompositeFieldContainer[StoredBatch]
    stored_epoch: int
    def __init__(self, producer_id: _Optional[bytes] = ..., epoch: _Optional[int] = ..., last_sequence: _Optional[int] = ..., named: bool = ..., last_time_us: _Optional[int] = ..., batches: _Optional[_Iterable[_Union[StoredBatch, _Mapping]]] = ..., stored_epoch: _Optional[int] = ...) -> None: ...

class StoredBatch(_message.Message):
    __slots__ = ("first_sequence", "last_sequence", "first_offset")
    FIRST_SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    LAST_SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    FIRST_OFFSET_FIELD_NUMBER: _ClassVar[int]
    first_sequence: int
    last_sequence: int
    first_offset: int
    def __init__(self, first_sequence: _Optional[int] = ..., last_sequence: _Optional[int] = ..., first_offset: _Optional[int] = ...) -> None: ...
