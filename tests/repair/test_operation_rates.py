"""The rate of a rebalancing at one of its targets."""

from __future__ import annotations

from magnetar.metadata.records import CopyReason, CopyTask, Goal, Operation, OperationState
from magnetar.repair.operation_rates import OperationRates


def operation(name: str, bytes_per_s: int) -> Operation:
    return Operation(name, Goal.BYTES, OperationState.RUNNING, bytes_per_s, 1, 1, 1, 1, b"m")


def tasks(*targets: str, name: str = "r-1") -> list[CopyTask]:
    return [CopyTask(n, "a", target, CopyReason.REBALANCE, name) for n, target in enumerate(targets, 1)]


def test_targets_share_the_rate_and_get_more_when_others_are_done() -> None:
    rates = OperationRates()
    rates.keep(operation("r-1", 900))
    mixed = [*tasks("d", "e", "e", "f"), *tasks("g", name="r-2")]
    throttle = rates.throttle("r-1", mixed, 0.0)
    assert throttle is not None
    assert throttle.bytes_per_s == 300
    assert rates.throttle("r-1", tasks("d"), 1.0) is throttle
    assert throttle.bytes_per_s == 900


def test_a_changed_rate_holds_at_once_and_what_is_owed_stays_owed() -> None:
    rates = OperationRates()
    rates.keep(operation("r-1", 100))
    throttle = rates.throttle("r-1", tasks("d"), 0.0)
    assert throttle is not None
    throttle.spend(1000, 0.0)
    rates.keep(operation("r-1", 1000))
    assert rates.throttle("r-1", tasks("d"), 0.0) is throttle
    assert throttle.wait_s(0.0) == 1.0


def test_the_throttle_ends_with_its_operation() -> None:
    rates = OperationRates()
    rates.keep(operation("r-1", 100))
    assert rates.throttle("", tasks("d"), 0.0) is None
    rates.forget("r-1")
    assert rates.throttle("r-1", tasks("d"), 0.0) is None
