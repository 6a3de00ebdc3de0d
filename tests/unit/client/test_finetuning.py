"""Settings of a fine-tuning: read from a file, overridden, refused by name."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.training_trunk import TinyTrainingTrunk

from fedsea.client.examples import LossOn
from fedsea.client.finetuning import FinetuneConfig, Finetuning
from fedsea.client.training_config import TrainerConfig
from fedsea.errors import ConfigError, DataError, PartitionError
from fedsea.model.partition import Partition
from fedsea.transport.memory import MemoryChannel

RUN = {"model": "m", "data": "d.jsonl", "out": "o"}


def test_defaults():
    """Only [run] has keys that must be there."""
    config = FinetuneConfig.from_table({"run": RUN})
    assert config.training == TrainerConfig()
    assert config.parts.partition == Partition(1, 1)
    assert config.run.adapter == "o"
    assert config.lora.train == ("bottom", "trunk", "top")


def test_paths(tmp_path):
    """Paths of a file are relative to it, those of overrides are not; a hub id stays one."""
    path = tmp_path / "run.toml"
    path.write_text('[run]\nmodel = "org/name"\ndata = "d.jsonl"\nout = "o"\n')
    config = FinetuneConfig.load(path, {"run": {"data": Path("e.jsonl")}})
    assert config.run.out == tmp_path / "o"
    assert config.run.data == Path("e.jsonl")
    assert config.run.model == "org/name"
    (tmp_path / "org" / "name").mkdir(parents=True)
    assert FinetuneConfig.load(path).run.model == str(tmp_path / "org" / "name")


def test_every_section():
    """Each section reaches its part."""
    config = FinetuneConfig.from_table(
        {
            "run": {**RUN, "name": "notes"},
            "parts": {"bottom": 2, "top": 3},
            "lora": {"rank": 4, "blocks": [0, 1], "train": ["trunk"], "freeze_a": True},
            "data": {"loss_on": "all", "max_tokens": 64},
            "training": {"steps": 5},
        }
    )
    assert config.run.adapter == "notes"
    assert config.parts.partition == Partition(2, 3)
    assert (config.lora.config.rank, config.lora.config.blocks) == (4, (0, 1))
    assert config.lora.config.freeze_a
    assert config.data.options.loss_on is LossOn.ALL
    assert config.training.steps == 5


@pytest.mark.parametrize(
    ("table", "words"),
    [
        ({"run": {"model": "m"}}, "run.data is missing"),
        ({"run": {**RUN, "model": ""}}, "run.model is empty"),
        ({"run": {**RUN, "evaluation_share": 1.0}}, "evaluation_share is 1"),
        ({"run": {**RUN, "evaluation_share": 0.1, "evaluation": "e.txt"}}, "both given"),
        ({"run": {**RUN, "name": ".hidden"}}, "give run.name"),
        ({"run": {**RUN, "out": "/"}}, "give run.name"),
        ({"run": RUN, "lora": {"rank": 0}}, "rank must be 1"),
        ({"run": RUN, "lora": {"train": ["middle"]}}, "lora.train names middle"),
        ({"run": RUN, "lora": {"train": []}}, "name what shall be trained"),
        ({"run": RUN, "lora": {"prompt_rows": -1}}, "prompt_rows is -1"),
        ({"run": RUN, "data": {"max_tokens": 1}}, "max_tokens is 1"),
        ({"run": RUN, "data": {"paragraphs": "packed"}}, "need max_tokens"),
        ({"run": RUN, "part": {}}, "did you mean part"),
        ({"run": RUN, "lora": {"ranks": 3}}, "did you mean rank"),
    ],
)
def test_refuses_bad_settings(table, words):
    """What cannot be used is named by its key."""
    with pytest.raises(ConfigError, match=words):
        FinetuneConfig.from_table(table)


def test_a_file_in_place_of_a_folder(tmp_path, tiny_model):
    """`out` is a folder."""
    (tmp_path / "o").write_text("")
    table = {"run": {"model": str(tiny_model), "data": "d.jsonl", "out": str(tmp_path / "o")}}
    with pytest.raises(ConfigError, match="is a file"):
        Finetuning(FinetuneConfig.from_table(table))


def test_a_cut_that_leaves_no_trunk(tmp_path, tiny_model):
    """The cut is checked before a file is read."""
    run = {"model": str(tiny_model), "data": "absent.jsonl", "out": str(tmp_path / "o")}
    config = FinetuneConfig.from_table({"run": run, "parts": {"bottom": 3, "top": 3}})
    with pytest.raises(PartitionError):
        Finetuning(config)


@pytest.mark.parametrize("key", ["data", "evaluation"])
def test_examples_that_the_server_does_not_take(tmp_path, tiny_model, key):
    """They are found when the session opens, and not at some step."""
    server = TinyTrainingTrunk(tiny_model, Partition(1, 1), max_rows=20)
    servers = {"memory": lambda: MemoryChannel(server)}
    files = {name: tmp_path / f"{name}.txt" for name in ("data", "evaluation")}
    for name, path in files.items():
        path.write_text("a" * (30 if name == key else 10))
    run = {"model": str(tiny_model), "out": str(tmp_path / "o")}
    run |= {name: str(path) for name, path in files.items()}
    with pytest.raises(DataError, match=r"server takes 20; give data\.max_tokens"):
        Finetuning(FinetuneConfig.from_table({"run": run})).connect(servers)
    fitting = {"run": run, "data": {"max_tokens": 20, "too_long": "cut"}}
    Finetuning(FinetuneConfig.from_table(fitting)).connect(servers).close()
