"""Audit every mechanism, and mechanisms with known mistakes, through the real codec: the long run.

    python -m benchmarks.privacy_audit

writes a dated page. Random numbers come from the operating system, as in use. What is claimed is
audited on what really runs: `passed` is expected of the correct ones, `BROKEN` of the others.
"""

from __future__ import annotations

import argparse
import platform
import shlex
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path

import numpy
import scipy
import torch
from tests.broken_mechanisms import Case, cases

from fedsea.client.channel import format_of, wire_channel
from fedsea.privacy.audit import Audit, audit
from fedsea.privacy.gaussian import FedSEAGaussian, Gaussian
from fedsea.privacy.mechanism import Mechanism
from fedsea.privacy.metric import MetricDP
from fedsea.privacy.noise import NoiseSource
from fedsea.privacy.quantization import StochasticQuantization, Ternary

RESULTS = Path(__file__).parent / "results"


def every_case(width: int) -> list[Case]:
    """The mistakes at mu 1 and 3, and correct mechanisms of every kind."""
    correct: list[Mechanism] = [
        Gaussian(0.5, 2.0, center=torch.linspace(-1, 1, width)),
        FedSEAGaussian(1.0, clip_norm=1.0),
        StochasticQuantization(1, 0.05, 1.0, width),
        StochasticQuantization(2, 0.05, 1.0, width),
        StochasticQuantization(8, 0.05, 1.0, width),
        Ternary(0.05, 1.0, 0.5, width),
        MetricDP(6.0, 1.0, width),
    ]
    return [
        *cases(width, 1.0),
        *cases(width, 3.0),
        *(Case(f"{made.name}, correct", made, made, is_broken=False) for made in correct),
    ]


def main() -> int:
    """Run all cases and write the page; 1 when a verdict is not the expected one."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, default=200_000)
    parser.add_argument("--confidence", type=float, default=0.999)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--repeat", type=int, default=0, help="runs of the two small mistakes")
    parser.add_argument("--name", default="privacy-audit", help="of the page, after the date")
    options = parser.parse_args()
    noise, rows, wrong = NoiseSource(), [], 0
    began = time.monotonic()
    for case in every_case(options.width):
        channel = wire_channel(case.real, format_of(case.real, options.width), noise)
        start = time.monotonic()
        found = audit(
            case.claimed,
            channel,
            width=options.width,
            samples=options.samples,
            confidence=options.confidence,
        )
        row = _row(case, found, time.monotonic() - start)
        print(row)
        rows.append(row)
        wrong += found.passed is case.is_broken
    repeated = _repeated(options, noise)
    command = shlex.join(["python", "-m", "benchmarks.privacy_audit", *sys.argv[1:]])
    page = _page(command, time.monotonic() - began, [*rows, *repeated], wrong, options)
    path = RESULTS / f"{datetime.now(UTC).date()}-{options.name}.md"
    path.write_text(page, encoding="utf-8")
    print(f"{path}: {wrong} unexpected verdicts")
    return 1 if wrong else 0


def _repeated(options: argparse.Namespace, noise: NoiseSource) -> list[str]:
    """How often so many releases find the small mistakes, in rows of width 8."""
    width, lines = 8, []
    for mu in (1.0, 3.0):
        for case in cases(width, mu):
            if options.repeat and "small" in case.name:
                channel = wire_channel(case.real, format_of(case.real, width), noise)
                found = sum(
                    not audit(
                        case.claimed,
                        channel,
                        width=width,
                        samples=options.samples,
                        confidence=options.confidence,
                    ).passed
                    for _ in range(options.repeat)
                )
                lines.append(f"- {case.name}, mu {mu:g}: found in {found} of {options.repeat} runs")
                print(lines[-1])
    heading = ["", f"How often as many releases find a small mistake, width {width}:", ""]
    return [*heading, *lines] if lines else []


def _row(case: Case, found: Audit, seconds: float) -> str:
    verdict = "passed" if found.passed else "BROKEN"
    return (
        f"| {case.name} | `{found.spec}` | {found.claimed_mu:.4g} | {found.shown_mu:.3f} | "
        f"{found.false_positive:.4f} | {found.false_negative:.4f} | {verdict} | {seconds:.1f} |"
    )


def _page(
    command: str, seconds: float, rows: list[str], wrong: int, options: argparse.Namespace
) -> str:
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=True
    ).stdout.strip()
    return "\n".join(
        [
            f"# Audit of the mechanisms, {datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
            "",
            f"- command: `{command}`, {seconds:.0f} s, commit {commit}",
            f"- {options.samples:,} releases for each row, half of them of each of two inputs; "
            f"width {options.width}, confidence {options.confidence:.4g}; noise of the system",
            f"- verdicts that are not the expected ones: {wrong}",
            f"- versions: python {platform.python_version()}, torch {torch.__version__}, "
            f"numpy {numpy.__version__}, scipy {scipy.__version__}",
            "",
            "Every release is protected, written by the wire codec (fp32, or packed counts), read "
            "again, and scored by the log-likelihood ratio. `shown mu` is a lower bound: half of "
            "the releases choose the threshold, the other half certify its error rates "
            "(Clopper-Pearson; `fpr` and `fnr` are their upper bounds). A claim is broken when "
            "the two contradict its exact trade-off curve.",
            "",
            "| what runs | what is claimed | mu claimed | mu shown | fpr | fnr | verdict | s |",
            "|---|---|---:|---:|---:|---:|---|---:|",
            *rows,
            "",
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
