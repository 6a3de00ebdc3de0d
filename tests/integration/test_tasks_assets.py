"""Readers and templates of the tasks on the published files of the shared assets."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedsea.tasks.catalogue import TASKS
from fedsea.tasks.loading import load
from fedsea.tasks.metrics import judged
from fedsea.tasks.records import trainable

DATA = Path(__file__).parents[2].parent / "shared" / "assets" / "data"

pytestmark = [
    pytest.mark.shared,
    pytest.mark.skipif(not DATA.is_dir(), reason="the folder of shared assets is absent"),
]

# File, records, and how many of them have a completion in the first style.
FILES = [
    ("multirc", "superglue/MultiRC_full/val.jsonl", 4848, 4848),
    ("multirc", "superglue/MultiRC_full/test.jsonl", 9693, 0),
    ("boolq", "superglue/BoolQ/val.jsonl", 3270, 3270),
    ("rte", "superglue/RTE/val.jsonl", 277, 277),
    ("rte", "superglue/RTE_full/dev.tsv", 277, 277),
    ("rte", "superglue/RTE_full/test.tsv", 3000, 0),
    ("cb", "superglue/CB/val.jsonl", 56, 56),
    ("copa", "superglue/COPA/val.jsonl", 100, 100),
    ("wic", "superglue/WiC/val.jsonl", 638, 638),
    ("wsc", "superglue/WSC/val.jsonl", 104, 38),
    ("record", "superglue/ReCoRD/dev32.jsonl", 32, 32),
    ("quac", "quac/test-tiny.jsonl", 150, 150),
    ("xsum", "xsum/test.jsonl", 1000, 1000),
    ("sst2", "sst2/dev.tsv", 6735, 6735),
]


@pytest.mark.parametrize(("name", "path", "count", "learnable"), FILES)
def test_published_files_are_read_whole(name: str, path: str, count: int, learnable: int) -> None:
    """No record is lost, and those with labels can be learned."""
    records = load(name, DATA / path)

    assert (len(records), len(trainable(records))) == (count, learnable)


@pytest.mark.parametrize(
    ("name", "path"), [(name, path) for name, path, _, learnable in FILES if learnable]
)
def test_right_answers_score_best(name: str, path: str) -> None:
    """In every style, on a hundred records at most, the first right answer is judged right."""
    for style in TASKS[name].styles:
        records = load(name, DATA / path, limit=100, style=style)

        scores = judged(TASKS[name].metric, [record.gold[0] for record in records], records)

        assert scores.get("em_any", next(iter(scores.values()))) == pytest.approx(1)


def test_answers_of_quac_are_pieces_of_the_passage() -> None:
    """Run-together answers are taken apart into what annotators marked."""
    records = load("quac", DATA / "quac" / "test-tiny.jsonl", style="plain")

    marked = [gold for record in records for gold in record.gold if gold != "CANNOTANSWER"]
    whole = [gold for gold in marked if len(gold.split()) > 1]

    assert len(whole) > 0.95 * len(marked)
