"""What the fine-tuning benchmark measures is known by its name and kept; scales are comparable."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from benchmarks.finetuning import (
    BOTTOMS,
    PAPER_MEAN,
    PAPER_SCALES,
    SEEDS,
    Bench,
    Outcome,
    noise_scales,
    plan,
)

OUTCOME = Outcome(start=3.0, loss=2.0, accuracy=None, last=2.1, curve=(2.9, 2.2), seconds=1.0)


def test_known_runs_are_not_repeated(tmp_path: Path) -> None:
    """A run that the file holds is taken from there, in another process too."""
    kept = tmp_path / "kept.json"
    run = plan(is_quick=True).noise
    bench = Bench(tmp_path / "no models", tmp_path / "no data", kept)
    bench.outcomes[run.name] = OUTCOME
    bench.save()

    again = Bench(tmp_path / "no models", tmp_path / "no data", kept)
    found = again.run(run)
    assert (found.loss, list(found.curve)) == (OUTCOME.loss, [*OUTCOME.curve])
    assert set(json.loads(kept.read_text(encoding="utf-8"))["runs"]) == {run.name}


def test_runs_have_names_of_their_own() -> None:
    """Seed, cut, noise and whatever else differs is in the name."""
    chosen = plan(is_quick=False)
    runs = [run for _, one in chosen.same for run in chosen.with_seeds(one)]
    runs += [replace(run, split=False) for run in runs]
    for bottom in BOTTOMS:
        for scale in PAPER_SCALES:
            runs += chosen.with_seeds(replace(chosen.noise, bottom=bottom, noise=scale))
    assert len({run.name for run in runs}) == len(runs) == len(SEEDS) * (2 * 4 + 3 * 4)


def test_relative_scales_stand_to_the_rows_as_the_papers_do() -> None:
    """The first kind is the paper's; the second has its noise / mean |h| behind one block."""
    mean = 0.33
    given, relative = noise_scales(mean)
    assert [scale for _, scale in given] == list(PAPER_SCALES)
    for paper, scale in relative:
        assert scale / mean == pytest.approx(paper / PAPER_MEAN, rel=0.01)
