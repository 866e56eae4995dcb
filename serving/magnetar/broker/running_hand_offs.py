"""A rebalancing of brokers while it is carried out: what becomes of each of its moves. Pure.

Hand-offs are made one after the other. What came of one is read from the shard's record, never remembered: whoever goes
on with an operation finds shards that arrived, and asks again for those that did not. A move that fails is tried again
after all others, FAILURES_MAX times in all.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Collection, Iterable, Mapping, Sequence

from magnetar.metadata.records import Move, MoveState, Operation, ShardRecord
from magnetar.repair.progress import OperationProgress, Place

FAILURES_MAX = 5


class RunningHandOffs(OperationProgress):
    """One operation that has not ended.

    _queue      places of the moves that are not done, the next one first
    _problems   of these that failed, why they did last
    """

    def __init__(self, operation: Operation, pages: Iterable[Sequence[Move]]) -> None:
        super().__init__(operation, pages)
        self._queue = deque(self.pending_places())
        self._failures = Counter[Place]()
        self._problems: dict[Place, str] = {}

    @property
    def remaining(self) -> int:
        return len(self._queue)

    def next(self) -> Move:
        """The move that is due, while there are any."""
        return self.move(self._queue[0])

    def settle(self, record: ShardRecord | None, takers: Collection[str]) -> bool:
        """Whether the next move is done already, or cannot be made any more; it is not the next one then.

        record   of the shard, None = it does not exist
        takers   the brokers that may get shards
        """
        move = self.next()
        owner = None if record is None or record.owner is None else record.owner.broker_id
        if record is None:
            self._end_next(MoveState.SKIPPED, "the topic was deleted")
        elif owner == move.target:
            self._end_next(MoveState.DONE)
        elif owner not in (None, move.source):
            self._end_next(MoveState.SKIPPED, f"somebody else moved it, or {move.source} died: its owner is {owner}")
        elif move.target not in takers:
            self._end_next(MoveState.SKIPPED, f"{move.target} is gone, stopping or being drained: plan again")
        else:
            return False
        return True

    def settle_arrived(self, owners: Mapping[int, str]) -> None:
        """Of a cancelled operation: all moves whose shards are where they were to go are done, whoever noted it.

        owners   of the shards that exist and have one
        """
        left = deque[Place]()
        for place in self._queue:
            if owners.get(self.move(place).shard_id) == self.move(place).target:
                self.finish(place, MoveState.DONE)
            else:
                left.append(place)
        self._queue = left

    def pending_shards(self) -> list[int]:
        """Of the moves that are not done."""
        return [self.move(place).shard_id for place in self._queue]

    def arrived(self) -> None:
        """The next move is done."""
        self._end_next(MoveState.DONE)

    def failed(self, problem: str) -> None:
        """The next move was not made: it is tried again, or skipped if it failed too often."""
        place = self._queue[0]
        self._failures[place] += 1
        if self._failures[place] >= FAILURES_MAX:
            self._end_next(MoveState.SKIPPED, problem)
            return
        self._problems[place] = problem
        self._queue.rotate(-1)

    @property
    def only_failures_left(self) -> bool:
        """All that remain have failed before: there is no hurry."""
        return len(self._problems) == len(self._queue)

    def keep_progress(self, now_us: int) -> None:
        """To be called after each few moves; ends the operation if that is due."""
        problems = [f"shard {self.move(place).shard_id}: {problem}" for place, problem in self._problems.items()]
        self.keep(now_us, problems if self.is_running else [])
        if self.is_cancelled or not self._queue:
            self.end(now_us)

    def _end_next(self, state: MoveState, reason: str = "") -> None:
        place = self._queue.popleft()
        self._problems.pop(place, None)
        self.finish(place, state, reason)
