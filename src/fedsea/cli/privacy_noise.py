"""`fedsea privacy plan` and `audit`: which noise a goal needs, and whether noise keeps its word."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fedsea.cli import screen
from fedsea.cli.options import AsJson
from fedsea.cli.protection import PrivacyUnit
from fedsea.errors import ConfigError, PrivacyError

if TYPE_CHECKING:
    from fedsea.privacy.audit import Audit
    from fedsea.privacy.planning import Goal, Load, Plan

_GOAL = "Goal"
_LOAD = "What is released"


def register(app: typer.Typer) -> None:
    """Add the commands to `fedsea privacy`."""
    app.command("plan")(plan)
    app.command("audit")(audit)


def plan(
    epsilon: Annotated[
        float | None,
        typer.Option(help="Most epsilon, at --delta.", show_default=False, rich_help_panel=_GOAL),
    ] = None,
    delta: Annotated[float, typer.Option(help="Delta of epsilon.", rich_help_panel=_GOAL)] = 1e-5,
    mu: Annotated[
        float | None, typer.Option(help="Most mu.", show_default=False, rich_help_panel=_GOAL)
    ] = None,
    recovery_bound: Annotated[
        float | None,
        typer.Option(
            help="Most likely recovery of what is protected, at --prior.",
            show_default=False,
            rich_help_panel=_GOAL,
        ),
    ] = None,
    prior: Annotated[
        float, typer.Option(help="Chance of guessing it without the rows.", rich_help_panel=_GOAL)
    ] = 0.01,
    unit: Annotated[
        PrivacyUnit, typer.Option(help="What is protected.", rich_help_panel=_LOAD)
    ] = PrivacyUnit.PROMPT,
    tokens: Annotated[int, typer.Option(help="Tokens of a session.", rich_help_panel=_LOAD)] = 256,
    sessions: Annotated[int, typer.Option(help="Sessions that add up.", rich_help_panel=_LOAD)] = 1,
    examples: Annotated[
        int | None,
        typer.Option(
            help="For training, instead of --unit and --sessions: examples of --tokens tokens, each "
            "as often as a step uses it; rows and gradients are released.",
            show_default=False,
            rich_help_panel=_LOAD,
        ),
    ] = None,
    width: Annotated[int, typer.Option(help="Numbers in a row.", rich_help_panel=_LOAD)] = 128,
    clip_norm: Annotated[
        float,
        typer.Option(help="Largest norm of a row; `calibrate` measures it.", rich_help_panel=_LOAD),
    ] = 1.0,
    mechanism: Annotated[
        list[str] | None,
        typer.Option(help="Only this one, by name; repeat it for several.", show_default="all"),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Find the least noise that keeps a goal, for every mechanism, and what it costs.

    The goal is one of --epsilon, --mu and --recovery-bound, for all releases together.
    """
    from fedsea.privacy import planning
    from fedsea.privacy.accounts import Budget
    from fedsea.privacy.mechanism import Unit

    if sum(given is not None for given in (epsilon, mu, recovery_bound)) != 1:
        raise ConfigError("give one goal: --epsilon, --mu or --recovery-bound")
    if recovery_bound is None:
        goal = planning.Goal(Budget(epsilon=epsilon, delta=delta, mu=mu))
    else:
        goal = planning.Goal(recovery=recovery_bound, prior=prior)
    if examples is None:
        load = planning.Load(Unit(unit.value), tokens, width, clip_norm, sessions)
    elif sessions == 1:
        load = planning.Load.training(examples, tokens, width, clip_norm)
    else:
        raise ConfigError("training is planned by --examples alone: leave --sessions out")
    with screen.bar("searching"):
        plans = list(planning.plan(goal, load, mechanism or ()))
    if not plans:
        raise ConfigError("no mechanism can keep this goal: allow more, or release less")
    if as_json:
        rows = [_summary(made, load, prior) for made in plans]
        screen.write_json({"goal": str(goal), "releases": load.releases, "plans": rows})
    else:
        _show_plans(goal, load, plans)


def audit(
    mechanism: Annotated[
        list[str],
        typer.Option(
            help="NAME:KEY=VALUE,...; repeat it for several.", metavar="SPEC", show_default=False
        ),
    ],
    width: Annotated[int, typer.Option(help="Numbers in a row.")] = 128,
    codec: Annotated[str, typer.Option(help="How rows of floats travel.")] = "fp32",
    samples: Annotated[int, typer.Option(help="Releases in all; more of them see more.")] = 400_000,
    confidence: Annotated[
        float, typer.Option(help="Chance, at least, that a bound is right.")
    ] = 0.999,
    as_json: AsJson = False,
) -> None:
    """Test what a mechanism claims on the bytes that leave.

    Two inputs as far apart as can be are protected, written and read again; the best test tells
    them apart as well as it can. What it reaches for certain is a lower bound on mu. An audit finds
    mistakes; it proves no guarantee.
    """
    found = [_audited(spec, width, codec, samples, confidence) for spec in mechanism]
    if as_json:
        rows = [{**asdict(each), "passed": each.passed} for each in found]
        screen.write_json({"width": width, "codec": codec, "audits": rows})
    else:
        _show_audits(found)
    broken = [each for each in found if not each.passed]
    if broken:
        raise PrivacyError(
            f"{broken[0].spec} gives away more than it claims: do not use it, and report it"
        )


def _audited(spec: str, width: int, codec: str, samples: int, confidence: float) -> Audit:
    from fedsea.client.channel import format_of, wire_channel
    from fedsea.privacy.audit import audit as run
    from fedsea.privacy.noise import NoiseSource
    from fedsea.privacy.registry import mechanism_from_spec
    from fedsea.wire.codecs import Codec

    made = mechanism_from_spec(spec, width=width)
    if made is None:
        raise ConfigError("plain claims nothing, so there is nothing to audit: name a mechanism")
    codecs = {each.value: each for each in Codec if each is not Codec.COUNTS}
    if codec not in codecs:
        raise ConfigError(f"no codec {codec!r} of floats; known: {', '.join(codecs)}")
    channel = wire_channel(made, format_of(made, width, codecs[codec]), NoiseSource())
    with screen.bar(f"auditing {made.name}") as advance:
        return run(
            made,
            channel,
            width=width,
            samples=samples,
            confidence=confidence,
            on_progress=advance,
        )


def _show_plans(goal: Goal, load: Load, plans: list[Plan]) -> None:
    times = "1 release" if load.releases == 1 else f"{load.releases:,} releases"
    table = screen.table(
        f"{goal}, unit {load.unit.value}: {times}; epsilon at delta {goal.delta:g}",
        "mechanism",
        "noise",
        "ratio",
        "bytes",
        "each",
        "total",
    )
    for made in plans:
        table.add_row(
            _label(made),
            f"{made.noise_name} {made.noise:.4g}",
            f"{made.noise_ratio:.3g}",
            str(_row_bytes(made, load)),
            screen.figure(made.epsilon_each),
            screen.figure(made.epsilon),
        )
    screen.out.print(table)
    for made in plans:
        screen.write(f"{made.mechanism.spec()}\n")
    screen.detail("ratio: norm of the noise over the clip norm; bytes: of a row, floats as fp32")


def _label(made: Plan) -> str:
    bits = getattr(made.mechanism, "bits", None)
    return made.mechanism.name if bits is None else f"{made.mechanism.name} {bits} bit"


def _row_bytes(made: Plan, load: Load) -> int:
    from fedsea.client.channel import format_of

    return format_of(made.mechanism, load.width).row_bytes


def _summary(made: Plan, load: Load, prior: float) -> dict[str, Any]:
    return {
        "mechanism": made.mechanism.spec(),
        made.noise_name: made.noise,
        "noise_ratio": made.noise_ratio,
        "row_bytes": _row_bytes(made, load),
        "epsilon_each": made.epsilon_each,
        "epsilon": made.epsilon,
        "mu": made.mu,
        "recovery_bound": made.recovery(prior),
        "prior": prior,
    }


def _show_audits(found: list[Audit]) -> None:
    one = found[0]
    table = screen.table(
        f"{one.samples:,} releases each, confidence {one.confidence:.4g}",
        "mechanism",
        "claimed mu",
        "shown mu",
        "verdict",
    )
    table.columns[0].overflow = "fold"
    for each in found:
        table.add_row(
            each.spec, f"{each.claimed_mu:.4g}", f">= {each.shown_mu:.4g}", _verdict(each)
        )
    screen.out.print(table)
    if any(each.is_blind for each in found):
        screen.detail(
            f"untestable: the claim is above mu {one.largest_mu:.3g}, the most that so many "
            "releases can show"
        )


def _verdict(found: Audit) -> str:
    if not found.passed:
        return "BROKEN"
    return "untestable" if found.is_blind else "consistent"
