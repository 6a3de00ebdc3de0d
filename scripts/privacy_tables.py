"""Write the tables of THREAT_MODEL.md and of the page on privacy accounting from code and results.

    python -m scripts.privacy_tables

Bounds and noise are computed by `fedsea.privacy`; measured tables are read from
`benchmarks/results`. A test compares the pages with what this script would write.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

from fedsea.evaluation.verdict import PUBLISHED_SCALES, Setting, published_scale, settings
from fedsea.privacy.accounts import DEFAULT_DELTA
from fedsea.privacy.gaussian import Gaussian
from fedsea.privacy.gaussian_loss import GaussianLoss, gaussian_mu
from fedsea.privacy.losses import PrivacyLoss
from fedsea.privacy.quantization import StochasticQuantization
from fedsea.redteam.report import TITLES, Row, parse, percent, perplexity_text

ROOT: Final = Path(__file__).resolve().parents[1]
RESULTS: Final = ROOT / "benchmarks" / "results"
PAGES: Final = (ROOT / "THREAT_MODEL.md", ROOT / "docs" / "explanation" / "privacy-accounting.md")

_MARKED = re.compile(
    r"(<!-- ([\w-]+): written by scripts/privacy_tables\.py -->\n).*?(<!-- end of \2 -->)",
    re.DOTALL,
)
_WIDE, _NARROW = 4096, 128
_CERTAIN = 0.9995
_ATTACKS = ("nn", "r1", "r2")


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
    halves = json.loads(_newest("*-placeholders.json").read_text(encoding="utf-8"))["halves"]
    (half,) = (each for each in halves if each["name"].startswith("held-out"))
    rows = [
        (each["type"], str(each["spans"]), f"{each['covered'] / each['spans']:.1%}")
        for each in half["recall"]
        if each["spans"]
    ]
    return _table(("type", "spans", "replaced in full"), *rows)


def clean_channel() -> str:
    """What the attacks read where nothing protects, and at the largest noise of the FedSEA paper."""
    rows = []
    for (model, bottom, _), found in _by_cut().items():
        for setting in settings(found):
            one = setting.strongest
            if one.is_clean or published_scale(one) == max(PUBLISHED_SCALES):
                utility = f"{one.utility.accuracy * 100:.1f} %"
                cells = (model, str(bottom), f"`{one.parameters}`", utility, percent(one.prior))
                rows.append((*cells, *_recoveries(setting)))
    head = ("model", "bottom", "what protects", "next-token accuracy", "a guess")
    return _table((*head, *(name for name in _ATTACKS)), *rows)


def sweep() -> str:
    """All mechanisms at rising noise, behind one block of each model."""
    rows = []
    for (model, bottom, _), found in _by_cut().items():
        if bottom != 1:
            continue
        for setting in settings(found):
            one = setting.strongest
            rows.append(
                (
                    model,
                    one.mechanism,
                    f"{one.noise:.2f}",
                    perplexity_text(one.utility.perplexity),
                    percent(one.utility.agreement),
                    percent(one.prior),
                    *_recoveries(setting),
                )
            )
    head = ("model", "mechanism", "noise / rows", "perplexity", "agreement", "a guess")
    return _table((*head, *(name for name in _ATTACKS)), *rows)


def learned() -> str:
    """Attackers that learn, read answers, or break secret rotations."""
    rows = [
        (row.attack, TITLES[row.attack], row.knowledge, f"`{row.parameters}`",
         percent(row.recovery), f"{row.low * 100:.0f} to {row.high * 100:.0f} %", percent(row.prior))
        for row in parse(_newest("*-redteam-learned.json").read_text(encoding="utf-8"))
        if row.attack in ("r4", "r4t", "r5", "r6")
    ]  # fmt: skip
    head = ("attack", "", "attacker knows", "what protects", "recovered", "95 %", "a guess")
    return _table(head, *rows)


def training_gradients() -> str:
    """Labels out of returned gradients, by what protects and by the blocks of the top."""
    rows = [
        (row.model, str(row.top), _what(row), f"`{row.parameters}`", f"{row.noise:.1f}",
         percent(row.prior), percent(row.recovery), _ends(row), percent(row.utility.agreement))
        for row in _training()
        if row.attack == "r3t" and "step" not in row.exposed
    ]  # fmt: skip
    head = ("model", "top", "loss on", "what protects", "noise / gradients", "a guess", "r3t")
    return _table((*head, "95 %", "agreement"), *rows)


def training_updates() -> str:
    """Tokens out of updates of the bottom's adapter."""
    rows = [
        (row.model, row.exposed.removesuffix(" of TinyStories"), f"{row.details['tokens']:.0f}",
         percent(row.prior), percent(row.recovery), _ends(row), percent(row.details["in_order"]))
        for row in _training()
        if row.attack == "r7"
    ]  # fmt: skip
    head = ("model", "what is handed over", "tokens", "a guess", "r7", "95 %", "text in order")
    return _table(head, *rows)


def training_released() -> str:
    """Members and canaries of a released adapter."""
    rows = [
        (row.model, f"`{row.parameters}`", TITLES[row.attack], percent(row.prior),
         percent(row.recovery), _ends(row), _beside(row))
        for row in _training()
        if row.attack in ("auc", "r8", "canary", "audit")
    ]  # fmt: skip
    head = ("model", "what protects", "attack", "a guess", "measured", "95 %", "")
    return _table(head, *rows)


def training_decoder() -> str:
    """The decoder of a malicious client, with the overlap of words that papers report."""
    rows = [
        (row.model, str(row.bottom), f"`{row.parameters}`", f"{row.noise:.2f}", row.attack,
         percent(row.recovery), _ends(row),
         *(f"{row.details[name] * 100:.0f}" for name in ("rougeL", "bleu")),
         *(f"{row.details[f'guess_{name}'] * 100:.0f}" for name in ("rougeL", "bleu")))
        for row in _training()
        if row.attack in ("r1", "r4t")
    ]  # fmt: skip
    head = ("model", "bottom", "what protects", "noise / rows", "attack", "recovered", "95 %")
    overlap = ("ROUGE-L", "BLEU-4", "ROUGE-L of a guess", "BLEU-4 of a guess")
    return _table((*head, *overlap), *rows)


def _training() -> list[Row]:
    return parse(_newest("*-redteam-training.json").read_text(encoding="utf-8"))


def _what(row: Row) -> str:
    return "answers" if row.exposed.endswith("answers") else "text"


def _ends(row: Row) -> str:
    return f"{row.low * 100:.0f} to {row.high * 100:.0f} %"


def _beside(row: Row) -> str:
    if row.attack == "canary":
        return f"mean exposure {row.details['mean_exposure']:.1f} bits"
    if row.attack == "audit":
        return f"epsilon at least {row.details['epsilon']:.2f}"
    return f"{row.details['members']:.0f} members"


def narrowed() -> str:
    """Attacks on DEL's counts, with rows as they are and behind projections."""
    rows = []
    for setting in settings(parse(_newest("*-redteam-del.json").read_text(encoding="utf-8"))):
        one = setting.strongest
        given = dict(
            pair.split("=") for pair in one.parameters.partition(":")[2].split(",") if pair
        )
        rows.append(
            (
                "whole" if one.width is None else str(one.width),
                given.get("mu", "none"),
                f"{one.noise:.2f}",
                perplexity_text(one.utility.perplexity),
                percent(one.utility.agreement),
                percent(one.prior),
                *_recoveries(setting),
            )
        )
    head = ("numbers in a row", "mu", "noise / rows", "perplexity", "agreement", "a guess")
    return _table((*head, *(name for name in _ATTACKS)), *rows)


def projection() -> str:
    """What is left of a model behind trained projections, without noise and with counts."""
    path = _newest("*-projection.md")
    free = [row for row in _rows_of(path, "trained for") if row["trained for"] in ("none", "nll")]
    noised = [
        row for row in _rows_of(path, "projection") if row["projection"].startswith("nll with ")
    ]
    shown = [
        *((row, "none") for row in free),
        *((row, f"4 bits, mu {row['mu']}") for row in noised),
    ]
    rows = [
        (row["model"], row["width"], noise, row["perplexity"], row["agreement"])
        for row, noise in sorted(shown, key=lambda each: each[0]["model"])
    ]
    return _table(("model", "numbers in a row", "noise", "perplexity", "agreement"), *rows)


def denoiser() -> str:
    """What denoisers restore, beside what they make of nothing."""
    rows = [
        (
            row["model"],
            row["noise"],
            row["mu"],
            row["denoiser"],
            row["perplexity"],
            row["agreement"],
        )
        for row in _rows_of(_newest("*-denoiser.md"), "denoiser")
        if row["noise"] in ("silence", "gaussian") and row["denoiser"] in ("without", "trained")
    ]
    return _table(("model", "noise", "mu", "denoiser", "perplexity", "agreement"), *rows)


def audit() -> str:
    """What an audit through the wire codec says about mechanisms, and about broken ones."""
    rows = [
        (row["what runs"], row["mu claimed"], row["mu shown"], row["verdict"])
        for row in _rows_of(_newest("*-privacy-audit-400k.md"), "what runs")
    ]
    return _table(("what runs", "mu claimed", "mu shown, at least", "verdict"), *rows)


TABLES: Final[dict[str, Callable[[], str]]] = {
    "recovery-bound": recovery_bound,
    "noise": noise,
    "composition": composition,
    "counts": counts,
    "placeholders": placeholders,
    "clean-channel": clean_channel,
    "sweep": sweep,
    "learned": learned,
    "training-gradients": training_gradients,
    "training-updates": training_updates,
    "training-released": training_released,
    "training-decoder": training_decoder,
    "narrowed": narrowed,
    "projection": projection,
    "denoiser": denoiser,
    "audit": audit,
}


def _epsilon(loss: PrivacyLoss) -> float:
    return loss.epsilon(DEFAULT_DELTA)


def _newest(pattern: str) -> Path:
    """The result file of the last day; their names begin with the date."""
    return max(RESULTS.glob(pattern))


def _by_cut() -> dict[tuple[str, int, int], list[Row]]:
    """Rows of the red team by model, bottom and top, in that order."""
    rows = parse(_newest("*-redteam.json").read_text(encoding="utf-8"))
    cuts = sorted({row.channel for row in rows})
    return {cut: [row for row in rows if row.channel == cut] for cut in cuts}


def _recoveries(setting: Setting) -> list[str]:
    found = {row.attack: row for row in setting.rows}
    return [percent(found[name].recovery) if name in found else "" for name in _ATTACKS]


def _rows_of(path: Path, column: str) -> list[dict[str, str]]:
    """Rows of the first table of a page that has this column."""
    lines = path.read_text(encoding="utf-8").splitlines()
    start = next(i for i, line in enumerate(lines) if column in _cells(line))
    names, found = _cells(lines[start]), []
    for line in lines[start + 2 :]:
        if not line.startswith("|"):
            break
        found.append(dict(zip(names, _cells(line), strict=True)))
    return found


def _cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("| ").split("|")]


def _table(head: Sequence[str], *rows: Sequence[str]) -> str:
    """Markdown; columns that begin with a number are aligned to the right."""
    rules = ["---:" if cell[:1].isdigit() else "---" for cell in rows[0]]
    lines = [head, rules, *rows]
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
