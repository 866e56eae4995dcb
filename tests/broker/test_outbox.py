"""Frames of a Consume stream, without a stream."""

from __future__ import annotations

from magnetar.broker.dispatch import Deliver, LoadedBatch
from magnetar.broker.outbox import BUFFER_BYTES_MAX, FRAME_BYTES_MAX, Outbox
from magnetar.node.rpc import invalid_argument
from magnetar.v1 import broker_pb2, common_pb2


class Said:
    def __init__(self) -> None:
        self.room: list[bool] = []
        self.times = 0
        self.outbox = Outbox(self.said, self.room.append)

    def said(self) -> None:
        self.times += 1

    def frames(self) -> list[broker_pb2.ConsumeResponse]:
        frames = []
        while (frame := self.outbox.next_frame()) is not None:
            frames.append(broker_pb2.ConsumeResponse.FromString(frame[0]))
            self.outbox.written(frame[1])
        return frames


def given(offset: int, size_bytes: int = 10, epoch: int = 1) -> Deliver:
    batch = LoadedBatch(offset, 3, bytes(size_bytes), 77)
    return Deliver(1, epoch, batch, bytes([0b101]), 2, (0, 4))


def test_everything_that_is_said_goes_into_one_frame() -> None:
    said = Said()
    said.outbox.opened(broker_pb2.SubscriptionOpened(handle=1, active=True))
    said.outbox.deliver(1, given(5))
    said.outbox.deliver(2, given(8))
    said.outbox.answer(broker_pb2.AckResult(request_id=4))
    said.outbox.caught_up(1, 8)
    said.outbox.failed(2, invalid_argument("no"))
    assert said.times == 6
    [frame] = said.frames()
    assert [opened.handle for opened in frame.opened] == [1]
    assert frame.deliveries[0] == broker_pb2.Delivery(
        handle=1,
        cursor_epoch=1,
        first_offset=5,
        publish_time_us=77,
        batch=bytes(10),
        selection=b"\x05",
        redeliveries=[0, 4],
    )
    assert [answer.request_id for answer in frame.acks] == [4]
    assert frame.notices[0].caught_up_to == 8
    assert (frame.errors[0].handle, frame.errors[0].error.reason) == (2, common_pb2.ERROR_REASON_INVALID_ARGUMENT)


def test_a_frame_is_bounded_or_has_one_delivery() -> None:
    said = Said()
    for offset, size_bytes in enumerate([FRAME_BYTES_MAX // 3] * 4 + [3 * FRAME_BYTES_MAX, 10, 10]):
        said.outbox.deliver(1, given(offset, size_bytes))
    counts = [len(frame.deliveries) for frame in said.frames()]
    assert counts == [2, 2, 1, 2]


def test_what_concerns_one_handle_is_read_in_the_order_in_which_it_was_said() -> None:
    said = Said()
    said.outbox.activated(1)
    said.outbox.deliver(1, given(1))
    said.outbox.deliver(2, given(2))
    said.outbox.answer_in_order(1, broker_pb2.AckResult(request_id=9))
    said.outbox.deliver(1, given(3, epoch=2))
    first, second, third = said.frames()
    assert (len(first.notices), len(first.deliveries)) == (1, 0)
    assert ([d.first_offset for d in second.deliveries], [a.request_id for a in second.acks]) == ([1, 2], [9])
    assert [d.first_offset for d in third.deliveries] == [3]


def test_a_notice_of_the_end_is_forgotten_when_more_is_delivered_first() -> None:
    said = Said()
    said.outbox.deliver(1, given(1))
    said.outbox.caught_up(1, 4)
    said.outbox.caught_up(2, 4)
    said.outbox.deliver(1, given(4))
    said.outbox.caught_up(1, 7)
    [frame] = said.frames()
    assert [(notice.handle, notice.caught_up_to) for notice in frame.notices] == [(2, 4), (1, 7)]
    said.outbox.deliver(1, given(7))
    assert [len(frame.notices) for frame in said.frames()] == [0]
    assert said.outbox.answers == 0


def test_it_is_full_until_half_is_written() -> None:
    said = Said()
    size_bytes = BUFFER_BYTES_MAX // 8
    for offset in range(8):
        said.outbox.deliver(1, given(offset, size_bytes))
    assert (said.outbox.full, said.room) == (True, [False])
    for left in range(7, 0, -1):
        frame = said.outbox.next_frame()
        assert frame is not None
        assert said.outbox.full == (left > 2), "what is being written still counts"
        said.outbox.written(frame[1])
    assert said.room == [False, True]


def test_dropped_deliveries_are_given_back_and_never_sent() -> None:
    said = Said()
    for offset in range(3):
        said.outbox.deliver(1, given(offset, 100))
        said.outbox.deliver(2, given(offset, 100))
    assert said.outbox.drop_deliveries(1) == (6, 300)
    assert said.outbox.drop_deliveries(1) == (0, 0)
    [frame] = said.frames()
    assert [delivery.handle for delivery in frame.deliveries] == [2, 2, 2]
    assert said.outbox.size_bytes == 0
