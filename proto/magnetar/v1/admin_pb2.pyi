from magnetar.v1 import metadata_pb2 as _metadata_pb2
from magnetar.v1 import rebalance_pb2 as _rebalance_pb2
from magnetar.v1 import repair_pb2 as _repair_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class BrokerState(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    BROKER_STATE_UNSPECIFIED: _ClassVar[BrokerState]
    BROKER_STATE_SERVING: _ClassVar[BrokerState]
    BROKER_STATE_DRAINING: _ClassVar[BrokerState]
    BROKER_STATE_LEAVING: _ClassVar[BrokerState]
BROKER_STATE_UNSPECIFIED: BrokerState
BROKER_STATE_SERVING: BrokerState
BROKER_STATE_DRAINING: BrokerState
BROKER_STATE_LEAVING: BrokerState

class CreateTopicRequest(_message.Message):
    __slots__ = ("topic", "shards", "dry_run")
    TOPIC_FIELD_NUMBER: _ClassVar[int]
    SHARDS_FIELD_NUMBER: _ClassVar[int]
    DRY_RUN_FIELD_NUMBER: _ClassVar[int]
    topic: str
    shards: int
    dry_run: bool
    def __init__(self, topic: _Optional[str] = ..., shards: _Optional[int] = ..., dry_run: bool = ...) -> None: ...

class CreateTopicResponse(_message.Message):
    __slots__ = ("topic",)
    TOPIC_FIELD_NUMBER: _ClassVar[int]
    topic: TopicDescription
    def __init__(self, topic: _Optional[_Union[TopicDescription, _Mapping]] = ...) -> None: ...

class ListTopicsRequest(_message.Message):
    __slots__ = ("prefix", "after", "limit")
    PREFIX_FIELD_NUMBER: _ClassVar[int]
    AFTER_FIELD_NUMBER: _ClassVar[int]
    LIMIT_FIELD_NUMBER: _ClassVar[int]
    prefix: str
    after: str
    limit: int
    def __init__(self, prefix: _Optional[str] = ..., after: _Optional[str] = ..., limit: _Optional[int] = ...) -> None: ...

class ListTopicsResponse(_message.Message):
    __slots__ = ("topics", "more")
    TOPICS_FIELD_NUMBER: _ClassVar[int]
    MORE_FIELD_NUMBER: _ClassVar[int]
    topics: _containers.RepeatedScalarFieldContainer[str]
    more: bool
    def __init__(self, topics: _Optional[_Iterable[str]] = ..., more: bool = ...) -> None: ...

class DescribeTopicRequest(_message.Message):
    __slots__ = ("topic",)
    TOPIC_FIELD_NUMBER: _ClassVar[int]
    topic: str
    def __init__(self, topic: _Optional[str] = ...) -> None: ...

class DescribeTopicResponse(_message.Message):
    __slots__ = ("topic",)
    TOPIC_FIELD_NUMBER: _ClassVar[int]
    topic: TopicDescription
    def __init__(self, topic: _Optional[_Union[TopicDescription, _Mapping]] = ...) -> None: ...

class TopicDescription(_message.Message):
    __slots__ = ("topic", "epoch", "shards", "subscriptions")
    TOPIC_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    SHARDS_FIELD_NUMBER: _ClassVar[int]
    SUBSCRIPTIONS_FIELD_NUMBER: _ClassVar[int]
    topic: str
    epoch: int
    shards: _containers.RepeatedCompositeFieldContainer[ShardDescription]
    subscriptions: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, topic: _Optional[str] = ..., epoch: _Optional[int] = ..., shards: _Optional[_Iterable[_Union[ShardDescription, _Mapping]]] = ..., subscriptions: _Optional[_Iterable[str]] = ...) -> None: ...

class ShardDescription(_message.Message):
    __slots__ = ("shard_id", "first_slot", "last_slot", "state", "parents", "owner", "start_offset", "end_offset", "segments")
    SHARD_ID_FIELD_NUMBER: _ClassVar[int]
    FIRST_SLOT_FIELD_NUMBER: _ClassVar[int]
    LAST_SLOT_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    PARENTS_FIELD_NUMBER: _ClassVar[int]
    OWNER_FIELD_NUMBER: _ClassVar[int]
    START_OFFSET_FIELD_NUMBER: _ClassVar[int]
    END_OFFSET_FIELD_NUMBER: _ClassVar[int]
    SEGMENTS_FIELD_NUMBER: _ClassVar[int]
    shard_id: int
    first_slot: int
    last_slot: int
    state: _metadata_pb2.ShardState
    parents: _containers.RepeatedScalarFieldContainer[int]
    owner: str
    start_offset: int
    end_offset: int
    segments: _containers.RepeatedCompositeFieldContainer[SegmentDescription]
    def __init__(self, shard_id: _Optional[int] = ..., first_slot: _Optional[int] = ..., last_slot: _Optional[int] = ..., state: _Optional[_Union[_metadata_pb2.ShardState, str]] = ..., parents: _Optional[_Iterable[int]] = ..., owner: _Optional[str] = ..., start_offset: _Optional[int] = ..., end_offset: _Optional[int] = ..., segments: _Optional[_Iterable[_Union[SegmentDescription, _Mapping]]] = ...) -> None: ...

class SegmentDescription(_message.Message):
    __slots__ = ("ledger_id", "first_offset", "messages", "bytes", "state", "ensemble")
    LEDGER_ID_FIELD_NUMBER: _ClassVar[int]
    FIRST_OFFSET_FIELD_NUMBER: _ClassVar[int]
    MESSAGES_FIELD_NUMBER: _ClassVar[int]
    BYTES_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    ENSEMBLE_FIELD_NUMBER: _ClassVar[int]
    ledger_id: int
    first_offset: int
    messages: int
    bytes: int
    state: _metadata_pb2.LedgerState
    ensemble: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, ledger_id: _Optional[int] = ..., first_offset: _Optional[int] = ..., messages: _Optional[int] = ..., bytes: _Optional[int] = ..., state: _Optional[_Union[_metadata_pb2.LedgerState, str]] = ..., ensemble: _Optional[_Iterable[str]] = ...) -> None: ...

class DeleteTopicRequest(_message.Message):
    __slots__ = ("topic", "dry_run")
    TOPIC_FIELD_NUMBER: _ClassVar[int]
    DRY_RUN_FIELD_NUMBER: _ClassVar[int]
    topic: str
    dry_run: bool
    def __init__(self, topic: _Optional[str] = ..., dry_run: bool = ...) -> None: ...

class DeleteTopicResponse(_message.Message):
    __slots__ = ("shards", "messages", "bytes")
    SHARDS_FIELD_NUMBER: _ClassVar[int]
    MESSAGES_FIELD_NUMBER: _ClassVar[int]
    BYTES_FIELD_NUMBER: _ClassVar[int]
    shards: int
    messages: int
    bytes: int
    def __init__(self, shards: _Optional[int] = ..., messages: _Optional[int] = ..., bytes: _Optional[int] = ...) -> None: ...

class CreateSubscriptionRequest(_message.Message):
    __slots__ = ("topic", "subscription", "type", "start")
    TOPIC_FIELD_NUMBER: _ClassVar[int]
    SUBSCRIPTION_FIELD_NUMBER: _ClassVar[int]
    TYPE_FIELD_NUMBER: _ClassVar[int]
    START_FIELD_NUMBER: _ClassVar[int]
    topic: str
    subscription: str
    type: _metadata_pb2.SubscriptionType
    start: _metadata_pb2.StartPosition
    def __init__(self, topic: _Optional[str] = ..., subscription: _Optional[str] = ..., type: _Optional[_Union[_metadata_pb2.SubscriptionType, str]] = ..., start: _Optional[_Union[_metadata_pb2.StartPosition, _Mapping]] = ...) -> None: ...

class CreateSubscriptionResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ListSubscriptionsRequest(_message.Message):
    __slots__ = ("topic",)
    TOPIC_FIELD_NUMBER: _ClassVar[int]
    topic: str
    def __init__(self, topic: _Optional[str] = ...) -> None: ...

class ListSubscriptionsResponse(_message.Message):
    __slots__ = ("subscriptions",)
    SUBSCRIPTIONS_FIELD_NUMBER: _ClassVar[int]
    subscriptions: _containers.RepeatedCompositeFieldContainer[SubscriptionSummary]
    def __init__(self, subscriptions: _Optional[_Iterable[_Union[SubscriptionSummary, _Mapping]]] = ...) -> None: ...

class SubscriptionSummary(_message.Message):
    __slots__ = ("subscription", "type", "backlog_messages", "consumers")
    SUBSCRIPTION_FIELD_NUMBER: _ClassVar[int]
    TYPE_FIELD_NUMBER: _ClassVar[int]
    BACKLOG_MESSAGES_FIELD_NUMBER: _ClassVar[int]
    CONSUMERS_FIELD_NUMBER: _ClassVar[int]
    subscription: str
    type: _metadata_pb2.SubscriptionType
    backlog_messages: int
    consumers: int
    def __init__(self, subscription: _Optional[str] = ..., type: _Optional[_Union[_metadata_pb2.SubscriptionType, str]] = ..., backlog_messages: _Optional[int] = ..., consumers: _Optional[int] = ...) -> None: ...

class DescribeSubscriptionRequest(_message.Message):
    __slots__ = ("topic", "subscription")
    TOPIC_FIELD_NUMBER: _ClassVar[int]
    SUBSCRIPTION_FIELD_NUMBER: _ClassVar[int]
    topic: str
    subscription: str
    def __init__(self, topic: _Optional[str] = ..., subscription: _Optional[str] = ...) -> None: ...

class DescribeSubscriptionResponse(_message.Message):
    __slots__ = ("subscription",)
    SUBSCRIPTION_FIELD_NUMBER: _ClassVar[int]
    subscription: SubscriptionDescription
    def __init__(self, subscription: _Optional[_Union[SubscriptionDescription, _Mapping]] = ...) -> None: ...

class SubscriptionDescription(_message.Message):
    __slots__ = ("subscription", "type", "backlog_messages", "backlog_bytes", "oldest_age_s", "shards", "consumers", "waiting_for")
    SUBSCRIPTION_FIELD_NUMBER: _ClassVar[int]
    TYPE_FIELD_NUMBER: _ClassVar[int]
    BACKLOG_MESSAGES_FIELD_NUMBER: _ClassVar[int]
    BACKLOG_BYTES_FIELD_NUMBER: _ClassVar[int]
    OLDEST_AGE_S_FIELD_NUMBER: _ClassVar[int]
    SHARDS_FIELD_NUMBER: _ClassVar[int]
    CONSUMERS_FIELD_NUMBER: _ClassVar[int]
    WAITING_FOR_FIELD_NUMBER: _ClassVar[int]
    subscription: str
    type: _metadata_pb2.SubscriptionType
    backlog_messages: int
    backlog_bytes: int
    oldest_age_s: float
    shards: _containers.RepeatedCompositeFieldContainer[CursorDescription]
    consumers: _containers.RepeatedCompositeFieldContainer[ConsumerDescription]
    waiting_for: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, subscription: _Optional[str] = ..., type: _Optional[_Union[_metadata_pb2.SubscriptionType, str]] = ..., backlog_messages: _Optional[int] = ..., backlog_bytes: _Optional[int] = ..., oldest_age_s: _Optional[float] = ..., shards: _Optional[_Iterable[_Union[CursorDescription, _Mapping]]] = ..., consumers: _Optional[_Iterable[_Union[ConsumerDescription, _Mapping]]] = ..., waiting_for: _Optional[_Iterable[str]] = ...) -> None: ...

class CursorDescription(_message.Message):
    __slots__ = ("shard_id", "floor", "acked_above_floor", "end_offset", "backlog_messages", "backlog_bytes", "unacked_messages")
    SHARD_ID_FIELD_NUMBER: _ClassVar[int]
    FLOOR_FIELD_NUMBER: _ClassVar[int]
    ACKED_ABOVE_FLOOR_FIELD_NUMBER: _ClassVar[int]
    END_OFFSET_FIELD_NUMBER: _ClassVar[int]
    BACKLOG_MESSAGES_FIELD_NUMBER: _ClassVar[int]
    BACKLOG_BYTES_FIELD_NUMBER: _ClassVar[int]
    UNACKED_MESSAGES_FIELD_NUMBER: _ClassVar[int]
    shard_id: int
    floor: int
    acked_above_floor: int
    end_offset: int
    backlog_messages: int
    backlog_bytes: int
    unacked_messages: int
    def __init__(self, shard_id: _Optional[int] = ..., floor: _Optional[int] = ..., acked_above_floor: _Optional[int] = ..., end_offset: _Optional[int] = ..., backlog_messages: _Optional[int] = ..., backlog_bytes: _Optional[int] = ..., unacked_messages: _Optional[int] = ...) -> None: ...

class ConsumerDescription(_message.Message):
    __slots__ = ("consumer", "shard_id", "active", "unacked_messages", "credit_messages", "credit_bytes", "client")
    CONSUMER_FIELD_NUMBER: _ClassVar[int]
    SHARD_ID_FIELD_NUMBER: _ClassVar[int]
    ACTIVE_FIELD_NUMBER: _ClassVar[int]
    UNACKED_MESSAGES_FIELD_NUMBER: _ClassVar[int]
    CREDIT_MESSAGES_FIELD_NUMBER: _ClassVar[int]
    CREDIT_BYTES_FIELD_NUMBER: _ClassVar[int]
    CLIENT_FIELD_NUMBER: _ClassVar[int]
    consumer: str
    shard_id: int
    active: bool
    unacked_messages: int
    credit_messages: int
    credit_bytes: int
    client: str
    def __init__(self, consumer: _Optional[str] = ..., shard_id: _Optional[int] = ..., active: bool = ..., unacked_messages: _Optional[int] = ..., credit_messages: _Optional[int] = ..., credit_bytes: _Optional[int] = ..., client: _Optional[str] = ...) -> None: ...

class SeekSubscriptionRequest(_message.Message):
    __slots__ = ("topic", "subscription", "position", "shard_id", "dry_run", "passed_on")
    TOPIC_FIELD_NUMBER: _ClassVar[int]
    SUBSCRIPTION_FIELD_NUMBER: _ClassVar[int]
    POSITION_FIELD_NUMBER: _ClassVar[int]
    SHARD_ID_FIELD_NUMBER: _ClassVar[int]
    DRY_RUN_FIELD_NUMBER: _ClassVar[int]
    PASSED_ON_FIELD_NUMBER: _ClassVar[int]
    topic: str
    subscription: str
    position: _metadata_pb2.StartPosition
    shard_id: int
    dry_run: bool
    passed_on: bool
    def __init__(self, topic: _Optional[str] = ..., subscription: _Optional[str] = ..., position: _Optional[_Union[_metadata_pb2.StartPosition, _Mapping]] = ..., shard_id: _Optional[int] = ..., dry_run: bool = ..., passed_on: bool = ...) -> None: ...

class SeekSubscriptionResponse(_message.Message):
    __slots__ = ("shards",)
    SHARDS_FIELD_NUMBER: _ClassVar[int]
    shards: _containers.RepeatedCompositeFieldContainer[CursorDescription]
    def __init__(self, shards: _Optional[_Iterable[_Union[CursorDescription, _Mapping]]] = ...) -> None: ...

class DeleteSubscriptionRequest(_message.Message):
    __slots__ = ("topic", "subscription", "dry_run")
    TOPIC_FIELD_NUMBER: _ClassVar[int]
    SUBSCRIPTION_FIELD_NUMBER: _ClassVar[int]
    DRY_RUN_FIELD_NUMBER: _ClassVar[int]
    topic: str
    subscription: str
    dry_run: bool
    def __init__(self, topic: _Optional[str] = ..., subscription: _Optional[str] = ..., dry_run: bool = ...) -> None: ...

class DeleteSubscriptionResponse(_message.Message):
    __slots__ = ("backlog_messages",)
    BACKLOG_MESSAGES_FIELD_NUMBER: _ClassVar[int]
    backlog_messages: int
    def __init__(self, backlog_messages: _Optional[int] = ...) -> None: ...

class AdminServiceListLedgersRequest(_message.Message):
    __slots__ = ("topic", "after", "limit")
    TOPIC_FIELD_NUMBER: _ClassVar[int]
    AFTER_FIELD_NUMBER: _ClassVar[int]
    LIMIT_FIELD_NUMBER: _ClassVar[int]
    topic: str
    after: int
    limit: int
    def __init__(self, topic: _Optional[str] = ..., after: _Optional[int] = ..., limit: _Optional[int] = ...) -> None: ...

class AdminServiceListLedgersResponse(_message.Message):
    __slots__ = ("ledgers", "more")
    LEDGERS_FIELD_NUMBER: _ClassVar[int]
    MORE_FIELD_NUMBER: _ClassVar[int]
    ledgers: _containers.RepeatedCompositeFieldContainer[LedgerDescription]
    more: bool
    def __init__(self, ledgers: _Optional[_Iterable[_Union[LedgerDescription, _Mapping]]] = ..., more: bool = ...) -> None: ...

class LedgerDescription(_message.Message):
    __slots__ = ("record", "topic")
    RECORD_FIELD_NUMBER: _ClassVar[int]
    TOPIC_FIELD_NUMBER: _ClassVar[int]
    record: _metadata_pb2.LedgerRecord
    topic: str
    def __init__(self, record: _Optional[_Union[_metadata_pb2.LedgerRecord, _Mapping]] = ..., topic: _Optional[str] = ...) -> None: ...

class DescribeLedgerRequest(_message.Message):
    __slots__ = ("ledger_id",)
    LEDGER_ID_FIELD_NUMBER: _ClassVar[int]
    ledger_id: int
    def __init__(self, ledger_id: _Optional[int] = ...) -> None: ...

class DescribeLedgerResponse(_message.Message):
    __slots__ = ("ledger",)
    LEDGER_FIELD_NUMBER: _ClassVar[int]
    ledger: LedgerDescription
    def __init__(self, ledger: _Optional[_Union[LedgerDescription, _Mapping]] = ...) -> None: ...

class ClusterHealthRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ClusterHealthResponse(_message.Message):
    __slots__ = ("healthy", "brokers", "bookies", "under_replicated_ledgers", "unavailable_shards", "problems", "notices")
    HEALTHY_FIELD_NUMBER: _ClassVar[int]
    BROKERS_FIELD_NUMBER: _ClassVar[int]
    BOOKIES_FIELD_NUMBER: _ClassVar[int]
    UNDER_REPLICATED_LEDGERS_FIELD_NUMBER: _ClassVar[int]
    UNAVAILABLE_SHARDS_FIELD_NUMBER: _ClassVar[int]
    PROBLEMS_FIELD_NUMBER: _ClassVar[int]
    NOTICES_FIELD_NUMBER: _ClassVar[int]
    healthy: bool
    brokers: int
    bookies: int
    under_replicated_ledgers: int
    unavailable_shards: int
    problems: _containers.RepeatedScalarFieldContainer[str]
    notices: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, healthy: bool = ..., brokers: _Optional[int] = ..., bookies: _Optional[int] = ..., under_replicated_ledgers: _Optional[int] = ..., unavailable_shards: _Optional[int] = ..., problems: _Optional[_Iterable[str]] = ..., notices: _Optional[_Iterable[str]] = ...) -> None: ...

class DescribeShardRequest(_message.Message):
    __slots__ = ("topic", "shard_id", "segments", "subscriptions", "ages")
    TOPIC_FIELD_NUMBER: _ClassVar[int]
    SHARD_ID_FIELD_NUMBER: _ClassVar[int]
    SEGMENTS_FIELD_NUMBER: _ClassVar[int]
    SUBSCRIPTIONS_FIELD_NUMBER: _ClassVar[int]
    AGES_FIELD_NUMBER: _ClassVar[int]
    topic: str
    shard_id: int
    segments: bool
    subscriptions: _containers.RepeatedScalarFieldContainer[str]
    ages: bool
    def __init__(self, topic: _Optional[str] = ..., shard_id: _Optional[int] = ..., segments: bool = ..., subscriptions: _Optional[_Iterable[str]] = ..., ages: bool = ...) -> None: ...

class DescribeShardResponse(_message.Message):
    __slots__ = ("shard", "subscriptions")
    SHARD_FIELD_NUMBER: _ClassVar[int]
    SUBSCRIPTIONS_FIELD_NUMBER: _ClassVar[int]
    shard: ShardDescription
    subscriptions: _containers.RepeatedCompositeFieldContainer[SubscriptionDescription]
    def __init__(self, shard: _Optional[_Union[ShardDescription, _Mapping]] = ..., subscriptions: _Optional[_Iterable[_Union[SubscriptionDescription, _Mapping]]] = ...) -> None: ...

class SettleSubscriptionRequest(_message.Message):
    __slots__ = ("topic", "shard_id", "subscription")
    TOPIC_FIELD_NUMBER: _ClassVar[int]
    SHARD_ID_FIELD_NUMBER: _ClassVar[int]
    SUBSCRIPTION_FIELD_NUMBER: _ClassVar[int]
    topic: str
    shard_id: int
    subscription: str
    def __init__(self, topic: _Optional[str] = ..., shard_id: _Optional[int] = ..., subscription: _Optional[str] = ...) -> None: ...

class SettleSubscriptionResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ListBrokersRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ListBrokersResponse(_message.Message):
    __slots__ = ("brokers",)
    BROKERS_FIELD_NUMBER: _ClassVar[int]
    brokers: _containers.RepeatedCompositeFieldContainer[BrokerDescription]
    def __init__(self, brokers: _Optional[_Iterable[_Union[BrokerDescription, _Mapping]]] = ...) -> None: ...

class BrokerDescription(_message.Message):
    __slots__ = ("broker_id", "address", "http_address", "version", "shards", "state")
    BROKER_ID_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    HTTP_ADDRESS_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    SHARDS_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    broker_id: str
    address: str
    http_address: str
    version: str
    shards: int
    state: BrokerState
    def __init__(self, broker_id: _Optional[str] = ..., address: _Optional[str] = ..., http_address: _Optional[str] = ..., version: _Optional[str] = ..., shards: _Optional[int] = ..., state: _Optional[_Union[BrokerState, str]] = ...) -> None: ...

class DrainBrokerRequest(_message.Message):
    __slots__ = ("broker_id", "dry_run")
    BROKER_ID_FIELD_NUMBER: _ClassVar[int]
    DRY_RUN_FIELD_NUMBER: _ClassVar[int]
    broker_id: str
    dry_run: bool
    def __init__(self, broker_id: _Optional[str] = ..., dry_run: bool = ...) -> None: ...

class DrainBrokerResponse(_message.Message):
    __slots__ = ("shards", "shares")
    SHARDS_FIELD_NUMBER: _ClassVar[int]
    SHARES_FIELD_NUMBER: _ClassVar[int]
    shards: int
    shares: _containers.RepeatedCompositeFieldContainer[BrokerShare]
    def __init__(self, shards: _Optional[int] = ..., shares: _Optional[_Iterable[_Union[BrokerShare, _Mapping]]] = ...) -> None: ...

class BrokerShare(_message.Message):
    __slots__ = ("broker_id", "shards")
    BROKER_ID_FIELD_NUMBER: _ClassVar[int]
    SHARDS_FIELD_NUMBER: _ClassVar[int]
    broker_id: str
    shards: int
    def __init__(self, broker_id: _Optional[str] = ..., shards: _Optional[int] = ...) -> None: ...

class UndrainBrokerRequest(_message.Message):
    __slots__ = ("broker_id", "dry_run")
    BROKER_ID_FIELD_NUMBER: _ClassVar[int]
    DRY_RUN_FIELD_NUMBER: _ClassVar[int]
    broker_id: str
    dry_run: bool
    def __init__(self, broker_id: _Optional[str] = ..., dry_run: bool = ...) -> None: ...

class UndrainBrokerResponse(_message.Message):
    __slots__ = ("was_draining",)
    WAS_DRAINING_FIELD_NUMBER: _ClassVar[int]
    was_draining: bool
    def __init__(self, was_draining: bool = ...) -> None: ...

class MoveShardRequest(_message.Message):
    __slots__ = ("shard_id", "to_broker_id", "reason", "passed_on")
    SHARD_ID_FIELD_NUMBER: _ClassVar[int]
    TO_BROKER_ID_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    PASSED_ON_FIELD_NUMBER: _ClassVar[int]
    shard_id: int
    to_broker_id: str
    reason: str
    passed_on: bool
    def __init__(self, shard_id: _Optional[int] = ..., to_broker_id: _Optional[str] = ..., reason: _Optional[str] = ..., passed_on: bool = ...) -> None: ...

class MoveShardResponse(_message.Message):
    __slots__ = ("from_broker_id", "paused_s")
    FROM_BROKER_ID_FIELD_NUMBER: _ClassVar[int]
    PAUSED_S_FIELD_NUMBER: _ClassVar[int]
    from_broker_id: str
    paused_s: float
    def __init__(self, from_broker_id: _Optional[str] = ..., paused_s: _Optional[float] = ...) -> None: ...

class ReceiveShardRequest(_message.Message):
    __slots__ = ("shard_id", "topic", "epoch", "source", "source_address")
    SHARD_ID_FIELD_NUMBER: _ClassVar[int]
    TOPIC_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    SOURCE_FIELD_NUMBER: _ClassVar[int]
    SOURCE_ADDRESS_FIELD_NUMBER: _ClassVar[int]
    shard_id: int
    topic: str
    epoch: int
    source: _metadata_pb2.Owner
    source_address: str
    def __init__(self, shard_id: _Optional[int] = ..., topic: _Optional[str] = ..., epoch: _Optional[int] = ..., source: _Optional[_Union[_metadata_pb2.Owner, _Mapping]] = ..., source_address: _Optional[str] = ...) -> None: ...

class ReceiveShardResponse(_message.Message):
    __slots__ = ("session", "ledger")
    SESSION_FIELD_NUMBER: _ClassVar[int]
    LEDGER_FIELD_NUMBER: _ClassVar[int]
    session: int
    ledger: _metadata_pb2.LedgerRecord
    def __init__(self, session: _Optional[int] = ..., ledger: _Optional[_Union[_metadata_pb2.LedgerRecord, _Mapping]] = ...) -> None: ...

class TakeShardRequest(_message.Message):
    __slots__ = ("shard_id", "passed_on", "consumers", "inheritance")
    SHARD_ID_FIELD_NUMBER: _ClassVar[int]
    PASSED_ON_FIELD_NUMBER: _ClassVar[int]
    CONSUMERS_FIELD_NUMBER: _ClassVar[int]
    INHERITANCE_FIELD_NUMBER: _ClassVar[int]
    shard_id: int
    passed_on: bool
    consumers: _containers.RepeatedCompositeFieldContainer[SubscriptionConsumers]
    inheritance: ShardInheritance
    def __init__(self, shard_id: _Optional[int] = ..., passed_on: bool = ..., consumers: _Optional[_Iterable[_Union[SubscriptionConsumers, _Mapping]]] = ..., inheritance: _Optional[_Union[ShardInheritance, _Mapping]] = ...) -> None: ...

class SubscriptionConsumers(_message.Message):
    __slots__ = ("subscription", "consumers")
    SUBSCRIPTION_FIELD_NUMBER: _ClassVar[int]
    CONSUMERS_FIELD_NUMBER: _ClassVar[int]
    subscription: str
    consumers: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, subscription: _Optional[str] = ..., consumers: _Optional[_Iterable[str]] = ...) -> None: ...

class ShardInheritance(_message.Message):
    __slots__ = ("last_time_us", "cursors", "cursor_ledger")
    LAST_TIME_US_FIELD_NUMBER: _ClassVar[int]
    CURSORS_FIELD_NUMBER: _ClassVar[int]
    CURSOR_LEDGER_FIELD_NUMBER: _ClassVar[int]
    last_time_us: int
    cursors: _containers.RepeatedScalarFieldContainer[bytes]
    cursor_ledger: _metadata_pb2.LedgerRecord
    def __init__(self, last_time_us: _Optional[int] = ..., cursors: _Optional[_Iterable[bytes]] = ..., cursor_ledger: _Optional[_Union[_metadata_pb2.LedgerRecord, _Mapping]] = ...) -> None: ...

class TakeShardResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class AskHandOffRequest(_message.Message):
    __slots__ = ("shard_id", "to_broker_id")
    SHARD_ID_FIELD_NUMBER: _ClassVar[int]
    TO_BROKER_ID_FIELD_NUMBER: _ClassVar[int]
    shard_id: int
    to_broker_id: str
    def __init__(self, shard_id: _Optional[int] = ..., to_broker_id: _Optional[str] = ...) -> None: ...

class AskHandOffResponse(_message.Message):
    __slots__ = ("under_way",)
    UNDER_WAY_FIELD_NUMBER: _ClassVar[int]
    under_way: bool
    def __init__(self, under_way: bool = ...) -> None: ...

class ReportLoadsRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ReportLoadsResponse(_message.Message):
    __slots__ = ("loads",)
    LOADS_FIELD_NUMBER: _ClassVar[int]
    loads: _containers.RepeatedCompositeFieldContainer[ShardLoad]
    def __init__(self, loads: _Optional[_Iterable[_Union[ShardLoad, _Mapping]]] = ...) -> None: ...

class ShardLoad(_message.Message):
    __slots__ = ("shard_id", "bytes_per_s", "messages_per_s")
    SHARD_ID_FIELD_NUMBER: _ClassVar[int]
    BYTES_PER_S_FIELD_NUMBER: _ClassVar[int]
    MESSAGES_PER_S_FIELD_NUMBER: _ClassVar[int]
    shard_id: int
    bytes_per_s: float
    messages_per_s: float
    def __init__(self, shard_id: _Optional[int] = ..., bytes_per_s: _Optional[float] = ..., messages_per_s: _Optional[float] = ...) -> None: ...

class ListBookiesRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ListBookiesResponse(_message.Message):
    __slots__ = ("bookies",)
    BOOKIES_FIELD_NUMBER: _ClassVar[int]
    bookies: _containers.RepeatedCompositeFieldContainer[BookieDescription]
    def __init__(self, bookies: _Optional[_Iterable[_Union[BookieDescription, _Mapping]]] = ...) -> None: ...

class BookieDescription(_message.Message):
    __slots__ = ("bookie_id", "address", "http_address", "version", "rack", "state", "ledgers", "bytes", "disk_free_bytes", "disk_total_bytes", "draining", "copies")
    BOOKIE_ID_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    HTTP_ADDRESS_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    RACK_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    LEDGERS_FIELD_NUMBER: _ClassVar[int]
    BYTES_FIELD_NUMBER: _ClassVar[int]
    DISK_FREE_BYTES_FIELD_NUMBER: _ClassVar[int]
    DISK_TOTAL_BYTES_FIELD_NUMBER: _ClassVar[int]
    DRAINING_FIELD_NUMBER: _ClassVar[int]
    COPIES_FIELD_NUMBER: _ClassVar[int]
    bookie_id: str
    address: str
    http_address: str
    version: str
    rack: str
    state: _metadata_pb2.BookieState
    ledgers: int
    bytes: int
    disk_free_bytes: int
    disk_total_bytes: int
    draining: bool
    copies: int
    def __init__(self, bookie_id: _Optional[str] = ..., address: _Optional[str] = ..., http_address: _Optional[str] = ..., version: _Optional[str] = ..., rack: _Optional[str] = ..., state: _Optional[_Union[_metadata_pb2.BookieState, str]] = ..., ledgers: _Optional[int] = ..., bytes: _Optional[int] = ..., disk_free_bytes: _Optional[int] = ..., disk_total_bytes: _Optional[int] = ..., draining: bool = ..., copies: _Optional[int] = ...) -> None: ...
