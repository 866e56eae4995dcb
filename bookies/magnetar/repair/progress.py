"""An operation that goes on: its record, its moves, and how far it is, as they should stand in the store. Pure."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

from magnetar.metadata.records import Goal, Move, MoveState, Operation, OperationState

MOVES_PER_PAGE = 1000
RATE_WINDOW_US = 20_000_000
HEARTBEAT_US = 2_000_000
"""The record is stored so often at least, so that it shows that somebody runs it."""
NEGLECTED_US = 30_000_000
"""Longer than a new process takes to be elected and to go on."""
PROBLEMS_MAX = 8
"""Named one by one; the rest is counted."""

Place = tuple[int, int]
"""Of a move: number of its page, place in it."""


class OperationProgress:
    """One operation that has not ended.

    operation   as it should stand in the store; `pages` likewise, those in `changed` differ from what stands there
    _rates      (time, bytes or shards done) of the last RATE_WINDOW_US
    """

    def __init__(self, operation: Operation, pages: Iterable[Sequence[Move]]) -> None:
        self.operation = operation
        self.pages = [list(page) for page in pages]
        self.changed: set[int] = set()
        self._rates: deque[tuple[int, int]] = deque()

    @property
    def is_running(self) -> bool:
        return self.operation.state is OperationState.RUNNING

    @property
    def is_cancelled(self) -> bool:
        return self.operation.state is OperationState.CANCELLED

    def move(self, place: Place) -> Move:
        return self.pages[place[0]][place[1]]

    def pending_places(self) -> Iterator[Place]:
        """Of the moves that are neither done nor skipped, in order."""
        for number, page in enumerate(self.pages):
            for index, move in enumerate(page):
                if move.state is MoveState.PENDING:
                    yield number, index

    def finish(self, place: Place, state: MoveState, reason: str = "") -> None:
        """The move is done, or skipped for this reason."""
        move = self.move(place)
        number, index = place
        self.pages[number][index] = replace(move, state=state, reason=reason)
        self.changed.add(number)
        operation = self.operation
        if state is MoveState.DONE:
            self.operation = replace(
                operation, moves_done=operation.moves_done + 1, bytes_done=operation.bytes_done + move.size_bytes
            )
        else:
            self.operation = replace(
                operation,
                moves_skipped=operation.moves_skipped + 1,
                bytes_skipped=operation.bytes_skipped + move.size_bytes,
            )

    def keep(self, now_us: int, problems: Sequence[str]) -> None:
        """Rate and problems go into the record, at the latest after HEARTBEAT_US."""
        self._rates.append((now_us, self._done()))
        while len(self._rates) > 2 and self._rates[1][0] <= now_us - RATE_WINDOW_US:
            self._rates.popleft()
        shown = _limited(problems)
        if not self.changed and shown == self.operation.problems and now_us < self.operation.updated_us + HEARTBEAT_US:
            return
        (first_us, first), (last_us, last) = self._rates[0], self._rates[-1]
        rate = (last - first) * 1_000_000 // (last_us - first_us) if last_us > first_us else self.operation.rate
        self.operation = replace(self.operation, rate=max(0, rate), problems=shown, updated_us=now_us)

    def end(self, now_us: int) -> None:
        state = OperationState.CANCELLED if self.is_cancelled else OperationState.DONE
        rate = self._done() * 1_000_000 // max(1, now_us - self.operation.created_us)
        self.operation = replace(
            self.operation, state=state, updated_us=now_us, ended_us=now_us, rate=max(0, rate), problems=()
        )

    def _done(self) -> int:
        return self.operation.moves_done if self.operation.goal is Goal.BROKERS else self.operation.bytes_done


def neglected(operation: Operation, now_us: int) -> str:
    """In words, if nobody goes on with an operation that should; else empty."""
    idle_us = now_us - max(operation.created_us, operation.updated_us)
    if operation.ended_us or operation.state is OperationState.PAUSED or idle_us < NEGLECTED_US:
        return ""
    kind = "broker" if operation.goal is Goal.BROKERS else "bookie"
    return f"no {kind} has gone on with it for {idle_us // 1_000_000} s: one is elected for that, see their logs"


def paged(moves: Sequence[Move]) -> list[Sequence[Move]]:
    return [moves[start : start + MOVES_PER_PAGE] for start in range(0, len(moves), MOVES_PER_PAGE)]


def reverse(moves: Iterable[Move]) -> list[Move]:
    """The moves that take back what was done, the last one first."""
    done = [move for move in moves if move.state is MoveState.DONE]
    return [replace(move, source=move.target, target=move.source, state=MoveState.PENDING) for move in reversed(done)]


def _limited(problems: Sequence[str]) -> tuple[str, ...]:
    if len(problems) <= PROBLEMS_MAX:
        return tuple(problems)
    return (*problems[:PROBLEMS_MAX], f"and {len(problems) - PROBLEMS_MAX} more like these")
