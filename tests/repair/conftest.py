"""The world of the repair tests."""

from __future__ import annotations

import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from repair_world import RepairWorld


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[RepairWorld]:
    made = RepairWorld(tmp_path)
    yield made
    await made.close()
