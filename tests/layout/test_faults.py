"""FAULTS.md names every case, and only tests that exist."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parents[1]
FAULTS, _, BUGS = (TESTS / "FAULTS.md").read_text().partition("\n## Bugs found\n")
CASES = 36
REFERENCE = re.compile(r"`([\w/]+\.(?:py|txt)(?:::\w+)?)`")
CASE_TEXTS = {
    int(number): text for number, text in re.findall(r"^(\d+)\. ((?:.|\n(?! *\d+\. |\n))*)", FAULTS, re.MULTILINE)
}


@cache
def names_in(path: Path) -> set[str]:
    nodes = ast.walk(ast.parse(path.read_text()))
    return {node.name for node in nodes if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)}


def test_every_case_is_there() -> None:
    assert list(CASE_TEXTS) == list(range(1, CASES + 1))


@pytest.mark.parametrize("number", CASE_TEXTS)
def test_a_case_is_shown_by_a_test_or_says_why_not(number: int) -> None:
    assert REFERENCE.search(CASE_TEXTS[number]) or "Not yet:" in CASE_TEXTS[number]


@pytest.mark.parametrize("reference", sorted(set(REFERENCE.findall(FAULTS + BUGS))))
def test_a_test_that_is_named_exists(reference: str) -> None:
    path, _, name = reference.partition("::")
    assert (TESTS / path).is_file()
    assert not name or (name.startswith("test_") and name in names_in(TESTS / path))


def test_a_bug_has_a_run_a_symptom_a_cause_and_a_fix() -> None:
    rows = [line for line in BUGS.splitlines() if line.startswith("|")]
    assert rows[0] == "| seed or run | symptom | cause | fix |"
    assert all(all(cell.strip() for cell in row.strip("|").split(" | ")) and row.count(" | ") == 3 for row in rows[2:])
