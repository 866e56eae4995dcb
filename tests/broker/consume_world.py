"""A client that speaks the Consume stream in raw frames, and keeps what it hears until it is asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from broker_world import TOPIC, Calls, Stream

from magnetar.v1 import broker_pb2, common_pb2, metadata_pb2
from magnetar.wire.selection import indices

STREAM = metadata_pb2.SUBSCRIPTION_TYPE_STREAM
QUEUE = metadata_pb2.SUBSCRIPTION_TYPE_QUEUE
EARLIEST = metadata_pb2.StartPosition(earliest=True)
LATEST = metadata_pb2.StartPosition()


def ranges_of(ranges: Iterable[tuple[int, int]]) -> list[common_pb2.Range]:
    return [common_pb2.Range(start=start, end=end) for start, end in ranges]


def offsets_of(delivery: broker_pb2.Delivery, count: int) -> list[int]:
    return [delivery.first_offset + index for index in indices(delivery.selection, count)]


class ConsumeClient(Stream):
    """Batches are `batch`es of `batch_size` messages, so that offsets can be told without parsing."""

    def __init__(self, calls: Calls) -> None:
        super().__init__(calls, "Consume", broker_pb2.ConsumeRequest, broker_pb2.ConsumeResponse)
        self.opened: list[broker_pb2.SubscriptionOpened] = []
        self.deliveries: list[broker_pb2.Delivery] = []
        self.answers: dict[int, broker_pb2.AckResult] = {}
        self.errors: list[broker_pb2.ConsumerError] = []
        self.notices: list[broker_pb2.ConsumerNotice] = []
        self.frames: list[broker_pb2.ConsumeResponse] = []

    async def open(
        self,
        shard_id: int,
        handle: int = 1,
        *,
        name: str = "audit",
        kind: Any = QUEUE,
        key_ordered: bool = False,
        start: metadata_pb2.StartPosition = EARLIEST,
        consumer: str = "",
        held: Iterable[tuple[int, int]] = (),
        messages: int = 1000,
        size_bytes: int = 1 << 20,
    ) -> broker_pb2.SubscriptionOpened:
        """Opens a subscription, with credit in the same frame unless messages is 0."""
        await self.send(
            open=[
                broker_pb2.OpenSubscription(
                    handle=handle,
                    topic=TOPIC,
                    shard_id=shard_id,
                    subscription=name,
                    type=kind,
                    key_ordered=key_ordered,
                    start=start,
                    consumer=consumer or f"consumer-{id(self)}-{handle}",
                    held=ranges_of(held),
                )
            ],
            credits=[broker_pb2.Credit(handle=handle, messages=messages, bytes=size_bytes)] if messages else [],
        )
        return await self.until_opened()

    async def open_reader(
        self,
        shard_id: int,
        handle: int = 1,
        start: metadata_pb2.StartPosition = EARLIEST,
        messages: int = 1000,
        size_bytes: int = 1 << 20,
    ) -> broker_pb2.SubscriptionOpened:
        await self.send_reader(shard_id, handle, start, messages, size_bytes)
        return await self.until_opened()

    async def send_reader(
        self,
        shard_id: int,
        handle: int = 1,
        start: metadata_pb2.StartPosition = EARLIEST,
        messages: int = 1000,
        size_bytes: int = 1 << 20,
    ) -> None:
        reader = broker_pb2.OpenReader(handle=handle, topic=TOPIC, shard_id=shard_id, start=start)
        credit = broker_pb2.Credit(handle=handle, messages=messages, bytes=size_bytes)
        await self.send(open_readers=[reader], credits=[credit])

    async def until_opened(self) -> broker_pb2.SubscriptionOpened:
        await self.until(lambda: bool(self.opened or self.errors))
        assert self.opened, self.errors
        return self.opened.pop(0)

    async def credit(self, messages: int, size_bytes: int = 1 << 20, handle: int = 1) -> None:
        await self.send(credits=[broker_pb2.Credit(handle=handle, messages=messages, bytes=size_bytes)])

    async def ack(
        self, *ranges: tuple[int, int], floor: int = 0, handle: int = 1, request_id: int = 0
    ) -> broker_pb2.AckResult | None:
        """Waits for the answer if there is a request id."""
        item = broker_pb2.Ack(handle=handle, request_id=request_id, floor=floor, ranges=ranges_of(ranges))
        await self.send(acks=[item])
        return await self.answer(request_id) if request_id else None

    async def nack(self, *ranges: tuple[int, int], handle: int = 1) -> None:
        await self.send(nacks=[broker_pb2.Nack(handle=handle, ranges=ranges_of(ranges))])

    async def seek(
        self, position: metadata_pb2.StartPosition, handle: int = 1, request_id: int = 99
    ) -> broker_pb2.AckResult:
        await self.send(seeks=[broker_pb2.Seek(handle=handle, request_id=request_id, position=position)])
        return await self.answer(request_id)

    async def close(self, handle: int = 1, request_id: int = 98) -> broker_pb2.AckResult:
        await self.send(close=[broker_pb2.CloseConsumer(handle=handle, request_id=request_id)])
        return await self.answer(request_id)

    async def answer(self, request_id: int) -> broker_pb2.AckResult:
        await self.until(lambda: request_id in self.answers)
        return self.answers.pop(request_id)

    async def offsets(self, count: int, batch_size: int = 10, handle: int = 1) -> list[int]:
        """The offsets of the next deliveries on the handle, in order of arrival: at least so many."""
        taken: list[int] = []
        while len(taken) < count:
            await self.until(lambda: any(delivery.handle == handle for delivery in self.deliveries))
            mine = [delivery for delivery in self.deliveries if delivery.handle == handle]
            self.deliveries = [delivery for delivery in self.deliveries if delivery.handle != handle]
            taken += [offset for delivery in mine for offset in offsets_of(delivery, batch_size)]
        return taken

    async def delivery(self) -> broker_pb2.Delivery:
        await self.until(lambda: bool(self.deliveries))
        return self.deliveries.pop(0)

    async def caught_up(self, handle: int = 1) -> int:
        """The offset of the next notice that the end is reached."""

        def found() -> list[broker_pb2.ConsumerNotice]:
            return [n for n in self.notices if n.handle == handle and n.WhichOneof("notice") == "caught_up_to"]

        await self.until(lambda: bool(found()))
        notice = found()[0]
        self.notices.remove(notice)
        return notice.caught_up_to

    async def active(self) -> None:
        await self.until(lambda: any(notice.active for notice in self.notices))

    async def error(self) -> broker_pb2.ConsumerError:
        await self.until(lambda: bool(self.errors))
        return self.errors.pop(0)

    async def stream_error(self) -> common_pb2.Error:
        """The error that ends the stream."""
        while True:
            frame = await self.receive()
            assert frame is not None, "the stream ended without an error"
            if frame.HasField("error"):
                assert await self.receive() is None
                return frame.error

    async def until(self, holds: Callable[[], bool]) -> None:
        while not holds():
            frame = await self.receive()
            assert frame is not None, "the stream ended"
            assert not frame.HasField("error"), frame.error
            self.frames.append(frame)
            self.opened.extend(frame.opened)
            self.deliveries.extend(frame.deliveries)
            self.answers.update((answer.request_id, answer) for answer in frame.acks)
            self.errors.extend(frame.errors)
            self.notices.extend(frame.notices)
