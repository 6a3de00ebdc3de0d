"""Verdicts over rows with chosen numbers."""

from __future__ import annotations

import pytest

from fedsea.evaluation.verdict import (
    Standing,
    fedsea_scale,
    floor,
    mechanisms,
    published_scale,
    settings,
)


def fedsea(make_row, scale, **changed):
    """A row of the FedSEA mechanism at a scale."""
    return make_row(mechanism="fedsea", parameters=f"fedsea:scale={scale}", **changed)


@pytest.mark.parametrize(
    ("recovery", "accuracy", "standing"),
    [
        (0.40, 0.48, Standing.EXPOSED),
        (0.40, 0.479, Standing.LOSING),
        (0.399, 0.3, Standing.SPENT),
        (0.399, 0.5, Standing.HOLDS),
    ],
)
def test_two_bars_decide(make_row, recovery, accuracy, standing):
    """Ten points over the guess and two points of accuracy, both inclusive, tell four cases apart."""
    row = fedsea(make_row, 0.1, recovery=recovery, accuracy=accuracy)
    assert settings([row])[0].standing is standing


def test_the_strongest_attack_on_the_prompt_decides(make_row):
    """A reading of the answer, or the guess itself, does not stand for the prompt."""
    rows = [
        make_row(attack="nn", recovery=0.2),
        make_row(attack="r2", recovery=0.7),
        make_row(attack="r5", recovery=1.0),
        make_row(attack="prior", recovery=0.3),
    ]
    assert settings(rows)[0].strongest.attack == "r2"


def test_floor_fails_on_a_weak_attack_only(make_row):
    """R1 under 99 % of a clean channel fails the suite; noise and other attacks do not."""
    weak = make_row(recovery=0.989)
    assert floor([weak, make_row(recovery=0.99)]) == [weak]
    assert not floor([make_row(attack="nn", recovery=0.2), fedsea(make_row, 1, recovery=0.1)])


def test_fedsea_scale_names_the_largest_noise_that_is_read(make_row):
    """Of the published scales that stay useful and readable, the noisiest is the evidence."""
    rows = [
        fedsea(make_row, 0.02, noise=0.1),
        fedsea(make_row, 0.05, noise=0.2, recovery=0.8),
        fedsea(make_row, 0.1, noise=0.4, accuracy=0.2),
        fedsea(make_row, 2.0, noise=9.0),
    ]
    (verdict,) = fedsea_scale(rows)
    assert not verdict.protective
    assert "not protective: at fedsea:scale=0.05" in verdict.sentence


def test_fedsea_scale_is_silent_about_other_noise(make_row):
    """A clipped mechanism, one beyond the paper's range, and none at all give no such verdict."""
    assert not fedsea_scale([make_row(), fedsea(make_row, 0.5), fedsea(make_row, 0)])
    clipped = make_row(mechanism="fedsea", parameters="fedsea:scale=0.02,clip_norm=1")
    assert published_scale(clipped) is None


def test_each_cut_has_its_own_verdict(make_row):
    """Two depths of one model are judged apart."""
    rows = [fedsea(make_row, 0.02), fedsea(make_row, 0.02, bottom=0, recovery=0.3)]
    assert [verdict.protective for verdict in fedsea_scale(rows)] == [False, True]


def test_mechanisms_say_what_a_sweep_found(make_row):
    """Held, spent or read: each kind of sweep has its sentence."""
    plain = make_row()
    held = make_row(mechanism="a", parameters="a:1", recovery=0.31)
    spent = make_row(mechanism="b", parameters="b:1", recovery=0.31, accuracy=0.1)
    read = make_row(mechanism="c", parameters="c:1", recovery=0.9, accuracy=0.1)
    verdicts = mechanisms([plain, held, spent, read])
    assert [verdict.protective for verdict in verdicts] == [False, True, False, False]
    assert "splitting alone hides nothing" in verdicts[0].sentence
    assert "held against these attacks at a:1" in verdicts[1].sentence
    assert "falls to a guess at b:1" in verdicts[2].sentence
    assert "not protective at any setting" in verdicts[3].sentence


def test_the_floor_is_about_the_channel_without_a_projection(make_row):
    """What a narrow projection leaves out cannot be read: that is no fault of the attack."""
    assert not floor([make_row(recovery=0.4, width=8, projection="a" * 64)])


def test_rows_with_and_without_a_projection_have_verdicts_of_their_own(make_row):
    """The same mechanism behind a projection is another setting, and the sentence says the width."""
    behind = {"width": 16, "projection": "a" * 64}
    rows = [make_row(), make_row(**behind), fedsea(make_row, 1), fedsea(make_row, 1, **behind)]
    assert len(settings(rows)) == 4
    found = mechanisms(rows)
    assert [verdict.name for verdict in found] == ["plain", "plain", "fedsea", "fedsea"]
    assert ["narrowed to 16" in verdict.sentence for verdict in found] == [False, True] * 2
    assert "splitting alone hides nothing" in found[0].sentence
    assert "this alone is no protection" in found[1].sentence
    (published,) = fedsea_scale([fedsea(make_row, 0.1, **behind)])
    assert "narrowed to 16" in published.sentence
