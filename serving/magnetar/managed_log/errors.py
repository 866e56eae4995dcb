"""What a log's callers can be told.

LogError
├── LogReleased     this broker serves the shard no longer: go to its owner
├── OffsetTrimmed   the offset is below the log's start: go on there
├── ReadFailed      the entries could not be read now: try again
├── LogUndecided    what is stored cannot be known now: open it again later
└── LogDamaged      the stored log contradicts its records: an operator has to look
"""

from __future__ import annotations

from dataclasses import dataclass

from magnetar.metadata.records import Owner


@dataclass(frozen=True, slots=True)
class Released:
    """Why a log was released; `owner` is who claimed the shard, None if that is not known."""

    owner: Owner | None
    reason: str


class LogError(Exception):
    """See the module."""


class LogReleased(LogError):
    """This broker serves the shard no longer. What waited for an answer has an unknown outcome."""

    def __init__(self, shard_id: int, released: Released) -> None:
        owner = released.owner.broker_id if released.owner else ""
        super().__init__(f"shard was released: shard=`{shard_id}` reason=`{released.reason}` owner=`{owner}`")
        self.released = released


class OffsetTrimmed(LogError):
    """The offset is below the start of the log."""

    def __init__(self, offset: int, start_offset: int) -> None:
        super().__init__(f"messages were trimmed: offset=`{offset}` start_offset=`{start_offset}`")
        self.start_offset = start_offset


class ReadFailed(LogError):
    """The entries are not readable now; they may be later."""


class LogDamaged(LogError):
    """What is stored contradicts the records. Must never happen."""


class LogUndecided(LogError):
    """Too few bookies answered to know where the log ends, or the outcome of a change is not known."""
