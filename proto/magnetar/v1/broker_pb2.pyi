from magnetar.v1 import common_pb2 as _common_pb2
from magnetar.v1 import metadata_pb2 as _metadata_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Layout(_message.Message):
    __slots__ = ("topic", "epoch", "shards")
    TOPIC_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    SHARDS_FIELD_NUMBER: _ClassVar[int]
    topic: str
    epoch: int
    shards: _containers.RepeatedCompositeFieldContainer[ShardLocation]
    def __init__(self, topic: _Optional[str] = ..., epoch: _Optional[int] = ..., shards: _Optional[_Iterable[_Union[ShardLocation, _Mapping]]] = ...) -> None: ...

class ShardLocation(_message.Message):
    __slots__ = ("shard_id", "first_slot", "last_slot", "state", "parents", "owner")
    SHARD_ID_FIELD_NUMBER: _ClassVar[int]
    FIRST_SLOT_FIELD_NUMBER: _ClassVar[int]
    LAST_SLOT_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    PARENTS_FIELD_NUMBER: _ClassVar[int]
    OWNER_FIELD_NUMBER: _ClassVar[int]
    shard_id: int
    first_slot: int
    last_slot: int
    state: _metadata_pb2.ShardState
    parents: _containers.RepeatedScalarFieldContainer[int]
    owner: str
    def __init__(self, shard_id: _Optional[int] = ..., first_slot: _Optional[int] = ..., last_slot: _Optional[int] = ..., state: _Optional[_Union[_metadata_pb2.ShardState, str]] = ..., parents: _Optional[_Iterable[int]] = ..., owner: _Optional[str] = ...) -> None: ...

class ResolveRequest(_message.Message):
    __slots__ = ("topic", "create")
    TOPIC_FIELD_NUMBER: _ClassVar[int]
    CREATE_FIELD_NUMBER: _ClassVar[int]
    topic: str
    create: bool
    def __init__(self, topic: _Optional[str] = ..., create: bool = ...) -> None: ...

class ResolveResponse(_message.Message):
    __slots__ = ("layout", "brokers")
    LAYOUT_FIELD_NUMBER: _ClassVar[int]
    BROKERS_FIELD_NUMBER: _ClassVar[int]
    layout: Layout
    brokers: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, layout: _Optional[_Union[Layout, _Mapping]] = ..., brokers: _Optional[_Iterable[str]] = ...) -> None: ...

class WatchLayoutRequest(_message.Message):
    __slots__ = ("topic",)
    TOPIC_FIELD_NUMBER: _ClassVar[int]
    topic: str
    def __init__(self, topic: _Optional[str] = ...) -> None: ...

class WatchLayoutResponse(_message.Message):
    __slots__ = ("layout", "brokers")
    LAYOUT_FIELD_NUMBER: _ClassVar[int]
    BROKERS_FIELD_NUMBER: _ClassVar[int]
    layout: Layout
    brokers: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, layout: _Optional[_Union[Layout, _Mapping]] = ..., brokers: _Optional[_Iterable[str]] = ...) -> None: ...

class RegisterProducerRequest(_message.Message):
    __slots__ = ("topic", "name", "newest_known")
    TOPIC_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    NEWEST_KNOWN_FIELD_NUMBER: _ClassVar[int]
    topic: str
    name: str
    newest_known: int
    def __init__(self, topic: _Optional[str] = ..., name: _Optional[str] = ..., newest_known: _Optional[int] = ...) -> None: ...

class RegisterProducerResponse(_message.Message):
    __slots__ = ("producer_id", "epoch", "outdated")
    PRODUCER_ID_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    OUTDATED_FIELD_NUMBER: _ClassVar[int]
    producer_id: bytes
    epoch: int
    outdated: bool
    def __init__(self, producer_id: _Optional[bytes] = ..., epoch: _Optional[int] = ..., outdated: bool = ...) -> None: ...

class ProduceRequest(_message.Message):
    __slots__ = ("hello", "open", "batches", "close")
    HELLO_FIELD_NUMBER: _ClassVar[int]
    OPEN_FIELD_NUMBER: _ClassVar[int]
    BATCHES_FIELD_NUMBER: _ClassVar[int]
    CLOSE_FIELD_NUMBER: _ClassVar[int]
    hello: _common_pb2.Hello
    open: OpenProducer
    batches: ProduceBatches
    close: CloseProducer
    def __init__(self, hello: _Optional[_Union[_common_pb2.Hello, _Mapping]] = ..., open: _Optional[_Union[OpenProducer, _Mapping]] = ..., batches: _Optional[_Union[ProduceBatches, _Mapping]] = ..., close: _Optional[_Union[CloseProducer, _Mapping]] = ...) -> None: ...

class OpenProducer(_message.Message):
    __slots__ = ("handle", "topic", "shard_id", "producer_id", "epoch", "name")
    HANDLE_FIELD_NUMBER: _ClassVar[int]
    TOPIC_FIELD_NUMBER: _ClassVar[int]
    SHARD_ID_FIELD_NUMBER: _ClassVar[int]
    PRODUCER_ID_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    handle: int
    topic: str
    shard_id: int
    producer_id: bytes
    epoch: int
    name: str
    def __init__(self, handle: _Optional[int] = ..., topic: _Optional[str] = ..., shard_id: _Optional[int] = ..., producer_id: _Optional[bytes] = ..., epoch: _Optional[int] = ..., name: _Optional[str] = ...) -> None: ...

class ProduceBatches(_message.Message):
    __slots__ = ("batches",)
    BATCHES_FIELD_NUMBER: _ClassVar[int]
    batches: _containers.RepeatedCompositeFieldContainer[ProduceBatch]
    def __init__(self, batches: _Optional[_Iterable[_Union[ProduceBatch, _Mapping]]] = ...) -> None: ...

class ProduceBatch(_message.Message):
    __slots__ = ("handle", "batch")
    HANDLE_FIELD_NUMBER: _ClassVar[int]
    BATCH_FIELD_NUMBER: _ClassVar[int]
    handle: int
    batch: bytes
    def __init__(self, handle: _Optional[int] = ..., batch: _Optional[bytes] = ...) -> None: ...

class CloseProducer(_message.Message):
    __slots__ = ("handle",)
    HANDLE_FIELD_NUMBER: _ClassVar[int]
    handle: int
    def __init__(self, handle: _Optional[int] = ...) -> None: ...

class ProduceResponse(_message.Message):
    __slots__ = ("hello", "opened", "stored", "errors", "windows", "error")
    HELLO_FIELD_NUMBER: _ClassVar[int]
    OPENED_FIELD_NUMBER: _ClassVar[int]
    STORED_FIELD_NUMBER: _ClassVar[int]
    ERRORS_FIELD_NUMBER: _ClassVar[int]
    WINDOWS_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    hello: _common_pb2.HelloReply
    opened: _containers.RepeatedCompositeFieldContainer[ProducerOpened]
    stored: _containers.RepeatedCompositeFieldContainer[BatchStored]
    errors: _containers.RepeatedCompositeFieldContainer[ProducerError]
    windows: _containers.RepeatedCompositeFieldContainer[ProducerWindow]
    error: _common_pb2.Error
    def __init__(self, hello: _Optional[_Union[_common_pb2.HelloReply, _Mapping]] = ..., opened: _Optional[_Iterable[_Union[ProducerOpened, _Mapping]]] = ..., stored: _Optional[_Iterable[_Union[BatchStored, _Mapping]]] = ..., errors: _Optional[_Iterable[_Union[ProducerError, _Mapping]]] = ..., windows: _Optional[_Iterable[_Union[ProducerWindow, _Mapping]]] = ..., error: _Optional[_Union[_common_pb2.Error, _Mapping]] = ...) -> None: ...

class ProducerOpened(_message.Message):
    __slots__ = ("handle", "last_sequence", "recent", "window_bytes", "parents", "stored_epoch")
    HANDLE_FIELD_NUMBER: _ClassVar[int]
    LAST_SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    RECENT_FIELD_NUMBER: _ClassVar[int]
    WINDOW_BYTES_FIELD_NUMBER: _ClassVar[int]
    PARENTS_FIELD_NUMBER: _ClassVar[int]
    STORED_EPOCH_FIELD_NUMBER: _ClassVar[int]
    handle: int
    last_sequence: int
    recent: _containers.RepeatedCompositeFieldContainer[BatchStored]
    window_bytes: int
    parents: _containers.RepeatedCompositeFieldContainer[ParentSequence]
    stored_epoch: int
    def __init__(self, handle: _Optional[int] = ..., last_sequence: _Optional[int] = ..., recent: _Optional[_Iterable[_Union[BatchStored, _Mapping]]] = ..., window_bytes: _Optional[int] = ..., parents: _Optional[_Iterable[_Union[ParentSequence, _Mapping]]] = ..., stored_epoch: _Optional[int] = ...) -> None: ...

class ParentSequence(_message.Message):
    __slots__ = ("first_slot", "last_slot", "last_sequence")
    FIRST_SLOT_FIELD_NUMBER: _ClassVar[int]
    LAST_SLOT_FIELD_NUMBER: _ClassVar[int]
    LAST_SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    first_slot: int
    last_slot: int
    last_sequence: int
    def __init__(self, first_slot: _Optional[int] = ..., last_slot: _Optional[int] = ..., last_sequence: _Optional[int] = ...) -> None: ...

class BatchStored(_message.Message):
    __slots__ = ("handle", "first_sequence", "last_sequence", "first_offset")
    HANDLE_FIELD_NUMBER: _ClassVar[int]
    FIRST_SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    LAST_SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    FIRST_OFFSET_FIELD_NUMBER: _ClassVar[int]
    handle: int
    first_sequence: int
    last_sequence: int
    first_offset: int
    def __init__(self, handle: _Optional[int] = ..., first_sequence: _Optional[int] = ..., last_sequence: _Optional[int] = ..., first_offset: _Optional[int] = ...) -> None: ...

class ProducerError(_message.Message):
    __slots__ = ("handle", "error", "sequence")
    HANDLE_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    handle: int
    error: _common_pb2.Error
    sequence: int
    def __init__(self, handle: _Optional[int] = ..., error: _Optional[_Union[_common_pb2.Error, _Mapping]] = ..., sequence: _Optional[int] = ...) -> None: ...

class ProducerWindow(_message.Message):
    __slots__ = ("handle", "window_bytes")
    HANDLE_FIELD_NUMBER: _ClassVar[int]
    WINDOW_BYTES_FIELD_NUMBER: _ClassVar[int]
    handle: int
    window_bytes: int
    def __init__(self, handle: _Optional[int] = ..., window_bytes: _Optional[int] = ...) -> None: ...

class ConsumeRequest(_message.Message):
    __slots__ = ("hello", "open", "open_readers", "credits", "acks", "nacks", "seeks", "close")
    HELLO_FIELD_NUMBER: _ClassVar[int]
    OPEN_FIELD_NUMBER: _ClassVar[int]
    OPEN_READERS_FIELD_NUMBER: _ClassVar[int]
    CREDITS_FIELD_NUMBER: _ClassVar[int]
    ACKS_FIELD_NUMBER: _ClassVar[int]
    NACKS_FIELD_NUMBER: _ClassVar[int]
    SEEKS_FIELD_NUMBER: _ClassVar[int]
    CLOSE_FIELD_NUMBER: _ClassVar[int]
    hello: _common_pb2.Hello
    open: _containers.RepeatedCompositeFieldContainer[OpenSubscription]
    open_readers: _containers.RepeatedCompositeFieldContainer[OpenReader]
    credits: _containers.RepeatedCompositeFieldContainer[Credit]
    acks: _containers.RepeatedCompositeFieldContainer[Ack]
    nacks: _containers.RepeatedCompositeFieldContainer[Nack]
    seeks: _containers.RepeatedCompositeFieldContainer[Seek]
    close: _containers.RepeatedCompositeFieldContainer[CloseConsumer]
    def __init__(self, hello: _Optional[_Union[_common_pb2.Hello, _Mapping]] = ..., open: _Optional[_Iterable[_Union[OpenSubscription, _Mapping]]] = ..., open_readers: _Optional[_Iterable[_Union[OpenReader, _Mapping]]] = ..., credits: _Optional[_Iterable[_Union[Credit, _Mapping]]] = ..., acks: _Optional[_Iterable[_Union[Ack, _Mapping]]] = ..., nacks: _Optional[_Iterable[_Union[Nack, _Mapping]]] = ..., seeks: _Optional[_Iterable[_Union[Seek, _Mapping]]] = ..., close: _Optional[_Iterable[_Union[CloseConsumer, _Mapping]]] = ...) -> None: ...

class OpenSubscription(_message.Message):
    __slots__ = ("handle", "topic", "shard_id", "subscription", "type", "key_ordered", "start", "consumer", "held")
    HANDLE_FIELD_NUMBER: _ClassVar[int]
    TOPIC_FIELD_NUMBER: _ClassVar[int]
    SHARD_ID_FIELD_NUMBER: _ClassVar[int]
    SUBSCRIPTION_FIELD_NUMBER: _ClassVar[int]
    TYPE_FIELD_NUMBER: _ClassVar[int]
    KEY_ORDERED_FIELD_NUMBER: _ClassVar[int]
    START_FIELD_NUMBER: _ClassVar[int]
    CONSUMER_FIELD_NUMBER: _ClassVar[int]
    HELD_FIELD_NUMBER: _ClassVar[int]
    handle: int
    topic: str
    shard_id: int
    subscription: str
    type: _metadata_pb2.SubscriptionType
    key_ordered: bool
    start: _metadata_pb2.StartPosition
    consumer: str
    held: _containers.RepeatedCompositeFieldContainer[_common_pb2.Range]
    def __init__(self, handle: _Optional[int] = ..., topic: _Optional[str] = ..., shard_id: _Optional[int] = ..., subscription: _Optional[str] = ..., type: _Optional[_Union[_metadata_pb2.SubscriptionType, str]] = ..., key_ordered: bool = ..., start: _Optional[_Union[_metadata_pb2.StartPosition, _Mapping]] = ..., consumer: _Optional[str] = ..., held: _Optional[_Iterable[_Union[_common_pb2.Range, _Mapping]]] = ...) -> None: ...

class OpenReader(_message.Message):
    __slots__ = ("handle", "topic", "shard_id", "start")
    HANDLE_FIELD_NUMBER: _ClassVar[int]
    TOPIC_FIELD_NUMBER: _ClassVar[int]
    SHARD_ID_FIELD_NUMBER: _ClassVar[int]
    START_FIELD_NUMBER: _ClassVar[int]
    handle: int
    topic: str
    shard_id: int
    start: _metadata_pb2.StartPosition
    def __init__(self, handle: _Optional[int] = ..., topic: _Optional[str] = ..., shard_id: _Optional[int] = ..., start: _Optional[_Union[_metadata_pb2.StartPosition, _Mapping]] = ...) -> None: ...

class Credit(_message.Message):
    __slots__ = ("handle", "messages", "bytes")
    HANDLE_FIELD_NUMBER: _ClassVar[int]
    MESSAGES_FIELD_NUMBER: _ClassVar[int]
    BYTES_FIELD_NUMBER: _ClassVar[int]
    handle: int
    messages: int
    bytes: int
    def __init__(self, handle: _Optional[int] = ..., messages: _Optional[int] = ..., bytes: _Optional[int] = ...) -> None: ...

class Ack(_message.Message):
    __slots__ = ("handle", "request_id", "floor", "ranges")
    HANDLE_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    FLOOR_FIELD_NUMBER: _ClassVar[int]
    RANGES_FIELD_NUMBER: _ClassVar[int]
    handle: int
    request_id: int
    floor: int
    ranges: _containers.RepeatedCompositeFieldContainer[_common_pb2.Range]
    def __init__(self, handle: _Optional[int] = ..., request_id: _Optional[int] = ..., floor: _Optional[int] = ..., ranges: _Optional[_Iterable[_Union[_common_pb2.Range, _Mapping]]] = ...) -> None: ...

class Nack(_message.Message):
    __slots__ = ("handle", "ranges")
    HANDLE_FIELD_NUMBER: _ClassVar[int]
    RANGES_FIELD_NUMBER: _ClassVar[int]
    handle: int
    ranges: _containers.RepeatedCompositeFieldContainer[_common_pb2.Range]
    def __init__(self, handle: _Optional[int] = ..., ranges: _Optional[_Iterable[_Union[_common_pb2.Range, _Mapping]]] = ...) -> None: ...

class Seek(_message.Message):
    __slots__ = ("handle", "request_id", "position")
    HANDLE_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    POSITION_FIELD_NUMBER: _ClassVar[int]
    handle: int
    request_id: int
    position: _metadata_pb2.StartPosition
    def __init__(self, handle: _Optional[int] = ..., request_id: _Optional[int] = ..., position: _Optional[_Union[_metadata_pb2.StartPosition, _Mapping]] = ...) -> None: ...

class CloseConsumer(_message.Message):
    __slots__ = ("handle", "request_id")
    HANDLE_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    handle: int
    request_id: int
    def __init__(self, handle: _Optional[int] = ..., request_id: _Optional[int] = ...) -> None: ...

class ConsumeResponse(_message.Message):
    __slots__ = ("hello", "opened", "deliveries", "acks", "errors", "notices", "error")
    HELLO_FIELD_NUMBER: _ClassVar[int]
    OPENED_FIELD_NUMBER: _ClassVar[int]
    DELIVERIES_FIELD_NUMBER: _ClassVar[int]
    ACKS_FIELD_NUMBER: _ClassVar[int]
    ERRORS_FIELD_NUMBER: _ClassVar[int]
    NOTICES_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    hello: _common_pb2.HelloReply
    opened: _containers.RepeatedCompositeFieldContainer[SubscriptionOpened]
    deliveries: _containers.RepeatedCompositeFieldContainer[Delivery]
    acks: _containers.RepeatedCompositeFieldContainer[AckResult]
    errors: _containers.RepeatedCompositeFieldContainer[ConsumerError]
    notices: _containers.RepeatedCompositeFieldContainer[ConsumerNotice]
    error: _common_pb2.Error
    def __init__(self, hello: _Optional[_Union[_common_pb2.HelloReply, _Mapping]] = ..., opened: _Optional[_Iterable[_Union[SubscriptionOpened, _Mapping]]] = ..., deliveries: _Optional[_Iterable[_Union[Delivery, _Mapping]]] = ..., acks: _Optional[_Iterable[_Union[AckResult, _Mapping]]] = ..., errors: _Optional[_Iterable[_Union[ConsumerError, _Mapping]]] = ..., notices: _Optional[_Iterable[_Union[ConsumerNotice, _Mapping]]] = ..., error: _Optional[_Union[_common_pb2.Error, _Mapping]] = ...) -> None: ...

class SubscriptionOpened(_message.Message):
    __slots__ = ("handle", "next_offset", "end_offset", "active", "cursor_epoch")
    HANDLE_FIELD_NUMBER: _ClassVar[int]
    NEXT_OFFSET_FIELD_NUMBER: _ClassVar[int]
    END_OFFSET_FIELD_NUMBER: _ClassVar[int]
    ACTIVE_FIELD_NUMBER: _ClassVar[int]
    CURSOR_EPOCH_FIELD_NUMBER: _ClassVar[int]
    handle: int
    next_offset: int
    end_offset: int
    active: bool
    cursor_epoch: int
    def __init__(self, handle: _Optional[int] = ..., next_offset: _Optional[int] = ..., end_offset: _Optional[int] = ..., active: bool = ..., cursor_epoch: _Optional[int] = ...) -> None: ...

class Delivery(_message.Message):
    __slots__ = ("handle", "cursor_epoch", "first_offset", "publish_time_us", "batch", "selection", "redeliveries")
    HANDLE_FIELD_NUMBER: _ClassVar[int]
    CURSOR_EPOCH_FIELD_NUMBER: _ClassVar[int]
    FIRST_OFFSET_FIELD_NUMBER: _ClassVar[int]
    PUBLISH_TIME_US_FIELD_NUMBER: _ClassVar[int]
    BATCH_FIELD_NUMBER: _ClassVar[int]
    SELECTION_FIELD_NUMBER: _ClassVar[int]
    REDELIVERIES_FIELD_NUMBER: _ClassVar[int]
    handle: int
    cursor_epoch: int
    first_offset: int
    publish_time_us: int
    batch: bytes
    selection: bytes
    redeliveries: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, handle: _Optional[int] = ..., cursor_epoch: _Optional[int] = ..., first_offset: _Optional[int] = ..., publish_time_us: _Optional[int] = ..., batch: _Optional[bytes] = ..., selection: _Optional[bytes] = ..., redeliveries: _Optional[_Iterable[int]] = ...) -> None: ...

class AckResult(_message.Message):
    __slots__ = ("request_id", "error", "next_offset", "cursor_epoch")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    NEXT_OFFSET_FIELD_NUMBER: _ClassVar[int]
    CURSOR_EPOCH_FIELD_NUMBER: _ClassVar[int]
    request_id: int
    error: _common_pb2.Error
    next_offset: int
    cursor_epoch: int
    def __init__(self, request_id: _Optional[int] = ..., error: _Optional[_Union[_common_pb2.Error, _Mapping]] = ..., next_offset: _Optional[int] = ..., cursor_epoch: _Optional[int] = ...) -> None: ...

class ConsumerError(_message.Message):
    __slots__ = ("handle", "error")
    HANDLE_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    handle: int
    error: _common_pb2.Error
    def __init__(self, handle: _Optional[int] = ..., error: _Optional[_Union[_common_pb2.Error, _Mapping]] = ...) -> None: ...

class ConsumerNotice(_message.Message):
    __slots__ = ("handle", "active", "caught_up_to", "end_of_shard")
    HANDLE_FIELD_NUMBER: _ClassVar[int]
    ACTIVE_FIELD_NUMBER: _ClassVar[int]
    CAUGHT_UP_TO_FIELD_NUMBER: _ClassVar[int]
    END_OF_SHARD_FIELD_NUMBER: _ClassVar[int]
    handle: int
    active: bool
    caught_up_to: int
    end_of_shard: int
    def __init__(self, handle: _Optional[int] = ..., active: bool = ..., caught_up_to: _Optional[int] = ..., end_of_shard: _Optional[int] = ...) -> None: ...
