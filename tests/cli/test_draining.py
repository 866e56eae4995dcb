"""What `magnetar bookies drain --wait` tells of a drain that does not go on."""

from __future__ import annotations

from dataclasses import replace

import pytest

from magnetar.broker.admin_storage import _problem as problem_of_server
from magnetar.cli.bookies import _problem, _tell
from magnetar.client import RepairStatus
from magnetar.metadata.records import CopyReason, CopyTask

STATUS = RepairStatus(
    enabled=True, delay=60.0, throttle=1, copies={"draining": 2}, stalled=2,
    problems=tuple(
        problem_of_server(CopyTask(7, name, "d", CopyReason.DRAINING, problem=f"no spare for {name}"))
        for name in ("bookie10", "bookie1")
    ),
    lost=(),
)  # fmt: skip


def test_the_reason_is_that_of_the_bookie_itself() -> None:
    assert _problem("bookie1", STATUS).endswith("no spare for bookie1")
    assert _problem("bookie2", STATUS) == ""
    assert "magnetar cluster repair --on" in _problem("bookie2", replace(STATUS, enabled=False))


def test_elsewhere_than_on_a_terminal_a_new_reason_is_told_though_nothing_moved(
    capsys: pytest.CaptureFixture[str],
) -> None:
    told = ""
    for problem in ("", "", "repair is switched off", "repair is switched off"):
        told = _tell(told, "0 %, 12 of 12 ledgers left", problem)
    lines = capsys.readouterr().err.splitlines()
    assert lines == ["0 %, 12 of 12 ledgers left", "0 %, 12 of 12 ledgers left; stalled: repair is switched off"]
