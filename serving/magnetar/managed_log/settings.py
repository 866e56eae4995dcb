"""The limits of a shard's log, as values. Units stand last in each name."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class LogSettings:
    """segment_bytes            a segment ends at this size; longer where a long log is retained
    segment_s                a segment that is not empty ends at this age
    vacant_s                 an open ledger with a vacant place ends at this age, if a new one would have none
    link_ahead               part of segment_bytes from which on the next ledger is created
    segment_bytes_hard       while no next ledger can be linked a segment grows to this, then appends wait
    retention_unsubscribed_s without any subscription, messages are kept for so long
    trim_open_bytes          an open segment of this size that is wholly acknowledged is ended to free its space
    max_in_flight_bytes      of entries sent and not confirmed
    entry_bytes              of the batches grouped into one entry; a larger batch is an entry of its own
    entries_before_grouping  so many small entries may be in flight; beyond it, batches wait until they fill one
    cursor_ledger_bytes      a cursor ledger is rolled at this size, or
    cursor_ledger_snapshots  at so many times the bytes of its snapshot, so that large states are not copied often
    inline_bytes             cursors up to this size go into the shard record at a clean close
    read_bytes               what one read asks of bookies
    read_ahead_max           reads in progress beyond which nothing is read ahead
    recovery_attempts        of one recovery when the log is opened; then LogUndecided is raised
    retry_first_s            delay after a failed attempt; doubles up to retry_last_s
    """

    segment_bytes: int = 64 << 20
    segment_s: float = 3600.0
    vacant_s: float = 60.0
    link_ahead: float = 0.75
    segment_bytes_hard: int = 4 << 30
    retention_unsubscribed_s: float = 7 * 24 * 3600.0
    trim_open_bytes: int = 16 << 20
    max_in_flight_bytes: int = 16 << 20
    entry_bytes: int = (1 << 20) - 4096
    entries_before_grouping: int = 2
    cursor_ledger_bytes: int = 4 << 20
    cursor_ledger_snapshots: int = 4
    inline_bytes: int = 1024
    read_bytes: int = 1 << 20
    read_ahead_max: int = 4
    recovery_attempts: int = 3
    retry_first_s: float = 0.02
    retry_last_s: float = 2.0

    def __post_init__(self) -> None:
        for name in ("segment_bytes", "max_in_flight_bytes", "entry_bytes", "entries_before_grouping", "read_bytes"):
            if getattr(self, name) < 1:
                raise ValueError(f"a limit of the log is not positive: {name}=`{getattr(self, name)}`")
        if not 0 < self.link_ahead <= 1:
            raise ValueError(f"link_ahead is a part of segment_bytes: link_ahead=`{self.link_ahead}`")
