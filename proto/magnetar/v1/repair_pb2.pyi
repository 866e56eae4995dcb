from magnetar.v1 import metadata_pb2 as _metadata_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class DrainBookieRequest(_message.Message):
    __slots__ = ("bookie_id", "dry_run")
    BOOKIE_ID_FIELD_NUMBER: _ClassVar[int]
    DRY_RUN_FIELD_NUMBER: _ClassVar[int]
    bookie_id: str
    dry_run: bool
    def __init__(self, bookie_id: _Optional[str] = ..., dry_run: bool = ...) -> None: ...

class DrainBookieResponse(_message.Message):
    __slots__ = ("changed", "ledgers", "warning")
    CHANGED_FIELD_NUMBER: _ClassVar[int]
    LEDGERS_FIELD_NUMBER: _ClassVar[int]
    WARNING_FIELD_NUMBER: _ClassVar[int]
    changed: bool
    ledgers: int
    warning: str
    def __init__(self, changed: bool = ..., ledgers: _Optional[int] = ..., warning: _Optional[str] = ...) -> None: ...

class UndrainBookieRequest(_message.Message):
    __slots__ = ("bookie_id", "dry_run")
    BOOKIE_ID_FIELD_NUMBER: _ClassVar[int]
    DRY_RUN_FIELD_NUMBER: _ClassVar[int]
    bookie_id: str
    dry_run: bool
    def __init__(self, bookie_id: _Optional[str] = ..., dry_run: bool = ...) -> None: ...

class UndrainBookieResponse(_message.Message):
    __slots__ = ("changed", "ledgers")
    CHANGED_FIELD_NUMBER: _ClassVar[int]
    LEDGERS_FIELD_NUMBER: _ClassVar[int]
    changed: bool
    ledgers: int
    def __init__(self, changed: bool = ..., ledgers: _Optional[int] = ...) -> None: ...

class DecommissionBookieRequest(_message.Message):
    __slots__ = ("bookie_id", "dry_run")
    BOOKIE_ID_FIELD_NUMBER: _ClassVar[int]
    DRY_RUN_FIELD_NUMBER: _ClassVar[int]
    bookie_id: str
    dry_run: bool
    def __init__(self, bookie_id: _Optional[str] = ..., dry_run: bool = ...) -> None: ...

class DecommissionBookieResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ConfigureRepairRequest(_message.Message):
    __slots__ = ("enabled", "delay_s", "bytes_per_s", "dry_run")
    ENABLED_FIELD_NUMBER: _ClassVar[int]
    DELAY_S_FIELD_NUMBER: _ClassVar[int]
    BYTES_PER_S_FIELD_NUMBER: _ClassVar[int]
    DRY_RUN_FIELD_NUMBER: _ClassVar[int]
    enabled: bool
    delay_s: float
    bytes_per_s: int
    dry_run: bool
    def __init__(self, enabled: bool = ..., delay_s: _Optional[float] = ..., bytes_per_s: _Optional[int] = ..., dry_run: bool = ...) -> None: ...

class ConfigureRepairResponse(_message.Message):
    __slots__ = ("settings", "copies", "problems", "lost", "stalled_bookies")
    class StalledBookiesEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    SETTINGS_FIELD_NUMBER: _ClassVar[int]
    COPIES_FIELD_NUMBER: _ClassVar[int]
    PROBLEMS_FIELD_NUMBER: _ClassVar[int]
    LOST_FIELD_NUMBER: _ClassVar[int]
    STALLED_BOOKIES_FIELD_NUMBER: _ClassVar[int]
    settings: _metadata_pb2.RepairSettings
    copies: _containers.RepeatedCompositeFieldContainer[WaitingCopies]
    problems: _containers.RepeatedScalarFieldContainer[str]
    lost: _containers.RepeatedCompositeFieldContainer[_metadata_pb2.Loss]
    stalled_bookies: _containers.ScalarMap[str, str]
    def __init__(self, settings: _Optional[_Union[_metadata_pb2.RepairSettings, _Mapping]] = ..., copies: _Optional[_Iterable[_Union[WaitingCopies, _Mapping]]] = ..., problems: _Optional[_Iterable[str]] = ..., lost: _Optional[_Iterable[_Union[_metadata_pb2.Loss, _Mapping]]] = ..., stalled_bookies: _Optional[_Mapping[str, str]] = ...) -> None: ...

class WaitingCopies(_message.Message):
    __slots__ = ("reason", "copies", "stalled")
    REASON_FIELD_NUMBER: _ClassVar[int]
    COPIES_FIELD_NUMBER: _ClassVar[int]
    STALLED_FIELD_NUMBER: _ClassVar[int]
    reason: _metadata_pb2.CopyReason
    copies: int
    stalled: int
    def __init__(self, reason: _Optional[_Union[_metadata_pb2.CopyReason, str]] = ..., copies: _Optional[int] = ..., stalled: _Optional[int] = ...) -> None: ...
