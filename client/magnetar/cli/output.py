"""What commands print: data on stdout, as a table or as JSON; everything else on stderr."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Sequence
from dataclasses import fields, is_dataclass
from datetime import datetime
from typing import Any

WIDTH_WITHOUT_TERMINAL = 160


def emit_json(value: Any) -> None:
    """One JSON document on stdout."""
    sys.stdout.write(json.dumps(value, indent=2 if sys.stdout.isatty() else None) + "\n")


def emit_table(columns: Sequence[str], rows: Sequence[Sequence[object]], *, title: str | None = None) -> None:
    """A table on stdout; numbers are set to the right."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(title=title, title_justify="left", box=None, pad_edge=False, header_style="bold")
    for index, column in enumerate(columns):
        numeric = bool(rows) and all(row[index] is None or isinstance(row[index], int | float | Size) for row in rows)
        table.add_column(column, justify="right" if numeric else "left", overflow="fold")
    for row in rows:
        table.add_row(*(Text(_cell(value)) for value in row))
    console = Console(file=sys.stdout, width=None if sys.stdout.isatty() else WIDTH_WITHOUT_TERMINAL)
    # Rich would end the process itself if the reader of stdout has gone.
    with console.capture() as capture:
        console.print(table)
    sys.stdout.write("\n".join(line.rstrip() for line in capture.get().splitlines()) + "\n")


def emit_facts(facts: Iterable[tuple[str, object]]) -> None:
    """Names and values below each other."""
    facts = list(facts)
    width = max(len(name) for name, _ in facts)
    sys.stdout.write("".join(f"{name:<{width}}  {_cell(value)}\n" for name, value in facts))


def note(text: str) -> None:
    """A line for people, on stderr."""
    print(text, file=sys.stderr)


class Size:
    """Bytes, shown with a unit."""

    def __init__(self, size_bytes: int) -> None:
        self.size_bytes = size_bytes

    def __str__(self) -> str:
        return human_bytes(self.size_bytes)


def number_of(number: int, one: str, many: str = "") -> str:
    """1, "ledger" -> "1 ledger"; 2 -> "2 ledgers", or what `many` says."""
    return f"{number:,} {one if number == 1 else many or one + 's'}"


def human_bytes(size_bytes: int) -> str:
    """1536 -> "1.5 KiB"."""
    if size_bytes < 1024:
        return f"{size_bytes} B"
    size = float(size_bytes)
    for unit in ("KiB", "MiB", "GiB", "TiB"):
        size /= 1024
        if size < 1023.95:
            return f"{size:.1f} {unit}"
    return f"{size / 1024:.1f} PiB"


def human_seconds(seconds: float) -> str:
    """93.4 -> "1 min 33 s"."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    whole = int(seconds)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    if whole < 86400:
        return f"{whole // 3600} h {whole % 3600 // 60} min"
    return f"{whole // 86400} d {whole % 86400 // 3600} h"


def _cell(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.1f}"
    return "-" if value is None or value == "" else str(value)


def plain(value: Any) -> Any:
    """Dataclasses as what JSON has: their fields in order, times as ISO 8601."""
    if is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, list | tuple):
        return [plain(one) for one in value]
    return value.isoformat() if isinstance(value, datetime) else value
