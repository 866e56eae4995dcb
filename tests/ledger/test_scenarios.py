"""The scenarios in `scenarios/`: each pitfall of the protocol as a story, with what everybody does in it.

REWRITE_SCENARIOS=1 writes down what was heard instead of comparing it: read the difference before you believe it.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from scenario_script import Script

SCENARIOS = sorted((Path(__file__).parent / "scenarios").glob("*.txt"))


@pytest.mark.parametrize("path", SCENARIOS, ids=lambda path: path.stem)
def test_everybody_does_what_the_scenario_says(path: Path) -> None:
    written = path.read_text()
    heard = Script().run(written)
    if os.environ.get("REWRITE_SCENARIOS"):
        path.write_text(heard)
    else:
        assert heard == written


def test_every_pitfall_has_a_scenario() -> None:
    numbers = {int(path.name.partition("_")[0]) for path in SCENARIOS}
    assert numbers >= set(range(1, 17))
