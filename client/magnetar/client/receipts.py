"""What a producer or consumer hands out for something that is still under way.

A receipt is a place in a batch. It costs no future: those who await it make one, when they do, and giving up waiting
disturbs nobody else who waits for the same batch.
"""

from __future__ import annotations

import asyncio
from bisect import bisect_right
from collections.abc import Callable, Generator, Sequence
from itertools import accumulate
from typing import overload

from magnetar.client.batching import Batch
from magnetar.client.completion import Completion
from magnetar.client.errors import MagnetarError
from magnetar.client.message import MessageId


def wait_for_end(completion: Completion, members: int = 1) -> Generator[object, None, None]:
    """Wait until it ends or is replaced; to be used with `yield from`."""
    if not completion.ended:
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()

        def tell() -> None:
            if not future.done():
                future.set_result(None)

        completion.listen(tell, members)
        yield from future.__await__()


class Settled:
    """Await until a batch, and all it was divided into, has ended, well or badly.

    seen   its failure counts as seen, because whoever waits here raises it
    """

    __slots__ = ("_batch", "_seen")

    def __init__(self, batch: Batch, *, seen: bool) -> None:
        self._batch = batch
        self._seen = seen

    def __await__(self) -> Generator[object, None, list[Batch]]:
        """Returns the batches that hold its messages now."""
        batch = self._batch
        if batch.moved is None:
            yield from wait_for_end(batch, max(batch.count, len(batch.payloads)) if self._seen else 0)
        if batch.moved is None:
            return [batch]
        ended: list[Batch] = []
        for part in dict.fromkeys(part for part, _ in batch.moved):
            ended += yield from Settled(part, seen=self._seen).__await__()
        return ended


class Receipt:
    """A message on its way. Awaiting it gives its MessageId when it is durable, or raises why it is not.

    Receipts of one batch end together. Awaiting one from several tasks, and giving up, is fine.
    """

    __slots__ = ("_batch", "_index")

    def __init__(self, batch: Batch, index: int) -> None:
        self._batch = batch
        self._index = index

    def done(self) -> bool:
        """The outcome is known."""
        return self._place().ended

    def result(self) -> MessageId:
        """The id, if it is durable. Raises asyncio.InvalidStateError while that is not known, or why it is not."""
        batch = self._place()
        if not batch.ended:
            raise asyncio.InvalidStateError("the message is not confirmed yet: await the receipt")
        if batch.error is not None:
            batch.listened += 1
            raise batch.error.again()
        return MessageId(batch.shard, batch.offset_of(self._index))

    def exception(self) -> MagnetarError | None:
        """Why it failed, None if it did not. Raises asyncio.InvalidStateError while that is not known."""
        try:
            self.result()
        except MagnetarError as error:
            return error
        return None

    def add_done_callback(self, callback: Callable[[Receipt], object]) -> None:
        """Call it with this receipt, from the event loop, soon after the outcome is known."""
        loop = asyncio.get_running_loop()

        def tell() -> None:
            batch = self._place()
            if batch.ended:
                loop.call_soon(callback, self)
            else:
                batch.listen(tell)

        self._place().listen(tell)

    def __await__(self) -> Generator[object, None, MessageId]:
        batch = self._place()
        while not batch.ended:
            yield from wait_for_end(batch)
            batch = self._place()
        return self.result()

    def _place(self) -> Batch:
        """The batch that has the message now; this receipt then points there."""
        while (moved := self._batch.moved) is not None:
            self._batch, self._index = moved[self._index]
        return self._batch

    def __repr__(self) -> str:
        return f"<Receipt {'done' if self.done() else 'pending'}>"


class MessageIds(Sequence[MessageId]):
    """The ids of messages that were sent together, in their order. They are made when they are looked at."""

    __slots__ = ("_ends", "_order", "_places")

    def __init__(self, places: Sequence[tuple[Batch, int, int]], order: Sequence[int] | None) -> None:
        """places   batch, first index, count: where the messages went, one behind the other
        order    for each message its number in that row; None: they stand in it as they were sent
        """
        self._places = places
        self._ends = list(accumulate(count for _, _, count in places))
        self._order = order

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    @overload
    def __getitem__(self, index: int) -> MessageId: ...
    @overload
    def __getitem__(self, index: slice) -> list[MessageId]: ...
    def __getitem__(self, index: int | slice) -> MessageId | list[MessageId]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if index < 0:
            index += len(self)
        if not 0 <= index < len(self):
            raise IndexError("index is beyond the messages that were sent")
        return self.receipt(index).result()

    def __repr__(self) -> str:
        return f"<MessageIds of {len(self)} messages>"

    def receipt(self, index: int) -> Receipt:
        """The receipt of one message."""
        number = index if self._order is None else self._order[index]
        place = bisect_right(self._ends, number)
        batch, first, count = self._places[place]
        return Receipt(batch, first + number - (self._ends[place] - count))

    def confirmed(self) -> list[MessageId | None]:
        """Each id, None where the message is not known to be stored."""
        found: list[MessageId | None] = []
        for index in range(len(self)):
            receipt = self.receipt(index)
            found.append(receipt.result() if receipt.done() and receipt.exception() is None else None)
        return found


class Acknowledgement:
    """Acknowledgements under way, shared by all of their group. Await it until they are durable."""

    __slots__ = ("_group",)

    def __init__(self, group: Completion) -> None:
        self._group = group

    def done(self) -> bool:
        """The outcome is known."""
        return self._group.ended

    def result(self) -> None:
        """Returns if they are durable. Raises asyncio.InvalidStateError while that is open, or why they are not."""
        if not self._group.ended:
            raise asyncio.InvalidStateError("the acknowledgement is not confirmed yet: await it")
        if self._group.error is not None:
            raise self._group.error.again()

    def add_done_callback(self, callback: Callable[[Acknowledgement], object]) -> None:
        """Call it with this object, from the event loop, soon after the outcome is known."""
        loop = asyncio.get_running_loop()

        def tell() -> None:
            loop.call_soon(callback, self)

        self._group.listen(tell)

    def __await__(self) -> Generator[object, None, None]:
        yield from wait_for_end(self._group)
        self.result()

    def __repr__(self) -> str:
        return f"<Acknowledgement {'done' if self.done() else 'pending'}>"
