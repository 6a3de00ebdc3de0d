"""The suite on a tiny random model: what rows it gives, and that they come from the wire."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from fedsea.errors import ConfigError, FingerprintMismatch, PartitionError
from fedsea.evaluation.suite import Plan, evaluate, public_rows
from fedsea.evaluation.texts import Texts
from fedsea.evaluation.verdict import floor
from fedsea.evaluation.victim import Victim
from fedsea.model.checkpoint import Checkpoint
from fedsea.model.partition import Partition
from fedsea.model.projection import Projection
from fedsea.privacy.denoiser import Denoiser, Purpose, Shape
from fedsea.privacy.registry import mechanism_from_spec
from fedsea.redteam.knowledge import Level

BOS = 1


def mechanism(spec, width=48):
    """A mechanism for rows of the tiny model."""
    made = mechanism_from_spec(spec, width=width)
    assert made is not None
    return made


def saved_denoiser(folder, model, spec, projection=None, noise=48):
    """The file of a denoiser that moves every answer the same way, for one mechanism."""
    named = "" if projection is None else Projection.load(projection).fingerprint()
    purpose = Purpose(Checkpoint.open(model).fingerprint(), 1, 0, mechanism(spec).spec(), named)
    denoiser = Denoiser(Shape(48, noise, inner=8, layers=1, heads=2, window=4), purpose)
    with torch.no_grad():
        denoiser.direct.bias.add_(torch.randn(48, generator=torch.Generator().manual_seed(3)))
    file = folder / "denoiser"
    denoiser.save(file)
    return file


def random_texts(count, length, seed):
    """Token ids behind a beginning of text."""
    drawn = torch.randint(5, 90, (count, length), generator=torch.Generator().manual_seed(seed))
    return tuple((BOS, *row) for row in drawn.tolist())


@pytest.fixture
def plan(tiny_model):
    """Two short texts behind one block."""
    return Plan(
        model=tiny_model,
        partition=Partition(1, 0),
        texts=Texts(random_texts(2, 9, 0), random_texts(3, 9, 1), (BOS,)),
        attacks=("nn", "r1"),
        answers=1,
        answer_tokens=3,
    )


def test_the_clean_channel_comes_first_and_is_read(plan):
    """Without a mechanism R1 names every token, and utility is that of the model itself."""
    rows = evaluate(plan)
    assert [row.attack for row in rows] == ["prior", "nn", "r1"]
    assert all(row.is_clean and row.noise == 0 for row in rows)
    assert rows[2].recovery == rows[2].clean == 1
    assert rows[2].tokens == 18
    assert rows[2].utility == rows[2].clean_utility
    assert rows[2].utility.agreement == rows[2].utility.generation == 1
    assert not floor(rows)


def test_a_mechanism_is_attacked_where_it_left_the_client(plan):
    """Overwhelming noise leaves no text and no use, and the row says how much noise there was."""
    strong = mechanism("fedsea:scale=1000")
    rows = evaluate(replace(plan, mechanisms=(strong,)))
    noisy = [row for row in rows if not row.is_clean]
    assert [row.attack for row in noisy] == ["nn", "r1"]
    assert noisy[1].parameters == strong.spec()
    assert noisy[1].recovery < 0.3
    assert noisy[1].clean == 1
    assert noisy[1].noise > 100
    assert noisy[1].mu is None is noisy[1].bound
    assert "not differentially private" in noisy[1].guarantee


def test_counts_are_attacked_as_counts(plan):
    """A mechanism whose releases are integers goes through the same path."""
    counts = mechanism("stochastic-quantization:bits=8,clip=4,mu=2000")
    rows = evaluate(replace(plan, mechanisms=(counts,)))
    assert rows[-1].mechanism == "stochastic-quantization"
    assert rows[-1].mu is not None


def test_a_bound_counts_what_a_token_is_in(plan, tiny_model):
    """Without blocks a token is in one row; behind a block all rows of the text compose."""
    with Victim(tiny_model, Partition(1, 0)) as victim:
        answer = victim.answer((BOS, 20, 30), 6)
    # Some of it is guessed and some is not, so that a guess has a rate between 0 and 1.
    texts = replace(plan.texts, secret=((BOS, 20, 30, *answer),))
    gaussian = mechanism("gaussian:clip_norm=5,mu=0.2")
    bounds = []
    for bottom in (0, 1):
        cut = replace(plan, texts=texts, partition=Partition(bottom, 0), mechanisms=(gaussian,))
        row = evaluate(cut)[-1]
        assert row.bound is not None
        bounds.append(row.bound)
        assert row.prior < row.bound < 1
    assert bounds[0] < bounds[1]


def test_r1_reads_the_clean_channel_also_when_nobody_asked(plan):
    """The check of the suite itself cannot be left out."""
    rows = evaluate(replace(plan, attacks=("nn",), mechanisms=(mechanism("fedsea:scale=0.1"),)))
    assert [row.attack for row in rows] == ["prior", "r1", "nn", "nn"]


def test_rotations_are_attacked_on_the_clean_channel(plan):
    """A secret rotation and a permutation hide the rows from a table, not from their products."""
    rows = evaluate(replace(plan, attacks=("r6",)))
    found = {row.mechanism: row for row in rows if row.attack == "r6"}
    assert set(found) == {"plain", "rotation", "permutation"}
    assert all(row.recovery > 0.9 for row in found.values())


def test_answers_are_read_from_what_comes_back(plan):
    """With a public top the server reads every token that the client decodes."""
    (row,) = [row for row in evaluate(replace(plan, attacks=("r5",))) if row.attack == "r5"]
    assert row.recovery == 1


def test_a_black_box_has_no_floor_and_learns_from_answers(plan):
    """Without weights there is no R1; the learned inverter asks a client of its own."""
    rows = evaluate(replace(plan, level=Level.BLACK_BOX, attacks=("r5",)))
    assert [row.attack for row in rows] == ["prior", "r5"]
    assert {row.knowledge for row in rows} == {"black-box"}


def test_kinds_have_rates_of_their_own(plan):
    """Tokens of each kind are counted apart, and together they are all."""
    texts = replace(plan.texts, kinds=((("content",) * 5 + ("numbers",) * 5),) * 2)
    row = evaluate(replace(plan, texts=texts))[-1]
    assert {name: rate.tokens for name, rate in row.by_class.items()} == {
        "content": 8,
        "numbers": 10,
    }


def test_progress_reaches_the_end(plan):
    """Whoever watches sees every mechanism, and the end."""
    seen = []
    evaluate(
        replace(plan, attacks=("nn",), mechanisms=(mechanism("fedsea:scale=1"),)),
        lambda doing, done, steps: seen.append((doing, done, steps)),
    )
    assert seen == [("the clean channel", 0, 2), ("fedsea:scale=1", 1, 2), ("done", 2, 2)]


def test_public_rows_are_those_of_the_cut(plan):
    """A sweep is calibrated on rows of public texts only, without the public beginning."""
    rows = public_rows(plan)
    assert [tuple(found.shape) for found in rows] == [(9, 48)] * 3


def test_what_cannot_run_is_refused_before_anything_runs(plan):
    """An unknown attack, a cut without a trunk, and a mechanism for other rows."""
    with pytest.raises(ConfigError, match="not known"):
        evaluate(replace(plan, attacks=("r7",)))
    with pytest.raises(PartitionError):
        evaluate(replace(plan, partition=Partition(5, 5)))
    other = mechanism_from_spec("ternary:clip=1,mu=1,sparsity=1,width=7")
    assert other is not None
    with pytest.raises(ConfigError, match="7"):
        evaluate(replace(plan, mechanisms=(other,)))


def test_a_projection_stands_at_the_cut_alone_first(plan, narrowing):
    """Clean rows, then narrow ones that R1 still reads, then the mechanism behind the projection."""
    counts = mechanism("stochastic-quantization:bits=8,clip=4,mu=2000", width=16)
    file = narrowing(16)
    rows = evaluate(
        replace(plan, projection=file, mechanisms=(counts,), attacks=("nn", "r1", "r2"))
    )
    assert [(row.mechanism, row.width) for row in rows] == [
        *[("plain", None)] * 4, *[("plain", 16)] * 3, *[("stochastic-quantization", 16)] * 3,
    ]  # fmt: skip
    named = Projection.load(file).fingerprint()
    assert {row.projection for row in rows} == {"", named}
    alone = next(row for row in rows if row.width and row.attack == "r1")
    assert alone.recovery == 1  # sixteen numbers tell the tokens of this vocabulary apart
    assert not alone.is_clean
    assert "not private" in alone.guarantee
    assert alone.mu is None
    assert 0 < alone.noise < 1  # what an orthonormal projection leaves out
    assert alone.utility.agreement < 1
    assert all(row.clean_utility == rows[0].utility for row in rows)
    assert rows[-1].mu is not None


def test_what_a_projection_leaves_out_does_not_fail_the_floor(plan, narrowing):
    """One number does not hold a token: R1 misses some, and the attacks are not to blame."""
    rows = evaluate(replace(plan, projection=narrowing(1)))
    assert rows[-1].attack == "r1"
    assert rows[-1].width == 1
    assert rows[-1].clean == 1
    assert not floor(rows)


def test_a_denoiser_changes_the_use_and_nothing_for_the_attacker(plan, tiny_model, tmp_path):
    """It restores under its own mechanism; what was sent is as it was."""
    weak, other = "fedsea:scale=1e-06", "fedsea:scale=2e-06"
    found = replace(
        plan,
        mechanisms=(mechanism(weak), mechanism(other)),
        denoiser=saved_denoiser(tmp_path, tiny_model, weak),
    )
    rows = [row for row in evaluate(found) if row.attack == "r1" and not row.is_clean]
    assert [row.denoised for row in rows] == [True, False]
    assert [row.recovery for row in rows] == [1, 1]
    assert rows[0].utility.perplexity != pytest.approx(rows[0].clean_utility.perplexity, rel=0.01)
    assert rows[1].utility.perplexity == pytest.approx(rows[1].clean_utility.perplexity, rel=0.01)


def test_a_denoiser_works_behind_a_projection(plan, tiny_model, tmp_path, narrowing):
    """Both stand at the cut of one client, each named in the row."""
    spec, file = "fedsea:scale=0.001", narrowing(16)
    denoiser = saved_denoiser(tmp_path, tiny_model, spec, file, noise=16)
    rows = evaluate(
        replace(plan, mechanisms=(mechanism(spec),), projection=file, denoiser=denoiser)
    )
    assert rows[-1].protection == "fedsea, width 16, denoised"


def test_public_rows_are_narrow_behind_a_projection(plan, narrowing):
    """A sweep behind a projection is calibrated on what is protected there."""
    rows = public_rows(replace(plan, projection=narrowing(16)))
    assert [tuple(found.shape) for found in rows] == [(9, 16)] * 3


def test_parts_for_something_else_are_refused(plan, tiny_model, other_model, narrowing, tmp_path):
    """Another cut or checkpoint, half a pair, and a denoiser whose mechanism is not attacked."""
    with pytest.raises(ConfigError, match="bottom=1"):
        evaluate(replace(plan, projection=narrowing(16, bottom=0)))
    with pytest.raises(FingerprintMismatch):
        evaluate(replace(plan, model=other_model, projection=narrowing(16)))
    half = tmp_path / "half"
    Projection.load(narrowing(16)).for_client().save(half)
    with pytest.raises(ConfigError, match="whole pair"):
        evaluate(replace(plan, projection=half))
    weak = mechanism("fedsea:scale=0.1")
    denoiser = saved_denoiser(tmp_path, tiny_model, weak.spec())
    with pytest.raises(ConfigError, match="not attacked here"):
        evaluate(replace(plan, denoiser=denoiser))
    with pytest.raises(ConfigError, match="top"):
        evaluate(replace(plan, partition=Partition(1, 1), denoiser=denoiser, mechanisms=(weak,)))
