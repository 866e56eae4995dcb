"""The client library of Magnetar, for asyncio. `magnetar.client.sync` is the same, blocking.

async with connect("localhost:7650") as client:
    async with client.producer("clicks") as producer:
        message_id = await producer.send(b"payload", key="user-1")

    async with client.stream_consumer("clicks", subscription="audit", start=EARLIEST) as consumer:
        async for message in consumer:
            consumer.ack(message)
"""

from magnetar.client import grpc_environment as _grpc_environment  # noqa: F401  first: see there
from magnetar.client.admin import (
    Admin,
    BookieDescription,
    BookieOrder,
    BrokerDescription,
    BrokerDrain,
    ClusterHealth,
    ConsumerDescription,
    CursorDescription,
    FragmentDescription,
    LedgerDescription,
    LostBookie,
    RepairStatus,
    SegmentDescription,
    ShardDescription,
    SubscriptionDeletion,
    SubscriptionDescription,
    SubscriptionSummary,
    TopicDeletion,
    TopicDescription,
)
from magnetar.client.batching import Batching
from magnetar.client.client import Client, connect
from magnetar.client.consumer import QueueConsumer, Reader, StreamConsumer
from magnetar.client.errors import (
    AlreadyExists,
    ClientClosed,
    ClusterUnavailable,
    ConsumerBusy,
    EndOfTopic,
    InvalidArgument,
    LedgerNotFound,
    MagnetarError,
    MessageTooLarge,
    NotAuthorized,
    OrderRefused,
    ProducerFenced,
    QueueFull,
    RetriableError,
    SubscriptionNotFound,
    TopicNotFound,
)
from magnetar.client.message import Message, MessageBatch, MessageId
from magnetar.client.positions import EARLIEST, LATEST, Edge, Position
from magnetar.client.producer import Producer
from magnetar.client.rebalancing import (
    BookieShare,
    BookieTraffic,
    BrokerBalance,
    BrokerTraffic,
    LedgerVerification,
    RebalanceMove,
    RebalanceOperation,
    RebalancePlan,
    RebalanceVerification,
)
from magnetar.client.receipts import Acknowledgement, MessageIds, Receipt

__all__ = [
    "EARLIEST",
    "LATEST",
    "Acknowledgement",
    "Admin",
    "AlreadyExists",
    "Batching",
    "BookieDescription",
    "BookieOrder",
    "BookieShare",
    "BookieTraffic",
    "BrokerBalance",
    "BrokerDescription",
    "BrokerDrain",
    "BrokerTraffic",
    "Client",
    "ClientClosed",
    "ClusterHealth",
    "ClusterUnavailable",
    "ConsumerBusy",
    "ConsumerDescription",
    "CursorDescription",
    "Edge",
    "EndOfTopic",
    "FragmentDescription",
    "InvalidArgument",
    "LedgerDescription",
    "LedgerNotFound",
    "LedgerVerification",
    "LostBookie",
    "MagnetarError",
    "Message",
    "MessageBatch",
    "MessageId",
    "MessageIds",
    "MessageTooLarge",
    "NotAuthorized",
    "OrderRefused",
    "Position",
    "Producer",
    "ProducerFenced",
    "QueueConsumer",
    "QueueFull",
    "Reader",
    "RebalanceMove",
    "RebalanceOperation",
    "RebalancePlan",
    "RebalanceVerification",
    "Receipt",
    "RepairStatus",
    "RetriableError",
    "SegmentDescription",
    "ShardDescription",
    "StreamConsumer",
    "SubscriptionDeletion",
    "SubscriptionDescription",
    "SubscriptionNotFound",
    "SubscriptionSummary",
    "TopicDeletion",
    "TopicDescription",
    "TopicNotFound",
    "connect",
]
