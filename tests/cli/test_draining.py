"""What those who wait for long work are told when it, or the cluster, does not go on."""

from __future__ import annotations

from dataclasses import replace

import pytest

from magnetar.cli import command
from magnetar.cli.bookies import _problem, _progress, _tell
from magnetar.cli.command import EXIT_TIMEOUT, CommandFailed, until_answered
from magnetar.client import ClusterUnavailable, RepairStatus

STATUS = RepairStatus(
    enabled=True, delay=60.0, throttle=1, copies={"draining": 2}, stalled=2, problems=(), lost=(),
    stalled_bookies={name: f"no spare for {name}" for name in ("bookie10", "bookie1")},
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


def test_one_ledger_is_not_one_ledgers() -> None:
    assert _progress(1, 1, 5.0) == "0 %, 1 of 1 ledger left"
    assert _progress(2, 1, 5.0) == "50 %, 1 of 2 ledgers left, about 5.0 s to go"


class Silent:
    """A cluster that cannot answer so many times."""

    def __init__(self, times: int) -> None:
        self.times = times

    async def ask(self) -> str:
        if self.times:
            self.times -= 1
            raise ClusterUnavailable("nobody is elected")
        return "answer"


async def test_a_moment_without_an_answer_ends_no_watching(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command, "UNANSWERED_PAUSE_S", 0.0)
    assert await until_answered(Silent(3).ask) == "answer"
    assert capsys.readouterr().err == "waiting for the cluster: nobody is elected\n"


async def test_a_cluster_that_stays_silent_is_given_up_with_what_still_stands(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "UNANSWERED_S", 0.0)
    with pytest.raises(CommandFailed, match=r"what was ordered stands.* nobody is elected") as failed:
        await until_answered(Silent(1).ask)
    assert failed.value.exit_code == EXIT_TIMEOUT
