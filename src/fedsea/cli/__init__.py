"""The command `fedsea`: reads options, calls the library, shows what it returns."""

from __future__ import annotations

import os

SPIN_VARIABLE = "GOMP_SPINCOUNT"
SHORT_SPIN = "2000"
INTERRUPTED = 130


def main() -> None:
    """Run the command line of this process.

    OpenMP threads spin for a short while only when they wait. With the long default two processes
    on the same cores, a client and a server say, stall each other for milliseconds. The variable
    is read when torch is imported, so it is set first.
    """
    os.environ.setdefault(SPIN_VARIABLE, SHORT_SPIN)
    try:
        from fedsea.cli.app import app

        app(prog_name="fedsea")
    except KeyboardInterrupt:  # before or after the command itself, which handles its own
        raise SystemExit(INTERRUPTED) from None
