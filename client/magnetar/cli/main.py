"""The `magnetar` command: where the process begins and ends."""

from __future__ import annotations

import logging
import os
import sys
import warnings

INTERRUPTED = 130


def main() -> None:
    """Runs the command line and ends the process with its exit code."""
    _open_closed_descriptors()
    _keep_libraries_quiet()
    try:
        # Imported here: Ctrl-C must find somebody who takes care of it, also this early.
        from magnetar.cli.verbs import run_command_line

        code = run_command_line(sys.argv[1:])
    except KeyboardInterrupt:
        code = INTERRUPTED
    sys.exit(code)


def _open_closed_descriptors() -> None:
    """A closed descriptor would go to the next file that is opened, and what is printed would be written into it."""
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    if sys.stdin is None:
        sys.stdin = os.fdopen(0, closefd=False)
    if sys.stderr is None:
        sys.stderr = os.fdopen(2, "w", closefd=False)


def _keep_libraries_quiet() -> None:
    """Libraries would write to stderr, tracebacks among it, between the lines of the command."""
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    if os.environ.get("MAGNETAR_LOG") == "debug":
        logging.basicConfig(level=logging.DEBUG)
        return
    logging.getLogger().addHandler(logging.NullHandler())
    if not sys.warnoptions:
        warnings.simplefilter("ignore")


if __name__ == "__main__":
    main()
