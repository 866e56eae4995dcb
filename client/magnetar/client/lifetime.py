"""Whether an object of this library may be used: it is entered once, closed once, and never crosses a fork."""

from __future__ import annotations

import os
import weakref
from collections.abc import Awaitable, Callable
from enum import Enum

from magnetar.client.errors import ClientClosed, MagnetarError


class _State(Enum):
    NEW = "new"
    OPENING = "opening"
    OPEN = "open"
    CLOSED = "closed"


class Lifetime:
    """One for each client, and for each of its producers, consumers and readers, which are its children.

    over      why it cannot be used; None while it can
    closer    closes the object; called when its parent is closed first
    """

    def __init__(self, kind: str, closer: Callable[[], Awaitable[None]] | None = None, parent: Lifetime | None = None):
        self.over: MagnetarError | None = ClientClosed(
            f"this {kind} is not open: use `async with` (or `with`, in magnetar.client.sync)"
        )
        self.closer = closer
        self.children: dict[Lifetime, None] = {}
        self._kind = kind
        self._parent = parent
        self._state = _State.NEW

    def check(self) -> None:
        """Raises why it cannot be used, if so."""
        if self.over is not None:
            raise self.over.again()

    def begin(self) -> None:
        """It is being opened. Raises ClientClosed if it was before, or if its client is not open."""
        if self._parent is not None:
            self._parent.check()
        if self._state is not _State.NEW:
            raise ClientClosed(f"a {self._kind} is entered only once: make another one")
        self._state = _State.OPENING
        if self._parent is not None:
            self._parent.children[self] = None
        else:
            _clients.add(self)

    def opened(self) -> None:
        """It can be used."""
        if self._state is _State.OPENING:
            self._state = _State.OPEN
            self.over = None

    def fail(self, error: MagnetarError) -> None:
        """It cannot be used any more, though it still has to be closed."""
        self.over = error

    def close(self) -> bool:
        """No use any more. False: there is nothing to close."""
        was_open = self._state is _State.OPEN
        if was_open:
            self._state = _State.CLOSED
            self.over = ClientClosed(f"this {self._kind} is closed")
        return was_open

    def end(self) -> None:
        """All of it is over: its parent need not care."""
        self._state = _State.CLOSED
        if self._parent is not None:
            self._parent.children.pop(self, None)
        _clients.discard(self)

    def forked(self) -> None:
        """This is a copy in a child process: the connections belong to the parent."""
        for lifetime in (self, *self.children):
            lifetime._state = _State.CLOSED
            lifetime.over = ClientClosed(
                f"this {lifetime._kind} belongs to the parent process: connect again after a fork: pid=`{os.getpid()}`"
            )


_clients: weakref.WeakSet[Lifetime] = weakref.WeakSet()


def _after_fork_in_child() -> None:
    for lifetime in tuple(_clients):
        lifetime.forked()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)
