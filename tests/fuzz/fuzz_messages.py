"""Fuzz the decoder of messages with coverage guidance, by hand, for as long as you like.

    pip install atheris
    python -m tests.fuzz.fuzz_messages -max_total_time=600

`tests/fuzz/test_messages.py` runs the same `judge` under hypothesis with every test run.
"""

from __future__ import annotations

import importlib
import sys


def main() -> None:
    """Run until an argument of libFuzzer or a finding ends it."""
    # By name, because the tool is optional: neither installed for the tests nor typed.
    atheris = importlib.import_module("atheris")
    with atheris.instrument_imports(include=["fedsea"]):
        judge = importlib.import_module("tests.fuzz.judge").judge
    atheris.Setup(sys.argv, judge)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
