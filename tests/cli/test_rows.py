"""How input becomes messages: lines, CSV rows, JSON objects, and their keys."""

from __future__ import annotations

import csv
import io
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from magnetar.cli.rows import ROW_BYTES_MAX, Format, MalformedInput, NoSuchColumn, Rows, split_fields


def read(
    data: bytes, format: Format, key: str | None = None, cuts: list[int] | None = None
) -> list[tuple[bytes, bytes | None]]:
    """All rows with their keys, from data that comes in pieces."""
    rows = Rows(format, key)
    places = sorted({0, len(data), *(cut % (len(data) + 1) for cut in cuts or [])})
    pieces = [data[start:end] for start, end in pairwise(places)]
    found: list[tuple[bytes, bytes | None]] = []
    for piece in [*(piece for piece in pieces if piece), b""]:
        payloads, keys = rows.feed(piece)
        assert (keys is None) == (key is None)
        found += zip(payloads, keys or [None] * len(payloads), strict=True)
    return found


def payloads(data: bytes, format: Format, key: str | None = None) -> list[bytes]:
    return [payload for payload, _ in read(data, format, key)]


def feed_twice_the_limit(rows: Rows, block: bytes) -> None:
    for _ in range(2 * ROW_BYTES_MAX // len(block)):
        rows.feed(block)


def keys(data: bytes, format: Format, key: str) -> list[bytes | None]:
    return [found for _, found in read(data, format, key)]


@pytest.mark.parametrize(
    ("data", "rows"),
    [
        (b"", []),
        (b"\n", [b""]),
        (b"a\nb\n", [b"a", b"b"]),
        (b"a\nb", [b"a", b"b"]),
        (b"a\r\nb\r\n", [b"a", b"b"]),
        (b"a\rb\n\r\n", [b"a\rb", b""]),
        (b"a\n\n\nb", [b"a", b"", b"", b"b"]),
        (b"\xff\x00\n\xfe", [b"\xff\x00", b"\xfe"]),
    ],
)
def test_lines_end_with_lf_or_crlf_and_the_last_one_needs_no_end(data: bytes, rows: list[bytes]) -> None:
    assert payloads(data, Format.lines) == rows


def test_the_header_of_a_csv_file_is_not_sent_and_blank_rows_are_skipped() -> None:
    assert payloads(b"id,name\r\n\r\n1,a\r\n2,b\r\n\n", Format.csv) == [b"1,a", b"2,b"]


def test_a_byte_order_mark_is_no_part_of_the_first_column() -> None:
    assert keys(b"\xef\xbb\xbfid,name\n7,a\n", Format.csv, "id") == [b"7"]


def test_a_row_may_span_lines_inside_quotes_and_stays_as_it_was() -> None:
    data = b'id,text\r\n1,"two\r\nlines, one ""quote"""\r\n2,plain\r\n'
    assert read(data, Format.csv, "id") == [(b'1,"two\r\nlines, one ""quote"""', b"1"), (b"2,plain", b"2")]


def test_a_quote_inside_an_unquoted_field_is_an_ordinary_byte() -> None:
    assert read(b'size,name\n5" pipe,a\n6",b\n', Format.csv, "name") == [(b'5" pipe,a', b"a"), (b'6",b', b"b")]


def test_the_key_is_the_value_of_the_field_without_its_quotes() -> None:
    data = b'"the ""key""",x\n"a,b",1\n"say ""hi""",2\n,3\n"",4\nplain,5\n"half"way,6\n'
    assert keys(data, Format.csv, 'the "key"') == [b"a,b", b'say "hi"', None, None, b"plain", b"halfway"]


def test_a_column_that_is_not_there_is_named_with_those_that_are() -> None:
    with pytest.raises(NoSuchColumn, match=r"no column 'tail'; the header has year, month"):
        read(b"year,month\n2013,1\n", Format.csv, "tail")


def test_a_row_without_the_key_column_is_named_by_its_line() -> None:
    with pytest.raises(MalformedInput, match="line 4: 1 columns and none for the key 'b'"):
        read(b'a,b\n"x\ny",1\nz\n', Format.csv, "b")


def test_input_that_ends_inside_quotes_is_an_error() -> None:
    with pytest.raises(MalformedInput, match="ends inside a quoted field"):
        read(b'a,b\n1,"open\nand more\n', Format.csv)


def test_an_unclosed_quote_is_found_before_it_takes_all_memory() -> None:
    rows = Rows(Format.csv, None)
    rows.feed(b'a\n"')
    block = b"x" * 1023 + b"\n"
    with pytest.raises(MalformedInput, match="the row has no end within"):
        feed_twice_the_limit(rows, block * 1024)


def test_a_line_without_an_end_is_found_before_it_takes_all_memory() -> None:
    rows = Rows(Format.lines, None)
    with pytest.raises(MalformedInput, match="line 1: the row has no end within"):
        feed_twice_the_limit(rows, b"x" * (1 << 20))


def test_a_huge_row_comes_whole_from_small_pieces() -> None:
    quoted = b'1,"' + b'line ""x"",\r\n' * 300_000 + b'"'
    rows = Rows(Format.csv, "id")
    data = b"id,text\n" + quoted + b"\n2,b\n"
    found: list[bytes] = []
    for start in range(0, len(data), 1 << 12):
        found += rows.feed(data[start : start + (1 << 12)])[0]
    assert found == [quoted, b"2,b"]


def test_json_keys_are_the_text_of_the_field() -> None:
    data = b'{"k":"a\\u00fc"}\n\n  \r\n{"k":7}\r\n{"k":null}\n{"j":1}\n{"k":""}\n{"k":[1,"x"]}\n{"k":true}'
    assert keys(data, Format.jsonl, "k") == ["aü".encode(), b"7", None, None, None, b'[1,"x"]', b"true"]


def test_json_rows_are_sent_as_they_are_written() -> None:
    assert payloads(b' {"a" : 1.0}\r\n[2]\n', Format.jsonl) == [b' {"a" : 1.0}', b"[2]"]


@pytest.mark.parametrize(
    ("row", "key", "message"),
    [
        (b"{", None, "line 2 is not JSON"),
        (b"\xff", None, "line 2 is not JSON"),
        (b"[" * 200_000, None, "line 2 is not JSON"),
        (b"[1]", "k", "line 2 is not a JSON object: it has no field 'k'"),
        (b'{"k":"\\ud800"}', "k", "line 2: the key is not valid Unicode"),
    ],
)
def test_json_that_cannot_be_read_is_named_by_its_line(row: bytes, key: str | None, message: str) -> None:
    with pytest.raises(MalformedInput, match=message):
        read(b'{"k": 1}\n' + row + b"\n", Format.jsonl, key)


texts = st.text(alphabet='a",\n\r é', max_size=6)
tables = st.lists(st.lists(texts, min_size=2, max_size=2), max_size=6)


@given(tables, st.sampled_from(["\n", "\r\n"]), st.booleans(), st.lists(st.integers(min_value=0), max_size=8))
def test_csv_is_read_as_it_was_written_however_its_bytes_are_cut(
    table: list[list[str]], line_end: str, quote_all: bool, cuts: list[int]
) -> None:
    text = io.StringIO()
    # Without quotes, a field that ends in CR at the end of a line is a line end.
    quote_all = quote_all or any("\r" in field for row in table for field in row)
    quoting = csv.QUOTE_ALL if quote_all else csv.QUOTE_MINIMAL
    writer = csv.writer(text, lineterminator=line_end, quoting=quoting)
    writer.writerows([["k", "other"], *table])
    found = read(text.getvalue().encode(), Format.csv, "k", cuts)
    assert [split_fields(payload) for payload, _ in found] == [[f.encode() for f in row] for row in table]
    assert [key for _, key in found] == [row[0].encode() or None for row in table]


@given(st.sampled_from(list(Format)), st.lists(st.sampled_from([b"a", b'"', b",", b"\n", b"\r", b"1", b"{}", b"\xff"])),
       st.lists(st.integers(min_value=0), max_size=8))  # fmt: skip
def test_any_cut_of_any_bytes_gives_the_same_rows_or_the_same_error(
    format: Format, parts: list[bytes], cuts: list[int]
) -> None:
    data = b"k,a\n" + b"".join(parts) if format is Format.csv else b"".join(parts)
    key = "k" if format is Format.csv else None

    def outcome(cuts: list[int]) -> object:
        try:
            return read(data, format, key, cuts)
        except MalformedInput as error:
            return str(error)

    assert outcome(cuts) == outcome([])
