"""The red team's report as one HTML page, for readers who decide and do not program.

The page is self-contained: text, tables and plots (SVG, drawn by matplotlib from the extra
`redteam`) are in the one file, and it asks for nothing from outside. It follows the reader's light
or dark setting and prints.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from fedsea.errors import ConfigError
from fedsea.evaluation import verdict
from fedsea.evaluation.verdict import Setting, Standing, Verdict
from fedsea.redteam.report import (
    PLAIN,
    PRIOR_ATTACK,
    TITLES,
    Row,
    percent,
    perplexity_text,
)
from fedsea.redteam.report import markdown as table_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_INK = "#010203"  # stands for the reader's text colour
_SERIES = tuple(f"#0a0b{number:02x}" for number in range(8))  # stand for the page's series colours
_MARKERS = "osD^vPX*"
_METADATA = re.compile(r"\s*<metadata>.*?</metadata>", re.DOTALL)
_PANEL_INCHES = (5.2, 3.7)
_READ_AS = {
    Standing.EXPOSED: "bad",
    Standing.LOSING: "bad",
    Standing.SPENT: "poor",
    Standing.HOLDS: "good",
}
_WORDS = {"good": "held", "poor": "too costly", "bad": "not protective", "none": "not attacked"}


@dataclass(frozen=True, slots=True)
class About:
    """How the report came to be.

    Attributes:
        date: day of the measurement.
        command: what was run.
        version: of fedsea.
        text: the attacked text, by name.
        method: further facts, a sentence each.
    """

    date: str
    command: str
    version: str
    text: str
    method: tuple[str, ...] = ()


def check_plots() -> None:
    """Raise ConfigError when matplotlib is not installed."""
    if find_spec("matplotlib") is None:
        raise ConfigError("the HTML page needs matplotlib: pip install 'fedsea[redteam]'")


def page(rows: Sequence[Row], about: About) -> str:
    """The whole page.

    Raises:
        ConfigError: there are no rows, or matplotlib is not installed.
    """
    if not rows:
        raise ConfigError("there is nothing to report: no attack was run")
    check_plots()
    body = [
        _heading(about),
        _verdicts(rows),
        _explanation(),
        *(_cut(group) for group in _by_cut(rows)),
        _method(rows, about),
        _LIMITS,
    ]
    return _PAGE.format(style=_STYLE, body="\n".join(body))


def markdown(rows: Sequence[Row], about: About) -> str:
    """Verdicts and all rows for a repository."""
    lines = [
        f"# Red team, {about.date}",
        "",
        f"fedsea {about.version}, text {about.text}. Command:",
        "",
        f"```\n{about.command}\n```",
        "",
        *(f"* {fact}" for fact in about.method),
        "",
        "## Verdicts",
        "",
        *(
            f"* {verdict.cut_text(row)}: **the attacks failed their own check**, "
            f"{row.attack.upper()} recovers "
            f"{percent(row.recovery)} without protection"
            for row in verdict.floor(rows)
        ),
        *(
            f"* **{found.name}** ({_WORDS[_kind(found)]}): {found.sentence}"
            for found in (*verdict.fedsea_scale(rows), *verdict.mechanisms(rows))
        ),
        "",
        "## All attacks",
        "",
        "Noise is in units of the signal. The interval is Clopper and Pearson's of 95 %. `prior` is "
        "the guess without any observation, `clean` the same attack without protection. Behind a "
        "projection noise is what reaches the trunk: it counts what the narrow row leaves out.",
        "",
    ]
    return "\n".join(lines) + table_of(rows)


def _heading(about: About) -> str:
    return (
        "<header><h1>What can the server read?</h1>"
        "<p class=lead>A red team report on split inference. The attacker saw the bytes that "
        "crossed the wire, and nothing else of the data owner's; the report says how much of the "
        f"text it recovered from them.</p><p class=meta>{escape(about.date)} · fedsea "
        f"{escape(about.version)} · text: {escape(about.text)}</p></header>"
    )


def _verdicts(rows: Sequence[Row]) -> str:
    failed = verdict.floor(rows)
    void = ""
    if failed:
        names = "; ".join(f"{verdict.cut_text(row)}: {percent(row.recovery)}" for row in failed)
        void = _card(
            "bad",
            "This report is void",
            "void",
            "The attacks failed their own check: without any protection the text must be read to "
            f"{verdict.FLOOR:.0%} or more, and was not ({names}). Nothing below is evidence of "
            "protection.",
        )
    named = "".join(_verdict_card(found) for found in verdict.fedsea_scale(rows))
    return (
        f"<section><h2>Verdicts</h2>{void}{_overview(rows)}<div class=cards>{named}</div></section>"
    )


def _overview(rows: Sequence[Row]) -> str:
    """Mechanisms down, cuts across, a word in each field."""
    cuts = _by_cut(rows)
    names = list(dict.fromkeys(row.protection for row in rows))
    head = "".join(f"<th>{escape(verdict.cut_text(cut[0]))}</th>" for cut in cuts)
    lines = []
    for name in names:
        fields = []
        for cut in cuts:
            found = verdict.mechanisms(row for row in cut if row.protection == name)
            kind = _kind(found[0]) if found else "none"
            fields.append(f"<td class={kind}>{_WORDS[kind]}</td>")
        lines.append(f"<tr><th scope=row>{escape(name)}</th>{''.join(fields)}</tr>")
    return (
        f"<div class=wide><table class=overview><thead><tr><th>mechanism</th>{head}</tr></thead>"
        f"<tbody>{''.join(lines)}</tbody></table></div>"
        "<p class=meta>Best setting of each mechanism that was tried. <b>not protective</b>: the "
        "text is read. <b>too costly</b>: where the attacker falls to a guess, the model suffers. "
        "<b>held</b>: these attacks gained little and the model is as good as without.</p>"
    )


def _verdict_card(found: Verdict) -> str:
    kind = _kind(found)
    return _card(kind, found.name, _WORDS[kind], found.sentence)


def _kind(found: Verdict) -> str:
    if found.protective:
        return "good"
    return "bad" if found.evidence is None else _READ_AS[found.evidence.standing]


def _card(kind: str, title: str, word: str, text: str) -> str:
    return (
        f'<article class="card {kind}"><h3>{escape(title)} <span class=badge>{word}</span></h3>'
        f"<p>{escape(text)}</p></article>"
    )


def _explanation() -> str:
    return f"""<section><h2>How to read the numbers</h2>
<dl>
<dt>Recovered</dt><dd>The share of secret tokens (pieces of words) that the attacker named
correctly. The interval is the range in which the true share lies with 95 % confidence
(Clopper-Pearson).</dd>
<dt>A guess</dt><dd>What the attacker names from knowledge of the language alone, without seeing
anything but the true text before each token, which favours it. No protection takes this
from an attacker, and recovery means something only
in comparison with it.</dd>
<dt>Clean</dt><dd>What the same attack recovers when nothing protects the text. If this is low, the
attack is weak, and its failure against a protection says little.</dd>
<dt>Perplexity, accuracy, agreement</dt><dd>What the protection leaves of the model. Perplexity: how
surprised it is by the real text; lower is better. Accuracy: how often its first choice is the
real next token. Agreement: how often its first choice is that of the unprotected model.</dd>
<dt>Not protective</dt><dd>The strongest attack recovers at least
{verdict.RECOVERY_POINTS * 100:.0f} points more than a guess, while accuracy is within
{verdict.UTILITY_POINTS * 100:.0f} points of the unprotected model.</dd>
<dt>Width</dt><dd>How many numbers a row has on the wire where a projection narrows it; the attacker
knows the projection. What it leaves out nobody can read, and the model lacks it too: the row without
a mechanism says how much that is. Noise there is what reaches the provider's blocks.</dd>
<dt>Denoised</dt><dd>The data owner restores part of the answer at home. The attacker gets nothing of
it: only the use changes.</dd>
<dt>Bound</dt><dd>Where a mechanism is differentially private: the most that <em>any</em> attacker
with the same prior knowledge can recover of one token. A measured recovery is only what
<em>these</em> attackers reached.</dd>
</dl></section>"""


def _cut(rows: Sequence[Row]) -> str:
    first = rows[0]
    title = f"{escape(verdict.cut_text(first))}, {first.top} after"
    plots = [_plot(_draw_tradeoff, rows, "Text recovered against use kept, strongest attack")]
    if any(row.noise > 0 for row in rows):
        plots.append(_plot(_draw_attacks, rows, "The same noise, seen by each attack"))
    cards = "".join(_verdict_card(found) for found in verdict.mechanisms(rows))
    return (
        f"<section><h2>{title}</h2><p class=meta>Attacker's knowledge: "
        f"{escape(_KNOWLEDGE.get(first.knowledge, first.knowledge))}</p>"
        f"<div class=plots>{''.join(plots)}</div><div class=cards>{cards}</div>"
        f"{_table(rows)}{_classes(rows)}</section>"
    )


def _table(rows: Sequence[Row]) -> str:
    lines = []
    for setting in _groups(rows):
        for index, row in enumerate(setting):
            first = index == 0
            name = (
                f'<th scope=rowgroup rowspan={len(setting)} title="{escape(row.guarantee)}">'
                f"{_breakable(row.setting)}"
                f"<small>noise {row.noise:.2f} × signal{_bound_text(row)}</small></th>"
                if first
                else ""
            )
            use = (
                f"<td rowspan={len(setting)}>{perplexity_text(row.utility.perplexity)}</td>"
                f"<td rowspan={len(setting)}>{percent(row.utility.accuracy)}</td>"
                f"<td rowspan={len(setting)}>{percent(row.utility.agreement)}</td>"
                if first
                else ""
            )
            lines.append(
                f"<tr{' class=first' if first else ''}>{name}"
                f"<td class=word>{escape(_attack_title(row.attack))}</td>"
                f"<td class={_shade(row)}>{percent(row.recovery)}</td>"
                f"<td>{row.low * 100:.1f}–{row.high * 100:.1f}</td>"
                f"<td>{percent(row.prior)}</td><td>{percent(row.clean)}</td>{use}</tr>"
            )
    return (
        "<details open><summary>All attacks</summary><div class=wide><table><thead><tr>"
        "<th>mechanism</th><th class=word>attack</th><th>recovered</th><th>95 %</th><th>guess</th>"
        "<th>clean</th><th>perplexity</th><th>accuracy</th><th>agreement</th></tr></thead>"
        f"<tbody>{''.join(lines)}</tbody></table></div></details>"
    )


def _classes(rows: Sequence[Row]) -> str:
    """Recovery by kind of token, of the strongest attack on every setting."""
    found = [setting.strongest for setting in verdict.settings(rows)]
    names = sorted({name for row in found for name in row.by_class})
    if not names:
        return ""
    head = "".join(f"<th>{escape(name)}</th>" for name in names)
    lines = [
        f"<tr><th scope=row>{_breakable(row.setting)}</th>"
        f"<td class=word>{escape(row.attack.upper())}</td>"
        + "".join(_class_cell(row, name) for name in names)
        + "</tr>"
        for row in found
    ]
    return (
        "<details><summary>By kind of token, strongest attack</summary><div class=wide><table>"
        f"<thead><tr><th>mechanism</th><th class=word>attack</th>{head}</tr></thead>"
        f"<tbody>{''.join(lines)}</tbody></table></div></details>"
    )


def _class_cell(row: Row, name: str) -> str:
    rate = row.by_class.get(name)
    if rate is None or not rate.tokens:
        return "<td>–</td>"
    return (
        f'<td title="95 % {rate.low * 100:.0f}–{rate.high * 100:.0f}, {rate.tokens} tokens">'
        f"{percent(rate.recovery)}</td>"
    )


def _method(rows: Sequence[Row], about: About) -> str:
    attacks = list(dict.fromkeys(row.attack for row in rows))
    listed = "".join(f"<li>{escape(_attack_title(name))}</li>" for name in attacks)
    facts = "".join(f"<li>{escape(fact)}</li>" for fact in about.method)
    return f"""<section><h2>Method</h2>
<p>The data owner's own client ran with each mechanism against a real server. A recorder on the wire
kept every message. The attacker decoded these messages as the server does and tried to name the
tokens. It knew the mechanism, its parameters and the published model; it did not know the noise.
The same texts were scored for the model's use.</p>
<ul>{listed}{facts}</ul>
<p>Command:</p><pre>{escape(about.command)}</pre></section>"""


_LIMITS = """<section><h2>Limits</h2>
<ul>
<li>An attack that fails proves nothing: a better one may come. Only a bound holds for all
attackers, and only for the unit that it names.</li>
<li>The numbers are of this model, this text and these settings. Larger models, other texts and
other cuts differ; run the report on your own.</li>
<li>The attacks read what the client sends. What comes back is symmetric information: with a public
top the server reads the answer as the client does (attack R5).</li>
<li>Lengths, times and the fact of a request were not hidden and not attacked here.</li>
</ul></section>"""

_KNOWLEDGE = {
    "base": "the published weights",
    "leaked": "the client's own weights, leaked",
    "black-box": "no weights; only texts like these",
}


def _attack_title(name: str) -> str:
    title = TITLES.get(name, "")
    if name == PRIOR_ATTACK:
        return title
    return f"{name.upper()}: {title}" if title else name


def _bound_text(row: Row) -> str:
    return "" if row.bound is None else f", bound {percent(row.bound)}"


def _breakable(spec: str) -> str:
    """A spec that may break after its separators."""
    return escape(spec).replace(",", ",<wbr>").replace(":", ":<wbr>")


def _shade(row: Row) -> str:
    if row.attack == PRIOR_ATTACK:
        return "same"
    return "bad" if row.recovery - row.prior >= verdict.RECOVERY_POINTS else "same"


def _by_cut(rows: Iterable[Row]) -> list[list[Row]]:
    found: dict[tuple[object, ...], list[Row]] = {}
    for row in rows:
        found.setdefault((*row.channel, row.knowledge), []).append(row)
    return list(found.values())


def _groups(rows: Iterable[Row]) -> list[list[Row]]:
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(row.setting, []).append(row)
    return list(found.values())


def _plot(draw: Any, rows: Sequence[Row], title: str) -> str:
    """One drawing as SVG whose colours are those of the page."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    style: dict[Any, Any] = {
        "svg.fonttype": "none",
        "svg.hashsalt": "fedsea",
        "font.family": "sans-serif",
        "font.size": 9,
        "axes.spines.top": False,
        "axes.spines.right": False,
        **dict.fromkeys(
            ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), _INK
        ),
    }
    with mpl.rc_context(style):
        figure = Figure(figsize=_PANEL_INCHES, layout="constrained")
        axes = figure.add_subplot()
        draw(axes, rows)
        drawn = io.StringIO()
        figure.savefig(drawn, format="svg", transparent=True, metadata={"Date": None})
    svg = drawn.getvalue()
    svg = _METADATA.sub("", svg[svg.index("<svg") :]).replace(_INK, "currentColor")
    for number, color in enumerate(_SERIES):
        svg = svg.replace(color, f"var(--series-{number})")
    first = rows[0]
    prefix = f"{first.model}-{first.bottom}-{first.top}-{first.knowledge}-{draw.__name__}-"
    svg = _unique_ids(svg, "".join(c if c.isalnum() else "-" for c in prefix))
    label = escape(f"{title}. {verdict.cut_text(first)}.")
    svg = svg.replace("<svg ", f'<svg role="img" aria-label="{label}" ', 1)
    return f"<figure>{svg}<figcaption>{escape(title)}</figcaption></figure>"


def _unique_ids(svg: str, prefix: str) -> str:
    """Several drawings share one page: what they name must not be the same."""
    for before in ('id="', "url(#", 'href="#'):
        svg = svg.replace(before, before + prefix)
    return svg


def _draw_tradeoff(axes: Axes, rows: Sequence[Row]) -> None:
    """Agreement with the clean model on x, the strongest attack's recovery on y."""
    found = verdict.settings(rows)
    clean = [setting for setting in found if setting.strongest.is_clean]
    names = dict.fromkeys(s.strongest.protection for s in found if s.strongest.noise > 0)
    for number, name in enumerate(names):
        line = [*clean, *_by_noise(s for s in found if s.strongest.protection == name)]
        _line(
            axes,
            number,
            [setting.strongest.utility.agreement for setting in line],
            [setting.strongest.recovery for setting in line],
            name,
        )
    for setting in clean:
        axes.plot(
            [setting.strongest.utility.agreement],
            [setting.strongest.recovery],
            marker="o",
            markersize=9,
            markerfacecolor="none",
            markeredgecolor=_INK,
            linestyle="none",
            label="no protection",
        )
    _finish(axes, rows, "agreement with the unprotected model")
    axes.set_xlim(-0.03, 1.03)
    axes.xaxis.set_major_formatter(_percent_ticks())


def _draw_attacks(axes: Axes, rows: Sequence[Row]) -> None:
    """Noise in units of the signal on x, what each attack recovers from FedSEA's noise on y."""
    shown = _most_tried(rows)
    attacks = [
        name for name in dict.fromkeys(row.attack for row in rows) if name in verdict.PROMPT_ATTACKS
    ]
    for number, name in enumerate(attacks):
        line = sorted(
            (r for r in rows if r.attack == name and r.protection in (shown, PLAIN)),
            key=lambda row: row.noise,
        )
        _line(
            axes, number, [row.noise for row in line], [row.recovery for row in line], name.upper()
        )
    accuracy = sorted(
        {
            (r.noise, r.utility.accuracy / max(r.clean_utility.accuracy, 1e-9))
            for r in rows
            if r.protection in (shown, PLAIN)
        }
    )
    axes.plot(
        [noise for noise, _ in accuracy],
        [share for _, share in accuracy],
        color=_INK,
        linewidth=1,
        linestyle=(0, (1, 1.5)),
        label="accuracy kept",
    )
    positive = [row.noise for row in rows if row.protection == shown and row.noise > 0]
    axes.set_xscale("symlog", linthresh=min(positive, default=1.0))
    _finish(axes, rows, f"noise of {shown}, in units of the signal")


def _most_tried(rows: Sequence[Row]) -> str:
    """The mechanism with the most settings; FedSEA's when several have as many."""
    counts: dict[str, set[str]] = {}
    for row in rows:
        if row.noise > 0:
            counts.setdefault(row.protection, set()).add(row.parameters)
    if not counts:
        return PLAIN
    return max(counts, key=lambda name: (len(counts[name]), name == verdict.FEDSEA))


def _line(axes: Axes, number: int, x: Sequence[float], y: Sequence[float], label: str) -> None:
    axes.plot(
        x,
        y,
        color=_SERIES[number % len(_SERIES)],
        marker=_MARKERS[number % len(_MARKERS)],
        markersize=4.5,
        linewidth=1.4,
        label=label,
    )


def _finish(axes: Axes, rows: Sequence[Row], x_label: str) -> None:
    prior = rows[0].prior
    if not math.isnan(prior):
        axes.axhline(prior, color=_INK, linewidth=1, linestyle=(0, (4, 3)), label="a guess")
    axes.set_ylim(-0.03, 1.05)
    axes.set_ylabel("tokens recovered")
    axes.set_xlabel(x_label)
    axes.yaxis.set_major_formatter(_percent_ticks())
    axes.grid(visible=True, color=_INK, alpha=0.12, linewidth=0.6)
    axes.legend(frameon=False, fontsize=8, loc="best")


def _percent_ticks() -> Any:
    from matplotlib.ticker import PercentFormatter

    return PercentFormatter(1.0, decimals=0)


def _by_noise(found: Iterable[Setting]) -> list[Setting]:
    return sorted(found, key=lambda setting: setting.strongest.noise)


_STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --quiet: #59636e; --ground: #ffffff;
  --card: #f6f8fa; --rule: #d1d9e0; --bad: #b42318; --poor: #8a5a00; --good: #1a7f37;
  --series-0: #0969da; --series-1: #bc4c00; --series-2: #1a7f37; --series-3: #8250df;
  --series-4: #bf3989; --series-5: #1b7c83; --series-6: #7d6600; --series-7: #6e7781; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6edf3; --quiet: #9198a1;
  --ground: #0d1117; --card: #161b22; --rule: #30363d; --bad: #ff8177; --poor: #e3b341;
  --good: #56d364; --series-0: #6cb6ff; --series-1: #ffa657; --series-2: #6bc46d;
  --series-3: #c8a2ff; --series-4: #ff8dc7; --series-5: #56d4dd; --series-6: #dbb32d;
  --series-7: #9da7b1; } }
@media print { :root { color-scheme: light; --ink: #000; --quiet: #444; --ground: #fff;
  --card: #fff; --rule: #999; --bad: #8f1a12; --poor: #6b4600; --good: #116329;
  --series-0: #0550ae; --series-1: #953800; --series-2: #116329; --series-3: #6639ba;
  --series-4: #99286e; --series-5: #0b5960; --series-6: #5c4a00; --series-7: #424a53; }
  .plots { grid-template-columns: 1fr 1fr; }
  section, article, figure, tr { break-inside: avoid-page; } section { break-inside: auto; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 2rem 1.25rem 4rem; max-width: 70rem; color: var(--ink);
  background: var(--ground); font: 1rem/1.55 system-ui, sans-serif; }
h1 { margin: 0; font-size: 2rem; line-height: 1.2; } h2 { margin: 2.5rem 0 .75rem; }
h3 { margin: 0 0 .35rem; font-size: 1rem; } .lead { max-width: 45rem; font-size: 1.1rem; }
.meta, figcaption, small { color: var(--quiet); font-size: .875rem; }
.cards { display: grid; gap: .75rem; grid-template-columns: repeat(auto-fill, minmax(min(20rem, 100%), 1fr)); }
.card { padding: .9rem 1rem; background: var(--card); border: 1px solid var(--rule);
  border-left: 4px solid var(--kind); border-radius: .4rem; }
.card p { margin: 0; overflow-wrap: anywhere; font-size: .95rem; }
.badge { float: right; margin-left: .5rem; color: var(--kind); font-weight: 600; font-size: .875rem; }
.card.bad { --kind: var(--bad); } .card.poor { --kind: var(--poor); }
.card.good { --kind: var(--good); }
dl { display: grid; gap: .35rem 1.25rem; grid-template-columns: minmax(8rem, 13rem) 1fr; }
dt { font-weight: 600; } dd { margin: 0; max-width: 45rem; }
.plots { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fit, minmax(min(24rem, 100%), 1fr)); }
figure { margin: 0; } figure svg { width: 100%; height: auto; } figcaption { text-align: center; }
.wide { overflow-x: auto; } details { margin-top: 1rem; } summary { cursor: pointer; font-weight: 600; }
table { width: 100%; border-collapse: collapse; font-size: .875rem; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .6rem; text-align: right; vertical-align: top; white-space: nowrap; }
th:first-child, .word { text-align: left; } .word { min-width: 14rem; white-space: normal; }
thead th { border-bottom: 1px solid var(--ink); color: var(--quiet); font-weight: 600; }
tbody th { max-width: 16rem; font-weight: 500; white-space: normal; }
tbody th small { display: block; font-weight: 400; } tr.first > * { border-top: 1px solid var(--rule); }
td.bad { color: var(--bad); font-weight: 600; } td.poor { color: var(--poor); }
td.good { color: var(--good); font-weight: 600; } td.none { color: var(--quiet); }
.overview { width: auto; margin-bottom: .5rem; } .overview th, .overview td { text-align: left; }
.overview thead th { white-space: normal; max-width: 11rem; } .card + .wide { margin-top: 1rem; }
pre { padding: .75rem 1rem; background: var(--card); border: 1px solid var(--rule);
  border-radius: .4rem; white-space: pre-wrap; overflow-wrap: anywhere; }
@media (max-width: 40rem) { body { padding: 1.25rem .9rem 3rem; } h1 { font-size: 1.6rem; }
  dl { grid-template-columns: 1fr; } dd { margin-bottom: .5rem; } .word { min-width: 9rem; } }
"""

_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>fedsea red team: what can the server read?</title>
<style>{style}</style>
</head>
<body>
{body}
</body>
</html>
"""
