"""Verdicts in words over the rows of a red team report, and the checks that a CI can rely on.

`fedsea-scale` is the named check of the noise that the FedSEA paper publishes (amplitudes up to
0.1): it says `not protective` when the strongest attack recovers at least 10 points more tokens
than a guess without any observation, while the model's next-token accuracy is within 2 points of
the unprotected model's. `floor` is the check of the suite itself: an attack that cannot read a
clean channel proves nothing about a protected one. It is about the channel without mechanism and
without projection: what a narrow projection leaves out cannot be read by anybody, and the row of the
projection alone says how much that is.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum

from fedsea.redteam.report import PLAIN, Row, percent

RECOVERY_POINTS = 0.10
UTILITY_POINTS = 0.02
FLOOR = 0.99
_ROUNDING = 1e-9  # differences of shares that meet a bar exactly
FLOOR_ATTACK = "r1"
# What the attack on gradients saw when its reading shows that it works: those of the first step,
# where the client's top is still the attacker's.
FIRST_GRADIENTS = "gradients"
_GRADIENT_FLOOR_ATTACK = "r3t"
# Attacks that name the tokens of a text; the others read answers or only measure.
PROMPT_ATTACKS = frozenset({"nn", "cosine", "r1", "r2", "r3", "r3t", "r4", "r4t", "r6", "r7"})

FEDSEA = "fedsea"
FEDSEA_SCALE = "fedsea-scale"
# The released code's default is 0.02; the paper sweeps around it, up to 0.1.
PUBLISHED_SCALES = (0.02, 0.05, 0.1)


class Standing(StrEnum):
    """What a mechanism at one setting is worth."""

    EXPOSED = "not protective"
    """The model is as good as without, and the attacker reads the text."""
    LOSING = "not protective, and the model suffers"
    """The attacker reads more than a guess, and the model is worse."""
    SPENT = "no better than a guess, but the model suffers"
    """The attacker gains little, and the model is worse."""
    HOLDS = "held against these attacks"
    """The attacker gains little, and the model is as good as without."""

    @property
    def is_protective(self) -> bool:
        """Whether the attacker gains less than the bar."""
        return self in (Standing.SPENT, Standing.HOLDS)


@dataclass(frozen=True, slots=True)
class Setting:
    """One mechanism at one noise on one cut: the strongest attack on it decides."""

    strongest: Row
    rows: tuple[Row, ...]

    @property
    def gain(self) -> float:
        """How much more the strongest attack recovers than a guess."""
        return self.strongest.recovery - self.strongest.prior

    @property
    def cost(self) -> float:
        """How much next-token accuracy is lost."""
        return self.strongest.clean_utility.accuracy - self.strongest.utility.accuracy

    @property
    def standing(self) -> Standing:
        """What the two say together."""
        useful = self.cost <= UTILITY_POINTS + _ROUNDING
        if self.gain >= RECOVERY_POINTS - _ROUNDING:
            return Standing.EXPOSED if useful else Standing.LOSING
        return Standing.HOLDS if useful else Standing.SPENT


@dataclass(frozen=True, slots=True)
class Verdict:
    """One finding in words; `evidence` is the setting that it rests on."""

    name: str
    protective: bool
    sentence: str
    evidence: Setting | None


def settings(rows: Iterable[Row]) -> list[Setting]:
    """Rows by cut and mechanism, in their order; prompts that were not attacked are left out."""
    grouped: dict[tuple[object, ...], list[Row]] = {}
    for row in rows:
        grouped.setdefault((*row.channel, row.knowledge, row.setting), []).append(row)
    return [
        Setting(max(prompt, key=lambda row: row.recovery), tuple(group))
        for group in grouped.values()
        if (prompt := [row for row in group if row.attack in PROMPT_ATTACKS])
    ]


def floor(rows: Iterable[Row]) -> list[Row]:
    """Rows on which the suite fails itself: a clean channel of which R1 or R3 reads under 99 %.

    R3 is asked for it in the first step, where the client's top is still the attacker's.
    """
    return [row for row in rows if row.is_clean and _shows_floor(row) and row.recovery < FLOOR]


def _shows_floor(row: Row) -> bool:
    if row.attack == _GRADIENT_FLOOR_ATTACK:
        return row.exposed == FIRST_GRADIENTS
    return row.attack == FLOOR_ATTACK


def fedsea_scale(rows: Iterable[Row]) -> list[Verdict]:
    """The named verdict on each cut that was attacked at a published scale, unclipped."""
    found: dict[tuple[object, ...], list[Setting]] = {}
    for setting in settings(rows):
        if published_scale(setting.strongest) is not None:
            row = setting.strongest
            key = (*row.channel, row.knowledge, row.protection)
            found.setdefault(key, []).append(setting)
    return [_fedsea_verdict(group) for group in found.values()]


def published_scale(row: Row) -> float | None:
    """The FedSEA amplitude of a row when it is one of the paper's; None for all others."""
    if row.mechanism != FEDSEA:
        return None
    given = dict(
        part.split("=", 1) for part in row.parameters.partition(":")[2].split(",") if "=" in part
    )
    scale = float(given.get("scale", 0))
    clipped = given.get("clip_norm", "none") not in ("none", "None", "")
    return scale if not clipped and 0 < scale <= max(PUBLISHED_SCALES) else None


def mechanisms(rows: Iterable[Row]) -> list[Verdict]:
    """One verdict for each mechanism on each cut, over all settings that were tried."""
    found: dict[tuple[object, ...], list[Setting]] = {}
    for setting in settings(rows):
        row = setting.strongest
        key = (*row.channel, row.knowledge, row.protection)
        found.setdefault(key, []).append(setting)
    return [_mechanism_verdict(group) for group in found.values()]


def cut_text(row: Row) -> str:
    """Where the rows were taken: model and blocks."""
    blocks = "1 block" if row.bottom == 1 else f"{row.bottom} blocks"
    return f"{row.model}, {blocks} before the cut"


def _place_text(row: Row) -> str:
    """The cut, and what stands there beside a mechanism."""
    width = "" if row.width is None else f", rows narrowed to {row.width}"
    return f"{cut_text(row)}{width}{', answers denoised' if row.denoised else ''}"


def setting_text(setting: Setting) -> str:
    """What happened at one setting, in one sentence without a full stop."""
    row = setting.strongest
    return (
        f"{row.attack.upper()} recovers {percent(row.recovery)} of the tokens "
        f"(95 % interval {percent(row.low)} to {percent(row.high)}; a guess {percent(row.prior)}) "
        f"while next-token accuracy is {percent(row.utility.accuracy)} "
        f"(unprotected {percent(row.clean_utility.accuracy)})"
    )


def _fedsea_verdict(group: Sequence[Setting]) -> Verdict:
    where = _place_text(group[0].strongest)
    exposed = [setting for setting in group if setting.standing is Standing.EXPOSED]
    if exposed:
        worst = max(exposed, key=lambda setting: setting.strongest.noise)
        sentence = f"{where}: {Standing.EXPOSED}: at {worst.strongest.setting} "
        return Verdict(FEDSEA_SCALE, False, f"{sentence}{setting_text(worst)}.", worst)
    best = max(group, key=lambda setting: setting.gain)
    sentence = (
        f"{where}: no published scale was found both useful and readable; "
        f"at {best.strongest.setting} {setting_text(best)}."
    )
    return Verdict(FEDSEA_SCALE, True, sentence, best)


def _mechanism_verdict(group: Sequence[Setting]) -> Verdict:
    first = group[0].strongest
    name, where = first.mechanism, _place_text(first)
    if name == PLAIN:
        worst = max(group, key=lambda setting: setting.gain)
        says = "splitting alone hides nothing" if first.is_clean else "this alone is no protection"
        sentence = f"{where}: {says}: {setting_text(worst)}."
        protective = worst.standing.is_protective
        return Verdict(name, protective, sentence if not protective else _held(where), worst)
    holding = [setting for setting in group if setting.standing is Standing.HOLDS]
    if holding:
        best = min(holding, key=lambda setting: setting.gain)
        sentence = f"{where}: {Standing.HOLDS} at {best.strongest.setting}: {setting_text(best)}."
        return Verdict(name, True, sentence, best)
    spent = [setting for setting in group if setting.standing.is_protective]
    if spent:
        least = min(spent, key=lambda setting: setting.cost)
        sentence = (
            f"{where}: no setting kept both text and use; the attacker falls to a guess at "
            f"{least.strongest.setting}, where {setting_text(least)}."
        )
        return Verdict(name, False, sentence, least)
    least = min(group, key=lambda setting: setting.gain)
    sentence = f"{where}: not protective at any setting; at {least.strongest.setting} "
    return Verdict(name, False, f"{sentence}{setting_text(least)}.", least)


def _held(where: str) -> str:
    return f"{where}: these attacks read little; that is no guarantee."
