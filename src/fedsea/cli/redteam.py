"""`fedsea redteam`: attack what leaves the machine, before it is trusted.

Exit codes beyond those of errors: 9 when the attacks failed their own check (R1 recovers under 99 %
of a channel without protection, so that nothing they say counts), 10 when a verdict that `--check`
names is "not protective".
"""

from __future__ import annotations

import datetime
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.text import Text

from fedsea.cli import screen
from fedsea.cli.options import flattened
from fedsea.cli.redteam_training import TrainingOptions, check_alone, plan_of
from fedsea.errors import ConfigError

if TYPE_CHECKING:
    from rich.table import Table

    from fedsea.evaluation.page import About
    from fedsea.evaluation.suite import Plan
    from fedsea.evaluation.verdict import Verdict
    from fedsea.redteam.report import Row

FLOOR_FAILED = 9
NOT_PROTECTIVE = 10
PLAIN = "plain"
FLOOR_ATTACK = "r1"

_VICTIM, _ATTACKER, _REPORT = "Data owner", "Attacker", "Report"


class KnowledgeLevel(StrEnum):
    """What the attacker holds."""

    BASE = "base"
    LEAKED = "leaked"
    BLACK_BOX = "black-box"


class Check(StrEnum):
    """Verdicts that can fail the command."""

    FEDSEA_SCALE = "fedsea-scale"
    MECHANISMS = "mechanisms"


@dataclass(frozen=True, slots=True)
class VictimOptions:
    """Whose text is attacked, and what protects it."""

    text: Annotated[
        Path | None,
        typer.Option(
            help="Text file; what is not attacked of it is public.",
            show_default=False,
            rich_help_panel=_VICTIM,
        ),
    ] = None
    recording: Annotated[
        Path | None,
        typer.Option(
            help="Instead of a text: read a file of `fedsea generate --recording` and show what the "
            "attacks make of it.",
            show_default=False,
            rich_help_panel=_VICTIM,
        ),
    ] = None
    model: Annotated[
        list[Path] | None,
        typer.Option(
            help="Folder of a checkpoint; repeat it for several.",
            show_default="the demo model",
            rich_help_panel=_VICTIM,
        ),
    ] = None
    bottom: Annotated[
        list[int] | None,
        typer.Option(
            help="Blocks after the embedding at the data owner; repeat it for several.",
            show_default="1",
            rich_help_panel=_VICTIM,
        ),
    ] = None
    top: Annotated[
        int,
        typer.Option(
            help="Blocks before the final norm at the data owner.", rich_help_panel=_VICTIM
        ),
    ] = 0
    texts: Annotated[
        int, typer.Option(help="How many texts are attacked.", rich_help_panel=_VICTIM)
    ] = 8
    tokens: Annotated[int, typer.Option(help="Tokens of each.", rich_help_panel=_VICTIM)] = 48
    mechanism: Annotated[
        list[str] | None,
        typer.Option(
            help="What protects rows, such as fedsea:scale=0.02; repeat it for several.",
            show_default="FedSEA at its published scales",
            rich_help_panel=_VICTIM,
        ),
    ] = None
    projection: Annotated[
        Path | None,
        typer.Option(
            help="File of the pair that narrows rows first; attackers know it.",
            show_default=False,
            rich_help_panel=_VICTIM,
        ),
    ] = None
    denoiser: Annotated[
        Path | None,
        typer.Option(
            help="File of the denoiser that restores answers under its mechanism; attackers do not "
            "have it.",
            show_default=False,
            rich_help_panel=_VICTIM,
        ),
    ] = None
    sweep: Annotated[
        bool,
        typer.Option(
            "--sweep",
            help="All mechanisms too, from no protection to full loss.",
            rich_help_panel=_VICTIM,
        ),
    ] = False

    @property
    def secret(self) -> Path:
        """The file that is attacked.

        Raises:
            ConfigError: there is none.
        """
        if self.text is None:
            raise ConfigError("there is nothing to attack: give --text or --recording")
        return self.text


@dataclass(frozen=True, slots=True)
class AttackerOptions:
    """What the attacker does and holds."""

    attacks: Annotated[
        str | None,
        typer.Option(
            help="Names with commas between: nn, cosine, r1, r2, r4, r4t, r5, r6; with --training "
            "r1, r3, r3t, r4t, r7, r8.",
            show_default="nn,r1,r2, or r4 for a black box; with --training r3,r3t,r7,r8",
            rich_help_panel=_ATTACKER,
        ),
    ] = None
    knowledge: Annotated[
        KnowledgeLevel,
        typer.Option(
            help="What it holds: public base weights, the client's own, or none.",
            rich_help_panel=_ATTACKER,
        ),
    ] = KnowledgeLevel.BASE
    base: Annotated[
        Path | None,
        typer.Option(
            help="Folder of the public checkpoint from which the model was fine-tuned.",
            show_default="the model itself",
            rich_help_panel=_ATTACKER,
        ),
    ] = None
    public: Annotated[
        Path | None,
        typer.Option(
            help="Text file that the attacker may learn from.",
            show_default="the rest of --text",
            rich_help_panel=_ATTACKER,
        ),
    ] = None


@dataclass(frozen=True, slots=True)
class ReportOptions:
    """Where the findings go, and which of them fail the command."""

    json: Annotated[
        Path | None,
        typer.Option(
            help="Write all rows, a JSON list.", show_default=False, rich_help_panel=_REPORT
        ),
    ] = None
    html: Annotated[
        Path | None,
        typer.Option(
            help="Write one page with verdicts, plots and tables.",
            show_default=False,
            rich_help_panel=_REPORT,
        ),
    ] = None
    markdown: Annotated[
        Path | None,
        typer.Option(
            help="Write verdicts and the table as Markdown.",
            show_default=False,
            rich_help_panel=_REPORT,
        ),
    ] = None
    add: Annotated[
        list[Path] | None,
        typer.Option(
            help="Rows of an earlier --json to show before the new ones; repeat it for several.",
            show_default=False,
            rich_help_panel=_REPORT,
        ),
    ] = None
    check: Annotated[
        list[Check] | None,
        typer.Option(
            help="Exit with 10 when this verdict is 'not protective'; repeat it for several.",
            show_default=False,
            rich_help_panel=_REPORT,
        ),
    ] = None
    threads: Annotated[
        int,
        typer.Option(
            help="CPU threads; 0 leaves torch's own number.", min=0, rich_help_panel=_REPORT
        ),
    ] = 0


@flattened
def redteam(
    victim: VictimOptions,
    attacker: AttackerOptions,
    training: TrainingOptions,
    report: ReportOptions,
) -> None:
    """Attack the bytes that a client sends: how much of the text does the server read?

    A client and a server run in this process; attackers see the recorded messages and nothing
    else. Exit code 9: the attacks failed their own check on the channel without protection.
    """
    if training.training:
        _attack_training(victim, attacker, training, report)
        return
    if victim.recording is not None:
        _show_readings(victim, attacker, victim.recording)
        return
    _check_files(report)
    rows = _earlier(report.add or [])
    with screen.bar("loading the models"):
        import torch

        from fedsea.evaluation.suite import evaluate
        from fedsea.redteam.report import distinct

        if report.threads:
            torch.set_num_threads(report.threads)
        plans = _plans(victim, attacker)
    began = time.monotonic()
    for plan in plans:
        cut = f"{plan.model.name}, bottom {plan.partition.bottom}"
        with screen.bar(cut) as advance:
            found = evaluate(plan, _Steps(advance))
        screen.out.print(_table(found, cut))
        rows += found
    rows = distinct(rows)
    about = _about(victim, report, plans[0], time.monotonic() - began)
    _write(rows, about, report)
    _conclude(rows, report.check or [])


def _attack_training(
    victim: VictimOptions,
    attacker: AttackerOptions,
    training: TrainingOptions,
    report: ReportOptions,
) -> None:
    """A report on fine-tuning: what crosses the cuts in it, and what is released after it.

    Raises:
        ConfigError, RequestError, ModelError: an option that cannot be used.
    """
    requests_only = {
        "--recording": victim.recording is not None,
        "--projection": victim.projection is not None,
        "--denoiser": victim.denoiser is not None,
        "--sweep": victim.sweep,
        "--knowledge": attacker.knowledge is not KnowledgeLevel.BASE,
        "--base": attacker.base is not None,
    }
    check_alone([name for name, is_given in requests_only.items() if is_given])
    _check_files(report)
    rows = _earlier(report.add or [])
    with screen.bar("loading the models"):
        import torch

        from fedsea.demo import model_path
        from fedsea.evaluation.training_suite import evaluate_training
        from fedsea.redteam.report import distinct

        if report.threads:
            torch.set_num_threads(report.threads)
        plans = [
            plan_of(
                training,
                model=model,
                bottom=bottom,
                top=victim.top,
                text=victim.secret,
                public=attacker.public,
                texts=victim.texts,
                tokens=victim.tokens,
                mechanisms=victim.mechanism or (),
                attacks=attacker.attacks,
            )
            for model in victim.model or [model_path()]
            for bottom in dict.fromkeys(victim.bottom if victim.bottom is not None else [1])
        ]
    began = time.monotonic()
    for plan in plans:
        cut = f"{plan.model.name}, bottom {plan.partition.bottom}, top {plan.partition.top}"
        with screen.bar(cut) as advance:
            found = evaluate_training(plan, _Steps(advance))
        screen.out.print(_table(found, cut))
        rows += found
    rows = distinct(rows)
    trained = len(plans[0].data.examples)
    about = _about_run(
        victim,
        report,
        (
            f"{plans[0].attacked * plans[0].batch} of {trained} texts of {victim.tokens} tokens "
            f"were attacked while they were trained on, in {plans[0].steps} steps of "
            f"{plans[0].batch}; perplexity and agreement are those of held-out texts afterwards.",
            "The gradient mechanisms see one text at a time; mu is that of one text.",
        ),
        time.monotonic() - began,
    )
    _write(rows, about, report)
    _conclude(rows, report.check or [])


@dataclass(frozen=True, slots=True)
class _Steps:
    """Moves a bar from one mechanism to the next."""

    advance: Callable[[int, int], None]

    def __call__(self, _doing: str, done: int, steps: int) -> None:
        self.advance(done, steps)


def _plans(victim: VictimOptions, attacker: AttackerOptions) -> list[Plan]:
    """One for each model and cut; everything that can be refused is refused here.

    Raises:
        ConfigError, RequestError, ModelError: an option that cannot be used.
    """
    from fedsea.demo import model_path

    models = victim.model or [model_path()]
    cuts = victim.bottom if victim.bottom is not None else [1]
    return [
        _plan(victim, attacker, model, bottom) for model in models for bottom in dict.fromkeys(cuts)
    ]


def _plan(victim: VictimOptions, attacker: AttackerOptions, model: Path, bottom: int) -> Plan:
    from fedsea.client.llm import load_tokenizer
    from fedsea.evaluation import sweep
    from fedsea.evaluation.suite import Plan, check_plan, public_rows
    from fedsea.evaluation.texts import read_texts, with_kinds
    from fedsea.model.checkpoint import Checkpoint
    from fedsea.model.partition import Partition
    from fedsea.model.projection import Projection
    from fedsea.privacy.registry import mechanism_from_spec
    from fedsea.redteam.knowledge import Level

    checkpoint = Checkpoint.open(model)
    partition = Partition(bottom, victim.top)
    partition.trunk_span(checkpoint.num_blocks)
    given = victim.mechanism or ([] if victim.sweep else list(sweep.published()))
    pair = None if victim.projection is None else Projection.load(victim.projection)
    width = checkpoint.hidden_size if pair is None else pair.width
    mechanisms = [mechanism_from_spec(spec, width=width) for spec in given]
    tokenizer = load_tokenizer(checkpoint)
    texts = read_texts(
        victim.secret,
        lambda text: tokenizer(text, verbose=False).input_ids,
        count=victim.texts,
        tokens=victim.tokens,
        public=attacker.public,
    )
    plan = Plan(
        model=model,
        partition=partition,
        texts=with_kinds(texts, tokenizer.convert_ids_to_tokens),
        attacks=_attacks(attacker),
        level=Level(attacker.knowledge.value),
        base=attacker.base,
        projection=victim.projection,
        denoiser=victim.denoiser,
    )
    if victim.sweep:
        specs = (*sweep.published(), *sweep.sweep(public_rows(plan)))
        mechanisms += [mechanism_from_spec(spec, width=width) for spec in specs]
    # A sweep may come to a setting that was given, or published.
    distinct = dict.fromkeys(each for each in mechanisms if each is not None)
    plan = replace(plan, mechanisms=tuple(distinct))
    check_plan(plan)
    return plan


def _show_readings(victim: VictimOptions, attacker: AttackerOptions, recording: Path) -> None:
    """What each attack makes of each text of a recording, on standard output.

    Raises:
        ConfigError, ModelError: the recording cannot be read, or does not fit the options.
    """
    from fedsea.client.llm import load_tokenizer
    from fedsea.demo import model_path
    from fedsea.evaluation.replay import replay
    from fedsea.model.checkpoint import Checkpoint
    from fedsea.model.projection import Projection
    from fedsea.privacy.registry import mechanism_from_spec
    from fedsea.transport.recording_file import read_recording

    checkpoint = Checkpoint.open((victim.model or [model_path()])[0])
    tokenizer = load_tokenizer(checkpoint)
    specs = victim.mechanism or [PLAIN]
    if len(specs) > 1:
        raise ConfigError("a recording was made with one mechanism: give one --mechanism at most")
    if victim.denoiser is not None:
        raise ConfigError("a denoiser stays with the client and is in no recording: leave it out")
    pair = None if victim.projection is None else Projection.load(victim.projection)
    width = checkpoint.hidden_size if pair is None else pair.width
    prefix = tuple(tokenizer("").input_ids)
    found = replay(
        read_recording(recording),
        checkpoint,
        (FLOOR_ATTACK,) if attacker.attacks is None else _attacks(attacker),
        mechanism_from_spec(specs[0], width=width),
        prefix,
        projection=pair,
    )
    for reading in found:
        for number, ids in enumerate(reading.texts, start=1):
            screen.err.rule(f"{reading.attack}, text {number}", align="left", style="dim")
            screen.write(tokenizer.decode(ids[len(prefix) :]) + "\n")


def _attacks(attacker: AttackerOptions) -> tuple[str, ...]:
    if attacker.attacks is None:
        return ("r4",) if attacker.knowledge is KnowledgeLevel.BLACK_BOX else ("nn", "r1", "r2")
    names = (name.strip().lower() for name in attacker.attacks.split(","))
    return tuple(dict.fromkeys(name for name in names if name))


def _check_files(report: ReportOptions) -> None:
    """Refuse, before anything runs, what could not be written afterwards.

    Raises:
        ConfigError: a folder does not exist, or the page cannot be drawn.
    """
    for path in (report.json, report.html, report.markdown):
        if path is not None and (path.is_dir() or not path.parent.is_dir()):
            raise ConfigError(f"{path} cannot be written: give a file in a folder that exists")
    if report.html is not None:
        from fedsea.evaluation.page import check_plots

        check_plots()


def _table(rows: Sequence[Row], title: str) -> Table:
    from fedsea.redteam.report import table

    first = rows[0]
    return table(rows, f"{title}, knowledge {first.knowledge}, {first.tokens} tokens")


def _earlier(files: Sequence[Path]) -> list[Row]:
    """Rows of earlier reports.

    Raises:
        ConfigError: a file is no report.
    """
    from fedsea.redteam.report import parse

    rows: list[Row] = []
    for path in files:
        try:
            rows += parse(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError):
            raise ConfigError(f"{path} cannot be read: give a file of --json") from None
    return rows


def _about(victim: VictimOptions, report: ReportOptions, plan: Plan, seconds: float) -> About:
    texts = plan.texts
    method = (
        f"{len(texts.secret)} texts of {victim.tokens} tokens were attacked; the first "
        f"{len(texts.prefix)} of each are what the tokenizer puts before every text and "
        "do not count.",
        "The attacker could learn from other texts of the same kind.",
        *_narrowed(plan),
    )
    return _about_run(victim, report, method, seconds)


def _about_run(
    victim: VictimOptions, report: ReportOptions, method: Sequence[str], seconds: float
) -> About:
    from fedsea.evaluation.page import About

    earlier = [f"Rows of {path.name}, measured before, are shown too." for path in report.add or ()]
    return About(
        date=datetime.datetime.now(datetime.UTC).date().isoformat(),
        command=shlex.join(["fedsea", *sys.argv[1:]]),
        version=version("fedsea"),
        text=victim.secret.name,
        method=(*method, f"It took {seconds / 60:.1f} minutes.", *earlier),
    )


def _narrowed(plan: Plan) -> list[str]:
    """What a projection is, and which channel the check of the attacks is about."""
    if plan.projection is None:
        return []
    from fedsea.model.projection import Projection

    pair = Projection.load(plan.projection)
    recipe = ", ".join(f"{name} {value}" for name, value in pair.recipe.items())
    return [
        f"{plan.projection.name} is the projection {pair.fingerprint()[:8]} to {pair.width} numbers"
        f"{f' ({recipe})' if recipe else ''}; the attacker knows it. That R1 reads a channel without "
        "protection to 99 % is asked of the channel without a projection too.",
    ]


def _write(rows: Sequence[Row], about: About, report: ReportOptions) -> None:
    from fedsea.evaluation import page
    from fedsea.redteam.report import dump

    if report.json is not None:
        report.json.write_text(dump(rows), encoding="utf-8")
    if report.html is not None:
        report.html.write_text(page.page(rows, about), encoding="utf-8")
    if report.markdown is not None:
        report.markdown.write_text(page.markdown(rows, about), encoding="utf-8")


def _conclude(rows: Sequence[Row], checks: Sequence[Check]) -> None:
    """Say the verdicts; leave with the code of what failed."""
    from fedsea.evaluation import verdict

    named = verdict.fedsea_scale(rows)
    found = [*named, *verdict.mechanisms(rows)]
    for each in found:
        screen.out.print(_verdict_line(each), soft_wrap=True)
    failed = verdict.floor(rows)
    if failed:
        for row in failed:
            screen.fail(
                f"{verdict.cut_text(row)}: {row.attack.upper()} recovers {row.recovery:.1%} without "
                f"protection and must recover {verdict.FLOOR:.0%}: this report proves nothing"
            )
        raise typer.Exit(FLOOR_FAILED)
    wanted = [
        each
        for each in found
        if (Check.FEDSEA_SCALE if each.name == verdict.FEDSEA_SCALE else Check.MECHANISMS) in checks
        and each.name != PLAIN
    ]
    if any(not each.protective for each in wanted):
        raise typer.Exit(NOT_PROTECTIVE)


def _verdict_line(found: Verdict) -> Text:
    style = "green" if found.protective else "red"
    return Text.assemble((f"{found.name}: ", f"bold {style}"), found.sentence)
