"""How much may be delivered: credits of a consumer, caps on the unacknowledged, the bound of a stream's buffer. Pure.

Credits are granted by the client and spent by deliveries: the selected messages, and the bytes of the whole batch that
carries them. A delivery needs both to be positive; it may overdraw the bytes, since a batch travels whole.
"""

from __future__ import annotations

CREDIT_MESSAGES_MAX = (1 << 31) - 1
CREDIT_BYTES_MAX = (1 << 47) - 1
"""The most that a handle may have granted and unused."""

CONSUMER_UNACKED_MAX = 50_000
"""Messages delivered to one consumer of a queue subscription in one shard and not acknowledged."""

SUBSCRIPTION_UNACKED_MAX = 200_000
"""The same for all consumers of a subscription in one shard."""

TURN_MESSAGES_MAX = 10_000
"""Messages that a consumer of a queue gets in one turn, however large its credit is."""


class CreditRefused(ValueError):
    """A grant of nothing, of less than nothing, or of more than a handle may have."""


class Credits:
    """What one consumer may still get. Both numbers may be negative after a batch that was larger than they were."""

    __slots__ = ("messages", "size_bytes")

    def __init__(self, messages: int = 0, size_bytes: int = 0) -> None:
        self.messages = messages
        self.size_bytes = size_bytes

    @property
    def open(self) -> bool:
        return self.messages > 0 and self.size_bytes > 0

    def grant(self, messages: int, size_bytes: int) -> None:
        """Add to both; raises CreditRefused, and then nothing is added."""
        if messages < 0 or size_bytes < 0 or not (messages or size_bytes):
            raise CreditRefused(f"credit adds nothing: messages=`{messages}` bytes=`{size_bytes}`")
        if self.messages + messages > CREDIT_MESSAGES_MAX or self.size_bytes + size_bytes > CREDIT_BYTES_MAX:
            raise CreditRefused(
                f"credit is more than a consumer may have: messages=`{self.messages + messages}` "
                f"bytes=`{self.size_bytes + size_bytes}`"
            )
        self.messages += messages
        self.size_bytes += size_bytes

    def spend(self, messages: int, size_bytes: int) -> None:
        self.messages -= messages
        self.size_bytes -= size_bytes

    def refund(self, messages: int, size_bytes: int) -> None:
        """A delivery was dropped before it was sent."""
        self.messages += messages
        self.size_bytes += size_bytes


def share(undelivered: int, consumers: int) -> int:
    """How many messages one of so many waiting consumers gets in its turn: an equal share of what is known to wait.

    With a long backlog that is whole batches, so that bytes travel once; the last messages are spread over all.
    """
    return max(1, min(TURN_MESSAGES_MAX, -(-undelivered // consumers)))


class Watermarks:
    """A count of buffered bytes that says `full` from `high_bytes` on until it is back at `low_bytes`."""

    __slots__ = ("full", "high_bytes", "low_bytes", "size_bytes")

    def __init__(self, high_bytes: int, low_bytes: int) -> None:
        assert 0 <= low_bytes < high_bytes
        self.high_bytes = high_bytes
        self.low_bytes = low_bytes
        self.size_bytes = 0
        self.full = False

    def add(self, size_bytes: int) -> bool:
        """Returns True if it became full by this."""
        self.size_bytes += size_bytes
        if self.full or self.size_bytes < self.high_bytes:
            return False
        self.full = True
        return True

    def remove(self, size_bytes: int) -> bool:
        """Returns True if there is room again by this."""
        self.size_bytes -= size_bytes
        if not self.full or self.size_bytes > self.low_bytes:
            return False
        self.full = False
        return True
