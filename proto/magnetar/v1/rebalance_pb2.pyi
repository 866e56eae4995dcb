from magnetar.v1 import metadata_pb2 as _metadata_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class RebalanceMove(_message.Message):
    __slots__ = ("ledger_id", "source", "target", "size_bytes", "state", "reason", "shard_id", "load")
    LEDGER_ID_FIELD_NUMBER: _ClassVar[int]
    SOURCE_FIELD_NUMBER: _ClassVar[int]
    TARGET_FIELD_NUMBER: _ClassVar[int]
    SIZE_BYTES_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    SHARD_ID_FIELD_NUMBER: _ClassVar[int]
    LOAD_FIELD_NUMBER: _ClassVar[int]
    ledger_id: int
    source: str
    target: str
    size_bytes: int
    state: _metadata_pb2.MoveState
    reason: str
    shard_id: int
    load: float
    def __init__(self, ledger_id: _Optional[int] = ..., source: _Optional[str] = ..., target: _Optional[str] = ..., size_bytes: _Optional[int] = ..., state: _Optional[_Union[_metadata_pb2.MoveState, str]] = ..., reason: _Optional[str] = ..., shard_id: _Optional[int] = ..., load: _Optional[float] = ...) -> None: ...

class BookieShare(_message.Message):
    __slots__ = ("bookie_id", "before", "after", "even")
    BOOKIE_ID_FIELD_NUMBER: _ClassVar[int]
    BEFORE_FIELD_NUMBER: _ClassVar[int]
    AFTER_FIELD_NUMBER: _ClassVar[int]
    EVEN_FIELD_NUMBER: _ClassVar[int]
    bookie_id: str
    before: int
    after: int
    even: float
    def __init__(self, bookie_id: _Optional[str] = ..., before: _Optional[int] = ..., after: _Optional[int] = ..., even: _Optional[float] = ...) -> None: ...

class BrokerBalance(_message.Message):
    __slots__ = ("broker_id", "shards_before", "shards_after", "load_before", "load_after")
    BROKER_ID_FIELD_NUMBER: _ClassVar[int]
    SHARDS_BEFORE_FIELD_NUMBER: _ClassVar[int]
    SHARDS_AFTER_FIELD_NUMBER: _ClassVar[int]
    LOAD_BEFORE_FIELD_NUMBER: _ClassVar[int]
    LOAD_AFTER_FIELD_NUMBER: _ClassVar[int]
    broker_id: str
    shards_before: int
    shards_after: int
    load_before: float
    load_after: float
    def __init__(self, broker_id: _Optional[str] = ..., shards_before: _Optional[int] = ..., shards_after: _Optional[int] = ..., load_before: _Optional[float] = ..., load_after: _Optional[float] = ...) -> None: ...

class PlanRebalanceRequest(_message.Message):
    __slots__ = ("goal", "max_bytes", "topic")
    GOAL_FIELD_NUMBER: _ClassVar[int]
    MAX_BYTES_FIELD_NUMBER: _ClassVar[int]
    TOPIC_FIELD_NUMBER: _ClassVar[int]
    goal: _metadata_pb2.Goal
    max_bytes: int
    topic: str
    def __init__(self, goal: _Optional[_Union[_metadata_pb2.Goal, str]] = ..., max_bytes: _Optional[int] = ..., topic: _Optional[str] = ...) -> None: ...

class PlanRebalanceResponse(_message.Message):
    __slots__ = ("revision", "goal", "moves", "bookies", "skew_before", "skew_after", "notes", "brokers")
    REVISION_FIELD_NUMBER: _ClassVar[int]
    GOAL_FIELD_NUMBER: _ClassVar[int]
    MOVES_FIELD_NUMBER: _ClassVar[int]
    BOOKIES_FIELD_NUMBER: _ClassVar[int]
    SKEW_BEFORE_FIELD_NUMBER: _ClassVar[int]
    SKEW_AFTER_FIELD_NUMBER: _ClassVar[int]
    NOTES_FIELD_NUMBER: _ClassVar[int]
    BROKERS_FIELD_NUMBER: _ClassVar[int]
    revision: int
    goal: _metadata_pb2.Goal
    moves: _containers.RepeatedCompositeFieldContainer[RebalanceMove]
    bookies: _containers.RepeatedCompositeFieldContainer[BookieShare]
    skew_before: float
    skew_after: float
    notes: _containers.RepeatedScalarFieldContainer[str]
    brokers: _containers.RepeatedCompositeFieldContainer[BrokerBalance]
    def __init__(self, revision: _Optional[int] = ..., goal: _Optional[_Union[_metadata_pb2.Goal, str]] = ..., moves: _Optional[_Iterable[_Union[RebalanceMove, _Mapping]]] = ..., bookies: _Optional[_Iterable[_Union[BookieShare, _Mapping]]] = ..., skew_before: _Optional[float] = ..., skew_after: _Optional[float] = ..., notes: _Optional[_Iterable[str]] = ..., brokers: _Optional[_Iterable[_Union[BrokerBalance, _Mapping]]] = ...) -> None: ...

class ApplyRebalanceRequest(_message.Message):
    __slots__ = ("revision", "goal", "moves", "bytes_per_s", "mark", "dry_run")
    REVISION_FIELD_NUMBER: _ClassVar[int]
    GOAL_FIELD_NUMBER: _ClassVar[int]
    MOVES_FIELD_NUMBER: _ClassVar[int]
    BYTES_PER_S_FIELD_NUMBER: _ClassVar[int]
    MARK_FIELD_NUMBER: _ClassVar[int]
    DRY_RUN_FIELD_NUMBER: _ClassVar[int]
    revision: int
    goal: _metadata_pb2.Goal
    moves: _containers.RepeatedCompositeFieldContainer[RebalanceMove]
    bytes_per_s: int
    mark: bytes
    dry_run: bool
    def __init__(self, revision: _Optional[int] = ..., goal: _Optional[_Union[_metadata_pb2.Goal, str]] = ..., moves: _Optional[_Iterable[_Union[RebalanceMove, _Mapping]]] = ..., bytes_per_s: _Optional[int] = ..., mark: _Optional[bytes] = ..., dry_run: bool = ...) -> None: ...

class ApplyRebalanceResponse(_message.Message):
    __slots__ = ("operation", "notes")
    OPERATION_FIELD_NUMBER: _ClassVar[int]
    NOTES_FIELD_NUMBER: _ClassVar[int]
    operation: RebalanceDescription
    notes: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, operation: _Optional[_Union[RebalanceDescription, _Mapping]] = ..., notes: _Optional[_Iterable[str]] = ...) -> None: ...

class RollBackRebalanceRequest(_message.Message):
    __slots__ = ("operation_id", "bytes_per_s", "mark", "dry_run")
    OPERATION_ID_FIELD_NUMBER: _ClassVar[int]
    BYTES_PER_S_FIELD_NUMBER: _ClassVar[int]
    MARK_FIELD_NUMBER: _ClassVar[int]
    DRY_RUN_FIELD_NUMBER: _ClassVar[int]
    operation_id: str
    bytes_per_s: int
    mark: bytes
    dry_run: bool
    def __init__(self, operation_id: _Optional[str] = ..., bytes_per_s: _Optional[int] = ..., mark: _Optional[bytes] = ..., dry_run: bool = ...) -> None: ...

class RollBackRebalanceResponse(_message.Message):
    __slots__ = ("operation", "notes")
    OPERATION_FIELD_NUMBER: _ClassVar[int]
    NOTES_FIELD_NUMBER: _ClassVar[int]
    operation: RebalanceDescription
    notes: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, operation: _Optional[_Union[RebalanceDescription, _Mapping]] = ..., notes: _Optional[_Iterable[str]] = ...) -> None: ...

class ChangeRebalanceRequest(_message.Message):
    __slots__ = ("operation_id", "state", "bytes_per_s", "dry_run")
    OPERATION_ID_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    BYTES_PER_S_FIELD_NUMBER: _ClassVar[int]
    DRY_RUN_FIELD_NUMBER: _ClassVar[int]
    operation_id: str
    state: _metadata_pb2.OperationState
    bytes_per_s: int
    dry_run: bool
    def __init__(self, operation_id: _Optional[str] = ..., state: _Optional[_Union[_metadata_pb2.OperationState, str]] = ..., bytes_per_s: _Optional[int] = ..., dry_run: bool = ...) -> None: ...

class ChangeRebalanceResponse(_message.Message):
    __slots__ = ("operation",)
    OPERATION_FIELD_NUMBER: _ClassVar[int]
    operation: _metadata_pb2.Operation
    def __init__(self, operation: _Optional[_Union[_metadata_pb2.Operation, _Mapping]] = ...) -> None: ...

class ListRebalancesRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ListRebalancesResponse(_message.Message):
    __slots__ = ("operations",)
    OPERATIONS_FIELD_NUMBER: _ClassVar[int]
    operations: _containers.RepeatedCompositeFieldContainer[_metadata_pb2.Operation]
    def __init__(self, operations: _Optional[_Iterable[_Union[_metadata_pb2.Operation, _Mapping]]] = ...) -> None: ...

class DescribeRebalanceRequest(_message.Message):
    __slots__ = ("operation_id",)
    OPERATION_ID_FIELD_NUMBER: _ClassVar[int]
    operation_id: str
    def __init__(self, operation_id: _Optional[str] = ...) -> None: ...

class DescribeRebalanceResponse(_message.Message):
    __slots__ = ("operation",)
    OPERATION_FIELD_NUMBER: _ClassVar[int]
    operation: RebalanceDescription
    def __init__(self, operation: _Optional[_Union[RebalanceDescription, _Mapping]] = ...) -> None: ...

class RebalanceDescription(_message.Message):
    __slots__ = ("operation", "bookies", "skipped", "brokers")
    OPERATION_FIELD_NUMBER: _ClassVar[int]
    BOOKIES_FIELD_NUMBER: _ClassVar[int]
    SKIPPED_FIELD_NUMBER: _ClassVar[int]
    BROKERS_FIELD_NUMBER: _ClassVar[int]
    operation: _metadata_pb2.Operation
    bookies: _containers.RepeatedCompositeFieldContainer[BookieTraffic]
    skipped: _containers.RepeatedCompositeFieldContainer[RebalanceMove]
    brokers: _containers.RepeatedCompositeFieldContainer[BrokerTraffic]
    def __init__(self, operation: _Optional[_Union[_metadata_pb2.Operation, _Mapping]] = ..., bookies: _Optional[_Iterable[_Union[BookieTraffic, _Mapping]]] = ..., skipped: _Optional[_Iterable[_Union[RebalanceMove, _Mapping]]] = ..., brokers: _Optional[_Iterable[_Union[BrokerTraffic, _Mapping]]] = ...) -> None: ...

class BrokerTraffic(_message.Message):
    __slots__ = ("broker_id", "shards_in", "shards_in_done", "shards_out", "shards_out_done")
    BROKER_ID_FIELD_NUMBER: _ClassVar[int]
    SHARDS_IN_FIELD_NUMBER: _ClassVar[int]
    SHARDS_IN_DONE_FIELD_NUMBER: _ClassVar[int]
    SHARDS_OUT_FIELD_NUMBER: _ClassVar[int]
    SHARDS_OUT_DONE_FIELD_NUMBER: _ClassVar[int]
    broker_id: str
    shards_in: int
    shards_in_done: int
    shards_out: int
    shards_out_done: int
    def __init__(self, broker_id: _Optional[str] = ..., shards_in: _Optional[int] = ..., shards_in_done: _Optional[int] = ..., shards_out: _Optional[int] = ..., shards_out_done: _Optional[int] = ...) -> None: ...

class BookieTraffic(_message.Message):
    __slots__ = ("bookie_id", "bytes_in", "bytes_in_done", "bytes_out", "bytes_out_done")
    BOOKIE_ID_FIELD_NUMBER: _ClassVar[int]
    BYTES_IN_FIELD_NUMBER: _ClassVar[int]
    BYTES_IN_DONE_FIELD_NUMBER: _ClassVar[int]
    BYTES_OUT_FIELD_NUMBER: _ClassVar[int]
    BYTES_OUT_DONE_FIELD_NUMBER: _ClassVar[int]
    bookie_id: str
    bytes_in: int
    bytes_in_done: int
    bytes_out: int
    bytes_out_done: int
    def __init__(self, bookie_id: _Optional[str] = ..., bytes_in: _Optional[int] = ..., bytes_in_done: _Optional[int] = ..., bytes_out: _Optional[int] = ..., bytes_out_done: _Optional[int] = ...) -> None: ...

class ListRebalanceMovesRequest(_message.Message):
    __slots__ = ("operation_id", "skip", "limit")
    OPERATION_ID_FIELD_NUMBER: _ClassVar[int]
    SKIP_FIELD_NUMBER: _ClassVar[int]
    LIMIT_FIELD_NUMBER: _ClassVar[int]
    operation_id: str
    skip: int
    limit: int
    def __init__(self, operation_id: _Optional[str] = ..., skip: _Optional[int] = ..., limit: _Optional[int] = ...) -> None: ...

class ListRebalanceMovesResponse(_message.Message):
    __slots__ = ("moves", "more")
    MOVES_FIELD_NUMBER: _ClassVar[int]
    MORE_FIELD_NUMBER: _ClassVar[int]
    moves: _containers.RepeatedCompositeFieldContainer[RebalanceMove]
    more: bool
    def __init__(self, moves: _Optional[_Iterable[_Union[RebalanceMove, _Mapping]]] = ..., more: bool = ...) -> None: ...

class VerifyLedgerRequest(_message.Message):
    __slots__ = ("ledger_id", "first_entry")
    LEDGER_ID_FIELD_NUMBER: _ClassVar[int]
    FIRST_ENTRY_FIELD_NUMBER: _ClassVar[int]
    ledger_id: int
    first_entry: int
    def __init__(self, ledger_id: _Optional[int] = ..., first_entry: _Optional[int] = ...) -> None: ...

class VerifyLedgerResponse(_message.Message):
    __slots__ = ("next_entry", "entries", "copies", "bytes", "bookies", "problems")
    NEXT_ENTRY_FIELD_NUMBER: _ClassVar[int]
    ENTRIES_FIELD_NUMBER: _ClassVar[int]
    COPIES_FIELD_NUMBER: _ClassVar[int]
    BYTES_FIELD_NUMBER: _ClassVar[int]
    BOOKIES_FIELD_NUMBER: _ClassVar[int]
    PROBLEMS_FIELD_NUMBER: _ClassVar[int]
    next_entry: int
    entries: int
    copies: int
    bytes: int
    bookies: _containers.RepeatedScalarFieldContainer[str]
    problems: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, next_entry: _Optional[int] = ..., entries: _Optional[int] = ..., copies: _Optional[int] = ..., bytes: _Optional[int] = ..., bookies: _Optional[_Iterable[str]] = ..., problems: _Optional[_Iterable[str]] = ...) -> None: ...
