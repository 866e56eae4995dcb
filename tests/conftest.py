"""What holds for every test: the same examples in each run, Ctrl-C as usual, and no skipped test in CI."""

from __future__ import annotations

import os
import signal

import pytest
from hypothesis import settings

settings.register_profile("magnetar", derandomize=True, deadline=None)
settings.load_profile("magnetar")

# A shell that starts the tests in the background has them ignore SIGINT, and every process that they start.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_sessionfinish(session: pytest.Session) -> None:
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if os.environ.get("CI") and reporter is not None and reporter.stats.get("skipped"):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
        reporter.write_line("a skipped test is a failure here: CI has all that a test may need", red=True)
