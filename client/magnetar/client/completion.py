"""Something that ends once, well or badly, and that many may wait for. Pure: it knows no event loop.

One object stands for a whole group of messages, so that a message costs none. Whoever waits gives a function; it is
called once, when the completion ends or is replaced by others, and then looks again.
"""

from __future__ import annotations

from collections.abc import Callable

from magnetar.client.errors import MagnetarError


class Completion:
    """ended     the outcome is known and final
    error     why it ended badly; None if well, or not yet
    listened  how many of the group's members somebody waits for
    """

    __slots__ = ("_listeners", "ended", "error", "listened")

    def __init__(self) -> None:
        self.ended = False
        self.error: MagnetarError | None = None
        self.listened = 0
        self._listeners: list[Callable[[], None]] | None = None

    def listen(self, listener: Callable[[], None], members: int = 1) -> None:
        """Call it once, at the end; now, if that has come."""
        self.listened += members
        if self.ended:
            listener()
        elif self._listeners is None:
            self._listeners = [listener]
        else:
            self._listeners.append(listener)

    def end(self, error: MagnetarError | None = None) -> None:
        """The outcome is known. The first one counts."""
        if not self.ended:
            self.ended = True
            self.error = error
            self._tell()

    def _tell(self) -> None:
        listeners, self._listeners = self._listeners, None
        for listener in listeners or ():
            listener()
