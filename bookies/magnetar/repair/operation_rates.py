"""At which rate a bookie makes the copies of each rebalancing: its part of the operation's rate. Pure.

All targets that have tasks of an operation share its rate evenly. Copies of a rebalancing are not counted against the
rate of repair, nor the other way round: a throttle belongs to its operation, and ends with it.
"""

from __future__ import annotations

from collections.abc import Iterable

from magnetar.metadata.records import CopyTask, Operation
from magnetar.repair.throttle import Throttle

CATCH_UP_S = 3.0
"""A copy that waited for a busy disk makes up for so much: the rate is held on average, from above and from below."""


class OperationRates:
    """Told of every operation that stands in the store, and of those that went."""

    def __init__(self) -> None:
        self._bytes_per_s: dict[str, int] = {}
        self._throttles: dict[str, Throttle] = {}

    def keep(self, operation: Operation) -> None:
        self._bytes_per_s[operation.operation_id] = operation.bytes_per_s

    def forget(self, operation_id: str) -> None:
        self._bytes_per_s.pop(operation_id, None)
        self._throttles.pop(operation_id, None)

    def forget_all(self) -> None:
        self._bytes_per_s.clear()
        self._throttles.clear()

    def throttle(self, operation_id: str, tasks: Iterable[CopyTask], now: float) -> Throttle | None:
        """With the rate as it is now; None for an operation that is not known. `tasks`: all of the cluster."""
        rate = self._bytes_per_s.get(operation_id)
        if rate is None:
            return None
        targets = {task.target for task in tasks if task.operation == operation_id and task.target}
        share = max(1, rate // max(1, len(targets)))
        throttle = self._throttles.setdefault(operation_id, Throttle(share, now, CATCH_UP_S))
        if throttle.bytes_per_s != share:
            throttle.set_rate(share, now)
        return throttle
