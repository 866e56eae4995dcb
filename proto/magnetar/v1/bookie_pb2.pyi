from magnetar.v1 import common_pb2 as _common_pb2
from magnetar.v1 import metadata_pb2 as _metadata_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class AddStatus(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    ADD_STATUS_UNSPECIFIED: _ClassVar[AddStatus]
    ADD_STATUS_OK: _ClassVar[AddStatus]
    ADD_STATUS_FENCED: _ClassVar[AddStatus]
    ADD_STATUS_STALE_EPOCH: _ClassVar[AddStatus]
    ADD_STATUS_READ_ONLY: _ClassVar[AddStatus]
    ADD_STATUS_REFUSED: _ClassVar[AddStatus]
    ADD_STATUS_BUSY: _ClassVar[AddStatus]
    ADD_STATUS_CONFLICT: _ClassVar[AddStatus]
    ADD_STATUS_WRONG_TOKEN: _ClassVar[AddStatus]
    ADD_STATUS_MALFORMED: _ClassVar[AddStatus]
    ADD_STATUS_IO_ERROR: _ClassVar[AddStatus]

class EntryOutcome(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    ENTRY_OUTCOME_UNSPECIFIED: _ClassVar[EntryOutcome]
    ENTRY_OUTCOME_HAVE: _ClassVar[EntryOutcome]
    ENTRY_OUTCOME_PROVABLY_NOT: _ClassVar[EntryOutcome]
    ENTRY_OUTCOME_UNKNOWN: _ClassVar[EntryOutcome]
ADD_STATUS_UNSPECIFIED: AddStatus
ADD_STATUS_OK: AddStatus
ADD_STATUS_FENCED: AddStatus
ADD_STATUS_STALE_EPOCH: AddStatus
ADD_STATUS_READ_ONLY: AddStatus
ADD_STATUS_REFUSED: AddStatus
ADD_STATUS_BUSY: AddStatus
ADD_STATUS_CONFLICT: AddStatus
ADD_STATUS_WRONG_TOKEN: AddStatus
ADD_STATUS_MALFORMED: AddStatus
ADD_STATUS_IO_ERROR: AddStatus
ENTRY_OUTCOME_UNSPECIFIED: EntryOutcome
ENTRY_OUTCOME_HAVE: EntryOutcome
ENTRY_OUTCOME_PROVABLY_NOT: EntryOutcome
ENTRY_OUTCOME_UNKNOWN: EntryOutcome

class AddEntriesRequest(_message.Message):
    __slots__ = ("hello", "groups")
    HELLO_FIELD_NUMBER: _ClassVar[int]
    GROUPS_FIELD_NUMBER: _ClassVar[int]
    hello: _common_pb2.Hello
    groups: _containers.RepeatedCompositeFieldContainer[AddGroup]
    def __init__(self, hello: _Optional[_Union[_common_pb2.Hello, _Mapping]] = ..., groups: _Optional[_Iterable[_Union[AddGroup, _Mapping]]] = ...) -> None: ...

class AddGroup(_message.Message):
    __slots__ = ("request_id", "ledger_id", "epoch", "token", "recovery", "entries")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    LEDGER_ID_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    TOKEN_FIELD_NUMBER: _ClassVar[int]
    RECOVERY_FIELD_NUMBER: _ClassVar[int]
    ENTRIES_FIELD_NUMBER: _ClassVar[int]
    request_id: int
    ledger_id: int
    epoch: int
    token: bytes
    recovery: bool
    entries: _containers.RepeatedScalarFieldContainer[bytes]
    def __init__(self, request_id: _Optional[int] = ..., ledger_id: _Optional[int] = ..., epoch: _Optional[int] = ..., token: _Optional[bytes] = ..., recovery: bool = ..., entries: _Optional[_Iterable[bytes]] = ...) -> None: ...

class AddEntriesResponse(_message.Message):
    __slots__ = ("hello", "results", "error", "stored")
    HELLO_FIELD_NUMBER: _ClassVar[int]
    RESULTS_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    STORED_FIELD_NUMBER: _ClassVar[int]
    hello: _common_pb2.HelloReply
    results: _containers.RepeatedCompositeFieldContainer[AddResult]
    error: _common_pb2.Error
    stored: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, hello: _Optional[_Union[_common_pb2.HelloReply, _Mapping]] = ..., results: _Optional[_Iterable[_Union[AddResult, _Mapping]]] = ..., error: _Optional[_Union[_common_pb2.Error, _Mapping]] = ..., stored: _Optional[_Iterable[int]] = ...) -> None: ...

class AddResult(_message.Message):
    __slots__ = ("request_id", "status", "message")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    STATUS_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    request_id: int
    status: AddStatus
    message: str
    def __init__(self, request_id: _Optional[int] = ..., status: _Optional[_Union[AddStatus, str]] = ..., message: _Optional[str] = ...) -> None: ...

class ReadEntriesRequest(_message.Message):
    __slots__ = ("hello", "groups")
    HELLO_FIELD_NUMBER: _ClassVar[int]
    GROUPS_FIELD_NUMBER: _ClassVar[int]
    hello: _common_pb2.Hello
    groups: _containers.RepeatedCompositeFieldContainer[ReadGroup]
    def __init__(self, hello: _Optional[_Union[_common_pb2.Hello, _Mapping]] = ..., groups: _Optional[_Iterable[_Union[ReadGroup, _Mapping]]] = ...) -> None: ...

class ReadGroup(_message.Message):
    __slots__ = ("request_id", "ledger_id", "epoch", "token", "fence", "first_entry", "last_entry", "max_bytes", "headers_only")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    LEDGER_ID_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    TOKEN_FIELD_NUMBER: _ClassVar[int]
    FENCE_FIELD_NUMBER: _ClassVar[int]
    FIRST_ENTRY_FIELD_NUMBER: _ClassVar[int]
    LAST_ENTRY_FIELD_NUMBER: _ClassVar[int]
    MAX_BYTES_FIELD_NUMBER: _ClassVar[int]
    HEADERS_ONLY_FIELD_NUMBER: _ClassVar[int]
    request_id: int
    ledger_id: int
    epoch: int
    token: bytes
    fence: bool
    first_entry: int
    last_entry: int
    max_bytes: int
    headers_only: bool
    def __init__(self, request_id: _Optional[int] = ..., ledger_id: _Optional[int] = ..., epoch: _Optional[int] = ..., token: _Optional[bytes] = ..., fence: bool = ..., first_entry: _Optional[int] = ..., last_entry: _Optional[int] = ..., max_bytes: _Optional[int] = ..., headers_only: bool = ...) -> None: ...

class ReadEntriesResponse(_message.Message):
    __slots__ = ("hello", "results", "error")
    HELLO_FIELD_NUMBER: _ClassVar[int]
    RESULTS_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    hello: _common_pb2.HelloReply
    results: _containers.RepeatedCompositeFieldContainer[ReadResult]
    error: _common_pb2.Error
    def __init__(self, hello: _Optional[_Union[_common_pb2.HelloReply, _Mapping]] = ..., results: _Optional[_Iterable[_Union[ReadResult, _Mapping]]] = ..., error: _Optional[_Union[_common_pb2.Error, _Mapping]] = ...) -> None: ...

class ReadResult(_message.Message):
    __slots__ = ("request_id", "outcomes", "entries", "message")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    OUTCOMES_FIELD_NUMBER: _ClassVar[int]
    ENTRIES_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    request_id: int
    outcomes: _containers.RepeatedScalarFieldContainer[EntryOutcome]
    entries: _containers.RepeatedScalarFieldContainer[bytes]
    message: str
    def __init__(self, request_id: _Optional[int] = ..., outcomes: _Optional[_Iterable[_Union[EntryOutcome, str]]] = ..., entries: _Optional[_Iterable[bytes]] = ..., message: _Optional[str] = ...) -> None: ...

class ReadLacRequest(_message.Message):
    __slots__ = ("hello", "queries")
    HELLO_FIELD_NUMBER: _ClassVar[int]
    QUERIES_FIELD_NUMBER: _ClassVar[int]
    hello: _common_pb2.Hello
    queries: _containers.RepeatedCompositeFieldContainer[LacQuery]
    def __init__(self, hello: _Optional[_Union[_common_pb2.Hello, _Mapping]] = ..., queries: _Optional[_Iterable[_Union[LacQuery, _Mapping]]] = ...) -> None: ...

class LacQuery(_message.Message):
    __slots__ = ("request_id", "ledger_id", "epoch", "token", "fence")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    LEDGER_ID_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    TOKEN_FIELD_NUMBER: _ClassVar[int]
    FENCE_FIELD_NUMBER: _ClassVar[int]
    request_id: int
    ledger_id: int
    epoch: int
    token: bytes
    fence: bool
    def __init__(self, request_id: _Optional[int] = ..., ledger_id: _Optional[int] = ..., epoch: _Optional[int] = ..., token: _Optional[bytes] = ..., fence: bool = ...) -> None: ...

class ReadLacResponse(_message.Message):
    __slots__ = ("hello", "results", "error")
    HELLO_FIELD_NUMBER: _ClassVar[int]
    RESULTS_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    hello: _common_pb2.HelloReply
    results: _containers.RepeatedCompositeFieldContainer[LacResult]
    error: _common_pb2.Error
    def __init__(self, hello: _Optional[_Union[_common_pb2.HelloReply, _Mapping]] = ..., results: _Optional[_Iterable[_Union[LacResult, _Mapping]]] = ..., error: _Optional[_Union[_common_pb2.Error, _Mapping]] = ...) -> None: ...

class LacResult(_message.Message):
    __slots__ = ("request_id", "outcome", "lac", "last_entry", "fenced", "epoch", "message")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    OUTCOME_FIELD_NUMBER: _ClassVar[int]
    LAC_FIELD_NUMBER: _ClassVar[int]
    LAST_ENTRY_FIELD_NUMBER: _ClassVar[int]
    FENCED_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    request_id: int
    outcome: EntryOutcome
    lac: int
    last_entry: int
    fenced: bool
    epoch: int
    message: str
    def __init__(self, request_id: _Optional[int] = ..., outcome: _Optional[_Union[EntryOutcome, str]] = ..., lac: _Optional[int] = ..., last_entry: _Optional[int] = ..., fenced: bool = ..., epoch: _Optional[int] = ..., message: _Optional[str] = ...) -> None: ...

class ListLedgersRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ListLedgersResponse(_message.Message):
    __slots__ = ("ledgers",)
    LEDGERS_FIELD_NUMBER: _ClassVar[int]
    ledgers: _containers.RepeatedCompositeFieldContainer[StoredLedger]
    def __init__(self, ledgers: _Optional[_Iterable[_Union[StoredLedger, _Mapping]]] = ...) -> None: ...

class StoredLedger(_message.Message):
    __slots__ = ("ledger_id", "fenced", "limbo", "epoch")
    LEDGER_ID_FIELD_NUMBER: _ClassVar[int]
    FENCED_FIELD_NUMBER: _ClassVar[int]
    LIMBO_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    ledger_id: int
    fenced: bool
    limbo: bool
    epoch: int
    def __init__(self, ledger_id: _Optional[int] = ..., fenced: bool = ..., limbo: bool = ..., epoch: _Optional[int] = ...) -> None: ...

class StatusRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class StatusResponse(_message.Message):
    __slots__ = ("bookie_id", "state", "disk_free_bytes", "disk_total_bytes", "stored_bytes", "garbage_bytes", "ledgers", "limbo")
    BOOKIE_ID_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    DISK_FREE_BYTES_FIELD_NUMBER: _ClassVar[int]
    DISK_TOTAL_BYTES_FIELD_NUMBER: _ClassVar[int]
    STORED_BYTES_FIELD_NUMBER: _ClassVar[int]
    GARBAGE_BYTES_FIELD_NUMBER: _ClassVar[int]
    LEDGERS_FIELD_NUMBER: _ClassVar[int]
    LIMBO_FIELD_NUMBER: _ClassVar[int]
    bookie_id: str
    state: _metadata_pb2.BookieState
    disk_free_bytes: int
    disk_total_bytes: int
    stored_bytes: int
    garbage_bytes: int
    ledgers: int
    limbo: bool
    def __init__(self, bookie_id: _Optional[str] = ..., state: _Optional[_Union[_metadata_pb2.BookieState, str]] = ..., disk_free_bytes: _Optional[int] = ..., disk_total_bytes: _Optional[int] = ..., stored_bytes: _Optional[int] = ..., garbage_bytes: _Optional[int] = ..., ledgers: _Optional[int] = ..., limbo: bool = ...) -> None: ...
