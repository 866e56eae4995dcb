"""The runner, as `make sim` runs it: a few seeds, and the promise that a seed is a run."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

RUN = Path(__file__).resolve().parent / "run.py"


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(RUN), *arguments], capture_output=True, text=True)


def transcript_of(output: str) -> str:
    found = re.search(r"^transcript ([0-9a-f]{16}), ([0-9.]+) virtual s", output, re.MULTILINE)
    assert found is not None, output
    return found[0]


def test_one_seed_twice_gives_the_same_transcript() -> None:
    runs = [run("--seed", "4711", "--calls", "250") for _ in range(2)]
    assert [each.returncode for each in runs] == [0, 0], runs[0].stdout[-2000:] + runs[0].stderr
    first, second = (transcript_of(each.stdout) for each in runs)
    assert first == second
    assert first != transcript_of(run("--seed", "4712", "--calls", "250").stdout)


def test_a_few_seeds_violate_nothing() -> None:
    result = run("--seeds", "4", "--first", "4720", "--calls", "250")
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr
    assert "4 seeds, 0 failed" in result.stdout


def test_a_planted_bug_is_found_and_reported_with_its_seed() -> None:
    plant = "ack before fsync"  # The first few seeds find it, whatever else changes; others take up to hundreds.
    result = run("--seeds", "40", "--first", "1", "--plant", plant)
    assert result.returncode == 1, result.stdout[-2000:] + result.stderr
    found = re.search(r"^seed (\d+): (durability|fence|lost|one end)", result.stdout, re.MULTILINE)
    assert found is not None, result.stdout[-2000:]
    assert f"again: make sim SEED={found[1]} PLANT='{plant}'" in result.stdout
