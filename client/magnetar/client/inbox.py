"""What was delivered and not given to the user yet. Pure.

Deliveries stay batches; message objects are made a chunk at a time, when somebody asks for messages. What was overtaken
by a seek is never given out.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from itertools import islice
from operator import length_hint

from magnetar.client.errors import MagnetarError
from magnetar.client.message import Message, MessageBatch, Source

CHUNK_MESSAGES = 256
"""Message objects that are made at once."""


class Inbox:
    """messages   the made ones that come next: take from it, and call `load` when it is empty"""

    __slots__ = ("_at", "_current", "_failure", "_ready", "chunk_messages", "messages")

    def __init__(self, chunk_messages: int = CHUNK_MESSAGES) -> None:
        self.messages: Iterator[Message] = iter(())
        self._ready: deque[MessageBatch] = deque()
        self._current: MessageBatch | None = None
        self._at = 0
        self._failure: MagnetarError | None = None
        self.chunk_messages = chunk_messages

    def put(self, batch: MessageBatch) -> None:
        self._ready.append(batch)

    def __bool__(self) -> bool:
        return bool(self._ready) or self._current is not None or length_hint(self.messages) > 0

    def load(self) -> bool:
        """Make the next messages. False: nothing is here. Raises MagnetarError for a batch that cannot be decoded."""
        self._raise_failure()
        chunk = self._next_chunk(self.chunk_messages)
        self.messages = iter(chunk)
        return bool(chunk)

    def take(self, messages_max: int) -> list[Message]:
        """As many messages as are here, at most so many. Raises as `load`."""
        self._raise_failure()
        taken = list(islice(self.messages, messages_max))
        try:
            while len(taken) < messages_max and (chunk := self._next_chunk(messages_max - len(taken))):
                taken += chunk
        except MagnetarError as error:
            # What was taken before goes to the user first.
            self._failure = error
        if not taken:
            self._raise_failure()
        return taken

    def take_batch(self) -> MessageBatch | None:
        """The messages of one delivery that nobody has got yet, as columns."""
        self._raise_failure()
        first = next(self.messages, None)
        if first is not None:
            self.messages = iter(())
            self._finish_current()
            return first.batch.part(first.index)
        batch = self._advance()
        if batch is None:
            return None
        start = self._at
        self._finish_current()
        return batch.part(start)

    def drop_overtaken(self) -> None:
        """Forget what a seek has overtaken, also messages that are made."""
        made = list(self.messages)
        self.messages = iter(made if made and _fresh(made[0].batch) else ())
        self._keep(_fresh)

    def drop_from(self, source: Source) -> None:
        """Forget what is here from this source, but for messages that are made: those count as given out."""
        self._keep(lambda batch: batch.source is not source)

    def _keep(self, wanted: Callable[[MessageBatch], bool]) -> None:
        current = self._current
        if current is not None and not wanted(current):
            self._current = None
            current.source.dropped(current, self._at)
        for batch in self._ready:
            if not wanted(batch):
                batch.source.dropped(batch, 0)
        self._ready = deque(filter(wanted, self._ready))

    def _next_chunk(self, messages_max: int) -> list[Message]:
        batch = self._advance()
        if batch is None:
            return []
        start = self._at
        stop = min(len(batch), start + messages_max)
        try:
            chunk = batch.messages(start, stop)
        except MagnetarError:
            self._current = None
            batch.source.dropped(batch, start)
            raise
        self._at = stop
        if stop == len(batch):
            self._current = None
        batch.source.took(batch, start, stop)
        return chunk

    def _advance(self) -> MessageBatch | None:
        """The batch from which messages come next."""
        while self._current is None and self._ready:
            batch = self._ready.popleft()
            if _fresh(batch):
                self._current, self._at = batch, 0
            else:
                batch.source.dropped(batch, 0)
        return self._current

    def _finish_current(self) -> None:
        """What is left of the current batch goes to the user as columns."""
        batch, self._current = self._current, None
        if batch is not None:
            batch.source.took(batch, self._at, len(batch))

    def _raise_failure(self) -> None:
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure


def _fresh(batch: MessageBatch) -> bool:
    return batch.generation == batch.source.generation
