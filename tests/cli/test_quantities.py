"""Sizes and rates as people type them."""

from __future__ import annotations

import pytest
import typer

from magnetar.cli.quantities import human_rate, parse_rate, parse_size


@pytest.mark.parametrize(
    ("text", "bytes_per_s"),
    [
        ("50MB/s", 50_000_000),
        ("50 MB/s", 50_000_000),
        ("1.5GiB/s", 3 << 29),
        ("800kB/s", 800_000),
        ("800 KBps", 800_000),
        ("1000", 1000),
        ("1000 B/s", 1000),
    ],
)
def test_a_rate_is_bytes_a_second(text: str, bytes_per_s: int) -> None:
    assert parse_rate(text) == bytes_per_s


@pytest.mark.parametrize("text", ["", "fast", "-5MB/s", "5MB/m", "MB/s", "5 5MB/s", "1e9", "٥MB/s", "9" * 40, "inf"])
def test_what_is_no_rate_is_refused(text: str) -> None:
    with pytest.raises(typer.BadParameter, match="is no rate"):
        parse_rate(text)


@pytest.mark.parametrize("text", ["0", "0MB/s", "0.0kB/s", "0.1 B/s"])
def test_a_rate_of_zero_is_refused_with_what_to_do_instead(text: str) -> None:
    with pytest.raises(typer.BadParameter, match="above zero, or pause"):
        parse_rate(text)


def test_sizes_may_be_zero() -> None:
    assert [parse_size(text) for text in ("0", "10GB", "2 GiB", "7b")] == [0, 10**10, 2 << 30, 7]


def test_a_rate_is_shown_as_it_is_typed() -> None:
    shown = [human_rate(rate) for rate in (50_000_000, 1_500_000_000, 800_000, 12)]
    assert shown == ["50.0 MB/s", "1.5 GB/s", "800.0 kB/s", "12 B/s"]
