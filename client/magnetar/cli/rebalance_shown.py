"""What `magnetar rebalance` prints for people: plans, operations, progress."""

from __future__ import annotations

import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING

from magnetar.cli.output import Size, emit_facts, emit_table, human_bytes, human_seconds, note, number_of
from magnetar.cli.quantities import human_rate

if TYPE_CHECKING:
    from magnetar.client import LedgerVerification, RebalanceOperation, RebalancePlan, RebalanceVerification

PROBLEMS_SHOWN_MAX = 20
REASONS_SHOWN_MAX = 3


# Plans.


def show_plan(found: RebalancePlan, throttle: int, moves: bool) -> None:
    """`moves`: one by one too."""
    if found.of_brokers:
        to_move = [("to move", number_of(len(found.moves), "shard"))]
    else:
        time = f"{human_seconds(found.seconds_at(throttle))} at {human_rate(throttle)}"
        to_move = [("to move", f"{number_of(len(found.moves), 'segment')}, {human_bytes(found.bytes)}"), ("time", time)]
    emit_facts(
        [
            ("revision", str(found.revision)),
            ("goal", found.goal),
            *to_move,
            ("skew before", _percent(found.skew_before)),
            ("skew after", _percent(found.skew_after)),
            *(("note", text) for text in found.notes),
        ]
    )
    print()
    if found.of_brokers:
        _show_broker_plan(found, moves)
    else:
        _show_bookie_plan(found, moves)


def _show_broker_plan(found: RebalancePlan, moves: bool) -> None:
    emit_table(
        ["broker", "shards before", "after", "load before", "after"],
        [
            (b.broker, b.shards_before, b.shards_after, _percent(b.load_before), _percent(b.load_after))
            for b in found.brokers
        ],
    )
    if not found.moves:
        return
    shards, loads = Counter[tuple[str, str]](), defaultdict[tuple[str, str], float](float)
    for move in found.moves:
        shards[move.source, move.target] += 1
        loads[move.source, move.target] += move.load
    print()
    emit_table(
        ["from", "to", "shards", "load"], [(*pair, shards[pair], _percent(loads[pair])) for pair in sorted(shards)]
    )
    if moves:
        print()
        emit_table(
            ["shard", "from", "to", "load"], [(str(m.shard), m.source, m.target, _percent(m.load)) for m in found.moves]
        )


def _show_bookie_plan(found: RebalancePlan, moves: bool) -> None:
    amount: Callable[[float], object] = (lambda n: Size(round(n))) if found.goal == "bytes" else round
    emit_table(
        ["bookie", "before", "after", "even share"],
        [(b.bookie, amount(b.before), amount(b.after), amount(b.even)) for b in found.bookies],
    )
    if not found.moves:
        return
    segments, sizes = Counter[tuple[str, str]](), Counter[tuple[str, str]]()
    for move in found.moves:
        segments[move.source, move.target] += 1
        sizes[move.source, move.target] += move.bytes
    print()
    emit_table(
        ["from", "to", "segments", "bytes"], [(*pair, segments[pair], Size(sizes[pair])) for pair in sorted(segments)]
    )
    if moves:
        print()
        emit_table(
            ["ledger", "from", "to", "bytes"], [(str(m.ledger), m.source, m.target, Size(m.bytes)) for m in found.moves]
        )


# Operations.


def show_begun(begun: RebalanceOperation, dry_run: bool) -> None:
    what = _things(begun, begun.moves)
    if not begun.of_brokers:
        what += f", {human_bytes(begun.bytes)}, at {human_rate(begun.throttle)}"
    for text in begun.notes:
        note(f"left out: {text}")
    if dry_run:
        note(f"would begin: {what}")
        return
    print(begun.operation)
    note(f"begun: {what}; follow it with: magnetar rebalance status {begun.operation} --watch")


def show_operations(found: Sequence[RebalanceOperation]) -> None:
    emit_table(
        ["operation", "goal", "state", "percent", "moves", "bytes", "created", "takes back"],
        [
            (
                one.operation, one.goal, one.state, one.percent, one.moves,
                None if one.of_brokers else Size(one.bytes),
                one.created.isoformat(timespec="seconds"), one.rollback_of,
            )
            for one in found
        ],
    )  # fmt: skip


def show_status(found: RebalanceOperation) -> None:
    copies = () if found.of_brokers else (
        ("moved", human_bytes(found.bytes_done)),
        ("remaining", human_bytes(found.bytes_remaining)),
        ("throttle", human_rate(found.throttle)),
    )  # fmt: skip
    emit_facts(
        [
            ("operation", found.operation),
            ("state", found.state),
            ("goal", found.goal),
            ("takes back", found.rollback_of),
            ("done", f"{found.percent:.1f} %, {found.moves_done:,} of {_things(found, found.moves)}"),
            *copies,
            ("skipped", _skipped(found)),
            ("rate", _rate(found)),
            ("time left", None if found.eta_s is None else human_seconds(found.eta_s)),
            ("created", found.created.isoformat(timespec="seconds")),
            ("ended", None if found.ended is None else found.ended.isoformat(timespec="seconds")),
            *(("stalled", problem) for problem in found.problems),
        ]
    )
    print()
    columns = ["gets", "of that done", "gives", "of that done"]
    if found.of_brokers:
        emit_table(
            ["broker", *columns],
            [(b.broker, b.shards_in, b.shards_in_done, b.shards_out, b.shards_out_done) for b in found.brokers],
        )
    else:
        emit_table(
            ["bookie", *columns],
            [
                (b.bookie, Size(b.bytes_in), Size(b.bytes_in_done), Size(b.bytes_out), Size(b.bytes_out_done))
                for b in found.bookies
            ],
        )
    if found.skipped:
        print()
        emit_table(
            ["skipped shard" if found.of_brokers else "skipped ledger", "from", "to", "reason"],
            [(str(move.shard or move.ledger), move.source, move.target, move.reason) for move in found.skipped],
        )


def left_out(found: RebalanceOperation) -> str:
    """What of an operation that has ended was not moved, why, and what to do next; empty if all was."""
    all_of_it, plan_again = _things(found, found.moves), f"`magnetar rebalance plan --goal {found.goal}`"
    if found.state == "CANCELLED":
        rollback = f"take back what was with `magnetar rebalance rollback {found.operation}`, or "
        return (
            f"{found.operation} was cancelled, {found.moves_done:,} of {all_of_it} moved: "
            f"{rollback if found.moves_done else ''}plan again with {plan_again}"
        )
    if not found.moves_skipped:
        return ""
    reasons = list(dict.fromkeys(move.reason for move in found.skipped))
    more = ", ..." if len(reasons) > REASONS_SHOWN_MAX else ""
    return (
        f"{found.operation} left out {found.moves_skipped:,} of {all_of_it} "
        f"({', '.join(reasons[:REASONS_SHOWN_MAX])}{more}): plan again with {plan_again}"
    )


def _things(found: RebalanceOperation, number: int) -> str:
    return number_of(number, "shard" if found.of_brokers else "segment")


def _skipped(found: RebalanceOperation) -> str:
    what = _things(found, found.moves_skipped)
    return what if found.of_brokers else f"{what}, {human_bytes(found.bytes_skipped)}"


def _rate(found: RebalanceOperation) -> str:
    return f"{found.rate:,} shards/s" if found.of_brokers else human_rate(found.rate)


def _percent(share: float) -> str:
    return f"{share * 100:.1f} %"


# Progress.


class Progress(ExitStack):
    """What is seen of an operation on the way: a bar on a terminal, else a line for each change, on stderr."""

    def __init__(self, operation: RebalanceOperation) -> None:
        super().__init__()
        self._bar = self.enter_context(_Bar(operation)) if sys.stderr.isatty() else None
        self._shown: object = None

    def show(self, found: RebalanceOperation, write: Callable[[RebalanceOperation], None] | None) -> None:
        """`write`: what is done with each change instead of a line."""
        line = (found.state, found.moves_done, found.moves_skipped, found.throttle, found.problems)
        if self._bar is not None:
            self._bar.show(found)
        elif line != self._shown and found.ended is None:
            if write is not None:
                write(found)
            else:
                note(_line(found))
        self._shown = line


def _line(found: RebalanceOperation) -> str:
    stalled = f", stalled: {'; '.join(found.problems)}" if found.problems else ""
    left = "" if found.eta_s is None else f", {human_seconds(found.eta_s)} left"
    if found.of_brokers:
        done = f"{found.moves_done:,} of {_things(found, found.moves)}"
    else:
        done = f"{human_bytes(found.bytes_done)} of {human_bytes(found.bytes)}"
    return f"{found.operation} {found.state}: {found.percent:.1f} %, {done}, {_rate(found)}{left}{stalled}"


class _Bar:
    """A progress bar on stderr."""

    def __init__(self, operation: RebalanceOperation) -> None:
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            DownloadColumn,
            MofNCompleteColumn,
            Progress,
            TaskProgressColumn,
            TextColumn,
        )

        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TaskProgressColumn(),
            MofNCompleteColumn() if operation.of_brokers else DownloadColumn(binary_units=True),
            TextColumn("{task.fields[facts]}"),
            console=Console(stderr=True),
        )
        self._task = self._progress.add_task(operation.operation, total=1, facts="")

    def __enter__(self) -> _Bar:
        self._progress.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._progress.stop()

    def show(self, found: RebalanceOperation) -> None:
        left = "" if found.eta_s is None else f"{human_seconds(found.eta_s)} left"
        facts = [found.state.lower(), _rate(found), left, *found.problems[:1]]
        if found.of_brokers:
            done, total = found.moves_done, found.moves - found.moves_skipped
        else:
            done, total = found.bytes_done, found.bytes - found.bytes_skipped
        self._progress.update(
            self._task,
            completed=done if found.ended is None or total else 1,
            total=max(1, total),
            facts=", ".join(filter(None, facts)),
        )


# Verification.


def show_verification(found: RebalanceVerification) -> None:
    emit_facts(
        [
            ("operation", found.operation),
            ("compared", f"{compared(found)} in {number_of(found.ledgers, 'ledger')}"),
            ("bytes", f"{human_bytes(found.bytes)}, of all copies"),
            ("trimmed since", number_of(found.trimmed, "ledger")),
            ("problems", len(found.problems)),
            *(("problem", problem) for problem in found.problems[:PROBLEMS_SHOWN_MAX]),
        ]
    )


def compared(found: LedgerVerification | RebalanceVerification) -> str:
    return f"{number_of(found.copies, 'copy', 'copies')} of {number_of(found.entries, 'entry', 'entries')}"


class LedgersBar:
    """A progress bar on stderr, a step for each ledger."""

    def __init__(self, ledgers: int) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (TextColumn("ledgers compared"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        self._progress = Progress(*columns, console=Console(stderr=True))
        self._task = self._progress.add_task("", total=max(1, ledgers))

    def __enter__(self) -> LedgersBar:
        self._progress.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._progress.stop()

    def compared(self, _found: LedgerVerification) -> None:
        self._progress.advance(self._task)
