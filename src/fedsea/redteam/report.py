"""What an attack found, as rows: for people a table, for programs a JSON list.

A row is one attack on one mechanism. Every rate stands beside three others without which it means
nothing: its interval, what the attacker would guess without any observation (`prior`), and what the
same attack gets when nothing protects the rows (`clean`).
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from fedsea.errors import ConfigError

PRIOR_ATTACK = "prior"
PLAIN = "plain"
TITLES: Mapping[str, str] = {
    PRIOR_ATTACK: "guess without any observation",
    "cosine": "nearest embedding by cosine, the measure of most papers",
    "nn": "nearest embedding",
    "r1": "prefix search, maximum likelihood",
    "r2": "prefix search with a language model",
    "r3": "labels from a returned gradient, closed form",
    "r3t": "labels from a returned gradient, refined with the model's expectation",
    "r4": "learned inverter, recurrent",
    "r4t": "learned inverter, transformer",
    "r5": "reading the answer with a public top",
    "r6": "breaking a secret rotation",
    "r7": "tokens from an update, by its span",
    "auc": "a trained text scores above another one (area under the curve)",
    "r8": "membership in the training data, 1 % false positives",
    "canary": "canaries whose secret is found first",
    "audit": "coins of canaries guessed right",
}
_PERCENT = 100.0
_SHORT_FINGERPRINT = 8
_NOTED_GAIN = 0.1  # over the guess, from where a rate is shown in red


@dataclass(frozen=True, slots=True)
class Rate:
    """A share of tokens with its 95 % interval."""

    recovery: float
    low: float
    high: float
    tokens: int


@dataclass(frozen=True, slots=True)
class Utility:
    """What a mechanism leaves of the model, measured through the split on the attacked text.

    `perplexity` is exp(nats per token), `accuracy` the share of next tokens that the model ranks
    first, `agreement` the share of positions at which its first choice is that of the unprotected
    model, `generation` the same for greedy answers (None when none were generated).
    """

    perplexity: float
    accuracy: float
    agreement: float
    generation: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One attack on one mechanism.

    Attributes:
        attack: short name, a key of `TITLES`.
        model: name of the checkpoint.
        bottom: blocks after the embedding on the client's side.
        top: blocks before the norm on the client's side.
        mechanism: its name, `plain` for none.
        parameters: the mechanism in full, as `mechanism_from_spec` takes it.
        width: numbers in a row on the wire behind a projection, None without one.
        projection: fingerprint of the projection, empty without one.
        denoised: whether the client restores what comes back; attackers see nothing of it.
        exposed: what the attacker saw, where that is not the rows of a request.
        knowledge: what the attacker holds: base, leaked or black-box.
        recovery: share of secret tokens that the attacker named.
        low: lower end of the 95 % interval of `recovery`.
        high: upper end.
        tokens: how many tokens were attacked.
        prior: share that the attacker names without any observation.
        clean: `recovery` of the same attack without mechanism and projection; None when it was
            not run.
        utility: of this mechanism.
        clean_utility: without mechanism and projection.
        noise: root mean square of the change of a row that enters the trunk, in units of that of the
            row itself; behind a projection, what it leaves out is part of the change.
        by_class: recovery by kind of token.
        guarantee: the mechanism in one line for people.
        mu: Gaussian privacy parameter of one token, None without a guarantee.
        bound: most that any attacker with this prior recovers, None without a guarantee.
        seconds: how long the attack took.
        details: further numbers of the attack.
    """

    attack: str
    model: str
    bottom: int
    top: int
    mechanism: str
    parameters: str
    knowledge: str
    recovery: float
    low: float
    high: float
    tokens: int
    prior: float
    clean: float | None
    utility: Utility
    clean_utility: Utility
    noise: float = 0.0
    by_class: Mapping[str, Rate] = field(default_factory=dict)
    guarantee: str = ""
    mu: float | None = None
    bound: float | None = None
    seconds: float = 0.0
    details: Mapping[str, float] = field(default_factory=dict)
    width: int | None = None
    projection: str = ""
    denoised: bool = False
    exposed: str = ""

    @property
    def channel(self) -> tuple[str, int, int]:
        """The cut that was attacked: model, bottom, top."""
        return self.model, self.bottom, self.top

    @property
    def is_clean(self) -> bool:
        """Whether the rows left as they were: no mechanism and no projection."""
        return self.mechanism == PLAIN and self.width is None

    @property
    def protection(self) -> str:
        """The mechanism by name, with what stands beside it; the same at every noise."""
        return self._beside(self.mechanism, "" if self.width is None else f"width {self.width}")

    @property
    def setting(self) -> str:
        """The mechanism in full, with what stands beside it."""
        short = self.projection[:_SHORT_FINGERPRINT]
        width = "" if self.width is None else f"projection {short} to width {self.width}"
        return self._beside(self.parameters, width)

    def _beside(self, mechanism: str, width: str) -> str:
        parts = (mechanism, width, "denoised" if self.denoised else "", self.exposed)
        return ", ".join(part for part in parts if part)

    def to_json(self) -> dict[str, Any]:
        """The row as JSON values; the interval is a pair, numbers that JSON lacks become null."""
        found = {entry.name: getattr(self, entry.name) for entry in fields(self)}
        low, high = found.pop("low"), found.pop("high")
        found["utility"] = asdict(self.utility)
        found["clean_utility"] = asdict(self.clean_utility)
        found["by_class"] = {name: asdict(rate) for name, rate in self.by_class.items()}
        found["details"] = dict(self.details)
        found["interval"] = [low, high]
        return {name: _finite(value) for name, value in found.items()}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Row:
        """A row from what `to_json` made.

        Raises:
            ConfigError: it is not such a row.
        """
        try:
            given = dict(value)
            low, high = given.pop("interval")
            for name in ("utility", "clean_utility"):
                given[name] = Utility(**given[name])
            given["by_class"] = {n: Rate(**rate) for n, rate in given["by_class"].items()}
            return cls(low=low, high=high, **given)
        except (AttributeError, KeyError, TypeError, ValueError):
            raise ConfigError(
                "this is no row of a red team report: give a file of --json"
            ) from None


def dump(rows: Iterable[Row]) -> str:
    """All rows as a JSON list, one row to a line."""
    lines = [json.dumps(row.to_json(), ensure_ascii=False, allow_nan=False) for row in rows]
    return "[\n" + ",\n".join(lines) + "\n]\n"


def parse(text: str) -> list[Row]:
    """The rows of a JSON list.

    Raises:
        ConfigError: the text is not what `dump` makes.
    """
    try:
        values = json.loads(text)
    except ValueError:
        raise ConfigError("the report is not JSON: give a file of --json") from None
    if not isinstance(values, list):
        raise ConfigError("the report is not a list of rows: give a file of --json")
    return [Row.from_json(value) for value in values]


def distinct(rows: Iterable[Row]) -> list[Row]:
    """Rows without those that say again, but for the time, what an earlier one says."""
    kept: list[Row] = []
    for row in rows:
        if not any(replace(row, seconds=other.seconds) == other for other in kept):
            kept.append(row)
    return kept


COLUMNS = ("attack", "recovered", "95 %", "prior", "clean", "perplexity", "agreement")


def table(rows: Sequence[Row], title: str) -> Table:
    """Rows of one cut as a table for a terminal: a line for each mechanism, its attacks below."""
    made = Table(
        title=title,
        title_justify="left",
        title_style="bold",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        pad_edge=False,
    )
    for index, name in enumerate(("mechanism, attack", *COLUMNS[1:])):
        made.add_column(
            name, justify="right" if index else "left", overflow="fold", no_wrap=index > 0
        )
    previous = None
    for row in rows:
        attack, *rates, perplexity, agreement = _cells(row)
        if row.setting != previous:
            previous = row.setting
            blank = [""] * len(rates)
            made.add_section()
            made.add_row(Text(row.setting, style="bold"), *blank, perplexity, agreement)
        made.add_row(Text.assemble("  ", attack), *rates, "", "")
    return made


def markdown(rows: Sequence[Row]) -> str:
    """Rows as a Markdown table."""
    head = ("model", "bottom", "mechanism", "noise", *COLUMNS)
    lines = ["| " + " | ".join(head) + " |", "|---|---:|---|---:|---|" + "---:|" * 6]
    for row in rows:
        cells = (row.model, str(row.bottom), f"`{row.setting}`", f"{row.noise:.2f}")
        shown = [cell.plain if isinstance(cell, Text) else cell for cell in _cells(row)]
        lines.append("| " + " | ".join((*cells, *shown)) + " |")
    return "\n".join(lines) + "\n"


def percent(rate: float | None) -> str:
    """A share as people read it: 0.0 %, 12.3 %, 100 %, or a dash for none."""
    if rate is None or math.isnan(rate):
        return "–"
    return "100 %" if rate == 1 else f"{rate * _PERCENT:.1f} %"


def perplexity_text(value: float) -> str:
    """A perplexity with three figures, thousands apart."""
    if not math.isfinite(value):
        return "–"
    return f"{value:,.0f}" if value >= _PERCENT else f"{value:.3g}"


def _cells(row: Row) -> list[str | Text]:
    style = "red" if row.recovery >= row.prior + _NOTED_GAIN else ""
    return [
        row.attack,
        Text(percent(row.recovery), style=style),
        f"{row.low * _PERCENT:.1f} – {row.high * _PERCENT:.1f}",
        percent(row.prior),
        percent(row.clean),
        perplexity_text(row.utility.perplexity),
        percent(row.utility.agreement),
    ]


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {name: _finite(entry) for name, entry in value.items()}
    return value
