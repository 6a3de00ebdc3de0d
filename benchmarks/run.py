"""The command: `python -m benchmarks.run [--quick]`.

Settings that are read while torch is imported have to be in the environment before, so the process
starts itself again when they are missing; only the standard library is imported until then.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.settings import FULL, QUICK, environment

RESULTS = Path(__file__).parent / "results"


def main(arguments: Sequence[str]) -> int:
    """Measure, print the table and the summary; returns the exit code."""
    options = _parser().parse_args(arguments)
    wanted = environment()
    if dict(os.environ) != wanted:
        command = [sys.executable, "-m", "benchmarks.run", *arguments]
        os.execve(sys.executable, command, wanted)
    from rich.console import Console

    from benchmarks import report
    from benchmarks.suite import measure

    clock = report.Clock()
    scale = QUICK if options.quick else FULL
    outcome = measure(scale, options.folder, options.only)
    about = report.circumstances(_command(arguments), clock)
    report.show(outcome.rows, Console(width=None if sys.stdout.isatty() else 160))
    for line in outcome.remarks:
        print(line)
    print(f"{about.seconds:.0f} s; other processes used {about.others:.2f} cores meanwhile")
    if not options.no_save:
        for path in report.save(outcome.rows, about, options.output, "-quick" * options.quick):
            print(f"wrote {path}")
    print(json.dumps(report.summary(outcome.rows)))
    return 1 if outcome.failed else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="only what the summary needs")
    parser.add_argument("--only", action="append", metavar="CASE", help="only these cases")
    parser.add_argument("--no-save", action="store_true", help="write no result files")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of result files")
    parser.add_argument(
        "--folder",
        type=Path,
        default=Path(__file__).resolve().parents[1] / ".bench",
        help="where random checkpoints are kept",
    )
    return parser


def _command(arguments: Sequence[str]) -> str:
    return " ".join(["python -m benchmarks.run", *arguments])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
