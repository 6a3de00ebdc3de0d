"""Write the tables of THREAT_MODEL.md and of the page on privacy accounting from code and results.

    python -m scripts.privacy_tables

Bounds and noise are computed by `fedsea.privacy`; measured tables are read from
`benchmarks/results`. A test compares the pages with what this script would write.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Final

from fedsea.privacy.accounts import DEFAULT_DELTA
from fedsea.privacy.gaussian import Gaussian
from fedsea.privacy.gaussian_loss import GaussianLoss, gaussian_mu
from fedsea.privacy.losses import PrivacyLoss
from fedsea.privacy.quantization import StochasticQuantization

ROOT: Final = Path(__file__).resolve().parents[1]
RESULTS: Final = ROOT / "benchmarks" / "results"
PAGES: Final = (ROOT / "THREAT_MODEL.md", ROOT / "docs" / "explanation" / "privacy-accounting.md")

_MARKED = re.compile(
    r"(<!-- ([\w-]+): written by scripts/privacy_tables\.py -->\n).*?(<!-- end of \2 -->)",
    re.DOTALL,
)
_WIDE, _NARROW = 4096, 128
_CERTAIN = 0.9995


def with_tables(text: str) -> str:
    """A page with the parts between its markers made anew.

    Raises:
        KeyError: a marker names a table that does not exist.
    """
    return _MARKED.sub(lambda found: f"{found[1]}\n{TABLES[found[2]]()}\n\n{found[3]}", text)


def recovery_bound() -> str:
    """The bound on recovery by one Gaussian release, for several guessers."""
    strengths = (0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0)
    losses = [Gaussian(clip_norm=1.0, mu=mu).loss() for mu in strengths]
    guesses = (
        ("recovered at most, if a guess is right 1 time in 32,000", 1 / 32_000),
        ("recovered at most, if a guess is right 1 time in 100", 0.01),
        ("recovered at most, if a guess is right 35 times in 100", 0.35),
    )
    return _table(
        ("mu", *(f"{mu:g}" for mu in strengths)),
        (f"epsilon at delta {DEFAULT_DELTA:g}", *(_figure(_epsilon(loss)) for loss in losses)),
        *(
            (words, *(_share(loss.recovery_bound(prior)) for loss in losses))
            for words, prior in guesses
        ),
    )


def noise() -> str:
    """How much Gaussian noise a guarantee for one release takes."""
    rows = []
    for epsilon in (1, 4, 8, 16, 64, 256):
        mechanism = Gaussian.calibrated(epsilon, DEFAULT_DELTA, clip_norm=1.0)
        ratios = (mechanism.sigma * math.sqrt(width) for width in (_WIDE, _NARROW))
        rows.append((str(epsilon), _figure(mechanism.mu), *(f"{ratio:.3g}" for ratio in ratios)))
    head = (f"epsilon at delta {DEFAULT_DELTA:g}", "mu")
    return _table((*head, *(f"noise / clip norm, {w:,} numbers" for w in (_WIDE, _NARROW))), *rows)


def composition() -> str:
    """What one release may cost when many of them share a budget."""
    total, rows = 8.0, []
    for releases in (1, 16, 64, 256, 1024):
        each = gaussian_mu(total, DEFAULT_DELTA) / math.sqrt(releases)
        ratio = Gaussian(clip_norm=1.0, mu=each).sigma * math.sqrt(_NARROW)
        rows.append((f"{releases:,}", _figure(each), f"{ratio:.3g}"))
    return _table(("releases", "mu of each", f"noise / clip norm, {_NARROW} numbers"), *rows)


def counts() -> str:
    """Stochastic quantization: the exact law beside the Gaussian figure of the paper."""
    rows = []
    for bits in (1, 4):
        for mu in (1.0, 2.0, 20.0):
            made = StochasticQuantization(bits, clip=0.05, mu=mu, width=_NARROW)
            exact, paper = made.loss(), GaussianLoss(made.paper_mu())
            rows.append(
                (
                    str(bits),
                    f"{mu:g}",
                    _figure(_epsilon(exact)),
                    _figure(_epsilon(paper)),
                    _figure(exact.pure_epsilon),
                    f"{made.paper_gamma():.2g}",
                )
            )
    head = ("bits", "mu", "epsilon, exact", "epsilon of mu alone", "epsilon at delta 0", "gamma")
    return _table(head, *rows)


def placeholders() -> str:
    """Recall of the built-in detectors on the held-out half of the data set."""
    (path,) = RESULTS.glob("*-placeholders.json")
    halves = json.loads(path.read_text(encoding="utf-8"))["halves"]
    (half,) = (each for each in halves if each["name"].startswith("held-out"))
    rows = [
        (each["type"], str(each["spans"]), f"{each['covered'] / each['spans']:.1%}")
        for each in half["recall"]
        if each["spans"]
    ]
    return _table(("type", "spans", "replaced in full"), *rows)


TABLES: Final[dict[str, Callable[[], str]]] = {
    "recovery-bound": recovery_bound,
    "noise": noise,
    "composition": composition,
    "counts": counts,
    "placeholders": placeholders,
}


def _epsilon(loss: PrivacyLoss) -> float:
    return loss.epsilon(DEFAULT_DELTA)


def _table(head: Sequence[str], *rows: Iterable[str]) -> str:
    lines = [head, ["---", *(["---:"] * (len(head) - 1))], *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def _figure(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _share(value: float) -> str:
    if value >= _CERTAIN:
        return "100 %"
    return f"{value * 100:.2g} %"


if __name__ == "__main__":
    for page in PAGES:
        page.write_text(with_tables(page.read_text(encoding="utf-8")), encoding="utf-8")
