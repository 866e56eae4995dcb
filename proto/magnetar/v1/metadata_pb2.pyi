from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class ShardState(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    SHARD_STATE_UNSPECIFIED: _ClassVar[ShardState]
    SHARD_STATE_OPEN: _ClassVar[ShardState]
    SHARD_STATE_SEALED: _ClassVar[ShardState]
    SHARD_STATE_DELETING: _ClassVar[ShardState]

class LedgerState(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    LEDGER_STATE_UNSPECIFIED: _ClassVar[LedgerState]
    LEDGER_STATE_OPEN: _ClassVar[LedgerState]
    LEDGER_STATE_IN_RECOVERY: _ClassVar[LedgerState]
    LEDGER_STATE_CLOSED: _ClassVar[LedgerState]

class LedgerPurpose(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    LEDGER_PURPOSE_UNSPECIFIED: _ClassVar[LedgerPurpose]
    LEDGER_PURPOSE_DATA: _ClassVar[LedgerPurpose]
    LEDGER_PURPOSE_CURSOR: _ClassVar[LedgerPurpose]

class SubscriptionType(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    SUBSCRIPTION_TYPE_UNSPECIFIED: _ClassVar[SubscriptionType]
    SUBSCRIPTION_TYPE_STREAM: _ClassVar[SubscriptionType]
    SUBSCRIPTION_TYPE_QUEUE: _ClassVar[SubscriptionType]

class CopyReason(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    COPY_REASON_UNSPECIFIED: _ClassVar[CopyReason]
    COPY_REASON_UNREPLICATED: _ClassVar[CopyReason]
    COPY_REASON_LOST: _ClassVar[CopyReason]
    COPY_REASON_DRAINING: _ClassVar[CopyReason]
    COPY_REASON_REBALANCE: _ClassVar[CopyReason]
    COPY_REASON_SCRUB: _ClassVar[CopyReason]

class Goal(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    GOAL_UNSPECIFIED: _ClassVar[Goal]
    GOAL_BYTES: _ClassVar[Goal]
    GOAL_SEGMENTS: _ClassVar[Goal]
    GOAL_BROKERS: _ClassVar[Goal]

class OperationState(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    OPERATION_STATE_UNSPECIFIED: _ClassVar[OperationState]
    OPERATION_STATE_RUNNING: _ClassVar[OperationState]
    OPERATION_STATE_PAUSED: _ClassVar[OperationState]
    OPERATION_STATE_CANCELLED: _ClassVar[OperationState]
    OPERATION_STATE_DONE: _ClassVar[OperationState]

class MoveState(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    MOVE_STATE_UNSPECIFIED: _ClassVar[MoveState]
    MOVE_STATE_PENDING: _ClassVar[MoveState]
    MOVE_STATE_DONE: _ClassVar[MoveState]
    MOVE_STATE_SKIPPED: _ClassVar[MoveState]

class BookieState(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    BOOKIE_STATE_UNSPECIFIED: _ClassVar[BookieState]
    BOOKIE_STATE_WRITABLE: _ClassVar[BookieState]
    BOOKIE_STATE_READ_ONLY: _ClassVar[BookieState]
    BOOKIE_STATE_DRAINING: _ClassVar[BookieState]
SHARD_STATE_UNSPECIFIED: ShardState
SHARD_STATE_OPEN: ShardState
SHARD_STATE_SEALED: ShardState
SHARD_STATE_DELETING: ShardState
LEDGER_STATE_UNSPECIFIED: LedgerState
LEDGER_STATE_OPEN: LedgerState
LEDGER_STATE_IN_RECOVERY: LedgerState
LEDGER_STATE_CLOSED: LedgerState
LEDGER_PURPOSE_UNSPECIFIED: LedgerPurpose
LEDGER_PURPOSE_DATA: LedgerPurpose
LEDGER_PURPOSE_CURSOR: LedgerPurpose
SUBSCRIPTION_TYPE_UNSPECIFIED: SubscriptionType
SUBSCRIPTION_TYPE_STREAM: SubscriptionType
SUBSCRIPTION_TYPE_QUEUE: SubscriptionType
COPY_REASON_UNSPECIFIED: CopyReason
COPY_REASON_UNREPLICATED: CopyReason
COPY_REASON_LOST: CopyReason
COPY_REASON_DRAINING: CopyReason
COPY_REASON_REBALANCE: CopyReason
COPY_REASON_SCRUB: CopyReason
GOAL_UNSPECIFIED: Goal
GOAL_BYTES: Goal
GOAL_SEGMENTS: Goal
GOAL_BROKERS: Goal
OPERATION_STATE_UNSPECIFIED: OperationState
OPERATION_STATE_RUNNING: OperationState
OPERATION_STATE_PAUSED: OperationState
OPERATION_STATE_CANCELLED: OperationState
OPERATION_STATE_DONE: OperationState
MOVE_STATE_UNSPECIFIED: MoveState
MOVE_STATE_PENDING: MoveState
MOVE_STATE_DONE: MoveState
MOVE_STATE_SKIPPED: MoveState
BOOKIE_STATE_UNSPECIFIED: BookieState
BOOKIE_STATE_WRITABLE: BookieState
BOOKIE_STATE_READ_ONLY: BookieState
BOOKIE_STATE_DRAINING: BookieState

class Owner(_message.Message):
    __slots__ = ("broker_id", "session")
    BROKER_ID_FIELD_NUMBER: _ClassVar[int]
    SESSION_FIELD_NUMBER: _ClassVar[int]
    broker_id: str
    session: int
    def __init__(self, broker_id: _Optional[str] = ..., session: _Optional[int] = ...) -> None: ...

class Segment(_message.Message):
    __slots__ = ("ledger_id", "first_offset", "first_time_us", "messages", "bytes")
    LEDGER_ID_FIELD_NUMBER: _ClassVar[int]
    FIRST_OFFSET_FIELD_NUMBER: _ClassVar[int]
    FIRST_TIME_US_FIELD_NUMBER: _ClassVar[int]
    MESSAGES_FIELD_NUMBER: _ClassVar[int]
    BYTES_FIELD_NUMBER: _ClassVar[int]
    ledger_id: int
    first_offset: int
    first_time_us: int
    messages: int
    bytes: int
    def __init__(self, ledger_id: _Optional[int] = ..., first_offset: _Optional[int] = ..., first_time_us: _Optional[int] = ..., messages: _Optional[int] = ..., bytes: _Optional[int] = ...) -> None: ...

class ShardRecord(_message.Message):
    __slots__ = ("shard_id", "topic", "state", "epoch", "owner", "first_slot", "last_slot", "parents", "start_offset", "segments", "first_page", "pages", "next_ledger", "cursor_ledger", "next_cursor", "inline_cursors", "created_us", "floor_time_us")
    SHARD_ID_FIELD_NUMBER: _ClassVar[int]
    TOPIC_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    OWNER_FIELD_NUMBER: _ClassVar[int]
    FIRST_SLOT_FIELD_NUMBER: _ClassVar[int]
    LAST_SLOT_FIELD_NUMBER: _ClassVar[int]
    PARENTS_FIELD_NUMBER: _ClassVar[int]
    START_OFFSET_FIELD_NUMBER: _ClassVar[int]
    SEGMENTS_FIELD_NUMBER: _ClassVar[int]
    FIRST_PAGE_FIELD_NUMBER: _ClassVar[int]
    PAGES_FIELD_NUMBER: _ClassVar[int]
    NEXT_LEDGER_FIELD_NUMBER: _ClassVar[int]
    CURSOR_LEDGER_FIELD_NUMBER: _ClassVar[int]
    NEXT_CURSOR_FIELD_NUMBER: _ClassVar[int]
    INLINE_CURSORS_FIELD_NUMBER: _ClassVar[int]
    CREATED_US_FIELD_NUMBER: _ClassVar[int]
    FLOOR_TIME_US_FIELD_NUMBER: _ClassVar[int]
    shard_id: int
    topic: str
    state: ShardState
    epoch: int
    owner: Owner
    first_slot: int
    last_slot: int
    parents: _containers.RepeatedScalarFieldContainer[int]
    start_offset: int
    segments: _containers.RepeatedCompositeFieldContainer[Segment]
    first_page: int
    pages: int
    next_ledger: int
    cursor_ledger: int
    next_cursor: int
    inline_cursors: bytes
    created_us: int
    floor_time_us: int
    def __init__(self, shard_id: _Optional[int] = ..., topic: _Optional[str] = ..., state: _Optional[_Union[ShardState, str]] = ..., epoch: _Optional[int] = ..., owner: _Optional[_Union[Owner, _Mapping]] = ..., first_slot: _Optional[int] = ..., last_slot: _Optional[int] = ..., parents: _Optional[_Iterable[int]] = ..., start_offset: _Optional[int] = ..., segments: _Optional[_Iterable[_Union[Segment, _Mapping]]] = ..., first_page: _Optional[int] = ..., pages: _Optional[int] = ..., next_ledger: _Optional[int] = ..., cursor_ledger: _Optional[int] = ..., next_cursor: _Optional[int] = ..., inline_cursors: _Optional[bytes] = ..., created_us: _Optional[int] = ..., floor_time_us: _Optional[int] = ...) -> None: ...

class SegmentPage(_message.Message):
    __slots__ = ("segments",)
    SEGMENTS_FIELD_NUMBER: _ClassVar[int]
    segments: _containers.RepeatedCompositeFieldContainer[Segment]
    def __init__(self, segments: _Optional[_Iterable[_Union[Segment, _Mapping]]] = ...) -> None: ...

class Fragment(_message.Message):
    __slots__ = ("first_entry", "bookies")
    FIRST_ENTRY_FIELD_NUMBER: _ClassVar[int]
    BOOKIES_FIELD_NUMBER: _ClassVar[int]
    first_entry: int
    bookies: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, first_entry: _Optional[int] = ..., bookies: _Optional[_Iterable[str]] = ...) -> None: ...

class LedgerRecord(_message.Message):
    __slots__ = ("ledger_id", "shard_id", "purpose", "state", "epoch", "token", "write_quorum", "ack_quorum", "fragments", "last_entry", "length", "created_us", "copy")
    LEDGER_ID_FIELD_NUMBER: _ClassVar[int]
    SHARD_ID_FIELD_NUMBER: _ClassVar[int]
    PURPOSE_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    TOKEN_FIELD_NUMBER: _ClassVar[int]
    WRITE_QUORUM_FIELD_NUMBER: _ClassVar[int]
    ACK_QUORUM_FIELD_NUMBER: _ClassVar[int]
    FRAGMENTS_FIELD_NUMBER: _ClassVar[int]
    LAST_ENTRY_FIELD_NUMBER: _ClassVar[int]
    LENGTH_FIELD_NUMBER: _ClassVar[int]
    CREATED_US_FIELD_NUMBER: _ClassVar[int]
    COPY_FIELD_NUMBER: _ClassVar[int]
    ledger_id: int
    shard_id: int
    purpose: LedgerPurpose
    state: LedgerState
    epoch: int
    token: bytes
    write_quorum: int
    ack_quorum: int
    fragments: _containers.RepeatedCompositeFieldContainer[Fragment]
    last_entry: int
    length: int
    created_us: int
    copy: CopyClaim
    def __init__(self, ledger_id: _Optional[int] = ..., shard_id: _Optional[int] = ..., purpose: _Optional[_Union[LedgerPurpose, str]] = ..., state: _Optional[_Union[LedgerState, str]] = ..., epoch: _Optional[int] = ..., token: _Optional[bytes] = ..., write_quorum: _Optional[int] = ..., ack_quorum: _Optional[int] = ..., fragments: _Optional[_Iterable[_Union[Fragment, _Mapping]]] = ..., last_entry: _Optional[int] = ..., length: _Optional[int] = ..., created_us: _Optional[int] = ..., copy: _Optional[_Union[CopyClaim, _Mapping]] = ...) -> None: ...

class CopyClaim(_message.Message):
    __slots__ = ("target", "replaces", "mark", "since_us")
    TARGET_FIELD_NUMBER: _ClassVar[int]
    REPLACES_FIELD_NUMBER: _ClassVar[int]
    MARK_FIELD_NUMBER: _ClassVar[int]
    SINCE_US_FIELD_NUMBER: _ClassVar[int]
    target: str
    replaces: str
    mark: bytes
    since_us: int
    def __init__(self, target: _Optional[str] = ..., replaces: _Optional[str] = ..., mark: _Optional[bytes] = ..., since_us: _Optional[int] = ...) -> None: ...

class CopyTask(_message.Message):
    __slots__ = ("ledger_id", "place", "target", "reason", "operation", "first_entry", "last_entry", "created_us", "problem")
    LEDGER_ID_FIELD_NUMBER: _ClassVar[int]
    PLACE_FIELD_NUMBER: _ClassVar[int]
    TARGET_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    OPERATION_FIELD_NUMBER: _ClassVar[int]
    FIRST_ENTRY_FIELD_NUMBER: _ClassVar[int]
    LAST_ENTRY_FIELD_NUMBER: _ClassVar[int]
    CREATED_US_FIELD_NUMBER: _ClassVar[int]
    PROBLEM_FIELD_NUMBER: _ClassVar[int]
    ledger_id: int
    place: str
    target: str
    reason: CopyReason
    operation: str
    first_entry: int
    last_entry: int
    created_us: int
    problem: str
    def __init__(self, ledger_id: _Optional[int] = ..., place: _Optional[str] = ..., target: _Optional[str] = ..., reason: _Optional[_Union[CopyReason, str]] = ..., operation: _Optional[str] = ..., first_entry: _Optional[int] = ..., last_entry: _Optional[int] = ..., created_us: _Optional[int] = ..., problem: _Optional[str] = ...) -> None: ...

class Drain(_message.Message):
    __slots__ = ("bookie_id", "since_us")
    BOOKIE_ID_FIELD_NUMBER: _ClassVar[int]
    SINCE_US_FIELD_NUMBER: _ClassVar[int]
    bookie_id: str
    since_us: int
    def __init__(self, bookie_id: _Optional[str] = ..., since_us: _Optional[int] = ...) -> None: ...

class Loss(_message.Message):
    __slots__ = ("bookie_id", "since_us", "given_up")
    BOOKIE_ID_FIELD_NUMBER: _ClassVar[int]
    SINCE_US_FIELD_NUMBER: _ClassVar[int]
    GIVEN_UP_FIELD_NUMBER: _ClassVar[int]
    bookie_id: str
    since_us: int
    given_up: bool
    def __init__(self, bookie_id: _Optional[str] = ..., since_us: _Optional[int] = ..., given_up: bool = ...) -> None: ...

class RepairSettings(_message.Message):
    __slots__ = ("enabled", "delay_s", "bytes_per_s")
    ENABLED_FIELD_NUMBER: _ClassVar[int]
    DELAY_S_FIELD_NUMBER: _ClassVar[int]
    BYTES_PER_S_FIELD_NUMBER: _ClassVar[int]
    enabled: bool
    delay_s: float
    bytes_per_s: int
    def __init__(self, enabled: bool = ..., delay_s: _Optional[float] = ..., bytes_per_s: _Optional[int] = ...) -> None: ...

class Operation(_message.Message):
    __slots__ = ("operation_id", "goal", "state", "bytes_per_s", "revision", "moves", "size_bytes", "pages", "mark", "rollback_of", "created_us", "updated_us", "ended_us", "moves_done", "bytes_done", "moves_skipped", "bytes_skipped", "rate", "problems")
    OPERATION_ID_FIELD_NUMBER: _ClassVar[int]
    GOAL_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    BYTES_PER_S_FIELD_NUMBER: _ClassVar[int]
    REVISION_FIELD_NUMBER: _ClassVar[int]
    MOVES_FIELD_NUMBER: _ClassVar[int]
    SIZE_BYTES_FIELD_NUMBER: _ClassVar[int]
    PAGES_FIELD_NUMBER: _ClassVar[int]
    MARK_FIELD_NUMBER: _ClassVar[int]
    ROLLBACK_OF_FIELD_NUMBER: _ClassVar[int]
    CREATED_US_FIELD_NUMBER: _ClassVar[int]
    UPDATED_US_FIELD_NUMBER: _ClassVar[int]
    ENDED_US_FIELD_NUMBER: _ClassVar[int]
    MOVES_DONE_FIELD_NUMBER: _ClassVar[int]
    BYTES_DONE_FIELD_NUMBER: _ClassVar[int]
    MOVES_SKIPPED_FIELD_NUMBER: _ClassVar[int]
    BYTES_SKIPPED_FIELD_NUMBER: _ClassVar[int]
    RATE_FIELD_NUMBER: _ClassVar[int]
    PROBLEMS_FIELD_NUMBER: _ClassVar[int]
    operation_id: str
    goal: Goal
    state: OperationState
    bytes_per_s: int
    revision: int
    moves: int
    size_bytes: int
    pages: int
    mark: bytes
    rollback_of: str
    created_us: int
    updated_us: int
    ended_us: int
    moves_done: int
    bytes_done: int
    moves_skipped: int
    bytes_skipped: int
    rate: int
    problems: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, operation_id: _Optional[str] = ..., goal: _Optional[_Union[Goal, str]] = ..., state: _Optional[_Union[OperationState, str]] = ..., bytes_per_s: _Optional[int] = ..., revision: _Optional[int] = ..., moves: _Optional[int] = ..., size_bytes: _Optional[int] = ..., pages: _Optional[int] = ..., mark: _Optional[bytes] = ..., rollback_of: _Optional[str] = ..., created_us: _Optional[int] = ..., updated_us: _Optional[int] = ..., ended_us: _Optional[int] = ..., moves_done: _Optional[int] = ..., bytes_done: _Optional[int] = ..., moves_skipped: _Optional[int] = ..., bytes_skipped: _Optional[int] = ..., rate: _Optional[int] = ..., problems: _Optional[_Iterable[str]] = ...) -> None: ...

class MovePage(_message.Message):
    __slots__ = ("bookies", "moves")
    BOOKIES_FIELD_NUMBER: _ClassVar[int]
    MOVES_FIELD_NUMBER: _ClassVar[int]
    bookies: _containers.RepeatedScalarFieldContainer[str]
    moves: _containers.RepeatedCompositeFieldContainer[Move]
    def __init__(self, bookies: _Optional[_Iterable[str]] = ..., moves: _Optional[_Iterable[_Union[Move, _Mapping]]] = ...) -> None: ...

class Move(_message.Message):
    __slots__ = ("ledger_id", "source", "target", "size_bytes", "state", "reason", "shard_id")
    LEDGER_ID_FIELD_NUMBER: _ClassVar[int]
    SOURCE_FIELD_NUMBER: _ClassVar[int]
    TARGET_FIELD_NUMBER: _ClassVar[int]
    SIZE_BYTES_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    SHARD_ID_FIELD_NUMBER: _ClassVar[int]
    ledger_id: int
    source: int
    target: int
    size_bytes: int
    state: MoveState
    reason: str
    shard_id: int
    def __init__(self, ledger_id: _Optional[int] = ..., source: _Optional[int] = ..., target: _Optional[int] = ..., size_bytes: _Optional[int] = ..., state: _Optional[_Union[MoveState, str]] = ..., reason: _Optional[str] = ..., shard_id: _Optional[int] = ...) -> None: ...

class LayoutShard(_message.Message):
    __slots__ = ("shard_id", "first_slot", "last_slot", "state", "parents")
    SHARD_ID_FIELD_NUMBER: _ClassVar[int]
    FIRST_SLOT_FIELD_NUMBER: _ClassVar[int]
    LAST_SLOT_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    PARENTS_FIELD_NUMBER: _ClassVar[int]
    shard_id: int
    first_slot: int
    last_slot: int
    state: ShardState
    parents: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, shard_id: _Optional[int] = ..., first_slot: _Optional[int] = ..., last_slot: _Optional[int] = ..., state: _Optional[_Union[ShardState, str]] = ..., parents: _Optional[_Iterable[int]] = ...) -> None: ...

class TopicRecord(_message.Message):
    __slots__ = ("topic", "layout_epoch", "shards", "created_us", "deleting")
    TOPIC_FIELD_NUMBER: _ClassVar[int]
    LAYOUT_EPOCH_FIELD_NUMBER: _ClassVar[int]
    SHARDS_FIELD_NUMBER: _ClassVar[int]
    CREATED_US_FIELD_NUMBER: _ClassVar[int]
    DELETING_FIELD_NUMBER: _ClassVar[int]
    topic: str
    layout_epoch: int
    shards: _containers.RepeatedCompositeFieldContainer[LayoutShard]
    created_us: int
    deleting: bool
    def __init__(self, topic: _Optional[str] = ..., layout_epoch: _Optional[int] = ..., shards: _Optional[_Iterable[_Union[LayoutShard, _Mapping]]] = ..., created_us: _Optional[int] = ..., deleting: bool = ...) -> None: ...

class SubscriptionRecord(_message.Message):
    __slots__ = ("topic", "name", "subscription_id", "type", "start", "created_us")
    TOPIC_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    SUBSCRIPTION_ID_FIELD_NUMBER: _ClassVar[int]
    TYPE_FIELD_NUMBER: _ClassVar[int]
    START_FIELD_NUMBER: _ClassVar[int]
    CREATED_US_FIELD_NUMBER: _ClassVar[int]
    topic: str
    name: str
    subscription_id: int
    type: SubscriptionType
    start: StartPosition
    created_us: int
    def __init__(self, topic: _Optional[str] = ..., name: _Optional[str] = ..., subscription_id: _Optional[int] = ..., type: _Optional[_Union[SubscriptionType, str]] = ..., start: _Optional[_Union[StartPosition, _Mapping]] = ..., created_us: _Optional[int] = ...) -> None: ...

class StartPosition(_message.Message):
    __slots__ = ("earliest", "offset", "time_us")
    EARLIEST_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    TIME_US_FIELD_NUMBER: _ClassVar[int]
    earliest: bool
    offset: int
    time_us: int
    def __init__(self, earliest: bool = ..., offset: _Optional[int] = ..., time_us: _Optional[int] = ...) -> None: ...

class ProducerRecord(_message.Message):
    __slots__ = ("producer_id", "epoch")
    PRODUCER_ID_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    producer_id: bytes
    epoch: int
    def __init__(self, producer_id: _Optional[bytes] = ..., epoch: _Optional[int] = ...) -> None: ...

class BookieRegistration(_message.Message):
    __slots__ = ("bookie_id", "address", "rack", "state", "disk_free_bytes", "disk_total_bytes", "ledger_floor", "version", "http_address")
    BOOKIE_ID_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    RACK_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    DISK_FREE_BYTES_FIELD_NUMBER: _ClassVar[int]
    DISK_TOTAL_BYTES_FIELD_NUMBER: _ClassVar[int]
    LEDGER_FLOOR_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    HTTP_ADDRESS_FIELD_NUMBER: _ClassVar[int]
    bookie_id: str
    address: str
    rack: str
    state: BookieState
    disk_free_bytes: int
    disk_total_bytes: int
    ledger_floor: int
    version: str
    http_address: str
    def __init__(self, bookie_id: _Optional[str] = ..., address: _Optional[str] = ..., rack: _Optional[str] = ..., state: _Optional[_Union[BookieState, str]] = ..., disk_free_bytes: _Optional[int] = ..., disk_total_bytes: _Optional[int] = ..., ledger_floor: _Optional[int] = ..., version: _Optional[str] = ..., http_address: _Optional[str] = ...) -> None: ...

class BrokerRegistration(_message.Message):
    __slots__ = ("broker_id", "address", "version", "http_address", "leaving")
    BROKER_ID_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    HTTP_ADDRESS_FIELD_NUMBER: _ClassVar[int]
    LEAVING_FIELD_NUMBER: _ClassVar[int]
    broker_id: str
    address: str
    version: str
    http_address: str
    leaving: bool
    def __init__(self, broker_id: _Optional[str] = ..., address: _Optional[str] = ..., version: _Optional[str] = ..., http_address: _Optional[str] = ..., leaving: bool = ...) -> None: ...

class Cookie(_message.Message):
    __slots__ = ("bookie_id", "instance_id", "cluster", "directory_id")
    BOOKIE_ID_FIELD_NUMBER: _ClassVar[int]
    INSTANCE_ID_FIELD_NUMBER: _ClassVar[int]
    CLUSTER_FIELD_NUMBER: _ClassVar[int]
    DIRECTORY_ID_FIELD_NUMBER: _ClassVar[int]
    bookie_id: str
    instance_id: str
    cluster: str
    directory_id: str
    def __init__(self, bookie_id: _Optional[str] = ..., instance_id: _Optional[str] = ..., cluster: _Optional[str] = ..., directory_id: _Optional[str] = ...) -> None: ...
