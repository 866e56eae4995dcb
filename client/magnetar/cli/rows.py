"""Cuts bytes into rows, and finds each row's key. Pure.

lines  a row is what stands between two line ends; it may be empty
csv    a row may span lines inside a quoted field; the first one is the header, blank ones are skipped
jsonl  a row is a line with a JSON value; blank ones are skipped

A line ends with LF or CRLF. What a row holds is never changed, and it does not depend on how its bytes were cut.
"""

from __future__ import annotations

import enum
import json
import re
from collections.abc import Iterable, Iterator

ROW_BYTES_MAX = 16 << 20
"""A row that does not end within it is no row: an unclosed quote, or a file without line ends."""

HEADER_NAMES_SHOWN_MAX = 20

Group = tuple[list[bytes], list[bytes | None] | None]
"""Rows and, if a key column was named, their keys."""

# A field is quoted from its first byte to a quote that is not doubled, or holds anything but a comma.
# Only one way leads through a quoted field: nothing is tried twice. No possessive quantifiers: Python 3.11.2, that of
# Debian 12, gets them wrong.
_TO_CLOSING_QUOTE = rb'[^"]*(?:""[^"]*)*"(?!")'
_FIELD = rb'(?:"' + _TO_CLOSING_QUOTE + rb'[^,]*|(?!")[^,]*)'
_ONE_FIELD = re.compile(_FIELD)
_WHOLE_FIELDS = re.compile(_FIELD + rb"(?:," + _FIELD + rb")*")
_QUOTED = re.compile(rb'"([^"]*(?:""[^"]*)*)"(?!")')
_REST_OF_QUOTED = re.compile(_TO_CLOSING_QUOTE + rb"[^,]*(?:,|$)")


class Format(enum.StrEnum):
    lines = "lines"
    csv = "csv"
    jsonl = "jsonl"


class MalformedInput(Exception):
    """The input cannot be read: the message names the line."""


class NoSuchColumn(MalformedInput):
    """The header has no column of the key's name."""


class Rows:
    """Takes bytes as they come. `feed(b"")` ends the input.

    _rest     the line that has not ended
    _pending  lines of a CSV row that has not ended, of `_pending_bytes` together
    _line     number of the last whole line
    """

    def __init__(self, format: Format, key_column: str | None) -> None:
        self._format = format
        self._key_column = key_column
        self._key_index: int | None = None
        self._in_header = format is Format.csv
        self._rest = bytearray()
        self._pending: list[bytes] = []
        self._pending_bytes = 0
        self._line = 0

    def feed(self, data: bytes) -> Group:
        """The rows that are whole now and their keys. Raises MalformedInput."""
        lines = self._whole_lines(data)
        if self._format is Format.lines:
            self._line += len(lines)
            return [line.removesuffix(b"\r") for line in lines], None
        rows: list[bytes] = []
        keys: list[bytes | None] = []
        numbered = self._csv_rows(lines) if self._format is Format.csv else self._json_rows(lines)
        for number, row in numbered:
            keys.append(self._key(number, row))
            rows.append(row)
        if not data and self._pending:
            raise MalformedInput(f"line {self._line}: the input ends inside a quoted field")
        self._check_size(self._pending_bytes + len(self._rest))
        return rows, keys if self._key_column is not None else None

    def _whole_lines(self, data: bytes) -> list[bytes]:
        end = data.rfind(b"\n") + 1 if data else 0
        if end:
            self._rest += data[: end - 1]
            lines = bytes(self._rest).split(b"\n")
            self._rest = bytearray(data[end:])
        elif not data and self._rest:
            lines = [bytes(self._rest)]
            self._rest.clear()
        else:
            lines = []
            self._rest += data
        self._check_size(max(map(len, lines), default=len(self._rest)))
        return lines

    def _check_size(self, size_bytes: int) -> None:
        if size_bytes > ROW_BYTES_MAX:
            raise MalformedInput(f"line {self._line + 1}: the row has no end within {ROW_BYTES_MAX:,} bytes")

    def _csv_rows(self, lines: Iterable[bytes]) -> Iterator[tuple[int, bytes]]:
        for line in lines:
            self._line += 1
            if not self._pending and b'"' not in line:
                row = line
            else:
                quoted = ends_inside_quotes(line, inside=bool(self._pending))
                self._pending.append(line)
                self._pending_bytes += len(line) + 1
                self._check_size(self._pending_bytes)
                if quoted:
                    continue
                row = b"\n".join(self._pending)
                self._pending.clear()
                self._pending_bytes = 0
            row = row.removesuffix(b"\r")
            if not row:
                continue
            if self._in_header:
                self._read_header(row)
            else:
                yield self._line, row

    def _read_header(self, row: bytes) -> None:
        self._in_header = False
        names = [name.decode("utf-8", "replace") for name in split_fields(row.removeprefix(b"\xef\xbb\xbf"))]
        if self._key_column is None:
            return
        if self._key_column not in names:
            shown = ", ".join(names[:HEADER_NAMES_SHOWN_MAX]) + (", ..." if len(names) > HEADER_NAMES_SHOWN_MAX else "")
            raise NoSuchColumn(f"there is no column {self._key_column!r}; the header has {shown}")
        self._key_index = names.index(self._key_column)

    def _json_rows(self, lines: Iterable[bytes]) -> Iterator[tuple[int, bytes]]:
        for line in lines:
            self._line += 1
            row = line.removesuffix(b"\r")
            if row.strip():
                yield self._line, row

    def _key(self, number: int, row: bytes) -> bytes | None:
        if self._format is Format.jsonl:
            return self._json_key(number, row)
        if self._key_index is None:
            return None
        fields = split_fields(row)
        if self._key_index >= len(fields):
            raise MalformedInput(f"line {number}: {len(fields)} columns and none for the key {self._key_column!r}")
        return fields[self._key_index] or None

    def _json_key(self, number: int, row: bytes) -> bytes | None:
        try:
            value = json.loads(row)
        except (ValueError, RecursionError) as error:
            raise MalformedInput(f"line {number} is not JSON: {error}") from None
        if self._key_column is None:
            return None
        if not isinstance(value, dict):
            raise MalformedInput(f"line {number} is not a JSON object: it has no field {self._key_column!r}")
        key = value.get(self._key_column)
        if key is None or key == "":
            return None
        text = key if isinstance(key, str) else json.dumps(key, ensure_ascii=False, separators=(",", ":"))
        try:
            return text.encode()
        except UnicodeEncodeError:
            raise MalformedInput(f"line {number}: the key is not valid Unicode: {text!r}") from None


def ends_inside_quotes(line: bytes, *, inside: bool) -> bool:
    """Whether a quoted field is open at the end of the line, given whether one is at its start."""
    start = 0
    if inside:
        closing = _REST_OF_QUOTED.match(line)
        if closing is None:
            return True
        if not closing[0].endswith(b","):
            return False
        start = closing.end()
    return _WHOLE_FIELDS.fullmatch(line, start) is None


def split_fields(row: bytes) -> list[bytes]:
    """The values of a whole CSV row, without their quotes."""
    if b'"' not in row:
        return row.split(b",")
    fields = []
    position = 0
    while True:
        match = _ONE_FIELD.match(row, position)
        assert match is not None, "the row is whole"
        fields.append(_unquote(match[0]))
        if match.end() >= len(row):
            return fields
        position = match.end() + 1


def _unquote(field: bytes) -> bytes:
    if not field.startswith(b'"'):
        return field
    quoted = _QUOTED.match(field)
    assert quoted is not None, "the row is whole"
    return quoted[1].replace(b'""', b'"') + field[quoted.end() :]
