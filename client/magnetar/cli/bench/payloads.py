"""Payloads and keys, made before the measuring begins: random bytes, text that repeats itself, or rows of a file."""

from __future__ import annotations

import csv
import gzip
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from magnetar.cli.command import EXIT_USAGE, CommandFailed

DISTINCT = 4096
POOL_BYTES = 8 << 20
TEXT = b"flight,of,a,real,airline,on,time,"
ROWS_MAX = 1_000_000


@dataclass(frozen=True, slots=True)
class Group:
    """Messages that are sent together."""

    payloads: list[bytes]
    keys: list[bytes | None] | None
    payload_bytes: int


class Payloads:
    """Endless groups of so many messages, which repeat after some thousand."""

    def __init__(self, payloads: Sequence[bytes], keys: Sequence[bytes | None] | None, group: int) -> None:
        times = -(-group // len(payloads))
        self._groups = [
            _group(list(payloads) * times, None if keys is None else list(keys) * times, start, group)
            for start in range(0, len(payloads) * times - group + 1, group)
        ]
        self._next = 0

    def next(self) -> Group:
        group = self._groups[self._next]
        self._next = (self._next + 1) % len(self._groups)
        return group


def _group(payloads: list[bytes], keys: Sequence[bytes | None] | None, start: int, count: int) -> Group:
    chosen = payloads[start : start + count]
    return Group(chosen, None if keys is None else list(keys[start : start + count]), sum(map(len, chosen)))


def generated(size: int, keys: int, group: int, *, compressible: bool = False) -> Payloads:
    """Payloads of this size, random or compressible, with so many distinct keys in turn; 0: without keys."""
    length = POOL_BYTES + size
    pool = (TEXT * (length // len(TEXT) + 1))[:length] if compressible else os.urandom(length)
    step = POOL_BYTES // DISTINCT
    payloads = [pool[number * step : number * step + size] for number in range(DISTINCT)]
    if keys > DISTINCT:
        payloads = (payloads * (keys // DISTINCT + 1))[:keys]
    names = [f"key-{number % keys}".encode() for number in range(len(payloads))] if keys else None
    return Payloads(payloads, names, group)


def rows_of(path: Path, key_column: str | None, group: int) -> Payloads:
    """The rows of a CSV file, gzipped or not, keyed by one of its columns. Raises CommandFailed."""
    text = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    header, *lines = text.splitlines()[: ROWS_MAX + 1] or [b""]
    if not lines:
        raise CommandFailed(f"{path} has no rows under its header")
    columns = next(csv.reader([header.decode()]))
    if key_column is None:
        return Payloads(lines, None, group)
    if key_column not in columns:
        raise CommandFailed(f"{path} has no column {key_column!r}: its columns are {', '.join(columns)}", EXIT_USAGE)
    place = columns.index(key_column)
    keys = [row[place].encode() or None for row in csv.reader(line.decode() for line in lines)]
    return Payloads(lines, keys, group)
